"""What can go wrong, in all rooms: the whole tree. What is caught in one place only is defined there.

    TokenKLError
    ├── ConfigError (also ValueError)      the user's mistake: exit code 2, one line
    │   ├── UnknownBackendError
    │   ├── DuplicateBackendError
    │   ├── MissingDependencyError
    │   ├── FolderInUseError               another run is at work (flows.folder.lock)
    │   └── LeaseLostError                 a lock in a bucket could not be kept (backends.storage.lease)
    ├── BackendError                       the service or the model
    │   ├── RetryableBackendError          may succeed when repeated; `retry_after_s` if the service said
    │   ├── ModelNotUsableError (also ConfigError)  exists not, gives no logprobs, or refuses a prefill
    │   ├── StatusError                    a refusal that repeating does not mend (backends.service.retry)
    │   ├── AskingStoppedError             no more is asked in this run (backends.service.breaker)
    │   ├── DailyQuotaError                final for today (backends.vertex.service.retry)
    │   ├── JobGivenUpError                a job that is not waited for any more (backends.vertex.jobs.rounds)
    │   ├── ListError                      a list that is no distribution (backends.openai_compatible.answers)
    │   ├── OtherContentError              a name in the bucket is taken (backends.vertex.jobs.bucket)
    │   └── PromptRefusedError             a local model has no form for a prompt (backends.local.tokenizer)
    ├── LeaseHeldError                     another process has the lock (backends.storage.lease)
    ├── SessionClosedError                 the run was stopped while work was under way (backends.session)
    ├── NoRoomError                        a disk takes no more (flows.folder.room)
    ├── InterruptedRunError                stopped by the user (flows.runtime.interrupts)
    └── DriftedRunError                    the distance has changed (flows.watch.ending)

Messages say what failed, the value seen and what to do. They never hold a credential or the text of a prompt.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class TokenKLError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(TokenKLError, ValueError):
    """A setting or an input that the user must change."""


class UnknownBackendError(ConfigError):
    """A backend name that nothing registered."""


class DuplicateBackendError(ConfigError):
    """Two plugins registered one backend name."""


class MissingDependencyError(ConfigError):
    """A package, or a model file, that an optional part needs is not installed."""


class BackendError(TokenKLError):
    """The service or the model did not do what was asked.

    Parameters
    ----------
    message : str
        What failed, the value seen, what to do.
    backend, model, request_key : str, optional
        Where it happened.
    """

    def __init__(
        self,
        message: str,
        *,
        backend: str | None = None,
        model: str | None = None,
        request_key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.backend = backend
        self.model = model
        self.request_key = request_key

    def __reduce__(self) -> tuple[Any, ...]:
        # Prefect carries errors between processes; keyword-only arguments do not survive the default pickle.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(kind: type[BackendError], args: tuple[Any, ...], state: dict[str, Any]) -> BackendError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class RetryableBackendError(BackendError):
    """A fault that may pass: throttling, a broken connection, a 5xx; ``status`` is the HTTP status if there is one."""

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, status: int | None = None, **where: str | None
    ) -> None:
        super().__init__(message, **where)
        self.retry_after_s = retry_after_s
        self.status = status


class ModelNotUsableError(BackendError, ConfigError):
    """The model does not exist, gives no log-probabilities or does not continue a prefill.

    ``permanent`` is true where that is proven, and not only so just now: no rights, say, or answers that were empty.
    """

    def __init__(self, message: str, *, permanent: bool = False, **where: str | None) -> None:
        super().__init__(message, **where)
        self.permanent = permanent


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message on a misspelt name: `` Did you mean 'local'?``, or nothing if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
