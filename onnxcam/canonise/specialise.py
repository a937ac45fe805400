"""Fix the inputs: their sizes by what the caller says, else by what the file says, with a symbol where neither knows;
those that are settings by their values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.errors import UsageError


def specialise(
    graph: gs.Graph, shapes: dict[str, tuple[int | str, ...]], settings: Mapping[str, np.ndarray] | None = None
) -> None:
    """Set the shapes of the inputs of `graph` and forget every other shape, which may be stale. The inputs in
    `settings` are inputs no longer, but constants.

    Raises:
        UsageError: a name in `shapes` is no input, or a shape contradicts the file's.
    """
    inputs = {t.name: t for t in graph.inputs}
    for name in shapes:
        if name not in inputs:
            raise UsageError(f"the model has no input {name!r}; its inputs are {', '.join(map(repr, inputs))}")
    for name, tensor in inputs.items():
        declared = None if tensor.shape is None else [_size(name, i, d) for i, d in enumerate(tensor.shape)]
        given = shapes.get(name)
        if given is not None:
            _check(name, declared, given)
        tensor.shape = declared if given is None else list(given)
    for name, value in (settings or {}).items():
        inputs[name].to_constant(value.copy())
        graph.inputs.remove(inputs[name])
    _forget(graph)


def drop_foreign_outputs(graph: gs.Graph) -> None:
    """Take maps and sequences off the outputs: graph surgeon writes every output as a tensor."""
    graph.outputs = [
        t for t in graph.outputs if getattr(t, "type", "tensor_type") == "tensor_type" or len(graph.outputs) == 1
    ]


def _size(name: str, axis: int, size: int | str | None) -> int | str:
    # Some converters write 0 or -1 for a size that they do not know.
    if isinstance(size, str) and size:
        return size
    if isinstance(size, int) and size > 0:
        return size
    return "batch" if axis == 0 else f"{name}.{axis}"


def _check(name: str, declared: list[int | str] | None, given: tuple[int | str, ...]) -> None:
    if declared is None:
        return
    fits = len(declared) == len(given) and all(
        isinstance(d, str) or isinstance(g, str) or d == g for d, g in zip(declared, given, strict=True)
    )
    if not fits:
        raise UsageError(f"input {name!r} has shape {_text(declared)} in the file, which {_text(given)} does not fit")


def _text(shape: list[int | str] | tuple[int | str, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _forget(graph: gs.Graph, outer: frozenset[int] = frozenset()) -> None:
    inputs = outer | {id(t) for t in graph.inputs}  # which a branch may read as well
    outputs = {id(t) for t in graph.outputs}
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and id(tensor) not in inputs:
            tensor.shape = None
            if id(tensor) not in outputs:
                tensor.dtype = None
    for subgraph in graph.subgraphs():
        _forget(subgraph, inputs)
