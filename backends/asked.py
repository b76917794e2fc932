"""What a backend is asked, and what that comes to."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from backends.settings import SampleSettings
from kl.records import Prompt, Response

if TYPE_CHECKING:
    from kl.columns import TopLists  # it loads Polars, which a command's help does not need


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Contexts of one response that a model is asked about.

    The context of position ``t`` is ``prompt`` followed by the first ``t`` tokens of the response, as text
    ``text[:prefix_ends[t]]``. Only ``positions`` are asked; ``keys[i]`` belongs to ``positions[i]`` and comes back in
    the result. Prefixes are cut when they are needed, so a long response costs no more memory than its text.

    Attributes
    ----------
    name : str
        How the response is called in logs and job files.
    model : str
        The model that is asked.
    prompt : Prompt
        With the system text that this model is to see.
    text : str
        P's response.
    prefix_ends : tuple of int
        For every position of the response, where its prefix ends in ``text`` (characters).
    token_ids : tuple of int, optional
        P's token ids for every position, where all are known.
    positions : tuple of int
        The positions asked, rising.
    keys : tuple of str
        One content hash per position asked.
    top_logprobs : int
        How many candidates to report.
    full_vocabulary : bool
        Also report the log-probability of every token (backends with that capability only).
    gaps : tuple of (int, str)
        (position, reason) of positions whose prefix no text says, asked where token ids are given: a backend that must
        fall back to the text gives them a failure of that reason.
    wanted : TopLists, of one list for each position asked, optional
        Given only with the capability ``wanted_tokens``: tokens whose values are asked for beside the candidates (P's
        listed ones and the one it sampled), as P names them; their log-probabilities are NaN. `Score.wanted` says those
        that the model has and does not list; a token that is none of its own, or not certainly one, is left out.
    counterparts : tuple of str
        Given only with the capability ``exact_pairs``: for each position asked, the key under which the other model is
        asked about the same context, in the same call where it is asked now; empty where nobody is. The score of each
        of two such keys then has `Score.exact`, and no ``full_logprobs``, which are not kept.
    """

    name: str
    model: str
    prompt: Prompt
    text: str
    prefix_ends: tuple[int, ...]
    token_ids: tuple[int, ...] | None
    positions: tuple[int, ...]
    keys: tuple[str, ...]
    top_logprobs: int
    full_vocabulary: bool = False
    gaps: tuple[tuple[int, str], ...] = ()
    counterparts: tuple[str, ...] = ()
    wanted: TopLists | None = None

    def contexts(self) -> Iterator[tuple[int, str, str]]:
        """(position, key, prefix text) of each position asked."""
        for position, key in zip(self.positions, self.keys, strict=True):
            yield position, key, self.text[: self.prefix_ends[position]]

    def only(self, wanted: Container[str]) -> ScoreRequest:
        """The same request for those of its contexts whose key is wanted; positions of one key are asked once."""
        first: dict[str, int] = {}
        for index, key in enumerate(self.keys):
            if key in wanted:
                first.setdefault(key, index)
        chosen = first.values()
        return replace(
            self,
            positions=tuple(self.positions[index] for index in chosen),
            keys=tuple(first),
            counterparts=tuple(self.counterparts[index] for index in chosen) if self.counterparts else (),
            wanted=None if self.wanted is None else self.wanted.take(np.array([*chosen], dtype=np.int64)),
        )


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One response that a model is to write.

    Attributes
    ----------
    key : str
        Of this response; comes back in the result.
    name : str
        How it is called in logs and job files.
    model : str
        The model that writes.
    prompt : Prompt
        With the system text that this model is to see.
    settings : SampleSettings
    index : int
        Its number among the responses to this prompt, from 0; its seed is ``settings.seed + index``.
    prefix : str
        How the response begins: the model goes on from there, and only what it adds is the response.
    prefix_ids : tuple of int, optional
        The token ids of the prefix, where they are known.
    """

    key: str
    name: str
    model: str
    prompt: Prompt
    settings: SampleSettings
    index: int = 0
    prefix: str = ""
    prefix_ids: tuple[int, ...] | None = None


class Sample(NamedTuple):
    """A response that was written, under the key of its request; its ``source_file`` is empty.

    The token counts are those of the service, for the bill; ``output_tokens`` is of the response alone.
    """

    key: str
    response: Response
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class WorkEstimate:
    """What a set of requests comes to, known before anything is sent.

    Token counts are estimates: texts without tokens by a rule (`kl.text_tokens`), prefixes by P's own tokens.
    ``prompt_tokens`` says how many of the input tokens are by that rule: a backend's own tokenizer may correct them.
    ``cost_usd`` is None where no price is known, 0 where nothing is charged.
    """

    requests: int = 0
    request_bytes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = 0.0
    prompt_tokens: int = 0

    def __add__(self, other: WorkEstimate) -> WorkEstimate:
        known = self.cost_usd is not None and other.cost_usd is not None
        return WorkEstimate(
            self.requests + other.requests,
            self.request_bytes + other.request_bytes,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            (self.cost_usd or 0.0) + (other.cost_usd or 0.0) if known else None,
            self.prompt_tokens + other.prompt_tokens,
        )
