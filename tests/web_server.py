"""The Debian nginx with the configuration we ship, on a mount: for tests of what web servers see.

Owns the process, its configuration and its logs, in a directory of its own beside the mountpoint.

Its fixture is registered in `conftest.py`.
"""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mounted import PROJECT, Mounted, wait_until

SHIPPED = PROJECT / "nginx" / "imgfs.conf"
WORKER = "www-data"
MAIN = """
user www-data;
worker_processes 2;
daemon off;
pid {prefix}/nginx.pid;
error_log {prefix}/error.log warn;
events {{ worker_connections 64; }}
http {{
    access_log off;
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    client_body_temp_path {prefix}/body;
    proxy_temp_path {prefix}/proxy;
    fastcgi_temp_path {prefix}/fastcgi;
    uwsgi_temp_path {prefix}/uwsgi;
    scgi_temp_path {prefix}/scgi;
    include {prefix}/imgfs.conf;
}}
"""


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Nginx:
    """A running nginx with a directory of its own."""

    def __init__(self, prefix: Path, root: Path) -> None:
        self.port = _free_port()
        self.error_log = prefix / "error.log"
        self._prefix = prefix
        self._root = root
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *changes: tuple[str, str], uploads: bool = False) -> None:
        """Serve the mount as the shipped configuration says, after *changes* to its text."""
        text = SHIPPED.read_text()
        if uploads:
            text = re.sub(r"^    #(location /upload/|    |\})", r"    \1", text, flags=re.MULTILINE)
        for old, new in [("listen 80;", f"listen 127.0.0.1:{self.port};"), ("/srv/photos", str(self._root)), *changes]:
            assert old in text
            text = text.replace(old, new)
        (self._prefix / "imgfs.conf").write_text(text)
        (self._prefix / "nginx.conf").write_text(MAIN.format(prefix=self._prefix))
        arguments = ["nginx", "-p", self._prefix, "-c", self._prefix / "nginx.conf", "-e", self.error_log]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self._listens, "nginx listens", process=self._process)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        """Send one request; underscores in the names of *headers* stand for hyphens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def web_server(mounted: Mounted) -> Iterator[Nginx]:
    """An nginx that is not started yet, on a mount."""
    if shutil.which("nginx") is None:
        pytest.fail("nginx is missing") if os.environ.get("IMGFS_SKIP_NOTHING") else pytest.skip("needs nginx")
    prefix = mounted.point.with_suffix(".nginx")
    prefix.mkdir()
    nginx = Nginx(prefix, mounted.point)
    try:
        yield nginx
    finally:
        nginx.stop()
        shutil.rmtree(prefix)
