"""Options that several commands share, and how a model is loaded from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from onnxcam.composites import ATTENTION, COMPOSITES
from onnxcam.errors import UsageError
from onnxcam.input_spec import InputSpec, at_rest
from onnxcam.methods import METHODS, method as find_method
from onnxcam.model import Model, load
from onnxcam.pictures import open_image
from onnxcam.preprocess import PRESETS, choose
from onnxcam.starts import STARTS

if TYPE_CHECKING:
    from onnxcam.evaluation.examples import Example


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an .onnx file")
    parser.add_argument(
        "--output", metavar="NAME", help="output, or inner tensor of logits, to explain (default: the first output)"
    )


GIVEN = "an array (.npy, .npz), a picture or a number for an input; without NAME for the one that pictures go to"


def add_input(parser: argparse.ArgumentParser, about: str = GIVEN) -> None:
    parser.add_argument(
        "--input", metavar="[NAME=]FILE", action="append", dest="inputs", default=[], help=f"{about}; repeatable"
    )


def read_inputs(given: Sequence[str], model: Model) -> dict[str, Any]:
    """What `--input` names, by the model's inputs.

    Raises:
        UsageError: a file is missing or holds no array, or an input is named twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or (Path(text).exists() and name not in {spec.name for spec in model.inputs}):
            name, value = "", text
        for key, array in _arrays(value, name, model.spec.name).items():
            if key in found:
                raise UsageError(f"--input {text}: input {key!r} is given twice")
            found[key] = array
    return found


def _arrays(value: str, name: str, main: str) -> dict[str, Any]:
    """One value of `--input`: by name, or what an archive calls its arrays."""
    path = Path(value)
    if path.suffix.lower() not in (".npy", ".npz"):
        if value.lower() in ("true", "false"):
            return {name or main: np.array(value.lower() == "true")}
        with suppress(ValueError):
            return {name or main: np.array(float(value))}
        if path.exists():
            return {name or main: open_image(value)}
    try:
        loaded = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"--input {value}: no such file, and no number") from None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UsageError(f"--input {value} cannot be read as an array: {str(error).splitlines()[0]}") from None
    if isinstance(loaded, np.ndarray):
        return {name or main: loaded}
    with loaded:
        arrays = {key: loaded[key] for key in loaded.files}
    if len(arrays) == 1:
        ((key, array),) = arrays.items()
        return {name or (key if key != "arr_0" else main): array}
    if name:
        raise UsageError(f"--input {name}={value} holds {len(arrays)} arrays ({', '.join(arrays)}): one is wanted")
    return arrays


def add_layers(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    parser.add_argument(
        "--layer", "-l", metavar="L", action="append", dest="layers",
        help="node, tensor, OpType_N, module path, glob, index, input, auto, suggested or all; repeatable "
        f"(default: {default})",
    )  # fmt: skip


def add_targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", "-t", metavar="CLASS|NAME", action="append", dest="targets",
        help="class number, label, top3 or predicted; may be repeated (default: predicted)",
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser, form: str = "NAME=VALUE") -> None:
    parser.add_argument(
        "--set", metavar=form, action="append", dest="options", default=[],
        help="an option of the method, samples=50 say; `onnxcam methods` lists them; repeatable",
    )  # fmt: skip


def options_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What `--set` says, by name.

    Raises:
        UsageError: something is no NAME=VALUE.
    """
    found = {}
    for text in arguments.options:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"--set {text}: write NAME=VALUE")
        found[name.strip().replace("-", "_") if "." not in name else name.strip()] = value.strip()
    return found


def options_by_method(arguments: argparse.Namespace, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """What `--set METHOD.NAME=VALUE` says, by method.

    Raises:
        UsageError: a method is not named, or is none.
    """
    found: dict[str, dict[str, str]] = {}
    for name, value in options_of(arguments).items():
        method, dot, option = name.partition(".")
        if not dot:
            raise UsageError(f"--set {name}={value}: say of which method, {methods[0]}.{name} say")
        found.setdefault(find_method(method).name, {})[option.replace("-", "_")] = value
    return found


def split(texts: Sequence[str] | None) -> list[str]:
    """Names that were given one by one or with commas."""
    return [name for text in texts or [] for name in text.split(",") if name]


def add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", "-m", metavar="M", help=f"one of {', '.join(METHODS)} (default: relevance-cam)")
    parser.add_argument("--composite", "-c", metavar="C", help=f"one of {', '.join(COMPOSITES)}")
    parser.add_argument("--start", metavar="S", help=f"one of {', '.join(STARTS)}")
    add_attention(parser)


def add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--attention", choices=ATTENTION,
        help="how relevance passes attention: to the values alone (cp, the default), or to queries and keys as well",
    )  # fmt: skip


def add_preprocess(parser: argparse.ArgumentParser, names: str = "--labels") -> None:
    """Options on what the input is, and `names` for the names of the classes."""
    group = parser.add_argument_group(
        "preprocessing", "by default what the file's metadata says, else a guess that is said aloud"
    )
    group.add_argument("--preprocess", metavar="P", help=f"a preset: {', '.join(PRESETS)}")
    group.add_argument("--mean", metavar="M[,M,M]", type=_numbers, help="mean, in units of pixel * scale")
    group.add_argument("--std", metavar="S[,S,S]", type=_numbers, help="standard deviation, likewise")
    group.add_argument("--scale", metavar="X", type=_scale, help="what pixels 0..255 are multiplied with, 1/255 say")
    group.add_argument("--size", metavar="N|HxW", type=parse_size, help="input size, where the file leaves it open")
    group.add_argument("--resize", metavar="HOW", help="warp, crop, pad or exact")
    group.add_argument("--channel-order", metavar="ORDER", help="rgb, bgr or gray")
    group.add_argument(names, metavar="FILE", dest="labels", help="class names: text, JSON or CSV")


def add_truth(parser: argparse.ArgumentParser, located: bool = True) -> None:
    """Options on what is known of the pictures: their classes and, where that is asked for, where the objects are."""
    truth = parser.add_argument_group("what is known of the pictures")
    truth.add_argument(
        "--labels", "--classes", metavar="FILE", dest="classes_file", help="their classes, a CSV: file, class"
    )
    truth.add_argument(
        "--label-offset", metavar="N", type=int, default=0,
        help="added to these classes: 1 where the model's class 0 is the background",
    )  # fmt: skip
    if located:
        truth.add_argument("--boxes", metavar="FILE", help="a CSV: file, x0, y0, x1, y1, in pixels of the picture")
        truth.add_argument("--masks", metavar="DIR", help="pictures of the same names, white where the object is")
        truth.add_argument("--coco", metavar="FILE", help="a COCO JSON")
        truth.add_argument("--voc", metavar="DIR", help="Pascal VOC XML files of the same names")


def read_examples(arguments: argparse.Namespace, pictures: Sequence[str]) -> list[Example]:
    """The pictures with what `add_truth`'s options say of them."""
    from onnxcam.evaluation.examples import examples

    where = {name: getattr(arguments, name, None) for name in ("boxes", "masks", "coco", "voc")}
    return examples(pictures, labels=arguments.classes_file, offset=arguments.label_offset, **where)


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


def say_what_else(model: Model) -> None:
    """Print what the model has beside the input and the output that are explained."""
    from onnxcam.cli.tables import say

    if others := [spec for spec in model.inputs if spec is not model.spec]:
        say(f"  input {model.spec.name} {model.spec.text}; to be given by --input NAME=FILE.npy: {_listed(others)}")
    if outputs := [name for name in model.outputs if name != model.output]:
        say(f"  output {model.output}; others, by --output NAME: {', '.join(outputs)}")


def _listed(specs: Sequence[InputSpec]) -> str:
    """Inputs with their shapes, and the value of those that need not be given."""
    rest = {spec.name: at_rest(spec) for spec in specs}
    return ", ".join(f"{s.name} {s.text}" + ("" if (v := rest[s.name]) is None else f" = {v.item()}") for s in specs)


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


def parse_size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if not all(p.isdigit() and int(p) > 0 for p in parts) or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 224 or 224x320 (height x width)")
    return int(parts[0]), int(parts[-1])
