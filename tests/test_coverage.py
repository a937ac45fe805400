"""The harness of the coverage sweep: it tells what passes from what fails, and names the op; no figure is tested."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from oracles.torch_models import export as to_onnx
from torch import nn

from benchmarks import coverage, coverage_export
from benchmarks.coverage_cases import SAMPLE, Case, design, light_cases, timm_cases
from benchmarks.coverage_export import MODEL, NOTES, REFERENCE, seed_weights
from benchmarks.coverage_files import read_json
from benchmarks.coverage_light import interpret
from benchmarks.coverage_table import (
    autograds,
    document,
    failure,
    gradient_agrees,
    outright,
    passed,
    plain,
    summary_line,
    whole,
)
from benchmarks.coverage_worker import begun, explain, settle
from onnxcam.operators import registry

CASE = Case("timm", "tiny", "torchscript", 16, "tiny")


def tiny() -> nn.Module:
    """Two convolutions with what surrounds them, in evaluation mode and seeded."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    seed_weights(model.eval())
    return model


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Explains `tiny` as the worker does, with autograd's gradient times `wrong`, and returns what is stored of it."""

    def run(wrong: float = 1.0, engines: tuple[str, ...] = ("onnx", "numpy")) -> dict[str, Any]:
        model, x = tiny(), np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
        onnx.save(to_onnx(model, x), tmp_path / MODEL)
        notes: dict[str, Any] = {"status": "ok", "seconds": 1.0, "nodes": 9, "size": 16}
        gradients = coverage_export._gradients(model, x, notes)
        (tmp_path / NOTES).write_text(json.dumps(notes))
        kept = {f"gradient{bits}": g * wrong for bits, g in gradients.items()}
        np.savez(tmp_path / REFERENCE, x=x, logits=np.arange(5.0), **kept)
        explain(tmp_path, tmp_path / "result.json", begun(engines, "code"))
        return {**notes, "explained": read_json(tmp_path / "result.json")}

    return run


def test_a_network_that_is_explained_passes(make):
    stored = make()
    steps = stored["explained"]["steps"]
    assert [s["status"] for s in steps.values()] == ["ok"] * len(steps)
    assert max(steps[f"gradient/{e}"]["torch64"] for e in ("onnx", "numpy")) <= 1e-5
    assert 0 < steps["cam/numpy"]["apart"] <= 1e-5
    assert "float64" not in steps
    assert steps["check"]["problems"] == []
    assert failure(stored) is None and passed(stored)
    assert summary_line(stored).startswith("ok, ")


def test_a_network_whose_operator_is_missing_fails_and_the_op_is_named(make, monkeypatch):
    monkeypatch.delitem(registry._ENTRIES, ("", "MaxPool"))
    stored = make()
    found = failure(stored)
    assert found is not None and not passed(stored)
    assert (found.step, found.kind, found.op) == ("cam/onnx", "refused", "MaxPool")
    assert [problem[0] for problem in stored["explained"]["steps"]["check"]["problems"]] == ["MaxPool"]
    page = document([(CASE, stored)])
    assert "| onnxcam | refused, onnx | MaxPool | node …: no operator for MaxPool" in page
    assert "| timm | 1 | 1 | 1 | 1 | 0 | 0 | 0 | 0 | 1 | 0.0 % |" in page
    assert "**tiny**" in page


def test_a_gradient_that_is_not_autograds_fails(make):
    found = failure(make(wrong=1.01, engines=("onnx",)))
    assert found is not None
    assert (found.step, found.kind) == ("gradient/onnx", "not autograd's")


def test_a_gradient_that_is_off_in_float32_alone_passes(make):
    stored = make()
    steps = stored["explained"]["steps"]
    for engine in ("onnx", "numpy"):
        steps[f"gradient/{engine}"] |= {"torch32": 0.3, "torch64": 0.2}
    assert not passed(stored)
    steps["float64"] = {"status": "ok", "error": 5e-6}
    steps["gradient/onnx"] |= {
        "torch32": 0.9,
        "torch64": 0.9,
    }  # engine onnx is further off than float32 takes engine numpy
    assert not passed(stored)
    steps["gradient/onnx"] |= {"torch32": 0.3, "torch64": 0.2}
    assert passed(stored) and not outright(stored)
    assert autograds(stored) and not autograds(stored, in_float32=True)
    steps["float64"]["error"] = 2e-5
    assert not passed(stored) and not autograds(stored)


def test_the_step_in_float64_is_made_up_for_where_it_is_missing(make, tmp_path):
    known = make()["explained"]
    settle(tmp_path, tmp_path / "again.json", json.loads(json.dumps(known)))
    found = read_json(tmp_path / "again.json")["steps"]
    assert found.pop("float64")["error"] <= 1e-6  # what PyTorch folds into the file in float32 is left
    assert found == known["steps"]


def test_a_case_without_the_second_engine_has_not_passed(make):
    stored = make(engines=("onnx",))
    assert failure(stored) is None and not whole(stored) and not passed(stored)


def test_only_rounding_widens_the_bound():
    assert gradient_agrees({"torch32": 9e-4}, None)
    assert not gradient_agrees({"torch32": 2e-3}, 1.0)  # float64 is not known
    assert gradient_agrees({"torch32": 5e-2, "torch64": 2e-2}, 1e-2)
    assert not gradient_agrees({"torch32": 5e-2, "torch64": 4e-2}, 1e-2)
    assert gradient_agrees({"torch32": 5e-2, "rounding": 2e-2}, None)
    assert not gradient_agrees({"torch32": 0.2, "rounding": 1.0}, None)  # then nothing can be said


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"lrp/numpy": {"status": "running"}}, ["explain"]),
        ({"lrp/numpy": {"status": "crash"}}, []),
        ({"gradient/onnx": {"status": "ok", "torch64": 2e-3, "torch32": 4e-3}}, ["settle"]),
        ({"gradient/onnx": {"status": "ok", "torch32": 1e-2}, "float64": {"status": "ok", "error": 0.0}}, []),
        ({"gradient/onnx": {"status": "ok", "torch64": 2e-6, "torch32": 4e-3}}, []),
    ],
    ids=["broken-off", "crashed", "without-float64", "settled", "exact"],
)
def test_a_sweep_does_what_is_missing(tmp_path, monkeypatch, last, expected):
    done: list[str] = []
    monkeypatch.setattr(coverage, "Process", lambda work, *_: done.append(work.__name__))
    place = coverage.Sweep(tmp_path / "results", tmp_path / "models", coverage.Limits(1, 1), "code")
    folder = place.folder(CASE)
    folder.mkdir(parents=True)
    (folder / MODEL).touch()
    (folder / NOTES).write_text('{"status": "ok"}')
    place.result(CASE).parent.mkdir(parents=True)
    steps = {"load": {"status": "ok", "seconds": 0.1}, **last}
    place.result(CASE).write_text(json.dumps({"code": "other", "engines": ["onnx", "numpy"], "steps": steps}))
    list(place.work(CASE, lambda known: False, False))
    assert done == expected


def test_an_export_that_fails_is_not_counted_against_onnxcam():
    failed = {"status": "failed", "error": "ValueError", "message": "no such thing"}
    page = document([(CASE, failed)])
    assert "| exporter | failed, export | ValueError | no such thing |" in page
    assert "| timm | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | – |" in page
    other = Case("timm", "tiny", "dynamo", 16, "tiny", "torchscript")
    page = document([(CASE, failed), (other, {"status": "ok", "seconds": 1, "nodes": 1})])
    assert "no such thing" not in page  # another exporter stands in


@pytest.mark.parametrize(
    ("work", "given", "seconds", "expected"),
    [
        (time.sleep, (60,), 0.5, ("lrp/onnx", "timeout", "more than 0 s")),
        (os.abort, (), 60, ("lrp/onnx", "crash", "exit code -6")),
    ],
)
def test_a_process_that_does_not_end_well_says_where(tmp_path, work, given, seconds, expected):
    notes = tmp_path / "notes.json"
    first = {"steps": {"load": {"status": "ok"}, "lrp/onnx": {"status": "running"}}}
    process = coverage.Process(work, given, notes, first, coverage.Limits(seconds, 64))
    while not process.ended():
        process.process.join(0.1)
    found = failure({"status": "ok", "explained": read_json(notes)})
    assert found is not None and (found.step, found.kind, found.message) == expected


def test_the_sample_covers_every_module_before_any_twice():
    cases = [c for c in timm_cases() if c.first is None]
    modules = {c.module for c in cases}
    assert len(cases) >= 400 and len(modules) == 98
    assert len({c.module for c in cases[:88]}) == 88
    assert len({c.name for c in cases}) == len(cases) == len(SAMPLE.read_text().splitlines())


def test_sizes_make_no_design():
    assert design("vit_tiny_patch16_224") == design("vit_base_patch32_384")
    assert design("vit_tiny_patch16_224") != design("vit_tiny_r_s16_p8_224")


def test_the_light_models_run_in_torch_as_they_do_in_onnx_runtime(tmp_path):
    import onnxruntime as ort

    from benchmarks.coverage_light import light_folder, seed_weights

    assert len(list(light_cases(["shipped"]))) == 9
    model = onnx.load(light_folder() / "light_squeezenet.onnx")
    seed_weights(model)
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: x})[0]
    found = interpret(model, torch.from_numpy(x), torch.float32)[model.graph.output[0].name].numpy()
    assert found.max() > 2 * found.min()  # not all alike
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32 sums in another order


def test_messages_that_differ_in_names_are_one():
    assert plain("node 'a/b': 12 of [3, 4]") == plain("node 'c': 7 of [5]")
