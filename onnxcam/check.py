"""Can this model be explained? For every node from the logits to the input: operator and rule, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from onnxcam.composites import Composite, composite as find_composite, describe, suited
from onnxcam.errors import ModelError
from onnxcam.graph import Graph, Node, Shape
from onnxcam.heads import one_row_each
from onnxcam.operators import lookup
from onnxcam.operators.kinds import Additive, Operator, Product
from onnxcam.propagate import LINEAR_OPS, first_linear
from onnxcam.rules import Vjp
from onnxcam.signs import nonnegative_tensors

if TYPE_CHECKING:
    from onnxcam.model import Canonical, Model


@dataclass(frozen=True)
class Row:
    """One node on the way: its kind and rule, or the reason why it cannot be passed.

    `macs` counts multiply-adds of its forward pass for one image, `walk_macs` those of the walk over it.
    """

    node: str
    op_type: str
    kind: str | None
    rule: str | None
    reason: str | None = None
    macs: int = 0
    walk_macs: int = 0


@dataclass(frozen=True)
class Check:
    """What `onnxcam check` finds, rows from the logits to the input."""

    logits: str
    composite: str
    rows: list[Row]

    @property
    def problems(self) -> list[Row]:
        return [row for row in self.rows if row.reason is not None]

    @property
    def macs(self) -> int:
        """Multiply-adds of one forward pass."""
        return sum(row.macs for row in self.rows)

    @property
    def walk_macs(self) -> int:
        """Multiply-adds of the walk from the logits to the input, for one target."""
        return sum(row.walk_macs for row in self.rows)


# What detectors end in.
_DETECTS = {"NonMaxSuppression", "EfficientNMS_TRT", "BatchedNMS_TRT", "BatchedNMSDynamic_TRT", "TRTBatchedNMS"}


def why_no_logits(graph: Graph, logits: str) -> str | None:
    """Why an explanation cannot begin at this tensor, as far as the graph tells; None where nothing speaks against."""
    shape, dtype = graph.shape(logits), graph.dtype(logits)
    for node in graph.between(graph.inputs, logits):
        if node.op_type in _DETECTS:
            return (
                f"node {node.name!r} ({node.op_type}): the model detects objects, and onnxcam explains classifiers; "
                f"name the scores of one object with --output{_choices(graph, logits)}"
            )
    if dtype is not None and dtype.kind != "f":
        maker = graph.producer(logits)
        chosen = f" ({maker.op_type} of {_sizes(maker.shape(0))})" if maker and maker.op_type == "ArgMax" else ""
        return (
            f"the logits ({logits!r}) are {dtype.name}, not floats{chosen}: onnxcam cannot start there; name what "
            f"they are chosen from with --output{_choices(graph, logits)}"
        )
    if shape is not None and not one_row_each(shape):
        return no_classifier(logits, shape, _choices(graph, logits))
    return None


def _choices(graph: Graph, logits: str) -> str:
    others = [name for name in graph.outputs if name != logits]
    return f" (there is {', '.join(others)})" if others else ""


def _sizes(shape: Shape | None) -> str:
    return f"({', '.join(map(str, shape or ('?',)))})"


def no_classifier(output: str, shape: Shape, choices: str = "") -> str:
    return (
        f"the output ({output!r}) has shape {_sizes(shape)}: onnxcam explains classifiers, whose output is (N, "
        f"classes); name another output with --output{choices}"
    )


def check(model: Model, composite: str | None = None, attention: str | None = None) -> Check:
    """Follow relevance from the logits to the input without computing any; where the model takes a branch by what it
    sees, along both.

    Raises:
        UsageError: no such composite, or no such way through attention.
    """
    from onnxcam.conditions import either_way

    plain = model.given()
    found = model.canonical(plain)
    rules = find_composite(composite) if composite else suited("relevance_cam", found.graph, found.logits)
    rules = rules.with_attention(attention)
    ways = {either_way(model, plain, value): None for value in (True, False)}
    checks = [_follow(model.canonical(given, fold_batchnorm=rules.fold_batchnorm), rules) for given in ways]
    rows = checks[0].rows + [row for row in checks[-1].rows if row.node not in {r.node for r in checks[0].rows}]
    return Check(found.logits, rules.name, rows)


def _follow(found: Canonical, rules: Composite) -> Check:
    graph = found.graph
    firsts = first_linear(graph)
    nonnegative = nonnegative_tensors(graph)
    reached = {found.logits}
    rows = []
    for node in reversed(graph.between(graph.inputs, found.logits)):
        if not any(name in reached for name in node.outputs):
            continue
        macs = _macs(graph, node)
        if found.logits in node.outputs and (reason := why_no_logits(graph, found.logits)):
            rows.append(Row(node.name, node.op_type, None, None, reason, macs))
            continue
        try:
            operator = lookup(node)
        except ModelError as error:
            rows.append(Row(node.name, node.op_type, None, None, str(error), macs))
            continue
        rule = rules.rule_for(operator, node.op_type, node.name in firsts)
        signs = 1 if node.inputs[0] in nonnegative or isinstance(rule, Vjp) else 2
        walk = macs * (signs if isinstance(rule, Vjp) else 2 * signs)
        rows.append(Row(node.name, node.op_type, operator.kind, describe(rule), None, macs, walk))
        reached.update(_receivers(graph, node, operator, rule))
    return Check(found.logits, rules.name, rows)


def unreached(layer: str, rules: Composite, graph: Graph) -> str:
    """What to say of a layer that no relevance reaches."""
    loops = [node for node in graph.nodes if node.op_type in ("Loop", "Scan")]
    if loops:
        return (
            f"no relevance reaches layer {layer!r}: node {loops[-1].name!r} ({loops[-1].op_type}) lies between it and "
            "the logits, and what goes round in a loop is not followed; name a layer behind it, or take the model as a "
            "--black-box"
        )
    return (
        f"no relevance reaches layer {layer!r} by the rules of {rules.name!r}: it weighs what is seen, as a gate or a "
        "statistic does; name a layer before or behind it"
    )


def reached(graph: Graph, logits: str, rules: Composite) -> set[str]:
    """The tensors between the inputs and `logits` that relevance comes to by these rules.

    What cannot be passed is taken to hand relevance on to all that it reads.
    """
    found = {logits}
    firsts = first_linear(graph) if rules.first is not None else set()
    for node in reversed(graph.between(graph.inputs, logits)):
        if not any(name in found for name in node.outputs):
            continue
        try:
            operator = lookup(node)
        except ModelError:
            found.update(name for name in node.inputs if name)
        else:
            rule = rules.rule_for(operator, node.op_type, node.name in firsts)
            found.update(_receivers(graph, node, operator, rule))
    return found


def _receivers(graph: Graph, node: Node, operator: Operator, rule: Any) -> Iterator[str]:
    """The inputs of `node` that relevance goes on to."""
    if operator.kind == "statistic":
        return
    operand = getattr(operator, "operand", None)
    takers: Sequence[int] = range(len(node.inputs)) if operand is None else (operand,)
    if isinstance(operator, Product) and hasattr(rule, "takers"):
        takers = rule.takers(operator)
    elif isinstance(operator, Additive) and not isinstance(rule, Vjp):
        takers = [i for i in takers if i not in operator.shifts]
    for i, name in enumerate(node.inputs):
        dtype = graph.dtype(name) if name else None
        carries = dtype is None or dtype.kind == "f" or name in graph.data
        if name and not node.is_constant(i) and i in takers and carries:
            yield name


def _macs(graph: Graph, node: Node) -> int:
    """Multiply-adds of a linear node for one image; symbolic axes count as 1."""
    if node.op_type not in LINEAR_OPS:
        return 0
    output, weight = node.output_shape(), node.shape(1)
    if output is None or weight is None:
        return 0

    def cells(shape: tuple[int | str | None, ...]) -> int:
        return prod(n for n in shape if isinstance(n, int))

    if node.op_type == "Conv":
        return cells(output) * cells(weight[1:])
    if node.op_type == "ConvTranspose":
        return cells(node.shape(0) or ()) * cells(weight[1:])
    inner = node.shape(0)
    k = inner[-1] if inner and not node.attr("transA", 0) else (inner or (1, 1))[-2]
    return cells(output) * (k if isinstance(k, int) else 1)
