"""What moves between the rooms: prompts, P's responses, Q's scores.

P is the reference model that wrote the responses, Q the candidate that is asked about them.
All log-probabilities are natural logarithms (nats).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Role = Literal["user", "model"]

LARGEST_MASS = 1.01  # of one list: log-probabilities rounded to two decimals reach 1.005
UNKNOWN_LOGPROB = -1000.0  # at or below: OpenAI's -9999.0 for "not known", Vertex AI's -2**100 for a masked token

# What models write to end a turn: ChatML, Llama 2/Mistral, Gemma (2), GPT, Llama 3 (3), Phi, harmony, DeepSeek.
END_TOKENS = frozenset(
    "<|im_end|> </s> <end_of_turn> <eos> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|> <|end|> <|return|> "
    "<\uff5cend\u2581of\u2581sentence\uff5c>".split()
)


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model was asked: the turns before the response, and an optional system text."""

    turns: tuple[Turn, ...]
    system: str | None = None

    def canonical(self) -> str:
        """The prompt as canonical JSON: equal prompts, and only those, give equal text."""
        return json.dumps(
            {"system": self.system, "turns": [[turn.role, turn.content] for turn in self.turns]},
            ensure_ascii=False,
            separators=(",", ":"),
        )

    @property
    def prompt_id(self) -> str:
        """16 hexadecimal digits that identify the prompt by its content."""
        return hashlib.sha256(self.canonical().encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Candidate(NamedTuple):
    """One token with its log-probability; ``None`` means not reported.

    ``token_bytes`` are the exact UTF-8 bytes where the source states them (a token may be part of a character).
    """

    token: str
    logprob: float | None
    token_id: int | None = None
    token_bytes: bytes | None = None


class Defect(NamedTuple):
    """Why something cannot be used: a short code and one line for people."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Position:
    """One position of a response: the token that was sampled and the top-k list it came from.

    ``top`` is sorted by falling log-probability. The sampled token may be absent from it. ``n_dropped`` counts entries
    of the source's list that were no probabilities. With ``may_lack`` the source may have lost entries of any value, so
    that the smallest one does not bound the tokens outside ``top``. Where the list is no distribution there is a
    ``defect`` and ``top`` is empty; the token belongs to the context of later positions all the same.
    """

    sampled: Candidate
    top: tuple[Candidate, ...]
    n_dropped: int = 0
    defect: Defect | None = None
    may_lack: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """How P's responses were sampled; ``None`` means not stated.

    ``logit_bias`` is whether some tokens were favoured or forbidden.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: bool | None = None


@runtime_checkable
class Columnar(Protocol):
    """Positions that are columns, of which some things can be said without objects."""

    def text_lengths(self) -> NDArray[np.int64]:
        """Characters of each sampled token, shape (T,)."""
        ...


@dataclass(frozen=True, slots=True)
class Response:
    """One response of P with its log-probabilities.

    ``source_file`` is the path below the input directory; ``response_idx`` counts from 0 as in the file.
    The texts of the sampled tokens, joined, are ``text``. With ``has_stop`` the last position is the end of the turn:
    what P might have said in place of stopping; the text of its token is no part of ``text``, unless the source shows
    it. ``gaps`` are (position, reason) of the positions whose prefix no text says, as tokens before it hide theirs.
    ``model_version`` is what the service called the model; ``rendered_prompt_sha256`` is of the text that P was given
    for the prompt, as its template writes it, where that is known.
    """

    source_file: str
    response_idx: int
    prompt: Prompt
    model: str | None
    text: str
    positions: Sequence[Position]
    finish_reason: str | None = None
    sampling: Sampling = Sampling()
    model_version: str | None = None
    has_stop: bool = False
    gaps: tuple[tuple[int, str], ...] = ()
    rendered_prompt_sha256: str | None = None

    @property
    def name(self) -> str:
        """How the response is called in logs, task runs and errors."""
        return f"{self.source_file}#{self.response_idx}"

    def prefix_ends(self) -> NDArray[np.int64]:
        """Where the prefix of each position ends in ``text``, in characters: shape (T,), first 0."""
        if isinstance(self.positions, Columnar):
            lengths = self.positions.text_lengths()
        else:
            lengths = np.array([len(position.sampled.token) for position in self.positions], dtype=np.int64)
        return np.concatenate(([0], np.cumsum(lengths[:-1]))).astype(np.int64)[: len(lengths)]


class ExactPair(NamedTuple):
    """What two models' whole vocabularies say at one context: of the model of this score from another, in nats.

    ``versus`` is the key of the other's score: the figures hold for that pair alone. They are NaN where the two
    vocabularies, of ``vocabulary`` and ``vocabulary_versus`` tokens, are not the same, and ``inf`` where one excludes a
    token that the other allows. ``tv`` is without unit.
    """

    versus: str
    kl: float
    reverse_kl: float
    js: float
    tv: float
    vocabulary: int
    vocabulary_versus: int

    def turned(self, key: str) -> ExactPair:
        """The same pair for the other score; ``key`` is this one's."""
        return ExactPair(
            key, self.reverse_kl, self.kl, self.js, self.tv, self.vocabulary_versus, self.vocabulary
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Score:
    """What Q says at one context: its top-k list, and with a full vocabulary every log-probability.

    ``key`` is the content hash of the context. ``full_logprobs`` has shape (V,), float32, indexed by token id.
    ``n_dropped`` counts candidates that were not probabilities (masked tokens reported as -2**100).
    Token counts are those of the service: for the bill, and to tell a prefix that it tokenised otherwise. ``exact`` is
    what a backend found that compares whole vocabularies itself. ``wanted`` are, by falling log-probability, the tokens
    that Q was asked for by name and that are not in ``top``; one that it gave no value for is missing.
    """

    key: str
    top: tuple[Candidate, ...]
    sampled: Candidate | None = None
    model_version: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    n_dropped: int = 0
    full_logprobs: NDArray[np.float32] | None = None
    exact: ExactPair | None = None
    wanted: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreFailure:
    """A context that Q gave no usable answer for.

    ``reason`` is a short code that reports count by (``blocked``, ``missing-row``); ``message`` is one line for people
    with what was seen and what to do. ``final`` means that asking again cannot help (a blocked prompt), so that the
    answer is kept and not bought a second time.
    """

    key: str
    reason: str
    message: str
    final: bool = False
