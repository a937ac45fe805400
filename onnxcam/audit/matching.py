"""Which layer of one model is which of another: by name, else by resolution, channels and order, else by depth.

Resolutions are those relative to the input, where the two take inputs of different sizes: 7 x 7 of 224 is 4 x 4 of 128.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, log2
from typing import Any

from onnxcam.errors import UsageError
from onnxcam.layers import Layer
from onnxcam.model import Model


@dataclass(frozen=True)
class Pair:
    """A layer of each model.

    Attributes:
        name: what it is called in results: the first model's node, or tensor where two layers have one node.
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

    Layers of the same name, resolution and number of channels go together. Of the others, those of one resolution and
    number of channels go together in order, where both models have as many of them: so it is with a file and its
    quantised or converted copy.
    """
    rows, others = first.layers(), second.layers()
    alike = first.size == second.size

    def kind(layer: Layer, model: Model) -> Any:
        return (layer.spatial if alike else _steps(layer, model)), channels(layer)

    found: dict[str, Pair] = {}
    taken: set[str] = set()
    names = {name: row for row in reversed(others) for name in (row.node, row.tensor, row.path) if name}
    for row in rows:
        same = next((names[n] for n in (row.node, row.tensor, row.path) if n in names), None)
        if same is not None and same.tensor not in taken and kind(same, second) == kind(row, first):
            found[row.tensor] = Pair(row.node, row, same, "name")
            taken.add(same.tensor)
    groups = _grouped((kind(r, first), r) for r in rows if r.tensor not in found)
    rest = _grouped((kind(r, second), r) for r in others if r.tensor not in taken)
    for key, left in groups.items():
        right = rest.get(key, [])
        if len(left) == len(right):
            found.update((a.tensor, Pair(a.node, a, b, "order")) for a, b in zip(left, right, strict=True))
    return {row.tensor: found[row.tensor] for row in rows if row.tensor in found}


def _steps(layer: Layer, model: Model) -> tuple[int, ...]:
    """How often the resolution of the input was halved on the way, axis by axis, as far as it is known."""
    sizes = zip(model.size, layer.spatial, strict=False)
    return tuple(round(log2(whole / n)) if isinstance(n, int) and n > 0 and whole > 0 else -1 for whole, n in sizes)


def _grouped(rows: Iterable[tuple[Any, Layer]]) -> dict[Any, list[Layer]]:
    groups: dict[Any, list[Layer]] = defaultdict(list)
    for kind, row in rows:
        groups[kind].append(row)
    return groups


def chosen(
    first: Model, second: Model, layers: Sequence[str | int], asked: Mapping[str, str] | None = None
) -> list[Pair]:
    """The pairs to be explained, from the input to the logits: `layers` of the first with what they are in the second,
    and those `asked` for.

    Where nothing is matched by name or order, the suggested layer of the second at the nearest resolution is taken.

    Raises:
        UsageError: a name means nothing, or several layers where one is asked for; a layer is asked for twice; the
            second model has no layer with a map.
    """
    known = matched(first, second)
    pairs: dict[str, Pair] = {}
    for a, b in (asked or {}).items():
        one, other = _only(first, a), _only(second, b)
        if one.tensor in pairs:
            raise UsageError(f"layer {a!r} is asked for twice, with {pairs[one.tensor].b.node} and with {b}")
        pairs[one.tensor] = Pair(one.node, one, other, "asked for")
    for row in first.resolve(list(layers)).values() if layers else ():
        pair = known.get(row.tensor) or Pair(row.node, row, _nearest(row, second), "depth")
        pairs.setdefault(row.tensor, pair)
    count = Counter(pair.name for pair in pairs.values())
    found = [pair if count[pair.name] == 1 else replace(pair, name=pair.a.tensor) for pair in pairs.values()]
    return sorted(found, key=lambda pair: _place(first, pair.a.tensor))


def _only(model: Model, name: str) -> Layer:
    found = list(model.resolve([name]).values())
    if len(found) != 1:
        raise UsageError(f"{name!r} means {len(found)} layers of {model.name}: a pair A=B is of one each")
    return found[0]


def _place(model: Model, tensor: str) -> int:
    """How far from the input a tensor is made."""
    graph = model.canonical().graph
    if tensor not in graph:
        graph = model.canonical(None, frozenset({tensor})).graph
    node = graph.producer(tensor)
    return -1 if node is None else node.index


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
