"""The walk: how relevance and gradients travel through a graph, whatever the rules are.

Most oracles are identities (two of one equal one of two, a sum over readers, gradient times input), so most tolerances
are rounding of float64: 1e-12 relative, or equality where the arithmetic is the same. All of it holds for both engines,
what the recorder records computed in float64 as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from walking import ENGINES, RecordedWalk, Walk, Walker, as_written, canonised, carry, network, relative

from onnxcam.composites import COMPOSITES, KINDS, Composite
from onnxcam.engines.array import ArrayOps
from onnxcam.errors import ModelError
from onnxcam.operators.kinds import At, LinearMap, Relevances, Share
from onnxcam.propagate import needed_taps, propagate
from onnxcam.rules import AlphaBeta, Epsilon, Flat, Gamma, LinearRule, Proportional, Vjp, WSquare, ZBox, ZPlus
from onnxcam.starts import STARTS

GRADIENT, DEFAULT = COMPOSITES["gradient"], COMPOSITES["relevance_cam"]
OPS = ArrayOps(np, "float64")
ROUNDING = 1e-12


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def he(*shape: int, seed: int) -> np.ndarray:
    return draw(*shape, seed=seed) * np.float32(np.sqrt(2 / np.prod(shape[1:])))


# A small residual network: odd sizes under stride 2, a skip connection, a pool, a dense head.
RESIDUAL = """(float[{n},3,9,7] x) => (float z) {{
    c1 = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w1 {b1}) r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2 {b2}) r2 = Relu(c2)
    c3 = Conv<pads=[1,1,1,1]>(r2, w3 {b3}) s = Add(c3, r1) r3 = Relu(s)
    p = MaxPool<kernel_shape=[2,2]>(r3) g = GlobalAveragePool(p) f = Flatten(g) z = Gemm<transB=1>(f, w4 {b4})
}}"""
LAYERS = ("x", "r1", "r2", "c3", "r3", "p")


def residual(n: int | str = 2, biased: bool = True) -> onnx.ModelProto:
    weights = {f"w{i}": he(6, 3 if i == 1 else 6, 3, 3, seed=i) for i in (1, 2, 3)} | {"w4": he(5, 6, seed=4)}
    biases = {f"b{i}": 0.3 * draw(5 if i == 4 else 6, seed=10 + i) for i in (1, 2, 3, 4)} if biased else {}
    text = RESIDUAL.format(n=n, **{f"b{i}": f", b{i}" if biased else "" for i in (1, 2, 3, 4)})
    return network(text, **weights, **biases)


def lrp(linear: Any, averaging: Any = None, additive: Any = None) -> Composite:
    """The default composite with other rules."""
    others = {"averaging": averaging or linear, "additive": additive or Proportional()}
    return replace(DEFAULT, rules=dict(DEFAULT.rules) | {"linear": linear} | others)


def onehot(targets: list[list[int]], classes: int = 5) -> np.ndarray:
    """(T, N, classes) from targets (N, T)."""
    return STARTS["one-hot"](np.zeros((len(targets), classes)), np.array(targets))


X = draw(2, 3, 9, 7, seed=9)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


# -- identities of the whole walk --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_batch_of_two_is_two_batches_of_one(name: str, engine: str) -> None:
    composite = COMPOSITES[name].with_box(np.array(-5.0), np.array(5.0))
    start = onehot([[0, 3], [4, 1]])
    both = Walker(residual(2), LAYERS, "z", engine=engine)({"x": X}, start, composite)
    single = Walker(residual(1), LAYERS, "z", engine=engine)
    for n in (0, 1):
        alone = single({"x": X[n : n + 1]}, start[:, n : n + 1], composite)
        for layer in LAYERS:
            assert relative(both[layer][:, n : n + 1], alone[layer]) <= ROUNDING, layer


@pytest.mark.parametrize("name", COMPOSITES)
def test_several_targets_in_one_walk_are_the_targets_one_by_one(name: str, engine: str) -> None:
    composite = COMPOSITES[name].with_box(np.array(-5.0), np.array(5.0))
    walker, start = Walker(residual(), LAYERS, "z", engine=engine), onehot([[0, 3, 2], [4, 1, 2]])
    values = walker.forward({"x": X})
    together = walker.back(values, start, composite)
    for t in range(3):
        alone = walker.back(values, start[t : t + 1], composite)
        for layer in LAYERS:
            assert relative(together[layer][t : t + 1], alone[layer]) <= ROUNDING, layer


@pytest.mark.parametrize("name", COMPOSITES)
def test_several_layers_in_one_walk_are_the_layers_one_by_one(name: str, engine: str) -> None:
    """And so a layer inside a residual branch has the same relevance whether or not the walk goes on below it."""
    composite = COMPOSITES[name].with_box(np.array(-5.0), np.array(5.0))
    start = onehot([[0], [4]])
    together = Walker(residual(), LAYERS, "z", engine=engine)({"x": X}, start, composite)
    for layer in LAYERS:
        alone = Walker(residual(), [layer], "z", engine=engine)({"x": X}, start, composite)
        np.testing.assert_array_equal(alone[layer], together[layer])


def test_a_symbolic_batch_takes_any_number_of_images(engine: str) -> None:
    dynamic = Walker(canonised(residual("N")), LAYERS, "z", engine=engine)
    for n in (1, 3):
        x, start = draw(n, 3, 9, 7, seed=n), onehot([[n]] * n)
        want = Walker(residual(n), LAYERS, "z", engine=engine)({"x": x}, start, DEFAULT)
        got = dynamic({"x": x}, start, DEFAULT)
        for layer in LAYERS:
            assert relative(got[layer], want[layer]) <= ROUNDING, layer


def test_the_walk_is_linear_in_its_start(engine: str) -> None:
    walker = Walker(residual(), LAYERS, "z", engine=engine)
    values, start = walker.forward({"x": X}), np.random.default_rng(1).standard_normal((2, 1, 2, 5))
    a, b, both = (walker.back(values, r, DEFAULT) for r in (*start, 2 * start[0] - 3 * start[1]))
    for layer in LAYERS:
        assert relative(both[layer], 2 * a[layer] - 3 * b[layer]) <= ROUNDING, layer


def test_the_gradient_is_the_slope(engine: str) -> None:
    """Oracle: central differences in float64. The network is piecewise linear, so within a piece they are exact."""
    walker = Walker(residual(), ["x"], "z", engine=engine)
    got = walker({"x": X}, onehot([[3], [3]]), GRADIENT)["x"][0]
    rng = np.random.default_rng(0)
    for _ in range(5):
        direction = rng.standard_normal(X.shape)
        up, down = (walker.forward({"x": X + step * direction})["z"][:, 3] for step in (1e-6, -1e-6))
        np.testing.assert_allclose((got * direction).sum((1, 2, 3)), (up - down) / 2e-6, rtol=1e-6)


def test_lrp_0_is_gradient_times_input_on_a_piecewise_linear_network_with_biases(engine: str) -> None:
    """Started at the logit itself (spec 2.3). Divisions by small sums cost a few digits: 1e-9."""
    walker = Walker(residual(), LAYERS, "z", engine=engine)
    values = walker.forward({"x": X})
    targets = np.array([[0, 3], [4, 1]])
    relevance = walker.back(values, STARTS["logit"](values["z"], targets), lrp(Epsilon(0.0)))
    gradient = walker.back(values, onehot(targets.tolist()), GRADIENT)
    for layer in LAYERS:
        assert relative(relevance[layer], values[layer] * gradient[layer]) <= 1e-9, layer


# -- who gets what -----------------------------------------------------------------------------------------------


def walk(
    body: str,
    composite: Composite,
    x: np.ndarray,
    layers: tuple[str, ...] = ("x",),
    engine: str = "numpy",
    **weights: Any,
) -> Walk:
    """A graph as written, started with ones at "y"."""
    model = network(f"(float[{','.join(map(str, x.shape))}] x) => (float y) {{ {body} }}", **weights)
    walker = Walker(model, layers, "y", engine=engine)
    values = walker.forward({"x": x})
    return walker.back(values, np.ones((1, *values["y"].shape)), composite)


def test_a_tensor_read_by_several_nodes_gets_the_sum_of_what_they_hand_down(engine: str) -> None:
    """Oracle: each reader alone."""
    w, v, x = draw(3, 4, seed=1), draw(3, 4, seed=2), draw(2, 4)
    both = walk(
        "a = Gemm<transB=1>(x, w) b = Gemm<transB=1>(x, v) y = Concat<axis=1>(a, b)",
        DEFAULT,
        x,
        w=w,
        v=v,
        engine=engine,
    )
    alone = [walk("y = Gemm<transB=1>(x, w)", DEFAULT, x, w=one, engine=engine)["x"] for one in (w, v)]
    assert relative(both["x"], alone[0] + alone[1]) <= ROUNDING


def test_a_skip_around_a_branch_of_zeros_gets_everything(engine: str) -> None:
    x = draw(2, 4)
    got = walk("b = Gemm<transB=1>(x, w) y = Add(x, b)", DEFAULT, x, w=np.zeros((4, 4), np.float32), engine=engine)
    np.testing.assert_allclose(got["x"], np.ones((1, 2, 4)), rtol=1e-15)


@pytest.mark.parametrize(
    ("body", "gradient"), [("y = Add(x, x)", lambda x: 0 * x + 2), ("y = Mul(x, x)", lambda x: 2 * x)]
)
def test_a_tensor_in_both_slots_of_a_node_gets_both_shares(body: str, gradient: Any, engine: str) -> None:
    x = draw(2, 4)
    np.testing.assert_allclose(walk(body, DEFAULT, x, engine=engine)["x"], np.ones((1, 2, 4)), rtol=1e-15)
    assert relative(walk(body, GRADIENT, x, engine=engine)["x"][0], gradient(x.astype(np.float64))) <= ROUNDING


def test_nodes_that_share_a_weight_do_not_disturb_each_other(engine: str) -> None:
    """Oracle: the same network with a copy of the weight for each node. The second node sees negative inputs, the
    first does not, so the parts of the weight that they need differ."""
    body = "a = Relu(x) b = Gemm<transB=1>(a, {0}) c = Gemm(b, {1}) y = Gemm<transB=1, alpha=-0.5>(c, {2})"
    w, x = draw(4, 4, seed=1), draw(2, 4)
    for composite in (DEFAULT, COMPOSITES["epsilon_alpha2_beta1"], lrp(Gamma()), lrp(WSquare()), GRADIENT):
        shared = walk(body.format("w", "w", "w"), composite, x, w=w, engine=engine)
        apart = walk(body.format("w", "v", "u"), composite, x, w=w, v=w, u=w, engine=engine)
        np.testing.assert_array_equal(shared["x"], apart["x"])


def test_weights_behind_an_identity_are_weights(engine: str) -> None:
    """The legacy exporter passes shared initialisers through Identity nodes."""
    text = "(float[2,4] x) => (float y) {{ i = Identity(w) y = Gemm<transB=1>(x, {0}) }}"
    x, start = draw(2, 4), np.ones((1, 2, 3))
    got = Walker(canonised(network(text.format("i"), w=draw(3, 4))), ["x"], "y", engine=engine)(
        {"x": x}, start, DEFAULT
    )
    want = Walker(network(text.format("w"), w=draw(3, 4)), ["x"], "y", engine=engine)({"x": x}, start, DEFAULT)
    np.testing.assert_array_equal(got["x"], want["x"])


def test_a_branch_without_the_input_takes_no_relevance(engine: str) -> None:
    text = "(float[2,4] x) => (float y) { a = Relu(k) b = Mul(a, k) y = Add(b, x) }"
    walker = Walker(canonised(network(text, k=draw(4, seed=1))), ["x"], "y", engine=engine)
    got = walker({"x": draw(2, 4)}, np.ones((1, 2, 4)), DEFAULT)
    np.testing.assert_array_equal(got["x"], np.ones((1, 2, 4)))


def test_relevance_inside_a_residual_branch_is_its_share_of_the_sum(engine: str) -> None:
    """Oracle: the proportional rule at the one Add, applied by hand."""
    got = Walker(residual(), (*LAYERS, "s"), "z", engine=engine)({"x": X}, onehot([[0], [4]]), DEFAULT)
    a, b = got.values["c3"], got.values["r1"]
    total = np.where(got["s"] == 0, 1.0, a + b)
    assert relative(got["c3"], a * got["s"] / total) <= ROUNDING


def test_a_walk_may_start_at_several_tensors_at_once(engine: str) -> None:
    graph = as_written(residual())
    values = Walker(graph, ["r1", "p"], "z", engine=engine).forward({"x": X})
    logits, inner = onehot([[0], [4]]), np.random.default_rng(0).standard_normal((1, *values["r2"].shape))
    both = carry(engine, graph, values, {"z": logits, "r2": inner}, ["r1"], DEFAULT).relevance["r1"]
    first = carry(engine, graph, values, {"z": logits}, ["r1"], DEFAULT).relevance["r1"]
    second = carry(engine, graph, values, {"r2": inner}, ["r1"], DEFAULT).relevance["r1"]
    assert relative(both, first + second) <= ROUNDING


def test_the_start_itself_is_the_relevance_of_the_logits(engine: str) -> None:
    start = onehot([[0], [4]])
    np.testing.assert_array_equal(
        Walker(residual(), ["z", "p"], "z", engine=engine)({"x": X}, start, DEFAULT)["z"], start
    )


def test_a_layer_that_no_relevance_reaches_is_absent_and_not_zero(engine: str) -> None:
    """A gate gets none, so neither does what the gate is computed from."""
    body = "g = GlobalAveragePool(x) s = Sigmoid(g) y = Mul(x, s)"
    got = walk(body, DEFAULT, draw(2, 3, 4, 4), ("x", "g"), engine=engine)
    assert "x" in got
    assert "g" not in got
    assert "g" in walk(body, GRADIENT, draw(2, 3, 4, 4), ("x", "g"), engine=engine)


def test_what_the_caller_passes_in_stays_as_it_was(engine: str) -> None:
    walker, start = Walker(residual(), LAYERS, "z", "float32", engine=engine), onehot([[0], [4]]).astype(np.float32)
    values = walker.forward({"x": X})
    before = {name: value.copy() for name, value in values.items()} | {"start": start.copy()}
    for composite in COMPOSITES.values():
        walker.back(values, start, composite.with_box(np.array(-5.0), np.array(5.0)))
    for name, value in (values | {"start": start}).items():
        np.testing.assert_array_equal(value, before[name])


def test_what_is_kept_from_walk_to_walk_changes_nothing() -> None:
    walker, cache, start = Walker(residual(), LAYERS, "z"), {}, onehot([[0], [4]])
    values = walker.forward({"x": X})
    for composite in (DEFAULT, COMPOSITES["epsilon_alpha2_beta1"], DEFAULT, lrp(WSquare()), DEFAULT):
        got = propagate(walker.graph, values, {"z": start}, LAYERS, composite, OPS, cache).relevance
        for layer, fresh in walker.back(values, start, composite).flow.relevance.items():
            np.testing.assert_array_equal(got[layer], fresh)
    assert {name for name, _ in cache} <= set(walker.graph.constants)


def test_only_the_tensors_between_are_tapped() -> None:
    assert needed_taps(as_written(residual()), ["r3"], "z") == ["r3", "p", "g", "f", "z"]


# -- ops without an operator -------------------------------------------------------------------------------------

FOREIGN = "a = Relu(x) b = ai.foreign.Warp(a) c = Relu(a) y = Add(b, c)"


def walk_foreign(engine: str, layer: str, body: str) -> set[str]:
    """The layers that relevance reaches. Nobody infers the shape behind a foreign op, so the file has to say it."""
    shapes = ", ".join(f"float[1,2] {name}" for name in re.findall(r"(\w+) =", body.rpartition(" y =")[0]))
    graph = as_written(network(f"(float[1,2] x) => (float[1,2] y) <{shapes}> {{ {body} }}"))
    for node in graph.nodes:
        node.name = f"node of {node.outputs[0]}"
    values = {name: np.ones((1, 2), np.float32) for node in graph.nodes for name in (*node.inputs, *node.outputs)}
    if engine == "onnx":
        return set(RecordedWalk(graph, {"y": (1, 1, 2)}, [layer], DEFAULT).found)
    return set(propagate(graph, values, {"y": np.ones((1, 1, 2))}, [layer], DEFAULT, OPS).relevance)


def test_an_op_without_an_operator_is_an_error_that_names_node_op_and_opset(engine: str) -> None:
    with pytest.raises(ModelError, match=r"'node of b'.*ai\.foreign\.Warp.*opset 1") as error:
        walk_foreign(engine, "a", FOREIGN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layer", "body"),
    [
        ("b", FOREIGN),  # the layer lies behind it
        ("c", FOREIGN),  # beside it
        ("a", "a = Relu(x) b = ai.foreign.Warp(a) y = Relu(a)"),  # a dead node
        ("a", "a = Relu(x) b = ai.foreign.Warp(a) s = Sigmoid(b) y = Mul(a, s)"),  # on the way, but behind a gate
    ],
)
def test_an_op_without_an_operator_is_no_error_where_no_relevance_reaches_it(
    engine: str, layer: str, body: str
) -> None:
    assert walk_foreign(engine, layer, body) == {layer}


# -- the balance of every node -----------------------------------------------------------------------------------

CONSERVING = {
    "epsilon": Epsilon(0.0),
    "z-plus": ZPlus(),
    "alpha-beta": AlphaBeta(eps=0.0),
    "gamma": Gamma(eps=0.0),
    "w-square": WSquare(),
    "flat": Flat(),
    "z-box": ZBox(-9.0, 9.0, eps=0.0),
}


@pytest.mark.parametrize("rule", CONSERVING)
def test_without_biases_every_node_hands_down_what_it_receives(rule: str, engine: str) -> None:
    """To 1e-6 of the sum of magnitudes, as promised; float64 leaves far less. Averages share by z-plus throughout."""
    composite = lrp(CONSERVING[rule], averaging=ZPlus())
    got = Walker(residual(biased=False), LAYERS, "z", engine=engine)({"x": X}, onehot([[0, 3], [4, 1]]), composite)
    assert got.flow.balances[0].op_type == "Gemm"
    assert len(got.flow.balances) == len(got.graph.nodes)
    for balance in got.flow.balances:
        assert balance.received.shape == balance.handed.shape == (2, 2)
        assert balance.residual <= 1e-6, balance


def test_the_contrast_keeps_one_over_the_number_of_classes_at_every_layer(engine: str) -> None:
    """Spec 1.4. Relevance at c3 and r1 add up to that of their sum."""
    got = Walker(residual(biased=False), (*LAYERS, "s"), "z", engine=engine)(
        {"x": X}, STARTS["contrast"](np.zeros((2, 5)), np.array([[0], [4]])), DEFAULT
    )
    for layer in ("s", "r3", "p", "x"):
        np.testing.assert_allclose(got[layer].sum((2, 3, 4)), 1 / 5, rtol=1e-9)


@dataclass(frozen=True)
class Leaky(LinearRule):
    """A rule with a mistake: a tenth of the relevance gets lost."""

    def share(self, f: LinearMap, r: Any) -> Any:
        return 0.9 * ZPlus().share(f, r)


def test_a_rule_that_loses_relevance_shows_in_the_balance_of_its_nodes_and_of_no_other(engine: str) -> None:
    composite = replace(lrp(ZPlus()), by_op={"Gemm": Leaky()})
    got = Walker(residual(biased=False), ["x"], "z", engine=engine)({"x": X}, onehot([[0], [4]]), composite)
    for balance in got.flow.balances:
        assert balance.residual == pytest.approx(0.1 if balance.op_type == "Gemm" else 0.0, abs=1e-9)
        assert balance.rule == str(Leaky() if balance.op_type == "Gemm" else composite.rules[kind_of(balance.op_type)])


def kind_of(op_type: str) -> str:
    return {
        "Conv": "linear",
        "GlobalAveragePool": "averaging",
        "Add": "additive",
        "MaxPool": "routing",
        "Flatten": "routing",
        "Relu": "activation",
    }[op_type]


def both_ways(at: At, operator: Any, rs: Relevances) -> list[Share]:
    """The mistake of a skip connection that is not split: each branch gets everything."""
    return [(i, rs[0]) for i in (0, 1)]


def test_a_sum_that_is_not_split_shows_as_relevance_from_nowhere(engine: str) -> None:
    composite = lrp(ZPlus(), additive=both_ways)
    got = Walker(residual(biased=False), ["r1"], "z", engine=engine)({"x": X}, onehot([[0], [4]]), composite)
    (add,) = [b for b in got.flow.balances if b.op_type == "Add"]
    np.testing.assert_allclose(add.handed, 2 * add.received, rtol=1e-12)
    assert add.residual == pytest.approx(1.0)
    assert add.rule == "both_ways"


def test_what_a_bias_takes_shows_in_the_balance(engine: str) -> None:
    """Oracle: the epsilon rule hands down z / (z + b) of what it gets."""
    w, b, x = draw(1, 4, seed=1), np.float32([0.5]), draw(1, 4)
    (balance,) = walk("y = Gemm<transB=1>(x, w, b)", lrp(Epsilon(0.0)), x, w=w, b=b, engine=engine).flow.balances
    z = float(x[0].astype(np.float64) @ w[0])
    np.testing.assert_allclose(balance.handed, z / (z + 0.5), rtol=1e-12)
    assert balance.residual == pytest.approx(abs(1 - z / (z + 0.5)))


def test_a_gradient_has_no_balance(engine: str) -> None:
    assert Walker(residual(), ["x"], "z", engine=engine)({"x": X}, onehot([[0], [4]]), GRADIENT).flow.balances == []
    assert set(GRADIENT.rules) == set(KINDS) and all(rule == Vjp() for rule in GRADIENT.rules.values())
