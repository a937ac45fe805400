"""Caches: keys by value, a bounded memory, and a folder that processes share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcam import COMPOSITES, METHODS, STARTS, load, runners
from onnxcam.cache import DiskCache, Recent, digest, disk_cache, frozen
from onnxcam.errors import UsageError
from onnxcam.model import SESSIONS
from onnxcam.rules import Epsilon, ZBox, ZPlus
from small_nets import mobilenet, resnet

X = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
KEYS = [f"{n:064x}" for n in range(4)]


def test_recent_forgets_what_was_longest_unused():
    recent, made = Recent(2), []
    for key in "abacab":
        assert recent.get(key, lambda key=key: made.append(key) or key.upper()) == key.upper()
    assert made == ["a", "b", "c", "b"]
    assert "a" in recent and "c" not in recent and len(recent) == 2


def test_recent_keeps_nothing_of_what_cannot_be_made():
    recent = Recent(2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert "a" not in recent


def box(low: float) -> ZBox:
    return ZBox(np.full((1, 3, 1, 1), low), np.full((1, 3, 1, 1), 2.0))


def test_keys_are_equal_where_the_values_are():
    one, two = (COMPOSITES["epsilon_gamma_box"].with_box(np.array([-1.0]), np.array([2.0])) for _ in range(2))
    assert frozen(one) == frozen(two) and hash(frozen(one)) == hash(frozen(two))
    assert digest(one) == digest(two)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (box(-1.0), box(-1.5)),
        (ZPlus(), ZPlus("absorb")),
        (Epsilon(1e-6), Epsilon(1e-9)),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (np.zeros((1, 2)), np.zeros((2, 1))),
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (["ab", "c"], ["a", "bc"]),
        (COMPOSITES["relevance_cam"], replace(COMPOSITES["relevance_cam"], first=ZPlus())),
        (STARTS["one-hot"], STARTS["logit"]),
        (METHODS["lrp"], METHODS["relevance-cam"]),
    ],
    ids=range(12),
)
def test_keys_differ_where_the_values_do(one, other):
    assert frozen(one) != frozen(other)
    assert digest(one) != digest(other)


def test_whatever_ships_has_a_digest():
    for value in (*COMPOSITES.values(), *METHODS.values(), *STARTS.values()):
        assert digest(value) is not None, value.name


def test_a_digest_is_the_same_in_another_process():
    code = (
        "from onnxcam import COMPOSITES, METHODS, STARTS; from onnxcam.cache import digest; "
        "print(digest(COMPOSITES, METHODS, STARTS, frozenset(('a', 'b', 'c'))))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert found.stdout.strip() == digest(COMPOSITES, METHODS, STARTS, frozenset(("a", "b", "c")))


def test_what_others_wrote_has_no_digest():
    def mine(ops, activation, relevance):
        return METHODS["lrp"].combine(ops, activation, relevance)

    assert digest(replace(METHODS["lrp"], combine=mine)) is None
    assert digest(object()) is None


# -- the folder --------------------------------------------------------------------------------------------------


def test_the_folder_keeps_within_its_bound_what_was_used_last(tmp_path):
    disk = DiskCache(tmp_path, limit=250)
    for age, key in zip((30, 20, 10), KEYS, strict=False):
        disk.store(key, b"x" * 80)
        os.utime(tmp_path / f"{key}.onnx", (1000 - age, 1000 - age))
    (tmp_path / "mine.onnx").write_bytes(b"x" * 1000)
    assert disk.find(KEYS[0]) is not None  # and thereby used last
    disk.store(KEYS[3], b"x" * 80)
    assert [disk.find(key) is not None for key in KEYS] == [True, False, True, True]
    assert (tmp_path / "mine.onnx").exists()


def test_an_entry_beyond_the_bound_stays_until_the_next(tmp_path):
    disk = DiskCache(tmp_path, limit=10)
    for key in KEYS[:2]:
        disk.store(key, b"x" * 80)
    assert [disk.find(key) is not None for key in KEYS[:2]] == [False, True]


def test_many_may_write_to_the_folder_at_once(tmp_path):
    def use(n: int) -> None:
        disk = DiskCache(tmp_path, limit=200)
        disk.store(KEYS[n % 4], bytes([n % 4]) * 80)
        disk.find(KEYS[(n + 1) % 4])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(64)))
    left = list(tmp_path.iterdir())
    assert 0 < len(left) <= 4
    assert all(path.read_bytes() == bytes([int(path.stem, 16)]) * 80 for path in left)


def test_the_environment_names_folder_and_bound(tmp_path, monkeypatch):
    monkeypatch.delenv("ONNXCAM_CACHE", raising=False)
    assert disk_cache(None) is None
    monkeypatch.setenv("ONNXCAM_CACHE", str(tmp_path / "from-env"))
    for text, size in (("500M", 500e6), ("1.5 GB", 1.5e9), ("77", 77), ("2k", 2000)):
        monkeypatch.setenv("ONNXCAM_CACHE_SIZE", text)
        found = disk_cache(None)
        assert (found.folder, found.limit) == (tmp_path / "from-env", size)
    assert disk_cache(tmp_path / "asked").folder == tmp_path / "asked"
    monkeypatch.setenv("ONNXCAM_CACHE_SIZE", "much")
    with pytest.raises(UsageError, match="'much', which is no size"):
        disk_cache(None)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write to folder"):
        load(resnet(), cache=tmp_path / "file")


# -- recorded explanations ---------------------------------------------------------------------------------------


@pytest.fixture
def no_recording(monkeypatch):
    def switch() -> None:
        def refuse(*args, **kwargs):
            raise AssertionError("recorded again")

        monkeypatch.setattr(runners, "record", refuse)

    return switch


def test_what_is_on_disk_is_not_recorded_again(tmp_path, no_recording):
    first = load(resnet(), cache=tmp_path).explain(X, ["suggested"], ["top3", 2])
    no_recording()
    second = load(resnet(), cache=tmp_path).explain(X, ["suggested"], ["top3", 2])
    assert list(first.maps) == list(second.maps)
    for name, heat in first.maps.items():
        np.testing.assert_array_equal(second.maps[name], heat)
    np.testing.assert_array_equal(second.targets, first.targets)
    assert second.conservation.to_json() == first.conservation.to_json()
    assert second.warnings == first.warnings


def test_what_differs_is_kept_apart(tmp_path):
    def explain(net=resnet, x=X, layers=("auto",), targets=None, **options):
        load(net(), cache=tmp_path).explain(x, list(layers), targets, **options)
        return len(list(tmp_path.iterdir()))

    kept = [
        explain(),
        explain(net=mobilenet),
        explain(layers=["-2"]),
        explain(layers=["-1"]),  # as `auto`, but reported under another name
        explain(targets=[1, 2]),
        explain(targets=["top2"]),
        explain(method="lrp"),
        explain(composite="epsilon_plus"),
        explain(composite="epsilon_gamma_box"),
        explain(start="logit"),
    ]
    assert kept == list(range(1, 11))
    assert explain() == 10
    assert explain(x=X[:1], targets=[3]) == 10  # the class is an input, and the batch is symbolic
    assert explain(composite="epsilon_gamma_box") == 10


def test_weights_beside_the_file_are_part_of_the_key(tmp_path):
    def explained(factor: float) -> np.ndarray:
        proto = resnet()
        weight = next(t for t in proto.graph.initializer if t.name == "fc_w")
        values = onnx.numpy_helper.to_array(weight) * np.float32(factor)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, "fc_w"))
        path = tmp_path / "model.onnx"
        (tmp_path / "weights").unlink(missing_ok=True)
        onnx.save(proto, path, save_as_external_data=True, location="weights", size_threshold=0)
        return load(path, cache=tmp_path / "cache").explain(X).logits

    assert not np.allclose(explained(1.0), explained(2.0))


@pytest.mark.parametrize("broken", [b"", b"not a model", "truncated", "other"])
def test_a_broken_entry_is_recorded_anew_and_said(tmp_path, broken):
    first = load(resnet(), cache=tmp_path).explain(X)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    other = resnet().SerializeToString()
    entry.write_bytes({"truncated": whole[: len(whole) // 2], "other": other}.get(broken, broken))
    again = load(resnet(), cache=tmp_path).explain(X)
    np.testing.assert_array_equal(again.maps["auto"], first.maps["auto"])
    assert sum("is recorded anew" in warning and str(entry) in warning for warning in again.warnings) == 1
    assert entry.read_bytes() == whole
    assert load(resnet(), cache=tmp_path).explain(X).warnings == first.warnings


def test_a_full_disk_is_said_and_does_no_harm(tmp_path, monkeypatch):
    def full(self, key, model):
        raise UsageError("no space left")

    monkeypatch.setattr(DiskCache, "store", full)
    found = load(resnet(), cache=tmp_path).explain(X)
    assert found.maps["auto"].shape[0] == 2
    assert "nothing is kept in the cache: no space left" in found.warnings


def test_what_others_wrote_is_explained_but_not_kept(tmp_path):
    def mine(ops, activation, relevance):
        return METHODS["lrp"].combine(ops, activation, relevance)

    found = load(resnet(), cache=tmp_path).explain(X, method=replace(METHODS["lrp"], combine=mine))
    assert found.maps["auto"].shape[0] == 2
    assert not list(tmp_path.iterdir())


def test_an_entry_is_a_model_that_says_what_its_outputs_are(tmp_path):
    load(resnet(), cache=tmp_path).explain(X, ["auto"])
    (entry,) = tmp_path.iterdir()
    proto = onnx.load(entry)
    onnx.checker.check_model(proto, full_check=True)
    names = json.loads({p.key: p.value for p in proto.metadata_props}["onnxcam.recording"])
    assert {names["logits"], names["classes"], *names["maps"].values()} <= {o.name for o in proto.graph.output}


def test_sessions_are_kept_by_what_they_compute_and_not_without_bound(monkeypatch):
    counted = []
    original = runners.record
    monkeypatch.setattr(runners, "record", lambda *a, **k: counted.append(k["count"]) or original(*a, **k))
    model = load(resnet())
    model.explain(X, targets=[0])
    model.explain(X, targets=[1])
    model.explain(
        X, targets=[1], method=replace(METHODS["relevance-cam"]), composite=replace(COMPOSITES["relevance_cam"])
    )
    assert counted == [1]
    plus = COMPOSITES["relevance_cam"]
    for eps in range(1, SESSIONS + 3):
        model.explain(X[:1], composite=replace(plus, rules={**plus.rules, "linear": Epsilon(eps)}))
    assert len(model._sessions) == SESSIONS


def test_composites_of_one_name_are_told_apart(tmp_path):
    model = load(resnet())
    plus = COMPOSITES["relevance_cam"]
    other = replace(plus, rules={**plus.rules, "linear": Epsilon(1e-6)})
    one, two = (model.explain(X, composite=c).maps["auto"] for c in (plus, other))
    assert not np.allclose(one, two)


def test_the_command_line_keeps_explanations(tmp_path, chelsea, monkeypatch, capsys, no_recording):
    from onnxcam.cli import main

    monkeypatch.delenv("ONNXCAM_CACHE", raising=False)
    path = tmp_path / "net.onnx"
    onnx.save(resnet(), path)
    arguments = ["explain", str(path), str(chelsea), "--preprocess", "imagenet", "--size", "16", "--threads", "1"]
    arguments += ["--provider", "auto,cpu", "--cache", str(tmp_path / "cache"), "--no-overlay", "--json"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    no_recording()
    assert main([*arguments, "--out", str(tmp_path / "two")]) == 0
    one, two = (sorted(p.read_bytes() for p in Path(tmp_path / name).rglob("*.npy")) for name in ("one", "two"))
    assert one == two and len(one) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["options"]["threads"] == 1
