"""Servers that answer like a peer, in this process or in one of their own.

Run as a program it is a contestant: ``--port``, ``--answer``, ``--die-after``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CONTEXT = "The key to room 7 hangs behind the bar."


@dataclass
class AnswerServer:
    """What a server saw."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def serve_answers(
    port: int = 0,
    *,
    answer: str | None = None,
    broken: Mapping[str, int] | None = None,
    die_after: int | None = None,
) -> Iterator[AnswerServer]:
    """A server on loopback; ``broken`` questions get that status and no answer."""
    seen = AnswerServer()
    failing = dict(broken or {})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(200, {})

        def do_POST(self) -> None:
            with seen.lock:
                seen.at_once += 1
                seen.most_at_once = max(seen.most_at_once, seen.at_once)
            length = int(self.headers["content-length"])
            body = json.loads(self.rfile.read(length))
            question = body["question"]
            with seen.lock:
                seen.bodies.append(body)
                if die_after is not None and len(seen.bodies) > die_after:
                    os._exit(3)
            if question in failing:
                status, reply = failing[question], {"detail": "broken"}
            else:
                number = re.sub(r"\D", "", question)
                text = f"answer {number}" if answer is None else answer
                status, reply = 200, {"answer": text}
            with seen.lock:
                seen.at_once -= 1
            self._reply(status, reply)

        def _reply(self, status: int, reply: dict[str, Any]) -> None:
            body = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", port), Handler) as server:
        seen.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()


def write_items(directory: Path, count: int) -> Path:
    """What a loading program reads."""
    path = directory / "items.json"
    items = [
        {"id": f"q{i}", "question": f"Question {i}?", "context": CONTEXT}
        for i in range(count)
    ]
    path.write_text(json.dumps(items))
    return path


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answer")
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--broken", action="store_true", help="do not start")
    given = parser.parse_args()
    if given.broken:
        raise SystemExit("no engine here")
    with serve_answers(given.port, answer=given.answer, die_after=given.die_after):
        threading.Event().wait()


if __name__ == "__main__":
    main()
