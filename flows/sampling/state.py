"""What sampling keeps beside its files until they are whole: responses on arrival, refusals, the backend's records."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from backends.base import UNREAD
from backends.errors import ConfigError
from backends.scores.lines import SUFFIX, lines_in
from backends.service.counting import COUNTS
from backends.storage import files_in, is_remote, local_copies, read_bytes, remove, remove_folder, write_bytes_atomic
from flows.folder.layout import OutputFolder

logger = logging.getLogger("flows.sample")

_NAME = ".sampling"


class SamplingState:
    """The folder ``.sampling`` in an output folder; it is gone when every response is in its file.

    It holds the ``identity`` of this sampling, which is a part of the name of every response, so that a second sampling
    of the same prompts elsewhere draws anew and is not given the remote jobs of the first; ``models``, which says
    what decides the answers of each model; and ``journal/``, a line for each response that came and for each that never
    will.

    Parameters
    ----------
    output_dir : Path
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / _NAME
        self._identity = self.folder / "identity"
        self._identities = self.folder / "models"
        self._journal = self.folder / "journal"
        self._lines = lines_in(self._journal, uuid.uuid4().hex)

    @property
    def jobs(self) -> Path:
        """The records of batch jobs."""
        return self.folder / "jobs"

    def identity(self, *, make: bool = True) -> str:
        """The name of this sampling; empty where there is none yet and none is to be made."""
        try:
            known = read_bytes(self._identity).decode("ascii").strip()
        except FileNotFoundError:
            known = ""
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._identity} cannot be read; restore it, or jobs may be bought twice.") from error
        if not known and make:
            known = uuid.uuid4().hex
            write_bytes_atomic(self._identity, known.encode("ascii"))
        return known

    def identities(self) -> dict[str, dict[str, Any]]:
        """What decides the answers of each model that was asked, by its name; empty where no run has said so."""
        try:
            return json.loads(read_bytes(self._identities))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(f"{self._identities} cannot be read; restore it, or remove it.") from error

    def keep_identities(self, identities: dict[str, dict[str, Any]]) -> None:
        """Put them on disk."""
        write_bytes_atomic(self._identities, json.dumps(identities, indent=1).encode("ascii"))

    def add(self, entry: dict[str, Any]) -> None:
        """Put an answer on disk."""
        self._lines.append(json.dumps(entry, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n")

    def recorded(self) -> Iterator[dict[str, Any]]:
        """What earlier runs left; a line that was cut short is left out."""
        for path, copy in local_copies(files_in(self._journal, SUFFIX)):
            with copy.open("rb") as file:
                for line in file:
                    try:
                        entry = json.loads(line)
                        entry["key"]
                    except (ValueError, KeyError, TypeError):
                        logger.warning("%s: a line was cut short and is left out; its response is asked again", path)
                        continue
                    yield entry

    def clear(self) -> None:
        """Everything is in the files: only rows that the backend was told to keep stay."""
        self._lines.clear()
        for folder in (self._journal, self.jobs, self.folder / UNREAD):
            remove_folder(folder)
        remove(self._identity)
        remove(self._identities)
        remove(self.folder / COUNTS)


def leave_no_lock(folder: OutputFolder) -> None:
    """Remove what the lock of a finished sampling leaves, and the folder if nothing else is in it."""
    if is_remote(folder.path):
        remove_folder(folder.lock)
        return
    remove(folder.lock)
    with suppress(OSError):  # rows that were kept are in it
        folder.path.rmdir()
