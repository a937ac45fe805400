"""What every exporter does after its framework has spoken: clean the model, describe it, check it, write it.

A ModelProto and a sample with the framework's own output flow in; a file flows out only if ONNX Runtime agrees with the
framework. Nothing here imports a training framework.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from onnxcam.errors import ModelError, UsageError
from onnxcam.labels import Labels, labels_to_metadata
from onnxcam.preprocess import Preprocess, to_metadata

# Where a node comes from in the framework's model. Other node metadata (stack traces, traced code) says more about the
# machine that exported the file than about the model, and goes.
KEPT_NODE_METADATA = {"namespace", "pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.name_scopes"}


@dataclass(frozen=True)
class Export:
    """A file that was written, and how closely ONNX Runtime agrees with the framework on the sample."""

    path: Path
    sha256: str
    size: int
    operators: Mapping[str, int]
    opset: int
    error: float

    def summary(self) -> str:
        """What was written, for a terminal."""
        operators = ", ".join(f"{count} {op}" for op, count in self.operators.items())
        return (
            f"{self.path}: {self.size:,} bytes, opset {self.opset}, {operators}\n"
            f"relative difference to the framework {self.error:.1e}\n"
            f"sha256 {self.sha256}"
        )


def finish(
    model: onnx.ModelProto,
    path: Path,
    *,
    sample: np.ndarray,
    expected: np.ndarray,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    description: str = "",
    tolerance: float = 1e-4,
) -> Export:
    """Clean, describe, check and write `model`; the file appears whole or not at all.

    `sample` (N, C, H, W) is the model's only input, `expected` (N, classes) the framework's logits for it. Raises
    `ModelError` where ONNX Runtime and the framework differ by more than `tolerance`, relative to the largest logit.
    """
    strip_traces(model)
    describe(model, preprocess=preprocess, labels=labels, description=description)
    try:
        data = model.SerializeToString(deterministic=True)
    except Exception as reason:  # protobuf's EncodeError, or ValueError, by version
        raise ModelError("the model is larger than the 2 GB that one ONNX file holds; not written") from reason
    onnx.checker.check_model(model, full_check=True)
    error = difference(data, sample, expected)
    if not error <= tolerance:
        raise ModelError(f"ONNX Runtime and the framework differ by {error:.1e} (allowed {tolerance:.0e}); not written")
    write_atomically(path, data)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    operators = dict(Counter(node.op_type for node in model.graph.node).most_common())
    return Export(path, hashlib.sha256(data).hexdigest(), len(data), operators, opset, error)


def strip_traces(model: onnx.ModelProto) -> None:
    """Remove, in place, what exporters note about the machine they ran on; module paths stay."""
    del model.metadata_props[:]
    for graph in graphs(model.graph):
        del graph.metadata_props[:]
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            del value.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            kept = [entry for entry in node.metadata_props if entry.key in KEPT_NODE_METADATA]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and, depth first, the graphs inside its nodes (branches of If, bodies of Loop)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from graphs(inner)


def describe(
    model: onnx.ModelProto,
    *,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | None = None,
    description: str = "",
) -> None:
    """Write the preprocessing, the class names and a description into the model, in place."""
    model.doc_string = description
    entries = to_metadata(preprocess) if preprocess else {}
    if labels:
        entries |= labels_to_metadata(Labels.of(labels))
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)


def difference(model: bytes, sample: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between ONNX Runtime's output and `expected`, relative to the largest expected value."""
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: sample})
    except Exception as error:  # onnxruntime's own classes; the file is the exporter's, and the reason is in the text
        raise ModelError(f"ONNX Runtime does not run what was exported: {str(error).splitlines()[0]}") from error
    if output.shape != expected.shape:
        raise ModelError(f"ONNX Runtime gives shape {output.shape}, the framework {expected.shape}; not written")
    return float(np.abs(output - expected).max() / np.abs(expected).max())


def seed_of(weights: str, *others: str) -> int | None:
    """The N of "seed:N"; None for one of the `others`.

    Raises:
        UsageError: it is neither.
    """
    kind, _, number = weights.partition(":")
    if kind == "seed" and number.isdecimal():
        return int(number)
    if weights in others:
        return None
    raise UsageError(f"no weights {weights!r}: {', '.join(others)} or seed:N")


def imported(name: str) -> Any:
    """What `package.module:attribute` names, the folder at hand being looked in, too.

    Raises:
        UsageError: there is no such thing.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise UsageError(f"{name!r} names no model: write MODULE:CALLABLE, my_package.models:make say")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{name} cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)
    return found


def called(name: str, make: Any) -> Any:
    """What `make()` returns.

    Raises:
        UsageError: it cannot be called without arguments, or fails.
    """
    try:
        return make()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{name}() fails: {type(error).__name__}: {reason}") from error


def no_download(name: str, error: Exception) -> UsageError:
    """What to say where trained weights cannot be had."""
    reason = (str(error).splitlines() or [""])[0][:120]
    return UsageError(
        f"the weights of {name} could not be downloaded ({type(error).__name__}: {reason}); use --weights seed:0 for "
        "random weights"
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and move it into place, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
