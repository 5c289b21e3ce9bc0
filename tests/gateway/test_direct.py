"""Routes that are called directly, and what still goes through FastAPI."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, Response

from int8qa.gateway.direct import DirectRoute

Asked = Annotated[float | None, Header(alias="X-Wait", gt=0)]
Named = Annotated[str | None, Query()]


def build_client(resolved: list[str], monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Two routes; ``resolved`` hears of each request that FastAPI resolves."""
    import fastapi.routing

    genuine = fastapi.routing.solve_dependencies

    async def solve(**options: Any) -> Any:
        resolved.append(options["request"].url.path)
        return await genuine(**options)

    monkeypatch.setattr(fastapi.routing, "solve_dependencies", solve)
    router = APIRouter(route_class=DirectRoute)

    @router.get("/plain")
    async def get_plain(
        request: Request, wait: Asked = None, name: Named = None
    ) -> Response:
        return JSONResponse([request.method, wait, name])

    @router.get("/needy")
    async def get_needy(
        request: Request, depended: Annotated[int, Depends(lambda: 3)]
    ) -> Response:
        del request
        return JSONResponse(depended)

    @router.get("/asking")
    async def get_asking(request: Request, name: Annotated[str, Query()]) -> Response:
        del request
        return JSONResponse(name)

    @router.get("/of/{name}")
    async def get_of(request: Request, name: str) -> Response:
        del request
        return JSONResponse(name)

    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


def test_nothing_to_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any of its parameters a request goes straight to its endpoint."""
    resolved: list[str] = []
    client = build_client(resolved, monkeypatch)
    assert client.get("/plain", headers={"X-Other": "1"}).json() == ["GET", None, None]
    assert resolved == []


@pytest.mark.parametrize(
    ("path", "headers", "answer"),
    [
        ("/plain", {"X-Wait": "2.5"}, ["GET", 2.5, None]),
        ("/plain?name=a", {}, ["GET", None, "a"]),
        ("/needy", {}, 3),
        ("/of/b", {}, "b"),
        ("/asking?name=c", {}, "c"),
    ],
)
def test_resolved(
    path: str, headers: dict[str, str], answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a request brings, and what an endpoint needs, FastAPI resolves."""
    resolved: list[str] = []
    client = build_client(resolved, monkeypatch)
    assert client.get(path, headers=headers).json() == answer
    assert resolved == [path.partition("?")[0]]


@pytest.mark.parametrize(
    ("path", "headers"), [("/plain", {"X-Wait": "-1"}), ("/asking", {})]
)
def test_refused(
    path: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad parameter, or a missing one, is refused as ever."""
    client = build_client([], monkeypatch)
    assert client.get(path, headers=headers).status_code == 422


def test_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The OpenAPI document names the parameters all the same."""
    document = build_client([], monkeypatch).get("/openapi.json").json()
    parameters = document["paths"]["/plain"]["get"]["parameters"]
    assert [entry["name"] for entry in parameters] == ["name", "X-Wait"]
