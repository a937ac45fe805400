"""LRP rules: how a linear map shares the relevance of its output among its inputs.

All rules are one kernel with different terms. A term is a pair (operand x', weight W'), each the original or a part of
it, and stands for the contributions x'_i W'_ij. The kernel adds the terms up to the denominator, divides, and carries
the quotient back through the same terms (spec 2.0, 2.4):

    z_j = sum over terms of (W' x')_j          s_j = R_j / (z_j + bias share, stabilised)
    R_i = sum over terms of x'_i (W'^T s)_i

So a rule is its list of terms and its bias policy: "ignore" leaves the bias out of the denominator, "absorb" lets the
bias take its share by sign, as zennit does, "full" adds it whole. Relevance that a bias takes, or that a vanishing
denominator drops, is lost on purpose and shows in the conservation check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from onnxcam.operators.kinds import (
    Additive,
    Array,
    At,
    Averaging,
    Coupled,
    Linear,
    LinearMap,
    Operator,
    Product,
    Relevances,
    Share,
)

Bias = Literal["ignore", "absorb", "full"]
Term = tuple[Array, Array | None]


def quotient(ops: Any, r: Array, z: Array, eps: float, sign: int = 0) -> Array:
    """r / z, with z pushed away from zero by `eps` in its own direction (sign(0) = +1, spec 2.2).

    `sign` is +1 or -1 where z is a sum of contributions that all have that sign: then a vanishing z means that there is
    nothing to share, and any finite quotient will do. Without an `eps` a vanishing z of mixed sign drops its relevance.
    """
    if sign:
        return r / (z + sign * max(eps, ops.tiny))
    if eps:
        return ops.stable_quotient(r, z, eps)
    alive = ops.abs(z) > ops.tiny
    return ops.where(alive, r / ops.where(alive, z, 1.0), 0.0)


def carry_back(f: LinearMap, s: Array, terms: Sequence[Term]) -> Array:
    """Sum over terms of x' * (W'^T s)."""
    parts = [x * f.adjoint(s, w) for x, w in terms]
    return sum(parts[1:], parts[0])


def forward(f: LinearMap, terms: Sequence[Term]) -> Array:
    parts = [f.apply(x, w) for x, w in terms]
    return sum(parts[1:], parts[0])


def share(f: LinearMap, r: Array, terms: Sequence[Term], bias: Array | None, eps: float, sign: int = 0) -> Array:
    """The kernel: relevance of the operand of `f`, shape (T, *x.shape). `sign` as for `quotient`."""
    z = forward(f, terms)
    return carry_back(f, quotient(f.ops, r, z if bias is None else z + bias, eps, sign), terms)


def outcome(f: LinearMap, bias: Bias) -> Array:
    """W x, with the bias unless it is ignored: taken from the forward pass where that is precise enough."""
    total = f.total()
    if total is None:
        z = f.apply(f.x, f.weight)
        return z if bias == "ignore" or f.bias is None else z + f.bias
    return total - f.bias if bias == "ignore" and f.bias is not None else total


def same_sign(f: LinearMap) -> list[Term]:
    """The terms of the positive contributions: x+ W+ and x- W-.

    Fixed coefficients are their own positive part and have no negative one. A term is left out where it is empty: no
    weight is split, nor anything computed, for entries that are not there.
    """
    if not f.ops.any_negative(f.x):
        return [(f.x, _positive(f))]
    terms = [(f.ops.positive(f.x), _positive(f))]
    return terms if f.weight is None else [*terms, (f.ops.negative(f.x), _negative(f))]


def opposite_sign(f: LinearMap) -> list[Term]:
    """The terms of the negative contributions: x+ W- and x- W+."""
    if not f.ops.any_negative(f.x):
        return [] if f.weight is None else [(f.x, _negative(f))]
    terms = [(f.ops.negative(f.x), _positive(f))]
    return terms if f.weight is None else [(f.ops.positive(f.x), _negative(f)), *terms]


def _positive(f: LinearMap) -> Array | None:
    return None if f.weight is None else f.part("positive", f.ops.positive)


def _negative(f: LinearMap) -> Array | None:
    return None if f.weight is None else f.part("negative", f.ops.negative)


class LinearRule:
    """A rule for linear and averaging operators: `share(f, r)` says how `f` hands down `r`."""

    def share(self, f: LinearMap, r: Array) -> Array:
        raise NotImplementedError

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        assert isinstance(operator, Linear | Averaging)
        operand = operator.operand if isinstance(operator, Linear) else 0
        return [(operand, self.share(operator.bind(at), rs[0]))]


@dataclass(frozen=True)
class Epsilon(LinearRule):
    """R_i = x_i W^T (R / (z + b + eps sign)): LRP-epsilon, and LRP-0 where `eps` is 0 (Bach et al. 2015)."""

    eps: float = 1e-9
    bias: Bias = "full"

    def share(self, f: LinearMap, r: Array) -> Array:
        return carry_back(f, quotient(f.ops, r, outcome(f, self.bias), self.eps), [(f.x, f.weight)])


@dataclass(frozen=True)
class ZPlus(LinearRule):
    """Only positive contributions share: x+ W+ + x- W- (Montavon et al. 2017; alpha 1, beta 0)."""

    bias: Bias = "ignore"
    eps: float = 0.0

    def share(self, f: LinearMap, r: Array) -> Array:
        bias = _bias_part(f, self.bias, positive=True)
        return share(f, r, same_sign(f), bias, self.eps, _sign(f, self.bias))


@dataclass(frozen=True)
class SameSign(LinearRule):
    """Only contributions of the sign of the output share: z-plus where it is positive, its mirror image elsewhere.

    For signed values. Where a sum is close to zero because its summands cancel, shares in proportion to them explode;
    and where an average is negative because all its values are, z-plus drops all that it received. Of these, none is
    negative or larger than the whole, and nothing is lost.
    """

    eps: float = 0.0

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        if not isinstance(operator, Additive):
            return super().__call__(at, operator, rs)
        ops, terms, r = at.ops, operator.terms(at), rs[0]
        if len(terms) == 1:
            return [(terms[0][0], ops.unbroadcast(r, at.shape(terms[0][0])))]
        positive = sum((a for _, a in terms[1:]), terms[0][1]) > 0
        parts = [ops.where(positive, ops.positive(a), ops.positive(-a)) for _, a in terms]
        s = quotient(ops, r, sum(parts[1:], parts[0]), self.eps, 1)
        return [(i, ops.unbroadcast(part * s, at.shape(i))) for (i, _), part in zip(terms, parts, strict=True)]

    def share(self, f: LinearMap, r: Array) -> Array:
        ops, negative = f.ops, opposite_sign(f)
        if not negative:
            return share(f, r, same_sign(f), None, self.eps, 1)
        positive = outcome(f, "ignore") > 0
        return share(f, ops.where(positive, r, 0.0), same_sign(f), None, self.eps, 1) + share(
            f, ops.where(positive, 0.0, r), negative, None, self.eps, -1
        )


@dataclass(frozen=True)
class AlphaBeta(LinearRule):
    """alpha times the shares of the positive contributions minus beta times those of the negative ones (Bach 2015).

    alpha - beta = 1. With `bias="full"` the whole bias stands in both denominators, as iNNvestigate has it.
    """

    alpha: float = 2.0
    beta: float = 1.0
    bias: Bias = "absorb"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(f"alpha-beta needs alpha - beta = 1 and both >= 0, not {self.alpha} and {self.beta}")

    def share(self, f: LinearMap, r: Array) -> Array:
        sign = _sign(f, self.bias)
        out = self.alpha * share(f, r, same_sign(f), _bias_part(f, self.bias, positive=True), self.eps, sign)
        negative = opposite_sign(f)
        if self.beta and negative:
            bias = _bias_part(f, self.bias, positive=False)
            out = out - self.beta * share(f, r, negative, bias, self.eps, -sign)
        return out


@dataclass(frozen=True)
class Gamma(LinearRule):
    """Generalised gamma: contributions of the sign of the output count 1 + gamma fold (Andeol et al. 2021; spec 2.0).

    Where z + b is positive the positive contributions are favoured, where it is negative the negative ones.
    """

    gamma: float = 0.25
    bias: Bias = "absorb"
    eps: float = 1e-6

    def share(self, f: LinearMap, r: Array) -> Array:
        ops, total = f.ops, outcome(f, self.bias)
        if ops.vanishes_below(r, total):  # as behind a rectifier
            return self._of_sign(f, r, positive=True)
        above, below = (ops.where(sign, r, 0.0) for sign in (total > 0, total < 0))
        return self._of_sign(f, above, positive=True) + self._of_sign(f, below, positive=False)

    def _of_sign(self, f: LinearMap, r: Array, positive: bool) -> Array:
        """What outputs of one sign hand down: x W + gamma times the terms of that sign, x+ and x- apart."""
        ops = f.ops
        terms = [self._term(f, ops.positive(f.x), positive)]
        if ops.any_negative(f.x):
            terms.append(self._term(f, ops.negative(f.x), not positive))
        bias = None if self.bias == "ignore" else f.bias
        if self.bias == "absorb" and bias is not None:
            bias = bias + self.gamma * (ops.positive if positive else ops.negative)(bias)
        return share(f, r, terms, bias, self.eps)

    def _term(self, f: LinearMap, x: Array, positive: bool) -> Term:
        """(x, W + gamma W+) or (x, W + gamma W-); fixed coefficients are their own positive part."""
        if f.weight is None:
            return (x * (1 + self.gamma) if positive else x), None
        part = f.ops.positive if positive else f.ops.negative
        sign = "positive" if positive else "negative"
        return x, f.part(f"with {self.gamma} of its {sign} part", lambda w: w + self.gamma * part(w))


@dataclass(frozen=True)
class ByKernel(LinearRule):
    """One rule for maps within a cell (1x1 kernels, dense layers), another for those that look at several cells."""

    within: LinearRule
    across: LinearRule

    def share(self, f: LinearMap, r: Array) -> Array:
        kernel = (0,) if f.weight is None else f.weight.shape[2:]
        rule = self.within if all(n == 1 for n in kernel) else self.across
        return rule.share(f, r)


@dataclass(frozen=True)
class Absolute(LinearRule):
    """Shares by the sizes of contributions, |x| |W|, whatever their signs: the first step of RAP (Nam et al. 2020)."""

    eps: float = 0.0

    def share(self, f: LinearMap, r: Array) -> Array:
        size = None if f.weight is None else f.part("size", f.ops.abs)
        return share(f, r, [(f.ops.abs(f.x), size)], None, self.eps, 1)


@dataclass(frozen=True)
class Relative(LinearRule):
    """RAP: contributions that count for little turn negative, and the sum is kept (Nam et al. 2020).

    Positive relevance is shared by the positive contributions, negative relevance by the sizes of the negative ones,
    and both once more by the sizes of the negative ones as a part of all; then every input that got anything gives back
    the same amount, so that what came is what goes. With inputs that are not negative this is the authors' code for
    convolutions (theirs for dense layers hands negative relevance to the positive contributions, which we do not).
    """

    def share(self, f: LinearMap, r: Array) -> Array:
        ops, same, opposite = f.ops, same_sign(f), opposite_sign(f)
        active = forward(f, same)
        out = carry_back(f, quotient(ops, ops.positive(r), active, 0.0, 1), same)
        if opposite:
            inhibiting = -forward(f, opposite)
            s = quotient(ops, r, active + inhibiting, 0.0, 1) + quotient(ops, ops.negative(r), inhibiting, 0.0, 1)
            out = out - carry_back(f, s, opposite)
        reached = ops.mask(ops.abs(out) > 0)
        excess = _total(ops, out) - _total(ops, r)
        each = excess / (_total(ops, reached) + ops.tiny)
        return out - reached * ops.reshape(each, (out.shape[1], *(1,) * (out.ndim - 2)))


def _total(ops: Any, r: Array) -> Array:
    """(T, N, ...) summed for each target and image."""
    return ops.sum(r, tuple(range(2 - r.ndim, 0)))


@dataclass(frozen=True)
class WSquare(LinearRule):
    """Shares by squared weights, whatever the input is: for unbounded inputs (Montavon et al. 2017)."""

    bias: Bias = "ignore"
    eps: float = 0.0

    def share(self, f: LinearMap, r: Array) -> Array:
        squared = None if f.weight is None else f.part("squared", lambda w: w * w)
        bias = None if self.bias == "ignore" or f.bias is None else f.bias * f.bias
        return share(f, r, [(f.ops.ones_like(f.x), squared)], bias, self.eps)


@dataclass(frozen=True)
class Flat(LinearRule):
    """Shares evenly among all inputs of a unit (Lapuschkin et al. 2019)."""

    bias: Bias = "ignore"
    eps: float = 0.0

    def share(self, f: LinearMap, r: Array) -> Array:
        even = None if f.weight is None else f.part("ones", f.ops.ones_like)
        bias = None if self.bias == "ignore" or f.bias is None else f.ops.ones_like(f.bias)
        return share(f, r, [(f.ops.ones_like(f.x), even)], bias, self.eps)


@dataclass(frozen=True)
class ZBox(LinearRule):
    """For inputs known to lie between `low` and `high`: contributions x W - low W+ - high W- (Montavon et al. 2017).

    `low` and `high` broadcast against the input, in the units of the input (normalised pixels); `boxes` has such pairs
    by the name of the tensor, where operators see different ones. The bias cancels.
    """

    low: Any = None
    high: Any = None
    eps: float = 1e-6
    boxes: Mapping[str, tuple[Any, Any]] | None = field(default=None, repr=False)

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        assert isinstance(operator, Linear | Averaging)
        seen = at.node.inputs[operator.operand if isinstance(operator, Linear) else 0]
        if self.boxes is None or seen not in self.boxes:
            return super().__call__(at, operator, rs)
        low, high = self.boxes[seen]
        return replace(self, low=low, high=high, boxes=None)(at, operator, rs)

    def share(self, f: LinearMap, r: Array) -> Array:
        ops = f.ops
        if self.low is None or self.high is None:
            raise ValueError("z-box needs the range of the input: low and high")
        low, high = (ops.zeros_like(f.x) + ops.asarray(np.asarray(v)) for v in (self.low, self.high))
        if f.weight is None:
            return share(f, r, [(f.x - low, None)], None, self.eps)
        return share(f, r, [(f.x, f.weight), (-low, _positive(f)), (-high, _negative(f))], None, self.eps)


def _bias_part(f: LinearMap, policy: Bias, positive: bool) -> Array | None:
    if policy == "ignore" or f.bias is None:
        return None
    if policy == "full":
        return f.bias
    return f.ops.positive(f.bias) if positive else f.ops.negative(f.bias)


def _sign(f: LinearMap, bias: Bias) -> int:
    """+1 where the denominator of positive contributions is sure to be one: a whole bias may have either sign."""
    return 0 if bias == "full" and f.bias is not None else 1


@dataclass(frozen=True)
class Opposite(LinearRule):
    """Only negative contributions share: z-plus with the weights negated (the dual of CLRP2, Gu et al. 2018)."""

    eps: float = 0.0

    def share(self, f: LinearMap, r: Array) -> Array:
        terms = opposite_sign(f)
        return share(f, r, terms, None, self.eps, -1) if terms else f.ops.zeros_like(f.adjoint(r, f.weight))


# -- rules for the other kinds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vjp:
    """The exact vector-Jacobian product: the gradient, for any kind."""

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        return operator.vjp(at, rs)


@dataclass(frozen=True)
class Guided:
    """The gradient, of which rectifiers let only positive values back: guided backpropagation (Springenberg 2015).

    `forward` False also lets them back where the rectifier was shut on the way forward: DeconvNet (Zeiler and Fergus
    2014). Rectifiers are Relu, and Clip from 0 up.
    """

    forward: bool = True

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        if not _rectifies(at):
            return operator.vjp(at, rs)
        r = at.ops.positive(rs[0])
        return operator.vjp(at, [r]) if self.forward else [(0, r)]


def _rectifies(at: At) -> bool:
    if at.node.op_type == "Relu":
        return True
    if at.node.op_type != "Clip":
        return False
    low = at.node.attr("min") if at.node.opset < 11 else at.node.constant(1)
    return low is not None and not np.any(np.asarray(low))


@dataclass(frozen=True)
class Pass:
    """Relevance stays where it is; an operand that was broadcast gets the sum."""

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        operand = getattr(operator, "operand", 0)
        return [(operand, at.ops.unbroadcast(rs[0], at.shape(operand)))]


@dataclass(frozen=True)
class Proportional:
    """A sum shares among its summands in proportion to their signed values, R_a = a / (a + b) R (spec 3.6).

    Where the summands cancel the proportion explodes. `eps` stabilises the denominator as the epsilon rule does; with
    `guard`, cells where a summand exceeds 1/guard times the sum share evenly instead, and the last summand takes what
    the others leave, so that nothing is lost. A constant summand takes nothing.
    """

    eps: float = 0.0
    guard: float = 0.0

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        assert isinstance(operator, Additive)
        ops, terms, r = at.ops, operator.terms(at), rs[0]
        if len(terms) < 2:
            return [(i, ops.unbroadcast(r, at.shape(i))) for i, _ in terms]
        whole = len(terms) == len(operator.coefficients) and at.values.precise(at.node.outputs[0])
        total = at.output() if whole else sum((a for _, a in terms[1:]), terms[0][1])
        if not self.guard:
            s = quotient(ops, r, total, self.eps)
            return [(i, ops.unbroadcast(a * s, at.shape(i))) for i, a in terms]
        ratios = [a / total for _, a in terms[:-1]]
        safe = ops.abs(ratios[0]) <= 1 / self.guard
        for ratio in ratios[1:]:
            safe = ops.where(safe, ops.mask(ops.abs(ratio) <= 1 / self.guard), 0.0) > 0
        parts = [r * ops.where(safe, ratio, 1 / len(terms)) for ratio in ratios]
        parts.append(r - sum(parts[1:], parts[0]))
        return [(i, ops.unbroadcast(part, at.shape(i))) for (i, _), part in zip(terms, parts, strict=True)]


@dataclass(frozen=True)
class SignalTakesAll:
    """The signal of a product gets all the relevance, its gate none; two signals get half each (spec 4.4).

    Attention counts as a linear map of its value with fixed weights (CP-LRP, Ali et al. 2022): the value takes all, by
    the rule `mixing`, and nothing goes to queries and keys. Where weights and value cannot be told apart, each operand
    gets half of what the epsilon rule with the other one fixed gives.
    """

    mixing: LinearRule = Epsilon()

    def takers(self, operator: Product) -> tuple[int, ...]:
        """The operands that may get relevance."""
        return (0, 1) if operator.signal is None else (operator.signal,)

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        assert isinstance(operator, Product)
        i = operator.signal
        if i is None:
            return _halves(at, operator, rs[0])
        if operator.given is not None:
            return [(i, self.mixing.share(operator.bind(at, i), rs[0]))]
        return [(i, at.ops.unbroadcast(rs[0], at.shape(i)))]


@dataclass(frozen=True)
class EqualShares:
    """Both operands of a product get half, even where one gates or weighs the other (AttnLRP, Achtibat et al. 2024).

    A quotient belongs to its numerator, and what is scaled by a gate or a statistic of its own to itself: these are one
    function of one tensor.
    """

    eps: float = 1e-9

    def takers(self, operator: Product) -> tuple[int, ...]:
        """The operands that may get relevance."""
        equals = operator.signal is None or operator.gated or operator.given is not None
        return (0, 1) if equals else (operator.signal or 0,)

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        assert isinstance(operator, Product)
        if len(takers := self.takers(operator)) == 2:
            return _halves(at, operator, rs[0], self.eps)
        return [(i, at.ops.unbroadcast(rs[0], at.shape(i))) for i in takers]


def _halves(at: At, operator: Product, r: Array, eps: float = 1e-9) -> list[Share]:
    """Half to each operand; in a bilinear map, half of the share by the epsilon rule with the other operand fixed."""
    carriers = [i for i in (0, 1) if at.carries(i)]
    if operator.given is None:
        return [(i, at.ops.unbroadcast(0.5 * r, at.shape(i))) for i in carriers]
    return [(i, Epsilon(eps, "ignore").share(operator.bind(at, i), 0.5 * r)) for i in carriers]


@dataclass(frozen=True)
class Taylor:
    """A softmax shares by its Taylor expansion, R_i = x_i (R_i - y_i sum R) (AttnLRP, Achtibat et al. 2024).

    The expansion has a constant term that takes its part, so relevance is not conserved here.
    """

    eps: float = 1e-9

    def __call__(self, at: At, operator: Operator, rs: Relevances) -> list[Share]:
        assert isinstance(operator, Coupled)
        if operator.taylor is not None:
            return [(0, operator.taylor(at, rs[0]))]
        return [(0, at.input(0) * operator.product(at, quotient(at.ops, rs[0], at.output(0), self.eps)))]
