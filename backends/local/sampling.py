"""Responses written by a local model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from backends.base import Sample, SampleRequest, SampleSettings
from backends.local.candidates import candidate, top_candidates
from backends.local.contexts import context_of_sample
from backends.local.gguf import FloatArray
from backends.local.models import LocalModel, find_model, load_model
from backends.local.rows import Cache
from backends.local.tokenizer import PromptRefusedError, split_text
from kl.records import Position, Response, Sampling, ScoreFailure


def sample_steps(requests: Sequence[SampleRequest]) -> Iterator[Sample | ScoreFailure]:
    """The responses asked, one after the other; those to one prompt share its pass."""
    for (name, *_), alike in groupby(requests, attrgetter(*_SHARED)):
        model = load_model(find_model(name))
        asked, limit = list(alike), model.engine.config.context_length
        try:
            context = context_of_sample(asked[0], model.tokenizer, model.template, limit)
        except PromptRefusedError as error:
            yield from (ScoreFailure(request.key, "prompt-refused", str(error), final=True) for request in asked)
            continue
        cache = Cache(model.engine.config)
        first_logits = model.engine.feed(cache, context)
        for request in asked:
            del cache.ids[len(context) :]
            response = _response(request, model, context, cache, first_logits)
            yield Sample(request.key, response, len(context), len(response.positions) - response.has_stop)


_SHARED = ("model", "prompt", "prefix", "prefix_ids")


def _response(
    request: SampleRequest, model: LocalModel, context: list[int], cache: Cache, first_logits: FloatArray
) -> Response:
    settings = request.settings
    rng = np.random.default_rng(settings.seed + request.index)
    ids, stop = _sample_ids(model, cache, first_logits, settings, rng)
    return Response(
        source_file="",
        response_idx=request.index,
        prompt=request.prompt,
        model=request.model,
        text="".join(split_text([model.tokenizer.token_bytes(token) for token in ids])),
        positions=_positions(model, context, ids, stop, settings.top_logprobs),
        finish_reason="MAX_TOKENS" if stop is None else "STOP",
        sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p),
        model_version=model.source.version,
        has_stop=stop is not None,
    )


def _sample_ids(
    model: LocalModel, cache: Cache, logits: FloatArray, settings: SampleSettings, rng: np.random.Generator
) -> tuple[list[int], int | None]:
    """Token ids of one response after what the cache holds, and the one that ended it, if it ended by itself."""
    room = model.engine.config.context_length - len(cache.ids) + 1  # the last token is not fed back
    ids: list[int] = []
    while True:
        token = draw(logits, settings.temperature, settings.top_p, rng)
        if token in model.tokenizer.stop_ids:
            return ids, token
        ids.append(token)
        if len(ids) >= min(settings.max_tokens, room):
            return ids, None
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


def _positions(
    model: LocalModel, prompt_ids: list[int], ids: list[int], stop: int | None, k: int
) -> tuple[Position, ...]:
    """The lists of a sampled response, from the pass that `score` would make; at its end that of the stop."""
    texts = split_text([model.tokenizer.token_bytes(token) for token in ids])
    written = list(zip(ids, texts, strict=True))
    if stop is not None:
        written.append((stop, model.tokenizer.token_bytes(stop).decode("utf-8", "replace")))
    rows = range(len(prompt_ids) - 1, len(prompt_ids) - 1 + len(written))
    fed = [*prompt_ids, *ids][: rows.stop]
    found = (logprobs for chunk in model.engine.logprobs(fed, rows) for _, logprobs in chunk)
    return tuple(
        Position(candidate(token, logprobs, model.tokenizer, text), top_candidates(logprobs, k, model.tokenizer))
        for (token, text), logprobs in zip(written, found, strict=True)
    )
