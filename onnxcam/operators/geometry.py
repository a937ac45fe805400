"""Windows of Conv, ConvTranspose and the pools from their attributes: `auto_pad`, `ceil_mode` and defaults resolved."""

from __future__ import annotations

from collections.abc import Sequence

from onnxcam.engines.window import Window, halves, resolve_conv, resolve_pool
from onnxcam.graph import Node


def _ints(node: Node, name: str, default: int, n: int) -> tuple[int, ...]:
    value = node.attr(name)
    return tuple(int(v) for v in value) if value is not None else (default,) * n


def _pads(node: Node, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pads = _ints(node, "pads", 0, 2 * n)
    return pads[:n], pads[n:]


def conv_window(node: Node, size: Sequence[int], kernel: Sequence[int]) -> Window:
    """Window of a Conv over an input of spatial `size`."""
    return resolve_conv(
        size,
        kernel,
        node.attr("auto_pad", "NOTSET"),
        node.attr("dilations"),
        node.attr("pads"),
        node.attr("strides"),
    )


def pool_window(node: Node, size: Sequence[int]) -> tuple[Window, tuple[int, ...]]:
    """Window of a MaxPool or AveragePool, and the end pads as the file states them."""
    return resolve_pool(
        size,
        [int(k) for k in node.attr("kernel_shape")],
        bool(node.attr("ceil_mode", 0)),
        node.attr("auto_pad", "NOTSET"),
        node.attr("dilations"),
        node.attr("pads"),
        node.attr("strides"),
    )


def conv_transpose_window(node: Node, size: Sequence[int], kernel: Sequence[int]) -> Window:
    """Window of the Conv whose adjoint a ConvTranspose over an input of spatial `size` is (ONNX spec)."""
    n = len(kernel)
    strides, dilations = _ints(node, "strides", 1, n), _ints(node, "dilations", 1, n)
    extra = _ints(node, "output_padding", 0, n)
    begin, end = _pads(node, n)
    auto_pad, wanted = node.attr("auto_pad", "NOTSET"), node.attr("output_shape")
    if wanted is not None or auto_pad.startswith("SAME"):
        same = [x * s for x, s in zip(size, strides, strict=True)]
        target = same if wanted is None else [int(v) for v in wanted][-n:]
        pairs = []
        for x, k, s, d, o, t in zip(size, kernel, strides, dilations, extra, target, strict=True):
            total = max(s * (x - 1) + o + (k - 1) * d + 1 - t, 0)
            pairs.append(halves(total, "SAME_UPPER" if auto_pad == "SAME_UPPER" else "SAME_LOWER"))
        begin, end = tuple(b for b, _ in pairs), tuple(e for _, e in pairs)
    elif auto_pad == "VALID":
        begin = end = (0,) * n
    return Window(tuple(kernel), strides, dilations, begin, end)
