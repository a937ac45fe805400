"""Signs told from the graph alone, held against what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from walking import as_written, canonised, network

from onnxcam.engines.session import RuntimeSession
from onnxcam.graph import Graph
from onnxcam.model import load
from onnxcam.signs import mostly_positive_tensors, nonnegative_tensors, self_gates
from onnxcam.taps import expose
from small_nets import NETS

REAL = ["efficientnet-lite0", "squeezenet-fp16-opset7", "pplcnet-orientation-paddle", "cifar10-resnet20", "mnist-cntk"]


def smallest_values(graph: Graph, seeds: int = 3) -> dict[str, float]:
    """The smallest value of every float tensor over random inputs, positive and negative."""
    names = [n for node in graph.nodes for n in node.outputs if n and getattr(graph.dtype(n), "kind", "") == "f"]
    session = RuntimeSession(expose(graph, names), names)
    (x,) = graph.inputs
    shape = [n if isinstance(n, int) else 2 for n in graph.shape(x) or ()]
    smallest = dict.fromkeys(names, np.inf)
    for seed in range(seeds):
        values = session.run({x: np.random.default_rng(seed).normal(size=shape, scale=3).astype(graph.dtype(x))})
        smallest = {n: min(smallest[n], float(values[n].min())) for n in names}
    return smallest


@pytest.mark.parametrize("net", NETS)
def test_what_is_called_nonnegative_never_is_negative(net):
    graph = canonised(NETS[net]())
    claimed = nonnegative_tensors(graph)
    smallest = smallest_values(graph)
    assert {n: v for n, v in smallest.items() if n in claimed and v < 0} == {}
    assert claimed & set(smallest)


@pytest.mark.parametrize("name", REAL)
def test_what_is_called_nonnegative_in_real_models_never_is_negative(name, assets):
    model = load(assets / "models" / f"{name}.onnx")
    graph = model.canonical().graph
    claimed = nonnegative_tensors(graph)
    smallest = smallest_values(graph, seeds=1)
    assert {n: v for n, v in smallest.items() if n in claimed and v < 0} == {}


@pytest.mark.parametrize("net", NETS)
def test_every_relu_is_seen_through_pooling_and_joining(net):
    """Not only safe but useful: of what random inputs never make negative, most is claimed."""
    graph = canonised(NETS[net]())
    claimed = nonnegative_tensors(graph)
    for node in graph.nodes:
        if node.op_type in ("MaxPool", "GlobalAveragePool") and node.inputs[0] in claimed:
            assert node.outputs[0] in claimed


def claims(body: str, opset: int = 17, **weights: np.ndarray) -> set[str]:
    return nonnegative_tensors(as_written(network(f"(float[1,2,4,4] x) => (float y) {{ {body} }}", opset, **weights)))


def test_a_clip_is_nonnegative_by_its_floor_unless_its_ceiling_is_below_zero():
    low, high, below = (np.float32(v) for v in (0, 6, -1))
    assert "y" in claims("y = Clip(x, low, high)", low=low, high=high)
    assert "y" not in claims("y = Clip(x, below, high)", below=below, high=high)
    assert "y" not in claims("r = Relu(x) y = Clip(r, , below)", below=below)
    assert "y" in claims("r = Relu(x) y = Clip(r, below, high)", below=below, high=high)
    assert "y" in claims("y = Clip<min=0.0, max=6.0>(x)", opset=10)


def test_what_undershoots_is_not_called_nonnegative():
    """Cubic interpolation and padding by a negative value make negatives out of none."""
    sizes = np.array([1, 2, 9, 9])
    assert "y" not in claims('r = Relu(x) y = Resize<mode="cubic">(r, , , sizes)', sizes=sizes)
    assert "y" in claims('r = Relu(x) y = Resize<mode="linear">(r, , , sizes)', sizes=sizes)
    pads, value = np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(-1)
    assert "y" not in claims("r = Relu(x) y = Pad(r, pads, value)", pads=pads, value=value)
    assert "y" in claims("r = Relu(x) y = Pad(r, pads)", pads=pads)


SELF_GATED = {
    "silu": "s = Sigmoid(x) y = Mul(x, s)",
    "silu, gate first": "s = Sigmoid(x) y = Mul(s, x)",
    "hard swish": "s = HardSigmoid<alpha=0.1666667, beta=0.5>(x) y = Mul(x, s)",
    "hard swish by hand": "a = Add(x, three) s = Clip(a, zero, six) y = Mul(x, s)",
    "mish": "p = Softplus(x) s = Tanh(p) y = Mul(x, s)",
    "gelu": "d = Div(x, root) e = Erf(d) s = Add(e, one) y = Mul(x, s)",
    "gelu, halved first": "d = Div(x, root) e = Erf(d) s = Add(e, one) h = Mul(x, half) y = Mul(h, s)",
    "gelu by tanh": """c = Pow(x, three) d = Mul(c, small) e = Add(x, d) f = Mul(e, root) t = Tanh(f)
                       s = Add(t, one) y = Mul(x, s)""",
}
NUMBERS = {"zero": 0, "half": 0.5, "one": 1, "three": 3, "six": 6, "root": 2**0.5, "small": 0.044715}


@pytest.mark.parametrize("spelling", SELF_GATED)
def test_an_activation_spelt_out_is_a_gate_and_what_it_lets_through(spelling):
    numbers = {name: np.float32(v) for name, v in NUMBERS.items()}
    graph = as_written(network(f"(float[1,2,4,4] x) => (float y) {{ {SELF_GATED[spelling]} }}", **numbers))
    gates = self_gates(graph)
    assert set(gates) == {"y"}
    assert "s" in gates["y"]
    assert "x" not in gates["y"]
    assert "y" in mostly_positive_tensors(graph, nonnegative_tensors(graph))


def test_a_gate_made_of_something_else_is_no_activation():
    weight = np.ones((2, 2, 1, 1), np.float32)
    graph = as_written(
        network("(float[1,2,4,4] x) => (float y) { c = Conv(x, w) s = Sigmoid(c) y = Mul(x, s) }", w=weight)
    )
    assert self_gates(graph) == {}


def test_tanh_is_not_called_mostly_positive():
    graph = as_written(network("(float[1,2,4,4] x) => (float y) { y = Tanh(x) }"))
    assert mostly_positive_tensors(graph, set()) == set()


def test_constants_count_by_their_values():
    positive, mixed = np.ones(2, np.float32), np.array([1, -1], np.float32)
    model = network("(float[1,2] x) => (float y) { r = Relu(x) a = Mul(r, p) y = Mul(r, q) }", p=positive, q=mixed)
    graph = as_written(onnx.shape_inference.infer_shapes(model))
    assert {"r", "a", "p"} <= nonnegative_tensors(graph)
    assert not {"y", "q", "x"} & nonnegative_tensors(graph)
