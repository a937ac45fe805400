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
from onnxcam.named import named
from onnxcam.operators.kinds import At, Operator, Relevances, Share
from onnxcam.rules import AlphaBeta, Epsilon, Gamma, Pass, Proportional, SignalTakesAll, Vjp, ZBox, ZPlus

Rule = Callable[[At, Operator, Relevances], list[Share]]

KINDS = ("linear", "averaging", "additive", "routing", "activation", "product", "normalisation", "softmax", "statistic")


@dataclass(frozen=True)
class Composite:
    """A named assignment of rules.

    Attributes:
        rules: a rule for each kind.
        by_op: rules for single op types, before those by kind.
        first: a rule for the linear operators nearest to the input, before all others.
        fold_batchnorm: False where the rules expect BatchNormalization nodes as the file has them.
        conserves: False where relevance is not meant to be conserved, so that no residual is reported.
        about: one line for listings.
    """

    name: str
    rules: Mapping[str, Rule]
    by_op: Mapping[str, Rule] = field(default_factory=dict)
    first: Rule | None = None
    fold_batchnorm: bool = True
    conserves: bool = True
    about: str = ""

    def rule_for(self, operator: Operator, op_type: str, first: bool = False) -> Rule:
        if first and self.first is not None and operator.kind == "linear":
            return self.first
        # A MatMul of two tensors that both depend on the input is no dense layer, but a product.
        special = self.by_op.get(op_type) if operator.kind != "product" else None
        return special or self.rules[operator.kind]

    @property
    def needs_box(self) -> bool:
        return isinstance(self.first, ZBox) and self.first.low is None

    def with_box(self, low: np.ndarray, high: np.ndarray) -> Composite:
        """The same composite with the range of the input filled in where it has a z-box rule without one."""
        if not isinstance(self.first, ZBox) or not self.needs_box:
            return self
        return replace(self, first=replace(self.first, low=low, high=high))

    def __str__(self) -> str:
        rows = [*self.rules.items(), *self.by_op.items(), *([("first linear", self.first)] if self.first else [])]
        width = max(len(where) for where, _ in rows)
        return "\n".join(
            [f"{self.name}: {self.about}", *(f"  {where:<{width}}  {describe(rule)}" for where, rule in rows)]
        )


def _lrp(linear: Rule, averaging: Rule, additive: Rule, **others: Rule) -> dict[str, Rule]:
    """The table of an LRP composite: what all of them agree on, and the three kinds they differ in."""
    table: dict[str, Rule] = {
        "linear": linear,
        "averaging": averaging,
        "additive": additive,
        "routing": Vjp(),
        "activation": Pass(),
        "product": SignalTakesAll(),
        "normalisation": Pass(),
        "softmax": Pass(),
        "statistic": Vjp(),
    }
    return table | others


ZENNIT_EPS = 1e-6  # zennit's default stabiliser
_NORM = Epsilon(ZENNIT_EPS)  # what zennit calls Norm: the epsilon rule of a sum or an average

COMPOSITES: dict[str, Composite] = {
    c.name: c
    for c in (
        Composite(
            "relevance_cam",
            _lrp(ZPlus(), ZPlus(), Proportional(guard=1e-6)),
            about="z-plus with the bias ignored everywhere; the default (Lee et al. 2021, spec 1.4)",
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
            "gradient",
            {kind: Vjp() for kind in KINDS},
            conserves=False,
            about="no relevance but the exact gradient: every kind by its vector-Jacobian product",
        ),
    )
}


def composite(name: str | Composite) -> Composite:
    """The composite of that name; dashes count as underscores.

    Raises:
        UsageError: there is none.
    """
    return name if isinstance(name, Composite) else named("composite", name, COMPOSITES)


def describe(rule: Any) -> str:
    """A short name for listings and manifests."""
    return getattr(rule, "__name__", None) or str(rule)
