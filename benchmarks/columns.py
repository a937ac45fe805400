"""What of onnxcam is measured: a column is a name, what it asks of `compile`, and the plain inference it is a ratio of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from onnxcam.composites import COMPOSITES, ZENNIT_EPS, Composite
from onnxcam.rules import Epsilon


def epsilon_everywhere() -> Composite:
    """`epsilon_plus` with the epsilon rule in place of z-plus: LRP-epsilon, as captum does it."""
    base, rule = COMPOSITES["epsilon_plus"], Epsilon(ZENNIT_EPS)
    return replace(base, name="epsilon", rules={**base.rules, "linear": rule, "averaging": rule}, by_op={})


@dataclass(frozen=True)
class Column:
    """One way to compile.

    Attributes:
        title: as it stands in the table.
        layers: what `compile` gets; "input" stands for the model's input.
        targets, batch: how many of each.
        stages: for ResNets only.
        options: more for `compile`.
    """

    title: str
    layers: tuple[str, ...]
    targets: int = 1
    batch: int = 1
    stages: bool = False
    options: Any = None


STAGES = ("-4", "-3", "-2", "-1")

COLUMNS = {
    "last": Column("last layer", ("auto",)),
    "stages": Column("four stages", STAGES, stages=True),
    "suggested": Column("all suggested", ("suggested",)),
    "lrp-epsilon-plus": Column(
        "input, epsilon-plus", ("input",), options=lambda: {"method": "lrp", "composite": "epsilon_plus"}
    ),
    "lrp-epsilon": Column(
        "input, epsilon", ("input",), options=lambda: {"method": "lrp", "composite": epsilon_everywhere()}
    ),
    "batch8": Column("last layer, batch 8", ("auto",), batch=8),
    "targets5": Column("last layer, 5 targets", ("auto",), targets=5),
}
