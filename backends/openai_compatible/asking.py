"""One request in each of the ways that a server can be asked, and what its answer says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from backends.openai_compatible.answers import (
    SHAPE_ERRORS,
    Entry,
    ListError,
    first_choice,
    keyed_entries,
    may_lack,
    one_list,
    prompt_entries,
    without_outsider,
)
from backends.openai_compatible.client import Client, Json
from backends.openai_compatible.presets import SPELLINGS, Prefill
from backends.openai_compatible.vocabulary import messages_of
from kl.records import Prompt

_FORCED = 100  # a bias that no logit reaches


class Told(NamedTuple):
    """What an answer says beside its lists; counts are the server's."""

    input_tokens: int | None
    output_tokens: int | None
    finish_reason: str | None
    fingerprint: str | None
    model: str | None


class Answered(NamedTuple):
    """One list for each position asked."""

    lists: list[list[Entry]]
    told: Told


class Asker:
    """Requests to one model of one server.

    Parameters
    ----------
    client : Client
    model : str
    fields : dict
        Of every request, beside what is asked.
    fast : bool
        Whether llama.cpp may answer from its prompt cache.
    as_ids : bool
        Whether the server can list tokens by their ids, as vLLM does.
    forced : int, optional
        The id of a harmless token that is generated whatever the model says, as llama.cpp needs it: it holds back a
        token that begins a character, and its list.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        fields: Json,
        *,
        fast: bool = False,
        forced: int | None = None,
        llama: bool = False,
        as_ids: bool = False,
    ) -> None:
        self.client, self.model = client, model
        self.fields = fields | ({"cache_prompt": fast} if llama else {})
        self._named = {"return_tokens_as_token_ids": True, "return_token_ids": True} if as_ids else {}
        self._forced = {} if forced is None else {"logit_bias": [[forced, _FORCED]]}

    def _body(self, **asked: Any) -> Json:
        plain = {"model": self.model, "max_tokens": 1, "temperature": 1, "top_p": 1}
        return {**self.fields, **plain, **asked}

    async def by_ids(self, ids: Sequence[int], k: int, **changes: Any) -> Answered:
        """The list after some tokens, from completions."""
        body = self._body(prompt=list(ids), logprobs=k, **self._named, **self._forced)
        answer = await self.client.post("completions", body | changes)
        return _read(lambda: _one(answer, ids, "completions", k))

    async def by_text(self, text: str, k: int, **changes: Any) -> Answered:
        """The list after a text, from completions."""
        body = self._body(prompt=text, logprobs=k, **self._named)
        answer = await self.client.post("completions", body | changes)
        return _read(lambda: _one(answer, None, "completions", k))

    async def by_chat(self, prompt: Prompt, prefix: str, k: int, spelling: Prefill, **changes: Any) -> Answered:
        """The list after the beginning of an answer, from chat; without one, that of the answer's first token."""
        flags, in_message = SPELLINGS[spelling] if prefix else ({}, {})
        messages = messages_of(prompt)
        if prefix:
            messages.append({"role": "assistant", "content": prefix, **in_message})
        body = self._body(messages=messages, logprobs=True, top_logprobs=k, **self._named, **flags, **self._forced)
        answer = await self.client.post("chat/completions", body | changes)
        return _read(lambda: _one(answer, None, "chat", k))

    async def whole(self, ids: Sequence[int], k: int, **changes: Any) -> Answered:
        """The lists before each token but the first, by ``prompt_logprobs``.

        The last token is never asked about what follows it; its own list is of what stands before it.
        """
        answer = await self.client.post(
            "completions", self._body(prompt=list(ids), prompt_logprobs=k, return_token_ids=True) | changes
        )
        return _read(lambda: _whole(answer, ids))

    async def echoed(self, text: str, k: int, **changes: Any) -> tuple[list[str], Answered]:
        """The prompt's tokens as texts, and the lists before each but the first, by ``echo``."""
        answer = await self.client.post("completions", self._body(prompt=text, logprobs=k, echo=True) | changes)
        return _read(lambda: _echoed(answer, text, k))


def _read(read: Any) -> Any:
    try:
        return read()
    except SHAPE_ERRORS as error:
        message = f"the answer has another shape than known: {type(error).__name__}: {error}"
        raise ListError("unexpected-shape", message) from error


def told(answer: Json, choice: Json) -> Told:
    """What an answer says beside its lists."""
    usage = answer.get("usage") or {}
    return Told(
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        choice.get("finish_reason"),
        answer.get("system_fingerprint"),
        answer.get("model"),
    )


def _one(answer: Json, ids: Sequence[int] | None, where: str, k: int) -> Answered:
    choice = first_choice(answer)
    said = told(answer, choice)
    if ids is not None:
        check_same(ids, said.input_tokens, choice.get("prompt_token_ids"))
    entries = one_list(choice, k)
    return Answered([list(without_outsider(entries)) if where == "chat" else entries], said)


def check_same(ids: Sequence[int], n_counted: int | None, echoed: Sequence[int] | None) -> None:
    """Refuse an answer to another prompt than was sent.

    Raises
    ------
    ListError
        With both numbers of tokens.
    """
    if n_counted is not None and n_counted != len(ids):
        raise ListError(
            "cut-prompt", f"{len(ids)} tokens were sent, and {n_counted} were read: the prompt was changed."
        )
    if echoed is not None and list(echoed) != list(ids):
        raise ListError("cut-prompt", "the server read other tokens than were sent.")


def _whole(answer: Json, ids: Sequence[int]) -> Answered:
    choice = first_choice(answer)
    said = told(answer, choice)
    listed = choice.get("prompt_logprobs")
    if not isinstance(listed, list):
        raise ListError("no-prompt-logprobs", "the answer has no prompt_logprobs: the server ignores them.")
    check_same(ids, said.input_tokens, choice.get("prompt_token_ids"))
    if len(listed) != len(ids) or listed[0] is not None:
        raise ListError("cut-prompt", f"{len(listed)} lists came for {len(ids)} tokens: the prompt was cut or shifted.")
    for token, item in zip(ids[1:], listed[1:], strict=True):
        if item is None or str(token) not in item:
            raise ListError("cut-prompt", "a list does not hold the prompt's own token: the lists are shifted.")
    return Answered([[], *map(prompt_entries, listed[1:])], said)


def _echoed(answer: Json, text: str, k: int) -> tuple[list[str], Answered]:
    choice = first_choice(answer)
    logprobs = choice.get("logprobs") or {}
    tokens, values, tops = (logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    said = told(answer, choice)
    n = len(tokens) - (said.output_tokens or 0)
    if n < 2 or not len(tokens) == len(values) == len(tops) or values[0] is not None:
        raise ListError("no-echo", "the answer does not repeat the prompt with its log-probabilities: echo is ignored.")
    if "".join(tokens[:n]) != text or said.input_tokens not in (None, n):
        raise ListError("cut-prompt", f"the {n} tokens that were echoed are not the prompt that was sent.")
    lists: list[list[Entry]] = [[]]
    for own, item in zip(tokens[1:n], tops[1:n], strict=True):
        entries = keyed_entries(item or {})
        # Tokens of one text become one entry: of what is missing then, nothing is known.
        lists.append([] if may_lack(entries, Entry(None, own, None, None), k) else entries)
    return tokens[:n], Answered(lists, said)
