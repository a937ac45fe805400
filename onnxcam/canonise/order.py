"""Sort nodes topologically, keeping the file's order wherever it is one already, and remove those that nobody needs."""

from __future__ import annotations

import heapq

import onnx_graphsurgeon as gs

from onnxcam.canonise.names import unique
from onnxcam.canonise.surgery import captured, detach
from onnxcam.errors import ModelError


def tidy(graph: gs.Graph, keep: frozenset[str]) -> None:
    """Sort the nodes, drop those that lead neither to an output nor to a tensor of `keep`, name those without a
    name."""
    _sort(graph)
    wanted = {t.name for t in graph.outputs} | keep
    live = []
    for node in reversed(graph.nodes):
        if any(t.name in wanted for t in node.outputs if not t.is_empty()):
            wanted.update(t.name for t in node.inputs)
            wanted.update(captured(node))
            live.append(node)
        else:
            detach(node)
    graph.nodes = live[::-1]
    _name(graph)


def _sort(graph: gs.Graph) -> None:
    # graph-surgeon's own toposort orders by depth, which scatters the branches of a block, and recurses once per level.
    producer = {t.name: i for i, node in enumerate(graph.nodes) for t in node.outputs if not t.is_empty()}
    needs = []
    readers: list[list[int]] = [[] for _ in graph.nodes]
    for i, node in enumerate(graph.nodes):
        names = {t.name for t in node.inputs} | captured(node)
        before = {producer[name] for name in names if name in producer} - {i}
        needs.append(len(before))
        for j in before:
            readers[j].append(i)
    ready = [i for i, n in enumerate(needs) if n == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(graph.nodes[i])
        for j in readers[i]:
            needs[j] -= 1
            if needs[j] == 0:
                heapq.heappush(ready, j)
    if len(order) < len(graph.nodes):
        stuck = next(node for node, n in zip(graph.nodes, needs, strict=True) if n > 0)
        raise ModelError(f"the graph has a cycle through or before node {stuck.name!r}; export the model again")
    graph.nodes = order


def _name(graph: gs.Graph) -> None:
    seen: set[str] = set()
    for node in graph.nodes:
        node.name = unique(node.name or node.op, seen)
        seen.add(node.name)
