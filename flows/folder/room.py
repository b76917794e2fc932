"""A disk that takes no more: room that is kept for what was paid for, and one line on what to do."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from backends.errors import TokenKLError
from backends.storage import is_remote
from kl.output.room import refusal_of

_RESERVE = ".reserve"
# Some thousand short answers: those in flight and those that wait for the disk, with room for their part of the table.
_FEWEST_BYTES = 4_000_000
_ENTRY_BYTES = 150  # of a candidate: 70 to 100 in a line of JSON, 25 in the table
_CHUNK_BYTES = 4_000_000


class DiskRefusedError(OSError):
    """A disk refused what was bought; asking was stopped in order. ``n_lost`` answers could be stored nowhere."""

    def __init__(self, number: int, path: str | None, n_lost: int) -> None:
        super().__init__(number, os.strerror(number), path)
        self.n_lost = n_lost


def disk_refused(error: OSError, n_lost: int = 0) -> DiskRefusedError:
    """The end of a run whose writes a disk refused with ``error``."""
    number = refusal_of(error)
    assert number is not None, error
    refused = DiskRefusedError(number, error.filename, n_lost)
    refused.__cause__ = error
    return refused


class NoRoomError(TokenKLError):
    """A run that ended because a disk takes no more; what it bought is kept.

    ``config`` is that of the run, with its folders filled in.
    """

    def __init__(self, message: str, config: object) -> None:
        super().__init__(message, config)
        self.config = config

    def __str__(self) -> str:
        return str(self.args[0])


class Reserve:
    """Room on the disk of a folder, for the answers in flight when a write is refused there.

    Parameters
    ----------
    folder : Path
    n_entries : int
        How many candidates these answers may have in all.
    """

    def __init__(self, folder: Path, n_entries: int = 0) -> None:
        self._path = folder / _RESERVE
        self._n_bytes = max(_FEWEST_BYTES, n_entries * _ENTRY_BYTES)

    @contextmanager
    def kept(self) -> Generator[None]:
        """While answers are bought.

        Raises
        ------
        OSError
            If there is no room even now: nothing is bought then.
        """
        if not is_remote(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._path.open("wb") as file:
                    for start in range(0, self._n_bytes, _CHUNK_BYTES):
                        # No zeros: some file systems keep those for nothing.
                        file.write(os.urandom(min(_CHUNK_BYTES, self._n_bytes - start)))
            except OSError as error:
                self.give_up()
                needed = f"{error.strerror}; {self._n_bytes / 1e6:,.0f} MB are kept for answers in flight"
                raise OSError(error.errno, needed, str(self._path)) from error
        try:
            yield
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Let the room be used."""
        if not is_remote(self._path):
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


@contextmanager
def one_line_on_room(output_dir: Path, kept_in: Path, config: object) -> Generator[None]:
    """The refusal of a disk, whoever met it, as `NoRoomError`.

    Parameters
    ----------
    output_dir : Path
        The disk is looked for there, and where temporary files are, if the error does not name a file.
    kept_in : Path
        Where what was bought is.
    config : object
        For the error.
    """
    try:
        yield
    except Exception as error:
        number = refusal_of(error)
        if number is None:
            raise
        place, is_temporary = _place(error, output_dir)
        why = error.strerror if isinstance(error, OSError) and error.strerror else os.strerror(number)
        room = f"{why}; {shutil.disk_usage(place).free / 1e6:,.1f} MB free"
        n_lost = error.n_lost if isinstance(error, DiskRefusedError) else 0
        lost = f", but for {n_lost} answers that came last and could be stored nowhere" if n_lost else ""
        more = ", or set TMPDIR to a folder on another disk" if is_temporary else ""
        raise NoRoomError(
            f"{place} takes no more ({room}). What was bought is kept in {kept_in}{lost}. Make room{more}; the same "
            "command then goes on and asks for nothing twice.",
            config,
        ) from error


def _place(error: Exception, output_dir: Path) -> tuple[Path, bool]:
    """The folder that was written to, and whether it is one of temporary files."""
    temporary = Path(tempfile.gettempdir())
    named = getattr(error, "filename", None)
    if isinstance(named, str):
        folder = Path(named).absolute().parent
    elif is_remote(output_dir):
        folder = temporary
    else:
        folder = min((output_dir.absolute(), temporary), key=lambda path: shutil.disk_usage(_existing(path)).free)
    return _existing(folder), folder.is_relative_to(temporary) and not output_dir.absolute().is_relative_to(temporary)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())
