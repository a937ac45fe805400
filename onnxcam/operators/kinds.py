"""The kinds of operator: what the mathematics of an ONNX op can look like to a rule.

An operator is one of a few dataclasses. Each knows its exact vector-Jacobian product (`vjp`), which is all the gradient
needs, and exposes as much structure as rules need to share relevance: the linear map behind a Conv, the coefficients of
an Add, which operand of a product is the signal. `At` is a node at the moment the walk stands on it, with its values.

Conventions: `r` is an array of shape (T, *output.shape), T targets; shares are `(input index, array)` pairs with arrays
of shape (T, *input.shape); an input that gets nothing is left out, never given zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

    def index(self, tensor: str) -> Any:
        """The tensor as whole numbers that point at entries: an array on the host where they are known, else a symbol
        of the engine. `ops` has the arithmetic on both."""

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

    def index(self, i: int) -> Any:
        """Input `i` as places of entries, which may be known only when the model runs."""
        return self.values.index(self.node.inputs[i])

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

    A weight or bias may depend on the input itself. Rules take it as it is, for it says how what is seen is weighed;
    the gradient goes to it too, by `others(at, r)`.
    """

    kind: ClassVar[str] = "linear"
    apply: Callable[[At, Array, Array], Array]
    adjoint: Callable[[At, Array, Array], Array]
    operand: int = 0
    weight: int = 1
    bias: Callable[[At], Array | None] = lambda at: None
    scale: float = 1.0
    others: Callable[[At, Array], list[Share]] = lambda at, r: []

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
        shares = self.others(at, rs[0])
        if at.carries(self.operand):
            shares.append((self.operand, self.adjoint(at, rs[0], self._scaled(at.input(self.weight)))))
        return shares


@dataclass(frozen=True)
class Averaging:
    """A linear map with fixed coefficients that are not negative: pooling, means and sums over axes, interpolation.

    Norms and their like share as a sum does, of something else than the input: `amount(at)` says of what, |x|^p say,
    and `gradient(at, r)` is then the exact vector-Jacobian product, which otherwise is the adjoint. What else the
    output depends on smoothly, where samples are taken, say, gets its gradient by `others(at, r)`, and no relevance.
    """

    kind: ClassVar[str] = "averaging"
    apply: Callable[[At, Array], Array]
    adjoint: Callable[[At, Array], Array]
    amount: Callable[[At], Array] = lambda at: at.input(0)
    gradient: Callable[[At, Array], Array] | None = None
    others: Callable[[At, Array], list[Share]] = lambda at, r: []

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
        own = [(0, (self.gradient or self.adjoint)(at, rs[0]))] if at.carries(0) else []
        return [*own, *self.others(at, rs[0])]


@dataclass(frozen=True)
class Additive:
    """y = sum of coefficient * operand over several tensors, which broadcast: Add, Sub, Sum, Mean.

    `shifts` are operands that only shift the others by a statistic of them, as a mean does that is subtracted: they get
    no relevance.
    """

    kind: ClassVar[str] = "additive"
    coefficients: tuple[float, ...]
    shifts: tuple[int, ...] = ()

    def terms(self, at: At) -> list[tuple[int, Array]]:
        """The summands that can carry relevance, signed as they enter the sum: (input index, array)."""
        carried = [i for i in range(len(self.coefficients)) if i not in self.shifts and at.carries(i)]
        return [(i, at.input(i) * self.coefficients[i]) for i in carried]

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
    """A map whose outputs share statistics of the input: softmax, local response normalisation.

    Where a scale or shift depends on the input too, the gradient goes to it by `others(at, r)`, relevance does not.

    `taylor` is the share of relevance by a Taylor expansion at the input, x times the product with r / y, in a form
    that holds where y vanishes.
    """

    kind: str
    product: Callable[[At, Array], Array]  # (at, r) -> vector-Jacobian product, same shape as r
    taylor: Callable[[At, Array], Array] | None = None
    others: Callable[[At, Array], list[Share]] = lambda at, r: []

    def vjp(self, at: At, rs: Relevances) -> list[Share]:
        return [*([(0, self.product(at, rs[0]))] if at.carries(0) else []), *self.others(at, rs[0])]


@dataclass(frozen=True)
class Product:
    """A product or quotient of two tensors that both depend on the input.

    `signal` is the operand that carries what is seen where the other one gates, mixes or normalises it; None where
    neither can be told apart. `gated` marks elementwise products of two tensors that may count as equals, `given` a
    bilinear map: `given(i)` is the linear map of operand `i` with the other one as its weight. Any other product
    belongs to its signal, whatever the rule.
    """

    kind: ClassVar[str] = "product"
    partials: Callable[[At, Array], list[Share]]
    signal: int | None = None
    gated: bool = False
    given: Callable[[int], Linear] | None = None

    def bind(self, at: At, operand: int) -> LinearMap:
        """The linear map of one operand of a bilinear product, the other one fixed.

        What a node of its own adds is no bias: a mask, or a table of relative positions. Weights that cannot be
        negative, as a softmax makes them, count as the coefficients of an average.
        """
        assert self.given is not None
        own = self.given(operand)
        f = replace(own.bind(at), bias=own.bias(at), total=lambda: Linear._total(at, None))
        weight = f.weight
        if at.ops.any_negative(weight):
            return f
        return replace(
            f,
            weight=None,
            apply=lambda x, _: f.apply(x, weight),
            adjoint=lambda r, _: f.adjoint(r, weight),
            part=lambda what, make: None,
        )

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

    A Reshape may stand between, as where tokens were rows of one matrix, if it keeps the last axis and the constant
    has no other. None where the sum is larger than the output: what repeats the output is no bias of it.
    """
    tensor = at.node.outputs[0]
    reader = _only_reader(at.node, tensor)
    reshape = reader if reader is not None and reader.op_type == "Reshape" and reader.inputs[0] == tensor else None
    if reshape is not None:
        tensor = reshape.outputs[0]
        reader = _only_reader(reshape, tensor)
    if reader is None or reader.op_type != "Add":
        return None
    for i in (0, 1):
        if reader.is_constant(i) and reader.inputs[1 - i] == tensor:
            constant, shape = at.values.array(reader.inputs[i]), at.output_shape()
            if reshape is not None:
                same = at.values.shape(tensor)[-1:] == shape[-1:] and all(n == 1 for n in constant.shape[:-1])
                constant = at.ops.shaped(constant, constant.shape[-1:]) if same else None
            if constant is None or constant.ndim > len(shape):
                return None
            repeats = any(n not in (1, m) for n, m in zip(constant.shape[::-1], shape[::-1], strict=False))
            return None if repeats else constant
    return None


def _only_reader(node: Node, tensor: str) -> Node | None:
    """The one node that reads `tensor`, where there is one and nobody else sees it."""
    readers = node.graph.consumers(tensor)
    return readers[0] if len(readers) == 1 and tensor not in node.graph.outputs else None
