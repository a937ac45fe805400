"""Maps of a whole set of pictures as one Parquet table, computed here or by actors of Ray.

Pictures go by a few at a time, so memory does not grow with their number. One that cannot be read is left out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcam.errors import NotFiniteError, PictureError, UsageError
from onnxcam.explain import explain
from onnxcam.explanation import Explanation
from onnxcam.files import writable_folder, write_atomically
from onnxcam.locations import is_url, written_to
from onnxcam.model import Model
from onnxcam.pictures import why_left_out
from onnxcam.pool import Pool, shared_out
from onnxcam.targets import Target

MAPS, MANIFEST = "maps.parquet", "manifest.json"
ROWS = 256  # held before they are written


@dataclass(frozen=True)
class Dataset:
    """What was written.

    Attributes:
        table: path or URL of the maps.
        pictures: how many were explained.
        skipped: pictures that were left out, and why.
        warnings: sentences that a user should read.
    """

    table: str
    pictures: int
    skipped: dict[str, str]
    warnings: list[str]


def explain_dataset(
    model: Model,
    images: Sequence[str | Path],
    out: str | Path,
    layers: Sequence[str | int] | str | int = ("auto",),
    targets: Sequence[Target] | Target | None = None,
    *,
    engine_pool: str | Pool | None = None,
    workers: int | None = None,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Callable[[float, int], None] | None = None,
    **how: Any,
) -> Dataset:
    """Explain pictures and write `OUT/maps.parquet`, a row for each picture, target and layer, and `OUT/manifest.json`.

    The columns: image, class, label, logit, probability, layer, node, tensor, shape (of the map) and map (its values,
    row by row, float32).

    Args:
        model: from `onnxcam.load`.
        images: paths or URLs.
        out: a folder, or its URL.
        layers, targets, how: as for `explain`.
        engine_pool: "ray" to share the pictures out among actors of Ray.
        workers: how many of them; by default one for each core, or GPU where that computes.
        batch_size: pictures at a time, where the file leaves its batch open.
        threads: within one op; an actor has one by default.
        progress: called with (done, total) pictures.

    Raises:
        UsageError: as `explain`; no picture could be read; pyarrow is not installed.
        ModelError: as `explain`.
    """
    who, threads = shared_out(engine_pool, workers, how.get("providers", "cpu"), threads)
    listed = [str(image) for image in images]
    if not listed:
        raise UsageError("there is no picture to explain")
    chunks = [listed[i : i + batch_size] for i in range(0, len(listed), batch_size)]
    lenient = len(listed) > 1
    named = [layers] if isinstance(layers, str | int) else list(layers)
    work = _Explaining(model, named, targets, dict(how, threads=threads, batch_size=batch_size), lenient)
    skipped: dict[str, str] = {}
    warnings: dict[str, None] = {}
    done, manifest = 0, None
    with _table(out) as write:
        for chunk, part in zip(chunks, who.run(work, chunks), strict=True):
            write(part.rows)
            skipped |= part.skipped
            warnings |= dict.fromkeys(part.warnings)
            manifest = manifest or part.manifest
            done += len(chunk)
            if progress is not None:
                progress(done, len(listed))
        if manifest is None:
            raise UsageError(next(iter(skipped.values())))
    count = len(listed) - len(skipped)
    text = json.dumps({**manifest, "pictures": count, "skipped": skipped, "warnings": list(warnings)}, indent=2) + "\n"
    _write(out, MANIFEST, text.encode())
    return Dataset(f"{str(out).rstrip('/')}/{MAPS}", count, skipped, list(warnings))


@dataclass(frozen=True)
class _Part:
    rows: list[dict[str, Any]]
    skipped: dict[str, str]
    manifest: dict[str, Any] | None
    warnings: list[str]


@dataclass(frozen=True)
class _Explaining:
    """The work on a few pictures."""

    model: Model
    layers: list[Any]
    targets: Any
    how: Mapping[str, Any]
    lenient: bool

    def begin(self) -> Callable[[list[str]], _Part]:
        def explained(pictures: list[str]) -> _Part:
            try:
                return self._part(pictures)
            except (PictureError, NotFiniteError):
                if not self.lenient:
                    raise
            # One of them cannot be read: find out which.
            parts, skipped = [], {}
            for picture in pictures:
                try:
                    parts.append(self._part([picture]))
                except (PictureError, NotFiniteError) as error:
                    skipped[picture] = why_left_out(picture, error)
            manifest = parts[0].manifest if parts else None
            warnings = [w for part in parts for w in part.warnings]
            return _Part([row for part in parts for row in part.rows], skipped, manifest, warnings)

        return explained

    def _part(self, pictures: list[str]) -> _Part:
        e = explain(self.model, pictures, self.layers, self.targets, **self.how)
        manifest = {key: value for key, value in e.manifest().items() if key not in ("conservation", "warnings")}
        return _Part(list(rows(e)), {}, manifest, e.warnings)


def rows(e: Explanation) -> Iterator[dict[str, Any]]:
    """An explanation as rows of the table."""
    for i, picture in enumerate(e.pictures):
        for t in range(e.targets.shape[1]):
            for name, heat in e.maps.items():
                yield {
                    "image": picture.name,
                    "class": int(e.targets[i, t]),
                    "label": e.label(i, t),
                    "logit": e.logit(i, t),
                    "probability": e.probability(i, t),
                    "layer": name,
                    "node": e.layers[name].node,
                    "tensor": e.layers[name].tensor,
                    "shape": list(heat.shape[2:]),
                    "map": np.asarray(heat[i, t], np.float32).ravel(),
                }


@contextmanager
def _table(out: str | Path) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
    """Gives what writes rows; the table appears whole, at the end, or not at all.

    Raises:
        UsageError: pyarrow is not installed, or the place cannot be written to.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UsageError("tables of maps need pyarrow: pip install 'onnxcam[evaluate]'") from None
    text, number = pa.string(), pa.int32()
    schema = pa.schema(
        [
            ("image", text), ("class", number), ("label", text), ("logit", pa.float32()),
            ("probability", pa.float32()), ("layer", text), ("node", text), ("tensor", text),
            ("shape", pa.list_(number)), ("map", pa.list_(pa.float32())),
        ]
    )  # fmt: skip
    if not is_url(out):
        writable_folder(out)
    with tempfile.TemporaryDirectory(dir=None if is_url(out) else out, prefix=".") as folder:
        temporary = Path(folder, MAPS)
        held: list[dict[str, Any]] = []
        with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:

            def write(some: Sequence[dict[str, Any]]) -> None:
                held.extend(some)
                if len(held) >= ROWS:
                    flush()

            def flush() -> None:
                writer.write_table(pa.Table.from_pylist(held, schema=schema))
                held.clear()

            yield write
            flush()
        if is_url(out):
            written_to(f"{str(out).rstrip('/')}/{MAPS}", temporary)
        else:
            temporary.replace(Path(out, MAPS))


def _write(out: str | Path, name: str, content: bytes) -> None:
    if not is_url(out):
        write_atomically(Path(out, name), lambda s: s.write(content))
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(content)
        written_to(f"{str(out).rstrip('/')}/{name}", Path(folder, name))
