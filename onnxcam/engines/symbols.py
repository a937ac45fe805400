"""Symbols: tensors of a graph under construction, used like arrays.

A symbol has a shape and arithmetic; each operation on it becomes a node of the graph. The axis of targets in front of
relevance arrays stands in the shape, and is left out of the graph where there is one target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from onnxcam.errors import OpenBatchError

if TYPE_CHECKING:
    from onnxcam.engines.recorder import Recorder


class _Unknown(str):
    """The length of an axis that is not known while recording: it has a name and no arithmetic."""

    __array_ufunc__ = None  # NumPy arrays leave the arithmetic to us

    def _refuse(self, _: object = None) -> Any:
        raise OpenBatchError(
            "this depends on how many images there are in a batch: fix the batch, or use --engine numpy"
        )

    __index__ = __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _refuse
    __sub__ = __rsub__ = __gt__ = __lt__ = __ge__ = __le__ = _refuse


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
        zeros: names of tensors of the user's graph; where an entry of one of them is 0, so is the entry here.
        factors: what this was recorded as the product of.
    """

    __slots__ = ("bare", "factors", "ops", "positive", "shape", "tensor", "zeros")
    __array_ufunc__ = None  # NumPy scalars leave the arithmetic to us

    def __init__(
        self, ops: Recorder, tensor: gs.Tensor, shape: Shape, bare: bool = False, positive: bool = False,
        zeros: frozenset[str] = frozenset(),
    ):  # fmt: skip
        self.ops, self.tensor, self.shape, self.bare, self.positive = ops, tensor, shape, bare, positive
        self.zeros = zeros
        self.factors: tuple[Symbol, ...] = ()

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


def replaced(shape: Shape, axis: int, size: Dim) -> Shape:
    """`shape` with another length along `axis`."""
    out = list(shape)
    out[axis] = size
    return tuple(out)
