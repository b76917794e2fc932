"""The command lines: flags made from the configuration models, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from backends.errors import ConfigError, TokenKLError, did_you_mean
from flows.config.models import CommonConfig
from flows.config.reading import SHORT_FORMS, ModelT, build_config, inner_model, read_yaml
from flows.runtime.environment import say, show_lines, shows
from flows.watch.report import EXIT_CODES, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE


class _WholeFlags(argparse.HelpFormatter):
    """Lines that break between words, and not within a flag."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line.

    Parameters
    ----------
    name : str
        The program, as ``python -m flows.NAME`` has it.
    description : str
    examples : sequence of (str, str), optional
        Calls, each as what it is for and the arguments; a line each in the help.
    epilog : str, optional
        What the exit codes mean.
    elsewhere : sequence of str, optional
        Paths of settings that have no flag: whoever writes one as a flag is told where it goes.
    """

    def __init__(
        self,
        name: str,
        description: str,
        examples: Sequence[tuple[str, str]] = (),
        epilog: str = EXIT_CODES,
        elsewhere: Sequence[str] = (),
    ) -> None:
        prog = " ".join(command_words(name))
        super().__init__(
            prog=prog, description=description, epilog=epilog, formatter_class=_WholeFlags, allow_abbrev=False
        )
        self.examples, self.elsewhere = examples, elsewhere
        self.appendix: Sequence[str] = ()  # lines at the end of the help

    def format_help(self) -> str:
        """The help, the examples and the appendix, these as they are."""
        calls = [line for what, call in self.examples for line in (f"  # {what}", f"  {self.prog} {call}")]
        return "\n".join([super().format_help(), *(["examples:", *calls, ""] if calls else []), *self.appendix])

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """The arguments; of a line that a shell asks to complete, the words that may follow, and the program's end."""
        if "_ARGCOMPLETE" in os.environ:
            from argcomplete import autocomplete

            autocomplete(self)
        values, unknown = self.parse_known_args(*arguments, **options)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}", self._meant(unknown))
        return values

    def error(self, message: str, hint: str = "") -> NoReturn:
        """Refuse the call, with where the help is."""
        raise ConfigError(f"{message}; see {self.prog} --help{hint and f'.{hint}'}")

    def _meant(self, unknown: Sequence[str]) -> str:
        """What the first flag that does not exist was meant to be."""
        wrong = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        asked = wrong.removeprefix("--").replace("-", "_")
        paths = [path for path in self.elsewhere if asked in (path, path.rpartition(".")[2])]
        if any(path.startswith(f"{asked}.") for path in self.elsewhere):
            paths = [f"{asked}.NAME"]
        if paths:
            return (
                f" It is no flag: write it in the file, or as {' or '.join(f'--set {path}=VALUE' for path in paths)}."
            )
        return did_you_mean(wrong, (flag for action in self._actions for flag in action.option_strings), cutoff=0.75)


def command_words(name: str) -> list[str]:
    """The words that start a program again, as it was started now: ``tokenkl run``, or ``python -m flows.run``."""
    return ["tokenkl", name] if Path(sys.argv[0]).stem == "tokenkl" else ["python", "-m", f"flows.{name}"]


# What stands for a value in the help, where its type alone does not say it.
_METAVARS = {
    "name": "NAME",
    "model1": "NAME",
    "model2": "NAME",
    "top_logprobs": "N|full",
    "responses_per_job": "N|auto",
    "max_cost_usd": "USD",
    "history": "FILE",
    "continue_from": "FILE",
    "older_than": "DURATION",
}


def make_parser(
    name: str,
    description: str,
    model: type[CommonConfig],
    *,
    examples: Sequence[tuple[str, str]] = (),
    epilog: str = EXIT_CODES,
    skip: Sequence[str] = (),
    required: Sequence[str] = (),
    about_set: str | None = None,
) -> Parser:
    """A parser with ``--config``, ``--set`` and one flag per plain field of a configuration model.

    Parameters
    ----------
    name, description, examples, epilog
        As of `Parser`.
    skip : sequence of str
        Fields that are no flags.
    required : sequence of str
        Fields that have a default in the model and must be given all the same.
    about_set : str, optional
        What the help of ``--set`` says. Default: which settings have no flag, and where the backend's options are.
    """
    elsewhere = {field: _paths(field, model.model_fields[field]) for field in skip}
    parser = Parser(name, description, examples, epilog, [path for paths in elsewhere.values() for path in paths])
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file with any of these settings; flags win over it."
    )
    add_levels(parser)
    needed = [field for field, found in model.model_fields.items() if found.is_required() or field in required]
    for field in dict.fromkeys([*needed, *model.model_fields]):
        if field not in skip:
            _add_flag(parser, field, model.model_fields[field], required=field in needed)
    if about_set is None:
        texts = (f"{', '.join(paths)}: {_help(field, model.model_fields[field])}" for field, paths in elsewhere.items())
        about_set = (
            "Set any setting by its path, such as backend.poll_interval_s=30; may be repeated, wins over all others. "
            f"By file or --set only: {' '.join(texts)} A backend's own options are shown by --backend NAME --help."
        )
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help=about_set)
    return parser


def _add_flag(parser: Parser, name: str, field: FieldInfo, *, required: bool) -> None:
    flag, about = "--" + name.replace("_", "-"), [_help(name, field)]
    if required:
        about.append("Required, here or in the file.")
    if name in SHORT_FORMS and len(paths := _paths(name, field)) > 1:
        about.append(f"With --set or in the file: {', '.join(paths[1:])}.")
    text = " ".join(about)
    if field.annotation is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        action = "append" if typing.get_origin(field.annotation) is tuple else "store"
        parser.add_argument(flag, action=action, metavar=_metavar(name, field), help=text)


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


def _paths(name: str, field: FieldInfo) -> list[str]:
    """How a setting, or each of those inside of it, is written with ``--set``."""
    inner = inner_model(field)
    return [name] if inner is None else [f"{name}.{key}" for key in inner.model_fields]


def _help(name: str, field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if name == "backend":
        default = default.name if default is not None else None
    if default in (None, ()) or isinstance(default, bool | BaseModel):
        return text
    return f"{text} Default: {default}."


def _metavar(name: str, field: FieldInfo) -> str:
    if name in SHORT_FORMS and (inner := inner_model(field)) is not None:
        name, field = SHORT_FORMS[name], inner.model_fields[SHORT_FORMS[name]]
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
    from backends.registry import check_known, registered
    from flows.config.catalogue import describe, full_text

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
        say(f"error: {error}")
        return EXIT_USAGE
    except OSError as error:
        say(f"error: {error}")
        return EXIT_ERROR
    except KeyboardInterrupt:
        say("stopped. Run the same command again to go on.")
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
        say(f"error: {result if expected else state.message}")
        return None
    if result is None:
        lost = "its result is lost, what it wrote is not: run the same command again to see it"
        say(f"error: the flow ended {state.name}; {lost}")
    return result
