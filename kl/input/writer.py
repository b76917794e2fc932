"""Writes files of P's responses, in the form that `kl.input.responses` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kl.records import Candidate, Position, Prompt, Response


def response_document(
    prompt: Prompt, model: str, sampling: Mapping[str, Any], responses: Sequence[Response]
) -> dict[str, Any]:
    """The content of one response file, as JSON types.

    The bytes of tokens are written where a text alone does not say them: a token that holds a part of a character.

    Parameters
    ----------
    sampling : mapping
        How the responses were drawn (temperature, top_p, seed, …); kept beside them.
    """
    return document_head(prompt, model, sampling) | {"responses": [response_entry(item) for item in responses]}


def document_head(prompt: Prompt, model: str, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """What a response file says beside its responses; parameters as of `response_document`."""
    return prompt_fields(prompt) | {"model": model, "sampling": dict(sampling)}


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """``prompt``, and ``system`` where there is one, as a response file has them."""
    plain = len(prompt.turns) == 1 and prompt.turns[0].role == "user"
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
    system = {} if prompt.system is None else {"system": prompt.system}
    return {"prompt": prompt.turns[0].content if plain else turns, **system}


def response_entry(response: Response) -> dict[str, Any]:
    """One response as it stands in a file."""
    split = any(_is_split(position.sampled) for position in response.positions)
    version = {} if response.model_version is None else {"model_version": response.model_version}
    return {
        "model": response.model,
        **version,
        "text": response.text,
        "finish_reason": response.finish_reason,
        "logprobs": {"content": [_position(position, split) for position in response.positions]},
    }


def _position(position: Position, with_bytes: bool) -> dict[str, Any]:
    entry = _candidate(position.sampled, with_bytes) | {
        "top_logprobs": [candidate_entry(candidate) for candidate in position.top]
    }
    return entry | ({"may_lack": True} if position.may_lack else {})


def _candidate(candidate: Candidate, with_bytes: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"token": candidate.token, "logprob": candidate.logprob}
    if candidate.token_id is not None:
        entry["token_id"] = candidate.token_id
    if with_bytes and candidate.token_bytes is not None:
        entry["bytes"] = list(candidate.token_bytes)
    return entry


def candidate_entry(candidate: Candidate) -> dict[str, Any]:
    """An entry of a list as it stands in a file."""
    return _candidate(candidate, _is_split(candidate))


def _is_split(candidate: Candidate) -> bool:
    return candidate.token_bytes is not None and candidate.token.encode("utf-8") != candidate.token_bytes
