"""The recorder: elementwise arithmetic, reductions and layout as nodes of an ONNX graph.

Weights are not stored twice: what is derived from a weight (its positive part, its transpose) is recorded too, and
folded by ONNX Runtime when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.engines.places import FEW, folds
from onnxcam.engines.recorded_places import RecordedPlaces
from onnxcam.engines.symbols import Dim, Shape, Symbol, broadcast_shapes, replaced
from onnxcam.errors import EngineError, OpenBatchError


class Recorder(RecordedPlaces):
    """The primitives but those of windows, recording into `graph`, whose default opset is 17 or newer."""

    dtype = "float32"
    tiny = 1e-20

    def __init__(self, graph: gs.Graph):
        self.graph = graph
        self._count = 0
        self._constants: dict[Any, gs.Constant] = {}
        self._biases: dict[tuple[str, int, int], Symbol] = {}
        self._taken = set(graph.tensors())

    # -- recording -----------------------------------------------------------------------------------------------

    def record(
        self, op: str, inputs: Sequence[Any], shape: Shape, *, bare: bool = False, positive: bool = False,
        dtype: Any = np.float32, outputs: int = 1, **attrs: Any,
    ) -> Symbol:  # fmt: skip
        """Add one node; inputs are Symbols, tensors or NumPy arrays. Returns its last output."""
        name = self._name(op)
        made = [gs.Variable(name if i == 0 else f"{name}_{i}", dtype=dtype) for i in range(outputs)]
        operands = [self._operand(i) for i in inputs]
        self.graph.nodes.append(gs.Node(op=op, name=name, inputs=operands, outputs=made, attrs=attrs))
        return Symbol(self, made[-1], shape, bare, positive)

    def _name(self, op: str) -> str:
        while True:
            name = f"onnxcam/{op}_{self._count}"
            self._count += 1
            if name not in self._taken:
                return name

    def _operand(self, value: Any) -> gs.Tensor:
        if isinstance(value, Symbol):
            return value.tensor
        return value if isinstance(value, gs.Tensor) else self.constant(np.asarray(value))

    def constant(self, value: np.ndarray) -> gs.Constant:
        """A constant of the graph; equal small ones are stored once."""
        key = (value.dtype.str, value.shape, value.tobytes()) if value.size <= 64 else object()
        if key not in self._constants:
            self._constants[key] = gs.Constant(self._name("Constant"), np.ascontiguousarray(value).reshape(value.shape))
        return self._constants[key]

    def tap(self, tensor: gs.Tensor, shape: Shape, positive: bool) -> Symbol:
        """A tensor of the user's graph as an array of float32."""
        symbol = Symbol(self, tensor, shape, positive=positive, zeros=frozenset([tensor.name]))
        if tensor.dtype is not None and np.dtype(tensor.dtype) != np.float32:
            return self.record("Cast", [symbol], shape, positive=positive, to=1)
        return symbol

    def unary(self, op: str, x: Symbol, positive: bool = False, **attrs: Any) -> Symbol:
        return self.record(op, [x], x.shape, bare=x.bare, positive=positive, **attrs)

    def binary(self, op: str, a: Any, b: Any, dtype: Any = np.float32) -> Symbol:
        if op == "Mul" and isinstance(b, int | float) and b == 1:
            return a
        a, b = self._lift(a), self._as_bias(b, a) if op == "Add" else self._lift(b)
        shape = broadcast_shapes(a.shape, b.shape)
        # Where only one side has left its axis of targets out, the other must not have one that it keeps.
        bare = a.bare or b.bare
        positive = op in ("Add", "Mul", "Div") and a.positive and b.positive
        made = self.record(op, [a, b], shape, bare=bare, positive=positive, dtype=dtype)
        if op == "Mul":
            made.zeros, made.factors = a.zeros | b.zeros, (a, b)
            self._state_shape(made)
        elif op in ("Add", "Sub", "Div"):
            made.zeros = a.zeros if op == "Div" else a.zeros & b.zeros
        return made

    def _lift(self, value: Any) -> Symbol:
        if isinstance(value, Symbol):
            return value
        array = np.asarray(value, np.float32)
        return Symbol(self, self.constant(array), array.shape, positive=bool((array >= 0).all()))

    def _as_bias(self, value: Any, summand: Any) -> Symbol:
        """What is added, in the form of a bias where it is a number and the summand a Conv's: ONNX Runtime then makes
        it the Conv's own."""
        number = self._lift(value)
        if number.shape or summand.bare or not summand.tensor.inputs or summand.tensor.inputs[0].op != "Conv":
            return number
        rank = len(summand.tensor.inputs[0].attrs.get("kernel_shape", ()))
        channels = summand.shape[-rank - 1]
        if not rank or not isinstance(channels, int):
            return number
        key = (number.tensor.name, channels, rank)
        if key not in self._biases:
            shape = (channels, *(1,) * rank)
            self._biases[key] = self.record(
                "Expand", [number, np.array(shape, np.int64)], shape, positive=number.positive
            )
        return self._biases[key]

    def _state_shape(self, product: Symbol) -> None:
        """Say in the file that a product has the shape of the user's tensor in it, where it has.

        ONNX Runtime multiplies in the layout of its convolutions where it sees that two shapes are one, and does not
        find out by itself behind a Reshape, where the batch is open.
        """
        for factor in product.factors:
            stated, shape = factor.tensor.shape, product.shape[product.bare :]
            if factor.zeros and stated and factor.shape == shape and all(stated):
                product.tensor.shape = list(stated)

    # -- values --------------------------------------------------------------------------------------------------

    def asarray(self, value: np.ndarray) -> Symbol:
        return self._lift(np.asarray(value, np.float32))

    def index_of(self, x: Symbol) -> Symbol:
        return self.record("Cast", [x], x.shape, dtype=np.int64, to=7)

    def to_host(self, value: Any) -> Any:
        raise EngineError("a recorded value has no numbers yet")

    def zeros(self, shape: Sequence[Dim]) -> Symbol:
        if all(isinstance(n, int) for n in shape):
            return self.asarray(np.zeros(tuple(shape), np.float32))  # type: ignore[arg-type]
        raise OpenBatchError("zeros of an unknown batch cannot be recorded: fix the batch, or use --engine numpy")

    def zeros_like(self, x: Symbol) -> Symbol:
        return self._filled(x, 0.0)

    def ones_like(self, x: Symbol) -> Symbol:
        return self._filled(x, 1.0)

    def _filled(self, x: Symbol, value: float) -> Symbol:
        shape = self.record("Shape", [x], (len(x.shape),), dtype=np.int64)
        tensor = gs.Constant(self._name("Constant"), np.array([value], np.float32))
        return self.record("ConstantOfShape", [shape], x.shape, bare=x.bare, positive=value >= 0, value=tensor)

    def where(self, condition: Symbol, a: Any, b: Any) -> Symbol:
        a, b = self._lift(a), self._lift(b)
        shape = broadcast_shapes(broadcast_shapes(condition.shape, a.shape), b.shape)
        bare = condition.bare or a.bare or b.bare
        made = self.record("Where", [condition, a, b], shape, bare=bare, positive=a.positive and b.positive)
        parts = [x.zeros for x in (a, b) if not _is_zero(x.tensor)]
        made.zeros = frozenset.intersection(*parts) if parts else frozenset()
        return made

    def stable_quotient(self, r: Symbol, z: Symbol, eps: float) -> Symbol:
        """r / (z + eps sign(z)), sign(0) = +1, in as few steps as what is known of `r` and `z` allows.

        Relevance that was recorded as z s gives s |z| / (|z| + eps). Where `r` is 0 wherever z is not positive, as
        behind a rectifier, z may be replaced by its positive part. Else a scaled Clip has the sign at half the cost of
        Less and Where.
        """
        rest = [other for one, other in zip(r.factors, r.factors[::-1], strict=True) if one.tensor is z.tensor]
        if rest:
            size = self.abs(z)
            return rest[0] * (size / (size + eps))
        rectified = self._rectified(z, r)
        if rectified is not None:
            return r / (rectified + eps)
        steep = self.binary("Add", self.binary("Mul", z, 1e30), eps)
        away = self.record("Clip", [steep, self._lift(-eps), self._lift(eps)], z.shape, bare=z.bare)
        return r / (z + away)

    def vanishes_below(self, r: Symbol, z: Symbol) -> bool:
        return z.positive or self._rectifier(z, r) is not None

    def _rectified(self, z: Symbol, r: Symbol) -> Symbol | None:
        """The positive part of `z`, where `r` is 0 wherever that is; None where that is not known."""
        if z.positive:
            return z
        reader = self._rectifier(z, r)
        if reader is None:
            return None
        return Symbol(self, reader.outputs[0], z.shape, positive=True) if reader.op == "Relu" else self.positive(z)

    @staticmethod
    def _rectifier(z: Symbol, r: Symbol) -> gs.Node | None:
        """The rectifier of `z`, in the user's graph, that `r` is 0 with."""
        for reader in z.tensor.outputs:
            if not reader.outputs or reader.outputs[0].name not in r.zeros:
                continue
            if reader.op == "Relu" or (reader.op == "Clip" and len(reader.inputs) > 1 and _is_zero(reader.inputs[1])):
                return reader
        return None

    def positive(self, x: Symbol) -> Symbol:
        return x if x.positive else self.unary("Relu", x, positive=True)

    def negative(self, x: Symbol) -> Symbol:
        return self.record("Min", [x, self._lift(0.0)], x.shape, bare=x.bare)

    def any_negative(self, x: Symbol) -> bool:
        """Whether an entry might be negative, as far as the graph tells."""
        return not x.positive

    def mask(self, condition: Symbol) -> Symbol:
        return self.record("Cast", [condition], condition.shape, bare=condition.bare, positive=True, to=1)

    def abs(self, x: Symbol) -> Symbol:
        return x if x.positive else self.unary("Abs", x, positive=True)

    def sign(self, x: Symbol) -> Symbol:
        return self.unary("Sign", x)

    def exp(self, x: Symbol) -> Symbol:
        return self.unary("Exp", x, positive=True)

    def log(self, x: Symbol) -> Symbol:
        return self.unary("Log", x)

    def sqrt(self, x: Symbol) -> Symbol:
        return self.unary("Sqrt", x, positive=True)

    def sin(self, x: Symbol) -> Symbol:
        return self.unary("Sin", x)

    def cos(self, x: Symbol) -> Symbol:
        return self.unary("Cos", x)

    def floor(self, x: Symbol) -> Symbol:
        return self.unary("Floor", x, positive=x.positive)

    def round(self, x: Symbol) -> Symbol:
        return self.unary("Round", x, positive=x.positive)

    def tanh(self, x: Symbol) -> Symbol:
        return self.unary("Tanh", x)

    def sigmoid(self, x: Symbol) -> Symbol:
        return self.unary("Sigmoid", x, positive=True)

    def power(self, x: Symbol, p: Any) -> Symbol:
        return self.binary("Pow", x, p)

    # -- reductions and layout -----------------------------------------------------------------------------------

    def sum(self, x: Symbol, axes: Sequence[int], keepdims: bool = False) -> Symbol:
        return self._reduce("ReduceSum", x, axes, keepdims, positive=x.positive)

    def mean(self, x: Symbol, axes: Sequence[int], keepdims: bool = False) -> Symbol:
        return self._reduce("ReduceMean", x, axes, keepdims, positive=x.positive)

    def prod(self, x: Symbol, axes: Sequence[int]) -> Symbol:
        return self._reduce("ReduceProd", x, axes, True, positive=x.positive)

    def min(self, x: Symbol, axes: Sequence[int]) -> Symbol:
        return self._reduce("ReduceMin", x, axes, True, positive=x.positive)

    def max(self, x: Symbol, axes: Sequence[int]) -> Symbol:
        return self._reduce("ReduceMax", x, axes, True, positive=x.positive)

    def _reduce(self, op: str, x: Symbol, axes: Sequence[int], keepdims: bool, positive: bool) -> Symbol:
        """Axes may count from either end; the axis of targets is reduced only where it is in the tensor."""
        if not axes:
            return x
        from_end = sorted(a if a < 0 else a - len(x.shape) for a in axes)
        shape = tuple(
            1 if i - len(x.shape) in from_end else n
            for i, n in enumerate(x.shape)
            if keepdims or i - len(x.shape) not in from_end
        )
        if x.bare and from_end[0] == -len(x.shape):
            raise EngineError("the axis of targets cannot be reduced while recording")
        if self.graph.opset >= (13 if op == "ReduceSum" else 18):
            return self.record(
                op, [x, np.array(from_end, np.int64)], shape, bare=x.bare, positive=positive, keepdims=int(keepdims)
            )
        return self.record(op, [x], shape, bare=x.bare, positive=positive, axes=from_end, keepdims=int(keepdims))

    def reshape(self, r: Symbol, shape: Sequence[Dim]) -> Symbol:
        return self._reshaped(r, (r.shape[0], *shape), r.bare)

    def shaped(self, x: Symbol, shape: Sequence[Dim]) -> Symbol:
        return self._reshaped(x, tuple(shape), False)

    def _reshaped(self, x: Symbol, shape: Shape, bare: bool) -> Symbol:
        if -1 in shape:
            rest = prod(n for n in shape if isinstance(n, int) and n != -1)
            total = prod(n for n in x.shape if isinstance(n, int))
            shape = tuple(total // rest if n == -1 else n for n in shape)
        if shape == x.shape and bare == x.bare:
            return x
        target = shape[1:] if bare else shape
        unknown = [i for i, n in enumerate(target) if not isinstance(n, int)]
        if len(unknown) > 1:
            raise OpenBatchError(f"a reshape to {target} has two unknown axes: use --engine numpy, or fix the batch")
        sizes = np.array([n if isinstance(n, int) else -1 for n in target], np.int64)
        return self.record("Reshape", [x, sizes], shape, bare=bare, positive=x.positive)

    def lifted(self, x: Symbol) -> Symbol:
        return Symbol(self, x.tensor, (1, *x.shape), bare=True, positive=x.positive, zeros=x.zeros)

    def lowered(self, r: Symbol) -> Symbol:
        assert r.bare
        return Symbol(self, r.tensor, r.shape[1:], positive=r.positive, zeros=r.zeros)

    def by_image(self, r: Symbol, images: Dim) -> Symbol:
        """(T, N*k, ...) as (T, N, k*...); how many images there are is asked of the graph's inputs when it runs."""
        if isinstance(images, int):
            return self._reshaped(r, (r.shape[0], images, -1), r.bare)
        batch = next(t for t in self.graph.inputs if t.shape and isinstance(t.shape[0], str))
        whole = self.record("Shape", [batch], (len(batch.shape),), dtype=np.int64)
        count = self.record("Gather", [whole, np.array([0], np.int64)], (1,), dtype=np.int64, axis=0)
        lead = [] if r.bare else [np.array([r.shape[0]], np.int64)]
        target = self.record("Concat", [*lead, count, np.array([-1], np.int64)], (3 - r.bare,), dtype=np.int64, axis=0)
        return self.record("Reshape", [r, target], (r.shape[0], images, "rest"), bare=r.bare, positive=r.positive)

    def permute(self, r: Symbol, perm: Sequence[int]) -> Symbol:
        shape = (r.shape[0], *(r.shape[1 + p] for p in perm))
        order = list(perm) if r.bare else [0, *(p + 1 for p in perm)]
        return self.record("Transpose", [r], shape, bare=r.bare, positive=r.positive, perm=order)

    def expand(self, r: Symbol, shape: Sequence[Dim]) -> Symbol:
        """The batch is there already or comes from what the result is combined with; only known axes are repeated."""
        full = (r.shape[0], *shape)
        short = len(full) - len(r.shape)
        if short:
            r = self._reshaped(r, (r.shape[0], *(1,) * short, *r.shape[1:]), r.bare)
        if r.shape == full:
            return r
        if any(a == 1 and not isinstance(b, int) for a, b in zip(r.shape, full, strict=True)):
            raise OpenBatchError("repeating along an unknown batch cannot be recorded: fix it, or use --engine numpy")
        sizes = [n if isinstance(n, int) else 1 for n in (shape if r.bare else full)]
        return self.record("Expand", [r, np.array(sizes, np.int64)], full, bare=r.bare, positive=r.positive)

    def unbroadcast(self, r: Symbol, shape: Sequence[Dim]) -> Symbol:
        if tuple(r.shape[1:]) == tuple(shape):
            return r
        extra = len(r.shape) - 1 - len(shape)
        rank = len(r.shape)
        r = self.sum(r, tuple(i - rank for i in range(1, 1 + extra)))
        n = len(shape)
        repeated = tuple(i - n for i, size in enumerate(shape) if size == 1 and r.shape[i + 1] != 1)
        return self.sum(r, repeated, keepdims=True)

    def concat(self, arrays: Sequence[Symbol], axis: int) -> Symbol:
        shape = list(arrays[0].shape)
        sizes = [a.shape[axis] for a in arrays]
        shape[axis] = sum(n for n in sizes if isinstance(n, int))
        bare = any(a.bare for a in arrays)
        return self.record(
            "Concat", arrays, tuple(shape), bare=bare, positive=all(a.positive for a in arrays), axis=axis
        )

    def slice(self, x: Symbol, axis: int, start: int, stop: int, step: int = 1) -> Symbol:
        size = x.shape[axis]
        assert isinstance(size, int)
        count = len(range(*slice(start, stop, step).indices(size)))
        if count == size and step == 1:
            return x
        bounds = [np.array([v], np.int64) for v in (start, stop, axis, step)]
        return self.record("Slice", [x, *bounds], replaced(x.shape, axis, count), bare=x.bare, positive=x.positive)

    def take(self, x: Symbol, index: np.ndarray | Symbol, axis: int) -> Symbol:
        if not isinstance(index, Symbol):
            index = np.asarray(index, np.int64)
        shape = replaced(x.shape, axis, index.shape[0])
        return self.record("Gather", [x, index], shape, bare=x.bare, positive=x.positive, axis=axis)

    def scatter_add(self, r: Symbol, index: np.ndarray | Symbol, axis: int, size: int) -> Symbol:
        """Adjoint of `take`, as a Pad where the places are consecutive, else as a few Gathers from `r` with a zero
        behind it, one for each repetition of the most frequent place: nothing races, every runtime has it. Places that
        only the running model knows become rows of zeros and ones, and the adding a MatMul with them."""
        if isinstance(index, Symbol):
            column = self._int("Unsqueeze", [index, np.array([-1], np.int64)], (index.shape[0], 1))
            hit = self.record("Equal", [column, np.arange(size)], (index.shape[0], size), dtype=bool)
            return self.along(r, self.swap(self.mask(hit)), axis)
        index = np.asarray(index)
        shape = replaced(r.shape, axis, size)
        if index.size and index[0] >= 0 and (np.diff(index) == 1).all():
            before, after = int(index[0]), size - int(index[-1]) - 1
            return self._padded(r, axis, before, after, shape)
        if np.unique(index, return_counts=True)[1].max(initial=0) > FEW:
            rounds, index = folds(index)
            for one, other in rounds:
                padded = self._padded(r, axis, 0, 1, replaced(r.shape, axis, int(r.shape[axis]) + 1))
                r = self.take(padded, one, axis) + self.take(padded, other, axis)
        padded = self._padded(r, axis, 0, 1, replaced(r.shape, axis, index.size + 1))
        out: Symbol | None = None
        positions = np.flatnonzero(index >= 0)
        while positions.size or out is None:
            places, first = np.unique(index[positions], return_index=True)
            source = np.full(size, index.size)
            source[places] = positions[first]
            part = self.take(padded, source, axis)
            out = part if out is None else out + part
            positions = np.delete(positions, first)
        return out

    def _padded(self, r: Symbol, axis: int, before: int, after: int, shape: Shape) -> Symbol:
        if not before and not after:
            return r
        rank = len(r.shape) - r.bare
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + axis], pads[2 * rank + axis] = before, after
        return self.record("Pad", [r, pads], shape, bare=r.bare, positive=r.positive)

    def matmul(self, a: Symbol, b: Symbol) -> Symbol:
        if len(b.shape) == 1:
            shape = a.shape[:-1]
        elif len(a.shape) == 1:
            shape = (*b.shape[:-2], b.shape[-1])
        else:
            shape = (*broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        return self.record("MatMul", [a, b], shape, bare=a.bare or b.bare, positive=a.positive and b.positive)

    def swap(self, a: Symbol) -> Symbol:
        rank = len(a.shape) - a.bare
        shape = (*a.shape[:-2], a.shape[-1], a.shape[-2])
        perm = [*range(rank - 2), rank - 1, rank - 2]
        return self.record("Transpose", [a], shape, bare=a.bare, positive=a.positive, perm=perm)

    def along(self, x: Symbol, matrix: Symbol, axis: int) -> Symbol:
        if axis == -1:
            return self.matmul(x, self.swap(matrix))
        if axis == -2:
            return self.matmul(matrix, x)
        rank = len(x.shape) - x.bare
        order = list(range(rank))
        order[axis], order[-1] = order[-1], order[axis]
        swapped = list(x.shape)
        swapped[axis], swapped[-1] = swapped[-1], swapped[axis]
        moved = self.record("Transpose", [x], tuple(swapped), bare=x.bare, positive=x.positive, perm=order)
        moved = self.matmul(moved, self.swap(matrix))
        back = list(moved.shape)
        back[axis], back[-1] = back[-1], back[axis]
        return self.record("Transpose", [moved], tuple(back), bare=x.bare, positive=moved.positive, perm=order)


def _is_zero(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and not np.any(tensor.values)
