"""From where on two models differ: their activations compared number by number, layer by layer, the input first.

Layers that have the same resolution and number of channels in both are compared; a network of another architecture has
few such, and then this says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcam.audit.matching import Pair, matched
from onnxcam.engines.array import array_ops
from onnxcam.engines.session import RuntimeSession, Settings
from onnxcam.metrics.agreement import likeness
from onnxcam.model import Model, filled
from onnxcam.pictures import open_image
from onnxcam.taps import expose

INPUT = "input"
PARTED = 0.1  # what the likeness of two layers must fall short of 1 by to be told apart
LAYERS = 64  # of deep networks, evenly chosen


@dataclass(frozen=True)
class Drift:
    """How like the activations of one layer are in both models, mean over pictures: 1 where they are the same, 0 where
    they are opposite; `low` of the picture where they differ most."""

    layer: str
    other: str
    likeness: float
    low: float


def drift(first: Model, second: Model, pictures: Sequence[str], settings: Settings) -> list[Drift]:
    """The input and all layers that can be compared, in the first model's order."""
    pairs = [p for p in matched(first, second).values() if p.comparable]
    if len(pairs) > LAYERS:
        picks = np.unique(np.linspace(0, len(pairs) - 1, LAYERS).round().astype(int))
        pairs = [pairs[i] for i in picks]
    taps = [_Taps(model, [getattr(p, side) for p in pairs], settings) for model, side in ((first, "a"), (second, "b"))]
    values: list[list[float]] = [[] for _ in range(len(pairs) + 1)]
    for picture in pictures:
        image = open_image(picture)
        (x, a), (y, b) = (t.of(image) for t in taps)
        alike = x.shape == y.shape and first.spec.is_integer == second.spec.is_integer  # in one unit
        values[0].append(likeness(x, y) if alike else float("nan"))
        for found, one, other in zip(values[1:], a, b, strict=True):
            found.append(likeness(one, other))
    names = [(INPUT, INPUT), *((p.a.node, p.b.node) for p in pairs)]
    return [
        Drift(name, other, float(np.mean(found)), float(np.min(found)))
        for (name, other), found in zip(names, values, strict=True)
        if not np.isnan(found).any()
    ]


def parted_at(found: Sequence[Drift], by: float = PARTED) -> Drift | None:
    """The first layer where the two are no longer alike; None where they stay so to the end.

    The input counts where the layer behind it is unlike as well: preprocessing may have been folded into the network.
    """
    unlike = [d.likeness < 1 - by for d in found]
    for k, d in enumerate(found):
        if unlike[k] and (d.layer != INPUT or any(unlike[k + 1 : k + 2])):
            return d
    return None


class _Taps:
    """A model's input and activations, (C, H, W) each, of one picture at a time."""

    def __init__(self, model: Model, layers: Sequence[Pair] | Sequence[object], settings: Settings):
        self.model, self.layers = model, list(layers)
        canonical = model.canonical()
        tensors = list(dict.fromkeys(layer.tensor for layer in self.layers))  # type: ignore[attr-defined]
        self.tensors = tensors
        self.session = RuntimeSession(expose(canonical.graph, tensors), tensors, settings) if tensors else None

    def of(self, image: object) -> tuple[np.ndarray, list[np.ndarray]]:
        model, ops = self.model, array_ops("numpy", "float32")
        prepared = model.preprocess.apply(image, model.spec)  # type: ignore[arg-type]
        x = prepared.array[0].astype(np.float64)
        x = x.transpose(2, 0, 1) if model.spec.layout == "NHWC" else x
        if self.session is None:
            return x, []
        values = self.session.run({model.spec.name: filled(prepared.array, model.spec.batch)})
        return x, [
            np.asarray(layer.activation(ops, ops.asarray(values[layer.tensor])))[0]  # type: ignore[attr-defined]
            for layer in self.layers
        ]
