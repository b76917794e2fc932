"""The backend of a run in a process that works for it elsewhere: opened with its first task, closed when it is over.

A worker process serves many runs, several of them at a time perhaps. For each there is one session, and a thread that
looks at the run's pulse: it stops what is asked within a second or two of the run's stop, and closes the session when
the run is over, or its process is gone.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Container
from dataclasses import replace
from typing import Any

from backends.base import Backend, ScoreRequest
from backends.errors import ConfigError, TokenKLError
from backends.session import BackendSession, SessionClosedError
from backends.storage.files import create, is_remote, write_bytes_atomic
from flows.cluster.pulse import Order, PulseReader, pulse_path, read_pulse
from flows.cluster.ticket import Ticket, check_installation
from flows.config.models import resolve_backend
from flows.stages.plan import Asker, Group, requests_of
from flows.stages.scoring import GroupOutcome, Stores, outcome_of_stored, score_and_store
from kl.records import Score, ScoreFailure

logger = logging.getLogger(__name__)

REPORTS = "reports"
_REPORT_EVERY_S = 10.0
_SETTLED_S = 10.0
_SERVER_S = 20.0
_VISIBLE_S = 20.0  # a shared disk may show a new file to other machines a while later


class WorkerStoppedError(SessionClosedError):
    """The run was stopped; the message says what goes on elsewhere of what this process began, or nothing."""


class WorkerSession:
    """A run's backend in this process.

    Parameters
    ----------
    ticket : Ticket

    Raises
    ------
    ConfigError
        If this process does not see the run's folders, or the backend cannot be built or entered.
    """

    def __init__(self, ticket: Ticket) -> None:
        config = self._config = ticket.config
        check_place(ticket)
        self.process = f"{socket.gethostname()}-{os.getpid()}-{ticket.run_id[:8]}"
        backend, options, _ = resolve_backend(config)
        self._asker = Asker(config, backend, options)
        self._stores = Stores.of(config.output_dir)
        built: Backend = backend(options, state_dir=config.output_dir / "scores")
        built.run_id = ticket.flow_run_id
        self._session = BackendSession(built).__enter__()
        self._pulse = PulseReader(config.output_dir, ticket.run_id)
        self._settled = threading.Event()
        self._closing = threading.Lock()
        self._left: str | None = None
        self._reported: tuple[float, dict[str, Any]] = (time.monotonic(), {})
        self.closed = False
        threading.Thread(target=self._watch, name="run-watch", daemon=True).start()

    def score(self, group: Group) -> GroupOutcome:
        """Ask for what the store does not hold of a group.

        Raises
        ------
        WorkerStoppedError
            If the run was stopped.
        """
        asks = list(requests_of(group, self._asker))
        begun_before = not self._begin(group)
        known = self._known(asks, begun_before)
        rest = [(prompt_id, left) for prompt_id, request in asks if (left := _without(request, known)).keys]
        if begun_before:
            logger.info("%s was begun by a worker that is gone: %d answers are kept", group.name, len(known))
        before = outcome_of_stored(known.values(), {key: request.model for _, request in asks for key in request.keys})
        if not rest:
            return before
        session = self._session
        try:
            work = score_and_store(session.backend, rest, self._stores, _uncounted, self._config.stage)
            return before + session.run(work)
        except SessionClosedError as error:
            self._settled.wait(_SETTLED_S)
            raise WorkerStoppedError(self._left or "") from error
        except (ConfigError, OSError):
            # It holds for every group: no rights, no credentials, a full disk. The others must not go on buying.
            session.cancel()
            raise

    def _begin(self, group: Group) -> bool:
        """Note that a group is at work; False if it was before in this run, by a process that did not live to tell."""
        digest = hashlib.sha256(repr((group.name, [(ask.side, ask.positions.tolist()) for ask in group.asks])).encode())
        path = self._config.output_dir / ".parts" / "begun" / digest.hexdigest()[:32]
        if is_remote(path):
            return create(path, f"{self.process} {time.time_ns()}".encode("ascii"))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _known(self, asks: list[tuple[str, ScoreRequest]], begun_before: bool) -> dict[str, Score | ScoreFailure]:
        """What is there already: the store decides what is bought."""
        keys: dict[str, set[str]] = {}
        for prompt_id, request in asks:
            keys.setdefault(prompt_id, set()).update(request.keys)
        if begun_before:
            self._stores.scores.copy_from_journals(keys)
        found: dict[str, Score | ScoreFailure] = {}
        for prompt_id, wanted in keys.items():
            self._stores.scores.look_again(prompt_id)
            if self._stores.scores.known_keys(prompt_id) & wanted:
                found |= self._stores.scores.load(prompt_id, wanted)
        return found

    def _watch(self) -> None:
        while True:
            time.sleep(self._pulse.every_s)
            order = self._pulse.look()
            if order is Order.FINISH:
                self.close()
                return
            if order is not Order.WORK and not self._settled.is_set():
                self._stop(order)
            self._report()

    def _stop(self, order: Order) -> None:
        try:
            if order is Order.INTERRUPT:
                self._left = self._session.interrupt()
            else:
                self._session.cancel()
        except Exception:
            logger.exception("the backend could not settle what it had begun")
        finally:
            self._settled.set()

    def _report(self, *, last: bool = False) -> None:
        """Leave what the run's record says of the backend's work where the run finds it, from time to time."""
        since, known = self._reported
        if not last and time.monotonic() - since < _REPORT_EVERY_S:
            return
        report = self._session.backend.report()
        self._reported = time.monotonic(), report
        if not last and report == known:
            return
        path = self._config.output_dir / ".parts" / REPORTS / f"{self.process}.json"
        try:
            write_bytes_atomic(path, json.dumps({"last": last, "report": report}).encode("utf-8"))
        except (TokenKLError, OSError) as error:
            logger.warning("the record of this worker's jobs and calls could not be written: %s", error)

    def close(self) -> None:
        """Stop what is under way, leave the backend; called again it does nothing."""
        with self._closing:
            if self.closed:
                return
            self.closed = True
            with _sessions_lock:
                for run_id in [run_id for run_id, session in _sessions.items() if session is self]:
                    del _sessions[run_id]
            self._session.cancel()
            self._settled.set()
            try:
                if self._pulse.ours:
                    self._report(last=True)
                self._session.__exit__(None, None, None)
            except Exception:
                logger.exception("the backend of a run that is over could not be closed")


def _uncounted(n: int) -> None:
    """Progress is counted where the outcomes arrive."""


def _without(request: ScoreRequest, known: Container[str]) -> ScoreRequest:
    left = [pair for pair in zip(request.positions, request.keys, strict=True) if pair[1] not in known]
    return replace(request, positions=tuple(position for position, _ in left), keys=tuple(key for _, key in left))


def check_worker(ticket: Ticket, api_url: str) -> None:
    """Prove that this process can work for a run.

    Raises
    ------
    ConfigError
        As `check_place`; or if it does not reach the Prefect server, without which no task begins.
    """
    check_place(ticket)
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=_SERVER_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # Prefect may know a certificate that this process does not
        raise ConfigError(
            f"the worker on {socket.gethostname()} does not reach the Prefect server at {api_url} ({reason}). Start "
            "one that all machines reach (prefect server start --host 0.0.0.0) and set PREFECT_API_URL to its address."
        ) from error


def check_place(ticket: Ticket) -> None:
    """Prove that this process sees the folders of the run that it works for, and has the same programs.

    Raises
    ------
    ConfigError
        If not: then nothing that it bought would be found.
    """
    check_installation(ticket)
    output = ticket.config.output_dir
    until = time.monotonic() + _VISIBLE_S
    while True:
        try:
            pulse = read_pulse(output)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the worker on {socket.gethostname()} cannot read {pulse_path(output)}: {error}"
            ) from error
        if pulse is not None and pulse.run_id == ticket.run_id:
            return
        if time.monotonic() > until or not (is_remote(output) or output.is_dir()):
            raise ConfigError(
                f"the worker on {socket.gethostname()} does not see the run's output folder {output}. Use folders that "
                "all workers share: a gs:// address, or a disk that is mounted at the same place everywhere."
            )
        time.sleep(0.5)


_sessions: dict[str, WorkerSession] = {}
_sessions_lock = threading.Lock()
_opening = threading.Lock()


def worker_session(ticket: Ticket) -> WorkerSession:
    """The one session of this process for a run; opened at the first call.

    Raises
    ------
    ConfigError
        As `WorkerSession`.
    """
    with _opening:
        with _sessions_lock:
            session = _sessions.get(ticket.run_id)
        if session is None:
            session = WorkerSession(ticket)
            with _sessions_lock:
                _sessions[ticket.run_id] = session
        return session


@atexit.register
def _close_all() -> None:
    for session in list(_sessions.values()):
        session.close()
