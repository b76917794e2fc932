"""Which prompts are asked: the forms of data sets, filters, orders, and what cannot be used."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.errors import ConfigError, MissingDependencyError
from flows.config.reading import validate
from flows.config.sampling import SampleConfig
from flows.sampling.prompts import Prompts, find_prompts
from kl.records import Prompt, Turn

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Ho"},
]
RECORDS = [
    {"prompt": "One", "language": "English", "other": {"text": ["a", "b"]}},
    {"prompt": TURNS, "language": "English", "system": "Be brief"},
    {"prompt": "Drei", "language": "German"},
    {"question": "no prompt"},
    {"prompt": 5},
    "Plain",
    {"prompt": "A rather longer prompt", "language": "English"},
]


def config(**settings: Any) -> SampleConfig:
    return validate(SampleConfig, {"backend": "local", "model1": "m", "output_dir": "out"} | settings)


def asked(**dataset: Any) -> Prompts:
    return find_prompts(config(dataset=dataset), None)


def texts(prompts: Prompts) -> list[str]:
    return [item.prompt.turns[-1].content for item in prompts.asked]


@pytest.fixture(params=["json", "jsonl"])
def records(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / f"data.{request.param}"
    lines = [json.dumps(record) for record in RECORDS]
    path.write_text(json.dumps(RECORDS) if request.param == "json" else "\n".join(lines) + "\n")
    return {request.param: str(path)}


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffOne\u2028still one\n\n  Two \r\nOne\u2028still one\n", encoding="utf-8")
    assert texts(asked(file=str(path))) == ["One\u2028still one", "Two"]
    assert asked(file=str(path)) == asked(source="file", file_path=str(path))
    assert texts(asked(file=str(path), num_prompts=1)) == ["One\u2028still one"]


def test_records_with_texts_or_turns_and_what_cannot_be_used_is_a_line_each(
    records: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = asked(**records)
    assert texts(found) == ["One", "Ho", "Drei", "Plain", "A rather longer prompt"]
    turns = (Turn("user", "Hi"), Turn("model", "Hello"), Turn("user", "Ho"))
    assert found.asked[1].prompt == Prompt(turns, "Be brief")
    assert found.n_unusable == 2
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "record 3 has no 'prompt' (it has question); set dataset.prompt_field" in lines[0]
    assert "record 4" in lines[1]
    assert "`prompt` is 5" in lines[1]


def test_filters_and_fields(records: dict[str, Any]) -> None:
    assert texts(asked(**records, language="English")) == ["One", "Ho", "Plain", "A rather longer prompt"]
    assert texts(asked(**records, min_length=5, max_length=10)) == ["Ho", "Plain"]  # Ho is nine characters in all
    assert texts(asked(**records, prompt_field="other.text.1")) == ["b", "Plain"]
    assert texts(asked(**records, num_prompts=2)) == ["One", "Ho"]


def test_random_prompts_depend_on_the_seed_and_more_begin_with_the_same(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(map(str, range(100))))
    dataset = {"file": str(path), "sampling_mode": "random", "seed": 1}
    ten, twenty = texts(asked(**dataset, num_prompts=10)), texts(asked(**dataset, num_prompts=20))
    assert twenty[:10] == ten != sorted(ten)
    assert texts(asked(**dataset | {"seed": 2}, num_prompts=10)) != ten
    assert sorted(texts(asked(**dataset))) == sorted(map(str, range(100)))


def test_the_text_of_the_backend_goes_before_that_of_the_record_and_this_before_that_of_the_run(
    records: dict[str, Any],
) -> None:
    settings = config(dataset=records, system="of the run")
    assert [item.prompt.system for item in find_prompts(settings, None).asked][:2] == ["of the run", "Be brief"]
    assert {item.prompt.system for item in find_prompts(settings, "of the backend").asked} == {"of the backend"}
    assert {item.prompt.system for item in find_prompts(settings, "").asked} == {None}


@pytest.mark.parametrize(
    ("content", "dataset", "message"),
    [
        (None, {"file": "F"}, "cannot be read: No such file"),
        (b"\xff\xfe", {"file": "F"}, "is not UTF-8"),
        (b"{", {"json": "F"}, "is not JSON"),
        (b"{}", {"json": "F"}, "it must be a list"),
        (b'"a"\n{', {"jsonl": "F"}, "line 2 of"),
        (b"\n", {"file": "F"}, "no prompt is left"),
        (b"a", {"file": "F", "min_length": 2}, "no prompt is left to sample: none fits"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    content: bytes | None, dataset: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    placed = {name: str(path) if value == "F" else value for name, value in dataset.items()}
    with pytest.raises(ConfigError, match=message):
        asked(**placed)


def test_a_data_set_of_the_hub_is_loaded_where_the_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "chats"
    folder.mkdir()
    rows = [{"conversation": [{"role": "user", "content": f"Question {i}"}], "language": "English"} for i in range(3)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(asked(huggingface=str(folder), use_wildchat_format=True, num_prompts=2)) == [
        "Question 0",
        "Question 1",
    ]
    with pytest.raises(ConfigError, match=r"split 'test', cannot be loaded: ValueError: Unknown split"):
        asked(huggingface=str(folder), split="test")


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"which is not installed: .*hf-datasets"):
        asked(source="huggingface", dataset_name="allenai/WildChat")


def test_both_forms_of_the_settings_mean_the_same() -> None:
    short = config(
        project_id="p", num_responses=3, output_dir="base/name", sampling={"top_logprobs": 7}, prompts=["Hi"],
        backend={"name": "local", "system": "s"},
    )  # fmt: skip
    long = validate(
        SampleConfig,
        {
            "backend": "local",
            "models": ["m"],
            "api": {"project_id": "p", "location": None, "system": "s"},
            "sampling": {"num_samples_per_prompt": 3, "logprobs": 7, "response_logprobs": True},
            "output": {"base_dir": "base/", "experiment_name": "name"},
            "prompts": ["Hi"],
        },
    )
    assert short.model_dump() == long.model_dump()
    assert validate(SampleConfig, short.model_dump()) == short


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["other"]}, r"models is \['other'\], but model1 is \['m'\]"),
        ({"model1": None}, "no model is set"),
        ({"model1": None, "models": ["a", "a"]}, "names one twice"),
        ({"model1": None, "models": ["a/b", "a_b"]}, "would share a folder"),
        ({"output": {"base_dir": "x"}}, "output_dir is 'out', but output is 'x'"),
        ({"output_dir": None}, "output_dir is not set"),
        (
            {"num_responses": 2, "sampling": {"num_samples_per_prompt": 3}},
            "num_responses is 2, but sampling.num_samples",
        ),
        ({"sampling": {"logprobs": 3, "top_logprobs": 4}}, "top_logprobs is 4, but sampling.logprobs is 3"),
        ({"sampling": {"response_logprobs": False}}, "response_logprobs"),
        ({"api": {"location": "eu"}, "location": "us"}, "location is 'us', but api.location is 'eu'"),
        ({"api": {"system": "a"}, "backend": {"name": "local", "system": "b"}}, "system is 'b', but api.system is 'a'"),
        ({"prompts": []}, "give one of prompts"),
        ({"dataset": {"file": "x"}}, "there is prompts and dataset"),
        ({"prompts": [], "dataset": {"file": "x", "json": "y"}}, "file and json are both given"),
        ({"prompts": [], "dataset": {"source": "json"}}, "needs file_path"),
        ({"prompts": [], "dataset": {"file": "x", "prompt_field": "y"}}, "hence no prompt_field"),
        ({"prompts": [], "dataset": {"json": "x", "dataset_name": "y"}}, "dataset_name is given"),
        ({"prompts": [], "dataset": {"json": "x", "min_length": 5, "max_length": 4}}, "max_length 4 is below"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**({"prompts": ["Hi"]} | changes))


def test_positions_to_go_on_from_are_taken_once_a_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def position(prefix: Any, place: int, **more: Any) -> dict[str, Any]:
        return {"prompt": "Hi", "prefix": prefix, "token": "a", "source": {"position": place}, "other": 1} | more

    records = [
        position("lo", 1, prefix_token_ids=[4]),
        position("", 0),
        position("lo", 2, token="b"),
        position(None, 3),
        position("x", 4, prefix_token_ids=["x"]),
        position("lo", 5, system="Be brief"),
    ]
    path = tmp_path / "high.json"
    path.write_text(json.dumps(records))
    with caplog.at_level(logging.WARNING):
        found = find_prompts(config(continue_from=str(path)), None)
    assert [(item.prefix, item.prefix_ids, item.prompt.system) for item in found.asked] == [
        ("lo", (4,), None),
        ("", None, None),
        ("lo", None, "Be brief"),
    ]
    assert found.n_unusable == 2
    assert found.asked[0].continues == {
        "prefix": "lo", "prefix_token_ids": [4], "token": "a", "source": {"position": 1},
        "also": [{"token": "b", "source": {"position": 2}}],
    }  # fmt: skip
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "position 3 has no 'prefix' that is a text" in text
    assert "position 4: 'prefix_token_ids' is no list of whole numbers" in text
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is no list of positions; "):
        find_prompts(config(continue_from=str(path)), None)
