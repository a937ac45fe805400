"""A .tflite file, float or int8: `python -m exporters tflite model.tflite -o model.onnx`.

Tried: tf2onnx 1.17.0 with tensorflow-cpu 2.21.0, which also runs the file for the check.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow
import tf2onnx

from exporters.common import Export, finish
from onnxcam.errors import UsageError
from onnxcam.labels import read_labels
from onnxcam.preprocess import PRESETS, preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m exporters tflite`."""
    parser.add_argument("model", type=Path, help="a .tflite file")
    parser.add_argument("--opset", type=int, default=17, help="default: %(default)s")
    parser.add_argument("--preprocess", choices=PRESETS, default="tf", help="of float files (default: %(default)s)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names: text, JSON or CSV")


def export(args: argparse.Namespace) -> Export:
    """Convert the file and check it against TensorFlow Lite's own output."""
    if not args.model.exists():
        raise UsageError(f"{args.model}: no such file")
    try:
        interpreter = tensorflow.lite.Interpreter(str(args.model))
    except ValueError as error:
        raise UsageError(f"{args.model} is no TensorFlow Lite model: {str(error).splitlines()[0]}") from error
    interpreter.allocate_tensors()
    (entry, *others), (result, *_) = interpreter.get_input_details(), interpreter.get_output_details()
    if others or len(entry["shape"]) != 4:
        raise UsageError(f"{args.model} takes {1 + len(others)} inputs; a classifier of pictures takes one")
    rng = np.random.default_rng(0)
    kind = entry["dtype"]
    shape = tuple(int(n) for n in entry["shape"])
    if np.issubdtype(kind, np.integer):
        limits = np.iinfo(kind)
        sample = rng.integers(limits.min, limits.max + 1, shape).astype(kind)
    else:
        sample = rng.uniform(-1, 1, shape).astype(kind)
    interpreter.set_tensor(entry["index"], sample)
    interpreter.invoke()
    expected = interpreter.get_tensor(result["index"])
    exported, _ = tf2onnx.convert.from_tflite(str(args.model), opset=args.opset)
    quantised = np.issubdtype(kind, np.integer)
    known = preset("raw" if quantised else args.preprocess).override(size=(shape[1], shape[2]))
    return finish(
        exported, args.output, sample=sample, expected=expected, preprocess=known,
        labels=None if args.labels is None else list(read_labels(args.labels)),
        description=f"{args.model.name}, converted by tf2onnx {tf2onnx.__version__}",
        # Of int8 files the two runtimes round at other places: a few steps of the output.
        tolerance=0.05 if quantised else 1e-3,
    )  # fmt: skip
