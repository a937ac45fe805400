"""What a method may have computed of a model: walks, taps and forward passes, by the engine and in the sessions that
the user asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxcam.cache import DiskCache
from onnxcam.check import no_classifier
from onnxcam.composites import Composite
from onnxcam.engines.array import ArrayOps, array_ops
from onnxcam.engines.reference import ReferenceSession
from onnxcam.engines.session import RuntimeSession, Settings
from onnxcam.errors import ModelError, UsageError
from onnxcam.explanation import Conservation
from onnxcam.layers import Layer
from onnxcam.methods.base import Method
from onnxcam.runners import ArrayRunner, Batch, Job, RecordedRunner, Runner, as_rows, finite
from onnxcam.starts import SIGMOIDS, Start, softmax
from onnxcam.taps import expose

Session = RuntimeSession | ReferenceSession
Tick = Callable[[float], None]  # what part of the batch is done, 0..1
Variants = Callable[[int, int], np.ndarray]  # (first, one to stop before) -> rows for one input


@dataclass(frozen=True)
class Means:
    """One model, graph and set of layers, and how they are to be computed.

    Attributes:
        job: what was asked for.
        engine, dtype, settings: how.
        fixed: the batch that the file fixes, or None.
        step: how many images go into one run, where that is open.
        disk, content: the disk cache and what the model is called there.
        rows: the layers that the model lists.
        seen: the input as a layer, or why it is none.
        tick: to be told how far the batch is.
    """

    job: Job
    engine: str
    dtype: str
    settings: Settings
    fixed: int | None = None
    step: int = 8
    disk: DiskCache | None = None
    content: str = ""
    rows: Sequence[Layer] = ()
    seen: Layer | str = "the model's input is no picture"
    tick: Tick = lambda part: None

    @property
    def picture(self) -> Layer:
        """The input as a layer.

        Raises:
            UsageError: it is none.
        """
        if isinstance(self.seen, Layer):
            return self.seen
        raise UsageError(self.seen)

    @property
    def ops(self) -> ArrayOps:
        """NumPy's primitives, for what is combined on the host."""
        return array_ops("numpy", self.dtype)

    def walk(
        self,
        method: Method,
        layers: Mapping[str, Layer] | None = None,
        rules: Composite | None = None,
        start: Start | None = None,
    ) -> Runner:
        """Who runs one walk and combines it; layers, rules and start are the job's unless others are given."""
        job = replace(self.job, method=method)
        job = replace(job, layers=dict(job.layers if layers is None else layers))
        job = replace(job, rules=rules or job.rules, start=start or job.start)
        if self.engine == "onnx":
            return RecordedRunner(job, self.settings, self.disk, self.content)
        return ArrayRunner(job, array_ops(self.engine, self.dtype), self.dtype, self.settings)

    def taps(self, tensors: Sequence[str]) -> Session:
        """A session that gives these tensors, by name."""
        wanted = list(dict.fromkeys(tensors))
        return self.session(("taps only", *wanted), lambda: expose(self.job.canonical.graph, wanted), wanted)

    def session(self, key: tuple[str, ...], make: Callable[[], onnx.ModelProto], outputs: Sequence[str]) -> Session:
        """A session of a model made of the graph, kept with it."""

        def load() -> Session:
            if self.dtype == "float64":
                return ReferenceSession(make(), outputs)
            return RuntimeSession(make(), outputs, self.settings)

        canonical = self.job.canonical
        found: Session = canonical.sessions.get((*key, canonical.key, self.dtype, self.settings), load)
        return found

    def forward(self, extra: Sequence[str] = ()) -> Forward:
        """Forward passes, for the logits; `extra` tensors can be had with them."""
        return Forward(self, [self.job.canonical.logits, *extra])

    def activations(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensor of each layer, of those in `values`, as (N, C, *spatial)."""
        ops = self.ops
        return {
            name: np.asarray(layer.activation(ops, ops.asarray(values[layer.tensor])))
            for name, layer in self.job.layers.items()
        }

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        return probabilities(logits, self.job.canonical.squash)

    def result(self, maps: Mapping[str, np.ndarray], classes: np.ndarray, logits: np.ndarray) -> Batch:
        """A batch of maps (N, T, *spatial) that no relevance was carried for."""
        none = np.zeros(classes.shape)
        sums = dict.fromkeys(maps, none)
        return Batch(
            {n: m.astype(np.float32) for n, m in maps.items()}, classes, logits, Conservation(none, none, sums)
        )


class Forward:
    """Forward passes of a batch, or of many variations of one image, as many at a time as the model takes."""

    def __init__(self, means: Means, tensors: Sequence[str]):
        self.means = means
        self.session = means.taps(tensors)
        self.providers = self.session.providers
        self.notes: list[str] = list(getattr(self.session, "notes", ()))

    def run(self, feeds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits (N, K), and all the tensors, of one batch."""
        job = self.means.job
        values = self.session.run(feeds)
        return self.rows(values, len(feeds[job.input])), values

    def rows(self, values: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        name = self.means.job.canonical.logits
        logits = as_rows(values[name], count)
        if logits is None:
            raise ModelError(no_classifier(name, values[name].shape))
        return finite(logits, f"logits ({name!r})")

    def variants(
        self,
        feeds: Mapping[str, np.ndarray],
        varied: str,
        count: int,
        make: Variants,
        tick: Tick = lambda part: None,
        session: Session | None = None,
    ) -> np.ndarray:
        """Logits (count, K) of one image with `count` versions of its input `varied`.

        `feeds` hold one row for each input; what is varied need not be among them. `session` runs a part of the model,
        by default it is the whole.
        """
        step = self.means.fixed or self.means.step
        found = []
        for begin in range(0, count, step):
            rows = make(begin, min(begin + step, count))
            full = step if self.means.fixed else len(rows)
            padded = (
                np.concatenate([rows, np.repeat(rows[-1:], full - len(rows), axis=0)]) if full > len(rows) else rows
            )
            others = {n: np.repeat(a[:1], full, axis=0) for n, a in feeds.items() if n != varied}
            values = (session or self.session).run({**others, varied: np.ascontiguousarray(padded)})
            found.append(self.rows(values, full)[: len(rows)])
            tick(min(begin + step, count) / count)
        return np.concatenate(found)


def probabilities(logits: np.ndarray, squash: str | None) -> np.ndarray:
    """(N, K): softmax, or the sigmoid that the file ends in; float64."""
    if squash in SIGMOIDS or logits.shape[1] == 1:
        return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return softmax(logits.astype(np.float64))


def of_class(values: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Columns of (count, K) by class numbers (T,): (count, T); where one column speaks for two classes, class 0 has its
    negative."""
    if values.shape[1] == 1:
        return np.where(classes == 1, values, -values)
    return values[:, classes]
