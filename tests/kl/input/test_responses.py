"""What is wrong with a file or a response is named, and never touches the good response beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kl.input.problems import KEPT_PER_KIND, WHAT_TO_DO
from kl.input.responses import ResponseFile, parse_responses
from kl.input.writer import response_document
from kl.records import END_TOKENS, Candidate, Prompt, Response, Sampling, Turn

SECRET = "the secret of the prompt"


def entry(token: str, logprob: Any, *top: Any, **more: Any) -> dict[str, Any]:
    """One position: the sampled token and (token, logprob) or (token, logprob, id) of its list."""
    listed = [dict(zip(("token", "logprob", "token_id"), row, strict=False)) for row in top]
    return {"token": token, "logprob": logprob, "top_logprobs": listed, **more}


def good_response() -> dict[str, Any]:
    content = [
        entry("Hello", -0.5, ("Hello", -0.5, 10), ("Hi", -1.5, 11), ("Hey", -3.0, 12), token_id=10),
        entry(" you", -0.25, (" you", -0.25, 20), (" there", -2.0, 21), ("!", -4.0, 1), token_id=20),
        entry("!", 0, ("!", 0, 1), (".", -20.5, 2), ("?", -21.5, 3), token_id=1),
    ]
    return {"text": "Hello you!", "finish_reason": "STOP", "logprobs": {"content": content}}


def good_document() -> dict[str, Any]:
    """Response 0 is the one that cases spoil, response 1 the good one beside it."""
    return {"prompt": SECRET, "model": "p-model", "responses": [good_response(), good_response()]}


def read(document: Any) -> ResponseFile:
    return parse_responses(json.dumps(document).encode(), "sub/a.json")


def content_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["responses"][0]["logprobs"]["content"]


def kinds(file: ResponseFile) -> list[tuple[int | None, int | None, str, bool]]:
    return [(p.response_idx, p.position, p.kind, p.repaired) for p in file.problems]


def set_response(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["responses"][0].update(values)


def drop_response_key(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["responses"][0].pop(key)


def replace_response(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["responses"].__setitem__(0, value)


def set_position(index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: content_of(document)[index].update(values)


def drop_position_key(index: int, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: content_of(document)[index].pop(key)


def set_candidate(index: int, rank: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: content_of(document)[index]["top_logprobs"][rank].update(values)


def add_candidate(index: int, token: str, logprob: float, token_id: int | None) -> Callable[[dict[str, Any]], None]:
    added = {"token": token, "logprob": logprob, "token_id": token_id}
    return lambda document: content_of(document)[index]["top_logprobs"].append(added)


def both(*mutations: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        for mutation in mutations:
            mutation(document)

    return apply


def set_tokens(
    text: str, *tokens: str, token_bytes: tuple[bytes, ...] | None = None
) -> Callable[[dict[str, Any]], None]:
    def apply(document: dict[str, Any]) -> None:
        rows = [entry(token, -0.5, (token, -0.5), ("other", -2.0)) for token in tokens]
        for row, piece in zip(rows, token_bytes or (), strict=bool(token_bytes)):
            row["bytes"] = list(piece)
        document["responses"][0].update(text=text, logprobs={"content": rows})

    return apply


@dataclass(frozen=True)
class Defect:
    """A mutation of response 0 that makes it unusable; ``shown`` must be in the message."""

    id: str
    mutate: Callable[[dict[str, Any]], None]
    kind: str
    position: int | None = None
    shown: str = ""


DEFECTS = [
    Defect("response is a text", replace_response("Hello"), "bad-response", shown="'Hello'"),
    Defect("response is null", replace_response(None), "bad-response", shown="null"),
    Defect("text missing", drop_response_key("text"), "no-text", shown="missing"),
    Defect("text null", set_response(text=None), "no-text", shown="null"),
    Defect("text is a number", set_response(text=7), "bad-text", shown="7"),
    Defect("lone surrogate in text", set_response(text="a\ud83d"), "lone-surrogate", shown=r"'\ud83d'"),
    Defect("lone surrogate in a token", set_tokens("😀", "\ud83d", "\ude00"), "lone-surrogate", 0, r"\ud83d"),
    Defect("logprobs missing", drop_response_key("logprobs"), "no-logprobs", shown="missing"),
    Defect("logprobs null", set_response(logprobs=None), "no-logprobs", shown="null"),
    Defect("logprobs is a list", set_response(logprobs=[1, 2]), "bad-logprobs", shown="a list of 2"),
    Defect("content missing", set_response(logprobs={}), "no-logprobs", shown="missing"),
    Defect("content is an object", set_response(logprobs={"content": {}}), "bad-logprobs", shown="an object"),
    Defect("content empty", set_response(logprobs={"content": []}), "no-logprobs", shown="an empty list"),
    Defect("nothing written", set_response(text="", logprobs={"content": []}), "empty-response"),
    Defect("only an end token, without a list",
           both(set_tokens("", "</s>"), set_position(0, top_logprobs=None)), "empty-response"),
    Defect("position is a number", lambda d: content_of(d).__setitem__(1, 3.5), "bad-position", 1, "3.5"),
    Defect("token missing", drop_position_key(1, "token"), "bad-token", 1, "missing"),
    Defect("token is a number", set_position(1, token=5), "bad-token", 1, "5"),
    Defect("listed token is null", set_candidate(2, 1, token=None), "bad-token", 2, "entry 1 of top_logprobs is null"),
    Defect("candidate is a list", lambda d: content_of(d)[0].update(top_logprobs=[["a", -1]]), "bad-candidate", 0),
    Defect("logprob missing", drop_position_key(2, "logprob"), "missing-logprob", 2, "missing"),
    Defect("listed logprob null before others", set_candidate(1, 1, logprob=None), "bad-logprob", 1, "null"),
    Defect("logprob is a text", set_position(0, logprob="-0.5"), "bad-logprob", 0, "'-0.5'"),
    Defect("logprob is a boolean", set_position(2, logprob=False), "bad-logprob", 2, "False"),
    Defect("NaN logprob", set_position(1, logprob=float("nan")), "nan-logprob", 1, "nan"),
    Defect("NaN in a list", set_candidate(1, 1, logprob=float("nan")), "nan-logprob", 1, "entry 1"),
    Defect("infinite logprob", set_position(1, logprob=float("inf")), "infinite-logprob", 1, "inf"),
    Defect("minus infinity sampled", set_position(1, logprob=float("-inf")), "infinite-logprob", 1, "-inf"),
    Defect("integer beyond all floats", set_position(1, logprob=-(10**350)), "infinite-logprob", 1, "-1000"),
    Defect("positive logprob", set_position(0, logprob=0.02), "positive-logprob", 0, "0.02"),
    Defect("positive just above rounding", set_candidate(2, 0, logprob=1.1e-5), "positive-logprob", 2, "1.1e-05"),
    Defect("probabilities instead of logs", set_candidate(0, 0, logprob=0.6), "positive-logprob", 0, "0.6"),
    Defect("token id is a text", set_position(0, token_id="10"), "bad-token-id", 0, "'10'"),
    Defect("token id is a boolean", set_candidate(0, 1, token_id=True), "bad-token-id", 0, "True"),
    Defect("token id is negative", set_candidate(0, 1, token_id=-1), "bad-token-id", 0, "-1"),
    Defect("token id has a part", set_position(0, token_id=10.5), "bad-token-id", 0, "10.5"),
    Defect("list of the last position missing", drop_position_key(2, "top_logprobs"), "no-top-logprobs", 2),
    Defect("token id beyond 64 bits", set_position(0, token_id=2**63), "bad-token-id", 0, "9223372036854775808"),
    Defect("bytes out of range", set_position(1, bytes=[32, 256]), "bad-bytes", 1, "a list of 2"),
    Defect("bytes as text", set_candidate(1, 1, bytes="IHlv"), "bad-bytes", 1, "'IHlv'"),
    Defect("list missing", drop_position_key(1, "top_logprobs"), "no-top-logprobs", 1),
    Defect("list null", set_position(1, top_logprobs=None), "no-top-logprobs", 1),
    Defect("list empty", set_position(1, top_logprobs=[]), "no-top-logprobs", 1, "an empty list"),
    Defect("may_lack is a number", set_position(1, may_lack=1), "bad-mark", 1, "`may_lack` is 1"),
    Defect("unusable is no text", set_position(1, unusable=True), "bad-mark", 1, "`unusable` is True"),
    Defect("list is a number", set_position(1, top_logprobs=7), "bad-top-logprobs", 1, "7"),
    Defect(
        "list of masked tokens only", set_position(1, top_logprobs=[{"token": "a", "logprob": -9999.0}]),
        "no-top-logprobs", 1, "only marks",
    ),
    Defect("mass above one", set_candidate(0, 1, logprob=-0.5), "mass-above-one", 0, "1.26285"),
    Defect("one id with two values", add_candidate(0, "Hi", -3.5, 11), "repeated-token-id", 0, "token id 11"),
    Defect("one id with two texts", add_candidate(0, "Hu", -1.5, 11), "repeated-token-id", 0, "'Hu'"),
    Defect("sampled disagrees by id", set_position(1, logprob=-0.27), "sampled-disagrees", 1, "-0.27"),
    Defect(
        "sampled disagrees by text", both(set_position(1, logprob=-0.27), drop_position_key(1, "token_id")),
        "sampled-disagrees", 1, "' you'",
    ),
    Defect("lists of another position", set_position(1, token_id=77), "sampled-above-list", 1, "down to -4.0"),
    Defect("token texts of another response", set_response(text="Hello world"), "text-mismatch", 1, "character 6"),
    Defect("text goes on after the tokens", set_response(text="Hello you! And"), "text-mismatch", 2, "character 10"),
    Defect("white space that no token has", set_response(text="Hello you!\n"), "text-mismatch", 2, r"'\n'"),
    Defect(
        "a token beyond a text that was cut", both(set_tokens("ab", "ab", "odd"), set_response(finish_reason="length")),
        "text-mismatch", 1, "'odd'",
    ),
    Defect(
        "split character with bytes of another text",
        set_tokens("é", "\ufffd", "\ufffd", token_bytes=(b"\xc3", b"\xa8")), "text-mismatch", 0,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", DEFECTS, ids=lambda case: case.id)
def test_defect_skips_its_response_alone(case: Defect) -> None:
    document = good_document()
    case.mutate(document)
    file = read(document)
    assert [r.response_idx for r in file.responses] == [1]
    assert file.responses[0] == read(good_document()).responses[1]
    assert [(u.response_idx, u.kind) for u in file.unreadable] == [(0, case.kind)]
    defects = [p for p in file.problems if not p.repaired]
    assert [(p.response_idx, p.position, p.kind) for p in defects] == [(0, case.position, case.kind)]
    (message,) = [p.message for p in defects]
    assert message.startswith("sub/a.json, response 0")
    assert case.shown in message
    assert message.endswith(WHAT_TO_DO[case.kind])
    assert "\n" not in message
    assert SECRET not in message
    assert file.unreadable[0].message == message


LONG = 8  # positions


def long_document(tokens: int = LONG) -> dict[str, Any]:
    """Two responses of which one position is a small part."""
    content = [
        entry(f" w{t}", -0.25, (f" w{t}", -0.25, 20 + t), (" there", -2.0, 11), ("!", -4.0, 1), token_id=20 + t)
        for t in range(tokens)
    ]
    response = {"text": "".join(item["token"] for item in content), "logprobs": {"content": content}}
    return {"prompt": SECRET, "model": "p-model", "responses": [response, good_response()]}


NUMBERS = [
    Defect("listed logprob null before others", set_candidate(1, 1, logprob=None), "bad-logprob", 1, "null"),
    Defect("NaN logprob", set_position(1, logprob=float("nan")), "nan-logprob", 1, "nan"),
    Defect("positive logprob", set_candidate(3, 1, logprob=4.0), "positive-logprob", 3, "4.0"),
    Defect("positive sampled", set_position(3, logprob=4.0), "positive-logprob", 3, "4.0"),
    Defect("infinite logprob", set_position(1, logprob=float("inf")), "infinite-logprob", 1, "inf"),
    Defect("mass above one", set_candidate(0, 1, logprob=-0.5), "mass-above-one", 0, "add up to 1."),
    Defect("one id with two values", add_candidate(0, "Hi", -3.5, 11), "repeated-token-id", 0, "token id 11"),
    Defect("sampled disagrees", set_position(1, logprob=-1.0), "sampled-disagrees", 1, "-1.0"),
    Defect("list missing", drop_position_key(1, "top_logprobs"), "no-top-logprobs", 1),
    Defect("candidate is a number", lambda d: content_of(d)[4].update(top_logprobs=[3]), "bad-candidate", 4, "3"),
    Defect("listed token is null", set_candidate(2, 1, token=None), "bad-token", 2, "entry 1 of top_logprobs is null"),
    Defect("numbers of the last position", set_candidate(LONG - 1, 0, logprob=2.0), "positive-logprob", LONG - 1),
]


@pytest.mark.parametrize("case", NUMBERS, ids=lambda case: case.id)
def test_numbers_that_cannot_be_right_leave_out_their_position_alone(case: Defect) -> None:
    document = long_document()
    case.mutate(document)
    found, whole = read(document), read(long_document()).responses[0]
    response = found.responses[0]
    assert not found.unreadable
    assert response.text == whole.text
    (problem,) = [problem for problem in found.problems if not problem.repaired]
    assert (problem.response_idx, problem.position, problem.kind) == (0, case.position, case.kind)
    assert case.shown in problem.message
    spoilt = response.positions[case.position]
    assert spoilt.defect == (case.kind, problem.message)
    assert (spoilt.top, spoilt.sampled.logprob) == ((), None)
    assert spoilt.sampled.token == whole.positions[case.position].sampled.token
    others = [(a, b) for a, b in zip(response.positions, whole.positions, strict=True) if a.defect is None]
    assert len(others) == len(whole.positions) - 1
    assert all(a == b for a, b in others)
    assert len(others) == LONG - 1


@pytest.mark.parametrize(
    ("n_spoilt", "n_positions", "values", "is_read"),
    [
        (1, 8, {"logprob": 3.0}, True),
        (2, 8, {"logprob": 3.0}, False),
        (1, 7, {"logprob": 3.0}, False),  # more than an eighth
        (3, 24, {"logprob": -1.0}, True),  # chance
        (5, 40, {"logprob": -1.0}, False),  # tokens and lists have lost each other
        (5, 40, {"logprob": 3.0}, True),
        (4, 50, {"logprob": -1.0}, True),  # few of many
    ],
)
def test_many_positions_that_cannot_be_used_refuse_the_response(
    n_spoilt: int, n_positions: int, values: dict[str, float], is_read: bool
) -> None:
    document = long_document(n_positions)
    for index in range(n_spoilt):
        content_of(document)[2 * index].update(values)
    found = read(document)
    assert (len(found.responses) == 2) is is_read
    assert [item.response_idx for item in found.unreadable] == ([] if is_read else [0])


@dataclass(frozen=True)
class Repair:
    """A mutation of response 0 that is repaired; ``look`` gives what must equal ``expected`` afterwards."""

    id: str
    mutate: Callable[[dict[str, Any]], None]
    kind: str
    position: int | None
    look: Callable[[Response], Any]
    expected: Any


def logprobs(position: int) -> Callable[[Response], Any]:
    return lambda response: [candidate.logprob for candidate in response.positions[position].top]


def sampled(position: int) -> Callable[[Response], Any]:
    return lambda response: response.positions[position].sampled.logprob


def tokens(response: Response) -> list[str]:
    return [position.sampled.token for position in response.positions]


REPAIRS = [
    Repair("rounding above 0", set_candidate(2, 0, logprob=1e-5), "positive-logprob", 2, logprobs(2),
           [0, -20.5, -21.5]),
    Repair("sampled rounding above 0", set_position(2, logprob=1.2e-7), "positive-logprob", 2, sampled(2), 0.0),
    Repair("unsorted", set_candidate(0, 1, logprob=-3.5), "unsorted-list", 0, logprobs(0), [-0.5, -3.0, -3.5]),
    Repair("masked token of Vertex AI", set_candidate(0, 1, logprob=-(2.0**100)), "masked-candidate", 0, logprobs(0),
           [-0.5, -3.0]),
    Repair("unknown of OpenAI", set_candidate(0, 1, logprob=-9999.0), "masked-candidate", 0, logprobs(0), [-0.5, -3.0]),
    Repair("listed minus infinity", set_candidate(0, 1, logprob=float("-inf")), "masked-candidate", 0, logprobs(0),
           [-0.5, -3.0]),
    Repair("unknown sampled logprob", both(set_position(0, logprob=-9999.0, token_id=99)), "unknown-logprob", 0,
           sampled(0), None),
    Repair("null sampled logprob", set_position(0, logprob=None, token_id=99), "unknown-logprob", 0, sampled(0), None),
    Repair("unknown sampled logprob, listed", set_position(0, logprob=None), "unknown-logprob", 0, sampled(0), -0.5),
    Repair("entry twice", add_candidate(0, "Hey", -3.0, 12), "duplicate-candidate", 0, logprobs(0), [-0.5, -1.5, -3.0]),
    Repair("half a character listed", set_candidate(0, 2, token="\ud83d", token_id=None), "lone-surrogate", 0,
           lambda r: r.positions[0].top[2], Candidate("\ufffd", -3.0)),
    Repair("sampled token appended to the list",
           both(set_position(1, token_id=5, logprob=-7.5), add_candidate(1, " you", -7.5, 5)),
           "sampled-appended", 1, logprobs(1), [-0.25, -2.0, -4.0]),
    Repair("stripped text", both(set_tokens("a b", "\n a", " b", " \n")), "stripped-text", None,
           lambda r: r.text, "\n a b \n"),
    Repair("text stripped of one of two line ends", set_tokens("a\n", "a", "\n", "\n"), "stripped-text", None,
           lambda r: r.text, "a\n\n"),
    Repair("end token without a list", both(set_tokens("ab", "a", "b", "<|im_end|>"), set_position(2, top_logprobs=[])),
           "end-token", 2, tokens, ["a", "b"]),
    Repair("a second end token", set_tokens("ab", "ab", "<|im_end|>", "<|endoftext|>"), "end-token", 2, tokens,
           ["ab", "<|im_end|>"]),
    Repair("a stop sequence of several tokens cut from the text", set_tokens("ab", "ab", "\n\nHuman", ":"), "cut-text",
           None, lambda r: r.text, "ab\n\nHuman:"),
    Repair("null for minus infinity", set_candidate(1, 2, logprob=None), "null-logprob", 1, logprobs(1), [-0.25, -2.0]),
    Repair("a whole number with a point as id", set_position(0, token_id=10.0), "float-id", 0,
           lambda r: r.positions[0].sampled.token_id, 10),
    Repair("pieces of byte-level BPE", set_tokens("né où\n", "n", "Ã", "©", "ĠoÃ¹", "Ċ"), "raw-pieces", None, tokens,
           ["n", "", "é", " où", "\n"]),
    Repair("pieces of SentencePiece, and its first blank", set_tokens("The é", "▁The", "▁", "<0xC3>", "<0xA9>"),
           "raw-pieces", None, tokens, ["The", " ", "", "é"]),
    Repair("bytes that the text shows by their names", set_tokens("a<0xC3><0xA9>", "a", "<0xC3>", "<0xA9>"),
           "text-from-bytes", None, tokens, ["a", "", "é"]),
    Repair("split character without bytes", set_tokens("né!", "n", "\ufffd", "\ufffd", "!"), "hidden-text", None,
           tokens, ["n", "", "é", "!"]),
    Repair("split character with the bytes of the sign for it", set_tokens("né!", "n", "\ufffd", "\ufffd", "!",
           token_bytes=(b"n", b"\xef\xbf\xbd", b"\xef\xbf\xbd", b"!")), "hidden-text", None, tokens,
           ["n", "", "é", "!"]),
    Repair("characters that no token shows", set_tokens("a 🌊 b", "a", " ", "", "", " b"), "hidden-text", None, tokens,
           ["a", " ", "", "🌊", " b"]),
    Repair("split character",
           set_tokens("né!", "n", "\ufffd", "\ufffd", "!", token_bytes=(b"n", b"\xc3", b"\xa9", b"!")),
           "text-from-bytes", None, tokens, ["n", "", "é", "!"]),
    Repair("fragments written out as text",
           set_tokens("é", "bytes:\\xc3", "bytes:\\xa9", token_bytes=(b"\xc3", b"\xa9")),
           "text-from-bytes", None, tokens, ["", "é"]),
    Repair("text joined from broken tokens", set_tokens("n\ufffd\ufffd", "n", "\ufffd", "\ufffd",
           token_bytes=(b"n", b"\xc3", b"\xa9")), "text-from-bytes", None, lambda r: r.text, "né"),
    Repair("text cut inside a character", set_tokens("n\ufffd", "n", "\ufffd", token_bytes=(b"n", b"\xf0\x9f")),
           "text-from-bytes", None, tokens, ["n", ""]),
    Repair("text cut inside a character and shown with one sign for two tokens",
           set_tokens("n\ufffd", "n", "\ufffd", "\ufffd", token_bytes=(b"n", b"\xf0", b"\x9f")),
           "text-from-bytes", None, tokens, ["n", "", ""]),
    Repair("model is no text", set_response(model=["m"]), "bad-model", None, lambda r: r.model, None),
    Repair("finish reason is no text", set_response(finish_reason=1), "bad-finish-reason", None,
           lambda r: r.finish_reason, None),
    Repair("temperature is a text", set_response(temperature="1.0"), "bad-sampling", None,
           lambda r: r.sampling, Sampling()),
]  # fmt: skip


@pytest.mark.parametrize("case", REPAIRS, ids=lambda case: case.id)
def test_certain_repair_is_made_and_noted(case: Repair) -> None:
    document = good_document()
    case.mutate(document)
    file = read(document)
    assert [r.response_idx for r in file.responses] == [0, 1]
    assert not file.unreadable
    assert case.look(file.responses[0]) == case.expected
    assert kinds(file) == [(0, case.position, case.kind, True)]
    assert file.responses[1] == read(good_document()).responses[1]
    assert_prefixes_are_of_the_text(file.responses[0])


def assert_prefixes_are_of_the_text(response: Response) -> None:
    ends = response.prefix_ends()
    assert len(ends) == len(response.positions)
    for t, end in enumerate(ends):
        assert response.text[:end] == "".join(position.sampled.token for position in response.positions[:t])
    said = tokens(response)
    assert response.text == "".join(said) or (response.has_stop and response.text == "".join(said[:-1]))


ORDINARY = [
    ("empty token", set_tokens("ab", "a", "", "b")),
    ("single empty token", set_tokens("", "")),
    ("control token", set_tokens("a<ctrl63>", "a", "<ctrl63>")),
    ("end token that the text shows", set_tokens("a</s>", "a", "</s>")),
    ("NUL and runs of blanks", set_tokens("\x00   \n\n\t", "\x00", "   ", "\n\n\t")),
    ("emoji and combining marks", set_tokens("👩‍💻é नमस्ते", "👩‍💻", "é", " नमस्ते")),
    ("replacement character that the model wrote", set_tokens("\ufffd", "\ufffd", token_bytes=("\ufffd".encode(),))),
    ("equal texts with two ids", add_candidate(0, "Hey", -3.0, 13)),
    ("equal texts without ids", both(set_tokens("a", "a"), add_candidate(0, "other", -2.0, None))),
    ("two empty tokens in a list", both(add_candidate(0, "", -4.0, None), add_candidate(0, "", -4.0, None))),
    ("mass above one by rounding", set_candidate(2, 1, logprob=-7.6)),
    ("sampled token not listed", set_position(1, token_id=77, logprob=-6.0)),
    ("empty sampled token beside another empty one", both(set_position(1, token="", logprob=-6.0),
        set_response(text="Hello!"), drop_position_key(1, "token_id"), add_candidate(1, "", -5.0, 9))),
    ("bytes of other tokens", set_tokens("a\ufffd", "a", "\ufffd", token_bytes=(b"b", b"\xc3\xa9"))),
    ("sampled logprob off by rounding", set_position(1, logprob=-0.2509)),
    ("no ids, no finish reason", set_tokens("ab", "a", "b")),
    ("unread keys are left alone", set_response(avg_logprobs=float("nan"), citations=[{"a": 1}])),
    ("more than 20 candidates", lambda d: content_of(d)[0]["top_logprobs"].extend(
        {"token": f"t{i}", "logprob": -5.0 - i, "token_id": 100 + i} for i in range(60))),
]  # fmt: skip


@pytest.mark.parametrize("mutate", [pytest.param(mutate, id=name) for name, mutate in ORDINARY])
def test_ordinary_input_is_read_as_it_stands(mutate: Callable[[dict[str, Any]], None]) -> None:
    document = good_document()
    mutate(document)
    raw = document["responses"][0]
    file = read(document)
    assert file.problems == ()
    response = file.responses[0]
    assert response.text == raw["text"]
    for position, written in zip(response.positions, raw["logprobs"]["content"], strict=True):
        assert (position.sampled.token, position.sampled.logprob) == (written["token"], written["logprob"])
        listed = [(c.token, c.logprob, c.token_id) for c in position.top]
        assert listed == [(c["token"], c["logprob"], c.get("token_id")) for c in written["top_logprobs"]]
    assert_prefixes_are_of_the_text(response)


NAMES_OF_ENDS = ("<|eot|>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<|user|>", "[EOS]", "[|endofturn|]", "over", "")


@pytest.mark.parametrize("end", [*sorted(END_TOKENS), *NAMES_OF_ENDS])
@pytest.mark.parametrize("reason", ["stop", "STOP", "FinishReason.STOP", "end_turn", "eos_token"])
def test_the_last_token_that_the_text_does_not_hold_ends_the_turn_whatever_its_name(end: str, reason: str) -> None:
    document = good_document()
    both(set_tokens("ab", "a", "b", end), set_response(finish_reason=reason))(document)
    file = read(document)
    (response,) = file.responses[:1]
    assert (tokens(response), response.text, response.has_stop) == (["a", "b", end], "ab", True)
    assert response.prefix_ends().tolist() == [0, 1, 2]
    assert response.gaps == ()
    assert file.problems == ()


@pytest.mark.parametrize(
    ("end", "reason", "has_stop"),
    [("</s>", None, True), ("<|odd|>", None, True), ("<|call|>", "tool_calls", True), ("<|im_end|>", "length", True),
     ("", "length", False), ("", None, False)],
)  # fmt: skip
def test_a_name_that_is_no_text_says_the_end_where_the_finish_reason_does_not(end, reason, has_stop) -> None:
    document = good_document()
    both(set_tokens("ab", "a", "b", end), set_response(finish_reason=reason))(document)
    response = read(document).responses[0]
    assert (response.has_stop, response.text, len(response.positions)) == (has_stop, "ab", 3)


def test_an_answer_that_ends_at_once_is_a_stop_and_no_text() -> None:
    document = good_document()
    set_tokens("", "<|im_end|>")(document)
    response = read(document).responses[0]
    assert (response.text, tokens(response), response.has_stop) == ("", ["<|im_end|>"], True)
    assert response.prefix_ends().tolist() == [0]


def test_an_end_token_whose_list_holds_marks_alone_is_dropped() -> None:
    document = good_document()
    set_tokens("ab", "a", "b", "</s>")(document)
    content_of(document)[2]["top_logprobs"] = [{"token": "</s>", "logprob": -9999.0}]
    file = read(document)
    assert (tokens(file.responses[0]), file.responses[0].has_stop) == (["a", "b"], False)
    assert kinds(file) == [(0, 2, "masked-candidate", True), (0, 2, "end-token", True)]


def test_an_end_token_that_the_text_shows_is_the_stop_all_the_same() -> None:
    document = good_document()
    set_tokens("ab</s>", "ab", "</s>")(document)
    response = read(document).responses[0]
    assert (response.text, response.has_stop) == ("ab</s>", True)


def test_a_stop_is_kept_after_white_space_that_the_text_lacks() -> None:
    document = good_document()
    set_tokens("ab", "ab", " \n", "<|eot|>")(document)
    file = read(document)
    assert (file.responses[0].text, file.responses[0].has_stop) == ("ab \n", True)
    assert kinds(file) == [(0, None, "stripped-text", True)]


PART, WHOLE = "partial-character", "unknown-prefix"
GAPS = [
    ("nothing hidden", set_tokens("a é", "a", " é"), []),
    ("parts of one character, shown by the last", set_tokens("🧎", "", "", "🧎"), [(1, PART), (2, PART)]),
    ("text goes on after them", set_tokens("🧎 a 🌊.", "", "", "🧎", " a", " ", "", "🌊", "."),
     [(1, PART), (2, PART), (5, WHOLE), (6, PART)]),
    ("with empty bytes, and those of the whole character",
     set_tokens("a🌊.", "a", "", "🌊", ".", token_bytes=(b"a", b"", "🌊".encode(), b".")),
     [(1, WHOLE), (2, PART)]),
    ("as many as the character has bytes", set_tokens("a é.", "a", " ", "", "é", "."), [(3, PART)]),
    ("a blank that may hide a part of what follows", set_tokens("é 世.", "", "é", " ", "世", "."),
     [(1, PART), (3, WHOLE)]),
    ("more of them than the character has bytes", set_tokens("aé.", "a", "", "", "é", "."),
     [(1, WHOLE), (2, WHOLE), (3, WHOLE), (4, WHOLE)]),
    ("a token that is in no text", set_tokens("Hello you", "", "Hello", " you"), [(1, WHOLE), (2, WHOLE)]),
    ("parts before a blank", set_tokens("a 🙂", "a", "", " 🙂"), [(1, WHOLE), (2, WHOLE)]),
    ("the sign for parts, in the text too", set_tokens("a\ufffd b", "a", "\ufffd", " b"), [(2, WHOLE)]),
    ("parts that no token shows", set_tokens("a🌊 b", "a", "", "", " b"), [(1, WHOLE), (2, PART)]),
    ("two characters that no token shows", set_tokens("a🌊🌊 b", "a", "", "", "", "", " b"),
     [(2, WHOLE), (3, WHOLE), (4, WHOLE)]),
    ("texts that fit in two places", set_tokens("xaxax!", "\ufffd", "a", "\ufffd", "!"),
     [(1, WHOLE), (2, WHOLE)]),
    ("texts that fit in two places, or in no text", set_tokens("aa b", "\ufffd", "a", "\ufffd", " b"),
     [(1, WHOLE), (2, WHOLE), (3, WHOLE)]),
    ("a text that is certain again", set_tokens("🌊a🌊a🌊b!", "\ufffd", "a", "\ufffd", "b", "!"),
     [(1, WHOLE), (2, WHOLE)]),
    ("bytes that say all", set_tokens("n😀!", "n", "\ufffd", "\ufffd", "!",
     token_bytes=(b"n", b"\xf0\x9f", b"\x98\x80", b"!")), [(2, PART)]),
    *((f"a blank with a part of a character, written as {first!r} and {second!r}",
       set_tokens("n 😀!", "n", first, second, "!", token_bytes=(b"n", b" \xf0\x9f", b"\x98\x80", b"!")), [(2, PART)])
      for first, second in ((" ", ""), (" ", "😀"), (" \ufffd", "\ufffd"), ("bytes: \\xf0\\x9f", "bytes:\\x98\\x80"))),
    ("the same as raw pieces", set_tokens("n 😀!", "n", "ĠðŁ", "ĺĢ", "!"), [(2, PART)]),
    ("the same where only one states its bytes", set_tokens("n 😀!", "n", " ", "", "!",
     token_bytes=(b"n", b" \xf0\x9f", b"", b"!")), [(2, WHOLE)]),
    ("the same where only the other does", set_tokens("n 😀!", "n", "\ufffd", "😀", "!",
     token_bytes=(b"n", b"", b"\x98\x80", b"!")), [(2, PART)]),
    ("bytes that the text leaves out", set_tokens("n a!", "n", " ", "a", "!",
     token_bytes=(b"n", b" \xf0\x9f", b"a", b"!")), [(2, PART), (3, WHOLE)]),
    ("the name of a byte that the model wrote out", set_tokens("n<0xF0>!", "n", "<0xF0>", "!"), []),
]  # fmt: skip


@pytest.mark.parametrize(("mutate", "gaps"), [pytest.param(*case[1:], id=case[0]) for case in GAPS])
def test_positions_whose_prefix_no_text_says_are_known(mutate: Callable[[dict[str, Any]], None], gaps: Any) -> None:
    document = good_document()
    both(mutate, set_response(finish_reason="length"))(document)
    response = read(document).responses[0]
    assert list(response.gaps) == gaps
    assert_prefixes_are_of_the_text(response)


def test_a_token_that_completes_a_character_is_not_the_whole_one_of_its_list() -> None:
    document = good_document()
    set_tokens("é", "", "é", token_bytes=(b"", "é".encode()))(document)
    content_of(document)[1]["top_logprobs"][0] |= {"logprob": -0.25, "bytes": list("é".encode())}
    content_of(document)[1]["top_logprobs"][1] |= {"logprob": -4.0}
    assert read(document).problems == ()
    content_of(document)[0] |= {"token": "e", "bytes": [101]}
    content_of(document)[0]["top_logprobs"][0] |= {"token": "e", "bytes": [101]}
    document["responses"][0]["text"] = "eé"
    assert [problem.kind for problem in read(document).problems] == ["sampled-disagrees"]


def test_two_tokens_without_bytes_are_not_one_token() -> None:
    document = good_document()
    set_tokens("é", "", "é", token_bytes=(b"", "é".encode()))(document)
    content = content_of(document)
    content[0] |= {"logprob": -2.0}
    content[0]["top_logprobs"] = [{"token": "", "logprob": value, "bytes": []} for value in (-0.5, -1.5, -3.0)]
    file = read(document)
    assert file.problems == ()
    assert logprobs(0)(file.responses[0]) == [-0.5, -1.5, -3.0]


def test_prepended_improbable_token_does_not_pass_for_the_least_of_the_best() -> None:
    document = good_document()
    set_position(1, token_id=5, logprob=-7.5)(document)
    best = content_of(document)[1]["top_logprobs"][:2]  # as servers do that cut the longer list to k again
    content_of(document)[1]["top_logprobs"] = [{"token": " you", "logprob": -7.5, "token_id": 5}, *best]
    file = read(document)
    assert logprobs(1)(file.responses[0]) == [-0.25, -2.0]
    assert sampled(1)(file.responses[0]) == -7.5
    assert kinds(file) == [(0, 1, "unsorted-list", True), (0, 1, "sampled-appended", True)]


def test_good_file_gives_every_field() -> None:
    file = read(good_document())
    response = file.responses[1]
    assert (file.prompt, file.model, file.n_responses, file.source_file) == (
        Prompt((Turn("user", SECRET),)), "p-model", 2, "sub/a.json",
    )  # fmt: skip
    assert (response.name, response.model, response.finish_reason) == ("sub/a.json#1", "p-model", "STOP")
    assert response.positions[1].sampled == Candidate(" you", -0.25, 20)
    assert response.positions[1].top[2] == Candidate("!", -4.0, 1)
    assert response.prefix_ends().tolist() == [0, 5, 9]


def test_finish_reason_may_be_absent() -> None:
    document = good_document()
    drop_response_key("finish_reason")(document)
    assert [r.finish_reason for r in read(document).responses] == [None, "STOP"]


def test_response_model_overrides_that_of_the_file() -> None:
    document = good_document()
    set_response(model="tuned")(document)
    assert [r.model for r in read(document).responses] == ["tuned", "p-model"]


def test_the_version_of_the_model_is_read_and_written() -> None:
    document = good_document() | {"model_version": "p-001"}
    set_response(model_version="p-002")(document)
    responses = read(document).responses
    assert [r.model_version for r in responses] == ["p-002", "p-001"]
    written = response_document(responses[0].prompt, "p-model", {}, responses)
    assert [r["model_version"] for r in written["responses"]] == ["p-002", "p-001"]
    assert [r.model_version for r in read(good_document()).responses] == [None, None]


def test_many_problems_of_one_kind_are_told_few_times_and_counted_all() -> None:
    document = good_document()
    row = entry("a", float("nan"), ("a", -(2.0**100)), ("a", -0.5))
    document["responses"][0] = {"text": "a" * 300, "logprobs": {"content": [row] * 300}}
    file = read(document)
    for kind, repaired in (("nan-logprob", False), ("masked-candidate", True)):
        told = [p for p in file.problems if p.kind == kind and p.repaired == repaired]
        assert [p.position for p in told] == list(range(KEPT_PER_KIND))
        assert sum(p.count for p in told) == 300
        assert "And 295 more like it." in told[-1].message
    assert [r.response_idx for r in file.responses] == [1]
    assert file.unreadable[0].message.startswith("sub/a.json, response 0, position 0: ")


def test_skipped_response_keeps_what_its_place_in_the_output_needs() -> None:
    document = good_document()
    set_response(text="a \ud83d b")(document)
    (place,) = read(document).unreadable
    assert place.text == "a \ufffd b"
    json.dumps(place).encode()
    document["responses"][0] = 5
    assert read(document).unreadable[0].text is None


FILE_KINDS = (
    "unreadable-file not-utf8 not-json nested-too-deeply not-an-object no-prompt bad-prompt empty-prompt unknown-role "
    "prompt-end two-system-texts bad-responses no-responses several-prompts continues-prefix"
).split()  # their cases are beside those of other whole files
FOREIGN_KINDS = (
    "foreign-prompt-part chosen-tokens no-boundary service-error hidden-thinking after-sampling missing-entries "
    "streamed-answer unusable-list two-prompts"
).split()  # of other people's formats, with their cases


def test_every_kind_of_defect_of_a_response_has_a_case() -> None:
    assert {case.kind for case in DEFECTS} | {"repeated-key", *FILE_KINDS, *FOREIGN_KINDS} == set(WHAT_TO_DO)


GOOD_TEXT = json.dumps(good_document())


def test_key_twice_in_a_response_skips_that_response() -> None:
    text = GOOD_TEXT.replace('"text": "Hello you!"', '"text": "Hello you!", "text": "Bye"', 1)
    file = parse_responses(text.encode(), "a.json")
    assert kinds(file) == [(0, None, "repeated-key", False)]
    assert [r.response_idx for r in file.responses] == [1]


def test_key_twice_in_a_candidate_names_its_position() -> None:
    text = GOOD_TEXT.replace('"token": " there",', '"token": " there", "logprob": -3,', 1)
    assert kinds(parse_responses(text.encode(), "a.json")) == [(0, 1, "repeated-key", False)]
