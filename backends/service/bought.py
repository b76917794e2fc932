"""Answers that are paid for and not read yet, in safety before the calls of the tokenizer that reading may need."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from backends.base import UNREAD
from backends.storage import files_in, read_bytes, remove, write_bytes_atomic
from kl.output.room import refusal_of

Json = dict[str, Any]

logger = logging.getLogger(__name__)

_SUFFIX = ".json"


class BoughtAnswers:
    """Answers by the key of their request, a file each until it is said that the caller has what became of it.

    Parameters
    ----------
    state_dir : Path, optional
        Where they survive the process; default in memory alone.
    """

    def __init__(self, state_dir: Path | None) -> None:
        self._folder = None if state_dir is None else state_dir / UNREAD
        self._answers: dict[str, Json] = {}

    def recall(self) -> Mapping[str, Json]:
        """Those of earlier processes too."""
        for path in () if self._folder is None else files_in(self._folder, _SUFFIX):
            try:
                entry = cast(Json, json.loads(read_bytes(path)))
                self._answers.setdefault(entry["key"], entry["answer"])
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s cannot be read (%s) and is left out; its response is asked again", path, error)
        return self._answers

    def get(self, key: str) -> Json | None:
        """The answer to a request."""
        return self._answers.get(key)

    async def add(self, key: str, answer: Json) -> None:
        """Put an answer on disk; one that the disk refuses is kept in memory until its response is stored.

        Raises
        ------
        OSError
            If it fails otherwise.
        """
        self._answers[key] = answer
        if self._folder is not None:
            data = json.dumps({"key": key, "answer": answer}).encode()
            try:
                await asyncio.to_thread(write_bytes_atomic, self._path(key), data)
            except OSError as error:
                # It is paid for, as are those in flight: the caller meets the same disk, and ends the asking in order.
                if refusal_of(error) is None:
                    raise
                logger.error("%s: an answer is kept in memory alone until its response is stored", error)

    async def drop(self, key: str) -> None:
        """Forget an answer, if there is one: the caller has the response, or a failure for good."""
        if self._answers.pop(key, None) is not None and self._folder is not None:
            await asyncio.to_thread(remove, self._path(key))

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{_SUFFIX}"
