"""The geometry of a sliding window, resolved to explicit numbers: what Conv, ConvTranspose and the pools share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil


@dataclass(frozen=True)
class Window:
    """A window over the last `len(kernel)` axes; `begin` and `end` are explicit pads, never negative.

    `auto_pad` and `ceil_mode` are resolved by the operators before they build one.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def extent(self) -> tuple[int, ...]:
        """Cells from the first to the last tap of the window, both included."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def pointwise(self) -> bool:
        """True where the window is the single cell below it, so that windows need no gathering at all."""
        return set(self.kernel + self.strides) == {1} and not any(self.begin + self.end)

    def padded(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(s + b + e for s, b, e in zip(size, self.begin, self.end, strict=True))

    def output(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Number of window positions along each axis of an input of `size`."""
        return tuple((p - x) // s + 1 for p, x, s in zip(self.padded(size), self.extent, self.strides, strict=True))

    def taps(self, output: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """For each cell of the kernel in row-major order: where it reads the padded input, at all positions."""
        for offset in product(*(range(k) for k in self.kernel)):
            yield tuple(
                slice(o * d, o * d + (n - 1) * s + 1, s)
                for o, d, n, s in zip(offset, self.dilations, output, self.strides, strict=True)
            )


def halves(total: int, auto_pad: str) -> tuple[int, int]:
    """Split padding over begin and end: SAME_UPPER puts the odd cell at the end, SAME_LOWER at the begin."""
    small, large = total // 2, total - total // 2
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def resolve_conv(
    size: Sequence[int],
    kernel: Sequence[int],
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Window:
    """The window of an ONNX Conv over an input of spatial `size` (ONNX spec, Conv; attributes as the node has them)."""
    n = len(kernel)
    strides, dilations = tuple(strides or (1,) * n), tuple(dilations or (1,) * n)
    begin, end = tuple((pads or (0,) * 2 * n)[:n]), tuple((pads or (0,) * 2 * n)[n:])
    if auto_pad == "VALID":
        begin = end = (0,) * n
    elif auto_pad.startswith("SAME"):
        pairs = [
            halves(max((ceil(x / s) - 1) * s + (k - 1) * d + 1 - x, 0), auto_pad)
            for x, k, s, d in zip(size, kernel, strides, dilations, strict=True)
        ]
        begin, end = tuple(b for b, _ in pairs), tuple(e for _, e in pairs)
    return Window(tuple(kernel), strides, dilations, begin, end)


def resolve_pool(
    size: Sequence[int],
    kernel: Sequence[int],
    ceil_mode: bool = False,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> tuple[Window, tuple[int, ...]]:
    """The window of an ONNX MaxPool or AveragePool, and the end pads as the file states them.

    With `ceil_mode` the last window may reach past the padding; the returned window's `end` covers it. A window that
    would start beyond the padded input is left out, as PyTorch and ONNX Runtime do.
    """
    window = resolve_conv(size, kernel, auto_pad, dilations, pads, strides)
    if not ceil_mode or auto_pad != "NOTSET":
        return window, window.end
    end = []
    for x, k, b, e, s in zip(size, window.extent, window.begin, window.end, window.strides, strict=True):
        count = ceil((x + b + e - k) / s) + 1
        if (count - 1) * s >= x + b:
            count -= 1
        end.append(max(e, (count - 1) * s + k - x - b))
    return Window(window.kernel, window.strides, window.dilations, window.begin, tuple(end)), window.end
