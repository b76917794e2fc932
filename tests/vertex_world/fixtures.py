"""pytest fixtures: ``from tests.vertex_world.fixtures import vertex_world``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.vertex_world.world import VertexWorld


@pytest.fixture
def vertex_world() -> Iterator[VertexWorld]:
    """A fresh world: own port, own buckets, empty ledger. It takes some 50 ms to start."""
    with VertexWorld() as world:
        yield world


@pytest.fixture
def make_vertex_world() -> Iterator[Callable[..., VertexWorld]]:
    """Start worlds with settings of one's own; they are stopped after the test."""
    with ExitStack() as stack:

        def make(**settings: Any) -> VertexWorld:
            return stack.enter_context(VertexWorld(**settings))

        yield make


@pytest.fixture
def in_vertex_world(vertex_world: VertexWorld, monkeypatch: pytest.MonkeyPatch) -> VertexWorld:
    """This process lives in a fresh world: its environment is set."""
    for name, value in vertex_world.environment().items():
        monkeypatch.setenv(name, value)
    return vertex_world
