"""The harness of benchmarks/ works; no figure is tested, figures belong to whoever looks at them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import profile, speed
from benchmarks.columns import COLUMNS, compiled, feeds
from benchmarks.macs import macs, macs_of
from benchmarks.results import Record, Results
from benchmarks.table import document
from benchmarks.timing import alternate
from onnxcam import load
from small_nets import NETS

COLUMN = "last"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(NETS["resnet"](), path)
    return path


def test_contenders_take_turns_after_a_run_that_does_not_count():
    order: list[str] = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert "".join(order) == "ab" + "abab"
    assert [len(t) for t in times.values()] == [2, 2]


def test_a_record_compares_medians():
    record = Record("m", "x", {"plain": [1.0, 9.0, 2.0], "same": [4.0], "x": [3.0, 8.0, 8.0]})
    assert record.ratio() == 4.0
    assert record.ratio("same") == 2.0
    assert record.ratio(statistic="min") == 3.0


def test_results_are_found_again_unless_the_key_has_changed(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    Results(path).add(Record("m", "x", {"x": [1.0]}, key="old"))
    Results(path).add(Record("m", "x", {"x": [2.0]}, {"bound": 1.5}, key="new"))
    found = Results(path)
    assert found.get("m", "x", "old") is None
    assert found.get("m", "x", "new") == Record("m", "x", {"x": [2.0]}, {"bound": 1.5}, key="new")


@pytest.mark.parametrize(
    ("op", "inputs", "output", "expected"),
    [
        ("Conv", [(1, 4, 8, 8), (6, 4, 3, 3)], (1, 6, 8, 8), 6 * 64 * 4 * 9),
        ("Conv", [(1, 4, 8, 8), (4, 1, 3, 3)], (1, 4, 8, 8), 4 * 64 * 9),  # depthwise
        ("ConvTranspose", [(1, 6, 4, 4), (6, 4, 3, 3)], (1, 4, 8, 8), 6 * 16 * 4 * 9),
        ("Gemm", [(1, 16), (5, 16)], (1, 5), 80),
        ("Relu", [(1, 4, 8, 8)], (1, 4, 8, 8), 0),
    ],
)
def test_multiply_adds_of_one_node(op, inputs, output, expected):
    assert macs_of(op, inputs, output) == expected


def test_the_plain_model_has_the_multiply_adds_that_check_counts(file):
    assert macs(onnx.load(file)) == load(file).check().macs


def test_a_compiled_model_has_more_multiply_adds_the_deeper_it_explains(file):
    model = load(file)
    last, deep = (macs(compiled(model, COLUMNS[name]).proto) for name in ("last", "lrp-epsilon-plus"))
    assert model.check().macs < last < deep


def test_feeds_fill_every_input(file):
    proto = compiled(load(file), COLUMNS["targets5"]).proto
    given = feeds(proto, (2, 3, 16, 16))
    assert [x.shape for x in given.values()] == [(2, 3, 16, 16), (2, 5)]
    assert (given["targets"] == -1).all()


def test_the_profile_tells_the_users_nodes_from_recorded_ones(file):
    proto = compiled(load(file), COLUMNS["suggested"]).proto
    nodes = profile.profile(proto.SerializeToString(), feeds(proto, (1, 3, 16, 16)), 2)
    assert {n.part for n in nodes} >= {"user", "recorded"}
    assert sum(n.macs for n in nodes if n.part == "user") == load(file).check().macs
    text = profile.report(nodes, top=3)
    assert re.search(r"user [\d.]+ ms \(\d+ nodes\), recorded [\d.]+ ms", text)


def test_one_command_measures_writes_the_page_and_goes_on_from_its_cache(file, tmp_path, monkeypatch, capsys):
    page, cache = tmp_path / "docs" / "speed.md", tmp_path / "cache"
    command = ["--models", str(file), "--columns", COLUMN, "batch8", "stages", "numpy", "torch-cam", "--runs", "2"]
    command += ["--cache", str(cache), "-o", str(page)]
    speed.main(command)
    written = page.read_text()
    assert "| tiny |" in written and COLUMNS[COLUMN].title in written
    assert "tiny, four stages: only ResNets have four stages" in written
    assert "tiny, torch-cam GradCAM: the torch module of this file is not known" in written
    assert "`engine=numpy`" in written

    monkeypatch.setattr(speed, "alternate", lambda *_: pytest.fail("measured again"))
    speed.main(command)
    assert page.read_text().count("| tiny |") == written.count("| tiny |")
    capsys.readouterr()


def test_a_child_process_reports_time_and_memory(file):
    found = speed.child("plain", file, COLUMN, 1)
    assert 0 < found["seconds"] < 60
    assert 10 < found["memory"] < 2000


def test_a_failing_process_is_a_reason_to_skip():
    with pytest.raises(speed.Skip, match="no such thing"):
        speed.process([sys.executable, "-c", "raise SystemExit('no such thing')"])()


def test_maps_of_the_same_size_are_correlated():
    a = np.random.default_rng(0).normal(size=(1, 1, 4, 4))
    assert speed.correlation(a, 2 * a[0]) == pytest.approx(1.0)
    assert np.isnan(speed.correlation(a, a[..., :2]))


def test_the_page_says_what_is_missing():
    text = document([], ["a model: a reason"], threads=2, runs=1)
    assert "- a model: a reason" in text
