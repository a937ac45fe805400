"""Write down the shapes that are known: Shape and Size of static axes, the target of a Reshape with one free axis, and
the numbers in the target of an Expand.

With a symbolic batch a shape is a vector of numbers and symbols. Vectors travel through the nodes that exporters
build shape arithmetic of (`STEPS`); wherever one consists of numbers alone, it is a constant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcam.canonise.surgery import Names, constant, has, static

Vector = np.ndarray

# Which input of an op is the shape of what it puts out.
SIZED = {"Expand": 1, "ConstantOfShape": 0}

# A size that is not even a symbol.
UNKNOWN = "?"


def _shape(node: gs.Node, _: list[Any]) -> Vector | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    return np.array(_named(shape)[slice(node.attrs.get("start", 0), node.attrs.get("end"))], object)


def _size(node: gs.Node, _: list[Any]) -> Vector | None:
    shape = static(node.inputs[0].shape)
    return None if shape is None else np.array(int(np.prod(shape, dtype=np.int64)), object)


def _gather(node: gs.Node, args: list[Any]) -> Vector | None:
    return np.take(args[0], args[1].astype(np.int64), axis=node.attrs.get("axis", 0))


def _slice(node: gs.Node, args: list[Any]) -> Vector | None:
    if len(args) > 1:
        starts, ends = args[1], args[2]
        axes = args[3] if len(args) > 3 and args[3] is not None else [0]
        steps = args[4] if len(args) > 4 and args[4] is not None else [1]
    else:
        starts, ends = node.attrs["starts"], node.attrs["ends"]
        axes, steps = node.attrs.get("axes", [0]), [1]
    if args[0].ndim != 1 or len(starts) != 1 or int(axes[0]) not in (0, -1) or int(steps[0]) < 1:
        return None
    return args[0][int(starts[0]) : int(ends[0]) : int(steps[0])]


def _flat(node: gs.Node, args: list[Any]) -> Vector | None:
    # Squeeze and Unsqueeze of a vector of one number: a scalar becomes a vector and back.
    if args[0].size != 1:
        return None
    return args[0].reshape(() if node.op == "Squeeze" else (1,)) if args[0].ndim == (node.op == "Squeeze") else None


def _concat(node: gs.Node, args: list[Any]) -> Vector | None:
    return np.concatenate(args) if all(a.ndim == 1 for a in args) else None


def _equal(node: gs.Node, args: list[Any]) -> Vector | None:
    """A size is what it is called and never negative; whether it is some other number is not known."""
    a, b = np.broadcast_arrays(*args)
    found = []
    for x, y in zip(a.flat, b.flat, strict=True):
        numbers = not isinstance(x, str) and not isinstance(y, str)
        negative = min([n for n in (x, y) if not isinstance(n, str)], default=0) < 0
        if not numbers and not negative and (x != y or x == UNKNOWN):
            return None
        found.append(bool(x == y))
    return np.array(found, object).reshape(a.shape)


def _where(node: gs.Node, args: list[Any]) -> Vector | None:
    condition, a, b = np.broadcast_arrays(*args)
    chosen = [x if c else y for c, x, y in zip(condition.flat, a.flat, b.flat, strict=True)]
    return np.array(chosen, object).reshape(condition.shape)


def _max(node: gs.Node, args: list[Any]) -> Vector | None:
    """Of a size and a number that is at most 1 the size is the larger: nothing is explained of no image.

    Paddle writes `token.expand([n, -1, -1])` with the larger of the shape and the target.
    """
    found = []
    for values in zip(*(a.flat for a in np.broadcast_arrays(*args)), strict=True):
        symbols = {v for v in values if isinstance(v, str)}
        largest = max([v for v in values if not isinstance(v, str)], default=0)
        if not symbols:
            found.append(largest)
        elif len(symbols) == 1 and UNKNOWN not in symbols and largest <= 1:
            found.append(symbols.pop())
        else:
            return None
    return np.array(found, object).reshape(np.broadcast_shapes(*(a.shape for a in args)))


STEPS: dict[str, Callable[[gs.Node, list[Any]], Vector | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _flat,
    "Unsqueeze": _flat,
    "Concat": _concat,
    "Equal": _equal,
    "Where": _where,
    "Max": _max,
    "Identity": lambda node, args: args[0],
    "Cast": lambda node, args: args[0] if node.attrs["to"] == onnx.TensorProto.INT64 else None,
}


def fold_shapes(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Replace shape arithmetic whose result is known by constants; True where there was some."""
    vectors: dict[str, Vector] = {}
    changed = False
    for node in graph.nodes:
        if node.outputs and (node.op in ("Shape", "Size") or any(t.name in vectors for t in node.inputs)):
            changed |= _step(node, vectors, protected)
    names = Names(graph, protected)
    for node in graph.nodes:
        if node.op == "Reshape" and node.outputs and constant(node, 1) is None:
            changed |= _settle(node, vectors.get(node.inputs[1].name), names)
    for node in [n for n in graph.nodes if n.outputs and n.op in SIZED and len(n.inputs) > SIZED[n.op]]:
        changed |= _spell_out(graph, node, vectors.get(node.inputs[SIZED[node.op]].name), names)
    return changed


def _step(node: gs.Node, vectors: dict[str, Vector], protected: frozenset[str]) -> bool:
    if node.op not in STEPS:
        return False
    args = [
        None if t.is_empty() else t.values if isinstance(t, gs.Constant) else vectors.get(t.name) for t in node.inputs
    ]
    if node.op not in ("Shape", "Size") and any(a is None and has(node, i) for i, a in enumerate(args)):
        return False
    value = STEPS[node.op](node, args)
    if value is None:
        return False
    output = node.outputs[0]
    vectors[output.name] = np.asarray(value, object)
    known = all(isinstance(v, (int, np.integer)) for v in vectors[output.name].flat)
    if not known or output.name in protected or not output.outputs:
        return False
    output.inputs.clear()
    output.to_constant(vectors[output.name].astype(np.bool_ if node.op == "Equal" else np.int64))
    return True


def _settle(node: gs.Node, vector: Vector | None, names: Names) -> bool:
    """Give a Reshape with a computed target a constant one: 0 for an axis that stays, -1 for one that is free.

    The target is known from the `vector` that was computed, else from the output's inferred shape.
    """
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if vector is not None and vector.ndim == 1 and before is not None:
        sizes = _resolve(list(vector), _named(before), bool(node.attrs.get("allowzero", 0)))
    else:
        sizes = None if after is None else _named(after)
    if sizes is None:
        return False
    dims = []
    for i, size in enumerate(sizes):
        if isinstance(size, int):
            dims.append(size)
        else:
            stays = size != UNKNOWN and before is not None and i < len(before) and before[i] == size
            dims.append(0 if stays and not node.attrs.get("allowzero", 0) else -1)
    if dims.count(-1) > 1 or any(size == 0 for size in sizes):
        return False
    node.inputs[1] = gs.Constant(names.fresh(f"{node.name}_shape"), np.array(dims, np.int64))
    return True


def _spell_out(graph: gs.Graph, node: gs.Node, vector: Vector | None, names: Names) -> bool:
    """Join the target of `node` from numbers and the sizes of inputs, which shape inference can follow.

    PyTorch writes `token.expand(n, -1, -1)` with Where and Equal, which it cannot.
    """
    target = node.inputs[SIZED[node.op]]
    if (
        vector is None
        or vector.ndim != 1
        or any(n.op == "Concat" and n.name == f"{node.name}_sizes" for n in target.inputs)
    ):
        return False
    inferred = node.outputs[0].shape or ()
    told = [d == v or (v == 1 and isinstance(d, (int, np.integer))) for d, v in zip(inferred, vector, strict=False)]
    if len(inferred) == len(vector) and all(told):
        return False
    sources = {d: (t, i) for t in graph.inputs for i, d in enumerate(t.shape or ()) if isinstance(d, str)}
    if not any(isinstance(v, str) for v in vector) or any(isinstance(v, str) and v not in sources for v in vector):
        return False
    parts: list[gs.Tensor] = []
    for value in vector:
        if not isinstance(value, str):
            parts.append(gs.Constant(names.fresh(f"{node.name}_size"), np.array([value], np.int64)))
            continue
        tensor, axis = sources[value]
        whole = gs.Variable(names.fresh(f"{node.name}_shape"), np.int64)
        size = gs.Variable(names.fresh(f"{node.name}_size"), np.int64)
        index = gs.Constant(names.fresh(f"{node.name}_axis"), np.array([axis], np.int64))
        graph.nodes.append(gs.Node("Shape", whole.name, {}, [tensor], [whole]))
        graph.nodes.append(gs.Node("Gather", size.name, {"axis": 0}, [whole, index], [size]))
        parts.append(size)
    joined = gs.Variable(names.fresh(f"{node.name}_sizes"), np.int64)
    graph.nodes.append(gs.Node("Concat", f"{node.name}_sizes", {"axis": 0}, parts, [joined]))
    node.inputs[SIZED[node.op]] = joined
    return True


def _named(shape: Iterable[int | str | None]) -> list[int | str]:
    return [int(d) if isinstance(d, (int, np.integer)) else d or UNKNOWN for d in shape]


def _resolve(target: list[Any], before: list[int | str], allowzero: bool) -> list[int | str] | None:
    """The sizes a Reshape's `target` means for an input of shape `before`: 0 copies, -1 is what is left."""
    if 0 in target and allowzero:
        return None
    if any(size == 0 and i >= len(before) for i, size in enumerate(target)):
        return None
    sizes = [before[i] if size == 0 else size for i, size in enumerate(target)]
    if -1 not in sizes:
        return sizes
    rest = [size for size in sizes if size != -1]
    symbols = Counter(size for size in before if isinstance(size, str))
    if UNKNOWN not in symbols and symbols == Counter(size for size in rest if isinstance(size, str)):
        known = int(np.prod([size for size in rest if isinstance(size, int)], dtype=np.int64))
        total = int(np.prod([size for size in before if isinstance(size, int)], dtype=np.int64))
        if known > 0 and total % known == 0:
            return [total // known if size == -1 else size for size in sizes]
    return [UNKNOWN if size == -1 else size for size in sizes]
