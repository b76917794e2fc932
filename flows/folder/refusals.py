"""Models that cannot be asked again, by what their preflight said: kept, so that every later stage decides alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from backends.errors import ConfigError
from backends.storage import read_bytes
from flows.folder.layout import OutputFolder
from flows.folder.lock import exclusive
from flows.folder.output import write_json

_ANYWHERE = ""  # where a model was refused, in a record that does not say it: {model: why}


class Refusal(NamedTuple):
    """Why a model cannot be asked again, and the score keys of its second answers that were bought before."""

    why: str
    kept: frozenset[str] = frozenset()


def refused_models(place: OutputFolder, at: str = _ANYWHERE) -> dict[str, Refusal]:
    """The models that cannot be asked again ``at`` a project and location; empty if nothing is on record.

    Raises
    ------
    ConfigError
        If the record cannot be read.
    """
    try:
        record = _read(place)
        found = {model: by_place.get(at) or by_place.get(_ANYWHERE) for model, by_place in record.items()}
        return {model: Refusal(item["why"], frozenset(item["kept"])) for model, item in found.items() if item}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{place.refusals} cannot be read: {error}. Remove it, and P is tried again.") from error


def note_refusals(place: OutputFolder, refused: Mapping[str, Refusal], at: str = _ANYWHERE) -> None:
    """Put models on record beside those that are, also by runs that share the store and do the same just now."""
    with exclusive(place.refusals):
        record = _read(place)
        for model, (why, kept) in refused.items():
            record[model] = record.get(model, {}) | {at: {"why": why, "kept": sorted(kept)}}
        write_json(place.refusals, record)


def _read(place: OutputFolder) -> dict[str, dict[str, Any]]:
    try:
        record = json.loads(read_bytes(place.refusals))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {
        model: {_ANYWHERE: {"why": found, "kept": []}} if isinstance(found, str) else found
        for model, found in record.items()
    }
