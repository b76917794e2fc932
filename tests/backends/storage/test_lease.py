"""A lock in a bucket: one holds it, a killed holder's is taken over, a lost one is known to be lost."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends.errors import ConfigError
from backends.storage import (
    Lease,
    LeaseHeldError,
    LeaseLostError,
    as_location,
    list_remote,
    read_bytes,
    remove_folder,
    write_bytes_atomic,
)
from tests.vertex_world.world import VertexWorld

LEASE_S = 2.0
PATIENCE_S = 60.0


@pytest.fixture
def folder(in_vertex_world: VertexWorld) -> Path:
    in_vertex_world.objects.create_bucket("data")
    return as_location("gs://data/out/.lock")


def left_by_a_killed_run(folder: Path) -> None:
    lease = Lease(folder, lease_s=LEASE_S)
    lease.acquire()
    lease._ended.set()  # its process is gone: nothing renews, nothing releases


def test_a_lock_that_is_released_is_had_at_once_and_leaves_one_object(folder: Path) -> None:
    for _ in range(3):
        lease = Lease(folder)
        lease.acquire()
        lease.check()
        lease.release()
    (file,) = list_remote(folder)
    assert file.path.name == "00000003.json"


def test_a_living_holder_is_named_and_not_waited_out(folder: Path) -> None:
    holder = Lease(folder, lease_s=LEASE_S)
    holder.acquire()
    try:
        with pytest.raises(LeaseHeldError, match=r"process \d+ on .*, since 20"):
            Lease(folder, lease_s=LEASE_S).acquire()
        holder.check()
    finally:
        holder.release()


def test_a_killed_holders_lock_is_taken_over_when_its_time_is_up(folder: Path) -> None:
    left_by_a_killed_run(folder)
    began = time.monotonic()
    lease = Lease(folder, lease_s=LEASE_S)
    lease.acquire()
    assert time.monotonic() - began > LEASE_S
    lease.check()
    lease.release()


def test_of_many_who_wait_for_a_killed_holders_lock_one_gets_it(folder: Path) -> None:
    left_by_a_killed_run(folder)
    leases = [Lease(folder, lease_s=LEASE_S) for _ in range(6)]

    def attempt(lease: Lease) -> bool:
        try:
            lease.acquire()
        except LeaseHeldError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(attempt, leases))
    assert won.count(True) == 1
    leases[won.index(True)].check()
    leases[won.index(True)].release()


def test_those_who_take_turns_all_have_it_alone(folder: Path) -> None:
    inside: list[int] = []
    seen: list[int] = []

    def work(index: int) -> None:
        lease = Lease(folder, lease_s=LEASE_S)
        lease.acquire(patience_s=PATIENCE_S)
        inside.append(index)
        seen.append(len(inside))
        time.sleep(0.05)
        inside.remove(index)
        lease.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert seen == [1, 1, 1, 1]


def test_a_holder_whose_lock_was_taken_over_is_told(folder: Path) -> None:
    told = threading.Event()
    lease = Lease(folder, lease_s=LEASE_S, on_lost=told.set)
    lease.acquire()
    (mine,) = list_remote(folder)
    other = json.loads(read_bytes(mine.path)) | {"owner": "another"}
    write_bytes_atomic(folder / "00000002.json", json.dumps(other).encode())
    assert told.wait(PATIENCE_S)
    with pytest.raises(LeaseLostError, match="could not be kept"):
        lease.check()
    lease.release()
    assert json.loads(read_bytes(folder / "00000002.json")) == other


def test_a_holder_that_cannot_renew_counts_its_lock_as_lost(folder: Path, in_vertex_world: VertexWorld) -> None:
    told = threading.Event()
    lease = Lease(folder, lease_s=LEASE_S, on_lost=told.set)
    lease.acquire()
    in_vertex_world.faults.http["storage.upload"] = {"503": 1.0}
    assert told.wait(PATIENCE_S)
    with pytest.raises(LeaseLostError):
        lease.check()
    in_vertex_world.faults.http.clear()
    lease.release()


def test_a_lock_that_was_removed_is_lost(folder: Path) -> None:
    told = threading.Event()
    lease = Lease(folder, lease_s=LEASE_S, on_lost=told.set)
    lease.acquire()
    remove_folder(folder)
    assert told.wait(PATIENCE_S)
    lease.release()
    assert list_remote(folder) == []


def test_a_lock_that_cannot_be_read_is_named(folder: Path) -> None:
    write_bytes_atomic(folder / "00000001.json", b"half")
    with pytest.raises(ConfigError, match=r"the lock gs://data/out/.lock/00000001.json cannot be read"):
        Lease(folder).acquire()
