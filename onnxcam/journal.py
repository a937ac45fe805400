"""A run over pictures that can be interrupted: rows of a CSV, written picture by picture, and what was asked for.

Rows of one picture are written at once, so memory does not grow with the set. What an interruption left in part is
taken away when the run is gone on with; a folder that holds another run is refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnxcam.errors import UsageError
from onnxcam.files import writable_folder, write_atomically

VALUES, SETTINGS = "values.csv", "settings.json"


class Journal:
    """The rows of a run in a folder.

    Attributes:
        folder: where `values.csv` and `settings.json` are.
        columns: of the rows; the first is the picture.
        done: pictures that have rows.
    """

    def __init__(self, folder: str | Path, columns: Sequence[str], settings: Mapping[str, Any]):
        """Begin, or go on.

        Raises:
            UsageError: the folder cannot be written to, or holds another run.
        """
        self.folder, self.columns = writable_folder(folder), tuple(columns)
        self.path = self.folder / VALUES
        self.done = self._begun(settings)

    def _begun(self, settings: Mapping[str, Any]) -> set[str]:
        known = self.folder / SETTINGS
        if known.exists():
            if json.loads(known.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
                raise UsageError(f"{self.folder} holds values of another model or other settings: give another folder")
        elif self.path.exists():
            raise UsageError(f"{self.path} is of no run of onnxcam: give another folder")
        write_atomically(known, lambda s: s.write((json.dumps(settings, indent=2) + "\n").encode()))
        if not self.path.exists():
            write_atomically(self.path, lambda s: s.write((",".join(self.columns) + "\n").encode()))
            return set()
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.DictReader(io.StringIO(whole)))
        counts: dict[str, int] = {}
        for row in rows:
            counts[row[self.columns[0]]] = counts.get(row[self.columns[0]], 0) + 1
        last = rows[-1][self.columns[0]] if rows else None
        if last is not None and (whole != text or counts[last] < max(counts.values())):
            # Fewer rows than others may also be for want of a truth: then they are made again, and come out the same.
            kept = [[row[c] for c in self.columns] for row in rows if row[self.columns[0]] != last]
            head = ",".join(self.columns) + "\n"
            write_atomically(self.path, lambda s: s.write((head + _lines(kept)).encode()))
            counts.pop(last)
        return set(counts)

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Append rows."""
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            yield Writer(stream)


def rows_of(folder: Path) -> Iterator[dict[str, str]]:
    """All rows of a run, one at a time, as they stand in its file."""
    with (folder / VALUES).open(newline="", encoding="utf-8") as stream:
        yield from csv.DictReader(stream)


class Writer:
    """Appends rows; those of one call are all there or, but for an interruption that is mended later, none."""

    def __init__(self, stream: Any):
        self.stream = stream

    def add(self, rows: Sequence[Sequence[Any]]) -> None:
        self.stream.write(_lines(rows))
        self.stream.flush()


def to_parquet(values: Path, text: Sequence[str], whole: Sequence[str] = ()) -> Path:
    """The values of a run as Parquet beside its CSV: columns `text` as they are, `whole` as whole numbers, others real.

    Raises:
        UsageError: pyarrow is not installed, or the folder cannot be written to.
    """
    try:
        import pyarrow as pa
        from pyarrow import csv as table, parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'onnxcam[evaluate]'") from None
    with values.open(newline="", encoding="utf-8") as stream:
        columns = next(csv.reader(stream))
    kinds = {name: pa.string() if name in text else pa.int32() if name in whole else pa.float64() for name in columns}
    read = table.read_csv(values, convert_options=table.ConvertOptions(column_types=kinds))
    return write_atomically(values.with_suffix(".parquet"), lambda s: parquet.write_table(read, s))


def _lines(rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()
