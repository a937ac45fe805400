"""Softmax attention that a file holds as one node, as the matrix products it is made of; ONNX's own op.

Whatever the op, in the end there are queries, keys and values by head, a scale, a mask and a softmax (`attend`); the
ops differ in how their operands are packed and in how they say what may not be seen. Masks become numbers added to the
scores, low ones where attention must not go, as exporters write them who know of no fused op. ONNX Runtime's ops are in
`contrib_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
import onnx

from onnxcam.canonise.expansion.body import LOWEST, Body, Made, Operand, Unknown
from onnxcam.canonise.expansion.rotary import heads_apart, heads_together
from onnxcam.canonise.expansion.table import expansion

INTO = "Reshape, Transpose, MatMul, Mul, Add, Softmax, MatMul"


@dataclass
class Attended:
    """What attention makes, and what its scores were on the way: raw, capped, masked, and after the softmax."""

    output: Operand
    scores: list[Operand] = field(default_factory=list)


def attend(
    b: Body,
    q: Operand,
    k: Operand,
    v: Operand,
    scale: float,
    masks: Sequence[Operand] = (),
    alive: Operand = None,
    softcap: float = 0.0,
    precision: np.dtype | None = None,
) -> Attended:
    """softmax(scale q k^T + masks) v of (N, heads, S, D), (N, heads, T, D) and (N, heads, T, E).

    Args:
        b: where it is written.
        masks: added to the scores (N, heads, S, T), against which they broadcast.
        alive: 0 for the rows that may see nothing and so come to nothing, 1 for the others.
        softcap: scores go through c tanh(scores / c) first.
        precision: the type that the softmax is computed in, where that is not the node's own.
    """
    raw = b("MatMul", b("Mul", q, scale), b.transpose(k, 0, 1, 3, 2))
    capped = b("Mul", b("Tanh", b("Div", raw, softcap)), softcap) if softcap > 0 else raw
    masked = b.sum(capped, *masks)
    wide = b.cast(masked, precision) if precision is not None and precision != b.dtype else masked
    weights: Operand = b("Softmax", wide, axis=3)
    if wide is not masked:
        weights = b.cast(weights, b.dtype)
    if alive is not None:
        weights = b("Mul", weights, alive)
    return Attended(b("MatMul", weights, v), [raw, capped, masked, weights])


def repeated(b: Body, x: Operand, heads: int, times: int) -> Operand:
    """Every head of (N, heads, T, D) `times` over: grouped queries share keys and values."""
    return x if times == 1 else b("Gather", x, np.repeat(np.arange(heads), times), axis=1)


def lowest(b: Body) -> float:
    return LOWEST[b.dtype.name]


def band(queries: int, keys: int, before: float = np.inf, after: float = np.inf, offset: int = 0) -> np.ndarray:
    """(queries, keys): True where key j lies at most `before` behind and `after` ahead of position i + offset."""
    ahead = np.arange(keys) - np.arange(queries)[:, None] - offset
    return (ahead <= after) & (-ahead <= before)


def lowered(b: Body, allowed: np.ndarray, low: float) -> np.ndarray:
    return b.number(np.where(allowed, 0.0, low))


@expansion("Attention", domain="", into=INTO)
def _attention(b: Body) -> list[Operand]:
    """Q, K, V with their heads apart (rank 4) or side by side (rank 3), mask, past keys and values, lengths."""
    flat = len(b.shape(0)) == 3
    q, k, v = b.input(0), b.input(1), b.input(2)
    heads = b.attr("q_num_heads") if flat else b.size(0, 1, "number of heads")
    shared = b.attr("kv_num_heads") if flat else b.size(1, 1, "number of heads")
    size = b.size(0, -1, "number of channels")
    if flat:
        q, k, v, size = heads_apart(b, q, heads), heads_apart(b, k, shared), heads_apart(b, v, shared), size // heads
    past = 0
    if b.has(4):
        past = b.size(4, 2, "length")
        k, v = b("Concat", b.input(4), k, axis=2), b("Concat", b.input(5), v, axis=2)
    masks, alive = _masks(b, past)
    precision = b.attr("softmax_precision")
    made = attend(
        b,
        q,
        repeated(b, k, shared, heads // shared),
        repeated(b, v, shared, heads // shared),
        b.attr("scale", 1 / sqrt(size)),
        masks,
        alive,
        b.attr("softcap", 0.0),
        onnx.helper.tensor_dtype_to_np_dtype(precision) if precision else None,
    )
    y = heads_together(b, made.output) if flat else made.output
    mode = b.attr("qk_matmul_output_mode", 0)
    # Masked scores are as low as `LOWEST` here, where the op has minus infinity.
    return [y, k, v, None if mode == 2 and masks else made.scores[mode]]


def _masks(b: Body, past: int) -> tuple[list[Operand], Operand]:
    """What is added to the scores, and which rows are alive where there may be such that see nothing."""
    causal = bool(b.attr("is_causal", 0))
    before, after = b.attr("left_window_size", -1), b.attr("right_window_size", -1)
    bounded = causal or before >= 0 or after >= 0
    pieces: list[Operand] = []
    known: list[np.ndarray] = []  # of constant masks; a row that sees nothing can be told from them
    if b.has(3):
        piece, values = _given(b, past)
        pieces.append(piece)
        known += [] if values is None else [values]
    if bounded or b.has(6):
        queries, keys = b.size(0, -2, "length of the queries"), past + b.size(1, -2, "length of the keys")
        reach = np.inf if before < 0 else before
        ahead = min(np.inf if after < 0 else after, 0 if causal else np.inf)
        if b.has(6):
            piece = _valid(b, queries, keys, reach, ahead)
            pieces.append(piece)
        else:
            known.append(lowered(b, band(queries, keys, reach, ahead, past), lowest(b)))
            pieces.append(known[-1])
    if not pieces:
        return [], None
    if len(known) == len(pieces):
        total = np.maximum(sum(np.asarray(m, np.float64) for m in known), lowest(b))
        seen = total.max(-1, keepdims=True) > lowest(b) / 2
        return [b.number(total)], None if seen.all() else b.number(seen)
    combined = b("Max", b.sum(*pieces), lowest(b))
    return [combined], b.cast(b("Greater", _largest(b, combined), lowest(b) / 2), b.dtype)


def _largest(b: Body, x: Operand) -> Made:
    if b.opset >= 18:
        return b("ReduceMax", x, b.ints(-1), keepdims=1)
    return b("ReduceMax", x, axes=[-1], keepdims=1)


def _given(b: Body, past: int) -> tuple[Operand, np.ndarray | None]:
    """The mask that the file brings, as numbers to add; and its values where it is a constant.

    It may be shorter than the keys, which are then not seen.
    """
    short = past + b.size(1, -2, "length of the keys") - b.size(3, -1, "length")
    mask, low = b.constant(3), lowest(b)
    if mask is not None:
        values = np.where(mask, 0.0, low) if mask.dtype == bool else np.maximum(mask.astype(np.float64), low)
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, short)], constant_values=low)
        return b.number(values), b.number(values)
    kind = b.node.inputs[3].dtype
    if kind is None:
        raise Unknown(f"the type of the mask {b.node.inputs[3].name!r} is not known")
    given: Operand = b("Where", b.input(3), 0.0, low) if np.dtype(kind) == bool else b.input(3)
    if short > 0:
        rank = len(b.shape(3))
        given = b("Pad", given, b.ints(*[0] * (2 * rank - 1), short), low)
    return given, None


def _valid(b: Body, queries: int, keys: int, before: float, after: float) -> Operand:
    """The mask of the first n keys, n for each image, and of what is ahead of the last query where that counts."""
    length = b.unsqueeze(b.input(6), 1, 2, 3)
    position = np.arange(keys, dtype=np.int64)
    allowed: Operand = b("Less", position, length)
    if np.isfinite(before) or np.isfinite(after):
        ahead = (position - np.arange(queries)[:, None])[None, None].astype(np.int64)
        beyond = b("Sub", ahead, b("Sub", length, b.ints(queries)))  # of each key, how far ahead of its query it lies
        if np.isfinite(after):
            allowed = b("And", allowed, b("Less", beyond, b.ints(int(after) + 1)))
        if np.isfinite(before):
            allowed = b("And", allowed, b("Greater", beyond, b.ints(-int(before) - 1)))
    return b("Where", allowed, 0.0, lowest(b))
