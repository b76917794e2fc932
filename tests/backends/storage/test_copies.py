"""Copies of remote files on the local disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends.storage import (
    LocalCopies,
    list_remote,
    remove,
    write_bytes_atomic,
)
from tests.vertex_world.world import VertexWorld


def test_copies_are_fetched_once_until_the_file_changes(bucket: Path, in_vertex_world: VertexWorld) -> None:
    write_bytes_atomic(bucket / "x", b"1")
    copies = LocalCopies()

    def read() -> bytes:
        (file,) = list_remote(bucket)
        with copies.open(file) as copy:
            return copy.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: read(), range(16))) == {b"1"}
    assert downloads(in_vertex_world) == 1
    write_bytes_atomic(bucket / "x", b"2")
    assert read() == b"2"
    assert downloads(in_vertex_world) == 2


def downloads(world: VertexWorld) -> int:
    return sum(line.path.startswith("/download/") for line in world.requests)


def test_copies_beyond_the_limit_go_oldest_first_and_those_in_use_stay(
    bucket: Path, in_vertex_world: VertexWorld
) -> None:
    for name in "abc":
        write_bytes_atomic(bucket / name, b"x" * 100)
    a, b, c = list_remote(bucket)
    copies = LocalCopies(max_bytes=200)
    with copies.open(a) as in_use:
        copies.fetch([b])
        copies.fetch([c])
        assert in_use.read_bytes() == b"x" * 100
    copies.fetch([c])
    assert downloads(in_vertex_world) == 3
    copies.fetch([b])
    assert downloads(in_vertex_world) == 4


def test_a_file_that_is_gone_is_an_error_each_time_and_not_kept(bucket: Path) -> None:
    write_bytes_atomic(bucket / "x", b"1")
    (file,) = list_remote(bucket)
    remove(file.path)
    copies = LocalCopies()
    for _ in range(2):
        with pytest.raises(FileNotFoundError), copies.open(file):
            pass
    write_bytes_atomic(bucket / "x", b"2")
    with copies.open(file) as copy:
        assert copy.read_bytes() == b"2"
