"""One run at a time in an output folder, one writer at a time to a shared file."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from backends.errors import ConfigError, TokenKLError
from backends.storage import Lease, LeaseHeldError, is_remote
from flows.folder.layout import LEFT_BY_NOTHING, OutputFolder
from flows.folder.output import prepare_output

_PATIENCE_S = 120.0


class FolderInUseError(ConfigError):
    """Another run uses the output folder."""


@contextmanager
def run_lock(folder: OutputFolder, on_lost: Callable[[], None] = lambda: None) -> Generator[Callable[[], None]]:
    """Only one run at a time may use an output folder: two would buy the same contexts.

    On a disk it is a lock of the operating system, which ends with the process. In a bucket it is a lease: that of a
    killed run is taken over after half a minute, during which this waits. A lease can be lost, when it could not be
    renewed for as long: then ``on_lost`` is called from another thread, to stop what is being bought.

    Yields
    ------
    callable
        Raises `backends.storage.lease.LeaseLostError` if the lock was lost.

    Raises
    ------
    FolderInUseError
        If another run holds it.
    """
    with ExitStack() as stack:
        try:
            check = stack.enter_context(held(folder.lock, on_lost))
        except LeaseHeldError as error:
            raise _in_use(folder.path, f" ({error})" if str(error) else "") from error
        yield check


@contextmanager
def held(lock: Path, on_lost: Callable[[], None] = lambda: None) -> Generator[Callable[[], None]]:
    """While this is entered, ``lock`` is this process's: of the operating system on a disk, a lease in a bucket.

    Yields as `run_lock` does.

    Raises
    ------
    LeaseHeldError
        If somebody who lives holds it; says who, where that is known.
    """
    if is_remote(lock):
        lease = Lease(lock, on_lost=on_lost)
        lease.acquire()
        with _released(lease):
            yield lease.check
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = FileLock(lock)
    try:
        file.acquire(timeout=0)
    except Timeout as error:
        raise LeaseHeldError("") from error
    try:
        yield _kept
    finally:
        file.release()


@contextmanager
def made_output(folder: OutputFolder, *, inside: str | None = None) -> Generator[None]:
    """As `prepare_output`; a folder that was not there before is removed again if an error finds nothing kept in it."""
    before = is_remote(folder.path) or folder.path.exists()
    prepare_output(folder.path, inside=inside)
    try:
        yield
    except (TokenKLError, OSError):
        if not before:
            _remove_if_empty(folder)
        raise


def _remove_if_empty(folder: OutputFolder) -> None:
    """Remove a local folder in which there is nothing but locks that nobody holds."""
    files = [path for path in folder.path.rglob("*") if not path.is_dir()]
    if not {path.name for path in files} <= LEFT_BY_NOTHING:
        return
    for path in files:
        lock = FileLock(path)  # held while it is removed: whoever waits for it then makes it anew
        try:
            with lock.acquire(timeout=0):
                path.unlink()
        except Timeout:
            return
    for path in sorted(folder.path.rglob("*"), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        folder.path.rmdir()


@contextmanager
def exclusive(path: Path, patience_s: float = _PATIENCE_S) -> Generator[None]:
    """While this is held, nobody else reads and rewrites the file ``path``; waits for its turn.

    Raises
    ------
    ConfigError
        If others hold it for longer than ``patience_s``.
    """
    beside = path.with_name(f".{path.name}.lock")
    if is_remote(path):
        lease = Lease(beside)
        try:
            lease.acquire(patience_s=patience_s)
        except LeaseHeldError as error:
            raise _busy(path, patience_s) from error
        with _released(lease):
            yield
            lease.check()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(beside)
    try:
        lock.acquire(timeout=patience_s)
    except Timeout as error:
        raise _busy(path, patience_s) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _released(lease: Lease) -> Generator[None]:
    try:
        yield
    finally:
        lease.release()


def _kept() -> None:
    """A lock of the operating system is not lost."""


def _in_use(output_dir: Path, holder: str = "") -> ConfigError:
    return FolderInUseError(f"another run is using {output_dir}{holder}; wait for it, or choose another --output-dir.")


def _busy(path: Path, patience_s: float) -> ConfigError:
    return ConfigError(f"{path} was in use by other runs for {patience_s:.0f} s; try again.")
