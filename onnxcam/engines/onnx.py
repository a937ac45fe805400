"""The recorder engine: every primitive adds nodes to an ONNX graph instead of computing.

The same operators and rules that compute on arrays record, behind the user's graph, the graph of the explanation. A
`Symbol` stands for an array: it has a shape and arithmetic, and each operation on it becomes a node. Weights are not
stored twice: what is derived from a weight (its positive part, its transpose) is recorded too, and folded by ONNX
Runtime when the model is loaded.

The axis of targets in front of relevance arrays is there in the shapes and left out of the graph where there is one
target, so that a single target costs no reshaping.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.engines.window import Window
from onnxcam.errors import ModelError


class _Unknown(str):
    """The length of an axis that is not known while recording: it has a name and no arithmetic."""

    def _refuse(self, _: object) -> Any:
        raise ModelError("this depends on how many images there are in a batch: fix the batch, or use --engine numpy")

    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _refuse


BATCH = _Unknown("N")
Dim = int | str
Shape = tuple[Dim, ...]


class Symbol:
    """A tensor of the graph under construction, used like an array.

    Attributes:
        tensor: the graph-surgeon tensor.
        shape: what an array would have, the axis of targets included.
        bare: the axis of targets, of length 1, stands in `shape` but not in the tensor.
        positive: no entry can be negative.
    """

    __slots__ = ("bare", "ops", "positive", "shape", "tensor")
    __array_ufunc__ = None  # NumPy scalars leave the arithmetic to us

    def __init__(self, ops: RecorderOps, tensor: gs.Tensor, shape: Shape, bare: bool = False, positive: bool = False):
        self.ops, self.tensor, self.shape, self.bare, self.positive = ops, tensor, shape, bare, positive

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __add__(self, other: Any) -> Symbol:
        return self.ops.binary("Add", self, other)

    def __sub__(self, other: Any) -> Symbol:
        return self.ops.binary("Sub", self, other)

    def __mul__(self, other: Any) -> Symbol:
        return self.ops.binary("Mul", self, other)

    def __truediv__(self, other: Any) -> Symbol:
        return self.ops.binary("Div", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return self.ops.binary("Add", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return self.ops.binary("Sub", other, self)

    def __rmul__(self, other: Any) -> Symbol:
        return self.ops.binary("Mul", self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self.ops.binary("Div", other, self)

    def __neg__(self) -> Symbol:
        return self.ops.unary("Neg", self)

    def __gt__(self, other: Any) -> Symbol:
        return self.ops.binary("Greater", self, other, bool)

    def __lt__(self, other: Any) -> Symbol:
        return self.ops.binary("Less", self, other, bool)

    def __ge__(self, other: Any) -> Symbol:
        return self.ops.binary("GreaterOrEqual", self, other, bool)

    def __le__(self, other: Any) -> Symbol:
        return self.ops.binary("LessOrEqual", self, other, bool)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return self.ops.binary("Equal", self, other, bool)

    __hash__ = object.__hash__


def broadcast_shapes(a: Shape, b: Shape) -> Shape:
    """The shape two shapes broadcast to; a symbolic axis goes with 1 and with itself."""
    n = max(len(a), len(b))
    pairs = zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b, strict=True)
    return tuple(x if y == 1 else y for x, y in pairs)


class RecorderOps:
    """The primitives, recording into `graph`, whose default opset is `graph.opset` (17 or newer)."""

    dtype = "float32"
    tiny = 1e-20

    def __init__(self, graph: gs.Graph):
        self.graph = graph
        self._count = 0
        self._constants: dict[Any, gs.Constant] = {}
        self._shapes: dict[int, gs.Tensor] = {}
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
        symbol = Symbol(self, tensor, shape, positive=positive)
        if tensor.dtype is not None and np.dtype(tensor.dtype) != np.float32:
            return self.record("Cast", [symbol], shape, positive=positive, to=1)
        return symbol

    def unary(self, op: str, x: Symbol, positive: bool = False, **attrs: Any) -> Symbol:
        return self.record(op, [x], x.shape, bare=x.bare, positive=positive, **attrs)

    def binary(self, op: str, a: Any, b: Any, dtype: Any = np.float32) -> Symbol:
        a, b = self._lift(a), self._lift(b)
        shape = broadcast_shapes(a.shape, b.shape)
        # Where only one side has left its axis of targets out, the other must not have one that it keeps.
        bare = a.bare or b.bare
        positive = op in ("Add", "Mul", "Div") and a.positive and b.positive
        return self.record(op, [a, b], shape, bare=bare, positive=positive, dtype=dtype)

    def _lift(self, value: Any) -> Symbol:
        if isinstance(value, Symbol):
            return value
        array = np.asarray(value, np.float32)
        return Symbol(self, self.constant(array), array.shape, positive=bool((array >= 0).all()))

    # -- values --------------------------------------------------------------------------------------------------

    def asarray(self, value: np.ndarray) -> Symbol:
        return self._lift(np.asarray(value, np.float32))

    def to_host(self, value: Any) -> Any:
        raise ModelError("a recorded value has no numbers yet")

    def zeros(self, shape: Sequence[Dim]) -> Symbol:
        if all(isinstance(n, int) for n in shape):
            return self.asarray(np.zeros(tuple(shape), np.float32))  # type: ignore[arg-type]
        raise ModelError("zeros of an unknown batch cannot be recorded; use --engine numpy")

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
        return self.record("Where", [condition, a, b], shape, bare=bare, positive=a.positive and b.positive)

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
            raise ModelError("the axis of targets cannot be reduced while recording")
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
            raise ModelError(f"a reshape to {target} has two unknown axes: use --engine numpy, or fix the batch")
        sizes = np.array([n if isinstance(n, int) else -1 for n in target], np.int64)
        return self.record("Reshape", [x, sizes], shape, bare=bare, positive=x.positive)

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
            raise ModelError("repeating along an unknown batch cannot be recorded; use --engine numpy")
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
        return self.record("Slice", [x, *bounds], _replaced(x.shape, axis, count), bare=x.bare, positive=x.positive)

    def take(self, x: Symbol, index: np.ndarray, axis: int) -> Symbol:
        shape = _replaced(x.shape, axis, len(index))
        index = np.asarray(index, np.int64)
        return self.record("Gather", [x, index], shape, bare=x.bare, positive=x.positive, axis=axis)

    def scatter_add(self, r: Symbol, index: np.ndarray, axis: int, size: int) -> Symbol:
        """Adjoint of `take`, as a Pad where the places are consecutive, else as a few Gathers from `r` with a zero
        behind it, one for each repetition of the most frequent place: nothing races, every runtime has it."""
        index = np.asarray(index)
        shape = _replaced(r.shape, axis, size)
        if index.size and index[0] >= 0 and (np.diff(index) == 1).all():
            before, after = int(index[0]), size - int(index[-1]) - 1
            return self._padded(r, axis, before, after, shape)
        padded = self._padded(r, axis, 0, 1, _replaced(r.shape, axis, index.size + 1))
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
        lead = broadcast_shapes(a.shape[:-2], b.shape[:-2])
        shape = (*lead, a.shape[-2], b.shape[-1])
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

    # -- windows -------------------------------------------------------------------------------------------------

    def conv(self, x: Symbol, w: Symbol, window: Window, group: int = 1) -> Symbol:
        size = _sizes(x, window)
        if any(reader.op == "ConvTranspose" for reader in w.tensor.outputs):
            w = self._own_copy(w)
        folded, lead = self._folded(x, window)
        shape = (folded.shape[0] if not folded.bare else 1, w.shape[0], *window.output(size))
        y = self.record(
            "Conv", [folded, w], (*folded.shape[: -window.rank - 1], *shape[1:]), bare=folded.bare,
            positive=x.positive and w.positive, group=group, kernel_shape=list(window.kernel),
            strides=list(window.strides), dilations=list(window.dilations), pads=[*window.begin, *window.end],
        )  # fmt: skip
        return self._unfolded(y, lead, window)

    def conv_adjoint(self, r: Symbol, w: Symbol, window: Window, size: Sequence[int], group: int = 1) -> Symbol:
        folded, lead = self._folded(r, window)
        channels = int(w.shape[1]) * group
        positive = r.positive and w.positive
        shape = (*folded.shape[: -window.rank - 1], channels, *size)
        unit = all(s == 1 for s in window.strides)
        if unit and (group == 1 or (w.shape[1] == 1 and w.shape[0] == group)):
            y = self._conv_adjoint_as_conv(folded, w, window, shape, group, positive)
        elif self._has_phases(window, group):
            y = self._conv_adjoint_by_phases(folded, w, window, shape, positive)
        else:
            # The pads that a stride leaves uncovered at the end come back as output padding (spec 3.0).
            extra = [
                (n + b + e - x) % s
                for n, b, e, x, s in zip(size, window.begin, window.end, window.extent, window.strides, strict=True)
            ]
            y = self.record(
                "ConvTranspose", [folded, self._own_copy(w)], shape, bare=folded.bare, positive=positive, group=group,
                kernel_shape=list(window.kernel), strides=list(window.strides), dilations=list(window.dilations),
                pads=[*window.begin, *window.end], output_padding=extra,
            )  # fmt: skip
        return self._unfolded(y, lead, window)

    def _own_copy(self, w: Symbol) -> Symbol:
        """The same weight by a node that runtimes fold into memory of its own.

        OpenVINO mixes up the repacked weights of a Conv and a ConvTranspose that share memory, and sees through
        Identity, Mul by 1, Reshape and a Transpose back.
        """
        lowest = self._lift(np.finfo(np.float32).min)
        return self.record("Max", [w, lowest], w.shape, positive=w.positive)

    def _conv_adjoint_as_conv(
        self, r: Symbol, w: Symbol, window: Window, shape: Shape, group: int, positive: bool
    ) -> Symbol:
        """Stride 1: a Conv with the flipped weight, its channels swapped, beats ConvTranspose: two to three times for
        depthwise and 1x1 (spec 3.0), by a third for dense 3x3."""
        n = window.rank
        turned = w
        if prod(window.kernel) > 1:
            bounds = [np.full(n, v, np.int64) for v in (-1, -(2**31))]
            steps = np.full(n, -1, np.int64)
            turned = self.record("Slice", [w, *bounds, np.arange(2, 2 + n), steps], w.shape, positive=w.positive)
        if group == 1:
            turned = self.record(
                "Transpose", [turned], (w.shape[1], w.shape[0], *w.shape[2:]), positive=w.positive,
                perm=[1, 0, *range(2, 2 + n)],
            )  # fmt: skip
        begin = [x - 1 - b for x, b in zip(window.extent, window.begin, strict=True)]
        end = [x - 1 - e for x, e in zip(window.extent, window.end, strict=True)]
        crop = any(p < 0 for p in (*begin, *end))
        attrs: dict[str, Any] = {"group": group, "kernel_shape": list(window.kernel)}
        attrs["dilations"] = list(window.dilations)
        if not crop:
            return self.record(
                "Conv", [r, turned], shape, bare=r.bare, positive=positive, pads=[*begin, *end],
                strides=[1] * n, **attrs,
            )  # fmt: skip
        wide = tuple(int(s) + max(-b, 0) + max(-e, 0) for s, b, e in zip(shape[-n:], begin, end, strict=True))
        y = self.record(
            "Conv", [r, turned], (*shape[:-n], *wide), bare=r.bare, positive=positive, strides=[1] * n,
            pads=[max(p, 0) for p in (*begin, *end)], **attrs,
        )  # fmt: skip
        for i in range(n):
            start = max(-begin[i], 0)
            y = self.slice(y, i - n, start, start + int(shape[i - n]))
        return y

    @staticmethod
    def _has_phases(window: Window, group: int) -> bool:
        """Dense, over pictures, equal strides, no dilation: what DepthToSpace can put together."""
        return window.rank == 2 and group == 1 and len(set(window.strides)) == 1 and set(window.dilations) == {1}

    def _conv_adjoint_by_phases(self, r: Symbol, w: Symbol, window: Window, shape: Shape, positive: bool) -> Symbol:
        """Stride s: the cells of the input fall into s x s phases, and each phase sees its own part of the kernel, so
        that one Conv with s*s times the channels and DepthToSpace take the place of ConvTranspose, which runtimes are
        slow at. Cell i = p s + f - begin gets the sum over t of W[t s + f] r[p - t].
        """
        s = window.strides[0]
        m, c = int(w.shape[0]), int(w.shape[1])
        size = tuple(int(n) for n in shape[-2:])
        if set(window.kernel) == {1}:
            below = Window((1, 1), (1, 1), (1, 1), (0, 0), (0, 0))
            y = self._conv_adjoint_as_conv(r, w, below, (*shape[:-2], *r.shape[-2:]), 1, positive)
            y = self._spread(y, s)
        else:
            q = tuple(-(-k // s) for k in window.kernel)
            short = [n * s - k for n, k in zip(q, window.kernel, strict=True)]
            wide = (m, c, q[0] * s, q[1] * s)
            w = self.record("Pad", [w, np.array([0] * 6 + short, np.int64)], wide, positive=w.positive)
            parts = self._reshaped(w, (m, c, q[0], s, q[1], s), False)
            parts = self.record(
                "Transpose", [parts], (c, s, s, m, *q), positive=w.positive, perm=[1, 3, 5, 0, 2, 4]
            )  # fmt: skip
            parts = self._reshaped(parts, (c * s * s, m, *q), False)
            turned = self.record(
                "Slice",
                [parts, *(np.array(v, np.int64) for v in ([-1, -1], [-(2**31)] * 2, [2, 3], [-1, -1]))],
                parts.shape,
                positive=w.positive,
            )
            phases = [-(-(b + n) // s) for b, n in zip(window.begin, size, strict=True)]
            behind = [max(p - int(n), 0) for p, n in zip(phases, r.shape[-2:], strict=True)]
            high, long = (int(n) + e for n, e in zip(r.shape[-2:], behind, strict=True))
            y = self.record(
                "Conv", [r, turned], (*shape[:-3], c * s * s, high, long), bare=r.bare, positive=positive, group=1,
                kernel_shape=list(q), strides=[1, 1], dilations=[1, 1], pads=[n - 1 for n in q] + behind,
            )  # fmt: skip
            y = self.record(
                "DepthToSpace", [y], (*shape[:-2], high * s, long * s), bare=y.bare, positive=positive, blocksize=s,
                mode="CRD",
            )  # fmt: skip
        for i in (-2, -1):
            begin, have = window.begin[i], int(y.shape[i])
            if begin or have > size[i]:
                y = self.slice(y, i, begin, min(begin + size[i], have))
            y = self._padded(y, i, 0, size[i] - int(y.shape[i]), _replaced(y.shape, i, size[i]))
        return y

    def _spread(self, y: Symbol, s: int) -> Symbol:
        """Put s - 1 zeros behind every cell of the last two axes: by far the quickest as a ConvTranspose of ones."""
        c, h, w = (int(n) for n in y.shape[-3:])
        return self.record(
            "ConvTranspose", [y, np.ones((c, 1, 1, 1), np.float32)], (*y.shape[:-2], h * s, w * s), bare=y.bare,
            positive=y.positive, group=c, kernel_shape=[1, 1], strides=[s, s], output_padding=[s - 1, s - 1],
        )  # fmt: skip

    def window_sum(self, x: Symbol, window: Window) -> Symbol:
        folded, lead = self._folded(x, window)
        return self._unfolded(self._ones("Conv", folded, window, window.output(_sizes(x, window))), lead, window)

    def window_sum_adjoint(self, r: Symbol, window: Window, size: Sequence[int]) -> Symbol:
        folded, lead = self._folded(r, window)
        return self._unfolded(self._ones("ConvTranspose", folded, window, tuple(size)), lead, window)

    def _ones(self, op: str, x: Symbol, window: Window, size: Sequence[int]) -> Symbol:
        """Convolve every channel by itself with ones, or the adjoint of that."""
        channels = x.shape[-window.rank - 1]
        assert isinstance(channels, int)
        attrs: dict[str, Any] = {"pads": [*window.begin, *window.end]}
        if op == "ConvTranspose":
            attrs["output_padding"] = [
                (n + b + e - c) % s
                for n, b, e, c, s in zip(size, window.begin, window.end, window.extent, window.strides, strict=True)
            ]
        return self.record(
            op, [x, self._ones_weight((channels, 1, *window.kernel))], (*x.shape[: -window.rank], *size),
            bare=x.bare, positive=x.positive, group=channels, kernel_shape=list(window.kernel),
            strides=list(window.strides), dilations=list(window.dilations), **attrs,
        )  # fmt: skip

    def _ones_weight(self, shape: tuple[int, ...]) -> Symbol:
        """Ones that the file holds as a node, as a large window would hold many."""
        one = gs.Constant(self._name("Constant"), np.ones(1, np.float32))
        return self.record("ConstantOfShape", [np.array(shape, np.int64)], shape, positive=True, value=one)

    def window_max_adjoint(self, r: Symbol, x: Symbol, y: Symbol, window: Window) -> Symbol:
        """By the Indices of a MaxPool over the same input: they are flat over all axes, and the first maximum wins."""
        n = window.rank
        places = self.record(
            "MaxPool", [x], y.shape, dtype=np.int64, outputs=2, kernel_shape=list(window.kernel),
            strides=list(window.strides), dilations=list(window.dilations), pads=[*window.begin, *window.end],
        )  # fmt: skip
        places.tensor.inputs[0].outputs[0].dtype = np.float32
        flat = np.array([-1], np.int64)
        zeros = self.record("Mul", [x, self._lift(0.0)], x.shape)
        if r.bare:
            data = self.record("Reshape", [zeros, flat], ("flat",))
            index = self.record("Reshape", [places, flat], ("flat",), dtype=np.int64)
            updates = self.record("Reshape", [r, flat], ("flat",))
            scattered = self.record("ScatterElements", [data, index, updates], ("flat",), axis=0, reduction="add")
        else:
            targets = r.shape[0]
            assert isinstance(targets, int)
            row = np.array([1, -1], np.int64)
            repeat = np.array([targets, 1], np.int64)
            data = self.record("Expand", [self.record("Reshape", [zeros, row], (1, "flat")), repeat], (targets, "flat"))
            index = self.record("Reshape", [places, row], (1, "flat"), dtype=np.int64)
            index = self.record("Expand", [index, repeat], (targets, "flat"), dtype=np.int64)
            updates = self.record("Reshape", [r, np.array([targets, -1], np.int64)], (targets, "flat"))
            scattered = self.record(
                "ScatterElements", [data, index, updates], (targets, "flat"), axis=1, reduction="add"
            )
        shape = (r.shape[0], *x.shape)
        sizes = [d if isinstance(d, int) else -1 for d in (x.shape if r.bare else shape)]
        assert n >= 1
        return self.record("Reshape", [scattered, np.array(sizes, np.int64)], shape, bare=r.bare, positive=r.positive)

    def _folded(self, x: Symbol, window: Window) -> tuple[Symbol, Shape]:
        """`x` with all axes before the channels made one, as Conv wants it, and what they were."""
        lead = x.shape[: -window.rank - 1]
        if x.bare or len(lead) == 1:
            return x, lead
        batch: Dim = prod(lead) if all(isinstance(n, int) for n in lead) else BATCH
        sizes = [n if isinstance(n, int) else -1 for n in (batch, *x.shape[-window.rank - 1 :])]
        folded = self.record(
            "Reshape", [x, np.array(sizes, np.int64)], (batch, *x.shape[-window.rank - 1 :]), positive=x.positive
        )
        return folded, lead

    def _unfolded(self, y: Symbol, lead: Shape, window: Window) -> Symbol:
        if y.bare or len(lead) == 1:
            return y
        shape = (*lead, *y.shape[-window.rank - 1 :])
        sizes = [n if isinstance(n, int) else -1 for n in shape]
        return self.record("Reshape", [y, np.array(sizes, np.int64)], shape, positive=y.positive)


def _replaced(shape: Shape, axis: int, size: Dim) -> Shape:
    out = list(shape)
    out[axis] = size
    return tuple(out)


def _sizes(x: Symbol, window: Window) -> tuple[int, ...]:
    size = x.shape[-window.rank :]
    if not all(isinstance(n, int) for n in size):
        raise ModelError(f"spatial size {size} is not known: give the input's size")
    return size  # type: ignore[return-value]
