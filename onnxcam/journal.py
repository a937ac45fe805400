"""A run over pictures that can be interrupted: rows of a CSV, written picture by picture, and what was asked for.

Rows of one picture are written at once, and behind them, in `done.csv`, that the picture is done, so memory does not
grow with the set. What an interruption left in part is taken away when the run is gone on with; a folder that holds
another run, or one over other pictures, is refused. Pictures may be added; one of which something else is known now is
done again.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from onnxcam.errors import UsageError
from onnxcam.files import writable_folder, write_atomically

VALUES, SETTINGS, DONE = "values.csv", "settings.json", "done.csv"


class Journal:
    """The rows of a run in a folder.

    Attributes:
        folder: where `values.csv`, `settings.json` and `done.csv` are.
        columns: of the rows; the first is the picture.
        pictures: those that are to be done, each with what is known of it, as one string.
        done: those that are.
    """

    def __init__(
        self, folder: str | Path, columns: Sequence[str], settings: Mapping[str, Any], pictures: Mapping[str, str]
    ):
        """Begin, or go on.

        Raises:
            UsageError: the folder cannot be written to, or holds another run.
        """
        self.folder, self.columns, self.pictures = writable_folder(folder), tuple(columns), dict(pictures)
        self.path = self.folder / VALUES
        self.done = self._begun(settings)

    def _begun(self, settings: Mapping[str, Any]) -> set[str]:
        settings = json.loads(json.dumps(settings))
        known = _lines_of(self.folder / DONE)
        if not (self.folder / SETTINGS).exists():
            if self.path.exists():
                raise UsageError(f"{self.path} is of no run of onnxcam: give another folder")
        elif _settings(self.folder / SETTINGS) != settings and (known or _has_rows(self.path)):
            raise UsageError(f"{self.folder} holds values of another model or other settings: give another folder")
        elif not known and _has_rows(self.path) and not (self.folder / DONE).exists():
            raise UsageError(f"{self.folder} holds a run of an earlier version of onnxcam: give another folder")
        if other := next((line[0] for line in known if line[0] not in self.pictures), None):
            raise UsageError(f"{self.folder} holds values of other pictures, {other} for one: give another folder")
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.DictReader(io.StringIO(whole)))
        count = Counter(row[self.columns[0]] for row in rows)
        lines = [line for line in known if line[1] == self.pictures[line[0]] and line[2] == str(count[line[0]])]
        done = {line[0] for line in lines}
        kept = [[row[c] for c in self.columns] for row in rows if row[self.columns[0]] in done]
        _write(self.folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        _write(self.folder / DONE, _lines(lines))
        if len(kept) < len(rows) or whole != text or not text:
            _write(self.path, _lines([self.columns, *kept]))
        return done

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Append rows."""
        with (
            self.path.open("a", newline="", encoding="utf-8") as rows,
            (self.folder / DONE).open("a", newline="", encoding="utf-8") as done,
        ):
            yield Writer(rows, done, self.pictures)


def _settings(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path} is of no run of onnxcam: give another folder") from None


def _has_rows(path: Path) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") > 1


def _lines_of(path: Path) -> list[list[str]]:
    """The whole lines of a CSV; none where there is no such file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [line for line in csv.reader(io.StringIO(text[: text.rfind("\n") + 1])) if len(line) == 3]


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda s: s.write(text.encode("utf-8")))


def rows_of(folder: Path) -> Iterator[dict[str, str]]:
    """All rows of a run, one at a time, as they stand in its file."""
    with (folder / VALUES).open(newline="", encoding="utf-8") as stream:
        yield from csv.DictReader(stream)


class Writer:
    """Appends the rows of pictures, and behind them that they are done."""

    def __init__(self, rows: IO[str], done: IO[str], pictures: Mapping[str, str]):
        self.rows, self.done, self.pictures = rows, done, pictures

    def add(self, picture: str, rows: Sequence[Sequence[Any]]) -> None:
        """All rows of one picture, which may be none. One that could not be read is not to be added."""
        for stream, lines in ((self.rows, rows), (self.done, [[picture, self.pictures[picture], len(rows)]])):
            stream.write(_lines(lines))
            stream.flush()


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
