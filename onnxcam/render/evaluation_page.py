"""An evaluation as one HTML page that needs nothing from elsewhere: the figure, and a table for each size of object."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcam.errors import UsageError
from onnxcam.files import write_atomically

if TYPE_CHECKING:
    from onnxcam.evaluation.summary import Line

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 2rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
thead th { position: sticky; top: 0; background: Canvas; vertical-align: bottom; }
small { opacity: .7; display: block; white-space: nowrap; }
.best { font-weight: 700; }
.floor { opacity: .65; font-style: italic; }
img { max-width: 100%; background: white; }
.wide { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ pictures }} pictures. Means over pictures with 95 % intervals; * differs from {{ reference or "–" }} at the same
layer (p &lt; 0.05); bold: the best method at a layer. Lines in italics know nothing of the model.</p>
{% if figure %}<p><img alt="Every metric over layers" src="data:image/png;base64,{{ figure }}"></p>{% endif %}
{% for heading, table in tables %}
<h2>{{ heading }}</h2>
<div class="wide"><table>
<thead><tr><th scope="col">method</th><th scope="col">layer</th>
{% for name, arrow in table.metrics %}<th scope="col">{{ name }}<small>{{ arrow }}</small></th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr{% if row.floor %} class="floor"{% endif %}><td>{{ row.method }}</td>
<td>{{ row.layer }}<small>{{ row.map }}</small></td>
{% for cell in row.cells %}
<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}<small>{{ cell.range }}</small></td>
{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
</body>
</html>
"""


def save_page(
    title: str, parts: Mapping[str, Sequence[Line]], pictures: int, path: Path, figure: Path | None = None
) -> Path:
    """Write the page.

    Args:
        title: of the page.
        parts: heading to lines.
        pictures: how many there are.
        path: where to.
        figure: a PNG to put into it.

    Raises:
        UsageError: Jinja2 is not installed, or the place cannot be written to.
    """
    try:
        from jinja2 import Environment
    except ImportError:
        raise UsageError("reports need Jinja2: pip install 'onnxcam[report]'") from None
    reference = next((line.against for lines in parts.values() for line in lines if line.against), "")
    text = (
        Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            title=title,
            pictures=pictures,
            reference=reference,
            figure=b64encode(figure.read_bytes()).decode() if figure is not None else "",
            tables=[(heading, _table(lines)) for heading, lines in parts.items() if lines],
        )
    )
    return write_atomically(path, lambda s: s.write(text.encode()))


def _table(lines: Sequence[Line]) -> dict[str, object]:
    from onnxcam.evaluation.measures import MEASURES
    from onnxcam.evaluation.run import FLOORS

    metrics = list(dict.fromkeys(line.metric for line in lines))
    found = {(line.method, line.layer, line.map, line.metric): line for line in lines}
    best: dict[tuple[str, str], float] = {}
    for line in lines:
        better = MEASURES[line.metric].better
        if better and line.method not in FLOORS:
            pick = max if better == "higher" else min
            best[line.layer, line.metric] = pick(best.get((line.layer, line.metric), line.mean), line.mean)
    rows = []
    for method, layer, shape in dict.fromkeys((line.method, line.layer, line.map) for line in lines):
        cells = []
        for metric in metrics:
            one = found.get((method, layer, shape, metric))
            cells.append(
                {"text": "–", "range": "", "best": False}
                if one is None
                else {
                    "text": f"{one.mean:.3f}{'*' if one.p < 0.05 else ''}",
                    "range": f"{one.low:.3f} to {one.high:.3f}",
                    "best": method not in FLOORS and best.get((layer, metric)) == one.mean,
                }
            )
        rows.append({"method": method, "layer": layer or "–", "map": shape, "cells": cells, "floor": method in FLOORS})
    arrows = {"higher": "higher is better", "lower": "lower is better", "": ""}
    return {"metrics": [(name, arrows[MEASURES[name].better]) for name in metrics], "rows": rows}
