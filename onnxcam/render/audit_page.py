"""An audit as one HTML file: the verdict, layers, classes, drift, and every picture, to be sorted, found and compared.

It needs nothing from elsewhere, and opens from a disk. Of the pictures only numbers are in it; their maps are files
beside it, which the page loads as they come into sight, so that ten thousand are no matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxcam.audit.drift import Drift
from onnxcam.audit.run import MEASURED, Audit
from onnxcam.audit.verdict import Findings
from onnxcam.errors import UsageError
from onnxcam.files import write_atomically
from onnxcam.labels import Labels
from onnxcam.locations import distinct

CLASSES = 50
BINS = 40
TEMPLATE = "audit.html"


def save_page(f: Findings, audit: Audit, labels: Labels | None = None, name: str = "report.html") -> Path:
    """Write the page into the audit's folder.

    Raises:
        UsageError: Jinja2 is not installed, or the place cannot be written to.
    """
    try:
        from jinja2 import Environment
        from markupsafe import Markup
    except ImportError:
        raise UsageError("reports need Jinja2: pip install 'onnxcam[audit]'") from None

    def script(value: Any) -> Markup:
        """As JavaScript within the page."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))

    order = {layer.layer: k for k, layer in enumerate(f.layers)}
    rows: list[list[Any]] = []
    values: list[list[list[float | None]]] = [[] for _ in order]
    used: set[int] = set()
    for row in audit.rows():
        measured = [_number(row[m]) for m in MEASURED]
        values[order[row["layer"]]].append(measured)
        if row["layer"] == f.judged:
            classes = [int(row[c]) for c in ("explained", "class_a", "class_b")]
            used.update(classes)
            sure = [_number(row["probability_a"]), _number(row["probability_b"])]
            rows.append([row["image"], int(row["number"]), *classes, *sure])
    for entry, short in zip(rows, distinct([entry[0] for entry in rows]), strict=True):
        entry[0] = short
    drawn = audit.settings["thumbs"]
    template = (Path(__file__).parent / TEMPLATE).read_text(encoding="utf-8")
    text = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            f=f,
            p=f.predictions,
            boxes=any(layer.means["energy_a"] == layer.means["energy_a"] for layer in f.layers),
            classes=f.classes[:CLASSES],
            histogram=Markup(_histogram([v[0] for v in values[order[f.judged]]])),
            drift=Markup(_drift(f.drift)) if len(f.drift) > 1 else "",
            layers=script(list(order)),
            rows=script(rows),
            values=script(values),
            names=script({c: labels.name(c) for c in sorted(used)} if labels else {}),
            drawn=script(10**9 if drawn is None else drawn),
        )
    )
    return write_atomically(audit.folder / name, lambda s: s.write(text.encode("utf-8", "backslashreplace")))


def _number(text: str) -> float | None:
    value = float(text)
    return round(value, 5) if value == value else None


def _histogram(values: Sequence[float | None]) -> str:
    """Bars from the lowest value, or 0, to 1."""
    known = [v for v in values if v is not None]
    low = min([0.0, *known])
    counts = [0] * BINS
    for v in known:
        counts[min(int((v - low) / (1 - low + 1e-12) * BINS), BINS - 1)] += 1
    width, height = 420, 130
    step, most = width / BINS, max(counts) or 1
    bars = "".join(
        f'<rect x="{20 + k * step:.1f}" y="{10 + height * (1 - n / most):.1f}" width="{step - 1:.1f}" '
        f'height="{height * n / most:.1f}" fill="var(--bar)"><title>{low + (1 - low) * k / BINS:.3f} to '
        f"{low + (1 - low) * (k + 1) / BINS:.3f}: {n}</title></rect>"
        for k, n in enumerate(counts)
    )
    ends = "".join(
        f'<text x="{20 + width * at}" y="{height + 26}" text-anchor="middle">{low + (1 - low) * at:.2f}</text>'
        for at in (0, 0.5, 1)
    )
    base = f'<line x1="20" x2="{20 + width}" y1="{height + 10}" y2="{height + 10}" stroke="currentColor"/>'
    most_text = f'<text x="{20 + width}" y="9" text-anchor="end">{most}</text>'
    label = f'role="img" aria-label="histogram of rank correlation over {len(known)} pictures"'
    return f'<svg viewBox="0 0 460 160" width="460" {label}>{bars}{base}{ends}{most_text}</svg>'


def _drift(found: Sequence[Drift]) -> str:
    """A line over layers, with the picture that differs most below it."""
    width, height = 420, 130

    def points(values: Sequence[float]) -> str:
        n = max(len(values) - 1, 1)
        return " ".join(f"{20 + width * k / n:.1f},{10 + height * (1 - max(v, 0)):.1f}" for k, v in enumerate(values))

    lines = (
        f'<polyline points="{points([d.low for d in found])}" fill="none" stroke="var(--bar)" stroke-dasharray="3 3"/>'
        f'<polyline points="{points([d.likeness for d in found])}" fill="none" stroke="var(--bar)" stroke-width="2"/>'
    )
    grid = "".join(
        f'<line x1="20" x2="{20 + width}" y1="{(y := 10 + height * (1 - v))}" y2="{y}" stroke="var(--line)"/>'
        f'<text x="16" y="{14 + height * (1 - v)}" text-anchor="end">{v:g}</text>'
        for v in (0, 0.5, 1)
    )
    ends = (
        f'<text x="20" y="{height + 26}">input</text>'
        f'<text x="{20 + width}" y="{height + 26}" text-anchor="end">last layer</text>'
    )
    label = 'role="img" aria-label="likeness of activations, layer by layer; dashed, the picture where it is least"'
    return f'<svg viewBox="-8 0 468 160" width="460" {label}>{grid}{lines}{ends}</svg>'
