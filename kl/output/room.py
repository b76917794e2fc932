"""A disk that takes no more, told by the errors of those who write to it."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_MORE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # Polars has the number in its text alone
_PROBE_BYTES = 65_536


def refusal_of(error: BaseException | None) -> int | None:
    """The number of the error by which a disk refuses every write: full, over quota, read-only; None of any other."""
    while error is not None:
        found = _OF_RUST.search(str(error)) if not isinstance(error, OSError) or error.errno is None else None
        number = int(found[1]) if found is not None else getattr(error, "errno", None)
        if number in _NO_MORE:
            return number
        error = error.__cause__
    return None


@contextmanager
def named_when_refused(path: Path) -> Generator[None]:
    """A disk's refusal as an `OSError` that says which file it was about."""
    try:
        yield
    except Exception as error:
        number = refusal_of(error)
        if number is None and not isinstance(error, OSError):
            number = _refused_now(path)  # a writer may hide it, as Polars does where the end of a table is refused
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _refused_now(path: Path) -> int | None:
    probe = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        probe.write_bytes(b"\1" * _PROBE_BYTES)
    except OSError as error:
        return refusal_of(error)
    finally:
        with suppress(OSError):
            probe.unlink()
    return None
