"""What can be wrong with a file of responses: a kind, a place, one line for people.

A defect makes a response (or a whole file, or one position) unusable; a repair was certain, so that the response goes
on. Messages quote values, cut short, and never the text of a prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

KEPT_PER_KIND = 5  # problems of one kind that are told one by one; the last of them stands for all further ones
_SHOWN = 40  # characters of a quoted value

WHAT_TO_DO = {
    "unreadable-file": "Check the path and its permissions.",
    "not-utf8": "Save the file as UTF-8.",
    "not-json": "Write the file again, or take it out of the input directory.",
    "nested-too-deeply": "Write the file in the documented form, or take it out of the input directory.",
    "not-an-object": 'The file must hold one object: {"prompt": …, "responses": […]}.',
    "several-prompts": "`python -m flows.convert IN OUT` writes a file for each prompt.",
    "foreign-prompt-part": "Q is given turns of text alone: sample without it, or write it into the prompt.",
    "chosen-tokens": "Sample with top_logprobs: what is not listed cannot be bounded otherwise.",
    "no-boundary": "State `prompt` (which its text begins with) or the response's `text` beside the answer.",
    "service-error": "Ask the service again.",
    "hidden-thinking": "Its lists are of a context that nobody else can be given: sample without thinking.",
    "streamed-answer": "Join the chunks of an answer, or sample without streaming.",
    "after-sampling": "Sample again without post_sampling_probs.",
    "missing-entries": "It cannot be said which entry belongs to which token; sample again with return_tokens.",
    "unusable-list": "Sample again, from a source that has a list at every token.",
    "repeated-key": "It cannot be known which value is meant: keep one of them.",
    "no-prompt": "Add the prompt that the responses answer; `python -m flows.convert IN OUT --requests FILE` does it "
    "from a file of requests.",
    "bad-prompt": "Write the prompt as a text, or as a list of {role, content} turns.",
    "empty-prompt": "Give each turn of the prompt a text.",
    "unknown-role": "Known: user, model (or assistant), and system for the first turn.",
    "prompt-end": "A prompt must end with a user turn; the response is what follows it.",
    "two-prompts": "State what the model was given, or the request alone.",
    "two-system-texts": "Keep one of them.",
    "bad-responses": "`responses` must be a list of objects.",
    "continues-prefix": "They are read by people; a run needs whole responses.",
    "no-responses": "Sample again, or take the file out of the input directory.",
    "lone-surrogate": "Half a surrogate pair is no character and cannot be sent to a model: write whole characters.",
    "bad-response": "A response must be an object with text and logprobs.",
    "no-text": "Add the text of the response.",
    "bad-text": "`text` must be a string.",
    "no-logprobs": "Sample again with log-probabilities and top_logprobs switched on.",
    "bad-logprobs": 'Write them as {"content": [{"token": …, "logprob": …, "top_logprobs": […]}, …]}.',
    "empty-response": "There is nothing to measure; sample again.",
    "bad-position": "Each entry of logprobs.content must be an object with token, logprob and top_logprobs.",
    "bad-candidate": "Each entry of top_logprobs must be an object with token and logprob.",
    "bad-token": "`token` must be a string (an empty one is allowed).",
    "missing-logprob": "Each token needs its natural-log probability; null is for a sampled token that has none.",
    "bad-logprob": "`logprob` must be a number.",
    "nan-logprob": "NaN is no log-probability; sample again.",
    "infinite-logprob": "A sampled token has a finite log-probability; write null where it is not known.",
    "positive-logprob": "Log-probabilities are natural logarithms, at most 0; check that these are not probabilities.",
    "bad-token-id": "`token_id` must be a whole number from 0 to 2**63-1, or absent.",
    "bad-bytes": "`bytes` must be a list of whole numbers from 0 to 255, or absent.",
    "no-top-logprobs": "Sample again with top_logprobs of at least 1.",
    "bad-mark": "`may_lack` is true or false, `unusable` a text that says why; or leave it out.",
    "bad-top-logprobs": "`top_logprobs` must be a list of {token, logprob} objects.",
    "repeated-token-id": "One list cannot hold a token with two values; sample again.",
    "mass-above-one": "The listed probabilities are no distribution; check that they are natural logarithms.",
    "sampled-disagrees": "One of the two is wrong; check that tokens and lists belong together.",
    "sampled-above-list": "A more probable token must be listed; check that tokens and lists belong together.",
    "text-mismatch": "Write `text` as the tokens joined, or give the `bytes` of each token.",
}


@dataclass(frozen=True, slots=True)
class InputProblem:
    """One thing that is wrong with the input.

    ``response_idx`` is None for a problem of the file, ``position`` where no single position is meant. ``kind`` is a
    short code to count by. ``count`` is above 1 where this problem stands for further ones of its kind in the same
    response, so that the sum of ``count`` is the number of places.
    """

    source_file: str
    response_idx: int | None
    position: int | None
    kind: str
    message: str
    repaired: bool
    count: int = 1


class Repair(NamedTuple):
    """What was put right at a position: a short code, and what in words."""

    kind: str
    what: str
    position: int


class RepeatedKeys(dict[str, object]):
    """A JSON object in which a key stands twice; ``repeated`` names the first such key."""

    repeated: str = ""


class Notes:
    """Collects the problems of one file (``response_idx`` None) or one response; keeps few of each kind, counts all.

    ``unusable`` has the first problem of each position that cannot be used, where the others can.
    """

    def __init__(self, source_file: str, response_idx: int | None = None) -> None:
        self.source_file = source_file
        self.response_idx = response_idx
        self.first_defect: InputProblem | None = None
        self.unusable: dict[int, InputProblem] = {}
        self._kept: list[InputProblem] = []
        self._counts: Counter[tuple[str, bool]] = Counter()

    def defect(self, kind: str, what: str, position: int | None = None) -> None:
        """Note what makes the response, or the file, unusable."""
        problem = self._add(kind, f"{what}. {WHAT_TO_DO[kind]}", position, repaired=False)
        self.first_defect = self.first_defect or problem

    def defect_at(self, position: int, kind: str, what: str) -> None:
        """Note what makes one position unusable, and no other: its numbers, not its token."""
        problem = self._add(kind, f"{what}. {WHAT_TO_DO[kind]}", position, repaired=False)
        self.unusable.setdefault(position, problem)

    def refuse_for(self, problem: InputProblem) -> None:
        """Make the response unusable for what was noted of some of its positions."""
        self.first_defect = self.first_defect or problem

    def repair(self, kind: str, what: str, position: int | None = None) -> None:
        """Note what was put right with certainty."""
        self._add(kind, f"{what}.", position, repaired=True)

    def repair_many(self, first: Iterable[Repair], counts: Mapping[str, int]) -> None:
        """Note repairs of which only the ones that are told one by one are in words; ``counts`` is of all."""
        told: Counter[str] = Counter()
        for repair in first:
            self.repair(*repair)
            told[repair.kind] += 1
        for kind, count in counts.items():
            self._counts[kind, True] += count - told[kind]

    def _add(self, kind: str, text: str, position: int | None, *, repaired: bool) -> InputProblem:
        where = self.source_file
        if self.response_idx is not None:
            where += f", response {self.response_idx}"
        if position is not None:
            where += f", position {position}"
        problem = InputProblem(self.source_file, self.response_idx, position, kind, f"{where}: {text}", repaired)
        self._counts[kind, repaired] += 1
        if self._counts[kind, repaired] <= KEPT_PER_KIND:
            self._kept.append(problem)
        return problem

    def problems(self) -> tuple[InputProblem, ...]:
        """What was noted, in order; the last kept problem of a kind carries the count of those left out."""
        seen: Counter[tuple[str, bool]] = Counter()
        told: list[InputProblem] = []
        for problem in self._kept:
            key = problem.kind, problem.repaired
            seen[key] += 1
            more = self._counts[key] - KEPT_PER_KIND if seen[key] == KEPT_PER_KIND else 0
            if more > 0:
                message = f"{problem.message} And {more} more like it."
                problem = replace(problem, message=message, count=1 + more)
            told.append(problem)
        return tuple(told)

    def as_object(self, value: object, kind: str, name: str, position: int | None = None) -> dict[str, object] | None:
        """``value`` if it is a JSON object without repeated keys; else None and a defect."""
        found = _plain_object(value, kind, name)
        return found if isinstance(found, dict) else self.defect(*found, position)

    def as_entry(self, value: object, name: str, position: int) -> dict[str, object] | None:
        """As `as_object`, of an entry of a list: what is wrong with it is a defect of the position alone."""
        found = _plain_object(value, "bad-candidate", name)
        return found if isinstance(found, dict) else self.defect_at(position, *found)


def _plain_object(value: object, kind: str, name: str) -> dict[str, object] | tuple[str, str]:
    """A JSON object without repeated keys, or the kind of the problem and what it is."""
    found = as_plain(value)
    if found is not None:
        return found
    if isinstance(value, RepeatedKeys):
        return "repeated-key", f"{name} holds the key {show(value.repeated)} more than once"
    return kind, f"{name} is {show(value)}, not an object"


def as_plain(value: object) -> dict[str, object] | None:
    """``value`` if it is a JSON object without repeated keys."""
    return cast("dict[str, object]", value) if type(value) is dict else None


def as_list(value: object) -> list[object] | None:
    """``value`` if it is a JSON list."""
    return cast("list[object]", value) if isinstance(value, list) else None


def number(value: object) -> float | None:
    """A JSON number as a float, one beyond its range as infinity; None for anything else (booleans too)."""
    if isinstance(value, float):
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def show(value: object) -> str:
    """A JSON value for a message: on one line, cut short, encodable."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        n = len(cast("list[object]", value))
        return f"a list of {n}" if n else "an empty list"
    if isinstance(value, str):
        return repr(value[:_SHOWN]) + ("…" if len(value) > _SHOWN else "")
    written = "null" if value is None else repr(value)
    return written if len(written) <= _SHOWN else written[:_SHOWN] + "…"


def is_encodable(text: str) -> bool:
    """Whether ``text`` is free of lone surrogates, so that UTF-8 can hold it."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def encodable(text: str) -> str:
    """``text`` with each lone surrogate as U+FFFD, as UTF-8 writers do."""
    return text if is_encodable(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
