"""Maps side by side: methods by layers, or classes by layers, of one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.explain import explain
from onnxcam.feeds import Source
from onnxcam.methods import INPUT, Method, method as find_method
from onnxcam.targets import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from onnxcam.explanation import Explanation
    from onnxcam.model import Model

DEFAULT = ("grad-cam", "grad-cam++", "layercam", "relevance-cam", "relevance-map")


@dataclass(frozen=True)
class Cell:
    """One map of the grid; None where the method means nothing at that layer."""

    heat: np.ndarray | None
    why: str = ""


@dataclass(frozen=True)
class Row:
    """The maps of one method and class."""

    method: str
    label: str
    probability: float
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """A grid of maps.

    Attributes:
        explanation: one of those that the grid was made of; it has the picture.
        columns: layers, as named, with the sizes of their maps.
        rows: methods and classes.
        notes: what could not be drawn, and why.
    """

    explanation: Explanation
    columns: list[tuple[str, str]]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def figure(self) -> Figure:
        """The grid as a matplotlib figure: the picture first, then a column for each layer.

        Raises:
            UsageError: matplotlib is not installed, or there is no picture to draw on.
        """
        from onnxcam.render.grid import grid

        return grid(self)

    def save(self, path: str | Path, dpi: int = 200) -> Path:
        """Write the figure as PNG, PDF or SVG, by the name's suffix.

        Raises:
            UsageError: there is no such format, or the place cannot be written to.
        """
        from onnxcam.render.grid import save

        return save(self.figure(), Path(path), dpi)


def compare(
    model: Model,
    image: Source | np.ndarray,
    methods: Sequence[str | Method] = DEFAULT,
    layers: Sequence[str | int] = ("suggested",),
    targets: Sequence[Target] | Target | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[float, int], None] | None = None,
    **how: Any,
) -> Comparison:
    """Explain one picture by several methods at several layers.

    Args:
        model, image, targets: as for `explain`.
        methods: names or methods, in the order of the rows.
        layers: in the order of the columns, but for keywords and globs, which are sorted from fine to coarse.
        options: of methods, by the method's name.
        progress: called with (done, total) methods.
        how: more for `explain`: engine, providers, composite and so on.

    Raises:
        UsageError: as `explain`, or no method means anything at any of the layers.
        ModelError: as `explain`.
    """
    listed = [find_method(m) for m in ([methods] if isinstance(methods, str | Method) else methods)]
    named = list(model.resolve([layer for layer in layers if layer != INPUT])) if set(layers) != {INPUT} else []
    named += [INPUT] if INPUT in layers or any(m.at_input for m in listed) else []
    found: dict[tuple[str, str], Explanation | str] = {}
    notes: list[str] = []
    for done, chosen in enumerate(listed):
        wanted = named if not chosen.at_input else [INPUT]
        wanted = [name for name in wanted if name != INPUT or chosen.at_input or INPUT in layers]
        given = (options or {}).get(chosen.name)

        def told(part: float, total: int, done: int = done) -> None:
            if progress is not None:
                progress(done + part / total, len(listed))

        for name, result in _at(model, image, wanted, targets, chosen, dict(how, options=given, progress=told)).items():
            found[chosen.name, name] = result
            if isinstance(result, str):
                notes.append(f"{chosen.name} at {name}: {result}")
        if progress is not None:
            progress(done + 1, len(listed))
    made = [e for e in found.values() if not isinstance(e, str)]
    if not made:
        raise UsageError(notes[0] if notes else "there is nothing to compare")
    first = made[0]
    named = [name for name in named if any(not isinstance(found.get((m.name, name), ""), str) for m in listed)]
    columns = [_column(name, found) for name in named]
    rows = []
    for t in range(first.targets.shape[1]):
        for chosen in listed:
            cells = []
            for name in named:
                result = found.get((chosen.name, name), "")
                cells.append(Cell(None, result) if isinstance(result, str) else Cell(result.maps[name][0, t]))
            rows.append(Row(chosen.name, first.label(0, t), first.probability(0, t), cells))
    return Comparison(first, columns, rows, notes)


def _at(
    model: Model, image: Any, layers: Sequence[str], targets: Any, method: Method, how: Mapping[str, Any]
) -> dict[str, Explanation | str]:
    """An explanation for each layer, or why there is none: all at once, or one by one where that is refused."""
    try:
        whole = explain(model, image, list(layers), targets, method=method, **how)
        return dict.fromkeys(layers, whole)
    except UsageError as error:
        if len(layers) == 1:
            return {layers[0]: str(error)}
    found: dict[str, Explanation | str] = {}
    for name in layers:
        found |= _at(model, image, [name], targets, method, how)
    return found


def _column(name: str, found: Mapping[tuple[str, str], Explanation | str]) -> tuple[str, str]:
    """What a layer is called in the figure, and the size of its maps: a number or a keyword says little."""
    for (_, layer), e in found.items():
        if layer == name and not isinstance(e, str):
            place = e.layers[name]
            title = name if name in (INPUT, place.tensor, place.path) else place.node
            return title, "x".join(map(str, e.maps[name].shape[2:]))
    return name, ""
