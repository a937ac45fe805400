"""What an audit says: distributions, classes, the worst pictures, McNemar's test on predictions, and a verdict."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from onnxcam.audit.drift import INPUT, Drift, parted_at
from onnxcam.audit.run import MEASURED, Audit
from onnxcam.errors import UsageError
from onnxcam.evaluation.summary import interval
from onnxcam.files import write_atomically
from onnxcam.labels import Labels
from onnxcam.locations import distinct

FAIL_UNDER = 0.85  # copies that are as good agree better, broken ones worse: docs/audits-measured.md
WORST = 20
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class LayerFindings:
    """One pair of layers over all pictures: mean of each measure, and of the rank correlation its 95 % interval and
    quantiles (5, 25, 50, 75, 95 %)."""

    layer: str
    other: str
    how: str
    means: dict[str, float]
    low: float
    high: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class ClassFindings:
    """One explained class at the judged layer: how many pictures, on how many predictions differ, mean rank
    correlation."""

    number: int
    label: str
    pictures: int
    changed: int
    rank: float


@dataclass(frozen=True)
class Predictions:
    """Of both models: how many pictures, on how many they agree; where classes are known, how many each has right, and
    McNemar's exact test on those that only one has right (p, two-sided)."""

    pictures: int
    agree: int
    right_a: int | None = None
    right_b: int | None = None
    only_a: int = 0
    only_b: int = 0
    p: float = float("nan")


@dataclass(frozen=True)
class Findings:
    """Everything an audit says.

    Attributes:
        judged: the layer whose mean rank correlation is held against `fail_under`: the last.
        passed: the verdict.
        parted: the first layer where the activations of the two are no longer alike; None where they are, or where that
            cannot be compared.
        worst: rows of `values.csv` at the judged layer, the lowest rank correlation first.
    """

    names: tuple[str, str]
    layers: list[LayerFindings]
    judged: str
    fail_under: float
    predictions: Predictions
    classes: list[ClassFindings]
    worst: list[dict[str, str]]
    drift: list[Drift]
    parted: Drift | None
    skipped: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        return next(found.means["rank"] for found in self.layers if found.layer == self.judged)

    @property
    def passed(self) -> bool:
        return self.score >= self.fail_under and not self.sees_otherwise

    @property
    def sees_otherwise(self) -> bool:
        """Whether the two are shown other numbers of the same kind: another preprocessing."""
        return self.parted is not None and self.parted.layer == INPUT

    @property
    def verdict(self) -> str:
        """ "same reasons", "other reasons" or "other input"."""
        return self.sentence.partition(":")[0]

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        p = self.predictions
        same = f"mean rank correlation {self.score:.3f} at {self.judged} over {p.pictures} pictures"
        if self.skipped:
            same += f", {len(self.skipped)} more left out"
        agree = f"predictions agree on {p.agree / max(p.pictures, 1):.1%}"
        where = ""
        if self.parted is not None:
            at = "their input" if self.sees_otherwise else f"layer {self.parted.layer}"
            where = f"; activations part ways at {at} (alike to {self.parted.likeness:.2f})"
        elif len(self.drift) > 1:
            where = "; activations that can be compared are alike throughout"
        else:
            where = "; no layers of the two can be compared number by number"
        if self.passed:
            return f"same reasons: {same} (at least {self.fail_under:g} was asked for); {agree}{where}"
        if self.score >= self.fail_under:
            return (
                f"other input: the two are shown other numbers, is the preprocessing the same? {same}; {agree}{where}"
            )
        return f"other reasons: {same}, below {self.fail_under:g}; {agree}{where}"


def findings(audit: Audit, fail_under: float = FAIL_UNDER, labels: Labels | None = None) -> Findings:
    """Sum an audit up.

    Raises:
        UsageError: nothing was measured, or `fail_under` is no correlation.
    """
    if not -1 <= fail_under <= 1:
        raise UsageError(f"a rank correlation to fail under lies between -1 and 1, not at {fail_under}")
    by_layer: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    judged = audit.pairs[-1].name
    rows: list[dict[str, str]] = []
    for row in audit.rows():
        for name in MEASURED:
            by_layer[row["layer"]][name].append(float(row[name]))
        if row["layer"] == judged:
            rows.append(row)
    if not rows:
        raise UsageError(next(iter(audit.skipped.values()), "nothing was measured"))
    layers = []
    for pair in audit.pairs:
        found = {name: np.array(values) for name, values in by_layer[pair.name].items()}
        low, high = interval(found["rank"])
        means = {name: float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for name, v in found.items()}
        quantiles = tuple(float(q) for q in np.quantile(found["rank"], QUANTILES))
        layers.append(LayerFindings(pair.name, pair.b.node, pair.how, means, low, high, quantiles))
    return Findings(
        audit.names, layers, judged, fail_under, _predictions(rows), _classes(rows, labels),
        sorted(rows, key=lambda row: float(row["rank"])), audit.drift, parted_at(audit.drift), audit.skipped,
        audit.warnings,
    )  # fmt: skip


def _predictions(rows: Sequence[Mapping[str, str]]) -> Predictions:
    agree = sum(row["class_a"] == row["class_b"] for row in rows)
    known = [row for row in rows if row["label"]]
    if not known:
        return Predictions(len(rows), agree)
    right = [(row["class_a"] == row["label"], row["class_b"] == row["label"]) for row in known]
    only_a, only_b = sum(a and not b for a, b in right), sum(b and not a for a, b in right)
    return Predictions(
        len(rows), agree, sum(a for a, _ in right), sum(b for _, b in right), only_a, only_b, mcnemar(only_a, only_b)
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test, two-sided: how probable a split as uneven is, if either were as likely.

    Raises:
        UsageError: SciPy is not installed.
    """
    if only_a + only_b == 0:
        return 1.0
    try:
        from scipy.stats import binomtest
    except ImportError:
        raise UsageError("McNemar's test needs SciPy: pip install 'onnxcam[audit]'") from None
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def _classes(rows: Sequence[Mapping[str, str]], labels: Labels | None) -> list[ClassFindings]:
    groups: dict[int, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        groups[int(row["explained"])].append(row)
    found = [
        ClassFindings(
            number, labels.name(number) if labels else f"class {number}", len(some),
            sum(row["class_a"] != row["class_b"] for row in some), float(np.mean([float(row["rank"]) for row in some])),
        )
        for number, some in groups.items()
    ]  # fmt: skip
    return sorted(found, key=lambda c: c.rank)


# -- written -----------------------------------------------------------------------------------------------------


def markdown(f: Findings) -> str:
    """A summary for a job page or a pull request."""
    p = f.predictions
    out = [f"## {'✅' if f.passed else '❌'} {f.names[0]} → {f.names[1]}", "", f"**{f.sentence}**", ""]
    out += [line for warning in f.warnings for line in (f"⚠ {warning}", "")]
    out += ["| layer | in the other | rank correlation | 5 % | median | SSIM | IoU of the top fifth | shift |"]
    out += ["| --- " * 8 + "|"]
    for layer in f.layers:
        m = layer.means
        numbers = (*layer.quantiles[:3:2], m["ssim"], m["iou"], m["shift"])
        out.append(
            f"| {_cell(layer.layer)} | {_cell(layer.other)} ({layer.how}) "
            f"| {m['rank']:.3f} [{layer.low:.3f}, {layer.high:.3f}] | "
            + " | ".join(f"{value:.3f}" for value in numbers)
            + " |"
        )
    out += ["", f"Predictions agree on {p.agree} of {p.pictures} pictures."]
    if p.right_a is not None:
        out[-1] += (
            f" Right: {p.right_a} and {p.right_b}; only the first {p.only_a}, only the second {p.only_b} "
            f"(McNemar p = {p.p:.3g})."
        )
    if any(np.isfinite(layer.means["energy_a"]) for layer in f.layers):
        energies = "; ".join(
            f"{layer.layer} {layer.means['energy_a']:.1%} and {layer.means['energy_b']:.1%}" for layer in f.layers
        )
        out += ["", f"Energy on the object: {energies}."]
    if f.drift:
        least = min(f.drift, key=lambda d: d.likeness)
        parted = "nowhere less" if f.parted is None else f"first below 0.9 at {f.parted.layer}"
        out += ["", f"Activations are alike to {least.likeness:.3f} at the least, at {least.layer}; {parted}."]
    out += ["", "| worst pictures | rank | first says | second says |", "| --- | --- | --- | --- |"]
    worst = f.worst[:WORST]
    names = dict(zip((row["image"] for row in f.worst), distinct([row["image"] for row in f.worst]), strict=True))
    out += [
        f"| {_cell(names[row['image']])} | {float(row['rank']):.3f} | {row['class_a']} | {row['class_b']} |"
        for row in worst
    ]
    if f.skipped:
        out += ["", f"{len(f.skipped)} pictures could not be read and are left out."]
    return "\n".join(out) + "\n"


def _cell(text: str) -> str:
    """As it may stand in a table of Markdown."""
    return " ".join(text.replace("|", "\\|").split())


def junit(f: Findings) -> bytes:
    """The verdict as JUnit XML, a case for each layer; only the judged one can fail."""
    suite = ElementTree.Element("testsuite", name="onnxcam audit", tests=str(len(f.layers)), errors="0")
    suite.set("failures", str(int(not f.passed)))
    for layer in f.layers:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{f.names[0]} -> {f.names[1]}", name=layer.layer)
        if layer.layer == f.judged and not f.passed:
            ElementTree.SubElement(case, "failure", message=f.sentence).text = markdown(f)
        else:
            ElementTree.SubElement(case, "system-out").text = f"mean rank correlation {layer.means['rank']:.4f}"
    if doubts := [*f.warnings, *(f"{path} is left out: {why}" for path, why in f.skipped.items())]:
        ElementTree.SubElement(suite, "system-err").text = "\n".join(doubts)
    whole: bytes = ElementTree.tostring(suite, "utf-8", xml_declaration=True)
    return whole + b"\n"


def to_json(f: Findings) -> dict[str, Any]:
    """Everything but the pictures, ready for JSON."""
    p = f.predictions
    return {
        "names": list(f.names),
        "verdict": f.verdict,
        "sentence": f.sentence,
        "judged": f.judged,
        "fail_under": f.fail_under,
        "layers": [vars(layer) for layer in f.layers],
        "predictions": vars(p),
        "classes": [vars(c) for c in f.classes],
        "drift": [vars(d) for d in f.drift],
        "parted": None if f.parted is None else f.parted.layer,
        "skipped": dict(f.skipped),
        "warnings": list(f.warnings),
    }


def _plain(value: Any) -> Any:
    """Without what JSON has no word for: a number that is none becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def save(f: Findings, folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Write `summary.md`, `junit.xml` and `manifest.json`: what was found, and under "run" what was asked for."""
    text = json.dumps(_plain({**to_json(f), "run": settings}), indent=2, ensure_ascii=False, default=str)
    contents = {"summary.md": markdown(f).encode(), "junit.xml": junit(f), "manifest.json": (text + "\n").encode()}
    return [
        write_atomically(folder / name, lambda s, content=content: s.write(content))  # type: ignore[misc]
        for name, content in contents.items()
    ]
