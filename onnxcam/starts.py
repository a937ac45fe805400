"""Starts: what relevance at the logits a pass begins with (spec 5).

A start maps the logits of a batch, (N, K), and the classes asked for, (N, T), to relevance of shape (T, N, K). The
formulas are written in the primitives of an engine, so that they can be computed, in float64 on the host since logits
are few, or recorded. Where the logits are, `heads` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcam.engines.array import ArrayOps
from onnxcam.named import named
from onnxcam.operators.kinds import Array

SIGMOIDS = ("Sigmoid", "HardSigmoid")  # behind these each class has a probability of its own
Formula = Callable[[Any, Array, Array], Array]  # (ops, logits (N, K), one-hot (T, N, K)) -> (T, N, K)


@dataclass(frozen=True)
class Start:
    """A named start.

    `formula` is for two classes or more, `apart` for classes that do not exclude each other, where that is another:
    behind a Sigmoid; `single(ops, logits (N, 1))` gives the size of relevance where one logit
    speaks for two classes: class 1 starts with plus that, class 0 with minus that.
    """

    name: str
    formula: Formula
    about: str
    single: Callable[[Any, Array], Array] = lambda ops, z: ops.ones_like(z)
    apart: Formula | None = None

    def at(self, ops: Any, logits: Array, onehot: Array, squash: str | None = None) -> Array:
        """Relevance (T, N, K) from logits (N, K) and the classes as one-hot rows (T, N, max(K, 2)).

        `squash` is the op that makes probabilities of the logits in the file.
        """
        if logits.shape[-1] == 1:
            sign = ops.slice(onehot, -1, 1, 2) - ops.slice(onehot, -1, 0, 1)
            return sign * self.single(ops, logits)
        formula = self.apart if self.apart is not None and squash in SIGMOIDS else self.formula
        return formula(ops, logits, onehot)

    def __call__(self, logits: np.ndarray, targets: np.ndarray, squash: str | None = None) -> np.ndarray:
        """Relevance at the logits.

        Args:
            logits: (N, K).
            targets: class indices, (N, T).
            squash: the op that makes probabilities of them.

        Returns:
            (T, N, K), float64.
        """
        classes = max(logits.shape[1], 2)
        onehot = (np.arange(classes) == np.asarray(targets).T[..., None]).astype(np.float64)
        return self.at(ArrayOps(np, "float64"), np.asarray(logits, np.float64), onehot, squash)


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


def _others(ops: Any, z: Array, c: Array) -> Array:
    return ops.abs(z) * (1 - c)


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


def _sigmoid_gradients(ops: Any, z: Array, c: Array) -> Array:
    return c * _sigmoid_gradient(ops, z)


STARTS: dict[str, Start] = {
    s.name: s
    for s in (
        Start("one-hot", _one_hot, "1 at the class, 0 elsewhere"),
        Start("logit", _logit, "the logit of the class (Bach et al. 2015)", lambda ops, z: z),
        Start("others", _others, "the size of every logit but that of the class (the dual of CLRP1, Gu et al. 2018)"),
        Start("contrast", _contrast, "1 at the class, -1/N at the N-1 others (the Relevance-CAM authors' code)"),
        Start("centred", _centred, "one-hot minus 1/N everywhere: sums to zero"),
        Start(
            "softmax-gradient",
            _softmax_gradient,
            "gradient of the class probability (SGLRP: p(1-p), -p p'; p(1-p) alone behind a Sigmoid)",
            _sigmoid_gradient,
            _sigmoid_gradients,
        ),
    )
}


def start(name: str | Start) -> Start:
    """The start of that name; underscores count as dashes.

    Raises:
        UsageError: there is none.
    """
    return name if isinstance(name, Start) else named("start", name, STARTS)
