"""Real models on real images: each exporter's file is explained at all its suggested layers.

Skipped where the files are not at hand (`ONNXCAM_ASSETS`). What each model wants, and how often it is right, is in the
README beside them; samples are small, so the bounds on accuracy are loose and only catch a wrong preprocessing.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import onnxcam

# model: preprocessing, what is added to the ImageNet class, how many of IMAGES the model must get right
CLASSIFIERS = {
    "efficientnet-lite0": ("efficientnet-lite", 0, 6),
    "efficientnet-lite0-torchscript-op13": ("efficientnet-lite", 0, 6),
    "efficientnet-lite0-fp16": ("efficientnet-lite", 0, 6),
    "efficientnet-lite0-qdq-int8": ("efficientnet-lite", 0, 6),
    "efficientnet-lite0-qoperator-u8s8": ("efficientnet-lite", 0, 6),
    "efficientnet-lite0-dynamic-u8": ("efficientnet-lite", 0, 6),
    "squeezenet-fp16-opset7": ("caffe", 0, 4),
    "mobilenet-v2-float-nchw-logits": ("tf", 1, 5),
    "mobilenet-v2-tflite-qdq-nhwc": ("raw", 1, 5),
}
# Models of other data: they are explained, right or wrong.
OTHERS = {"pplcnet-orientation-paddle": "imagenet", "cifar10-resnet20": "imagenet", "mnist-cntk": "raw"}
IMAGES = 8


@cache
def images(assets: Path) -> tuple[list[Path], np.ndarray]:
    """Every so many of the images, with their classes."""
    with open(assets / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = rows[:: len(rows) // IMAGES][:IMAGES]
    return [assets / "images" / row["file"] for row in rows], np.array([int(row["class_index"]) for row in rows])


@cache
def model(assets: Path, name: str) -> onnxcam.Model:
    preprocess = CLASSIFIERS[name][0] if name in CLASSIFIERS else OTHERS[name]
    return onnxcam.load(assets / "models" / f"{name}.onnx", preprocess=preprocess)


@cache
def explained(assets: Path, name: str) -> onnxcam.Explanation:
    """One image at all suggested layers."""
    return model(assets, name).explain(images(assets)[0][0], "suggested")


@cache
def last_layer(assets: Path, name: str) -> onnxcam.Explanation:
    """All images at the last suggested layer, which takes no walk through the network."""
    return model(assets, name).explain(images(assets)[0], "auto")


@pytest.mark.parametrize("name", [*CLASSIFIERS, *OTHERS])
def test_every_suggested_layer_has_a_map_that_says_something(name, assets):
    e = explained(assets, name)
    assert len(e.maps) >= 3
    for layer, heat in e.maps.items():
        assert heat.shape == (1, 1, *e.layers[layer].spatial)
        assert np.isfinite(heat).all()
        assert heat.std() > 0, layer


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_model_sees_what_it_was_trained_on(name, assets):
    _, offset, enough = CLASSIFIERS[name]
    assert (last_layer(assets, name).targets[:, 0] == images(assets)[1] + offset).sum() >= enough


@pytest.mark.parametrize("name", [*CLASSIFIERS, *OTHERS])
def test_relevance_is_conserved_up_to_what_has_no_positive_contribution(name, assets):
    """Oracle: sums. z-plus drops relevance only where a unit has no positive input; of the start's, that is little."""
    dropped = explained(assets, name).conservation.dropped()
    assert sum(share for _, share in dropped) < 0.15
    linear = {"Conv", "Gemm", "MatMul", "AveragePool", "GlobalAveragePool", "ReduceMean"}
    assert {node.op_type for node, share in dropped if share > 1e-5} <= linear


@pytest.mark.parametrize("name", ["efficientnet-lite0-torchscript-op13", "efficientnet-lite0-fp16"])
def test_files_of_the_same_network_give_the_same_maps(name, assets):
    """Another exporter, another precision: Pearson correlation with the reference file's maps of the same classes."""
    ours, reference = last_layer(assets, name), last_layer(assets, "efficientnet-lite0")
    same = ours.targets == reference.targets
    assert same.mean() > 0.8
    for a, b in zip(ours.maps["auto"][same], reference.maps["auto"][same], strict=True):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99


def test_the_shipped_model_agrees_with_the_one_it_was_made_from(assets, shipped_model):
    """The same weights, exported with an open batch: float32 sums in another order, 1e-3 of the largest value."""
    files, _ = images(assets)
    ours = onnxcam.load(shipped_model).explain(files[:2], "auto", 0).maps["auto"]
    path = assets / "models" / "efficientnet-lite0.onnx"
    theirs = onnxcam.load(path, preprocess="efficientnet-lite").explain(files[:2], "auto", 0).maps["auto"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max())
