"""The result: drawn, saved, described."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from walking import network

from onnxcam.errors import UsageError
from onnxcam.model import load
from small_nets import classifier, resnet

RNG = np.random.default_rng(3)
PICTURES = [Image.fromarray(RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(3)]
LABELS = ["ant", "bee", "cat", "dog", "Größe / a:b"]


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def result():
    return load(resnet(), preprocess="unit", labels=LABELS).explain(PICTURES[:2], ["A2", "auto"], [1, 4])


def test_each_map_is_saved_raw_and_drawn(result, tmp_path):
    written = result.save(tmp_path / "out")
    names = {
        f"image-{i}/class-{c}-layer-{node}{end}"
        for i in (0, 1)
        for c in (1, 4)
        for node in ("A2", "A4")
        for end in (".npy", "-overlay.png")
    }
    assert set(files_in(tmp_path / "out")) == names | {"manifest.json"}
    assert {p.relative_to(tmp_path / "out").as_posix() for p in written} == names | {"manifest.json"}
    for i in (0, 1):
        for t, c in enumerate((1, 4)):
            saved = np.load(tmp_path / "out" / f"image-{i}" / f"class-{c}-layer-A4.npy")
            np.testing.assert_array_equal(saved, result.maps["auto"][i, t])
            assert saved.dtype == np.float32
            with Image.open(tmp_path / "out" / f"image-{i}" / f"class-{c}-layer-A4-overlay.png") as png:
                assert png.mode == "RGB"


def test_saving_twice_gives_the_same_files(result, tmp_path):
    result.save(tmp_path)
    first = files_in(tmp_path)
    result.save(tmp_path)
    assert files_in(tmp_path) == first


def test_raw_maps_can_be_saved_alone(result, tmp_path):
    result.save(tmp_path, overlays=False)
    assert not [name for name in files_in(tmp_path) if name.endswith(".png")]


def test_the_manifest_says_what_was_done(result, tmp_path):
    result.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    proto = resnet().SerializeToString(deterministic=True)
    assert manifest["schema_version"] == 1
    assert manifest["model"]["sha256"] == hashlib.sha256(proto).hexdigest()
    assert set(manifest["versions"]) >= {"onnxcam", "onnx", "onnxruntime", "numpy", "python"}
    assert manifest["options"]["method"] == "relevance-cam"
    assert manifest["options"]["targets"] == ["1", "4"]
    assert (manifest["preprocess"], manifest["preprocess_source"]) == ("unit", "asked for")
    assert manifest["layers"]["auto"]["tensor"] == "r4"
    assert manifest["conservation"]["largest_node_residual"] >= 0
    for i, image in enumerate(manifest["images"]):
        for t, target in enumerate(image["targets"]):
            assert target["label"] == LABELS[target["class"]]
            assert target["logit"] == pytest.approx(float(result.logits[i, target["class"]]))
            assert target["probability"] == pytest.approx(float(result.probabilities[i, target["class"]]))
            for name, entry in target["maps"].items():
                heat = np.load(tmp_path / entry["npy"])
                np.testing.assert_array_equal(heat, result.maps[name][i, t])
                assert (entry["min"], entry["max"]) == (heat.min(), heat.max())
                assert (tmp_path / entry["overlay"]).is_file()


def test_layers_of_one_node_get_files_of_their_own(tmp_path):
    """A convolution's output and its activation are two layers of one node."""
    e = load(resnet(), preprocess="unit").explain(PICTURES[0], ["C0", "c0", "n0", "0"], 1)
    e.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    maps = manifest["images"][0]["targets"][0]["maps"]
    for name in e.maps:
        np.testing.assert_array_equal(np.load(tmp_path / maps[name]["npy"]), e.maps[name][0, 0])
    assert len({maps[name]["npy"] for name in ("C0", "c0", "n0")}) == 3
    assert maps["0"]["npy"] == maps["C0"]["npy"]  # the same layer


def test_names_that_differ_in_capitals_only_get_files_of_their_own(tmp_path):
    """Windows and macOS tell no capitals apart."""
    proto = classifier("c = Conv(x, w8x3x3_0) r = Relu(c) d = Conv(r, w8x8x3_1) s = Relu(d)", "s#8")
    proto.graph.node[0].name, proto.graph.node[2].name = "conv/a", "Conv:A"
    written = load(proto, preprocess="unit").explain(PICTURES[0], ["conv/a", "Conv:A"], 1).save(tmp_path)
    assert len({p.name.lower() for p in written}) == len(written) == 5


def test_pictures_of_the_same_name_get_folders_of_their_own(tmp_path):
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "c" / "X.jpg", tmp_path / "d" / "x-2.png"]
    for path in paths:
        path.parent.mkdir()
        PICTURES[0].save(path)
    e = load(resnet(), preprocess="unit").explain(paths, targets=0)
    assert e.folders() == ["x", "x-2", "X-3", "x-2-2"]
    e.save(tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_an_interrupted_save_leaves_whole_files_and_no_manifest(result, tmp_path, monkeypatch):
    """Nor that of an earlier result, which would speak of other files."""
    result.save(tmp_path)
    drawn = iter(range(2))

    def interrupted(*_, **__):
        if next(drawn, None) is None:
            raise KeyboardInterrupt
        return PICTURES[0]

    monkeypatch.setattr(type(result), "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path)
    left = files_in(tmp_path)
    assert "manifest.json" not in left
    assert all(name.endswith((".npy", ".png")) for name in left)
    assert all(Path(name).name.startswith("class-") for name in left)


def test_a_place_below_a_file_is_refused(result, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot write to folder"):
        result.save(tmp_path / "file" / "out")


def test_a_constant_map_is_drawn_without_nan():
    """No weight leads to the class: relevance is zero, and so is the map; the picture stays as it is."""
    zero = network(
        "(float[N,3,16,16] x) => (float[N,2] y) { c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g)"
        " y = Gemm(f, v) }",
        w=np.ones((4, 3, 3, 3), np.float32),
        v=np.zeros((4, 2), np.float32),
    )
    e = load(zero, preprocess="unit").explain(PICTURES[0])
    assert not e.maps["auto"].any()
    assert np.asarray(e.overlay()).std() > 0


@pytest.mark.parametrize("kind", ["auto", "positive", "signed", "minmax"])
def test_an_overlay_can_be_drawn_in_each_kind(result, kind):
    assert result.overlay("A2", 1, 1, kind=kind).size[0] > 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("B2",), "there is no map of layer 'B2'; there is A2, auto"),
        (("A2", 2), "image 2, target 0: there are 2 and 2"),
        (("A2", 0, 5), "target 5"),
    ],
)
def test_an_overlay_of_what_is_not_there_is_refused(result, arguments, says):
    with pytest.raises(UsageError, match=says):
        result.overlay(*arguments)


def test_a_result_of_arrays_has_maps_but_no_pictures(tmp_path):
    e = load(resnet()).explain(np.zeros((2, 3, 16, 16), np.float32), targets=0)
    e.save(tmp_path)
    assert set(files_in(tmp_path)) == {f"array-{i}/class-0-layer-A4.npy" for i in (0, 1)} | {"manifest.json"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["preprocess"] is None
    with pytest.raises(UsageError, match="no picture to draw the map on"):
        e.overlay()


def test_a_result_prints_in_one_short_line(result):
    text = repr(result)
    assert len(text) < 200
    assert "A2 (2, 2, 16, 16)" in text


def test_captions_say_class_probability_layer_and_method(result):
    first, second = result.caption("auto", 0, 1)
    assert first.startswith("Größe / a:b  ")
    assert first.endswith("%")
    assert second == "layer A4 (8x8)  relevance-cam, relevance_cam, contrast"


def test_a_picture_whose_name_is_no_unicode_is_no_obstacle(tmp_path):
    """Linux file names are bytes; Python carries those that are no UTF-8 as lone surrogates."""
    e = load(resnet(), preprocess="unit").explain(PICTURES[0])
    e.pictures[0] = type(e.pictures[0])("caf\udce9.png", e.pictures[0].prepare)
    e.save(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["images"][0]["name"] == "caf\udce9.png"


def test_a_model_from_a_file_is_named_after_it(tmp_path):
    onnx.save(resnet(), tmp_path / "net.onnx")
    manifest = load(tmp_path / "net.onnx").explain(np.zeros((1, 3, 16, 16), np.float32)).manifest()
    assert manifest["model"]["name"] == "net.onnx"
    assert manifest["model"]["sha256"] == hashlib.sha256((tmp_path / "net.onnx").read_bytes()).hexdigest()
