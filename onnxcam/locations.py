"""Files by path or by URL: s3://, gs://, memory:// and whatever else fsspec knows (`pip install 'onnxcam[ray]'`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

from onnxcam.errors import UsageError


def is_url(path: str | os.PathLike[str]) -> bool:
    """True for what no file system of this machine has a name for."""
    return "://" in os.fspath(path)


def name_of(path: str | os.PathLike[str]) -> str:
    """The last part of a path or URL."""
    text = os.fspath(path)
    return PurePosixPath(urlsplit(text).path).name if is_url(text) else os.path.basename(text)


def distinct(paths: Sequence[str]) -> list[str]:
    """The name of each path, with as many of the folders before it as make it differ from the others."""
    unlike = list(dict.fromkeys(paths))
    parts = {path: path.replace(os.sep, "/").split("/") for path in unlike}
    depth = dict.fromkeys(unlike, 1)
    while True:
        names = {path: "/".join(parts[path][-depth[path] :]) for path in unlike}
        count = Counter(names.values())
        deeper = [path for path in unlike if count[names[path]] > 1 and depth[path] < len(parts[path])]
        if not deeper:
            return [names[path] for path in paths]
        depth |= {path: depth[path] + 1 for path in deeper}


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system that a URL is of, and the path in it.

    Raises:
        UsageError: fsspec is not installed, or knows no such URL.
    """
    try:
        import fsspec
    except ImportError:
        raise UsageError(f"{url}: URLs need fsspec: pip install 'onnxcam[ray]'") from None
    try:
        found, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # a protocol without its package, or none that there is
        raise UsageError(f"{url} cannot be read: {error}") from None
    return found, path


@contextmanager
def reading(url: str) -> Iterator[IO[bytes]]:
    """The file at a URL, open for reading.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    system, path = _filesystem(url)
    try:
        with system.open(path, "rb") as stream:
            yield stream
    except FileNotFoundError:
        raise UsageError(f"no such file: {url}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{url} cannot be read: {error}") from None


def files_in(url: str) -> list[str] | None:
    """URLs of the files in the folder at `url`, sorted; None where it is no folder.

    Raises:
        UsageError: it cannot be read.
    """
    system, path = _filesystem(url)
    try:
        if not system.isdir(path):
            return None
        return sorted(system.unstrip_protocol(entry) for entry in system.ls(path, detail=False))
    except OSError as error:
        raise UsageError(f"{url} cannot be read: {error}") from None


def written_to(url: str, path: Path) -> None:
    """Copy a file of this machine to a URL.

    Raises:
        UsageError: it cannot be written there.
    """
    system, target = _filesystem(url)
    try:
        system.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
        system.put_file(str(path), target)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {url}: {error}") from None
