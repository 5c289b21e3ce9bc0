"""An HTTP server that speaks the gateway's JSON, and says what it is told to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {
    "checkpoint": "acme/reader",
    "build_id": "b1",
    "default_precision": "int8",
    "precisions": ["int8", "fp16", "fp32"],
    "max_window_tokens": 384,
    "verdict": "",
    "recommended": "int8",
    "models": [],
}


@dataclass
class Reply:
    """One HTTP answer; a ``str`` body goes out as it is."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def answer_reply(
    text: str | None, *, precision: str = "int8", ms: float = 2.0
) -> Reply:
    """A 200 of ``POST /v1/answer``."""
    answer = None
    if text is not None:
        answer = {"text": text, "start": 3, "end": 3 + len(text), "score": 0.75}
    return Reply(
        {
            "answer": answer,
            "alternatives": [],
            "precision": precision,
            "windows": 1,
            "timing_ms": {
                "tokenize": 0.1,
                "queue": 0.2,
                "inference": ms,
                "decode": 0.1,
                "total": 2 * ms,
            },
        }
    )


def problem_reply(status: int, detail: str, **headers: str) -> Reply:
    """Problem details, as RFC 9457 has them."""
    body = {"type": "urn:x", "title": "No", "status": status, "detail": detail}
    return Reply(
        body, status, {name.replace("_", "-"): v for name, v in headers.items()}
    )


@dataclass
class StubGateway:
    """A running stub: its address and what it was asked."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextlib.contextmanager
def run_gateway(answer: Callable[[dict[str, Any]], Reply]) -> Iterator[StubGateway]:
    """Serve ``answer`` at ``POST /v1/answer`` until the block is left."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(Reply(MODELS) if self.path == "/v1/models" else Reply("", 404))

        def do_POST(self) -> None:
            size = int(self.headers["content-length"])
            body = json.loads(self.rfile.read(size))
            with lock:
                gateway.requests.append(body)
                reply = answer(body)
            self._send(reply if self.path == "/v1/answer" else Reply("", 404))

        def _send(self, reply: Reply) -> None:
            text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            data = text.encode()
            self.send_response(reply.status)
            self.send_header("content-length", str(len(data)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        # Of five, its default, the sixth client that connects at once waits seconds.
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    gateway = StubGateway(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield gateway
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
