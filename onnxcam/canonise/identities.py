"""Drop the nodes that hand their first input on unchanged: Identity, Dropout at inference, no-ops of other types.

`NO_OPS` says when a node of a type does nothing; every answer needs constants and shapes that are known, else the
node stays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcam.canonise.surgery import constant, detach, hand_over, has, rewire, static


def _same_shape(node: gs.Node) -> bool:
    """Equal shapes; one axis may be a symbol, which then stands for the same size on both sides."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None or list(before) != list(after):
        return False
    return sum(not isinstance(d, (int, np.integer)) for d in before) <= 1


def _dropout(node: gs.Node) -> bool:
    if any(t.outputs for t in node.outputs[1:]):
        return False  # somebody reads the mask
    if not has(node, 2):
        return True
    training = constant(node, 2)
    return training is not None and not bool(training.item())


def _cast(node: gs.Node) -> bool:
    before = node.inputs[0].dtype
    if before is None:
        return False
    if not isinstance(before, int):
        before = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(before))
    return int(before) == node.attrs["to"]


def _transpose(node: gs.Node) -> bool:
    perm = node.attrs.get("perm")
    return perm is not None and list(perm) == list(range(len(perm)))


def _slice(node: gs.Node) -> bool:
    steps = constant(node, 4)
    forward = not has(node, 4) or (steps is not None and bool(np.all(steps == 1)))
    return forward and static(node.inputs[0].shape) is not None and _same_shape(node)


def _pad(node: gs.Node) -> bool:
    pads = constant(node, 1) if has(node, 1) else node.attrs.get("pads")
    return pads is not None and not np.any(pads)


def _tile(node: gs.Node) -> bool:
    repeats = constant(node, 1)
    return repeats is not None and bool(np.all(repeats == 1))


def _alone(node: gs.Node) -> bool:
    return len(node.inputs) == 1


NO_OPS: dict[str, Callable[[gs.Node], bool]] = {
    "Identity": lambda node: True,
    "Dropout": _dropout,
    "Cast": _cast,
    "Reshape": _same_shape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Pad": _pad,
    "Expand": _same_shape,
    "Tile": _tile,
    "Concat": _alone,
    "Sum": _alone,
    "Max": _alone,
    "Min": _alone,
}


def drop_identities(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Drop the nodes that do nothing; True where there was one.

    A node that makes a tensor of `protected` goes only where that name can pass to the node before it.
    """
    changed = False
    inputs = {t.name for t in graph.inputs}
    for node in graph.nodes:
        does_nothing = NO_OPS.get(node.op)
        if does_nothing is None or node.domain not in (None, "", "ai.onnx") or not node.outputs:
            continue
        if isinstance(node.inputs[0], gs.Constant) or not does_nothing(node):
            continue
        before, after = node.inputs[0], node.outputs[0]
        if after.name not in protected:
            rewire(after, before)
        elif before.name not in protected and before.name not in inputs and len(before.inputs) == 1:
            hand_over(before, after)
        else:
            continue
        detach(node)
        changed = True
    return changed
