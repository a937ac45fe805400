"""The attentions of ONNX Runtime, as its optimisers fuse them, in the matrix products they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from onnxcam.canonise.expansion.attention import INTO, attend, band, lowered, lowest, repeated
from onnxcam.canonise.expansion.body import Body, Operand, Refused
from onnxcam.canonise.expansion.rotary import heads_apart, heads_together, turned
from onnxcam.canonise.expansion.table import expansion


def _hidden(b: Body, i: int, queries: int, keys: int) -> list[Operand]:
    """What the mask of a fused attention adds to the scores: 0 for what it lets through, a low number elsewhere.

    It is the number of keys that count, their end and start, or ones and zeros for keys, or for queries and keys.

    Raises:
        Refused: it has another form.
    """
    masks: list[Operand] = []
    low = b.attr("mask_filter_value", -10000.0)
    if b.attr("unidirectional", 0):
        masks.append(lowered(b, band(queries, keys, after=0, offset=keys - queries), lowest(b)))
    if not b.has(i):
        return masks
    shape, batch = b.shape(i), b.shape(0)[0]
    mask: Operand
    if len(shape) == 1:
        position = np.arange(keys, dtype=np.int32)
        if shape[0] == batch:
            mask = b("Less", position, b.unsqueeze(b.cast(b.input(i), np.int32), 1))
        elif isinstance(batch, int) and shape[0] == 2 * batch:
            halves = [b.unsqueeze(x, 1) for x in b.split(b.cast(b.input(i), np.int32), (batch, batch), 0)]
            mask = b("And", b("Less", position, halves[0]), b("Not", b("Less", position, halves[1])))
        else:
            raise Refused(f"{b.node.op} with a mask of shape {shape}")
        masks.append(b.unsqueeze(b("Where", mask, 0.0, low), 1, 2))
    elif len(shape) in (2, 3):
        mask = b("Where", b.cast(b.input(i), bool), 0.0, low)
        masks.append(b.unsqueeze(mask, *((1, 2) if len(shape) == 2 else (1,))))
    else:
        raise Refused(f"{b.node.op} with a mask of shape {shape}")
    return masks


PAST = "keys and values of the past: a step of generating text"


def _packed(b: Body, x: Operand, weight: Operand, sizes: Sequence[int], masks: Sequence[Operand]) -> Operand:
    """Self-attention behind one projection to queries, keys and values."""
    heads = b.attr("num_heads")
    projected = b.sum(b("MatMul", x, weight), b.input(2))
    q, k, v = (heads_apart(b, part, heads) for part in b.split(projected, sizes, 2))
    scale = b.attr("scale", 0.0) or 1 / sqrt(sizes[0] // heads)
    return heads_together(b, attend(b, q, k, v, scale, masks).output)


@expansion("Attention", into="MatMul, Add, Split, " + INTO)
def _contrib_attention(b: Body) -> Operand:
    b.refuse_inputs({4: PAST, 6: PAST})
    if b.attr("do_rotary", 0):
        raise Refused("Attention that embeds positions itself (do_rotary)")
    sizes = b.attr("qkv_hidden_sizes") or [b.size(1, 1, "width") // 3] * 3
    length = b.size(0, 1, "length of the sequence") if b.has(3) or b.attr("unidirectional", 0) else 0
    masks = _hidden(b, 3, length, length)
    if b.has(5):
        masks.append(b.input(5))
    return _packed(b, b.input(0), b.input(1), sizes, masks)


@expansion("QAttention", into="DequantizeLinear, MatMul, Add, Split, " + INTO)
def _quantised_attention(b: Body) -> Operand:
    """On the dequantised input and weight, which is where relevance lives."""
    b.refuse_inputs({8: PAST})
    weight, scale, zero = b.constant(1), b.constant(4), b.constant(7) if b.has(7) else np.zeros(())
    if b.attr("do_rotary", 0):
        raise Refused("QAttention that embeds positions itself (do_rotary)")
    if weight is None or scale is None or zero is None:
        raise Refused("QAttention whose weight, or its scale, is computed in the graph")
    if b.opset < 10:
        raise Refused("QAttention before opset 10, where ONNX has no DequantizeLinear")
    x = b("DequantizeLinear", b.input(0), b.input(3), b.input(6))
    w = b.number((weight.astype(np.float64) - zero.astype(np.float64)) * scale)
    length = b.size(0, 1, "length of the sequence") if b.has(5) or b.attr("unidirectional", 0) else 0
    return _packed(b, x, w, [weight.shape[1] // 3] * 3, _hidden(b, 5, length, length))


@expansion("MultiHeadAttention", into=INTO)
def _multi_head_attention(b: Body) -> list[Operand]:
    """Queries, keys and values side by side in three tensors, keys and values in one, or all in one; and their bias."""
    b.refuse_inputs({6: PAST, 7: PAST, 8: PAST, 9: PAST})
    heads, rank = b.attr("num_heads"), len(b.shape(0))
    k: Operand
    v: Operand
    if rank == 5:  # (N, S, heads, 3, D)
        queries = keys = b.size(0, 1, "length of the sequence")
        size = b.size(0, 4, "number of channels")
        parts = [b("Gather", b.input(0), np.array(j), axis=3) for j in range(3)]
        q, k, v = (b.transpose(_biased(b, x, j, heads, size), 0, 2, 1, 3) for j, x in enumerate(parts))
    else:
        queries, size = b.size(0, 1, "length of the queries"), b.size(0, 2, "number of channels") // heads
        q = heads_apart(b, _biased(b, b.input(0), 0, None, heads * size), heads)
        if not b.has(1):
            raise Refused("MultiHeadAttention of one operand of rank 3")
        layout = len(b.shape(1))
        if layout == 5:  # (N, T, heads, 2, D)
            keys = b.size(1, 1, "length of the keys")
            pair = [b("Gather", b.input(1), np.array(j), axis=3) for j in range(2)]
            k, v = (b.transpose(_biased(b, x, j + 1, heads, size), 0, 2, 1, 3) for j, x in enumerate(pair))
        elif layout == 4:  # (N, heads, T, D), as another layer left them
            keys = b.size(1, 2, "length of the keys")
            k, v = b.input(1), b.input(2)
        else:
            keys = b.size(1, 1, "length of the keys")
            k, v = (heads_apart(b, _biased(b, b.input(j), j, None, heads * size), heads) for j in (1, 2))
    masks = _hidden(b, 4, queries, keys)
    if b.has(5):
        masks.append(b.input(5))
    made = attend(b, q, k, v, b.attr("scale", 0.0) or 1 / sqrt(size), masks)
    return [heads_together(b, made.output), k, v, made.scores[3]]


def _biased(b: Body, x: Operand, part: int, heads: int | None, width: int) -> Operand:
    """`x` with its part of the bias, which is (heads * D,) for queries and keys, then what is left for values."""
    if not b.has(3):
        return x
    size = width * (heads or 1)
    end = 2**31 - 1 if part == 2 else (part + 1) * size
    bias: Operand = b.slice(b.input(3), part * size, end, 0)
    return b("Add", x, b.reshape(bias, heads, -1) if heads else bias)


@expansion("GroupQueryAttention", into="Split, Gather, " + INTO)
def _group_query_attention(b: Body) -> list[Operand]:
    """A whole prompt at once: no past, every token counts."""
    b.refuse_inputs(
        {
            3: PAST,
            4: PAST,
            11: "sinks",
            12: "quantised keys",
            13: "quantised values",
            14: "a norm of its own",
            15: "a norm of its own",
            16: "padded chunks",
        }
    )
    if b.attr("smooth_softmax", 0) == 1:
        raise Refused("GroupQueryAttention with a smooth softmax")
    heads, shared = b.attr("num_heads"), b.attr("kv_num_heads")
    length, width = b.size(0, 1, "length of the sequence"), b.size(0, 2, "number of channels")
    counts = b.constant(5)
    if counts is None or (counts != length - 1).any():
        raise Refused("GroupQueryAttention of sequences whose lengths are computed in the graph, or differ")
    q, k, v = b.input(0), b.input(1), b.input(2)
    if b.has(1):
        size = width // heads
    else:
        size = width // (heads + 2 * shared)
        q, k, v = b.split(q, (heads * size, shared * size, shared * size), 2)
    q, k, v = heads_apart(b, q, heads), heads_apart(b, k, shared), heads_apart(b, v, shared)
    if b.attr("do_rotary", 0):
        if b.has(9):
            raise Refused("GroupQueryAttention with positions of its own")
        cos, sin = (b.slice(b.input(i), 0, length, 0) for i in (7, 8))
        turns = (cos, sin, size, 2 * b.size(7, 1, "width"), bool(b.attr("rotary_interleaved", 0)))
        q, k = turned(b, q, *turns), turned(b, k, *turns)
    window = b.attr("local_window_size", -1)
    masks: list[Operand] = []
    if b.attr("causal", 1):
        seen = band(length, length, before=np.inf if window < 0 else window - 1, after=0)
        masks.append(lowered(b, seen, lowest(b)))
    if b.has(10):
        masks.append(b.input(10))
    times = heads // shared
    made = attend(
        b, q, repeated(b, k, shared, times), repeated(b, v, shared, times), b.attr("scale", 0.0) or 1 / sqrt(size),
        masks, softcap=b.attr("softcap", 0.0),
    )  # fmt: skip
    return [heads_together(b, made.output), k, v]
