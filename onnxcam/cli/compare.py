"""`onnxcam compare`: methods side by side over layers, or classes over layers, as one figure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onnxcam.cli.explain import Bar, add_running
from onnxcam.cli.options import (
    add_layers,
    add_model,
    add_options,
    add_preprocess,
    add_targets,
    load_model,
    options_by_method,
    split,
)
from onnxcam.composites import COMPOSITES
from onnxcam.errors import UsageError
from onnxcam.methods import METHODS
from onnxcam.starts import STARTS

FORMATS = (".png", ".pdf", ".svg")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("compare", help="methods side by side, as one figure", description=__doc__)
    add_model(p)
    p.add_argument("image", metavar="IMAGE", help="a picture")
    p.add_argument("--out", "-o", metavar="FILE", default="compare.png", help="a .png, .pdf or .svg file")
    p.add_argument(
        "--method", "-m", metavar="M", action="append", dest="methods",
        help=f"repeatable, or with commas: {', '.join(METHODS)} (default: some that cost one pass each)",
    )  # fmt: skip
    add_layers(p, "suggested")
    add_targets(p)
    p.add_argument("--composite", "-c", metavar="C", help=f"for methods of relevance: {', '.join(COMPOSITES)}")
    p.add_argument("--start", metavar="S", help=f"likewise: {', '.join(STARTS)}")
    add_options(p, "METHOD.NAME=VALUE")
    add_preprocess(p)
    add_running(p)
    p.add_argument("--dpi", metavar="N", type=int, default=200, help="dots per inch of a PNG (default: 200)")
    p.set_defaults(run=run_compare)


def run_compare(arguments: argparse.Namespace) -> int:
    from onnxcam.compare import DEFAULT, compare

    out = Path(arguments.out)
    if out.suffix.lower() not in FORMATS:
        raise UsageError(f"figures are written as {', '.join(FORMATS)}, and {out.name} is none of them")
    if not 30 <= arguments.dpi <= 2400:
        raise UsageError(f"--dpi is a number from 30 to 2400, not {arguments.dpi}")
    methods = split(arguments.methods) or list(DEFAULT)
    options = options_by_method(arguments, methods)
    model = load_model(arguments)
    with Bar(len(methods), "comparing") as bar:
        found = compare(
            model,
            arguments.image,
            methods,
            arguments.layers or ["suggested"],
            arguments.targets,
            options=options,
            progress=bar.update,
            composite=arguments.composite,
            start=arguments.start,
            engine=arguments.engine,
            dtype=arguments.dtype,
            providers=arguments.providers or "cpu",
            threads=arguments.threads,
            batch_size=arguments.batch_size,
        )
    path = found.save(out, arguments.dpi)
    for note in (*found.notes, *found.explanation.warnings):
        print(f"onnxcam: warning: {note}", file=sys.stderr)
    drawn = sum(cell.heat is not None for row in found.rows for cell in row.cells)
    print(f"{drawn} maps of {len(found.rows)} rows and {len(found.columns)} layers in {path}")
    return 0
