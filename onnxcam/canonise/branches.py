"""Take the branch of an If whose condition is known: its nodes join the graph in the If's place.

A condition is known where it is a constant, or where the caller has evaluated it for the input at hand: the graph is
then one for inputs that take the same branches.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnxcam.canonise.names import unique
from onnxcam.canonise.surgery import constant, detach, put_for


def take_branches(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Replace every If with a known condition by an inlined branch; the If's outputs keep their names.

    A node or tensor of the branch keeps its name too, unless the graph already has one of that name.
    """
    chosen = [node for node in graph.nodes if node.op == "If" and constant(node, 0) is not None]
    for node in chosen:
        condition = constant(node, 0)
        assert condition is not None
        _inline(graph, node, bool(condition.item()))
    return bool(chosen)


def take_known(graph: gs.Graph, protected: frozenset[str], conditions: Mapping[str, bool]) -> bool:
    """The same for every If whose condition, by the name of its tensor, stands in `conditions`."""
    chosen = [node for node in graph.nodes if node.op == "If" and node.inputs[0].name in conditions]
    for node in chosen:
        _inline(graph, node, conditions[node.inputs[0].name])
    return bool(chosen)


def _inline(graph: gs.Graph, node: gs.Node, condition: bool) -> None:
    branch: gs.Graph = node.attrs["then_branch" if condition else "else_branch"]
    outputs = list(node.outputs)
    detach(node)
    _rename(graph, branch)
    local = {id(t) for inner in branch.nodes for t in inner.outputs}
    nodes = list(branch.nodes)
    renamed: set[int] = set()
    for output, inner in zip(outputs, branch.outputs, strict=True):
        if id(inner) in local and id(inner) not in renamed:
            renamed.add(id(inner))
            _rebind(inner, output)
        else:
            # A constant, a tensor from outside, or one that the branch hands out twice.
            source = inner if id(inner) not in renamed else outputs[_first(branch.outputs, inner)]
            nodes.append(gs.Node("Identity", f"{node.name}_{output.name}", {}, [source], [output]))
    put_for(graph, node, nodes)


def _first(tensors: list[gs.Tensor], wanted: gs.Tensor) -> int:
    return next(i for i, tensor in enumerate(tensors) if tensor is wanted)


def _rebind(inner: gs.Tensor, output: gs.Tensor) -> None:
    for producer in list(inner.inputs):
        for i, tensor in enumerate(producer.outputs):
            if tensor is inner:
                producer.outputs[i] = output
    for reader in list(inner.outputs):
        for i, tensor in enumerate(reader.inputs):
            if tensor is inner:
                reader.inputs[i] = output


def _rename(graph: gs.Graph, branch: gs.Graph) -> None:
    tensors = set(graph.tensors())
    names = {node.name for node in graph.nodes}
    local = {id(t): t for inner in branch.nodes for t in inner.outputs if not t.is_empty()}
    outer = {id(t) for t in graph.tensors().values()}
    local.update((id(t), t) for t in branch.tensors().values() if isinstance(t, gs.Constant) and id(t) not in outer)
    for tensor in local.values():
        tensor.name = unique(tensor.name, tensors)
        tensors.add(tensor.name)
    for inner in branch.nodes:
        inner.name = unique(inner.name or inner.op, names)
        names.add(inner.name)
