"""Counting prompts by a backend's own tokenizer: a few of them, whose counts correct the estimate of all.

What is counted is drawn while a plan is made, by priority sampling: weight / u with u uniform by the text's hash, the
largest kept, so that what costs most is counted for certain and the same plan counts the same texts.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from backends.base import Backend, BackendOptions, ScoreRequest, WorkEstimate
from backends.errors import TokenKLError
from backends.storage import read_bytes, write_bytes_atomic
from kl.records import Prompt, Turn
from kl.text_tokens import prompt_tokens_of

logger = logging.getLogger(__name__)

COUNTS = "token_counts"  # below `Backend.state_dir`

_MOST_PROMPTS = 64  # of a model
_FEWEST = 4  # prompts of a script, for a correction of its own
_MOST_RESPONSES = 8  # of a model: P's tokens need not be Q's
_RESPONSES = "responses"  # in the place of a script
_MOST_TOO_HIGH = 2  # times what is counted, an estimate may be
_ONE_TOKEN = Prompt((Turn("user", "a"),))  # what else a count of it has in it, the template wrote
_AT_ONCE = 16
_DEADLINE_S = 5.0

Kind = tuple[str, str]
"""A model, and the script of a text."""


class _Text(NamedTuple):
    """A text that may be counted: how many tokens it is said to be, and of how many in all it speaks."""

    priority: float
    key: str
    prompt: Prompt
    expected: float
    weight: float


@dataclass(slots=True)
class TextSample:
    """Texts of a plan to be counted, those of one script apart; a bounded number is held."""

    _kept: dict[Kind, list[_Text]] = field(default_factory=dict[Kind, list[_Text]])
    _weights: dict[Kind, float] = field(default_factory=dict[Kind, float])

    def note_prompt(self, model: str, prompt: Prompt, requests: int, template_tokens: int) -> None:
        """A prompt, and how many requests begin with it."""
        expected, script = prompt_tokens_of(prompt, template_tokens)
        self._note((model, script), prompt, expected, requests * expected, _MOST_PROMPTS)

    def note_response(self, request: ScoreRequest) -> None:
        """A response whose beginnings are asked about, which are as many tokens as P wrote."""
        n_tokens = sum(end < len(request.text) for end in request.prefix_ends)
        weight = sum(request.positions)
        if n_tokens and weight:
            prompt = Prompt((Turn("user", request.text),))
            self._note((request.model, _RESPONSES), prompt, n_tokens, weight, _MOST_RESPONSES)

    def _note(self, kind: Kind, prompt: Prompt, expected: float, weight: float, most: int) -> None:
        if not weight:
            return
        kept = self._kept.setdefault(kind, [])
        key = prompt.prompt_id
        if any(text.key == key for text in kept):
            return
        self._weights[kind] = self._weights.get(kind, 0.0) + weight
        u = (1 + int.from_bytes(hashlib.sha256(f"{kind} {key}".encode()).digest()[:6])) / 2**48
        heapq.heappush(kept, _Text(weight / u, key, prompt, expected, weight))
        if len(kept) > most + 1:  # the next one says how much those that are counted stand for
            heapq.heappop(kept)

    def chosen(self) -> Iterator[tuple[Kind, list[_Text]]]:
        """What is counted of each kind, the heaviest first; with the weight of what it stands for."""
        for kind, kept in self._kept.items():
            ordered = sorted(kept, reverse=True)
            n = self._share(kind)
            threshold = ordered[n].priority if len(ordered) > n else 0.0
            yield kind, [text._replace(weight=max(text.weight, threshold)) for text in ordered[:n]]

    def _share(self, kind: Kind) -> int:
        if kind[1] == _RESPONSES:
            return _MOST_RESPONSES
        others = [other for other in self._kept if other[0] == kind[0] and other[1] != _RESPONSES]
        if sum(len(self._kept[other]) for other in others) <= _MOST_PROMPTS:
            return _MOST_PROMPTS
        free = max(_MOST_PROMPTS - _FEWEST * len(others), 0)
        return _FEWEST + int(free * self._weights[kind] / sum(self._weights[other] for other in others))


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What counting came to: how many prompts were counted, and counted / estimated by model and script.

    ``ratios`` has an entry of the script "" for what no script of its own says.
    """

    n_prompts: int = 0
    ratios: Mapping[Kind, float] = field(default_factory=dict[Kind, float])

    def ratio(self, model: str, script: str) -> float:
        """Counted / estimated."""
        return self.ratios.get((model, script)) or self.ratios.get((model, ""), 1.0)

    def corrected(
        self, work: WorkEstimate, model: str, script: str, backend: type[Backend], options: BackendOptions
    ) -> WorkEstimate:
        """The estimate of some requests of one model, whose prompts are of one script, with what was counted."""
        if not work.prompt_tokens or not self.ratios:
            return work
        n_prompt = round(work.prompt_tokens * self.ratio(model, script))
        n_prefix = round((work.input_tokens - work.prompt_tokens) * self.ratios.get((model, _RESPONSES), 1.0))
        before = backend.cost_usd(options, model, work.input_tokens, work.output_tokens)
        after = backend.cost_usd(options, model, n_prompt + n_prefix, work.output_tokens)
        cost = work.cost_usd * after / before if work.cost_usd and before and after else work.cost_usd
        return replace(work, input_tokens=n_prompt + n_prefix, cost_usd=cost, prompt_tokens=n_prompt)


def worth_counting(backend: type[Backend], work: WorkEstimate, max_cost_usd: float | None = None) -> bool:
    """Whether something would be spent, at a known price, and counting may decide whether it is within a limit."""
    limit = math.inf if max_cost_usd is None else max_cost_usd
    return backend.capabilities.remote and bool(work.cost_usd) and (work.cost_usd or 0) <= _MOST_TOO_HIGH * limit


def counts_here(backend: type[Backend]) -> bool:
    """Whether a backend can count, and sends nothing away for it."""
    return not backend.capabilities.remote and backend.count_prompt_tokens is not Backend.count_prompt_tokens


async def count_texts(backend: Backend, sample: TextSample, *, deadline_s: float = _DEADLINE_S) -> TokenCounts:
    """Have a sample of texts counted, as far as the backend does so within some seconds.

    What is on record is not asked again. Whatever goes wrong is one line in the log, and the estimate stands.

    Parameters
    ----------
    backend : Backend
        Entered.
    """
    wanted = dict(sample.chosen())
    record = await asyncio.to_thread(_Record.of, backend)
    known = record.n
    try:
        async with asyncio.timeout(deadline_s):
            for model in dict.fromkeys(model for model, _ in wanted):
                await _ask(backend, model, [texts for kind, texts in wanted.items() if kind[0] == model], record)
    except TimeoutError:
        logger.info("counting tokens took longer than %g s; what was not counted is estimated", deadline_s)
    except (TokenKLError, OSError) as error:
        logger.info("tokens are estimated, since they cannot be counted now: %s", error)
    if record.n > known:
        await asyncio.to_thread(record.write)
    return _compared(wanted, record)


async def _ask(backend: Backend, model: str, wanted: Sequence[Sequence[_Text]], record: _Record) -> None:
    """Have what is not on record counted, some of each kind in turn: time may run out."""
    in_turn = [text for texts in zip_longest(*wanted) for text in texts if text is not None]
    prompts = {_ONE_TOKEN.prompt_id: _ONE_TOKEN} | {text.key: text.prompt for text in in_turn}
    missing = {key: prompt for key, prompt in prompts.items() if record.get(model, key) is None}
    keys = list(missing)
    for start in range(0, len(keys), _AT_ONCE):
        some = keys[start : start + _AT_ONCE]
        counts = await backend.count_prompt_tokens(model, [missing[key] for key in some])
        if counts is None:
            return
        for key, count in zip(some, counts, strict=True):
            record.note(model, key, count)


def _compared(wanted: Mapping[Kind, Sequence[_Text]], record: _Record) -> TokenCounts:
    n_prompts, ratios = 0, dict[Kind, float]()
    sums: dict[str, tuple[float, float]] = {}
    for (model, script), texts in wanted.items():
        counted = [(text, count) for text in texts if (count := record.get(model, text.key)) is not None]
        if not counted:
            continue
        template = (record.get(model, _ONE_TOKEN.prompt_id) or 1) - 1 if script == _RESPONSES else 0
        weight = sum(text.weight for text, _ in counted)
        above = sum(text.weight * (count - template) / text.expected for text, count in counted)
        if script == _RESPONSES or len(counted) >= min(_FEWEST, len(texts)):
            ratios[model, script] = above / weight
        if script != _RESPONSES:
            n_prompts += len(counted)
            before = sums.get(model, (0.0, 0.0))
            sums[model] = before[0] + above, before[1] + weight
    ratios |= {(model, ""): above / weight for model, (above, weight) in sums.items()}
    return TokenCounts(n_prompts, ratios)


@dataclass(slots=True)
class _Record:
    """Counts by model and prompt, in the backend's folder where it has one."""

    path: Path | None
    counts: dict[str, dict[str, int]]

    @classmethod
    def of(cls, backend: Backend) -> _Record:
        """What is on record."""
        if backend.state_dir is None or not backend.capabilities.remote:
            return cls(None, {})
        path = backend.state_dir / COUNTS
        try:
            return cls(path, _checked(json.loads(read_bytes(path))))
        except (FileNotFoundError, NotADirectoryError):
            return cls(path, {})
        except (OSError, ValueError) as error:
            logger.info("%s cannot be read (%s); tokens are counted again", path, error)
            return cls(path, {})

    @property
    def n(self) -> int:
        """How many there are."""
        return sum(map(len, self.counts.values()))

    def get(self, model: str, key: str) -> int | None:
        """The count of a prompt; None if nobody counted it."""
        return self.counts.get(model, {}).get(key)

    def note(self, model: str, key: str, count: int | None) -> None:
        """Take in a count."""
        if count is not None:
            self.counts.setdefault(model, {})[key] = count

    def write(self) -> None:
        """Keep the counts for the next run."""
        if self.path is None:
            return
        try:
            write_bytes_atomic(self.path, json.dumps(self.counts).encode("ascii"))
        except (TokenKLError, OSError) as error:
            logger.info("the token counts are not kept for the next run: %s", error)


def _checked(record: Any) -> dict[str, dict[str, int]]:
    try:
        if all(type(count) is int for counts in record.values() for count in counts.values()):
            return record
    except AttributeError as error:
        raise ValueError("it is no object of objects") from error
    raise ValueError("a count in it is no number")
