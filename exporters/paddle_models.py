"""Classifiers of paddle.vision: `python -m exporters paddle resnet18 -o resnet18.onnx`.

Tried: paddlepaddle 3.3.1, paddle2onnx 2.1.0, which wants onnx 1.17 and an environment of its own. Its own graph
optimisers are left out: one of them installs packages.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import paddle
from paddle.vision import models

from exporters.common import Export, finish, no_download, seed_of
from onnxcam.errors import ModelError, UsageError
from onnxcam.preprocess import preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m exporters paddle`."""
    parser.add_argument("model", help="a name from paddle.vision.models, such as resnet18")
    parser.add_argument(
        "--weights", default="seed:0",
        help="pretrained (downloaded), or seed:N for reproducible random weights (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=224, help="input height and width (default: %(default)s)")
    parser.add_argument("--opset", type=int, default=17, help="default: %(default)s")


def export(args: argparse.Namespace) -> Export:
    """Export the model that `args` describes and check it against Paddle's own output."""
    about = f"paddle.vision {args.model}, weights {args.weights}"
    return write(load(args.model, args.weights), args.output, size=args.size, opset=args.opset, about=about)


def write(model: Any, path: Path, *, size: int, channels: int = 3, opset: int = 17, about: str = "") -> Export:
    """Export a `paddle.nn.Layer` that takes pictures (N, C, H, W)."""
    model.eval()
    sample = np.random.default_rng(0).standard_normal((3, channels, size, size)).astype(np.float32)
    expected = model(paddle.to_tensor(sample))
    expected = (expected[0] if isinstance(expected, list | tuple) else expected).numpy()
    tool = shutil.which("paddle2onnx", path=str(Path(sys.executable).parent)) or shutil.which("paddle2onnx")
    if tool is None:
        raise UsageError("paddle2onnx is not installed: pip install paddle2onnx")
    with tempfile.TemporaryDirectory() as folder:
        spec = paddle.static.InputSpec([-1, channels, size, size], "float32", "x")
        paddle.jit.save(model, f"{folder}/m", input_spec=[spec])
        command = [
            tool, "--model_dir", folder, "--model_filename", "m.json", "--params_filename", "m.pdiparams",
            "--save_file", f"{folder}/m.onnx", "--opset_version", str(opset), "--optimize_tool", "None",
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True)
        if not Path(folder, "m.onnx").exists():
            raise ModelError(f"paddle2onnx failed: {(ran.stderr or ran.stdout).strip().splitlines()[-1][:200]}")
        exported = onnx.load(f"{folder}/m.onnx")
    return finish(
        exported, path, sample=sample, expected=expected, preprocess=preset("imagenet").override(size=(size, size)),
        description=f"{about}, exported by paddle2onnx", tolerance=1e-3,
    )  # fmt: skip


def load(name: str, weights: str) -> Any:
    """Build a classifier."""
    make = getattr(models, name, None)
    if not callable(make) or not name[0].islower():
        raise UsageError(f"paddle.vision.models has no {name!r}")
    seed = seed_of(weights, "pretrained")
    if seed is None:
        try:
            return make(pretrained=True)
        except Exception as error:  # whatever the download raises where there is no network
            raise no_download(name, error) from error
    paddle.seed(seed)
    model = make()
    rng = np.random.default_rng(seed)
    for layer in model.sublayers():  # so that no normalisation is the identity
        if isinstance(layer, paddle.nn.BatchNorm2D):
            for variable, (low, high) in (
                (layer.weight, (0.5, 1.5)), (layer.bias, (-0.3, 0.3)), (layer._mean, (-0.3, 0.3)),
                (layer._variance, (0.3, 2.0)),
            ):  # fmt: skip
                variable.set_value(paddle.to_tensor(rng.uniform(low, high, variable.shape).astype("float32")))
    return model
