"""Serves the page with a compiled explanation, and prints what it reports.

    python serve.py WORK                  open http://localhost:8123 in any browser
    python serve.py WORK chromium         the same in a headless Chromium, which is started and ended

onnxruntime-web comes from ../node/node_modules: `npm install` there first.
"""

import subprocess
import sys
import tempfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


class Handler(SimpleHTTPRequestHandler):
    """Files by the first part of their path; a report that is posted ends the server."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def __init__(self, work: Path, *args):
        self.places = {"files": work, "ort": HERE.parent / "node" / "node_modules" / "onnxruntime-web" / "dist"}
        super().__init__(*args)

    def translate_path(self, path: str) -> str:
        first, _, rest = path.lstrip("/").partition("/")
        if first in self.places and ".." not in rest:
            return str(self.places[first] / rest)
        return str({"": HERE / "index.html", "agreement.mjs": HERE.parent / "agreement.mjs"}.get(first, "nowhere"))

    def do_POST(self) -> None:
        print(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()
        self.server.done = True

    def log_message(self, *_) -> None:
        pass


work, browser = Path(sys.argv[1]), sys.argv[2:3]
server = ThreadingHTTPServer(("localhost", 0 if browser else 8123), partial(Handler, work))
server.done, server.timeout = False, 1
address = f"http://localhost:{server.server_port}/"
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    started = None
    if browser:
        command = [*browser, *FLAGS, f"--user-data-dir={profile}/chromium", address]
        started = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    else:
        print(f"open {address}")
    while not server.done and (started is None or started.poll() is None):
        server.handle_request()
    if started:
        started.terminate()
        started.wait()
sys.exit(0 if server.done else "the browser ended without a report")
