"""Starts: what relevance at the logits a pass begins with (spec 5).

A start maps the logits of a batch, (N, K), and the classes asked for, (N, T), to relevance of shape (T, N, K). The
formulas are written in the primitives of an engine, so that they can be computed, in float64 on the host since logits
are few, or recorded. `locate_logits` finds the tensor that logits belong to, which lies before any softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcam.engines.array import ArrayOps
from onnxcam.errors import ModelError
from onnxcam.graph import Graph
from onnxcam.named import named
from onnxcam.operators.kinds import Array

Formula = Callable[[Any, Array, Array], Array]  # (ops, logits (N, K), one-hot (T, N, K)) -> (T, N, K)


@dataclass(frozen=True)
class Start:
    """A named start.

    `formula` is for two classes or more; `single(ops, logits (N, 1))` gives the size of relevance where one logit
    speaks for two classes: class 1 starts with plus that, class 0 with minus that.
    """

    name: str
    formula: Formula
    about: str
    single: Callable[[Any, Array], Array] = lambda ops, z: ops.ones_like(z)

    def at(self, ops: Any, logits: Array, onehot: Array) -> Array:
        """Relevance (T, N, K) from logits (N, K) and the classes as one-hot rows (T, N, max(K, 2))."""
        if logits.shape[-1] == 1:
            sign = ops.slice(onehot, -1, 1, 2) - ops.slice(onehot, -1, 0, 1)
            return sign * self.single(ops, logits)
        return self.formula(ops, logits, onehot)

    def __call__(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Relevance at the logits.

        Args:
            logits: (N, K).
            targets: class indices, (N, T).

        Returns:
            (T, N, K), float64.
        """
        classes = max(logits.shape[1], 2)
        onehot = (np.arange(classes) == np.asarray(targets).T[..., None]).astype(np.float64)
        return self.at(ArrayOps(np, "float64"), np.asarray(logits, np.float64), onehot)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    return _softmax(ArrayOps(np, "float64"), np.asarray(logits, np.float64))


def _softmax(ops: Any, z: Array) -> Array:
    e = ops.exp(z - ops.max(z, (-1,)))
    return e / ops.sum(e, (-1,), keepdims=True)


def _one_hot(ops: Any, z: Array, c: Array) -> Array:
    return c


def _logit(ops: Any, z: Array, c: Array) -> Array:
    return z * c


def _contrast(ops: Any, z: Array, c: Array) -> Array:
    n = z.shape[-1]
    return c * (1 + 1 / n) - 1 / n


def _centred(ops: Any, z: Array, c: Array) -> Array:
    return c - 1 / z.shape[-1]


def _softmax_gradient(ops: Any, z: Array, c: Array) -> Array:
    p = _softmax(ops, z)
    return ops.sum(p * c, (-1,), keepdims=True) * (c - p)


def _sigmoid_gradient(ops: Any, z: Array) -> Array:
    p = ops.sigmoid(z)
    return p * (1 - p)


STARTS: dict[str, Start] = {
    s.name: s
    for s in (
        Start("one-hot", _one_hot, "1 at the class, 0 elsewhere"),
        Start("logit", _logit, "the logit of the class (Bach et al. 2015)", lambda ops, z: z),
        Start("contrast", _contrast, "1 at the class, -1/N at the N-1 others (the Relevance-CAM authors' code)"),
        Start("centred", _centred, "one-hot minus 1/N everywhere: sums to zero"),
        Start(
            "softmax-gradient",
            _softmax_gradient,
            "gradient of the class probability (SGLRP: p(1-p), -p p')",
            _sigmoid_gradient,
        ),
    )
}


def start(name: str | Start) -> Start:
    """The start of that name; underscores count as dashes.

    Raises:
        UsageError: there is none.
    """
    return name if isinstance(name, Start) else named("start", name, STARTS)


# Ops between the logits and a graph output that turn them into probabilities or change their layout only.
_AFTER_LOGITS = {
    "Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"
}  # fmt: skip
_SQUASHES = {"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid"}


def locate_logits(graph: Graph, output: str) -> tuple[str, str | None]:
    """The tensor of logits behind a graph output, and the op that squashes it (None where the output is the logits).

    Relevance must not start at probabilities: rules of the epsilon kind would flip signs for negative logits.

    Raises:
        ModelError: nothing computes the output.
    """
    tensor, logits, squash = output, output, None
    while True:
        node = graph.producer(tensor)
        if node is None:
            if tensor == output:
                raise ModelError(f"no node computes the output {output!r}: there is nothing to explain")
            break
        if node.op_type not in _AFTER_LOGITS:
            break
        tensor = node.inputs[0]
        if node.op_type in _SQUASHES:
            squash, logits = squash or node.op_type, tensor
    return logits, squash
