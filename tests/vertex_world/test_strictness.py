"""Each rule by which a request is refused, online and in a row of a batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.vertex_world import ModelSpec, VertexWorld
from tests.vertex_world.fixtures import in_vertex_world, make_vertex_world, vertex_world
from tests.vertex_world.testing import (
    FLASH,
    LITE,
    authorized_session,
    genai_client,
    scoring_request,
    upload_rows,
    vertex_url,
)

__all__ = ["in_vertex_world", "make_vertex_world", "vertex_world"]

pytestmark = pytest.mark.world

PRO = "gemini-2.5-pro"


@dataclass(frozen=True)
class Case:
    """A request body and a part of the message it is refused with."""

    id: str
    body: dict[str, Any]
    message: str
    model: str = FLASH
    code: int = 400
    malformed: bool = True


def turns(*contents: Any) -> dict[str, Any]:
    return {**scoring_request("q"), "contents": list(contents)}


def turn(role: str | None, *texts: str) -> dict[str, Any]:
    content: dict[str, Any] = {"parts": [{"text": text} for text in texts]}
    return content if role is None else {"role": role, **content}


CASES = [
    Case("unknown field", {**scoring_request("q"), "prefill": "x"}, 'Unknown name "prefill": Cannot find field.'),
    Case(
        "unknown field in the configuration",
        scoring_request("q", topLogprobs=20),
        "Unknown name \"topLogprobs\" at 'generation_config': Cannot find field.",
    ),
    Case(
        "unknown field in a part",
        turns({"role": "user", "parts": [{"txt": "q"}]}),
        "Unknown name \"txt\" at 'contents[0].parts[0]'",
    ),
    Case("number as text", scoring_request("q", logprobs="20"), "Invalid value at 'generation_config.logprobs'"),
    Case("half a number", scoring_request("q", logprobs=2.5), "Invalid value at 'generation_config.logprobs'"),
    Case("temperature as a boolean", scoring_request("q", temperature=True), "Invalid value at 'generation_config"),
    Case("half a character", scoring_request("q\ud83d"), "Unpaired surrogate at 'contents[0].parts[0].text'"),
    Case("contents are empty", turns(), "at least one contents field is required"),
    Case("role assistant", turns(turn("user", "q"), turn("assistant", "a")), "valid role: user, model"),
    Case("role missing in a conversation", turns(turn("user", "q"), turn(None, "a")), "valid role: user, model"),
    Case("single model turn", turns(turn("model", "a")), "single turn requests end with a user role"),
    Case("empty model turn", turns(turn("user", "q"), turn("model")), "at least one parts field"),
    Case("empty text in the model turn", turns(turn("user", "q"), turn("model", "")), "empty text parameter"),
    Case("empty user text", turns(turn("user", "")), "empty text parameter"),
    Case("logprobs 0", scoring_request("q", logprobs=0), "logprobs value of 0 but the supported range is from 1"),
    Case("logprobs 21", scoring_request("q", logprobs=21), "logprobs value of 21"),
    Case("logprobs alone", scoring_request("q", responseLogprobs=None), "response_logprobs is set to true"),
    Case("no tokens", scoring_request("q", maxOutputTokens=0), "maxOutputTokens value of 0"),
    Case("no candidates", scoring_request("q", candidateCount=0), "candidateCount value of 0"),
    Case("temperature 2.5", scoring_request("q", temperature=2.5), "temperature value of 2.5"),
    Case("temperature below 0", scoring_request("q", temperature=-0.1), "temperature value of -0.1"),
    Case("topP 1.5", scoring_request("q", topP=1.5), "topP value of 1.5"),
    Case("topK 0", scoring_request("q", topK=0), "topK value of 0"),
    Case(
        "thinking budget and level",
        scoring_request("q", thinkingConfig={"thinkingBudget": 0, "thinkingLevel": "LOW"}),
        "only one of thinking budget and thinking level",
    ),
    Case(
        "thinking budget below the least of flash-lite",
        scoring_request("q", thinkingConfig={"thinkingBudget": 100}),
        "thinking budget 100 is invalid",
        model=LITE,
    ),
    Case("label with blanks", {**scoring_request("q"), "labels": {"a": "B c"}}, "Invalid label"),
    Case("tools are not spoken", {**scoring_request("q"), "tools": []}, "does not speak 'tools'"),
    Case("2.5-pro thinks", scoring_request("q"), "only works in thinking mode", model=PRO, malformed=False),
    Case("2.0 is shut", scoring_request("q"), "was not found", model="gemini-2.0-flash", code=404, malformed=False),
    Case("unknown model", scoring_request("q"), "was not found", model="gemini-9", code=404, malformed=False),
    Case(
        "3.x is not in a region", scoring_request("q"), "was not found", "gemini-3.5-flash", code=404, malformed=False
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_an_online_request_is_refused_with_the_services_words(vertex_world: VertexWorld, case: Case) -> None:
    with authorized_session(vertex_world) as session:
        url = vertex_url(vertex_world, f"publishers/google/models/{case.model}:generateContent")
        answer = session.post(url, json=case.body, timeout=10)
    assert answer.status_code == case.code
    assert case.message in answer.json()["error"]["message"]
    assert answer.json()["error"]["status"] == ("NOT_FOUND" if case.code == 404 else "INVALID_ARGUMENT")
    noted = vertex_world.rejected if case.malformed else vertex_world.refused
    assert [refusal.body for refusal in noted] == [case.body]
    assert len(vertex_world.rejected) + len(vertex_world.refused) == 1
    assert not vertex_world.rows_bought


@pytest.mark.parametrize("case", [case for case in CASES if case.code == 400], ids=lambda case: case.id)
def test_a_batch_row_is_refused_with_the_same_words_and_its_neighbours_are_answered(
    make_vertex_world: Callable[..., VertexWorld], monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    world = make_vertex_world(job_seconds=0)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    source = upload_rows([{"request": scoring_request("good")}, {"request": case.body}], "a")
    client = genai_client(world)
    client.batches.create(model=case.model, src=source, config={"display_name": "a", "dest": "gs://bucket/out"})
    (job,) = world.wait_for_jobs()
    lines = world.objects.read(f"{job.output_directory}/predictions.jsonl").split(b"\n")
    good, bad = (json.loads(line) for line in lines if line)
    assert "response" not in bad
    title, _, body = bad["status"].partition(": ")
    assert title == "Bad Request"
    assert case.message in json.loads(body)["error"]["message"]
    expects_good = case.model != PRO
    assert (good["status"] == "") is expects_good
    assert job.state == "JOB_STATE_SUCCEEDED"
    assert job.rows_failed == (1 if expects_good else 2)


@pytest.mark.parametrize(
    ("model", "prefix", "message"),
    [
        ("gemini-3.5-flash", "A", "Logprobs is not supported for this model"),
        ("gemini-3.1-pro-preview", "", "Logprobs is not supported for this model"),
        ("gemini-3.6-flash", "A", "Requests ending with a model turn are not supported."),
        ("gemini-3.5-flash-lite", "A", "Requests ending with a model turn are not supported."),
    ],
)
def test_newer_models_on_global_refuse_logprobs_or_a_prefill(
    vertex_world: VertexWorld, model: str, prefix: str, message: str
) -> None:
    with authorized_session(vertex_world) as session:
        url = vertex_url(vertex_world, f"publishers/google/models/{model}:generateContent", "global")
        answer = session.post(url, json=scoring_request("q", prefix), timeout=10)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert vertex_world.rejected == []
    assert len(vertex_world.refused) == 1


@pytest.mark.parametrize(("model", "config"), [(PRO, {"thinkingConfig": None}), (FLASH, {"thinkingConfig": None})])
def test_a_model_that_thinks_spends_one_token_on_thoughts_and_has_no_parts(
    vertex_world: VertexWorld, model: str, config: dict[str, Any]
) -> None:
    with authorized_session(vertex_world) as session:
        url = vertex_url(vertex_world, f"publishers/google/models/{model}:generateContent")
        answer = session.post(url, json=scoring_request("q", **config), timeout=10).json()
    (candidate,) = answer["candidates"]
    assert candidate == {"content": {"role": "model"}, "finishReason": "MAX_TOKENS"}
    assert answer["usageMetadata"]["thoughtsTokenCount"] == 1


def test_models_can_be_added(make_vertex_world: Callable[..., VertexWorld]) -> None:
    world = make_vertex_world(models={"my-model": ModelSpec("my-model-001", prefill=False)})
    with authorized_session(world) as session:
        url = vertex_url(world, "publishers/google/models/my-model:generateContent")
        assert session.post(url, json=scoring_request("q"), timeout=10).json()["modelVersion"] == "my-model-001"
        assert session.post(url, json=scoring_request("q", "A"), timeout=10).status_code == 400


GOOD_JOB = {
    "displayName": "a",
    "model": f"publishers/google/models/{FLASH}",
    "inputConfig": {"instancesFormat": "jsonl", "gcsSource": {"uris": ["gs://bucket/in.jsonl"]}},
    "outputConfig": {"predictionsFormat": "jsonl", "gcsDestination": {"outputUriPrefix": "gs://bucket/out"}},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelz": {}}, 'Unknown name "labelz": Cannot find field.'),
        ({"displayName": None}, "'display_name' is missing"),
        ({"displayName": "x" * 129}, "at most 128 characters"),
        ({"outputConfig": None}, "'output_config' is missing"),
        ({"model": "gemini-2.5-flash"}, "Invalid model name"),
        ({"inputConfig": {"instancesFormat": "csv", "gcsSource": {"uris": ["gs://b/i"]}}}, "Only the jsonl format"),
        ({"inputConfig": {"instancesFormat": "jsonl", "gcsSource": {"uris": ["/b/i"]}}}, "Invalid Cloud Storage URI"),
        ({"model": "publishers/google/models/gemini-2.0-flash"}, "was not found"),
    ],
)
def test_a_wrong_create_makes_no_job(vertex_world: VertexWorld, changes: dict[str, Any], message: str) -> None:
    with authorized_session(vertex_world) as session:
        answer = session.post(vertex_url(vertex_world, "batchPredictionJobs"), json={**GOOD_JOB, **changes}, timeout=10)
    assert answer.status_code in {400, 404}
    assert message in answer.json()["error"]["message"]
    assert vertex_world.jobs == []


def test_labels_and_a_key_field_may_be_sent_with_a_job(in_vertex_world: VertexWorld) -> None:
    upload_rows([{"request": scoring_request("q")}], "a")
    job = {**GOOD_JOB, "labels": {"run": "a"}, "instanceConfig": {"keyField": "key"}}
    with authorized_session(in_vertex_world) as session:
        url = vertex_url(in_vertex_world, "batchPredictionJobs")
        assert session.post(url, json=job, timeout=10).json()["labels"] == {"run": "a"}
        found = session.get(url, params={"filter": "labels.run=a AND labels.run:*"}, timeout=10).json()
        assert len(found["batchPredictionJobs"]) == 1
        for wrong in ("displayName ~ x", 'displayName="a" AND', "nonsense=1", 'state>"x"'):
            assert session.get(url, params={"filter": wrong}, timeout=10).status_code == 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"request": {}}\n{"request": \n', "Line 2 of the input is not valid JSON"),
        ('{"key": "no request"}\n', "has no field 'request'"),
        ('{"request": {"temperature": NaN}}\n', "Line 1 of the input is not valid JSON"),
        ("", "contains no requests"),
        ('{"request": {}}\n' * 11, "the limit is 10 requests per job"),
        ('{"request": {"labels": {"a": "' + "x" * 2000 + '"}}}\n', "larger than the limit of 2000 bytes"),
        (None, "does not exist"),
    ],
)
def test_an_input_that_cannot_be_used_fails_the_job_and_is_noted(
    make_vertex_world: Callable[..., VertexWorld], text: str | None, message: str
) -> None:
    world = make_vertex_world(max_rows=10, max_bytes=2000, job_seconds=0)
    world.objects.create_bucket("bucket")
    if text is not None:
        world.objects.write("gs://bucket/in.jsonl", text.encode())
    with authorized_session(world) as session:
        created = session.post(vertex_url(world, "batchPredictionJobs"), json=GOOD_JOB, timeout=10)
    assert created.status_code == 200
    (job,) = world.wait_for_jobs()
    assert job.state == "JOB_STATE_FAILED"
    assert job.error is not None
    assert message in job.error["message"]
    assert not world.rows_bought
    assert any(message in refusal.message for refusal in world.rejected)


def test_what_is_not_spoken_is_a_404_that_says_so(vertex_world: VertexWorld) -> None:
    with authorized_session(vertex_world) as session:
        url = vertex_url(vertex_world, f"publishers/google/models/{FLASH}:streamGenerateContent")
        answer = session.post(url, json=scoring_request("q"), timeout=10)
    assert answer.status_code == 404
    assert "does not speak" in answer.json()["error"]["message"]


def test_another_project_is_denied(vertex_world: VertexWorld) -> None:
    with authorized_session(vertex_world) as session:
        url = vertex_url(vertex_world, "batchPredictionJobs").replace(vertex_world.project, "somebody-else")
        assert session.get(url, timeout=10).status_code == 403
