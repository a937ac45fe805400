"""Write docs/operators.md, what becomes of every op: `python docs/make_operators.py`.

Everything on the page is asked of the code: what is registered, expanded, lowered or refused. The lists of ops are
those of the onnx package and of ONNX Runtime installed here; an op that none of the tables knows is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

from onnxcam.canonise import recurrent
from onnxcam.canonise.expansion.functions import has_body
from onnxcam.canonise.expansion.table import EXPANSIONS, MICROSOFT
from onnxcam.canonise.quantised import LOWERED
from onnxcam.composites import COMPOSITES, KINDS, describe
from onnxcam.errors import ModelError
from onnxcam.graph import Graph, Node
from onnxcam.operators import lookup, registered
from onnxcam.operators.refused import REFUSED

PAGE = Path(__file__).with_name("operators.md")
NEWEST = onnx.defs.onnx_opset_version()
DOMAINS = {
    "": "ai.onnx",
    "ai.onnx.ml": "ai.onnx.ml",
    "ai.onnx.preview": "ai.onnx.preview",
    "ai.onnx.preview.training": "ai.onnx.preview.training",
    MICROSOFT: "com.microsoft",
    "com.microsoft.nchwc": "com.microsoft.nchwc",
    "com.ms.internal.nhwc": "com.ms.internal.nhwc",
}
# What passes of canonising do that keep no table of the ops they are for.
REWRITTEN = {
    ("", "If"): "the branch that is taken",
    (MICROSOFT, "NhwcMaxPool"): "Transpose, MaxPool, Transpose",
    ("", "Einsum"): "Transpose, ReduceSum, Mul, MatMul",
    **{("", op): "the steps of the sequence: Gemm, activations, Mul, Add" for op in recurrent.GATES},
}
# Attributes that operators ask for before they say their kind.
SAMPLE = {"kernel_shape": [3, 3], "axes": [1], "to": onnx.TensorProto.FLOAT, "blocksize": 1}
KIND = {
    "linear": "a linear map by a weight: Conv, Gemm, MatMul with a constant",
    "averaging": "a linear map whose coefficients are not negative and not learned",
    "additive": "a sum of tensors",
    "routing": "moves, copies or selects entries",
    "activation": "f(x), entry by entry",
    "product": "a product of two tensors that both depend on the input: gates, attention",
    "normalisation": "divides by a statistic of its input",
    "softmax": "softmax and its logarithm",
    "statistic": "shapes, comparisons, indices, random numbers",
}
HEAD = """# Operators

What becomes of every op of the ONNX specification and of ONNX Runtime when an explanation meets it. This page is
generated (`python docs/make_operators.py`) from the tables in the code, for the ops of onnx {onnx} (opset {opset}) and
ONNX Runtime {runtime}.

* **explained**: there is an operator for it. Its kind decides what a composite does with relevance; the gradient is
  exact for every kind.
* **expanded**: canonising writes it in simpler ops, which are explained; its name and those of its outputs stay.
* **stops relevance**: a statistic. Nothing that is seen flows through it, neither relevance nor gradient.
* **refused**: an error where relevance reaches it, in the words given here; anywhere else it does no harm.

An op may have forms that are refused where the op is not; the error says which. Where there is no operator,
[one can be added](add-an-operator.md), and goes before expansions.

| kind | what it is | `relevance_cam` | `epsilon_plus` |
|---|---|---|---|
{kinds}
"""


@dataclass(frozen=True)
class Row:
    """One op on the page."""

    op: str
    what: str
    how: str


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page's text."""
    kinds = "\n".join(
        f"| {kind} | {KIND[kind]} | {_rule('relevance_cam', kind)} | {_rule('epsilon_plus', kind)} |" for kind in KINDS
    )
    parts = [HEAD.format(onnx=onnx.__version__, opset=NEWEST, runtime=onnxruntime.__version__, kinds=kinds)]
    for domain, title in DOMAINS.items():
        rows = [row(domain, op) for op in ops(domain)]
        lines = [f"| {r.op} | {r.what} | {r.how} |" for r in rows]
        parts.append(f"## {title}\n\n{_count(rows)}\n\n| op | | |\n|---|---|---|\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _rule(composite: str, kind: str) -> str:
    return f"`{describe(COMPOSITES[composite].rules[kind])}`"


def _count(rows: list[Row]) -> str:
    counts = Counter(r.what for r in rows)
    return f"{len(rows)} ops: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) + "."


def ops(domain: str) -> list[str]:
    """The ops of a domain, of ONNX and of ONNX Runtime."""
    names = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == domain}
    return sorted(names | {s.name for s in runtime.get_all_operator_schema() if s.domain == domain})


def row(domain: str, op: str) -> Row:
    """What becomes of an op, by the first of the tables that knows it.

    Raises:
        LookupError: none does.
    """
    spans = [(since, until) for d, o, since, until in registered() if (d, o) == (domain, op)]
    if (domain, op) in REWRITTEN:
        return Row(op, "expanded", f"into {REWRITTEN[domain, op]}")
    newest = 1 if domain else NEWEST
    kinds = dict.fromkeys(kind for since, until in spans for kind in _kinds(domain, op, until or max(since, newest)))
    if kinds:
        return _registered(op, list(kinds), spans)
    if (domain, op) in LOWERED:  # what is left of it, where it cannot be lowered, has an operator that says so
        return Row(op, "expanded", "into the float op, between dequantising and quantising")
    if (domain, op) in EXPANSIONS:
        found = EXPANSIONS[domain, op]
        return Row(op, "expanded", f"into {found.into}" + (f" (to opset {found.until})" if found.until else ""))
    if (domain, op) in REFUSED:
        return Row(op, "refused", REFUSED[domain, op])
    if has_body(domain, op, NEWEST):
        return Row(op, "expanded", "into the function that defines it" + _body(domain, op))
    if spans:
        raise LookupError(f"{domain or 'ai.onnx'}.{op} is refused in every form tried: add attributes to SAMPLE")
    raise LookupError(f"nothing is known of {domain or 'ai.onnx'}.{op}: add it to one of the tables")


def _registered(op: str, kinds: list[str], spans: list[tuple[int, int | None]]) -> Row:
    opsets = ", ".join(text for since, until in spans if (text := _span(since, until)))
    if kinds == ["statistic"]:
        return Row(op, "stops relevance", opsets)
    return Row(op, "explained", " or ".join(kinds) + (f"; {opsets}" if opsets else ""))


def _span(since: int, until: int | None) -> str:
    if until is None:
        return f"from opset {since}" if since > 1 else ""
    return f"opset {since} to {until}" if since > 1 else f"to opset {until}"


def _body(domain: str, op: str) -> str:
    schema = onnx.defs.get_schema(op, NEWEST if not domain else 1, domain)
    names = dict.fromkeys(node.op_type for node in schema.function_body.node) if schema.has_function else {}
    made = [name for name in names if name not in ("Constant", "CastLike", "Cast", "Identity", "Shape")]
    return f": {', '.join(made)}" if made else ""


def _kinds(domain: str, op: str, opset: int) -> Iterator[str]:
    """The kinds that an operator comes in: it is asked about nodes with their operands computed, and constant."""
    for constant in (None, np.ones((4, 4, 3, 3), np.float32), np.ones(1, np.int64)):
        try:
            yield lookup(_node(domain, op, opset, constant)).kind
        except ModelError:
            continue


def _node(domain: str, op: str, opset: int, constant: np.ndarray | None) -> Node:
    """A node of the op over a picture, its other operands that `constant`, or computed where that is None."""
    schema = _schema(domain, op, opset)
    operands = [_picture("x")]
    for i in range(1, max(schema.min_input, min(len(schema.inputs), 4))):
        operands.append(_picture(f"x{i}") if constant is None else gs.Constant(f"c{i}", constant))
    outputs = [_picture(f"y{i}") for i in range(max(schema.min_output, 1))]
    attrs = {name: value for name, value in SAMPLE.items() if name in schema.attributes}
    node = gs.Node(op, op.lower(), attrs, operands, outputs, domain or None)
    inputs = [tensor for tensor in operands if isinstance(tensor, gs.Variable)]
    return Graph(gs.Graph([node], inputs, [], opset=NEWEST if domain else opset)).nodes[0]


def _picture(name: str) -> gs.Variable:
    return gs.Variable(name, np.float32, [1, 4, 8, 8])


def _schema(domain: str, op: str, opset: int) -> Any:
    if onnx.defs.has(op, max_inclusive_version=opset, domain=domain):
        return onnx.defs.get_schema(op, opset, domain)
    found = [s for s in runtime.get_all_operator_schema() if (s.domain, s.name) == (domain, op)]
    return max((s for s in found if s.since_version <= opset), key=lambda s: s.since_version)


if __name__ == "__main__":
    main()
