"""The figures as Markdown tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.columns import COLUMNS
from benchmarks.models import subject
from benchmarks.peers import NOT_RUN, PEERS, version
from benchmarks.results import Record

PACKAGES = (
    "onnxruntime", "numpy", "torch", "torchvision", "grad-cam", "torchcam", "zennit", "captum"
)  # fmt: skip

# What issue 3 asks of ResNet-50: contender, who it is compared with, and how many times as long it may take.
WANTED = (
    ("last", "plain", 1.10),
    ("stages", "plain", 2.6),
    ("targets5", "plain", 1.2),
    ("lrp-epsilon", "plain", 2.5),
    ("cold", "plain", 2.0),
)

HOW = """\
# Speed

Written by `python -m benchmarks.speed -o docs/speed.md`. A ratio is a time divided by that of plain ONNX Runtime
inference of the same file; the two, and onnxcam at the same job where a peer is compared, take turns in one process
({runs} turns, {statistic}s, {threads} threads), with a pause before each run, as the threads of whoever ran before go
on spinning. Weights are random and seeded but for the shipped EfficientNet-Lite0; the input is one 224x224 picture.

{machine}
"""

BOUND = """
In brackets: multiply-adds of the compiled model as a multiple of one inference, what no implementation of the same
arithmetic can beat by much. z-plus takes two linear maps for each layer on the way (the denominator and the share), and
four where the layer's input can be negative; epsilon takes the layer's own output for a denominator.
"""

PEERS_HEAD = """
## Peers

Same weights, same picture, same number of threads. `onnxcam` is what it takes for the same job in the same turns, and
the last column how many times as long the peer takes. "Agreement" is the correlation of the two relevance maps; zennit
does not know how residual additions of other models than ResNets share. Gradients in PyTorch are compared as users run
them, beside what PyTorch takes for inference alone. PyTorch's threads wait passively, which is to its advantage here.
A map of the last layer costs hardly more than inference, in either runtime: how many times as long Grad-CAM takes there
is how many times as long PyTorch's inference takes as ONNX Runtime's.
"""

START_HEAD = """
## Whole processes

`ready`: `onnxcam.load`, `compile` and the session, after imports. Memory is the most the process ever held: `explain`
calls `Model.explain`, `file` loads the compiled file with ONNX Runtime and nothing else; both relative to a process
that runs the plain model once.
"""


def document(
    records: Sequence[Record], notes: Sequence[str], threads: int, runs: int, statistic: str = "median"
) -> str:
    """Everything as one page."""
    parts = [HOW.format(runs=runs, statistic=statistic, threads=threads, machine=machine())]
    columns = [c for c in COLUMNS if any(r.contender == c for r in records)]
    if columns:
        parts += [
            "\n## Time, as a multiple of plain inference\n",
            BOUND,
            "\n",
            columns_table(records, columns, statistic),
        ]
    compared = [r for r in records if r.contender in PEERS]
    if compared:
        parts += [PEERS_HEAD, "\n", peers_table(compared, statistic)]
    if any(r.contender in ("start", "cold") for r in records):
        parts += [START_HEAD, "\n", start_table(records, statistic)]
    if reached := goals(records, statistic):
        parts += ["\n## ResNet-50 against what was asked for\n\n", GOALS_HEAD, reached]
    missing = [*notes, *(f"{who}: {why}" for who, why in NOT_RUN.items())]
    parts += ["\n## Not measured\n\n", *(f"- {note}\n" for note in missing)]
    return "".join(parts)


GOALS_HEAD = """\
The last column counts multiply-adds, which no form of the same rule does without: with z-plus, one denominator and one
share for each linear map on the way. What is above them goes to quotients, sums and changes of memory layout between
convolutions; in four stages ONNX Runtime spends 85 % of its time in convolutions.

"""


def columns_table(records: Sequence[Record], columns: Sequence[str], statistic: str) -> str:
    rows = []
    for model in _models(r for r in records if r.contender in columns):
        found = {r.contender: r for r in records if r.model == model}
        own = [found[c] for c in columns if c in found]
        alone = [r for r in own if COLUMNS[r.contender].batch == 1] or own
        cells = [
            f"{found[c].ratio(statistic=statistic):.2f} ({found[c].figures['bound']:.2f})" if c in found else "–"
            for c in columns
        ]
        plain = f"{median(r.seconds('plain', statistic) for r in alone) * 1e3:.1f} ms"
        rows.append([subject(model).title, plain, f"{own[0].figures['macs'] / 1e9:.2f} G", *cells])
    return _markdown(["model", "plain inference", "multiply-adds", *(COLUMNS[c].title for c in columns)], rows)


def peers_table(records: Sequence[Record], statistic: str) -> str:
    rows = []
    for r in sorted(records, key=lambda r: (_models(records).index(r.model), PEERS[r.contender].job)):
        peer = PEERS[r.contender]
        agreement = _agreement(r.figures.get("agreement"))
        rows.append(
            [
                subject(r.model).title, peer.title, peer.job, _time(r.seconds(r.contender, statistic)),
                f"{r.ratio(statistic=statistic):.1f}",
                f"{r.seconds('same', statistic) / r.seconds('plain', statistic):.2f}",
                f"{r.ratio('same', statistic):.1f}", agreement,
            ]
        )  # fmt: skip
    head = ["model", "peer", "job", "time", "times inference", "onnxcam", "times onnxcam", "agreement"]
    return _markdown(head, rows)


def start_table(records: Sequence[Record], statistic: str) -> str:
    rows = []
    for model in _models(r for r in records if r.contender in ("start", "cold")):
        found = {r.contender: r for r in records if r.model == model}
        title = subject(model).title
        if "start" in found:
            r = found["start"]
            base = r.figures["plain"]
            rows.append([title, "plain session", f"{r.seconds('plain', statistic):.2f} s", f"{base:.0f} MiB", ""])
            for name in (n for n in r.times if n in COLUMNS):
                explain, file = (r.figures[f"{name} {job}"] / base for job in ("explain", "file"))
                ready = f"{r.seconds(name, statistic):.2f} s"
                rows.append([title, COLUMNS[name].title, ready, f"{explain:.2f}", f"{file:.2f}"])
        if "cold" in found:
            r = found["cold"]
            took = f"{r.seconds('cold', statistic):.2f} s, {r.ratio(statistic=statistic):.2f} times a bare script"
            rows.append([title, "`onnxcam explain`, cold", took, "", ""])
    return _markdown(["model", "what", "ready", "memory: explain", "memory: file"], rows)


def goals(records: Sequence[Record], statistic: str) -> str:
    found = {r.contender: r for r in records if r.model == "resnet50"}
    rows = []
    for contender, to, limit in WANTED:
        if contender in found:
            r = found[contender]
            label = COLUMNS[contender].title if contender in COLUMNS else "command line, cold"
            bound = f"{r.figures['bound']:.2f}" if "bound" in r.figures else ""
            rows.append([label, f"≤ {limit:.2f} ×", f"{r.ratio(to, statistic):.2f} ×", bound])
    for r in found.values():
        if r.contender in PEERS and PEERS[r.contender].claim:
            rows.append([PEERS[r.contender].title, "≥ 2.00 × onnxcam", f"{r.ratio('same', statistic):.2f} ×", ""])
    if start := found.get("start"):
        for name in (n for n in start.times if n in COLUMNS):
            rows.append([f"ready, {COLUMNS[name].title}", "≤ 2.00 s", f"{start.seconds(name, statistic):.2f} s", ""])
            memory = start.figures[f"{name} explain"] / start.figures["plain"]
            rows.append([f"memory, {COLUMNS[name].title}", "≤ 3.00 ×", f"{memory:.2f} ×", ""])
    return _markdown(["figure", "wanted", "measured", "multiply-adds"], rows) if rows else ""


def line(record: Record) -> str:
    """One record in one line, for the terminal."""
    times = ", ".join(f"{who} {_time(record.seconds(who))}" for who in record.times)
    ratio = f", x{record.ratio():.2f}" if record.contender in record.times else ""
    bound = f" (multiply-adds x{record.figures['bound']:.2f})" if "bound" in record.figures else ""
    return f"{record.contender}: {times}{ratio}{bound}"


def machine() -> str:
    """Which processor and which versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [row.split(":", 1)[1].strip() for row in info.read_text().splitlines() if row.startswith("model name")]
        model = names[0] if names else model
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := version(name)))
    load = f"; load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    return f"{model}, {os.cpu_count()} cores{load}. Python {platform.python_version()}, {versions}."


def _agreement(correlation: float | None) -> str:
    if correlation is None:
        return ""
    return f"{correlation:.3f}" if np.isfinite(correlation) else "the peer's map is not finite"


def _models(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(r.model for r in records))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))
