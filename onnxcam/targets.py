"""Targets: which classes to explain, as numbers, label texts, "top3", or "predicted".

What was asked for becomes a few codes: a class number, or -1 for the most likely class of each image, -2 for the second
most likely, and so on. Codes mean the same for every batch, and are what a compiled model takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.labels import Labels

Target = str | int


def target_codes(wanted: Sequence[Target], classes: int, labels: Labels) -> list[int]:
    """Codes of what was asked for, each once, in the order asked.

    `classes` is how many logits the model has; a single one has classes 0 and 1, told apart by its sign.

    Raises:
        UsageError: no such class, or nothing asked for.
    """
    classes = max(classes, 2)
    codes: list[int] = []
    for target in wanted:
        text = str(target).strip()
        match = re.fullmatch(r"top-?(\d+)", text, re.IGNORECASE)
        if text == "predicted":
            codes.append(-1)
        elif match:
            n = int(match[1])
            if not 1 <= n <= classes:
                raise UsageError(f"target {text!r}: the model has {classes} classes")
            codes += range(-1, -n - 1, -1)
        else:
            codes += labels.find(text, classes)
    if not codes:
        raise UsageError("there is no target to explain")
    return list(dict.fromkeys(codes))


def classes_of(codes: Sequence[int] | np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Class numbers (N, T) that `codes` mean for logits (N, K); an array (N, T) has a row of them for each image."""
    ranked = _ranked(logits)
    if isinstance(codes, np.ndarray) and codes.ndim == 2:
        places = np.take_along_axis(ranked, np.maximum(-codes - 1, 0), axis=1)
        return np.where(codes < 0, places, codes).astype(np.int64)
    columns = [ranked[:, -c - 1] if c < 0 else np.full(len(logits), c) for c in codes]
    return np.stack(columns, axis=1).astype(np.int64)


def choose_targets(wanted: Sequence[Target], logits: np.ndarray, labels: Labels) -> np.ndarray:
    """Class numbers (N, T) for logits (N, K), from what was asked for.

    Raises:
        UsageError: no such class, or nothing asked for.
    """
    return classes_of(target_codes(wanted, logits.shape[1], labels), logits)


def _ranked(logits: np.ndarray) -> np.ndarray:
    """Classes from the largest logit to the smallest; ties in the order of their numbers."""
    if logits.shape[1] == 1:
        logits = np.concatenate([-logits, logits], axis=1)
    return np.argsort(-logits, axis=1, kind="stable")
