"""Files in a bucket, over real HTTP."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends.errors import ConfigError
from backends.storage import (
    as_location,
    create,
    exists,
    files_in,
    list_remote,
    local_copies,
    publish,
    read_bytes,
    remove,
    remove_folder,
    write_bytes_atomic,
)
from tests.vertex_world.world import VertexWorld

NAMES = ["a.json", "b/c.json", "b/d #1?x=[2]*%20é.json", "b/e/f.json"]


def test_files_come_back_under_any_name(bucket: Path) -> None:
    for index, name in enumerate(NAMES):
        write_bytes_atomic(bucket / name, b"%d" % index)
    assert [str(file.path) for file in list_remote(bucket)] == [f"gs://data/folder/{name}" for name in NAMES]
    assert [file.path.name for file in list_remote(bucket, recursive=False)] == ["a.json"]
    assert [path.name for path in files_in(bucket / "b", ".json")] == ["c.json", "d #1?x=[2]*%20é.json"]
    assert [read_bytes(bucket / name) for name in NAMES] == [b"0", b"1", b"2", b"3"]
    copies = [(copy, copy.read_bytes()) for _, copy in local_copies(bucket / name for name in NAMES)]
    assert [content for _, content in copies] == [b"0", b"1", b"2", b"3"]
    assert not any(copy.exists() for copy, _ in copies)
    remove(bucket / "b/d #1?x=[2]*%20é.json")
    remove(bucket / "never there")
    assert len(list_remote(bucket)) == 3
    assert exists(bucket / "b")
    remove_folder(bucket / "b")
    assert not exists(bucket / "b")
    assert [file.path.name for file in list_remote(bucket)] == ["a.json"]


def test_a_listing_is_never_an_old_one(bucket: Path, in_vertex_world: VertexWorld) -> None:
    assert list_remote(bucket) == []
    in_vertex_world.objects.write("gs://data/folder/x.json", b"{}")
    (first,) = list_remote(bucket)
    in_vertex_world.objects.write("gs://data/folder/x.json", b"[]")
    (second,) = list_remote(bucket)
    assert (first.path, first.size) == (second.path, second.size)
    assert first.version != second.version


def test_a_finished_file_is_moved_to_its_place(bucket: Path, tmp_path: Path) -> None:
    for target in (bucket / "x.bin", tmp_path / "made" / "x.bin"):
        made = tmp_path / "made.bin"
        made.write_bytes(b"\x00" * 3_000_000)
        publish(made, target)
        assert read_bytes(target) == b"\x00" * 3_000_000
        assert not made.exists()


def test_one_of_many_creates_a_file(bucket: Path) -> None:
    barrier = threading.Barrier(8)

    def attempt(index: int) -> bool:
        barrier.wait()
        return create(bucket / "lock.json", b"%d" % index)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert won.count(True) == 1
    assert read_bytes(bucket / "lock.json") == b"%d" % won.index(True)


def test_a_create_whose_answer_was_lost_counts(bucket: Path, in_vertex_world: VertexWorld) -> None:
    in_vertex_world.faults.http_script["storage.upload"] = ["lost-503"]
    assert create(bucket / "lock.json", b"mine")
    assert not create(bucket / "lock.json", b"another's")


def test_a_fault_that_passes_is_not_seen(bucket: Path, in_vertex_world: VertexWorld) -> None:
    in_vertex_world.faults.http_script |= {"storage.upload": ["503", "reset"], "storage.download": ["503"]}
    write_bytes_atomic(bucket / "x", b"x")
    assert read_bytes(bucket / "x") == b"x"
    assert sum(in_vertex_world.faults.injected.values()) == 3


def test_a_bucket_that_is_not_there_is_named(bucket: Path) -> None:
    absent = as_location("gs://absent/folder")
    for use in (lambda: write_bytes_atomic(absent / "x", b""), lambda: list_remote(absent)):
        with pytest.raises(ConfigError, match="the bucket 'absent' does not exist"):
            use()
    with pytest.raises(FileNotFoundError):
        read_bytes(bucket / "absent")


def test_a_refusal_is_one_line_with_what_to_grant(bucket: Path, in_vertex_world: VertexWorld) -> None:
    in_vertex_world.faults.http_script["storage.upload"] = ["403"]
    with pytest.raises(ConfigError, match=r"cannot write gs://data/folder/x: .*Grant roles/storage.objectAdmin"):
        write_bytes_atomic(bucket / "x", b"x")


def test_without_credentials_nothing_is_tried_as_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match=r"cannot read gs://data/no-credentials: .*application-default login"):
        read_bytes(as_location("gs://data/no-credentials"))
