"""Which layer of one model is which of another: by name, else by resolution, channels and order, else by depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from onnxcam.errors import UsageError
from onnxcam.layers import Layer
from onnxcam.model import Model


@dataclass(frozen=True)
class Pair:
    """A layer of each model.

    Attributes:
        name: what it is called in results: the first model's node.
        how: "name", "order" (same resolution, channels and place among those), "depth", or "asked for".
    """

    name: str
    a: Layer
    b: Layer
    how: str

    @property
    def comparable(self) -> bool:
        """Whether the activations of the two can be compared number by number."""
        return self.a.spatial == self.b.spatial and channels(self.a) == channels(self.b)


def channels(layer: Layer) -> Any:
    """How many channels a layer has, whatever its layout."""
    return layer.shape[1] if layer.form is None else layer.form.channels


def matched(first: Model, second: Model) -> dict[str, Pair]:
    """All layers of the first model that the second has too, by tensor of the first, in order.

    Layers of the same name and kind go together. Of the others, those of one resolution and number of channels go
    together in order, where both models have as many of them: so it is with a file and its quantised or converted copy.
    """
    rows, others = first.layers(), second.layers()
    found: dict[str, Pair] = {}
    taken: set[str] = set()
    names = {name: row for row in reversed(others) for name in (row.node, row.tensor, row.path) if name}
    for row in rows:
        same = next((names[n] for n in (row.node, row.tensor, row.path) if n in names), None)
        if same is not None and same.tensor not in taken and _kind(same) == _kind(row):
            found[row.tensor] = Pair(row.node, row, same, "name")
            taken.add(same.tensor)
    kinds = [_grouped(r for r in rows if r.tensor not in found), _grouped(r for r in others if r.tensor not in taken)]
    for kind, left in kinds[0].items():
        right = kinds[1].get(kind, [])
        if len(left) == len(right):
            found.update((a.tensor, Pair(a.node, a, b, "order")) for a, b in zip(left, right, strict=True))
    return {row.tensor: found[row.tensor] for row in rows if row.tensor in found}


def _kind(layer: Layer) -> tuple[Any, Any]:
    return layer.spatial, channels(layer)


def _grouped(rows: Iterable[Layer]) -> dict[Any, list[Layer]]:
    groups: dict[Any, list[Layer]] = defaultdict(list)
    for row in rows:
        groups[_kind(row)].append(row)
    return groups


def chosen(
    first: Model, second: Model, layers: Sequence[str | int], asked: Mapping[str, str] | None = None
) -> list[Pair]:
    """The pairs to be explained: `layers` of the first with what they are in the second, and those `asked` for.

    Where nothing is matched by name or order, the suggested layer of the second at the nearest resolution is taken.

    Raises:
        UsageError: a name means nothing, or the second model has no layer with a map.
    """
    known = matched(first, second)
    pairs = []
    for a, b in (asked or {}).items():
        (name, one), *_ = first.resolve([a]).items()
        other = next(iter(second.resolve([b]).values()))
        pairs.append(Pair(name, one, other, "asked for"))
    for name, row in first.resolve(list(layers)).items() if layers else ():
        pair = known.get(row.tensor)
        pairs.append(Pair(name, row, pair.b, pair.how) if pair else Pair(name, row, _nearest(row, second), "depth"))
    return pairs


def _nearest(layer: Layer, model: Model) -> Layer:
    rows = [row for row in model.layers() if row.suggested and row.reaches] or model.layers()
    if not rows:
        raise UsageError(f"{model.name} has no layer with a map")

    def far(row: Layer) -> float:
        return abs(log(_area(row)) - log(_area(layer)))

    return min(reversed(rows), key=far)


def _area(layer: Layer) -> float:
    area = 1.0
    for n in layer.spatial:
        area *= n if isinstance(n, int) and n > 0 else 1
    return area
