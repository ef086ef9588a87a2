"""A package index on loopback for machines that reach PyPI and not PyTorch's index of builds for the CPU.

Where pip on this machine is told of a folder with such a build (``find-links``), it is served as the index's only
torch; what else pip asks for, it is sent to PyPI for. torchvision from there is a build for CUDA: beside a torch
for the CPU its version is right, but it cannot be imported, so images with this stand-in train on digits and
folders with the small encoder, and not on torchvision's.
"""

from __future__ import annotations

import contextlib
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

PORT = 47_113
"""The same each time, since the URL is part of what layers are cached by."""
PYPI = "https://pypi.org/simple"


def wheel_for_cpu() -> Path | None:
    """A build of torch for the CPU and the images' Python, in a folder that pip looks into here."""
    told = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    folders = [
        Path(word)
        for line in told.stdout.splitlines()
        if "find-links" in line
        for word in re.findall(r"/[^\s']+", line)
    ]
    found = [
        wheel for folder in folders if folder.is_dir() for wheel in folder.glob("torch-*+cpu-cp311-*.whl")
    ]
    return max(found, default=None)


@contextlib.contextmanager
def serving(wheel: Path) -> Iterator[str]:
    """The URL of an index whose torch is `wheel`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path)
            name = path.strip("/").split("/")[-1]
            if path == f"/files/{wheel.name}":
                self._send("application/octet-stream", wheel.stat().st_size)
                with wheel.open("rb") as content:
                    while block := content.read(1 << 20):
                        self.wfile.write(block)
            elif path == "/simple/torch/":
                page = f'<!DOCTYPE html><a href="/files/{wheel.name}">{wheel.name}</a>'.encode()
                self._send("text/html", len(page))
                self.wfile.write(page)
            else:
                self.send_response(302)
                self.send_header("Location", f"{PYPI}/{name}/")
                self.end_headers()

        def _send(self, kind: str, length: int) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    except OSError:  # taken
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
