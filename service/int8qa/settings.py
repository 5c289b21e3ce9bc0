"""Run-time settings: environment variables with the prefix ``INT8QA_``.

In: the process environment. Out: one frozen :class:`Settings`, built once at the
entry point and handed down. Unknown names are refused, misspelt groups too. What is
decided at build time is not here: the gateway reads that from the model
repository's contract.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from int8qa.errors import ConfigurationError

ENV_PREFIX = "INT8QA_"
DELIMITER = "__"

MAX_WORKERS = 64
"""Gateway processes of one port: each tells all others what it sees."""

_OTHER_NAMES = frozenset({"INT8QA_API_KEY", "INT8QA_PYTHON", "INT8QA_TORCH_INDEX"})
"""Variables with our prefix that only clients or the Makefile read."""


_ORIGIN = re.compile(r"https?://(\[[0-9a-f:]+\]|[a-z0-9.-]+)(:\d{1,5})?")
"""As browsers write it. Source: RFC 6454, 6.2."""


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _split(values: str) -> list[str]:
    return [value.strip() for value in values.split(",") if value.strip()]


def _check_origins(values: str) -> str:
    for value in _split(values):
        if value != "*" and not _ORIGIN.fullmatch(value):
            raise ValueError(
                "an origin is a scheme and a host, and a port if need be, in lower "
                "case and without a path: https://a.example:8443"
            )
    return values


def _check_networks(values: str) -> str:
    for value in _split(values):
        ipaddress.ip_network(value)
    return values


class TritonSettings(_Group):
    """How the gateway reaches Triton."""

    url: str = Field(
        default="127.0.0.1:8001",
        description="host:port of Triton's gRPC endpoint, `int8qa up` sets its own; "
        "several with commas between, or `dns:///name:port` for all that a name has",
        pattern=r"^(dns:///)?[^\s/,]+:\d{1,5}(,(dns:///)?[^\s/,]+:\d{1,5})*$",
    )
    probe_interval_s: float = Field(
        default=0.5,
        gt=0,
        le=60,
        description="how often a lost Triton is looked for; smaller recovers sooner",
    )
    control_key: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_-]*$",
        description="key that Triton wants before it loads a rebuilt model; `int8qa "
        "triton` loads none without one, `up` makes its own",
    )


class BatcherSettings(_Group):
    """The trade between latency and throughput."""

    max_wait_s: float = Field(
        default=0.004,
        ge=0,
        le=1,
        description="longest wait of a window for company while the engine is busy; "
        "larger fills batches, smaller shortens the tail",
    )
    max_in_flight: int = Field(
        default=3,
        ge=1,
        le=64,
        description="batches of one precision inside Triton at once, of each gateway "
        "process; one more than the engine's instances, of which there are 2, has the "
        "next batch there when one is done",
    )
    max_queue_tokens: int = Field(
        default=262_144,
        ge=512,
        le=2**31,
        description="padded tokens that may wait in one precision's queue; above it "
        "requests are refused at once",
    )


class LimitSettings(_Group):
    """What one request may ask for."""

    max_body_bytes: int = Field(
        default=4 * 2**20, ge=1024, le=2**30, description="HTTP body, bytes"
    )
    max_pending_bytes: int = Field(
        default=64 * 2**20,
        ge=1024,
        le=2**34,
        description="bodies of all requests in work together, bytes; above it "
        "requests are refused at once",
    )
    max_question_chars: int = Field(
        default=2_000, ge=1, le=10**6, description="question, Unicode code points"
    )
    max_context_chars: int = Field(
        default=500_000, ge=1, le=10**8, description="context, Unicode code points"
    )
    max_windows: int = Field(
        default=512,
        ge=1,
        le=100_000,
        description="windows one context may be split into; bounds the cost of one "
        "request",
    )
    max_items: int = Field(
        default=256, ge=1, le=100_000, description="items of one /v1/answers request"
    )
    request_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="deadline of a request, queueing included; then 504. Clients ask "
        "for less with X-Request-Timeout",
    )
    receive_timeout_s: float = Field(
        default=20.0,
        gt=0,
        le=3600,
        description="the headers, and then the body, of a request must each arrive "
        "within; then the connection is closed, or 408",
    )
    send_timeout_s: float = Field(
        default=20.0,
        gt=0,
        le=3600,
        description="a client that leaves its answer unread for longer is cut off",
    )
    shutdown_timeout_s: float = Field(
        default=15.0,
        ge=0,
        le=600,
        description="how long SIGTERM waits for accepted requests",
    )


class ComparisonSettings(_Group):
    """INT8 against FP16 under live traffic: ``/v1/comparison`` and its guard."""

    window: int = Field(
        default=2_000,
        ge=10,
        le=20_000,  # they are sorted for each report, on the event loop
        description="most recent observations kept per precision, and pairs",
    )
    fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of answered questions asked again of INT8 and FP16, in "
        "quiet moments, to compare them; 0: none",
    )
    capacity_share: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="most of the time that may go into asking again",
    )
    max_windows: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="longer documents are not asked again: a request that comes "
        "meanwhile waits for the batch",
    )
    guard: Literal["off", "alert", "fallback"] = Field(
        default="alert",
        description="when INT8 no longer agrees with FP16: alert shows it in metrics "
        "and log, fallback also serves FP16 where no precision is asked for",
    )
    guard_agreement: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="the guard trips below this share of equal answers",
    )
    guard_hysteresis: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="and recovers at that share plus this, at most 1",
    )
    guard_pairs: int = Field(
        default=100,
        ge=1,
        le=10**5,
        description="over so many of the most recent pairs",
    )

    @property
    def guard_recovery(self) -> float:
        """Share of equal answers from which the guard recovers."""
        # Rounded, or 0.8 + 0.05 would ask for a little more than 85 of 100.
        return round(min(1.0, self.guard_agreement + self.guard_hysteresis), 9)


class AccessSettings(_Group):
    """Who may ask."""

    keys_file: str = Field(
        default="",
        description="file of API keys, such as /run/secrets/int8qa_keys, with lines by "
        "`int8qa keys new`; read again when it changes; empty: everybody may ask",
    )
    allowed_origins: Annotated[str, AfterValidator(_check_origins)] = Field(
        default="",
        description="web origins whose pages may ask from a browser, such as "
        "https://a.example, separated by commas, or *; empty: this service's page only",
    )
    trusted_proxies: Annotated[str, AfterValidator(_check_networks)] = Field(
        default="",
        description="addresses or networks of proxies whose X-Forwarded-For and "
        "X-Forwarded-Proto are believed, separated by commas; empty: nobody's",
    )

    def list_origins(self) -> list[str]:
        """The allowed origins one by one."""
        return _split(self.allowed_origins)


class AdminSettings(_Group):
    """A second address, for operators."""

    host: str = Field(
        default="127.0.0.1", description="address of the operators' port, if any"
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="serves /metrics, /docs and /openapi.json, without a key, and "
        "takes them from the public port; 0: there is none",
    )


class EmbeddedSettings(_Group):
    """The Triton that `int8qa up` starts itself."""

    start_timeout_s: float = Field(
        default=120.0, gt=0, le=3600, description="until Triton must be ready"
    )
    stop_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="after SIGTERM, before SIGKILL"
    )
    max_restart_delay_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="upper bound of the back-off between restarts",
    )
    grpc_port: int = Field(
        default=0, ge=0, le=65535, description="Triton's gRPC port; 0: any free one"
    )
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="port of Triton's own Prometheus metrics; 0: any free one",
    )
    engine_threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="CPU threads of one engine; 0 lets OpenVINO choose",
    )
    model_control: bool = Field(
        default=True,
        description="let `up` load rebuilt models into its running Triton; turn it off "
        "on a machine shared with people you would not let run code as you",
    )


class Settings(BaseSettings):
    """All settings of one process, frozen."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=DELIMITER,
        frozen=True,
        extra="forbid",
    )

    host: str = Field(default="127.0.0.1", description="address the gateway binds")
    port: int = Field(default=8080, ge=0, le=65535, description="HTTP port")
    workers: int = Field(
        default=1,
        ge=1,
        le=MAX_WORKERS,
        description="gateway processes behind the port; more where one process is "
        "short of its core and the engine is not",
    )
    model_repository: Path = Field(
        default=Path("model_repository"),
        description="directory written by `int8qa build`",
    )
    default_precision: Literal["auto", "int8", "fp16", "fp32"] = Field(
        default="auto",
        description="precision of requests that name none: int8, fp16, fp32, or auto "
        "for the one that the build recommends",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log line written"
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto",
        description="console for people, json for collectors, or auto: console on a "
        "terminal, else json",
    )
    tracing: Literal["off", "otlp"] = Field(
        default="off",
        description="OpenTelemetry traces by OTLP; where to, the OTEL_ variables say; "
        "needs the extra `tracing`",
    )

    triton: TritonSettings = Field(default_factory=TritonSettings)
    batcher: BatcherSettings = Field(default_factory=BatcherSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    comparison: ComparisonSettings = Field(default_factory=ComparisonSettings)
    access: AccessSettings = Field(default_factory=AccessSettings)
    admin: AdminSettings = Field(default_factory=AdminSettings)
    embedded: EmbeddedSettings = Field(default_factory=EmbeddedSettings)

    @property
    def local_url(self) -> str:
        """Where this machine reaches its own gateway."""
        host = self.host if self.host not in {"0.0.0.0", "::"} else "127.0.0.1"  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def iter_setting_names() -> Iterator[tuple[str, str, object]]:
    """Yield (environment name, description, default) of every setting, in order."""
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, _Group):
            for inner, inner_field in group.model_fields.items():
                yield (
                    f"{ENV_PREFIX}{name}{DELIMITER}{inner}".upper(),
                    inner_field.description or "",
                    inner_field.default,
                )
        else:
            yield f"{ENV_PREFIX}{name}".upper(), field.description or "", field.default


def load_settings(
    environ: Mapping[str, str] | None = None,
    **overrides: object,
) -> Settings:
    """Build the settings of this process.

    Args:
        environ: where names are checked; the process environment by default.
        overrides: values from the command line; they win over it.

    Raises:
        ConfigurationError: a name is unknown or a value is out of range.
    """
    known = {name for name, _, _ in iter_setting_names()} | _OTHER_NAMES
    source = os.environ if environ is None else environ
    for name in source:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            raise ConfigurationError(
                f"unknown setting {name}; known are: {', '.join(sorted(known))}"
            )
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ENV_PREFIX + DELIMITER.join(str(p) for p in first["loc"]).upper()
        raise ConfigurationError(f"{name}: {first['msg']}") from error
