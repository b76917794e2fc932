"""Cloud Storage through the real client: fake-gcs-server and what the proxy adds to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from google.api_core.exceptions import BadRequest, Conflict, NotFound, PreconditionFailed
from google.cloud import storage
from google.cloud.storage.exceptions import InvalidResponse

from tests.vertex_world import VertexWorld
from tests.vertex_world.fixtures import in_vertex_world, vertex_world

__all__ = ["in_vertex_world", "vertex_world"]

pytestmark = pytest.mark.world

MEGABYTE = 1 << 20


@pytest.fixture
def bucket(in_vertex_world: VertexWorld) -> Iterator[storage.Bucket]:
    with storage.Client() as client:
        yield client.create_bucket("bucket", location="europe-west4")


def write(bucket: storage.Bucket, name: str, size: int, how: str) -> None:
    blob = bucket.blob(name)
    if how == "whole":
        blob.upload_from_string(b"x" * size, if_generation_match=0)
        return
    with blob.open("wb", chunk_size=MEGABYTE, if_generation_match=0, ignore_flush=True) as file:
        for start in range(0, size, 100_000):
            file.write(b"x" * min(100_000, size - start))


@pytest.mark.parametrize(
    ("how", "size"), [("whole", 10), ("whole", 9 * MEGABYTE), ("stream", 10), ("stream", 3 * MEGABYTE)]
)
def test_a_create_only_upload_succeeds_once_and_then_gives_412(bucket: storage.Bucket, how: str, size: int) -> None:
    write(bucket, "runs/a b/ü%2F.jsonl", size, how)
    # A stream reports the 412 in the client's own class, an upload in one call in that of api_core.
    with pytest.raises(InvalidResponse if how == "stream" else PreconditionFailed, match="412"):
        write(bucket, "runs/a b/ü%2F.jsonl", size, how)
    blob = bucket.get_blob("runs/a b/ü%2F.jsonl")
    assert blob is not None
    assert blob.size == size
    assert blob.download_as_bytes() == b"x" * size  # by its mediaLink
    assert bucket.blob("runs/a b/ü%2F.jsonl").download_as_bytes(start=2, end=4) == b"xxx"
    with bucket.blob("runs/a b/ü%2F.jsonl").open("rb", chunk_size=MEGABYTE) as file:
        assert sum(map(len, iter(lambda: file.read(70_000), b""))) == size


def test_of_two_streams_that_began_together_one_wins(bucket: storage.Bucket) -> None:
    outcomes: list[str] = []
    ready = threading.Barrier(2)

    def upload() -> None:
        try:
            with bucket.blob("race").open("wb", chunk_size=MEGABYTE, if_generation_match=0, ignore_flush=True) as file:
                file.write(b"x" * 3 * MEGABYTE)
                ready.wait(10)
        except InvalidResponse as error:
            outcomes.append(str(error.response.status_code))
        else:
            outcomes.append("made")

    threads = [threading.Thread(target=upload) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["412", "made"]


def test_an_upload_that_is_abandoned_never_appears(bucket: storage.Bucket) -> None:
    def abandon() -> None:
        with bucket.blob("half").open("wb", chunk_size=MEGABYTE, if_generation_match=0, ignore_flush=True) as file:
            file.write(b"x" * 3 * MEGABYTE)
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        abandon()
    assert not bucket.blob("half").exists()


def test_reads_and_deletes_look_at_the_generation(bucket: storage.Bucket) -> None:
    bucket.blob("a").upload_from_string("x")
    blob = bucket.get_blob("a")
    assert blob is not None
    with pytest.raises(PreconditionFailed):
        bucket.blob("a").download_as_bytes(if_generation_match=1)
    with pytest.raises(PreconditionFailed):
        bucket.blob("a").delete(if_generation_match=1)
    blob.delete(if_generation_match=blob.generation)
    with pytest.raises(NotFound):
        bucket.blob("a").download_as_bytes()


def test_a_bucket_keeps_its_lifecycle_its_location_and_uniform_access(in_vertex_world: VertexWorld) -> None:
    with storage.Client() as client:
        wanted = client.bucket("kept")
        wanted.add_lifecycle_delete_rule(age=7, matches_prefix=["runs/"])
        wanted.iam_configuration.uniform_bucket_level_access_enabled = True
        client.create_bucket(wanted, location="us-central1")
        found = client.get_bucket("kept")
        rule = {"action": {"type": "Delete"}, "condition": {"age": 7, "matchesPrefix": ["runs/"]}}
        assert list(found.lifecycle_rules) == [rule]
        assert found.location == "US-CENTRAL1"
        assert found.iam_configuration.uniform_bucket_level_access_enabled is True
        found.add_lifecycle_delete_rule(age=1, matches_prefix=["tmp/"])
        found.patch()
        assert len(list(client.get_bucket("kept").lifecycle_rules)) == 2
        found.clear_lifecycle_rules()
        found.patch()
        assert list(client.get_bucket("kept").lifecycle_rules) == []


def test_buckets_that_exist_or_are_misnamed_or_missing_are_refused(bucket: storage.Bucket) -> None:
    client = bucket.client
    with pytest.raises(Conflict):
        client.create_bucket("bucket")
    for name in ("Capital", "a", "has google in it", "domain.com:project-kl-batch"):
        with pytest.raises((BadRequest, ValueError)):
            client.create_bucket(name)
    with pytest.raises(NotFound):
        client.get_bucket("absent")
    assert client.lookup_bucket("absent") is None


def test_listings_come_in_pages_with_prefixes_and_offsets(bucket: storage.Bucket) -> None:
    names = [f"p/{index:02d}" for index in range(7)]
    for name in [*names, "q/x"]:
        bucket.blob(name).upload_from_string("x")
    pages = list(bucket.client.list_blobs("bucket", prefix="p/", page_size=3).pages)
    assert [[blob.name for blob in page] for page in pages] == [names[:3], names[3:6], names[6:]]
    assert [blob.name for blob in bucket.list_blobs(start_offset="p/05")] == ["p/05", "p/06", "q/x"]
    folders = bucket.list_blobs(delimiter="/")
    assert list(folders) == []
    assert folders.prefixes == {"p/", "q/"}
    bucket.delete_blobs(list(bucket.list_blobs(prefix="p/")))
    assert [blob.name for blob in bucket.list_blobs()] == ["q/x"]


def test_names_are_unicode_and_may_be_long(bucket: storage.Bucket) -> None:
    name = "runs/" + "日本/" * 100 + "x" * 300
    bucket.blob(name).upload_from_string("content")
    assert [blob.name for blob in bucket.list_blobs()] == [name]
    assert bucket.blob(name).download_as_text() == "content"
