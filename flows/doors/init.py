"""``python -m flows.init DIR``: the examples, to start from where there is no checkout."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from backends.errors import ConfigError
from backends.storage import write_bytes_atomic
from flows.commands.arguments import Parser, exit_code_of
from flows.runtime.environment import say
from flows.watch.report import EXIT_COMPLETE, EXIT_INCOMPLETE

# And not whatever else lies beside them in a checkout.
_PATTERNS = (
    "examples/*.yaml",
    "examples/prompts.txt",
    "examples/responses/*.json",
    "automations/*.yaml",
    "prefect.yaml",
)
_DESCRIPTION = (
    "Writes the examples into a folder: configurations for the model in the box, for Vertex AI and for servers, "
    "responses of a P to compare with, prompts, and prefect.yaml with automations/ for schedules (docs/deploying.md). "
    "Files that are there already are left alone: what they hold is yours."
)
_EXAMPLES = (("into a folder of its own", "kl"), ("where you are", "."))
_EPILOG = "exit codes: 0 all are there; 3 some hold something else and were left alone; 2 a mistake in the call"
_QUICKSTART = "examples/quickstart.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the examples from the command line; returns the exit code."""
    return exit_code_of(lambda: _init(sys.argv[1:] if arguments is None else arguments))


def _init(arguments: Sequence[str]) -> int:
    parser = Parser("init", _DESCRIPTION, _EXAMPLES, _EPILOG)
    parser.add_argument("folder", metavar="DIR", type=Path, help="Where to; made when absent.")
    folder: Path = parser.parse_args(arguments).folder
    written, there, other = 0, 0, 0
    for name, data in _files():
        target = folder / name
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomic(target, data)
                written += 1
            elif target.is_file() and target.read_bytes() == data:
                there += 1
            else:
                other += 1
                say(f"{target} holds something else and is left alone")
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror or error}.") from error
    counts = f"{written} files written" + f", {there} were there" * (there > 0) + f", {other} left alone" * (other > 0)
    print(f"{folder}: {counts}. To begin:")  # noqa: T201
    print(f"  cd {shlex.quote(str(folder))} && tokenkl run --config {_QUICKSTART}")  # noqa: T201
    return EXIT_INCOMPLETE if other else EXIT_COMPLETE


def _files() -> Iterator[tuple[str, bytes]]:
    """Each example by its place below the folder."""
    source = _source()
    for pattern in _PATTERNS:
        for path in sorted(source.glob(pattern)):
            yield path.relative_to(source).as_posix(), path.read_bytes()


def _source() -> Path:
    """Where a wheel has them (pyproject.toml), else the checkout."""
    packed = Path(__file__).parents[1] / "starter"
    return packed if packed.is_dir() else packed.parents[1]


if __name__ == "__main__":
    raise SystemExit(main())
