"""Works batch jobs off in threads: reads the input, answers row by row, writes the folder, ends as scripted."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import tempfile
import threading
import time
import traceback
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from tests.vertex_world.answering import Service
from tests.vertex_world.job_output import RowSpool
from tests.vertex_world.jobs import TERMINAL, Job
from tests.vertex_world.ledger import Ledger
from tests.vertex_world.storage import ObjectStore, StorageError, copy_stream
from tests.vertex_world.wire import ApiError, mangled_echo, now

PROVISIONING = ApiError(
    400,
    "Service agents are being provisioned (https://cloud.google.com/vertex-ai/docs/general/access-control"
    "#service-agents). Service agents are needed to read the Cloud Storage file provided. So please try again in a few "
    "minutes.",
    status="FAILED_PRECONDITION",
)
_ALWAYS_FAILED = ApiError(500)


class JobInputError(Exception):
    """An input that fails the job as a whole."""


class _Row(NamedTuple):
    line: dict[str, Any] | None  # None: missing from the output
    bought: str | None
    failed: bool


@dataclass
class JobRunner:
    """The pool of workers. A job takes ``job_seconds``: a quarter of it pending, the rest running."""

    service: Service
    objects: ObjectStore
    ledger: Ledger
    job_seconds: float = 0.2
    cancel_seconds: float = 0.1
    max_rows: int = 200_000
    max_bytes: int = 1_000_000_000
    max_running: int = 64
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._held = 0  # jobs that a worker holds or that wait for one
        self._pool = ThreadPoolExecutor(self.max_running, thread_name_prefix="vertex-job")

    def start(self, job: Job) -> None:
        """Give a job to the next free worker; until there is one it is queued."""
        with self.lock:
            self._held += 1
            if self._held > self.max_running:
                job.state = "JOB_STATE_QUEUED"
        self._pool.submit(self._guarded, self._run, job)

    def finish_cancel(self, job: Job) -> None:
        self._pool.submit(self._guarded, self._cancel_parked, job)

    def stop(self) -> None:
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _guarded(self, work: Any, job: Job) -> None:
        try:
            work(job)
        except Exception:  # noqa: BLE001 - kept in the ledger, which fails the test
            self.ledger.note_crash(traceback.format_exc())
            self._end(job, "JOB_STATE_FAILED", error={"code": 13, "message": "The stand-in crashed."})

    def _run(self, job: Job) -> None:
        try:
            self._run_held(job)
        finally:
            with self.lock:
                self._held -= 1

    def _run_held(self, job: Job) -> None:
        spool = RowSpool()
        with self.lock:
            if job.state == "JOB_STATE_QUEUED":
                job.state, job.update_time = "JOB_STATE_PENDING", now()
        self._pause(job, time.monotonic(), 0.25)
        if job.outcome == "NEVER_STARTS" and not job.cancelled.is_set():
            self._park(job, "JOB_STATE_PENDING", spool)
            return
        if job.cancelled.is_set():
            self._cancelled(job, spool)
            return
        with self.lock:
            job.state, job.start_time, job.update_time = "JOB_STATE_RUNNING", now(), now()
        try:
            with self._input(job) as (file, lines):
                self._work_off(job, file, lines, spool)
        except JobInputError as error:
            spool.close()
            self.ledger.note_refusal(f"job {job.id}", str(error), job.body, malformed=True)
            self._end(job, "JOB_STATE_FAILED", error={"code": 3, "message": str(error)})
            return
        self._conclude(job, spool)

    @contextlib.contextmanager
    def _input(self, job: Job) -> Generator[tuple[IO[bytes], int]]:
        """The input on disk, and its number of lines; over the limits it fails the job before a row is bought."""
        with tempfile.TemporaryFile() as file:
            try:
                for uri in self._expand(job.input_uris):
                    with self.objects.reading(uri) as stream:
                        copy_stream(stream, file, self.max_bytes)
                    if file.tell() > self.max_bytes:
                        raise JobInputError(f"The input file {uri} is larger than the limit of {self.max_bytes} bytes.")
                    if file.tell() and not _ends_line(file):
                        file.write(b"\n")
            except StorageError as error:
                raise JobInputError(str(error)) from error
            file.seek(0)
            lines = sum(1 for line in file if line.strip())
            if not lines:
                raise JobInputError("The input file contains no requests.")
            if lines > self.max_rows:
                raise JobInputError(f"The input has {lines} requests; the limit is {self.max_rows} requests per job.")
            with self.lock:
                job.rows_in = lines
            file.seek(0)
            yield file, lines

    def _expand(self, uris: list[str]) -> list[str]:
        found: list[str] = []
        for uri in uris:
            if "*" not in uri:
                found.append(uri)
                continue
            matches = [name for name in self.objects.list(uri.partition("*")[0]) if fnmatch.fnmatchcase(name, uri)]
            if not matches:
                raise JobInputError(f"No file matches {uri}.")
            found += matches
        return found

    def _work_off(self, job: Job, file: IO[bytes], lines: int, spool: RowSpool) -> None:
        wanted = math.ceil(lines * job.fraction)
        begun = time.monotonic()
        numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for done, (number, line) in enumerate(numbered):
            if job.cancelled.is_set() or self._stopping.is_set() or done >= wanted:
                return
            row = self._row(job, number, line)
            if row.line is not None:
                spool.add(row.line, row.bought)
            with self.lock:
                job.rows_finished += row.line is not None
                job.rows_failed += row.failed
                job.rows_missing += row.line is None
            self._pause(job, begun, 0.75 * (done + 1) / lines)

    def _pause(self, job: Job, begun: float, share: float) -> None:
        """Wait until a share of the time that a job takes, which may change meanwhile, has passed since ``begun``."""
        while not (job.cancelled.is_set() or self._stopping.is_set()):
            left = begun + self.job_seconds * share - time.monotonic()
            if left <= 0.005:
                return
            job.cancelled.wait(min(left, 0.05))

    def _row(self, job: Job, number: int, raw: bytes) -> _Row:
        line = _parse_line(raw, number)
        echo = mangled_echo(line["request"]) if self.service.faults.mangle_echo else line["request"]
        extra = {} if self.service.faults.drop_keys else {key: line[key] for key in line if key != "request"}
        stamp = now().isoformat(timespec="milliseconds")
        try:
            answer = self._answer(job, number, line["request"])
        except ApiError as error:
            shapes: dict[str, dict[str, Any]] = {"absent": {}, "null": {"response": None}, "empty": {"response": {}}}
            failed = shapes[self.service.faults.failed_response]
            fields = {"status": error.row_status(), "processed_time": stamp, "request": echo, **failed}
            return _Row({**extra, **fields}, None, True)
        if self.service.faults.hits(self.service.faults.missing_rate, "missing", answer.request_hash, job.index):
            return _Row(None, None, False)
        fields = {"status": "", "processed_time": stamp, "request": echo, "response": answer.response}
        return _Row({**extra, **fields}, answer.request_hash, False)

    def _answer(self, job: Job, number: int, body: Any) -> Any:
        faults = self.service.faults
        if faults.provision_first_job and job.index == 0:
            faults.count("provision_first_job")
            raise PROVISIONING
        try:
            spec = self.service.resolve(job.model, job.location, job.model)
            request = self.service.parse(spec, job.model, body, "batch")
        except ApiError as error:
            where = f"job {job.id} line {number}"
            self.ledger.note_refusal(where, error.message, body, malformed=error.malformed)
            raise
        if job.outcome == "SUCCEEDED_ALL_ROWS_FAILED":
            raise _ALWAYS_FAILED
        return self.service.answer(spec, job.model, request, "batch")

    def _conclude(self, job: Job, spool: RowSpool) -> None:
        if job.cancelled.is_set():
            self._cancelled(job, spool)
        elif job.outcome == "NEVER":
            self._park(job, "JOB_STATE_RUNNING", spool)
        else:
            state = "SUCCEEDED" if job.outcome == "SUCCEEDED_ALL_ROWS_FAILED" else job.outcome
            state = state if state.startswith("JOB_STATE_") else f"JOB_STATE_{state}"
            if state in TERMINAL:
                self._write(job, spool, state)
            else:
                self._park(job, state, spool)

    def _park(self, job: Job, state: str, spool: RowSpool) -> None:
        with self.lock:
            if not job.cancelled.is_set():
                job.state, job.update_time, job.parked = state, now(), spool
                return
        self._cancelled(job, spool)

    def _cancel_parked(self, job: Job) -> None:
        with self.lock:
            spool, job.parked = job.parked, None
        if spool is not None:
            self._cancelled(job, spool)

    def _cancelled(self, job: Job, spool: RowSpool) -> None:
        self._stopping.wait(self.cancel_seconds)
        self._write(job, spool, "JOB_STATE_CANCELLED")

    def _write(self, job: Job, spool: RowSpool, state: str) -> None:
        """End the job and write its folder: usually the files come first, with `output_delay_s` the state does."""
        faults = self.service.faults
        stamp = f"{now():%Y-%m-%dT%H:%M:%S.%f}"
        folder = f"{job.output_prefix.rstrip('/')}/prediction-model-{stamp}{job.index:03d}Z"
        try:
            if faults.output_delay_s:
                faults.count("output_delay")
                self._end(job, state, folder if len(spool) else None, settled=False)
                self._stopping.wait(faults.output_delay_s)
            if len(spool):
                self.ledger.note_bought(spool.write(self.objects, folder, faults, job.id))
        except StorageError as error:
            self._end(job, "JOB_STATE_FAILED", error={"code": error.code, "message": str(error)})
        else:
            self._end(job, state, folder if len(spool) else None)
        finally:
            spool.close()

    def _end(
        self,
        job: Job,
        state: str,
        folder: str | None = None,
        *,
        error: dict[str, Any] | None = None,
        settled: bool = True,
    ) -> None:
        with self.lock:
            job.error = error or job.error or self._error(state, job)
            job.output_directory = folder
            job.end_time = job.end_time or now()
            job.state, job.update_time, job.settled = state, now(), settled

    def _error(self, state: str, job: Job) -> dict[str, Any] | None:
        errors = {
            "JOB_STATE_FAILED": (13, "INTERNAL"),
            "JOB_STATE_EXPIRED": (4, "The job did not finish in 24 hours and expired."),
            "JOB_STATE_CANCELLED": (1, "CANCELED"),
        }
        if state not in errors:
            return None
        code, message = errors[state]
        error: dict[str, Any] = {"code": code, "message": message}
        if self.service.faults.job_error_details:
            self.service.faults.count("job_error_details")
            debug = "type.googleapis.com/google.rpc.DebugInfo"
            error["details"] = [{"@type": debug, "detail": f"job {job.id} ended as {state}"}]
        return error


def _parse_line(raw: bytes, number: int) -> dict[str, Any]:
    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        line = json.loads(raw, parse_constant=no_constant)
    except ValueError as error:
        raise JobInputError(f"Line {number} of the input is not valid JSON: {error}.") from error
    if not isinstance(line, dict) or not isinstance(line.get("request"), dict):
        raise JobInputError(f"Line {number} of the input has no field 'request'.")
    return line


def _ends_line(file: IO[bytes]) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"
