"""Options that several commands share, and how a model is loaded from them."""

from __future__ import annotations

import argparse

from onnxcam.composites import COMPOSITES
from onnxcam.methods import METHODS
from onnxcam.model import Model, load
from onnxcam.preprocess import PRESETS, choose
from onnxcam.starts import STARTS


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an .onnx file")
    parser.add_argument("--output", metavar="NAME", help="the graph output to explain (default: the first)")


def add_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer", "-l", metavar="L", action="append", dest="layers",
        help="node, tensor, OpType_N, module path, glob, index, auto, suggested or all; repeatable (default: auto)",
    )  # fmt: skip


def add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", "-m", metavar="M", default="relevance-cam", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--composite", "-c", metavar="C", help=f"one of {', '.join(COMPOSITES)}")
    parser.add_argument("--start", metavar="S", help=f"one of {', '.join(STARTS)}")


def add_preprocess(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "preprocessing", "by default what the file's metadata says, else a guess that is said aloud"
    )
    group.add_argument("--preprocess", metavar="P", help=f"a preset: {', '.join(PRESETS)}")
    group.add_argument("--mean", metavar="M[,M,M]", type=_numbers, help="mean, in units of pixel * scale")
    group.add_argument("--std", metavar="S[,S,S]", type=_numbers, help="standard deviation, likewise")
    group.add_argument("--scale", metavar="X", type=_scale, help="what pixels 0..255 are multiplied with, 1/255 say")
    group.add_argument("--size", metavar="N|HxW", type=_size, help="input size, where the file leaves it open")
    group.add_argument("--resize", metavar="HOW", help="warp, crop, pad or exact")
    group.add_argument("--channel-order", metavar="ORDER", help="rgb, bgr or gray")
    group.add_argument("--labels", metavar="FILE", help="class names: text, JSON or CSV")


def load_model(arguments: argparse.Namespace) -> Model:
    """The model that the options describe."""
    model = load(
        arguments.model,
        labels=getattr(arguments, "labels", None),
        output=arguments.output,
        cache=getattr(arguments, "cache", None),
    )
    if hasattr(arguments, "preprocess"):
        overrides = {
            "mean": arguments.mean,
            "std": arguments.std,
            "scale": arguments.scale,
            "size": arguments.size,
            "resize": arguments.resize,
            "channel_order": arguments.channel_order,
        }
        chosen, source = choose(arguments.preprocess, model.metadata, model.spec)
        if any(value is not None for value in overrides.values()):
            chosen, source = chosen.override(**overrides), f"{source}, with flags"
        model.preprocess, model.preprocess_source = chosen, source
    return model


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(_number(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not one number or a list such as 0.485,0.456,0.406") from None


def _scale(text: str) -> float:
    try:
        return _number(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 1/255") from None


def _number(text: str) -> float:
    """A number, or a fraction such as 1/255."""
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom) if bottom else float(top)


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if not all(p.isdigit() and int(p) > 0 for p in parts) or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 224 or 224x320 (height x width)")
    return int(parts[0]), int(parts[-1])
