"""Other people's formats: read as the same answer in the documented form, or named with what they lack."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from kl.input.responses import ResponseFile, parse_responses
from kl.records import Candidate, Response, Sampling, Score
from kl.tables.tokens import measure_response
from tests import ROOT

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
    ],
)  # fmt: skip
def test_a_raw_answer_is_read_with_the_prompt_beside_it_or_in_its_request(document: dict[str, Any]) -> None:
    file = read(document)
    assert file.problems == ()
    (response,) = file.responses
    good = expected()
    assert (response.prompt, response.text, response.positions) == (good.prompt, good.text, good.positions)
    assert response.sampling.temperature == document.get("request", {}).get("temperature")


@pytest.mark.parametrize(
    ("document", "kind", "shown"),
    [
        pytest.param(chat(), "no-prompt", "a raw answer of chat completions, and `prompt` is missing", id="chat"),
        pytest.param({"candidates": [GEMINI]}, "no-prompt", "a raw answer of Gemini, and `prompt`", id="Gemini"),
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
