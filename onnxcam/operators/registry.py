"""Where operators are registered and found: by domain, op type and opset."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from onnxcam.errors import ModelError
from onnxcam.graph import Node
from onnxcam.operators.kinds import Operator
from onnxcam.operators.refused import REFUSED

Make = Callable[[Node], Operator]


@dataclass(frozen=True)
class _Entry:
    since: int
    until: int | None
    make: Make


_ENTRIES: dict[tuple[str, str], list[_Entry]] = {}


def operator(*op_types: str, since: int = 1, until: int | None = None, domain: str = "") -> Callable[[Make], Make]:
    """Register a function from a node to its mathematics for `op_types`, opsets `since` to `until` (both included)."""

    def register(make: Make) -> Make:
        for op_type in op_types:
            entries = _ENTRIES.setdefault((domain, op_type), [])
            if any(e.since <= (until or e.since) and since <= (e.until or since) for e in entries):
                raise ValueError(f"{op_type} is registered twice for one opset")
            entries.append(_Entry(since, until, make))
        return make

    return register


def registered() -> list[tuple[str, str, int, int | None]]:
    """Every (domain, op type, since, until) there is an operator for."""
    return sorted(
        ((domain, op, e.since, e.until) for (domain, op), entries in _ENTRIES.items() for e in entries),
        key=lambda row: row[:3],
    )


def _find(domain: str, op_type: str, opset: int) -> _Entry | None:
    for entry in _ENTRIES.get((domain, op_type), []):
        if entry.since <= opset and (entry.until is None or opset <= entry.until):
            return entry
    return None


def has_operator(domain: str, op_type: str, opset: int) -> bool:
    """True where there is an operator for this op at this opset."""
    return _find(domain, op_type, opset) is not None


def _known_reason(node: Node) -> str | None:
    """Why there is none on purpose: for the op in general, or for the form that this node is in."""
    # canonise knows operators, not they it
    from onnxcam.canonise.einsum import why_kept
    from onnxcam.canonise.expansion import why_not as why_not_expanded
    from onnxcam.canonise.recurrent import why_rolled

    reason = REFUSED.get((node.domain, node.op_type))
    surgeon = node.graph.surgeon.nodes[node.index]
    return reason or why_not_expanded(surgeon, node.graph.surgeon) or why_kept(surgeon) or why_rolled(surgeon)


def why_not(node: Node) -> str:
    """One line that says which node has no operator, and the ways out."""
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    reason = _known_reason(node)
    if reason is not None:
        return f"node {node.name!r}: no operator for {name} at opset {node.opset}: {reason}"
    known = [op for domain, op in _ENTRIES if domain == node.domain]
    near = difflib.get_close_matches(node.op_type, known, n=1, cutoff=0.8)
    hint = f" (there is one for {near[0]})" if near and near[0] != node.op_type else ""
    return (
        f"node {node.name!r}: no operator for {name} at opset {node.opset}{hint}; explain a layer that lies behind it "
        "(see `onnxcam layers`), take the model as a --black-box, or add the operator as docs/add-an-operator.md shows"
    )


def refusal(node: Node, why: str) -> ModelError:
    """What a maker raises for a node whose op it knows, but not in this form."""
    return ModelError(
        f"node {node.name!r}: {why} (opset {node.opset}); explain a layer that lies behind it (see `onnxcam layers`)"
    )


def need_constant(node: Node, i: int, what: str) -> None:
    """Refuse a node whose input `i` is there and depends on the input.

    Raises:
        ModelError: says what and where.
    """
    if node.has(i) and node.inputs[i] in node.graph.data:
        raise refusal(node, f"the {what} of {node.op_type} is computed in the graph from the input")


def need_numpy_broadcasting(node: Node) -> None:
    """Refuse the broadcasting of before opset 7, which aligned the second operand at an axis.

    Raises:
        ModelError: names the node.
    """
    if node.opset < 7 and node.attr("axis") is not None:
        raise refusal(node, f"{node.op_type} broadcasts along an axis, as it did before opset 7")


def lookup(node: Node) -> Operator:
    """The mathematics of a node.

    Raises:
        ModelError: onnxcam has no operator for it; the message names node, op, opset and the way out.
    """
    entry = _find(node.domain, node.op_type, node.opset)
    if entry is None:
        raise ModelError(why_not(node))
    return entry.make(node)
