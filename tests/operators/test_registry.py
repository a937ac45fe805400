"""Finding operators: by domain, op type and opset; what is found needs no values."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcam.composites import COMPOSITES
from onnxcam.errors import ModelError
from onnxcam.operators import lookup, registered
from onnxcam.operators.registry import operator
from onnxcam.operators.statistics import STOPS
from tests.operators.single_node import Single, build
from tests.operators.test_node_cases import Case, cases, prepared, variants


def test_an_op_type_is_registered_once_for_each_opset() -> None:
    seen: dict[tuple[str, str], list[tuple[int, int | None]]] = {}
    for domain, op, since, until in registered():
        for other_since, other_until in seen.get((domain, op), []):
            assert other_since > (until or since) or since > (other_until or other_since)
        seen.setdefault((domain, op), []).append((since, until))
    with pytest.raises(ValueError, match="registered twice"):
        operator("Conv", since=5)(lambda node: None)  # type: ignore[arg-type, return-value]


def test_an_unknown_operator_is_named_with_its_opset_and_the_way_out() -> None:
    model, feeds = build("Relu", [np.zeros(3, np.float32)])
    model.graph.node[0].op_type = "GlobalAvgPool"
    with pytest.raises(ModelError, match=r"node 'relu': no operator for GlobalAvgPool at opset 21 .*GlobalAveragePool"):
        Single(model, feeds, [])


@pytest.mark.parametrize(
    "case", [p.values[0] for p in variants() if p.id.endswith("-first")][::6], ids=lambda c: c.name
)
def test_an_operator_is_made_without_values_and_every_composite_has_a_rule_for_it(case: Case) -> None:
    model, _ = prepared(case, {n.name for n in case.model.graph.input} - {case.signals[0]})
    single = Single(model, {}, [])
    for composite in COMPOSITES.values():
        assert composite.rule_for(single.operator, case.node.op_type)


@pytest.mark.parametrize("op", STOPS)
def test_a_statistic_hands_nothing_down(op: str) -> None:
    model, feeds = build(op, [np.zeros(3, np.float32)])
    single = Single(model, feeds, [np.zeros(3, np.float32)])
    assert lookup(single.node).kind == "statistic"
    for composite in COMPOSITES:
        assert single.back({"o0": np.ones((1, 3))}, composite) == {}


def test_the_node_cases_are_many() -> None:
    """A change in onnx that hid its node cases would make the tests of operators pass for want of cases."""
    assert len(cases()) > 300
