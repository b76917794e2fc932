"""What ``python -m flows.convert`` does: starts no flow and asks no backend."""

from __future__ import annotations

import argparse
import glob
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from backends.errors import ConfigError
from backends.storage import as_location, exists, is_remote, is_within, read_bytes, write_bytes_atomic
from flows.commands.arguments import Parser, exit_code_of
from flows.folder.output import prepare_output
from flows.runtime.environment import say
from flows.runtime.progress import ProgressReporter
from flows.runtime.terminal import console, print_pairs
from flows.stages.inputs import InputFile, list_inputs, opened, read_ahead
from flows.watch.report import EXIT_COMPLETE, EXIT_INCOMPLETE
from kl.input.conversion import Converted, UnclearRequestsError, converted, read_requests, with_requests
from kl.input.responses import read_responses
from kl.input.sources import mapped
from kl.output.atomic import json_bytes

_PATTERN = "*.json*"
_DESCRIPTION = (
    "Writes files of responses in the form of docs/input-formats.md, one JSON file per prompt, from answers as "
    "services give and log them: raw answers of OpenAI, vLLM, llama.cpp and Gemini, alone, in a JSON list or as "
    "JSONL, with their requests beside them or in --requests. Values are not touched. What cannot be read is named, a "
    "line each, and left out; files of OUT that hold something else are left alone."
)
_EXAMPLES = (
    ("a folder of answers, each with its prompt in it or beside it", "answers responses"),
    ("the output of a batch, with its input", "batch_output.jsonl responses --requests batch_input.jsonl"),
)
_EPILOG = (
    "exit codes: 0 everything is converted; 3 some responses or files are not (each with its reason); 2 a mistake in "
    "the call; 1 anything else"
)


@dataclass(slots=True)
class _Counts:
    files: int = 0
    written: int = 0
    there: int = 0
    responses: int = 0
    left_out: int = 0
    repaired: Counter[str] = field(default_factory=Counter[str])


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert from the command line; returns the exit code."""
    return exit_code_of(lambda: _convert(_parse(sys.argv[1:] if arguments is None else arguments)))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("convert", _DESCRIPTION, _EXAMPLES, _EPILOG)
    parser.add_argument("input", metavar="IN", help="A file, or a folder of files; on a disk or in a bucket.")
    parser.add_argument("output", metavar="OUT", help="Folder for the converted files; made when absent.")
    parser.add_argument("--pattern", metavar="GLOB", help=f"Which files of the folder IN. Default: {_PATTERN}.")
    parser.add_argument(
        "--requests",
        metavar="FILE",
        help="What was asked, for answers without their prompts: the input file of the batch, or a JSONL or list of "
        '{"custom_id": …, "prompt": …} (or "key", "id", "messages"). Known by the same custom_id, key or id in the '
        "answer, or for a file with one answer by its name.",
    )
    return parser.parse_args(arguments)


def _convert(options: argparse.Namespace) -> int:
    output = as_location(options.output)
    files = _inputs(as_location(options.input), options.pattern, output)
    requests = {} if options.requests is None else _requests(as_location(options.requests))
    prepare_output(output)
    counts = _Counts()
    targets: dict[str, str] = {}
    with ProgressReporter("files converted", len(files)) as progress:
        for file in read_ahead(files):
            counts.files += 1
            for item in _items(file, requests):
                _note(item, counts)
                if item.document is not None:
                    _write(item.document, output / _target(file.source_file, item.number, targets), counts)
            progress.advance(1)
    _show(counts, output)
    return EXIT_INCOMPLETE if counts.left_out else EXIT_COMPLETE


def _inputs(place: Path, pattern: str | None, output: Path) -> list[InputFile]:
    folder = place
    if not is_remote(place) and place.is_file():
        if pattern is not None:
            raise ConfigError(f"--pattern is for a folder, and {place} is a file.")
        folder, pattern = place.parent, glob.escape(place.name)
    elif is_within(place, output) and is_within(output, place):
        raise ConfigError(f"OUT is IN ({place}); choose another folder for what is written.")
    wanted = _PATTERN if pattern is None else pattern
    try:
        files = [file for file in list_inputs(folder, wanted) if not is_within(file.path, output) or folder != place]
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if not files:
        raise ConfigError(f"no file in {folder} matches {wanted!r}; set IN or --pattern.")
    return files


def _requests(path: Path) -> Mapping[str, dict[str, object]]:
    try:
        return read_requests(read_bytes(path))
    except (UnclearRequestsError, OSError) as error:
        raise ConfigError(f"--requests {path}: {error}") from error


def _items(file: InputFile, requests: Mapping[str, dict[str, object]]) -> Iterator[Converted]:
    try:
        with opened(file) as copy, mapped(copy) as data:
            name = PurePosixPath(file.source_file)
            names = (file.source_file, name.name, name.stem)
            yield from converted(with_requests(data, requests, names) if requests else data, file.source_file)
    except OSError:
        yield Converted(None, read_responses(file.path, file.source_file), None)  # which says why


def _note(item: Converted, counts: _Counts) -> None:
    read = item.read
    for problem in read.problems:
        if problem.repaired:
            counts.repaired[problem.kind] += problem.count
        else:
            say(problem.message)
    counts.responses += len(read.responses)
    counts.left_out += len(read.unreadable) or (0 if read.responses else 1)


def _target(source_file: str, number: int | None, targets: dict[str, str]) -> str:
    """Where a prompt goes, below OUT; under the whole name of its file where the bare one is taken."""
    source = PurePosixPath(source_file)
    suffix = "" if number is None else f"_{number:04d}"
    for name in (f"{source.stem}{suffix}.json", f"{source.name}{suffix}.json"):
        target = str(source.with_name(name))
        if targets.setdefault(target, f"{source_file}{suffix}") == f"{source_file}{suffix}":
            return target
    raise ConfigError(f"{source_file}: another file of IN is written to {target}; rename one of them.")


def _write(document: dict[str, Any], target: Path, counts: _Counts) -> None:
    data = json_bytes(document) + b"\n"
    if not exists(target):
        write_bytes_atomic(target, data)
        counts.written += 1
    elif read_bytes(target) == data:
        counts.there += 1
    else:
        say(f"{target} holds something else and is left alone: move it, or choose another OUT.")
        counts.left_out += 1


def _show(counts: _Counts, output: Path) -> None:
    rows = [
        ("files read", f"{counts.files:,}"),
        ("responses", f"{counts.responses:,} in {counts.written + counts.there:,} files of {output}"),
        ("written now", f"{counts.written:,}"),
        ("there already", f"{counts.there:,}"),
        ("left out", f"{counts.left_out:,}"),
        *((f"noted: {kind}", f"{count:,}") for kind, count in sorted(counts.repaired.items())),
    ]
    print_pairs(console(), rows)
