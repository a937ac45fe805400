"""Resize and Upsample in every mode (spec 3.7).

Oracle for values: ONNX Runtime in float32, 1e-5, as its coordinates carry 1e-6. Oracle for the product: the adjoint
identity in float64, 1e-10.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcam.operators.resize import Sampling, average_of, matrix
from tests.operators.single_node import Single, agree, build, check_adjoint, check_map, cotangents, runtime
from tests.operators.test_linear import normal

TRANSFORMATIONS = (
    *("half_pixel", "asymmetric", "align_corners"),
    *("pytorch_half_pixel", "half_pixel_symmetric", "tf_crop_and_resize"),
)
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
TARGETS = (
    *(("sizes", 10, 14), ("sizes", 4, 5), ("sizes", 1, 3), ("sizes", 3, 2)),
    *(("scales", 0.6, 1.7), ("scales", 2, 3)),
    ("scales", 1.1, 2),  # an axis of the same size that is resampled all the same, without antialias
    ("scales", 1.1, 1.05),  # a shape that stays: ONNX Runtime copies
)
SHAPES = ((5, 7), (6, 6), (9, 8))
ROI = np.array([0.1, -0.2, 0.8, 1.1], np.float32)


def resized(shape: tuple[int, ...], target: tuple[Any, ...], **attributes: Any) -> tuple[Any, Any]:
    """Resize of the last two axes of a normal tensor, by sizes or scales."""
    what, *factors = target
    full = [2, 3, *factors] if what == "sizes" else [1, 1, *factors]
    crop = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    roi = np.concatenate([[0, 0], ROI[:2], [1, 1], ROI[2:]]).astype(np.float32) if crop else None
    scales = np.array(full, np.float32) if what == "scales" else None
    sizes = np.array(full, np.int64) if what == "sizes" else None
    inputs = [normal(2, 3, *shape), roi, scales, sizes]
    return build("Resize", inputs, [i for i in (1, 2, 3) if inputs[i] is not None], opset=19, **attributes)


def check_signed(model: Any, feeds: Any) -> None:
    """Cubic: the gradient is the adjoint of the exact map; what relevance is shared by is a non-negative average."""
    y = runtime(model, feeds)[0].astype(np.float64)
    single = Single(model, feeds, [y])
    u = cotangents(y.shape)
    back = single.back({"o0": u})["i0"]
    x = feeds["i0"].astype(np.float64)
    scale = np.linalg.norm(x) * np.linalg.norm(back)
    assert np.abs((y * u).reshape(2, -1).sum(1) - (back * x).reshape(2, -1).sum(1)).max() <= 1e-5 * scale
    linear = single.operator.bind(single.at)
    assert (linear.apply(np.abs(x), None) >= 0).all()
    forward, backward = linear.apply(x, None), linear.adjoint(u, None)
    assert np.abs((forward * u).reshape(2, -1).sum(1) - (backward * x).reshape(2, -1).sum(1)).max() <= 1e-10 * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_nearest(shape: tuple[int, int], target: tuple[Any, ...], rounding: str, transformation: str) -> None:
    mode = {"coordinate_transformation_mode": transformation, "nearest_mode": rounding}
    check_map(*resized(shape, target, mode="nearest", **mode))


@pytest.mark.parametrize("antialias, exclude_outside", [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_linear(
    shape: tuple[int, int], target: tuple[Any, ...], transformation: str, antialias: int, exclude_outside: int
) -> None:
    mode = {"antialias": antialias, "exclude_outside": exclude_outside}
    check_map(*resized(shape, target, mode="linear", coordinate_transformation_mode=transformation, **mode))


@pytest.mark.parametrize("antialias, exclude_outside, a", [(0, 0, -0.75), (0, 1, -0.5), (1, 0, -0.5), (1, 1, -0.75)])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_cubic(target: tuple[Any, ...], transformation: str, antialias: int, exclude_outside: int, a: float) -> None:
    mode = {"antialias": antialias, "exclude_outside": exclude_outside, "cubic_coeff_a": a}
    check_signed(*resized((5, 7), target, mode="cubic", coordinate_transformation_mode=transformation, **mode))


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_the_opsets_since_11_share_their_defaults(opset: int) -> None:
    inputs = [normal(1, 2, 4, 5), np.zeros(0, np.float32), np.array([1, 1, 2, 1.5], np.float32)]
    check_map(*build("Resize", inputs, (1, 2), opset=opset, mode="linear"))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_the_transformation_that_opset_13_dropped(mode: str) -> None:
    inputs = [normal(1, 2, 4, 5), np.zeros(0, np.float32), np.array([1, 1, 2, 1.5], np.float32)]
    check_map(
        *build("Resize", inputs, (1, 2), opset=11, mode=mode, coordinate_transformation_mode="tf_half_pixel_for_nn")
    )


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(2, 2), (3, 1.5), (0.5, 0.7), (1, 2.5)])
@pytest.mark.parametrize("opset", [7, 9, 10])
def test_upsample_and_the_first_resize(mode: str, scales: tuple[float, float], opset: int) -> None:
    factors = [1.0, 1.0, *scales]
    if opset < 10 and min(scales) < 1:
        pytest.skip("Upsample does not shrink")
    x = normal(1, 2, 6, 5)
    if opset == 7:
        model, feeds = build("Upsample", [x], opset=7, mode=mode, scales=factors)
    else:
        op = "Upsample" if opset == 9 else "Resize"
        model, feeds = build(op, [x, np.array(factors, np.float32)], (1,), opset=opset, mode=mode)
    check_map(model, feeds)


@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1, -2], [3]])
@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_sizes_of_some_axes_only(axes: list[int], policy: str) -> None:
    inputs = [normal(1, 2, 5, 7), None, None, np.array([9, 8][: len(axes)], np.int64)]
    mode = {"axes": axes, "keep_aspect_ratio_policy": policy}
    if min(axes) < 0:  # ONNX Runtime takes non-negative axes only: compare with them
        single = [
            Single(*build("Resize", inputs, (3,), opset=19, mode="linear", **(mode | {"axes": a})), [y])  # type: ignore[arg-type]
            for y in runtime(*build("Resize", inputs, (3,), opset=19, mode="linear", **(mode | {"axes": [3, 2]})))
            for a in (axes, [3, 2])
        ]
        u = cotangents(single[0].at.output_shape())
        assert np.array_equal(single[0].back({"o0": u})["i0"], single[1].back({"o0": u})["i0"])
    else:
        check_map(*build("Resize", inputs, (3,), opset=19, mode="linear", **mode))


@pytest.mark.parametrize("shape, scales", [((2, 3, 4), (1, 2, 3)), ((1, 2, 3, 4, 5), (1, 1, 2, 1.5, 0.6))])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_other_ranks(shape: tuple[int, ...], scales: tuple[float, ...], mode: str) -> None:
    check_map(*build("Resize", [normal(*shape), None, np.array(scales, np.float32)], (2,), mode=mode))


def test_scales_and_sizes_may_be_computed_in_the_graph() -> None:
    for inputs in (
        [normal(1, 1, 4, 5), None, np.array([1, 1, 2, 3], np.float32)],
        [normal(1, 1, 4, 5), None, None, np.array([1, 1, 7, 3], np.int64)],
    ):
        model, feeds = build("Resize", inputs, (), opset=19, mode="linear")
        y = runtime(model, feeds)[0].astype(np.float64)
        single = Single(model, feeds, [y])
        z = single.operator.bind(single.at).apply(feeds["i0"].astype(np.float64), None)
        agree(z, y, 1e-5)
        check_adjoint(single, {"o0": z}, {"i0": feeds["i0"]})


def test_a_cell_outside_the_crop_hands_nothing_down() -> None:
    sampling = Sampling("linear", "tf_crop_and_resize")
    rows = matrix(sampling, 5, 6, 1.2, (-0.5, 1.0)).sum(1)
    assert rows.tolist() == pytest.approx([0, 0, 1, 1, 1, 1])


def test_cubic_relevance_is_conserved_and_stays_within_the_reach_of_a_cell() -> None:
    """z-plus on the plain adjoint of a signed map could divide by a vanishing sum; shares of an average cannot."""
    rng = np.random.default_rng(0)
    a = average_of(matrix(Sampling("cubic"), 6, 13, 13 / 6))
    assert (a >= 0).all() and np.allclose(a.sum(1), 1)
    inputs = [np.abs(rng.standard_normal((1, 1, 6, 6))).astype(np.float32), None, None, np.array([1, 1, 13, 13])]
    model, feeds = build("Resize", inputs, (3,), opset=19, mode="cubic")
    u = cotangents((1, 1, 13, 13))
    single = Single(model, feeds, runtime(model, feeds))
    back = single.back({"o0": u}, "relevance_cam")["i0"]
    agree(back.reshape(2, -1).sum(1), u.reshape(2, -1).sum(1), 1e-12)
    assert np.abs(back).sum() <= np.abs(u).sum() * (1 + 1e-12)
