"""The light models of the onnx package: ONNX files with no module behind them, so PyTorch is made to run the file.

They ship with all weights alike, which makes all channels alike; "seeded" puts random weights in their place. The
reference is a plain interpreter of the few ops they have in PyTorch's own functions, differentiated by autograd.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.coverage_cases import Case, light_folder


def make(case: Case, path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Write the model to `path`; returns an input, the output, and the gradients of the largest logit."""
    import torch

    torch.set_num_threads(1)
    model = onnx.load(light_folder() / f"{case.name}.onnx")
    if case.exporter == "seeded":
        seed_weights(model)
    onnx.save(model, path)
    weights = {t.name for t in model.graph.initializer}
    shape = next([d.dim_value for d in i.type.tensor_type.shape.dim] for i in picture_inputs(model, weights))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    gradients = {}
    target = None
    for bits, dtype in (("32", torch.float32), ("64", torch.float64)):
        leaf = torch.from_numpy(x).to(dtype).requires_grad_()
        values = interpret(model, leaf, dtype)
        last = model.graph.node[-1]
        logits = values[last.input[0] if last.op_type == "Softmax" else last.output[0]].reshape(-1)
        target = int(logits.argmax()) if target is None else target
        gradients[bits] = torch.autograd.grad(logits[target], leaf)[0].numpy()
        if bits == "32":
            output = values[model.graph.output[0].name].detach().numpy()
    return x, output, gradients


def picture_inputs(model: onnx.ModelProto, weights: set[str]) -> list[Any]:
    return [i for i in model.graph.input if i.name not in weights]


def seed_weights(model: onnx.ModelProto) -> None:
    """Random initialisers in place of the ConstantOfShape nodes, by the name and the use of each; see
    `coverage_export.seed_weights`."""
    graph = model.graph
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    filled = []
    for node in [n for n in graph.node if n.op_type == "ConstantOfShape"]:
        shape = tuple(int(n) for n in known[node.input[0]])
        filled.append(numpy_helper.from_array(_values(graph, node.output[0], shape), node.output[0]))
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name in read]
    inputs = [i for i in graph.input if i.name in read]
    for field in ("initializer", "input"):
        graph.ClearField(field)
    graph.initializer.extend([*kept, *filled])
    graph.input.extend(inputs)


def _values(graph: onnx.GraphProto, name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    use, place = _use(graph, name)
    if use in ("Conv", "Gemm") and place == 1:
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    if use == "BatchNormalization" and place == 4:
        return rng.uniform(0.3, 2.0, shape).astype(np.float32)
    if use == "Mul" or (use == "BatchNormalization" and place == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (0.3 * rng.standard_normal(shape)).astype(np.float32)


def _use(graph: onnx.GraphProto, name: str) -> tuple[str, int]:
    """The op that reads a weight, and as which of its inputs."""
    for node in graph.node:
        if name in node.input:
            if node.op_type in ("Unsqueeze", "Reshape"):
                return _use(graph, node.output[0])
            return node.op_type, list(node.input).index(name)
    return "", 0


def interpret(model: onnx.ModelProto, x: Any, dtype: Any) -> dict[str, Any]:
    """Every tensor of the graph for the input `x`."""
    import torch

    graph = model.graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arrays.items()}
    (picture,) = picture_inputs(model, set(arrays))
    values[picture.name] = x
    for node in graph.node:
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        given = [values[name] for name in node.input if name]
        values[node.output[0]] = _run(node.op_type, given, attrs, dtype)
    return values


def _run(op: str, given: list[Any], attrs: Mapping[str, Any], dtype: Any) -> Any:
    import torch
    from torch.nn import functional as F

    x = given[0]
    if op == "ConstantOfShape":
        value = float(numpy_helper.to_array(attrs["value"]).ravel()[0])
        return torch.full([int(n) for n in x], value, dtype=dtype)
    if op == "Conv":
        w, bias = given[1], given[2] if len(given) > 2 else None
        return F.conv2d(_padded(x, attrs, 0.0), w, bias, attrs.get("strides", 1), 0, 1, attrs.get("group", 1))
    if op == "MaxPool":
        return F.max_pool2d(_padded(x, attrs, -np.inf), attrs["kernel_shape"], attrs.get("strides", 1))
    if op == "AveragePool":
        sizes, strides = attrs["kernel_shape"], attrs.get("strides", 1)
        total = F.avg_pool2d(_padded(x, attrs, 0.0), sizes, strides)
        return total / F.avg_pool2d(_padded(torch.ones_like(x), attrs, 0.0), sizes, strides)  # padding does not count
    if op == "LRN":
        return F.local_response_norm(x, attrs["size"], attrs["alpha"], attrs["beta"], attrs.get("bias", 1.0))
    if op == "BatchNormalization":
        scale, bias, mean, var = given[1:5]
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, attrs.get("epsilon", 1e-5))
    if op == "Gemm":
        return x @ (given[1].T if attrs.get("transB") else given[1]) + given[2]
    if op == "Concat":
        return torch.cat(given, attrs["axis"])
    if op == "Reshape":
        return x.reshape([int(x.shape[i]) if n == 0 else int(n) for i, n in enumerate(given[1])])
    if op == "Unsqueeze":
        for axis in attrs["axes"]:
            x = x.unsqueeze(axis)
        return x
    if op == "Softmax":  # of before opset 13: over all axes from `axis` on
        return x.flatten(attrs.get("axis", 1)).softmax(-1).reshape(x.shape)
    simple = {
        "Relu": lambda: x.relu(),
        "Dropout": lambda: x,
        "GlobalAveragePool": lambda: x.mean((2, 3), keepdim=True),
        "Sum": lambda: sum(given[1:], given[0]),
        "Add": lambda: x + given[1],
        "Mul": lambda: x * given[1],
        "Transpose": lambda: x.permute(attrs["perm"]),
    }
    return simple[op]()


def _padded(x: Any, attrs: Mapping[str, Any], value: float) -> Any:
    from torch.nn import functional as F

    top, left, bottom, right = attrs.get("pads", (0, 0, 0, 0))
    return F.pad(x, (left, right, top, bottom), value=value)
