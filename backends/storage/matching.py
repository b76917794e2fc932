"""Which files of a folder a pattern means, the same on a disk and in a bucket."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from backends.storage.files import StoredFile, list_remote
from backends.storage.locations import is_remote

logger = logging.getLogger(__name__)


def list_matching(folder: Path, pattern: str) -> list[tuple[str, StoredFile]]:
    """The files of a folder that match a pattern (`pathlib.Path.glob`), with their names below it, sorted by these.

    Raises
    ------
    ConfigError, OSError, ValueError
        If the folder or the pattern cannot be used.
    """
    from kl.input.responses import list_files  # late: it loads arrays and tables, a command's help needs none

    if is_remote(folder):
        return list(_remote_files(folder, pattern))
    paths = list_files(folder, pattern, None)
    return [(path.relative_to(folder).as_posix(), _stored(path)) for path in paths]


def _stored(path: Path) -> StoredFile:
    try:
        stat = path.stat()
    except OSError:  # a broken link: reading it says what is wrong
        return StoredFile(path, 0, "")
    return StoredFile(path, stat.st_size, f"{stat.st_mtime_ns}-{stat.st_size}")


def _remote_files(folder: Path, pattern: str) -> list[tuple[str, StoredFile]]:
    from kl.input.responses import check_pattern  # late, as above

    check_pattern(pattern)
    parts = PurePosixPath(pattern).parts
    start = len(str(folder).rstrip("/")) + 1
    files: list[tuple[str, StoredFile]] = []
    for stored in list_remote(folder, recursive=len(parts) > 1):
        name = str(stored.path)[start:]
        if not _matches(name.split("/"), parts):
            continue
        if PurePosixPath(name).as_posix() != name or ".." in name.split("/"):
            logger.warning("%s is left out: its name has parts that no folder can have", stored.path)
            continue
        files.append((name, stored))
    return files


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a file's name fit those of a pattern, as `pathlib.Path.glob` has it."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(name[skipped:], pattern[1:]) for skipped in range(len(name)))
    if "**" in pattern[0]:
        raise ValueError(f"pattern {'/'.join(pattern)!r} cannot be used: '**' can only be a whole part of it.")
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])
