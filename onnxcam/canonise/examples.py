"""Learn shapes from two examples where the batch is left open: what inference loses behind computed sizes.

Exporters write sizes as arithmetic on the batch, the number of windows divided by their number in one image, say, and
ONNX's shape inference gives up there. With a batch that is a number it does not. So the graph is canonised for two
batches too, and a size that is the same in both is a number, one that is the batch in both is the batch; any other
stays open. A recorded walk needs to know all sizes but one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.surgery import Names, constant, static

BATCHES = (2, 3)
Shape = list[int | str | None]


def open_batch(graph: gs.Graph) -> str | None:
    """The name of the first axis of the inputs where it is the only one left open; None where it is not."""
    shapes = [t.shape for t in graph.inputs]
    if any(shape is None for shape in shapes):
        return None
    names = {d for shape in shapes for d in shape if not isinstance(d, int)}
    first = {shape[0] for shape in shapes if shape}
    if len(names) != 1 or None in names or any(not isinstance(d, int) for shape in shapes for d in shape[1:]):
        return None
    name = names.pop()
    return str(name) if name in first else None


def lacking(graph: gs.Graph) -> bool:
    """True where the shape of some float tensor is not known but for one axis."""
    return any(_open(t) > 1 for t in _floats(graph))


def _floats(graph: gs.Graph) -> list[gs.Variable]:
    made = [t for node in graph.nodes for t in node.outputs if not t.is_empty()]
    return [t for t in made if t.dtype is None or (not isinstance(t.dtype, int) and np.dtype(t.dtype).kind == "f")]


def _open(tensor: gs.Tensor) -> int:
    return 2 if tensor.shape is None else sum(not isinstance(d, int) for d in tensor.shape)


@dataclass
class Learned:
    """What both examples agree on, by the names of tensors."""

    shapes: dict[str, Shape]
    constants: dict[str, np.ndarray]


def learned(batch: str, make: Callable[[int], gs.Graph]) -> Learned:
    """The shapes of the tensors that both examples have, and the whole numbers that are constants in both."""
    one, other = (make(n).tensors() for n in BATCHES)
    found = Learned({}, {})
    for name, first in one.items():
        second = other.get(name)
        if second is None:
            continue
        a, b = static(first.shape), static(second.shape)
        if a is not None and b is not None and len(a) == len(b):
            found.shapes[name] = [_size(batch, x, y) for x, y in zip(a, b, strict=True)]
        values = [t.values for t in (first, second) if isinstance(t, gs.Constant) and t.dtype.kind in "iu"]
        if len(values) == 2 and np.array_equal(*values):
            found.constants[name] = values[0]
    return found


def _size(batch: str, x: int, y: int) -> int | str | None:
    if x == y:
        return x
    return batch if (x, y) == BATCHES else None


def write_down(graph: gs.Graph, known: Learned) -> None:
    """Give tensors the shapes that were learned, where they are better known there."""
    for node in graph.nodes:
        for tensor in node.outputs:
            shape = known.shapes.get(tensor.name)
            if shape is not None and sum(not isinstance(d, int) for d in shape) < _open(tensor):
                tensor.shape = list(shape)


def settle(graph: gs.Graph, known: Learned, protected: frozenset[str]) -> bool:
    """Make a constant of what is known to be one, and of the target of a Reshape where all axes are known but one; True
    where there was anything to do."""
    names, changed = Names(graph, protected), False
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in known.constants and tensor.name not in protected and isinstance(tensor, gs.Variable):
                tensor.inputs.clear()
                tensor.to_constant(known.constants[tensor.name])
                changed = True
    for node in graph.nodes:
        if node.op != "Reshape" or not node.outputs or constant(node, 1) is not None or _open(node.outputs[0]) > 1:
            continue
        sizes = [d if isinstance(d, int) else -1 for d in node.outputs[0].shape]
        if 0 not in sizes:
            node.inputs[1] = gs.Constant(names.fresh(f"{node.name}_shape"), np.array(sizes, np.int64))
            changed = True
    return changed
