"""One overlay after the other."""

from __future__ import annotations

import pytest

from tests.deploy.rendering import OVERLAYS, Manifest, load_golden


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    name: str = request.param
    return name


@pytest.fixture
def documents(overlay: str) -> list[Manifest]:
    """All objects of one overlay."""
    return load_golden(overlay)
