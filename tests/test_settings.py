"""Settings from the environment: bounds, unknown names, misspelt groups."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from int8qa.contract import Precision
from int8qa.errors import ConfigurationError
from int8qa.settings import Settings, iter_setting_names, load_settings

NAMES = {name: default for name, _, default in iter_setting_names()}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither this process's variables nor a ``.env`` lying about take part."""
    for name in list(os.environ):
        if name.upper().startswith("INT8QA_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def iter_fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            for inner, inner_field in group.model_fields.items():
                yield f"INT8QA_{name}__{inner}".upper(), inner_field
        else:
            yield f"INT8QA_{name}".upper(), field


NUMBERS = {
    name: field for name, field in iter_fields() if field.annotation in {int, float}
}


def outside_and_inside(field: FieldInfo) -> tuple[list[float], list[float]]:
    """Values just beyond the bounds, and on or just within them."""
    step = 1 if field.annotation is int else 1e-9
    outside: list[float] = []
    inside: list[float] = []
    for bound in field.metadata:
        if isinstance(bound, Ge):
            outside.append(bound.ge - step)  # type: ignore[operator]
            inside.append(bound.ge)  # type: ignore[arg-type]
        elif isinstance(bound, Gt):
            outside.append(bound.gt)  # type: ignore[arg-type]
            inside.append(bound.gt + step)  # type: ignore[operator]
        elif isinstance(bound, Le):
            outside.append(bound.le * 2)  # type: ignore[operator]
            inside.append(bound.le)  # type: ignore[arg-type]
    return outside, inside


def value_at(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.removeprefix("INT8QA_").lower().split("__"):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", NUMBERS)
def test_bounds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each number has a lower and an upper bound; beyond it, the name is given."""
    outside, inside = outside_and_inside(NUMBERS[name])
    assert len(outside) == len(inside) == 2
    for value in inside:
        monkeypatch.setenv(name, str(value))
        assert value_at(load_settings(), name) == value
    for bad in (*outside, "", "many", "nan"):
        monkeypatch.setenv(name, str(bad))
        with pytest.raises(ConfigurationError, match=rf"^{name}: "):
            load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INT8QA_TRITON__URL", "localhost"),
        ("INT8QA_TRITON__URL", "http://localhost:8001"),
        ("INT8QA_TRITON__URL", "localhost:port"),
        ("INT8QA_TRITON__URL", "local host:8001"),
        ("INT8QA_DEFAULT_PRECISION", "int4"),
        ("INT8QA_LOG_LEVEL", "loud"),
        ("INT8QA_LOG_FORMAT", "xml"),
    ],
)
def test_wrong_word(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A word outside the list, or no host:port, is refused by the setting's name."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=rf"^{name}: "):
        load_settings()


@pytest.mark.parametrize(
    "name",
    [
        "INT8QA_PROT",
        "INT8QA_BATCHR__MAX_WAIT_S",
        "INT8QA_BATCHER__MAX_WAIT",
        "INT8QA_BATCHER_MAX_WAIT_S",
        "INT8QA_BATCHER",
        "INT8QA_",
        "int8qa_prot",
        "INT8QA_TRITON__URL__HOST",
    ],
)
def test_unknown_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A misspelt name or group is refused, and the known ones are listed."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigurationError, match=f"unknown setting {name};") as caught:
        load_settings()
    listed = str(caught.value).split("known are: ")[1].split(", ")
    assert set(NAMES) <= set(listed)


@pytest.mark.parametrize("name", ["INT8QA_PYTHON", "INT8QA_TORCH_INDEX"])
def test_install_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What only the Makefile reads is no mistake."""
    monkeypatch.setenv(name, "x")
    load_settings()


def test_names_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only our prefix is ours."""
    monkeypatch.setenv("INT8_QA_PORT", "1")
    monkeypatch.setenv("PORT", "1")
    assert load_settings().port == 8080


@pytest.mark.parametrize("name", NAMES)
def test_every_default_can_be_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each name is read from the environment, in either case, and takes its default."""
    assert value_at(load_settings(), name) == NAMES[name]
    for spelling in (name, name.lower()):
        monkeypatch.setenv(spelling, str(NAMES[name]))
        assert value_at(load_settings(), name) == NAMES[name]
        monkeypatch.delenv(spelling)


def test_every_setting_is_described() -> None:
    """Name, description and default: the README's table is made of them."""
    rows = list(iter_setting_names())
    assert [name for name, _, _ in rows] == [name for name, _ in iter_fields()]
    assert all(description for _, description, _ in rows)
    assert all(re.fullmatch(r"INT8QA_[A-Z0-9_]+", name) for name, _, _ in rows)


def test_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line wins over the environment, which wins over the default."""
    monkeypatch.setenv("INT8QA_PORT", "9000")
    monkeypatch.setenv("INT8QA_HOST", "0.0.0.0")
    settings = load_settings(port=9001)
    assert (settings.port, settings.host) == (9001, "0.0.0.0")


def test_dotenv_lying_about(tmp_path: Path) -> None:
    """A ``.env`` in the working directory is not read unasked."""
    (tmp_path / ".env").write_text("INT8QA_PORT=9004\n")
    assert load_settings().port == 8080


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9000"),
        ("0.0.0.0", "http://127.0.0.1:9000"),
        ("::", "http://127.0.0.1:9000"),
        ("::1", "http://[::1]:9000"),
        ("gateway.test", "http://gateway.test:9000"),
    ],
)
def test_local_url(host: str, url: str) -> None:
    """An address that is bound is not always one that can be asked."""
    assert load_settings(host=host, port=9000).local_url == url


def test_frozen() -> None:
    """Settings are decided once."""
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.batcher.max_wait_s = 1.0  # type: ignore[misc]


def test_default_precision_words() -> None:
    """Every precision there is may be the default, and `auto`, and nothing else."""
    words = get_args(Settings.model_fields["default_precision"].annotation)
    assert words == ("auto", *(precision.value for precision in Precision))


def test_types() -> None:
    """Values arrive as what they are."""
    settings = load_settings()
    assert settings.default_precision == "auto"
    assert settings.model_repository == Path("model_repository")
