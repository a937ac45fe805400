"""Quantised layout: no operator but rounding itself touches integers, and each tensor is rounded once.

Files move integers about, by Reshape, MaxPool or Concat, before they dequantise them. Here the real values are moved
and rounded again behind, which gives the same integers, so that every tensor between two roundings means something;
a runtime that moves integers fuses the three nodes into one. Where a file rounds or dequantises one tensor several
times over, once for each reader, once is enough.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.quantised.values import STANDARD, Lowering, NotLowered, equal, input_of
from onnxcam.canonise.surgery import Names, constant, detach, has, rewire

ROUNDING = ("QuantizeLinear", "DequantizeLinear")
# Which inputs of a node hold what it moves: the first, or all of them.
FIRST_OF = {
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "MaxPool", "Slice", "Split", "Gather"),
    *("GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Pad", "Resize"),
}
ALL_OF = {"Concat", "Max", "Min"}


def join_rounding(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Let one node round, or dequantise, a tensor where several do the same; True where there were some."""
    changed = False
    for tensor in list(graph.tensors().values()):
        if isinstance(tensor, gs.Constant) or len(tensor.outputs) < 2:
            continue
        kept: list[gs.Node] = []
        for node in list(tensor.outputs):
            if node.op not in ROUNDING or node.domain not in STANDARD or node.inputs[0] is not tensor:
                continue
            twin = next((k for k in kept if _same(k, node)), None)
            if twin is None or node.outputs[0].name in protected:
                kept.append(node)
                continue
            rewire(node.outputs[0], twin.outputs[0])
            detach(node)
            changed = True
    return changed


def _same(a: gs.Node, b: gs.Node) -> bool:
    return (
        a.op == b.op
        and a.attrs == b.attrs
        and a is not b
        and len(a.inputs) == len(b.inputs)
        and all(equal(x, y) for x, y in zip(a.inputs[1:], b.inputs[1:], strict=True))
    )


def move_real_values(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Let what moves integers that are dequantised later move their real values; True where something did."""
    names = Names(graph, protected)
    changed = False
    for node in list(graph.nodes):
        if _moves(node):
            readers = [r for t in node.outputs for r in t.outputs if _dequantises(r, t)]
            changed |= bool(readers) and _on_real_values(Lowering(graph, node, names), readers[0])
    return changed


def _dequantises(reader: gs.Node, tensor: gs.Tensor) -> bool:
    scale = constant(reader, 1) if reader.op == "DequantizeLinear" and reader.domain in STANDARD else None
    dynamic = reader.op == "DequantizeLinear" and reader.domain in STANDARD and scale is None
    return reader.inputs[0] is tensor and (dynamic or (scale is not None and scale.size == 1))


def _on_real_values(at: Lowering, reader: gs.Node) -> bool:
    """Dequantise before the node and round again behind it, with scale and zero point as `reader` has them."""
    mover, parameters = at.node, list(reader.inputs[1:])
    try:
        inputs = _real_inputs(at, mover, parameters[0], input_of(reader, 2))
    except NotLowered:
        at.undo()
        return False
    for i, integers in enumerate(list(mover.outputs)):
        if not integers.is_empty():
            real = at.variable(f"{integers.name}_real")
            mover.outputs[i] = real
            at.add("QuantizeLinear", f"{integers.name}_quantise", [real, *parameters], [integers])
    mover.inputs = inputs
    return True


def _moves(mover: gs.Node) -> bool:
    if mover.domain not in STANDARD or mover.op not in FIRST_OF | ALL_OF:
        return False
    if mover.op == "MaxPool" and any(t.outputs for t in mover.outputs[1:]):
        return False
    return bool(mover.outputs) and not isinstance(mover.inputs[0], gs.Constant)


def _real_inputs(at: Lowering, mover: gs.Node, scale: gs.Tensor, zero: gs.Tensor | None) -> list[gs.Tensor]:
    moved = range(len(mover.inputs)) if mover.op in ALL_OF else (0,)
    inputs: list[gs.Tensor] = []
    for i, tensor in enumerate(mover.inputs):
        if i not in moved:
            inputs.append(tensor)
        elif isinstance(tensor, gs.Constant):
            raise NotLowered
        else:
            inputs.append(at.real_of(tensor, scale, zero))
    if mover.op == "Pad" and mover.attrs.get("mode", "constant") == "constant":
        inputs = _padded(at, mover, inputs, scale, zero)
    return inputs


def _padded(
    at: Lowering, mover: gs.Node, inputs: list[gs.Tensor], scale: gs.Tensor, zero: gs.Tensor | None
) -> list[gs.Tensor]:
    """The padding value as a real number; without one, integers are padded with the integer 0."""
    fill = constant(mover, 2) if has(mover, 2) else np.zeros((), np.int64)
    if fill is None or not isinstance(scale, gs.Constant) or not (zero is None or isinstance(zero, gs.Constant)):
        raise NotLowered
    point = 0.0 if zero is None else float(zero.values.item())
    real = np.array((float(fill.item()) - point) * float(scale.values.item()), np.float32)
    value = at.constant(real, f"{mover.name}_value")
    return [inputs[0], inputs[1], value, *inputs[3:]]
