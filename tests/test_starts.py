"""Starts against their formulas, written out entry by entry; and where the logits are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from walking import as_written, network

from onnxcam.errors import ModelError, UsageError
from onnxcam.heads import locate_logits
from onnxcam.starts import STARTS, softmax, start

LOGITS = np.array([[2.0, -1.0, 0.5, 0.0], [-3.0, 4.0, 1.0, 2.0]])
TARGETS = np.array([[0, 2], [1, 1]])  # (images, T)


def entries(name: str, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(T, N, K), one number at a time."""
    out = np.zeros((targets.shape[1], *logits.shape))
    for t, n, k in np.ndindex(out.shape):
        z, c, classes = logits[n], targets[n, t], logits.shape[1]
        p = [math.exp(v) / sum(math.exp(u) for u in z) for v in z]
        out[t, n, k] = {
            "one-hot": 1.0 if k == c else 0.0,
            "logit": z[k] if k == c else 0.0,
            "others": 0.0 if k == c else abs(z[k]),
            "contrast": 1.0 if k == c else -1 / classes,
            "centred": (1.0 if k == c else 0.0) - 1 / classes,
            "softmax-gradient": p[c] * (1 - p[c]) if k == c else -p[c] * p[k],
        }[name]
    return out


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_its_formula_for_every_image_and_target(name: str) -> None:
    """Tolerance: rounding of float64."""
    got = STARTS[name](LOGITS.astype(np.float32), TARGETS)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, entries(name, LOGITS, TARGETS), rtol=1e-14, atol=1e-16)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(list(STARTS)), st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(0, 99))
def test_a_start_has_the_shape_of_targets_by_images_by_classes(name: str, t: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, targets = rng.standard_normal((n, k)), rng.integers(0, k, (n, t))
    np.testing.assert_allclose(STARTS[name](logits, targets), entries(name, logits, targets), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "size"),
    [("one-hot", 1.0), ("logit", -1.5), ("contrast", 1.0), ("centred", 1.0), ("softmax-gradient", 0.14914645207)],
)
def test_a_single_logit_speaks_for_class_one_and_negated_for_class_zero(name: str, size: float) -> None:
    """The gradient is that of the sigmoid, p (1 - p), at a logit of -1.5; ten digits of it are given."""
    got = STARTS[name](np.array([[-1.5], [-1.5]]), np.array([[1], [0]]))
    np.testing.assert_allclose(got, [[[size], [-size]]], rtol=1e-10)


def test_the_contrast_sums_to_one_over_the_number_of_classes() -> None:
    np.testing.assert_allclose(STARTS["contrast"](LOGITS, TARGETS).sum(-1), 1 / 4, rtol=1e-14)


def test_the_softmax_gradient_is_the_slope_of_the_probability() -> None:
    """Oracle: central differences, whose error is about 1e-10 at a step of 1e-5."""
    got, step = STARTS["softmax-gradient"](LOGITS, TARGETS), 1e-5
    for n, k in np.ndindex(LOGITS.shape):
        moved = np.zeros_like(LOGITS)
        moved[n, k] = step
        slope = (softmax(LOGITS + moved) - softmax(LOGITS - moved))[n] / (2 * step)
        np.testing.assert_allclose(got[:, n, k], slope[TARGETS[n]], atol=1e-8)


def test_huge_logits_overflow_no_start() -> None:
    for name in STARTS:
        assert np.isfinite(STARTS[name](np.array([[1e4, -1e4, 0.0]]), np.array([[0]]))).all(), name


def test_a_start_is_found_by_name_with_dashes_or_underscores_and_passes_through_itself() -> None:
    assert start("softmax_gradient") is STARTS["softmax-gradient"]
    assert start(STARTS["contrast"]) is STARTS["contrast"]


def test_an_unknown_start_names_the_nearest_and_all_there_are() -> None:
    with pytest.raises(UsageError, match=r"did you mean contrast.*one-hot") as error:
        start("contrsat")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tail", "squash"),
    [
        ("y = Identity(z)", None),
        ("y = Softmax(z)", "Softmax"),
        ("y = LogSoftmax<axis=1>(z)", "LogSoftmax"),
        ("y = Sigmoid(z)", "Sigmoid"),
        ("p = Softmax(z) y = Cast<to=1>(p)", "Softmax"),
        ("p = Softmax(z) q = Flatten(p) y = Identity(q)", "Softmax"),
    ],
)
def test_logits_lie_before_what_squashes_them(tail: str, squash: str | None) -> None:
    graph = as_written(
        network(f"(float[1,3] x) => (float y) {{ z = MatMul(x, w) {tail} }}", w=np.eye(3, dtype=np.float32))
    )
    logits, found = locate_logits(graph, "y")
    assert found == squash
    assert logits == ("z" if squash else "y")


def test_layout_between_the_logits_and_their_softmax_is_not_skipped() -> None:
    """The softmax runs over what the Flatten made, and that is the tensor whose last axis holds the classes."""
    graph = as_written(
        network(
            "(float[1,3,1,1] x) => (float y) { z = Conv(x, w) f = Flatten(z) y = Softmax(f) }",
            w=np.ones((4, 3, 1, 1), np.float32),
        )
    )
    assert locate_logits(graph, "y") == ("f", "Softmax")


def test_an_output_that_nothing_computes_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to explain"):
        locate_logits(as_written(network("(float[1,3] x) => (float[1,3] x) { y = Relu(x) }")), "x")
