"""Lists of candidates in the shapes that servers have, and what is usable in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from backends.errors import BackendError
from backends.openai_compatible.client import Json
from kl.records import UNKNOWN_LOGPROB

# llama.cpp's own log-softmax is off by up to 2.5e-4; what is further above 0 is no log-probability.
LARGEST_LOGPROB = 1e-3
_CLIPPED = -100.0  # what some services say in place of minus infinity
_AS_ID = "token_id:"
_NO_BYTES = "\ufffd".encode()
SHAPE_ERRORS = (AttributeError, KeyError, IndexError, TypeError, ValueError)


class ListError(BackendError):
    """A list that cannot be used; ``reason`` is the code that reports count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Entry(NamedTuple):
    """One candidate as a server lists it."""

    token_id: int | None
    text: str
    token_bytes: bytes | None
    logprob: float | None
    rank: int | None = None


class Usable(NamedTuple):
    """A list by falling log-probability, and how many of its entries were none."""

    entries: list[Entry]
    n_dropped: int


def usable(entries: Sequence[Entry], k: int) -> Usable:
    """The k best that have a log-probability, and that can be told apart.

    The sampled token, or the prompt's own, may stand in a list beside the k best. Entries of one text and no id are
    not told apart: the list ends before the first of them, so that all that is not in it is below its last.

    Raises
    ------
    ListError
        If values are above 0 (logits), or nothing usable is left.
    """
    known = falling(entries)
    n_none = len(entries) - len(known)
    best = [item for item in known if item.rank is None or item.rank <= k][:k]
    if not best:
        raise ListError("no-logprobs", f"none of the {len(entries)} candidates has a log-probability.")
    told = _told_apart(best)
    if not told:
        raise ListError(
            "colliding-texts", "the best candidates share one text and have no ids: which is which is unknown."
        )
    return Usable(list(told), n_none + len(best) - len(told))


def falling(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that have a log-probability, by falling value; what rounding puts above 0 is 0.

    Raises
    ------
    ListError
        If values are above 0 (logits).
    """
    known = [item for item in entries if item.logprob is not None and _is_logprob(item.logprob)]
    known.sort(key=lambda item: -_value(item))
    if known and _value(known[0]) > LARGEST_LOGPROB:
        raise ListError(
            "no-log-probabilities",
            f"a value of {_value(known[0]):.4g} is above 0: the server reports something else than log-probabilities "
            "(vLLM: start it with --logprobs-mode raw_logprobs).",
        )
    return [item._replace(logprob=min(_value(item), 0.0)) for item in known]


def _value(item: Entry) -> float:
    return -math.inf if item.logprob is None else item.logprob


def _is_logprob(value: float) -> bool:
    return math.isfinite(value) and value > UNKNOWN_LOGPROB and value != _CLIPPED


def _told_apart(best: Sequence[Entry]) -> Sequence[Entry]:
    if len({item.token_id for item in best}) == len(best) and all(item.token_id is not None for item in best):
        return best
    if any(item.token_id is not None for item in best):
        raise ListError("unexpected-shape", "one token id stands in the list twice, or some entries have none.")
    shown = [(item.text, item.token_bytes) for item in best]
    first = next((n for n, item in enumerate(shown) if shown.count(item) > 1), len(best))
    return best[:first]


def chat_entries(item: Json) -> list[Entry]:
    """Of one item of ``logprobs.content``; llama.cpp answers so in completions, too."""
    if "top_probs" in item or "top_logprobs" not in item:
        raise ListError(
            "after-sampling",
            "the server reports probabilities after sampling (post_sampling_probs), or no list at all.",
        )
    return [_chat_entry(entry) for entry in item["top_logprobs"]]


def without_outsider(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Without a first entry that is below all others: vLLM's chat lists the sampled token in place of the k-th best."""
    values = [_value(item) for item in entries]
    return entries[1:] if len(values) > 1 and values[0] < min(values[1:]) else entries


def _chat_entry(item: Json) -> Entry:
    text = str(item.get("token") or "")
    listed = item.get("bytes")
    token_id = item.get("id", item.get("token_id"))
    if token_id is None and text.startswith(_AS_ID):
        return Entry(
            int(text.removeprefix(_AS_ID)), "", None, _number(item.get("logprob"))
        )  # its bytes are of that text
    # Some servers show a part of a character as U+FFFD, and give the bytes of that.
    token_bytes = bytes(listed) if listed and _NO_BYTES not in bytes(listed) else None
    return Entry(
        token_id,
        text if token_bytes is None else token_bytes.decode("utf-8", "replace"),
        token_bytes,
        _number(item.get("logprob")),
    )


def keyed_entries(listed: dict[str, Any]) -> list[Entry]:
    """Of a list in the form of the older completions: a mapping from text, or from ``token_id:7``, to value."""
    return [
        Entry(int(text.removeprefix(_AS_ID)), "", None, _number(value))
        if text.startswith(_AS_ID)
        else Entry(None, text, None, _number(value))
        for text, value in listed.items()
    ]


def may_lack(entries: Sequence[Entry], own: Entry, k: int) -> bool:
    """Whether a list by texts may have lost an entry to another of its text.

    A list has its k best, and one more where the position's own token is none of them. Of k entries whose last is the
    position's own, nobody can say whether it stands beside them or in the place of one that was lost.
    """
    if all(item.token_id is not None for item in entries):
        return False
    least = min(entries, key=_value, default=None)
    return len(entries) < k or (len(entries) == k > 1 and least is not None and least.text == own.text)


def prompt_entries(listed: dict[str, Any]) -> list[Entry]:
    """Of one item of ``prompt_logprobs``: a mapping from the id as text."""
    return [
        Entry(int(token), "", None, _number(entry["logprob"]), entry.get("rank")) for token, entry in listed.items()
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def first_choice(answer: Json) -> Json:
    """The one choice of an answer.

    Raises
    ------
    ListError
        If there is none, or several.
    """
    choices = answer.get("choices") or []
    if len(choices) != 1:
        raise ListError("unexpected-shape", f"the answer has {len(choices)} choices where one was asked.")
    return choices[0]


def generated_lists(choice: Json) -> list[tuple[Entry, list[Entry]]]:
    """(sampled token, list) of each generated token, in either shape.

    Raises
    ------
    ListError
        If there are none.
    """
    logprobs = choice.get("logprobs")
    if not logprobs:
        raise ListError("no-logprobs", f"the answer has no log-probabilities (finish {choice.get('finish_reason')}).")
    if logprobs.get("content") is not None:
        return [(_chat_entry(item), chat_entries(item)) for item in logprobs["content"]]
    tokens, values, tops = (logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not len(tokens) == len(values) == len(tops):
        raise ListError("unexpected-shape", f"{len(tokens)} tokens, {len(values)} values and {len(tops)} lists.")
    return [
        (keyed_entries({token: value})[0], [] if top is None else keyed_entries(top))
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def one_list(choice: Json, k: int) -> list[Entry]:
    """The list of the one generated token; empty where entries may have been lost to others of their text.

    Raises
    ------
    ListError
        If it is not one.
    """
    lists = generated_lists(choice)
    if len(lists) != 1:
        raise ListError("unexpected-shape", f"the answer has {len(lists)} lists where one token was asked.")
    ((own, entries),) = lists
    return [] if is_keyed(choice) and may_lack(entries, own, k) else entries


def is_keyed(choice: Json) -> bool:
    """Whether its lists are in the form of the older completions: a mapping, where equal texts are one entry."""
    return (choice.get("logprobs") or {}).get("content") is None
