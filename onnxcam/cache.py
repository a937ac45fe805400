"""Caches: recent sessions in memory, and recorded explanations on disk.

Both are keyed by value: `frozen` makes of a composite, a method or a layer something that compares by what it holds,
and `digest` a text of it for file names. On disk a recorded explanation is one ONNX model, `<key>.onnx`, whose metadata
says what its outputs are. It appears whole or not at all, so processes may share a folder; the entries longest unused
go when the folder outgrows its bound. What is missing or broken is recorded anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.files import writable_folder, write_atomically

T = TypeVar("T")
FOLDER = "ONNXCAM_CACHE"
SIZE = "ONNXCAM_CACHE_SIZE"
DEFAULT_SIZE = 2 * 1000**3
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


class Recent:
    """The last few things made, by key; the one longest unused goes first."""

    def __init__(self, limit: int):
        self.limit = limit
        self._held: OrderedDict[Any, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Any) -> bool:
        return key in self._held

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """What is held under `key`, made where nothing is."""
        try:
            found: T = self._held.pop(key)  # taken out and put back, so that threads do not trip over each other
        except KeyError:
            found = make()
        self._held[key] = found
        while len(self._held) > self.limit:
            self._held.popitem(last=False)
        return found


def frozen(value: Any) -> Any:
    """`value` as something hashable that is equal where it holds the same.

    Dataclasses, mappings, sequences and arrays are taken apart. What is left, functions above all, stands for itself,
    and is kept alive by the key that it is part of.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), *((f.name, frozen(getattr(value, f.name))) for f in fields(value)))
    if isinstance(value, Mapping):
        return ("mapping", *((frozen(k), frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(frozen, value))
    if isinstance(value, set | frozenset):
        return ("set", *sorted(map(frozen, value)))
    if isinstance(value, np.ndarray | np.generic):
        return ("array", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, bool | int | float):
        return (type(value).__name__, repr(value))  # 1, 1.0 and True are equal, 0.0 and -0.0 too
    if type(value).__hash__ is None:
        return _ByIdentity(value)
    return value


def digest(*values: Any) -> str | None:
    """SHA-256 over what `frozen` makes of `values`, the same in every process.

    None where a function or class of others takes part: its name does not tell what it does.
    """
    try:
        text = repr(_named(frozen(values)))
    except _Foreign:
        return None
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_stamp() -> str:
    """What tells this onnxcam from another: its version and, for those who work on it, when its files were changed."""
    import onnx

    import onnxcam

    root = Path(onnxcam.__file__).parent
    files = sorted((str(p.relative_to(root)), p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*.py"))
    return repr((onnxcam.__version__, onnx.__version__, files))


class DiskCache:
    """A folder of recorded explanations.

    Args:
        folder: is made where it is not there.
        limit: bytes that its entries may take together; the one just written stays in any case.

    Raises:
        UsageError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, limit: int = DEFAULT_SIZE):
        self.folder, self.limit = writable_folder(folder), limit

    def find(self, key: str) -> Path | None:
        """The file kept under `key`, which counts as used now; None where there is none."""
        path = self._file(key)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError:  # not ours to touch, but perhaps to read
            pass
        return path

    def store(self, key: str, model: bytes) -> None:
        """Keep a model.

        Raises:
            UsageError: the folder cannot be written to.
        """
        kept = write_atomically(self._file(key), lambda stream: stream.write(model))
        entries = []
        for path in self.folder.iterdir():
            if re.fullmatch(r"[0-9a-f]{64}\.onnx", path.name):
                with suppress(FileNotFoundError):  # other processes may be at it too
                    status = path.stat()
                    entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        # The newest stays, whoever wrote it: two that store at once would else remove each other's.
        staying = {kept, *(path for *_, path in sorted(entries)[-1:])}
        for _, size, path in sorted(entries):
            if total <= self.limit:
                break
            if path not in staying:
                with suppress(OSError):  # gone meanwhile; or open, where a system does not let go of open files
                    path.unlink()
                total -= size

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.onnx"


def disk_cache(folder: str | Path | None) -> DiskCache | None:
    """The cache in `folder`, else in the folder that the environment variable ONNXCAM_CACHE names; None for neither.

    Raises:
        UsageError: the folder cannot be used, or ONNXCAM_CACHE_SIZE is no size.
    """
    place = folder or os.environ.get(FOLDER)
    return DiskCache(place, _bytes(os.environ.get(SIZE))) if place else None


def _bytes(text: str | None) -> int:
    """A size such as 500M or 2GB; the default for None."""
    if not text:
        return DEFAULT_SIZE
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not match:
        raise UsageError(f"{SIZE} is {text!r}, which is no size such as 500M or 2G")
    return int(float(match[1]) * UNITS[match[2]])


class _ByIdentity:
    """Stands for a value that cannot be hashed: equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Foreign(Exception):
    """A key holds something that has no name of its own across processes."""


def _named(value: Any) -> Any:
    """`value`, as `frozen` makes it, of plain values alone: classes and functions of onnxcam by where they stand."""
    if isinstance(value, tuple):
        return tuple(map(_named, value))
    if value is None or isinstance(value, str | bytes | int):
        return value
    module = str(getattr(value, "__module__", ""))
    if not callable(value) or not module.startswith("onnxcam.") or getattr(value, "__closure__", None):
        raise _Foreign
    code = getattr(value, "__code__", None)
    where = f":{code.co_firstlineno}:{code.co_code.hex()}" if code else ""  # tells lambdas apart
    return f"{module}.{value.__qualname__}{where}"
