"""How fast onnxcam is: `python -m benchmarks.speed [--models ...] [--columns ...] [--runs N] [-o docs/speed.md]`.

Every figure is a ratio to plain ONNX Runtime inference of the same file, measured in turns in one process on as many
threads. What was measured is kept in the cache folder, so that a run that is broken off goes on where it stopped; a
change of onnxcam's code or of `--runs` measures anew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

import onnxcam
from benchmarks import peers
from benchmarks.columns import COLUMNS, compiled, runner
from benchmarks.macs import macs
from benchmarks.models import CACHE, SHIPPED, SUBJECTS, Subject, file_of, picture, subject
from benchmarks.peers import PEERS
from benchmarks.results import Record, Results, sources_hash
from benchmarks.table import document, line
from benchmarks.timing import Run, Skip, alternate

PICTURE = SHIPPED.with_name("chelsea.png")
WHOLE = {"start": "load to ready, and memory", "cold": "the command line, cold"}
BARE = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: numpy.zeros((1, 3, 224, 224), numpy.float32)})
"""


@dataclass
class Bench:
    """One model under measurement.

    Attributes:
        name: what the command line calls it.
        file: the ONNX file.
        runs: turns that everyone takes.
        threads: of every contender.
    """

    name: str
    file: Path
    runs: int
    threads: int

    @cached_property
    def subject(self) -> Subject:
        return subject(self.name)

    @cached_property
    def model(self) -> onnxcam.Model:
        return onnxcam.load(self.file)

    @cached_property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.file)

    def shape(self, batch: int = 1) -> tuple[int, ...]:
        return (batch, self.model.spec.channels or 3, *self.model.size)

    def plain(self, batch: int = 1) -> Run:
        if batch > 1 and self.model.spec.batch is not None:
            raise Skip("the file has a fixed batch")
        return runner(self.proto, self.shape(batch), self.threads)

    def runner(self, column: str) -> Run:
        return runner(compiled(self.model, COLUMNS[column]).proto, self.shape(), self.threads)

    @cached_property
    def macs(self) -> int:
        return macs(_with_size(self.proto, self.shape()))

    # -- contenders ----------------------------------------------------------------------------------------------

    def measure(self, contender: str) -> Record:
        """Measure one contender beside plain inference.

        Raises:
            Skip: it cannot be measured on this model.
        """
        if contender in COLUMNS:
            return self._column(contender)
        if contender in PEERS:
            return self._peer(contender)
        return self._start() if contender == "start" else self._cold()

    def _column(self, name: str) -> Record:
        column = COLUMNS[name]
        if column.stages and not self.subject.stages:
            raise Skip("only ResNets have four stages")
        proto = compiled(self.model, column).proto
        # A batch costs every image the same, and so the plain batch: the bound is that of one image.
        bound = macs(_with_size(proto, self.shape())) / self.macs
        turns = {"plain": self.plain(column.batch), name: runner(proto, self.shape(column.batch), self.threads)}
        del proto
        return Record(self.name, name, alternate(turns, self.runs), {"bound": bound, "macs": self.macs})

    def _peer(self, name: str) -> Record:
        peer = PEERS[name]
        if peer.only and self.name not in peer.only:
            raise Skip(f"too slow to run on all models; {' and '.join(SUBJECTS[n].title for n in peer.only)} must do")
        x, plain = picture(self.shape()), self.plain()
        logits = plain()[0]
        setting = peers.Setting(self.name, self.file, x, int(logits.argmax()), logits.shape[-1], self.threads)
        explain = peers.make(peer, setting)
        same = plain if peer.same == "plain" else self.runner(peer.same)
        figures = {}
        if peer.same.startswith("lrp"):
            figures["agreement"] = correlation(same()[-1], explain())
        turns = {"plain": plain, "same": same}
        if not peer.once:
            return Record(self.name, name, alternate({**turns, name: explain}, self.runs), figures)
        times = alternate(turns, self.runs)
        return Record(self.name, name, {**times, **alternate({name: explain}, 1, warm=False)}, figures)

    def _start(self) -> Record:
        """Children take turns: the seconds until each is ready, and what each holds at most."""
        heavy = "stages" if self.subject.stages else "suggested"
        times: dict[str, list[float]] = {}
        memory: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            jobs = {"plain": ("plain", self.file, "last")}
            for name in ("last", heavy, "lrp-epsilon-plus"):
                saved = Path(folder, f"{name}.onnx")
                compiled(self.model, COLUMNS[name]).save(saved)
                jobs[name] = ("compile", self.file, name)
                jobs[f"{name} explain"] = ("explain", self.file, name)
                jobs[f"{name} file"] = ("plain", saved, name)
            for _ in range(min(self.runs, 3)):
                for name, (job, file, column) in jobs.items():
                    found = child(job, file, column, self.threads)
                    times.setdefault(name, []).append(found["seconds"])
                    memory.setdefault(name, []).append(found["memory"])
        return Record(self.name, "start", times, {name: float(np.median(mib)) for name, mib in memory.items()})

    def _cold(self) -> Record:
        with tempfile.TemporaryDirectory() as folder:
            turns = {
                "plain": [sys.executable, "-c", BARE, str(self.file)],
                "cold": [sys.executable, "-m", "onnxcam", "explain", str(self.file), str(PICTURE), "--out", folder],
            }
            # Bytecode is there, as pip leaves it on a user's machine: a first turn, not counted, writes it.
            kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
            kept["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "bytecode")
            jobs = {name: process(command, kept) for name, command in turns.items()}
            for job in jobs.values():
                job()
            return Record(self.name, "cold", alternate(jobs, min(self.runs, 7)))


def child(job: str, file: Path, column: str, threads: int) -> dict[str, float]:
    import json

    command = [sys.executable, "-m", "benchmarks.child", job, str(file), column, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Skip(f"{job} {column} fails: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def process(command: Sequence[str], env: Mapping[str, str] | None = None) -> Run:
    def run() -> None:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            raise Skip(f"{command[1:3]} fails: {(done.stderr.strip().splitlines() or [''])[-1]}")

    return run


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two maps of the same size, whatever axes of length 1 they have."""
    a, b = np.squeeze(a), np.squeeze(b)
    wide = [x.ravel().astype(np.float64) for x in (a, b)]  # squares of relevance can be too large for float32
    return float(np.corrcoef(wide[0], wide[1])[0, 1]) if a.shape == b.shape else float("nan")


def _with_size(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The model with the size of its image fixed, so that shapes can be inferred."""
    graph = model.graph
    weights = {t.name for t in graph.initializer}
    image = next(i for i in graph.input if i.name not in weights)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    wanted = next(i for i in fixed.graph.input if i.name == image.name)
    for d, n in zip(wanted.type.tensor_type.shape.dim, shape, strict=True):
        d.dim_value = n
    return fixed


def on_cores(threads: int) -> None:
    """Keep to so many cores, child processes and libraries with threads of their own included.

    Libraries count cores when they are loaded, so the process starts over.
    """
    if not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > threads:
        os.sched_setaffinity(0, cores[:threads])
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.speed", *sys.argv[1:]])


def measure(
    benches: Mapping[str, Bench], contenders: Sequence[str], results: Results, key: str
) -> tuple[list[Record], list[str]]:
    """Everything that is not in `results` yet; returns all records, and why others are missing."""
    records: list[Record] = []
    notes: list[str] = []
    for name, bench in benches.items():
        if bench.subject.note:
            notes.append(f"{bench.subject.title}: {bench.subject.note}")
            continue
        for contender in contenders:
            record = results.get(name, contender, key)
            if record is None:
                try:
                    measured = bench.measure(contender)
                except Skip as reason:
                    notes.append(f"{bench.subject.title}, {title(contender)}: {reason}")
                    print(f"  {notes[-1]}", file=sys.stderr, flush=True)
                    continue
                record = results.add(Record(**{**vars(measured), "key": key}))
            print(f"  {bench.subject.title}: {line(record)}", file=sys.stderr, flush=True)
            records.append(record)
        # The next model needs the memory.
        for made in ("model", "proto"):
            vars(bench).pop(made, None)
    return records, notes


def title(contender: str) -> str:
    known = {k: v.title for k, v in (COLUMNS | PEERS).items()} | WHOLE
    return known[contender]


def main(argv: Sequence[str] | None = None) -> None:
    everything = (*COLUMNS, *PEERS, *WHOLE)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.splitlines()[0],
        epilog=f"models: {', '.join(SUBJECTS)}, or ONNX files. columns: {', '.join(everything)}.",
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), metavar="M")
    parser.add_argument("--columns", nargs="+", default=list(everything), choices=everything, metavar="C")
    parser.add_argument("--runs", type=int, default=15, help="turns that everyone takes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every contender (default: %(default)s)")
    parser.add_argument("--statistic", choices=("median", "min"), default="median")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for exported models and results")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("-o", "--output", type=Path, help="write the tables there too")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="captum|torch")
    if argv is None:
        on_cores(args.threads)
    # PyTorch's threads wait for each other by spinning, which costs it tenfold where another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args.cache.mkdir(parents=True, exist_ok=True)
    (args.cache / ".gitignore").write_text("*\n")
    results = Results(args.cache / "speed.jsonl")
    if args.fresh:
        results.records.clear()
    key = f"{sources_hash()} runs={args.runs} threads={args.threads}"
    runnable = {name: name for name in args.models if not subject(name).note}
    benches = {
        name: Bench(name, file_of(name, args.cache) if name in runnable else Path(name), args.runs, args.threads)
        for name in args.models
    }
    records, notes = measure(benches, args.columns, results, key)
    text = document(records, notes, args.threads, args.runs, args.statistic)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)


if __name__ == "__main__":
    main()
