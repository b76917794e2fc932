"""``python -m flows.convert``: what the readers say of a file they say of its conversion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.commands.convert import main
from kl.input.responses import read_responses
from kl.records import Response
from tests import ROOT

GOOD = json.loads((ROOT / "examples/responses/001_write-a-haiku-about-the-sea-with-an-emoj.json").read_text())
CONTENT = GOOD["responses"][0]["logprobs"]["content"]
TEXT = GOOD["responses"][0]["text"]


def chat(content: Any = CONTENT, **changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": {"content": content}}
    return {"id": "c-1", "object": "chat.completion", "model": "m", "choices": [choice], **changes}


def asked(prompt: str, **settings: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], **settings}


def written(folder: Path, documents: dict[str, Any]) -> Path:
    for name, document in documents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, document)) if name.endswith("l") else json.dumps(document))
    return folder


def responses_in(path: Path) -> list[Response]:
    return [replace(response, source_file="", response_idx=0) for response in read_responses(path).responses]


LOSSY = [{**row, "top_logprobs": {e["token"]: e["logprob"] for e in row["top_logprobs"]}} for row in CONTENT]
LOSSY[2]["top_logprobs"] = {"": LOSSY[2]["logprob"], " x": -9.0}
NAN = [*CONTENT[:3], {**CONTENT[3], "top_logprobs": [{"token": "x", "logprob": float("nan")}]}, *CONTENT[4:]]
STATED = asked("Hi.", temperature=0.5, top_p=0.9, logit_bias={"5": 1})
FORMS = {
    "the documented form": GOOD,
    "chat with its request": {"request": STATED, "response": {"body": chat(system_fingerprint="x")}},
    "lists that may lack entries": {"prompt": "Hi.", "responses": [{"text": TEXT, "logprobs": {"content": LOSSY}}]},
    "a position that cannot be used": {"prompt": "Hi.", **chat(NAN)},
    "llama.cpp": {"request": STATED, "response": chat([
        {"id": row["token_id"], **{k: v for k, v in row.items() if k != "token_id"}} for row in CONTENT])},
    "several turns": {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}], **chat()},
}  # fmt: skip


@pytest.mark.parametrize("document", FORMS.values(), ids=FORMS.keys())
def test_a_conversion_is_read_as_its_source(document: dict[str, Any], tmp_path: Path) -> None:
    source = written(tmp_path / "in", {"a.json": document})
    assert main([str(source), str(tmp_path / "out")]) == 0
    before, after = (responses_in(tmp_path / name / "a.json") for name in ("in", "out"))
    assert len(before) == len(after) == 1
    for one, other in zip(before[0].positions, after[0].positions, strict=True):
        assert (one.sampled, one.top, one.may_lack) == (other.sampled, other.top, other.may_lack)
        assert (one.defect is None) == (other.defect is None)
    assert replace(before[0], positions=()) == replace(after[0], positions=())
    form = json.loads((tmp_path / "out/a.json").read_text())
    assert isinstance(form["responses"][0]["logprobs"]["content"][0]["top_logprobs"], list)


def test_lines_with_requests_elsewhere_become_a_file_per_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"custom_id": f"r{n}", "response": {"status_code": 200, "body": chat()}} for n in range(4)]
    rows[3]["response"]["body"] = {"error": {"message": "too long"}}
    source = written(tmp_path / "in", {"batch.jsonl": rows, "sub/one.json": chat()})
    requests = [
        {"custom_id": f"r{n}", "method": "POST", "body": asked(f"Prompt {n % 2}", temperature=1)} for n in range(4)
    ]
    written(tmp_path, {"requests.jsonl": [*requests, {"id": "one", "prompt": "Of one file."}]})
    arguments = [str(source), str(tmp_path / "out"), "--pattern", "**/*.json*"]

    assert main(arguments) == 3
    assert "batch.jsonl: a raw answer of chat completions, and `prompt` is missing" in capsys.readouterr().err
    assert main([*arguments, "--requests", str(tmp_path / "requests.jsonl")]) == 3
    shown = capsys.readouterr()
    assert "batch.jsonl#1, response 1: the service answered with an error: 'too long'" in shown.err
    out = {path.relative_to(tmp_path / "out").as_posix(): json.loads(path.read_text()) for path in
           (tmp_path / "out").rglob("*.json")}  # fmt: skip
    assert {name: (form["prompt"], len(form["responses"])) for name, form in out.items()} == {
        "batch_0000.json": ("Prompt 0", 2), "batch_0001.json": ("Prompt 1", 1), "sub/one.json": ("Of one file.", 1),
    }  # fmt: skip
    assert out["batch_0000.json"]["responses"][0]["sampling"] == {"temperature": 1}
    assert out["sub/one.json"]["responses"][0]["logprobs"]["content"] == CONTENT


def test_what_is_there_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "in", {"a.json": {"prompt": "x", **chat()}, "a.jsonl": [{"prompt": "y", **chat()}]})
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.json").write_text("mine")
    assert main([str(source), str(out)]) == 3
    assert f"{out / 'a.json'} holds something else and is left alone" in capsys.readouterr().err
    assert (out / "a.json").read_text() == "mine"
    (out / "a.json").unlink()
    assert main([str(source), str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"a.json", "a.jsonl.json"}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    capsys.readouterr()
    assert main([str(source / "a.json"), str(out)]) == 0
    assert "there already  1" in capsys.readouterr().out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["in", "in"], "OUT is IN"),
        (["in", "out", "--pattern", "*.txt"], "matches '*.txt'"),
        (["nowhere", "out"], "does not exist"),
        (["in", "out", "--requests", "in/a.json"], "row 0 has none of custom_id, key, id"),
        (["in/a.json", "out", "--pattern", "*"], "--pattern is for a folder"),
        (["in"], "OUT"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_in_the_call_is_one_line(
    arguments: list[str],
    shown: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written(tmp_path / "in", {"a.json": {"prompt": "x"}})
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert shown in lines[0]
    assert not (tmp_path / "out").exists()


def test_links_in_a_circle_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "in", {"good.json": GOOD})
    (folder / "a.json").symlink_to("a.json")
    assert main([str(folder), str(tmp_path / "out")]) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.json"]
    assert capsys.readouterr().err.startswith("a.json: the file cannot be read: Too many levels of symbolic links.")
    assert main([str(folder / "a.json"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
