"""Rotary position embeddings, of ONNX and of ONNX Runtime: pairs of channels turned by an angle that grows along the
sequence.
"""

from __future__ import annotations

from onnxcam.canonise.expansion.body import Body, Made, Operand, Refused
from onnxcam.canonise.expansion.table import expansion

INTO = "Split, Mul, Sub, Add, Concat"


def heads_apart(b: Body, x: Operand, heads: int) -> Made:
    """(N, S, heads * D) as (N, heads, S, D)."""
    return b.transpose(b.reshape(x, 0, 0, heads, -1), 0, 2, 1, 3)


def heads_together(b: Body, x: Operand) -> Made:
    """(N, heads, S, D) as (N, S, heads * D)."""
    return b.reshape(b.transpose(x, 0, 2, 1, 3), 0, 0, -1)


def turned(b: Body, x: Operand, cos: Operand, sin: Operand, size: int, width: int, interleaved: bool) -> Operand:
    """(N, heads, S, size) with its first `width` channels turned; cos and sin broadcast against half of those.

    Channel i makes a pair with channel i + width/2, or with its neighbour where they are interleaved.
    """
    rest: list[Operand] = []
    if width < size:
        x, kept = b.split(x, (width, size - width), 3)
        rest = [kept]
    half = width // 2
    if interleaved:
        one, other = b.slice(x, 0, width, 3, 2), b.slice(x, 1, width, 3, 2)
    else:
        one, other = b.split(x, (half, half), 3)
    real = b("Sub", b("Mul", one, cos), b("Mul", other, sin))
    imaginary = b("Add", b("Mul", one, sin), b("Mul", other, cos))
    if interleaved:
        y = b("Concat", b.unsqueeze(real, 4), b.unsqueeze(imaginary, 4), axis=4)
        parts = [b("Reshape", y, b("Shape", x)), *rest]
    else:
        parts = [real, imaginary, *rest]
    return b("Concat", *parts, axis=3) if len(parts) > 1 else parts[0]


def _embed(b: Body, caches: tuple[Operand, Operand], heads: int, width: int) -> Operand:
    x, flat = b.input(0), len(b.shape(0)) == 3
    size = b.size(0, -1, "number of channels")
    if flat:
        x, size = heads_apart(b, x, heads), size // heads
    y = turned(b, x, *caches, size, width or size, bool(b.attr("interleaved", 0)))
    return heads_together(b, y) if flat else y


@expansion("RotaryEmbedding", domain="", into=INTO)
def _rotary_embedding(b: Body) -> Operand:
    """x, cos, sin, positions; caches by position and positions, or caches as they are (N, S, width/2)."""
    caches: list[Operand] = [b.input(1), b.input(2)]
    if b.has(3):
        caches = [b("Gather", cache, b.input(3), axis=0) for cache in caches]
    cos, sin = (b.unsqueeze(cache, 1) for cache in caches)
    return _embed(b, (cos, sin), b.attr("num_heads", 0), b.attr("rotary_embedding_dim", 0))


@expansion("RotaryEmbedding", into=INTO)
def _contrib_rotary_embedding(b: Body) -> Operand:
    """x, positions (one for each token, or the first one), cos, sin by position."""
    if b.attr("is_packed_batching", 0):
        raise Refused("RotaryEmbedding of a packed batch")
    if b.attr("scale", 1.0) != 1:
        raise Refused("RotaryEmbedding with a scale")
    cos: Operand = b.input(2)
    sin: Operand = b.input(3)
    width, heads = b.attr("rotary_embedding_dim", 0), b.attr("num_heads", 0)
    if len(b.shape(1)) == 1:
        first = b.constant(1)
        if first is None:
            raise Refused("RotaryEmbedding from a position that is computed in the graph")
        length = b.size(0, -2, "length of the sequence")
        cos, sin = (b.slice(c, int(first.item()), int(first.item()) + length, 0) for c in (cos, sin))
    else:
        cos, sin = (b.unsqueeze(b("Gather", c, b.input(1), axis=0), 1) for c in (cos, sin))
    if not heads and len(b.shape(0)) == 3:
        heads = b.size(0, -1, "number of channels") // (2 * b.size(2, -1, "width"))
    return _embed(b, (cos, sin), heads, width)
