"""Nothing half-written: files appear whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from onnxcam.errors import UsageError
from onnxcam.files import check_writable, safe_name, writable_folder, write_atomically


def everything_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"one", b"two"):
        assert write_atomically(path, lambda s, c=content: s.write(c)) == path
        assert path.read_bytes() == content
    assert everything_in(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def half(stream):
        stream.write(b"ne")
        raise error

    with pytest.raises(error):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert everything_in(tmp_path) == ["a.bin"]


def test_files_have_the_permissions_that_the_user_asks_for(tmp_path):
    """Not the private ones of temporary files: others have to read results too."""
    mask = os.umask(0o022)
    try:
        path = write_atomically(tmp_path / "a.bin", lambda s: s.write(b""))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_full_or_missing_place_is_said_in_words(tmp_path):
    with pytest.raises(UsageError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "a.bin", lambda s: s.write(b""))

    def full(stream):
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=r"cannot write .*a\.bin: No space left on device"):
        write_atomically(tmp_path / "a.bin", full)
    assert everything_in(tmp_path) == []


def test_a_folder_is_made_with_its_parents(tmp_path):
    assert writable_folder(tmp_path / "a" / "b").is_dir()
    assert everything_in(tmp_path) == ["a", str(Path("a", "b"))]


@pytest.mark.parametrize("check", [writable_folder, check_writable])
@pytest.mark.parametrize("below", ["file", "file/folder"])
def test_a_place_on_or_below_a_file_is_no_folder(tmp_path, check, below):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot write to folder"):
        check(tmp_path / below)
    assert everything_in(tmp_path) == ["file"]


def test_checking_a_place_leaves_nothing_there(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/layer4/layer4.1/conv2/Conv", "layer4-layer4.1-conv2-Conv"),
        ("model/conv:0", "model-conv-0"),
        ("../../etc/passwd", "etc-passwd"),
        ("..", "unnamed"),
        ("", "unnamed"),
        (".hidden", "hidden"),
        ("a b\tc\nd", "a-b-c-d"),
        ("Größe", "Größe"),
        ("x" * 300, "x" * 120),
    ],
)
def test_any_name_becomes_one_part_of_a_path(text, name):
    assert safe_name(text) == name
