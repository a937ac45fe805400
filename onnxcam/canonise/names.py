"""Give every node of a file a unique, non-empty name, before any pass runs and changes who is the n-th of its type.

An unnamed node becomes `{OpType}_{n}`, n counting the nodes of that type in the file from 0; a name that is taken
gets a suffix. Only `graph.node` is named this way: nodes inside the branches of an If are named when they join the
graph.
"""

from __future__ import annotations

from collections import Counter

import onnx


def name_nodes(graph: onnx.GraphProto) -> None:
    """Name the nodes of `graph` in place; names that are already unique stay as they are."""
    taken = {node.name for node in graph.node if node.name}
    seen: set[str] = set()
    position: Counter[str] = Counter()
    for node in graph.node:
        n = position[node.op_type]
        position[node.op_type] += 1
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        node.name = unique(node.name or f"{node.op_type}_{n}", taken)
        seen.add(node.name)
        taken.add(node.name)


def unique(name: str, taken: set[str] | frozenset[str]) -> str:
    """`name`, or `name` with the first numeric suffix that is not among `taken`."""
    if name not in taken:
        return name
    k = 1
    while f"{name}_{k}" in taken:
        k += 1
    return f"{name}_{k}"
