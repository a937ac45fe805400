"""Sharing pictures out: actors of Ray give what this process gives; tables of maps; pictures at URLs.

The oracle is the local run, of one thread: the same kernels see the same arrays, so results are equal, not just close.
Ray is started once, here, on this machine.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import onnx
import pytest
import ray
from PIL import Image
from pyarrow import parquet

import onnxcam
from onnxcam.cli import main
from onnxcam.dataset import explain_dataset
from onnxcam.errors import ModelError, UsageError
from onnxcam.evaluation import evaluate, examples
from onnxcam.pool import RayPool, pool
from small_nets import resnet


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    here = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}  # where this file's helpers are
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=here)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    onnx.save(resnet(), folder / "net.onnx")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
    (folder / "boxes.csv").write_text("file,x0,y0,x1,y1\n" + "".join(f"{i}.png,5,{4 + i},30,28\n" for i in range(7)))
    return folder


@pytest.fixture
def model(place: Path) -> onnxcam.Model:
    return onnxcam.load(place / "net.onnx", preprocess="unit")


def pictures(place: Path) -> list[str]:
    return [str(p) for p in sorted((place / "pictures").iterdir())]


class Halves:
    """Work that fails on odd numbers, with the error it is told."""

    def __init__(self, error: Exception):
        self.error = error

    def begin(self) -> Callable[[int], int]:
        def half(n: int) -> int:
            if n % 2:
                raise self.error
            return n // 2

        return half


def test_results_come_in_the_order_of_the_items(cluster) -> None:
    for who in (pool(), pool("ray", workers=2)):
        assert list(who.run(Halves(UsageError("odd")), range(0, 40, 2))) == list(range(20))


@pytest.mark.parametrize("error", [UsageError("odd"), ModelError("odd")])
def test_errors_come_back_as_they_were_raised(cluster, error) -> None:
    with pytest.raises(type(error), match=r"^odd$"):
        list(RayPool(2).run(Halves(error), [0, 2, 3]))


def test_a_bug_in_an_actor_is_not_taken_for_a_result(cluster) -> None:
    with pytest.raises(Exception, match="broken") as caught:
        list(RayPool(1).run(Halves(ZeroDivisionError("broken")), [1]))
    assert not isinstance(caught.value, UsageError | ModelError)


def test_pools_by_name() -> None:
    with pytest.raises(UsageError, match="no pool is called 'spark': there are local, ray"):
        pool("spark")
    with pytest.raises(UsageError, match="workers are of --engine-pool ray"):
        pool("local", workers=2)


def test_a_model_can_be_pickled_and_explains_the_same(place: Path, model: onnxcam.Model) -> None:
    here = model.explain(pictures(place)[0], "suggested")
    copy = pickle.loads(pickle.dumps(model))
    there = copy.explain(pictures(place)[0], "suggested")
    assert copy.sha256 == model.sha256 and copy.preprocess == model.preprocess
    assert all(np.array_equal(here.maps[name], there.maps[name]) for name in here.maps)


@pytest.mark.parametrize("how", [{}, {"engine_pool": "ray", "workers": 2}], ids=["local", "ray"])
def test_the_table_holds_the_maps_of_explain(place, model, tmp_path, how, cluster) -> None:
    found = explain_dataset(
        model, pictures(place), tmp_path, ["A2", "A4"], "top2", batch_size=3, threads=1, method="grad-cam", **how
    )
    e = model.explain(pictures(place), ["A2", "A4"], "top2", method="grad-cam", threads=1)
    table = parquet.read_table(tmp_path / "maps.parquet").to_pylist()
    assert found.pictures == 7 and found.table == str(tmp_path / "maps.parquet") and len(table) == 7 * 2 * 2
    rows = iter(table)
    for i, picture in enumerate(pictures(place)):
        for t in range(2):
            for name in ("A2", "A4"):
                row = next(rows)
                assert (row["image"], row["class"], row["layer"]) == (picture, e.targets[i, t], name)
                assert row["node"] == e.layers[name].node and row["label"] == e.label(i, t)
                assert row["probability"] == pytest.approx(e.probability(i, t), rel=1e-6)
                np.testing.assert_allclose(
                    np.reshape(row["map"], row["shape"]), e.maps[name][i, t], rtol=1e-5, atol=1e-7
                )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["pictures"] == 7 and manifest["options"]["method"] == "grad-cam" and manifest["skipped"] == {}
    assert [f.name for f in tmp_path.iterdir()] == ["maps.parquet", "manifest.json"] or len(
        list(tmp_path.iterdir())
    ) == 2


def test_ray_writes_the_bytes_that_the_local_run_writes(place, model, tmp_path, cluster) -> None:
    for name, how in (("local", {"threads": 1}), ("ray", {"engine_pool": "ray", "workers": 2})):
        explain_dataset(model, pictures(place), tmp_path / name, "suggested", batch_size=2, **how)
    assert parquet.read_table(tmp_path / "local" / "maps.parquet").equals(
        parquet.read_table(tmp_path / "ray" / "maps.parquet")
    )
    known = examples(pictures(place), boxes=place / "boxes.csv")
    for name, how in (("a", {"threads": 1}), ("b", {"engine_pool": "ray", "workers": 2})):
        found = evaluate(
            model, known, ["grad-cam", "relevance-cam"], ["A4"], ["drop-50", "energy"], tmp_path / name, **how
        )
        assert found.pictures == 7
    assert (tmp_path / "a" / "values.csv").read_bytes() == (tmp_path / "b" / "values.csv").read_bytes()


def test_an_audit_by_ray_is_that_of_the_local_run(place, model, tmp_path, cluster) -> None:
    from onnxcam.audit import audit

    known = examples(pictures(place), boxes=place / "boxes.csv")
    for name, how in (("a", {"threads": 1}), ("b", {"engine_pool": "ray", "workers": 2})):
        audit(model, model, known, ["A2", "A4"], tmp_path / name, **how)
    assert (tmp_path / "a" / "values.csv").read_bytes() == (tmp_path / "b" / "values.csv").read_bytes()
    drawn = sorted(p.name for p in (tmp_path / "a" / "maps").iterdir())
    assert len(drawn) == 14 and drawn == sorted(p.name for p in (tmp_path / "b" / "maps").iterdir())


def test_an_interrupted_evaluation_goes_on_with_ray(place, model, tmp_path, cluster) -> None:
    known = examples(pictures(place), boxes=place / "boxes.csv")
    how = (["grad-cam"], ["A4"], ["energy"], tmp_path)
    evaluate(model, known[:3], *how, threads=1)
    seen: list[int] = []
    found = evaluate(
        model, known, *how, engine_pool="ray", workers=2, threads=1, progress=lambda done, total: seen.append(done)
    )
    assert seen == [3, 4, 5, 6, 7] and len({row["image"] for row in found.rows}) == 7


def test_a_picture_that_cannot_be_read_is_left_out_and_one_that_is_not_there_is_refused(place, model, tmp_path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures(place)[0]).read_bytes()[:200])
    found = explain_dataset(model, [*pictures(place)[:2], str(broken)], tmp_path / "out")
    assert found.pictures == 2 and list(found.skipped) == [str(broken)]
    assert len({row["image"] for row in parquet.read_table(found.table).to_pylist()}) == 2
    with pytest.raises(UsageError, match=r"no such picture: .*gone\.png"):
        explain_dataset(model, [*pictures(place)[:2], str(tmp_path / "gone.png")], tmp_path / "no")
    assert not list((tmp_path / "no").iterdir())  # nothing half-written stays
    with pytest.raises(UsageError, match="is damaged"):
        explain_dataset(model, [str(broken)], tmp_path / "no")


def test_pictures_and_results_may_lie_at_urls(place, model, tmp_path, capsys) -> None:
    memory = fsspec.filesystem("memory")
    for picture in pictures(place)[:3]:
        memory.put_file(picture, f"/bucket/{Path(picture).name}")
    memory.pipe_file("/bucket/readme.txt", b"no picture")
    command = ["explain", str(place / "net.onnx"), "memory://bucket", "--preprocess", "unit", "-l", "A4", "--parquet"]
    assert main([*command, "-o", "memory://results/run"]) == 0
    assert "3 pictures; maps in memory://results/run/maps.parquet" in capsys.readouterr().out
    with memory.open("/results/run/maps.parquet") as stream:
        table = parquet.read_table(stream).to_pylist()
    e = model.explain(pictures(place)[:3], ["A4"])
    assert [row["image"] for row in table] == [f"memory:///bucket/{i}.png" for i in range(3)]
    for i, row in enumerate(table):
        np.testing.assert_allclose(np.reshape(row["map"], row["shape"]), e.maps["A4"][i, 0], rtol=1e-5, atol=1e-7)
    known = examples(["memory://bucket/1.png"], boxes=place / "boxes.csv")
    assert known[0].located
    (row,) = evaluate(model, known, ["grad-cam"], ["A4"], ["energy"], tmp_path, floors=False).rows
    assert row["image"] == "memory://bucket/1.png" and 0 <= float(row["value"]) <= 1


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("memory://nowhere/a.png", "no such file"),
        ("nosuch://bucket/a.png", "cannot be read: Protocol not known"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(place, url, what, capsys, tmp_path) -> None:
    command = ["explain", str(place / "net.onnx"), url, "--preprocess", "unit", "-o", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert what in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--engine-pool", "ray"], "writes one table of maps: add --parquet"),
        (["--parquet", "--segment"], "leave --segment out"),
        (["--parquet", "--json"], "leave --json out"),
        (["--parquet", "--workers", "2"], "workers are of --engine-pool ray"),
    ],
)
def test_options_that_do_not_go_together(place, options, what, capsys, tmp_path) -> None:
    command = ["explain", str(place / "net.onnx"), *pictures(place)[:1], "-o", str(tmp_path / "out"), *options]
    assert main(command) == 2
    assert what in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_evaluate_writes_parquet_of_the_same_values(place, tmp_path) -> None:
    (tmp_path / "labels.csv").write_text("file,class\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(7)))
    command = ["evaluate", str(place / "net.onnx"), str(place / "pictures"), "--preprocess", "unit", "-l", "A4"]
    command += ["-m", "grad-cam", "--metrics", "energy,entropy", "--boxes", str(place / "boxes.csv")]
    command += ["--labels", str(tmp_path / "labels.csv"), "--label-offset", "1", "-o", str(tmp_path / "out")]
    assert main(command) == 0
    table = parquet.read_table(tmp_path / "out" / "values.parquet").to_pylist()
    assert len(table) == 7 * (1 + 3) * 2
    assert [row["label"] for row in table[:: 4 * 2]] == [i % 3 + 1 for i in range(7)]
    assert all(isinstance(row["value"], float) for row in table)
