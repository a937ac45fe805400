"""Positions carried through a graph, node by node, and back: which of them reach the logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from onnxcam.graph import Graph, Node
from onnxcam.positions.coordinates import Axes, Coordinate, Field, Outcome, Placed, along, blurred, nowhere
from onnxcam.positions.rules import RULES

SLIDING = frozenset(("Conv", "QLinearConv", "ConvInteger", "FusedConv"))


class Positions:
    """The positions of all tensors of a graph that have kept them.

    Args:
        graph: a canonised graph.
        inputs: spatial axes of the graph's inputs, in the picture's order.
        batch: how many images to track, where the graph leaves it open.
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, Axes], batch: int = 2):
        self.graph = graph
        self.placed: dict[str, Placed] = {}
        self.outcomes: dict[int, list[Outcome | None]] = {}
        self.whole = True  # no shape has contradicted the batch that is tracked
        self._known: dict[Any, Any] = {}
        self._arrays: dict[Any, Coordinate] = {}
        self._interned: dict[Any, Placed] = {}
        self._open: set[str] = set()  # what the graph calls an open batch
        self.batch = batch
        self.size: tuple[int, ...] = ()
        for name in graph.inputs:
            self._input(name, inputs.get(name, ()), batch)
        # A quotient of nothing but NaN is NaN, as it should be.
        with np.errstate(invalid="ignore", divide="ignore"):
            for node in graph.nodes:
                if node.op_type in SLIDING:
                    self._placed_anew(node)
                if any(name in self.placed for name in node.inputs):
                    self._node(node)

    def _input(self, name: str, axes: Axes, batch: int) -> None:
        shape = self.graph.shape(name)
        if not shape or not axes or any(not isinstance(n, int) for n in shape[1:]):
            return
        first = shape[0]
        if isinstance(first, str):
            self._open.add(first)
        self.batch = first if isinstance(first, int) else batch
        sizes = (self.batch, *(int(n) for n in shape[1:] if isinstance(n, int)))
        field = [np.arange(sizes[axis], dtype=float).reshape(along(len(sizes), axis)) for axis in (0, *axes)]
        self.size = tuple(sizes[axis] for axis in axes)
        self.placed[name] = Placed(sizes, (tuple(field),))

    def _placed_anew(self, node: Node) -> None:
        """What a convolution slides over lies in places. Where those were lost on the way to it, as behind a cosine
        transform of blocks, it is taken to cover the whole picture evenly."""
        if not node.has(0) or node.inputs[0] in self.placed or node.inputs[0] not in self.graph.data:
            return
        sizes = self.sizes(node.inputs[0])
        if sizes is None or len(sizes) != 2 + len(self.size) or sizes[0] != self.batch or prod(sizes[2:]) <= 1:
            return
        field = [np.arange(self.batch, dtype=float).reshape(along(len(sizes), 0))]
        for axis, (cells, pixels) in enumerate(zip(sizes[2:], self.size, strict=True), start=2):
            field.append(((np.arange(cells) + 0.5) * pixels / cells - 0.5).reshape(along(len(sizes), axis)))
        self.placed[node.inputs[0]] = Placed(sizes, (tuple(field),))

    def _node(self, node: Node) -> None:
        rule = RULES.get(node.op_type)
        if rule is None:
            return
        found = rule(self, node)
        listed = [found] if found is None or isinstance(found, Outcome) else list(found)
        kept = [self._checked(name, one) for name, one in zip(node.outputs, listed, strict=False)]
        self.outcomes[node.index] = kept
        self.placed.update((name, one.placed) for name, one in zip(node.outputs, kept, strict=False) if one)

    def _checked(self, name: str, found: Outcome | None) -> Outcome | None:
        """Nothing where no field is left, or where shape inference says otherwise."""
        if found is None or not found.placed.fields or not name:
            return None
        known = self.graph.shape(name)
        if known is None or len(known) != len(found.placed.shape):
            return None
        fits = all(not isinstance(n, int) or n == m for n, m in zip(known, found.placed.shape, strict=True))
        return found if fits else None

    # -- what rules use ------------------------------------------------------------------------------------------

    def of(self, node: Node, i: int = 0) -> Placed | None:
        return self.placed.get(node.inputs[i]) if node.has(i) else None

    def sizes(self, tensor: str, total: int | None = None) -> tuple[int, ...] | None:
        """The tensor's shape for the batch that is tracked; one axis may follow from how many entries there are."""
        shape = self.graph.shape(tensor)
        if shape is None:
            return None
        sizes = [self.batch if isinstance(n, str) and n in self._open else n for n in shape]
        unknown = [i for i, n in enumerate(sizes) if not isinstance(n, int)]
        rest = prod(n for n in sizes if isinstance(n, int))
        if len(unknown) == 1 and total is not None and rest and total % rest == 0:
            sizes[unknown[0]] = total // rest
        elif unknown:
            return None
        found = tuple(int(n) for n in sizes if isinstance(n, int))
        if total is not None and prod(found) != total:
            self.whole = False
            return None
        return found

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """`make()`, made once for each key; what blocks of a network have in common is worked out once."""
        if key not in self._known:
            made = make()
            self._known[key] = replace(made, placed=self._one(made.placed)) if isinstance(made, Outcome) else made
        return self._known[key]

    def _one(self, placed: Placed) -> Placed:
        """Equal positions are one object, so that what is worked out for one holds for all."""
        same = self._arrays.setdefault
        fields = tuple(tuple(same((a.shape, a.tobytes()), a) for a in f) for f in placed.fields)
        key = (placed.shape, tuple(tuple(map(id, f)) for f in fields))
        return self._interned.setdefault(key, Placed(placed.shape, fields))

    def moved(
        self, node: Node, key: tuple[Any, ...], shape: Sequence[int], move: Callable[[Coordinate], Coordinate]
    ) -> Outcome | None:
        """What the node puts out where it moves the coordinates of its first input by `move`, which `key` tells."""
        x = self.of(node)
        if x is None:
            return None

        def make() -> Outcome | None:
            kept = [(i, field) for i, f in enumerate(x.fields) if not blurred(field := tuple(move(a) for a in f))]
            placed = Placed(tuple(shape), tuple(field for _, field in kept))
            return Outcome(placed, tuple(((0, i),) for i, _ in kept)) if kept else None

        found: Outcome | None = self.once((node.op_type, x, *key), make)
        return found

    # -- what reaches the logits ---------------------------------------------------------------------------------

    def dead(self, logits: str) -> set[str]:
        """The tensors whose positions do not reach `logits`: of all their tokens only some without a position do.

        Behind the last attention of a network that reads its class token, the other tokens lead nowhere.
        """
        wanted = {logits}
        alive = {(logits, i) for i, f in enumerate(self._fields(logits)) if not nowhere(f)}
        for node in reversed(self.graph.nodes):
            outputs = [(o, name) for o, name in enumerate(node.outputs) if name in wanted]
            if not outputs:
                continue
            wanted.update(name for name in node.inputs if name)
            outcomes = self.outcomes.get(node.index, [])
            for i, name in enumerate(node.inputs):
                for f in range(len(self._fields(name))):
                    heirs = [
                        (output, g)
                        for o, output in outputs
                        if o < len(outcomes) and (one := outcomes[o]) is not None
                        for g, sources in enumerate(one.sources)
                        if (i, f) in sources
                    ]
                    mixes = any(one is not None and i in one.mixed for one in outcomes)
                    if mixes or not heirs or any(heir in alive for heir in heirs):
                        alive.add((name, f))
        alive = {(name, f) for name, f in alive if not nowhere(self._fields(name)[f])}
        return {name for name in self.placed if name in wanted and not any((name, f) in alive for f in (0, 1))}

    def _fields(self, tensor: str) -> tuple[Field, ...]:
        placed = self.placed.get(tensor)
        return placed.fields if placed else ()
