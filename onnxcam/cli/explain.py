"""`onnxcam explain`: maps and overlays of pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxcam.cli.options import (
    add_input,
    add_layers,
    add_method,
    add_model,
    add_options,
    add_preprocess,
    add_targets,
    load_model,
    options_of,
    read_inputs,
)
from onnxcam.engines.session import PROVIDERS
from onnxcam.errors import UsageError
from onnxcam.files import check_writable
from onnxcam.locations import files_in, is_url
from onnxcam.methods import METHODS, Method, method as find_method
from onnxcam.methods.perturbation import BlackBox
from onnxcam.pool import POOLS
from onnxcam.segment import MEAN_STD, parse as parse_threshold

if TYPE_CHECKING:
    from onnxcam.explanation import Explanation

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
KINDS = ("auto", "positive", "signed", "minmax")
SHOWN = 20  # images listed in the summary
TOP = 10  # features listed of an image


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("explain", help="where did the model look?", description=__doc__)
    add_model(p)
    p.add_argument("images", metavar="IMAGE", nargs="*", help="pictures, or folders of them")
    add_input(p)
    add_layers(p)
    add_targets(p)
    add_method(p)
    add_options(p)
    p.add_argument(
        "--concept", metavar="LAYER=C[,C]", action="append", dest="concepts", default=[],
        help="let relevance through these channels of a layer only; --method channel-relevance ranks them; repeatable",
    )  # fmt: skip
    p.add_argument(
        "--black-box", action="store_true",
        help="only look at what goes in and comes out, for models with ops that onnxcam does not know: --method rise, "
        "or another that needs nothing",
    )  # fmt: skip
    add_preprocess(p)
    add_running(p)
    add_pool(p)
    out = p.add_argument_group("output")
    out.add_argument("--out", "-o", metavar="DIR", default="onnxcam-out", help="where to write (default: onnxcam-out)")
    out.add_argument(
        "--colours", choices=KINDS, default="auto",
        help="auto; positive (from 0 up); signed (red for, blue against); minmax (stretched, as the paper's figures)",
    )  # fmt: skip
    out.add_argument("--no-overlay", action="store_true", help="write the raw maps only")
    out.add_argument(
        "--segment", metavar="HOW", nargs="?", const=MEAN_STD,
        help=f"also write the object as a mask and as COCO outlines: where the map is above {MEAN_STD} (the default) "
        "or a quantile, q0.8 say",
    )  # fmt: skip
    out.add_argument(
        "--parquet", action="store_true",
        help="write the raw maps of all pictures as one table, OUT/maps.parquet, for large sets; OUT may be a URL",
    )  # fmt: skip
    out.add_argument("--json", action="store_true", help="print the manifest as JSON instead of a summary")
    p.set_defaults(run=run_explain)


def add_running(p: argparse.ArgumentParser, batches: bool = True) -> None:
    """Options on who computes, and where; with `batches`, how many pictures at a time."""
    run = p.add_argument_group("running")
    run.add_argument(
        "--engine", choices=("onnx", "numpy", "cupy"),
        help="who computes relevance: one recorded ONNX model, or the walk over arrays (default: onnx)",
    )  # fmt: skip
    run.add_argument(
        "--provider", metavar="P", action="append", dest="providers",
        help=f"execution providers in order of preference, repeated or with commas: {', '.join(PROVIDERS)}, auto, full "
        "names, cuda:1 for a device (default: cpu)",
    )  # fmt: skip
    run.add_argument(
        "--threads", metavar="N", type=_number_of("threads"), help="threads (default: as ONNX Runtime chooses)"
    )
    run.add_argument(
        "--cache", metavar="DIR",
        help="keep recorded explanations there for the next time (default: what ONNXCAM_CACHE says, else nowhere)",
    )  # fmt: skip
    run.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="float64 is slow, for checks")
    if batches:
        run.add_argument(
            "--batch-size", metavar="N", type=_number_of("pictures"), default=8, help="pictures at a time (default: 8)"
        )


def add_pool(p: argparse.ArgumentParser) -> None:
    """Options on sharing pictures out."""
    pool = p.add_argument_group("sharing pictures out")
    pool.add_argument(
        "--engine-pool", choices=POOLS, default="local",
        help="who explains: this process (the default), or actors of Ray, one for each core or GPU",
    )  # fmt: skip
    pool.add_argument("--workers", metavar="N", type=_number_of("actors"), help="how many actors")


def run_explain(arguments: argparse.Namespace) -> int:
    if arguments.parquet:
        return _explain_to_table(arguments)
    if arguments.engine_pool != "local":
        raise UsageError(f"--engine-pool {arguments.engine_pool} writes one table of maps: add --parquet")
    check_writable(arguments.out)
    chosen = _method(arguments)
    quantile = parse_threshold(arguments.segment) if arguments.segment else None
    images = find_pictures(arguments.images)
    model = load_model(arguments)
    inputs = read_inputs(arguments.inputs, model)
    if images and model.spec.name in inputs:
        raise UsageError(f"input {model.spec.name!r} is given twice, by IMAGE and by --input: leave one out")
    count = len(images) or len(np.atleast_1d(inputs.get(model.spec.name, 0)))
    with Bar(count, "explaining", always=type(chosen).runner is not Method.runner) as bar:
        explanation = model.explain(
            images or None,
            arguments.layers or ["auto"],
            inputs=inputs,
            targets=arguments.targets,
            method=chosen,
            options=options_of(arguments),
            concepts=_concepts(arguments.concepts),
            composite=arguments.composite,
            start=arguments.start,
            attention=arguments.attention,
            engine=arguments.engine,
            dtype=arguments.dtype,
            providers=arguments.providers or "cpu",
            threads=arguments.threads,
            batch_size=arguments.batch_size,
            progress=bar.update,
        )
    written = explanation.save(
        arguments.out, overlays=not arguments.no_overlay, segments=bool(arguments.segment), quantile=quantile,
        kind=arguments.colours,
    )  # fmt: skip
    for warning in explanation.warnings:
        print(f"onnxcam: warning: {warning}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(json.loads(written[-1].read_text(encoding="utf-8"))))
    else:
        _summary(explanation, written)
    return 0


def _explain_to_table(arguments: argparse.Namespace) -> int:
    """Explain a set of pictures into a table."""
    from onnxcam.cli.tables import say
    from onnxcam.dataset import explain_dataset

    if arguments.inputs:
        raise UsageError("--parquet explains pictures: leave --input out")
    for option, given in (("--segment", arguments.segment), ("--json", arguments.json)):
        if given:
            raise UsageError(f"--parquet writes raw maps and nothing else: leave {option} out")
    chosen = _method(arguments)
    images = find_pictures(arguments.images)
    model = load_model(arguments)
    with Bar(len(images), "explaining") as bar:
        found = explain_dataset(
            model, images, arguments.out, arguments.layers or ["auto"], arguments.targets,
            engine_pool=arguments.engine_pool, workers=arguments.workers, batch_size=arguments.batch_size,
            threads=arguments.threads, progress=bar.update, method=chosen, options=options_of(arguments),
            concepts=_concepts(arguments.concepts), composite=arguments.composite, start=arguments.start,
            attention=arguments.attention, engine=arguments.engine, dtype=arguments.dtype,
            providers=arguments.providers or "cpu",
        )  # fmt: skip
    for warning in found.warnings:
        print(f"onnxcam: warning: {warning}", file=sys.stderr)
    for path, why in found.skipped.items():
        print(f"onnxcam: warning: {path} is left out: {why}", file=sys.stderr)
    say(f"{found.pictures} pictures; maps in {found.table}")
    return 0


def _method(arguments: argparse.Namespace) -> Method:
    """The method that the options name.

    Raises:
        UsageError: there is none of that name, or it is none for a black box.
    """
    chosen = find_method(arguments.method or ("rise" if arguments.black_box else "relevance-cam"))
    if arguments.black_box and (chosen.walks or not chosen.at_input):
        able = [m.name for m in METHODS.values() if isinstance(m, BlackBox)]
        raise UsageError(f"method {chosen.name} looks into the model: with --black-box there are {', '.join(able)}")
    return chosen


def _concepts(texts: Sequence[str]) -> dict[str, list[int]]:
    """Channels by layer, from LAYER=3,17.

    Raises:
        UsageError: something is written otherwise.
    """
    found: dict[str, list[int]] = {}
    for text in texts:
        layer, equals, channels = text.rpartition("=")
        try:
            numbers = [int(c) for c in channels.split(",")]
        except ValueError:
            numbers = []
        if not equals or not layer or not numbers:
            raise UsageError(f"--concept {text}: write LAYER=CHANNEL[,CHANNEL], numbers from 0")
        found.setdefault(layer, []).extend(numbers)
    return found


def find_pictures(sources: Sequence[str]) -> list[str]:
    """The picture files that the arguments name, by path or URL: folders are searched, not below themselves.

    Raises:
        UsageError: a folder holds no picture.
    """
    found: list[str] = []
    for source in sources:
        if is_url(source):
            inside = files_in(source)
            pictures = [source] if inside is None else [f for f in inside if Path(f).suffix.lower() in SUFFIXES]
            if not pictures:
                raise UsageError(f"{source} holds no picture ({', '.join(sorted(SUFFIXES))})")
            found += pictures
            continue
        path = Path(source)
        if not path.is_dir():
            found.append(source)
            continue
        inside = sorted(str(f) for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
        if not inside:
            raise UsageError(f"folder {source} holds no picture ({', '.join(sorted(SUFFIXES))})")
        found += inside
    return found


def _number_of(what: str) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of {what}")
        return int(text)

    return number


class Bar:
    """A bar with an estimate on standard error, on a terminal only, and where there is more than one thing to do."""

    def __init__(self, total: int, what: str, always: bool = False):
        self.bar = None
        if (total > 1 or always) and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> Bar:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: float, total: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, total=total)


def _summary(e: Explanation, written: Sequence[Path]) -> None:
    from onnxcam.cli.tables import print_table, say

    folders = e.folders()
    print_table(
        ("image", "class", "probability", "logit"),
        [
            (
                (
                    folders[i] if t == 0 else "",
                    _class(e, i, t),
                    f"{e.probability(i, t):.1%}",
                    f"{e.logit(i, t):.2f}",
                ),
                "",
            )
            for i in range(min(len(e.pictures), SHOWN))
            for t in range(e.targets.shape[1])
        ],
        right=("probability", "logit"),
    )
    if len(e.pictures) > SHOWN:
        say(f"... and {len(e.pictures) - SHOWN} more images")
    for name in e.layers:
        if e.is_vector(name):
            _features(e, name)
    say(f"layers: {', '.join(_layer(e, name) for name in e.layers)}")
    if why := _no_overlay(e):
        say(f"maps are written as .npy and not drawn: {why}")
    o = e.options
    source = "guessed" if "guess" in e.model.preprocess_source else e.model.preprocess_source  # the warning says why
    preprocess = f"; preprocessing {o['preprocess']} ({source})" if o["preprocess"] else ""
    rules = [f"{what} {o[what]}" for what in ("composite", "start") if o[what]]
    say(f"{', '.join([o['method'], *rules])}{preprocess}")
    if (dropped := e.conservation.dropped()) and (residual := e.conservation.residual) is not None:
        node, share = dropped[0]
        if share > 1e-4:
            say(f"conservation: {share:.2%} of the relevance was dropped at {node.node} ({node.op_type}), the most")
        else:
            say(f"conservation: every node hands on what it received, to {residual:.0e} of it")
    say(f"{len(written)} files in {written[-1].parent}")


def _features(e: Explanation, name: str) -> None:
    """The features with the most relevance, for or against."""
    from onnxcam.cli.tables import print_table, say

    folders = e.folders()
    rows = []
    for i in range(min(len(e.pictures), SHOWN)):
        for t in range(e.targets.shape[1]):
            for rank, (feature, relevance) in enumerate(e.top_features(name, i, t, TOP)):
                cells = (folders[i], _class(e, i, t)) if rank == 0 else ("", "")
                rows.append(((*cells, str(feature), f"{relevance:+.4g}"), ""))
    say(f"features of {_layer(e, name)}, by relevance:")
    print_table(("image", "class", "feature", "relevance"), rows, right=("feature", "relevance"))


def _no_overlay(e: Explanation) -> str:
    flat = [name for name, heat in e.maps.items() if heat.ndim != 4]
    if flat:
        ranks = sorted({e.maps[name].ndim - 2 for name in flat if not e.is_vector(name)})
        return f"maps have {' and '.join(map(str, ranks))} dimensions, a picture has 2" if ranks else ""
    return "" if e.pictures[0].drawable else "the input is an array, not a picture"


def _class(e: Explanation, image: int, target: int) -> str:
    number, label = e.targets[image, target], e.label(image, target)
    return label if label == f"class {number}" else f"{number} {label}"


def _layer(e: Explanation, name: str) -> str:
    layer = e.layers[name]
    title = name if name in (layer.node, layer.tensor) else f"{name} = {layer.node}"
    return f"{title} ({'x'.join(map(str, e.maps[name].shape[2:]))})"
