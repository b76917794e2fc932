"""Models that cannot be asked again are on record, one beside the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.errors import ConfigError
from flows.folder.layout import OutputFolder
from flows.folder.refusals import note_refusals, refused_models


def test_refusals_are_added_to_those_on_record(tmp_path: Path) -> None:
    place = OutputFolder(tmp_path / "out")
    assert refused_models(place) == {}
    note_refusals(place, {"p1": "not found"})
    note_refusals(place, {"p2": "no prefill", "p1": "shut down"})
    assert refused_models(place) == {"p1": "shut down", "p2": "no prefill"}


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "\udcff"])
def test_a_damaged_record_is_named(content: str, tmp_path: Path) -> None:
    place = OutputFolder(tmp_path)
    place.refusals.parent.mkdir()
    place.refusals.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"not_asked_again.json cannot be read: .* Remove it"):
        refused_models(place)
