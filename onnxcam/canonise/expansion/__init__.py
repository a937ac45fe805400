"""Write ops out in simpler ones: what ONNX Runtime's optimiser fused, and what ONNX defines by a function.

A node that onnxcam has an operator for stays. Any other is replaced where there is an expansion of its op, else where
the specification has a body for it; its outputs keep their names. A node in a form that has no expansion stays too: it
is an error only where relevance reaches it, and `why_not` then says what is in the way.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxcam.canonise.expansion import (  # noqa: F401  (importing registers)
    attention,
    contrib_activations,
    contrib_attention,
    contrib_linear,
    contrib_misc,
    contrib_normalisation,
    grid,
    rotary,
)
from onnxcam.canonise.expansion.body import Body, Operand, Refused, Unknown
from onnxcam.canonise.expansion.functions import has_body, write_function
from onnxcam.canonise.expansion.table import EXPANSIONS, Expand
from onnxcam.canonise.inference import ask_runtime
from onnxcam.canonise.surgery import Names
from onnxcam.operators.refused import REFUSED
from onnxcam.operators.registry import has_operator


def expand(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Replace the nodes that can be written in simpler ops; True where there was one."""
    names = Names(graph, protected)
    waiting = [node for node in graph.nodes if expander(node, graph) is not None]
    changed = False
    for ask in (False, True):
        if ask and waiting:
            # ONNX's shape inference knows no fused op, and nothing that comes after one.
            ask_runtime(graph)
        later = []
        for node in waiting:
            try:
                body, results = _written(node, graph, protected)
            except Unknown:
                later.append(node)
            except Refused:
                continue
            else:
                body.join(graph, results, names)
                changed = True
        waiting = later
    return changed


def expander(node: gs.Node, graph: gs.Graph) -> Expand | None:
    """What writes `node` in simpler ops; None where it stays, or nothing does."""
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    opset = graph.opset if not domain else 1
    if has_operator(domain, node.op, opset) and not _gives_statistics(node):
        return None
    found = EXPANSIONS.get((domain, node.op))
    if found is not None and (found.until is None or opset <= found.until):
        return found.write
    return write_function if (domain, node.op) not in REFUSED and has_body(domain, node.op, opset) else None


def _gives_statistics(node: gs.Node) -> bool:
    """True for a normalisation whose mean or deviation is read as well: its operator is of what it normalises alone."""
    return node.op == "LayerNormalization" and any(not t.is_empty() and t.outputs for t in node.outputs[1:])


def why_not(node: gs.Node, graph: gs.Graph) -> str | None:
    """Why a node that there is an expansion for has not been replaced; None where there is none."""
    if expander(node, graph) is None:
        return None
    try:
        _written(node, graph, frozenset(t.name for t in graph.outputs))
    except (Refused, Unknown) as error:
        return str(error)
    return None


def _written(node: gs.Node, graph: gs.Graph, protected: frozenset[str]) -> tuple[Body, list[Operand]]:
    write = expander(node, graph)
    assert write is not None
    body = Body(node, graph.opset)
    results = write(body)
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    results += [None] * (len(node.outputs) - len(results))
    for i, (output, result) in enumerate(zip(node.outputs, results, strict=False)):
        if result is None and not output.is_empty() and (output.outputs or output.name in protected):
            raise Refused(f"{node.op} whose output {i} ({output.name!r}) is used")
    return body, results
