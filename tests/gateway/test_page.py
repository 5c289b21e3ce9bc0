"""GET / and /static: which files go out, and under which headers."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import PurePosixPath

import pytest

from int8qa.gateway.page import PAGE_NAME, POLICY, load_files
from tests.gateway.fakes import Service

FILES = load_files()
PATHS = ["/", *(f"/static/{name}" for name in FILES if name != PAGE_NAME)]


@pytest.mark.parametrize("path", PATHS)
async def test_each_file_is_served_under_strict_headers(service: Service, path: str):
    """The file as packaged, its type, and a policy that trusts this origin alone."""
    response = await service.client.get(path)
    assert response.status_code == 200
    file = FILES[PAGE_NAME if path == "/" else path.removeprefix("/static/")]
    assert response.content == file.content
    assert response.headers["content-type"] == file.media_type
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cross-origin-opener-policy"] == "same-origin"
    assert response.headers["etag"] == file.etag


def test_policy_allows_no_inline_code_and_no_other_site():
    """Nothing is allowed by default, and no directive names more than this origin."""
    policy = dict(rule.strip().split(" ", 1) for rule in POLICY.split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


@pytest.mark.parametrize("path", ["/", "/static/page.js"])
async def test_unchanged_file_is_not_sent_again(service: Service, path: str):
    """A client that has the file gets 304 and no body; any other tag gets the file."""
    etag = (await service.client.get(path)).headers["etag"]
    for condition in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        response = await service.client.get(path, headers={"If-None-Match": condition})
        assert response.status_code == 304, condition
        assert response.content == b""
        assert response.headers["etag"] == etag
        assert response.headers["content-security-policy"] == POLICY
    response = await service.client.get(path, headers={"If-None-Match": '"other"'})
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/", "/static/page.css"])
async def test_head_is_answered(service: Service, path: str):
    """Probes may ask for the headers alone."""
    response = await service.client.head(path)
    assert response.status_code == 200
    assert response.headers["content-length"] != "0"


@pytest.mark.parametrize(
    "name",
    [
        "index.html",
        "nothing.js",
        "..%2Fpage.py",
        "%2e%2e/page.py",
        "../page.py",
        "page.js/",
        "",
    ],
)
async def test_nothing_else_is_served(service: Service, name: str):
    """The set is closed: other names, and ways out of the folder, are 404."""
    response = await service.client.get(f"/static/{name}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


def test_every_packaged_file_is_served():
    """No file lies in the package without a route, and none is missing."""
    static = resources.files("int8qa.gateway") / "static"
    assert {file.name for file in static.iterdir()} == set(FILES)


def test_page_loads_only_its_own_files_by_relative_addresses():
    """It works behind a path prefix, and each file it names is there."""
    named = []
    for name, file in FILES.items():
        text = file.content.decode()
        if name.endswith(".html"):
            links = re.findall(r'(?:src|href)="([^"#][^"]*)"', text)
            assert not [link for link in links if link.startswith(("/", "http"))]
            named += [link for link in links if link.startswith("static/")]
            assert not re.findall(r"<script>|<style|\sstyle=|\son[a-z]+=", text)
        elif name.endswith(".js"):
            imports = re.findall(r'from "([^"]+)"', text)
            assert all(path.startswith("./") for path in imports)
            named += imports
            assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
            assert "innerHTML" not in text
        elif name.endswith(".css"):
            assert "url(" not in text
            assert "@import" not in text
    assert {PurePosixPath(path).name for path in named} <= set(FILES)
    assert "page.js" in {PurePosixPath(path).name for path in named}
