"""Methods that weigh channels or cells of a layer by what the model scores with them: Score-CAM, Ablation-CAM,
Recipro-CAM. Forward passes only: no operator has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.methods.base import Method, raw
from onnxcam.methods.perturbation import shown, sizes, told
from onnxcam.methods.upsample import upsampled

if TYPE_CHECKING:
    from onnxcam.layers import Layer
    from onnxcam.means import Means, Tick, Variants
    from onnxcam.runners import Batch, Codes

Array = np.ndarray


@dataclass(frozen=True)
class Scored(Method):
    """A method that asks for the logits of changed forward passes, layer by layer and image by image."""

    compiles: ClassVar[bool] = False
    walks: ClassVar[bool] = False

    def explain(self, activation: Array, classes: Array, logits: Array, scores: Scores) -> Array:
        """A map (T, *spatial) of one image: activation (C, *spatial), classes (T,), logits (1, K)."""
        raise NotImplementedError

    def runner(self, means: Means) -> _Runner:
        return _Runner(self, means)


def scored(name: str, kind: type[Scored], weighs_channels: bool, about: str) -> Scored:
    return kind(name, raw, "gradient", "one-hot", weighs_channels, about)


class Scores:
    """What can be asked of one image at one layer: logits (count, K), the predicted probabilities (count, K)."""

    def __init__(
        self, runner: _Runner, layer: Layer, one: Mapping[str, Array], values: Mapping[str, Array], tick: Tick
    ):
        self.runner, self.layer, self.one, self.values, self.tick = runner, layer, one, values, tick
        self.means = runner.means
        self.probabilities = runner.means.probabilities

    def of_masks(self, count: int, masks: Callable[[int, int], Array]) -> Array:
        """With the picture kept where masks (count, *spatial), any size, are 1."""
        picture, x = self.runner.picture, self.one[self.means.job.input]
        size = sizes(picture)

        def versions(begin: int, stop: int) -> Array:
            return shown(x, upsampled(masks(begin, stop), size), picture)

        return self.runner.forward.variants(self.one, self.means.job.input, count, versions, self.tick)

    def of_layer(self, count: int, changed: Variants) -> Array:
        """With the layer replaced by versions (count, C, *spatial) of it: the rest of the model is run again."""
        return self.runner.behind(self.layer, self.values, count, changed, self.tick)


@dataclass(frozen=True)
class ScoreCam(Scored):
    """relu(sum of w_k A_k), w the softmax over channels of the logits behind the picture masked by A_k (Wang 2020)."""

    cost: ClassVar[str] = "1 forward for each channel"

    def explain(self, activation: Array, classes: Array, logits: Array, scores: Scores) -> Array:
        from onnxcam.means import of_class

        def masks(begin: int, stop: int) -> Array:
            part = activation[begin:stop]
            cells = tuple(range(1, part.ndim))
            part = upsampled(part, sizes(scores.runner.picture))
            low, high = part.min(cells, keepdims=True), part.max(cells, keepdims=True)
            return np.asarray((part - low) / np.where(high > low, high - low, 1))

        found = of_class(scores.of_masks(len(activation), masks), classes).astype(np.float64)  # (C, T)
        e = np.exp(found - found.max(0))
        return np.maximum(np.tensordot((e / e.sum(0)).T, activation, 1), 0)


@dataclass(frozen=True)
class AblationCam(Scored):
    """relu(sum of w_k A_k), w_k = (y - y_k) / y, y_k the logit without channel k (Desai and Ramaswamy 2020)."""

    cost: ClassVar[str] = "1 forward of what lies behind the layer for each channel"

    def explain(self, activation: Array, classes: Array, logits: Array, scores: Scores) -> Array:
        from onnxcam.means import of_class

        def without(begin: int, stop: int) -> Array:
            changed = np.repeat(activation[None], stop - begin, axis=0)
            changed[np.arange(stop - begin), np.arange(begin, stop)] = 0
            return changed

        y = of_class(logits, classes).astype(np.float64)
        fall = y - of_class(scores.of_layer(len(activation), without), classes)  # (C, T)
        weights = fall / np.where(np.abs(y) > 1e-12, y, 1e-12)
        return np.maximum(np.tensordot(weights.T, activation.astype(np.float64), 1), 0)


@dataclass(frozen=True)
class ReciproCam(Scored):
    """The probability of the class with all but one cell of the layer at 0, cell by cell (Byun and Lee 2022).

    The neighbours of the cell are kept in part, as by a Gaussian, unless `blur` is 0.
    """

    blur: float = 0.4

    cost: ClassVar[str] = "1 forward of what lies behind the layer for each cell"

    def validate(self) -> None:
        if not 0 <= self.blur < 100:
            raise UsageError(f"option blur of method {self.name} is a width in cells, 0 or more, not {self.blur}")

    def explain(self, activation: Array, classes: Array, logits: Array, scores: Scores) -> Array:
        grid = activation.shape[1:]
        places = np.stack(np.unravel_index(np.arange(prod(grid)), grid))  # (axes, cells)

        def alone(begin: int, stop: int) -> Array:
            distance = np.abs(places[:, begin:stop, None] - places[:, None, :])  # (axes, versions, cells)
            near = (distance <= (1 if self.blur else 0)).all(0)
            width = self.blur or 1.0
            kept = np.where(near, np.exp(-(distance**2).sum(0) / (2 * width**2)), 0.0).reshape(-1, 1, *grid)
            return np.asarray(kept * activation[None])

        found = scores.probabilities(scores.of_layer(prod(grid), alone))
        one = found[:, classes] if found.shape[1] > 1 else np.where(classes == 1, found, 1 - found)
        return one.T.reshape(-1, *grid)


class _Runner:
    def __init__(self, method: Scored, means: Means):
        self.method, self.means = method, means
        job = means.job
        self.picture = means.picture
        self.tails = {}
        beside: list[str] = []
        if not isinstance(method, ScoreCam):
            from onnxcam.tail import tail

            for layer in job.layers.values():
                if layer.form is not None and not layer.form.plain:
                    raise UsageError(
                        f"method {method.name} changes layers (N, C, *spatial), and {layer.node!r} is {layer.shape}: "
                        "give another method, score-cam say"
                    )
                self.tails[layer.tensor] = tail(job.canonical.graph, layer.tensor, job.canonical.logits)
                beside += self.tails[layer.tensor].beside
        self.forward = means.forward([*(layer.tensor for layer in job.layers.values()), *beside])
        self.providers, self.notes = self.forward.providers, self.forward.notes

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        from onnxcam.targets import classes_of

        job, means = self.means.job, self.means
        logits, values = self.forward.run(feeds)
        classes = classes_of(codes, logits)
        count, layers = len(logits), len(job.layers)
        maps: dict[str, list[Array]] = {name: [] for name in job.layers}
        for k, (name, activation) in enumerate(means.activations(values).items()):
            for i in range(count):
                one = {n: rows[i : i + 1] for n, rows in feeds.items()}
                mine = {n: rows[i : i + 1] for n, rows in values.items()}
                tick = partial(told, means.tick, k * count + i, count * layers)
                scores = Scores(self, job.layers[name], one, mine, tick)
                maps[name].append(self.method.explain(activation[i], classes[i], logits[i : i + 1], scores))
        return means.result({name: np.stack(rows) for name, rows in maps.items()}, classes, logits)

    def behind(self, layer: Layer, values: Mapping[str, Array], count: int, changed: Variants, tick: Tick) -> Array:
        cut = self.tails[layer.tensor]
        session = self.means.session(("tail", layer.tensor), lambda: cut.model, [self.means.job.canonical.logits])
        beside = {name: values[name] for name in cut.beside}
        dtype = values[layer.tensor].dtype

        def versions(begin: int, stop: int) -> Array:
            return changed(begin, stop).astype(dtype)

        return self.forward.variants(beside, layer.tensor, count, versions, tick, session)
