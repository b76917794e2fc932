"""A real small language model in this process: nothing to sign up for, and exact full-vocabulary log-probabilities.

One forward pass gives every position of a response. All work is given out by one thread of its own, step by step, so
that the event loop stays free; the requests of several tasks go through the model together.

The context of a score is the ids of the prompt, written by the model's chat template, followed by P's tokens: as ids
where they are this model's own (`own_token_ids`), else the tokenised text of the prefix.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any, ClassVar, TypeVar

from backends.base import Backend, BackendOptions, Capabilities, Sample, SampleRequest, ScoreRequest
from backends.errors import TokenKLError
from backends.local.engine import ENGINE
from backends.local.gguf import BACKEND
from backends.local.models import LocalModel, check_model, find_model, load_model
from backends.local.sampling import sample_steps
from backends.local.tokenizer import PromptRefusedError, Tokenizer, split_text
from backends.local.work import Asked, Prepared, steps, units_of
from kl.records import Score, ScoreFailure
from kl.tables.context_counts import RETOKENISED

logger = logging.getLogger(__name__)
T = TypeVar("T")

_OTHERWISE = (
    "P wrote {} tokens before this position, all of them tokens of this model too, which cuts their text into {} other "
    "ones: its list would be of another context. Sample with token ids, which are then fed."
)


class LocalBackend(Backend):
    """Runs llama-architecture GGUF files with numpy, float32, on as many cores as BLAS is allowed."""

    Options: ClassVar[type[BackendOptions]] = BackendOptions
    name = BACKEND
    needs = ("the extra local (uv sync --extra local), or a llama-architecture GGUF file named by its path",)
    capabilities: ClassVar[Capabilities] = Capabilities(
        max_top_logprobs=1000, full_vocabulary=True, samples=True, token_ids=True, remote=False, exact_pairs=True
    )

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        """The engine, the content of the model file, its rounding, and what is reported.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            If there is no such model file.
        """
        source = find_model(request.model)
        return {
            "engine": ENGINE,
            "weights_sha256": source.sha256,
            "rounding": source.rule,
            "top_logprobs": request.top_logprobs,
            "full": request.full_vocabulary,
        }

    async def preflight(self, model: str) -> str:
        """Check the model's header, its vocabulary and its chat template; returns file name and content hash.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            In one line, with what was found and what to do.
        """

        def check() -> str:
            source = find_model(model)
            check_model(source)
            return source.version

        return await _in_worker(check)

    def parallel_groups(self) -> int:
        """More than one, so that short responses, too, fill the matrices that go through the model."""
        return 8

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Yield one result for each key asked; results of a response come as its chunks are done."""
        for together in _together(requests):
            results = _score_steps(together)
            while (some := await _in_worker(functools.partial(next, results, None))) is not None:
                for result in some:
                    yield result

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        """Write responses. Their lists come from the same pass that `score` makes, so P against itself gives 0.

        Raises
        ------
        ModelNotUsableError, MissingDependencyError
            If a model cannot be used.
        """
        steps = sample_steps(requests)
        while (result := await _in_worker(functools.partial(next, steps, None))) is not None:
            yield result


@functools.cache
def _worker(process_id: int) -> ThreadPoolExecutor:
    # One thread: the engine is one at a time, and waiting for it must not fill the event loop's own pool. By process,
    # because a forked child inherits the object but not its thread.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-model")


async def _in_worker(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_worker(os.getpid()), work)


# Scoring: from a request to sequences of ids, from these to scores.


def _together(requests: Sequence[ScoreRequest]) -> Iterator[list[ScoreRequest]]:
    """Each request with those that have the other halves of its pairs."""
    home = {key: number for number, request in enumerate(requests) for key in request.keys}
    left = dict(enumerate(requests))
    for number in range(len(requests)):
        if number in left:
            others = {home[key] for key in requests[number].counterparts if key in home} & left.keys()
            yield [left.pop(each) for each in sorted({number, *others})]


def _score_steps(requests: Sequence[ScoreRequest]) -> Iterator[list[Score | ScoreFailure]]:
    """Results step by step."""
    prepared: list[Prepared] = []
    for request in requests:
        yield from _caught(request.name, request.keys, _prepare(request, prepared))
    keys = [asked.key for each in prepared for asked in each.asked]
    yield from _caught(requests[0].name, keys, steps(units_of(prepared)))


def _caught(
    name: str, keys: Sequence[str], results: Iterator[Sequence[Score | ScoreFailure]]
) -> Iterator[list[Score | ScoreFailure]]:
    """The same results; whatever goes wrong becomes a failure of the keys that are left."""
    left = dict.fromkeys(keys)
    try:
        for some in results:
            for result in some:
                left.pop(result.key, None)
            yield list(some)
    except PromptRefusedError as error:
        yield [ScoreFailure(key, "prompt-refused", str(error), final=True) for key in left]
    except TokenKLError as error:
        yield [ScoreFailure(key, "model-not-usable", str(error)) for key in left]
    except Exception as error:
        logger.exception("%s: the local engine failed", name)
        message = (
            f"the local engine failed: {type(error).__name__}: {error}. The program or the model file is at fault."
        )
        yield [ScoreFailure(key, "engine-error", message) for key in left]


def _prepare(request: ScoreRequest, prepared: list[Prepared]) -> Iterator[list[ScoreFailure]]:
    """Find what is computed; gives the positions that cannot be."""
    model = load_model(find_model(request.model))
    limit = model.engine.config.context_length
    contexts, refused = _contexts(request, model)
    yield [*refused, *(_too_long(context, limit) for context in contexts if context.length > limit)]
    prepared.append(
        Prepared(request, model, _by_sequence([context for context in contexts if context.length <= limit]))
    )


def _too_long(context: Asked, limit: int) -> ScoreFailure:
    message = f"the context has {context.length} tokens, the model takes {limit}; use a model with a longer context."
    return ScoreFailure(context.key, "context-too-long", message, final=True)


def _contexts(request: ScoreRequest, model: LocalModel) -> tuple[list[Asked], list[ScoreFailure]]:
    """What each position asks, and the positions that have no context in this model's tokens."""
    prompt_ids = model.template.encode(request.prompt)
    own = own_token_ids(request, model.tokenizer)
    whole = [*prompt_ids, *(own or ())]
    contexts: list[Asked] = []
    refused: list[ScoreFailure] = []
    gaps = dict(request.gaps) if own is None else {}
    comparable = own is None and _has_tokens_of(request, model.tokenizer)
    for position, key, prefix in request.contexts():
        if position in gaps:
            message = "no text says what P had written here, and P's token ids are not this model's."
            refused.append(ScoreFailure(key, gaps[position], message, final=True))
            continue
        try:
            prefix_ids = model.tokenizer.encode(prefix) if own is None else []
        except PromptRefusedError as error:
            refused.append(ScoreFailure(key, "prompt-refused", str(error), final=True))
            continue
        if comparable and not _cut_alike(request.prefix_ends[: position + 1], prefix_ids, model.tokenizer):
            refused.append(ScoreFailure(key, RETOKENISED, _OTHERWISE.format(position, len(prefix_ids))))
            continue
        ids = prompt_ids + prefix_ids if own is None else whole
        context = Asked(key, ids, len(ids) if own is None else len(prompt_ids) + position)
        if context.length:
            contexts.append(context)
        else:
            message = "the context is empty and the model has no begin-of-text token; there is nothing to predict from."
            refused.append(ScoreFailure(key, "empty-context", message, final=True))
    return contexts, refused


def _has_tokens_of(request: ScoreRequest, tokenizer: Tokenizer) -> bool:
    """Whether all of P's tokens are tokens here, so that P's tokenizer may be this one though its ids are not known."""
    return all(tokenizer.is_token(request.text[start:end]) for start, end in pairwise(request.prefix_ends))


def _cut_alike(ends: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a prefix are P's: they end at the same places."""
    lengths = map(len, split_text([tokenizer.token_bytes(index) for index in ids]))
    return list(accumulate(lengths, initial=0)) == list(ends)


def own_token_ids(request: ScoreRequest, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """P's token ids if they are this vocabulary's: each in range, and standing for exactly the text P gives it.

    A last one beyond the text ends the turn and is never fed: it may be of any name and number.
    """
    ids, ends = request.token_ids, request.prefix_ends
    if ids is None or len(ids) != len(ends):
        return None
    in_text = ids[:-1] if ends and ends[-1] == len(request.text) else ids
    if not all(0 <= index < len(tokenizer) for index in in_text):
        return None
    at = 0
    texts = split_text([tokenizer.token_bytes(index) for index in in_text])
    for end, text in zip(ends, texts, strict=False):
        if end != at or not request.text.startswith(text, at):
            return None
        at += len(text)
    return ids if at == len(request.text) else None


def _by_sequence(contexts: list[Asked]) -> list[Asked]:
    """The same contexts, shortest first, as beginnings of as few lists of ids as serve all.

    The ids of a shorter text are mostly the beginning of those of a longer one. Where they are not (the longer text
    goes on within a word) the context has a list of its own, whose last chunks are computed for it alone.
    """
    lists: list[Sequence[int]] = []
    found: list[Asked] = []
    for key, ids, length in sorted(contexts, key=lambda context: context.length, reverse=True):
        tried = (*lists[:1], *lists[-1:])
        home = next((known for known in tried if known is ids or known[:length] == ids[:length]), None)
        if home is None:
            lists.append(home := ids)
        found.append(Asked(key, home, length))
    return found[::-1]
