"""Methods that take more than one pass, each against a computation that shares no code with ours.

Oracles: captum for integrated gradients, guided backpropagation, DeconvNet, Guided Grad-CAM, occlusion; torch-cam for
Score-CAM where it is installed; else autograd and forward passes in float64 of the network that was exported, with the
papers' formulas. Float32 maps of a small network come to 1e-4 of the largest value, which is what issue 5 asks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles.torch_models import export, load_seeded
from torch import nn
from walking import relative

import onnxcam
from onnxcam.errors import UsageError
from onnxcam.methods import METHODS
from onnxcam.methods.perturbation import Rise
from onnxcam.methods.upsample import upsampled

CLASSES = [2, 4]
ENGINES = ("onnx", "numpy")
AUTOGRAD = "autograd"
Within = Callable[..., None]


class Net(nn.Module):
    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride, 1)
        self.act1 = nn.ReLU()
        self.conv = nn.Conv2d(8, 12, 3, 1, 1)
        self.act2 = nn.ReLU()
        self.head = nn.Linear(12, 6)

    def inner(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stem = self.act1(self.stem(x))
        return stem, self.act2(self.conv(stem) + 0.5 * F.pad(stem, (0, 0, 0, 0, 0, 4)))

    def behind(self, stem: torch.Tensor, body: torch.Tensor | None = None) -> torch.Tensor:
        body = self.act2(self.conv(stem) + 0.5 * F.pad(stem, (0, 0, 0, 0, 0, 4))) if body is None else body
        return self.head(body.mean((2, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind(*self.inner(x))


STEM, BODY = "Relu_0", "Relu_1"


@cache
def net() -> Net:
    made = load_seeded(Net())
    assert isinstance(made, Net)
    return made


@cache
def setting() -> tuple[onnxcam.Model, np.ndarray, Net]:
    x = np.random.default_rng(0).standard_normal((2, 3, 20, 26)).astype(np.float32)
    model = onnxcam.load(export(net(), x, "torchscript"), preprocess="none")
    return model, x, net().double()


def double(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float64))


def ours(method: str, layer: str = "auto", engine: str = "onnx", x: np.ndarray | None = None, **how: Any) -> np.ndarray:
    """(N, T, H, W)."""
    model, inputs, _ = setting()
    e = model.explain(inputs if x is None else x, layer, CLASSES, method=method, engine=engine, **how)
    return next(iter(e.maps.values()))


def gradient(x: np.ndarray, target: int, tensor: str = "input") -> np.ndarray:
    network = setting()[2]
    leaf = double(x).requires_grad_()
    if tensor == "input":
        return torch.autograd.grad(network(leaf)[:, target].sum(), leaf)[0].numpy()
    stem, body = network.inner(leaf)
    return torch.autograd.grad(network.behind(stem, body)[:, target].sum(), stem if tensor == STEM else body)[0].numpy()


def activation(tensor: str) -> np.ndarray:
    stem, body = setting()[2].inner(double(setting()[1]))
    return (stem if tensor == STEM else body).detach().numpy()


def by_class(compute: Any) -> np.ndarray:
    return np.stack([compute(c) for c in CLASSES], 1)


def relu(a: np.ndarray) -> np.ndarray:
    return np.maximum(a, 0)


def enlarged(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    shaped = torch.from_numpy(maps).reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(shaped, size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size).numpy()


def test_maps_are_enlarged_as_torch_enlarges_them() -> None:
    maps = np.random.default_rng(0).standard_normal((2, 3, 5, 7))
    for size in ((20, 26), (5, 7), (3, 4), (1, 50)):
        np.testing.assert_allclose(upsampled(maps, size), enlarged(maps, size), atol=1e-12)
    part = upsampled(maps, (20, 26), (3, 5), (10, 12))
    np.testing.assert_allclose(part, enlarged(maps, (20, 26))[..., 3:13, 5:17], atol=1e-12)


# -- averages of gradients ---------------------------------------------------------------------------------------


def noisy(method: str, samples: int, seed: int = 0) -> list[np.ndarray]:
    """The versions of the input: noise as documented, one field for all images, in parts of each image's range."""
    x, noise = setting()[1], METHODS[method].options()["noise"]
    deviation = noise * np.ptp(x.reshape(len(x), -1), axis=1).reshape(-1, 1, 1, 1)
    fields = [np.random.default_rng([seed, k]).standard_normal(x.shape[1:]) for k in range(samples)]
    return [(x + deviation * field).astype(np.float32) for field in fields]


@pytest.mark.parametrize("engine", ENGINES)
def test_smoothgrad_averages_gradients(within: Within, engine: str) -> None:
    versions = noisy("smoothgrad", 6)
    expected = by_class(lambda c: np.abs(np.mean([gradient(v, c) for v in versions], 0)).max(1))
    within("smoothgrad", AUTOGRAD, ours("smoothgrad", engine=engine, options={"samples": 6}), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_vargrad_is_the_variance_of_gradients(within: Within, engine: str) -> None:
    versions = noisy("vargrad", 6, seed=5)
    expected = by_class(lambda c: np.var([gradient(v, c) for v in versions], 0).sum(1))
    within("vargrad", AUTOGRAD, ours("vargrad", engine=engine, options={"samples": "6", "seed": 5}), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", [STEM, BODY])
def test_smooth_grad_cam_plus_plus_is_its_formula(within: Within, layer: str, engine: str) -> None:
    """Omeiza et al., equations 5 to 7. (torch-cam takes the last sample's gradient where the paper has the mean.)"""
    versions, a = noisy("smooth-grad-cam++", 4), activation(layer)

    def expected(c: int) -> np.ndarray:
        g = [gradient(v, c, layer) for v in versions]
        first, second, third = (np.mean([one**p for one in g], 0) for p in (1, 2, 3))
        alpha = second / (2 * second + a.sum((2, 3), keepdims=True) * third + 1e-6)
        return relu(np.einsum("nchw,nc->nhw", a, (alpha * relu(first)).sum((2, 3))))

    found = ours("smooth-grad-cam++", layer, engine, options={"samples": 4})
    within("smooth-grad-cam++", AUTOGRAD, found, by_class(expected))


@pytest.mark.parametrize("baseline", [0.0, -1.5])
def test_integrated_gradients_are_captums(within: Within, baseline: float) -> None:
    _, x, network = setting()
    peer = captum.attr.IntegratedGradients(network)
    flat = torch.full_like(double(x), baseline)
    expected = by_class(lambda c: peer.attribute(double(x), flat, target=c, n_steps=20).numpy().sum(1))
    found = ours("integrated-gradients", options={"samples": 20, "baseline": baseline})
    within("integrated-gradients", "captum", found, expected)
    # Completeness: the map sums to what the logit has more than at the baseline.
    with torch.no_grad():
        rise = (network(double(x)) - network(flat))[:, CLASSES].numpy()
    np.testing.assert_allclose(found.sum((2, 3)), rise, rtol=0.05, atol=0.02)


def test_noise_does_not_depend_on_what_else_is_in_the_batch() -> None:
    x = setting()[1]
    both = ours("smoothgrad", options={"samples": 3})
    alone = np.concatenate([ours("smoothgrad", x=x[i : i + 1], options={"samples": 3}) for i in (0, 1)])
    assert relative(both, alone) <= 1e-5


# -- rectified gradients -----------------------------------------------------------------------------------------


QUIET = pytest.mark.filterwarnings("ignore:Setting backward hooks", "ignore:Input Tensor 0 did not already")


@QUIET
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("method", "peer"), [("guided-backprop", "GuidedBackprop"), ("deconvnet", "Deconvolution")])
def test_rectified_gradients_are_captums(within: Within, method: str, peer: str, engine: str) -> None:
    _, x, network = setting()
    attribution = getattr(captum.attr, peer)(network)
    expected = by_class(lambda c: attribution.attribute(double(x), target=c).abs().amax(1).detach().numpy())
    within(method, "captum", ours(method, engine=engine), expected)


@QUIET
@pytest.mark.parametrize("engine", ENGINES)
def test_guided_grad_cam_is_captums(within: Within, engine: str) -> None:
    _, x, network = setting()
    attribution = captum.attr.GuidedGradCam(network, network.act1)
    bilinear = {"interpolate_mode": "bilinear"}
    expected = by_class(
        lambda c: attribution.attribute(double(x), target=c, **bilinear).abs().amax(1).detach().numpy()  # type: ignore[arg-type]
    )
    within("guided-grad-cam", "captum", ours("guided-grad-cam", STEM, engine), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_fullgrad_sums_input_and_biases(within: Within, engine: str) -> None:
    """The formula of Srinivas and Fleuret with autograd's gradients; their code scales, enlarges and sums like this."""
    _, x, network = setting()

    def scaled(a: np.ndarray) -> np.ndarray:
        a = np.abs(a)
        a = a - a.min((1, 2, 3), keepdims=True)
        return a / (a.max((1, 2, 3), keepdims=True) + 1e-6)

    def expected(c: int) -> np.ndarray:
        total = scaled(x * gradient(x, c)).sum(1)
        leaf = double(x)
        before = network.stem(leaf)
        before.retain_grad()
        stem = network.act1(before)
        inner = network.conv(stem)
        inner.retain_grad()
        network.behind(stem, network.act2(inner + 0.5 * F.pad(stem, (0, 0, 0, 0, 0, 4))))[:, c].sum().backward()
        for tensor, layer in ((before, network.stem), (inner, network.conv)):
            assert tensor.grad is not None and layer.bias is not None
            part = tensor.grad.numpy() * layer.bias.detach().numpy().reshape(-1, 1, 1)
            total = total + enlarged(scaled(part).sum(1), x.shape[2:])
        return total

    within("fullgrad", AUTOGRAD, ours("fullgrad", engine=engine), by_class(expected))


# -- singular vectors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [STEM, BODY])
def test_eigen_cam_projects_on_the_first_singular_vector(within: Within, layer: str) -> None:
    a = torch.from_numpy(activation(layer)).flatten(2).mT  # (N, cells, C)
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    expected = (u[:, :, 0] * s[:, :1]).reshape(len(a), *activation(layer).shape[2:]).abs().numpy()
    found = ours("eigen-cam", layer)
    within("eigen-cam", "torch.linalg", found, np.stack([expected, expected], 1))


@pytest.mark.parametrize("engine", ENGINES)
def test_eigen_grad_cam_is_that_of_pytorch_grad_cam_but_for_the_sign(within: Within, engine: str) -> None:
    """Oracle: the leading eigenvector of the covariance of channels, by torch.linalg.eigh."""

    def expected(c: int) -> np.ndarray:
        weighted = torch.from_numpy(activation(BODY) * gradient(setting()[1], c, BODY)).flatten(2).mT
        centred = weighted - weighted.mean(1, keepdim=True)
        vector = torch.linalg.eigh(centred.mT @ centred)[1][:, :, -1]
        return np.abs((centred @ vector[:, :, None]).reshape(len(centred), *activation(BODY).shape[2:]).numpy())

    within("eigengrad-cam", "torch.linalg", np.abs(ours("eigengrad-cam", BODY, engine)), by_class(expected))


# -- scores of changed passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [STEM, BODY])
def test_score_cam_weighs_channels_by_the_logits_behind_their_masks(within: Within, layer: str) -> None:
    _, x, network = setting()
    a = activation(layer)
    up = enlarged(a, x.shape[2:])
    low, high = up.min((2, 3), keepdims=True), up.max((2, 3), keepdims=True)
    masks = (up - low) / np.where(high > low, high - low, 1)
    with torch.no_grad():
        logits = torch.stack([network(double(x) * torch.from_numpy(masks[:, k : k + 1])) for k in range(a.shape[1])], 1)
    weights = torch.softmax(logits, 1).numpy()
    expected = by_class(lambda c: relu(np.einsum("nchw,nc->nhw", a, weights[:, :, c])))
    within("score-cam", "forward passes", ours("score-cam", layer, batch_size=5), expected)


def test_score_cam_is_that_of_torch_cam(within: Within) -> None:
    """At a layer of the input's size: elsewhere torch-cam scales masks before it enlarges them, the paper after."""
    peer = pytest.importorskip("torchcam.methods")
    x, network = setting()[1], load_seeded(Net(stride=1))
    model = onnxcam.load(export(network, x, "torchscript"), preprocess="none")
    maps = model.explain(x, STEM, CLASSES, method="score-cam").maps[STEM]
    network = network.double()
    for c in CLASSES:
        with peer.ScoreCAM(network, "act1", input_shape=x.shape[1:]) as extractor:
            network(double(x))
            (expected,) = extractor(c, normalized=False)
        within("score-cam", "torch-cam", maps[:, CLASSES.index(c)], expected.detach().numpy())


@pytest.mark.parametrize("layer", [STEM, BODY])
def test_ablation_cam_weighs_channels_by_what_the_logit_loses(within: Within, layer: str) -> None:
    _, _, network = setting()
    a = activation(layer)

    def logits(tensor: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            changed = torch.from_numpy(tensor)
            return (network.behind(changed) if layer == STEM else network.behind(changed, changed)).numpy()

    y = logits(a)
    without = []
    for k in range(a.shape[1]):
        changed = a.copy()
        changed[:, k] = 0
        without.append((y - logits(changed)) / y)
    weights = np.stack(without, 1)
    expected = by_class(lambda c: relu(np.einsum("nchw,nc->nhw", a, weights[:, :, c])))
    within("ablation-cam", "forward passes", ours("ablation-cam", layer, batch_size=3), expected)


@pytest.mark.parametrize("blur", [0.0, 0.4])
def test_recipro_cam_is_the_probability_by_one_cell(within: Within, blur: float) -> None:
    _, _, network = setting()
    a = activation(BODY)
    height, width = a.shape[2:]
    expected = np.zeros((2, 2, height, width))
    ys, xs = np.mgrid[:height, :width]
    for i in range(height):
        for j in range(width):
            apart = np.maximum(np.abs(ys - i), np.abs(xs - j))
            kept = np.exp(-((ys - i) ** 2 + (xs - j) ** 2) / (2 * (blur or 1) ** 2)) * (apart <= (1 if blur else 0))
            changed = torch.from_numpy(a * kept)
            with torch.no_grad():
                expected[:, :, i, j] = torch.softmax(network.behind(changed, changed), 1)[:, CLASSES].numpy()
    found = ours("recipro-cam", BODY, options={"blur": blur}, batch_size=50)
    within("recipro-cam", "forward passes", found, expected)


def test_occlusion_is_captums(within: Within) -> None:
    _, x, network = setting()
    attribution = captum.attr.Occlusion(network)
    window, stride = round(0.2 * 26), round(0.1 * 26)
    expected = by_class(
        lambda c: attribution.attribute(
            double(x), sliding_window_shapes=(3, window, window), strides=(3, stride, stride), target=c, baselines=0.25
        ).numpy()[:, 0]
    )
    found = ours("occlusion", options={"window": 0.2, "stride": 0.1, "fill": 0.25}, batch_size=16)
    within("occlusion", "captum", found, expected)


def test_rise_is_the_mean_of_masks_weighted_by_probabilities(within: Within) -> None:
    _, x, network = setting()
    method = METHODS["rise"].with_options({"samples": 40, "cells": 4, "keep": 0.3, "seed": 9})
    assert isinstance(method, Rise)
    masks = method.masks(x.shape[2:], 0, 40)
    assert masks.shape == (40, 20, 26) and masks.min() >= 0 and masks.max() <= 1
    assert abs(method.masks((60, 60), 0, 400).mean() - 0.3) < 0.03
    with torch.no_grad():
        p = torch.stack([torch.softmax(network(double(x) * torch.from_numpy(m)), 1) for m in masks]).numpy()
    expected = by_class(lambda c: np.einsum("kn,khw->nhw", p[:, :, c], masks) / (40 * 0.3))
    found = ours("rise", options={"samples": 40, "cells": 4, "keep": 0.3, "seed": 9}, batch_size=7)
    within("rise", "forward passes", found, expected)
    again = ours("rise", options={"samples": 40, "cells": 4, "keep": 0.3, "seed": 9}, batch_size=40)
    assert relative(again, found) <= 1e-5


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rise", {"window": 1}, "method rise has no option 'window': it has samples, cells, keep, seed"),
        ("grad-cam", {"samples": 3}, "method grad-cam has no option 'samples': it has none"),
        ("rise", {"samples": "many"}, "option samples of method rise is a whole number, not 'many'"),
        ("rise", {"keep": 1.5}, "keep of method rise lies between 0 and 1"),
        ("smoothgrad", {"samples": 0}, "samples of method smoothgrad is 1 or more"),
        ("occlusion", {"stride": 0}, "parts of the input"),
    ],
)
def test_options_that_mean_nothing_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        METHODS[method].with_options(options)


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if not m.compiles])
def test_what_takes_many_passes_is_not_compiled(method: str) -> None:
    with pytest.raises(UsageError, match=f"method {re.escape(method)} is no single pass.*relevance-cam"):
        onnxcam.compile(setting()[0], method=method)


@pytest.mark.parametrize("method", ["rise", "occlusion", "fullgrad"])
def test_methods_of_the_input_refuse_other_layers(method: str) -> None:
    with pytest.raises(UsageError, match=f"method {method} explains the input, not layer 'Relu_0'"):
        ours(method, STEM)


def test_progress_is_told_within_an_image() -> None:
    told: list[float] = []
    ours("rise", options={"samples": 8}, batch_size=2, progress=lambda done, total: told.append(done / total))
    assert told == sorted(told) and told[-1] == 1 and len(told) >= 8
