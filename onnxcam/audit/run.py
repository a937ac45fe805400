"""Explain every picture by both models, for the class that the first one predicts, and measure how the maps agree.

Rows are written picture by picture: memory does not grow with the set, an interrupted run goes on where it stopped, and
pictures may be shared out to actors of Ray.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcam.audit.drift import Drift, drift
from onnxcam.audit.matching import Pair, chosen
from onnxcam.compile import classes_in
from onnxcam.engines.session import Settings
from onnxcam.errors import NotFiniteError, PictureError, UsageError
from onnxcam.evaluation.examples import Example, checked
from onnxcam.explanation import Explanation
from onnxcam.files import writable_folder, write_atomically
from onnxcam.journal import VALUES, Journal, rows_of, to_parquet
from onnxcam.locations import distinct
from onnxcam.methods import Method, method as find_method
from onnxcam.methods.upsample import upsampled
from onnxcam.metrics import agreement, localisation
from onnxcam.model import Model
from onnxcam.pictures import open_image, why_left_out
from onnxcam.pool import Pool, shared_out
from onnxcam.render.colour import Kind, normalise

MEASURED = ("rank", "ssim", "iou", "shift", "energy_a", "energy_b")
COLUMNS = (
    "image", "number", "label", "class_a", "class_b", "explained", "probability_a", "probability_b", "layer", *MEASURED,
)  # fmt: skip
THUMBS = "maps"
SIDE = 224  # of the pictures in the report, at most
SAMPLE = 16  # pictures that activations are compared on


@dataclass(frozen=True)
class Audit:
    """What was measured.

    Attributes:
        folder: with `values.csv`, and `maps/` with pictures of both maps.
        names: of the two models.
        pairs: the layers that were explained.
        drift: how like the activations of the two are, layer by layer, the input first.
        pictures: how many there are.
        skipped: those that were left out, and why.
        settings: what was asked for.
        warnings: what makes the comparison doubtful.
    """

    folder: Path
    names: tuple[str, str]
    pairs: list[Pair]
    drift: list[Drift]
    pictures: int
    skipped: dict[str, str]
    settings: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def rows(self) -> Iterator[dict[str, str]]:
        """All rows, one at a time."""
        return rows_of(self.folder)

    def to_parquet(self) -> Path:
        """The same as `values.parquet`; raises UsageError where pyarrow is not installed."""
        whole = ("number", "label", "class_a", "class_b", "explained")
        return to_parquet(self.folder / VALUES, ("image", "layer"), whole)


def audit(
    first: Model,
    second: Model,
    examples: Sequence[Example],
    layers: Sequence[str | int] = ("suggested",),
    out: str | Path = "onnxcam-audit",
    *,
    asked: Mapping[str, str] | None = None,
    method: str | Method = "relevance-cam",
    options: Mapping[str, Any] | None = None,
    target: str = "predicted",
    offset: int = 0,
    thumbs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    engine_pool: str | Pool | None = None,
    workers: int | None = None,
    **how: Any,
) -> Audit:
    """Compare two models over pictures.

    Args:
        first, second: from `onnxcam.load`; each with its own preprocessing.
        examples: pictures with what is known of them.
        layers: of the first model; `asked` says by name which of the second goes with one of the first, where that
            should not be found by name, order or depth.
        out: the folder; one that holds part of the same run is gone on with, also where there are more pictures now.
        method, options, how: as for `explain`, the same for both.
        target: the class that both explain: what the first predicts ("predicted"), or the "label".
        offset: class c of the first is class c + offset of the second.
        thumbs: of how many pictures the maps are drawn, for the report; by default of all.
        progress: called with (done, total) pictures.
        threads, engine_pool, workers: as for `evaluate`.

    Raises:
        UsageError: something means nothing, or the folder holds another run.
        ModelError: as `explain`.
    """
    examples = checked(examples, target)
    if first.spec.layout is None or second.spec.layout is None:
        which = first if first.spec.layout is None else second
        raise UsageError(f"{which.name}: {which.spec.why_no_image}; an audit compares models of pictures")
    first, second = at_one_size(first, second)
    pairs = chosen(first, second, layers, asked)
    if not pairs:
        raise UsageError("there is no layer to compare")
    explained = find_method(method)
    settings = {
        "models": [[model.content, model.output] for model in (first, second)],
        "preprocess": [first.preprocess.to_json(), second.preprocess.to_json()],
        "layers": [[p.name, p.a.tensor, p.b.tensor] for p in pairs],
        "method": [explained.name, dict(options or {})],
        "target": target,
        "offset": offset,
        "thumbs": thumbs,
        "how": {key: str(value) for key, value in sorted(how.items())},
    }
    journal = Journal(out, COLUMNS, settings, {e.path: e.known for e in examples})
    begin = 1 + max((int(row["number"]) for row in rows_of(journal.folder)), default=-1)
    if thumbs is None or thumbs > 0:
        writable_folder(journal.folder / THUMBS)
    who, threads = shared_out(engine_pool, workers, how.get("providers", "cpu"), threads)
    work = _Auditing(
        first, second, pairs, explained, dict(options or {}), target, offset, thumbs, len(examples) > 1,
        dict(how, threads=threads),
    )  # fmt: skip
    left = list(enumerate((e for e in examples if e.path not in journal.done), begin))
    skipped: dict[str, str] = {}
    count = len(examples) - len(left)
    if progress is not None and count:
        progress(count, len(examples))
    with journal.writing() as values:
        for (number, example), part in zip(left, who.run(work, left), strict=True):
            for side, content in zip("ab", part.pictures, strict=False):
                _save(journal.folder / THUMBS / f"{number:06d}-{side}.jpg", content)
            if part.why:
                skipped[example.path] = part.why
            else:
                values.add(example.path, part.rows)
            count += 1
            if progress is not None:
                progress(count, len(examples))
    readable = [e.path for e in examples if e.path not in skipped][:SAMPLE]
    if not readable:
        raise UsageError(next(iter(skipped.values()), "there is no picture to compare on"))
    parted = drift(first, second, readable, Settings.of(how.get("providers", "cpu"), threads))
    pictures = len({e.path for e in examples} - set(skipped))
    return Audit(
        journal.folder, told_apart(first, second), pairs, parted, pictures, skipped, settings,
        tuple(_doubts(first, second, offset)),
    )  # fmt: skip


def at_one_size(first: Model, second: Model) -> tuple[Model, Model]:
    """The two, one that takes inputs of any size made to take those of the other's, unless it says what it wants."""
    for one, other in ((first, second), (second, first)):
        fixed = one.spec.height and one.spec.width
        free = (
            not (other.spec.height or other.spec.width or other.preprocess.size) and other.preprocess.resize != "exact"
        )
        if fixed and free and one.size != other.size:
            resized = copy.copy(other)
            resized.preprocess = other.preprocess.override(size=one.size)
            return (one, resized) if one is first else (resized, one)
    return first, second


def told_apart(first: Model, second: Model) -> tuple[str, str]:
    """The names of the two, with as much of the folders before as makes them differ."""
    a, b = distinct([str(model.path or model.name) for model in (first, second)])
    return a, b


def _doubts(first: Model, second: Model, offset: int) -> Iterator[str]:
    counts = [_classes(model) for model in (first, second)]
    if counts[0] != counts[1] and not offset:
        yield (
            f"{first.name} has {counts[0]} classes and {second.name} {counts[1]}: if class c of the one is class c + N "
            "of the other, give --offset N"
        )


def _classes(model: Model) -> int:
    """How many classes a model tells apart; one logit tells two."""
    return max(classes_in(model.canonical()), 2)


def _save(path: Path, content: bytes) -> None:
    write_atomically(path, lambda s: s.write(content))


@dataclass(frozen=True)
class _Part:
    rows: list[list[Any]]
    pictures: tuple[bytes, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class _Auditing:
    """The work on one picture."""

    first: Model
    second: Model
    pairs: list[Pair]
    method: Method
    options: dict[str, Any]
    target: str
    offset: int
    thumbs: int | None
    lenient: bool
    how: dict[str, Any]

    def begin(self) -> Callable[[tuple[int, Example]], _Part]:
        def audited(item: tuple[int, Example]) -> _Part:
            number, example = item
            try:
                return self._part(number, example)
            except (PictureError, NotFiniteError) as error:
                if not self.lenient:
                    raise
                return _Part([], (), why_left_out(example.path, error))

        return audited

    def _part(self, number: int, example: Example) -> _Part:
        same = {"method": self.method, "options": self.options, **self.how}
        wanted = "predicted" if self.target == "predicted" else int(example.label or 0)
        a = self.first.explain(example.path, [p.a for p in self.pairs], [wanted], **same)
        explained = int(a.targets[0, 0])
        try:
            b = self.second.explain(example.path, [p.b for p in self.pairs], [explained + self.offset], **same)
        except PictureError:
            raise
        except UsageError as error:
            what = f"class {explained} of {self.first.name} for {example.name}"
            also = f" is class {explained + self.offset} by --offset {self.offset}" if self.offset else ""
            raise UsageError(f"{self.second.name}, asked about {what}{also}: {error}") from None
        image = open_image(example.path)
        seen = [m.preprocess.apply(image, m.spec) for m in (self.first, self.second)]
        size = self.first.size
        truth, _ = example.seen(seen[0].window, (size[0], size[1]))
        rows: list[list[Any]] = []
        maps: list[tuple[np.ndarray, np.ndarray]] = []
        for pair in self.pairs:
            one = _map(a, pair.a).astype(np.float64)
            other = _map(b, pair.b).astype(np.float64)
            if one.ndim != 2 or other.ndim != 2:
                raise UsageError(f"method {self.method.name} gives no map of two dimensions at layer {pair.name!r}")
            moved = agreement.in_window(other, seen[1].window, seen[0].window, (one.shape[0], one.shape[1]))
            maps.append((one, moved))
            energies = [
                float("nan") if truth is None else localisation.energy_inside(upsampled(m, size), truth)
                for m in (one, moved)
            ]
            found = [
                agreement.rank_correlation(one, moved), agreement.structure(one, moved), agreement.top_iou(one, moved),
                agreement.shift(one, moved), *energies,
            ]  # fmt: skip
            rows.append(
                [
                    example.path, number, "" if example.label is None else example.label, _predicted(a),
                    _predicted(b) - self.offset, explained, f"{a.probability(0, 0):.6g}", f"{b.probability(0, 0):.6g}",
                    pair.name, *(f"{value:.6g}" for value in found),
                ]
            )  # fmt: skip
        drawn: tuple[bytes, ...] = ()
        if self.thumbs is None or number < self.thumbs:
            kind: Kind = "signed" if any(normalise(m).kind == "signed" for m in maps[-1]) else "positive"
            drawn = tuple(_drawn(seen[0].view, m, kind) for m in maps[-1])
        return _Part(rows, drawn)


def _map(e: Explanation, layer: Any) -> np.ndarray:
    """The map of a layer, by tensor: two layers may have one node's name."""
    name = next(n for n, found in e.layers.items() if found.tensor == layer.tensor)
    return e.maps[name][0, 0]


def _predicted(e: Explanation) -> int:
    """The class that a model predicts; of one logit 0 or 1."""
    row = e.logits[0]
    return int(row.argmax()) if len(row) > 1 else int(row[0] > 0)


def _drawn(view: Any, heat: np.ndarray, kind: Kind) -> bytes:
    """The map over what the first model saw, as a JPEG; both maps of a pair are of one kind, to be compared."""
    import io

    from onnxcam.render.overlay import blend

    stream = io.BytesIO()
    blend(view, heat, kind=kind, size=SIDE).save(stream, "JPEG", quality=82)
    return stream.getvalue()
