"""Whole processes: how long until a model is ready, and how much memory a run takes at most.

`python -m benchmarks.child JOB FILE COLUMN THREADS` does one job and prints a JSON line: `seconds`, from the imports
done to the session made, and `memory`, the most the process ever held, in MiB. Jobs: `plain` runs the file as it is and
imports nothing of onnxcam; `compile` compiles, makes the session and runs it; `explain` calls `Model.explain`.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any


def plain(file: str, column: str, threads: int) -> float:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    start = time.perf_counter()
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    session.run(None, {wanted.name: filled(wanted) for wanted in session.get_inputs()})
    return seconds


def filled(wanted: Any) -> Any:
    """A random picture, 224x224 where the file leaves its size open, or the predicted class as the target."""
    import numpy as np

    shape = [n if isinstance(n, int) else 224 if i > 1 else 1 for i, n in enumerate(wanted.shape)]
    if wanted.type == "tensor(int64)":
        return np.full(shape, -1, np.int64)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def compile(file: str, column: str, threads: int) -> float:
    import onnxcam
    from benchmarks.columns import COLUMNS, compiled, feeds, session

    wanted = COLUMNS[column]
    start = time.perf_counter()
    model = onnxcam.load(file)
    made = compiled(model, wanted)
    ready = session(made.to_bytes(), threads)
    seconds = time.perf_counter() - start
    ready.run(None, feeds(made.proto, (wanted.batch, model.spec.channels or 3, *model.size)))
    return seconds


def explain(file: str, column: str, threads: int) -> float:
    import onnxcam
    from benchmarks.columns import COLUMNS
    from benchmarks.models import picture

    start = time.perf_counter()
    model = onnxcam.load(file)
    seconds = time.perf_counter() - start
    layers = [model.spec.name if layer == "input" else layer for layer in COLUMNS[column].layers]
    model.explain(picture((1, model.spec.channels or 3, *model.size)), layers, **COLUMNS[column].options)
    return seconds


JOBS = {"plain": plain, "compile": compile, "explain": explain}


def main() -> None:
    job, file, column, threads = sys.argv[1:5]
    seconds = JOBS[job](file, column, int(threads))
    print(json.dumps({"seconds": seconds, "memory": peak_memory()}))


def peak_memory() -> float:
    """The most this process ever held, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss of a child begins at what its parent held when it was forked
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
