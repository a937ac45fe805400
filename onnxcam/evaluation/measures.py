"""The metrics of an evaluation by name: what each needs, and which way is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxcam.metrics import complexity, faithfulness as f, localisation as m

Array = np.ndarray
ROAD_SHARES = (0.2, 0.4, 0.6, 0.8)
STEPS = 20


@dataclass(frozen=True)
class Case:
    """One map with what it is measured against.

    Attributes:
        heat: the map, enlarged to the model's input, (H, W), raw.
        x: the model's input, (C, H, W).
        probability, logit: versions (count, C, H, W) to the score of the class that was explained, (count,).
        truth: the object as a mask (H, W); None where it is not known.
        boxes: likewise, x, y, width, height in pixels of the input.
        lost: the share of the relevance at the logits that did not arrive at the layer; NaN where none is carried.
        other: the map of another class, as it is made, where a metric asks for it; `shaken` that of the input with a
            little noise.
    """

    heat: Array
    x: Array
    probability: f.Score
    logit: f.Score
    truth: Array | None
    boxes: list[m.Box]
    other: Array | None = None
    shaken: Array | None = None
    lost: float = float("nan")

    @cached_property
    def soft(self) -> f.Drop:
        """The probability before and behind the map."""
        return f.soft_drop(self.probability, self.x, self.heat)

    @property
    def flat(self) -> Array:
        """An input of zeros: mean grey, where the model's input is normalised."""
        return np.zeros_like(self.x)


@dataclass(frozen=True)
class Measure:
    """A metric: its value for one map; `better` is "higher" or "lower", "" where neither is."""

    name: str
    value: Callable[[Case], float]
    better: str
    about: str
    truth: bool = False
    boxes: bool = False
    other: bool = False
    shaken: bool = False


def _truth(name: str, value: Callable[[Array, Array], float], about: str) -> Measure:
    def measured(case: Case) -> float:
        assert case.truth is not None
        return value(case.heat, case.truth)

    return Measure(name, measured, "higher", about, truth=True)


def _curve(case: Case, deletion: bool) -> float:
    start, end = (case.x, case.flat) if deletion else (f.blurred(case.x), case.x)
    return f.area(f.curve(case.probability, start, end, case.heat, STEPS))


def _road(case: Case, lowest_first: bool) -> float:
    losses = [f.road(case.probability, case.x, case.heat, share, lowest_first) for share in ROAD_SHARES]
    return float(np.mean(losses))


def correlation(a: Array, b: Array) -> float:
    """Pearson's; 1 for two constant maps, 0 for one beside another."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float(np.ptp(a) == 0 and np.ptp(b) == 0)
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _other(case: Case) -> float:
    assert case.other is not None
    return correlation(case.heat, case.other)


def _shaken(case: Case) -> float:
    assert case.shaken is not None
    return correlation(case.heat, case.shaken)


def _flipping(case: Case) -> float:
    scores = f.curve(case.logit, case.x, case.flat, case.heat, STEPS)
    return float(np.mean(scores[0] - scores[1:]))


def _sensitivity(case: Case) -> float:
    return f.sensitivity_n(case.logit, case.x, case.flat, case.heat, max(case.heat.size // 10, 1))


def _infidelity(case: Case) -> float:
    attribution = np.broadcast_to(case.heat / len(case.x), case.x.shape)
    return f.infidelity(case.logit, case.x, attribution)


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            "average-drop",
            lambda c: c.soft.drop,
            "lower",
            "what the probability loses behind the map, a part of 1 (Chattopadhay et al. 2018)",
        ),
        Measure(
            "average-increase",
            lambda c: c.soft.increase,
            "higher",
            "how often it rises",
        ),
        Measure(
            "drop-50",
            lambda c: f.half_drop(c.probability, c.x, c.heat).drop,
            "lower",
            "what it loses where only the higher half of the cells is shown (AD50): one area for every map",
        ),
        Measure(
            "deletion",
            lambda c: _curve(c, True),
            "lower",
            "area under the probability while the highest cells go (Petsiuk et al. 2018)",
        ),
        Measure(
            "insertion",
            lambda c: _curve(c, False),
            "higher",
            "area under the probability while they come into a blurred picture",
        ),
        Measure(
            "road-most",
            lambda c: _road(c, False),
            "higher",
            "what the probability loses where the highest cells are filled in from around them (Rong et al. 2022)",
        ),
        Measure(
            "road-least",
            lambda c: _road(c, True),
            "lower",
            "likewise the lowest cells",
        ),
        Measure(
            "pixel-flipping",
            _flipping,
            "higher",
            "mean fall of the logit while the highest cells go (Samek et al. 2017)",
        ),
        Measure(
            "sensitivity-n",
            _sensitivity,
            "higher",
            "correlation of the map's sum over a tenth of the cells with the logit's fall (Ancona et al. 2018)",
        ),
        Measure("infidelity", _infidelity, "lower", "error of the map as a linear model (Yeh et al. 2019)"),
        _truth("iou-25", lambda h, t: m.iou(m.above(h, 0.25), t), "overlap of what is above 25 % of the maximum"),
        _truth("iou-75", lambda h, t: m.iou(m.above(h, 0.75), t), "overlap of what is above 75 % of the maximum"),
        _truth("iou-top", lambda h, t: m.iou(m.largest(h, 0.25), t), "overlap of the highest quarter of the cells"),
        Measure(
            "box-iou",
            lambda c: m.best_box_iou(c.heat, c.boxes),
            "higher",
            "the box around the largest part above 25 % of the maximum, against the best box",
            boxes=True,
        ),
        _truth("hit", m.hit, "how often the highest cell lies on the object (the pointing game)"),
        _truth("energy", m.energy_inside, "the share of the positive part on the object (relevance mass accuracy)"),
        _truth("rank", m.rank_accuracy, "the share of the K highest cells on the object, K its size"),
        Measure(
            "class-correlation",
            _other,
            "lower",
            "correlation of the map with that of a random other class: 1 is blind to the class",
            other=True,
        ),
        Measure(
            "conservation",
            lambda c: c.lost,
            "lower",
            "the share of the relevance at the logits, by magnitude, that is lost on the way to the layer",
        ),
        Measure(
            "stability",
            _shaken,
            "higher",
            "correlation of the map with that of the input with noise of 0.02 of its range",
            shaken=True,
        ),
        Measure("entropy", lambda c: complexity.entropy(c.heat), "", "bits: how much a map says at once"),
        Measure("sparseness", lambda c: complexity.sparseness(c.heat), "", "Gini index: 0 even, 1 in one cell"),
    )
}
DEFAULT = ("average-drop", "average-increase", "drop-50", "deletion", "insertion", "iou-25", "box-iou", "hit", "energy")
