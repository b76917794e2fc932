"""Q from files: which context of P a logged list belongs to, and what is said where none does."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import ScoreRequest
from backends.contract import CASES, Check, Subject, checks_for
from backends.contract.subject import Case
from backends.errors import ConfigError, ModelNotUsableError
from backends.files.backend import FilesBackend
from backends.storage import as_location, remove_folder, write_bytes_atomic
from flows.config.backend import check_capabilities
from flows.config.models import RunConfig
from kl.records import Candidate, Prompt, Score, ScoreFailure, Turn

FIRST_ID = 1000


def token_ids(tokens: Sequence[str], shift: int = 0) -> list[int]:
    return [FIRST_ID + shift + sum(map(ord, token)) for token in tokens]


def law(tokens: Sequence[str], at: int, model: str) -> list[tuple[str, float]]:
    """A list that depends on the context and the model, the sampled token in it."""
    p = 0.5 + (hash_of("".join(tokens[:at]) + model) % 40) / 100
    return [(tokens[at], math.log(p)), (" other", math.log((1 - p) / 2)), (" third", math.log((1 - p) / 4))]


def hash_of(text: str) -> int:
    return sum((index + 1) * ord(letter) for index, letter in enumerate(text))


def response(
    tokens: Sequence[str], model: str | None = "q", ids: Sequence[int] | None = None, salt: str = "", **changes: Any
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for at, token in enumerate(tokens):
        top = [{"token": text, "logprob": value} for text, value in law(tokens, at, (model or "") + salt)]
        rows.append({**top[0], "bytes": [*token.encode()], "top_logprobs": top})
        if ids is not None:
            rows[-1]["token_id"] = ids[at]
    named = {} if model is None else {"model": model}
    return {**named, "text": "".join(tokens), "logprobs": {"content": rows}, **changes}


def document(prompt: str | list[dict[str, str]], *responses: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"prompt": prompt, "responses": [*responses], **changes}


def logged(folder: Path, **documents: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def asked(prompt: str, tokens: Sequence[str], model: str = "q", **changes: Any) -> ScoreRequest:
    ends = tuple(sum(map(len, tokens[:at])) for at in range(len(tokens)))
    fields: dict[str, Any] = {"token_ids": None, "positions": tuple(range(len(tokens))), "top_logprobs": 20, **changes}
    keys = tuple(f"{prompt}/{position}" for position in fields["positions"])
    turns = Prompt((Turn("user", prompt),), fields.pop("system", None))
    return ScoreRequest("r", model, turns, "".join(tokens), ends, keys=keys, **fields)


def answers(folder: Path, *requests: ScoreRequest, **options: Any) -> dict[str, Score | ScoreFailure]:
    async def work() -> dict[str, Score | ScoreFailure]:
        async with FilesBackend(FilesBackend.Options(dir=folder, **options)) as backend:
            return {result.key: result async for result in backend.score(requests)}

    return asyncio.run(work())


def said(results: dict[str, Score | ScoreFailure]) -> list[str | float]:
    """The first log-probability of each answer, or the reason."""
    return [result.reason if isinstance(result, ScoreFailure) else result.top[0].logprob or 0.0
            for result in results.values()]  # fmt: skip


TOKENS = [" The", " sky", " is", " blue", "."]


def expected(tokens: Sequence[str], model: str = "q") -> list[float]:
    return [law(tokens, at, model)[0][1] for at in range(len(tokens))]


def test_lists_on_ps_own_tokens_answer_every_position(tmp_path: Path) -> None:
    folder = logged(tmp_path / "q", a=document("Why?", response(TOKENS)))
    assert said(answers(folder, asked("Why?", TOKENS))) == expected(TOKENS)
    results = answers(folder, asked("Why?", TOKENS, top_logprobs=2))
    assert [[c.token for c in result.top] for result in results.values() if isinstance(result, Score)] == [
        [token, " other"] for token in TOKENS
    ]


def test_qs_value_of_its_own_token_is_kept_where_its_list_lacks_that(tmp_path: Path) -> None:
    q = response(TOKENS)
    q["logprobs"]["content"][1] |= {"token": " sea", "logprob": -7.0, "bytes": [*b" sea"]}
    q["text"] = " The sea is blue."
    folder = logged(tmp_path / "q", a=document("Why?", q))
    result = answers(folder, asked("Why?", [" The", " sea"]))["Why?/1"]
    assert isinstance(result, Score)
    assert result.sampled == Candidate(" sea", -7.0, None, b" sea")
    assert " sea" not in [candidate.token for candidate in result.top]


def test_any_response_that_begins_alike_answers_as_far_as_it_goes(tmp_path: Path) -> None:
    other = [*TOKENS[:3], " grey", "!"]
    folder = logged(tmp_path / "q", a=document("Why?", response(["Sky"]), response(other)))
    found = answers(folder, asked("Why?", TOKENS))
    # At the position after the shared tokens the other response has its list, too.
    first = law(["Sky"], 0, "q")[0][1]
    assert said(found) == [first, *expected(other)[1:4], "not-in-files"]
    failure = [*found.values()][-1]
    assert isinstance(failure, ScoreFailure)
    assert failure.final
    assert "no response of 'q' in the files begins with these 4 tokens" in failure.message


def test_ones_own_text_goes_before_others_and_names_and_order_of_files_say_nothing(tmp_path: Path) -> None:
    own, other = document("Why?", response(TOKENS)), document("Why?", response([" The", " sea"]), response(["x"]))
    one = logged(tmp_path / "one", a=own, b=other)
    two = logged(tmp_path / "two", z=own, c=other)
    os.utime(two / "z.json", (1, 1))
    request = asked("Why?", [" The", " sky", " was"])
    assert answers(one, request) == answers(two, request)
    assert said(answers(one, asked("Why?", TOKENS))) == said(answers(two, asked("Why?", TOKENS))) == expected(TOKENS)
    assert identity(one) == identity(two)


def test_a_log_of_raw_prompts_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = {"tokens": [" So"], "token_logprobs": [-0.2], "top_logprobs": [{" So": -0.2, " It": -2.0}]}
    choice = {"index": 0, "text": " So", "logprobs": columns}
    raw = {prompt: {"request": {"prompt": prompt}, "response": {"model": "q", "choices": [choice]}} for prompt in "ab"}
    answers(logged(tmp_path / "raw", **raw), asked("a", [" So"]), asked("b", [" So"]))
    assert [record.message for record in caplog.records if "without a chat template" in record.message] != []
    assert len(caplog.records) == 1
    answers(logged(tmp_path / "chat", a=document("a", response([" So"]))), asked("a", [" So"]))
    assert len(caplog.records) == 1


def identity(folder: Path) -> dict[str, Any]:
    return FilesBackend.identity(FilesBackend.Options(dir=folder), asked("Why?", TOKENS))


def test_a_changed_file_is_another_identity_and_ends_a_run_that_began_before(tmp_path: Path) -> None:
    folder = logged(tmp_path / "q", a=document("Why?", response(TOKENS)))
    before = identity(folder)
    options = asyncio.run(FilesBackend(FilesBackend.Options(dir=folder)).discover("q", call=False))
    assert options.model_dump()["content_sha256"] == before["files_sha256"]
    logged(folder, a=document("Why?", response([*TOKENS, "!"])))
    assert identity(folder) != before
    assert said(answers(folder, asked("Why?", [*TOKENS, "!"]))) == expected([*TOKENS, "!"])

    async def work() -> None:
        async with FilesBackend(options) as backend:
            async for _ in backend.score([asked("Why?", TOKENS)]):
                pass

    with pytest.raises(ConfigError, match="changed while the run read it"):
        asyncio.run(work())


def test_prompts_that_differ_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = logged(tmp_path / "q", a=document("Why?", response(TOKENS), system="Be brief."))
    requests = [asked("Why?", TOKENS), asked("How?", TOKENS), asked("Why?", TOKENS, system="Be brief.")]
    found = [said(answers(folder, request)) for request in requests]
    assert found == [["not-in-files"] * 5, ["not-in-files"] * 5, expected(TOKENS)]
    assert "1 in them end with the same turn and have another system text" in caplog.messages[0]
    assert "no file of" in caplog.messages[1]
    assert "end with the same turn" not in caplog.messages[1]
    assert len(caplog.messages) == 2


def test_an_empty_system_text_is_none(tmp_path: Path) -> None:
    folder = logged(tmp_path / "q", a=document("Why?", response(TOKENS)))
    assert said(answers(folder, asked("Why?", TOKENS, system=""))) == expected(TOKENS)


def test_the_model_is_the_one_that_the_files_name_or_any(tmp_path: Path) -> None:
    folder = logged(tmp_path / "q", a=document("Why?", response(TOKENS), response(TOKENS, "p", model_version="p-1")),
                    b=document("How?", response(TOKENS, None)))  # fmt: skip
    for model in ("p", "p-1"):
        assert said(answers(folder, asked("Why?", TOKENS, model))) == expected(TOKENS, "p")
    assert said(answers(folder, asked("How?", TOKENS))) == ["not-in-files"] * 5
    assert said(answers(folder, asked("How?", TOKENS, "any"))) == expected(TOKENS, "")

    def preflight(model: str) -> str | None:
        return asyncio.run(FilesBackend(FilesBackend.Options(dir=folder)).preflight(model))

    assert [preflight(model) for model in ("q", "p")] == ["q", "p-1"]
    with pytest.raises(ModelNotUsableError, match=r"model 'x'; there are: .*no name \(1 responses\)"):
        preflight("x")


def test_text_in_other_tokens_is_another_context(tmp_path: Path) -> None:
    folder = logged(tmp_path / "q", a=document("Why?", response([" The sky", " is", " blue", "."])))
    assert said(answers(folder, asked("Why?", TOKENS))) == [
        law([" The sky"], 0, "q")[0][1], "not-in-files", "retokenised", "retokenised", "retokenised",
    ]  # fmt: skip


def test_ids_tell_tokens_of_one_vocabulary_apart(tmp_path: Path) -> None:
    ids = token_ids(TOKENS)
    folder = logged(tmp_path / "q", a=document("Why?", response(TOKENS, ids=[ids[0], 7, *ids[2:]])))
    request = asked("Why?", TOKENS, token_ids=tuple(ids))
    assert said(answers(folder, request)) == [*expected(TOKENS)[:2], *["retokenised"] * 3]
    foreign = asked("Why?", TOKENS, token_ids=tuple(token_ids(TOKENS, shift=50_000)))
    assert said(answers(folder, foreign)) == expected(TOKENS), "ids of another vocabulary say nothing"


def test_a_position_inside_a_character_is_found_by_ids_alone(tmp_path: Path) -> None:
    tokens = [" a", " b", "\ufffd", "\ufffd", "."]
    ids = [11, 12, 21, 22, 13]
    q = response(tokens, ids=ids)
    for row, stated in zip(q["logprobs"]["content"][2:4], ([0xC3], [0xA9]), strict=True):
        row["bytes"] = stated
    q["text"] = " a bé."
    folder = logged(tmp_path / "q", a=document("Why?", q))
    fields: dict[str, Any] = {"gaps": ((3, "partial-character"),)}
    request = asked("Why?", [" a", " b", "", "é", "."], token_ids=tuple(ids), **fields)
    assert said(answers(folder, request)) == expected(tokens)
    assert said(answers(folder, asked("Why?", [" a", " b", "", "é", "."], **fields)))[3] == "partial-character"


def test_a_list_that_cannot_be_used_has_its_reason(tmp_path: Path) -> None:
    q = response(TOKENS * 4)
    q["logprobs"]["content"][1]["top_logprobs"] = [{"token": "x", "logprob": 1.0}]
    q["logprobs"]["content"][2]["may_lack"] = True
    folder = logged(tmp_path / "q", a=document("Why?", q))
    assert said(answers(folder, asked("Why?", TOKENS)))[:4] == [
        expected(TOKENS)[0], "positive-logprob", "overwritten-entries", expected(TOKENS)[3],
    ]  # fmt: skip
    logged(folder, b=document("Why?", response(TOKENS)))
    assert said(answers(folder, asked("Why?", TOKENS))) == expected(TOKENS), "another response has them"


def test_files_of_many_prompts_and_forms_are_one_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "q"
    folder.mkdir()
    rows = [
        {"request": {"messages": [{"role": "user", "content": f"Q{n % 20}"}]}, "response": {"model": "q", "choices": [
            {"index": 0, "message": {"content": "".join(TOKENS)}, "logprobs": response(TOKENS)["logprobs"]}]}}
        for n in range(40)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "broken.json").write_text("{")
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    logged(folder, part=document("Q3", {"text": "x"}))
    found = answers(folder, *(asked(f"Q{n}", TOKENS) for n in range(21)))
    assert said(found) == expected(TOKENS) * 20 + ["not-in-files"] * 5
    shown = "\n".join(caplog.messages)
    for line in ("broken.json answers nothing: broken.json: not JSON", "gone.json cannot be read: No such file",
                 "part.json, response 0: `logprobs` is missing"):  # fmt: skip
        assert shown.count(line) == 1


def test_files_in_a_bucket_answer_as_those_on_a_disk(tmp_path: Path) -> None:
    bucket = as_location("memory://logs/q")
    content = [document("Why?", response(TOKENS)), document("How?", response(TOKENS[:2]))]
    write_bytes_atomic(bucket / "log.json", json.dumps(content).encode())
    folder = logged(tmp_path / "q", log=content)
    try:
        requests = [asked("Why?", TOKENS), asked("How?", TOKENS)]
        assert answers(bucket, *requests) == answers(folder, *requests)
        assert identity(bucket) == identity(folder)
    finally:
        remove_folder(bucket)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({"dir": "nowhere"}, "does not exist"), ({"pattern": "*.txt"}, "matches '\\*.txt'")],
    ids=["folder", "pattern"],
)
def test_files_that_are_not_there_are_the_users_mistake(changes: dict[str, Any], shown: str, tmp_path: Path) -> None:
    folder = logged(tmp_path / "q", a=document("Why?", response(TOKENS)))
    with pytest.raises(ConfigError, match=shown):
        FilesBackend.identity(FilesBackend.Options(**{"dir": folder, **changes}), asked("Why?", TOKENS))


def test_a_noise_floor_is_refused_as_nothing_is_answered_anew(tmp_path: Path) -> None:
    config = RunConfig(input_dir=tmp_path, output_dir=tmp_path / "out", model2="q", noise_floor={"fraction": 0.5})
    with pytest.raises(ConfigError, match="one answer to each on record"):
        check_capabilities(config, FilesBackend)


# The contract. Empty tokens in the middle say nothing that a file could be asked about.
CASES_OF_FILES = [
    *(case for case in CASES if "" not in case.tokens),
    Case("control tokens", Prompt((Turn("user", "Show me <eos>."),)), ("<|im_end|>", "\n", "\t", "</s>", "\r\n", "  ")),
]


def turns_of(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt.turns]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("files")
    for number, case in enumerate(CASES_OF_FILES):
        ids = token_ids(case.tokens, shift=100_000 * number)
        own = response(case.tokens, ids=ids)
        logged(folder / "q", **{f"c{number}": document(turns_of(case.prompt), own, system=case.prompt.system)})
        # What a backend would be asked that drops a part of the prompt.
        less = {
            "system": replace(case.prompt, system=None),
            "turns": replace(case.prompt, turns=case.prompt.turns[-1:]),
        }
        for name, prompt in less.items():
            if prompt != case.prompt and case.prompt.system != "":
                other = document(turns_of(prompt), response(case.tokens, salt=name), system=prompt.system)
                logged(folder / "q", **{f"c{number}-{name}": other})
    more = logged(folder / "more", a=document("Other.", response(["x"])))
    return Subject(FilesBackend, "q", "nobody", {"dir": str(folder / "q")}, [{"dir": str(more)}], CASES_OF_FILES)


@pytest.mark.parametrize("check", checks_for(Subject(FilesBackend, "q", "nobody")), ids=str)
def test_contract(check: Check, subject: Subject) -> None:
    check.run(subject)
