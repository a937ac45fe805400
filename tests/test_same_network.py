"""One network with the same weights, built in four frameworks and exported by each one's own exporter: the same
predictions, the same maps.

The truth is a forward pass written out in NumPy (float64), and the maps of the file that PyTorch wrote. Frameworks have
pins that disagree: ONNXCAM_FRAMEWORKS names interpreters that have them, "keras=/venvs/tf/bin/python,flax=...";
docs/exporters.md has what came of it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from exporters.same_network import CONVOLUTIONS, EPSILON, FRAMEWORKS, SIZE, compare, weights

ROOT = Path(__file__).parents[1]
NEEDED = {"torch": ["torch", "onnxscript"], "keras": ["keras"], "flax": ["flax", "jax2onnx"], "paddle": ["paddle"]}


def interpreter(framework: str) -> str | None:
    """Who can export with a framework: this interpreter, one that is named, or none."""
    named = dict(part.split("=", 1) for part in os.environ.get("ONNXCAM_FRAMEWORKS", "").split(",") if "=" in part)
    if framework in named:
        return named[framework]
    here = all(importlib.util.find_spec(module) for module in NEEDED[framework])
    return sys.executable if here else None


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("same")
    found = {}
    for framework in FRAMEWORKS:
        python, path = interpreter(framework), folder / f"{framework}.onnx"
        if python is not None:
            command = [python, "-m", "exporters", "same-network", "--framework", framework, "-o", str(path)]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            found[framework] = path
    return found


def by_hand(x: np.ndarray) -> np.ndarray:
    """The logits, by loops over kernel cells."""
    w = {name: value.astype(np.float64) for name, value in weights().items()}

    def block(x: np.ndarray, name: str) -> np.ndarray:
        k, _, after, stride = CONVOLUTIONS[name]
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        size = (x.shape[2] + 2 - k) // stride + 1
        out = np.zeros((len(x), after, size, size))
        for i in range(k):
            for j in range(k):
                seen = padded[:, :, i : i + stride * size : stride, j : j + stride * size : stride]
                out += np.einsum("nchw,oc->nohw", seen, w[f"{name}.weight"][:, :, i, j])
        scale = w[f"{name}.gamma"] / np.sqrt(w[f"{name}.variance"] + EPSILON)
        return out * scale[:, None, None] + (w[f"{name}.beta"] - w[f"{name}.mean"] * scale)[:, None, None]

    def relu(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)

    x = relu(block(x, "stem"))
    x = relu(x + block(relu(block(x, "first")), "second"))
    x = x.reshape(len(x), 16, SIZE // 2, 2, SIZE // 2, 2).max((3, 5))
    return relu(block(x, "down")).mean((2, 3)) @ w["head.weight"] + w["head.bias"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_predictions_are_those_written_out_by_hand(files, framework: str) -> None:
    if framework not in files:
        pytest.skip(f"{framework} is not installed here: name an interpreter by ONNXCAM_FRAMEWORKS")
    session = onnxruntime.InferenceSession(str(files[framework]))
    entry = session.get_inputs()[0]
    x = np.random.default_rng(3).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
    fed = x if entry.shape[1] == 3 else np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    (found,) = session.run(None, {entry.name: fed})
    expected = by_hand(x.astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())  # float32


@pytest.mark.parametrize("framework", FRAMEWORKS[1:])
def test_maps_are_those_of_the_file_from_pytorch(files, framework: str) -> None:
    if framework not in files:
        pytest.skip(f"{framework} is not installed here: name an interpreter by ONNXCAM_FRAMEWORKS")
    ((_, _, gap, correlation),) = compare([files["torch"], files[framework]])
    assert gap < 1e-5 and correlation >= 0.999
