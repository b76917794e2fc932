"""Responses that a model of a server writes, with a list for every token or a reason why not."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from backends.base import Sample, SampleRequest
from backends.errors import BackendError
from backends.local.tokenizer import PromptRefusedError
from backends.openai_compatible.answers import (
    SHAPE_ERRORS,
    Entry,
    ListError,
    first_choice,
    generated_lists,
    is_keyed,
    may_lack,
    usable,
    without_outsider,
)
from backends.openai_compatible.asking import check_same, told
from backends.openai_compatible.client import Json
from backends.openai_compatible.presets import SPELLINGS
from backends.openai_compatible.scoring import Scorer
from backends.openai_compatible.vocabulary import ServerVocabulary, messages_of, raw_text
from backends.service.breaker import NOT_ASKED
from kl.records import END_TOKENS, Candidate, Position, Response, Sampling, ScoreFailure

_SEEDS = 2**31
# Failures of the calls that follow an answer, and of one server among several: the answer is kept for another try.
_ASKED_ANEW = ("deadline", "refused", "server-changed", NOT_ASKED)
_PART = "\ufffd"


class _Written(NamedTuple):
    """A response: ``tokens`` are (sampled, list) of each; with ``has_stop`` the last ends the turn.

    ``lacking`` says of each whether its list may lack entries; empty where none does. ``by_ids``: the prompt was ids.
    """

    tokens: list[tuple[Entry, list[Entry]]]
    texts: list[str]
    has_stop: bool
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int
    lacking: Sequence[bool] = ()
    by_ids: bool = True


async def write(scorer: Scorer, request: SampleRequest) -> Sample | ScoreFailure:
    """One response; what was paid for and cannot be used is not asked for again."""
    result = await _sample(scorer, request)
    if isinstance(result, Sample) or scorer.bought.get(request.key) is None:
        return result
    if result.reason in _ASKED_ANEW:
        return replace(result, message=f"the answer came, and then: {result.message}")
    return replace(result, final=True)


async def _sample(scorer: Scorer, request: SampleRequest) -> Sample | ScoreFailure:
    try:
        written = await _written(scorer, request)
        await scorer.fetch_texts(item for sampled, listed in written.tokens for item in (sampled, *listed))
        return Sample(request.key, _response(scorer, request, written), written.input_tokens, written.output_tokens)
    except PromptRefusedError as error:
        return ScoreFailure(request.key, "prompt-refused", str(error), final=True)
    except SHAPE_ERRORS as error:
        message = f"the answer has another shape than known: {type(error).__name__}: {error}"
        return ScoreFailure(request.key, "unexpected-shape", message)
    except BackendError as error:
        return scorer.failure(error).of(request.key)


async def _written(scorer: Scorer, request: SampleRequest) -> _Written:
    if scorer.found.writes_after_sampling and (request.settings.temperature, request.settings.top_p) != (1, 1):
        raise ListError(
            "after-sampling",
            "the server reports its values after sampling: sample at temperature 1 and top_p 1, or start vLLM with "
            "--logprobs-mode raw_logprobs.",
        )
    if scorer.found.form != "ids" or scorer.vocabulary is None:
        return await _by_text(scorer, request)
    ids = await _context(scorer, scorer.vocabulary, request)
    if scorer.found.kind == "llama_cpp":
        return await _by_llama(scorer, scorer.vocabulary, request, ids)
    return await _by_ids(scorer, scorer.vocabulary, request, ids)


async def _context(scorer: Scorer, vocabulary: ServerVocabulary, request: SampleRequest) -> list[int]:
    await scorer.fetched(lambda: vocabulary.fetch_prompt(request.prompt))
    prompt = vocabulary.prompt_ids(request.prompt)
    if not request.prefix:
        return prompt
    stated = request.prefix_ids
    if stated is not None and await scorer.fetched(lambda: vocabulary.text_of_ids(stated)) == request.prefix:
        return [*prompt, *stated]
    return [*prompt, *await scorer.fetched(lambda: vocabulary.encoded(request.prefix))]


async def _by_llama(
    scorer: Scorer, vocabulary: ServerVocabulary, request: SampleRequest, ids: Sequence[int]
) -> _Written:
    settings = request.settings
    body = {
        **scorer.options.body,
        "prompt": list(ids),
        "n_predict": settings.max_tokens,
        "n_probs": settings.top_logprobs,
        "return_tokens": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "min_p": 0,
        "samplers": ["top_p", "temperature"],
        "seed": _seed(request),
        "cache_prompt": scorer.options.cache == "fast",
    }
    answer = await _called(scorer, request, "/completion", body)
    _check_llama(scorer, answer)
    check_same(ids, answer.get("tokens_evaluated"), None)
    tokens: list[int] = answer["tokens"]
    has_stop = answer.get("stop_type") == "eos"
    pieces = await _pieces(scorer, vocabulary, tokens, answer["content"], has_stop=has_stop)
    lists = await _mended(
        scorer, request, ids, pieces, generated_lists({"logprobs": {"content": answer["completion_probabilities"]}})
    )
    finish = "stop" if has_stop else "length"
    return _Written(
        lists, [piece.text for piece in pieces], has_stop, finish, answer.get("tokens_evaluated"), len(tokens)
    )


def _check_llama(scorer: Scorer, answer: Json) -> None:
    # Its own route says the model's name alone.
    scorer.check_server(told(answer, {})._replace(fingerprint=scorer.found.fingerprint))


async def _mended(
    scorer: Scorer,
    request: SampleRequest,
    ids: Sequence[int],
    pieces: Sequence[_Piece],
    lists: Sequence[tuple[Entry, list[Entry]]],
) -> list[tuple[Entry, list[Entry]]]:
    """A list for every token: llama.cpp holds back tokens that begin a character, and gives none for them.

    Those are asked for; all are, if what came is not of exactly the tokens that end a character.
    """
    expected = [number for number, piece in enumerate(pieces) if piece.ends_character]
    fits = [pieces[number].token for number in expected] == [item.token_id for item, _ in lists]
    found = dict(zip(expected, lists, strict=True)) if fits else {}
    for number, piece in enumerate(pieces):
        if number not in found:
            context = [*ids, *(before.token for before in pieces[:number])]
            ask = partial(scorer.asker.by_ids, context, request.settings.top_logprobs)
            answered = await scorer.call(ask, f"mend {request.name}")
            entries: list[Entry] = answered.lists[0]
            value = next((item.logprob for item in entries if item.token_id == piece.token), None)
            found[number] = Entry(piece.token, "", None, value), entries
    return [found[number] for number in range(len(pieces))]


async def _by_ids(scorer: Scorer, vocabulary: ServerVocabulary, request: SampleRequest, ids: Sequence[int]) -> _Written:
    settings = request.settings
    body = _sampling_body(scorer, request) | {
        "prompt": list(ids),
        "logprobs": settings.top_logprobs,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        "top_k": -1,
        "min_p": 0,
    }
    answer = await _called(scorer, request, "completions", body)
    choice = first_choice(answer)
    said = told(answer, choice)
    scorer.check_server(said)
    check_same(ids, said.input_tokens, choice.get("prompt_token_ids"))
    lists = generated_lists(choice)
    tokens = [item.token_id for item, _ in lists if item.token_id is not None]
    if len(tokens) != len(lists) or tokens != (choice.get("token_ids") or tokens):
        raise ListError(
            "lists-missing", f"{len(lists)} lists do not belong to the {len(choice.get('token_ids') or ())} tokens."
        )
    if said.output_tokens not in (None, len(tokens)):
        raise ListError("lists-missing", f"{len(tokens)} lists came for {said.output_tokens} tokens.")
    has_stop = choice.get("finish_reason") == "stop"
    pieces = await _pieces(scorer, vocabulary, tokens, choice["text"], has_stop=has_stop)
    return _Written(
        lists, [piece.text for piece in pieces], has_stop, choice.get("finish_reason"), said.input_tokens, len(tokens)
    )


async def _by_text(scorer: Scorer, request: SampleRequest) -> _Written:
    """By chat, or where prompts are given as they are, by completions."""
    messages, spelling = messages_of(request.prompt), scorer.found.prefill
    body = _sampling_body(scorer, request)
    if scorer.options.template == "none":
        body |= {"prompt": raw_text(messages) + request.prefix, "logprobs": request.settings.top_logprobs}
        answer = await _called(scorer, request, "completions", body)
    else:
        if request.prefix and spelling is None:
            raise ListError("no-prefill", "the server was not proven to continue an answer.")
        flags, in_message = SPELLINGS[spelling or "plain"] if request.prefix else ({}, {})
        last = [{"role": "assistant", "content": request.prefix, **in_message}] if request.prefix else []
        body |= {
            "messages": [*messages, *last],
            "logprobs": True,
            "top_logprobs": request.settings.top_logprobs,
            **flags,
        }
        answer = await _called(scorer, request, "chat/completions", body)
    choice = first_choice(answer)
    said = told(answer, choice)
    scorer.check_server(said)
    message = choice.get("message") or {}
    if message.get("reasoning") or message.get("reasoning_content"):
        raise ListError("hidden-thinking", "the model thought before it answered, in tokens that have no lists.")
    lists = generated_lists(choice)
    lacking = [is_keyed(choice) and may_lack(listed, own, request.settings.top_logprobs) for own, listed in lists]
    if not is_keyed(choice):
        lists = [(own, list(without_outsider(listed))) for own, listed in lists]
    has_stop = choice.get("finish_reason") == "stop" and (not lists[-1][0].text or lists[-1][0].text in END_TOKENS)
    texts = _joined([item for item, _ in (lists[:-1] if has_stop else lists)])
    content: str = choice["text"] if "text" in choice else message.get("content") or ""
    if content not in ("".join(texts), request.prefix + "".join(texts)):
        raise ListError("lists-missing", "the texts of the listed tokens do not add up to the answer.")
    if said.output_tokens not in (None, len(lists), len(lists) + (choice.get("finish_reason") == "stop")):
        raise ListError("lists-missing", f"{len(lists)} lists came for {said.output_tokens} tokens.")
    texts += [lists[-1][0].text] if has_stop else []
    return _Written(
        lists, texts, has_stop, choice.get("finish_reason"), said.input_tokens,
        said.output_tokens or len(lists), lacking, by_ids=False,
    )  # fmt: skip


def _joined(entries: Sequence[Entry]) -> list[str]:
    """The texts of tokens, so that they add up: a character counts for the token that completes it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [item.text if item.token_bytes is None else decoder.decode(item.token_bytes) for item in entries]


def _sampling_body(scorer: Scorer, request: SampleRequest) -> Json:
    settings = request.settings
    return {
        **scorer.asker.fields,
        "model": request.model,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": _seed(request),
    }


def _seed(request: SampleRequest) -> int:
    return (request.settings.seed + request.index) % _SEEDS


async def _called(scorer: Scorer, request: SampleRequest, path: str, body: Json) -> Json:
    answer = scorer.bought.get(request.key)
    if answer is None:
        answer = await scorer.call(lambda: scorer.client.post(path, body), f"sample {request.name}")
        await scorer.bought.add(request.key, answer)
    return answer


class _Piece(NamedTuple):
    """A token with the text that counts for it: a character counts for the token that ends it."""

    token: int
    text: str
    ends_character: bool


async def _pieces(
    scorer: Scorer, vocabulary: ServerVocabulary, tokens: Sequence[int], text: str, *, has_stop: bool
) -> list[_Piece]:
    """The tokens of a response, whose texts add up to it; at its end the stop."""
    said = tokens[:-1] if has_stop else tokens
    await scorer.fetched(lambda: vocabulary.fetch_texts(tokens))
    pieces: list[_Piece] = []
    parts: list[int] = []
    for token in said:
        shown = vocabulary.text_of(token)
        if parts or _PART in shown:
            parts.append(token)
            shown = await scorer.fetched(partial(vocabulary.text_of_ids, list(parts)))
        done = not shown.endswith(_PART)
        pieces.append(_Piece(token, shown if done else "", done))
        parts = [] if done else parts
    joined = "".join(piece.text for piece in pieces)
    if joined != text.rstrip(_PART):
        raise ListError(
            "unexpected-shape",
            f"the texts of {len(said)} tokens have {len(joined)} characters, the answer {len(text)}.",
        )
    return [*pieces, _Piece(tokens[-1], vocabulary.text_of(tokens[-1]), True)] if has_stop else pieces


def _response(scorer: Scorer, request: SampleRequest, written: _Written) -> Response:
    settings = request.settings
    return Response(
        source_file="",
        response_idx=request.index,
        prompt=request.prompt,
        model=request.model,
        text="".join(written.texts[: len(written.texts) - written.has_stop]),
        positions=tuple(
            replace(_position(scorer, sampled, listed, text, settings.top_logprobs), may_lack=lacks)
            for (sampled, listed), text, lacks in zip(
                written.tokens, written.texts, written.lacking or [False] * len(written.texts), strict=True
            )
        ),
        finish_reason=written.finish_reason,
        # By ids top_k is switched off in the request; by text it is left to the server.
        sampling=Sampling(settings.temperature, settings.top_p, 0 if written.by_ids else None),
        model_version=scorer.version,
        has_stop=written.has_stop,
    )


def _position(scorer: Scorer, sampled: Entry, listed: Sequence[Entry], text: str, k: int) -> Position:
    best = usable(listed, k)
    exact = scorer.candidate(sampled)
    value = None if sampled.logprob is None else min(sampled.logprob, 0.0)
    own = Candidate(text, value, exact.token_id, exact.token_bytes)
    return Position(own, tuple(map(scorer.candidate, best.entries)), best.n_dropped)
