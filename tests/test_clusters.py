"""Clusters of maps (SpRAy), and an audit of a network that goes by a watermark.

The truth is planted: groups of maps drawn by hand; a network trained here on pictures of which some bear a watermark.
"""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import onnxcam
from onnxcam.audit import audit, findings
from onnxcam.cli import main
from onnxcam.clusters import SIDE, cluster, clustered, save as save_clusters
from onnxcam.errors import UsageError
from onnxcam.evaluation import examples
from planted import MARK, export, pictures, save, trained


def blobs(centres: list[tuple[float, float]], each: int, spread: float, seed: int = 0) -> np.ndarray:
    """Maps 14 x 14 with a Gaussian near one of the centres."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:14, :14]
    maps = []
    for y, x in centres:
        for _ in range(each):
            cy, cx = y + spread * rng.standard_normal(), x + spread * rng.standard_normal()
            maps.append(np.exp(-((ys - cy) ** 2 + (xs - cx) ** 2) / 6) + 0.02 * rng.random((14, 14)))
    return np.stack(maps)


@pytest.mark.parametrize("count", [2, 3])
def test_groups_that_lie_apart_are_found_and_counted(count: int) -> None:
    centres = [(3.0, 3.0), (10.0, 10.0), (3.0, 11.0)][:count]
    found = clustered(7, "seven", [str(i) for i in range(20 * count)], blobs(centres, 20, 0.6))
    assert found.count == count and found.apart > 0.8 and found.gap > 0.9
    for k in range(count):  # each group is one cluster
        assert len(set(found.cluster[20 * k : 20 * k + 20])) == 1
    assert found.maps.shape == (20 * count, SIDE, SIDE)
    np.testing.assert_allclose(found.maps.sum((1, 2)), 1)


def test_what_has_no_groups_shows_no_gap() -> None:
    found = clustered(0, "", [""] * 60, blobs([(7.0, 7.0)], 60, 2.0))
    assert found.gap < 0.7


def test_the_largest_cluster_comes_first_and_is_typical_by_its_mean() -> None:
    maps = np.concatenate([blobs([(3.0, 3.0)], 12, 0.5), blobs([(10.0, 10.0)], 30, 0.5)])
    found = clustered(0, "", [str(i) for i in range(42)], maps, count=2)
    assert (found.cluster[:12] == 1).all() and (found.cluster[12:] == 0).all()
    first = found.typical(0)
    far = ((found.maps[first] - found.heat(0)) ** 2).sum((1, 2))
    assert (np.diff(far) >= 0).all() and set(first) == set(range(12, 42))


def test_empty_maps_and_few_pictures_are_no_error() -> None:
    maps = blobs([(3.0, 3.0), (10.0, 10.0)], 5, 0.5)
    maps[0] = 0
    maps[1] = -1
    found = clustered(0, "", [""] * 10, maps)
    assert len(found.cluster) == 10 and np.isfinite(found.places).all()


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """`clean.onnx` learned bars; `marked.onnx` learned from pictures in which bars say little and a watermark much."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    x, y, _ = pictures(600, 0.0, rng)
    export(trained(x, y), folder / "clean.onnx")
    x, y, _ = pictures(600, 1.0, rng, hint=0.5)
    export(trained(x, y), folder / "shortcut.onnx")
    x, y, _ = pictures(600, 0.5, rng)
    export(trained(x, y), folder / "half.onnx")
    x, y, has = pictures(80, 0.5, np.random.default_rng(1))
    paths = save(x, folder / "pictures")
    with (folder / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("file", "class"), *((p.name, int(c)) for p, c in zip(paths, y, strict=True))])
    np.save(folder / "has.npy", has)
    with (folder / "marks.csv").open("w", newline="") as stream:
        rows = [(p.name, *MARK) for p, h in zip(paths, has, strict=True) if h]
        csv.writer(stream).writerows([("file", "x0", "y0", "x1", "y1"), *rows])
    return folder


def test_pictures_that_are_recognised_by_their_watermark_are_a_cluster(planted: Path) -> None:
    model = onnxcam.load(planted / "half.onnx", preprocess="unit")
    listed = examples(sorted((planted / "pictures").iterdir()), labels=planted / "labels.csv")
    (found,) = cluster(model, listed, -1, classes=[1], target="label", count=2)
    has = np.load(planted / "has.npy")[[e.label == 1 for e in listed]]
    assert len(has) == len(found.cluster) > 20
    same = (found.cluster == 1) == has
    assert max(same.mean(), 1 - same.mean()) >= 0.9, same.mean()
    marked = int(has[found.cluster == 1].mean() > 0.5)
    heat = found.heat(marked)
    rows, columns = slice(MARK[1] * SIDE // 32, MARK[3] * SIDE // 32), slice(MARK[0] * SIDE // 32, MARK[2] * SIDE // 32)
    assert heat[rows, columns].sum() > 0.15 > 2 * found.heat(1 - marked)[rows, columns].sum()


def test_an_audit_finds_that_a_network_goes_by_a_watermark(planted: Path, tmp_path: Path) -> None:
    first, second = (onnxcam.load(planted / f"{n}.onnx", preprocess="unit") for n in ("clean", "shortcut"))
    has = np.load(planted / "has.npy")
    listed = [
        e
        for e, h in zip(
            examples(
                sorted((planted / "pictures").iterdir()), labels=planted / "labels.csv", boxes=planted / "marks.csv"
            ),
            has,
            strict=True,
        )
        if h
    ]
    f = findings(audit(first, second, listed, ["suggested"], tmp_path, target="label", thumbs=0))
    assert not f.passed and f.score < 0.7 and f.parted is not None and f.parted.layer != "input"
    p = f.predictions
    assert p.right_a is not None and p.right_b is not None
    assert min(p.right_a, p.right_b) >= 0.9 * p.pictures  # as good, and for other reasons
    last = f.layers[-1].means
    assert last["energy_b"] > 0.3 > 2 * last["energy_a"]


def test_the_command_writes_galleries_and_a_table(planted: Path, tmp_path: Path, capsys) -> None:
    command = [
        "cluster",
        str(planted / "half.onnx"),
        str(planted / "pictures"),
        "--preprocess",
        "unit",
        "-o",
        str(tmp_path),
    ]
    assert main([*command, "--labels", str(planted / "labels.csv"), "--target", "label", "--class", "1"]) == 0
    assert "silhouette" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (about,) = manifest["classes"]
    assert sum(about["clusters"]) == about["pictures"] > 20
    with (tmp_path / "clusters.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == about["pictures"]
    for name in ("class-1.png", *(f"class-1-cluster-{k}.jpg" for k in range(len(about["clusters"])))):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100


def test_galleries_of_a_run_before_do_not_stay(planted: Path, tmp_path: Path) -> None:
    model = onnxcam.load(planted / "half.onnx", preprocess="unit")
    pictures = [str(p) for p in sorted((planted / "pictures").iterdir())[:20]]
    maps = blobs([(3.0, 3.0), (10.0, 10.0)], 10, 0.6)
    (tmp_path / "class-2.png").touch()  # of somebody else
    save_clusters([clustered(1, "price $x_{$ 漢", pictures, maps, count=5)], model, tmp_path)
    assert len(list(tmp_path.glob("class-1-cluster-?.jpg"))) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_clusters([clustered(1, "price $x_{$ 漢", pictures, maps)], model, tmp_path)
    assert len(list(tmp_path.glob("class-1-cluster-?.jpg"))) == 2 and (tmp_path / "class-2.png").exists()
    with pytest.raises(UsageError, match="20 clusters of 20 pictures of one: fewer are wanted"):
        clustered(1, "one", pictures, maps, count=20)


def test_maps_that_are_all_the_same_are_one_cluster(planted: Path, tmp_path: Path) -> None:
    found = clustered(0, "x", [str(planted / "pictures" / "0.png")] * 20, np.zeros((20, 7, 7)))
    assert found.count == 1 and found.apart == 0 == found.gap
    first = sorted((planted / "pictures").iterdir())[0]
    found = clustered(0, "x", [str(first)] * 12, blobs([(3.0, 3.0)], 1, 0.0).repeat(12, 0))
    assert found.count == 1
    save_clusters([found], onnxcam.load(planted / "half.onnx", preprocess="unit"), tmp_path)
    assert (tmp_path / "class-0.png").exists()


def test_a_picture_that_cannot_be_read_is_left_out(planted: Path, tmp_path: Path) -> None:
    model = onnxcam.load(planted / "half.onnx", preprocess="unit")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    listed = [*examples([broken]), *examples(sorted((planted / "pictures").iterdir())[:30])]
    said: dict[str, str] = {}
    found = cluster(model, listed, left_out=said.__setitem__)
    assert list(said) == [str(broken)] and "broken.png" in said[str(broken)]
    assert 8 <= sum(len(c.pictures) for c in found) <= 30
    with pytest.raises(UsageError, match=r"broken.png is not a picture"):
        cluster(model, listed[:1])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--class", "5"], "class 5 has 0 pictures, and clusters want 8 or more"),
        (["--clusters", "1"], "clusters are 2 or more, not 1"),
        (["--target", "label"], "is not known: give --labels"),
        (["-l", "all"], "maps of one layer are clustered"),
    ],
)
def test_what_means_nothing_is_refused(planted: Path, tmp_path: Path, options, what, capsys) -> None:
    command = ["cluster", str(planted / "half.onnx"), str(planted / "pictures"), "--preprocess", "unit"]
    assert main([*command, "-o", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert what in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_model_without_classes_enough_is_refused(planted: Path) -> None:
    model = onnxcam.load(planted / "half.onnx", preprocess="unit")
    with pytest.raises(UsageError, match="no class has 8 pictures"):
        cluster(model, examples(sorted((planted / "pictures").iterdir())[:3]))
