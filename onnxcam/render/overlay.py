"""A map drawn over the picture that the model saw: blended, with a colour bar of raw values and a caption.

In come the view from preprocessing and one map at its layer's own resolution; out comes an RGB picture on white. The
map is enlarged here for the eye only. The more relevant a place, the more colour; where relevance is 0 the photo is
untouched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from onnxcam.render import text
from onnxcam.render.colour import Kind, Scaled, colours, normalise

SMALLEST = 448  # longest side of the photo in a figure, unless it is larger by itself
PIXEL_ART = 64  # pictures up to this size are enlarged without smoothing: their pixels are what the model saw
THINNEST = 96  # a photo's shorter side is stretched to this, so that something can be seen
RAMP = 0.75  # alpha grows with value ** RAMP: a little faster than the value at the low end
TICKS = (0.0, 0.5, 1.0)
WHITE = (255, 255, 255)
CAPTION_LINES = 2


def overlay(
    view: Image.Image,
    heat: np.ndarray,
    *,
    caption: str | Sequence[str] = (),
    kind: Kind = "auto",
    alpha: float = 0.6,
    size: int | None = None,
    percentile: float = 100.0,
) -> Image.Image:
    """A figure: the photo with the map `heat` (h, w) on it, a colour bar at its right, caption lines below.

    `alpha` is the weight of the heat map at its largest value (0: photo only, 1: map only); it falls to 0 with the
    value. `kind` and `percentile` are those of `colour.normalise`. `size` is the photo's longest side in pixels, by
    default its own, at least 448. The first line of the caption is set larger.
    """
    scaled = normalise(heat, kind, percentile)
    photo = _blend(enlarge(view, size), scaled, alpha)
    return _framed(photo, scaled, [caption] if isinstance(caption, str) else list(caption))


def blend(
    view: Image.Image,
    heat: np.ndarray,
    *,
    kind: Kind = "auto",
    alpha: float = 0.6,
    size: int | None = None,
    percentile: float = 100.0,
) -> Image.Image:
    """The photo with the map on it and nothing around it; arguments as for `overlay`."""
    return _blend(enlarge(view, size), normalise(heat, kind, percentile), alpha)


def enlarge(view: Image.Image, size: int | None = None) -> Image.Image:
    """The photo with its longest side `size` pixels long, by default its own size but at least 448."""
    longest = max(view.size)
    target = size or max(longest, SMALLEST)
    if longest <= PIXEL_ART and size is None:
        target = longest * -(-SMALLEST // longest)  # a whole multiple, so that all pixels come out the same size
    sides = [max(round(side * target / longest), min(THINNEST, target)) for side in view.size]
    small = longest <= PIXEL_ART and target >= longest
    resample = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    photo = view.convert("RGB")
    return photo if photo.size == tuple(sides) else photo.resize((sides[0], sides[1]), resample)


def upsample(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values (h, w) smoothly brought to `size` (width, height), pixel centres aligned as for resizing a photo.

    Bicubic, for positive and negative parts apart: ringing around a peak cannot turn into relevance of the other sign.
    """
    positive, negative = (_upsample(np.maximum(part, 0), size) for part in (values, -values))
    signed: np.ndarray = positive - negative
    return signed


def _upsample(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    large = Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(large, dtype=np.float64), 0, values.max())


def opacity(values: np.ndarray, alpha: float) -> np.ndarray:
    """The weight of the heat map where it has these values, 0..alpha."""
    weight: np.ndarray = alpha * np.abs(values) ** RAMP
    return weight


def _blend(photo: Image.Image, scaled: Scaled, alpha: float) -> Image.Image:
    values = upsample(scaled.values, photo.size)
    weight = opacity(values, alpha)[..., None]
    pixels, grey = (np.asarray(p, dtype=np.float64) for p in (photo, photo.convert("L").convert("RGB")))
    faded = np.sqrt(weight)  # under the heat the photo keeps its light and shade but not its hue, which is the map's
    mixed = (1 - weight) * ((1 - faded) * pixels + faded * grey) + weight * colours(values, scaled.kind)
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def _framed(photo: Image.Image, scaled: Scaled, caption: Sequence[str]) -> Image.Image:
    em = min(26, max(15, round(max(photo.size) / 32)))
    margin = em
    small, large = text.font(round(em * 0.85)), text.font(round(em * 1.1))
    labels = [text.number(scaled.vmin + at * (scaled.vmax - scaled.vmin)) for at in TICKS]
    if scaled.beyond:
        labels[-1] = f">= {labels[-1]}"
        labels[0] = f"<= {labels[0]}" if scaled.kind == "signed" else labels[0]
    bar_width = round(em * 0.9)
    ends = ("for", "against") if scaled.kind == "signed" else ()
    side = margin + bar_width + em // 2 + max(text.width(s, small) for s in (*labels, *ends))
    width = max(photo.width, 320 - side) + side
    lines = [
        (line, large if i == 0 else small, text.INK if i == 0 else text.FAINT)
        for i, paragraph in enumerate(caption)
        for line in text.wrap(paragraph, large if i == 0 else small, width, CAPTION_LINES)
    ]
    strip = sum(text.line_height(face) for _, face, _ in lines) + (em // 2 if lines else 0)
    figure = Image.new("RGB", (width + 2 * margin, photo.height + strip + 2 * margin), WHITE)
    figure.paste(photo, (margin, margin))
    _bar(figure, (margin * 2 + photo.width, margin, bar_width, photo.height), scaled, labels, ends, small)
    draw, y = ImageDraw.Draw(figure), margin + photo.height + em // 2
    for line, face, ink in lines:
        draw.text((margin, y), line, fill=ink, font=face)
        y += text.line_height(face)
    return figure


def _bar(
    figure: Image.Image,
    box: tuple[int, int, int, int],
    scaled: Scaled,
    labels: Sequence[str],
    ends: Sequence[str],
    face: text.Font,
) -> None:
    x, y, width, height = box
    draw, tall = ImageDraw.Draw(figure), text.line_height(face)
    low = -1 if scaled.kind == "signed" else 0
    values = np.linspace(1, low, height)[:, None]
    opaque = opacity(values, 1.0)[..., None]
    strip = np.round((1 - opaque) * 255 + opaque * colours(values, scaled.kind)).astype(np.uint8)
    figure.paste(Image.fromarray(np.repeat(strip, width, axis=1)), (x, y))
    draw.rectangle((x, y, x + width - 1, y + height - 1), outline=text.FAINT)
    for at, label in list(zip(TICKS, labels, strict=True))[: 1 if scaled.vmin == scaled.vmax else None]:
        tick = y + round((1 - at) * (height - 1))
        draw.line((x + width, tick, x + width + 3, tick), fill=text.FAINT)
        # the end labels stay inside the bar's height
        draw.text((x + width + 7, tick), label, fill=text.INK, font=face, anchor={0.0: "ls", 0.5: "lm", 1.0: "lt"}[at])
    for word, place in zip(ends, (y + tall, y + height - tall), strict=False):
        anchor = "lt" if place < y + height / 2 else "ls"
        draw.text((x + width + 7, place), word, fill=text.FAINT, font=face, anchor=anchor)
