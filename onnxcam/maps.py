"""Where the spatial axes of a tensor stand: which tensors are maps, channels at axis 1, the picture's axes after.

Convolutions and pooling have them there; transposes move them along, as networks that normalise with channels last do.
What is flattened into tokens or multiplied into an attention matrix has none left, whatever its rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxcam.graph import Graph, Node, Shape

Axes = tuple[int, ...]

# Spatial axes come out at 2, 3, ... whatever goes in, as the ONNX operators demand.
_CHANNELS_FIRST = set(
    "Conv ConvTranspose ConvInteger QLinearConv MaxPool AveragePool LpPool MaxUnpool GlobalAveragePool GlobalMaxPool "
    "GlobalLpPool BatchNormalization InstanceNormalization GroupNormalization LRN DepthToSpace SpaceToDepth "
    "GridSample".split()
)


def spatial_axes(graph: Graph, inputs: Mapping[str, Axes] | None = None) -> dict[str, Axes]:
    """The spatial axes of every tensor that has kept them, in the picture's order.

    Args:
        graph: a canonised graph.
        inputs: those of the graph's inputs; axis 2 and up where not given.
    """
    known: dict[str, Axes] = {}
    for name in graph.inputs:
        shape = graph.shape(name)
        known[name] = (inputs or {}).get(name, tuple(range(2, len(shape or ()))))
    for node in graph.nodes:
        for name in node.outputs:
            axes = _axes(node, name, known)
            if axes:
                known[name] = axes
    return known


def _axes(node: Node, output: str, known: Mapping[str, Axes]) -> Axes:
    shape = node.graph.shape(output)
    if shape is None:
        return ()
    if node.op_type in _CHANNELS_FIRST:
        return tuple(range(2, len(shape)))
    sources = [name for name in node.inputs if name in known and node.graph.shape(name) is not None]
    if not sources:
        return ()
    before, source = known[sources[0]], node.graph.shape(sources[0])
    assert source is not None
    if node.op_type == "Transpose":
        order = list(node.attr("perm") or range(len(shape))[::-1])
        return tuple(order.index(axis) for axis in before)
    if node.op_type == "MatMul":
        weighs_channels = node.is_constant(1) and len(shape) == len(source) and len(shape) - 1 not in before
        return before if weighs_channels else ()
    if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Gemm", "Einsum"):
        return _reshaped(source, before, shape)
    largest = max(sources, key=lambda name: len(node.graph.shape(name) or ()))
    return known[largest] if len(node.graph.shape(largest) or ()) == len(shape) else ()


def _reshaped(source: Shape, before: Axes, shape: Shape) -> Axes:
    """Axes at the end of the tensor stay if their sizes do: only channels are regrouped then."""
    n = len(before)
    at_end = before == tuple(range(len(source) - n, len(source)))
    same = len(shape) > n and at_end and source[len(source) - n :] == shape[len(shape) - n :]
    return tuple(range(len(shape) - n, len(shape))) if same else ()
