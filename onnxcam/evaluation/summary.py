"""What an evaluation says: means with confidence intervals, and whether one method is better than another.

Intervals are the percentiles of means over resampled pictures; the test between two methods flips the signs of their
differences, picture by picture. Both are seeded.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcam.evaluation.measures import MEASURES
from onnxcam.evaluation.run import FLOORS
from onnxcam.files import write_atomically

RESAMPLED = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Line:
    """One method at one layer by one metric.

    Attributes:
        mean, low, high: over pictures, with the ends of the 95 % interval.
        count: pictures.
        against, p: the method it is compared with at the same layer, and how probable a difference as large would be if
            there were none; NaN where there is nothing to compare.
    """

    method: str
    layer: str
    map: str
    metric: str
    mean: float
    low: float
    high: float
    count: int
    against: str = ""
    p: float = float("nan")


def summarise(
    rows: Iterable[Mapping[str, str]],
    reference: str | None = None,
    objects: str | None = None,
    right: bool = False,
) -> list[Line]:
    """A line for each method, layer and metric.

    Args:
        rows: of `values.csv`.
        reference: the method that the others are compared with; by default the first.
        objects: "small", "medium" or "large": pictures with such objects only.
        right: only pictures whose class is known and was explained: with target "predicted", those classified right.
    """
    values: dict[tuple[str, str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        value = float(row["value"])
        if right and row["class"] != row["label"]:
            continue
        if not np.isnan(value) and (objects is None or row["object"] == objects):
            values[row["method"], row["layer"], row["map"], row["metric"]][row["image"]] = value
    methods = list(dict.fromkeys(key[0] for key in values))
    reference = reference or next((m for m in methods if m not in FLOORS), None)
    lines = []
    for (method, layer, shape, metric), found in values.items():
        array = np.array(list(found.values()))
        low, high = interval(array)
        other = values.get((reference or "", layer, shape, metric), {})
        shared = [image for image in found if image in other]
        p = float("nan")
        if method != reference and len(shared) > 1:
            p = sign_flip(np.array([found[image] - other[image] for image in shared]))
        against = reference or "" if not np.isnan(p) else ""
        lines.append(Line(method, layer, shape, metric, float(array.mean()), low, high, len(array), against, p))
    return lines


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean, by the bootstrap."""
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLED, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_flip(differences: np.ndarray, seed: int = 0) -> float:
    """How probable a mean as far from 0 is, if either sign of every difference were as likely (two-sided)."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (RESAMPLED, len(differences)))
    means = np.abs((signs * differences).mean(1))
    return float((1 + (means >= abs(differences.mean()) - 1e-15).sum()) / (RESAMPLED + 1))


def markdown(lines: Sequence[Line]) -> str:
    """A table: methods and layers down, metrics across."""
    metrics = list(dict.fromkeys(line.metric for line in lines))
    found = {(line.method, line.layer, line.map, line.metric): line for line in lines}
    arrows = {"higher": " ↑", "lower": " ↓", "": ""}
    heads = [f"{name}{arrows[MEASURES[name].better]}" for name in metrics]
    out = [f"| method | layer | map | {' | '.join(heads)} |", "| --- " * (3 + len(metrics)) + "|"]
    for method, layer, shape in dict.fromkeys((line.method, line.layer, line.map) for line in lines):
        cells = []
        for metric in metrics:
            line = found.get((method, layer, shape, metric))
            star = "" if line is None or np.isnan(line.p) or line.p >= 0.05 else " *"
            cells.append("–" if line is None else f"{line.mean:.3f} [{line.low:.3f}, {line.high:.3f}]{star}")
        out.append(f"| {method} | {layer or '–'} | {shape} | {' | '.join(cells)} |")
    reference = next((line.against for line in lines if line.against), "")
    note = f"\n\\* differs from {reference} at the same layer (p < 0.05, sign flips).\n" if reference else ""
    return "\n".join(out) + "\n" + note


def save(lines: Sequence[Line], path: Path) -> Path:
    """The lines as a CSV."""
    stream = io.StringIO()
    columns = list(Line.__dataclass_fields__)
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([getattr(line, c) for c in columns] for line in lines)
    return write_atomically(path, lambda s: s.write(stream.getvalue().encode()))
