"""One exported model is explained, step by step; what came of each step is written down before the next begins.

A step ends "ok", "refused" (onnxcam says what it cannot do), or "error" (it does not know that it cannot); who runs the
worker turns a step that never ended into "timeout" or "crash". Figures are kept, not judged; `coverage_table` judges.
"""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.coverage_export import MODEL, NOTES, REFERENCE, relative
from benchmarks.coverage_files import first_line, read_json, write_json
from benchmarks.coverage_table import ROUNDING, in_float64

ENGINES = ("onnx", "numpy")
LARGE = 4e8  # bytes of a model from which on sessions are not kept from one step to the next
HUGE = 1.5e9  # bytes from which on float64 does not fit into the memory of this machine
COARSE = 5e-4  # of a gradient: what is further from autograd's is looked into


def explain(folder: Path, result: Path, notes: dict[str, Any], threads: int = 1) -> None:
    """Explain the model in `folder` by every engine that `notes` name, which go on in `result`."""
    _Explaining(folder, result, notes, threads).run(notes["engines"])


def settle(folder: Path, result: Path, notes: dict[str, Any], threads: int = 1) -> None:
    """Add the step "float64" to an explanation that was made before there was one; goes on in `result`."""
    work = _Explaining(folder, result, notes, threads)
    work.load()
    work.step("float64", work.float64)


def unsettled(notes: dict[str, Any]) -> bool:
    """True where a gradient is further from autograd's than float32 should make it, and float64 was not yet asked."""
    steps = notes["steps"]
    errors = [
        min((steps[name][bits] for bits in ("torch32", "torch64") if bits in steps[name]), default=0.0)
        for name in steps
        if name.startswith("gradient/")
    ]
    return max(errors, default=0.0) > COARSE and "float64" not in steps


def begun(engines: Sequence[str], code: str) -> dict[str, Any]:
    """The notes of an explanation that has just begun."""
    return {
        "code": code,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "engines": list(engines),
        "steps": {"load": {"status": "running"}},
    }


class _Explaining:
    def __init__(self, folder: Path, result: Path, notes: dict[str, Any], threads: int):
        self.folder, self.result, self.notes, self.threads = folder, result, notes, threads
        self.model: Any = None
        self.ops: dict[str, str] = {}
        self.maps: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        with np.load(folder / REFERENCE) as stored:
            self.reference = dict(stored)
        self.target = (read_json(folder / NOTES) or {}).get("target")
        self.size = sum(f.stat().st_size for f in folder.glob(f"{MODEL}*"))
        self.alike = bool(np.ptp(self.reference["logits"]) == 0)

    def run(self, engines: Sequence[str]) -> None:
        if not self.step("load", self.load):
            return
        self.step("check", self.check)
        self.step("layers", self.layers)
        for engine in engines:
            for name, work in (("cam", self.cam), ("lrp", self.lrp), ("gradient", self.gradient)):
                if self.size > LARGE:
                    self.fresh()
                self.step(f"{name}/{engine}", partial(work, engine))

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> bool:
        from onnxcam.errors import OnnxcamError

        steps = self.notes["steps"]
        steps[name] = {"status": "running"}
        write_json(self.result, self.notes)
        started = time.perf_counter()
        try:
            steps[name] = {"status": "ok", **work()}
        except OnnxcamError as error:
            steps[name] = {"status": "refused", "message": first_line(error), "op": self.culprit(str(error))}
        except Exception as error:
            where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
            steps[name] = {
                "status": "error",
                "message": f"{type(error).__name__}: {first_line(error)}",
                "op": self.culprit(str(error)),
                "where": where[-4:],
            }
        steps[name]["seconds"] = round(time.perf_counter() - started, 3)
        write_json(self.result, self.notes)
        return steps[name]["status"] == "ok"

    def culprit(self, message: str) -> str | None:
        """The op type of the node that a message names."""
        if match := re.search(r"no operator for ([\w.]+)", message):
            return match[1]
        for name in re.findall(r"node '([^']+)'", message):
            if name in self.ops:
                return self.ops[name]
        return None

    def fresh(self) -> None:
        """The model anew, without the sessions of the steps before."""
        import onnxcam

        self.model = None
        gc.collect()
        self.model = onnxcam.load(self.folder / MODEL)

    def load(self) -> dict[str, Any]:
        self.fresh()
        graph = self.model.canonical(self._size()).graph
        self.ops = {n.name: n.op_type for n in (*self.model.names.raw.nodes, *graph.nodes)}
        return {"nodes": len(graph.nodes), "ops": dict(Counter(n.op_type for n in graph.nodes))}

    def _size(self) -> tuple[int, ...]:
        return tuple(self.reference["x"].shape[2:])

    def check(self) -> dict[str, Any]:
        """Every node that has no operator, whether or not the steps below get that far."""
        problems = self.model.check().problems
        found = Counter((row.op_type, re.sub(r"'[^']*'", "'...'", row.reason or "")) for row in problems)
        return {"problems": [[op, reason, n] for (op, reason), n in found.most_common()]}

    def layers(self) -> dict[str, Any]:
        rows = self.model.layers(self._size())
        return {"layers": len(rows), "suggested": [r.node for r in rows if r.suggested]}

    def cam(self, engine: str) -> dict[str, Any]:
        return self.compared("cam", engine, self.explained(engine, "suggested"))

    def lrp(self, engine: str) -> dict[str, Any]:
        found = self.explained(engine, [self.model.spec.name], method="lrp")
        sums = found.conservation
        scale = np.maximum(sums.start_magnitude, np.finfo(np.float32).tiny)
        arrived = next(iter(sums.at_layers.values()))
        dropped: Counter[str] = Counter()
        for n in sums.nodes:
            dropped[n.op_type] += float(np.abs(n.dropped / scale).max())
        return {
            "residual": float(np.abs((sums.start - arrived) / scale).max()),
            "dropped": {op: amount for op, amount in dropped.most_common(4) if amount > 1e-4},
            **self.compared("lrp", engine, found),
        }

    def gradient(self, engine: str) -> dict[str, Any]:
        """The gradient of one logit with respect to every entry of the input, against autograd."""
        found = self.explained(
            engine, [self.model.spec.name], method=entries(), composite="gradient", start="one-hot"
        )  # fmt: skip
        ours = next(iter(found.maps.values()))[:, 0]
        figures = {
            f"torch{bits}": relative(ours, self.reference[f"gradient{bits}"])
            for bits in ("32", "64")
            if f"gradient{bits}" in self.reference
        }
        figures |= self.compared("gradient", engine, found)
        if min(figures.get("torch32", 1.0), figures.get("torch64", 1.0)) > COARSE and not (
            self.settled() and engine == "numpy"
        ):
            if "rounding" not in figures:
                figures["rounding"] = self.rounding(engine, found.maps)
            reference = self.reference.get("gradient64", self.reference.get("gradient32"))
            if reference is not None:
                figures["beside"] = self.beside(engine, ours, reference)
        return figures

    def settled(self) -> bool:
        """True where the gradient is autograd's with everything in float64; asked once, when first wanted."""
        steps, asked = self.notes["steps"], self.asked
        if "float64" not in steps and self.size < HUGE:
            self.step("float64", self.float64)
        self.asked = asked
        return in_float64(steps)

    def float64(self) -> dict[str, Any]:
        """The same gradient all in float64, by engine numpy and the reference evaluator's forward pass, against
        autograd's in float64: rounding out of the way, what is left is a mistake in an adjoint, or weights that the
        exporter folded in float32."""
        if "gradient64" not in self.reference:
            return {"error": None}
        layers = [self.model.spec.name]
        found = self.explained(
            "numpy", layers, method=entries(), composite="gradient", start="one-hot", dtype="float64"
        )  # fmt: skip
        ours = next(iter(found.maps.values()))[:, 0]
        reference = self.reference["gradient64"]
        return {"error": relative(ours.reshape(reference.shape), reference)}

    def beside(self, engine: str, ours: np.ndarray, reference: np.ndarray) -> float:
        """How far autograd's gradient is from ours right beside the input, at its nearest.

        Where a rectifier stands within rounding of its bend, one of the two may be on the other side of it. Then ours
        is autograd's after a step of at most 1e-5 of the input along the difference, one way or the other.
        """
        x, layers, options = self.reference["x"], *self.asked
        away = (ours - reference.reshape(ours.shape)).reshape(x.shape)
        away = away / max(np.abs(away).max(), 1e-30) * np.abs(x).max()
        found = [
            next(iter(self.explained(engine, layers, at=(x + step * away).astype(x.dtype), **options).maps.values()))
            for size in (3e-7, 1e-6, 3e-6, 1e-5)
            for step in (size, -size)
        ]
        return min(relative(one[:, 0], reference) for one in found)

    def explained(self, engine: str, layers: Any, noise: int = 0, at: np.ndarray | None = None, **options: Any) -> Any:
        target = self.target if self.target is not None else "predicted"
        if self.alike and "start" not in options:
            options["start"] = "one-hot"  # logits that are all alike cancel each other in a contrast
        x = self.reference["x"] if at is None else at
        if noise:
            x = (x * (1 + 3e-7 * np.random.default_rng(noise).standard_normal(x.shape))).astype(x.dtype)
        self.asked = layers, options
        return self.model.explain(x, layers, target, engine=engine, threads=self.threads, **options)

    def compared(self, what: str, engine: str, found: Any) -> dict[str, Any]:
        """How far the maps are from those of the engine before: the worst layer's largest difference, relatively.

        Where that is much, also how far a change of the input in its last digits moves them: rules that divide by
        sums that can be 0 make a map of rounding there, on any engine.
        """
        self.maps[what, engine] = found.maps
        others = [maps for (w, e), maps in self.maps.items() if w == what and e != engine]
        if not others:
            return {}
        figures = {"apart": _apart(found.maps, others[0])}
        if figures["apart"] > COARSE:
            figures["rounding"] = self.rounding(engine, found.maps, figures["apart"] / ROUNDING)
        return figures

    def rounding(self, engine: str, maps: Mapping[str, np.ndarray], enough: float = np.inf) -> float:
        """How far the maps of the last question move where the input changes in its last digits: the most of four
        changes, or of up to twelve while it is not `enough`. A rectifier near its bend is not moved over it by each."""
        layers, options = self.asked
        most = 0.0
        for seed in range(1, 13):
            most = max(most, _apart(self.explained(engine, layers, noise=seed, **options).maps, maps))
            if seed >= 4 and (enough == np.inf or most >= enough):
                break
        return most


def _apart(maps: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    return max(
        float(np.abs(heat - reference[name]).max() / max(np.abs(reference[name]).max(), 1e-30))
        for name, heat in maps.items()
    )


def entries() -> Any:
    """A method that sums nothing: what arrives at every entry of a layer."""
    from onnxcam.methods import Method

    return Method("entries", lambda ops, activation, relevance: relevance, "gradient", "one-hot", False, "entries")
