"""Copies of remote files on the local disk, for this process; what is read several times is fetched once."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from backends.errors import TokenKLError
from backends.storage.files import StoredFile, download
from backends.storage.locations import is_remote
from backends.storage.parallel import PARALLEL, in_order

# Where a container has no disk its scratch folder is memory.
_MAX_BYTES = 500_000_000

_kept: list[tempfile.TemporaryDirectory[str]] = []
_kept_lock = threading.Lock()


@contextmanager
def scratch_folder() -> Generator[Path]:
    """A local folder for files on their way, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="tokenkl-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


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


def kept_copy(path: Path) -> Path:
    """A file to read on a local disk until this process ends: itself, or a download."""
    if not is_remote(path):
        return path
    with _kept_lock:
        if not _kept:
            _kept.append(tempfile.TemporaryDirectory(prefix="tokenkl-", ignore_cleanup_errors=True))
        copy = Path(_kept[0].name) / f"{uuid.uuid4().hex}{path.suffix}"
    download(path, copy)
    return copy


@dataclass(slots=True)
class _Copy:
    """A file that is being fetched, or was."""

    target: Path
    size: int
    users: int = 0
    path: Future[Path] = field(default_factory=Future[Path])


class LocalCopies:
    """The copies used last, up to a sum of bytes; those in use are kept beyond it.

    A copy is known by the path and version of its file: one that was changed is fetched again.

    Parameters
    ----------
    max_bytes : int
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._copies: OrderedDict[tuple[str, str], _Copy] = OrderedDict()
        self._n_fetched = 0
        self._lock = threading.Lock()

    @contextmanager
    def open(self, file: StoredFile) -> Generator[Path]:
        """A local copy, which stays while the context lasts; a local file is its own.

        Raises
        ------
        OSError
            If the file is not there or cannot be fetched.
        """
        if not is_remote(file.path):
            yield file.path
            return
        name = (str(file.path), file.version)
        with self._lock:
            copy = self._copies.get(name)
            is_new = copy is None
            if copy is None:
                self._n_fetched += 1
                target = self._scratch() / f"{self._n_fetched}{file.path.suffix}"
                copy = self._copies[name] = _Copy(target, file.size)
            copy.users += 1
            self._copies.move_to_end(name)
        if is_new:
            self._fetch(name, copy, file)
        try:
            yield copy.path.result()
        finally:
            with self._lock:
                copy.users -= 1
                self._shrink()

    def _scratch(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tokenkl-", ignore_cleanup_errors=True)
        return Path(self._folder.name)

    def _fetch(self, name: tuple[str, str], copy: _Copy, file: StoredFile) -> None:
        try:
            download(file.path, copy.target)
        except BaseException as error:  # noqa: BLE001 - handed to all who wait for it
            with self._lock:
                del self._copies[name]
            copy.path.set_exception(error)
        else:
            copy.path.set_result(copy.target)

    def _shrink(self) -> None:
        total = sum(copy.size for copy in self._copies.values())
        for name, copy in list(self._copies.items()):
            if total <= self.max_bytes:
                return
            if not copy.users:
                del self._copies[name]
                total -= copy.size
                copy.target.unlink(missing_ok=True)

    def ahead(self, files: Iterable[StoredFile]) -> Generator[StoredFile]:
        """The same files, each fetched by the time it is given out, and some after it; errors are as in `fetch`."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            for file, _ in in_order(pool, lambda _, file: self._touch(file), files):
                yield file

    def fetch(self, files: Sequence[StoredFile]) -> None:
        """Fetch many at once if they fit; errors are left to whoever opens the file."""
        if sum(file.size for file in files) <= self.max_bytes:
            with ThreadPoolExecutor(PARALLEL) as pool:
                for file in files:
                    pool.submit(self._touch, file)

    def _touch(self, file: StoredFile) -> None:
        with suppress(TokenKLError, OSError), self.open(file):
            pass


# The one set of copies of this process.
COPIES = LocalCopies()
