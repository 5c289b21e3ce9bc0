"""The page for people: ``GET /`` and the few files that it loads.

In: the packaged files of ``static``, a closed set read once. Out: a router that
serves them under strict headers, so that a browser runs nothing but these files and
speaks to nobody but this gateway. Knows no models and no questions: the page asks
the public routes.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

PAGE_NAME = "index.html"

_MEDIA_TYPES: Mapping[str, str] = {
    PAGE_NAME: "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "ask.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "key.js": "text/javascript; charset=utf-8",
    "gateway.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "models.js": "text/javascript; charset=utf-8",
    "offsets.js": "text/javascript; charset=utf-8",
    "problem.js": "text/javascript; charset=utf-8",
    "traffic.js": "text/javascript; charset=utf-8",
    "examples.json": "application/json",
    "voyage.txt": "text/plain; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; "
    # Texts and answers are untrusted: not even our own script may parse markup.
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content-Security-Policy. Source: W3C Content Security Policy Level 3, and Trusted
Types for the last two."""

_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Ask each time, and send what has not changed only once.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A packaged file as it is sent; the tag is its SHA-256."""

    content: bytes
    media_type: str
    etag: str


def load_files(*, operator_links: bool = True) -> dict[str, PageFile]:
    """Read every file of the page, by name.

    Args:
        operator_links: whether it may lead to what operators may have to themselves.

    Raises:
        FileNotFoundError: the installation lacks one.
    """
    static = importlib.resources.files("int8qa.gateway") / "static"
    files = {}
    for name, media_type in _MEDIA_TYPES.items():
        content = (static / name).read_bytes()
        if name == PAGE_NAME and not operator_links:
            lines = content.splitlines(keepends=True)
            content = b"".join(line for line in lines if b"data-operator" not in line)
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        files[name] = PageFile(content, media_type, etag)
    return files


def build_page_router(files: Mapping[str, PageFile]) -> APIRouter:
    """The routes of the page, from ``load_files``."""
    router = APIRouter()
    methods = ["GET", "HEAD"]

    @router.api_route("/", methods=methods, include_in_schema=False)
    async def get_index(request: Request) -> Response:
        """A page for people."""
        return _respond(request, files[PAGE_NAME])

    @router.api_route("/static/{name}", methods=methods, include_in_schema=False)
    async def get_static(request: Request, name: str) -> Response:
        """A file of the page."""
        file = files.get(name)
        if file is None or name == PAGE_NAME:
            raise HTTPException(404)
        return _respond(request, file)

    return router


def _respond(request: Request, file: PageFile) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    if _matches(request.headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


def _matches(condition: str, etag: str) -> bool:
    """Whether If-None-Match holds; weak tags count. Source: RFC 9110, 13.1.2."""
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return etag in tags or tags == ["*"]
