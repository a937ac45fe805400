"""Targets: which classes to explain, as numbers, label texts, "top3", or "predicted"."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.labels import Labels

Target = str | int


def choose_targets(wanted: Sequence[Target], logits: np.ndarray, labels: Labels) -> np.ndarray:
    """Class numbers (N, T) for logits (N, K).

    `predicted` is the class of the largest logit and `topN` the N largest, each for every image by itself; a number or
    a label text is the same class for all. A model with a single logit has classes 0 and 1, told apart by its sign.

    Raises:
        UsageError: no such class, or nothing asked for.
    """
    classes = max(logits.shape[1], 2)
    ranked = _ranked(logits)
    columns: list[np.ndarray] = []
    for target in wanted:
        text = str(target).strip()
        match = re.fullmatch(r"top-?(\d+)", text, re.IGNORECASE)
        if text == "predicted":
            columns.append(ranked[:, :1])
        elif match:
            n = int(match[1])
            if not 1 <= n <= classes:
                raise UsageError(f"target {text!r}: the model has {classes} classes")
            columns.append(ranked[:, :n])
        else:
            found = labels.find(text, classes)
            columns.append(np.tile(np.array(found, np.int64), (len(logits), 1)))
    if not columns:
        raise UsageError("there is no target to explain")
    together = np.concatenate(columns, axis=1)
    # The same class asked for twice is explained once, unless images differ in it.
    _, first = np.unique(together, axis=1, return_index=True)
    return together[:, np.sort(first)]


def _ranked(logits: np.ndarray) -> np.ndarray:
    """Classes from the largest logit to the smallest; ties in the order of their numbers."""
    if logits.shape[1] == 1:
        logits = np.concatenate([-logits, logits], axis=1)
    return np.argsort(-logits, axis=1, kind="stable")
