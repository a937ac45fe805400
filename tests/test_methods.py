"""Every method against an independent computation of its formula, on both engines, for two classes at once.

Oracles: activations and gradients by torch's hooks and autograd in float64 on the network that was exported; from them
the maps by pytorch-grad-cam's own classes, where that package is installed, and by the papers' formulas in NumPy.
Float32 maps of a small network come to 1e-4 of the largest value, which is what issue 5 asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
import torch
from oracles.torch_models import export, load_seeded
from torch import nn
from walking import relative

import onnxcam
from onnxcam.errors import UsageError
from onnxcam.methods import METHODS, Method

ENGINES = ("onnx", "numpy")
CLASSES = [2, 4]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@cache
def setting() -> tuple[onnxcam.Model, np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """The model, its input, A (N, C, H, W) and G (T, N, C, H, W) of three tensors, and the weights of the head."""
    net = load_seeded(Net())
    x = np.random.default_rng(0).standard_normal((2, 3, 20, 26)).astype(np.float32)
    model = onnxcam.load(export(net, x, "torchscript"), preprocess="none")
    double = net.double()
    image = torch.from_numpy(x).double().requires_grad_()
    stem = double.stem(image)
    body = double.body(stem)
    logits = double.head(body.mean((2, 3)))
    tensors = (stem, body, image)
    found = {}
    for name, tensor in zip(("stem", "body", "input"), tensors, strict=True):
        rows = [torch.autograd.grad(logits[:, c].sum(), tensor, retain_graph=True)[0].numpy() for c in CLASSES]
        found[name] = (tensor.detach().numpy(), np.stack(rows))
    return model, x, found, double.head.weight.detach().numpy()


LAYERS = {"stem": "Relu_0", "body": "Relu_2", "input": "input"}


def maps(method: str, engine: str) -> dict[str, np.ndarray]:
    """(T, N, H, W) by layer; CAM is defined at the last one only."""
    model, x, _, _ = setting()
    layers = [LAYERS["body"]] if method == "cam" else list(LAYERS.values())
    e = model.explain(x, layers, CLASSES, method=method, engine=engine)
    by_typed = dict(zip(layers, e.maps.values(), strict=True))
    return {name: np.moveaxis(by_typed[typed], 1, 0) for name, typed in LAYERS.items() if typed in by_typed}


def relu(a: np.ndarray) -> np.ndarray:
    return np.maximum(a, 0)


def weighted(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.einsum("nchw,nc->nhw", a, w)


def plus_plus(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    below = 2 * g**2 + a.sum((2, 3), keepdims=True) * g**3 + 1e-6
    alpha = np.where(g != 0, g**2 / below, 0)
    return relu(weighted(a, (relu(g) * alpha).sum((2, 3))))


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "grad-cam": lambda a, g: relu(weighted(a, g.mean((2, 3)))),
    "grad-cam++": plus_plus,
    "xgrad-cam": lambda a, g: relu(weighted(a, (g * a).sum((2, 3)) / (a.sum((2, 3)) + 1e-7))),
    "hirescam": lambda a, g: relu((a * g).sum(1)),
    "layercam": lambda a, g: relu((a * relu(g)).sum(1)),
    "grad-cam-elementwise": lambda a, g: relu(a * g).sum(1),
    "saliency": lambda a, g: np.abs(g).max(1),
    "input-x-gradient": lambda a, g: (a * g).sum(1),
    "cam": lambda a, g: weighted(a, g.sum((2, 3))),
}
PEERS = {
    "grad-cam": "GradCAM",
    "grad-cam++": "GradCAMPlusPlus",
    "xgrad-cam": "XGradCAM",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "grad-cam-elementwise": "GradCAMElementWise",
}


def test_every_method_of_gradients_has_a_formula_here() -> None:
    assert {m.name for m in METHODS.values() if m.composite == "gradient" and type(m) is Method} == set(FORMULAS)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", FORMULAS)
def test_a_method_is_its_formula(within: Callable[..., None], method: str, engine: str) -> None:
    _, _, oracle, _ = setting()
    got = maps(method, engine)
    for name, (a, g) in oracle.items():
        if name not in got or (method == "xgrad-cam" and name == "input"):
            continue  # the latter divides by the sum of a channel, which a picture around zero leaves to chance
        expected = np.stack([FORMULAS[method](a, one) for one in g])
        within(method, "autograd", got[name], expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of an object made without its model
@pytest.mark.parametrize("method", PEERS)
def test_a_method_is_that_of_pytorch_grad_cam(within: Callable[..., None], method: str) -> None:
    peer = pytest.importorskip("pytorch_grad_cam")
    _, _, oracle, _ = setting()
    a, g = oracle["stem"]
    cam = object.__new__(getattr(peer, PEERS[method]))
    expected = np.stack([np.maximum(cam.get_cam_image(None, None, None, a, one, False), 0) for one in g])
    within(method, "pytorch-grad-cam", maps(method, "onnx")["stem"], expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_cam_is_the_classifiers_weights_times_the_channels(engine: str) -> None:
    _, _, oracle, weights = setting()
    a, _ = oracle["body"]
    expected = np.stack([np.einsum("nchw,c->nhw", a, weights[c]) for c in CLASSES])
    assert relative(maps("cam", engine)["body"], expected) <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_maps_of_relevance_are_its_positive_part_and_its_product_with_activations(
    within: Callable[..., None], engine: str
) -> None:
    """Oracle: the relevance itself, from the array engine in float64, combined here."""
    model, x, oracle, _ = setting()
    channels = []
    for c in range(8):
        one = Method("one", lambda ops, a, r, c=c: r[:, :, c], "relevance_cam", "contrast", False, "one channel")
        e = model.explain(x, [LAYERS["stem"]], CLASSES, method=one, engine="numpy", dtype="float64")
        channels.append(np.moveaxis(next(iter(e.maps.values())), 1, 0))
    r = np.stack(channels, 2)
    a = oracle["stem"][0]
    own = "relevance in float64"
    within("relevance-map", own, maps("relevance-map", engine)["stem"], relu(r.sum(2)))
    within("relevance-layer-cam", own, maps("relevance-layer-cam", engine)["stem"], relu((relu(r) * a).sum(2)))


@pytest.mark.parametrize("layer", ["Relu_0", "Relu_1", "input"])
def test_cam_is_refused_where_the_classifier_has_no_weights_for_channels(layer: str) -> None:
    model, x, _, _ = setting()
    with pytest.raises(UsageError, match=r"method cam means nothing at layer .*dense layer must follow"):
        model.explain(x, layer, method="cam")
    with pytest.raises(UsageError, match="method cam means nothing"):
        onnxcam.compile(model, [layer], method="cam")


@pytest.mark.parametrize("method", ["saliency", "guided-backprop"])
def test_a_compiled_model_explains_the_layer_that_explain_does(method: str) -> None:
    """By default the input, for methods that are meant for it."""
    model, x, _, _ = setting()
    compiled = onnxcam.compile(model, targets=CLASSES, method=method)
    session = ort.InferenceSession(compiled.to_bytes(), providers=["CPUExecutionProvider"])
    (name,) = compiled.maps.values()
    (found,) = session.run([name], {model.spec.name: x})
    e = model.explain(x, targets=CLASSES, method=method)
    assert list(e.maps) == ["input"] and e.maps["input"].shape == (2, 2, 20, 26)
    assert relative(found, e.maps["input"]) <= 1e-5
