"""The table of methods: how exact and how long. `python -m benchmarks.methods -o docs/methods-measured.md`.

Errors are those of the tests, which compare each method with an implementation that shares no code with ours: the tests
are run and say what they found. Times are of `Model.explain` on one picture of 224x224, as multiples of plain ONNX
Runtime inference of the same file, measured in turns; what takes longer than ten seconds is run once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import onnxcam
from benchmarks.columns import session
from benchmarks.models import CACHE, SUBJECTS, file_of, picture
from benchmarks.results import sources_hash
from benchmarks.table import machine
from benchmarks.timing import alternate
from onnxcam.cli.methods import cost, needs
from onnxcam.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_methods.py", "test_methods_of_many_passes.py", "test_rollout.py", "test_contrast.py", "test_zennit.py")
MODELS = ("resnet50", "efficientnet-lite0")
LONG = 10.0  # seconds
PREFIX = "error of "  # of what the tests report
HEAD = """\
# Methods, measured

Written by `python -m benchmarks.methods -o docs/methods-measured.md`. What each method computes is in
[methods.md](methods.md).

Error: the largest difference from an independent implementation, relative to the largest value, over all cases of the
tests; float32 against float64. Relevance-CAM itself is compared with its authors' maps in
[evidence-of-correctness.md](evidence-of-correctness.md). Time: `Model.explain` on one picture, after the first, as a
multiple of plain inference by ONNX Runtime; at the last layer, or at the input for methods of the input.
"""


def errors() -> dict[str, tuple[float, str]]:
    """The largest error of each method and the oracle it was found against, as the tests report them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o",
             "junit_family=xunit1", *(str(ROOT / "tests" / name) for name in TESTS)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    found: dict[str, tuple[float, set[str]]] = {}
    for p in (p for case in cases for p in case.iter("property")):
        if (name := p.get("name") or "").startswith(PREFIX):
            value, oracle = (p.get("value") or "").split(" by ", 1)
            error, oracles = found.get(name.removeprefix(PREFIX), (0.0, set()))
            found[name.removeprefix(PREFIX)] = max(error, float(value)), oracles | {oracle}
    return {name: (error, ", ".join(sorted(oracles))) for name, (error, oracles) in found.items()}


def times(name: str, methods: Sequence[str], runs: int) -> tuple[float, dict[str, float | str]]:
    """Seconds of plain inference, and multiples of it; a method that refuses the model has its reason instead."""
    file = file_of(name, CACHE)
    model = onnxcam.load(file)
    x = picture((1, model.spec.channels or 3, *model.size))
    plain = session(str(file))
    fed = {plain.get_inputs()[0].name: x}

    plain.run(None, fed)
    cache = CACHE / f"methods-{name}-{sources_hash()}.json"
    if cache.exists():
        kept: tuple[float, dict[str, float | str]] = json.loads(cache.read_text())
        if set(methods) <= set(kept[1]):
            return kept
    found: dict[str, float | str] = {}
    base = median(alternate({"plain": lambda: plain.run(None, fed)}, 15)["plain"])
    for method in methods:
        job = partial(model.explain, x, method=method, threads=2)
        start = time.perf_counter()
        try:
            job()
        except onnxcam.OnnxcamError as error:
            found[method] = str(error)
            continue
        if (first := time.perf_counter() - start) > LONG:
            found[method] = first / base
        else:
            turns = alternate({"plain": lambda: plain.run(None, fed), "method": job}, runs)
            found[method] = median(turns["method"]) / median(turns["plain"])
        print(f"{name}: {method} {found[method]:.2f}", flush=True)
        cache.write_text(json.dumps([base, found]))
    return base, found


def document(measured: dict[str, tuple[float, dict[str, float | str]]], exact: dict[str, tuple[float, str]]) -> str:
    titles = [f"{SUBJECTS[name].title}, {base * 1e3:.0f} ms" for name, (base, _) in measured.items()]
    lines = [HEAD, machine(), ""]
    lines += [
        f"| method | error | oracle | {' | '.join(titles)} | passes | needs |",
        "| --- " * (5 + len(titles)) + "|",
    ]
    for name, method in METHODS.items():
        error, oracle = exact.get(name, (None, ""))
        cells = [_cell(found[name]) for _, found in measured.values()]
        shown = "" if error is None else f"{error:.0e}"
        lines.append(f"| `{name}` | {shown} | {oracle} | {' | '.join(cells)} | {cost(method)} | {needs(method)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | str) -> str:
    return "refused" if isinstance(value, str) else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    text = document({name: times(name, args.methods, args.runs) for name in args.models}, errors())
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
