"""The catalogue of trained models, and how they are fetched: checked, whole or not at all, and gone on with."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from onnxcam.errors import UsageError
from onnxcam.files import safe_name, writable_folder
from onnxcam.named import named

CHUNK = 1 << 18
TIMEOUT = 30.0  # seconds without a byte


@dataclass(frozen=True)
class Entry:
    """A model that can be fetched: where from, its checksum and size in bytes, its preprocessing and licence."""

    name: str
    url: str
    sha256: str
    size: int
    preprocess: str
    licence: str
    about: str = ""


def catalogue(path: str | Path | None = None) -> dict[str, Entry]:
    """The entries by name, of the catalogue that ships or of another.

    Raises:
        UsageError: there is no such file, or it is no catalogue.
    """
    place = Path(path) if path is not None else _shipped()
    try:
        with place.open("rb") as stream:
            data = tomllib.load(stream)
        return {name: _entry(name, row) for name, row in data.items()}
    except FileNotFoundError:
        raise UsageError(f"{place}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, AttributeError, ValueError) as error:
        wanted = ", ".join(f.name for f in fields(Entry)[1:])
        raise UsageError(f"{place} is no catalogue, a table of {wanted} for each name: {error}") from None


def _entry(name: str, row: dict[str, Any]) -> Entry:
    """Checked; raises TypeError or ValueError where it is none."""
    entry = Entry(name, **row)
    for field in fields(Entry):
        value = getattr(entry, field.name)
        if type(value) is not (int if field.name == "size" else str):
            raise TypeError(f"{field.name} of {name} is {value!r}")
    if name != safe_name(name):
        raise ValueError(f"{name!r} is no name for a file")
    if not re.fullmatch(r"https?://[^\s/]+/\S+", entry.url):
        raise ValueError(f"url of {name} is {entry.url!r}")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", entry.sha256) or entry.size < 1:
        raise ValueError(f"sha256 or size of {name} is none")
    return replace(entry, sha256=entry.sha256.lower())


def _shipped() -> Path:
    beside = Path(__file__).with_name("catalogue.toml")  # as it is installed
    return beside if beside.exists() else Path(__file__).parents[1] / "models" / "catalogue.toml"


def fetch(
    entry: str | Entry,
    folder: str | Path = "models",
    *,
    known: dict[str, Entry] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The file of an entry, downloaded unless it is there.

    Args:
        entry: or its name.
        folder: where to.
        known: the catalogue; by default the one that ships.
        progress: called with (bytes, of how many).

    Raises:
        UsageError: there is no such entry or no network, or what came is not what the checksum says.
    """
    wanted = entry if isinstance(entry, Entry) else named("model", entry, known or catalogue())
    path = writable_folder(folder) / f"{wanted.name}.onnx"
    if path.exists():
        if _checksum(path) == wanted.sha256:
            return path
        raise UsageError(f"{path} is there and is not {wanted.name}: its SHA-256 is another; move it away")
    part = path.with_name(f".{path.name}.part")
    try:
        _download(wanted, part, progress)
    except urllib.error.HTTPError as error:
        raise UsageError(f"{wanted.url} cannot be fetched: {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise UsageError(
            f"{wanted.name} cannot be fetched: no way to {wanted.url} ({reason}); what has come is kept, and the same "
            "command goes on"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write {part}: {error.strerror or error}") from error
    found = _checksum(part)
    if found != wanted.sha256:
        part.unlink()
        raise UsageError(
            f"what {wanted.url} sent is not {wanted.name}: its SHA-256 is {found}, not {wanted.sha256}; nothing is kept"
        )
    os.replace(part, path)
    return path


def _download(entry: Entry, part: Path, progress: Callable[[int, int], None] | None) -> None:
    """Get what is missing of `part`; begins anew where the server sends the whole."""
    have = part.stat().st_size if part.exists() else 0
    if have == entry.size:
        return
    request = urllib.request.Request(entry.url, headers={"User-Agent": "onnxcam"})
    if 0 < have < entry.size:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        goes_on = _status(answer) == 206
        have = have if goes_on else 0
        with part.open("ab" if goes_on else "wb") as stream:
            while chunk := answer.read(CHUNK):
                stream.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, entry.size)
    if have < entry.size:
        raise urllib.error.URLError(f"the connection ended after {have} of {entry.size} bytes")


def _status(answer: Any) -> int:
    return int(getattr(answer, "status", None) or 200)


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
