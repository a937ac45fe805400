"""`onnxcam compile`: the explanation as an ONNX model, which runs wherever ONNX runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcam.cli.options import add_input, add_layers, add_method, add_model, add_preprocess, load_model, read_inputs
from onnxcam.errors import UsageError

if TYPE_CHECKING:
    import onnx

    from onnxcam.compile import Compiled


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("compile", help="the explanation as an ONNX model", description=__doc__)
    add_model(p)
    add_input(p, "a value to fix for an input that holds for all images, a switch or a prompt: number, .npy, .npz")
    p.add_argument("--out", "-o", metavar="OUT", help="the .onnx file to write")
    p.add_argument(
        "--triton", metavar="DIR", help="write NAME/1/model.onnx and NAME/config.pbtxt into this Triton repository"
    )
    add_layers(p)
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--targets", metavar="N", type=_count, default=1, dest="slots",
        help="how many classes an image its input `targets` asks for (default: 1); -1 there is the predicted class",
    )  # fmt: skip
    which.add_argument(
        "--target", "-t", metavar="CLASS|NAME", action="append", dest="fixed",
        help="fix the class in the model: number, label, top3 or predicted; repeatable",
    )  # fmt: skip
    add_method(p)
    p.add_argument("--upsample", action="store_true", help="maps at the size of the input, bilinearly")
    p.add_argument("--normalise", action="store_true", help="maps from 0 to 1, each by its own minimum and maximum")
    add_preprocess(p)
    p.set_defaults(run=run_compile)


def run_compile(arguments: argparse.Namespace) -> int:
    from onnxcam.compile import compile
    from onnxcam.triton import save_triton

    if not arguments.out and not arguments.triton:
        raise UsageError("say where to write: -o OUT.onnx, or --triton DIR")
    _check_place(arguments.out, arguments.model)
    model = load_model(arguments)
    inputs = read_inputs(arguments.inputs, model)
    compiled = compile(
        model,
        arguments.layers or ["auto"],
        arguments.fixed,
        slots=arguments.slots,
        method=arguments.method or "relevance-cam",
        composite=arguments.composite,
        start=arguments.start,
        attention=arguments.attention,
        size=arguments.size,
        inputs=inputs,
        upsample=arguments.upsample,
        normalise=arguments.normalise,
    )
    written = []
    if arguments.out:
        written.append(compiled.save(arguments.out))
    if arguments.triton:
        name = Path(arguments.out or f"{Path(model.name).stem}-explained").stem
        written += save_triton(compiled, arguments.triton, name)
    _summary(compiled, written, Path(arguments.model).stat().st_size)
    return 0


def _check_place(out: str | None, source: str) -> None:
    """See, before the work, that the file can be written and is not the model itself."""
    if out is None:
        return
    place = Path(out)
    if place.is_dir():
        raise UsageError(f"{out} is a folder: name the file to write, {place / 'explained.onnx'} say")
    if place.exists() and Path(source).exists() and place.samefile(source):
        raise UsageError(f"{out} is the model itself, which stays as it is: name another file")
    if not place.absolute().parent.is_dir():
        raise UsageError(f"cannot write {out}: there is no folder {place.parent}")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of targets; --target fixes a class")
    return int(text)


def _summary(compiled: Compiled, written: Sequence[Path], before: int) -> None:
    from onnxcam.cli.tables import print_table, say

    graph = compiled.cut.graph
    layers = {output: layer for layer, output in compiled.maps.items()}
    rows = [("input", v, "") for v in graph.input] + [("output", v, layers.get(v.name, "")) for v in graph.output]
    print_table(
        ("", "name", "type", "shape", "layer"),
        [((side, v.name, _type(v), _shape(v), layer), "") for side, v, layer in rows],
    )
    opset = next(o.version for o in compiled.cut.opset_import if o.domain in ("", "ai.onnx"))
    size = compiled.size
    # Where the model's weights lie in files of their own, its size says nothing.
    growth = f" ({size / before - 1:+.1%} to the model's)" if size < 2 * before else ""
    say(f"opset {opset}, {len(graph.node)} nodes, {size / 2**20:.1f} MiB{growth}")
    for note in compiled.notes:
        say(note)
    for path in written:
        say(f"wrote {path}")


def _type(value: onnx.ValueInfoProto) -> str:
    from onnx.helper import tensor_dtype_to_np_dtype

    return str(tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def _shape(value: onnx.ValueInfoProto) -> str:
    return "x".join(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim)
