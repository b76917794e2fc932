"""The input of a run: which files, and one parsed file at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from backends.errors import ConfigError
from flows.config import RunConfig
from kl.responses import InputProblem, ResponseFile, list_files, read_responses

# Tasks take the responses of one file one after the other; a few parsed files serve all that are at work.
_PARSED_FILES_KEPT = 4


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file and what it is called in the outputs: its path below the input directory."""

    path: Path
    source_file: str


def find_inputs(config: RunConfig) -> list[InputFile]:
    """The files of a run, sorted.

    Raises
    ------
    ConfigError
        If the folder or the pattern cannot be used, or nothing matches.
    """
    try:
        paths = list_files(config.input_dir, config.pattern, None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--input-dir/--pattern: {error}") from error
    output = config.output_dir.resolve()
    # Results are not responses, and must not count among the files that max_files allows.
    paths = [path for path in paths if not path.resolve().is_relative_to(output)][: config.max_files]
    if not paths:
        raise ConfigError(f"no file in {config.input_dir} matches {config.pattern!r}; set --input-dir or --pattern.")
    return [InputFile(path, path.relative_to(config.input_dir).as_posix()) for path in paths]


def read_input(file: InputFile) -> ResponseFile:
    """Parse a file, or take it from the few parsed last; a file that changed on disk is parsed again."""
    try:
        stat = file.path.stat()
        version = (stat.st_mtime_ns, stat.st_size)
    except OSError:
        version = (0, 0)
    return _read(file, version)


@lru_cache(maxsize=_PARSED_FILES_KEPT)
def _read(file: InputFile, version: tuple[int, int]) -> ResponseFile:
    return read_responses(file.path, file.source_file)


def file_defect(parsed: ResponseFile) -> InputProblem | None:
    """What is wrong with the file as a whole, if anything is that was not repaired."""
    return next((item for item in parsed.problems if item.response_idx is None and not item.repaired), None)
