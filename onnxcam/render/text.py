"""Text in figures: Pillow's own font, wrapped or cut to a width and drawn line by line."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK = (38, 38, 38)
FAINT = (96, 96, 96)
ELLIPSIS = "..."
PIECE = re.compile(r"[^/_.:-]*[/_.:-]*")  # where a layer's name may be broken: after what separates its parts
# Pillow's font has little beyond ASCII: what captions may well hold is spelt out, accents are dropped, and what is left
# shows as "?".
SPELT = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{MULTIPLICATION SIGN}": "x",
        "\N{RIGHTWARDS ARROW}": "->",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{GREEK SMALL LETTER ALPHA}": "alpha",
        "\N{GREEK SMALL LETTER BETA}": "beta",
        "\N{GREEK SMALL LETTER GAMMA}": "gamma",
        "\N{GREEK SMALL LETTER EPSILON}": "epsilon",
        "\N{LATIN SMALL LETTER SHARP S}": "ss",
        "\N{LATIN SMALL LETTER AE}": "ae",
        "\N{LATIN SMALL LETTER O WITH STROKE}": "o",
    }
)


@lru_cache(maxsize=16)
def font(size: int) -> Font:
    """Pillow's built-in font at `size` pixels; it scales where Pillow has FreeType, as every wheel does."""
    return ImageFont.load_default(size=size)


def plain(text: str) -> str:
    """The text in the characters that the font has, on one line."""
    folded = unicodedata.normalize("NFKD", text.translate(SPELT))
    kept = "".join(c for c in folded if not unicodedata.combining(c))
    return " ".join(kept.encode("ascii", "replace").decode().split())


def line_height(face: Font) -> int:
    """The distance between lines, in pixels."""
    _, top, _, bottom = face.getbbox("Ågjy")
    return round((bottom - min(top, 0)) * 1.25)


def width(text: str, face: Font) -> int:
    """The width of one line, in pixels."""
    return int(face.getlength(text) + 0.999)


def short(text: str, face: Font, limit: int) -> str:
    """The text in at most `limit` pixels, its middle left out where it is longer: names differ at their ends."""
    if width(text, face) <= limit:
        return text
    for keep in range(len(text) - 1, 0, -1):
        cut = text[: (keep + 1) // 2].rstrip() + ELLIPSIS + text[len(text) - keep // 2 :].lstrip()
        if width(cut, face) <= limit:
            return cut
    return ELLIPSIS


def wrap(text: str, face: Font, limit: int, lines: int) -> list[str]:
    """The text in at most `lines` lines of at most `limit` pixels; what is left over is shortened.

    Lines break at spaces, and within words that are too long for a line, as names of layers, after their separators.
    """
    rest = plain(text)
    wrapped: list[str] = []
    while rest and len(wrapped) < lines - 1 and width(rest, face) > limit:
        line = ""
        for piece in _pieces(rest, face, limit):
            if line and width((line + piece).rstrip(), face) > limit:
                break
            line += piece
        wrapped.append(short(line.rstrip(), face, limit))
        rest = rest[len(line) :]
    return [*wrapped, short(rest, face, limit)] if rest else wrapped


def _pieces(text: str, face: Font, limit: int) -> list[str]:
    words = re.findall(r"\S+\s*", text)
    return [p for w in words for p in (PIECE.findall(w) if width(w.rstrip(), face) > limit else [w]) if p]


def number(value: float) -> str:
    """A number for a tick label: three digits, a short exponent, no negative zero."""
    text = f"{value + 0.0:.3g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text
