"""The command lines: flags made from the configuration models, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel

from backends.errors import ConfigError, TokenKLError
from flows.config.models import CommonConfig
from flows.config.reading import SHORT_FORMS, ModelT, build_config, inner_model, read_yaml
from flows.runtime.environment import show_lines, shows
from flows.watch.report import EXIT_CODES, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line. The lines of ``appendix`` end its help as they are."""

    appendix: Sequence[str] = ()

    def format_help(self) -> str:
        """The help, and the appendix."""
        return "\n".join([super().format_help(), *self.appendix])

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """The arguments; of a line that a shell asks to complete, the words that may follow, and the program's end."""
        if "_ARGCOMPLETE" in os.environ:
            from argcomplete import autocomplete

            autocomplete(self)
        return super().parse_args(*arguments, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse the call, with where the help is."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def command_words(name: str) -> list[str]:
    """The words that start a program again, as it was started now: ``tokenkl run``, or ``python -m flows.run``."""
    return ["tokenkl", name] if Path(sys.argv[0]).stem == "tokenkl" else ["python", "-m", f"flows.{name}"]


# What stands for a value in the help, where its type alone does not say it.
_METAVARS = {
    "backend": "NAME",
    "task_runner": "{threads,dask,ray}",
    "model1": "NAME",
    "model2": "NAME",
    "top_logprobs": "N|full",
    "responses_per_job": "N|auto",
    "max_cost_usd": "USD",
    "history": "FILE",
    "continue_from": "FILE",
}


def make_parser(
    prog: str, description: str, model: type[CommonConfig], skip: Sequence[str] = (), epilog: str = EXIT_CODES
) -> Parser:
    """A parser with ``--config``, ``--set`` and one flag per plain field of a configuration model.

    The fields in ``skip`` are no flags; the help says how to set them.
    """
    parser = Parser(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with any of these settings; flags win over it."
    )
    add_levels(parser)
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        flag = "--" + name.replace("_", "-")
        text = _help(name, field)
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, metavar=_metavar(name, field), help=text)
    parser.add_argument(
        "--set",
        dest="sets",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Set any setting by its path, such as backend.poll_interval_s=30; may be repeated, wins over all others. "
        f"{_settings_without_flags(model, skip)}A backend's own options are shown by --backend NAME --help.",
    )
    return parser


def add_levels(parser: Parser) -> None:
    """Give a parser ``-v`` and ``-q``, whose choice is ``level``; None is neither."""
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("-v", "--verbose", dest="level", action="store_const", const="-v",
                        help="Show everything that is logged, such as the name of each batch job.")  # fmt: skip
    levels.add_argument("-q", "--quiet", dest="level", action="store_const", const="-q",
                        help="Show warnings and the result alone.")  # fmt: skip


def take_level(level: str | None) -> None:
    """Show log lines as ``-v`` or ``-q`` asks."""
    if level is not None:
        show_lines({"-v": logging.DEBUG, "-q": logging.WARNING}[level])


def _settings_without_flags(model: type[CommonConfig], names: Sequence[str]) -> str:
    """How the settings that are no flags are written in a file or with ``--set``."""
    texts: list[str] = []
    for name in names:
        field = model.model_fields[name]
        inner = inner_model(field)
        paths = [name] if inner is None else [f"{name}.{key}" for key in inner.model_fields]
        about = _help(name, field)
        texts.append(f"{', '.join(paths)}: {about[:1].lower()}{about[1:]} ")
    return f"By file or --set only: {''.join(texts)}" if texts else ""


def _help(name: str, field: Any) -> str:
    text = (field.description or "").replace("%", "%%")
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if name == "backend":
        default = default.name if default is not None else None
    if default in (None, ()) or isinstance(default, bool | BaseModel):
        return text
    return f"{text} Default: {default}."


def _metavar(name: str, field: Any) -> str:
    if name in _METAVARS:
        return _METAVARS[name]
    choices = [item for item in typing.get_args(field.annotation) if isinstance(item, str)]
    if choices:
        return "{" + ",".join(choices) + "}"
    kinds = {str(item) for item in typing.get_args(field.annotation)} | {str(field.annotation)}
    if any("int" in kind for kind in kinds):
        return "N"
    return "DIR" if any("Path" in kind for kind in kinds) else "TEXT"


def _options_of_chosen(arguments: Sequence[str]) -> list[str]:
    """The options of the backend that a call names, by flag or in its file; nothing if it names none."""
    from backends.catalogue import describe, full_text
    from backends.registry import check_known, registered

    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--backend")
    chosen.add_argument("--config", type=Path)
    called, _ = chosen.parse_known_args(arguments)
    name = called.backend
    if name is None and called.config is not None:
        choice = read_yaml(called.config).get("backend")
        name = choice.get("name") if isinstance(choice, dict) else None
    if name is None:
        return []
    known = registered()
    check_known(name, known)
    return ["the chosen backend:", *full_text(describe(name, known[name]))]


def parse_config(parser: Parser, model: type[ModelT], arguments: Sequence[str]) -> ModelT:
    """The configuration that flags, file and ``--set`` give.

    Raises
    ------
    ConfigError
        One line on what is wrong.
    """
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.appendix = _options_of_chosen(arguments)
    values = vars(parser.parse_args(arguments))
    take_level(values.pop("level"))
    config_file = values.pop("config")
    sets = values.pop("sets")
    for setting, name in SHORT_FORMS.items():
        if values.get(setting) is not None:
            values[setting] = {name: values[setting]}
    return build_config(model, config_file, values, sets)


def show_life() -> None:
    """On a terminal, say that the program has begun; the next line, which may be all there is, takes its place."""
    if sys.stderr.isatty() and shows(logging.INFO):
        print("starting …", end="\r", file=sys.stderr, flush=True)  # noqa: T201


def exit_code_of(program: Callable[[], int]) -> int:
    """Run a program; the user's mistakes (exit code 2) and failing disks or buckets (1) end it with one line."""
    try:
        return program()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_USAGE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("stopped. Run the same command again to go on.", file=sys.stderr)  # noqa: T201
        return EXIT_INTERRUPTED


def returned(state: Any) -> Any:
    """What a flow returned, or the exception it ended with; None where the state holds neither.

    A server that is told of an end twice, because its first answer came too late, gives back its own copy of the state.
    """
    return None if state.is_completed() and state.data is None else state.result(raise_on_failure=False)


def result_of(state: Any) -> Any:
    """What a flow returned; None if it failed, with the reason on standard error.

    Raises
    ------
    ConfigError
        If that is why it failed.
    """
    result = returned(state)
    if isinstance(result, ConfigError):
        raise result
    expected = isinstance(result, TokenKLError | OSError)
    if isinstance(result, BaseException) and not expected:
        traceback.print_exception(result)  # a fault of this program: whoever mends it needs to see where
    if not state.is_completed():
        print(f"error: {result if expected else state.message}", file=sys.stderr)  # noqa: T201
        return None
    if result is None:
        lost = "its result is lost, what it wrote is not: run the same command again to see it"
        print(f"error: the flow ended {state.name}; {lost}", file=sys.stderr)  # noqa: T201
    return result
