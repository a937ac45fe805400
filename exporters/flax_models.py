"""A Flax nnx module: `python -m exporters flax my_package:make -o model.onnx`; `make()` returns it, (N, H, W, C) in.

Tried: flax 0.12.8, jax 0.10.2, jax2onnx 0.17.1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax2onnx
import numpy as np

from exporters.common import Export, called, finish, imported
from onnxcam.labels import read_labels
from onnxcam.preprocess import PRESETS, preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m exporters flax`."""
    parser.add_argument("model", metavar="MODULE:CALLABLE", help="what returns the module; looked for here, too")
    parser.add_argument("--size", type=int, default=224, help="input height and width (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--preprocess", choices=PRESETS, default="imagenet", help="default: %(default)s")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names: text, JSON or CSV")


def export(args: argparse.Namespace) -> Export:
    """Export the module that `args` names and check it against JAX's own output."""
    return write(
        called(args.model, imported(args.model)), args.output, size=args.size, channels=args.channels,
        preprocess=args.preprocess,
        labels=None if args.labels is None else list(read_labels(args.labels)), about=args.model,
    )  # fmt: skip


def write(
    module: Any,
    path: Path,
    *,
    size: int,
    channels: int = 3,
    preprocess: str = "imagenet",
    labels: list[str] | None = None,
    about: str = "",
) -> Export:
    """Export a module whose statistics are frozen."""
    module.eval()
    sample = np.random.default_rng(0).standard_normal((3, size, size, channels)).astype(np.float32)
    expected = np.asarray(module(sample))
    exported = jax2onnx.to_onnx(module, [("B", size, size, channels)])
    del exported.graph.value_info[:]  # shapes of another layout stay behind in them
    return finish(
        exported, path, sample=sample, expected=expected, preprocess=preset(preprocess).override(size=(size, size)),
        labels=labels, description=f"{about}, exported by jax2onnx", tolerance=1e-3,
    )  # fmt: skip
