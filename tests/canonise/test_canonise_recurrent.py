"""LSTM, GRU and RNN are unrolled into dense layers, gates and sums.

Oracle for values: ONNX Runtime on the node as it is, float32, 1e-5. Oracle for the gradient: torch's modules and
autograd in float64, whose gates come in another order; 1e-6, as the two biases of a gate are added up in float32. For
relevance: it is conserved where nothing takes any of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from walking import ENGINES, Walker, canonised, network, relative

from onnxcam.composites import COMPOSITES
from onnxcam.errors import ModelError
from onnxcam.graph import Graph

STEPS, IMAGES, FEATURES, HIDDEN = 4, 3, 5, 6
ROWS = {"LSTM": 4, "GRU": 3, "RNN": 1}
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}  # torch's gates, in the order of ONNX


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.5 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def model_of(
    op: str,
    direction: str = "forward",
    bias: bool = True,
    more: str = "",
    features: int = FEATURES,
    **given: np.ndarray,
) -> onnx.ModelProto:
    """One recurrent node over x (steps, images, features), and its outputs y, h and c."""
    directions, rows = (2 if direction == "bidirectional" else 1), ROWS[op] * HIDDEN
    weights = {"w": normal(directions, rows, features), "r": normal(directions, rows, HIDDEN, seed=1)}
    if bias:
        weights["b"] = normal(directions, 2 * rows, seed=2)
    inputs = ["x", "w", "r", "b" if bias else "", *(name if name in given else "" for name in ("n", "h0", "c0", "p"))]
    while not inputs[-1]:
        inputs.pop()
    outputs = "y, h, c" if op == "LSTM" else "y, h"
    sizes = "?,?,?,?"
    kinds = {"y": sizes, "h": "?,?,?", "c": "?,?,?"}
    declared = ", ".join(f"float[{kinds[o]}] {o}" for o in outputs.split(", "))
    body = f'[rnn] {outputs} = {op}<hidden_size={HIDDEN}, direction="{direction}"{more}>({", ".join(inputs)})'
    lead = f"{IMAGES},{STEPS}" if "layout=1" in more else f"{STEPS},{IMAGES}"
    return network(f"(float[{lead},{features}] x) => ({declared}) {{ {body} }}", **weights, **given)


def outputs_of(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from onnxcam.engines.session import RuntimeSession
    from onnxcam.taps import expose

    names = list(graph.outputs)
    return RuntimeSession(expose(graph, names), names).run(feeds)


CASES: list[tuple[str, dict[str, Any]]] = [
    *((op, {"direction": d}) for op in ROWS for d in ("forward", "reverse", "bidirectional")),
    *((op, {"bias": False}) for op in ROWS),
    *((op, {"h0": normal(2, IMAGES, HIDDEN, seed=5), "direction": "bidirectional"}) for op in ROWS),
    ("LSTM", {"h0": normal(1, IMAGES, HIDDEN, seed=5), "c0": normal(1, IMAGES, HIDDEN, seed=6)}),
    ("LSTM", {"h0": np.zeros((1, IMAGES, HIDDEN), np.float32), "c0": np.zeros((1, IMAGES, HIDDEN), np.float32)}),
    ("LSTM", {"n": np.full(IMAGES, STEPS, np.int32)}),
    ("LSTM", {"p": np.zeros((1, 3 * HIDDEN), np.float32)}),
    ("LSTM", {"more": ', activations=["Sigmoid", "Relu", "Softsign"]'}),
    ("GRU", {"more": ", linear_before_reset=1"}),
    ("GRU", {"more": ", linear_before_reset=1", "bias": False, "direction": "reverse"}),
    ("RNN", {"more": ', activations=["Relu", "Relu"]', "direction": "bidirectional"}),
]


@pytest.mark.parametrize("op, options", CASES, ids=[f"{op} {sorted(o)}" for op, o in CASES])
def test_the_steps_compute_what_the_node_computes(op: str, options: dict[str, Any]) -> None:
    model, feeds = model_of(op, **options), {"x": normal(STEPS, IMAGES, FEATURES, seed=3)}
    graph = canonised(model)
    assert not {node.op_type for node in graph.nodes} & set(ROWS)
    want = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    got = outputs_of(graph, feeds)
    for name, value in zip([o.name for o in model.graph.output], want, strict=True):
        assert got[name].shape == value.shape
        assert np.abs(got[name] - value).max() <= 1e-5


@pytest.mark.parametrize("op", ROWS)
def test_images_may_come_first(op: str) -> None:
    """ONNX Runtime has no layout 1; oracle: the same node with layout 0, its input and outputs turned."""
    x = normal(STEPS, IMAGES, FEATURES, seed=3)
    want = outputs_of(canonised(model_of(op, "bidirectional")), {"x": x})
    got = outputs_of(canonised(model_of(op, "bidirectional", more=", layout=1")), {"x": x.swapaxes(0, 1).copy()})
    assert np.array_equal(got["y"], want["y"].transpose(2, 0, 1, 3))
    assert np.array_equal(got["h"], want["h"].swapaxes(0, 1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("op", ROWS)
def test_its_gradient_is_that_of_torch(op: str, engine: str) -> None:
    more = ", linear_before_reset=1" if op == "GRU" else ""
    model, x = model_of(op, "bidirectional", more=more), normal(STEPS, IMAGES, FEATURES, seed=3).astype(np.float64)
    module = getattr(torch.nn, op)(FEATURES, HIDDEN, bidirectional=True).double()
    named = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}

    def gates(a: np.ndarray) -> torch.Tensor:
        parts = np.split(a, ROWS[op])
        back = [parts[ORDER[op].index(i)] for i in range(ROWS[op])]
        return torch.from_numpy(np.concatenate(back))

    with torch.no_grad():
        for d, suffix in enumerate(("", "_reverse")):
            getattr(module, "weight_ih_l0" + suffix).copy_(gates(named["w"][d]))
            getattr(module, "weight_hh_l0" + suffix).copy_(gates(named["r"][d]))
            for i, which in enumerate(("ih", "hh")):
                getattr(module, f"bias_{which}_l0{suffix}").copy_(gates(np.split(named["b"][d], 2)[i]))
    leaf = torch.from_numpy(x).requires_grad_()
    y = module(leaf)[0].reshape(STEPS, IMAGES, 2, HIDDEN).transpose(1, 2)
    walker = Walker(canonised(model), ["x"], "y", engine=engine)
    values = walker.forward({"x": x})
    assert relative(values["y"], y.detach().numpy()) <= 1e-6
    start = np.random.default_rng(4).standard_normal((2, *y.shape))
    walk = walker.back(values, start, COMPOSITES["gradient"])
    rows = [torch.autograd.grad(y, leaf, torch.from_numpy(u), retain_graph=True)[0].numpy() for u in start]
    assert relative(walk["x"], np.stack(rows)) <= 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_relevance_passes_gates_and_reaches_every_step(op: str, direction: str, engine: str) -> None:
    """Without biases z-plus and a sum in proportion lose nothing: what starts at the last state arrives at the input.

    Of forty inputs one at least contributes positively to any unit.
    """
    graph = canonised(model_of(op, direction, bias=False, features=40, more=", layout=1"))
    walker = Walker(graph, ["x"], "h", engine=engine)
    values = walker.forward({"x": normal(IMAGES, STEPS, 40, seed=3)})
    start = np.ones((1, *values["h"].shape))
    walk = walker.back(values, start, COMPOSITES["relevance_cam"])
    assert abs(walk["x"].sum() - start.sum()) <= 1e-6 * start.sum()
    assert (np.abs(walk["x"][0]).sum((0, 2)) > 0).all()
    sources = {node.op_type for node in graph.nodes}
    assert {"Gemm", "Mul" if op != "RNN" else "Tanh"} <= sources


def test_a_gate_gets_no_relevance() -> None:
    """Of the dense layers of an LSTM those of the gates are left out; the cell's get it all."""
    graph = canonised(model_of("LSTM"))
    gates = [node.outputs[0] for node in graph.nodes if node.op_type == "Sigmoid"]
    cells = [node.outputs[0] for node in graph.nodes if node.op_type == "Tanh"]
    walker = Walker(graph, ["x", *gates, *cells], "h")
    walk = walker({"x": normal(STEPS, IMAGES, FEATURES)}, np.ones((1, 1, IMAGES, HIDDEN)), COMPOSITES["epsilon_plus"])
    assert not any(name in walk for name in gates)
    assert all(name in walk for name in cells)


@pytest.mark.parametrize(
    "op, options, why",
    [
        ("LSTM", {"more": ", clip=0.5"}, "clips"),
        ("LSTM", {"p": normal(1, 3 * HIDDEN)}, "peepholes"),
        ("LSTM", {"n": np.array([4, 2, 3], np.int32)}, "differ in length"),
        ("RNN", {"more": ', activations=["ThresholdedRelu"]'}, "parameters"),
    ],
)
def test_what_cannot_be_unrolled_stays_and_says_why(op: str, options: dict[str, Any], why: str) -> None:
    from onnxcam.canonise.recurrent import why_rolled

    graph = canonised(model_of(op, **options))
    (node,) = [n for n in graph.surgeon.nodes if n.op == op]
    assert why in (why_rolled(node) or "")
    with pytest.raises(ModelError, match=f"'rnn'.*{op}.*{why}"):
        Walker(graph, ["x"], "h", "float32")(
            {"x": normal(STEPS, IMAGES, FEATURES)}, np.ones((1, 1, 3, 6)), COMPOSITES["gradient"]
        )
