"""How rows are printed, on a terminal and elsewhere."""

from __future__ import annotations

import logging
import sys
from io import StringIO

import pytest
from rich.console import Console

from backends.errors import ConfigError
from flows.commands.arguments import exit_code_of
from flows.commands.tables import print_table
from flows.commands.texts import headline_styles
from flows.runtime.environment import _terminal, say
from flows.runtime.logs import _handler
from flows.runtime.terminal import print_lines, print_pairs
from kl.output.glance import Figure
from kl.output.headline import ANSWER

ROWS = [(ANSWER, "0.62 nats"), ("Responses", "6 (6 prompts): 6 complete and " + "much " * 20)]


def printed(width: int, **options: bool) -> str:
    out = Console(
        file=StringIO(), width=width, color_system="standard" if options else None, highlight=False, **options
    )
    print_pairs(out, ROWS, {ANSWER: "bold green"})
    return out.file.getvalue()


def test_the_answer_stands_out_on_a_terminal_and_no_color_leaves_it_bold() -> None:
    assert "\x1b[1;32m0.62 nats\x1b[0m\n" in printed(80, force_terminal=True)
    assert "\x1b[1m0.62 nats\x1b[0m\n" in printed(80, force_terminal=True, no_color=True)
    assert "\x1b" not in printed(10_000)


@pytest.mark.parametrize("options", [{}, {"force_terminal": True}], ids=["plain", "colours forced"])
def test_no_row_is_filled_up_with_blanks(options: dict[str, bool]) -> None:
    for width in (80, 10_000):
        lines = printed(width, **options).splitlines()
        assert [line for line in lines if line.removesuffix("\x1b[0m").endswith(" ")] == []


@pytest.mark.parametrize(
    ("figure", "alarms", "whole", "style"),
    [
        (Figure("KL", "0.62", "0.37", "0.86", "0.43"), False, True, "bold green"),
        (Figure("KL", "0.62", "0.37", "0.86", "0.43"), False, False, "bold yellow"),
        (Figure("KL", "0.62", "", "", "0.43"), False, True, "bold yellow"),
        (Figure("KL", "0.62", "0.37", "0.86", "0.43"), True, True, "bold red"),
        (Figure("KL", "", "", "", "0.43"), False, True, "bold red"),
    ],
    ids=["sure", "in part", "no interval", "alarm", "not known"],
)
def test_its_colour_says_how_far_it_is_known(figure: Figure, alarms: bool, whole: bool, style: str) -> None:
    assert headline_styles([figure], alarms=alarms, whole=whole) == {ANSWER: style}


def test_a_verdict_has_the_colour_of_its_decision() -> None:
    for text, style in (("drift: rose", "bold red"), ("no drift: fell", "bold green"), ("undecided: x", "bold yellow")):
        assert headline_styles([], alarms=False, whole=True, verdict=[("Drift", text)])["Drift"] == style


ODD = "a\x1b[2J\u202eb\nc.json"
SHOWN = "a⟨U+001B⟩[2J⟨U+202E⟩b⏎c.json"


def test_names_are_shown_without_what_acts_on_a_terminal_and_colours_stay() -> None:
    for options in ({}, {"force_terminal": True, "color_system": "standard"}):
        out = Console(file=StringIO(), width=10_000, highlight=False, **options)
        print_pairs(out, [(ODD, ODD)], {ODD: "bold green"})
        print_lines(out, [ODD], style="bold green")
        print_table(out, ODD, [{"response": ODD, "KL": "1"}])
        text = out.file.getvalue()
        assert text.count(SHOWN) == 5
        assert "\x1b[2J" not in text
        assert ("\x1b[1;32m" in text) == bool(options)


def test_lines_on_standard_error_and_in_the_log_of_a_run_stay_on_their_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(ODD)
    assert exit_code_of(lambda: raised(ConfigError(f"{ODD} cannot be read"))) == 2
    assert exit_code_of(lambda: raised(OSError(5, "no", ODD))) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[:2] == [SHOWN, f"error: {SHOWN} cannot be read"]
    assert len(errors) == 3
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("flows.a", logging.INFO, "", 1, "read %s", (ODD,), sys.exc_info())
    for handler in (_terminal, _handler):
        line, *traceback = handler.format(record).splitlines()
        assert line.endswith(f"read {SHOWN}")
        assert traceback[-1] == "ValueError: why"


def raised(error: Exception) -> int:
    raise error
