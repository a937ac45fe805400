"""Writing files so that nothing half-written stays: under another name first, then in place at once."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from onnxcam.errors import UsageError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write a file through `write(stream)`; it appears whole or not at all.

    Raises:
        UsageError: the place cannot be written to.
    """
    # Named before it is made, so that an interrupt at any moment finds it.
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        try:
            with temporary.open("xb") as stream:
                write(stream)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def writable_folder(path: str | Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        UsageError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to folder {folder}: {error.strerror or error}") from error
    return folder


def check_writable(path: str | Path) -> None:
    """See that a folder could be made and written to at `path`, and leave nothing there.

    Raises:
        UsageError: it could not.
    """
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to folder {path}: {error.strerror or error}") from error


def safe_name(text: str) -> str:
    """`text` as one part of a file name: letters, digits, `.`, `_` and `-`; never hidden, never empty."""
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-.")
    return kept[:120] or "unnamed"
