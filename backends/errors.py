"""What can go wrong with a backend.

    TokenKLError
    ├── ConfigError (also ValueError)      the user's mistake: exit code 2, one line
    │   ├── UnknownBackendError
    │   ├── DuplicateBackendError
    │   └── MissingDependencyError
    └── BackendError                       the service or the model
        ├── RetryableBackendError          may succeed when repeated; `retry_after_s` if the service said
        ├── ModelNotUsableError (also ConfigError)  exists not, gives no logprobs, or refuses a prefill
        ├── ResponseShapeError             an answer that cannot be read
        └── BatchFailedError               a batch job that ended without its rows

Messages say what failed, the value seen and what to do. They never hold a credential or the text of a prompt.
"""

from __future__ import annotations

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
    """The model does not exist, gives no log-probabilities or does not continue a prefill."""


class ResponseShapeError(BackendError):
    """An answer in a form that is not understood."""


class BatchFailedError(BackendError):
    """A batch job that ended in failure, with the service's own words."""
