"""The storage's client, one a process and storage, and its errors in the terms of this project."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from backends.errors import ConfigError
from backends.storage.locations import is_google

_systems: dict[tuple[int, str, str], Any] = {}
_systems_lock = threading.Lock()


def system_of(path: Path) -> Any:
    """The one file system object of this process for a storage: it is safe in threads, and keeps its connections."""
    remote: Any = path
    name = (os.getpid(), str(remote.protocol), repr(sorted(remote.storage_options.items())))
    with _systems_lock:
        if name not in _systems:
            _systems[name] = fsspec.filesystem(remote.protocol, skip_instance_cache=True, **remote.storage_options)
        return _systems[name]


def key_of(path: Path) -> str:
    """What the file system calls a path."""
    remote: Any = path
    return str(remote.path)


def checked(path: Path) -> dict[str, Any]:
    """Google returns the checksum of what arrived: it is compared."""
    return {"consistency": "md5"} if is_google(path) else {}


def version_of(info: dict[str, Any]) -> str:
    """What changes with the content of a file, from its entry in a listing."""
    values = (info.get(name) for name in ("generation", "etag", "ETag", "created", "mtime", "LastModified", "size"))
    return "/".join(str(value) for value in values if value is not None)


def no_bucket(path: Path) -> ConfigError:
    """The error for an address whose bucket is not there."""
    bucket = str(path).partition("://")[2].partition("/")[0]
    return ConfigError(f"{path}: the bucket {bucket!r} does not exist or is not visible to these credentials.")


@contextmanager
def translated(action: str, path: Path) -> Generator[None]:
    """Errors of the storage's client in the terms of this project, a line each."""
    try:
        yield
    except FileNotFoundError as error:
        if action == "write":  # what is written needs no folder: only the bucket can be missing
            raise no_bucket(path) from error
        raise
    except (ConfigError, FileExistsError):
        raise
    except PermissionError as error:
        raise _refused(action, path, error) from error
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        kind, code = type(error).__module__.partition(".")[0], getattr(error, "code", None)
        if code == 403 or _is_from_gcsfs(error, "Forbidden: "):
            raise _refused(action, path, error) from error
        if code == 401 or type(error).__name__ == "DefaultCredentialsError":
            why = " ".join(str(error.__cause__ or words).split())
            login = "Log in: gcloud auth application-default login."
            raise ConfigError(f"cannot {action} {path}: no valid credentials ({why}). {login}") from error
        of_client = kind in ("gcsfs", "google", "requests", "aiohttp", "botocore", "azure")
        if isinstance(error, OSError) or of_client or _is_from_gcsfs(error, "Bad Request: "):
            raise OSError(f"cannot {action} {path}: {words}") from error
        raise


def _is_from_gcsfs(error: Exception, start: str) -> bool:
    """Whether this is an error that gcsfs makes of a status, without a field for it: its own words are all it gives."""
    return type(error) in (OSError, ValueError) and len(error.args) == 1 and str(error).startswith(start)


def _refused(action: str, path: Path, error: Exception) -> ConfigError:
    words = " ".join(str(error).split())
    grant = " Grant roles/storage.objectAdmin on the bucket." if str(path).startswith(("gs:", "gcs:")) else ""
    return ConfigError(f"cannot {action} {path}: the storage refuses ({words}).{grant}")
