"""Models that cannot be asked again are on record, one beside the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.errors import ConfigError
from flows.folder.layout import OutputFolder
from flows.folder.refusals import Refusal, note_refusals, refused_models


def test_refusals_are_added_to_those_on_record(tmp_path: Path) -> None:
    place = OutputFolder(tmp_path / "out")
    assert refused_models(place) == {}
    note_refusals(place, {"p1": Refusal("not found")})
    note_refusals(place, {"p2": Refusal("no prefill"), "p1": Refusal("shut down", frozenset({"key"}))})
    assert refused_models(place) == {"p1": Refusal("shut down", frozenset({"key"})), "p2": Refusal("no prefill")}


def test_a_refusal_holds_where_it_was_met(tmp_path: Path) -> None:
    place = OutputFolder(tmp_path / "out")
    note_refusals(place, {"p": Refusal("not found here")}, "project/us-central1")
    note_refusals(place, {"p": Refusal("nor here")}, "project/us-east1")
    assert refused_models(place, "project/us-central1") == {"p": Refusal("not found here")}
    assert refused_models(place, "project/us-east1") == {"p": Refusal("nor here")}
    assert refused_models(place, "project/global") == {}


def test_a_record_that_names_no_place_holds_everywhere(tmp_path: Path) -> None:
    place = OutputFolder(tmp_path)
    place.refusals.parent.mkdir()
    place.refusals.write_text('{"p": "not found"}')
    assert refused_models(place, "project/us-central1") == {"p": Refusal("not found")}
    note_refusals(place, {"p2": Refusal("no prefill")}, "project/us-central1")
    assert set(refused_models(place, "project/us-central1")) == {"p", "p2"}


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\udcff", '{"p": 3}', '{"p": {"": {"why": "x"}}}'])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    place = OutputFolder(tmp_path)
    place.refusals.parent.mkdir()
    place.refusals.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"not_asked_again.json cannot be read: .* Remove it"):
        refused_models(place)
