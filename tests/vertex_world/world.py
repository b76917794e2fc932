"""The world itself: everything started together, and what tests ask of it afterwards."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.vertex_world.answering import Service
from tests.vertex_world.credentials import ServiceAccount
from tests.vertex_world.faults import Faults
from tests.vertex_world.job_runner import JobRunner
from tests.vertex_world.jobs import Job, JobStore
from tests.vertex_world.language_model import LanguageModel, SyntheticModel, exact_kl
from tests.vertex_world.ledger import Ledger, OnlineCall, Refusal, RequestLine
from tests.vertex_world.models import ModelSpec
from tests.vertex_world.router import Router
from tests.vertex_world.sampling import write_response_files
from tests.vertex_world.server import WorldServer
from tests.vertex_world.storage import GcsServer, ObjectStore, StorageBackend
from tests.vertex_world.storage_proxy import StorageProxy


class VertexWorld:
    """A local Vertex AI with Cloud Storage, for the real clients: a context manager.

    Parameters
    ----------
    language_model : LanguageModel, optional
        What answers; its exact distribution is known. Default: a `SyntheticModel` in which gemini-2.5-flash differs
        from gemini-2.5-flash-lite by noise of 0.3 nats.
    models : mapping of name to ModelSpec, optional
        Models beside, or in place of, those of `models.MODELS`.
    faults : Faults, optional
        May be changed at any time, as `world.faults`.
    job_seconds, cancel_seconds : float
        How long a batch job takes, and how long it is CANCELLING.
    max_rows, max_bytes, max_running : int
        Limits of a job's input, and how many jobs run at a time.
    reshape_logprobs : bool
        Whether temperature, topP and topK change the log-probabilities that are reported.
    port : int
        0 takes a free one.
    storage_backend : {"memory", "filesystem"}
        Where fake-gcs-server keeps objects.
    """

    def __init__(
        self,
        *,
        project: str = "stand-in-project",
        location: str = "us-central1",
        language_model: LanguageModel | None = None,
        models: Mapping[str, ModelSpec] | None = None,
        faults: Faults | None = None,
        job_seconds: float = 0.2,
        cancel_seconds: float = 0.1,
        max_rows: int = 200_000,
        max_bytes: int = 1_000_000_000,
        max_running: int = 64,
        reshape_logprobs: bool = True,
        token_lifetime_s: int = 3600,
        port: int = 0,
        storage_backend: StorageBackend = "memory",
    ) -> None:
        self.project = project
        self.location = location
        self.language_model = language_model or SyntheticModel(noise={"gemini-2.5-flash": 0.3})
        self.faults = faults or Faults()
        self.ledger = Ledger()
        self.api_key = f"AIza{secrets.token_hex(8)}"
        self._server = WorldServer(port, self.faults, self.ledger)
        self.url = self._server.url
        self._gcs = GcsServer(self.url, storage_backend)
        self.objects = ObjectStore(self._gcs)
        self._account = ServiceAccount(project, self.url, token_lifetime_s)
        self.service = Service(self.language_model, dict(models or {}), self.faults, self.ledger, reshape_logprobs)
        lock = threading.RLock()
        self._runner = JobRunner(
            self.service,
            self.objects,
            self.ledger,
            job_seconds=job_seconds,
            cancel_seconds=cancel_seconds,
            max_rows=max_rows,
            max_bytes=max_bytes,
            max_running=max_running,
            lock=lock,
        )
        self._jobs = JobStore(self.faults, self._runner.start, self._runner.finish_cancel, lock)
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="vertex-world-")
        self._account.write_key_file(self._key_file)
        self._gcs.start()
        storage = StorageProxy(self._gcs, self.objects)
        self._server.start(
            Router(self.project, self.service, self._jobs, self._account, storage, self.ledger, self.api_key)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.stop()
        self._server.stop()
        self._gcs.stop()
        assert self._directory is not None
        self._directory.cleanup()
        if self.ledger.crashes and kind is None:
            raise RuntimeError("the stand-in itself crashed:\n" + "\n".join(self.ledger.crashes))

    @property
    def _key_file(self) -> Path:
        assert self._directory is not None, "enter the world first"
        return Path(self._directory.name, "service-account.json")

    def environment(self) -> dict[str, str]:
        """What a process needs in order to live in this world, and nothing else."""
        return {
            "GOOGLE_APPLICATION_CREDENTIALS": str(self._key_file),
            "GOOGLE_VERTEX_BASE_URL": self.url,
            "STORAGE_EMULATOR_HOST": self.url,
            "GOOGLE_CLOUD_PROJECT": self.project,
            "GOOGLE_CLOUD_LOCATION": self.location,
            "GOOGLE_GENAI_USE_VERTEXAI": "true",
        }

    @property
    def jobs(self) -> list[Job]:
        """Copies of all jobs, deleted ones included, in order of creation."""
        return self._jobs.snapshot()

    def hurry(self, job_seconds: float = 0.2) -> None:
        """From now on jobs take so long, those that run included."""
        self._runner.job_seconds = job_seconds

    def wait_for_jobs(self, timeout_s: float = 30) -> list[Job]:
        """Wait until nothing more will happen to any job; TimeoutError names those that are left."""
        deadline = time.monotonic() + timeout_s
        while left := [job for job in self.jobs if not job.settled]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"unfinished jobs: {[(job.display_name, job.state) for job in left]}")
            time.sleep(0.01)
        return self.jobs

    def exact_kl(
        self,
        model_p: str,
        model_q: str,
        prompt: str | Sequence[Mapping[str, str]],
        prefix: str = "",
        *,
        system: str | None = None,
    ) -> float:
        """KL(P‖Q) of two of the world's models at one context, over the whole vocabulary, in nats."""
        return exact_kl(self.language_model, model_p, model_q, prompt, prefix, system=system)

    def write_responses(
        self,
        directory: Path,
        model_name: str,
        prompts: Sequence[str | Sequence[Mapping[str, str]]],
        n: int = 1,
        max_tokens: int = 8,
        seed: int = 0,
        **options: Any,
    ) -> list[Path]:
        """Write response files of one of the world's models, as `sampling.write_response_files` does."""
        return write_response_files(directory, self.language_model, model_name, prompts, n, max_tokens, seed, **options)

    def expire_tokens(self) -> None:
        """All access tokens issued so far stop working."""
        self._account.expire_tokens()

    @property
    def rejected(self) -> list[Refusal]:
        return self.ledger.rejected

    @property
    def refused(self) -> list[Refusal]:
        return self.ledger.refused

    @property
    def rows_bought(self) -> Counter[str]:
        return self.ledger.rows_bought

    @property
    def online_calls(self) -> list[OnlineCall]:
        return self.ledger.online_calls

    @property
    def max_online_in_flight(self) -> int:
        return self.ledger.max_online_in_flight

    @property
    def token_requests(self) -> int:
        return self.ledger.token_requests

    @property
    def requests(self) -> list[RequestLine]:
        return self.ledger.requests
