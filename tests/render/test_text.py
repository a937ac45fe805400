"""Text keeps to its width, loses as little as possible, and numbers stay short."""

import pytest

from onnxcam.render.text import font, number, plain, short, width, wrap

FACE = font(14)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (-0.0, "0"),
        (1, "1"),
        (0.4732, "0.473"),
        (-12.345, "-12.3"),
        (3.2e-5, "3.2e-5"),
        (1.234e12, "1.23e12"),
        (-1e-300, "-1e-300"),
        (1000, "1e3"),
        (999, "999"),
    ],
)
def test_numbers_have_three_digits_and_a_short_exponent(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize("text", ["tabby cat", "word " * 60, "/layer4/layer4.1/conv2/Conv_output_0" * 4, "x" * 300])
@pytest.mark.parametrize("limit", [60, 150, 400])
@pytest.mark.parametrize("lines", [1, 2, 3])
def test_wrapped_text_keeps_to_its_width_and_number_of_lines(text, limit, lines):
    wrapped = wrap(text, FACE, limit, lines)
    assert len(wrapped) <= lines and all(width(line, FACE) <= limit for line in wrapped)


def test_text_that_fits_is_left_whole():
    assert wrap("tabby, tabby cat", FACE, 400, 2) == ["tabby, tabby cat"] and wrap("", FACE, 400, 2) == []


def test_lines_break_between_words_and_lose_none():
    text = "one two three four five six seven eight nine ten eleven twelve"
    wrapped = wrap(text, FACE, 160, 9)
    assert len(wrapped) > 1 and " ".join(wrapped) == text


def test_names_of_layers_break_after_their_separators():
    name = "/backbone/stages.3/blocks.2/mlp/fc2/Conv_output_0"
    wrapped = wrap(name, FACE, 160, 9)
    assert len(wrapped) > 1 and "".join(wrapped) == name and all(line[-1] in "/._" for line in wrapped[:-1])


def test_too_long_text_keeps_both_its_ends():
    cut = short("/layer4/layer4.1/conv2/Conv_output_0", FACE, 150)
    assert cut.startswith("/layer") and cut.endswith("output_0") and "..." in cut


def test_what_the_font_lacks_is_spelt_out():
    given = "Schäferhund, Straße\n z⁺ 3\N{MULTIPLICATION SIGN}3 \N{MINUS SIGN}1 ε 犬"
    assert plain(given) == "Schaferhund, Strasse z+ 3x3 -1 epsilon ?"
