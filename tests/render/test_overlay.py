"""The overlay shows the photo where nothing is relevant, heat where something is, and both in the right place."""

import numpy as np
import pytest
from PIL import Image

from onnxcam.render.overlay import blend, enlarge, overlay, upsample


def photo(width=512, height=512):
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def spot(h, w, y, x, value=1.0):
    heat = np.zeros((h, w))
    heat[y, x] = value
    return heat


def array(image):
    return np.asarray(image, dtype=float)


def test_where_relevance_is_zero_the_photo_is_untouched():
    view = photo()
    np.testing.assert_array_equal(array(blend(view, np.zeros((7, 7)))), array(view))
    mixed = array(blend(view, spot(8, 8, 0, 0)))
    np.testing.assert_array_equal(mixed[256:], array(view)[256:])


def test_alpha_zero_is_the_photo_and_alpha_one_is_the_map():
    view = photo()
    np.testing.assert_array_equal(array(blend(view, np.ones((3, 3)), alpha=0)), array(view))
    assert len(np.unique(array(blend(view, np.ones((3, 3)), alpha=1)).reshape(-1, 3), axis=0)) == 1


def test_alpha_is_the_weight_of_the_heat_at_its_maximum():
    grey = Image.new("RGB", (512, 512), (100, 100, 100))
    top = array(blend(grey, np.ones((2, 2)), alpha=1))[0, 0]
    np.testing.assert_allclose(array(blend(grey, np.ones((2, 2)), alpha=0.25))[0, 0], 75 + 0.25 * top, atol=0.51)


def test_more_relevance_hides_more_of_the_photo():
    white = Image.new("RGB", (512, 512), "white")
    rows = array(blend(white, np.linspace(0, 1, 64)[:, None] ** 2, kind="signed"))[:, 0, 2]
    assert (np.diff(rows) <= 0).all() and rows[0] > 254 and rows[-1] < 180


@pytest.mark.parametrize(("y", "x"), [(0, 0), (1, 5), (3, 2)])
def test_the_heat_lies_over_the_cell_it_belongs_to(y, x):
    view = Image.new("RGB", (600, 400), "black")  # cells of 100 x 100
    brightness = array(blend(view, spot(4, 6, y, x))).sum(axis=2)
    peak = np.unravel_index(brightness.argmax(), brightness.shape)
    assert brightness[y * 100 + 50, x * 100 + 50] > 0.9 * brightness[peak]
    assert peak[0] // 100 == y and peak[1] // 100 == x


def test_red_is_for_and_blue_is_against():
    view = Image.new("RGB", (512, 512), (128, 128, 128))
    mixed = array(blend(view, np.array([[1.0, -1.0]])))
    (r, _, b), (r2, _, b2) = mixed[256, 10], mixed[256, -10]
    assert r > b + 50 and b2 > r2 + 50


def test_enlarging_never_invents_relevance_of_the_other_sign():
    large = upsample(spot(7, 7, 3, 3), (448, 448))
    assert large.min() == 0 and 0.9 < large.max() <= 1
    both = upsample(np.array([[1.0, 0.0, -1.0]]), (300, 100))
    assert both[0, :100].min() >= 0 and both[0, -100:].max() <= 0


def test_enlarging_a_constant_keeps_it():
    np.testing.assert_allclose(upsample(np.full((1, 1), -0.7), (50, 40)), -0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "size", "expected"),
    [
        ((28, 28), None, (448, 448)),
        ((32, 32), None, (448, 448)),
        ((227, 227), None, (448, 448)),
        ((1024, 512), None, (1024, 512)),
        ((1024, 512), 256, (256, 128)),
        ((28, 28), 100, (100, 100)),
        ((1, 1), None, (448, 448)),
        ((1, 1000), None, (96, 1000)),
        ((1000, 1), None, (1000, 96)),
        ((1000, 1), 50, (50, 50)),
    ],
)
def test_small_and_thin_photos_are_enlarged_to_be_seen(given, size, expected):
    assert enlarge(Image.new("RGB", given), size).size == expected


def test_the_pixels_of_tiny_photos_stay_sharp():
    tiny = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    np.testing.assert_array_equal(array(enlarge(tiny)), array(tiny).repeat(16, axis=0).repeat(16, axis=1))


HEATS = {
    "1x1": np.array([[2.0]]),
    "zeros": np.zeros((7, 7)),
    "constant": np.full((7, 7), 3.0),
    "negative": -np.ones((7, 7)) * np.arange(7),
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "tiny values": spot(7, 7, 3, 3, 1e-40),
    "huge values": spot(7, 7, 3, 3, 1e300),
    "larger than the photo": np.random.default_rng(0).random((600, 700)),
}


@pytest.mark.parametrize("kind", ["auto", "positive", "signed", "minmax"])
@pytest.mark.parametrize("heat", HEATS.values(), ids=HEATS)
def test_every_map_can_be_drawn_in_every_kind(heat, kind):
    figure = overlay(photo(64, 48), heat, caption=["name", "layer"], kind=kind)
    assert figure.mode == "RGB" and figure.width >= 320


def test_the_figure_holds_the_blended_photo_unchanged_on_white():
    view, heat = photo(500, 300), spot(7, 7, 3, 3)
    figure, plain = array(overlay(view, heat, caption="cat")), array(blend(view, heat))
    margin = int(np.argmax((figure != 255).any(axis=(1, 2))))
    np.testing.assert_array_equal(figure[margin : margin + 300, margin : margin + 500], plain)
    assert (figure[0] == 255).all() and (figure[-1] == 255).all()


def ink(figure, below):
    return (array(figure)[below:].min(axis=2) < 128).any(axis=1)


def test_captions_stand_below_one_under_the_other():
    view, heat = Image.new("RGB", (500, 300), "white"), np.zeros((7, 7))
    bare, one, two = (overlay(view, heat, caption=c) for c in ("", "first", ["first", "second"]))
    assert bare.height < one.height < two.height
    assert not ink(bare, 325).any() and ink(one, 325).any()
    assert ink(two, 325).sum() > ink(one, 325).sum()


def test_a_caption_never_runs_out_of_the_figure():
    words = ["word " * 100, "/backbone/stages.3/blocks.2/" * 20, "x" * 500]
    figure = array(overlay(Image.new("RGB", (500, 300), "white"), np.zeros((7, 7)), caption=words))
    assert (figure[:, :8] == 255).all() and (figure[:, -8:] == 255).all()


def test_characters_that_the_font_lacks_do_no_harm():
    overlay(photo(), np.zeros((2, 2)), caption=["Schäferhund 犬 ε z⁺ \u200d\n\ttab", ""])


def test_the_same_input_gives_the_same_bytes():
    heat = np.random.default_rng(1).normal(size=(7, 7))
    first, second = (overlay(photo(), heat, caption=["a", "b"]).tobytes() for _ in range(2))
    assert first == second


def test_the_photo_and_the_map_passed_in_are_left_alone():
    view, heat = photo(100, 50).convert("L"), np.eye(4)
    before = view.tobytes()
    overlay(view, heat)
    assert view.tobytes() == before and (heat == np.eye(4)).all()
