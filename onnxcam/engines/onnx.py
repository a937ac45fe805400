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

BATCH = "N"  # a batch axis whose length is not known while recording
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
    tiny = 1e-30

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
        """Known shapes give a scalar that broadcasts; nothing in the rules needs more."""
        if all(isinstance(n, int) for n in x.shape):
            return self.asarray(np.full(x.shape[1:] if x.bare else x.shape, value, np.float32))._as_bare(x)
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
