"""Batch files in the local Cloud Storage."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from google.cloud import storage

from backends.errors import BackendError, ConfigError
from backends.vertex.jobs.bucket import BatchBucket, OtherContentError, check_bucket_name, lacks_shards
from tests.vertex_world.world import VertexWorld

T = TypeVar("T")
NAME = "stand-in-bucket"


def use(work: Callable[[BatchBucket], Awaitable[T]], location: str = "us-central1", deadline_s: float = 60.0) -> T:
    async def run() -> T:
        bucket = BatchBucket("stand-in-project", location, NAME, deadline_s)
        try:
            await bucket.ensure()
            return await work(bucket)
        finally:
            bucket.close()

    return asyncio.run(run())


class Lines:
    """Lines made anew at each reading; how often is counted."""

    def __init__(self, n: int, length: int = 1000) -> None:
        self.n, self.length, self.read = n, length, 0

    def __iter__(self) -> Iterator[bytes]:
        self.read += 1
        for index in range(self.n):
            yield f"{index:0{self.length - 1}d}\n".encode()


@pytest.mark.parametrize(
    ("location", "expected"), [("us-central1", "US-CENTRAL1"), ("global", "US"), ("us", "US"), ("eu", "EU")]
)
def test_it_is_made_where_the_jobs_run_with_uniform_access(location: str, expected: str, in_vertex_world) -> None:
    async def nothing(bucket: BatchBucket) -> None:
        return None

    use(nothing, location)
    use(nothing, location)
    with storage.Client() as client:
        bucket = client.get_bucket(NAME)
        assert bucket.location.upper() == expected


@pytest.mark.parametrize("fault", ["503", "429", "reset", "lost", "lost-503"])
def test_it_is_made_under_faults(fault: Any, in_vertex_world: VertexWorld) -> None:
    in_vertex_world.faults.http_script = {"storage": [fault, None, fault]}

    async def upload(bucket: BatchBucket) -> str:
        return await bucket.upload_once("batch_input/a.jsonl", Lines(3))

    assert use(upload) == f"gs://{NAME}/batch_input/a.jsonl"


def test_runs_that_make_it_at_the_same_time_all_have_it(in_vertex_world) -> None:
    async def work() -> None:
        buckets = [BatchBucket("stand-in-project", "us-central1", NAME, 60.0) for _ in range(8)]
        await asyncio.gather(*(bucket.ensure() for bucket in buckets))
        for bucket in buckets:
            bucket.close()

    asyncio.run(work())


def test_the_same_content_twice_is_one_object_and_other_content_is_refused(in_vertex_world: VertexWorld) -> None:
    async def work(bucket: BatchBucket) -> None:
        await bucket.upload_once("batch_input/a.jsonl", Lines(10))
        await bucket.upload_once("batch_input/a.jsonl", Lines(10))
        with pytest.raises(OtherContentError, match="exists with other content"):
            await bucket.upload_once("batch_input/a.jsonl", Lines(11))

    use(work)
    assert in_vertex_world.objects.read(f"gs://{NAME}/batch_input/a.jsonl") == b"".join(Lines(10))


# The local storage appends a chunk that is sent twice, where the real one looks at its range; so only the last is lost.
@pytest.mark.parametrize(
    ("fault", "last"), [("503", "429"), ("reset", "reset"), ("503", "lost"), ("reset", "lost-503")]
)
def test_a_fault_in_a_large_file_does_not_begin_it_again(fault: Any, last: Any, in_vertex_world: VertexWorld) -> None:
    lines = Lines(30_000)
    in_vertex_world.faults.http_script = {"storage.upload": [None, None, fault, None, None, last]}

    async def work(bucket: BatchBucket) -> None:
        await bucket.upload_once("batch_input/large.jsonl", lines)

    use(work)
    assert in_vertex_world.objects.read(f"gs://{NAME}/batch_input/large.jsonl") == b"".join(lines)
    assert lines.read <= 3  # once, once more here, and once where the last answer was lost and the content compared


def test_a_download_is_whole_under_faults(in_vertex_world: VertexWorld, tmp_path: Path) -> None:
    async def work(bucket: BatchBucket) -> None:
        await bucket.upload_once("batch_output/x/predictions.jsonl", Lines(5000))
        in_vertex_world.faults.http_script = {"storage.download": ["503", "reset", "lost", None]}
        await bucket.download("batch_output/x/predictions.jsonl", tmp_path / "copy")

    use(work)
    assert (tmp_path / "copy").read_bytes() == b"".join(Lines(5000))


OUTPUT = ["m/predictions.jsonl", "m/predictions-00000-of-00002.jsonl", "m/predictions_001.jsonl",
          "m/predictions.jsonl-00000-of-00002"]  # fmt: skip
OTHER = ["m/incremental_predictions.jsonl", "m/incremental_predictions-00000-of-00001.jsonl", "m/notes.txt",
         "m/predictions.jsonl.tmp"]  # fmt: skip


def test_prediction_files_are_found_below_a_folder_and_nothing_else(in_vertex_world: VertexWorld) -> None:
    async def work(bucket: BatchBucket) -> list[str]:
        for name in OUTPUT + OTHER:
            await bucket.upload_once(f"batch_output/job/{name}", Lines(1))
        await bucket.upload_once("batch_output/job-2/predictions.jsonl", Lines(1))
        return await bucket.output_files(f"gs://{NAME}/batch_output/job")

    assert use(work) == sorted(f"batch_output/job/{name}" for name in OUTPUT)


def test_output_elsewhere_is_refused(in_vertex_world) -> None:
    async def work(bucket: BatchBucket) -> None:
        with pytest.raises(BackendError, match="is not in the bucket"):
            await bucket.output_files("gs://other/batch_output/job")

    use(work)


@pytest.mark.parametrize(
    ("paths", "lacking"),
    [
        (["m/predictions.jsonl"], False),
        (["m/predictions-00000-of-00002.jsonl"], True),
        (["m/predictions-00000-of-00002.jsonl", "m/predictions-00001-of-00002.jsonl"], False),
        (["m/predictions-00001-of-00002.jsonl", "m/predictions-00002-of-00002.jsonl"], False),
        (["m/predictions.jsonl-00000-of-00003", "m/predictions.jsonl-00002-of-00003"], True),
        (["a/predictions-00000-of-00001.jsonl", "b/predictions-00000-of-00002.jsonl"], True),
    ],
)
def test_shards_that_are_still_to_come_are_noticed(paths: list[str], lacking: bool) -> None:
    assert lacks_shards(paths) == lacking


@pytest.mark.parametrize("name", ["project-kl-batch", "a.b_c-9", "abc"])
def test_names_that_buckets_can_have(name: str) -> None:
    assert check_bucket_name(name) == name


@pytest.mark.parametrize("name", ["ab", "-abc", "Abc", "gs://abc", "a:b-kl-batch", "x" * 223, ""])
def test_names_that_no_bucket_can_have(name: str) -> None:
    with pytest.raises(ConfigError, match="--bucket-name"):
        check_bucket_name(name)
