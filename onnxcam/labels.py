"""Names of a model's classes: read from a file or from the model's metadata, looked up by number and by text.

Text that a user types for a class becomes class numbers here; what has no name is called "class 281".
"""

from __future__ import annotations

import ast
import csv
import difflib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcam.errors import UsageError

KEY = "onnxcam.labels"
FOREIGN_KEYS = ("names", "character")  # Ultralytics YOLO: a Python dict or list; RapidAI's Paddle models: one per line
WORDNET = re.compile(r"n\d{8}\s+")
NUMBERED = re.compile(r"(\d+)\s*[:,;\s]\s*(\S.*)")
MATCHES_SHOWN = 8


@dataclass(frozen=True)
class Labels:
    """Class number -> name; numbers may be missing. Synonyms stand in one name, separated by commas."""

    names: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Sequence[str]) -> Labels:
        """Labels from a list; an empty name is a class without one."""
        return cls({i: str(name).strip() for i, name in enumerate(names) if str(name).strip()})

    def __len__(self) -> int:
        return max(self.names, default=-1) + 1

    def __iter__(self) -> Iterator[str]:
        return (self.name(i) for i in range(len(self)))

    def name(self, i: int) -> str:
        """The name of class `i`; "class 281" where it has none."""
        return self.names.get(i, f"class {i}")

    def find(self, text: str, classes: int | None = None) -> list[int]:
        """The classes that `text` names, in order.

        A number is a class number, below `classes` where that is given. Else all classes with exactly this name, else
        with this synonym, else the one class whose name contains the text; capitals, underscores and spaces do not
        matter. Raises UsageError, with the nearest names, where nothing or too much matches.
        """
        wanted = _plain(text)
        if re.fullmatch(r"[+-]?\d+", text.strip()):
            number = int(text)
            if number >= 0 and (classes is None or number < classes):
                return [number]
            if not self._exact(wanted):  # a model of digits or angles has names that are numbers
                limit = f"classes run from 0 to {classes - 1}" if classes is not None else "classes count from 0"
                raise UsageError(f"there is no class {number}: {limit}")
        if not self.names:
            raise UsageError(
                f"class {text!r}: the model's classes have no names; give a number, or a file with --labels"
            )
        found = self._exact(wanted) or self._synonym(wanted) or self._containing(wanted, text)
        if not found:
            raise UsageError(f"no class is called {text!r}; {self._nearest(wanted)}")
        if classes is not None and found[-1] >= classes:
            raise UsageError(
                f"{text!r} is class {found[-1]} in the labels, but the model has only {classes} classes: "
                "the labels belong to another model"
            )
        return found

    def mismatch(self, classes: int) -> str | None:
        """A sentence of warning where the labels do not number as many as the model's classes, else None."""
        if not self.names or len(self) == classes:
            return None
        hint = ""
        if len(self) == classes - 1:
            hint = ", perhaps shifted by one: many TensorFlow models have a background class 0"
        return f"the labels name {len(self)} classes and the model has {classes}: names may be wrong{hint}"

    def _exact(self, wanted: str) -> list[int]:
        return sorted(i for i, name in self.names.items() if _plain(name) == wanted)

    def _synonym(self, wanted: str) -> list[int]:
        return sorted(i for i, name in self.names.items() if wanted in map(_plain, name.split(",")))

    def _containing(self, wanted: str, text: str) -> list[int]:
        found = sorted(i for i, name in self.names.items() if wanted and wanted in _plain(name))
        if len(found) > 1:
            word = re.compile(rf"\b{re.escape(wanted)}\b")
            found.sort(key=lambda i: not word.search(_plain(self.names[i])))  # whole words first
            raise UsageError(f"{text!r} fits {len(found)} classes: {self._listed(found)}; give a number or a full name")
        return found

    def _nearest(self, wanted: str) -> str:
        synonyms = {_plain(part): i for i, name in sorted(self.names.items()) for part in name.split(",")}
        near = difflib.get_close_matches(wanted, synonyms, n=3, cutoff=0.5)
        if not near:
            return f"the names start with {self._listed(sorted(self.names)[:3])}"
        return f"the nearest: {self._listed(list(dict.fromkeys(synonyms[name] for name in near)))}"

    def _listed(self, classes: Sequence[int]) -> str:
        rest = ["..."] if len(classes) > MATCHES_SHOWN else []
        return "; ".join([f"{i} {self.names[i]}" for i in classes[:MATCHES_SHOWN]] + rest)


def read_labels(path: str | os.PathLike[str]) -> Labels:
    """Labels from a file.

    Understood: text with one name per line (also numbered "281: tabby", or with WordNet ids as in synset_words.txt);
    JSON or a Python literal, a list of names or an object number -> name (also imagenet_class_index.json, name ->
    number, and a Hugging Face config.json with id2label); CSV with number and name. Raises UsageError that says what
    is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"no such labels file: {path}") from None
    except UnicodeDecodeError:
        raise UsageError(f"labels file {path} is not UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"labels file {path} cannot be read: {error.strerror or error}") from None
    kind = path.suffix.lower()
    try:
        labels = _from_csv(text) if kind in (".csv", ".tsv") else _from_text(text, must_be_json=kind == ".json")
    except ValueError as error:
        raise UsageError(f"labels file {path}: {error}") from None
    if not labels.names:
        raise UsageError(f"labels file {path} names no classes")
    return labels


def labels_from_metadata(metadata: Mapping[str, str], classes: int | None = None) -> Labels | None:
    """Labels from a model's metadata; None where the file has none.

    Read are our key `onnxcam.labels` (a JSON list, or one name per line) and the keys of other exporters; those count
    only where they can be read and number `classes`. Raises UsageError that names the key where ours is malformed.
    """
    if KEY in metadata:
        try:
            labels = _from_text(metadata[KEY])
        except ValueError as error:
            raise UsageError(
                f"the model's metadata {KEY!r} cannot be used: {error}; pass --labels FILE to go without it"
            ) from None
        return labels if labels.names else None
    for key in FOREIGN_KEYS:
        try:
            labels = _from_text(metadata.get(key, ""))
        except ValueError:
            continue
        if labels.names and classes in (None, len(labels)):
            return labels
    return None


def labels_to_metadata(labels: Labels) -> dict[str, str]:
    """The entry to write into a model's metadata so that `labels_from_metadata` reads the same again."""
    return {KEY: json.dumps([labels.names.get(i, "") for i in range(len(labels))], ensure_ascii=False)}


def _from_text(text: str, must_be_json: bool = False) -> Labels:
    """Labels from JSON, a Python literal, or lines. Raises ValueError for a structure that is none of these."""
    text = text.strip()
    if must_be_json or text[:1] in ("{", "["):
        try:
            return _from_structure(json.loads(text))
        except json.JSONDecodeError as not_json:
            try:
                return _from_structure(ast.literal_eval(text))
            except (SyntaxError, TypeError, MemoryError, RecursionError, ValueError):
                raise ValueError(f"not valid JSON ({not_json})") from None
    return _from_lines(text.splitlines())


def _from_structure(value: Any) -> Labels:
    if isinstance(value, dict) and isinstance(value.get("id2label"), dict):
        value = value["id2label"]
    if isinstance(value, (list, tuple)):
        return Labels.of([_name_in(entry) for entry in value])
    if not isinstance(value, dict):
        raise ValueError("expected a list of names, or an object number -> name")
    if value and all(isinstance(v, int) and not isinstance(v, bool) for v in value.values()):
        value = {number: name for name, number in value.items()}
    numbers = {}
    for key, entry in value.items():
        if not str(key).strip().isdecimal():
            raise ValueError(f"{key!r} is not a class number; expected a list of names, or an object number -> name")
        numbers[int(key)] = _name_in(entry)
    return _numbered(numbers)


def _name_in(entry: Any) -> str:
    # imagenet_class_index.json pairs a WordNet id with the name: the name stands last.
    name = entry[-1] if isinstance(entry, (list, tuple)) and entry else entry
    if name is None or isinstance(name, (dict, list, tuple)):
        raise ValueError(f"{entry!r} is not a name")
    return str(name)


def _from_lines(lines: Sequence[str]) -> Labels:
    lines = [line.strip() for line in lines]
    named = [line for line in lines if line]
    if named and all(WORDNET.match(line) for line in named):
        return Labels.of([WORDNET.sub("", line, count=1) for line in lines])
    matches = [NUMBERED.fullmatch(line) for line in named]
    if matches and [int(m[1]) if m else -1 for m in matches] == list(range(len(matches))):
        return _numbered({int(m[1]): m[2] for m in matches if m})
    return Labels.of(lines)


def _from_csv(text: str) -> Labels:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(map(str.strip, row))]
    if rows and not any(cell.strip().isdecimal() for cell in rows[0]) and len(rows[0]) > 1:
        rows = rows[1:]  # the header
    if all(len(row) == 1 for row in rows):
        return Labels.of([row[0] for row in rows])
    numbers = {}
    for row in rows:
        if len(row) < 2 or not row[0].strip().isdecimal():
            raise ValueError(f"row {delimiter.join(row)!r} does not start with a class number and a name")
        numbers[int(row[0])] = row[1]
    return _numbered(numbers)


def _numbered(numbers: Mapping[int, str]) -> Labels:
    return Labels({i: name.strip() for i, name in sorted(numbers.items()) if name.strip()})


def _plain(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())
