"""What a model's input wants: its shape as the file gives it, its number type, and whether a picture fits into it.

`InputSpec.of` reads layout, channels and size off the shape. Preprocessing takes a spec and a picture and makes the
array; a spec without a layout says in `why_no_image` why a picture cannot be put in, and arrays can still be passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Layout = Literal["NCHW", "NHWC"]
Dim = int | str | None

CHANNEL_AXIS: dict[str, int] = {"NCHW": 1, "NHWC": 3}
IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    `shape` stands as in the file: a number, the name of a symbolic dimension, or None. `layout` is None where the
    input holds no image, and `why_no_image` then says why. `channels`, `height`, `width` and `batch` are None where
    symbolic.
    """

    name: str
    shape: tuple[Dim, ...]
    dtype: np.dtype
    layout: Layout | None = None
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int | None = None
    why_no_image: str = ""

    @classmethod
    def of(cls, name: str, shape: Sequence[Dim], dtype: np.typing.DTypeLike) -> InputSpec:
        """The spec of input `name`: the layout is worked out from the shape, NCHW where both would do.

        Never fails: an input that holds no image (not rank 4, neither 1 nor 3 channels, not numbers) gets no layout.
        """
        shape, dtype = tuple(shape), np.dtype(dtype)
        sizes = [static(d) for d in shape]
        layout, why = _layout(sizes, dtype)
        if layout is None:
            return cls(name, shape, dtype, batch=sizes[0] if sizes else None, why_no_image=f"input {name!r} {why}")
        channel = CHANNEL_AXIS[layout]
        height, width = (sizes[axis] for axis in (1, 2, 3) if axis != channel)
        return cls(name, shape, dtype, layout, sizes[channel], height, width, sizes[0])

    @property
    def is_integer(self) -> bool:
        """True where the input takes whole numbers, as uint8 pixels."""
        return self.dtype.kind in "iu"

    def broadcast(self, per_channel: np.ndarray) -> np.ndarray:
        """Values per channel (C,) as an array that broadcasts with the input: (1, C, 1, 1) or (1, 1, 1, C)."""
        return per_channel.reshape((1, 1, 1, -1) if self.layout == "NHWC" else (1, -1, 1, 1))


def static(dim: Dim) -> int | None:
    """The dimension where it is a fixed number; None where symbolic (some exporters write 0 or -1 for that)."""
    return int(dim) if isinstance(dim, (int, np.integer)) and dim > 0 else None


def is_float(dtype: np.dtype) -> bool:
    """True for floating point numbers, bfloat16 (which NumPy knows only through ml_dtypes) included."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _layout(sizes: Sequence[int | None], dtype: np.dtype) -> tuple[Layout | None, str]:
    if not (is_float(dtype) or dtype.kind in "iu"):
        return None, f"takes {dtype.name}, not numbers a picture could be turned into"
    if len(sizes) != 4:
        return None, f"has {len(sizes)} dimensions; an image needs 4, (N, C, H, W) or (N, H, W, C)"
    _, second, third, last = sizes
    if second in IMAGE_CHANNELS:
        return "NCHW", ""
    if last in IMAGE_CHANNELS:
        return "NHWC", ""
    if second is None:
        return "NCHW", ""
    if last is None and third is not None and second > 4:  # (N, 224, 224, ?): a size where NCHW has its channels
        return "NHWC", ""
    return None, f"has {second} channels (NCHW) or {last} (NHWC); a picture has 1 or 3"
