"""The input of a run: which files, and what they say, each parsed once."""

from __future__ import annotations

import logging
import pickle
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from backends.errors import ConfigError
from backends.storage import COPIES, StoredFile, is_remote, is_within, list_matching, scratch_folder
from flows.config.models import RunConfig
from kl.columns import Positions
from kl.input.responses import (
    InputProblem,
    ResponseFile,
    parse_responses,
    read_responses,
)
from kl.input.sources import LARGE, SEVERAL_PROMPTS, Part, mapped, parts_of
from kl.records import Response

logger = logging.getLogger(__name__)

_USUAL, _LINES = "*.json", "*.jsonl"
_MOST_IN_MEMORY = 300_000_000  # bytes of JSON, which are less when they are parsed; what is more goes to the disk


class Version(NamedTuple):
    """When a local file was changed, and its bytes; of a remote one, which is known by its own version, these alone."""

    changed: int
    size: int


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file and what it is called in the outputs: its path below the input directory.

    ``stored`` is set for a remote one: the file as it was when the run listed its input. ``part`` is set where the file
    has answers to several prompts and this is one of them; ``version`` is then the file's. With ``first_only`` each
    response is read as if it ended with its first position.
    """

    path: Path
    source_file: str
    stored: StoredFile | None = None
    part: Part | None = None
    version: Version | None = None
    first_only: bool = False

    @property
    def size(self) -> int:
        """Bytes; 0 of a file that cannot be looked at."""
        if self.part is not None:
            return self.part.size
        if self.stored is not None:
            return self.stored.size
        try:
            return self.path.stat().st_size
        except OSError:
            return 0


def find_inputs(config: RunConfig) -> list[InputFile]:
    """The files of a run, sorted.

    Raises
    ------
    ConfigError
        If the folder or the pattern cannot be used, or nothing matches.
    """
    try:
        files = list_inputs(config.input_dir, config.pattern)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--input-dir/--pattern: {error}") from error
    # Results are not responses, and must not count among the files that max_files allows.
    files = [file for file in files if not is_within(file.path, config.output_dir)][: config.max_files]
    if not files:
        lines = "" if config.pattern != _USUAL else _lines_hint(config.input_dir)
        raise ConfigError(
            f"no file in {config.input_dir} matches {config.pattern!r}; set --input-dir or --pattern.{lines}"
        )
    return files if config.first_repeats is None else [replace(file, first_only=True) for file in files]


def _lines_hint(folder: Path) -> str:
    n = len(list_inputs(folder, _LINES))
    return f" Files that match {_LINES!r}: {n:,}." if n else ""


def list_inputs(folder: Path, pattern: str) -> list[InputFile]:
    """The files of a folder, local or remote, that match a pattern, sorted.

    Raises
    ------
    ConfigError, OSError, ValueError
        If the folder or the pattern cannot be used.
    """
    remote = is_remote(folder)
    return [InputFile(stored.path, name, stored if remote else None) for name, stored in list_matching(folder, pattern)]


def read_ahead(files: Iterable[InputFile]) -> Iterator[InputFile]:
    """The same files; remote ones are fetched some ahead of their use, since each takes a while to come."""
    files = list(files)
    if any(file.stored is None for file in files):
        return iter(files)
    ahead = COPIES.ahead(file.stored for file in files if file.stored is not None)
    return (file for file, _ in zip(files, ahead, strict=True))


def read_inputs(files: Iterable[InputFile]) -> Iterator[tuple[InputFile, ResponseFile]]:
    """Each file with what it says, parsed; one with answers to several prompts as so many files."""
    for file in read_ahead(files):
        # A large one is looked through before all of it is in memory.
        parts = _parts_of(file) if file.part is None and file.size > LARGE else []
        if len(parts) < 2:
            parsed = read_input(file)
            parts = _parts_of(file) if file.part is None and _has_parts(parsed) else []
            if not parts:
                yield file, parsed
        for part in parts:
            yield part, read_input(part)


def _has_parts(parsed: ResponseFile) -> bool:
    return any(problem.kind == SEVERAL_PROMPTS for problem in parsed.problems)


def _parts_of(file: InputFile) -> list[InputFile]:
    """The parts of a file, as files; none of one that is not there."""
    version = _version_of(file)
    try:
        with opened(file) as copy, mapped(copy) as data:
            parts = parts_of(data)
    except OSError:
        return []
    return [
        replace(file, source_file=f"{file.source_file}#{part.number}", part=part, version=version) for part in parts
    ]


class ParsedFiles:
    """Input files as they were parsed: all stages of a run read them, the first one from their text.

    Those that memory is not to hold are on the local disk.
    """

    def __init__(self) -> None:
        self._parsed: dict[InputFile, tuple[Version, ResponseFile | Path]] = {}
        self._n_bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def read(self, file: InputFile, version: Version) -> ResponseFile:
        """The file as it is in this version."""
        with self._lock:
            known, parsed = self._parsed.get(file, (None, None))
        if known == version and parsed is not None:
            return pickle.loads(parsed.read_bytes()) if isinstance(parsed, Path) else parsed
        found = _parse(file)
        with self._lock:
            self._keep(file, version, found)
        return found

    def _keep(self, file: InputFile, version: Version, parsed: ResponseFile) -> None:
        self._n_bytes += file.size
        if self._n_bytes <= _MOST_IN_MEMORY:
            self._parsed[file] = version, parsed
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="tokenkl-input-")
        place = Path(self._folder.name) / f"{len(self._parsed)}-{version.changed}"
        place.write_bytes(pickle.dumps(parsed, protocol=5))
        self._parsed[file] = version, place

    def forget(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._parsed, self._n_bytes = {}, 0
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None


_parsed_files = ParsedFiles()


@contextmanager
def parsed_files_kept() -> Generator[None]:
    """Files that are read inside are parsed once, as long as they stay as they are."""
    try:
        yield
    finally:
        forget_parsed_files()


def forget_parsed_files() -> None:
    """Let go of what was parsed, where it is known that little of it is read again."""
    _parsed_files.forget()


def read_input(file: InputFile) -> ResponseFile:
    """Parse a file, or take it from those that are parsed already; a file that changed on disk is parsed again.

    Raises
    ------
    ConfigError, OSError
        If the storage of a remote file refuses or does not answer.
    """
    return _parsed_files.read(file, _version_of(file))


def _version_of(file: InputFile) -> Version:
    if file.stored is not None:
        return Version(0, file.stored.size)
    try:
        stat = file.path.stat()
    except OSError:
        return Version(0, 0)
    return Version(stat.st_mtime_ns, stat.st_size)


def _parse(file: InputFile) -> ResponseFile:
    parsed = _parse_whole(file)
    if not file.first_only:
        return parsed
    return replace(parsed, responses=tuple(map(first_position, parsed.responses)))


def first_position(response: Response) -> Response:
    """The response as if it ended with its first position: figures of it are of no other, nor weighted for others."""
    if len(response.positions) < 2:
        return response
    positions = Positions.of(response.positions).part(0, 1)
    (text,) = positions.sampled.texts()
    gaps = tuple(gap for gap in response.gaps if gap[0] == 0)
    return replace(response, text=text, positions=positions, has_stop=False, gaps=gaps)


def _parse_whole(file: InputFile) -> ResponseFile:
    if file.part is not None:
        return _parse_part(file, file.part)
    try:
        with opened(file) as copy:
            return read_responses(copy, file.source_file)
    except FileNotFoundError:  # removed since it was listed: a file that cannot be read, as on a disk
        with scratch_folder() as nothing:
            return read_responses(nothing / "gone", file.source_file)


def _parse_part(file: InputFile, part: Part) -> ResponseFile:
    """Some objects of a file, which must be as it was when it was divided."""
    if _version_of(file) != file.version:
        raise ConfigError(f"{file.path} was changed while it was read; run again when it is whole.")
    with opened(file) as copy, copy.open("rb") as stream:

        def read(start: int, size: int) -> bytes:
            stream.seek(start)
            return stream.read(size)

        return parse_responses(part.text(read), file.source_file)


@contextmanager
def opened(file: InputFile) -> Generator[Path]:
    """The file on a local disk.

    Raises
    ------
    ConfigError, OSError
        If the storage of a remote file refuses or does not answer.
    """
    if file.stored is None:
        yield file.path
        return
    with COPIES.open(file.stored) as copy:
        yield copy


def file_defect(parsed: ResponseFile) -> InputProblem | None:
    """What is wrong with the file as a whole, if anything is that was not repaired."""
    return next((item for item in parsed.problems if item.response_idx is None and not item.repaired), None)
