"""Which architectures onnxcam explains: `python -m benchmarks.coverage [--family F] [--match GLOB] [-o FILE]`.

Every case, an architecture out of an exporter, is exported once and explained by both engines, each in a process of its
own with a limit on time and memory. What came of it is kept, one JSON file a case: a sweep that is broken off goes on
where it stopped, `--retry-failed` repeats what failed, `--stale` what was explained by other code than is at hand.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.coverage_cases import EXPORTERS, FAMILIES, Case, cases, write_sample
from benchmarks.coverage_export import MODEL, NOTES, export
from benchmarks.coverage_files import read_json, write_json
from benchmarks.coverage_table import document, failure, summary_line
from benchmarks.coverage_worker import ENGINES, begun, explain, settle, unsettled
from benchmarks.models import CACHE
from benchmarks.results import sources_hash

RESULTS = CACHE / "coverage"
MODELS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxcam-coverage"
RESERVE = 20e9  # bytes of the disk that no model is kept on


@dataclass(frozen=True)
class Limits:
    """What one process may take."""

    seconds: float
    gigabytes: float


@dataclass
class Sweep:
    """Where a sweep keeps things, and how it runs.

    Attributes:
        results: a JSON file for each case.
        models: a folder for each case.
        code: of onnxcam, as a hash.
        keep: megabytes up to which a model is kept once it has been explained.
    """

    results: Path
    models: Path
    limits: Limits
    code: str
    engines: tuple[str, ...] = ENGINES
    threads: int = 1
    keep: float = 200

    def folder(self, case: Case) -> Path:
        return self.models / case.key

    def result(self, case: Case) -> Path:
        return self.results / f"{case.key}.json"

    def exported(self, case: Case) -> dict[str, Any] | None:
        return read_json(self.folder(case) / NOTES)

    def stored(self, case: Case) -> dict[str, Any] | None:
        """Everything known of a case: its notes of the export, and of the explanation under "explained"."""
        notes = self.exported(case)
        return None if notes is None else {**notes, "explained": read_json(self.result(case))}

    # -- one case ------------------------------------------------------------------------------------------------

    def work(self, case: Case, again: Callable[[dict[str, Any]], bool], export_only: bool) -> Iterator[Process]:
        """The processes a case still needs, one after the other."""
        folder, result = self.folder(case), self.result(case)
        notes = self.exported(case)
        known = read_json(result)
        wanted = not export_only and (
            known is None or again(known) or _broken_off(known) or set(self.engines) - set(known["engines"])
        )
        again_in_float64 = known is not None and not (wanted or export_only) and unsettled(known)
        if notes is None or (
            (wanted or again_in_float64) and notes["status"] == "ok" and not (folder / MODEL).exists()
        ):
            folder.mkdir(parents=True, exist_ok=True)
            yield Process(export, (case, folder), folder / NOTES, {"status": "running"}, self.limits)
            notes = self.exported(case)
        if wanted and notes is not None and notes["status"] == "ok":
            begin = begun(self.engines, self.code)
            yield Process(explain, (folder, result, begin, self.threads), result, begin, self.limits)
        elif again_in_float64 and known is not None and notes is not None and notes["status"] == "ok":
            known["steps"]["float64"] = {"status": "running"}
            yield Process(settle, (folder, result, known, self.threads), result, known, self.limits)
        self.tidy(case, bool(wanted or again_in_float64))

    def tidy(self, case: Case, explained: bool) -> None:
        """Large models go once they have been explained, and all where the disk gets full."""
        folder = self.folder(case)
        size = sum(f.stat().st_size for f in folder.glob("*") if f.is_file())
        full = shutil.disk_usage(self.models).free < RESERVE
        if (explained and size > self.keep * 1e6) or full:
            for file in folder.glob(f"{MODEL}*"):
                file.unlink()


class Process:
    """A child process with limits; its notes, which begin as `first` has them, tell how it ended."""

    def __init__(
        self, work: Callable[..., None], given: tuple[Any, ...], notes: Path, first: dict[str, Any], limits: Limits
    ):
        self.notes, self.limits = notes, limits
        write_json(notes, first)
        log = notes.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        context = mp.get_context("forkserver")
        self.process = context.Process(target=_limited, args=(limits, log, work, given), daemon=True)
        self.process.start()
        self.deadline = time.monotonic() + limits.seconds

    @property
    def sentinel(self) -> Any:
        return self.process.sentinel

    def ended(self) -> bool:
        """True once it is over, be it that its time was; its notes then say so."""
        late = time.monotonic() > self.deadline
        if self.process.is_alive() and not late:
            return False
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        reason = f"more than {self.limits.seconds:.0f} s" if late else f"exit code {self.process.exitcode}"
        self._note("timeout" if late else "crash", reason)
        return True

    def _note(self, status: str, reason: str) -> None:
        notes = read_json(self.notes) or {}
        broken = {"status": status, "message": reason}
        if notes.get("status") == "running":
            notes |= broken
        elif "steps" in notes:
            for step in notes["steps"].values():
                if step["status"] == "running":
                    step |= broken
        write_json(self.notes, notes)


def _limited(limits: Limits, log: Path, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    """In the child: run `work` within its memory, its chatter in a file."""
    most = int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    work(*given)


# -- all cases ---------------------------------------------------------------------------------------------------


def sweep(
    todo: Sequence[Case],
    place: Sweep,
    *,
    jobs: int = 1,
    again: Callable[[dict[str, Any]], bool] = lambda known: False,
    export_only: bool = False,
    report: Callable[[Case], None] = lambda case: None,
) -> None:
    """Run what is missing of every case, so many at a time."""
    waiting = list(todo)
    running: list[tuple[Case, Iterator[Process], Process]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop(0)
                if case.first is not None and case.first in [c.exporter for c, *_ in running if c.name == case.name]:
                    waiting.insert(min(jobs, len(waiting)), case)  # it depends on what that comes to
                    if len(waiting) == 1:
                        break
                    continue
                if _needless(case, place):
                    continue
                steps = place.work(case, again, export_only)
                if (process := next(steps, None)) is not None:
                    running.append((case, steps, process))
            wait([p.sentinel for _, _, p in running], timeout=0.5)
            still = []
            for case, steps, process in running:
                following: Process | None = process
                if process.ended():
                    following = next(steps, None)
                if following is None:
                    report(case)
                else:
                    still.append((case, steps, following))
            running = still
    finally:
        for _, _, process in running:
            process.process.kill()


def _broken_off(known: dict[str, Any]) -> bool:
    """True where a sweep ended within this case."""
    return any(step["status"] == "running" for step in known["steps"].values())


def _needless(case: Case, place: Sweep) -> bool:
    """True for a second exporter where the first gave a model."""
    if case.first is None:
        return False
    notes = place.exported(Case(**{**vars(case), "exporter": case.first, "first": None}))
    return notes is None or notes["status"] == "ok"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--exporter", nargs="+", choices=sorted({e for es in EXPORTERS.values() for e in es}))
    parser.add_argument("--match", nargs="+", default=["*"], metavar="GLOB", help="architectures by name")
    parser.add_argument("--limit", type=int, help="only the first so many cases")
    parser.add_argument("--largest", type=float, metavar="MB", help="leave out models whose file is larger")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=180, help="for each process (default: %(default)s)")
    parser.add_argument("--gigabytes", type=float, default=16, help="for each process (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only engine onnx")
    parser.add_argument("--export-only", action="store_true")
    parser.add_argument("--retry-failed", action="store_true", help="explain again what failed by other code")
    parser.add_argument("--stale", action="store_true", help="explain again whatever was explained by other code")
    parser.add_argument("--force", action="store_true", help="with either, whatever the code")
    parser.add_argument("--retry-export", action="store_true", help="export again what could not be exported")
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the table")
    parser.add_argument("--write-sample", type=int, metavar="N", help="choose the sample of timm anew")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models-cache", type=Path, default=MODELS, help="exported models (default: %(default)s)")
    parser.add_argument("--keep", type=float, default=200, metavar="MB", help="keep models up to that size")
    parser.add_argument("-o", "--output", type=Path, help="write the table there")
    args = parser.parse_args(argv)
    if args.write_sample:
        write_sample(args.write_sample)
        return
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(args.threads)
    mp.get_context("forkserver").set_forkserver_preload(["benchmarks.coverage_preload"])
    args.results.mkdir(parents=True, exist_ok=True)
    args.models_cache.mkdir(parents=True, exist_ok=True)
    if CACHE in args.results.parents:
        (CACHE / ".gitignore").write_text("*\n")
    engines = ENGINES[:1] if args.quick else ENGINES
    limits = Limits(args.seconds, args.gigabytes)
    place = Sweep(args.results, args.models_cache, limits, sources_hash(), engines, args.threads, args.keep)
    every = cases(args.family, args.exporter, args.match)[: args.limit]
    if args.largest:
        every = [c for c in every if ((place.exported(c) or {}).get("megabytes") or 0) <= args.largest]
    if args.retry_export:
        for case in every:
            if (notes := place.exported(case)) is not None and failure(notes) is not None:
                (place.folder(case) / NOTES).unlink()
                place.result(case).unlink(missing_ok=True)

    def again(known: dict[str, Any]) -> bool:
        if not args.force and known.get("code") == place.code:
            return False
        return args.stale or (args.retry_failed and failure({"status": "ok", "explained": known}) is not None)

    done = 0

    def report(case: Case) -> None:
        nonlocal done
        done += 1
        stored = place.stored(case)
        print(f"{done:4} {case.key}: {summary_line(stored)}", file=sys.stderr, flush=True)

    if not args.table_only:
        with contextlib.suppress(KeyboardInterrupt):
            sweep(every, place, jobs=args.jobs, again=again, export_only=args.export_only, report=report)
    if args.output:
        args.output.write_text(document([(case, place.stored(case)) for case in every]))


if __name__ == "__main__":
    main()
