"""What a sampling would ask, from files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backends.errors import ConfigError
from flows.config.reading import validate
from flows.config.sampling import SampleConfig
from flows.sampling.asking import Sampler
from flows.sampling.plan import check_cost, plan_rows, plan_sampling, resolve_sampling

P = "gemini-2.5-flash-lite"


def config(folder: Path, **settings: Any) -> SampleConfig:
    given = {"backend": {"name": "vertex_online", "project_id": "p"}, "model1": P, "output_dir": folder / "out"}
    return validate(SampleConfig, given | {"prompts": ["One?", "Two?"], "num_responses": 2} | settings)


def entry(number: int) -> dict[str, Any]:
    token = {"token": "Hi", "logprob": -0.5, "token_id": number}
    content = [{**token, "top_logprobs": [token]}]
    return {"text": "Hi", "finish_reason": "STOP", "logprobs": {"content": content}, "sample": number}


def test_a_plan_knows_what_is_missing_and_what_it_may_cost(tmp_path: Path) -> None:
    plan = plan_sampling(config(tmp_path, sampling={"max_tokens": 1000}), make_identity=False)
    assert [request.name for request in plan.requests] == ["000_one#0", "000_one#1", "001_two#0", "001_two#1"]
    assert not (tmp_path / "out").exists()
    assert dict(plan_rows(plan))["output tokens, at most"] == "4,000"
    limited = plan_sampling(config(tmp_path, sampling={"max_tokens": 1000}, max_cost_usd=0.001), make_identity=False)
    with pytest.raises(ConfigError, match=r"may cost up to 0.0016 USD, above max_cost_usd = 0.001"):
        check_cost(limited)
    unpriced = plan_sampling(config(tmp_path, model1="gemini-9", max_cost_usd=1), make_identity=False)
    with pytest.raises(ConfigError, match="no price is known of gemini-9"):
        check_cost(unpriced)


def test_what_a_killed_sampling_left_is_taken_in_and_a_cut_line_is_asked_again(tmp_path: Path) -> None:
    settings = config(tmp_path)
    first = plan_sampling(settings, make_identity=True)
    keys = [request.key for request in first.requests]
    first.state.add({"key": keys[0], "response": entry(0)})
    first.state.add({"key": keys[3], "reason": "blocked", "message": "no."})
    (journal,) = first.state.folder.glob("journal/*.jsonl")
    journal.write_bytes(journal.read_bytes() + b'{"key": "' + keys[1].encode() + b'", "resp')

    plan = plan_sampling(settings, make_identity=True)
    assert [request.key for request in plan.requests] == keys[1:3]
    assert {key: failure.reason for key, failure in plan.failures.items()} == {keys[3]: "blocked"}
    plan.state.add({"key": keys[1], "response": entry(1)})
    plan.state.add({"key": keys[2], "response": entry(0)})
    report = Sampler(plan_sampling(settings, make_identity=True)).run()  # nothing is left to ask
    assert (report.n_responses, report.missing, report.complete) == (3, {"blocked": 1}, False)
    documents = [json.loads(Path(path).read_text()) for path in report.paths]
    assert [[item["sample"] for item in document["responses"]] for document in documents] == [[0, 1], [0]]

    other = plan_sampling(config(tmp_path / "other"), make_identity=True)
    assert not {request.key for request in other.requests} & set(keys), "a second sampling draws anew"


def test_jobs_follow_rows_up_as_often_as_max_retries_says(tmp_path: Path) -> None:
    def attempts(**settings: Any) -> int:
        batch = {"name": "vertex_batch", "project_id": "p", **settings.pop("backend", {})}
        return resolve_sampling(config(tmp_path, backend=batch, **settings))[1].model_dump()["max_attempts"]

    assert attempts() == 8
    assert attempts(sampling={"max_retries": 3}) == 4
    assert attempts(backend={"max_attempts": 5}) == 5
    with pytest.raises(ConfigError, match=r"max_retries is 3, hence 4 tries, but backend.max_attempts is 5"):
        attempts(sampling={"max_retries": 3}, backend={"max_attempts": 5})


def test_a_backend_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the backend files does not write responses"):
        resolve_sampling(config(tmp_path, backend={"name": "files", "dir": str(tmp_path)}))
    with pytest.raises(ConfigError, match="top_logprobs is 21, but the backend vertex_online reports at most 20"):
        resolve_sampling(config(tmp_path, sampling={"logprobs": 21}))


def test_a_response_waits_for_the_others_of_its_file_in_few_bytes(tmp_path: Path) -> None:
    (target, _) = plan_sampling(config(tmp_path), make_identity=False).targets
    long = entry(0) | {"logprobs": {"content": entry(0)["logprobs"]["content"] * 1000}}
    target.put(0, long)
    assert len(target.entries[0]) < len(json.dumps(long)) / 10
    target.write()
    assert json.loads(target.path.read_text())["responses"] == [long]
