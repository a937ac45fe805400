"""Fetching models: a server of this machine that can go on, break off, lie and refuse. Nothing leaves this machine."""

from __future__ import annotations

import hashlib
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from onnxcam.catalogue import Entry, catalogue, fetch
from onnxcam.cli import main
from onnxcam.errors import UsageError
from onnxcam.preprocess import PRESETS

CONTENT = bytes(range(256)) * 4000
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(HTTPServer):
    """Serves CONTENT: /whole ignores ranges, /ranges honours them, /breaks ends early, /lies sends something else."""

    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        kind, wanted = self.path.strip("/"), self.headers.get("Range")
        self.server.asked.append(wanted)
        if kind == "gone":
            self.send_error(404, "Not Found")
            return
        begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and kind in ("ranges", "breaks") else 0
        body = (b"x" * len(CONTENT) if kind == "lies" else CONTENT)[begin:]
        self.send_response(206 if begin else 200)
        if kind != "breaks":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: 300_000 if kind == "breaks" else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def entry(server: Server, kind: str) -> Entry:
    url = f"http://127.0.0.1:{server.server_port}/{kind}"
    return Entry("net", url, SHA, len(CONTENT), "imagenet", "Apache-2.0", "a net")


def test_a_file_is_fetched_checked_and_not_fetched_again(server: Server, tmp_path: Path) -> None:
    seen: list[int] = []
    path = fetch(entry(server, "whole"), tmp_path, progress=lambda done, total: seen.append(done))
    assert path.read_bytes() == CONTENT and path.name == "net.onnx" and seen[-1] == len(CONTENT)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    fetch(entry(server, "whole"), tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize("kind", ["ranges", "whole"])
def test_a_broken_download_is_gone_on_with(server: Server, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="the connection ended after 300000 of 1024000 bytes"):
        fetch(entry(server, "breaks"), tmp_path)
    assert not (tmp_path / "net.onnx").exists()
    assert fetch(entry(server, kind), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_what_is_not_what_the_checksum_says_is_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not net: its SHA-256 is"):
        fetch(entry(server, "lies"), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "net.onnx").write_bytes(b"mine")
    with pytest.raises(UsageError, match="is there and is not net"):
        fetch(entry(server, "whole"), tmp_path)
    assert (tmp_path / "net.onnx").read_bytes() == b"mine"


def test_no_network_and_no_such_file_are_said_in_one_line(server: Server, tmp_path: Path, capsys) -> None:
    with pytest.raises(UsageError, match="cannot be fetched: 404 Not Found"):
        fetch(entry(server, "gone"), tmp_path)
    listing = tmp_path / "c.toml"
    listing.write_text(
        f'[net]\nurl = "http://127.0.0.1:1/net"\nsha256 = "{SHA}"\nsize = 5\npreprocess = "imagenet"\nlicence = "MIT"\n'
    )
    assert main(["fetch", "net", "--catalogue", str(listing), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "net cannot be fetched: no way to http://127.0.0.1:1/net" in error and len(error.splitlines()) == 1


def test_the_command_says_how_to_go_on(server: Server, tmp_path: Path, capsys) -> None:
    known = entry(server, "whole")
    listing = tmp_path / "c.toml"
    rows = [f'{k} = "{getattr(known, k)}"' for k in ("url", "sha256", "preprocess", "licence", "about")]
    listing.write_text("\n".join(["[net]", *rows, f"size = {known.size}"]))
    assert main(["fetch", "net", "--catalogue", str(listing), "-o", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"onnxcam explain {tmp_path / 'net.onnx'} IMAGE --preprocess imagenet" in said
    assert main(["fetch", "nett", "--catalogue", str(listing)]) == 2
    assert "net" in capsys.readouterr().err


def test_the_catalogue_that_ships_is_whole(capsys) -> None:
    for name, known in catalogue().items():
        assert len(known.sha256) == 64 and int(known.sha256, 16) and known.size > 1e5, name
        assert known.preprocess in PRESETS and known.licence and known.about
        parts = urlsplit(known.url)
        assert parts.scheme == "https" and parts.path.endswith(".onnx")
        urllib.request.Request(known.url)
    assert main(["fetch"]) == 0
    assert "resnet18-v2" in capsys.readouterr().out


def written(name: str = "net", **other: object) -> bytes:
    row = {"url": "https://a.b/c.onnx", "sha256": SHA, "size": 9, "preprocess": "raw", "licence": "MIT"} | other
    return (f'["{name}"]\n' + "".join(f"{key} = {value!r}\n" for key, value in row.items())).encode()


def test_a_checksum_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(written(sha256=SHA.upper()))
    assert catalogue(tmp_path / "c.toml")["net"].sha256 == SHA


@pytest.mark.parametrize(
    "text",
    [
        b"x = 1", b"[net]\nurl = 'a'", b"not toml", b"\xff", written(url="m/a.onnx"), written(url="https://a b/c"),
        written(url="file:///etc/passwd"), written(size="big"), written(size=0), written(sha256="12"), written("../e"),
        written(licence=3),
    ],
)  # fmt: skip
def test_what_is_no_catalogue_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "c.toml").write_bytes(text)
    with pytest.raises(UsageError, match="is no catalogue"):
        catalogue(tmp_path / "c.toml")
    with pytest.raises(UsageError, match="no such file"):
        catalogue(tmp_path / "d.toml")
