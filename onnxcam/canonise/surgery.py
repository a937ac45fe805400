"""The few moves on a graph-surgeon graph that the passes share: who may be touched, and how to rewire around a node."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.names import unique


class Names:
    """The names a pass may not touch, and those that tensors already have."""

    def __init__(self, graph: gs.Graph, protected: frozenset[str]):
        self.protected = protected
        self._taken = set(graph.tensors())

    def fresh(self, name: str) -> str:
        """`name`, with a suffix where a tensor already has it; from now on it is taken."""
        name = unique(name, self._taken)
        self._taken.add(name)
        return name


def protected(graph: gs.Graph, keep: frozenset[str]) -> frozenset[str]:
    """Names of tensors whose name and values must stay: `keep`, the graph's outputs, and what a subgraph hands out."""
    names = set(keep)
    names.update(t.name for t in graph.outputs)
    for subgraph in graph.subgraphs(recursive=True):
        names.update(t.name for t in subgraph.outputs)
    return frozenset(names)


def captured(node: gs.Node) -> set[str]:
    """Names of the tensors that the subgraphs of `node` read and do not make themselves."""
    names: set[str] = set()
    for subgraph in node.subgraphs():
        local = {t.name for t in subgraph.inputs}
        read = {t.name for t in subgraph.outputs}
        for inner in subgraph.nodes:
            local.update(t.name for t in inner.outputs)
            read.update(t.name for t in inner.inputs)
            read |= captured(inner)
        names |= read - local
    return names


def constant(node: gs.Node, i: int) -> np.ndarray | None:
    """The value of input `i` of `node` where it is a constant, else None."""
    if i < len(node.inputs) and isinstance(node.inputs[i], gs.Constant):
        return node.inputs[i].values
    return None


def has(node: gs.Node, i: int) -> bool:
    """True where `node` has an `i`-th input (an omitted optional input has an empty name)."""
    return i < len(node.inputs) and not node.inputs[i].is_empty()


def static(shape: Collection[int | str | None] | None) -> list[int] | None:
    """The sizes of a shape whose every axis is a number; None for any other."""
    sizes = [int(d) for d in shape or () if isinstance(d, (int, np.integer))]
    return sizes if shape is not None and len(sizes) == len(shape) else None


def rewire(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every node that reads `old` read `new`."""
    for node in list(old.outputs):
        for i, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[i] = new


def hand_over(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let `new` take the place of `old`: its producer makes `new`, and the nodes that read `old` read `new`."""
    new.inputs.clear()
    (producer,) = old.inputs
    for i, tensor in enumerate(producer.outputs):
        if tensor is old:
            producer.outputs[i] = new
    rewire(old, new)


def detach(node: gs.Node) -> None:
    """Cut `node` off the graph; `tidy` removes it."""
    node.inputs.clear()
    node.outputs.clear()


def put_for(graph: gs.Graph, node: gs.Node, nodes: Collection[gs.Node]) -> None:
    """Put `nodes` where `node` stands in the order of the graph; by identity, as nodes that look alike are equal."""
    place = next(i for i, other in enumerate(graph.nodes) if other is node)
    graph.nodes[place : place + 1] = nodes


def set_constant(node: gs.Node, i: int, values: np.ndarray, name: str, names: Names) -> None:
    """Make `values` the `i`-th input of `node`, under the name of the constant it replaces where no other node reads
    that.

    A constant that others read, or that is to stay, gives way to a new one called `name`, or so where that is taken.
    """
    while len(node.inputs) <= i:
        node.inputs.append(gs.Variable.empty())
    old = node.inputs[i]
    own = isinstance(old, gs.Constant) and len(old.outputs) == 1 and old.name not in names.protected
    node.inputs[i] = gs.Constant(old.name if own else names.fresh(name), np.ascontiguousarray(values))
