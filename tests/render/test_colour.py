"""Colours say the size and the sign of relevance, and nothing else."""

import numpy as np
import pytest

from onnxcam.errors import UsageError
from onnxcam.render.colour import POSITIVE, colours, normalise


def lightness(rgb):
    """CIE L* of sRGB 0..255."""
    linear = np.where(rgb <= 10.31475, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_positive_is_matplotlibs_inferno_up_to_its_pale_end():
    matplotlib = pytest.importorskip("matplotlib")
    at = np.linspace(0, 0.88, 200)
    table = np.array(matplotlib.colormaps["inferno"].colors) * 255
    want = np.stack([np.interp(at * 255, np.arange(256), table[:, c]) for c in range(3)], axis=1)
    assert np.abs(colours(at / 0.88, "positive") - want).max() <= 2


def test_positive_gets_lighter_all_the_way_at_an_even_pace():
    steps = np.diff(lightness(colours(np.linspace(0, 1, 12), "positive")))
    assert (steps > 0).all() and steps[1:].max() < 1.4 * steps[1:].min()  # L* is no measure next to black


def test_signed_is_white_at_exactly_zero_and_equally_strong_on_both_sides():
    values = np.linspace(0, 1, 41)
    red, blue = colours(values, "signed"), colours(-values, "signed")
    assert red[0].tolist() == blue[0].tolist() == [255, 255, 255]
    assert (np.diff(lightness(red)) < 0).all() and (np.diff(lightness(blue)) < 0).all()
    assert np.abs(lightness(red) - lightness(blue)).max() < 5
    assert red[-1, 0] > 150 > red[-1, 2] and blue[-1, 2] > 150 > blue[-1, 0]


def test_colours_hit_their_table_at_both_ends():
    assert colours(np.array([0.0, 1.0]), "positive").tolist() == [POSITIVE[0].tolist(), POSITIVE[-1].tolist()]


@pytest.mark.parametrize(
    ("heat", "kind"),
    [
        ([0, 1, 2], "positive"),
        ([-0.05, 1], "positive"),
        ([-0.2, 1], "signed"),
        ([-1, 0.5], "signed"),
        ([-3, -2], "signed"),
        ([0, 0], "positive"),
    ],
)
def test_a_map_is_signed_where_its_negative_part_can_be_seen(heat, kind):
    assert normalise(np.array(heat)).kind == kind


@pytest.mark.parametrize(
    ("kind", "values", "vmin", "vmax"),
    [
        ("positive", [0, 0.25, 1], 0, 4),
        ("signed", [-0.5, 0.25, 1], -4, 4),
        ("minmax", [0, 0.5, 1], -2, 4),
    ],
)
def test_each_kind_scales_by_its_own_ends(kind, values, vmin, vmax):
    scaled = normalise(np.array([-2.0, 1.0, 4.0]), kind)
    np.testing.assert_allclose(scaled.values, values)
    assert (scaled.vmin, scaled.vmax, scaled.kind, scaled.beyond) == (vmin, vmax, kind, False)


@pytest.mark.parametrize("kind", ["auto", "positive", "signed", "minmax"])
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -3.0, 5e-324, 1e308])
def test_constant_maps_never_give_nan(kind, value):
    scaled = normalise(np.full((3, 4), value, np.float64), kind)
    assert np.isfinite(scaled.values).all() and np.abs(scaled.values).max() <= 1
    assert len(np.unique(scaled.values)) == 1
    if value == 0 or kind == "minmax":
        assert not scaled.values.any()


def test_a_negative_map_drawn_as_positive_is_empty():
    scaled = normalise(np.array([-3.0, -1.0]), "positive")
    assert scaled.values.tolist() == [0, 0] and (scaled.vmin, scaled.vmax) == (0, 0)


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1.0, 1e30])
def test_the_size_of_the_values_does_not_matter(factor):
    heat = np.random.default_rng(0).normal(size=(5, 5))
    np.testing.assert_allclose(normalise(heat * factor).values, normalise(heat).values, rtol=1e-12)


def test_a_percentile_keeps_one_extreme_point_from_hiding_the_rest():
    heat = np.append(np.linspace(0, 1, 999), 1000.0)
    scaled = normalise(heat, percentile=99)
    assert 0.9 < scaled.vmax < 1.1 and scaled.beyond and scaled.values.max() == 1


def test_a_percentile_does_not_wipe_out_a_map_of_mostly_zeros():
    heat = np.zeros(1000)
    heat[3] = 2
    assert normalise(heat, percentile=99).vmax == 2


def test_the_map_passed_in_is_left_alone():
    heat = np.array([[-1.0, 2.0]])
    normalise(heat)
    assert heat.tolist() == [[-1, 2]]


def test_an_unknown_kind_lists_the_kinds():
    with pytest.raises(UsageError, match="auto, positive, signed, minmax"):
        normalise(np.ones(3), "jet")  # type: ignore[arg-type]
