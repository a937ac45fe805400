"""Ops whose meaning the ONNX specification itself gives as a function of simpler ops: that body takes their place.

For every op without an operator or an expansion of onnxcam's own. The body is the one of the graph's opset, with the
node's attributes and types filled in by ONNX's own inliner.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxcam.canonise.constants import lower_constants
from onnxcam.canonise.expansion.body import Body, Operand, Refused, Unknown

# Understood better whole: the scales of dynamic quantisation are no way for relevance.
WHOLE = {("", "DynamicQuantizeLinear")}


@cache
def has_body(domain: str, op: str, opset: int) -> bool:
    """True where the specification defines the op by a function at this opset."""
    if (domain, op) in WHOLE or not onnx.defs.has(op, max_inclusive_version=opset, domain=domain):
        return False
    schema: Any = onnx.defs.get_schema(op, opset, domain)
    return bool(schema.has_function or schema.has_context_dependent_function)


def write_function(b: Body) -> list[Operand]:
    """The function of the specification, written.

    Raises:
        Refused: ONNX cannot write it for this node.
        Unknown: it takes a type that is not known.
    """
    body = gs.import_onnx(_inlined(b))
    known: dict[str, Operand] = {f"i{i}": tensor for i, tensor in enumerate(b.node.inputs) if not tensor.is_empty()}
    for node in body.nodes:
        if any(True for _ in node.subgraphs()):
            raise Refused(f"the function that defines {b.node.op} has a {node.op} in it")
        operands = [
            None if t.is_empty() else t.values if isinstance(t, gs.Constant) else known[t.name] for t in node.inputs
        ]
        made = b.node_of(node.op, operands, len(node.outputs), dict(node.attrs))
        known.update(zip((t.name for t in node.outputs), made, strict=True))
    return [known.get(f"o{i}") for i in range(len(b.node.outputs))]


def _inlined(b: Body) -> onnx.ModelProto:
    """A model of the node alone, and its body put in its place."""
    node = b.node
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    inputs = {f"i{i}": t for i, t in enumerate(node.inputs) if not t.is_empty()}
    outputs = [f"o{i}" if b.used(i) else "" for i in range(len(node.outputs))]
    infos = []
    for name, tensor in inputs.items():
        if tensor.dtype is None:
            raise Unknown(f"the type of {tensor.name!r} is not known")
        twin = gs.Variable(name, tensor.dtype, tensor.shape)
        infos.append(OnnxExporter.export_value_info_proto(twin, do_type_check=False))
    alone = OnnxExporter.export_node(node)
    alone.input[:] = [name if (name := f"i{i}") in inputs else "" for i in range(len(node.inputs))]
    alone.output[:] = outputs
    # The inliner knows the attributes that are set; the body may ask for any.
    given = {a.name for a in alone.attribute}
    schema = onnx.defs.get_schema(node.op, b.opset if domain == "" else 1, domain)
    alone.attribute.extend(
        a.default_value for k, a in schema.attributes.items() if k not in given and a.default_value.name
    )
    graph = onnx.helper.make_graph([alone], node.op, infos, [onnx.ValueInfoProto(name=o) for o in outputs if o])
    imports = [onnx.helper.make_opsetid("", b.opset)]
    if domain:
        imports.append(onnx.helper.make_opsetid(domain, 1))
    try:
        model = onnx.inliner.inline_selected_functions(
            onnx.helper.make_model(graph, opset_imports=imports), [(domain, node.op)], inline_schema_functions=True
        )
    except TypeError as error:  # onnx before 1.19 knows functions of models only
        raise Refused(f"{node.op} needs a newer onnx than {onnx.__version__} to be expanded") from error
    except Exception as error:  # the inliner raises RuntimeError, ValueError and others
        raise Refused(f"ONNX cannot expand {node.op} by its function: {str(error).strip().splitlines()[0]}") from error
    if any(n.op_type == node.op and n.domain == node.domain for n in model.graph.node):
        raise Refused(f"ONNX gives {node.op} no function for these types at opset {b.opset}")
    lower_constants(model.graph)
    return model
