"""Pictures before they are numbers: opened from a file, turned into upright 8-bit RGB, and cut to what a model sees.

A picture comes in as a path or a PIL image of any mode. `Placement` says which region of it goes where in the model's
input; the same placement draws both the input (at the model's size) and the view (at the picture's own resolution), so
a map drawn over the view lies where the model saw it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from onnxcam.errors import OnnxcamError, PictureError, UsageError
from onnxcam.locations import is_url, name_of, reading

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]

VIEW_LIMIT = 1024


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in file `path`, or at a URL, decoded and turned upright as its EXIF orientation says.

    Raises UsageError, in one line, where there is no such file, or it is a directory; PictureError where it is empty,
    no picture, cut short, has more pixels than Pillow takes for safe (about 179 million), or its URL gives nothing.
    """
    if is_url(path):
        try:
            with reading(str(path)) as stream:
                return _decoded(str(path), stream)
        except UsageError as error:
            raise PictureError(str(error)) from None
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a directory: name the pictures in it, as {path / '*.jpg'}")
    return _decoded(str(path), path)


def _decoded(path: str, source: Path | IO[bytes]) -> Image.Image:
    try:
        if isinstance(source, Path) and source.stat().st_size == 0:
            raise PictureError(f"{path} is empty (0 bytes)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large but below the limit: fine
            with Image.open(source) as image:
                image.load()
                return upright(image)
    except FileNotFoundError:
        raise UsageError(f"no such picture: {path}") from None
    except PermissionError:
        raise PictureError(f"{path} may not be read: check its permissions") from None
    except UnidentifiedImageError:
        raise PictureError(f"{path} is not a picture that Pillow can read") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{path} has too many pixels to be opened safely: scale it down first") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on broken data
        raise PictureError(f"{path} is damaged and cannot be read: {error}") from None


def why_left_out(path: str, error: OnnxcamError) -> str:
    """What is said of a picture that is left out of several, with its name."""
    text, name = str(error), name_of(path)
    return text if name in text else f"{name}: {text}"


def upright(image: Image.Image) -> Image.Image:
    """A copy of the picture turned as its EXIF orientation says; the tag is dropped, so doing it twice is harmless."""
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture upright in 8-bit RGB, whatever its mode: alpha is laid on white, 16 bits are scaled to 8.

    Integer and float pictures are read by their largest value: up to 1 (floats only), 255 or 65535. Raises PictureError
    for a picture without pixels, with other values, or in a mode that Pillow cannot convert.
    """
    if 0 in image.size:
        raise PictureError(f"the picture has no pixels: it is {image.width} x {image.height}")
    image = upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError:
        raise PictureError(f"a picture of mode {image.mode} cannot be turned into RGB: save it as RGB first") from None


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or high > 65535:
        raise PictureError(f"the picture's values run from {low:g} to {high:g}: scale them to 0..255 first")
    if image.mode.startswith("I;16") or high > 255:
        values = values / 257  # 65535 / 255
    elif image.mode == "F" and high <= 1:
        values = values * 255
    return Image.fromarray(np.round(values).astype(np.uint8))


@dataclass(frozen=True)
class Placement:
    """Which part of a picture fills which part of a model's input.

    `source`: the region taken, (left, top, right, bottom) in picture pixels, fractions allowed. `target`: where it
    goes, in input pixels. `picture`: (width, height) of the picture; `size`: (height, width) of the input.
    """

    source: Box
    target: tuple[int, int, int, int]
    picture: tuple[int, int]
    size: tuple[int, int]

    @property
    def window(self) -> Box:
        """The region that the whole input covers, in picture pixels; it reaches beyond the picture where padded."""
        left, top, right, bottom = self.source
        x0, y0, x1, y1 = self.target
        sx, sy = (right - left) / (x1 - x0), (bottom - top) / (y1 - y0)
        height, width = self.size
        return left - x0 * sx, top - y0 * sy, right + (width - x1) * sx, bottom + (height - y1) * sy

    def draw(self, image: Image.Image, resample: Image.Resampling, fill: Colour) -> Image.Image:
        """The model's input as an RGB picture of the input's size."""
        height, width = self.size
        return self._draw(image, (width, height), self.target, resample, fill)

    def view(self, image: Image.Image, fill: Colour, limit: int = VIEW_LIMIT) -> Image.Image:
        """The same region at the picture's own resolution, scaled down where a side is longer than `limit` pixels."""
        left, top, right, bottom = self.window
        shrink = min(1.0, limit / max(right - left, bottom - top))
        width, height = (max(1, round(side * shrink)) for side in (right - left, bottom - top))
        sx, sy = width / self.size[1], height / self.size[0]
        x0, y0, x1, y1 = self.target
        x0, y0 = min(round(x0 * sx), width - 1), min(round(y0 * sy), height - 1)
        target = x0, y0, max(x0 + 1, round(x1 * sx)), max(y0 + 1, round(y1 * sy))
        return self._draw(image, (width, height), target, Image.Resampling.LANCZOS, fill)

    def _draw(
        self,
        image: Image.Image,
        size: tuple[int, int],
        target: tuple[int, int, int, int],
        resample: Image.Resampling,
        fill: Colour,
    ) -> Image.Image:
        # `box` lets the filter see pixels beyond the region: the same as resizing all of it and cutting afterwards,
        # without the memory that a long thin picture would take.
        x0, y0, x1, y1 = target
        part = image.resize((x1 - x0, y1 - y0), resample, box=self.source)
        if part.size == size:
            return part
        canvas = Image.new("RGB", size, fill)
        canvas.paste(part, (x0, y0))
        return canvas


def warp(picture: tuple[int, int], size: tuple[int, int], crop_fraction: float) -> Placement:
    """All of the picture, stretched to the input's size."""
    return Placement((0, 0, *picture), (0, 0, size[1], size[0]), picture, size)


def crop(picture: tuple[int, int], size: tuple[int, int], crop_fraction: float) -> Placement:
    """The centre: the picture is scaled until it covers size / crop_fraction, and the middle is cut out.

    For a square input this is torchvision's Resize(size / crop_fraction) and CenterCrop(size), with their rounding.
    """
    (width, height), (h, w) = picture, size
    cover_w, cover_h = (math.floor(side / crop_fraction) for side in (w, h))
    if cover_w * height >= cover_h * width:  # the width decides; the other side follows, never below the cut
        full_w, full_h = cover_w, max(h, int(cover_w * height / width))
    else:
        full_w, full_h = max(w, int(cover_h * width / height)), cover_h
    left, top = round((full_w - w) / 2), round((full_h - h) / 2)
    sx, sy = width / full_w, height / full_h
    # min: the last bit of the product must not reach beyond the picture, which PIL refuses
    source = left * sx, top * sy, min((left + w) * sx, width), min((top + h) * sy, height)
    return Placement(source, (0, 0, w, h), picture, size)


def pad(picture: tuple[int, int], size: tuple[int, int], crop_fraction: float) -> Placement:
    """All of the picture in its own proportions, centred, with bars at two sides (a letterbox)."""
    (width, height), (h, w) = picture, size
    scale = min(w / width, h / height)
    part_w, part_h = min(w, max(1, round(width * scale))), min(h, max(1, round(height * scale)))
    left, top = (w - part_w) // 2, (h - part_h) // 2
    return Placement((0, 0, width, height), (left, top, left + part_w, top + part_h), picture, size)


def exact(picture: tuple[int, int], size: tuple[int, int], crop_fraction: float) -> Placement:
    """The picture as it is. Raises UsageError where its size is not the input's."""
    if picture != (size[1], size[0]):
        raise UsageError(
            f"the picture is {picture[0]} x {picture[1]} and the model wants {size[1]} x {size[0]} (width x height): "
            "choose a preprocessing that resizes, or --resize warp, crop or pad"
        )
    return warp(picture, size, crop_fraction)


RESIZE: dict[str, Callable[[tuple[int, int], tuple[int, int], float], Placement]] = {
    "warp": warp,
    "crop": crop,
    "pad": pad,
    "exact": exact,
}

INTERPOLATION: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
