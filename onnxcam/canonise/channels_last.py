"""Channels last: pools and affine maps of (N, H, W, C) put into the layout that operators and folding know.

Keras and Flax on JAX compute with channels last, and jax2onnx writes that down as it is. A Conv stands between two
Transposes with the affine maps of its BatchNormalization behind the second, out of reach of `affine`. A pool becomes
one over (1, 1, N, H, W, C) whose window is 1 in the axis of images and in that of channels, so that the batch looks
like a row of positions. Keras' Rescaling and Normalization scale a picture before it is turned to channels first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.linear import LINEAR
from onnxcam.canonise.names import unique
from onnxcam.canonise.surgery import Names, constant

POOLS = ("MaxPool", "AveragePool", "LpPool")
AFFINE = ("Add", "Sub", "Mul", "Div")
STANDARD = (None, "", "ai.onnx")

Shape = Sequence[int | str | None]


# -- pools ---------------------------------------------------------------------------------------------------------


def pool_each_channel(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Let a pool over (1, 1, N, H, W, C), or the axes in another order, pool (N, C, H, W); True where there was one.

    Tensors keep their names and values: the two axes go before the pool and come back behind it.
    """
    names = Names(graph, protected)
    taken = {n.name for n in graph.nodes}
    changed = _cancel_squeezes(graph)
    for node in [n for n in graph.nodes if n.op in POOLS and n.domain in STANDARD]:
        shape = node.inputs[0].shape
        if shape is None or list(shape[:2]) != [1, 1] or any(not t.is_empty() and t.outputs for t in node.outputs[1:]):
            continue
        channels = _channels(node)
        if channels is not None:
            _pool(graph, node, channels, names, taken)
            changed = True
    return changed


def _cancel_squeezes(graph: gs.Graph) -> bool:
    """Let a Squeeze of an Unsqueeze that undoes it read what that reads, and do nothing."""
    changed = False
    for node in graph.nodes:
        if node.op != "Squeeze" or node.domain not in STANDARD or node.outputs[0].shape is None:
            continue
        source = node.inputs[0]
        while source.inputs and source.inputs[0].op == "Unsqueeze":
            source = source.inputs[0].inputs[0]
        if source is node.inputs[0] or source.shape is None or list(source.shape) != list(node.outputs[0].shape):
            continue
        if sum(not isinstance(d, (int, np.integer)) for d in source.shape) > 1 or isinstance(source, gs.Constant):
            continue
        node.op, node.attrs = "Identity", {}
        node.inputs = [source]
        changed = True
    return changed


def _channels(node: gs.Node) -> int | None:
    """The axis of channels among those that are pooled over, where the first is that of images and neither is pooled.

    It is the last one, else the second.
    """
    kernel = node.attrs.get("kernel_shape", [])
    rank = len(kernel)
    strides, pads = node.attrs.get("strides", [1] * rank), node.attrs.get("pads", [0] * 2 * rank)
    apart = [i for i in range(rank) if kernel[i] == strides[i] == 1 and pads[i] == pads[rank + i] == 0]
    if rank < 3 or 0 not in apart:
        return None
    return next((i for i in (rank - 1, 1) if i in apart), None)


def _pool(graph: gs.Graph, node: gs.Node, channels: int, names: Names, taken: set[str]) -> None:
    before, after = node.inputs[0], node.outputs[0]
    rank = len(before.shape) - 2
    spatial = [i for i in range(1, rank) if i != channels]
    order = [0, channels, *spatial]
    for name in ("kernel_shape", "strides", "dilations"):
        if name in node.attrs:
            node.attrs[name] = [node.attrs[name][i] for i in spatial]
    if "pads" in node.attrs:
        node.attrs["pads"] = [node.attrs["pads"][i] for i in (*spatial, *(rank + i for i in spatial))]

    def step(op: str, source: gs.Tensor, made: gs.Tensor | None = None, perm: list[int] | None = None) -> gs.Tensor:
        name = unique(f"{node.name}_{op}".lower(), taken)
        taken.add(name)
        inputs, attributes = [source], {} if perm is None else {"perm": perm}
        if perm is None and graph.opset >= 13:
            inputs.append(gs.Constant(names.fresh(f"{name}_axes"), np.array([0, 1], np.int64)))
        elif perm is None:
            attributes = {"axes": [0, 1]}
        made = made if made is not None else gs.Variable(names.fresh(name), source.dtype)
        graph.nodes.append(gs.Node(op, name, attributes, inputs, [made]))
        return made

    node.inputs[0] = step("Transpose", step("Squeeze", before), perm=order)
    node.outputs = [gs.Variable(names.fresh(f"{after.name}_channels_first"), after.dtype)]
    step("Unsqueeze", step("Transpose", node.outputs[0], perm=[int(i) for i in np.argsort(order)]), after)


# -- affine maps ---------------------------------------------------------------------------------------------------


def affine_to_linear(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Swap a Transpose and a map by a constant per channel where the map gets beside a linear operator by that.

    True where there was one. What leaves the second of the two keeps its name and its values.
    """
    names = Names(graph, protected)
    changed = False
    for node in list(graph.nodes):
        if node.op == "Transpose" and node.domain in STANDARD and node.outputs and node.attrs.get("perm") is not None:
            changed |= _lift(node, names) or _lower(graph, node, names)
    return changed


def _alone(tensor: gs.Tensor, names: Names) -> bool:
    return len(tensor.outputs) == 1 and tensor.name not in names.protected


def _map(node: gs.Node) -> tuple[int, np.ndarray] | None:
    """Which operand of `node` is mapped, and the constant it is mapped by."""
    if node.op not in AFFINE or node.domain not in STANDARD or len(node.inputs) != 2:
        return None
    for i in (0, 1):
        value = constant(node, 1 - i)
        if value is not None and not isinstance(node.inputs[i], gs.Constant):
            return i, value
    return None


def _from_linear(tensor: gs.Tensor, names: Names) -> bool:
    """True where `tensor` is what a linear operator makes, mapped or not, with no other reader on the way."""
    while tensor.inputs and _alone(tensor, names):
        node = tensor.inputs[0]
        if node.op in LINEAR and node.domain in STANDARD:
            return True
        found = _map(node)
        if found is None:
            return False
        tensor = node.inputs[found[0]]
    return False


def _rearranged(values: np.ndarray, perm: Sequence[int], shape: Shape | None) -> np.ndarray | None:
    """`values` for a tensor of `shape` after its axes are permuted, where they are one for each channel, or one."""
    if shape is None or len(shape) != len(perm) or values.ndim > len(perm):
        return None
    if values.size == 1:
        return values.reshape(())
    full = values.reshape((1,) * (len(perm) - values.ndim) + values.shape).transpose(perm)
    return full if full.shape[1] == values.size == shape[1] else None


def _lift(transpose: gs.Node, names: Names) -> bool:
    """Linear, Transpose, map: let the map come before the Transpose."""
    before, after = transpose.inputs[0], transpose.outputs[0]
    if not _alone(after, names) or not _from_linear(before, names):
        return False
    node = after.outputs[0]
    found = _map(node)
    if found is None:
        return False
    i, values = found
    back = [int(i) for i in np.argsort(transpose.attrs["perm"])]
    moved = _rearranged(values, back, before.shape)
    if moved is None:
        return False
    last, inner = node.outputs[0], gs.Variable(names.fresh(f"{after.name}_mapped"), before.dtype, before.shape)
    node.inputs[i] = before
    node.inputs[1 - i] = gs.Constant(names.fresh(f"{node.inputs[1 - i].name}_moved"), np.ascontiguousarray(moved))
    node.outputs[0] = inner
    transpose.inputs[0] = inner
    transpose.outputs[0] = last
    return True


def _is_scaled_input(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """True where `tensor` is an input of the graph with nothing but maps on the way; these no other pass moves."""
    while tensor.inputs and (found := _map(tensor.inputs[0])) is not None:
        tensor = tensor.inputs[0].inputs[found[0]]
    return any(tensor is t for t in graph.inputs)


def _lower(graph: gs.Graph, transpose: gs.Node, names: Names) -> bool:
    """Input, map, Transpose, linear: let the map come after the Transpose."""
    before, after = transpose.inputs[0], transpose.outputs[0]
    if not _alone(after, names) or not _alone(before, names) or not before.inputs:
        return False
    reader, node = after.outputs[0], before.inputs[0]
    # Maps that were lowered before stand between here and the linear operator.
    while (found := _map(reader)) is not None and _alone(reader.outputs[0], names):
        reader = reader.outputs[0].outputs[0]
    found = _map(node)
    if found is None or reader.op not in LINEAR or not _is_scaled_input(graph, before):
        return False
    i, values = found
    moved = _rearranged(values, transpose.attrs["perm"], after.shape)
    if moved is None:
        return False
    source = node.inputs[i]
    inner = gs.Variable(names.fresh(f"{after.name}_unmapped"), source.dtype)
    node.inputs[1 - i] = gs.Constant(names.fresh(f"{node.inputs[1 - i].name}_moved"), np.ascontiguousarray(moved))
    transpose.inputs[0] = source
    transpose.outputs[0] = inner
    node.inputs[i] = inner
    node.outputs[0] = after
    return True
