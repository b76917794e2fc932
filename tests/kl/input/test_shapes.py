"""Other people's formats: read as the same answer in the documented form, or named with what they lack."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from kl.input.responses import ResponseFile, parse_responses
from kl.input.sources import parts_of
from kl.records import Candidate, Prompt, Response, Sampling, Score, Turn
from kl.tables.tokens import measure_response
from tests import ROOT
from tests.documents import code_blocks

GOOD = json.loads((ROOT / "examples/responses/000_why-is-the-sky-blue.json").read_text())
RESPONSE = GOOD["responses"][0]
CONTENT = RESPONSE["logprobs"]["content"]
PROMPT = GOOD["prompt"]
MESSAGES = [{"role": "user", "content": PROMPT}]
HEAD = {name: value for name, value in GOOD.items() if name != "responses"}


def read(*documents: Any) -> ResponseFile:
    return parse_responses("\n".join(map(json.dumps, documents)).encode(), "a.json")


def expected(**changes: Any) -> Any:
    return replace(read(GOOD).responses[0], **changes)


def legacy(**changes: Any) -> dict[str, Any]:
    columns = {
        "tokens": [row["token"] for row in CONTENT],
        "token_logprobs": [row["logprob"] for row in CONTENT],
        "top_logprobs": [{entry["token"]: entry["logprob"] for entry in row["top_logprobs"]} for row in CONTENT],
        "text_offset": [0] * len(CONTENT),
    }
    return {**columns, **changes}


def without_ids(file: ResponseFile) -> list[Any]:
    def bare(candidate: Any) -> tuple[Any, ...]:
        return candidate.token, candidate.logprob

    return [
        (bare(position.sampled), [bare(entry) for entry in position.top])
        for response in file.responses
        for position in response.positions
    ]


def chat(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": RESPONSE["text"]}}
    answer = {
        "id": "c-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [choice | {"logprobs": {"content": CONTENT}}],
    }
    return answer | changes


def gemini_token(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "tokenId": entry["token_id"], "logProbability": entry["logprob"]}


GEMINI = {
    "content": {"role": "model", "parts": [{"text": RESPONSE["text"]}]},
    "finishReason": "STOP",
    "logprobsResult": {
        "chosenCandidates": [gemini_token(row) for row in CONTENT],
        "topCandidates": [{"candidates": [gemini_token(entry) for entry in row["top_logprobs"]]} for row in CONTENT],
    },
}


def snake(value: Any) -> Any:
    """The same with the names of the Python client."""
    if isinstance(value, list):
        return [snake(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {re.sub(r"(?=[A-Z])", "_", name).lower(): snake(item) for name, item in value.items()}


def llama_cpp() -> dict[str, Any]:
    rows = [{"id": row["token_id"], **row, "top_logprobs": list(map(renamed, row["top_logprobs"]))} for row in CONTENT]
    return {"choices": [{"index": 0, "text": RESPONSE["text"], "logprobs": {"content": list(map(renamed, rows))}}]}


def renamed(entry: dict[str, Any]) -> dict[str, Any]:
    return {"id": entry["token_id"]} | {name: value for name, value in entry.items() if name != "token_id"}


def responses_route(**changes: Any) -> dict[str, Any]:
    """An answer of OpenAI's Responses route."""
    part = {"type": "output_text", "text": RESPONSE["text"], "annotations": [], "logprobs": CONTENT}
    message = {"type": "message", "role": "assistant", "content": [part]}
    return {"object": "response", "status": "completed", "model": "m", "tools": [], "output": [message], **changes}


INPUT = [{"role": "user", "content": [{"type": "input_text", "text": PROMPT}]}]


GEMINI_REQUEST = {"contents": [{"role": "user", "parts": [{"text": PROMPT}]}]}


def test_an_object_a_line_for_one_prompt_is_one_file() -> None:
    file = read(GOOD, GOOD)
    assert [problem.kind for problem in file.problems] == ["json-lines"]
    assert list(file.responses) == [expected(), expected(response_idx=1)]


def test_lines_may_be_responses_with_the_prompt_beside_them() -> None:
    file = read(*[{**HEAD, **RESPONSE, "temperature": 1.0}] * 3)
    assert [response.text for response in file.responses] == [RESPONSE["text"]] * 3
    assert file.responses[2].sampling == Sampling(1.0, 1.0, 0)


def test_what_a_line_states_is_of_its_own_responses() -> None:
    response = {name: value for name, value in RESPONSE.items() if name != "model"}
    bare = {"prompt": PROMPT, "responses": [response]}
    first = {
        **bare,
        "model": "a",
        "model_version": "a-1",
        "sampling": {"top_p": 0.5},
        "temperature": 0.5,
        "typical_p": 0.9,
    }
    own = {**first, "responses": [{**response, "temperature": 0.7, "sampling": {"top_p": 0.8}, "model": "c"}]}
    null = {**first, "responses": [{**response, "model": None, "top_p": None, "sampling": []}]}
    file = read(first, bare, {**bare, "model_version": "b-1"}, own, null)
    assert [problem.kind for problem in file.problems] == ["json-lines", "bad-sampling"]
    assert [(r.model, r.model_version, r.sampling) for r in file.responses] == [
        ("a", "a-1", Sampling(0.5, 0.5, typical_p=0.9)),
        (None, None, Sampling()),
        (None, "b-1", Sampling()),
        ("c", "a-1", Sampling(0.7, 0.8, typical_p=0.9)),
        ("a", "a-1", Sampling(0.5, typical_p=0.9)),
    ]


def test_the_model_of_a_file_is_the_one_that_all_lines_state() -> None:
    assert read(HEAD | {"responses": [RESPONSE]}, GOOD).model == GOOD["model"]
    assert read(GOOD, {"prompt": PROMPT, "responses": [RESPONSE]}).model is None


def test_the_completions_format_has_its_columns_side_by_side() -> None:
    file = read({**HEAD, "responses": [RESPONSE | {"logprobs": legacy()}]})
    assert file.problems == ()
    assert without_ids(file) == without_ids(read(GOOD))


def test_a_list_may_be_an_object_of_texts_and_values() -> None:
    rows = [row | {"top_logprobs": {e["token"]: e["logprob"] for e in row["top_logprobs"]}} for row in CONTENT]
    file = read({**HEAD, "responses": [RESPONSE | {"logprobs": {"content": rows}}]})
    assert file.problems == ()
    assert without_ids(file) == without_ids(read(GOOD))


# Tokens with their bytes where the text is another one; the first law loses an entry to another one of its text.
PLAIN = [(" a", b" a", 0.4), (" b", b" b", 0.3), (" c", b" c", 0.1), (" d", b" d", 0.05)]
LOSSY = {
    "U+FFFD": [("\ufffd", b"\xe2", 0.5), (" a", b" a", 0.3), ("\ufffd", b"\xf0", 0.1), (" b", b" b", 0.05)],
    "nothing": [("", b"\xe2", 0.5), (" a", b" a", 0.3), (" b", b" b", 0.1), ("", b"\xf0", 0.05)],
    "out of order": [("the", b" the", 0.5), (" a", b" a", 0.3), ("the", b"the", 0.1), (" b", b" b", 0.05)],
    "too few": [(" a", b" a", 0.5), ("the", b" the", 0.3), ("the", b"the", 0.1), (" b", b" b", 0.05)],
}


def as_objects(laws: list[Any], sampled: str = " a") -> Response:
    tops = [{token: math.log(value) for token, _, value in law} for law in laws]
    columns = {
        "tokens": [sampled] * len(laws),
        "token_logprobs": [top[sampled] for top in tops],
        "top_logprobs": tops,
    }
    return read({"prompt": "x", "responses": [{"text": sampled * len(laws), "logprobs": columns}]}).responses[0]


@pytest.mark.parametrize("law", LOSSY.values(), ids=LOSSY.keys())
def test_an_object_that_lost_a_token_to_another_of_its_text_bounds_nothing_it_lacks(law: list[Any]) -> None:
    response = as_objects([PLAIN, law, PLAIN])
    assert [position.may_lack for position in response.positions] == [False, True, False]
    tops = [tuple(Candidate(token, math.log(p), None, own) for token, own, p in each) for each in (PLAIN, law, PLAIN)]
    scores = [Score("k", top) for top in tops]
    table = measure_response(response, scores, estimator="censored", prior=None)
    assert all((table[name] <= 1e-9).all() for name in ("kl_lower", "reverse_kl_lower", "tv_lower", "js_lower"))


def test_a_lost_token_is_said_by_position_and_counted() -> None:
    top = {token: math.log(value) for token, _, value in LOSSY["U+FFFD"]}
    row = {"token": " a", "logprob": math.log(0.3), "top_logprobs": top}
    file = read({"prompt": "x", "responses": [{"text": " a" * 9, "logprobs": {"content": [row] * 9}}]})
    assert sum(problem.count for problem in file.problems if problem.kind == "overwritten-entries") == 9
    assert all(problem.repaired for problem in file.problems)


def test_an_object_with_the_sampled_token_beside_the_best_lacks_none() -> None:
    beside = (" z", b" z", 0.01)
    first = as_objects([PLAIN, [PLAIN[2], *PLAIN[:2], PLAIN[3]]], " c")
    assert not any(position.may_lack for position in first.positions)
    rows = [{"token": " z", "logprob": math.log(0.01)}, {"token": " a", "logprob": math.log(0.4)}]
    for row, law in zip(rows, ([beside, *PLAIN], PLAIN), strict=True):
        row["top_logprobs"] = {token: math.log(value) for token, _, value in law}
    file = read({"prompt": "x", "responses": [{"text": " z a", "logprobs": {"content": rows}}]})
    assert [(position.may_lack, len(position.top)) for position in file.responses[0].positions] == [(False, 4)] * 2


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(chat(prompt=PROMPT), id="prompt beside it"),
        pytest.param(chat(messages=MESSAGES), id="messages beside it"),
        pytest.param(chat(request={"messages": MESSAGES, "temperature": 0.5}), id="in its request"),
        pytest.param({"request": {"body": {"messages": MESSAGES}}, "response": {"body": chat()}}, id="batch row"),
        pytest.param({"prompt": PROMPT, "model": "m", "responses": chat()["choices"]}, id="choices as responses"),
        pytest.param({"prompt": PROMPT, "model": "m", "responses": [chat()]}, id="answers as responses"),
        pytest.param({"prompt": PROMPT, "responses": [{"candidates": [GEMINI]}]}, id="Gemini answers as responses"),
        pytest.param({"prompt": PROMPT, "candidates": [GEMINI]}, id="Gemini, prompt beside it"),
        pytest.param({"request": GEMINI_REQUEST, "response": {"candidates": [GEMINI]}}, id="Gemini batch row"),
        pytest.param([chat(prompt=PROMPT)], id="in a list"),
        pytest.param({"request": {"contents": PROMPT}, "response": snake({"candidates": [GEMINI]})}, id="snake"),
        pytest.param({"prompt": PROMPT, **llama_cpp()}, id="llama.cpp"),
        pytest.param({"request": {"input": INPUT}, "response": responses_route()}, id="Responses route"),
        pytest.param({"prompt": PROMPT, "completion_probabilities": llama_cpp()["choices"][0]["logprobs"]["content"],
                      "content": RESPONSE["text"], "stop_type": "eos"}, id="llama.cpp, own route"),
    ],
)  # fmt: skip
def test_a_raw_answer_is_read_with_the_prompt_beside_it_or_in_its_request(document: dict[str, Any]) -> None:
    file = read(document)
    assert {problem.kind for problem in file.problems} <= {"raw-prompt"}
    (response,) = file.responses
    good = expected()
    assert (response.prompt, response.text) == (good.prompt, good.text)
    assert [position.top for position in response.positions] == [position.top for position in good.positions]
    stated = {} if isinstance(document, list) else document.get("request", {})
    assert response.sampling.temperature == stated.get("temperature")


@pytest.mark.parametrize(
    ("document", "kind", "shown"),
    [
        pytest.param(chat(), "no-prompt", "a raw answer of chat completions, and `prompt` is missing", id="chat"),
        pytest.param({"candidates": [GEMINI]}, "no-prompt", "a raw answer of Gemini, and `prompt`", id="Gemini"),
        pytest.param(responses_route(), "no-prompt", "of the Responses route, and `prompt`", id="Responses route"),
        pytest.param(
            {"prompt": PROMPT, "responses": [{"candidates": [GEMINI | {"logprobsResult": {"chosenCandidates": []}}]}]},
            "no-logprobs", "a raw answer of Gemini with 0 chosenCandidates and 0 topCandidates", id="Gemini, no lists",
        ),
        pytest.param(
            {**HEAD, "responses": [RESPONSE | {"logprobs": legacy(top_logprobs=None)}]}, "no-logprobs",
            "of the completions format with 6 tokens, 6 token_logprobs, 0 top_logprobs", id="completions without lists",
        ),
    ],
)  # fmt: skip
def test_what_a_format_lacks_is_said_in_a_line_that_names_it(document: dict[str, Any], kind: str, shown: str) -> None:
    file = read(document)
    assert file.responses == ()
    assert file.unreadable[0].kind == kind
    assert shown in file.unreadable[0].message
    assert "\n" not in file.unreadable[0].message


# What the lists of a format hide, and where its response begins.


def columns(*rows: tuple[str, float | None, dict[str, float] | None], **changes: Any) -> dict[str, Any]:
    tokens, values, tops = zip(*rows, strict=True)
    return {"tokens": [*tokens], "token_logprobs": [*values], "top_logprobs": [*tops], **changes}


ECHO = [("Hi", None, None), (" you", -3.0, {" you": -3.0, "!": -0.1}), ("!", -0.2, {"!": -0.2, "?": -2.0})]
ECHOED = {"index": 0, "text": "Hi you!", "logprobs": columns(*ECHO)}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        pytest.param({"request": {"prompt": "Hi"}, "response": {"choices": [ECHOED]}}, " you!", id="asked"),
        pytest.param({"prompt": "Hi you", "choices": [ECHOED]}, "!", id="stated"),
        pytest.param({"request": {"prompt": "Hi", "echo": True}, "response": {"choices": [
                      {**ECHOED, "logprobs": columns(("Hi", 0.0, {"Hi": 0.0}), *ECHO[1:])}]}}, " you!", id="a value"),
        pytest.param({"prompt": "Greet.", "text": " you!", "choices": [ECHOED]}, " you!", id="response stated"),
        pytest.param({"prompt": "Hi you", "request": {"prompt": [7, 8]}, "response": {"choices": [ECHOED]}}, "!",
                     id="ids"),
        pytest.param({"prompt": "Hi", "request": {"prompt": [7, 8]}, "response": {"choices": [ECHOED]}}, " you!",
                     id="ids of the response too"),
        pytest.param({"messages": MESSAGES, "request": {"prompt": [7, 8]}, "response": {"choices": [ECHOED]}}, "!",
                     id="ids of turns"),
    ],
)  # fmt: skip
def test_an_echoed_prompt_is_cut_off(document: dict[str, Any], text: str) -> None:
    (response,) = read(document).responses
    assert response.text == text
    assert "".join(position.sampled.token for position in response.positions) == text
    assert response.positions[-1].top == (Candidate("!", -0.2), Candidate("?", -2.0))


def scored_item(*entries: tuple[int, str, float, int]) -> dict[str, Any]:
    return {str(i): {"logprob": value, "rank": rank, "decoded_token": text} for i, text, value, rank in entries}


SCORED = [
    None,
    scored_item((11, "Hi", -2.0, 9), (12, "Yo", -0.5, 1), (13, "He", -1.0, 2)),  # two best, and the prompt's own
    scored_item((20, "", -0.9, 2), (21, "!", -0.7, 1)),
    scored_item((22, "🌊", -0.3, 1), (23, "🌟", -1.5, 2)),
    scored_item((24, ".", -0.9, 2), (25, "?", -0.6, 1)),
]
MORE = [*MESSAGES, {"role": "assistant", "content": "🌊."}]


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({"request": {"messages": MORE}, "response": {"choices": [{"index": 0, "logprobs": None}],
                      "prompt_logprobs": SCORED, "prompt_token_ids": [1, 11, 20, 22, 24]}}, id="chat"),
        pytest.param({"prompt": PROMPT, "text": "🌊.", "request": {"prompt": "…Hi🌊."}, "response": {"choices": [
                      {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": SCORED}]}}, id="text"),
    ],
)  # fmt: skip
def test_a_response_that_vllm_scored_as_its_prompt_has_its_lists(document: dict[str, Any]) -> None:
    (response,) = read(document).responses
    assert (response.prompt, response.text, response.finish_reason) == (expected().prompt, "🌊.", None)
    assert [position.sampled.token_id for position in response.positions] == [20, 22, 24]
    assert response.gaps == ((1, "partial-character"),)
    # What is shown after a part of a character is that character, not the token: only its id says which it is.
    assert [[(c.token, c.token_id) for c in position.top] for position in response.positions] == [
        [("!", 21), ("", 20)], [("", 22), ("", 23)], [("?", 25), (".", 24)],
    ]  # fmt: skip


def test_lists_of_what_was_generated_after_a_scored_response_are_not_those_of_the_response() -> None:
    chat_lists = {"content": [row_of("!", -0.1, ("!", -0.1), ("?", -3.0))]}
    scored: list[Any] = [{"messages": MORE}, {"choices": [{"index": 0, "message": {"content": "!"}}]}]
    text: list[Any] = [{"prompt": f"{PROMPT}🌊."}, {"choices": [{"index": 0, "text": "!"}]}]
    for request, answer in (scored, text):
        head = {} if request is scored[0] else {"prompt": PROMPT}
        items = [None, scored_item((10, PROMPT, -3.0, 1)), *SCORED[2:]]
        answer["choices"][0] |= {"prompt_logprobs": items, "logprobs": chat_lists}
        (response,) = read({**head, "request": request, "response": answer}).responses
        assert (response.text, len(response.positions)) == ("🌊.", 3)
        # Where the request has the prompt alone, they are.
        request |= {"messages": MESSAGES} if request is scored[0] else {"prompt": PROMPT}
        answer["choices"][0]["prompt_logprobs"] = items[:2]
        (response,) = read({**head, "request": request, "response": answer}).responses
        assert (response.text, len(response.positions)) == ("!", 1)


def row_of(token: str, logprob: float, *top: tuple[str, float]) -> dict[str, Any]:
    listed = [{"token": text, "logprob": value} for text, value in top]
    return {"token": token, "logprob": logprob, "top_logprobs": listed}


def test_a_token_beside_the_best_is_no_entry_of_vllms_list() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Hi🌊."}]
    file = read({"request": {"messages": messages}, "response": {"choices": [{"index": 0}], "prompt_logprobs": SCORED}})
    first = file.responses[0].positions[0]
    assert (first.sampled, first.top) == (
        Candidate("Hi", -2.0, 11), (Candidate("Yo", -0.5, 12), Candidate("He", -1.0, 13)),
    )  # fmt: skip


def test_tokens_named_by_their_ids_are_known_by_these_alone() -> None:
    def named(i: int, value: float, **more: Any) -> dict[str, Any]:
        return {"token": f"token_id:{i}", "logprob": value, "bytes": [*f"token_id:{i}".encode()], **more}

    rows = [
        named(7, -0.5, bytes=[*b" The"], top_logprobs=[named(7, -0.5), named(8, -1.5)]),
        named(9, -0.1, bytes=[*b"!"], top_logprobs=[named(9, -0.1), named(8, -3.0)]),
    ]
    answer = {"choices": [{"index": 0, "message": {"content": " The!"}, "logprobs": {"content": rows}}]}
    (response,) = read({"messages": MESSAGES, **answer}).responses
    assert [position.sampled.token for position in response.positions] == [" The", "!"]
    assert response.positions[1].top == (Candidate("", -0.1, 9), Candidate("", -3.0, 8))

    listed = columns(("token_id:9", -0.1, {"token_id:9": -0.1, "token_id:8": -3.0}))
    (response,) = read({"prompt": "x", "choices": [{"index": 0, "text": "!", "logprobs": listed}]}).responses
    assert response.positions[0] == replace(response.positions[0], may_lack=False, top=(
        Candidate("", -0.1, 9), Candidate("", -3.0, 8)))  # fmt: skip


def test_ids_of_the_sampled_tokens_may_stand_beside_them() -> None:
    rows = [{name: row[name] for name in ("token", "logprob")} for row in CONTENT]
    for row, given in zip(rows, CONTENT, strict=True):
        row["top_logprobs"] = [{"token": e["token"], "logprob": e["logprob"]} for e in given["top_logprobs"]]
    ids = [row["token_id"] for row in CONTENT]
    for content in (rows, [row | {"odd": 1} for row in rows]):  # read in columns, and entry by entry
        document = chat(prompt=PROMPT)
        document["choices"][0] |= {"logprobs": {"content": content}, "token_ids": ids}
        (response,) = read(document).responses
        assert [position.sampled.token_id for position in response.positions] == ids
        document["choices"][0]["token_ids"] = ids[1:]
        assert {position.sampled.token_id for position in read(document).responses[0].positions} == {None}


def llama_row(i: int, token: str, value: float, *top: tuple[int, str, float]) -> dict[str, Any]:
    def entry(i: int, token: str, value: float, own: bytes | None = None) -> dict[str, Any]:
        return {"id": i, "token": token, "bytes": [*(own or token.encode())], "logprob": value}

    listed = [entry(j, text, v, b"\x8a" if text == "\ufffd" else None) for j, text, v in top]
    return {**entry(i, token, value), "top_logprobs": listed}


def llama_answer(n_tokens: int, *rows: dict[str, Any]) -> dict[str, Any]:
    text = "".join(row["token"] for row in rows)
    choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": {"content": [*rows]}}
    return {"prompt": "x", "choices": [choice], "usage": {"completion_tokens": n_tokens}}


PLAIN_ROWS = [llama_row(1, " a", -0.5, (1, " a", -0.5), (2, " b", -1.0))] * 8


def test_an_entry_that_stands_for_several_tokens_of_llama_cpp_is_not_used() -> None:
    merged = llama_row(228, " 🌊", -0.03, (228, "\ufffd", -0.03), (112, "\ufffd", -6.0))
    file = read(llama_answer(11, *PLAIN_ROWS, merged))
    (response,) = file.responses
    assert response.text == " a" * 8 + " 🌊"
    assert [position.defect is None for position in response.positions] == [True] * 8 + [False]
    assert response.positions[8].sampled.token_id is None
    assert [problem.kind for problem in file.problems] == ["unusable-list"]
    beyond = llama_row(228, " 🌊", -7.0, (1, " a", -0.5), (112, "\ufffd", -6.0))  # the list does not have it
    assert [p.defect is None for p in read(llama_answer(11, *PLAIN_ROWS, beyond)).responses[0].positions][8:] == [False]
    assert [p.defect is None for p in read(llama_answer(9, *PLAIN_ROWS, beyond)).responses[0].positions][8:] == [True]


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        pytest.param(llama_answer(11, *PLAIN_ROWS), "missing-entries", id="entries that nothing accounts for"),
        pytest.param({"prompt": "Bye", "choices": [ECHOED]}, "no-boundary", id="another prompt"),
        pytest.param({"prompt": "H", "choices": [ECHOED]}, "no-boundary", id="inside a token"),
        pytest.param({"prompt": "Hi", "choices": [
                      {**ECHOED, "logprobs": columns(("Hi", 0.0, {"Hi": 0.0}), *ECHO[1:])}]}, "no-boundary",
                     id="an echo, or a response that begins so"),
        pytest.param({"prompt": "x", "text": "🌊.", "request": {"prompt": "Cut from the left: Hi🌊."}, "choices": [
                      {"index": 0, "prompt_logprobs": SCORED}]}, "no-boundary", id="a prompt cut from the left"),
        pytest.param({"request": {"messages": MORE, "truncate_prompt_tokens": 4}, "response": {"choices": [
                      {"index": 0}], "prompt_logprobs": SCORED}}, "foreign-prompt-part",
                     id="a prompt that was to be cut"),
        pytest.param({"prompt": "Hi you!", "choices": [ECHOED]}, "no-boundary", id="nothing after the prompt"),
        pytest.param({"prompt": "x", "text": "🌊.", "choices": [{"index": 0, "prompt_logprobs": SCORED[:4],
                      "prompt_token_ids": [1, 11, 20, 22, 24]}]}, "no-logprobs", id="a scored prompt that was cut"),
        pytest.param(chat(prompt=PROMPT, usage={"completion_tokens_details": {"reasoning_tokens": 9}}),
                     "hidden-thinking", id="thoughts"),
        pytest.param({"prompt": PROMPT, "choices": [{"index": 0, "message": {"content": "a", "reasoning": "so"}}]},
                     "hidden-thinking", id="thoughts beside the answer"),
        pytest.param({"request": {"input": PROMPT}, "response": responses_route(output=[
                      {"type": "reasoning", "summary": []}, *responses_route()["output"]])}, "hidden-thinking",
                     id="an item of thoughts"),
        pytest.param({"request": {**GEMINI_REQUEST, "cachedContent": "c"}, "response": {"candidates": [GEMINI]}},
                     "foreign-prompt-part", id="a kept part of the prompt"),
        pytest.param({"prompt": PROMPT, "request": {**GEMINI_REQUEST, "systemInstruction": {"parts": [{"text": "S"}]}},
                      "response": {"candidates": [GEMINI]}}, "two-prompts", id="a system text in the request alone"),
        pytest.param(chat(prompt=PROMPT, request={"messages": [*MORE, *MESSAGES]}), "two-prompts", id="earlier turns"),
        pytest.param({"request": GEMINI_REQUEST, "response": {"candidates": [GEMINI], "usageMetadata":
                      {"thoughtsTokenCount": 3}}}, "hidden-thinking", id="thoughts of Gemini"),
        pytest.param(chat(request={"messages": MESSAGES, "tools": [{"type": "function"}]}), "foreign-prompt-part",
                     id="tools"),
        pytest.param(chat(request={"messages": MESSAGES, "logprob_token_ids": [1]}), "chosen-tokens", id="chosen ids"),
        pytest.param({"prompt": "x", "choices": [{"index": 0, "text": "a", "logprobs": {"content": [
                      {"id": 1, "token": "a", "prob": 0.9, "top_probs": []}]}}]}, "after-sampling", id="probabilities"),
        pytest.param({"custom_id": "1", "request": {"messages": MESSAGES}, "response": {"status_code": 400, "body":
                      {"error": {"message": "too long"}}}}, "service-error", id="a batch row that failed"),
        pytest.param({"request": GEMINI_REQUEST, "status": "Bad Request: {}", "response": {}}, "service-error",
                     id="a row of Gemini that failed"),
        pytest.param({"request": GEMINI_REQUEST, "response": {"promptFeedback": {"blockReason": "SAFETY"}}},
                     "service-error", id="blocked"),
        pytest.param({"request": {"prompt": [1, 2]}, "response": chat()}, "no-prompt", id="a prompt of ids"),
        pytest.param({"prompt": PROMPT, "choices": [{"index": 0, "delta": {"content": "a"}}]}, "streamed-answer",
                     id="a chunk"),
        pytest.param({"request": {"input": PROMPT, "previous_response_id": "r"}, "response": responses_route()},
                     "foreign-prompt-part", id="an answer that goes on from another"),
        pytest.param({"request": {"input": PROMPT}, "response": responses_route(usage={"output_tokens_details":
                      {"reasoning_tokens": 5}})}, "hidden-thinking", id="thoughts of the Responses route"),
        pytest.param({"request": {"input": PROMPT}, "response": responses_route(output=[{"type": "function_call"}])},
                     "no-text", id="a call in place of a text"),
        pytest.param({"request": {"contents": [{"role": "user", "parts": [{"inlineData": {}}, {"text": "x"}]}]},
                      "response": {"candidates": [GEMINI]}}, "bad-prompt", id="an image in the prompt"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_read_is_refused_with_the_reason(document: dict[str, Any], kind: str) -> None:
    file = read(document)
    assert (len(file.responses), [item.kind for item in file.unreadable]) == (0, [kind])
    assert "\n" not in file.unreadable[0].message


def test_the_system_text_is_the_one_of_the_request_or_of_the_answer_that_repeats_it() -> None:
    answer = responses_route(instructions="S")
    for document in (
        {"prompt": PROMPT, **answer},
        {"request": {"input": INPUT}, "response": answer},
        {"prompt": PROMPT, "system": "S", "request": {"input": INPUT, "instructions": "S"}, "response": answer},
    ):
        (response,) = read(document).responses
        assert response.prompt == Prompt((Turn("user", PROMPT),), "S")


def test_settings_stand_in_the_request_in_the_words_of_its_service() -> None:
    config = {"temperature": 0.5, "topP": 0.9, "topK": 40, "presencePenalty": 0.25}
    row = {"request": {**GEMINI_REQUEST, "generationConfig": config}, "response": {"modelVersion": "g-1"}}
    row["response"] |= {"candidates": [GEMINI]}
    (response,) = read(row).responses
    assert response.sampling == Sampling(0.5, 0.9, 40, presence_penalty=0.25)
    assert response.model_version == "g-1"
    native = {"content": " a", "completion_probabilities": PLAIN_ROWS[:1], "prompt": "x"}
    native["generation_settings"] = {"temperature": 0.8, "top_k": 40, "repeat_penalty": 1.1, "logit_bias": []}
    (response,) = read(native).responses
    assert response.sampling == Sampling(0.8, None, 40, repetition_penalty=1.1, logit_bias=False)


def test_a_file_says_by_itself_what_was_lost() -> None:
    rows = [{**CONTENT[0], "may_lack": True}, {**CONTENT[1], "unusable": "the source has no list"}, *CONTENT[2:]]
    rows = [*rows, *CONTENT]
    file = read({**HEAD, "responses": [{**RESPONSE, "text": RESPONSE["text"] * 2, "logprobs": {"content": rows}}]})
    positions = file.responses[0].positions
    assert [position.may_lack for position in positions[:3]] == [True, False, False]
    assert [position.defect is None for position in positions[:3]] == [True, False, True]
    assert "position 1: the source has no list." in file.problems[1].message


# Several objects in a file.


def test_a_file_with_several_prompts_is_read_in_parts() -> None:
    rows = [chat(custom_id=str(n), request={"messages": [{"role": "user", "content": f"{n % 2}"}]}) for n in range(4)]
    lines = "\n".join(map(json.dumps, rows))
    for data in (lines + "\n", f"\r\n {lines}\r\n\r\n", json.dumps(rows), json.dumps(rows, indent=1)):
        whole = data.encode()
        assert [problem.kind for problem in parse_responses(whole, "a").problems] == ["several-prompts"]
        parts = parts_of(whole)
        files = [parse_responses(part.text(lambda at, n: whole[at : at + n]), f"a#{part.number}") for part in parts]  # noqa: B023
        assert [file.prompt and file.prompt.turns[0].content for file in files] == ["0", "1"]
        assert [[response.text for response in file.responses] for file in files] == [[RESPONSE["text"]] * 2] * 2
        assert all(piece.stop <= len(whole) for part in parts for piece in part.pieces)
    assert parts_of(json.dumps(GOOD, indent=1).encode()) == parts_of(b"[]") == parts_of(b"[1, 2]") == []


def test_a_line_that_is_no_json_is_a_part_of_its_own() -> None:
    data = "\n".join([json.dumps(chat(prompt=PROMPT)), '{"prompt": "cut o', json.dumps(chat(prompt=PROMPT))]).encode()
    files = [parse_responses(part.text(lambda at, n: data[at : at + n]), "a") for part in parts_of(data)]
    assert [(len(file.responses), [p.kind for p in file.problems]) for file in files] == [
        (2, ["json-lines"]), (0, ["not-json"]),
    ]  # fmt: skip


def test_the_examples_of_the_document_are_read() -> None:
    examples = code_blocks(ROOT / "docs/input-formats.md", "json")
    files = [parse_responses(example.encode(), "example.json") for example in examples]
    assert len(files) == 7
    for file in files:
        assert (file.problems, len(file.responses)) == ((), 1), file
        assert file.responses[0].text.strip() in ("So", "So.")
        assert file.prompt == Prompt((Turn("user", "Why?"),))
        assert {position.top[0].logprob for position in file.responses[0].positions} <= {-0.25, -0.1}
