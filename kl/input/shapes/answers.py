"""Raw answers of services as files of responses, and their items as responses, in the form that the readers check.

Nothing is made up: what a format lacks is noted in one line that names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kl.input.problems import Notes, as_list, as_plain, number, show
from kl.input.prompts import read_prompt
from kl.input.shapes.completions import (
    Asked,
    Shown,
    is_scored,
    legacy_rows,
    native_answer,
    scored_prompt,
    without_echo,
)
from kl.input.shapes.gemini import gemini_response, is_candidate
from kl.input.shapes.outputs import output_choice
from kl.input.shapes.requests import (
    Object,
    answer_of,
    asked_of,
    either,
    foreign_part,
    is_raw_text,
    prompt_of,
    prompt_of_request,
    scored_message,
    settings_of,
)
from kl.input.shapes.rows import unexplained, usual_rows, with_ids
from kl.records import Prompt

_CONTEXT = "\0asked"  # a key that no service has


class _Context(NamedTuple):
    """What an item of a raw answer needs of the answer and of its request.

    ``n_tokens`` is how many tokens the service counted, ``n_hidden`` how many came before and are not shown, None where
    some did; ``trouble`` is what the service said in the place of an answer.
    """

    asked: Asked = Asked()
    n_tokens: int | None = None
    n_hidden: int | None = 0
    trouble: str | None = None


def as_document(document: Object) -> Object:
    """A file's object with its responses under ``responses``, if it is a raw answer of a service or one response.

    The prompt may stand beside a raw answer, or in the request of a batch row.
    """
    if "responses" in document:
        return document
    answer = answer_of(document)
    items = _items_of(document, answer)
    if items is None:
        return {**document, "responses": [document]} if "text" in document and "logprobs" in document else document
    prompt = prompt_of(document)
    about = settings_of((document, answer, asked_of(document)))
    about |= {name: document[name] for name in ("sampling",) if name in document}
    return {**about, **prompt, "responses": [_with_request(item, document, answer, prompt) for item in items]}


def _items_of(document: Object, answer: Object) -> list[object] | None:
    """The responses of an answer, or what the service said in place of any."""
    for name in ("choices", "candidates"):
        items = as_list(answer.get(name))
        if items:
            return items
    if as_list(answer.get("completion_probabilities")) is not None:
        return [answer]
    choice = output_choice(answer)
    if choice is not None and choice["text"] != "":
        return [choice]
    refusal = _refusal(document, answer)
    if refusal is None:
        return as_list(answer.get("choices")) if "choices" in answer else as_list(answer.get("candidates"))
    return [{_CONTEXT: _Context(trouble=refusal)}]


def _refusal(document: Object, answer: Object) -> str | None:
    feedback = as_plain(either(answer, "promptFeedback", "prompt_feedback")) or {}
    blocked = either(feedback, "blockReason", "block_reason")
    if blocked is not None:
        return f"the service blocked the prompt: {show(blocked)}"
    status = document.get("status") if "request" in document or "response" in document else None  # of a batch row
    for said in (either(answer, "error"), either(document, "error"), status):
        inner = as_plain(said)
        if said is None or (inner is None and not isinstance(said, str)) or said == "":
            continue
        if answer is document and "text" in document:
            return None
        text = " ".join(str(said if inner is None else inner.get("message", inner)).split())
        return f"the service answered with an error: {show(text)}"
    return None


def _with_request(item: object, document: Object, answer: Object, prompt: Object) -> object:
    raw = as_plain(item)
    if raw is None or _CONTEXT in raw:
        return item
    # Of a chat they stand beside the choices.
    beside = {
        name: answer[name]
        for name in ("prompt_logprobs", "prompt_token_ids")
        if raw.get(name) is None and answer.get(name)
    }
    stated = document.get("text") if document is not answer or "choices" in document else None
    scored = scored_message(document)
    whole = either(asked_of(document), "prompt") if scored is None else None
    text = stated if isinstance(stated, str) else scored
    request = asked_of(document)
    echo = bool(request.get("echo")) if request else None
    asked = Asked(prompt.get("prompt"), whole, text, scored is not None, echo)
    count = (as_plain(answer.get("usage")) or {}).get("completion_tokens")
    n_tokens = count if type(count) is int and len(as_list(answer.get("choices")) or ()) == 1 else None
    return {**raw, **beside, _CONTEXT: _Context(asked, n_tokens, _hidden_tokens(raw, answer))}


def _hidden_tokens(item: Object, answer: Object) -> int | None:
    """How many tokens a model wrote before its response that this does not hold; None where it is some number."""
    usage = as_plain(answer.get("usage")) or {}
    details = as_plain(either(usage, "completion_tokens_details", "output_tokens_details")) or {}
    google = as_plain(either(answer, "usageMetadata", "usage_metadata")) or {}
    counts = (either(details, "reasoning_tokens"), either(google, "thoughtsTokenCount", "thoughts_token_count"))
    count = next((value for raw in counts if (value := number(raw)) is not None), None)
    message = as_plain(item.get("message")) or {}
    kinds = [(as_plain(part) or {}).get("type") for part in as_list(answer.get("output")) or []]
    thinks = message.get("reasoning_content") or message.get("reasoning") or ("reasoning" in kinds and count is None)
    return int(count) if count else None if thinks else 0


def note_request(document: Object, shaped: Object, notes: Notes) -> None:
    """What a file with a raw answer lacks of its prompt, or has too much of."""
    if shaped is not document and "responses" not in document:
        foreign = foreign_part(document)
        if foreign is not None:
            notes.defect("foreign-prompt-part", f"the request has `{foreign}`, which the model is given as text")
        if either(asked_of(document), "logprob_token_ids") is not None:
            notes.defect("chosen-tokens", "the request has `logprob_token_ids`: the lists are of those tokens alone")
        asked = prompt_of_request(document)
        if asked is not None and "prompt" in shaped and _read(asked) != _read(shaped):
            notes.defect("two-prompts", "the request has other turns, or another system text, than stand beside it")
        if is_raw_text(document):
            what = "the request's `prompt` is the text that the model was given as it is"
            notes.repair("raw-prompt", f"{what}; taken as a user turn, as nothing here says otherwise")
    first = next(iter(as_list(shaped.get("responses")) or ()), None)
    bare = None if "prompt" in shaped else _name_of(as_plain(first) or {})
    ids = as_list(shaped.get("prompt"))
    if bare is not None:
        notes.defect("no-prompt", f"{bare}, and `prompt` is missing")
    elif ids and all(type(item) is int for item in ids):
        notes.defect("no-prompt", "the request's `prompt` is a list of token ids, which no text here says")


def _read(asked: Object) -> Prompt | None:
    return read_prompt(asked, Notes(""))


def _name_of(item: Mapping[str, object]) -> str | None:
    if "message" in item:
        return "a raw answer of chat completions"
    if as_plain(item.get("content")) is not None or "candidates" in item:
        return "a raw answer of Gemini"
    if "completion_probabilities" in item:
        return "a raw answer of llama.cpp"
    if item.get("object") == "response":
        return "a raw answer of the Responses route"
    return "a raw answer of completions" if "index" in item and "text" in item else None


def as_response(item: object, notes: Notes) -> object:
    """A response, choice or candidate in the documented form; as it stands if it is in none of the known ones."""
    raw = _opened(item)
    if raw is None:
        return item
    context = raw.get(_CONTEXT, _Context())
    assert isinstance(context, _Context), "no JSON has it"
    if context.trouble is not None:
        return notes.defect("service-error", context.trouble)
    if context.n_hidden != 0:
        number_of = "" if context.n_hidden is None else f"{context.n_hidden} "
        what = f"the model wrote {number_of}tokens of thought before the response, which are not shown"
        return notes.defect("hidden-thinking", what)
    if "delta" in raw:
        return notes.defect("streamed-answer", "the item is a chunk of an answer that was streamed")
    return _shaped({name: value for name, value in raw.items() if name != _CONTEXT}, context, notes)


def _opened(item: object) -> Object | None:
    """The one choice of an answer that stands among the responses; the object itself otherwise."""
    raw = as_plain(item)
    inner = None if raw is None else as_list(raw.get("choices")) or as_list(raw.get("candidates"))
    if raw is None or inner is None or len(inner) != 1 or as_plain(inner[0]) is None:
        return raw
    return as_plain(_with_request(inner[0], raw, raw, {}))


def _shaped(raw: Object, context: _Context, notes: Notes) -> object:
    if is_candidate(raw):
        return gemini_response(raw, notes)
    message = as_plain(raw.get("message"))
    if message is not None and "text" not in raw:
        raw = {**raw, "text": message.get("content")}
    shown = _shown(raw, context, notes)
    if shown is None:
        return raw
    reason = shown.choice.get("finish_reason")
    predicted = raw.get("tokens_predicted")
    n_tokens = predicted if type(predicted) is int else context.n_tokens
    rows = with_ids(shown.rows, raw)
    return {**shown.choice, "logprobs": {"content": _checked(rows, n_tokens, reason, notes)}}


def _shown(raw: Object, context: _Context, notes: Notes) -> Shown | None:
    """A choice and its positions; None if it has none, or they are columns already."""
    if "completion_probabilities" in raw:
        return native_answer(raw)
    holder = as_plain(raw.get("logprobs"))
    if as_list(raw.get("prompt_logprobs")) and (not _has_lists(holder) or is_scored(raw, context.asked)):
        return scored_prompt(raw, context.asked, notes)
    if holder is not None and as_list(holder.get("tokens")) is not None:
        return without_echo(raw, legacy_rows(holder, notes), context.asked, notes)
    rows = None if holder is None else as_list(holder.get("content"))
    return None if rows is None else Shown(raw, rows)


def _has_lists(holder: Object | None) -> bool:
    """Whether the tokens that were generated have lists."""
    return holder is not None and bool(holder.get("content") or holder.get("tokens"))


def _checked(rows: Sequence[object], n_tokens: int | None, finish_reason: object, notes: Notes) -> list[object]:
    first = as_plain(rows[0]) if rows else None
    if first is not None and "prob" in first and "logprob" not in first:
        notes.defect("after-sampling", "the entries have `prob` in place of `logprob`: what was left after sampling")
    # Only llama.cpp, whose entries have an `id`, leaves tokens out; others count what is no part of the response.
    counted = n_tokens if first is not None and type(first.get("id")) is int else None
    usual = usual_rows(rows, counted)
    missing = unexplained(usual, counted)
    if missing > (1 if str(finish_reason).lower() == "stop" else 0):
        what = f"the service counted {counted} tokens and gave log-probabilities of {len(rows)}"
        notes.defect("missing-entries", what)
    return usual
