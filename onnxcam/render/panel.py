"""Figures side by side: a grid of pictures, each with a title above it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from onnxcam.render import text
from onnxcam.render.overlay import WHITE

TITLE_LINES = 2


def panel(images: Sequence[Image.Image], titles: Sequence[str] = (), columns: int | None = None) -> Image.Image:
    """The pictures in rows of `columns` (all in one row by default), in reading order, as one RGB picture on white.

    Each column is as wide and each row as high as its largest picture. Raises ValueError where there is no picture or
    the titles are neither none nor one per picture.
    """
    if not images or len(titles) not in (0, len(images)):
        raise ValueError(
            f"a panel needs pictures and a title for each or for none, not {len(images)} and {len(titles)}"
        )
    columns = min(columns or len(images), len(images))
    em = min(26, max(15, round(max(max(image.size) for image in images) / 32)))
    face, gap = text.font(em), em
    wide = [max(image.width for image in images[column::columns]) for column in range(columns)]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heads = [text.wrap(titles[i], face, wide[i % columns], TITLE_LINES) if titles else [] for i in range(len(images))]
    line = text.line_height(face)
    head = [max(len(heads[i]) for i in row) * line for row in rows]
    tall = [max(images[i].height for i in row) for row in rows]
    size = sum(wide) + gap * (columns + 1), sum(head) + sum(tall) + gap * (len(rows) + 1)
    figure = Image.new("RGB", size, WHITE)
    draw, y = ImageDraw.Draw(figure), gap
    for row, above, height in zip(rows, head, tall, strict=True):
        x = gap
        for i in row:
            width = wide[i % columns]
            for n, words in enumerate(reversed(heads[i]), start=1):  # close to the picture where a neighbour has more
                draw.text((x + width // 2, y + above - n * line), words, fill=text.INK, font=face, anchor="ma")
            figure.paste(images[i].convert("RGB"), (x + (width - images[i].width) // 2, y + above))
            x += width + gap
        y += above + height + gap
    return figure
