"""Models that cannot be asked again, by what their preflight said: kept, so that every later stage decides alike."""

from __future__ import annotations

import json
from collections.abc import Mapping

from backends.errors import ConfigError
from backends.storage import read_bytes
from flows.folder.layout import OutputFolder
from flows.folder.output import write_json


def refused_models(place: OutputFolder) -> dict[str, str]:
    """Model → why it cannot be asked again; empty if nothing is on record.

    Raises
    ------
    ConfigError
        If the record cannot be read.
    """
    try:
        return dict(json.loads(read_bytes(place.refusals)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{place.refusals} cannot be read: {error}. Remove it, and P is tried again.") from error


def note_refusals(place: OutputFolder, refused: Mapping[str, str]) -> None:
    """Put models on record beside those that are."""
    write_json(place.refusals, refused_models(place) | dict(refused))
