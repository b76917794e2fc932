"""Files on local disks and in buckets: read, written whole or not at all, listed.

Each function is one request or two, and none depends on a cached listing: other processes write too.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from backends.errors import ConfigError
from backends.storage.locations import Location, as_location, is_google, is_remote, is_within, resolved

__all__ = [
    "PARALLEL",
    "Location",
    "StoredFile",
    "as_location",
    "create",
    "download",
    "exists",
    "files_in",
    "in_order",
    "in_parallel",
    "is_remote",
    "is_within",
    "kept_copy",
    "list_remote",
    "local_copies",
    "local_copy",
    "no_bucket",
    "publish",
    "read_bytes",
    "remove",
    "remove_folder",
    "resolved",
    "scratch_folder",
    "write_bytes_atomic",
]

S = TypeVar("S")
T = TypeVar("T")

PARALLEL = 16

_systems: dict[tuple[int, str, str], Any] = {}
_systems_lock = threading.Lock()
_kept: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as a listing shows it; ``version`` of a remote one changes whenever its content may have."""

    path: Path
    size: int
    version: str


@contextmanager
def local_copy(path: Path) -> Generator[Path]:
    """A file to read on a local disk: itself, or a download that is removed afterwards.

    Raises
    ------
    OSError
        `FileNotFoundError` if there is none.
    """
    if not is_remote(path):
        yield path
        return
    with scratch_folder() as scratch:
        copy = scratch / f"copy{path.suffix}"
        download(path, copy)
        yield copy


def kept_copy(path: Path) -> Path:
    """A file to read on a local disk until this process ends: itself, or a download."""
    if not is_remote(path):
        return path
    with _systems_lock:
        if not _kept:
            _kept.append(tempfile.TemporaryDirectory(prefix="tokenkl-", ignore_cleanup_errors=True))
        copy = Path(_kept[0].name) / f"{uuid.uuid4().hex}{path.suffix}"
    download(path, copy)
    return copy


@contextmanager
def scratch_folder() -> Generator[Path]:
    """A local folder for files on their way, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="tokenkl-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def download(path: Path, target: Path) -> None:
    """Copy a remote file to a local one."""
    # In one stream, gcsfs does not ask for the size first, which would make three requests of one.
    one_stream = {"concurrency": 1} if is_google(path) else {}
    with _translated("read", path):
        _system(path).get_file(_key(path), str(target), **one_stream)


def local_copies(paths: Iterable[Path]) -> Generator[tuple[Path, Path]]:
    """Each path with a file to read on a local disk, in order; remote ones are fetched some ahead, kept until the next.

    Raises
    ------
    OSError
        When it comes to a file that is not there.
    """
    paths = list(paths)
    if not any(is_remote(path) for path in paths):
        yield from zip(paths, paths, strict=True)
        return
    with scratch_folder() as scratch, ThreadPoolExecutor(PARALLEL) as pool:

        def fetch(index: int, path: Path) -> Path:
            if not is_remote(path):
                return path
            copy = scratch / f"{index}{path.suffix}"
            download(path, copy)
            return copy

        for path, copy in in_order(pool, fetch, paths):
            yield path, copy
            if copy is not path:
                copy.unlink()


def in_order(pool: ThreadPoolExecutor, function: Callable[[int, S], T], items: Iterable[S]) -> Generator[tuple[S, T]]:
    """What a function of index and item gives, in the order of the items, worked out a bounded number ahead."""
    ahead: deque[tuple[S, Future[T]]] = deque()
    try:
        for index, item in enumerate(items):
            ahead.append((item, pool.submit(function, index, item)))
            if len(ahead) > PARALLEL:
                first, result = ahead.popleft()
                yield first, result.result()
        while ahead:
            first, result = ahead.popleft()
            yield first, result.result()
    finally:
        for _, result in ahead:
            result.cancel()


def read_bytes(path: Path) -> bytes:
    """The content of a file, in one request."""
    if not is_remote(path):
        return path.read_bytes()
    with _translated("read", path):
        return _system(path).cat_file(_key(path))


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its folder is made.

    Raises
    ------
    ConfigError
        If the bucket does not exist or refuses.
    OSError
        For any other fault, after several tries where it may pass.
    """
    if is_remote(path):
        with _translated("write", path):
            _system(path).pipe_file(_key(path), data, **_checked(path))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def publish(local: Path, target: Path) -> None:
    """Move a finished local file to its place, whole or not at all; it is gone from ``local`` afterwards.

    Raises as `write_bytes_atomic` does; then ``local`` is still there.
    """
    if is_remote(target):
        local.stat()
        with _translated("write", target):
            _system(target).put_file(str(local), _key(target), **_checked(target))
        local.unlink()
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    _sync(local)
    try:
        os.replace(local, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _move_between_disks(local, target)


def _move_between_disks(local: Path, target: Path) -> None:
    temporary = _temporary(target)
    try:
        shutil.copyfile(local, temporary)
        _sync(temporary)
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    local.unlink()


def create(path: Path, data: bytes) -> bool:
    """Write a remote file that must not exist yet; False if it does. Of several who try at once, one succeeds."""
    try:
        with _translated("write", path):
            _system(path).pipe_file(_key(path), data, mode="create")
    except FileExistsError:
        return _came_from_here(path, data)
    return True


def _came_from_here(path: Path, data: bytes) -> bool:
    # A create whose answer was lost is sent again, and then finds its own file.
    try:
        return read_bytes(path) == data
    except FileNotFoundError:
        return False


def exists(path: Path) -> bool:
    """Whether a file is there, or a folder (a remote one: with a file in it)."""
    if not is_remote(path):
        return path.exists()
    with _translated("look for", path):
        return bool(_system(path).exists(_key(path)))


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    with suppress(FileNotFoundError), _translated("remove", path):
        _system(path).rm_file(_key(path))


def remove_folder(folder: Path) -> None:
    """Remove a folder and all that is in it, if it is there; local leftovers that cannot be removed are left."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    in_parallel(remove, [file.path for file in list_remote(folder)])


def list_remote(folder: Path, *, recursive: bool = True) -> list[StoredFile]:
    """The files in a remote folder, or also below it, sorted by path; none where nothing is.

    Raises
    ------
    ConfigError
        If the bucket does not exist or refuses.
    """
    start = _key(folder).rstrip("/") + "/"
    entries = None if recursive else _entries(folder)
    files = [
        StoredFile(folder / str(info["name"]).removeprefix(start), int(info["size"] or 0), _version(info))
        for info in (_tree(folder) if entries is None else entries)
        if str(info["name"]).startswith(start) and not str(info["name"]).endswith("/") and info["type"] == "file"
    ]
    return sorted(files, key=lambda file: file.path.as_posix())


def _tree(folder: Path) -> Iterable[dict[str, Any]]:
    try:
        with _translated("list", folder):
            return _system(folder).find(_key(folder), detail=True).values()
    except FileNotFoundError as error:
        if is_google(folder):
            raise no_bucket(folder) from error
        return []


def _entries(folder: Path) -> list[dict[str, Any]] | None:
    """The listing of one level; None where nothing is, which may be for want of the bucket."""
    try:
        with _translated("list", folder):
            return _system(folder).ls(_key(folder), detail=True)
    except FileNotFoundError:
        return None


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files in a folder, local or remote, whose names end so, sorted; none where there is no folder."""
    if not is_remote(folder):
        return sorted(folder.glob(f"*{suffix}"))
    return [file.path for file in list_remote(folder, recursive=False) if file.path.name.endswith(suffix)]


def no_bucket(path: Path) -> ConfigError:
    """The error for an address whose bucket is not there."""
    bucket = str(path).partition("://")[2].partition("/")[0]
    return ConfigError(f"{path}: the bucket {bucket!r} does not exist or is not visible to these credentials.")


def _version(info: dict[str, Any]) -> str:
    values = (info.get(name) for name in ("generation", "etag", "ETag", "created", "mtime", "LastModified", "size"))
    return "/".join(str(value) for value in values if value is not None)


def in_parallel(function: Callable[[Path], None], paths: Sequence[Path]) -> None:
    """Call a function for each path, several at a time; the first error is raised when all have ended."""
    if len(paths) < 2:
        for path in paths:
            function(path)
        return
    with ThreadPoolExecutor(PARALLEL) as pool:
        for done in [pool.submit(function, path) for path in paths]:
            done.result()


def _system(path: Path) -> Any:
    """The one file system object of this process for a storage: it is safe in threads, and keeps its connections."""
    remote: Any = path
    name = (os.getpid(), str(remote.protocol), repr(sorted(remote.storage_options.items())))
    with _systems_lock:
        if name not in _systems:
            _systems[name] = fsspec.filesystem(remote.protocol, skip_instance_cache=True, **remote.storage_options)
        return _systems[name]


def _key(path: Path) -> str:
    remote: Any = path
    return str(remote.path)


def _checked(path: Path) -> dict[str, Any]:
    """Google returns the checksum of what arrived: it is compared."""
    return {"consistency": "md5"} if is_google(path) else {}


@contextmanager
def _translated(action: str, path: Path) -> Generator[None]:
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
        if code == 403 or words.startswith("Forbidden"):
            raise _refused(action, path, error) from error
        if code == 401 or type(error).__name__ == "DefaultCredentialsError":
            why = " ".join(str(error.__cause__ or words).split())
            login = "Log in: gcloud auth application-default login."
            raise ConfigError(f"cannot {action} {path}: no valid credentials ({why}). {login}") from error
        if isinstance(error, OSError) or kind in ("gcsfs", "google", "requests", "aiohttp", "botocore", "azure"):
            raise OSError(f"cannot {action} {path}: {words}") from error
        raise


def _refused(action: str, path: Path, error: Exception) -> ConfigError:
    words = " ".join(str(error).split())
    grant = " Grant roles/storage.objectAdmin on the bucket." if str(path).startswith(("gs:", "gcs:")) else ""
    return ConfigError(f"cannot {action} {path}: the storage refuses ({words}).{grant}")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
