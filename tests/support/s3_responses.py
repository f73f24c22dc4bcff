"""HTTP servers with responses set by a test: web pages, redirects, S3 errors, an in-memory S3."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Answer = Callable[[BaseHTTPRequestHandler, bytes], tuple[int, bytes, dict[str, str]]]

FULL = {"ETag": '"x"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
PAGE = b"<!DOCTYPE html><html><body>Sign in</body></html>"


@contextmanager
def serving(
    answer: Answer, certificate: tuple[Path, Path] | None = None, host: str = "127.0.0.1"
) -> Iterator[str]:
    """Yield the address of a server that responds with ``answer(request, body)``.

    The answer is a status, a body and headers.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, content, headers = answer(self, body)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def __getattr__(self, name: str) -> object:
            if name.startswith("do_"):
                return self._answer
            raise AttributeError(name)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients that reject the certificate disconnect

    server = Server((host, 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"{'https' if certificate else 'http'}://{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def constant(status: int, content: bytes = b"", **headers: str) -> Answer:
    """Return the same answer to every request; ``_`` in a header's name becomes a dash."""
    return lambda request, body: (
        status,
        content,
        {name.replace("_", "-"): value for name, value in headers.items()},
    )


def s3_error(code: str, more: str = "") -> bytes:
    content = f"<Code>{code}</Code><Message>test</Message>{more}"
    return f"<?xml version='1.0'?><Error>{content}</Error>".encode()


class MemoryS3:
    """An in-memory S3: objects by bucket/key, and all requests as (method, key, headers).

    Signatures are not checked.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []

    def __call__(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        parts = urlsplit(request.path)
        key, query = unquote(parts.path).lstrip("/"), parse_qs(parts.query)
        self.requests.append((request.command, key, dict(request.headers)))
        if request.command == "PUT":
            self.objects[key] = body
            return 200, b"", FULL
        if "list-type" in query:
            prefix = key.rstrip("/") + "/"
            names = [
                name.removeprefix(prefix)
                for name in self.objects
                if name.startswith(prefix + query.get("prefix", [""])[0])
            ]
            entries = "".join(
                "<Contents><LastModified>2024-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
                f"<Size>1</Size><Key>{name}</Key></Contents>"
                for name in sorted(names)
            )
            listing = (
                f"<Name>b</Name><KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>"
                f"{entries}"
            )
            return 200, f"<ListBucketResult>{listing}</ListBucketResult>".encode(), {}
        if key not in self.objects:
            return 404, s3_error("NoSuchKey"), {}
        return 200, self.objects[key], FULL
