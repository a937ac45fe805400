"""Explaining from Python: what goes in, what comes out, and that neither batches nor sizes nor layouts change a map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from walking import network

import onnxcam
from onnxcam.errors import ModelError, OnnxcamError, UsageError
from onnxcam.model import load
from small_nets import NETS, classifier, mobilenet, resnet, silu
from test_taps import in_the_file

RNG = np.random.default_rng(2)
X = RNG.normal(size=(3, 3, 16, 16)).astype(np.float32)
WEIGHTS = {"w": RNG.normal(size=(4, 3, 3, 3)).astype(np.float32), "v": RNG.normal(size=(4, 5)).astype(np.float32)}
FEATURES = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c)"
POOLED = f"{FEATURES} g = GlobalAveragePool(r) f = Flatten(g)"
PICTURE = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8))


def plain(
    shape: str = "N,3,16,16", tail: str = "y = Gemm(f, v)", out: str = "N,5", **weights: np.ndarray
) -> onnx.ModelProto:
    return network(f"(float[{shape}] x) => (float[{out}] y) {{ {POOLED} {tail} }}", **WEIGHTS | weights)


def plain_text(body: str, out: str = "float[N,5]", **weights: np.ndarray) -> onnx.ModelProto:
    return network(f"(float[N,3,16,16] x) => ({out} y) {{ {body} }}", **WEIGHTS | weights)


def close(ours: np.ndarray, reference: np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest value: float32 sums in another order differ by less than 1e-5."""
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * np.abs(reference).max())


# -- one oracle by hand ----------------------------------------------------------------------------------------------


def test_the_map_before_the_head_is_what_the_formula_says():
    """Contrast start, z-plus through the dense layer and the average, weights times activation: written out."""
    proto = plain()
    a, logits = (v.astype(np.float64) for v in in_the_file(proto, ["r", "y"], X[:1]))
    pooled, positive = a.mean((2, 3))[0], np.maximum(WEIGHTS["v"], 0).astype(np.float64)
    start = np.full(5, -1 / 5)
    start[logits.argmax()] = 1
    shares = pooled[:, None] * positive
    relevance = (shares / shares.sum(0)) @ start  # of each pooled channel
    expected = (relevance / a[0, 0].size) @ a[0].reshape(4, -1)
    close(load(proto).explain(X[:1]).maps["auto"], expected.reshape(1, 1, 16, 16))


# -- what goes in ----------------------------------------------------------------------------------------------------


def test_a_path_a_picture_and_lists_of_them_are_explained_alike(tmp_path):
    path = tmp_path / "a.png"
    PICTURE.save(path)
    model = load(resnet(), preprocess="unit")
    reference = model.explain(str(path))
    for images in (path, PICTURE, [path], (str(path),), [PICTURE]):
        np.testing.assert_array_equal(model.explain(images).maps["auto"], reference.maps["auto"])
    assert model.explain([path, PICTURE]).maps["auto"].shape == (2, 1, 8, 8)
    assert reference.pictures[0].name == str(path)
    assert model.explain(PICTURE).pictures[0].name == "image-0"


def test_an_array_is_the_input_as_it_is_and_stays_as_it_is():
    before = X.copy()
    e = load(resnet()).explain(X)
    np.testing.assert_array_equal(X, before)
    close(e.logits, in_the_file(resnet(), ["y"], X)[0])
    assert e.options["preprocess"] is None
    assert e.warnings == []  # nothing about preprocessing that did not happen


def test_an_array_of_another_number_type_is_converted():
    whole = np.random.default_rng(0).integers(0, 255, X.shape)
    model = load(resnet())
    reference = model.explain(whole.astype(np.float32)).maps["auto"]
    for dtype in (np.uint8, np.float64, np.int64):
        np.testing.assert_array_equal(model.explain(whole.astype(dtype)).maps["auto"], reference)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (X[0], r"shape \(3, 16, 16\), but input 'x' wants \(N, 3, 16, 16\)"),
        (X[:, :2], "wants"),
        (X[:, :, :15], "wants"),
        (X[:0], "holds no image"),
        (X.astype(complex), "holds complex128"),
        (X.astype(str), "holds <U"),
        ([], "no picture"),
        ([X], "ndarray is no picture: give paths, PIL pictures, or one array"),
        (None, r"input 'x' \(N, 3, 16, 16\) is missing; give pictures, or an array by --input x=FILE.npy"),
        (3, "pictures: 3"),
        ("nowhere.png", "no such picture"),
    ],
)
def test_what_is_no_input_is_refused_in_words(images, says):
    with pytest.raises(UsageError, match=says):
        load(resnet()).explain(images)


def test_an_input_that_makes_the_logits_overflow_is_refused():
    with pytest.raises(ModelError, match="not finite on this input: check the preprocessing"):
        load(resnet()).explain(np.full_like(X, np.nan))


@pytest.mark.parametrize(
    "options",
    [
        {"layers": []},
        {"layers": None},
        {"layers": 2.5},
        {"targets": []},
        {"targets": 2.5},
        {"batch_size": 0},
        {"dtype": "float16"},
        {"engine": "abacus"},
        {"method": "grad-camm"},
        {"composite": "epsilon"},
        {"start": "logits"},
        {"providers": ["cuda-like"]},
    ],
)
def test_options_that_make_no_sense_are_the_users_mistake(options):
    with pytest.raises(UsageError):
        load(resnet()).explain(X, **options)


def test_names_near_one_that_exists_are_offered():
    model = load(resnet())
    for options, hint in (
        ({"method": "relevance-cams"}, "relevance-cam"),
        ({"composite": "epsilon_pluss"}, "epsilon_plus"),
        ({"start": "contrasts"}, "contrast"),
    ):
        with pytest.raises(UsageError, match=f"did you mean {hint}"):
            model.explain(X, **options)


def test_a_provider_may_be_named_by_itself():
    assert load(resnet()).explain(X, providers="cpu").options["providers"] == ["CPUExecutionProvider"]


# -- what comes out --------------------------------------------------------------------------------------------------


def test_maps_have_an_axis_for_images_and_one_for_targets():
    e = load(resnet()).explain(X, ["A2", "A4"], [0, "top2"])
    assert {name: heat.shape[2:] for name, heat in e.maps.items()} == {"A2": (16, 16), "A4": (8, 8)}
    assert all(heat.shape[:2] == e.targets.shape and heat.dtype == np.float32 for heat in e.maps.values())


@pytest.mark.parametrize("net", NETS)
def test_a_batch_of_two_equals_two_of_one(net):
    model = load(NETS[net]())
    both = model.explain(X[:2], "suggested", 1)
    for i in (0, 1):
        alone = model.explain(X[i : i + 1], "suggested", 1)
        for name in both.maps:
            close(both.maps[name][i], alone.maps[name][0])


def test_chunks_of_any_size_give_the_same_maps():
    model = load(resnet())
    whole = model.explain(X, ["A2"], batch_size=8)
    for size in (1, 2):
        parts = model.explain(X, ["A2"], batch_size=size)
        close(parts.maps["A2"], whole.maps["A2"])
        np.testing.assert_array_equal(parts.targets, whole.targets)
        assert parts.conservation.start.shape == whole.conservation.start.shape == (3, 1)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_file_with_a_fixed_batch_takes_any_number_of_images(batch):
    fixed, free = plain(f"{batch},3,16,16", out=f"{batch},5"), plain()
    ours, reference = load(fixed).explain(X, targets=1), load(free).explain(X, targets=1)
    assert ours.logits.shape == (3, 5)
    close(ours.maps["auto"], reference.maps["auto"])


def test_several_targets_and_layers_give_what_each_gives_alone():
    """One walk serves all: nothing of one may leak into another."""
    model = load(mobilenet())
    together = model.explain(X, "suggested", [0, 3])
    for t, target in enumerate((0, 3)):
        for name in together.maps:
            alone = model.explain(X, name, target)
            close(together.maps[name][:, t], alone.maps[name][:, 0])


@pytest.mark.parametrize("net", NETS)
def test_float64_and_float32_agree(net):
    """Oracle: the reference evaluator and float64 arithmetic. z-plus has no cancellation, so 1e-4 is generous."""
    model = load(NETS[net]())
    single, double = (model.explain(X[:1], "suggested", 1, dtype=d, engine="numpy") for d in ("float32", "float64"))
    for name in single.maps:
        close(single.maps[name], double.maps[name], 1e-4)


@pytest.mark.parametrize("net", NETS)
def test_only_maps_without_a_positive_contribution_drop_relevance(net):
    """z-plus ignores the bias, so a linear map or an average drops a unit whose contributions are all negative; every
    other node hands on what it received, to rounding."""
    conservation = load(NETS[net]()).explain(X, "suggested", 1).conservation
    may_drop = {"Conv", "ConvTranspose", "Gemm", "BatchNormalization", "AveragePool", "GlobalAveragePool"}
    assert conservation.residual is not None
    assert {node.op_type for node, share in conservation.dropped() if share > 1e-6} <= may_drop


def test_the_gradient_reports_no_conservation():
    assert load(resnet()).explain(X, composite="gradient").conservation.residual is None


def test_asking_twice_gives_the_same():
    model = load(resnet())
    first, second = model.explain(X), model.explain(X)
    np.testing.assert_array_equal(first.maps["auto"], second.maps["auto"])


# -- inputs and outputs of other shapes ------------------------------------------------------------------------------


def test_open_sizes_are_explained_at_each():
    model = load(plain("N,3,H,W"))
    for size in ((16, 16), (20, 12)):
        assert model.explain(np.ones((1, 3, *size), np.float32)).maps["auto"].shape[2:] == size
    close(model.explain(X).maps["auto"], load(plain()).explain(X).maps["auto"])
    assert model.explain(PICTURE).maps["auto"].shape[2:] == (224, 224)


def test_pictures_of_different_sizes_need_one_size():
    model = load(plain("N,3,H,W"), preprocess="none")
    with pytest.raises(UsageError, match="different sizes"):
        model.explain([PICTURE, PICTURE.resize((32, 32))])


def test_channels_last_input_gives_the_maps_of_channels_first():
    last = network(
        f"(float[N,16,16,3] t) => (float[N,5] y) {{ x = Transpose<perm=[0,3,1,2]>(t) {POOLED} y = Gemm(f, v) }}",
        **WEIGHTS,
    )
    model = load(last, preprocess="unit")
    assert model.spec.layout == "NHWC"
    close(model.explain(X.transpose(0, 2, 3, 1)).maps["auto"], load(plain()).explain(X).maps["auto"])
    close(model.explain(PICTURE).maps["auto"], load(plain(), preprocess="unit").explain(PICTURE).maps["auto"])
    first = load(plain()).explain(X, "x", composite="gradient").maps["x"]
    close(model.explain(X.transpose(0, 2, 3, 1), "t", composite="gradient").maps["t"], first)


@pytest.mark.parametrize("sizes", [(20,), (6, 7, 8)])
def test_signals_and_volumes_are_explained_through_arrays(sizes):
    rng = np.random.default_rng(0)
    shape = ",".join(map(str, ("N", 2, *sizes)))
    weights = {"w": rng.normal(size=(4, 2, *(3,) * len(sizes))).astype(np.float32), "v": WEIGHTS["v"]}
    body = "c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) y = Gemm(f, v)"
    model = load(network(f"(float[{shape}] x) => (float[N,5] y) {{ {body} }}", **weights))
    e = model.explain(rng.normal(size=(2, 2, *sizes)).astype(np.float32), ["auto", "x"])
    assert e.maps["auto"].shape == (2, 1, *(n - 2 for n in sizes))
    assert e.maps["x"].shape == (2, 1, *sizes)
    with pytest.raises(UsageError, match="dimensions; an image needs 4"):
        model.explain(PICTURE)
    with pytest.raises(UsageError, match="no picture to draw the map on"):
        e.overlay()


def test_one_logit_speaks_for_two_classes():
    """For class 0 the evidence is that against class 1."""
    proto = plain(tail="y = Gemm(f, u)", out="N,1", u=WEIGHTS["v"][:, :1])
    e = load(proto).explain(X, targets=[0, 1])
    np.testing.assert_array_equal(e.targets, [[0, 1]] * 3)
    close(e.maps["auto"][:, 0], -e.maps["auto"][:, 1])
    for i in range(3):
        assert e.probability(i, 0) + e.probability(i, 1) == pytest.approx(1)
        assert e.logit(i, 0) == -e.logit(i, 1)
    predicted = load(proto).explain(X).targets[:, 0]
    np.testing.assert_array_equal(predicted, (e.logits[:, 0] > 0).astype(int))


@pytest.mark.parametrize(
    ("tail", "out"),
    [
        ("z = Gemm(f, v) y = Softmax<axis=1>(z)", "N,5"),
        ("z = Gemm(f, v) y = Sigmoid(z)", "N,5"),
        ("z = Gemm(f, v) i = Identity(z) s = Softmax<axis=-1>(i) y = Identity(s)", "N,5"),
        ("z = Gemm(f, v) y = LogSoftmax<axis=1>(z)", "N,5"),
    ],
)
def test_a_model_that_ends_in_probabilities_is_explained_from_its_logits(tail, out):
    ours, reference = load(plain(tail=tail, out=out)).explain(X), load(plain()).explain(X)
    close(ours.logits, reference.logits)
    close(ours.maps["auto"], reference.maps["auto"])
    expected = in_the_file(plain(tail=tail, out=out), ["y"], X)[0]
    close(ours.probabilities, np.exp(expected) if "Log" in tail else expected)


def test_logits_may_keep_axes_of_length_one():
    body = f"{FEATURES} d = Conv(r, k) y = GlobalAveragePool(d)"
    kernel = WEIGHTS["v"].T.reshape(5, 4, 1, 1).copy()
    proto = network(f"(float[N,3,16,16] x) => (float[N,5,1,1] y) {{ {body} }}", w=WEIGHTS["w"], k=kernel)
    e = load(proto).explain(X)
    close(e.logits, load(plain()).explain(X).logits)
    assert e.maps["auto"].shape == (3, 1, 16, 16)


# -- what cannot be explained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "out", "says"),
    [
        (
            FEATURES.replace("r =", "y ="),
            "float[N,4,16,16]",
            r"'y'\) has shape \(N, 4, 16, 16\): onnxcam explains class",
        ),
        (
            f"{FEATURES} y = ArgMax<axis=1>(r)",
            "int64[N,1,16,16]",
            r"are int64, not floats \(ArgMax of \(N, 4, 16, 16\)",
        ),
        (f"{POOLED} z = Gemm(f, v) y = NonZero(z)", "int64[2,K]", "are int64, not floats"),
        (f"{FEATURES} d = Det(r) y = Gemm(d, v)", "float[N,5]", "node 'Det_0': no operator for Det at opset 17"),
    ],
)
def test_a_model_that_cannot_be_explained_says_why(body, out, says):
    with pytest.raises(ModelError, match=says) as caught:
        load(plain_text(body, out)).explain(X)
    assert caught.value.exit_code == 3


def test_an_op_without_an_operator_matters_only_where_relevance_reaches_it():
    body = f"n = Det(x) m = Reshape(n, shape) z = Mul(x, m) {POOLED.replace('(x, w)', '(z, w)')} y = Gemm(f, v)"
    model = load(plain_text(body, shape=np.array([-1, 3, 1, 1])))
    assert model.explain(X, "r").maps["r"].shape == (3, 1, 16, 16)
    with pytest.raises(ModelError, match="no operator for Det"):
        model.explain(X, "x", composite="gradient")


# -- warnings --------------------------------------------------------------------------------------------------------


def test_a_signed_layer_is_warned_about_with_a_better_one():
    model = load(resnet())
    (warning,) = model.explain(X, "C4").warnings
    assert warning.startswith("layer C4 can be negative")
    assert "--layer C3 at the same resolution cannot be" in warning
    assert model.explain(X, "C4", method="lrp").warnings == []  # it weighs no channels
    assert model.explain(X, "A4").warnings == []
    assert load(silu()).explain(X, "C1").warnings == []


def test_a_guess_about_preprocessing_is_said_aloud():
    (warning,) = load(resnet()).explain(PICTURE).warnings
    assert "guessed imagenet" in warning
    assert "--preprocess" in warning
    assert load(resnet(), preprocess="imagenet").explain(PICTURE).warnings == []


def test_progress_counts_images():
    seen: list[tuple[int, int]] = []
    load(resnet()).explain(X, batch_size=2, progress=lambda *at: seen.append(at))
    assert seen == [(2, 3), (3, 3)]


def test_every_deliberate_error_is_one_line_of_one_kind():
    for broken in ({"layers": "x y z"}, {"targets": "no such"}, {"method": "?"}):
        with pytest.raises(OnnxcamError) as caught:
            onnxcam.load(resnet()).explain(X, **broken)
        assert "\n" not in str(caught.value)


def test_the_shipped_model_knows_its_picture(shipped_model: Path, chelsea: Path):
    e = onnxcam.load(shipped_model).explain(chelsea, targets=["predicted", "top3"])
    assert "cat" in e.label(0, 0)
    assert e.targets.shape == (1, 3)
    assert e.maps["auto"].shape == (1, 3, 7, 7)
    assert e.warnings == []


def test_a_map_is_the_same_by_any_way_to_name_its_layer():
    model = load(classifier("c = Conv(x, w8x3x3_0) r = Relu(c)", "r#8"))
    e = model.explain(X, ["C", "r", "-1", "0", "auto", "Conv_0"])
    for heat in e.maps.values():
        np.testing.assert_array_equal(heat, e.maps["r"])


def test_labels_that_do_not_number_as_many_as_the_classes_are_said_to_be_wrong():
    model = load(resnet(), preprocess="none", labels=["a", "b"])
    e = model.explain(np.zeros((1, 3, 16, 16), np.float32))
    assert any("the labels name 2 classes and the model has 5" in w for w in e.warnings)


def test_the_authors_rules_come_with_a_warning_where_batch_normalization_was_not_kept():
    x = np.zeros((1, 3, 16, 16), np.float32)
    kept, folded = load(resnet(), preprocess="none"), load(mobilenet(), preprocess="none")

    def said(model, composite):
        return any("keep their BatchNormalization" in w for w in model.explain(x, composite=composite).warnings)

    assert said(folded, "relevance_cam_authors")
    assert not said(kept, "relevance_cam_authors") and not said(folded, "relevance_cam")
