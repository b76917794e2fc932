"""Raw answers of Gemini, with the names of its REST form and of its Python client."""

from __future__ import annotations

from kl.input.problems import Notes, as_list, as_plain
from kl.input.shapes.requests import Object, either


def is_candidate(raw: Object) -> bool:
    """Whether an object is a candidate of Gemini."""
    names = ("logprobsResult", "logprobs_result")
    return "text" not in raw and (as_plain(raw.get("content")) is not None or either(raw, *names) is not None)


def gemini_response(raw: Object, notes: Notes) -> Object:
    """A candidate in the documented form."""
    result = as_plain(either(raw, "logprobsResult", "logprobs_result")) or {}
    chosen = as_list(either(result, "chosenCandidates", "chosen_candidates")) or []
    tops = as_list(either(result, "topCandidates", "top_candidates")) or []
    if not chosen or len(tops) != len(chosen):
        what = f"{len(chosen)} chosenCandidates and {len(tops)} topCandidates in its logprobsResult"
        notes.defect("no-logprobs", f"a raw answer of Gemini with {what}")
    rows = [
        {**_token(item), "top_logprobs": [_token(entry) for entry in as_list(top.get("candidates")) or []]}
        for item, top in zip(chosen, (as_plain(top) or {} for top in tops), strict=False)
    ]
    reason = either(raw, "finishReason", "finish_reason")
    return {
        "text": _text(as_plain(raw.get("content")) or {}),
        **({} if reason is None else {"finish_reason": reason}),
        "logprobs": {"content": rows},
    }


def _token(item: object) -> Object:
    raw = as_plain(item) or {}
    logprob = raw.get("logProbability", raw.get("log_probability"))
    token: Object = {"token": raw.get("token", ""), "logprob": logprob}
    token_id = either(raw, "tokenId", "token_id")
    return token if token_id is None else {**token, "token_id": token_id}


def _text(content: Object) -> str | None:
    texts = [(as_plain(part) or {}).get("text") for part in as_list(content.get("parts")) or []]
    return "".join(text for text in texts if isinstance(text, str)) if texts else None
