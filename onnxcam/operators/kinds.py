"""The kinds of operator: what the mathematics of an ONNX op can look like to a rule.

An operator is one of a few dataclasses. Each knows its exact vector-Jacobian product (`vjp`), which is all the gradient
needs, and exposes as much structure as rules need to share relevance: the linear map behind a Conv, the coefficients of
an Add, which operand of a product is the signal. `At` is a node at the moment the walk stands on it, with its values.

Conventions: `r` is an array of shape (T, *output.shape), T targets; shares are `(input index, array)` pairs with arrays
of shape (T, *input.shape); an input that gets nothing is left out, never given zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from onnxcam.graph import Node

Array = Any
Share = tuple[int, Array]
Relevances = Sequence[Array]  # one per output of a node; None where none arrived


class Values(Protocol):
    """The values of one forward pass, by tensor name."""

    ops: Any

    def array(self, tensor: str) -> Array:
        """The tensor as a float array of the engine."""

    def host(self, tensor: str) -> np.ndarray:
        """The tensor as it came from the session, on the host: for integer operands such as axes and indices."""

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The tensor's shape; while recording, an axis of unknown length is a string."""

    def precise(self, tensor: str) -> bool:
        """True where the forward pass gives the tensor as precisely as relevance is computed."""

    def derived(self, tensor: str, what: str, make: Callable[[Array], Array]) -> Array:
        """`make(array)`, computed once per tensor and `what`: the positive part of a weight, say."""


class At:
    """A node where the walk stands: its structure, and the values of its operands."""

    def __init__(self, node: Node, values: Values):
        self.node = node
        self.values = values
        self.ops = values.ops

    def input(self, i: int = 0) -> Array:
        return self.values.array(self.node.inputs[i])

    def output(self, i: int = 0) -> Array:
        return self.values.array(self.node.outputs[i])

    def host(self, i: int) -> Any:
        """Input `i` as a NumPy array on the host, None where it is omitted."""
        return self.values.host(self.node.inputs[i]) if self.node.has(i) else None

    def ints(self, i: int) -> Any:
        """Input `i` as a list of Python ints, None where it is omitted."""
        value = self.host(i)
        return None if value is None else [int(v) for v in np.ravel(value)]

    def shape(self, i: int = 0) -> tuple[int, ...]:
        return self.values.shape(self.node.inputs[i])

    def output_shape(self, i: int = 0) -> tuple[int, ...]:
        return self.values.shape(self.node.outputs[i])

    def carries(self, i: int) -> bool:
        """True where what the model sees flows in through input `i`, so that relevance can flow back."""
        return self.node.has(i) and self.node.inputs[i] in self.node.graph.data


@dataclass(frozen=True)
class LinearMap:
    """z = W x + b at one node, ready to be used by a rule.

    Attributes:
        x: the operand, (N, ...).
        weight: the weight's name for caching and its array; None where all coefficients are fixed and non-negative
            (an average), so that the map is its own positive part.
        bias: an array that broadcasts against z, or None.
        apply: (x, w) -> z without bias.
        adjoint: (r, w) -> array of shape (T, *x.shape).
        part: (what, make) -> the weight changed by `make`, cached under `what`.
        total: z + b as the forward pass found it; None where that is not known precisely.
    """

    ops: Any
    x: Array
    weight: Array | None
    bias: Array | None
    apply: Callable[[Array, Array | None], Array]
    adjoint: Callable[[Array, Array | None], Array]
    part: Callable[[str, Callable[[Array], Array]], Array | None]
    total: Callable[[], Array | None] = lambda: None


@dataclass(frozen=True)
class Linear:
    """A linear map of one operand with a weight: Conv, Gemm, MatMul by a constant, ConvTranspose.

    `apply(at, x, w)` and `adjoint(at, r, w)` are the bias-free map and its adjoint; `bias(at)` broadcasts against the
    output. `scale` multiplies the weight before any rule sees it, as signs and squares of the weight depend on it.
    """

    kind: ClassVar[str] = "linear"
    apply: Callable[[At, Array, Array], Array]
    adjoint: Callable[[At, Array, Array], Array]
    operand: int = 0
    weight: int = 1
    bias: Callable[[At], Array | None] = lambda at: None
    scale: float = 1.0

    def _scaled(self, w: Array) -> Array:
        return w if self.scale == 1 else w * self.scale

    def bind(self, at: At) -> LinearMap:
        name = at.node.inputs[self.weight]
        bias = self.bias(at)
        extra = following_constant(at)
        if extra is not None:
            bias = extra if bias is None else bias + extra
        return LinearMap(
            ops=at.ops,
            x=at.input(self.operand),
            weight=at.values.derived(name, f"times {self.scale}", self._scaled),
            bias=bias,
            apply=lambda x, w: self.apply(at, x, w),
            adjoint=lambda r, w: self.adjoint(at, r, w),
            part=lambda what, make: at.values.derived(
                name, f"{what}, times {self.scale}", lambda w: make(self._scaled(w))
            ),
            total=lambda: self._total(at, extra),
        )

    @staticmethod
    def _total(at: At, extra: Array | None) -> Array | None:
        if not at.values.precise(at.node.outputs[0]):
            return None
        return at.output() if extra is None else at.output() + extra

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return [(self.operand, self.adjoint(at, rs[0], self._scaled(at.input(self.weight))))]


@dataclass(frozen=True)
class Averaging:
    """A linear map with fixed coefficients that are not negative: pooling, means and sums over axes, interpolation.

    Norms and their like share as a sum does, of something else than the input: `amount(at)` says of what, |x|^p say,
    and `gradient(at, r)` is then the exact vector-Jacobian product, which otherwise is the adjoint.
    """

    kind: ClassVar[str] = "averaging"
    apply: Callable[[At, Array], Array]
    adjoint: Callable[[At, Array], Array]
    amount: Callable[[At], Array] = lambda at: at.input(0)
    gradient: Callable[[At, Array], Array] | None = None

    def bind(self, at: At) -> LinearMap:
        return LinearMap(
            ops=at.ops,
            x=self.amount(at),
            weight=None,
            bias=None,
            apply=lambda x, w: self.apply(at, x),
            adjoint=lambda r, w: self.adjoint(at, r),
            part=lambda what, make: None,
        )

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return [(0, (self.gradient or self.adjoint)(at, rs[0]))]


@dataclass(frozen=True)
class Additive:
    """y = sum of coefficient * operand over several tensors, which broadcast: Add, Sub, Sum, Mean."""

    kind: ClassVar[str] = "additive"
    coefficients: tuple[float, ...]

    def terms(self, at: At) -> list[tuple[int, Array]]:
        """The summands that can carry relevance, signed as they enter the sum: (input index, array)."""
        return [(i, at.input(i) * c) for i, c in enumerate(self.coefficients) if at.carries(i)]

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return [
            (i, at.ops.unbroadcast(rs[0] * c, at.shape(i))) for i, c in enumerate(self.coefficients) if at.carries(i)
        ]


@dataclass(frozen=True)
class Routing:
    """Moves, copies or selects entries: relevance and gradients go the same way back, and nothing is lost on it."""

    kind: ClassVar[str] = "routing"
    route: Callable[[At, Relevances], list[Share]]

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return self.route(at, rs)


@dataclass(frozen=True)
class Elementwise:
    """y_i = f(x_i) for operand 0; `derivative(at)` broadcasts against the output.

    `kind` is "activation", or "normalisation" for a per-channel scaling with fixed statistics.
    """

    derivative: Callable[[At], Array]
    kind: str = "activation"
    operand: int = 0

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return [(self.operand, at.ops.unbroadcast(rs[0] * self.derivative(at), at.shape(self.operand)))]


@dataclass(frozen=True)
class Coupled:
    """A map whose outputs share statistics of the input: softmax, local response normalisation."""

    kind: str
    product: Callable[[At, Array], Array]  # (at, r) -> vector-Jacobian product, same shape as r

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return [(0, self.product(at, rs[0]))]


@dataclass(frozen=True)
class Product:
    """A product or quotient of two tensors that both depend on the input.

    `signal` is the operand that carries what is seen where the other one gates or normalises it; None where neither
    can be told apart.
    """

    kind: ClassVar[str] = "product"
    partials: Callable[[At, Array], list[Share]]
    signal: int | None = None

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return self.partials(at, rs[0])


@dataclass(frozen=True)
class Statistic:
    """Carries no relevance and no gradient: shapes, comparisons, indices."""

    kind: ClassVar[str] = "statistic"

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return []


Operator = Linear | Averaging | Additive | Routing | Elementwise | Coupled | Product | Statistic


def following_constant(at: At) -> Array | None:
    """The constant that the only reader of this node adds to its output: a bias that the file writes as its own Add.

    None where the sum is larger than the output: what repeats the output is no bias of it.
    """
    node = at.node
    readers = node.graph.consumers(node.outputs[0])
    if len(readers) != 1 or readers[0].op_type != "Add" or node.outputs[0] in node.graph.outputs:
        return None
    add = readers[0]
    for i in (0, 1):
        if add.is_constant(i) and add.inputs[1 - i] == node.outputs[0]:
            constant, shape = at.values.array(add.inputs[i]), at.output_shape()
            repeats = any(n not in (1, m) for n, m in zip(constant.shape[::-1], shape[::-1], strict=False))
            return None if constant.ndim > len(shape) or repeats else constant
    return None
