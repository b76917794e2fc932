"""Tokens that are asked for by name: further requests at a position, with their ids (vLLM's ``logprob_token_ids``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from backends.base import ScoreRequest
from backends.errors import ConfigError
from backends.openai_compatible.answers import Entry, ListError, falling
from backends.openai_compatible.asking import Answered, Asker
from backends.openai_compatible.found import Found
from backends.openai_compatible.vocabulary import ServerVocabulary
from kl.pieces import is_whole
from kl.records import Candidate, Score

_MOST_AT_ONCE = 128  # ids that vLLM takes in a request


def check_can(found: Found) -> None:
    """Refuse a server that has no way to be asked so.

    Raises
    ------
    ConfigError
        With what can.
    """
    if found.kind != "vllm" or found.form != "ids":
        raise ConfigError(
            f"wanted_tokens is on, but this server ({found.kind}, asked by {found.form}) cannot be asked for tokens by "
            "name; vLLM can (logprob_token_ids). Leave wanted_tokens out."
        )


async def wanted_ids(request: ScoreRequest, vocabulary: ServerVocabulary) -> dict[str, tuple[int, ...]]:
    """By key, the ids of the tokens that are asked for, where P's vocabulary is the server's.

    A token is left out if the server says another text for its id than P does: which one it is is then not certain.
    """
    assert request.wanted is not None, "asked only where there are some"
    tokens = set(chain.from_iterable(request.wanted))
    known = {token: token.token_id for token in tokens if token.token_id is not None}
    ids = sorted({index for index in known.values() if 0 <= index < len(vocabulary)})
    await vocabulary.fetch_texts(ids)
    certain = {token for token, index in known.items() if index in set(ids) and _is_same(token, index, vocabulary)}
    return {
        key: tuple(dict.fromkeys(known[token] for token in listed if token in certain))
        for key, listed in zip(request.keys, request.wanted, strict=True)
    }


def _is_same(token: Candidate, index: int, vocabulary: ServerVocabulary) -> bool:
    text = vocabulary.text_of(index)
    if token.token_bytes is not None and is_whole(text):
        return token.token_bytes == text.encode()
    # The text of a part of a character says nothing against the id, which is of one vocabulary.
    return token.token == text or not (is_whole(token.token) and is_whole(text))


async def values_of(asker: Asker, ids: Sequence[int], tokens: Sequence[int], longest: int) -> list[Answered]:
    """The answers to one context about some tokens, as few as a server takes them in."""
    size = min(longest, _MOST_AT_ONCE)
    return [
        await asker.by_ids(ids, len(part), logprob_token_ids=list(part))
        for part in (tokens[start : start + size] for start in range(0, len(tokens), size))
    ]


def entries_of(answers: Iterable[Answered], tokens: Sequence[int]) -> list[Entry]:
    """The entries of the tokens that were asked for, by falling value; the sampled one may stand beside them.

    Raises
    ------
    ListError
        If one is missing, or is no log-probability.
    """
    found = {entry.token_id: entry for answer in answers for entry in answer.lists[0]}
    missing = [token for token in tokens if token not in found]
    if missing:
        raise ListError(
            "wanted-ignored",
            f"{len(missing)} of {len(tokens)} tokens that were asked for by id are not in the answer: the server "
            "ignores logprob_token_ids. Leave wanted_tokens out.",
        )
    return falling(found[token] for token in tokens)


def lacking(score: Score, tokens: Sequence[int]) -> list[int]:
    """The tokens that the score's list does not say."""
    listed = {item.token_id for item in score.top}
    return [token for token in tokens if token not in listed]
