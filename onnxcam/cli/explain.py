"""`onnxcam explain`: maps and overlays of pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcam.cli.options import add_model, add_preprocess, load_model
from onnxcam.composites import COMPOSITES
from onnxcam.engines.session import PROVIDERS
from onnxcam.errors import UsageError
from onnxcam.files import check_writable
from onnxcam.methods import METHODS
from onnxcam.starts import STARTS

if TYPE_CHECKING:
    from onnxcam.explanation import Explanation

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
SHOWN = 20  # images listed in the summary


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("explain", help="where did the model look?", description=__doc__)
    add_model(p)
    p.add_argument("images", metavar="IMAGE", nargs="+", help="pictures, or folders of them")
    p.add_argument(
        "--layer", "-l", metavar="L", action="append", dest="layers",
        help="node, tensor, OpType_N, module path, glob, index, auto, suggested or all; may be repeated (default: auto)",
    )  # fmt: skip
    p.add_argument(
        "--target", "-t", metavar="CLASS|NAME", action="append", dest="targets",
        help="class number, label, top3 or predicted; may be repeated (default: predicted)",
    )  # fmt: skip
    p.add_argument("--method", "-m", metavar="M", default="relevance-cam", help=f"one of {', '.join(METHODS)}")
    p.add_argument("--composite", "-c", metavar="C", help=f"one of {', '.join(COMPOSITES)}")
    p.add_argument("--start", metavar="S", help=f"one of {', '.join(STARTS)}")
    add_preprocess(p)
    run = p.add_argument_group("running")
    run.add_argument("--engine", choices=("numpy", "cupy"), default="numpy", help="who computes relevance")
    run.add_argument(
        "--provider", metavar="P", action="append", dest="providers",
        help=f"execution provider of the forward pass: {', '.join(PROVIDERS)}; may be repeated (default: cpu)",
    )  # fmt: skip
    run.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="float64 is slow, for checks")
    run.add_argument("--batch-size", metavar="N", type=_positive, default=8, help="pictures at a time (default: 8)")
    out = p.add_argument_group("output")
    out.add_argument("--out", "-o", metavar="DIR", default="onnxcam-out", help="folder to write to (default: onnxcam-out)")
    out.add_argument("--no-overlay", action="store_true", help="write the raw maps only")
    out.add_argument("--json", action="store_true", help="print the manifest as JSON instead of a summary")
    p.set_defaults(run=run_explain)


def run_explain(arguments: argparse.Namespace) -> int:
    check_writable(arguments.out)
    images = find_pictures(arguments.images)
    model = load_model(arguments)
    with _Progress(len(images)) as progress:
        explanation = model.explain(
            images,
            arguments.layers or ["auto"],
            targets=arguments.targets,
            method=arguments.method,
            composite=arguments.composite,
            start=arguments.start,
            engine=arguments.engine,
            dtype=arguments.dtype,
            providers=arguments.providers or ["cpu"],
            batch_size=arguments.batch_size,
            progress=progress.update,
        )
    written = explanation.save(arguments.out, overlays=not arguments.no_overlay)
    for warning in explanation.warnings:
        print(f"onnxcam: warning: {warning}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(json.loads(written[-1].read_text()), ensure_ascii=False))
    else:
        _summary(explanation, written)
    return 0


def find_pictures(sources: Sequence[str]) -> list[str]:
    """The picture files that the arguments name: folders are searched, not below themselves.

    Raises:
        UsageError: a folder holds no picture.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source)
        if not path.is_dir():
            found.append(source)
            continue
        inside = sorted(str(f) for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
        if not inside:
            raise UsageError(f"folder {source} holds no picture ({', '.join(sorted(SUFFIXES))})")
        found += inside
    return found


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pictures")
    return int(text)


class _Progress:
    """A bar on standard error, for more than one picture and a terminal only."""

    def __init__(self, total: int):
        self.bar = None
        if total > 1 and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("explaining", total=total)

    def __enter__(self) -> _Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, total: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, total=total)


def _summary(e: Explanation, written: Sequence[Path]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("image", "class", "probability", "logit", "layer", "map", "relevance kept"):
        table.add_column(column, justify="right" if column in ("probability", "logit", "relevance kept") else "left")
    folders = e.folders()
    for i in range(min(len(e.pictures), SHOWN)):
        for t in range(e.targets.shape[1]):
            for k, (name, layer) in enumerate(e.layers.items()):
                first = k == 0
                table.add_row(
                    escape(folders[i]) if first and t == 0 else "",
                    escape(f"{e.targets[i, t]} {e.label(i, t)}") if first else "",
                    f"{e.probability(i, t):.1%}" if first else "",
                    f"{e.logit(i, t):.2f}" if first else "",
                    escape(name if name == layer.node else f"{name} = {layer.node}"),
                    "x".join(map(str, e.maps[name].shape[2:])),
                    _kept(e, name, i, t),
                )
    console.print(table)
    if len(e.pictures) > SHOWN:
        console.print(f"... and {len(e.pictures) - SHOWN} more images")
    o = e.options
    source = f", preprocessing {o['preprocess']} ({e.model.preprocess_source})" if o["preprocess"] else ""
    console.print(f"{o['method']} with {o['composite']} from {o['start']}{source}", soft_wrap=True, markup=False)
    worst = [(n, share) for n, share in e.conservation.dropped()[:1] if share > 1e-3]
    for node, share in worst:
        text = f"most relevance was dropped at {node.node} ({node.op_type}, {node.rule}): {share:.1%} of the start"
        console.print(text, soft_wrap=True, markup=False)
    console.print(f"{len(written)} files in {written[-1].parent}", soft_wrap=True, markup=False)


def _kept(e: Explanation, layer: str, image: int, target: int) -> str:
    """Relevance at the layer as a share of the start; where that sums to nearly nothing the share means nothing."""
    start, arrived = e.conservation.start[image, target], e.conservation.at_layers[layer][image, target]
    if not e.conservation.nodes or not e.layers[layer].bottleneck or abs(start) < 1e-9:
        return "-"
    return f"{arrived / start:.1%}"
