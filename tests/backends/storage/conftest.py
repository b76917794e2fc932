"""A bucket of the stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.storage import as_location
from tests.vertex_world.world import VertexWorld


@pytest.fixture
def bucket(in_vertex_world: VertexWorld) -> Path:
    in_vertex_world.objects.create_bucket("data")
    return as_location("gs://data/folder")
