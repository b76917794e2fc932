"""How rows are printed, on a terminal and elsewhere."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from flows.commands.texts import headline_styles
from flows.runtime.terminal import print_pairs
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
