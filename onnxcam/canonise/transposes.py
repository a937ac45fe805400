"""Join Transposes that follow each other: what converters put around each op of a network with channels last cancels.

A pair that undoes itself becomes a Transpose that does nothing, which `drop_identities` drops.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs


def join_transposes(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Let each Transpose of a Transpose read what the first one reads; True where there was one.

    Not around a tensor of `protected`: what is looked at there has to come by.

    Every tensor keeps its name and its values. The first of the two goes when nobody reads it any more.
    """
    changed = False
    for node in graph.nodes:
        if not _transposes(node) or not node.inputs[0].inputs or not _transposes(node.inputs[0].inputs[0]):
            continue
        if node.inputs[0].name in protected:
            continue
        before = node.inputs[0].inputs[0]
        outer, inner = _perm(node), _perm(before)
        if outer is None or inner is None:
            continue
        node.inputs[0] = before.inputs[0]
        node.attrs["perm"] = [inner[i] for i in outer]
        changed = True
    return changed


def _transposes(node: gs.Node) -> bool:
    return node.op == "Transpose" and node.domain in (None, "", "ai.onnx")


def _perm(node: gs.Node) -> list[int] | None:
    """Which axis comes where; without the attribute they are reversed, as many as there are."""
    perm, shape = node.attrs.get("perm"), node.inputs[0].shape
    if perm is None and shape is not None:
        perm = range(len(shape))[::-1]
    return None if perm is None else [int(i) for i in perm]
