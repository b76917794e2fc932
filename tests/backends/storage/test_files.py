"""Locations: local paths are paths, addresses in a bucket are used over real HTTP."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath, WindowsPath

import pytest
from pydantic import BaseModel

from backends.errors import ConfigError
from backends.storage import (
    LocalCopies,
    Location,
    as_location,
    create,
    exists,
    files_in,
    in_order,
    is_remote,
    is_within,
    list_remote,
    local_copies,
    local_copy,
    publish,
    read_bytes,
    remove,
    remove_folder,
    write_bytes_atomic,
)
from tests import ROOT
from tests.vertex_world.world import VertexWorld

NAMES = ["a.json", "b/c.json", "b/d #1?x=[2]*%20é.json", "b/e/f.json"]


class Settings(BaseModel):
    place: Location
    other: Location | None = None


@pytest.fixture
def bucket(in_vertex_world: VertexWorld) -> Path:
    in_vertex_world.objects.create_bucket("data")
    return as_location("gs://data/folder")


def test_a_local_location_is_a_plain_path(tmp_path: Path) -> None:
    for text in (str(tmp_path), tmp_path, "relative/x", "file:///tmp/x"):
        assert type(as_location(text)) in (PosixPath, WindowsPath)
    assert as_location("file:///tmp/x") == Path("/tmp/x")
    assert not is_remote(tmp_path)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://", "names no bucket; write it as gs://BUCKET/FOLDER"),
        ("gs:///x", "names no bucket"),
        ("gs://b/../x", "'..' parts mean nothing"),
        ("gs://b//x", "empty"),
        ("gopher://b/x", "no storage is known as gopher://"),
        ("s3://b/x", "needs a package that is not installed: .*s3fs"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_in_a_line(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        as_location(address)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("package", ["gcsfs", "upath"])
def test_without_the_packages_the_extra_is_named(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from backends.storage import as_location; as_location('gs://b/x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("backends.errors.MissingDependencyError: ")
    assert last.endswith("which is not installed: pip install 'tokenkl[gcs]'.")


def test_a_setting_is_a_string_outside_and_a_location_inside() -> None:
    settings = Settings.model_validate({"place": "gcs://data/x/", "other": "y"})
    assert str(settings.place) == "gs://data/x"
    assert is_remote(settings.place)
    assert settings.model_dump() == {"place": "gs://data/x", "other": "y"}
    assert settings.model_dump_json() == '{"place":"gs://data/x","other":"y"}'
    assert Settings.model_json_schema()["properties"]["place"]["type"] == "string"
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings
    assert again == Settings.model_validate_json(settings.model_dump_json())
    with pytest.raises(ValueError, match="not a valid path"):
        Settings.model_validate({"place": 5})


def test_what_is_within_a_folder(tmp_path: Path) -> None:
    folder = as_location("gs://data/out")
    assert is_within(folder / "x" / "y", folder)
    assert is_within(folder / "x", as_location("gs://data"))
    assert not is_within(as_location("gs://data/out2/x"), folder)
    assert not is_within(tmp_path, folder)
    assert is_within(tmp_path / "a" / ".." / "b", tmp_path)


def test_files_come_back_under_any_name(bucket: Path) -> None:
    for index, name in enumerate(NAMES):
        write_bytes_atomic(bucket / name, b"%d" % index)
    assert [str(file.path) for file in list_remote(bucket)] == [f"gs://data/folder/{name}" for name in NAMES]
    assert [file.path.name for file in list_remote(bucket, recursive=False)] == ["a.json"]
    assert [path.name for path in files_in(bucket / "b", ".json")] == ["c.json", "d #1?x=[2]*%20é.json"]
    assert [read_bytes(bucket / name) for name in NAMES] == [b"0", b"1", b"2", b"3"]
    with local_copy(bucket / NAMES[2]) as copy:
        assert copy.read_bytes() == b"2"
    assert not copy.exists()
    assert [copy.read_bytes() for _, copy in local_copies(bucket / name for name in NAMES)] == [b"0", b"1", b"2", b"3"]
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


def test_work_ahead_is_bounded_and_in_order() -> None:
    begun: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            begun.append(number)
            yield number

    with ThreadPoolExecutor(4) as pool:
        results = in_order(pool, lambda index, number: index * number, numbers())
        assert [next(results) for _ in range(10)] == [(n, n * n) for n in range(10)]
        assert len(begun) < 100
        results.close()
