"""`audit`: agreement of maps against SciPy and scikit-image, layers matched, planted drifts found, what is written.

Oracles: SciPy's spearmanr and binomial distribution; arrays made by hand; maps of `Model.explain`; Chromium for the
page, where it is installed.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from scipy import stats

import onnxcam
from onnxcam.audit import audit, findings, matched, run
from onnxcam.audit.drift import Drift, drift, parted_at
from onnxcam.audit.verdict import junit, markdown, mcnemar, save
from onnxcam.cli import main
from onnxcam.engines.session import Settings
from onnxcam.errors import UsageError
from onnxcam.evaluation.examples import examples
from onnxcam.metrics import agreement
from onnxcam.render.audit_page import _histogram, save_page
from small_nets import resnet

RNG = np.random.default_rng(0)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def permuted(model: onnx.ModelProto, weight: str) -> onnx.ModelProto:
    """The model with the output channels of one weight in another order."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name == weight:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.roll(array, 1, axis=0)), weight))
    return changed


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with other names for all that is inside."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    outer = {v.name for v in (*changed.graph.input, *changed.graph.output)}
    for node in changed.graph.node:
        node.name = f"other/{node.name}"
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = name if name in outer or not name else f"other/{name}"
    for tensor in changed.graph.initializer:
        tensor.name = f"other/{tensor.name}"
    del changed.graph.value_info[:]
    return changed


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    net = resnet()
    onnx.save(net, folder / "a.onnx")
    rng = np.random.default_rng(0)
    noisy = onnx.ModelProto()
    noisy.CopyFrom(net)
    for tensor in noisy.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            array = (array * (1 + 1e-3 * rng.standard_normal(array.shape))).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(noisy, folder / "close.onnx")
    onnx.save(renamed(net), folder / "renamed.onnx")
    (folder / "pictures").mkdir()
    for i in range(6):
        blob = np.zeros((40, 40, 3))
        blob[5 + 3 * i : 20 + 3 * i, 8:26] = rng.random(3)
        noise = 0.2 * rng.random(blob.shape)
        Image.fromarray((255 * np.clip(blob + noise, 0, 1)).astype(np.uint8)).save(folder / "pictures" / f"{i}.png")
    (folder / "boxes.csv").write_text(
        "file,x0,y0,x1,y1\n" + "".join(f"{i}.png,8,{5 + 3 * i},26,{20 + 3 * i}\n" for i in range(6))
    )
    (folder / "labels.csv").write_text("file,class\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(6)))
    return folder


def model(place: Path, name: str, preprocess: str = "unit") -> onnxcam.Model:
    return onnxcam.load(place / f"{name}.onnx", preprocess=preprocess)


def known(place: Path, **truths: str):
    return examples(sorted((place / "pictures").iterdir()), **{k: place / v for k, v in truths.items()})


# -- agreement of two maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["real", "ties"])
def test_rank_correlation_is_scipys(kind: str) -> None:
    for _ in range(5):
        a, b = RNG.standard_normal((2, 7, 9))
        if kind == "ties":
            a, b = np.maximum(a, 0), np.round(b)
        assert agreement.rank_correlation(a, b) == pytest.approx(
            stats.spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-12
        )


def test_equal_maps_agree_wholly_and_constant_ones_are_no_error() -> None:
    a, flat = RNG.random((7, 7)), np.ones((7, 7))
    assert agreement.rank_correlation(a, 2 * a + 1) == pytest.approx(1) and agreement.rank_correlation(
        a, -a
    ) == pytest.approx(-1)
    assert agreement.rank_correlation(a, flat) == 0 and agreement.rank_correlation(flat, 3 * flat) == 1
    assert agreement.structure(a, 5 * a) == pytest.approx(1) and agreement.structure(a, a[::-1]) < 0.9
    assert agreement.structure(np.zeros((7, 7)), np.zeros((7, 7))) == pytest.approx(1)
    assert agreement.top_iou(a, a) == 1 and agreement.top_iou(a, -a) == 0 and agreement.top_iou(flat, flat) == 1
    assert agreement.shift(a, a) == 0 and np.isnan(agreement.shift(a, -a))
    assert agreement.likeness(a, a) == 1 and agreement.likeness(a, -a) == pytest.approx(0)


def test_the_centre_of_mass_moves_by_a_share_of_the_diagonal() -> None:
    a, b = np.zeros((10, 20)), np.zeros((10, 20))
    a[0, 0], b[9, 19] = 1, 5
    assert agreement.shift(a, b) == pytest.approx(np.hypot(0.9, 0.95) / np.sqrt(2))


def test_a_map_is_moved_into_the_window_of_another() -> None:
    """A map over the whole of a picture, seen from a model that saw its middle, by bilinear sampling of a plane."""
    ys, xs = (np.arange(40) + 0.5, np.arange(60) + 0.5)
    plane = 2 * ys[:, None] + 3 * xs[None]
    found = agreement.in_window(plane, (0, 0, 60, 40), (15, 10, 45, 30), (4, 6))
    y, x = 10 + (np.arange(4) + 0.5) * 5, 15 + (np.arange(6) + 0.5) * 5
    np.testing.assert_allclose(found, 2 * y[:, None] + 3 * x[None], atol=1e-9)
    np.testing.assert_array_equal(agreement.in_window(plane, (0, 0, 60, 40), (0, 0, 60, 40), (40, 60)), plane)


# -- layers ------------------------------------------------------------------------------------------------------


def test_layers_go_together_by_name_or_else_by_order(place: Path) -> None:
    a = model(place, "a")
    for name, how in (("close", "name"), ("renamed", "order")):
        pairs = matched(a, model(place, name))
        assert len(pairs) == len(a.layers()) and {p.how for p in pairs.values()} == {how}
        assert [p.a.spatial for p in pairs.values()] == [p.b.spatial for p in pairs.values()]
        assert [p.b.node.removeprefix("other/") for p in pairs.values()] == [p.a.node for p in pairs.values()]


# -- drifts that are planted -------------------------------------------------------------------------------------


def test_a_copy_with_a_little_noise_looks_for_the_same_reasons(place: Path, tmp_path: Path) -> None:
    found = audit(model(place, "a"), model(place, "close"), known(place, boxes="boxes.csv"), ["A2", "A4"], tmp_path)
    f = findings(found)
    assert f.passed and f.score > 0.99 and f.parted is None and f.predictions.agree == 6
    assert f.judged == "A4" and len(list((tmp_path / "maps").iterdir())) == 12


def test_a_permuted_layer_is_found_and_named(place: Path, tmp_path: Path) -> None:
    a = model(place, "a")
    weights = {n.outputs[0]: n.inputs[1] for n in a.names.raw.nodes if n.op_type == "Conv"}
    rows = {row.node: row for row in a.layers()}
    for node in [n for n in a.names.raw.nodes if n.op_type == "Conv"][1:3]:
        onnx.save(permuted(resnet(), weights[node.outputs[0]]), tmp_path / "b.onnx")
        b = onnxcam.load(tmp_path / "b.onnx", preprocess="unit")
        f = findings(audit(a, b, known(place), ["suggested"], tmp_path / node.name, thumbs=0))
        assert f.parted is not None and not f.passed
        before = [d for d in f.drift if d.layer == "input" or rows[d.layer].index < rows[f.parted.layer].index]
        assert all(d.likeness == pytest.approx(1) for d in before)
        assert rows[f.parted.layer].index <= min(
            row.index for row in rows.values() if row.index >= (rows[node.name].index if node.name in rows else 0)
        )
        assert f.parted.layer in f.sentence and f.sentence.startswith("other reasons")


def test_another_preprocessing_is_found_at_the_input(place: Path, tmp_path: Path) -> None:
    a, b = model(place, "a"), model(place, "a", "imagenet")
    found = audit(a, b, known(place), ["A4"], tmp_path, thumbs=0)
    for asked, verdict in ((1.0, "other reasons"), (-1.0, "other input")):
        f = findings(found, fail_under=asked)
        assert not f.passed and f.verdict == verdict
        assert f.parted is not None and f.parted.layer == "input" and "part ways at their input" in f.sentence


def test_the_drift_is_what_the_activations_say(place: Path) -> None:
    a, b = model(place, "a"), model(place, "close")
    found = drift(a, b, [str(place / "pictures" / "0.png")], Settings())
    assert found[0].layer == "input" and found[0].likeness == 1 and parted_at(found) is None
    assert all(0.99 < d.likeness < 1 for d in found[1:])
    x = a.preprocess.apply(Image.open(place / "pictures" / "0.png"), a.spec).array
    import onnxruntime

    values = []
    for name in ("a", "close"):
        proto = onnx.load(place / f"{name}.onnx")
        proto.graph.output.append(onnx.helper.make_tensor_value_info("r4", onnx.TensorProto.FLOAT, None))
        values.append(onnxruntime.InferenceSession(proto.SerializeToString()).run(["r4"], {"x": x})[0])
    gap = np.linalg.norm(values[0] - values[1]) / (np.linalg.norm(values[0]) + np.linalg.norm(values[1]))
    by_tensor = {row.node: row.tensor for row in a.layers()}
    ours = next(d for d in found[1:] if by_tensor[d.layer] == "r4")
    assert 1 - ours.likeness == pytest.approx(gap, rel=1e-3)


# -- what is written ---------------------------------------------------------------------------------------------


def test_rows_hold_what_explain_gives(place: Path, tmp_path: Path) -> None:
    a, b = model(place, "a"), model(place, "close")
    found = audit(a, b, known(place, labels="labels.csv"), ["A2"], tmp_path, method="grad-cam")
    rows = list(found.rows())
    picture = place / "pictures" / "3.png"
    e = a.explain(picture, ["A2"], method="grad-cam")
    c = int(e.targets[0, 0])
    other = b.explain(picture, ["A2"], [c], method="grad-cam")
    row = rows[3]
    assert (
        row["image"] == str(picture) and int(row["explained"]) == c and row["label"] == "0" and row["energy_a"] == "nan"
    )
    expected = stats.spearmanr(e.maps["A2"].ravel(), other.maps["A2"].ravel()).statistic
    assert float(row["rank"]) == pytest.approx(expected, abs=1e-5)
    assert float(row["probability_b"]) == pytest.approx(other.probability(0, 0), rel=1e-5)


def test_an_interrupted_audit_goes_on_and_another_is_refused(place: Path, tmp_path: Path) -> None:
    a, b = model(place, "a"), model(place, "close")
    whole = audit(a, b, known(place), ["A4"], tmp_path / "whole")
    audit(a, b, known(place)[:4], ["A4"], tmp_path / "part")
    seen: list[int] = []
    part = audit(a, b, known(place), ["A4"], tmp_path / "part", progress=lambda done, total: seen.append(done))
    assert seen == [4, 5, 6] and list(part.rows()) == list(whole.rows())
    with pytest.raises(UsageError, match="another model or other settings"):
        audit(a, b, known(place), ["A2"], tmp_path / "part")


def test_pictures_may_be_added_and_keep_their_maps(place: Path, tmp_path: Path) -> None:
    a, b = model(place, "a"), model(place, "close")
    pictures = known(place)
    audit(a, b, pictures[2:4], ["A4"], tmp_path / "out")
    drawn = {f.name: f.read_bytes() for f in (tmp_path / "out" / "maps").iterdir()}
    found = audit(a, b, [pictures[0], pictures[0], *pictures[1:4]], ["A4"], tmp_path / "out")
    rows = list(found.rows())
    assert [(Path(row["image"]).name, row["number"]) for row in rows] == [
        ("2.png", "0"), ("3.png", "1"), ("0.png", "2"), ("1.png", "3"),
    ]  # fmt: skip
    assert findings(found).predictions.pictures == 4
    maps = {f.name: f.read_bytes() for f in (tmp_path / "out" / "maps").iterdir()}
    assert len(maps) == 8 and all(maps[name] == content for name, content in drawn.items())
    with pytest.raises(UsageError, match=r"holds values of other pictures, .*2.png for one"):
        audit(a, b, pictures[:2], ["A4"], tmp_path / "out")


def test_a_picture_is_done_again_where_something_else_is_known_of_it(place: Path, tmp_path: Path) -> None:
    a, b = model(place, "a"), model(place, "close")
    audit(a, b, known(place), ["A4"], tmp_path / "out")
    done: list[int] = []
    again = audit(
        a, b, known(place, labels="labels.csv", boxes="boxes.csv"), ["A4"], tmp_path / "out",
        progress=lambda n, total: done.append(n),
    )  # fmt: skip
    fresh = audit(a, b, known(place, labels="labels.csv", boxes="boxes.csv"), ["A4"], tmp_path / "fresh")
    assert done == [1, 2, 3, 4, 5, 6] and list(again.rows()) == list(fresh.rows())


def external(place: Path, folder: Path, scale: float) -> onnxcam.Model:
    """The network with its weights in a file beside, the last of them scaled: the .onnx is the same for any scale."""
    folder.mkdir()
    proto = onnx.load(place / "a.onnx")
    last = next(t for t in reversed(proto.graph.initializer) if len(t.dims) > 1)
    last.CopyFrom(numpy_helper.from_array(scale * numpy_helper.to_array(last), last.name))
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return onnxcam.load(folder / "m.onnx", preprocess="unit")


def test_other_weights_beside_the_file_and_another_output_are_another_run(place: Path, tmp_path: Path) -> None:
    one, two = external(place, tmp_path / "1", 1.0), external(place, tmp_path / "2", 2.0)
    assert one.sha256 == two.sha256
    a = model(place, "a")
    audit(a, one, known(place)[:2], ["A4"], tmp_path / "out", thumbs=0)
    with pytest.raises(UsageError, match="another model or other settings"):
        audit(a, two, known(place)[:2], ["A4"], tmp_path / "out", thumbs=0)
    proto = onnx.load(place / "a.onnx")
    logits = proto.graph.output[0].name
    proto.graph.node.append(onnx.helper.make_node("Neg", [logits], ["less"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("less", onnx.TensorProto.FLOAT, None))
    onnx.save(proto, tmp_path / "heads.onnx")
    heads = [onnxcam.load(tmp_path / "heads.onnx", preprocess="unit", output=name) for name in (logits, "less")]
    audit(a, heads[0], known(place)[:2], ["A4"], tmp_path / "heads", thumbs=0)
    with pytest.raises(UsageError, match="another model or other settings"):
        audit(a, heads[1], known(place)[:2], ["A4"], tmp_path / "heads", thumbs=0)


def test_pictures_whose_rows_are_gone_are_done_again(place: Path, tmp_path: Path) -> None:
    a, b = model(place, "a"), model(place, "close")
    whole = list(audit(a, b, known(place)[:3], ["A2", "A4"], tmp_path, thumbs=0).rows())
    values = tmp_path / "values.csv"
    lines = values.read_text().splitlines(keepends=True)
    for kept in ("".join(lines[:4]), "".join(lines[:-1]), None):
        values.unlink() if kept is None else values.write_text(kept)
        again = list(audit(a, b, known(place)[:3], ["A2", "A4"], tmp_path, thumbs=0).rows())
        assert {(r["image"], r["layer"], r["rank"]) for r in again} == {
            (r["image"], r["layer"], r["rank"]) for r in whole
        }
        assert len(again) == len(whole)


def test_a_picture_with_numpys_numbers_and_many_boxes_is_known(place: Path, tmp_path: Path) -> None:
    picture = known(place)[0]
    boxes = tuple((np.float32(k), np.int64(k), 4.0, 4.0) for k in range(5000))
    odd = replace(picture, label=np.int64(3), boxes=boxes)
    assert odd.known == replace(picture, label=3, boxes=tuple((k, k, 4, 4) for k in range(5000))).known
    for _ in range(2):
        audit(model(place, "a"), model(place, "close"), [odd], ["A4"], tmp_path, thumbs=0)


def test_two_layers_of_one_node_are_two(place: Path, tmp_path: Path) -> None:
    found = audit(model(place, "a"), model(place, "close"), known(place)[:1], ["c1", "r1"], tmp_path, thumbs=0)
    assert [p.name for p in found.pairs] == ["c1", "r1"] and len(list(found.rows())) == 2


def test_a_run_that_never_got_to_a_picture_leaves_nothing_in_the_way(place: Path, tmp_path: Path) -> None:
    a, b = model(place, "a"), model(place, "close")
    with pytest.raises(UsageError, match=r"asked about class . of a.onnx for 0.png is class .* by --offset 9"):
        audit(a, b, known(place)[:2], ["A4"], tmp_path / "out", offset=9)
    assert len(list(audit(a, b, known(place)[:2], ["A4"], tmp_path / "out").rows())) == 2
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(UsageError, match=r"settings.json is of no run of onnxcam"):
        audit(a, b, known(place)[:2], ["A4"], tmp_path / "out")


def test_pictures_that_cannot_be_numbers_are_left_out_by_name(place: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.tif"
    Image.fromarray(np.linspace(-300, 300, 1600, dtype=np.float32).reshape(40, 40)).save(odd)
    a, b = model(place, "a"), model(place, "close")
    found = audit(a, b, [*known(place)[:1], *examples([odd])], ["A4"], tmp_path / "out", thumbs=0)
    assert found.skipped == {str(odd): "odd.tif: the picture's values run from -300 to 300: scale them to 0..255 first"}
    f = findings(found)
    assert "over 1 pictures, 1 more left out" in f.sentence and b"odd.tif" in junit(f)
    with pytest.raises(UsageError, match="tables are UTF-8 and this name is not"):
        examples([b"\xff.png".decode("utf-8", "surrogateescape")])


# -- layers and inputs -------------------------------------------------------------------------------------------


def of_size(place: Path, folder: Path, size: int | str, name: str) -> onnxcam.Model:
    proto = onnx.load(place / "a.onnx")
    for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        if isinstance(size, int):
            dim.dim_value = size
        else:
            dim.dim_param = size
    del proto.graph.value_info[:]
    onnx.save(proto, folder / f"{name}.onnx")
    return onnxcam.load(folder / f"{name}.onnx", preprocess="unit")


@pytest.mark.parametrize("size", [16, 20, 64])
def test_layers_go_together_by_name_at_another_input_size(place: Path, tmp_path: Path, size: int) -> None:
    small, large = of_size(place, tmp_path, size, "small"), of_size(place, tmp_path, 32, "large")
    pairs = matched(large, small)
    assert all(p.a.node == p.b.node and p.how == "name" for p in pairs.values())
    assert len(pairs) == len(large.layers())


def test_a_model_of_any_input_size_is_given_the_others(place: Path, tmp_path: Path) -> None:
    fixed, free = of_size(place, tmp_path, 24, "fixed"), of_size(place, tmp_path, "side", "free")
    assert free.size == (224, 224)
    f = findings(audit(fixed, free, known(place)[:2], ["A4"], tmp_path / "1", thumbs=0))
    assert f.score == pytest.approx(1) and free.size == (224, 224)
    assert findings(audit(free, fixed, known(place)[:2], ["A4"], tmp_path / "2", thumbs=0)).score == pytest.approx(1)


def test_the_layer_nearest_to_the_logits_is_judged_however_they_are_named(place: Path, tmp_path: Path) -> None:
    found = audit(
        model(place, "a"), model(place, "close"), known(place)[:1], ["A4", "R0", -1, "suggested"], tmp_path,
        asked={"A2": "A2"}, thumbs=0,
    )  # fmt: skip
    names = [p.name for p in found.pairs]
    assert names == ["C0", "A2", "A4"] and findings(found).judged == "A4"  # as the listing calls them


def test_preprocessing_that_was_folded_into_the_network_is_no_other_input(place: Path, tmp_path: Path) -> None:
    proto = onnx.load(place / "a.onnx")
    first = next(n for n in proto.graph.node if n.op_type == "Conv").input[1]
    (weight,) = [t for t in proto.graph.initializer if t.name == first]
    weight.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(weight) / 255).astype(np.float32), first))
    onnx.save(proto, tmp_path / "folded.onnx")
    folded = onnxcam.load(tmp_path / "folded.onnx", preprocess="raw")
    f = findings(audit(model(place, "a"), folded, known(place), ["A4"], tmp_path / "out", thumbs=0))
    assert f.drift[0].likeness < 0.1 and min(d.likeness for d in f.drift[1:]) > 0.999
    assert f.passed and f.parted is None


def test_networks_of_which_no_layers_compare_are_judged_by_their_maps_alone(place: Path, tmp_path: Path) -> None:
    drift_ = [Drift("input", "input", 0.01, 0.01)]
    found = audit(model(place, "a"), model(place, "close"), known(place)[:2], ["A4"], tmp_path, thumbs=0)
    f = findings(replace(found, drift=drift_))
    assert f.passed and "no layers of the two can be compared number by number" in f.sentence


def test_another_number_of_classes_is_said(place: Path, tmp_path: Path) -> None:
    proto = onnx.load(place / "a.onnx")
    logits = proto.graph.output[0].name
    count = proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    proto.graph.initializer.append(numpy_helper.from_array(np.full((1, 1), -9, np.float32), "background"))
    nodes = onnx.parser.parse_graph(
        f"""g (float[N,{count}] {logits}, float[1,1] background) => (float[N,{count + 1}] wider)
        {{ none = ReduceMean<axes=[1]>({logits}) low = Add(none, background) wider = Concat<axis=1>(low, {logits}) }}"""
    )
    proto.graph.node.extend(nodes.node)
    del proto.graph.output[:]
    proto.graph.output.extend(nodes.output)
    onnx.save(proto, tmp_path / "wider.onnx")
    wider = onnxcam.load(tmp_path / "wider.onnx", preprocess="unit")
    a = model(place, "a")
    found = audit(a, wider, known(place), ["A4"], tmp_path / "out", thumbs=0)
    (warning,) = found.warnings
    assert warning.startswith(f"a.onnx has {count} classes and wider.onnx {count + 1}: ") and "--offset" in warning
    assert warning in markdown(findings(found))
    right = audit(a, wider, known(place), ["A4"], tmp_path / "right", thumbs=0, offset=1)
    f = findings(right)
    assert not right.warnings and f.predictions.agree == 6 and f.score > 0.99


def test_both_maps_of_a_pair_are_drawn_alike(place: Path, tmp_path: Path, monkeypatch) -> None:
    drawn: list[tuple[str, str]] = []

    def record(view, heat, kind):
        drawn.append((kind, "signed" if heat.min() < -0.1 * np.abs(heat).max() else "positive"))
        return b""

    monkeypatch.setattr(run, "_drawn", record)
    audit(model(place, "a"), model(place, "renamed"), known(place), ["A4"], tmp_path, method="contrast-map")
    assert len(drawn) == 12
    for (one, own), (other, others) in zip(drawn[::2], drawn[1::2], strict=True):
        assert one == other == ("signed" if "signed" in (own, others) else "positive")


def test_labels_of_pictures_of_one_name_go_by_their_folders(place: Path, tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shutil.copy(place / "pictures" / "0.png", tmp_path / folder / "a.png")
    paths = [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png"]
    (tmp_path / "labels.csv").write_text("file,class\nx/a.png,1\ny/a.png,2\n")
    assert [e.label for e in examples(paths, labels=tmp_path / "labels.csv")] == [1, 2]
    (tmp_path / "labels.csv").write_text("file,class\na.png,1\na.png,2\n")
    with pytest.raises(UsageError, match="the classes 1 and 2: one is wanted"):
        examples(paths, labels=tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("file,class\nu/a.png,1\nv/a.png,2\n")
    with pytest.raises(UsageError, match=r"u/a.png and v/a.png have its name"):
        examples(paths, labels=tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("file,class\nval/x/a.png,3\nval/y/a.png,4\n./b.png,5\n")
    assert [e.label for e in examples(["x/a.png", "y/a.png", "z/b.png"], labels=tmp_path / "labels.csv")] == [3, 4, 5]
    found = audit(model(place, "a"), model(place, "close"), examples(paths), ["A4"], tmp_path / "out", thumbs=0)
    assert "| x/a.png |" in markdown(findings(found)) and "| y/a.png |" in markdown(findings(found))


def test_mcnemars_test_is_the_exact_one() -> None:
    assert mcnemar(0, 0) == 1
    for split in ((3, 11), (8, 8), (0, 6)):
        n = sum(split)
        tail = sum(stats.binom.pmf(k, n, 0.5) for k in range(min(split) + 1))
        assert mcnemar(*split) == pytest.approx(min(1, 2 * tail))


def test_the_command_gates_a_release(place: Path, tmp_path: Path, capsys) -> None:
    onnx.save(permuted(resnet(), _first_weight(place)), tmp_path / "bad.onnx")
    command = [
        "audit",
        str(place / "a.onnx"),
        "",
        str(place / "pictures"),
        "--preprocess",
        "unit",
        "-l",
        "A2",
        "-l",
        "A4",
    ]
    command += ["--labels", str(place / "labels.csv"), "--boxes", str(place / "boxes.csv")]
    for second, code, verdict in (
        (place / "close.onnx", 0, "same reasons"),
        (tmp_path / "bad.onnx", 4, "other reasons"),
    ):
        command[2] = str(second)
        out = tmp_path / second.stem
        assert main([*command, "-o", str(out)]) == code
        assert verdict in capsys.readouterr().out
        names = {
            "values.csv",
            "values.parquet",
            "settings.json",
            "done.csv",
            "summary.md",
            "junit.xml",
            "manifest.json",
            "report.html",
            "maps",
        }
        assert {f.name for f in out.iterdir()} == names
        suite = ElementTree.fromstring((out / "junit.xml").read_bytes())
        assert suite.get("failures") == str(int(code == 4)) and len(suite.findall("testcase")) == 2
        assert len(suite.findall("testcase/failure")) == int(code == 4)
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["verdict"] == verdict and manifest["judged"] == "A4" and len(manifest["layers"]) == 2
        assert verdict in (out / "summary.md").read_text()
        with (out / "values.csv").open(newline="") as stream:
            assert len(list(csv.DictReader(stream))) == 12


def _first_weight(place: Path) -> str:
    nodes = [n for n in onnx.load(place / "a.onnx").graph.node if n.op_type == "Conv"]
    return nodes[1].input[1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--fail-under", "2"], "--fail-under is a rank correlation"),
        (["--target", "label"], "is not known: give --labels"),
        (["-l", "nowhere"], "no layer is called 'nowhere'"),
        (["-l", "A4=nowhere"], "no layer is called 'nowhere'"),
        (["--method", "channel-relevance", "-l", "A4"], "gives no map of two dimensions"),
        (["-l", "A4=A2", "-l", "A4=A4"], "A4 is given twice, with A2 before"),
        (["-l", "A4=A2", "-l", "r4=A4"], "layer 'r4' is asked for twice, with A2 and with A4"),
        (["-l", "A*=A4"], "'A*' means 2 layers of a.onnx: a pair A=B is of one each"),
        (["--offset", "9"], "close.onnx, asked about class"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(place: Path, tmp_path: Path, options, what, capsys) -> None:
    command = [
        "audit",
        *(str(place / f"{n}.onnx") for n in ("a", "close")),
        str(place / "pictures"),
        "--preprocess",
        "unit",
    ]
    assert main([*command, "-o", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert what in error and len(error.splitlines()) == 1


def test_a_layer_of_one_may_be_named_for_a_layer_of_the_other(place: Path, tmp_path: Path) -> None:
    found = audit(model(place, "a"), model(place, "a"), known(place)[:2], [], tmp_path, asked={"A2": "A4"}, thumbs=0)
    assert [(p.a.tensor, p.b.tensor, p.how) for p in found.pairs] == [("r2", "r4", "asked for")]
    assert all(float(row["rank"]) < 1 for row in found.rows())


def test_what_is_written_survives_odd_names(place: Path, tmp_path: Path) -> None:
    (tmp_path / "v2").mkdir()
    shutil.copy(place / "close.onnx", tmp_path / "v2" / "a.onnx")
    odd = tmp_path / "NaN |x'<b>&.png"
    shutil.copy(place / "pictures" / "0.png", odd)
    second = onnxcam.load(tmp_path / "v2" / "a.onnx", preprocess="unit")
    found = audit(model(place, "a"), second, [*known(place)[:1], *examples([odd])], ["A4"], tmp_path / "out", thumbs=0)
    f = findings(found)
    text = markdown(f)
    assert text.startswith(f"## ✅ {place.name}/a.onnx → v2/a.onnx") and "| NaN \\|x'<b>&.png |" in text
    assert ElementTree.fromstring(junit(f)) is not None
    save(f, found.folder, found.settings)
    manifest = json.loads((found.folder / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["layers"][0]["means"]["energy_a"] is None and manifest["names"][1] == "v2/a.onnx"
    assert manifest["run"]["models"] == [[m.content, m.output] for m in (model(place, "a"), second)]


# -- the page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(place: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    a, b = model(place, "a"), model(place, "close")
    some = known(place, boxes="boxes.csv")
    found = audit(a, b, [*some[:5], replace(some[5], boxes=())], ["A2", "A4"], folder)
    return save_page(findings(found), found)


def test_the_page_needs_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text) and "@import" not in text
    assert len(text) < 60_000  # pictures are files of their own


def shown(page: Path, state: str) -> tuple[list[str], str]:
    """The pictures that the table lists, in order, and the whole document, once Chromium has run the page."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--virtual-time-budget=4000", "--dump-dom", f"{page.as_uri()}#{state}",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in ran.stderr, ran.stderr
    body = re.search(r'<table id="pictures">.*?</table>', ran.stdout, re.S)
    assert body is not None
    return re.findall(r'title="(\d+\.png)"', body[0]), ran.stdout


def test_a_bar_stands_where_its_value_is() -> None:
    drawn = _histogram([-0.725])
    (bar,) = re.findall(r'<rect x="([\d.]+)"[^>]*><title>(-?[\d.]+) to (-?[\d.]+): 1<', drawn)
    assert float(bar[0]) == 20 and float(bar[1]) <= -0.724 < float(bar[2]) and ">-0.72<" in drawn


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_sorts_filters_and_reports_no_errors(page: Path) -> None:
    up, _ = shown(page, "sort=A+sure")
    down, _ = shown(page, "sort=A+sure&down=1")
    assert sorted(up) == [f"{i}.png" for i in range(6)] and up == down[::-1]
    by_name, whole = shown(page, "sort=picture")
    assert by_name == sorted(by_name) and 'aria-sort="ascending"' in whole
    assert shown(page, "find=3.png")[0] == ["3.png"]
    assert shown(page, "changed=1")[0] == []
    energies, _ = shown(page, "sort=energy+A&down=1")  # 5.png has no box in this set: last either way
    assert energies[-1] == "5.png" == shown(page, "sort=energy+A")[0][-1]
    assert "<dialog" in whole and re.search(r"<dialog[^>]* open", shown(page, "compare=1")[1])


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_ten_thousand_pictures_are_a_page_at_a_time(place: Path, tmp_path: Path) -> None:
    count = 10_000
    small = audit(model(place, "a"), model(place, "close"), known(place), ["A2", "A4"], tmp_path)
    two = [row for row in small.rows() if row["number"] == "0"]
    with (tmp_path / "values.csv").open("w", newline="") as stream:
        values = csv.DictWriter(stream, list(two[0]))
        values.writeheader()
        values.writerows({**row, "number": n, "image": f"{n:05d}.png"} for n in range(count) for row in two)
    page = save_page(findings(small), small)
    assert page.stat().st_size < 300 * count  # numbers alone
    names, whole = shown(page, "sort=picture&down=1")
    assert names == [f"{count - 1 - k:05d}.png" for k in range(50)] and f"of {count}" in whole
    assert shown(page, "find=05000")[0] == ["05000.png"]
