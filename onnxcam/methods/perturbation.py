"""Methods that change the input and look at the score, the model a black box: occlusion and RISE.

They need no operator at all: whatever ONNX Runtime runs can be explained so, at the price of many forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.methods.base import INPUT, Method, at_least, raw
from onnxcam.methods.upsample import upsampled

if TYPE_CHECKING:
    from onnxcam.layers import Layer
    from onnxcam.means import Means, Tick
    from onnxcam.runners import Batch, Codes

Array = np.ndarray
# (one image of a batch of one, its classes, masks to logits) -> maps (T, *grid); a mask is 1 where the input is kept.
Masked = Callable[[int, Callable[[int, int], Array]], Array]


@dataclass(frozen=True)
class BlackBox(Method):
    """A method of the input that sees of the model what goes in and what comes out."""

    compiles: ClassVar[bool] = False
    walks: ClassVar[bool] = False

    def explain(self, means: Means, grid: tuple[int, ...], classes: Array, logits: Array, masked: Masked) -> Array:
        """Maps (T, *grid) of one image; `masked(count, masks)` gives the logits (count, K) of masked versions."""
        raise NotImplementedError

    @property
    def value(self) -> float:
        """What stands where a mask is 0."""
        return 0.0

    def runner(self, means: Means) -> _Runner:
        return _Runner(self, means)


def black_box(name: str, kind: type[BlackBox], about: str) -> BlackBox:
    return kind(name, raw, "gradient", "one-hot", False, about, at_input=True)


@dataclass(frozen=True)
class Occlusion(BlackBox):
    """How much the logit falls where a box covers a place, mean over the boxes (Zeiler and Fergus 2014).

    `window` and `stride` are parts of the longest side of the input; the box is filled with `fill`.
    """

    window: float = 0.125
    stride: float = 0.0625
    fill: float = 0.0

    cost: ClassVar[str] = "about (1 / stride)^2 forwards"

    @property
    def value(self) -> float:
        return self.fill

    def validate(self) -> None:
        if not 0 < self.window <= 1 or not 0 < self.stride <= 1:
            raise UsageError(f"options window and stride of method {self.name} are parts of the input, from 0 to 1")

    def boxes(self, grid: tuple[int, ...]) -> list[tuple[slice, ...]]:
        side = max(grid)
        size, step = max(1, round(self.window * side)), max(1, round(self.stride * side))
        starts = [range(0, (max(ceil((n - size) / step), 0) + 1) * step, step) for n in grid]
        return [
            tuple(slice(at, min(at + size, n)) for at, n in zip(corner, grid, strict=True))
            for corner in product(*starts)
        ]

    def explain(self, means: Means, grid: tuple[int, ...], classes: Array, logits: Array, masked: Masked) -> Array:
        from onnxcam.means import of_class

        boxes = self.boxes(grid)

        def masks(begin: int, stop: int) -> Array:
            kept = np.ones((stop - begin, *grid))
            for k, box in enumerate(boxes[begin:stop]):
                kept[k][box] = 0
            return kept

        fall = of_class(logits, classes) - of_class(masked(len(boxes), masks), classes)  # (boxes, T)
        total, covers = np.zeros((len(classes), *grid)), np.zeros(grid)
        for box, value in zip(boxes, fall.astype(np.float64), strict=True):
            total[(slice(None), *box)] += value.reshape(-1, *(1,) * len(grid))
            covers[box] += 1
        return np.asarray(total / np.maximum(covers, 1))


@dataclass(frozen=True)
class Rise(BlackBox):
    """The mean of random masks weighted by the probability that the class has behind them (Petsiuk et al. 2018).

    A mask is a grid of `cells` x `cells` (along the shorter side as many as fit) that are each kept with probability
    `keep`, enlarged and shifted at random.
    """

    samples: int = 1000
    cells: int = 7
    keep: float = 0.5
    seed: int = 0

    cost: ClassVar[str] = "{samples} forwards"

    def validate(self) -> None:
        at_least(self, 1, "samples", "cells")
        if not 0 < self.keep < 1:
            raise UsageError(f"option keep of method {self.name} lies between 0 and 1, not {self.keep}")

    def masks(self, grid: tuple[int, ...], begin: int, stop: int) -> Array:
        """Masks (count, *grid), 0..1; the k-th is the same whatever is asked for with it."""
        cell = ceil(max(grid) / self.cells)
        coarse = [max(1, ceil(n / cell)) + 1 for n in grid]
        made = []
        for k in range(begin, stop):
            rng = np.random.default_rng([self.seed, k])
            field = (rng.random(coarse) < self.keep).astype(np.float32)
            made.append(upsampled(field, [n * cell for n in coarse], [int(rng.integers(0, cell)) for _ in grid], grid))
        return np.stack(made)

    def explain(self, means: Means, grid: tuple[int, ...], classes: Array, logits: Array, masked: Masked) -> Array:
        found = means.probabilities(masked(self.samples, lambda begin, stop: self.masks(grid, begin, stop)))
        # One probability speaks for two classes.
        weights = found[:, classes] if found.shape[1] > 1 else np.where(classes == 1, found, 1 - found)
        total = np.zeros((len(classes), *grid))
        for begin in range(0, self.samples, 64):
            stop = min(begin + 64, self.samples)
            total += np.tensordot(weights[begin:stop].T, self.masks(grid, begin, stop), 1)
        return np.asarray(total / (self.samples * self.keep))


class _Runner:
    def __init__(self, method: BlackBox, means: Means):
        job = means.job
        for name, layer in job.layers.items():
            if layer.tensor != job.input:
                raise UsageError(f"method {method.name} explains the input, not layer {name!r}: give --layer {INPUT}")
        self.method, self.means = method, means
        self.layer = next(iter(job.layers.values()))
        self.forward = means.forward()
        self.providers, self.notes = self.forward.providers, self.forward.notes

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        from onnxcam.targets import classes_of

        job, grid = self.means.job, sizes(self.layer)
        logits, _ = self.forward.run(feeds)
        classes = classes_of(codes, logits)
        images = feeds[job.input]
        maps = np.zeros((*classes.shape, *grid))
        for i in range(len(images)):
            one = {name: rows[i : i + 1] for name, rows in feeds.items()}
            masked = partial(self._masked, one, partial(told, self.means.tick, i, len(images)))
            maps[i] = self.method.explain(self.means, grid, classes[i], logits[i : i + 1], masked)
        return self.means.result(dict.fromkeys(job.layers, maps), classes, logits)

    def _masked(self, one: Mapping[str, Array], tick: Tick, count: int, masks: Callable[[int, int], Array]) -> Array:
        name = self.means.job.input

        def versions(begin: int, stop: int) -> Array:
            return shown(one[name], masks(begin, stop), self.layer, self.method.value)

        return self.forward.variants(one, name, count, versions, tick)


def told(tick: Tick, done: int, total: int, part: float) -> None:
    """Tell that a part of what comes next is done."""
    tick((done + part) / total)


def sizes(layer: Layer) -> tuple[int, ...]:
    """The size of the layer's map."""
    return tuple(n for n in layer.spatial if isinstance(n, int))


def shown(x: Array, masks: Array, layer: Layer, value: float = 0.0) -> Array:
    """Versions (count, ...) of an input (1, ...), kept where a mask (count, *grid) is 1 and `value` where it is 0.

    Raises:
        UsageError: it is not plain how the input is a picture.
    """
    form = layer.form
    if form is None or form.plain or (len(masks.shape) == x.ndim and not form.channels_last):
        axis = 1
    elif form.channels_last:
        axis = -1
    else:
        raise UsageError(
            f"input {layer.tensor!r} is neither (N, C, *spatial) nor (N, *spatial, C): it cannot be masked"
        )
    kept = np.expand_dims(masks, axis) if masks.ndim < x.ndim else masks
    wide = x.dtype if x.dtype.kind == "f" and x.dtype.itemsize >= 4 else np.dtype(np.float32)
    mixed = kept.astype(wide) * (x.astype(wide) - wide.type(value)) + wide.type(value)
    return np.asarray((np.round(mixed) if x.dtype.kind in "iu" else mixed).astype(x.dtype, copy=False))
