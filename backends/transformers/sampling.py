"""Responses written by checkpoints: several at a time, each with a random generator of its own."""

# pyright: reportMissingImports=false
# torch is in no installation that uv makes by itself.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from backends.base import Sample, SampleRequest
from backends.local.contexts import context_of_sample
from backends.local.tokenizer import PromptRefusedError, split_text
from backends.transformers.loading import LoadedModel, Tensor
from backends.transformers.passes import Fed, Passes, Rows
from backends.transformers.reduction import top_ids
from backends.transformers.work import candidate, candidates
from kl.records import Candidate, Position, Response, Sampling, ScoreFailure

_TOKENS = 2  # of a batch's contexts and longest responses together, in passes


class _Asked(NamedTuple):
    """A request and the ids that its response goes on from; ``room`` is how many tokens it may have."""

    request: SampleRequest
    context: list[int]
    room: int


class _Written(NamedTuple):
    """Ids of a response, and the one that ended it, if it ended by itself."""

    ids: list[int]
    stop: int | None


def sample_steps(
    requests: Sequence[SampleRequest], load: Callable[[str], LoadedModel], passes: Passes
) -> Iterator[list[Sample | ScoreFailure]]:
    """The responses asked, batch by batch.

    Raises
    ------
    MissingDependencyError, ModelNotUsableError
        If a model cannot be used.
    """
    for name, alike in groupby(requests, lambda request: request.model):
        model = load(name)
        asked: list[_Asked] = []
        for request in alike:
            try:
                asked.append(_prepared(request, model))
            except PromptRefusedError as error:
                yield [ScoreFailure(request.key, "prompt-refused", str(error), final=True)]
        for batch in _batches(asked, _TOKENS * passes.tokens(model)):
            yield _responses(model, batch, passes)


def _prepared(request: SampleRequest, model: LoadedModel) -> _Asked:
    context = context_of_sample(request, model.tokenizer, model.template, model.limit)
    # The last token is not fed back.
    return _Asked(request, context, min(request.settings.max_tokens, model.limit - len(context) + 1))


def _batches(asked: Sequence[_Asked], room: int) -> Iterator[list[_Asked]]:
    batch: list[_Asked] = []
    for each in asked:
        longest = max(len(one.context) + one.room for one in (*batch, each))
        if batch and (len(batch) + 1) * longest > room:
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _responses(model: LoadedModel, batch: Sequence[_Asked], passes: Passes) -> list[Sample | ScoreFailure]:
    import torch

    with torch.inference_mode():
        written = _write(model, batch)
    listed = _lists(model, batch, written, passes)
    return [
        Sample(each.request.key, _response(each, one, top, model), len(each.context), len(one.ids))
        for each, one, top in zip(batch, written, listed, strict=True)
    ]


def _write(model: LoadedModel, batch: Sequence[_Asked]) -> list[_Written]:
    """All responses of a batch, token by token; shorter contexts are filled up at their start."""
    import torch

    n, longest = len(batch), max(len(each.context) for each in batch)
    ids, mask = torch.zeros((n, longest), dtype=torch.long), torch.zeros((n, longest), dtype=torch.long)
    for row, seen, each in zip(ids, mask, batch, strict=True):
        row[longest - len(each.context) :] = torch.tensor(each.context)
        seen[longest - len(each.context) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    generators = [np.random.default_rng(each.request.settings.seed + each.request.index) for each in batch]
    written: list[list[int]] = [[] for _ in batch]
    stops: list[int | None] = [None] * n
    going = set(range(n))
    cache: Any = None
    while going:
        logits, cache = model.step(ids, mask, positions, cache)
        drawn = draw(logits, model.unused, batch, [generator.random() for generator in generators])
        for at in sorted(going):
            if drawn[at] in model.stop_ids:
                stops[at] = drawn[at]
                going.discard(at)
                continue
            written[at].append(drawn[at])
            if len(written[at]) >= batch[at].room:
                going.discard(at)
        ids = torch.tensor(drawn, device=model.device)[:, None]
        mask = torch.cat([mask, mask.new_ones((n, 1))], dim=1)
        # Rows that are done go on beside the others; a position beyond the limit may change the frequencies of all.
        positions = (positions[:, -1:] + 1).clamp(max=model.limit - 1)
    return [_Written(one, stop) for one, stop in zip(written, stops, strict=True)]


def draw(logits: Tensor, unused: Tensor, batch: Sequence[_Asked], uniform: Sequence[float]) -> list[int]:
    """A token of each row, shape (n, V): the best at temperature 0, else from the fewest that hold ``top_p``.

    The rule of `backends.local.sampling.draw`, on the device. ``unused`` columns, shape (V,), are no tokens.
    """
    import torch

    settings = [each.request.settings for each in batch]
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    masked = logits.to(wide).masked_fill(unused, -torch.inf)
    if all(one.temperature == 0 for one in settings):
        return top_ids(masked, 1)[:, 0].tolist()

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=wide, device=logits.device)[:, None]

    scaled = masked / column([one.temperature or 1.0 for one in settings])
    values, order = torch.sort(scaled, dim=1, descending=True, stable=True)
    mass = torch.cumsum(torch.exp(values - values[:, :1]), dim=1)
    last = (mass < column([one.top_p for one in settings]) * mass[:, -1:]).sum(dim=1, keepdim=True)
    found = (mass <= column(uniform) * mass.gather(1, last)).sum(dim=1, keepdim=True)
    # At temperature 0 the first; and the product may be rounded up to the whole mass.
    chosen = torch.where(column([one.temperature for one in settings]) == 0, 0, torch.minimum(found, last))
    return order.gather(1, chosen)[:, 0].tolist()


def _lists(
    model: LoadedModel, batch: Sequence[_Asked], written: Sequence[_Written], passes: Passes
) -> list[list[tuple[tuple[Candidate, ...], float]]]:
    """The list at each position of each response, from the pass that a score is made of, and the value of its token."""
    fed: list[Fed] = []
    said: list[list[int]] = []
    for each, one in zip(batch, written, strict=True):
        tokens = [*one.ids, *(() if one.stop is None else (one.stop,))]
        said.append(tokens)
        first = len(each.context) - 1
        fed.append(Fed([*each.context, *tokens[:-1]], range(first, first + len(tokens))))
    hidden = passes.hidden(model, fed)
    found: list[list[tuple[tuple[Candidate, ...], float]]] = []
    for each, tokens, rows in zip(batch, said, hidden, strict=True):
        of_one: list[tuple[tuple[Candidate, ...], float]] = []
        asked = Rows(model, rows, each.request.settings.top_logprobs, False, [(token,) for token in tokens])
        for _, compared in passes.reduced([asked], pair=False):
            (side,) = compared.sides
            for ids, logprobs, (value,) in zip(side.ids.tolist(), side.logprobs.tolist(), side.wanted, strict=True):
                of_one.append((candidates(model, ids, logprobs), value))
        found.append(of_one)
    return found


def _response(
    asked: _Asked, written: _Written, listed: Sequence[tuple[tuple[Candidate, ...], float]], model: LoadedModel
) -> Response:
    request, settings, known = asked.request, asked.request.settings, model.tokenizer
    texts = split_text([known.token_bytes(index) for index in written.ids])
    tokens = list(zip(written.ids, texts, strict=True))
    if written.stop is not None:
        tokens.append((written.stop, model.token(written.stop)[0]))
    positions = tuple(
        Position(candidate(model, index, value, text), top)
        for (index, text), (top, value) in zip(tokens, listed, strict=True)
    )
    return Response(
        source_file="",
        response_idx=request.index,
        prompt=request.prompt,
        model=request.model,
        text="".join(texts),
        positions=positions,
        finish_reason="MAX_TOKENS" if written.stop is None else "STOP",
        sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p),
        model_version=model.checkpoint.version,
        has_stop=written.stop is not None,
    )
