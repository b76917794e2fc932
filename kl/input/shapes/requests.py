"""What was asked, as far as a file says it: the prompt and the sampling settings, in the ways that services write them.

Nothing is left out of a prompt: what cannot be a part of one stands there still, so that the readers refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kl.input.problems import as_list, as_plain

Object = dict[str, object]
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "logit_bias", "presence_penalty",
            "frequency_penalty", "repetition_penalty")  # fmt: skip
RENDERED = "rendered_prompt_sha256"  # where a file states the hash of the text that its model was given
K = "top_logprobs"  # how many entries were asked for a list
ABOUT = ("model", "model_version", RENDERED, K, *SETTINGS)
_OTHER_NAMES = {
    "modelVersion": "model_version",
    "topP": "top_p",
    "topK": "top_k",
    "presencePenalty": "presence_penalty",
    "frequencyPenalty": "frequency_penalty",
    "repeat_penalty": "repetition_penalty",
}
TOOLS = ("tools", "functions")  # what a model was given beside the turns
# The last one takes a part of the prompt away.
_PARTS_OF_A_PROMPT = (*TOOLS, "previous_response_id", "conversation", "cachedContent", "cached_content",
                      "truncate_prompt_tokens")  # fmt: skip
_BESIDE = ("prompt", "messages", "system")  # where the prompt stands beside an answer


def either(raw: Mapping[str, object], *names: str) -> object:
    """The value of the first of these names that is there and not null."""
    return next((raw[name] for name in names if raw.get(name) is not None), None)


def answer_of(document: Object) -> Object:
    """The service's answer in a file's object: itself, or what stands under ``response``, ``body`` or both."""
    answer = as_plain(document.get("response")) or document
    return as_plain(answer.get("body")) or answer


def asked_of(document: Object) -> Object:
    """The request that an answer stands beside; empty if there is none."""
    request = as_plain(document.get("request")) or {}
    return as_plain(request.get("body")) or request or as_plain(answer_of(document).get("generation_settings")) or {}


def settings_of(places: Sequence[Mapping[str, object]]) -> Object:
    """Model and settings that are stated in some places, of which the first one counts."""
    found: Object = {}
    for place in reversed(places):
        inner = as_plain(either(place, "generationConfig", "generation_config")) or {}
        for raw in (place, inner):
            for name, value in raw.items():
                # Of chats `logprobs` is a switch, and in answers both names are those of lists.
                known = K if name == "logprobs" and type(value) is int else _OTHER_NAMES.get(name, name)
                if known in ABOUT and value is not None and (known != K or type(value) is int):
                    found[known] = value
    return found


def prompt_of(document: Object) -> Object:
    """``prompt`` and ``system`` of an answer's file, as the readers take them; nothing where it has none."""
    asked = asked_of(document)
    repeated = _repeated_system(document)
    own = {} if repeated is None else {"system": repeated}
    own |= {"system": document["system"]} if "system" in document else {}
    for place in (document, asked, answer_of(document)):
        if place.get("prompt") is not None:
            return {"prompt": place["prompt"], **own}
        messages = as_list(place.get("messages"))
        if messages is not None:
            return {"prompt": messages[:-1] if scored_message(document) is not None else messages, **own}
    found = _turns_of_input(asked["input"]) if "input" in asked else _of_contents(either(asked, "contents"))
    system = either(asked, "systemInstruction", "system_instruction", "instructions")
    if found is None:
        return {"prompt": document["prompt"], **own} if "prompt" in document else own
    return {"prompt": found, **({} if system is None else {"system": _text_parts(system)}), **own}


def prompt_of_request(document: Object) -> Object | None:
    """As `prompt_of`, of a request with turns or a system text, whatever stands beside it; None of any other one."""
    names = ("messages", "contents", "input", "systemInstruction", "system_instruction", "instructions")
    if either(asked_of(document), *names) is None and _repeated_system(document) is None:
        return None
    asked = {name: value for name, value in document.items() if name not in _BESIDE}
    found = prompt_of(asked)
    return found if "prompt" in found else {"prompt": prompt_of(document).get("prompt"), **found}


def _repeated_system(document: Object) -> object:
    """The system text that an answer of OpenAI's Responses route repeats."""
    answer = answer_of(document)
    return answer.get("instructions") if answer.get("object") == "response" else None


def scored_message(document: Object) -> str | None:
    """The response that was given with the request, to be scored: its last message, which is the model's."""
    answer, asked = answer_of(document), asked_of(document)
    choices = [as_plain(item) or {} for item in as_list(answer.get("choices")) or []]
    if not any(item.get("prompt_logprobs") for item in (answer, *choices)):
        return None
    for place in (document, asked):
        messages = as_list(place.get("messages"))
        last = as_plain(messages[-1]) if messages else None
        if last is not None and last.get("role") in ("assistant", "model"):
            content = last.get("content")
            return content if isinstance(content, str) else None
    return None


def foreign_part(document: Object) -> str | None:
    """What a request gives the model beside the prompt, that no prompt here can hold."""
    places = (asked_of(document), answer_of(document))
    return next((name for name in _PARTS_OF_A_PROMPT for place in places if place.get(name)), None)


def is_raw_text(document: Object) -> bool:
    """Whether the prompt is the text that a model was given as it is, by a request to the completions route."""
    if document.get("prompt") is not None or document.get("messages") is not None:
        return document.get("completion_probabilities") is not None
    return isinstance(either(asked_of(document), "prompt") or answer_of(document).get("prompt"), str)


def _of_contents(contents: object) -> object:
    """The turns of a Gemini request."""
    if contents is None or isinstance(contents, str):
        return contents
    turns = as_list(contents)
    if turns is None:
        turns = [contents]
    return [
        {"role": turn.get("role", "user"), "content": _text_parts(turn)}
        if (turn := as_plain(item)) is not None
        else item
        for item in turns
    ]


def _text_parts(content: object) -> object:
    """The text of Gemini's parts; the parts themselves where one is no text, for the reader to say so."""
    parts = as_list((as_plain(content) or {}).get("parts"))
    if parts is None:
        return content
    texts = [(as_plain(part) or {}).get("text") for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "".join(text for text in texts if isinstance(text, str))
    return [
        {"type": next(iter(as_plain(part) or {"nothing": 0}), "nothing"), **(as_plain(part) or {})} for part in parts
    ]


def _turns_of_input(given: object) -> object:
    """The turns of a request to OpenAI's Responses route, whose parts of text have names of their own."""
    items = as_list(given)
    if items is None:
        return given
    return [item if (turn := as_plain(item)) is None else {**turn, "content": _plain_parts(turn)} for item in items]


def _plain_parts(turn: Object) -> object:
    parts = as_list(turn.get("content"))
    if parts is None:
        return turn.get("content")
    names = ("input_text", "output_text")
    return [
        {**part, "type": "text"} if (part := as_plain(item)) is not None and part.get("type") in names else item
        for item in parts
    ]
