"""Classifiers of torchvision, by its own names: `python -m exporters torchvision resnet18 -o resnet18.onnx`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any
from urllib.error import URLError

from torch import hub, nn

from exporters.common import Export, finish
from exporters.torch_common import add_torch_arguments, batch_of, import_torchvision, seed_weights, to_onnx
from onnxcam.errors import UsageError
from onnxcam.preprocess import Preprocess, preset


@dataclass(frozen=True)
class Source:
    """A torchvision model with the weights asked for, and what is known of its images and classes."""

    model: nn.Module
    preprocess: Preprocess
    labels: list[str] | None
    weights: str

    @property
    def size(self) -> int:
        """Input height and width."""
        assert self.preprocess.size is not None
        return self.preprocess.size[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m exporters torchvision`."""
    parser.add_argument("model", help="a name from torchvision.models.list_models(), such as resnet18")
    parser.add_argument(
        "--weights",
        default="seed:0",
        help="DEFAULT or another name of trained weights (downloaded), seed:N for reproducible random weights whose "
        "BatchNorm is far from identity, none for the framework's own initialisation (default: %(default)s)",
    )
    add_torch_arguments(parser)


def export(args: argparse.Namespace) -> Export:
    """Export the model that `args` describes and check it against torchvision's own output."""
    batch = batch_of(args.batch)
    source = load(args.model, args.weights, args.size)
    model, sample, expected = to_onnx(
        source.model,
        size=source.size,
        batch=batch,
        exporter=args.exporter,
        opset=args.opset,
        keep_batchnorm=args.keep_batchnorm,
    )
    description = f"torchvision {args.model}, weights {source.weights}, exported by torch ({args.exporter})"
    return finish(
        model,
        args.output,
        sample=sample,
        expected=expected,
        preprocess=source.preprocess,
        labels=source.labels,
        description=description,
    )


def load(name: str, weights: str = "seed:0", size: int | None = None) -> Source:
    """Build a torchvision classifier; `weights` and `size` as on the command line."""
    models = import_torchvision().models
    if name not in models.list_models(module=models):
        raise UsageError(f"torchvision has no classifier '{name}'; see torchvision.models.list_models()")
    kind, _, number = weights.partition(":")
    if kind == "seed" and number.isdecimal():
        model = seed_weights(models.get_model(name, weights=None), int(number))
        return Source(model, _preprocess(size), None, weights)
    if weights == "none":
        return Source(models.get_model(name, weights=None), _preprocess(size), None, "as initialised")

    available = models.get_model_weights(name)
    if weights not in available.__members__:
        raise UsageError(f"no weights '{weights}' for {name}: none, seed:N, {', '.join(available.__members__)}")
    chosen = available[weights]
    try:
        model = models.get_model(name, weights=chosen)
    except (URLError, ConnectionError, TimeoutError) as error:
        raise UsageError(
            f"the weights of {name} could not be downloaded from {chosen.url} ({error}); use --weights seed:0 for "
            f"random weights, or put the file into {hub.get_dir()}/checkpoints"
        ) from error
    return Source(model, _preprocess(size, chosen.transforms()), list(chosen.meta["categories"]), str(chosen))


def _preprocess(size: int | None, transforms: Any = None) -> Preprocess:
    """What goes into the file: the ImageNet preset, or what the weights' own transforms say."""
    if transforms is None:
        return replace(preset("imagenet"), size=(size or 224,) * 2)
    (crop,), (resized,) = transforms.crop_size, transforms.resize_size
    return Preprocess(
        "torchvision",
        size=(size or crop,) * 2,
        resize="crop",
        crop_fraction=crop / resized,
        interpolation=transforms.interpolation.value,
        scale=1 / 255,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
