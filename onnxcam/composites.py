"""Composites: which rule applies where, under a name. A composite is a table; print it to see all of it.

Rules are assigned by kind of operator, then, more closely, by op type, and most closely to the first linear operators,
those that no other linear operator lies before. The gradient is a composite like any other: every kind by its exact
vector-Jacobian product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from onnxcam import authors
from onnxcam.errors import UsageError
from onnxcam.graph import Graph
from onnxcam.named import named
from onnxcam.operators.kinds import At, Operator, Relevances, Share
from onnxcam.operators.roles import leaves_signed
from onnxcam.rules import (
    Absolute,
    AlphaBeta,
    ByKernel,
    Epsilon,
    EqualShares,
    Gamma,
    Guided,
    LinearRule,
    Pass,
    Proportional,
    Relative,
    SameSign,
    SignalTakesAll,
    Taylor,
    Vjp,
    ZBox,
    ZPlus,
)

Rule = Callable[[At, Operator, Relevances], list[Share]]

KINDS = ("linear", "averaging", "additive", "routing", "activation", "product", "normalisation", "softmax", "statistic")


@dataclass(frozen=True)
class Composite:
    """A named assignment of rules.

    Attributes:
        rules: a rule for each kind.
        by_op: rules for single op types, before those by kind.
        first: a rule for the linear operators nearest to the input, before all others.
        last: a rule for those nearest to the logits.
        fold_batchnorm: False where the rules expect BatchNormalization nodes as the file has them.
        conserves: False where relevance is not meant to be conserved, so that no residual is reported.
        attention: how relevance passes attention: "cp" to the values alone, "attnlrp" to queries and keys as well; None
            where no rule of its own applies there.
        about: one line for listings.
    """

    name: str
    rules: Mapping[str, Rule]
    by_op: Mapping[str, Rule] = field(default_factory=dict)
    first: Rule | None = None
    last: Rule | None = None
    fold_batchnorm: bool = True
    conserves: bool = True
    attention: str | None = "cp"
    about: str = ""

    def rule_for(self, operator: Operator, op_type: str, first: bool = False, last: bool = False) -> Rule:
        if operator.kind == "linear":
            for here, rule in ((first, self.first), (last, self.last)):
                if here and rule is not None:
                    return rule
        # A MatMul of two tensors that both depend on the input is no dense layer, but a product.
        special = self.by_op.get(op_type) if operator.kind != "product" else None
        return special or self.rules[operator.kind]

    @property
    def needs_box(self) -> bool:
        return isinstance(self.first, ZBox) and self.first.low is None and self.first.boxes is None

    def with_box(self, low: np.ndarray, high: np.ndarray) -> Composite:
        """The same composite with the range of the input filled in where it has a z-box rule without one."""
        if not isinstance(self.first, ZBox) or not self.needs_box:
            return self
        return replace(self, first=replace(self.first, low=low, high=high))

    def with_boxes(self, boxes: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Composite:
        """The same with a range for each tensor that a first linear operator sees."""
        return replace(self, first=replace(self.first, boxes=boxes)) if isinstance(self.first, ZBox) else self

    def with_attention(self, how: str | None) -> Composite:
        """The same composite with relevance passing attention by CP-LRP ("cp") or AttnLRP ("attnlrp"); None: as it is.

        Raises:
            UsageError: there is no such way, or none to choose as with the gradient.
        """
        if how is None or how == self.attention:
            return self
        if how not in ATTENTION:
            raise UsageError(f"no way through attention is called {how!r}: there are {', '.join(ATTENTION)}")
        if self.attention is None:
            raise UsageError(f"composite {self.name} has one way through attention: leave attention {how!r} out")
        ways: dict[str, dict[str, Rule]] = {
            "cp": _cp(self.rules["averaging"]),
            "attnlrp": {"product": EqualShares(), "softmax": Taylor()},
        }
        return replace(self, rules={**self.rules, **ways[how]}, attention=how)

    def __str__(self) -> str:
        rows = [*self.rules.items(), *self.by_op.items(), *([("first linear", self.first)] if self.first else [])]
        rows += [("last linear", self.last)] if self.last else []
        width = max(len(where) for where, _ in rows)
        return "\n".join(
            [f"{self.name}: {self.about}", *(f"  {where:<{width}}  {describe(rule)}" for where, rule in rows)]
        )


ATTENTION = ("cp", "attnlrp")


def _cp(averaging: Rule) -> dict[str, Rule]:
    """Attention averages its values: they share as the inputs of an average do, but signed as they are, by `SameSign`
    where that is z-plus."""
    mixing = averaging if isinstance(averaging, LinearRule) and not isinstance(averaging, ZPlus) else SameSign()
    return {"product": SignalTakesAll(mixing), "softmax": Pass()}


def _lrp(linear: Rule, averaging: Rule, additive: Rule, **others: Rule) -> dict[str, Rule]:
    """The table of an LRP composite: what all of them agree on, and the three kinds they differ in."""
    rules: dict[str, Rule] = {
        "linear": linear,
        "averaging": averaging,
        "additive": additive,
        "routing": Vjp(),
        "activation": Pass(),
        "normalisation": Pass(),
        "statistic": Vjp(),
        **_cp(averaging),
        **others,
    }
    return {kind: rules[kind] for kind in KINDS}


ZENNIT_EPS = 1e-6  # zennit's default stabiliser
_MEASURED = ByKernel(Gamma(0.1, "absorb", 1e-6), Gamma(1.0, "absorb", 1e-6))
_NORM = Epsilon(ZENNIT_EPS)  # what zennit calls Norm: the epsilon rule of a sum or an average

COMPOSITES: dict[str, Composite] = {
    c.name: c
    for c in (
        Composite(
            "relevance_cam",
            _lrp(ZPlus(), ZPlus(), Proportional(guard=1e-6)),
            about="z-plus with the bias ignored everywhere; the default of convolutional networks (Lee et al. 2021)",
        ),
        Composite(
            "relevance_cam_signed",
            _lrp(ZPlus(), SameSign(), SameSign()),
            about="relevance_cam with sums and averages shared by their own sign; the default of transformers",
        ),
        Composite(
            "contrast_map",
            _lrp(_MEASURED, ZPlus(), Proportional(guard=1e-6)),
            last=ZPlus(),
            about="gamma 1, of 1x1 kernels 0.1, z-plus next to the logits: chosen by measurement (docs/evidence.md)",
        ),
        Composite(
            "contrast_map_signed",
            _lrp(_MEASURED, SameSign(), SameSign()),
            last=ZPlus(),
            about="contrast_map with sums and averages shared by their own sign; for transformers",
        ),
        Composite(
            "relevance_cam_authors",
            _lrp(authors.conv, authors.adaptive_pool, authors.add, normalisation=authors.batch_norm),
            by_op=authors.BY_OP,
            fold_batchnorm=False,
            about="the code of the Relevance-CAM authors to the letter, BatchNormalization kept (spec 1.2)",
        ),
        Composite(
            "epsilon_plus",
            _lrp(ZPlus("absorb", ZENNIT_EPS), _NORM, Proportional(ZENNIT_EPS)),
            by_op={"Gemm": Epsilon(ZENNIT_EPS), "MatMul": Epsilon(ZENNIT_EPS)},
            about="epsilon for dense layers, z-plus for convolutions (zennit's EpsilonPlus)",
        ),
        Composite(
            "epsilon_gamma_box",
            _lrp(Gamma(0.25, "absorb", ZENNIT_EPS), _NORM, Proportional(ZENNIT_EPS)),
            by_op={"Gemm": Epsilon(ZENNIT_EPS), "MatMul": Epsilon(ZENNIT_EPS)},
            first=ZBox(eps=ZENNIT_EPS),
            about="epsilon for dense layers, gamma 0.25 for convolutions, z-box first (zennit's EpsilonGammaBox)",
        ),
        Composite(
            "epsilon_alpha2_beta1",
            _lrp(AlphaBeta(2.0, 1.0, "absorb", ZENNIT_EPS), _NORM, Proportional(ZENNIT_EPS)),
            by_op={"Gemm": Epsilon(ZENNIT_EPS), "MatMul": Epsilon(ZENNIT_EPS)},
            about="epsilon for dense layers, alpha 2 beta 1 for convolutions (zennit's EpsilonAlpha2Beta1)",
        ),
        Composite(
            "rap",
            _lrp(Relative(), Epsilon(0.0, "ignore"), Proportional()),
            first=ZBox(eps=ZENNIT_EPS),
            last=Absolute(),
            about="relative attributing propagation: little influence counts against, the sum stays (Nam et al. 2020)",
        ),
        Composite(
            "gradient",
            {kind: Vjp() for kind in KINDS},
            conserves=False,
            attention=None,
            about="no relevance but the exact gradient: every kind by its vector-Jacobian product",
        ),
        Composite(
            "guided",
            {kind: Vjp() for kind in KINDS} | {"activation": Guided()},
            conserves=False,
            attention=None,
            about="the gradient, of which rectifiers let only positive values back (guided backpropagation)",
        ),
        Composite(
            "deconvnet",
            {kind: Vjp() for kind in KINDS} | {"activation": Guided(forward=False)},
            conserves=False,
            attention=None,
            about="the gradient, rectifiers replaced by rectifying what comes back (DeconvNet)",
        ),
    )
}


SIGNED = {
    name: f"{name}_signed" for name in ("relevance_cam", "contrast_map")
}  # what suits networks whose features have both signs


def suited(name: str, graph: Graph, logits: str) -> Composite:
    """The composite a method is meant for, in the form that suits the network.

    Where normalisation and attention leave features of both signs, summands cancel: what shares a sum in proportion to
    signed summands is then mostly rounding (see docs/transformers.md).
    """
    return composite(SIGNED.get(name, name) if leaves_signed(graph, logits) else name)


def composite(name: str | Composite) -> Composite:
    """The composite of that name; dashes count as underscores.

    Raises:
        UsageError: there is none.
    """
    return name if isinstance(name, Composite) else named("composite", name, COMPOSITES)


def describe(rule: Any) -> str:
    """A short name for listings and manifests."""
    return getattr(rule, "__name__", None) or str(rule)
