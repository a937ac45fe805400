"""Runners: who turns a batch into maps. One has the explanation recorded as an ONNX model, one walks over arrays.

Both are made once for a model, an input size, a set of layers, a method and its rules, and then run batch after batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from onnxcam.cache import DiskCache, code_stamp, digest, frozen
from onnxcam.check import no_classifier, unreached
from onnxcam.compile import BALANCE, record
from onnxcam.composites import Composite
from onnxcam.engines.array import ArrayOps
from onnxcam.engines.reference import ReferenceSession
from onnxcam.engines.session import RuntimeSession, Settings, first_line
from onnxcam.errors import ModelError, UsageError
from onnxcam.explanation import Conservation, NodeBalance
from onnxcam.heads import before_rounding
from onnxcam.layers import Layer
from onnxcam.methods.base import Method
from onnxcam.model import Canonical
from onnxcam.propagate import needed_taps, per_image, propagate
from onnxcam.starts import Start
from onnxcam.taps import expose
from onnxcam.targets import classes_of
from onnxcam.weights import pieces


@dataclass(frozen=True)
class Job:
    """What is to be computed, whoever does it."""

    canonical: Canonical
    input: str
    layers: dict[str, Layer]
    method: Method
    rules: Composite
    start: Start
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)  # what relevance is multiplied with, by tensor

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


Codes = Sequence[int] | np.ndarray  # targets for all images alike, or for each image: (N, T)


class Runner(Protocol):
    """Runs one job; `providers` says where its forward pass runs, `notes` what of it was not as asked for."""

    providers: list[str]
    notes: list[str]

    def run(self, feeds: Mapping[str, np.ndarray], codes: Codes) -> Batch:
        """Explain a batch, arrays (N, ...) by input, for the targets that `codes` mean (see `targets`)."""


class ArrayRunner:
    """Forward in a session with taps, then the walk over arrays: the reference."""

    def __init__(self, job: Job, ops: ArrayOps, dtype: str, settings: Settings):
        self.job, self.ops, self.dtype, self.settings = job, ops, dtype, settings
        key = ("taps", job.canonical.key, tuple(job.tensors), dtype, settings)
        self.session: RuntimeSession | ReferenceSession = job.canonical.sessions.get(key, self._load)
        self.providers = self.session.providers
        self.notes: list[str] = list(getattr(self.session, "notes", ()))
        self._constants: dict[Any, Any] = job.canonical.cache.setdefault(("constants", ops.xp.__name__, dtype), {})

    def _load(self) -> RuntimeSession | ReferenceSession:
        canonical = self.job.canonical
        taps = needed_taps(canonical.graph, self.job.tensors, canonical.logits)
        model = expose(canonical.graph, taps)
        return ReferenceSession(model, taps) if self.dtype == "float64" else RuntimeSession(model, taps, self.settings)

    def run(self, feeds: Mapping[str, np.ndarray], codes: Codes) -> Batch:
        job, ops, name = self.job, self.ops, self.job.canonical.logits
        taps = self.session.run(feeds)
        logits = as_rows(taps[name], len(feeds[job.input]))
        if logits is None:
            raise ModelError(no_classifier(name, taps[name].shape))
        finite(logits, f"logits ({name!r})")
        classes = classes_of(codes, logits)
        relevance = job.start(logits, classes, job.canonical.squash).reshape(classes.shape[1], *taps[name].shape)
        begins = {before_rounding(job.canonical.graph, name): relevance}
        flow = propagate(
            job.canonical.graph, taps, begins, job.tensors, job.rules, ops, self._constants, len(logits), job.masks
        )
        maps, sums = {}, {}
        for layer_name, layer in job.layers.items():
            if layer.tensor not in flow.relevance:
                raise ModelError(unreached(layer_name, job.rules, job.canonical.graph))
            at_layer = flow.relevance[layer.tensor]
            activation = layer.activation(ops, ops.asarray(taps[layer.tensor]))
            combine = job.method.formula(job.canonical.graph, layer, name)
            heat = combine(ops, activation, layer.relevance(ops, at_layer))
            maps[layer_name] = np.moveaxis(np.asarray(ops.to_host(heat)), 0, 1).astype(np.float32)
            sums[layer_name] = _rows(
                ops.to_host(per_image(ops, job.canonical.graph, layer.tensor, at_layer, classes.shape[0]))
            )
        nodes = [
            NodeBalance(b.node, b.op_type, b.rule, _rows(b.received), _rows(b.handed), _rows(b.magnitude))
            for b in flow.balances
        ]
        return Batch(maps, classes, logits, Conservation(*_start_sums(relevance), sums, nodes))


RECORDING = "onnxcam.recording"  # the metadata of a recorded model that says what its inputs and outputs are


class RecordedRunner:
    """The explanation as one ONNX model, recorded anew for each number of targets.

    Sessions are kept with the model. What they run is kept on disk as well, where there is a folder for it.
    """

    def __init__(self, job: Job, settings: Settings, disk: DiskCache | None = None, content: str = ""):
        self.job, self.settings, self.disk, self.content = job, settings, disk, content
        self.providers: list[str] = []
        self.notes: list[str] = []

    def run(self, feeds: Mapping[str, np.ndarray], codes: Codes) -> Batch:
        job, images = self.job, len(feeds[self.job.input])
        wanted = np.broadcast_to(np.asarray(codes, np.int64), (images, np.shape(codes)[-1]))
        count, ranks = wanted.shape[1], max(1, int(-wanted.min()))
        what = (job.canonical.key, self._what(), count, ranks)
        session, names = job.canonical.sessions.get(
            ("recorded", frozen(what), self.settings), lambda: self._load(what, count, ranks)
        )
        self.providers = session.providers
        self.notes += [note for note in session.notes if note not in self.notes]
        out = session.run({**feeds, names["targets"]: np.ascontiguousarray(wanted)})
        logits, classes = finite(out[names["logits"]], f"logits ({job.canonical.logits!r})"), out[names["classes"]]
        nodes = []
        if names["balanced"]:
            rows = out[BALANCE].astype(np.float64)
            nodes = [NodeBalance(*who, *rows[i]) for i, who in enumerate(names["balanced"])]
        sums = {name: out[f"sum/{name}"].astype(np.float64) for name in job.layers}
        maps = {name: out[names["maps"][name]] for name in job.layers}
        begun = _start_sums(job.start(logits, classes, job.canonical.squash))
        return Batch(maps, classes, logits, Conservation(*begun, sums, nodes))

    def _what(self) -> tuple[Any, ...]:
        """What a recording depends on, beside the graph and the targets."""
        job = self.job
        layers = [(name, layer.node, layer.tensor) for name, layer in job.layers.items()]
        return layers, job.canonical.logits, job.canonical.squash, job.method, job.rules, job.start, job.masks

    def _load(self, what: Any, count: int, ranks: int) -> tuple[RuntimeSession, dict[str, Any]]:
        key = None if self.disk is None else digest(code_stamp(), self.content, what)
        if self.disk is None or key is None:
            return self._opened(*self._record(count, ranks))
        if (path := self.disk.find(key)) is not None:
            try:
                return self._opened(path)
            except (ModelError, LookupError, ValueError) as error:
                if path.exists():  # else another process has just removed it
                    self.notes.append(f"{path} cannot be used and is recorded anew: {first_line(error)}")
        recorded, weights = self._record(count, ranks)
        model = b"".join(pieces(recorded.SerializeToString(), weights))
        try:
            self.disk.store(key, model)
        except UsageError as error:
            self.notes.append(f"nothing is kept in the cache: {error}")
        return self._opened(model)

    def _opened(
        self, model: onnx.ModelProto | bytes | Path, weights: Mapping[str, np.ndarray] | None = None
    ) -> tuple[RuntimeSession, dict[str, Any]]:
        session = RuntimeSession(model, settings=self.settings, weights=weights)
        names: dict[str, Any] = json.loads(session.metadata[RECORDING])
        return session, names

    def _record(self, count: int, ranks: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        job = self.job
        made = record(
            job.canonical, job.layers, job.method, job.rules, job.start, count=count, ranks=ranks, sums=True,
            balances=job.rules.conserves, masks=job.masks,
        )  # fmt: skip
        graph = made.proto.graph
        names = {
            "targets": graph.input[-1].name,
            "logits": graph.output[0].name,
            "classes": graph.output[1].name,
            "maps": made.maps,
            "balanced": made.balanced,
        }
        made.proto.metadata_props.add(key=RECORDING, value=json.dumps(names))
        return made.proto, made.weights


def as_rows(logits: np.ndarray, images: int) -> np.ndarray | None:
    """Logits as (N, K), whatever axes of length 1 the file gives them; None where they are none of a classifier."""
    if logits.ndim >= 2 and logits.shape[0] == images and logits.size == images * max(logits.shape[1:]):
        return logits.reshape(images, -1)
    if logits.ndim == 1:  # one logit for each image, or the classes of the one image
        return logits[None] if images == 1 else logits[:, None] if len(logits) == images else None
    return None


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
