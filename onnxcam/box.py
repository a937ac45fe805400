"""The range of what the first linear operators see, which z-box rules need: of pixels, followed through the graph.

The range of the input comes from preprocessing, or from the data. Where the graph scales its input itself before the
first linear operator, black and white are sent through that part: what keeps the order of values in each channel takes
the ends of a range to the ends of a range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from onnxcam.composites import Composite
from onnxcam.engines.session import RuntimeSession, Settings
from onnxcam.errors import UsageError
from onnxcam.graph import Graph
from onnxcam.operators import lookup
from onnxcam.operators.kinds import Linear
from onnxcam.propagate import first_linear
from onnxcam.taps import expose

if TYPE_CHECKING:
    from onnxcam.model import Canonical

Ranges = Mapping[str, tuple[np.ndarray, np.ndarray]]  # input -> the smallest and the largest it can be


def boxed(rules: Composite, canonical: Canonical, ranges: Ranges, feeds: Mapping[str, np.ndarray]) -> Composite:
    """The composite with the range of every operand of a first linear operator filled in.

    Args:
        rules: a composite that needs it.
        canonical: the graph.
        ranges: of the inputs, in arrays that broadcast with them.
        feeds: an array for each input, which says its size.

    Raises:
        UsageError: a first linear operator sees an input without a range.
    """
    graph = canonical.graph
    operands = {}
    firsts = first_linear(graph)
    for node in graph.nodes:
        if node.name in firsts:
            operator = lookup(node)
            if isinstance(operator, Linear):
                operands[node.inputs[operator.operand]] = node
    names = [name for name in operands if name not in ranges]
    for other in set(graph.inputs) - set(ranges):
        if other in names or any(graph.between([other], name) for name in names):
            raise UsageError(f"composite {rules.name} needs the range of input {other!r}, which only pictures have")
    boxes = {name: ranges[name] for name in operands if name in ranges}
    if names:
        session = RuntimeSession(expose(graph, names), names, Settings())
        ends = []
        for end in (0, 1):
            arrays = {name: _whole(ranges[name][end], a) if name in ranges else a for name, a in feeds.items()}
            ends.append(session.run(arrays))
        for name in names:
            black, white = (np.asarray(e[name][:1], np.float32) for e in ends)
            boxes[name] = _small(np.minimum(black, white)), _small(np.maximum(black, white))
    return rules.with_boxes(boxes)


def blank(graph: Graph) -> dict[str, np.ndarray]:
    """Zeros for every input of a graph, one image of it where the batch is open."""
    sizes = {name: [n if isinstance(n, int) else 1 for n in graph.shape(name) or ()] for name in graph.inputs}
    return {name: np.zeros(shape, graph.dtype(name)) for name, shape in sizes.items()}


def _whole(value: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.broadcast_to(value, like.shape).astype(like.dtype)


def _small(box: np.ndarray) -> np.ndarray:
    """The box with its axes of equal entries shortened, so that it is stored once for each channel only."""
    for axis in range(box.ndim):
        first = np.take(box, [0], axis)
        if (box == first).all():
            box = first
    return box
