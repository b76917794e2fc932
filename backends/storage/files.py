"""Files on local disks and in buckets: read, written whole or not at all, listed.

Each function is one request or two, and none depends on a cached listing: other processes write too.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.storage.locations import is_google, is_remote
from backends.storage.parallel import in_parallel
from backends.storage.remote import checked, key_of, no_bucket, system_of, translated, version_of
from kl.output.room import named_when_refused


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as a listing shows it; ``version`` of a remote one changes whenever its content may have."""

    path: Path
    size: int
    version: str


def read_bytes(path: Path) -> bytes:
    """The content of a file, in one request."""
    if not is_remote(path):
        return path.read_bytes()
    with translated("read", path):
        return system_of(path).cat_file(key_of(path))


def download(path: Path, target: Path) -> None:
    """Copy a remote file to a local one."""
    # In one stream, gcsfs does not ask for the size first, which would make three requests of one.
    one_stream = {"concurrency": 1} if is_google(path) else {}
    with translated("read", path):
        system_of(path).get_file(key_of(path), str(target), **one_stream)


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
        with translated("write", path):
            system_of(path).pipe_file(key_of(path), data, **checked(path))
        return
    temporary = _temporary(path)
    try:
        with named_when_refused(path):
            path.parent.mkdir(parents=True, exist_ok=True)
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
        with translated("write", target):
            system_of(target).put_file(str(local), key_of(target), **checked(target))
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
        with named_when_refused(target):
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
        with translated("write", path):
            system_of(path).pipe_file(key_of(path), data, mode="create")
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
    with translated("look for", path):
        return bool(system_of(path).exists(key_of(path)))


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    with suppress(FileNotFoundError), translated("remove", path):
        system_of(path).rm_file(key_of(path))


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
    start = key_of(folder).rstrip("/") + "/"
    entries = None if recursive else _entries(folder)
    files = [
        StoredFile(folder / str(info["name"]).removeprefix(start), int(info["size"] or 0), version_of(info))
        for info in (_tree(folder) if entries is None else entries)
        if str(info["name"]).startswith(start) and not str(info["name"]).endswith("/") and info["type"] == "file"
    ]
    return sorted(files, key=lambda file: file.path.as_posix())


def _tree(folder: Path) -> Iterable[dict[str, Any]]:
    try:
        with translated("list", folder):
            return system_of(folder).find(key_of(folder), detail=True).values()
    except FileNotFoundError as error:
        if is_google(folder):
            raise no_bucket(folder) from error
        return []


def _entries(folder: Path) -> list[dict[str, Any]] | None:
    """The listing of one level; None where nothing is, which may be for want of the bucket."""
    try:
        with translated("list", folder):
            return system_of(folder).ls(key_of(folder), detail=True)
    except FileNotFoundError:
        return None


def files_in(folder: Path, suffix: str) -> list[Path]:
    """The files in a folder, local or remote, whose names end so, sorted; none where there is no folder."""
    if not is_remote(folder):
        return sorted(folder.glob(f"*{suffix}"))
    return [file.path for file in list_remote(folder, recursive=False) if file.path.name.endswith(suffix)]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
