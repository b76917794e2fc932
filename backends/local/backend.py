"""A real small language model in this process: nothing to sign up for, and exact full-vocabulary log-probabilities.

One forward pass gives every position of a response. All work runs on one thread of its own, chunk by chunk, so that the
event loop stays free and the requests of several tasks take turns.

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
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from backends.base import Backend, BackendOptions, Capabilities, SampleSettings, ScoreRequest
from backends.errors import TokenKLError
from backends.local.engine import ENGINE, Cache
from backends.local.gguf import BACKEND, FloatArray
from backends.local.models import LocalModel, check_model, find_model, load_model
from backends.local.tokenizer import PromptRefusedError, Tokenizer, split_text
from kl.records import Candidate, Position, Prompt, Response, Sampling, Score, ScoreFailure

logger = logging.getLogger(__name__)
T = TypeVar("T")


class LocalBackend(Backend):
    """Runs llama-architecture GGUF files with numpy, float32, on one core."""

    Options: ClassVar[type[BackendOptions]] = BackendOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        max_top_logprobs=1000, full_vocabulary=True, samples=True, one_pass=True, token_ids=True, remote=False
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

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Yield one result for each key asked; results of a response come as its chunks are done."""
        for request in requests:
            steps = _score_steps(request)
            while (results := await _in_worker(functools.partial(next, steps, None))) is not None:
                for result in results:
                    yield result

    async def sample(self, prompt: Prompt, model: str, settings: SampleSettings, n: int) -> AsyncIterator[Response]:
        """Write ``n`` responses. Their lists come from the same pass that `score` makes, so P against itself gives 0.

        Raises
        ------
        PromptRefusedError
            If the model has no form for the prompt, or no room for an answer.
        ModelNotUsableError, MissingDependencyError
            If the model cannot be used.
        """
        steps = _sample_steps(prompt, model, settings, n)
        while (response := await _in_worker(functools.partial(next, steps, None))) is not None:
            yield response


@functools.cache
def _worker(process_id: int) -> ThreadPoolExecutor:
    # One thread: the engine is one at a time, and waiting for it must not fill the event loop's own pool. By process,
    # because a forked child inherits the object but not its thread.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="local-model")


async def _in_worker(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_worker(os.getpid()), work)


# Scoring: from a request to sequences of ids, from these to scores.


class _Context(NamedTuple):
    """What one position asks: the token after the first ``length`` of ``ids``. Positions may share one list."""

    key: str
    ids: list[int]
    length: int


@dataclass(slots=True)
class _Sequence:
    """One pass: ``ids`` from the start of the context, and the keys asked after each row."""

    ids: list[int]
    asked: dict[int, list[str]] = field(default_factory=dict[int, list[str]])


def _score_steps(request: ScoreRequest) -> Iterator[list[Score | ScoreFailure]]:
    """Results chunk by chunk; whatever goes wrong becomes a failure of the positions that are left."""
    left = list(request.keys)
    try:
        for results in _results(request):
            for result in results:
                left.remove(result.key)
            yield results
    except PromptRefusedError as error:
        yield [ScoreFailure(key, "prompt-refused", str(error), final=True) for key in left]
    except TokenKLError as error:
        yield [ScoreFailure(key, "model-not-usable", str(error)) for key in left]
    except Exception as error:
        logger.exception("%s: the local engine failed", request.name)
        message = (
            f"the local engine failed: {type(error).__name__}: {error}. The program or the model file is at fault."
        )
        yield [ScoreFailure(key, "engine-error", message) for key in left]


def _results(request: ScoreRequest) -> Iterator[list[Score | ScoreFailure]]:
    model = load_model(find_model(request.model))
    limit = model.engine.config.context_length
    contexts, refused = _contexts(request, model)
    too_long = [_too_long(context, limit) for context in contexts if context.length > limit]
    yield [*refused, *too_long]
    for sequence in _sequences([context for context in contexts if context.length <= limit]):
        for rows in model.engine.logprobs(sequence.ids, sorted(sequence.asked)):
            yield [
                _score(request, model, key, row + 1, logprobs) for row, logprobs in rows for key in sequence.asked[row]
            ]


def _too_long(context: _Context, limit: int) -> ScoreFailure:
    message = f"the context has {context.length} tokens, the model takes {limit}; use a model with a longer context."
    return ScoreFailure(context.key, "context-too-long", message, final=True)


def _contexts(request: ScoreRequest, model: LocalModel) -> tuple[list[_Context], list[ScoreFailure]]:
    """What each position asks, and the positions that have no context in this model's tokens."""
    prompt_ids = model.template.encode(request.prompt)
    own = own_token_ids(request, model.tokenizer)
    whole = [*prompt_ids, *(own or ())]
    contexts: list[_Context] = []
    refused: list[ScoreFailure] = []
    for position, key, prefix in request.contexts():
        try:
            ids = prompt_ids + model.tokenizer.encode(prefix) if own is None else whole
        except PromptRefusedError as error:
            refused.append(ScoreFailure(key, "prompt-refused", str(error), final=True))
            continue
        context = _Context(key, ids, len(ids) if own is None else len(prompt_ids) + position)
        if context.length:
            contexts.append(context)
        else:
            message = "the context is empty and the model has no begin-of-text token; there is nothing to predict from."
            refused.append(ScoreFailure(key, "empty-context", message, final=True))
    return contexts, refused


def own_token_ids(request: ScoreRequest, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """P's token ids if they are this vocabulary's: each in range, and standing for exactly the text P gives it."""
    ids = request.token_ids
    if ids is None or len(ids) != len(request.prefix_ends) or not all(0 <= index < len(tokenizer) for index in ids):
        return None
    at = 0
    texts = split_text([tokenizer.token_bytes(index) for index in ids])
    for end, text in zip(request.prefix_ends, texts, strict=True):
        if end != at or not request.text.startswith(text, at):
            return None
        at += len(text)
    return ids if at == len(request.text) else None


def _sequences(contexts: list[_Context]) -> list[_Sequence]:
    """As few passes as serve all contexts, longest first.

    The ids of a shorter text are mostly the beginning of those of a longer one. Where they are not (the longer text
    goes on within a word) the context gets a pass of its own, which the engine resumes at its last chunks.
    """
    sequences: list[_Sequence] = []
    for key, ids, length in sorted(contexts, key=lambda context: context.length, reverse=True):
        tried = (*sequences[:1], *sequences[-1:])
        home = next((known for known in tried if known.ids is ids or known.ids[:length] == ids[:length]), None)
        if home is None:
            home = _Sequence(ids)
            sequences.append(home)
        home.asked.setdefault(length - 1, []).append(key)
    return sequences


def _score(request: ScoreRequest, model: LocalModel, key: str, n_context: int, logprobs: FloatArray) -> Score:
    return Score(
        key=key,
        top=top_candidates(logprobs, request.top_logprobs, model.tokenizer),
        model_version=model.source.version,
        input_tokens=n_context,
        output_tokens=1,
        full_logprobs=logprobs if request.full_vocabulary else None,
    )


def top_candidates(logprobs: FloatArray, k: int, tokenizer: Tokenizer) -> tuple[Candidate, ...]:
    """The ``k`` most probable tokens, by falling log-probability, equals by rising id."""
    k = min(k, len(logprobs))
    smallest = np.partition(logprobs, len(logprobs) - k)[len(logprobs) - k]
    listed = np.flatnonzero(logprobs >= smallest)
    order = np.lexsort((listed, -logprobs[listed]))[:k]
    return tuple(_candidate(int(index), logprobs, tokenizer) for index in listed[order])


def _candidate(index: int, logprobs: FloatArray, tokenizer: Tokenizer, text: str | None = None) -> Candidate:
    exact = tokenizer.token_bytes(index)
    return Candidate(exact.decode("utf-8", "replace") if text is None else text, float(logprobs[index]), index, exact)


# Sampling.


def _sample_steps(prompt: Prompt, name: str, settings: SampleSettings, n: int) -> Iterator[Response]:
    model = load_model(find_model(name))
    prompt_ids = model.template.encode(prompt)
    limit = model.engine.config.context_length
    if not 0 < len(prompt_ids) <= limit:
        raise PromptRefusedError(
            f"the prompt has {len(prompt_ids)} tokens, model {name!r} takes 1 to {limit}.", backend=BACKEND, model=name
        )
    cache = Cache(model.engine.config)
    first_logits = model.engine.feed(cache, prompt_ids)
    for index in range(n):
        del cache.ids[len(prompt_ids) :]
        rng = np.random.default_rng(settings.seed + index)
        ids, stopped = _sample_ids(model, cache, first_logits, settings, rng)
        yield Response(
            source_file="",
            response_idx=index,
            prompt=prompt,
            model=name,
            text="".join(split_text([model.tokenizer.token_bytes(token) for token in ids])),
            positions=_positions(model, prompt_ids, ids, settings.top_logprobs),
            finish_reason="STOP" if stopped else "MAX_TOKENS",
            sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p),
            model_version=model.source.version,
        )


def _sample_ids(
    model: LocalModel, cache: Cache, logits: FloatArray, settings: SampleSettings, rng: np.random.Generator
) -> tuple[list[int], bool]:
    """Token ids of one response after what the cache holds, and whether it ended by itself."""
    room = model.engine.config.context_length - len(cache.ids) + 1  # the last token is not fed back
    ids: list[int] = []
    while True:
        token = draw(logits, settings.temperature, settings.top_p, rng)
        if token in model.tokenizer.stop_ids:
            return ids, True
        ids.append(token)
        if len(ids) >= min(settings.max_tokens, room):
            return ids, False
        logits = model.engine.feed(cache, [token])


def draw(logits: FloatArray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """One token id: the best at temperature 0, else drawn from the fewest tokens that hold ``top_p`` of the mass."""
    if temperature == 0:
        return int(logits.argmax())
    scaled: NDArray[np.float64] = logits.astype(np.float64) / temperature
    order: NDArray[np.intp] = np.argsort(-scaled, kind="stable")
    mass: NDArray[np.float64] = np.cumsum(np.exp(scaled[order] - scaled[order[0]]))
    last = int(np.count_nonzero(mass < top_p * mass[-1]))
    drawn = int(np.count_nonzero(mass <= rng.random() * mass[last]))
    return int(order[min(drawn, last)])  # the product may be rounded up to the whole mass


def _positions(model: LocalModel, prompt_ids: list[int], ids: list[int], k: int) -> tuple[Position, ...]:
    """The lists of a sampled response, from the pass that `score` would make."""
    if not ids:
        return ()
    texts = split_text([model.tokenizer.token_bytes(token) for token in ids])
    rows = range(len(prompt_ids) - 1, len(prompt_ids) - 1 + len(ids))
    found = (logprobs for chunk in model.engine.logprobs([*prompt_ids, *ids[:-1]], rows) for _, logprobs in chunk)
    return tuple(
        Position(_candidate(token, logprobs, model.tokenizer, text), top_candidates(logprobs, k, model.tokenizer))
        for token, text, logprobs in zip(ids, texts, found, strict=True)
    )
