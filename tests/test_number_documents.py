"""The documents about the numbers name every number there is, and show what the programs print."""

from __future__ import annotations

import dataclasses
import re

import pytest

from kl.estimators.divergence import ESTIMATORS
from kl.output.kl_json import DETAIL_NAMES
from kl.statistics.summary import Divergence, Summary
from kl.tables.responses import RESPONSES
from kl.tables.schemas import CANDIDATES, TOKENS
from tests.documents import ROOT

READING = (ROOT / "docs" / "reading-the-numbers.md").read_text(encoding="utf-8")
ESTIMATORS_TEXT = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")


def names_in_table(heading: str) -> list[str]:
    """The names in backticks of the first column of the table below a heading."""
    section = READING.split(f"\n### {heading}\n", 1)[1]
    rows = section[section.index("\n|") :].split("\n\n", 1)[0]
    return [name for row in rows.splitlines()[3:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("Token columns", list(TOKENS)),
        ("Response columns", list(RESPONSES)),
        ("Candidate columns", list(CANDIDATES)),
        ("Summary fields", [field.name for field in dataclasses.fields(Summary)]),
    ],
)
def test_every_column_and_field_is_described_once(heading, names):
    assert sorted(names_in_table(heading)) == sorted(names)


def test_other_names_of_token_columns_are_described():
    section = READING.split("\n### `*_kl.json`\n", 1)[1]
    renamed = [new for old, new in DETAIL_NAMES.items() if old != new]
    assert [name for name in renamed if f"`{name}`" not in section] == []


def test_every_estimator_is_described():
    named = {*ESTIMATORS, *(field.name for field in dataclasses.fields(Divergence))} - {"estimate", "plausible_upper"}
    assert [name for name in named if f"`{name}`" not in ESTIMATORS_TEXT] == []
