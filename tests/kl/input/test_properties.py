"""No JSON value makes the reader raise; what is written well is read back exactly."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kl.input.responses import ResponseFile, parse_responses
from kl.records import Candidate, Position, Prompt, Response, Sampling, Turn

KEYS = (
    "prompt model system responses text finish_reason logprobs content token logprob token_id bytes top_logprobs role "
    "type sampling temperature top_p top_k"
).split()
WHOLE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**500, -(10**500), -(2**70), 2**63]),
    st.floats(),
    st.sampled_from([0.0, -0.5, -9999.0, -(2.0**100), 1e-6]),
    st.text(st.characters(), max_size=8),
    st.sampled_from(["user", "model", "system", "a", "\ud83d", "\ufffd", "</s>", ""]),
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=6)
    ),
    max_leaves=25,
)


def assert_consistent(file: ResponseFile) -> None:
    """What holds for every file, however broken."""
    indices = [r.response_idx for r in file.responses] + [u.response_idx for u in file.unreadable]
    assert sorted(indices) == list(range(file.n_responses))
    assert file.responses or any(not problem.repaired for problem in file.problems)
    for problem in file.problems:
        assert problem.count >= 1
        assert "\n" not in problem.message
        problem.message.encode()
    for response in file.responses:
        response.text.encode()
        assert response.prompt.turns[-1].role == "user"
        ends = response.prefix_ends()
        assert "".join(p.sampled.token for p in response.positions) == response.text
        for t, position in enumerate(response.positions):
            assert response.text[: ends[t]] == "".join(p.sampled.token for p in response.positions[:t])
            listed = [c.logprob for c in position.top if c.logprob is not None]
            assert len(listed) == len(position.top) >= 1
            assert listed == sorted(listed, reverse=True)
            assert all(-1000 < value <= 0 for value in listed)
            assert math.fsum(map(math.exp, listed)) <= 1.001
            own = position.sampled.logprob
            assert own is None or -1000 < own <= 0


@given(JSON_VALUES)
def test_no_json_value_raises(value: Any) -> None:
    assert_consistent(parse_responses(json.dumps(value).encode(), "a.json"))


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_bytes_raise(data: bytes) -> None:
    assert_consistent(parse_responses(data, "a.json"))


def model_document() -> dict[str, Any]:
    """A document in which every key that is read stands somewhere."""
    top = [{"token": "é", "logprob": -0.5, "token_id": 3, "bytes": [0xC3, 0xA9]}, {"token": "e", "logprob": -2.0}]
    row = {"token": "é", "logprob": -0.5, "token_id": 3, "bytes": [0xC3, 0xA9], "top_logprobs": top}
    response = {"model": "m", "text": "éé", "finish_reason": "STOP", "top_k": 5, "logprobs": {"content": [row, row]}}
    prompt = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    return {"prompt": prompt, "system": "S", "model": "m", "sampling": {"top_p": 1}, "responses": [response, response]}


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node below ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*here, key), *paths(inner, (*here, key))]]


PATHS = paths(model_document())


def spoil(document: Any, path: tuple[Any, ...], value: Any) -> None:
    *way, last = path
    for key in way:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):  # an earlier spoiling took this place away
            return
    if isinstance(document, dict) or (isinstance(document, list) and isinstance(last, int) and last < len(document)):
        document[last] = value


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON_VALUES), min_size=1, max_size=3))
def test_no_spoiled_document_raises(spoilings: list[tuple[tuple[Any, ...], Any]]) -> None:
    document = json.loads(json.dumps(model_document()))  # no node shared
    for path, value in spoilings:
        spoil(document, path, copy.deepcopy(value))
    assert_consistent(parse_responses(json.dumps(document).encode(), "a.json"))


@given(st.sampled_from([path for path in PATHS if path[:2] == ("responses", 0)]), JSON_VALUES)
def test_spoiled_response_leaves_its_neighbour_alone(path: tuple[Any, ...], value: Any) -> None:
    good = json.loads(json.dumps(model_document()))
    document = copy.deepcopy(good)
    spoil(document, path, value)
    expected = parse_responses(json.dumps(good).encode(), "a.json").responses[1]
    assert parse_responses(json.dumps(document).encode(), "a.json").responses[-1] == expected


@st.composite
def positions(draw: st.DrawFn, k: int) -> Position:
    """A position with a list of ``k``; the sampled token is one of them, or less probable than all."""
    weights = draw(st.lists(st.floats(0.001, 1), min_size=k + 1, max_size=k + 1))
    logprobs = sorted((math.log(w / sum(weights)) for w in weights), reverse=True)
    with_ids = draw(st.booleans())
    # Without ids, a text that stands twice belongs to nobody for certain; such lists have tests of their own.
    texts = draw(st.lists(WHOLE_TEXT, min_size=k + 1, max_size=k + 1, unique=not with_ids))
    token_ids = st.lists(st.integers(0, 2**63 - 1), min_size=k + 1, max_size=k + 1, unique=True)
    ids = draw(token_ids) if with_ids else [None] * (k + 1)
    with_bytes = draw(st.booleans())
    every = [
        Candidate(text, logprob, token_id, text.encode() if with_bytes else None)
        for text, logprob, token_id in zip(texts, logprobs, ids, strict=True)
    ]
    sampled = draw(st.sampled_from(every))
    return Position(sampled, tuple(every[:k]))


@st.composite
def responses(draw: st.DrawFn, prompt: Prompt, index: int) -> Response:
    k = draw(st.integers(1, 6))
    rows = draw(st.lists(positions(k), min_size=1, max_size=6))
    text = "".join(position.sampled.token for position in rows)
    sampling = Sampling(
        draw(st.none() | st.floats(0, 2)), draw(st.none() | st.floats(0.1, 1)), draw(st.none() | st.just(40))
    )
    reason = draw(st.none() | st.sampled_from(["STOP", "MAX_TOKENS"]))
    return Response("sub/ü.json", index, prompt, draw(WHOLE_TEXT), text, tuple(rows), reason, sampling)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    texts = WHOLE_TEXT.filter(bool)
    turns = draw(st.lists(st.builds(Turn, st.sampled_from(["user", "model"]), texts), max_size=3))
    return Prompt((*turns, Turn("user", draw(texts))), draw(st.none() | texts))


def written(candidate: Candidate) -> dict[str, Any]:
    token_bytes = None if candidate.token_bytes is None else list(candidate.token_bytes)
    fields = {"token_id": candidate.token_id, "bytes": token_bytes}
    return {"token": candidate.token, "logprob": candidate.logprob} | {k: v for k, v in fields.items() if v is not None}


def document_of(prompt: Prompt, rows: list[Response]) -> dict[str, Any]:
    return {
        "prompt": [turn._asdict() for turn in prompt.turns],
        "system": prompt.system,
        "responses": [
            {
                "model": row.model,
                "text": row.text,
                "finish_reason": row.finish_reason,
                "top_logprobs": len(row.positions[0].top),
                "sampling": {name: getattr(row.sampling, name) for name in ("temperature", "top_p", "top_k")},
                "logprobs": {
                    "content": [
                        {**written(p.sampled), "top_logprobs": [written(candidate) for candidate in p.top]}
                        for p in row.positions
                    ]
                },
            }
            for row in rows
        ],
    }


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), prompts(), st.booleans())
def test_well_formed_documents_are_read_back_exactly(data: st.DataObject, prompt: Prompt, escaped: bool) -> None:
    rows = [data.draw(responses(prompt, index)) for index in range(data.draw(st.integers(1, 3)))]
    text = json.dumps(document_of(prompt, rows), ensure_ascii=escaped)
    file = parse_responses(text.encode(), "sub/ü.json")
    assert file.problems == ()
    assert tuple(replace(response, has_stop=False, gaps=()) for response in file.responses) == tuple(rows)
    ends = [row.finish_reason == "STOP" and row.positions[-1].sampled.token == "" for row in rows]
    assert [response.has_stop for response in file.responses] == ends
    assert file.prompt == prompt
    assert_consistent(file)
