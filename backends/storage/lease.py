"""A lock in a bucket: a lease that its owner renews, and that others may take over when it is renewed no more.

The lock is a folder of numbered objects; the highest number holds. Whoever wants it creates the next number, which
succeeds for one only (create-if-absent), when the highest is released or has not changed for one lease time. That time
is watched on one's own clock: clocks of two machines are never compared. Only its owner rewrites an object.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from backends.errors import ConfigError, TokenKLError
from backends.storage.files import create, list_remote, read_bytes, remove, write_bytes_atomic

logger = logging.getLogger(__name__)

LEASE_S = 30.0
_RENEWALS_PER_LEASE = 4
_POLLS_PER_LEASE = 30


class LeaseHeldError(TokenKLError):
    """The lock is held; the message says by whom."""


class LeaseLostError(ConfigError):
    """The lock could not be kept: somebody else may hold it now."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What an object of the lock says."""

    owner: str
    host: str
    process: int
    lease_s: float
    since: str
    renewed: int = 0
    released: bool = False

    @property
    def holder(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


def _now() -> float:
    """Seconds as others count them: those for which this machine slept are among them, where it counts these."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """One holder's view of a lock.

    Parameters
    ----------
    folder : Path
        Where the lock is; remote.
    lease_s : float
        How long the lock outlives its last renewal.
    on_lost : callable
        Called once, from another thread, when the lock could not be kept.
    """

    def __init__(self, folder: Path, *, lease_s: float = LEASE_S, on_lost: Callable[[], None] = lambda: None) -> None:
        self._folder = folder
        self._lease_s = lease_s
        self._on_lost = on_lost
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._claim = _Claim(uuid.uuid4().hex, socket.gethostname(), os.getpid(), lease_s, now)
        self._number = 0
        self._renewed_at = 0.0
        self._lost: str | None = None
        self._ended = threading.Event()
        self._state = threading.Lock()

    def acquire(self, *, patience_s: float = 0.0) -> None:
        """Take the lock, now or as soon as it is known that its holder is gone.

        Parameters
        ----------
        patience_s : float
            How long to wait for a holder that is seen to live; one that is not is watched for its lease time first.

        Raises
        ------
        LeaseHeldError
            If its holder lives.
        """
        give_up = _now() + patience_s
        watched, since = None, 0.0
        while True:
            number, claim = self._newest()
            free = claim is None or claim.released
            expired = claim is not None and claim == watched and _now() - since > claim.lease_s
            if (free or expired) and self._take(number + 1):
                return
            if claim != watched:
                if claim is not None and not claim.released and watched is not None and _now() >= give_up:
                    raise LeaseHeldError(claim.holder)
                if watched is None and claim is not None and not free:
                    logger.info("%s is held by %s; watching whether it lives", self._folder, claim.holder)
                watched, since = claim, _now()
            time.sleep(self._lease_s / _POLLS_PER_LEASE)

    def _newest(self) -> tuple[int, _Claim | None]:
        while True:
            files = [file.path for file in list_remote(self._folder) if file.path.stem.isdecimal()]
            if not files:
                return 0, None
            try:
                return int(files[-1].stem), _Claim(**json.loads(read_bytes(files[-1])))
            except FileNotFoundError:
                continue  # an older one, removed just now
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"the lock {files[-1]} cannot be read ({error}). Remove it when no other run is at work."
                ) from error

    def _take(self, number: int) -> bool:
        self._renewed_at = _now()
        if not create(self._path(number), self._content()):
            return False
        self._number = number
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        for file in list_remote(self._folder):
            if file.path.stem.isdecimal() and int(file.path.stem) < number:
                remove(file.path)
        return True

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.json"

    def _content(self) -> bytes:
        return json.dumps(asdict(self._claim)).encode("utf-8")

    def _keep(self) -> None:
        """Renew until the end. A renewal may hang as long as the network does: the expiry does not wait for it."""
        while not self._ended.wait(self._lease_s / _RENEWALS_PER_LEASE):
            watchdog = threading.Timer(self._renewed_at + self._lease_s - _now(), self._give_up, ["no answer"])
            watchdog.daemon = True
            watchdog.start()
            try:
                self._renew()
            except (TokenKLError, OSError) as error:
                logger.warning("the lock %s was not renewed: %s", self._folder, error)
                if _now() - self._renewed_at > self._lease_s:
                    self._give_up(str(error))
            finally:
                watchdog.cancel()

    def _renew(self) -> None:
        started = _now()
        with self._state:
            if self._ended.is_set():
                return
            number, claim = self._newest()
            if number != self._number or claim is None or claim.owner != self._claim.owner:
                self._give_up(claim.holder if claim is not None else "its object was removed")
                return
            self._claim = replace(self._claim, renewed=self._claim.renewed + 1)
            write_bytes_atomic(self._path(number), self._content())
            self._renewed_at = started

    def _give_up(self, reason: str) -> None:
        if self._lost is None and not self._ended.is_set():
            self._lost = reason
            self._ended.set()
            self._on_lost()

    def check(self) -> None:
        """Raise if the lock was lost.

        Raises
        ------
        LeaseLostError
            With the reason.
        """
        lost = self._lost
        if lost is None and _now() - self._renewed_at > self._lease_s:
            lost = "it was not renewed in time"  # this process was held up, and its own thread does not know yet
        if lost is not None:
            raise LeaseLostError(f"the lock {self._folder} could not be kept ({lost}); another run may be at work.")

    def release(self) -> None:
        """Let others have the lock; where that cannot be said, it expires."""
        self._ended.set()
        if not self._state.acquire(timeout=self._lease_s):
            return  # a renewal hangs
        try:
            if self._lost is None:
                self._claim = replace(self._claim, released=True)
                write_bytes_atomic(self._path(self._number), self._content())
        except (TokenKLError, OSError) as error:
            logger.warning("the lock %s was not released, it expires: %s", self._folder, error)
        finally:
            self._state.release()
