"""The input of a run: which files, and one parsed file at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath

from backends.errors import ConfigError
from backends.storage import COPIES, StoredFile, is_remote, is_within, list_remote, scratch_folder
from flows.config.models import RunConfig
from kl.input.responses import InputProblem, ResponseFile, check_pattern, list_files, read_responses

logger = logging.getLogger(__name__)

# Tasks take the responses of one file one after the other; a few parsed files serve all that are at work.
_PARSED_FILES_KEPT = 4


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file and what it is called in the outputs: its path below the input directory.

    ``stored`` is set for a remote one: the file as it was when the run listed its input.
    """

    path: Path
    source_file: str
    stored: StoredFile | None = None

    @property
    def size(self) -> int:
        """Bytes; 0 of a file that cannot be looked at."""
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
        files = _remote_files(config) if is_remote(config.input_dir) else _local_files(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--input-dir/--pattern: {error}") from error
    # Results are not responses, and must not count among the files that max_files allows.
    files = [file for file in files if not is_within(file.path, config.output_dir)][: config.max_files]
    if not files:
        raise ConfigError(f"no file in {config.input_dir} matches {config.pattern!r}; set --input-dir or --pattern.")
    return files


def _local_files(config: RunConfig) -> list[InputFile]:
    paths = list_files(config.input_dir, config.pattern, None)
    return [InputFile(path, path.relative_to(config.input_dir).as_posix()) for path in paths]


def _remote_files(config: RunConfig) -> list[InputFile]:
    check_pattern(config.pattern)
    parts = PurePosixPath(config.pattern).parts
    start = len(str(config.input_dir).rstrip("/")) + 1
    files: list[InputFile] = []
    for stored in list_remote(config.input_dir, recursive=len(parts) > 1):
        name = str(stored.path)[start:]
        if not _matches(name.split("/"), parts):
            continue
        if PurePosixPath(name).as_posix() != name or ".." in name.split("/"):
            logger.warning("%s is left out: its name has parts that no folder can have", stored.path)
            continue
        files.append(InputFile(stored.path, name, stored))
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


def read_ahead(files: Iterable[InputFile]) -> Iterator[InputFile]:
    """The same files; remote ones are fetched some ahead of their use, since each takes a while to come."""
    files = list(files)
    stored = {file.stored: file for file in files if file.stored is not None}
    return (stored[file] for file in COPIES.ahead(stored)) if len(stored) == len(files) else iter(files)


def read_input(file: InputFile) -> ResponseFile:
    """Parse a file, or take it from the few parsed last; a file that changed on disk is parsed again.

    Raises
    ------
    ConfigError, OSError
        If the storage of a remote file refuses or does not answer.
    """
    if file.stored is not None:
        return _read(file, (0, 0))
    try:
        stat = file.path.stat()
        version = (stat.st_mtime_ns, stat.st_size)
    except OSError:
        version = (0, 0)
    return _read(file, version)


@lru_cache(maxsize=_PARSED_FILES_KEPT)
def _read(file: InputFile, version: tuple[int, int]) -> ResponseFile:
    if file.stored is None:
        return read_responses(file.path, file.source_file)
    try:
        with COPIES.open(file.stored) as copy:
            return read_responses(copy, file.source_file)
    except FileNotFoundError:  # removed since it was listed: a file that cannot be read, as on a disk
        with scratch_folder() as nothing:
            return read_responses(nothing / "gone", file.source_file)


def file_defect(parsed: ResponseFile) -> InputProblem | None:
    """What is wrong with the file as a whole, if anything is that was not repaired."""
    return next((item for item in parsed.problems if item.response_idx is None and not item.repaired), None)
