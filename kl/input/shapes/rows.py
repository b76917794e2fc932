"""Positions as services write them: ids under other names, lists that are objects, tokens named by their ids.

Two marks are put on positions, and mean the same in a file that says them itself. With ``may_lack`` the list may have
lost entries of any value; ``unusable`` says in words why the list is not that of the position.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from kl.input.problems import as_list, as_plain, number
from kl.input.shapes.requests import Object
from kl.pieces import NAMED_BY_ID, is_whole

_NAMED_BY_ID = re.compile(rf"{NAMED_BY_ID}(\d+)")
_ID_END = 2**63
_MERGED = (
    "the entry stands for several tokens, of which the first ones show no text: its list comes after them, and the "
    "source has none for these"
)


def usual_rows(items: Sequence[object], n_tokens: int | None = None) -> list[object]:
    """Positions in the documented form.

    Parameters
    ----------
    n_tokens : int, optional
        How many tokens the service counted; where there are fewer entries, some of them stand for several tokens.
    """
    rows = [item if (row := as_plain(item)) is None else _usual_row(row) for item in items]
    return _with_lists(_with_merged_marked(rows, n_tokens))


def ids_beside(raw: Object, n: int) -> list[int] | None:
    """The ids of n sampled tokens that stand beside their positions; None where these are no such ids."""
    ids = as_list(raw.get("token_ids")) or []
    found = [item for item in ids if type(item) is int and 0 <= item < _ID_END]
    return found if len(found) == len(ids) == n else None


def with_ids(rows: Sequence[object], raw: Object) -> Sequence[object]:
    """Positions that state no ids, with those of the sampled tokens that stand beside them."""
    ids = ids_beside(raw, len(rows))
    if ids is None or any(map(_states_id, rows)):
        return rows
    return [
        item if (row := as_plain(item)) is None else {**row, "token_id": token_id}
        for item, token_id in zip(rows, ids, strict=True)
    ]


def _states_id(item: object) -> bool:
    row = as_plain(item) or {}
    entries = (row, *(as_plain(entry) or {} for entry in as_list(row.get("top_logprobs")) or ()))
    return any(entry.get("token_id") is not None or entry.get("id") is not None for entry in entries)


def _usual_row(row: Object) -> Object:
    top = as_list(row.get("top_logprobs"))
    by_id = _NAMED_BY_ID.fullmatch(str(row.get("token"))) is not None
    usual = _usual_entry(row, by_id=by_id, keep_bytes=True)
    if top is None:
        return usual
    return {**usual, "top_logprobs": [_usual_listed(item, by_id) for item in top]}


def _usual_listed(item: object, by_id: bool) -> object:
    entry = as_plain(item)
    return item if entry is None else _usual_entry(entry, by_id=by_id, keep_bytes=False)


def _usual_entry(entry: Object, *, by_id: bool, keep_bytes: bool) -> Object:
    """With its id as ``token_id``; one that is named by its id has no text but that of its bytes.

    Those of the sampled token are its own, those of a listed one spell its name (vLLM 0.32).
    """
    usual = entry
    if type(entry.get("id")) is int and "token_id" not in entry:
        usual = {"token_id" if name == "id" else name: value for name, value in entry.items()}
    named = _NAMED_BY_ID.fullmatch(str(entry.get("token"))) if by_id else None
    if named is None:
        return usual
    usual = {**usual, "token": "", "token_id": int(named[1])}
    stated = as_list(usual.pop("bytes", None))
    if keep_bytes and stated and bytes_spell(stated) != named[0]:
        text = bytes_spell(stated)
        usual |= {"bytes": stated} if text is None else {"bytes": stated, "token": text}
    return usual


def bytes_spell(stated: Sequence[object]) -> str | None:
    """The text of stated bytes; None if they are none, or no whole characters."""
    try:
        return bytes(item if isinstance(item, int) else -1 for item in stated).decode()
    except (ValueError, UnicodeDecodeError):
        return None


def _with_merged_marked(rows: list[object], n_tokens: int | None) -> list[object]:
    """With the positions marked at which tokens before the entry's own have no entry.

    llama.cpp holds back a token that begins a character and is not the whole of it, with its list, and then says the
    whole text beside the list, and the id, of the last token alone.
    """
    plain = {at: row for at, item in enumerate(rows) if (row := as_plain(item)) is not None}
    certain = {at for at, row in plain.items() if _is_merged(row)}
    lacking = 0 if n_tokens is None else n_tokens - len(rows)
    # A token that ends the turn may be counted and not shown. Without a list that has the token nothing tells.
    unsure = {at for at, row in plain.items() if _may_be_merged(row)} if lacking > 0 else set[int]()
    for at in certain | unsure:
        kept = {name: value for name, value in plain[at].items() if name not in ("token_id", "bytes")}
        rows[at] = {**kept, "unusable": _MERGED}
    return rows


def unexplained(rows: Sequence[object], n_tokens: int | None) -> int:
    """How many tokens a service counted beyond the entries that it gave, and no marked position accounts for."""
    marked = any((as_plain(row) or {}).get("unusable") == _MERGED for row in rows)
    return 0 if n_tokens is None or marked else max(n_tokens - len(rows), 0)


def _is_merged(row: Object) -> bool:
    """Whether the list has the sampled id with the end of the sampled bytes only."""
    own = as_list(row.get("bytes")) or []
    for item in as_list(row.get("top_logprobs")) or []:
        entry = as_plain(item) or {}
        if entry.get("token_id") is not None and entry.get("token_id") == row.get("token_id"):
            listed = as_list(entry.get("bytes")) or []
            return 0 < len(listed) < len(own) and own[-len(listed) :] == listed
    return False


def _may_be_merged(row: Object) -> bool:
    token = row.get("token")
    ids = [(as_plain(item) or {}).get("token_id") for item in as_list(row.get("top_logprobs")) or []]
    return isinstance(token, str) and not token.isascii() and row.get("token_id") not in ids


def _with_lists(rows: Sequence[object]) -> list[object]:
    """Positions whose lists may be objects of texts and values, with lists of entries.

    In an object, tokens of one text overwrite each other: one may be missing where a key is no token's own, where the
    values do not fall, or where there are fewer than elsewhere. A sampled token that is none of the k best may be added
    to them, and may stand before them. Keys that are ids collide with none.
    """
    raw = {at: row for at, item in enumerate(rows) if (row := as_plain(item)) is not None}
    tops = {at: top for at, row in raw.items() if (top := as_plain(row.get("top_logprobs"))) is not None}
    may_be_added = {at: _least(top) == raw[at].get("token") for at, top in tops.items()}
    k = max((len(top) for at, top in tops.items() if not may_be_added[at]), default=0)
    longest = max(map(len, tops.values()), default=0)
    found = list(rows)
    for at, top in tops.items():
        named = [_NAMED_BY_ID.fullmatch(token) for token in top]
        entries: list[Object] = [{"token": token, "logprob": value} for token, value in top.items()]
        if named and all(named):
            entries = [_usual_entry(entry, by_id=True, keep_bytes=False) for entry in entries]
            found[at] = {**raw[at], "top_logprobs": entries}
            continue
        is_short = len(top) < (longest if may_be_added[at] else k)
        is_first = next(iter(top), None) == raw[at].get("token") and not (may_be_added[at] and len(top) <= k)
        values = [_value(value) for value in top.values()][1 if is_first else 0 :]
        lacks = is_short or not all(map(is_whole, top)) or values != sorted(values, reverse=True)
        found[at] = {**raw[at], "top_logprobs": entries, **({"may_lack": True} if lacks else {})}
    return found


def _least(top: Object) -> str | None:
    return min(top, key=lambda token: _value(top[token]), default=None)


def _value(value: object) -> float:
    read = number(value)
    return -math.inf if read is None else read
