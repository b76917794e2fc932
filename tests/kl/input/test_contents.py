"""Lists of positions are the same whether they are read as columns or entry by entry, and so is all that is noted."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kl.columns import Positions
from kl.input.contents import Columns, read_contents
from kl.input.responses import ResponseFile, parse_responses
from tests import ROOT
from tests.kl.input.test_properties import JSON_VALUES, PATHS, model_document, paths, spoil

INPUTS = sorted((ROOT / "tests" / "runs" / "earlier_runs" / "in").glob("*.json"))
MANY = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def same(data: bytes) -> ResponseFile:
    """The file, which is the same in both ways."""
    read = parse_responses(data, "a.json")
    assert read == parse_responses(data, "a.json", in_columns=False)
    assert all(type(response.positions) is Positions for response in read.responses)
    return read


def in_columns(rows: list[Any]) -> bool:
    (read,) = read_contents([memoryview(json.dumps(rows).encode())], lambda raw: None)
    return isinstance(read, Columns)


TOKENS = st.sampled_from(
    ["a", "b", " c", "é", ":", "token", "logprob", '"', "\\u003a", "\n", "", "\ufffd", "<0xE2>", "</s>"]
)
BYTES = st.sampled_from([None, [], [0x61], [0x62], [0xE2], [0xC3, 0xA9], [0xEF, 0xBF, 0xBD], [300], [1.0], [-1]])
IDS = st.sampled_from([None, 0, 1, 2, 3, 2**31, 2**40, 2**63 - 1, 2**63, 2**70, -1, 1.0])
VALUES = st.sampled_from(
    [None, 0, -0.5, -0.501, -1, -1.0, -2.0, -3.0, -9999.0, -9999, -(2.0**100), 1e-6, 0.5, -math.inf]
)


@st.composite
def entries(draw: st.DrawFn, wild: bool) -> dict[str, Any]:
    """A token as files have it, mostly a good one unless it is to be a wild one."""
    found: dict[str, Any] = {"token": draw(TOKENS), "logprob": draw(VALUES)}
    for key, values in (("token_id", IDS), ("bytes", BYTES)):
        if draw(st.integers(0, 2)) == 0:
            found[key] = draw(values)
    if wild and draw(st.integers(0, 5)) == 0:
        found[draw(st.sampled_from(["token", "logprob", "id", "top_logprobs"]))] = draw(JSON_VALUES)
    return found


@st.composite
def contents(draw: st.DrawFn) -> list[Any]:
    """Lists of positions in which everything that is checked may be right or wrong."""
    wild, with_ids, k = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 4))
    rows: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 5))):
        row: dict[str, Any] = draw(entries(wild))
        top = draw(st.lists(entries(wild), min_size=max(k - 1, 0), max_size=k + 1))
        if draw(st.booleans()):
            top = _tame(draw, top, with_ids)
            row = {**draw(st.sampled_from(top))} if top else row
            if draw(st.integers(0, 3)) == 0:
                row["logprob"] = None
            elif draw(st.integers(0, 3)) == 0:
                top = [*top, {**row}]
        rows.append({**row, "top_logprobs": top})
        if draw(st.integers(0, 9)) == 0:
            rows[-1]["top_logprobs"] = draw(st.sampled_from([None, [], {}]))
    return rows


def _tame(draw: st.DrawFn, top: list[dict[str, Any]], with_ids: bool) -> list[dict[str, Any]]:
    """A list that can nearly be right: its values fall, mostly, and its ids differ."""
    values = sorted(
        (-0.5 - draw(st.integers(0, 8)) / 2 - at for at in range(len(top))), reverse=draw(st.integers(0, 4)) > 0
    )
    tail = draw(st.sampled_from([0, 0, 0, 1, 2]))
    mark = draw(st.sampled_from([None, -9999.0, -1000]))
    found: list[dict[str, Any]] = []
    for at, (entry, value) in enumerate(zip(top, values, strict=True)):
        kept = {key: entry[key] for key in ("token", "bytes") if key in entry and isinstance(entry["token"], str)}
        kept = {"token": "a", **kept, "logprob": mark if at >= len(top) - tail else value}
        found.append({**kept, "token_id": at + 1} if with_ids else kept)
    return found


@MANY
@given(
    st.lists(contents(), min_size=1, max_size=3), st.booleans(), st.sampled_from([None, "stop", "length"]), st.data()
)
def test_both_ways_are_one(lists: list[list[Any]], escaped: bool, reason: str | None, data: st.DataObject) -> None:
    responses: list[dict[str, Any]] = []
    for rows in lists:
        tokens = [row["token"] if isinstance(row.get("token"), str) else "" for row in rows]
        text = "".join(tokens[: data.draw(st.sampled_from([len(tokens), len(tokens), len(tokens) - 1]))])
        responses.append({"text": text, "finish_reason": reason, "logprobs": {"content": rows}})
    same(json.dumps({"prompt": "Hi", "responses": responses}, ensure_ascii=escaped).encode("utf-8", "surrogatepass"))


@MANY
@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON_VALUES), min_size=1, max_size=3))
def test_both_ways_are_one_in_spoiled_documents(spoilings: list[tuple[tuple[Any, ...], Any]]) -> None:
    document = json.loads(json.dumps(model_document()))
    for path, value in spoilings:
        spoil(document, path, copy.deepcopy(value))
    same(json.dumps(document).encode())


PIECES = (
    '"token": "x", ; "token" :"x",; "tok\\u0065n": "x",; "logprob": -1,; NaN; -Infinity; null; []; {}; "; \\; \\ud83d; '
    '\\u003a; :; ,; ]; }; 01; 1e400; -0; -1; 2.0; \x01; \n; {"a": {"token": 1}},; "id": 7,; "bytes": [97],; \ufeff'
).split("; ")


@MANY
@given(
    st.sampled_from(INPUTS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.sampled_from(PIECES)), max_size=3),
)
def test_both_ways_are_one_in_cut_and_patched_files(path: Any, patches: list[tuple[float, int, str]]) -> None:
    text = path.read_text(encoding="utf-8")
    for share, n, piece in patches:
        at = int(share * len(text))
        at = text.find('"', at) if n % 2 else at  # half of them where a string begins or ends
        text = text[:at] + piece + text[at + n // 2 :]
    same(text.encode())


@MANY
@given(st.sampled_from(INPUTS), st.data())
def test_both_ways_are_one_in_real_files_with_spoiled_values(path: Any, data: st.DataObject) -> None:
    document = json.loads(path.read_bytes())
    below = [p for p in paths(document) if "content" in p]
    for spoilt in data.draw(st.lists(st.sampled_from(below), min_size=1, max_size=3)):
        spoil(document, spoilt, data.draw(JSON_VALUES))
    same(json.dumps(document, indent=data.draw(st.sampled_from([None, 1]))).encode())


def real_rows(path: Any = INPUTS[0]) -> list[Any]:
    return json.loads(path.read_bytes())["responses"][0]["logprobs"]["content"]


def _null_tail(rows: list[Any]) -> None:
    rows[1]["top_logprobs"][-1]["logprob"] = None


def _masked(rows: list[Any]) -> None:
    for row in rows:
        row["top_logprobs"][-1]["logprob"] = -9999.0


def _unsorted(rows: list[Any]) -> None:
    for row in rows[:7]:
        row["top_logprobs"].reverse()


def _sampled_unknown(rows: list[Any]) -> None:
    rows[0]["logprob"] = None


def _appended(rows: list[Any]) -> None:
    rows[2]["top_logprobs"].append({**rows[2]["top_logprobs"][-1], "token": "zz", "token_id": 9, "logprob": -50.0})
    rows[2] |= {"token": "zz", "token_id": 9, "logprob": -50.0}


def _end_without_list(rows: list[Any]) -> None:
    rows[-1].pop("top_logprobs")


COMMON = {
    "null-logprob": _null_tail,
    "masked-candidate": _masked,
    "unsorted-list": _unsorted,
    "unknown-logprob": _sampled_unknown,
    "sampled-appended": _appended,
    None: _end_without_list,
}


@pytest.mark.parametrize(("kind", "change"), COMMON.items(), ids=[str(kind) for kind in COMMON])
def test_common_repairs_are_made_in_columns(kind: str | None, change: Callable[[list[Any]], None]) -> None:
    document = json.loads(INPUTS[0].read_bytes())
    rows = document["responses"][0]["logprobs"]["content"]
    change(rows)
    document["responses"][0]["text"] = "".join(row["token"] for row in rows)
    assert in_columns(rows)
    found = same(json.dumps(document).encode())
    assert kind is None or kind in {problem.kind for problem in found.problems}


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.name)
def test_real_files_are_read_in_columns(path: Any) -> None:
    assert in_columns(real_rows(path))
    assert same(path.read_bytes()).responses


def test_tokens_that_look_like_keys_are_no_repeated_keys() -> None:
    row = {"token": '":', "logprob": -0.5, "top_logprobs": [{"token": '"token":', "logprob": -0.5}]}
    assert in_columns([{**row, "token": name} for name in ("token", "a:b", '"logprob": 1', ":")])


@pytest.mark.parametrize(
    "written",
    [
        '"token": "b", "logprob": -0.1',
        '"tok\\u0065n" : "b", "logprob": -0.1',
        '"token": "\\u003a", "token": "\\u003a", "logprob": -0.1',
        '"logprob": -0.1, "bytes": null, "bytes": null',
        '"logprob": -0.1, "token_id": 1, "token_id": 1',
    ],
)
def test_repeated_keys_are_seen(written: str) -> None:
    document = (
        f'{{"prompt": "Hi", "responses": [{{"text": "a", "logprobs": {{"content": [{{"token": "a", {written}}}]}}}}]}}'
    )
    kinds = {problem.kind for problem in same(document.encode()).problems}
    assert kinds == {"repeated-key"}


def test_lines_and_raw_answers_are_read_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    item = {
        "text": "a",
        "logprobs": {"content": [{"token": "a", "logprob": -1, "top_logprobs": [{"token": "a", "logprob": -1}]}]},
    }
    choice = {"message": {"content": "a"}, "logprobs": item["logprobs"]}
    shapes = [{"prompt": "Hi", "responses": [item]}, {"prompt": "Hi", **item}, {"prompt": "Hi", "choices": [choice]},
              {"prompt": "Hi", "response": {"body": {"choices": [choice]}}}]  # fmt: skip
    texts = [json.dumps(shape) for shape in shapes]
    for text in [*texts, "\n".join(texts), "\ufeff" + texts[0]]:
        read = same(text.encode())
        assert {tuple(p.sampled.token for p in response.positions) for response in read.responses} == {("a",)}
    monkeypatch.setattr("kl.input.responses.read_positions", pytest.fail)
    for text in [*texts, "\n".join(texts), "\ufeff" + texts[0]]:
        assert parse_responses(text.encode(), "a.json").responses


@pytest.mark.parametrize(
    ("stated", "kept", "shown"),
    [
        ({}, [2, 2], "may have been added"),
        ({"top_logprobs": 2}, [2, 2], "one longer than the 2"),
        ({"top_logprobs": 9}, [2, 2], "may have been added"),
        ({"sampling": {"logprobs": 3}}, [3, 3], None),
    ],
)
def test_a_sampled_token_that_ends_every_list_is_no_limit_unless_it_is_one_of_the_k(
    stated: dict[str, Any], kept: list[int], shown: str | None
) -> None:
    best = [{"token": " a", "logprob": math.log(0.5)}, {"token": " b", "logprob": math.log(0.2)}]
    rows = [
        {"token": token, "logprob": math.log(p), "top_logprobs": [*best, {"token": token, "logprob": math.log(p)}]}
        for token, p in ((" y", 0.01), (" z", 0.02))
    ]
    head = {"prompt": "Hi", "model": "m", **stated}
    found = same(json.dumps({**head, "responses": [{"text": " y z", "logprobs": {"content": rows}}]}).encode())
    (response,) = found.responses
    assert [len(position.top) for position in response.positions] == kept
    assert [position.sampled.logprob for position in response.positions] == [math.log(0.01), math.log(0.02)]
    assert all(shown in p.message for p in found.problems) if shown else not found.problems
    # No token that is missing can be more probable than the last one: the list is whole.
    own = {"token": " y", "logprob": math.log(0.29)}
    for top in ([best[0], own], [own]):
        rows = [{**own, "top_logprobs": top}]
        found = same(
            json.dumps({"prompt": "Hi", "responses": [{"text": " y", "logprobs": {"content": rows}}]}).encode()
        )
        assert (found.problems, len(found.responses[0].positions[0].top)) == ((), len(top))


def test_a_file_travels_between_processes_as_it_is() -> None:
    read = parse_responses(INPUTS[0].read_bytes(), "a.json")
    assert pickle.loads(pickle.dumps(read)) == read


def test_messages_of_both_ways_count_alike() -> None:
    document = json.loads(INPUTS[0].read_bytes())
    for row in document["responses"][0]["logprobs"]["content"]:
        row["top_logprobs"][-1]["logprob"] = None
    found = same(json.dumps(document).encode())
    (last,) = [problem for problem in found.problems if re.search("And [0-9]+ more like it", problem.message)]
    assert (
        sum(p.count for p in found.problems) == len(document["responses"][0]["logprobs"]["content"]) == last.count + 4
    )
