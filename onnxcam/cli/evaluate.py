"""`onnxcam evaluate`: which method can be trusted on this model, measured over pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcam.cli.explain import Bar, add_pool, add_running, find_pictures
from onnxcam.cli.options import (
    add_layers,
    add_model,
    add_options,
    add_preprocess,
    add_truth,
    load_model,
    options_by_method,
    read_examples,
    split,
)
from onnxcam.composites import COMPOSITES
from onnxcam.errors import UsageError
from onnxcam.methods import METHODS

if TYPE_CHECKING:
    from onnxcam.evaluation.examples import Example
    from onnxcam.model import Model


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    p = commands.add_parser("evaluate", help="which method can be trusted here?", description=__doc__)
    add_model(p)
    p.add_argument("images", metavar="IMAGE", nargs="+", help="pictures, or folders of them")
    p.add_argument("--out", "-o", metavar="DIR", default="onnxcam-evaluation", help="where to write, and to go on from")
    p.add_argument(
        "--method", "--methods", "-m", metavar="M", action="append", dest="methods",
        help=f"repeatable, or with commas: {', '.join(METHODS)} (default: grad-cam, layercam, relevance-cam, "
        "relevance-map)",
    )  # fmt: skip
    add_layers(p, "suggested")
    p.add_argument(
        "--metric", "--metrics", metavar="M", action="append", dest="metrics",
        help="repeatable, or with commas; `--metric list` says which there are",
    )  # fmt: skip
    p.add_argument("--target", choices=("predicted", "label"), default="predicted", help="the class that is explained")
    add_truth(p)
    p.add_argument("--composite", "-c", metavar="C", help=f"for methods of relevance: {', '.join(COMPOSITES)}")
    p.add_argument("--start", metavar="S", help="likewise")
    p.add_argument(
        "--sanity", metavar="N", nargs="?", type=int, const=8,
        help="also shuffle the model's weights, layer by layer, and see whether the maps of N pictures (default: 8) "
        "notice",
    )  # fmt: skip
    p.add_argument("--no-floors", action="store_true", help="leave out the maps that know nothing of the model")
    add_options(p, "METHOD.NAME=VALUE")
    add_preprocess(p, names="--class-names")
    add_running(p, batches=False)
    add_pool(p)
    p.set_defaults(run=run_evaluate)


def run_evaluate(arguments: argparse.Namespace) -> int:
    from onnxcam.cli.tables import say
    from onnxcam.evaluation.measures import DEFAULT, MEASURES
    from onnxcam.evaluation.run import evaluate
    from onnxcam.evaluation.summary import markdown, save, summarise
    from onnxcam.files import write_atomically

    metrics = split(arguments.metrics) or list(DEFAULT)
    if metrics == ["list"]:
        for measure in MEASURES.values():
            needs = "boxes" if measure.boxes else "a truth" if measure.truth else ""
            say(f"{measure.name}: {measure.about}{f'; needs {needs}' if needs else ''}")
        return 0
    methods = split(arguments.methods) or ["grad-cam", "layercam", "relevance-cam", "relevance-map"]
    options = options_by_method(arguments, methods)
    listed = read_examples(arguments, find_pictures(arguments.images))
    model = load_model(arguments)
    how = {"composite": arguments.composite, "start": arguments.start, "engine": arguments.engine}
    how |= {"providers": arguments.providers or "cpu", "dtype": arguments.dtype}
    with Bar(len(listed), "evaluating") as bar:
        found = evaluate(
            model, listed, methods, arguments.layers or ["suggested"], metrics, arguments.out,
            floors=not arguments.no_floors, target=arguments.target, options=options, progress=bar.update,
            threads=arguments.threads, engine_pool=arguments.engine_pool, workers=arguments.workers, **how,
        )  # fmt: skip
    if not found.rows:
        raise UsageError(next(iter(found.skipped.values()), "nothing was measured"))
    lines = summarise(found.rows)
    save(lines, found.folder / "summary.csv")
    parts = {"All pictures": lines}
    if any(e.label is not None for e in listed) and arguments.target == "predicted":
        parts["Pictures that are classified right"] = summarise(found.rows, right=True)
    for objects in ("small", "medium", "large"):
        some = [line for line in summarise(found.rows, objects=objects) if MEASURES[line.metric].better]
        if some:
            parts[f"Pictures with {objects} objects"] = some
    text = "".join(f"\n## {heading}\n\n{markdown(part)}" for heading, part in parts.items())
    write_atomically(found.folder / "summary.md", lambda s: s.write(f"# {model.name}\n{text}".encode()))
    written = ["values.csv", "summary.csv", "summary.md"]
    if find_spec("pyarrow") is not None:
        written.append(found.to_parquet().name)
    figure = None
    if find_spec("matplotlib") is not None:
        from onnxcam.render.depth import save_depth

        figure = save_depth(lines, found.folder / "depth.png")
        written.append(figure.name)
    if find_spec("jinja2") is not None:
        from onnxcam.render.evaluation_page import save_page

        page = save_page(f"{model.name}, evaluated", parts, found.pictures, found.folder / "report.html", figure)
        written.append(page.name)
    if arguments.sanity:
        written.append(_sanity(arguments, model, listed, methods, options, how, found.folder))
    for path, why in found.skipped.items():
        print(f"onnxcam: warning: {path} is left out: {why}", file=sys.stderr)
    say(markdown(lines).strip())
    say(f"{found.pictures} pictures; {', '.join(written)} in {found.folder}")
    return 0


def _sanity(
    arguments: argparse.Namespace,
    model: Model,
    listed: Sequence[Example],
    methods: Sequence[str],
    options: Mapping[str, Mapping[str, str]],
    how: Mapping[str, Any],
    folder: Path,
) -> str:
    """Write what is left of the maps of some pictures as the weights are shuffled; the file's name."""
    from onnxcam.evaluation.sanity import STEPS, cascade
    from onnxcam.files import write_atomically

    if arguments.sanity < 1:
        raise UsageError(f"--sanity is a number of pictures, not {arguments.sanity}")
    some = [str(e.path) for e in listed[: arguments.sanity]]
    with Bar(STEPS, "shuffling") as bar:
        kept = cascade(
            model, some, methods, arguments.layers or ["suggested"], options=options, progress=bar.update,
            threads=arguments.threads, **how,
        )  # fmt: skip
    rows = ["method,layer,shuffled,correlation"]
    rows += [f"{k.method},{k.layer},{k.shuffled:.3f},{k.correlation:.4f}" for k in kept]
    write_atomically(folder / "sanity.csv", lambda s: s.write(("\n".join(rows) + "\n").encode()))
    return "sanity.csv"
