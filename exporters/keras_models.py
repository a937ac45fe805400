"""Keras, on TensorFlow or JAX: `python -m exporters keras MobileNetV2 -o mobilenet_v2.onnx`, or a saved .keras file.

KERAS_BACKEND chooses the backend, tensorflow by default. Tried: keras 3.15.1 with tensorflow-cpu 2.21.0 and tf2onnx
1.17.0; with jax 0.10.2 and jax2onnx 0.17.1. Install one of the two pairs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from exporters.common import Export, finish, no_download, seed_of
from onnxcam.errors import UsageError
from onnxcam.preprocess import Preprocess, preset

# What `preprocess_input` of each family does to pixels 0..255; the others take pixels as they are, or as `tf`.
IMAGENET = ("DenseNet121", "DenseNet169", "DenseNet201")
CAFFE = ("ResNet50", "ResNet101", "ResNet152", "VGG16", "VGG19")
RAW = ("EfficientNet", "MobileNetV3", "ConvNeXt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m exporters keras`."""
    parser.add_argument("model", help="a name from keras.applications, such as MobileNetV2, or a .keras file")
    parser.add_argument(
        "--weights", default="seed:0",
        help="imagenet (downloaded), or seed:N for reproducible random weights (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=224, help="input height and width (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="a fixed batch (default: open)")


def export(args: argparse.Namespace) -> Export:
    """Export the model that `args` describes and check it against Keras' own output."""
    model, name = load(args.model, args.weights, args.size)
    height, width = model.input_shape[1:3]
    if height is None or width is None:
        height = width = args.size
    sample = np.random.default_rng(0).uniform(0, 255, (args.batch or 3, height, width, 3)).astype(np.float32)
    prepared = _prepared(name, (int(height), int(width)))
    sample = ((sample * prepared.scale - np.array(prepared.mean)) / np.array(prepared.std)).astype(np.float32)
    about = f"{args.model}, weights {args.weights}"
    return write(model, args.output, sample=sample, batch=args.batch, preprocess=prepared, description=about)


def write(
    model: Any,
    path: Path,
    *,
    sample: np.ndarray,
    batch: int | None = None,
    preprocess: Preprocess | None = None,
    description: str = "",
) -> Export:
    """Export a classifier that takes pictures (N, H, W, C)."""
    expected = np.asarray(model(sample, training=False))
    if expected.ndim != 2:
        raise UsageError("the model does not return one (N, classes) array; only classifiers can be exported")
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder, "model.onnx")
        signature = [keras.InputSpec(shape=(batch, *sample.shape[1:]), dtype="float32", name="input")]
        model.export(inner, format="onnx", verbose=False, input_signature=signature)
        exported = onnx.load(inner)
    del exported.graph.value_info[:]  # jax2onnx leaves shapes of another layout
    by = f"Keras {keras.__version__} on {keras.backend.backend()}"
    return finish(
        exported, path, sample=sample, expected=expected, preprocess=preprocess,
        description=f"{description}, exported by {by}", tolerance=1e-3,
    )  # fmt: skip


def load(name: str, weights: str, size: int) -> tuple[Any, str]:
    """Build a classifier, or read a saved one."""
    if name.endswith((".keras", ".h5")):
        if not Path(name).exists():
            raise UsageError(f"{name}: no such file")
        return keras.models.load_model(name, compile=False), ""
    make = getattr(keras.applications, name, None)
    if not callable(make):
        known = [n for n in dir(keras.applications) if n[0].isupper()]
        raise UsageError(f"keras.applications has no {name!r}; there are {', '.join(known)}")
    seed = seed_of(weights, "imagenet")
    if seed is None:
        try:
            return make(weights="imagenet"), name
        except Exception as error:  # whatever the download raises where there is no network
            raise no_download(name, error) from error
    keras.utils.set_random_seed(seed)
    model = make(weights=None, input_shape=(size, size, 3))
    rng = np.random.default_rng(seed)
    for layer in model.layers:  # so that no normalisation is the identity
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([_far(variable, rng) for variable in layer.weights])
    return model, name


def _far(variable: Any, rng: np.random.Generator) -> np.ndarray:
    kind, shape = variable.name.split("/")[-1], tuple(variable.shape)
    if kind in ("beta", "moving_mean"):
        return rng.normal(0, 0.3, shape)
    return rng.uniform(0.5, 1.5, shape)


def _prepared(name: str, size: tuple[int, int]) -> Preprocess:
    if name in IMAGENET:
        known = preset("imagenet")
    elif name in CAFFE:
        known = preset("caffe")
    elif name.startswith(RAW):
        known = preset("raw")
    else:
        known = preset("tf")
    return known.override(size=size)
