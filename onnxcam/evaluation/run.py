"""Measure methods and layers over a set of pictures: one row for each picture, method, layer and metric.

Rows are written picture by picture, so memory does not grow with the set, and a run that was interrupted goes on where
it stopped. Beside the methods stand three maps that know nothing of the model: the centre, smooth noise and edges. What
does not beat those says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from onnxcam.engines.session import RuntimeSession, Settings
from onnxcam.errors import ModelError, NotFiniteError, PictureError, UsageError
from onnxcam.evaluation.examples import Example, checked
from onnxcam.evaluation.measures import DEFAULT, MEASURES, Case, Measure
from onnxcam.explanation import Explanation
from onnxcam.journal import VALUES, Journal, rows_of, to_parquet
from onnxcam.means import of_class, probabilities
from onnxcam.methods import INPUT, Method, method as find_method
from onnxcam.methods.upsample import upsampled
from onnxcam.model import Model
from onnxcam.named import named
from onnxcam.pictures import open_image, why_left_out
from onnxcam.pool import Pool, shared_out
from onnxcam.runners import as_rows
from onnxcam.taps import expose

COLUMNS = ("image", "class", "label", "object", "method", "layer", "map", "metric", "value")
FLOORS = ("centre", "noise", "edges")
NOISE = 0.02  # of the input's range: what `stability` shakes it by
STEP = 16  # versions of a picture in one run
SMALL, LARGE = 0.25, 0.5  # part of the picture that an object covers, from which on it is no longer small, and is large


@dataclass(frozen=True)
class Evaluation:
    """What was measured: the folder with `values.csv`, and how many pictures it has now."""

    folder: Path
    pictures: int
    skipped: dict[str, str]

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """All values, as they stand in the file."""
        return list(rows_of(self.folder))

    def to_parquet(self) -> Path:
        """The same values as `values.parquet`.

        Raises:
            UsageError: pyarrow is not installed, or the folder cannot be written to.
        """
        numbers = ("class", "label", "value")
        return to_parquet(self.folder / VALUES, [c for c in COLUMNS if c not in numbers], ("class", "label"))


def evaluate(
    model: Model,
    examples: Sequence[Example],
    methods: Sequence[str | Method] = ("grad-cam", "layercam", "relevance-cam", "relevance-map"),
    layers: Sequence[str | int] = ("suggested",),
    metrics: Sequence[str] = DEFAULT,
    out: str | Path = "onnxcam-evaluation",
    *,
    floors: bool = True,
    target: str = "predicted",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    engine_pool: str | Pool | None = None,
    workers: int | None = None,
    **how: Any,
) -> Evaluation:
    """Explain every picture by every method at every layer, and measure the maps.

    Args:
        model: from `onnxcam.load`.
        examples: pictures with what is known of them; metrics that need a truth are left out where there is none.
        methods, layers: as for `explain`; methods of the input explain that.
        metrics: names of `MEASURES`.
        out: the folder; one that holds part of the same run is gone on with.
        floors: measure the maps that know nothing, too.
        target: which class is explained: "predicted", or "label" where it is known.
        options: of methods, by name.
        progress: called with (done, total) pictures.
        engine_pool: "ray" to share the pictures out among actors of Ray.
        workers: how many of them; by default one for each core, or GPU where that computes.
        threads, how: more for `explain`; an actor has one thread.

    Raises:
        UsageError: something means nothing, or the folder holds another run.
        ModelError: as `explain`.
    """
    examples = checked(examples, target)
    chosen = [find_method(m) for m in methods]
    measures = [named("metric", name, MEASURES) for name in metrics]
    known = {"boxes": any(e.boxes for e in examples), "truth": any(e.located for e in examples)}
    if all((m.boxes and not known["boxes"]) or (m.truth and not known["truth"]) for m in measures):
        raise UsageError(
            f"{', '.join(m.name for m in measures)}: these need to know where the objects are, and nothing says so; "
            "give boxes or masks, or other metrics"
        )
    names = list(model.resolve(list(layers)))
    settings = {
        "model": [model.content, model.output],
        "preprocess": model.preprocess.to_json(),
        "methods": [[m.name, dict((options or {}).get(m.name, {}))] for m in chosen],
        "layers": names,
        "metrics": [m.name for m in measures],
        "floors": floors,
        "target": target,
        "how": {key: str(value) for key, value in sorted(how.items())},
    }
    journal = Journal(out, COLUMNS, settings, {e.path: e.known for e in examples})
    skipped: dict[str, str] = {}
    who, threads = shared_out(engine_pool, workers, how.get("providers", "cpu"), threads)
    work = _Measuring(
        model, tuple(chosen), tuple(names), tuple(measures), floors, target, dict(options or {}),
        dict(how, threads=threads), len(examples) > 1,
    )  # fmt: skip
    left = [example for example in examples if example.path not in journal.done]
    count = len(examples) - len(left)
    if progress is not None and count:
        progress(count, len(examples))
    with journal.writing() as values:
        for example, (rows, why) in zip(left, who.run(work, left), strict=True):
            if why:
                skipped[example.path] = why
            else:
                values.add(example.path, rows)
            count += 1
            if progress is not None:
                progress(count, len(examples))
    return Evaluation(journal.folder, len({e.path for e in examples} - set(skipped)), skipped)


@dataclass(frozen=True)
class _Measuring:
    """The work on one picture; gives its rows, or why it is left out."""

    model: Model
    methods: tuple[Method, ...]
    layers: tuple[str, ...]
    measures: tuple[Measure, ...]
    floors: bool
    target: str
    options: dict[str, Mapping[str, Any]]
    how: dict[str, Any]
    lenient: bool

    def begin(self) -> Callable[[Example], tuple[list[list[Any]], str]]:
        self.model.hold(3 * len(self.methods) + 4)  # for one class and two, and taps of its own
        scorer = Scorer(self.model, Settings.of(self.how.get("providers", "cpu"), self.how["threads"]))

        def measured(example: Example) -> tuple[list[list[Any]], str]:
            try:
                rows = _measured(
                    self.model, scorer, example, self.methods, self.layers, self.measures, self.floors, self.target,
                    self.options, self.how,
                )  # fmt: skip
                return list(rows), ""
            except (PictureError, NotFiniteError) as error:
                if not self.lenient:
                    raise
                return [], why_left_out(example.path, error)

        return measured


class Scorer:
    """Scores of versions of a picture, by forward passes of the model."""

    def __init__(self, model: Model, settings: Settings):
        self.model, self.settings = model, settings

    def logits(self, versions: np.ndarray) -> np.ndarray:
        """(count, C, H, W) to (count, K)."""
        spec = self.model.spec
        size = versions.shape[2:]
        canonical = self.model.canonical(size)
        key = ("logits", canonical.key, self.settings)
        session: RuntimeSession = canonical.sessions.get(
            key, lambda: RuntimeSession(expose(canonical.graph, [canonical.logits]), [canonical.logits], self.settings)
        )
        step, found = spec.batch or STEP, []
        for begin in range(0, len(versions), step):
            rows = versions[begin : begin + step]
            full = np.concatenate([rows, np.repeat(rows[-1:], step - len(rows), axis=0)]) if spec.batch else rows
            array = full.transpose(0, 2, 3, 1) if spec.layout == "NHWC" else full
            array = np.round(array) if spec.is_integer else array
            values = session.run({spec.name: np.ascontiguousarray(array.astype(spec.dtype))})[canonical.logits]
            logits = as_rows(values, len(full))
            if logits is None:
                raise ModelError(f"the logits ({canonical.logits!r}) have shape {values.shape}: one row each is wanted")
            found.append(logits[: len(rows)])
        return np.concatenate(found)

    def score(self, versions: np.ndarray, target: int, probability: bool) -> np.ndarray:
        logits = self.logits(versions)
        if not probability:
            return of_class(logits, np.array([target]))[:, 0].astype(np.float64)
        found = probabilities(logits, self.model.canonical(versions.shape[2:]).squash)
        if found.shape[1] == 1:
            return found[:, 0] if target == 1 else 1 - found[:, 0]
        return found[:, target]


class _Remembering:
    """A score that knows the score of the picture itself, which most metrics begin with."""

    def __init__(self, score: Callable[[np.ndarray], np.ndarray], x: np.ndarray):
        self.score, self.x = score, x
        self.known: float | None = None

    def __call__(self, versions: np.ndarray) -> np.ndarray:
        if not np.array_equal(versions[0], self.x):
            return self.score(versions)
        if self.known is None:
            self.known = float(self.score(versions[:1])[0])
        rest = [self.score(versions[1:])] if len(versions) > 1 else []
        return np.concatenate([[self.known], *rest])


def _measured(
    model: Model,
    scorer: Scorer,
    example: Example,
    methods: Sequence[Method],
    layers: Sequence[str],
    measures: Sequence[Measure],
    floors: bool,
    target: str,
    options: Mapping[str, Mapping[str, Any]],
    how: Mapping[str, Any],
) -> Iterator[list[Any]]:
    """The rows of one picture."""
    prepared = model.preprocess.apply(open_image(example.path), model.spec)
    x = prepared.array[0].astype(np.float64)
    x = x.transpose(2, 0, 1) if model.spec.layout == "NHWC" else x
    size = (x.shape[1], x.shape[2])
    truth, boxes = example.seen(prepared.window, size)
    logits = scorer.logits(x[None])
    predicted = int(logits[0].argmax()) if logits.shape[1] > 1 else int(logits[0, 0] > 0)
    explained = predicted if target == "predicted" or example.label is None else example.label
    extent = "" if truth is None else _extent(float(truth.mean()))
    wanted = [explained]
    if any(measure.other for measure in measures):
        wanted.append(_another(explained, max(logits.shape[1], 2), x))
    shaken = any(measure.shaken for measure in measures)
    # Of each also that of the other class, that of the shaken input, and how much relevance was lost.
    maps: list[tuple[str, str, np.ndarray, np.ndarray, np.ndarray, float]] = []
    for m in methods:
        places = [INPUT] if m.at_input else list(layers)
        more = dict(how, method=m, options=options.get(m.name))
        e = model.explain(example.path, places, wanted, **more)
        noisy = model.explain(_shaken(prepared.array, x), places, [explained], **more).maps if shaken else e.maps
        maps += [
            (m.name, name, heat[0, 0], heat[0, -1], noisy[name][0, 0], _lost(e, name)) for name, heat in e.maps.items()
        ]
    if floors:
        maps += [(name, "", heat, heat, heat, float("nan")) for name, heat in baselines(x).items()]
    probability = _Remembering(lambda versions: scorer.score(versions, explained, True), x)
    logit = _Remembering(lambda versions: scorer.score(versions, explained, False), x)
    for name, layer, heat, other, moved, lost in maps:
        if heat.ndim != 2:
            raise UsageError(f"method {name} gives no map of two dimensions at layer {layer!r}: it cannot be evaluated")
        case = Case(
            upsampled(heat.astype(np.float64), size),
            x,
            probability,
            logit,
            truth,
            list(boxes),
            upsampled(other.astype(np.float64), size) if len(wanted) > 1 else None,
            upsampled(moved.astype(np.float64), size) if shaken else None,
            lost,
        )
        for measure in measures:
            if (measure.truth and truth is None) or (measure.boxes and not boxes):
                continue
            shape = "x".join(map(str, heat.shape))
            label = "" if example.label is None else example.label
            value = f"{measure.value(case):.8g}"
            yield [example.path, explained, label, extent, name, layer, shape, measure.name, value]


def _lost(e: Explanation, layer: str) -> float:
    """The share of the relevance at the logits, by magnitude, that did not arrive at a layer; NaN where it is not known
    or not meant to."""
    c = e.conservation
    if layer not in c.at_layers or not c.nodes:
        return float("nan")
    return float(abs(c.start[0, 0] - c.at_layers[layer][0, 0]) / max(c.start_magnitude[0, 0], 1e-30))


def _seed(x: np.ndarray) -> int:
    """The same for a picture in every run."""
    return int(np.abs(x).sum() * 1e3) % 2**32


def _another(explained: int, classes: int, x: np.ndarray) -> int:
    """A class that is not explained, at random."""
    picked = int(np.random.default_rng([1, _seed(x)]).integers(0, classes - 1))
    return picked + (picked >= explained)


def _shaken(array: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The model's input with a little noise."""
    noise = NOISE * np.ptp(x) * np.random.default_rng([2, _seed(x)]).standard_normal(array.shape)
    moved = array + noise
    return (np.round(moved).clip(0, 255) if array.dtype.kind in "iu" else moved).astype(array.dtype)


def _extent(part: float) -> str:
    return "small" if part < SMALL else "large" if part >= LARGE else "medium"


def baselines(x: np.ndarray) -> dict[str, np.ndarray]:
    """Maps (H, W) that know nothing of the model: a Gaussian in the centre, smooth noise, and edges of the picture."""
    height, width = x.shape[1:]
    ys, xs = ((np.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    centre = np.exp(-(ys[:, None] ** 2 + xs[None] ** 2) / (2 * 0.25**2))
    noise = upsampled(np.random.default_rng(_seed(x)).random((7, 7)), (height, width))
    grey = np.pad(x.mean(0), 1, mode="edge")
    down = grey[2:, 1:-1] - grey[:-2, 1:-1]
    right = grey[1:-1, 2:] - grey[1:-1, :-2]
    return {"centre": centre, "noise": noise, "edges": np.hypot(down, right)}
