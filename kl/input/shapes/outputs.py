"""Answers of OpenAI's Responses route, whose text and lists stand in the parts of its output items."""

from __future__ import annotations

from kl.input.problems import as_list, as_plain
from kl.input.shapes.requests import Object

_SILENT = ("reasoning",)  # items that are no text of the response; how many tokens they have is in the usage
_ENDS = {"completed": "stop", "max_output_tokens": "length"}


def output_choice(answer: Object) -> Object | None:
    """The one response of an answer in the form of a choice; None if it is no answer of that route.

    Where an item or a part is something else than text, the choice has no text.
    """
    items = as_list(answer.get("output"))
    if answer.get("object") != "response" or items is None:
        return None
    whole = [item for raw in items if (item := as_plain(raw) or {}).get("type") not in _SILENT]
    parts = [as_plain(part) or {} for item in whole for part in as_list(item.get("content")) or [None]]
    texts = [part.get("text") if part.get("type") == "output_text" else None for part in parts]
    text = "".join(text for text in texts if isinstance(text, str)) if None not in texts else None
    rows = [row for part in parts for row in as_list(part.get("logprobs")) or []]
    reason = (as_plain(answer.get("incomplete_details")) or {}).get("reason", answer.get("status"))
    end = _ENDS.get(str(reason), reason)
    ended: Object = {} if end is None else {"finish_reason": end}
    return {"object": "response", "text": text, **ended, "logprobs": {"content": rows} if rows else None}
