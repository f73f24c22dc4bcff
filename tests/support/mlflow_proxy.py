"""An HTTP proxy in front of a real MLflow server that answers selected requests itself."""

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """A request to the proxy; ``forward`` sends it to the server and returns the answer."""

    method: str
    path: str
    body: bytes
    forward: Callable[[], tuple[int, bytes, str]]

    def is_call(self, name: str) -> bool:
        """Return whether it calls MLflow's endpoint ``name``, such as ``runs/create``."""
        return self.path.partition("?")[0].endswith(f"/mlflow/{name}")


Answer = tuple[int, bytes, str] | None
JSON = "application/json"
LOST = (0, b"", "")  # the connection ends without an answer


class MlflowProxy:
    """``hook`` returns the answer to a request, or None to forward it; requests are recorded."""

    def __init__(self, upstream: str) -> None:
        self.hook: Callable[[Request], Answer] = lambda request: None
        self.requests: list[Request] = []
        self._upstream = upstream.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":  # an empty file
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                request = Request(self.command, self.path, body, lambda: proxy._forward(self, body))
                proxy.requests.append(request)
                status, content, kind = proxy.hook(request) or request.forward()
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        dropped = ("host", "content-length", "transfer-encoding", "accept-encoding")
        headers = {k: v for k, v in handler.headers.items() if k.lower() not in dropped}
        connection.request(handler.command, handler.path, body or None, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, answer.getheader("Content-Type") or JSON

    def calls(self, name: str) -> int:
        return sum(request.is_call(name) for request in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
