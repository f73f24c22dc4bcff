"""A real S3 server, and proxies that inject faults between it and its clients.

``HttpProxy`` injects faults at the HTTP level, toxiproxy below it.
"""

import http.client
import json
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import psutil

from pipelines.local import servers
from support.go_tools import go_program

TOXIPROXY = "github.com/Shopify/toxiproxy/v2/cmd/server"
TOXIPROXY_VERSION = "v2.12.0"
_SENT_AT_ONCE = 16 * 1024


class S3Server:
    """SeaweedFS on one port and one data folder.

    It can be killed, restarted and given new credentials.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "s3").mkdir(parents=True)
        self.port, *self._others = servers._free_ports(1 + 7)
        self._process: servers.Process | None = None
        self.start()

    @property
    def credentials(self) -> tuple[str, str]:
        return servers._credentials(self.folder)

    def start(self) -> None:
        """Start the server and wait until it answers a signed request."""
        self._process = servers._start_s3(self.folder, self.port, self._others)
        services = servers.Services(
            self.folder,
            f"http://127.0.0.1:{self.port}",
            "",
            *self.credentials,
            {"s3": self._process},
        )
        servers._wait(services, "s3", lambda: servers._make_bucket(services))

    def kill(self) -> None:
        """Send SIGKILL and wait until the process has ended."""
        assert self._process is not None
        if process := self._process.handle():
            process.send_signal(signal.SIGKILL)
            psutil.wait_procs([process], 10)

    def rotate(self) -> None:
        """Replace the credentials; the old ones are rejected from now on.

        The server is restarted to read them.
        """
        self.kill()
        (self.folder / "s3.json").unlink()
        self.start()


@dataclass(frozen=True)
class Fault:
    """A fault in one response. ``after``: bytes of its body that are sent before the fault."""

    kind: Literal["status", "truncated", "reset", "stalled", "shifted", "ignores_range"]
    after: int = 0
    status: int = 503
    code: str = "SlowDown"


class HttpProxy:
    """Forwards signed requests unchanged and injects the faults that ``plan`` returns.

    ``plan`` is called once per GET or HEAD; None means no fault. The bytes of the bodies of GET
    responses are counted.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.plan: Callable[[], Fault | None] = lambda: None
        self.bytes = 0
        self.gets = 0
        self.faults = 0
        self._lock = threading.Lock()
        self.released = threading.Event()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    def reset(self, plan: Callable[[], Fault | None] = lambda: None) -> None:
        """Reset the counters and set the plan."""
        with self._lock:
            self.plan, self.bytes, self.gets, self.faults = plan, 0, 0, 0

    def next_fault(self) -> Fault | None:
        with self._lock:
            fault = self.plan()
            self.gets += 1
            self.faults += fault is not None
            return fault

    def count(self, length: int) -> None:
        with self._lock:
            self.bytes += length

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: HttpProxy

    def setup(self) -> None:
        # bytes that count as sent must not be in a kernel buffer, which grows with the machine's
        # load
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENT_AT_ONCE)

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.next_fault() if self.command in ("GET", "HEAD") else None
        if fault is not None and fault.kind == "status":
            self._refuse(fault)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=30)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            with suppress(ConnectionError):
                self._forward(response, fault)
        except (OSError, http.client.HTTPException):
            self._disconnect()  # the server has ended, so the client's connection ends too
        finally:
            connection.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _refuse(self, fault: Fault) -> None:
        message = "<Message>planned by the test</Message>"
        text = f"<Error><Code>{fault.code}</Code>{message}</Error>".encode()
        self.send_response(fault.status)
        if fault.status in (429, 503):
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _forward(self, response: http.client.HTTPResponse, fault: Fault | None) -> None:
        status = response.status
        headers = [
            (n, v)
            for n, v in response.getheaders()
            if n.lower() not in ("connection", "keep-alive", "date", "server")
        ]
        if fault is not None and fault.kind == "shifted":
            headers = [(n, _shifted(v) if n.lower() == "content-range" else v) for n, v in headers]
        if fault is not None and fault.kind == "ignores_range":
            status, headers = 200, [(n, v) for n, v in headers if n.lower() != "content-range"]
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if (
            response.length is None and self.command != "HEAD"
        ):  # chunked: the body ends with the connection
            self.send_header("Connection", "close")
        self.end_headers()
        truncates = fault is not None and fault.kind in ("truncated", "reset", "stalled")
        left = fault.after if fault is not None and truncates else None
        while part := response.read(_SENT_AT_ONCE if left is None else min(_SENT_AT_ONCE, left)):
            self.owner.count(len(part) if self.command == "GET" else 0)
            self.wfile.write(part)
            left = None if left is None else left - len(part)
        if fault is not None and truncates:
            if fault.kind == "stalled":
                self.owner.released.wait(20)
            self._disconnect(reset=fault.kind == "reset")

    def _disconnect(self, reset: bool = False) -> None:
        self.close_connection = True
        with suppress(OSError):
            if reset:
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)


def _shifted(content_range: str) -> str:
    """``bytes 10-19/99`` as ``bytes 11-20/99``."""
    span, total = content_range.removeprefix("bytes ").split("/")
    first, last = map(int, span.split("-"))
    return f"bytes {first + 1}-{last + 1}/{total}"


class Toxiproxy:
    """A proxy below HTTP, with Shopify's toxics between ``port`` and ``upstream``."""

    def __init__(self, program: Path, upstream: int) -> None:
        self._api, self.port = servers._free_ports(2)
        self._process = subprocess.Popen(
            [program, "-host", "127.0.0.1", "-port", str(self._api)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait()
        self._ask(
            "POST",
            "/proxies",
            {"name": "s3", "listen": f"127.0.0.1:{self.port}", "upstream": f"127.0.0.1:{upstream}"},
        )

    @contextmanager
    def toxic(self, kind: str, **attributes: int) -> Iterator[None]:
        """Apply one toxic to data from the server while the context is active."""
        toxic = {"name": "it", "type": kind, "stream": "downstream", "attributes": attributes}
        self._ask("POST", "/proxies/s3/toxics", toxic)
        try:
            yield
        finally:
            self.cure()

    def cure(self) -> None:
        """Remove all toxics and enable the proxy."""
        self._ask("POST", "/reset")

    def switch(self, on: bool) -> None:
        """Enable or disable the proxy.

        While it is disabled, new connections are refused and open ones are closed.
        """
        self._ask("POST", "/proxies/s3", {"enabled": on})

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def _wait(self) -> None:
        give_up = time.monotonic() + 30
        while True:
            try:
                self._ask("GET", "/version")
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, "toxiproxy exited at startup"
                assert time.monotonic() < give_up, "toxiproxy did not start"
                time.sleep(0.05)
            else:
                return

    def _ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> None:
        body = json.dumps(content).encode() if content is not None else None
        request = urllib.request.Request(f"http://127.0.0.1:{self._api}{path}", body, method=method)
        urllib.request.urlopen(request, timeout=10).close()


def toxiproxy_program() -> Path | str:
    """Return the program, or the reason why it cannot be built."""
    return go_program(TOXIPROXY, TOXIPROXY_VERSION, "toxiproxy")
