"""`python -m exporters torch`, `timm`, and frameworks that other interpreters have (ONNXCAM_FRAMEWORKS, see
test_same_network.py).

The truth is the framework's own output: an exporter writes nothing unless ONNX Runtime gives that, so here it is
checked that it does write, what it writes into the metadata, and that it refuses in one line.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import onnxcam
from exporters.__main__ import main
from test_same_network import interpreter

ROOT = Path(__file__).parents[1]
SOURCE = """
import torch

def make():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(6, 4))

net = make()
number = lambda: 5
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_nets.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return tmp_path


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_callable_of_yours_is_exported_with_its_weights_and_names(package: Path, exporter: str) -> None:
    sys.path.insert(0, str(package))
    try:
        import my_nets
    finally:
        sys.path.pop(0)
    net = my_nets.make()
    with torch.no_grad():
        net[4].bias += 1
    torch.save(net.state_dict(), package / "state.pt")
    (package / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    command = [
        "torch",
        "my_nets:make",
        "--state",
        "state.pt",
        "--labels",
        "names.txt",
        "--size",
        "16",
        "--preprocess",
        "tf",
    ]
    assert main([*command, "--exporter", exporter, "-o", "net.onnx"]) == 0
    model = onnxcam.load("net.onnx")
    assert list(model.labels) == ["ant", "bee", "cat", "dog"] and model.preprocess.size == (16, 16)
    assert model.preprocess.mean == onnxcam.preprocess.PRESETS["tf"].mean and "guess" not in model.preprocess_source
    x = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession("net.onnx").run(None, {"input": x})
    with torch.no_grad():
        np.testing.assert_allclose(found, net.eval()(torch.tensor(x)).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["torch", "my_nets"], "names no model: write MODULE:CALLABLE"),
        (["torch", "my_nets:nothing"], "cannot be imported"),
        (["torch", "no_such_module:make"], "cannot be imported"),
        (["torch", "my_nets:number"], "gives a int, not a torch.nn.Module"),
        (["torch", "my_nets:make", "--state", "gone.pt"], "is no state of this model"),
        (["torch", "my_nets:make", "--batch", "0"], "'dynamic' or a whole number"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(package: Path, arguments, what, capsys) -> None:
    assert main([*arguments, "--size", "16", "-o", "net.onnx"]) == 2
    error = capsys.readouterr().err
    assert what in error and len(error.splitlines()) == 1 and not Path("net.onnx").exists()


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_timm_classifier_carries_its_preprocessing(tmp_path: Path, capsys) -> None:
    path = tmp_path / "net.onnx"
    assert main(["timm", "resnet10t", "--size", "64", "-o", str(path)]) == 0
    model = onnxcam.load(path)
    assert model.preprocess.size == (64, 64) and model.preprocess.mean == pytest.approx((0.485, 0.456, 0.406))
    assert any(row.path.startswith("layer4") for row in model.layers())
    assert main(["timm", "no_such_net", "-o", str(path)]) == 2
    assert "timm has no model 'no_such_net'" in capsys.readouterr().err


OTHERS = {
    "keras": ["keras", "MobileNetV2", "--size", "64"],
    "paddle": ["paddle", "resnet18", "--size", "64"],
}


@pytest.mark.parametrize("framework", OTHERS)
def test_other_frameworks(framework: str, tmp_path: Path) -> None:
    python = interpreter(framework)
    if python is None:
        pytest.skip(f"{framework} is not installed here: name an interpreter by ONNXCAM_FRAMEWORKS")
    path = tmp_path / "net.onnx"
    command = [python, "-m", "exporters", *OTHERS[framework], "-o", str(path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    model = onnxcam.load(path)
    assert model.preprocess.size == (64, 64) and "guess" not in model.preprocess_source
    shape = (1, 64, 64, 3) if model.spec.layout == "NHWC" else (1, 3, 64, 64)
    e = model.explain(np.random.default_rng(0).standard_normal(shape).astype(np.float32), "suggested")
    assert all(np.ptp(heat) > 0 for heat in e.maps.values())
