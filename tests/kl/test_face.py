"""`from kl import …`: the names, what they cost, and their document."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys

import pytest

import kl
from tests import ROOT
from tests.documents import code_blocks

LIBRARY = ROOT / "docs" / "library.md"

# A name that goes from here breaks the programs of others; one that comes must be kept.
NAMES = set(
    "Aligned CANDIDATES Candidate CandidateListError Estimate FinishedRunError PairedDifference Position "
    "PositionDivergences Prompt RESPONSES Response ResponseFile ResponseInfo Run RunFacts Sampling Score ScoreFailure "
    "SpreadEvidence SpreadPrior Summary TOKENS Turn align cells compare diagnose exact_kl headline listed load_run "
    "lower_bounds measure_response paired_difference pooled_prior ratio_estimate read_responses response_spread "
    "sampled_token summarise_dataset summarise_responses write_part write_responses write_summary write_tokens".split()
)


def imported_for_types() -> dict[str, str]:
    """Name → module, of the imports that a type checker reads."""
    tree = ast.parse((ROOT / "kl" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_names_are_these() -> None:
    assert set(kl.__all__) == NAMES
    assert set(dir(kl)) >= NAMES


def test_the_interpreter_and_the_type_checker_see_the_same_names() -> None:
    homes = imported_for_types()
    assert set(homes) == NAMES
    for name, home in homes.items():
        found = getattr(kl, name)
        assert found is getattr(importlib.import_module(home), name)
        assert getattr(found, "__module__", home) in (home, "polars.schema"), f"{name} is not at home in {home}"


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'kl' has no attribute 'kompare'"):
        _ = kl.kompare  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import kl", {"numpy", "scipy", "polars"}),
        ("import kl.records", {"scipy", "polars"}),
        ("from kl import Response, Score", {"scipy", "polars"}),
        ("from kl import compare", {"prefect", "pluggy", "pydantic"}),
        ("from kl import *", {"prefect", "pluggy", "pydantic", "httpx", "requests", "google", "flows", "backends"}),
    ],
)
def test_a_name_costs_no_more_than_its_module(statement: str, without: set[str]) -> None:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(done.stdout.split()) & without


def test_the_document_lists_every_name_once() -> None:
    section = LIBRARY.read_text(encoding="utf-8").split("\n## All names\n", 1)[1]
    firsts = [row.split("|")[1] for row in section.splitlines() if row.startswith("|")]
    listed = [name for cell in firsts for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(NAMES)


def test_the_document_describes_every_array_of_the_comparison() -> None:
    text = LIBRARY.read_text(encoding="utf-8")
    assert [name for name in kl.PositionDivergences.__dataclass_fields__ if f"`{name}`" not in text] == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_example_prints_what_the_document_shows(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(code_blocks(LIBRARY, "python")[number], LIBRARY.name, "exec"), {})
    assert capsys.readouterr().out == code_blocks(LIBRARY, "text")[number]


def test_every_example_is_run() -> None:
    assert len(code_blocks(LIBRARY, "python")) == len(code_blocks(LIBRARY, "text")) == 3
