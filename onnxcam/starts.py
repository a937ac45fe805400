"""Starts: what relevance at the logits a pass begins with (spec 5).

A start maps the logits of a batch, (N, K), and the classes asked for, (N, T), to relevance of shape (T, N, K). Values
are computed in float64 on the host: logits are few. `locate_logits` finds their tensor, which lies before any softmax.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcam.errors import ModelError, UsageError
from onnxcam.graph import Graph

Formula = Callable[[np.ndarray, np.ndarray], np.ndarray]  # logits (1, N, K), one-hot (T, N, K) -> (T, N, K)


@dataclass(frozen=True)
class Start:
    """A named start; `formula(logits, onehot)` broadcasts over targets."""

    name: str
    formula: Formula
    about: str

    def __call__(self, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Relevance at the logits.

        Args:
            logits: (N, K).
            targets: class indices, (N, T).

        Returns:
            (T, N, K), float64.
        """
        logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
        if logits.shape[1] == 1:
            # One logit speaks for two classes: for class 1 as it is, for class 0 against it (spec 5).
            sign = np.where(targets.T[..., None] == 1, 1.0, -1.0)
            return sign * np.abs(self.formula(np.concatenate([-logits, logits], 1)[None] / 2, _TWO)[..., 1:])
        onehot = (np.arange(logits.shape[1]) == targets.T[..., None]).astype(np.float64)
        return self.formula(logits[None], onehot)


_TWO = np.array([[[0.0, 1.0]]])  # one-hot of class 1 of two


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _contrast(z: np.ndarray, c: np.ndarray) -> np.ndarray:
    """+1 at the class, -1/N at the others. A single logit is its own contrast: +1."""
    n = z.shape[-1]
    return c - (1 - c) / n


def _softmax_gradient(z: np.ndarray, c: np.ndarray) -> np.ndarray:
    p = softmax(z)
    return (p * c).sum(-1, keepdims=True) * (c - p)


STARTS: dict[str, Start] = {
    s.name: s
    for s in (
        Start("one-hot", lambda z, c: c + 0 * z, "1 at the class, 0 elsewhere"),
        Start("logit", lambda z, c: z * c, "the logit of the class (Bach et al. 2015)"),
        Start("contrast", _contrast, "1 at the class, -1/N at the N-1 others (the Relevance-CAM authors' code)"),
        Start("centred", lambda z, c: c - 1 / z.shape[-1] + 0 * z, "one-hot minus 1/N everywhere: sums to zero"),
        Start("softmax-gradient", _softmax_gradient, "gradient of the class probability (SGLRP: p(1-p), -p p')"),
    )
}


def start(name: str | Start) -> Start:
    """The start of that name; underscores count as dashes.

    Raises:
        UsageError: there is none.
    """
    if isinstance(name, Start):
        return name
    key = name.replace("_", "-")
    if key not in STARTS:
        near = difflib.get_close_matches(key, STARTS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"no start named {name!r}: {hint}there are {', '.join(STARTS)}")
    return STARTS[key]


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
