"""`evaluate` over a few pictures: what is written, gone on with, and said; geometry of truths; statistics.

Oracles: metrics computed here from `Model.explain` and the shipped metric functions (which have tests of their own);
masks drawn by hand; SciPy's bootstrap and exact permutation test.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from scipy import stats

import onnxcam
from onnxcam.cli import main
from onnxcam.engines.session import Settings
from onnxcam.errors import UsageError
from onnxcam.evaluation import Example, evaluate, examples, sanity
from onnxcam.evaluation.measures import MEASURES
from onnxcam.evaluation.run import Scorer, baselines
from onnxcam.evaluation.summary import interval, markdown, sign_flip, summarise
from onnxcam.methods.upsample import upsampled
from onnxcam.metrics import localisation
from small_nets import resnet

METHODS = ["grad-cam", "relevance-cam"]
METRICS = ["drop-50", "energy", "hit", "box-iou", "entropy"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    onnx.save(resnet(), folder / "net.onnx")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
    (folder / "boxes.csv").write_text(
        "file,class_index,x0,y0,x1,y1\n" + "".join(f"{i}.png,1,5,{4 + i},30,28\n" for i in range(3))
    )
    (folder / "classes.csv").write_text("file,class\n" + "".join(f"{i}.png,{i}\n" for i in range(4)))
    return folder


@pytest.fixture
def model(place: Path) -> onnxcam.Model:
    return onnxcam.load(place / "net.onnx", preprocess="unit")


def listed(place: Path, **truths: str) -> list[Example]:
    pictures = sorted((place / "pictures").iterdir())
    return examples(pictures, **{name: place / value for name, value in truths.items()})


def test_values_are_those_of_the_metrics(place: Path, model: onnxcam.Model, tmp_path: Path) -> None:
    found = evaluate(model, listed(place, boxes="boxes.csv"), METHODS, ["A2", "A4"], METRICS, tmp_path / "out")
    rows = {(Path(r["image"]).name, r["method"], r["layer"], r["metric"]): r for r in found.rows}
    assert len(rows) == len(found.rows) == 3 * (2 * 2 + 3) * 5 + 1 * (2 * 2 + 3) * 2  # the fourth has no box
    picture = place / "pictures" / "1.png"
    e = model.explain(picture, ["A2", "A4"], method="grad-cam")
    prepared = model.preprocess.apply(Image.open(picture), model.spec)
    height, width = prepared.array.shape[2:]
    heat = upsampled(e.maps["A2"][0, 0].astype(np.float64), (height, width))
    left, top, right, bottom = prepared.window
    truth = np.zeros((height, width), bool)
    for y, x in np.ndindex(height, width):
        px, py = left + (x + 0.5) * (right - left) / width, top + (y + 0.5) * (bottom - top) / height
        truth[y, x] = 5 <= px < 30 and 5 <= py < 28
    row = rows["1.png", "grad-cam", "A2", "energy"]
    assert float(row["value"]) == pytest.approx(localisation.energy_inside(heat, truth), rel=1e-6)
    assert int(row["class"]) == e.targets[0, 0] and row["map"] == "16x16"
    kept = localisation.largest(heat, 0.5)
    x = prepared.array.astype(np.float64)
    p = [model.explain((x * m).astype(np.float32), ["A4"], [int(row["class"])]).probability(0, 0) for m in (1.0, kept)]
    drop = rows["1.png", "grad-cam", "A2", "drop-50"]["value"]
    assert float(drop) == pytest.approx(max(p[0] - p[1], 0) / p[0], rel=1e-3, abs=1e-5)


def test_an_interrupted_run_goes_on_where_it_stopped(place: Path, model: onnxcam.Model, tmp_path: Path) -> None:
    known = listed(place, boxes="boxes.csv")
    whole = evaluate(model, known, METHODS, ["A4"], METRICS, tmp_path / "whole")
    evaluate(model, known[:2], METHODS, ["A4"], METRICS, tmp_path / "part")
    values = tmp_path / "part" / "values.csv"
    values.write_bytes(values.read_bytes()[:-40])  # killed while it wrote
    explained: list[int] = []
    again = evaluate(
        model, known, METHODS, ["A4"], METRICS, tmp_path / "part", progress=lambda done, total: explained.append(done)
    )
    assert again.rows == whole.rows and explained == [1, 2, 3, 4]


def test_another_run_is_not_mixed_in(place: Path, model: onnxcam.Model, tmp_path: Path) -> None:
    known = listed(place)
    evaluate(model, known[:1], ["grad-cam"], ["A4"], ["entropy"], tmp_path)
    with pytest.raises(UsageError, match="holds values of another model or other settings"):
        evaluate(model, known[:1], ["grad-cam"], ["A2"], ["entropy"], tmp_path)
    other = onnxcam.load(place / "net.onnx", preprocess="imagenet")
    with pytest.raises(UsageError, match="holds values of another model or other settings"):
        evaluate(other, known[:1], ["grad-cam"], ["A4"], ["entropy"], tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(UsageError, match="is of no run of onnxcam"):
        evaluate(model, known[:1], ["grad-cam"], ["A4"], ["entropy"], tmp_path)


def test_a_picture_that_cannot_be_read_is_left_out_and_said(place: Path, model: onnxcam.Model, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((place / "pictures" / "0.png").read_bytes()[:200])
    found = evaluate(
        model, [Example(str(broken)), *listed(place)[:1]], ["grad-cam"], ["A4"], ["entropy"], tmp_path / "out"
    )
    assert list(found.skipped) == [str(broken)] and found.pictures == 1
    assert {r["image"] for r in found.rows} == {str(place / "pictures" / "0.png")}


def test_the_label_can_be_explained(place: Path, model: onnxcam.Model, tmp_path: Path) -> None:
    known = listed(place, labels="classes.csv")
    found = evaluate(model, known, ["grad-cam"], ["A4"], ["entropy"], tmp_path, target="label", floors=False)
    assert [int(r["class"]) for r in found.rows] == [0, 1, 2, 3]
    with pytest.raises(UsageError, match=r"class of 0\.png is not known"):
        evaluate(model, listed(place), ["grad-cam"], ["A4"], ["entropy"], tmp_path / "x", target="label")


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "conservation"])
def test_every_metric_gives_a_number(place: Path, model: onnxcam.Model, tmp_path: Path, name: str) -> None:
    found = evaluate(model, listed(place, boxes="boxes.csv")[:1], ["layercam"], ["A4"], [name], tmp_path)
    assert len(found.rows) == 4 and all(np.isfinite(float(r["value"])) for r in found.rows)


def test_conservation_is_what_the_walk_lost(place: Path, model: onnxcam.Model, tmp_path: Path) -> None:
    found = evaluate(model, listed(place)[:1], ["lrp", "grad-cam"], ["A2", "A4"], ["conservation"], tmp_path)
    values = {(row["method"], row["layer"]): float(row["value"]) for row in found.rows}
    e = model.explain(place / "pictures" / "0.png", ["A2", "A4"], method="lrp")
    start = np.abs(e.conservation.start_magnitude[0, 0])
    for name in ("A2", "A4"):
        lost = abs(e.conservation.start[0, 0] - e.maps[name].sum(dtype=np.float64)) / start
        assert values["lrp", name] == pytest.approx(lost, abs=1e-6)
        assert np.isnan(values["grad-cam", name])  # the gradient conserves nothing


def test_baselines_do_not_change(place: Path, model: onnxcam.Model) -> None:
    x = np.random.default_rng(0).random((3, 20, 30))
    first, again = baselines(x), baselines(x)
    assert set(first) == {"centre", "noise", "edges"}
    for name, heat in first.items():
        assert heat.shape == (20, 30) and (heat == again[name]).all() and np.ptp(heat) > 0
    flat = np.zeros((1, 8, 8))
    flat[:, :, 4:] = 1
    assert baselines(flat)["edges"].argmax(1).tolist() == [3] * 8


@pytest.mark.parametrize("layout", ["NHWC", "uint8"])
def test_scores_are_those_of_the_model_in_any_layout(layout: str) -> None:
    from walking import network

    rng = np.random.default_rng(0)
    before = {"NHWC": "p = Transpose<perm=[0,3,1,2]>(x)", "uint8": "p = Cast<to=1>(x)"}[layout]
    signature = {
        "NHWC": "(float[N,8,8,3] x) => (float[N,5] y)",
        "uint8": "(uint8[2,3,8,8] x) => (float[2,5] y)",
    }[layout]
    body = f"{before} c = Conv(p, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) y = MatMul(f, d)"
    w = rng.standard_normal((4, 3, 3, 3)).astype(np.float32) / 50
    d = rng.standard_normal((4, 5)).astype(np.float32)
    model = onnxcam.load(network(f"{signature} {{ {body} }}", w=w, d=d), preprocess="raw")
    versions = rng.integers(0, 255, (5, 3, 8, 8)).astype(np.float64)
    found = Scorer(model, Settings()).logits(versions)
    x = versions.transpose(0, 2, 3, 1) if layout == "NHWC" else versions
    x = x.astype(np.uint8 if layout == "uint8" else np.float32)
    expected = np.concatenate([model.explain(x[i : i + 1], "r", method="grad-cam").logits for i in range(5)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# -- truths ------------------------------------------------------------------------------------------------------


def test_masks_coco_and_voc_say_the_same(place: Path, tmp_path: Path) -> None:
    size, window = (24, 32), (4.0, 2.0, 44.0, 38.0)
    (tmp_path / "coco.json").write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "sub/0.png"}],
                "annotations": [{"image_id": 7, "bbox": [5, 4, 25, 24]}],
            }
        )
    )
    (tmp_path / "voc").mkdir()
    (tmp_path / "voc" / "0.xml").write_text(
        "<annotation><object><bndbox><xmin>5</xmin><ymin>4</ymin><xmax>30</xmax><ymax>28</ymax></bndbox></object></annotation>"
    )
    (tmp_path / "masks").mkdir()
    drawn = np.zeros((40, 50), np.uint8)
    drawn[4:28, 5:30] = 255
    Image.fromarray(drawn).save(tmp_path / "masks" / "0.png")
    picture = [place / "pictures" / "0.png"]
    truths = [
        examples(picture, boxes=place / "boxes.csv"),
        examples(picture, coco=tmp_path / "coco.json"),
        examples(picture, voc=tmp_path / "voc"),
        examples(picture, masks=tmp_path / "masks"),
    ]
    seen = [example.seen(window, size)[0] for (example,) in truths]
    assert all(mask is not None and (mask == seen[0]).all() for mask in seen) and seen[0].any()
    boxes = truths[0][0].seen(window, size)[1]
    assert boxes == [pytest.approx((1 * 0.8, 2 * 24 / 36, 25 * 0.8, 24 * 24 / 36))]


def test_what_is_beyond_the_picture_is_no_object(tmp_path: Path) -> None:
    Image.new("L", (10, 10), 255).save(tmp_path / "a.png")
    example = Example(str(tmp_path / "a.png"), mask=tmp_path / "a.png")
    mask, _ = example.seen((-10.0, 0.0, 10.0, 10.0), (4, 8))
    assert mask is not None and (mask == np.array([False] * 4 + [True] * 4)).all()


@pytest.mark.parametrize(
    ("truths", "message"),
    [
        ({"boxes": "none.csv"}, "no such file"),
        ({"boxes": "classes.csv"}, "has no column 'x0'"),
        ({"coco": "boxes.csv"}, "is no COCO file"),
        ({"voc": "boxes.csv"}, "is no folder of Pascal VOC files"),
        ({"masks": "boxes.csv"}, "is no folder of masks"),
        ({"boxes": "boxes.csv", "coco": "x.json"}, "boxes and coco both say"),
        ({"labels": "boxes.csv", "masks": "pictures"}, None),
    ],
)
def test_truths_that_cannot_be_read_are_refused(place: Path, truths: dict[str, str], message: str | None) -> None:
    if message is None:
        assert all(e.located for e in listed(place, **truths))
        return
    with pytest.raises(UsageError, match=message):
        listed(place, **truths)


# -- statistics --------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=60)
    found = interval(values)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, random_state=0)
    np.testing.assert_allclose(found, expected.confidence_interval, atol=0.03)
    assert interval(np.array([2.0])) == (2.0, 2.0)


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_the_test_of_pairs_is_scipys(shift: float) -> None:
    differences = np.random.default_rng(1).standard_normal(40) + shift
    expected = stats.permutation_test(
        (differences, np.zeros(40)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=9999,
        random_state=0,
    ).pvalue  # fmt: skip
    assert sign_flip(differences) == pytest.approx(expected, abs=0.03)
    assert sign_flip(np.zeros(10)) == 1


def test_a_summary_compares_with_the_first_method() -> None:
    same = {"layer": "a", "map": "7x7", "metric": "energy", "object": "small"}
    rows = [
        {**same, "image": str(i), "method": m, "value": str(v + i / 100)}
        for i in range(30)
        for m, v in (("grad-cam", 0.2), ("lrp", 0.5 + 0.01 * (i % 3)))
    ]
    first, second = summarise(rows)
    assert (first.mean, first.count, first.against) == (pytest.approx(0.2 + 0.145), 30, "")
    assert second.against == "grad-cam" and second.p < 0.001
    table = markdown([first, second])
    assert "| lrp | a | 7x7 | 0.655" in table and "energy ↑" in table and table.count(" *") == 1
    assert summarise(rows, objects="large") == []
    assert summarise(rows, reference="lrp")[0].against == "lrp"


def test_the_command_writes_values_and_a_summary(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(place)
    asked = ["evaluate", "net.onnx", "pictures", "--boxes", "boxes.csv", "-m", "grad-cam,relevance-cam", "-l", "A4"]
    asked += ["--metric", "energy,drop-50", "--preprocess", "unit", "-o", str(tmp_path / "out")]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "| relevance-cam | A4 | 8x8 |" in printed and "| centre |" in printed and "4 pictures" in printed
    with (tmp_path / "out" / "summary.csv").open() as stream:
        assert {row["metric"] for row in csv.DictReader(stream)} == {"energy", "drop-50"}
    assert "objects" in (tmp_path / "out" / "summary.md").read_text()
    assert main(["evaluate", "net.onnx", "pictures", "--metric", "list"]) == 0
    assert "deletion: " in capsys.readouterr().out
    assert main([*asked, "--metric", "beauty"]) == 2
    assert "no metric named 'beauty'" in capsys.readouterr().err


# -- sanity ------------------------------------------------------------------------------------------------------


def test_weights_are_shuffled_from_the_logits_down(model: onnxcam.Model) -> None:
    names = sanity.linear_weights(model)
    raw = model.names.raw
    assert raw.constants[names[0]].shape == raw.constants[names[0]].shape and len(names) == len(set(names))
    readers = [next(n for n in raw.nodes if name in n.inputs) for name in names]
    assert [n.index for n in readers] == sorted((n.index for n in readers), reverse=True)
    other = sanity.shuffled(model, names[:2])
    for name in names:
        before, after = raw.constants[name], other.names.raw.constants[name]
        assert (np.sort(before.ravel()) == np.sort(after.ravel())).all()
        assert (before == after).all() == (name not in names[:2])
    assert other.preprocess == model.preprocess


def test_edges_survive_what_relevance_does_not(place: Path, model: onnxcam.Model) -> None:
    """A map of activations alone notices nothing until its own layers are shuffled; gradients notice at once."""
    pictures = [str(p) for p in sorted((place / "pictures").iterdir())]
    kept = sanity.cascade(model, pictures, ["eigen-cam", "lrp"], ["A2"], steps=4)
    by = {(k.method, k.shuffled): k.correlation for k in kept}
    first, last = min(k.shuffled for k in kept), max(k.shuffled for k in kept)
    assert by["eigen-cam", first] > 0.999 and last == 1
    assert by["lrp", first] < 0.9
    assert abs(by["eigen-cam", last]) < 0.9
    assert sanity.cascade(model, pictures, ["eigen-cam", "lrp"], ["A2"], steps=4) == kept


def test_ranks_are_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 3, 6, 6)).astype(float), rng.integers(0, 5, (2, 3, 6, 6)).astype(float)
    expected = [
        stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a.reshape(6, -1), b.reshape(6, -1), strict=True)
    ]
    assert sanity._correlation(a, b) == pytest.approx(np.mean(expected))
    assert sanity._correlation(np.ones((1, 1, 2, 2)), a[:1, :1, :2, :2]) == 0


def test_other_weights_must_fit(model: onnxcam.Model) -> None:
    name = sanity.linear_weights(model)[0]
    with pytest.raises(UsageError, match="the model has one of shape"):
        model.with_weights({name: np.zeros(3, np.float32)})
    with pytest.raises(UsageError, match="the model has none of that name"):
        model.with_weights({"nothing": np.zeros(3, np.float32)})


def test_the_command_draws_and_shuffles(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(place)
    asked = ["evaluate", "net.onnx", "pictures", "-m", "grad-cam", "--metric", "entropy", "--preprocess", "unit"]
    assert main([*asked, "--sanity", "2", "-o", str(tmp_path)]) == 0
    assert "depth.png, report.html, sanity.csv in" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<table>") == page.count("</table>") == 1 and "grad-cam" in page
    assert Image.open(tmp_path / "depth.png").width > 300
    with (tmp_path / "sanity.csv").open() as stream:
        assert {row["method"] for row in csv.DictReader(stream)} == {"grad-cam"}


def test_the_page_marks_the_best_and_escapes_names(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    from onnxcam.evaluation.summary import Line
    from onnxcam.render.evaluation_page import save_page

    lines = [
        Line("lrp", "<a>", "7x7", "energy", 0.9, 0.8, 1.0, 5, "grad-cam", 0.01),
        Line("grad-cam", "<a>", "7x7", "energy", 0.4, 0.3, 0.5, 5),
        Line("centre", "", "9x9", "energy", 0.95, 0.9, 1.0, 5),
    ]
    page = save_page("net", {"All": lines, "None": []}, 5, tmp_path / "p.html").read_text()
    assert "&lt;a&gt;" in page and "<a>" not in page
    assert page.count('class="best"') == 1 and '<td class="best">0.900*' in page
    assert page.count('class="floor"') == 1 and page.count("<h2>") == 1


def test_maps_of_another_class_and_of_a_shaken_input_are_compared(
    place: Path, model: onnxcam.Model, tmp_path: Path
) -> None:
    asked = ["class-correlation", "stability"]
    found = evaluate(model, listed(place)[:2], ["eigen-cam", "relevance-cam"], ["A4"], asked, tmp_path)
    by = {(r["method"], r["metric"], Path(r["image"]).name): float(r["value"]) for r in found.rows}
    for i in ("0.png", "1.png"):
        assert by["eigen-cam", "class-correlation", i] == pytest.approx(1)
        assert by["relevance-cam", "class-correlation", i] < 0.999
        assert 0.5 < by["relevance-cam", "stability", i] < 1
        assert by["noise", "stability", i] == pytest.approx(1)


def test_metrics_that_need_a_truth_are_refused_where_there_is_none(
    place: Path, model: onnxcam.Model, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="energy, box-iou: these need to know where the objects are"):
        evaluate(model, listed(place), ["grad-cam"], ["A4"], ["energy", "box-iou"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_map_that_overflows_costs_its_picture_and_no_more(
    place: Path, model: onnxcam.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxcam.dataset import explain_dataset
    from onnxcam.errors import NotFiniteError

    explain = onnxcam.Model.explain

    def overflowing(self: onnxcam.Model, images: object, *more: object, **options: object) -> object:
        if "1.png" in str(images):
            raise NotFiniteError("the map of layer 'A4' is not finite")
        return explain(self, images, *more, **options)

    monkeypatch.setattr(onnxcam.Model, "explain", overflowing)
    monkeypatch.setattr("onnxcam.dataset.explain", overflowing)
    found = evaluate(model, listed(place)[:3], ["grad-cam"], ["A4"], ["entropy"], tmp_path / "out")
    assert found.pictures == 2 and "is not finite" in next(iter(found.skipped.values()))
    table = explain_dataset(model, [e.path for e in listed(place)[:3]], tmp_path / "table", "A4")
    assert table.pictures == 2 and [Path(p).name for p in table.skipped] == ["1.png"]
    with pytest.raises(NotFiniteError):
        evaluate(model, listed(place)[1:2], ["grad-cam"], ["A4"], ["entropy"], tmp_path / "one")
