"""How the prompts are written for both models: one conversation that two templates write otherwise is two contexts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from backends.base import Backend
from backends.errors import BackendError
from backends.session import BackendSession
from backends.storage import read_bytes
from flows.config.comparison import Comparison
from flows.stages.inputs import InputFile, read_ahead, read_input
from kl.input.responses import prompt_sha256
from kl.records import Prompt

_LOOKED_AT = 100  # files: two templates differ at once, or for a kind of prompt
_NAMED = 5


def rendered_prompts(files: list[InputFile], comparison: Comparison, session: BackendSession) -> dict[str, Any] | None:
    """What ``run.json`` says of the first prompts as Q is given them; None where the backend cannot say.

    Returns
    -------
    dict
        ``n`` prompts and the ``sha256`` of all their texts, ``stated_by_p`` of which P's files state how P was given
        them, and the files where the two ``differ``.
    """
    asked = list(islice(_prompts(files, comparison), _LOOKED_AT))
    written = session.run(_written(session.backend, [prompt for _, prompt, _ in asked], comparison.config.model2))
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


async def _written(backend: Backend, prompts: list[Prompt], model: str) -> list[str | None]:
    hashes: list[str | None] = []
    for prompt in prompts:
        try:
            text = await backend.rendered_prompt(prompt, model)
        except BackendError:
            text = None  # a prompt that the model cannot be given: its contexts are failures with that reason
        hashes.append(None if text is None else prompt_sha256(text))
        if hashes == [None]:
            return [None] * len(prompts)  # a backend that cannot say it of one says it of none
    return hashes
