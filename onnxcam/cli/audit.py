"""`onnxcam audit`: does the second model look where the first did, and if not, from where on?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from onnxcam.cli.explain import Bar, add_pool, add_running, find_pictures
from onnxcam.cli.options import add_layers, add_options, add_truth, options_of, parse_size, read_examples
from onnxcam.composites import COMPOSITES
from onnxcam.errors import UsageError
from onnxcam.methods import METHODS
from onnxcam.model import Model, load
from onnxcam.preprocess import PRESETS

FAILED = 4  # exit code of a verdict against the second model


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("audit", help="two models: the same reasons?", description=__doc__)
    p.add_argument("first", metavar="A", help="an .onnx file: the original")
    p.add_argument("second", metavar="B", help="another: the copy that is to be judged")
    p.add_argument("images", metavar="IMAGE", nargs="+", help="pictures, or folders of them")
    p.add_argument("--out", "-o", metavar="DIR", default="onnxcam-audit", help="where to write, and to go on from")
    add_layers(p, "suggested")
    p.add_argument("--method", "-m", metavar="M", default="relevance-cam", help=f"one of {', '.join(METHODS)}")
    p.add_argument("--composite", "-c", metavar="C", help=f"for methods of relevance: {', '.join(COMPOSITES)}")
    p.add_argument("--start", metavar="S", help="likewise")
    add_options(p)
    p.add_argument(
        "--fail-under", metavar="R", type=float, default=0.85,
        help=f"exit with {FAILED} where the mean rank correlation of maps at the last layer is less (default: 0.85), "
        "or where the two are shown other numbers",
    )  # fmt: skip
    p.add_argument("--target", choices=("predicted", "label"), default="predicted", help="the class that is explained")
    p.add_argument(
        "--offset", metavar="N", type=int, default=0, help="class c of A is class c + N of B (default: 0)"
    )  # fmt: skip
    p.add_argument("--output", metavar="NAME", help="output of A, or inner tensor of logits, to explain")
    p.add_argument("--output-b", metavar="NAME", help="likewise of B")
    p.add_argument(
        "--pictures", metavar="N", type=int, help="draw the maps of the first N pictures for the report (default: all)"
    )
    add_truth(p)
    pre = p.add_argument_group("preprocessing", "by default what each file's metadata says, else a guess")
    pre.add_argument("--preprocess", metavar="P", help=f"of both, or of A: {', '.join(PRESETS)}")
    pre.add_argument("--preprocess-b", metavar="P", help="of B, where it is another")
    pre.add_argument("--resize", metavar="HOW", help="warp, crop, pad or exact, for both")
    pre.add_argument(
        "--size", metavar="N|HxW", type=parse_size,
        help="input size, where files leave it open (default: that of the other file, where only one does)",
    )  # fmt: skip
    pre.add_argument("--class-names", metavar="FILE", help="names of the classes: text, JSON or CSV")
    add_running(p, batches=False)
    add_pool(p)
    p.set_defaults(run=run_audit)


def run_audit(arguments: argparse.Namespace) -> int:
    from onnxcam.audit import audit, findings
    from onnxcam.audit.verdict import markdown, save
    from onnxcam.cli.tables import say

    if not -1 <= arguments.fail_under <= 1:
        raise UsageError(f"--fail-under is a rank correlation, -1 to 1, not {arguments.fail_under:g}")
    asked, layers = _layers(arguments.layers or [])
    listed = read_examples(arguments, find_pictures(arguments.images))
    first = _model(arguments, arguments.first, arguments.preprocess, arguments.output)
    second = _model(arguments, arguments.second, arguments.preprocess_b or arguments.preprocess, arguments.output_b)
    for model in (first, second):
        if "guess" in model.preprocess_source:
            print(f"onnxcam: warning: {model.name}: {model.preprocess_source}", file=sys.stderr)
    with Bar(len(listed), "auditing") as bar:
        found = audit(
            first, second, listed, layers or ([] if asked else ["suggested"]), arguments.out, asked=asked,
            method=arguments.method, options=options_of(arguments),
            target=arguments.target, offset=arguments.offset, thumbs=arguments.pictures, progress=bar.update,
            threads=arguments.threads, engine_pool=arguments.engine_pool, workers=arguments.workers,
            composite=arguments.composite, start=arguments.start, engine=arguments.engine,
            providers=arguments.providers or "cpu", dtype=arguments.dtype,
        )  # fmt: skip
    result = findings(found, arguments.fail_under, first.labels)
    written = [path.name for path in save(result, found.folder, found.settings)]
    if find_spec("pyarrow") is not None:
        written.append(found.to_parquet().name)
    if find_spec("jinja2") is not None:
        from onnxcam.render.audit_page import save_page

        written.append(save_page(result, found, first.labels).name)
    for warning in found.warnings:
        print(f"onnxcam: warning: {warning}", file=sys.stderr)
    for path, why in found.skipped.items():
        print(f"onnxcam: warning: {path} is left out: {why}", file=sys.stderr)
    say(markdown(result).strip())
    say(f"values.csv, {', '.join(written)} in {found.folder}")
    return 0 if result.passed else FAILED


def _layers(typed: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Pairs that are written A=B, and layers of the first model.

    Raises:
        UsageError: one of the first model's is given twice.
    """
    asked: dict[str, str] = {}
    layers = []
    for text in typed:
        a, equals, b = text.partition("=")
        if equals and a and b:
            if a in asked:
                raise UsageError(f"--layer {text}: {a} is given twice, with {asked[a]} before")
            asked[a] = b
        else:
            layers.append(text)
    return asked, layers


def _model(arguments: argparse.Namespace, path: str, preprocess: str | None, output: str | None) -> Model:
    model = load(path, preprocess, arguments.class_names, output, arguments.cache)
    model.preprocess = model.preprocess.override(resize=arguments.resize, size=arguments.size)
    return model
