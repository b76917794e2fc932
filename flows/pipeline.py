"""Sample, run and analyse in one command: ``python -m flows.pipeline --config FILE``.

The file has the sections ``sample``, ``run`` and ``analyze``, each with the settings of the command of that name; each
can also be given to its command alone, as ``--config FILE#sample``. Every stage goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from backends.errors import ConfigError, did_you_mean
from flows.commands.arguments import Parser, add_levels, exit_code_of
from flows.config.backend import resolve_backend
from flows.config.models import RunConfig
from flows.config.reading import build_config, read_yaml
from flows.config.sampling import SampleConfig
from flows.runtime.environment import prepare_environment
from flows.watch.report import EXIT_COMPLETE, EXIT_DRIFT, EXIT_INCOMPLETE

_DESCRIPTION = (
    "Samples, runs and analyses in one command. The file has the sections sample, run and analyze, each with the "
    "settings of the command of that name; each can also be given to its command alone, as --config FILE#sample. Every "
    "stage goes on where it was stopped."
)
_EXAMPLES = (("all stages by one file", "--config examples/pipeline.yaml"),)
_EPILOG = (
    "exit codes, that of the worst stage: 0 nothing is missing; 3 positions or responses are (each with its reason in "
    "the outputs); 4 drifted, with fail_on_drift; 5 with stage: collect: jobs still run, collect again later; 2 a "
    "mistake in the settings or the call; 130 stopped by a signal; 1 anything else"
)
_STAGES = ("sample", "run", "analyze")
# What does not keep the next stage from its work.
_GOES_ON = (EXIT_COMPLETE, EXIT_INCOMPLETE, EXIT_DRIFT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages from the command line; returns the exit code of the worst of them."""
    return exit_code_of(lambda: _pipeline(_parse(sys.argv[1:] if arguments is None else arguments)))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("pipeline", _DESCRIPTION, _EXAMPLES, _EPILOG)
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="YAML file with the sections. Required."
    )
    add_levels(parser)
    return parser.parse_args(arguments)


def _pipeline(options: argparse.Namespace) -> int:
    prepare_environment()
    file: Path = options.config
    sections = read_yaml(file)
    for name in sections:
        if name not in _STAGES:
            raise ConfigError(
                f"{file} has a section {name!r}.{did_you_mean(name, _STAGES)} Known: {', '.join(_STAGES)}"
            )
    # All mistakes before anything is bought.
    for stage, model in (("sample", SampleConfig), ("run", RunConfig)):
        if stage in sections:
            resolve_backend(build_config(model, _section(file, stage), {}))
    analyses = list(_analyses(sections, file))
    code = EXIT_COMPLETE
    for stage in ("sample", "run"):
        if stage in sections:
            ended = _run_flow(stage, _section(file, stage), options.level)
            if ended not in _GOES_ON:
                return ended
            code = max(code, ended)
    from flows.analyze import main as analyze

    return max([code, *(analyze(arguments) for arguments in analyses)])


def _section(file: Path, stage: str) -> Path:
    return file.with_name(f"{file.name}#{stage}")


def _run_flow(stage: str, config: Path, level: str | None) -> int:
    arguments = ["--config", str(config), *([level] if level is not None else [])]
    command, flow = import_module(f"flows.commands.{stage}"), {"sample": "sample_responses", "run": "kl_divergence"}
    return int(command.main(lambda: getattr(import_module(f"flows.{stage}"), flow[stage]), arguments))


def _analyses(sections: Mapping[str, Any], file: Path) -> Iterator[list[str]]:
    """The flags of each analysis; the section is one mapping of them, or a list of such."""
    from flows.analyze import check_arguments

    found = sections.get("analyze", [])
    for flags in [found] if isinstance(found, dict) else found:
        if not isinstance(flags, dict):
            raise ConfigError(f"{file}: analyze is a mapping of flags, such as {{top: 10}}, or a list of such.")
        given = dict(flags)
        folder = given.pop("run_dir", (sections.get("run") or {}).get("output_dir"))
        of_other_runs = not {"compare", "history", "result_dir"}.isdisjoint(given)
        arguments = [str(folder)] if folder is not None and not of_other_runs else []
        for name, value in given.items():
            if value is not False:
                values = value if isinstance(value, list) else [] if value is True else [value]
                arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
        check_arguments(arguments)
        yield arguments


if __name__ == "__main__":
    raise SystemExit(main())
