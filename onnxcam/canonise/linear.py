"""How a linear operator absorbs an affine map per channel, y = s x + t, that stands after or before it.

`LINEAR` says for Conv, ConvTranspose, Gemm and MatMul where the weight's output and input channels lie; arrays are
float64. Where a Conv pads, the shift of a map before it is no constant bias: the padding is zero after the map.
`shift_map` is what the map's shift contributes to each output pixel, exactly, borders included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs


class Linear(NamedTuple):
    """Axes of one op type's weight: numbers of channels, and the weight with a scale per channel put in."""

    out_channels: Callable[[gs.Node, np.ndarray], int]
    in_channels: Callable[[gs.Node, np.ndarray], int]
    scale_out: Callable[[gs.Node, np.ndarray, np.ndarray], np.ndarray]
    scale_in: Callable[[gs.Node, np.ndarray, np.ndarray], np.ndarray]


def group(node: gs.Node) -> int:
    return int(node.attrs.get("group", 1))


def _per_axis(scale: np.ndarray, axis: int, like: np.ndarray) -> np.ndarray:
    return scale.reshape([-1 if i == axis else 1 for i in range(like.ndim)])


def _scale_within_groups(node: gs.Node, w: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Scale axis 1 of `w` (A, C/g, ...), whose rows fall into g groups of A/g that see C/g channels each."""
    g = group(node)
    blocks = w.reshape(g, w.shape[0] // g, *w.shape[1:])
    return (blocks * s.reshape(g, 1, w.shape[1], *[1] * (w.ndim - 2))).reshape(w.shape)


def _scale_rows(node: gs.Node, w: np.ndarray, s: np.ndarray) -> np.ndarray:
    return w * _per_axis(s, 0, w)


def _out_axis(node: gs.Node) -> int:
    return 0 if node.attrs.get("transB", 0) else 1


CONV = Linear(
    out_channels=lambda node, w: w.shape[0],
    in_channels=lambda node, w: w.shape[1] * group(node),
    scale_out=_scale_rows,
    scale_in=_scale_within_groups,
)
CONV_TRANSPOSE = Linear(
    out_channels=lambda node, w: w.shape[1] * group(node),
    in_channels=lambda node, w: w.shape[0],
    scale_out=_scale_within_groups,
    scale_in=_scale_rows,
)
MATRIX = Linear(
    out_channels=lambda node, w: w.shape[_out_axis(node)],
    in_channels=lambda node, w: w.shape[1 - _out_axis(node)],
    scale_out=lambda node, w, s: w * _per_axis(s, _out_axis(node), w),
    scale_in=lambda node, w, s: w * _per_axis(s, 1 - _out_axis(node), w),
)
LINEAR = {"Conv": CONV, "ConvTranspose": CONV_TRANSPOSE, "Gemm": MATRIX, "MatMul": MATRIX}


class Geometry(NamedTuple):
    """Strides, dilations and explicit pads of a Conv, one entry per spatial axis; sizes only where they are known."""

    strides: list[int]
    dilations: list[int]
    begins: list[int]
    ends: list[int]


def geometry(node: gs.Node, kernel: tuple[int, ...], size: list[int] | None) -> Geometry | None:
    """The geometry of Conv `node` on an input of spatial `size`; None where `auto_pad` needs a size that is unknown."""
    n = len(kernel)
    strides = list(node.attrs.get("strides", [1] * n))
    dilations = list(node.attrs.get("dilations", [1] * n))
    auto = node.attrs.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return Geometry(strides, dilations, [0] * n, [0] * n)
    if auto == "NOTSET":
        pads = list(node.attrs.get("pads", [0] * 2 * n))
        return Geometry(strides, dilations, pads[:n], pads[n:])
    if size is None:
        return None
    begins, ends = [], []
    for h, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-h // s) - 1) * s + (k - 1) * d + 1 - h, 0)
        half = total // 2
        begins.append(half if auto == "SAME_UPPER" else total - half)
        ends.append(total - begins[-1])
    return Geometry(strides, dilations, begins, ends)


def shift_taps(node: gs.Node, w: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(M, *kernel): what a shift `t` (C,) of the input contributes through each tap of the kernel `w` (M, C/g,
    *kernel)."""
    return np.asarray(_scale_within_groups(node, w, t).sum(axis=1))


def shift_map(taps: np.ndarray, where: Geometry, size: list[int]) -> np.ndarray:
    """(1, M, *output size): the sum over the `taps` (M, *kernel) that fall inside an input of spatial `size`.

    Whether a tap falls inside is a product over the axes, so the sum is one small matrix product per axis.
    """
    total = taps
    for h, k, s, d, begin, end in zip(size, taps.shape[1:], *where, strict=True):
        extent = (h + begin + end - (k - 1) * d - 1) // s + 1
        position = np.arange(extent)[:, None] * s + np.arange(k)[None, :] * d - begin
        inside = ((position >= 0) & (position < h)).astype(np.float64)
        total = np.tensordot(total, inside, axes=([1], [1]))
    return total[None]
