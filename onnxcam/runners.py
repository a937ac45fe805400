"""Runners: who turns a batch into maps. One has the explanation recorded as an ONNX model, one walks over arrays.

Both are made once for a model, an input size, a set of layers, a method and its rules, and then run batch after batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from onnxcam.check import no_classifier
from onnxcam.compile import BALANCE, record, unreached
from onnxcam.composites import Composite
from onnxcam.engines.array import ArrayOps
from onnxcam.engines.reference import ReferenceSession
from onnxcam.engines.session import RuntimeSession
from onnxcam.errors import ModelError
from onnxcam.explanation import Conservation, NodeBalance
from onnxcam.layers import Layer
from onnxcam.methods import Method
from onnxcam.model import Canonical
from onnxcam.propagate import needed_taps, propagate
from onnxcam.starts import Start
from onnxcam.taps import expose
from onnxcam.targets import classes_of


@dataclass(frozen=True)
class Job:
    """What is to be computed, whoever does it."""

    canonical: Canonical
    input: str
    layers: dict[str, Layer]
    method: Method
    rules: Composite
    start: Start

    @property
    def tensors(self) -> list[str]:
        return list(dict.fromkeys(layer.tensor for layer in self.layers.values()))


@dataclass(frozen=True)
class Batch:
    """The results of one batch: maps (N, T, *spatial), classes (N, T), logits (N, K)."""

    maps: dict[str, np.ndarray]
    targets: np.ndarray
    logits: np.ndarray
    conservation: Conservation

    def first(self, count: int) -> Batch:
        """The first `count` images: a batch of fixed size may be filled up with repetitions."""
        maps = {name: heat[:count] for name, heat in self.maps.items()}
        return Batch(maps, self.targets[:count], self.logits[:count], self.conservation.first(count))


class Runner(Protocol):
    """Runs one job; `providers` says where its forward pass runs."""

    providers: list[str]

    def run(self, array: np.ndarray, codes: Sequence[int]) -> Batch:
        """Explain a batch (N, ...) for the targets that `codes` mean (see `targets`)."""


class ArrayRunner:
    """Forward in a session with taps, then the walk over arrays: the reference."""

    def __init__(self, job: Job, ops: ArrayOps, dtype: str, providers: Sequence[str]):
        self.job, self.ops = job, ops
        cache = job.canonical.cache
        key = ("session", tuple(job.tensors), dtype, tuple(providers))
        if key not in cache:
            taps = needed_taps(job.canonical.graph, job.tensors, job.canonical.logits)
            model = expose(job.canonical.graph, taps)
            cache[key] = ReferenceSession(model, taps) if dtype == "float64" else RuntimeSession(model, taps, providers)
        self.session: RuntimeSession | ReferenceSession = cache[key]
        self.providers = self.session.providers
        self._constants: dict[Any, Any] = cache.setdefault(("constants", ops.xp.__name__, dtype), {})

    def run(self, array: np.ndarray, codes: Sequence[int]) -> Batch:
        job, ops, name = self.job, self.ops, self.job.canonical.logits
        taps = self.session.run({job.input: array})
        logits = as_rows(taps[name], len(array))
        if logits is None:
            raise ModelError(no_classifier(name, taps[name].shape))
        finite(logits, f"logits ({name!r})")
        classes = classes_of(codes, logits)
        relevance = job.start(logits, classes).reshape(classes.shape[1], *taps[name].shape)
        flow = propagate(job.canonical.graph, taps, {name: relevance}, job.tensors, job.rules, ops, self._constants)
        maps, sums = {}, {}
        for layer_name, layer in job.layers.items():
            if layer.tensor not in flow.relevance:
                raise ModelError(unreached(layer_name, job.rules))
            at_layer = flow.relevance[layer.tensor]
            heat = job.method.combine(ops, ops.asarray(taps[layer.tensor]), at_layer)
            maps[layer_name] = np.moveaxis(np.asarray(ops.to_host(heat)), 0, 1).astype(np.float32)
            sums[layer_name] = _rows(ops.to_host(ops.sum(at_layer, tuple(range(2 - at_layer.ndim, 0)))))
        nodes = [
            NodeBalance(b.node, b.op_type, b.rule, _rows(b.received), _rows(b.handed), _rows(b.magnitude))
            for b in flow.balances
        ]
        return Batch(maps, classes, logits, Conservation(*_start_sums(relevance), sums, nodes))


@dataclass
class RecordedRunner:
    """The explanation as one ONNX model, recorded anew for each number of targets."""

    job: Job
    providers: list[str]
    balances: bool = True
    notes: list[str] = field(default_factory=list)

    def run(self, array: np.ndarray, codes: Sequence[int]) -> Batch:
        job = self.job
        session, maps, balanced = self._session(len(codes), max([1, *(-c for c in codes)]))
        targets = np.tile(np.array(codes, np.int64), (len(array), 1))
        out = session.run({job.input: array, "targets": targets})
        logits = finite(out["logits"], f"logits ({job.canonical.logits!r})")
        classes = out["classes"]
        relevance = job.start(logits, classes)
        nodes = []
        if balanced:
            rows = out[BALANCE].astype(np.float64)
            nodes = [NodeBalance(*who, *rows[i]) for i, who in enumerate(balanced)]
        sums = {name: out[f"sum/{name}"].astype(np.float64) for name in job.layers}
        return Batch(
            {name: out[name] for name in maps}, classes, logits, Conservation(*_start_sums(relevance), sums, nodes)
        )

    def _session(self, count: int, ranks: int) -> tuple[RuntimeSession, list[str], list[tuple[str, str, str]]]:
        job, cache = self.job, self.job.canonical.cache
        what = (tuple(job.layers.items()), job.method, id(job.rules), job.start)
        key = ("recorded", what, count, ranks, self.balances, tuple(self.providers))
        if key not in cache:
            made = record(
                job.canonical, job.layers, job.method, job.rules, job.start, count=count, ranks=ranks, sums=True,
                balances=self.balances,
            )  # fmt: skip
            names = [o.name for o in made.proto.graph.output]
            meant = {output: name for name, output in made.maps.items()}
            taps = ["logits", "classes", *(meant.get(name, name) for name in names[2:])]
            # The rules are kept with the session so that their identity cannot be taken by others.
            cache[key] = (RuntimeSession(made.proto, taps, self.providers), list(made.maps), made.balanced, job.rules)
            self.notes += [note for note in made.notes if note not in self.notes]
        session, maps, balanced, _ = cache[key]
        self.providers = session.providers
        return session, maps, balanced


def as_rows(logits: np.ndarray, images: int) -> np.ndarray | None:
    """Logits as (N, K), whatever axes of length 1 the file gives them; None where they are none of a classifier."""
    if logits.ndim >= 2 and logits.shape[0] == images and logits.size == images * max(logits.shape[1:]):
        return logits.reshape(images, -1)
    return logits[None] if logits.ndim == 1 and images == 1 else None


def finite(array: np.ndarray, what: str) -> np.ndarray:
    """The array, if all of it is finite.

    Raises:
        ModelError: it is not.
    """
    if not np.isfinite(array).all():
        raise ModelError(f"the model's {what} are not finite on this input: check the preprocessing")
    return array


def _start_sums(relevance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    axes = tuple(range(2, relevance.ndim))
    return _rows(relevance.sum(axes)), _rows(np.abs(relevance).sum(axes))


def _rows(sums: Any) -> np.ndarray:
    """(T, N) as (N, T)."""
    return np.asarray(sums, np.float64).T
