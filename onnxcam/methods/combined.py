"""Methods that need more than one walk: Guided Grad-CAM, contrastive LRP, FullGrad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.methods.base import Method, raw_of
from onnxcam.methods.upsample import upsampled

if TYPE_CHECKING:
    from onnxcam.graph import Graph, Node
    from onnxcam.layers import Layer
    from onnxcam.means import Means
    from onnxcam.runners import Batch, Codes

Array = np.ndarray


@dataclass(frozen=True)
class GuidedGradCam(Method):
    """Grad-CAM of a layer, enlarged, times guided backpropagation to the input (Selvaraju et al. 2017).

    A map of the input's size; its value in a cell is that of the channel where guided backpropagation is largest.
    """

    compiles: ClassVar[bool] = False
    cost: ClassVar[str] = "2 x (1 forward, 1 backward)"

    def runner(self, means: Means) -> _GuidedGradCam:
        return _GuidedGradCam(self, means)


class _GuidedGradCam:
    def __init__(self, method: Method, means: Means):
        from onnxcam.composites import composite

        self.means = means
        picture = means.picture
        self.coarse = means.walk(method)
        self.fine = means.walk(raw_of(method), {picture.node: picture}, composite("guided"))
        self.providers = self.coarse.providers
        self.notes: list[str] = []

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        coarse = self.coarse.run(feeds, codes)
        self.providers, self.notes = self.coarse.providers, self.coarse.notes
        (fine,) = self.fine.run(feeds, coarse.targets).maps.values()
        detail = np.abs(fine).max(2)
        maps = {name: upsampled(np.maximum(m, 0), detail.shape[2:]) * detail for name, m in coarse.maps.items()}
        return self.means.result(maps, coarse.targets, coarse.logits)


@dataclass(frozen=True)
class Contrasted(Method):
    """relu(m / sum(m) - d / sum(d)): the relevance of the class less that of what stands against it (Gu et al. 2018).

    `dual` says what stands against it: "others", the logits of the other classes; "negated", the class with the weights
    of the last linear operator negated.
    """

    dual: str = "others"
    compiles: ClassVar[bool] = False
    cost: ClassVar[str] = "2 x (1 forward, 1 backward)"

    def runner(self, means: Means) -> _Contrasted:
        return _Contrasted(self, means)


class _Contrasted:
    def __init__(self, method: Contrasted, means: Means):
        from onnxcam.rules import Opposite
        from onnxcam.starts import start

        self.means, rules = means, means.job.rules
        self.own = means.walk(raw_of(method))
        if method.dual == "others":
            self.dual = means.walk(raw_of(method), start=start("others"))
        else:
            self.dual = means.walk(raw_of(method), rules=replace(rules, last=Opposite()))
        self.providers, self.notes = self.own.providers, self.own.notes

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        own = self.own.run(feeds, codes)
        if own.logits.shape[1] == 1:
            raise UsageError("contrastive relevance weighs a class against others, and the model has a single logit")
        dual = self.dual.run(feeds, own.targets)
        self.providers, self.notes = self.own.providers, self.own.notes
        maps = {name: np.maximum(_share(r.sum(2)) - _share(dual.maps[name].sum(2)), 0) for name, r in own.maps.items()}
        return self.means.result(maps, own.targets, own.logits)


def _share(maps: Array) -> Array:
    """Each map divided by its sum; zeros where that is 0."""
    total = maps.astype(np.float64).sum(tuple(range(2, maps.ndim)), keepdims=True)
    return np.asarray(maps / np.where(total == 0, 1, total))


@dataclass(frozen=True)
class FullGrad(Method):
    """|x G| and, of every convolution, |b G| at its output, each scaled to 0..1, enlarged and summed over channels and
    layers (Srinivas and Fleuret 2019). Biases are those of the graph as it runs: BatchNormalization folded."""

    compiles: ClassVar[bool] = False

    def runner(self, means: Means) -> _FullGrad:
        return _FullGrad(self, means)


class _FullGrad:
    def __init__(self, method: Method, means: Means):
        from onnxcam.layers import Layer

        self.means, job = means, means.job
        for name, layer in job.layers.items():
            if layer.tensor != job.input:
                raise UsageError(f"method {method.name} explains the input, not layer {name!r}: give --layer input")
        graph, picture = job.canonical.graph, means.picture
        self.biases = dict(_biases(graph, job.canonical.logits))
        layers: dict[str, Layer] = {picture.node: picture}
        for tensor in self.biases:
            shape, node = graph.shape(tensor), graph.producer(tensor)
            assert shape is not None and node is not None
            layers[f"at {tensor}"] = Layer(None, node.name, node.op_type, tensor, shape, 0, "signed")
        self.inner = means.walk(raw_of(method), layers)
        self.providers, self.notes = self.inner.providers, self.inner.notes

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        means, job = self.means, self.means.job
        found = self.inner.run(feeds, codes)
        self.providers, self.notes = self.inner.providers, self.inner.notes
        picture = means.picture
        x = np.asarray(picture.activation(means.ops, means.ops.asarray(feeds[job.input])))
        total = _scaled(x[:, None] * found.maps[picture.node]).sum(2)
        for tensor, bias in self.biases.items():
            gradient = found.maps[f"at {tensor}"]
            part = _scaled(bias.reshape(-1, *(1,) * (gradient.ndim - 3)) * gradient).sum(2)
            total = total + upsampled(part, total.shape[2:])
        return means.result(dict.fromkeys(job.layers, total), found.targets, found.logits)


def _biases(graph: Graph, logits: str) -> list[tuple[str, Array]]:
    """(output, bias (C,)) of the convolutions on the way."""
    found = []
    for node in graph.between(graph.inputs, logits):
        shape = graph.shape(node.outputs[0])
        if node.op_type in ("Conv", "ConvTranspose") and shape is not None and (bias := _bias(node)) is not None:
            found.append((node.outputs[0], bias.astype(np.float64)))
    return found


def _bias(node: Node) -> Array | None:
    bias = node.constant(2) if node.has(2) else None
    return None if bias is None else np.ravel(bias)


def _scaled(values: Array) -> Array:
    """|values| (N, T, C, *spatial) stretched to 0..1, image by image."""
    size = np.abs(values.astype(np.float64))
    axes = tuple(range(2, size.ndim))
    size = size - size.min(axes, keepdims=True)
    return np.asarray(size / (size.max(axes, keepdims=True) + 1e-6))
