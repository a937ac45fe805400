"""Classifiers of timm, by its own names: `python -m exporters timm convnext_tiny -o convnext_tiny.onnx`."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from exporters.common import Export, finish, no_download, seed_of
from exporters.torch_common import add_torch_arguments, batch_of, import_torchvision, seed_weights, to_onnx
from onnxcam.errors import UsageError
from onnxcam.preprocess import Preprocess


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m exporters timm`."""
    parser.add_argument("model", help="a name from timm.list_models(), such as convnext_tiny")
    parser.add_argument(
        "--weights", default="seed:0",
        help="pretrained (downloaded), seed:N for reproducible random weights, none for the framework's own "
        "initialisation (default: %(default)s)",
    )  # fmt: skip
    add_torch_arguments(parser)


def export(args: argparse.Namespace) -> Export:
    """Export the model that `args` describes and check it against timm's own output."""
    model, config = load(args.model, args.weights)
    size = args.size or int(config["input_size"][1])
    exported, sample, expected = to_onnx(
        model, size=size, batch=batch_of(args.batch), exporter=args.exporter, opset=args.opset,
        keep_batchnorm=args.keep_batchnorm,
    )  # fmt: skip
    return finish(
        exported, args.output, sample=sample, expected=expected, preprocess=preprocess(config, size),
        labels=config.get("labels"),
        description=f"timm {args.model}, weights {args.weights}, exported by torch ({args.exporter})",
        tolerance=1e-3,
    )  # fmt: skip


def load(name: str, weights: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a classifier, and what timm knows of its pictures."""
    import_torchvision()
    import timm
    from timm.data.config import resolve_data_config
    from timm.layers.config import set_fused_attn

    set_fused_attn(False)  # the fused attention has no ONNX form in some exporters
    if name not in timm.list_models():
        near = timm.list_models(f"*{name}*")[:5]
        raise UsageError(f"timm has no model {name!r}{f'; there is {chr(44).join(near)}' if near else ''}")
    seed = seed_of(weights, "pretrained", "none")
    try:
        model = timm.create_model(name, pretrained=weights == "pretrained")
    except Exception as error:  # whatever the hub's client raises where there is no network
        if weights != "pretrained":
            raise
        raise no_download(name, error) from error
    if seed is not None:
        seed_weights(model, seed)
    return model.eval(), resolve_data_config({}, model=model)


def preprocess(config: dict[str, Any], size: int) -> Preprocess:
    """What timm says of the pictures."""
    kind = {"center": "crop", "squash": "warp", "border": "pad"}[config.get("crop_mode", "center")]
    return Preprocess(
        "timm", size=(size, size), resize=kind, crop_fraction=float(config["crop_pct"]),
        interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic",
        scale=1 / 255, mean=tuple(config["mean"]), std=tuple(config["std"]),
    )  # fmt: skip
