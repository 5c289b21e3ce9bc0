"""A client of the gateway's own API, for the command line.

In: questions and contexts. Out: the gateway's answers, as typed values. Waits and
asks again where the gateway says so (429, 503 with Retry-After); knows no model.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import httpx

from int8qa.errors import GatewayRequestError

MAX_ATTEMPTS = 30
"""Times one question is sent before an overloaded or absent gateway is an error."""


def build_key_headers() -> dict[str, str]:
    """Headers with the API key of ``INT8QA_API_KEY``; none where it is unset.

    From the environment, so that no command, record or report has it.
    """
    key = os.environ.get("INT8QA_API_KEY", "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


class GatewayClient:
    """An HTTP client of one gateway; use it as an async context manager.

    Where that asks for an API key, it is taken from ``INT8QA_API_KEY``.
    """

    def __init__(self, url: str, *, timeout_s: float = 120.0) -> None:
        self._url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            timeout=timeout_s, trust_env=False, headers=build_key_headers()
        )

    async def __aenter__(self) -> GatewayClient:  # noqa: PYI034 - Self is 3.11+
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def list_models(self) -> dict[str, Any]:
        """What the gateway serves (``GET /v1/models``)."""
        return await self._send("GET", "/v1/models")

    async def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask one question (``POST /v1/answer``).

        Raises:
            GatewayRequestError: no gateway there, it refused the request, or it
                stayed overloaded.
        """
        # ASCII escapes carry even what is no Unicode text; the gateway names the field.
        return await self._send(
            "POST",
            "/v1/answer",
            content=json.dumps(request).encode("ascii"),
            headers={"content-type": "application/json"},
        )

    async def _send(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                response = await self._client.request(method, self._url + path, **body)
            except httpx.ConnectError as error:
                raise GatewayRequestError(
                    f"no gateway answers at {self._url}; start one with `int8qa up` "
                    f"or name another with --url"
                ) from error
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise GatewayRequestError(
                    f"{self._url} is no address of a gateway; give one such as "
                    f"--url http://127.0.0.1:8080"
                ) from error
            except httpx.HTTPError as error:
                raise GatewayRequestError(
                    f"the gateway at {self._url} broke off: {type(error).__name__}"
                ) from error
            if response.status_code == httpx.codes.OK:
                return _as_object(response)
            if response.status_code not in {429, 503} or attempt == MAX_ATTEMPTS:
                raise GatewayRequestError(_describe_refusal(response))
            await asyncio.sleep(_retry_delay_s(response))
        raise AssertionError


def _as_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise GatewayRequestError(
            f"{response.url} is no int8qa gateway: its answer is not a JSON object"
        )
    return body


def _retry_delay_s(response: httpx.Response) -> float:
    try:
        delay_s = float(response.headers.get("retry-after", "1"))
    except ValueError:  # the other form it may have, a date
        return 1.0
    return min(max(delay_s, 0.1), 10.0) if math.isfinite(delay_s) else 1.0


def _describe_refusal(response: httpx.Response) -> str:
    try:
        problem = response.json()
        detail = str(problem.get("detail") or problem.get("title"))
    except (ValueError, AttributeError):
        detail = "no reason given"
    return f"the gateway answered HTTP {response.status_code}: {detail}"
