"""Errors of a storage's client: told apart by codes, and by words only where the client itself gives nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from gcsfs.retry import HttpError, validate_response

from backends.errors import ConfigError
from backends.storage.remote import translated

PLACE = Path("gs:/Forbidden-invalid-evals/scores")


def as_told(error: Exception) -> Exception:
    with pytest.raises(Exception) as caught, translated("read", PLACE):
        raise error
    return caught.value


def of_status(status: int, message: str) -> Exception:
    """What gcsfs makes of an answer."""
    with pytest.raises(Exception) as caught:
        validate_response(
            status, f'{{"error": {{"code": {status}, "message": "{message}"}}}}', "b/Forbidden-invalid-evals", []
        )
    return caught.value


@pytest.mark.parametrize(
    "error", [of_status(403, "no"), HttpError({"code": 403, "message": "no"}), PermissionError("no")], ids=repr
)
def test_a_refusal_is_the_users_to_mend(error: Exception) -> None:
    told = as_told(error)
    assert isinstance(told, ConfigError)
    assert "the storage refuses" in str(told)


QUOTING = [
    of_status(503, "Forbidden-evals is busy"),
    of_status(429, "invalid-evals has too many requests"),
    of_status(400, "Forbidden-evals: invalid"),
    HttpError({"code": 500, "message": "Forbidden-evals"}),
    OSError(5, "Forbidden: evals"),
]


@pytest.mark.parametrize("error", QUOTING, ids=repr)
def test_a_name_that_a_message_quotes_is_no_refusal(error: Exception) -> None:
    told = as_told(error)
    assert type(told) is OSError
    assert "refuses" not in str(told)
    assert "\n" not in str(told)
