"""How the prompts are written for both models: one conversation that two templates write otherwise is two contexts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from backends.base import Backend
from backends.errors import BackendError, RetryableBackendError
from backends.session import BackendSession
from backends.storage import read_bytes
from flows.config.comparison import Comparison
from flows.stages.inputs import InputFile, read_ahead, read_input
from kl.records import Prompt

logger = logging.getLogger(__name__)

_LOOKED_AT = 100  # files: two templates differ at once, or for a kind of prompt
_NAMED = 5
_AT_ONCE = 8


def rendered_prompts(files: list[InputFile], comparison: Comparison, session: BackendSession) -> dict[str, Any] | None:
    """What ``run.json`` says of the first prompts as Q is given them; None where the backend cannot say.

    Returns
    -------
    dict
        ``n`` prompts and the ``sha256`` of all their texts, ``stated_by_p`` of which P's files state how P was given
        them, and the files where the two ``differ``.
    """
    asked = list(islice(_prompts(files, comparison), _LOOKED_AT))
    model = comparison.config.model2
    written = session.run(prompt_hashes(session.backend, [(model, prompt) for _, prompt, _ in asked]))
    known = [(name, ours, p) for (name, _, p), ours in zip(asked, written, strict=True) if ours is not None]
    if not known:
        return None
    together = hashlib.sha256("\n".join(ours for _, ours, _ in known).encode("ascii"))
    return {
        "n": len(known),
        "sha256": together.hexdigest(),
        "stated_by_p": sum(p is not None for _, _, p in known),
        "differ": [name for name, ours, p in known if p is not None and p != ours],
    }


def rendered_before(comparison: Comparison) -> dict[str, Any] | None:
    """What the last finished run in this folder had on record, for one that asks nothing."""
    try:
        record = json.loads(read_bytes(comparison.folder.run))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return record.get("rendered_prompts")


def difference(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for people where ``rendered_prompts`` of a run's record says that the two templates differ."""
    found = record.get("rendered_prompts") or {}
    differ = found.get("differ", [])
    if differ:
        more = ", …" if len(differ) > _NAMED else ""
        yield (
            f"P and Q were given different texts for the same prompt in {len(differ)} of {found['stated_by_p']} files "
            f"({', '.join(differ[:_NAMED])}{more}): their chat templates differ, and the KL has that difference in it. "
            "Give both the same system text (backend.system), or compare models of one template."
        )


def _prompts(files: list[InputFile], comparison: Comparison) -> Iterator[tuple[str, Prompt, str | None]]:
    """(file, prompt as Q is asked it, hash of P's text if the file states one) of each different prompt."""
    seen: set[str] = set()
    system = comparison.options.system
    for file in read_ahead(files):
        parsed = read_input(file)
        if parsed.prompt is None or parsed.prompt.prompt_id in seen:
            continue
        seen.add(parsed.prompt.prompt_id)
        stated = (response.rendered_prompt_sha256 for response in parsed.responses)
        prompt = parsed.prompt if system is None else replace(parsed.prompt, system=system)
        yield file.source_file, prompt, next((item for item in stated if item is not None), None)


async def prompt_hashes(backend: Backend, asked: Sequence[tuple[str, Prompt]]) -> list[str | None]:
    """Hashes of the texts that models are given for prompts, asked a few at once; None where nobody says.

    A prompt that its model cannot be given is not known, either: its answers are failures with that reason. A service
    that does not answer is asked no more.
    """
    places, away, told = asyncio.Semaphore(_AT_ONCE), set[str](), set[str]()

    async def one(model: str, prompt: Prompt) -> str | None:
        async with places:
            if model in away:
                return None
            try:
                return await backend.rendered_prompt_sha256(prompt, model)
            except BackendError as error:
                if isinstance(error, RetryableBackendError):
                    away.add(model)  # each further prompt would be waited for as long
                if model not in told:
                    logger.info("%s: how prompts are written is not known: %s", model, error)
                told.add(model)
                return None

    return await asyncio.gather(*(one(model, prompt) for model, prompt in asked))
