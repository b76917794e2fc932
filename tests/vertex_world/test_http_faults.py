"""Faults of HTTP calls, as they show over the wire, and their counts."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from google.cloud import storage
from google.genai import errors

from tests.vertex_world import VertexWorld
from tests.vertex_world.fixtures import in_vertex_world, vertex_world
from tests.vertex_world.testing import ask, authorized_session, genai_client, start_job, upload_rows, vertex_url

__all__ = ["in_vertex_world", "vertex_world"]

pytestmark = pytest.mark.world


@pytest.fixture
def world(in_vertex_world: VertexWorld) -> VertexWorld:
    return in_vertex_world


@pytest.mark.parametrize(("fault", "code"), [("429", 429), ("500", 500), ("503", 503)])
def test_http_errors_by_rate_and_by_script(world: VertexWorld, fault: Any, code: int) -> None:
    world.faults.http_script["online"] = [None, fault]
    ask(world)
    with pytest.raises(errors.APIError) as failure:
        ask(world)
    assert failure.value.code == code
    world.faults.http["online"] = {fault: 0.5}
    with genai_client(world) as client:
        statuses = Counter(_status(lambda: ask(world, client=client)) for _ in range(30))
    assert 0 < statuses[code] < 30
    assert world.faults.injected[f"online:{fault}"] == statuses[code] + 1
    assert len(world.online_calls) == 31 - statuses[code]


def _status(call: Callable[[], object]) -> int:
    try:
        call()
    except errors.APIError as error:
        return error.code
    return 200


def test_retry_after_is_a_header(world: VertexWorld) -> None:
    world.faults.http_script["list"] = ["429+retry-after", "429"]
    world.faults.retry_after_s = 3
    with authorized_session(world) as session:
        url = vertex_url(world, "batchPredictionJobs")
        assert session.get(url, timeout=10).headers["Retry-After"] == "3"
        assert "Retry-After" not in session.get(url, timeout=10).headers


def test_a_reset_does_nothing_and_a_lost_answer_was_work_done(world: VertexWorld) -> None:
    world.faults.http_script["online"] = ["reset", "lost", "lost-503"]
    for _ in range(2):
        with pytest.raises(httpx2.TransportError):
            ask(world)
    with pytest.raises(errors.ServerError):
        ask(world)
    assert len(world.online_calls) == 2
    assert not world.rows_bought


@pytest.mark.parametrize(("fault", "error"), [("lost", httpx2.TransportError), ("lost-503", errors.ServerError)])
def test_a_job_exists_although_the_answer_to_create_was_lost(
    world: VertexWorld, fault: Any, error: type[Exception]
) -> None:
    world.faults.http_script["create"] = [fault]
    with pytest.raises(error):
        start_job(world)
    with genai_client(world) as client:
        assert [job.display_name for job in client.batches.list(config={"filter": 'displayName="a"'})] == ["a"]


def test_slow_answers_and_latency_take_their_time(world: VertexWorld) -> None:
    ask(world)
    world.faults.slow_s = world.faults.latency_s = 0.3
    world.faults.http_script["online"] = ["slow"]
    begun = time.monotonic()
    ask(world)
    assert time.monotonic() - begun >= 0.6


@pytest.mark.parametrize("kind", ["get", "cancel", "delete"])
def test_every_job_endpoint_can_fail(world: VertexWorld, kind: str) -> None:
    created = start_job(world)
    world.wait_for_jobs()
    world.faults.http_script[kind] = ["503"]
    with genai_client(world) as client, pytest.raises(errors.ServerError):
        getattr(client.batches, kind)(name=str(created.name))


def test_the_token_endpoint_and_storage_can_fail_and_the_clients_retry(world: VertexWorld) -> None:
    world.faults.http_script |= {"token": ["503"], "storage.upload": ["503"], "storage.download": ["reset"]}
    ask(world)
    upload_rows([{"request": {}}], "a")
    with storage.Client() as client:
        assert client.bucket("bucket").blob("in/a.jsonl").download_as_bytes()
    assert world.token_requests == 1  # the refused call never reached the grant
    assert [request.path for request in world.requests].count("/token") == 2
    assert world.faults.injected == {"token:503": 1, "storage.upload:503": 1, "storage.download:reset": 1}


def test_an_upload_whose_answer_was_lost_is_there(world: VertexWorld) -> None:
    with storage.Client() as client:
        bucket = client.create_bucket("bucket")
        world.faults.http_script["storage"] = ["lost-503"]
        with pytest.raises(Exception, match="503"):
            bucket.blob("a").upload_from_string("x", if_generation_match=0, retry=None)
        assert bucket.blob("a").download_as_bytes() == b"x"


def test_a_request_that_was_cut_short_is_none(world: VertexWorld) -> None:
    before = len(world.requests)
    place = urlsplit(vertex_url(world, "batchPredictionJobs"))
    with socket.create_connection((place.hostname, place.port), timeout=10) as client:
        client.sendall(f"POST {place.path} HTTP/1.1\r\nContent-Length: 100\r\n\r\n{{".encode())
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert len(world.requests) == before
