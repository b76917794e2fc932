"""Which files of a folder answer which prompt, and the hash of all that they say.

Every file is read once when the index is made, and none is kept: memory holds a place for each prompt.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from backends.errors import ConfigError
from backends.storage import COPIES, StoredFile, list_matching
from kl.input.responses import ResponseFile, parse_responses
from kl.input.sources import Part, mapped, prompts_of
from kl.records import Prompt

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where responses to one prompt are: a file, or a part of it. ``content`` is the hash of the file."""

    content: str
    name: str
    file: StoredFile
    part: Part | None

    @property
    def size(self) -> int:
        """Bytes of JSON."""
        return self.file.size if self.part is None else self.part.size

    def read(self) -> ResponseFile:
        """What is there, parsed.

        Raises
        ------
        ConfigError
            If the file is not the one that was indexed.
        """
        with COPIES.open(self.file) as copy:
            if copy is self.file.path and not _is_still(self.file):
                raise changed(self.file.path)
            if self.part is None:
                return parse_responses(copy.read_bytes(), self.name)
            with copy.open("rb") as stream:

                def read(start: int, size: int) -> bytes:
                    stream.seek(start)
                    return stream.read(size)

                return parse_responses(self.part.text(read), f"{self.name}#{self.part.number}")


@dataclass(frozen=True, slots=True)
class Index:
    """What a folder holds.

    Attributes
    ----------
    digest : str
        Hash of the contents of all files; their names and order are no part of it.
    n_files : int
    places : dict
        Prompt id → where its responses are, in the order of the files' contents.
    last_turns : dict
        Hash of the last turn of a prompt → how many prompts end with it.
    """

    digest: str
    n_files: int
    places: dict[str, list[Place]] = field(default_factory=dict[str, list[Place]])
    last_turns: dict[str, int] = field(default_factory=dict[str, int])


def index_of(folder: Path, pattern: str) -> Index:
    """The index of a folder, made anew only where a file of it is another one than before.

    Raises
    ------
    ConfigError
        If the folder or the pattern cannot be used, or nothing matches.
    """
    try:
        files = list_matching(folder, pattern)
    except (OSError, ValueError) as error:
        raise ConfigError(f"backend.dir/backend.pattern: {error}") from error
    if not files:
        raise ConfigError(f"no file in {folder} matches {pattern!r}; set backend.dir or backend.pattern.")
    return _indexed(tuple(files))


@functools.lru_cache(maxsize=4)
def _indexed(files: tuple[tuple[str, StoredFile], ...]) -> Index:
    contents = sorted(_contents(files), key=lambda found: found[0])
    whole = hashlib.sha256("\n".join(content for content, _ in contents).encode()).hexdigest()
    index = Index(whole, len(files))
    for _, prompts in contents:
        for place, prompt in prompts:
            known = index.places.setdefault(question_id(prompt), [])
            if not known:
                turn = last_turn(prompt)
                index.last_turns[turn] = index.last_turns.get(turn, 0) + 1
            known.append(place)
    return index


def _contents(files: Sequence[tuple[str, StoredFile]]) -> Iterator[tuple[str, list[tuple[Place, Prompt]]]]:
    """The hash of each file, and the places in it."""
    stored = [file for _, file in files]
    for (name, file), _ in zip(files, COPIES.ahead(stored), strict=True):
        try:
            with COPIES.open(file) as copy, mapped(copy) as data:
                content, prompts = hashlib.sha256(data).hexdigest(), prompts_of(data)
                if not prompts:
                    _say_why(data[:], file.path)
        except OSError as error:
            logger.warning("%s cannot be read: %s", file.path, error.strerror or error)
            content, prompts = f"unreadable {name}", []
        yield content, [(Place(content, name, file, part), prompt) for part, prompt in prompts]


def _say_why(data: bytes, path: Path) -> None:
    defects = [problem for problem in parse_responses(data, path.name).problems if not problem.repaired]
    why = defects[0].message if defects else "it has no prompt."
    logger.warning("%s answers nothing: %s", path, why)


def question_id(prompt: Prompt) -> str:
    """By what a prompt is known: its content; an empty system text is none."""
    return Prompt(prompt.turns, prompt.system or None).prompt_id


def last_turn(prompt: Prompt) -> str:
    """The last turn of a prompt as a hash."""
    return Prompt(prompt.turns[-1:]).prompt_id


def changed(what: Path) -> ConfigError:
    """The error where files are not those that answers were kept under."""
    return ConfigError(f"{what} was changed while the run read it; run again when it is whole.")


def _is_still(file: StoredFile) -> bool:
    try:
        stat = file.path.stat()
    except OSError:
        return False
    return f"{stat.st_mtime_ns}-{stat.st_size}" == file.version
