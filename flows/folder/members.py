"""Runs that use one store of scores at the same moment: who is at work, and which contexts each of them buys.

Beside the scores there is a folder for each run::

    SCORES_DIR/members/<run>/lock       held while the run is at work
    SCORES_DIR/members/<run>/claimed    the contexts that it buys, 64 bits of each key
    SCORES_DIR/members/<run>/journals   its answers until they are a part of the table

A run claims all that it is going to ask, or nothing: one that finds a context claimed by another run waits, holding
none, until it is answered or given up. So no two runs wait for each other. What a killed run had claimed is free as
soon as its lock is; its answers are taken in first.
"""

from __future__ import annotations

import logging
import time
import uuid
from array import array
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.errors import ConfigError
from backends.keys import short_key
from backends.scores.lines import SUFFIX
from backends.scores.store import ScoreStore
from backends.storage import (
    LeaseHeldError,
    LeaseLostError,
    as_location,
    exists,
    files_in,
    is_remote,
    list_remote,
    read_bytes,
    remove,
    remove_folder,
    resolved,
    write_bytes_atomic,
)
from flows.folder.layout import OutputFolder
from flows.folder.lock import exclusive, held

logger = logging.getLogger(__name__)

Missing = Mapping[str, "array[int]"]  # prompt id → the first 64 bits of each key

_MEMBERS, _LOCK, _CLAIMED = "members", "lock", "claimed"
# How the pauses between two looks at what others buy grow with the time waited.
_FIRST_PAUSE_S, _PAUSE_SHARE, _LONGEST_PAUSE_S = 0.5, 0.125, 30.0


class Member:
    """One run among those that use a store.

    Parameters
    ----------
    scores : Path
    folder : Path
        Its own.
    check : callable
        Raises `LeaseLostError` if this run does not count as alive any more.
    """

    def __init__(self, scores: Path, folder: Path, check: Callable[[], None]) -> None:
        self._scores, self._folder = scores, folder
        self.check = check
        self.journals = folder / "journals"
        self._claimed = np.array([], dtype=np.uint64)
        self._waiting_since: float | None = None

    @contextmanager
    def alone(self) -> Generator[None]:
        """While this is entered, no other run changes what is stored."""
        with exclusive(self._scores / _MEMBERS):
            self.check()
            yield

    def holds(self, wanted: Missing) -> bool:
        """Whether all these contexts are claimed by this run."""
        return bool(np.isin(_joined(wanted), self._claimed, assume_unique=True).all())

    def claim(self, wanted: Missing) -> Sequence[Path]:
        """Claim all these contexts, or none if other runs hold some: gives their folders then.

        What was claimed before is let go.
        """
        with self.alone():
            holders = self._holders(wanted)
            self._claimed = np.array([], dtype=np.uint64) if holders else _joined(wanted)
            write_bytes_atomic(self._folder / _CLAIMED, self._claimed.astype("<u8").tobytes())
        if not holders:
            self._waiting_since = None
        return holders

    def wait(self, wanted: Missing, holders: Sequence[Path]) -> None:
        """Wait until no run that lives holds a context of these that has no answer in the store.

        At least one pause, if it lives: an answer may not be all that is wanted of a context (its whole vocabulary),
        and the caller plans anew each time.
        """
        logger.info(
            "other runs that use %s buy some of the contexts wanted (%s): waiting for their answers",
            self._scores, ", ".join(holder.name[:8] for holder in holders),
        )  # fmt: skip
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        paused = False
        while True:
            for holder in holders:
                self._take_over(holder)
            if paused:
                wanted = _unanswered(wanted, ScoreStore(self._scores))
            holders = self._holders(wanted)
            if not holders:
                return
            waited = time.monotonic() - self._waiting_since
            time.sleep(min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, waited * _PAUSE_SHARE)))
            paused = True
            self.check()

    def _holders(self, wanted: Missing) -> list[Path]:
        keys = _joined(wanted)
        return [path.parent for path in self._claims() if len(keys) and np.isin(keys, _read(path)).any()]

    def _claims(self) -> Iterable[Path]:
        members = self._scores / _MEMBERS
        found = [file.path for file in list_remote(members)] if is_remote(members) else sorted(members.glob("*/*"))
        return [path for path in found if path.name == _CLAIMED and path.parent != self._folder]

    def _take_over(self, holder: Path) -> None:
        """Take in the answers of a run that ended without leaving, and free what it had claimed; one that lives stays.

        Only a run that holds its lock has claims, so that none is taken for dead before it is at work. One that left in
        order has none any more.
        """
        if not exists(holder / _CLAIMED):
            return
        try:
            with held(holder / _LOCK):
                if exists(holder / _CLAIMED):  # it may have left just now
                    taken = ScoreStore(self._scores, journals=holder / "journals").recover()
                    remove(holder / _CLAIMED)
                    logger.warning(
                        "a run that used %s ended at once; %d answers of it were taken in", self._scores, taken
                    )
        except LeaseHeldError:
            return
        remove_folder(holder)

    def leave(self) -> bool:
        """Free what was claimed; gives whether nothing of this run is left.

        Answers that could not be stored stay, with the claim, for the run that takes over.
        """
        try:
            self.check()
        except LeaseLostError:
            return False  # another run may have taken over
        if files_in(self.journals, SUFFIX):
            return False
        remove(self._folder / _CLAIMED)
        return True


@contextmanager
def member_of(scores: Path, on_lost: Callable[[], None]) -> Generator[Member]:
    """While this is entered, this run is one of those that use a store.

    Parameters
    ----------
    scores : Path
        The store.
    on_lost : callable
        Called from another thread when a lease could not be renewed, to stop what is being bought.
    """
    folder = scores / _MEMBERS / uuid.uuid4().hex
    with ExitStack() as stack:
        with held(folder / _LOCK, on_lost) as check:
            member = Member(scores, folder, check)
            try:
                yield member
            finally:
                if member.leave():
                    stack.callback(remove_folder, folder)  # when the lock is released, which may be in a file


def _joined(wanted: Missing) -> NDArray[np.uint64]:
    arrays = [np.frombuffer(keys, dtype=np.uint64) for keys in wanted.values() if keys]
    return np.unique(np.concatenate(arrays)) if arrays else np.array([], dtype=np.uint64)


def _read(path: Path) -> NDArray[np.uint64]:
    try:
        return np.frombuffer(read_bytes(path), dtype="<u8")
    except FileNotFoundError:
        return np.array([], dtype=np.uint64)  # that run has just left


def _unanswered(wanted: Missing, store: ScoreStore) -> dict[str, array[int]]:
    left: dict[str, array[int]] = {}
    for prompt_id, keys in wanted.items():
        known = {short_key(key) for key in store.known_keys(prompt_id)} if keys else set[int]()
        if rest := array("Q", (key for key in keys if key not in known)):
            left[prompt_id] = rest
    return left


def take_in_moved(scores: Path) -> int:
    """Take in the journals at the top of a store: of a run that was killed before its folder's scores were moved.

    Runs that share the store have their journals elsewhere. Gives how many answers.

    Raises
    ------
    ConfigError
        If another run is at the same for long.
    """
    store = ScoreStore(scores)
    if not store.has_journals():
        return 0
    with exclusive(scores / "journals"):
        return store.recover()


def check_store(folder: OutputFolder) -> None:
    """See to it that what was bought for an output folder is found where its runs look for it.

    Raises
    ------
    ConfigError
        If earlier runs of the folder used another store, or the shared one is another folder's own.
    """
    before = _noted(folder)
    if before is not None and before != _address(folder):
        raise ConfigError(
            f"what was bought for {folder.path} is in {before}: give --scores-dir {before} again, or choose another "
            "--output-dir."
        )
    if folder.shared is None:
        return
    if before is None and _holds_files(folder.own_scores):
        raise ConfigError(
            f"what was bought for {folder.path} is in {folder.own_scores}, which {folder.shared} does not have. Move "
            "it there first (all that is in it), or choose another --output-dir."
        )
    beside = OutputFolder(folder.shared.parent)
    if folder.shared.name == folder.own_scores.name and (exists(beside.lock) or exists(beside.run)):
        raise ConfigError(
            f"scores_dir: {folder.shared} is the store of the output folder {beside.path}, whose runs know of no "
            "others. Move it to a place of its own, and give that to all runs."
        )


def note_store(folder: OutputFolder) -> None:
    """Put on record which shared store the runs of an output folder use."""
    if folder.shared is not None and _noted(folder) is None:
        write_bytes_atomic(folder.shared_note, _address(folder).encode("utf-8"))


def store_of(output_dir: Path) -> Path | None:
    """The address of the shared store that an output folder's runs use, as it was given; None if they use none."""
    noted = _noted(OutputFolder(output_dir))
    return None if noted is None else as_location(noted)


def _address(folder: OutputFolder) -> str:
    return "" if folder.shared is None else str(resolved(folder.shared))


def _noted(folder: OutputFolder) -> str | None:
    try:
        return read_bytes(folder.shared_note).decode("utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _holds_files(folder: Path) -> bool:
    return bool(list_remote(folder)) if is_remote(folder) else any(path.is_file() for path in folder.rglob("*"))
