"""Whole files: what makes one unusable, the prompt, the sampling settings, and which files are read."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kl.input.problems import WHAT_TO_DO
from kl.input.responses import ResponseFile, list_files, parse_responses, read_responses
from kl.records import Prompt, Sampling, Turn

SECRET = "the secret of the prompt"


def good_document() -> dict[str, Any]:
    """Two responses of one token each."""
    row = {"token": "Hello", "logprob": -0.5, "top_logprobs": [{"token": "Hello", "logprob": -0.5}]}
    response = {"text": "Hello", "logprobs": {"content": [row]}}
    return {"prompt": SECRET, "responses": [response, dict(response)]}


def read(document: Any) -> ResponseFile:
    return parse_responses(json.dumps(document).encode(), "sub/a.json")


def kinds(file: ResponseFile) -> list[tuple[int | None, int | None, str, bool]]:
    return [(p.response_idx, p.position, p.kind, p.repaired) for p in file.problems]


@dataclass(frozen=True)
class BadFile:
    """Bytes of a file of which nothing can be used."""

    id: str
    data: bytes
    kind: str
    shown: str = ""
    n_responses: int = 0


def spoiled(**values: Any) -> bytes:
    return json.dumps({**good_document(), **values}).encode()


def without(key: str) -> bytes:
    return json.dumps({k: v for k, v in good_document().items() if k != key}).encode()


def turns(*roles: str, **more: Any) -> bytes:
    return spoiled(prompt=[{"role": role, "content": SECRET} for role in roles], **more)


GOOD_TEXT = json.dumps(good_document())
BAD_FILES = [
    BadFile("empty", b"", "not-json", "the file is empty"),
    BadFile("cut off", GOOD_TEXT[:60].encode(), "not-json", "line 1"),
    BadFile("UTF-16", GOOD_TEXT.encode("utf-16"), "not-utf8", "UTF-16"),
    BadFile("UTF-16 without BOM", GOOD_TEXT.encode("utf-16-le"), "not-utf8", "UTF-16-LE"),
    BadFile("Latin-1", '{"prompt": "é"}'.encode("latin-1"), "not-utf8", "byte 12 of the file (0xe9)"),
    BadFile("nested too deeply", b"[" * 200_000, "nested-too-deeply"),
    BadFile("lines for two prompts", b'{"prompt": "a", "responses": []}\n{"prompt": "b", "responses": []}\n',
            "several-prompts", "2 objects (JSONL, one a line, or a list), for 2 prompts"),
    BadFile("a list", b"[]", "not-an-object", "an empty list"),
    BadFile("NaN alone", b"NaN", "not-an-object", "nan"),
    BadFile("null", b"null", "not-an-object", "null"),
    BadFile("an integer of 5,000 digits", b"-" + b"7" * 5000, "not-an-object", "-inf"),
    BadFile("key twice", b'{"prompt": "a", "prompt": "b", "responses": []}', "repeated-key", "'prompt'"),
    BadFile("no prompt", without("prompt"), "no-prompt", "missing", 2),
    BadFile("null prompt", spoiled(prompt=None), "no-prompt", "null", 2),
    BadFile("prompt is a number", spoiled(prompt=3), "bad-prompt", "3", 2),
    BadFile("empty prompt", spoiled(prompt=""), "empty-prompt", n_responses=2),
    BadFile("no turns", spoiled(prompt=[]), "empty-prompt", n_responses=2),
    BadFile("only a system turn", turns("system"), "empty-prompt", "no user turn", 2),
    BadFile("empty turn", spoiled(prompt=[{"role": "user", "content": []}]), "empty-prompt", n_responses=2),
    BadFile("turn is a text", spoiled(prompt=[SECRET]), "bad-prompt", "turn 0", 2),
    BadFile("turn without content", spoiled(prompt=[{"role": "user"}]), "bad-prompt", "turn 0", 2),
    BadFile("unknown role", turns("user", "tool"), "unknown-role", "turn 1 of the prompt has the role 'tool'", 2),
    BadFile("role is a list", spoiled(prompt=[{"role": ["user"], "content": "a"}]), "unknown-role", "a list of 1", 2),
    BadFile("late system turn", turns("user", "system"), "unknown-role", "only the first turn", 2),
    BadFile("ends with a model turn", turns("user", "assistant"), "prompt-end", "'assistant'", 2),
    BadFile("two system texts", turns("system", "user", system="Be brief."), "two-system-texts", n_responses=2),
    BadFile("system is a number", spoiled(system=1), "bad-prompt", "`system` is 1", 2),
    BadFile(
        "image in the prompt", spoiled(prompt=[{"role": "user", "content": [{"type": "image_url", "text": SECRET}]}]),
        "bad-prompt", "'image_url'", 2,
    ),
    BadFile("lone surrogate in the prompt", spoiled(prompt="a\ud83d"), "lone-surrogate", n_responses=2),
    BadFile("goes on from a prefix", spoiled(continues={"prefix": "He"}), "continues-prefix", "`continues`", 2),
    BadFile("no responses", without("responses"), "no-responses", "missing"),
    BadFile("empty responses", spoiled(responses=[]), "no-responses", "an empty list"),
    BadFile("responses is an object", spoiled(responses={}), "bad-responses", "an object"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES, ids=lambda case: case.id)
def test_unusable_file_is_named_and_its_responses_keep_their_places(case: BadFile) -> None:
    file = parse_responses(case.data, "sub/a.json")
    assert kinds(file) == [(None, None, case.kind, False)]
    (message,) = [p.message for p in file.problems]
    assert message.startswith("sub/a.json: ")
    assert case.shown in message
    assert "\n" not in message
    assert SECRET not in message
    assert message.endswith(WHAT_TO_DO[case.kind])
    assert file.n_responses == case.n_responses
    assert file.responses == ()
    assert [(u.response_idx, u.kind) for u in file.unreadable] == [(i, case.kind) for i in range(case.n_responses)]
    assert all(u.text == "Hello" for u in file.unreadable)


def test_every_kind_of_defect_of_a_file_has_a_case() -> None:
    of_files = set(WHAT_TO_DO) & {"unreadable-file", *(case.kind for case in BAD_FILES)}
    of_a_response = {"repeated-key", "lone-surrogate"}
    assert len(of_files - of_a_response) == 15, sorted(of_files)


def test_byte_order_mark_is_no_problem() -> None:
    assert parse_responses(b"\xef\xbb\xbf" + GOOD_TEXT.encode(), "sub/a.json") == read(good_document())


def test_turns_and_system_text_become_a_prompt() -> None:
    parts = [{"type": "text", "text": "Why "}, {"text": "so?"}]
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "No."},
        {"role": "model", "content": "No!"},
        {"role": "user", "content": parts},
    ]
    expected = (Turn("user", "Hi"), Turn("model", "No."), Turn("model", "No!"), Turn("user", "Why so?"))
    assert parse_responses(spoiled(prompt=prompt), "a").prompt == Prompt(expected, "Be brief.")
    assert parse_responses(spoiled(prompt=prompt[1:], system="Be brief."), "a").prompt == Prompt(expected, "Be brief.")
    assert parse_responses(spoiled(system=""), "a").prompt == Prompt((Turn("user", SECRET),))


SAMPLINGS = [
    ("nowhere", {}, {}, Sampling(), 0),
    ("in the file", {"sampling": {"temperature": 1, "top_p": 0.95, "top_k": 40.0}}, {}, Sampling(1.0, 0.95, 40), 0),
    ("beside the responses", {"temperature": 0, "top_k": -1}, {}, Sampling(0.0, None, -1), 0),
    (
        "response over file",
        {"temperature": 1.0, "top_p": 1.0},
        {"sampling": {"temperature": 0.7}},
        Sampling(0.7, 1.0),
        0,
    ),
    ("equal in two places", {}, {"sampling": {"top_p": 1}, "top_p": 1.0}, Sampling(None, 1.0), 0),
    ("different in two places", {}, {"sampling": {"top_p": 1}, "top_p": 0.9}, Sampling(), 1),
    ("bad one never falls back to the file", {"temperature": 1.0}, {"temperature": -1}, Sampling(), 1),
    ("NaN", {}, {"temperature": float("nan")}, Sampling(), 1),
    ("top_p above one", {}, {"top_p": 1.5}, Sampling(), 1),
    ("half a top_k", {}, {"top_k": 2.5}, Sampling(), 1),
    ("not an object", {"temperature": 1.0}, {"sampling": "greedy"}, Sampling(), 1),
]


@pytest.mark.parametrize(
    ("of_file", "of_response", "expected", "n"), [pytest.param(*s[1:], id=s[0]) for s in SAMPLINGS]
)
def test_sampling_settings(of_file: dict[str, Any], of_response: dict[str, Any], expected: Sampling, n: int) -> None:
    document = {**good_document(), **of_file}
    document["responses"][0].update(of_response)
    file = read(document)
    assert file.responses[0].sampling == expected
    assert kinds(file) == [(0, None, "bad-sampling", True)] * n


def test_file_is_read_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(good_document(), ensure_ascii=False), encoding="utf-8")
    assert read_responses(path, "sub/a.json") == read(good_document())


@pytest.mark.parametrize("make", ["missing", "directory", "locked", "broken link", "NUL in name"])
def test_unreadable_file_is_a_problem(tmp_path: Path, make: str) -> None:
    path = tmp_path / ("a\0.json" if make == "NUL in name" else "a.json")
    if make == "directory":
        path.mkdir()
    elif make == "broken link":
        path.symlink_to(tmp_path / "gone.json")
    elif make == "locked":
        path.write_text(GOOD_TEXT)
        path.chmod(0)
        try:
            path.read_bytes()
        except PermissionError:
            pass
        else:
            pytest.skip("this user may read locked files")
    file = read_responses(path, "a.json")
    assert kinds(file) == [(None, None, "unreadable-file", False)]
    assert (file.n_responses, file.responses, file.unreadable) == (0, (), ())


def test_files_are_listed_sorted_and_only_files(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "sub/c.json", "sub/deep/a.json", "note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "broken.json").symlink_to(tmp_path / "gone")

    def names(pattern: str, max_files: int | None = None) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path, pattern, max_files)]

    assert names("*.json") == ["a.json", "b.json", "broken.json"]
    assert names("**/*.json") == ["a.json", "b.json", "broken.json", "sub/c.json", "sub/deep/a.json"]
    assert names("**/*.json", 2) == ["a.json", "b.json"]
    assert names("none*") == []


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*.json", "**.json"])
def test_unusable_pattern_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        list_files(tmp_path, pattern, None)


def test_missing_input_directory_and_negative_limit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        list_files(tmp_path / "nowhere", "*.json", None)
    with pytest.raises(ValueError, match="max_files=-1"):
        list_files(tmp_path, "*.json", -1)


def test_reading_time_grows_linearly() -> None:
    def seconds(n: int) -> float:
        top = [{"token": f" t{i}", "logprob": -0.7 - i, "token_id": i} for i in range(20)]
        rows = [{**top[0], "top_logprobs": top}] * n
        data = json.dumps({"prompt": "p", "responses": [{"text": " t0" * n, "logprobs": {"content": rows}}]}).encode()
        start = time.process_time()
        file = parse_responses(data, "a.json")
        spent = time.process_time() - start
        assert len(file.responses[0].positions) == n
        return spent

    seconds(100)
    assert seconds(8000) < 20 * max(seconds(1000), 0.02)  # 8 for a linear reader, 64 for a quadratic one
