"""Composites: found by name, printed as tables, and the most particular rule wins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from walking import as_written, network

from onnxcam.composites import COMPOSITES, KINDS, Composite, composite, describe
from onnxcam.errors import UsageError
from onnxcam.operators import lookup, registered
from onnxcam.propagate import first_linear
from onnxcam.rules import Epsilon, Flat, Vjp, WSquare, ZBox, ZPlus


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_has_a_rule_for_every_kind_and_says_what_it_is_for(name: str) -> None:
    c = COMPOSITES[name]
    assert c.name == name
    assert set(c.rules) == set(KINDS)
    assert c.about


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_prints_as_a_table_of_all_its_rules(name: str) -> None:
    c = COMPOSITES[name]
    head, *rows = str(c).splitlines()
    assert head == f"{name}: {c.about}"
    ends = [name for name, rule in (("first", c.first), ("last", c.last)) if rule]
    assert [row.split()[0] for row in rows] == [*KINDS, *c.by_op, *ends]
    assert "0x" not in str(c), "functions print as addresses"


def test_kinds_are_those_of_the_registered_operators() -> None:
    """One node of every kind, so that no operator can be without a rule."""
    graph = as_written(
        network(
            """(float[1,2,4,4] x) => (float y) {
                linear = Conv(x, w) averaging = GlobalAveragePool(linear) additive = Add(linear, averaging)
                routing = MaxPool<kernel_shape=[2,2]>(additive) activation = Relu(routing)
                product = Mul(activation, routing) normalisation = LRN<size=3>(product)
                softmax = Softmax(normalisation) statistic = Shape(softmax) y = Cast<to=1>(statistic)
            }""",
            w=np.ones((2, 2, 1, 1), np.float32),
        )
    )
    found = {node.outputs[0]: lookup(node).kind for node in graph.nodes if node.outputs[0] in KINDS}
    assert found == {kind: kind for kind in KINDS}
    assert len(registered()) > len(KINDS)


def test_the_rule_of_the_first_layer_beats_that_of_the_op_and_that_of_the_kind() -> None:
    c = Composite("test", {kind: Vjp() for kind in KINDS} | {"linear": ZPlus()}, {"Gemm": Epsilon()}, Flat())
    graph = as_written(network("(float[1,2] x) => (float y) { y = Gemm(x, w) }", w=np.ones((2, 2), np.float32)))
    linear = lookup(graph.nodes[0])
    assert c.rule_for(linear, "Conv") == ZPlus()
    assert c.rule_for(linear, "Gemm") == Epsilon()
    assert c.rule_for(linear, "Gemm", first=True) == Flat()


def test_first_are_the_linear_nodes_that_no_other_lies_before() -> None:
    """Two stems, one of them behind a pool; the Conv that reads both is not first, nor is the Gemm behind it."""
    graph = as_written(
        network(
            """(float[1,2,4,4] x) => (float y) {
                a = Conv(x, w) p = AveragePool<kernel_shape=[1,1]>(x) b = Conv(p, w) s = Add(a, b) r = Relu(s)
                c = Conv(r, w) g = GlobalAveragePool(c) f = Flatten(g) y = Gemm(f, v)
            }""",
            w=np.ones((2, 2, 1, 1), np.float32),
            v=np.ones((2, 3), np.float32),
        )
    )
    makes = {node.name: node.outputs[0] for node in graph.nodes}
    assert {makes[name] for name in first_linear(graph)} == {"a", "b"}


def test_a_composite_is_found_by_name_with_dashes_or_underscores_and_passes_through_itself() -> None:
    assert composite("relevance-cam") is COMPOSITES["relevance_cam"]
    mine = replace(COMPOSITES["epsilon_plus"], first=WSquare())
    assert composite(mine) is mine


def test_an_unknown_composite_names_the_nearest_and_all_there_are() -> None:
    with pytest.raises(UsageError, match=r"did you mean epsilon_plus.*relevance_cam_authors") as error:
        composite("epsilon_pluss")
    assert "\n" not in str(error.value)


def test_the_box_is_filled_in_only_where_it_is_missing() -> None:
    low, high = np.array(-1.0), np.array(1.0)
    box = COMPOSITES["epsilon_gamma_box"]
    assert box.needs_box
    filled = box.with_box(low, high)
    assert filled.first == ZBox(low, high, eps=1e-6) and not filled.needs_box
    assert filled.with_box(2 * low, 2 * high) is filled
    assert COMPOSITES["epsilon_plus"].with_box(low, high) is COMPOSITES["epsilon_plus"]
    assert box.needs_box, "a composite is not changed in place"


def test_a_rule_is_described_by_its_parameters_or_its_name() -> None:
    assert describe(Epsilon(0.1)) == "Epsilon(eps=0.1, bias='full')"
    assert describe(test_a_rule_is_described_by_its_parameters_or_its_name).startswith("test_a_rule")
