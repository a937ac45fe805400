"""Attention rollout: how much of each token flows to where the class is read, by the attention of all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.methods.base import INPUT, Method, raw_of
from onnxcam.operators.roles import value_of

if TYPE_CHECKING:
    from onnxcam.graph import Graph
    from onnxcam.layers import Layer
    from onnxcam.maps import Form
    from onnxcam.means import Means
    from onnxcam.runners import Batch, Codes

Array = np.ndarray
NEEDED = (
    "rollout multiplies the attention of all blocks, so each must attend from every token of the picture to all "
    "others, as in ViT and DeiT; relevance-cam and lrp have no such need"
)


@dataclass(frozen=True)
class Rollout(Method):
    """The product over blocks of (mean over heads of A + 1) / 2, rows summing to 1 (Abnar and Zuidema 2020)."""

    compiles: ClassVar[bool] = False
    walks: ClassVar[bool] = False
    cost: ClassVar[str] = "1 forward"

    def runner(self, means: Means) -> _Rollout:
        return _Rollout(self, means)


@dataclass(frozen=True)
class GradientRollout(Rollout):
    """R <- R + mean over heads of (A G)+ R, block by block, G the gradient at the attention (Chefer et al. 2021)."""

    walks: ClassVar[bool] = True
    cost: ClassVar[str] = "2 forwards, 1 backward"


class _Rollout:
    def __init__(self, method: Rollout, means: Means):
        from onnxcam.layers import Layer

        self.means, job = means, means.job
        graph = job.canonical.graph
        for name, layer in job.layers.items():
            if layer.tensor != job.input:
                raise UsageError(f"method {method.name} explains the input, not layer {name!r}: give --layer {INPUT}")
        self.attention = attentions(graph, job.canonical.logits)
        if not self.attention:
            raise UsageError(f"method {method.name} needs attention, and there is none on the way to the logits")
        sizes = {shape[-2:] for name in self.attention if (shape := graph.shape(name)) is not None}
        length = next(iter(sizes))[0] if len(sizes) == 1 else None
        form = None if length is None else _tokens(means.rows, length)
        if len(sizes) != 1 or next(iter(sizes))[0] != next(iter(sizes))[1] or form is None:
            raise UsageError(
                f"method {method.name} means nothing here, where attention differs from block to block: {NEEDED}"
            )
        self.form = form
        self.forward = means.forward(self.attention)
        self.inner = None
        if isinstance(method, GradientRollout):
            places = {
                name: Layer(None, name, "attention", name, graph.shape(name) or (), 0, "nonnegative")
                for name in self.attention
            }
            self.inner = means.walk(raw_of(method), places)
        self.providers, self.notes = self.forward.providers, self.forward.notes

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        from onnxcam.targets import classes_of

        logits, values = self.forward.run(feeds)
        classes = classes_of(codes, logits)
        images, targets = classes.shape
        gradients = self.inner.run(feeds, classes).maps if self.inner is not None else None
        rolled: Array | None = None
        for name in self.attention:
            a = values[name].astype(np.float64)  # (N, heads, L, L)
            a = a.reshape(images, 1, -1, *a.shape[-2:])
            one = np.eye(a.shape[-1])
            if gradients is None:
                step = 0.5 * a.mean(2) + 0.5 * one
                step = step / step.sum(-1, keepdims=True)
            else:
                g = gradients[name].astype(np.float64).reshape(images, targets, -1, *a.shape[-2:])
                step = np.maximum(a * g, 0).mean(2) + one
            rolled = step if rolled is None else step @ rolled
        assert rolled is not None
        cells = list(self.form.cells) if self.form.cells is not None else list(range(rolled.shape[-1]))
        apart = [i for i in range(rolled.shape[-1]) if i not in set(cells)]
        # Where the class is read from one token, its row; where from the mean of all, the mean of theirs.
        row = rolled[:, :, apart[0]] if apart else rolled[:, :, cells].mean(2)
        maps = np.broadcast_to(row[:, :, cells], (images, targets, len(cells))).reshape(
            images, targets, *self.form.grid
        )
        return self.means.result(dict.fromkeys(self.means.job.layers, maps), classes, logits)


def attentions(graph: Graph, logits: str) -> list[str]:
    """The weights (N, heads, L, L) that mix values, in the order of the blocks."""
    found = []
    for node in graph.between(graph.inputs, logits):
        value = value_of(node) if node.op_type == "MatMul" else None
        if value is None:
            continue
        weights = node.inputs[1 - value]
        shape = graph.shape(weights)
        if shape is not None and len(shape) >= 3 and isinstance(shape[-1], int):
            found.append(weights)
    return found


def _tokens(rows: Sequence[Layer], length: int | str | None) -> Form | None:
    """How tokens of that number are a map."""
    for row in rows:
        form = row.form
        if form is not None and not form.plain and form.windows == 1 and len(form.grid) == 2 and length == len_of(form):
            return form
    return None


def len_of(form: Form) -> int:
    """How many tokens there are, those that lie nowhere included."""
    return form.apart + int(np.prod(form.grid))
