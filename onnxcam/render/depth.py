"""An evaluation over depth: a panel for each metric, a line for each method, from fine layers to coarse ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcam.errors import UsageError
from onnxcam.render.grid import STYLE, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from onnxcam.evaluation.summary import Line

MARKS = "osD^vP*X"
LINES = ("-", "--", "-.", ":")
COLUMNS = 3


def depth(lines: Sequence[Line]) -> Figure:
    """The figure. Methods of the input and the maps that know nothing are dotted lines across: they have no depth.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("figures need matplotlib: pip install 'onnxcam[report]'") from None
    from onnxcam.evaluation.measures import MEASURES

    metrics = list(dict.fromkeys(line.metric for line in lines))
    layers = list(dict.fromkeys((line.layer, line.map) for line in lines if line.layer not in ("", "input")))
    methods = list(dict.fromkeys(line.method for line in lines))
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.2 * columns, 2.5 * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, metric in zip(axes, metrics, strict=False):
            for k, method in enumerate(methods):
                own = {(line.layer, line.map): line for line in lines if (line.method, line.metric) == (method, metric)}
                places = [i for i, layer in enumerate(layers) if layer in own]
                colour = f"C{k % 10}"
                if places:
                    found = [own[layers[i]] for i in places]
                    axis.plot(
                        places, [line.mean for line in found], LINES[k // 10 % 4], marker=MARKS[k % len(MARKS)],
                        color=colour, label=method, markersize=4,
                    )  # fmt: skip
                    axis.fill_between(
                        places, [line.low for line in found], [line.high for line in found], color=colour, alpha=0.12
                    )
                elif own:
                    axis.axhline(next(iter(own.values())).mean, linestyle=":", color=colour, label=method, linewidth=1)
            better = MEASURES[metric].better
            axis.set_title(f"{metric}{f' ({better} is better)' if better else ''}", fontsize=8)
            axis.set_xticks(range(len(layers)), [size for _, size in layers], fontsize=7)
            axis.grid(alpha=0.25)
        for axis in axes[len(metrics) :]:
            axis.set_axis_off()
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), fontsize=7, frameon=False)
    return figure


def save_depth(lines: Sequence[Line], path: Path) -> Path:
    """Write the figure as PNG, PDF or SVG.

    Raises:
        UsageError: matplotlib is not installed, or the place cannot be written to.
    """
    return save(depth(lines), path, 150)
