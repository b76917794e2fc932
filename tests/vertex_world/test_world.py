"""The stand-in of Vertex AI, through the real clients: round trips and recorded requests."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from google import genai
from google.cloud import storage
from google.genai import errors, types

from tests import ROOT
from tests.vertex_world import VertexWorld, canonical_request_hash
from tests.vertex_world.fixtures import in_vertex_world, make_vertex_world, vertex_world
from tests.vertex_world.testing import (
    FLASH,
    LITE,
    authorized_session,
    genai_client,
    scoring_config,
    scoring_request,
    upload_rows,
    vertex_url,
)

__all__ = ["in_vertex_world", "make_vertex_world", "vertex_world"]

pytestmark = pytest.mark.world


@pytest.fixture
def client(in_vertex_world: VertexWorld) -> Iterator[genai.Client]:
    with genai_client(in_vertex_world) as client:
        yield client


def run_job(client: genai.Client, rows: list[dict[str, Any]], name: str = "kl-a") -> types.BatchJob:
    source = upload_rows(rows, name)
    return client.batches.create(
        model=FLASH, src=source, config={"display_name": name, "dest": f"gs://bucket/out/{name}"}
    )


def output_rows(job: types.BatchJob) -> list[dict[str, Any]]:
    assert job.output_info is not None
    folder = str(job.output_info.gcs_output_directory).removeprefix("gs://bucket/")
    with storage.Client() as store:
        blobs = list(store.list_blobs("bucket", prefix=folder))
        return [json.loads(line) for blob in blobs for line in blob.download_as_bytes().split(b"\n") if line]


def test_an_online_call_continues_the_prefill_with_the_known_distribution(
    in_vertex_world: VertexWorld, client: genai.Client
) -> None:
    answer = client.models.generate_content(
        model=FLASH,
        contents=[
            types.Content(role="user", parts=[types.Part(text="Why is the sky blue?")]),
            types.Content(role="model", parts=[types.Part(text="The sky ")]),
        ],
        config=scoring_config(),
    )
    assert answer.candidates is not None
    assert answer.candidates[0].finish_reason == types.FinishReason.MAX_TOKENS
    result = answer.candidates[0].logprobs_result
    assert result is not None
    assert result.top_candidates is not None
    known = in_vertex_world.language_model.distribution(FLASH, [("user", "Why is the sky blue?")], None, "The sky ")
    expected = {token_id: logprob for token_id, logprob in zip(known.ids, known.logprobs, strict=True)}
    listed = result.top_candidates[0].candidates or []
    assert len(listed) == 20
    for candidate in listed:
        assert candidate.token_id is not None
        assert candidate.log_probability == pytest.approx(expected[candidate.token_id], rel=1e-6, abs=1e-9)
    assert listed[0].log_probability == pytest.approx(known.logprobs.max(), rel=1e-6)
    assert in_vertex_world.token_requests == 1
    assert in_vertex_world.rejected == []
    assert list(in_vertex_world.rows_bought.values()) == [1]


def test_the_recorded_generate_request_is_accepted_with_its_quirks(
    in_vertex_world: VertexWorld, client: genai.Client
) -> None:
    config = types.GenerateContentConfig(
        system_instruction="sys",
        temperature=1.0,
        top_p=1.0,
        top_k=64,
        candidate_count=1,
        max_output_tokens=1,
        response_logprobs=True,
        logprobs=20,
        seed=7,
        labels={"run": "a"},
        thinking_config=types.ThinkingConfig(thinking_budget=0),
    )
    said = (("user", "hi"), ("model", "A "))
    turns = [types.Content(role=role, parts=[types.Part(text=text)]) for role, text in said]
    client.models.generate_content(model=FLASH, contents=turns, config=config)
    # topK leaves the client as 64.0 and the budget as thinking_budget; both come out canonical.
    assert in_vertex_world.online_calls[0].request == {
        "contents": [{"parts": [{"text": "hi"}], "role": "user"}, {"parts": [{"text": "A "}], "role": "model"}],
        "systemInstruction": {"parts": [{"text": "sys"}], "role": "user"},
        "labels": {"run": "a"},
        "generationConfig": {
            "temperature": 1,
            "topP": 1,
            "topK": 64,
            "candidateCount": 1,
            "maxOutputTokens": 1,
            "responseLogprobs": True,
            "logprobs": 20,
            "seed": 7,
            "thinkingConfig": {"thinkingBudget": 0},
        },
    }
    assert in_vertex_world.rejected == []


def test_the_recorded_create_request_gives_a_job_that_writes_its_folder(
    in_vertex_world: VertexWorld, client: genai.Client
) -> None:
    rows = [{"key": f"k{index}", "request": scoring_request(f"question {index}", "Well")} for index in range(6)]
    created = run_job(client, rows, "dn")
    assert created.state == types.JobState.JOB_STATE_PENDING
    assert in_vertex_world.jobs[0].body == {
        "model": "publishers/google/models/gemini-2.5-flash",
        "inputConfig": {"instancesFormat": "jsonl", "gcsSource": {"uris": ["gs://bucket/in/dn.jsonl"]}},
        "displayName": "dn",
        "outputConfig": {
            "predictionsFormat": "jsonl",
            "gcsDestination": {"outputUriPrefix": "gs://bucket/out/dn"},
        },
    }
    in_vertex_world.wait_for_jobs()
    job = client.batches.get(name=str(created.name))
    assert job.state == types.JobState.JOB_STATE_SUCCEEDED
    assert job.completion_stats is not None
    assert job.completion_stats.successful_count == 6
    lines = output_rows(job)
    assert [line["key"] for line in lines] == [row["key"] for row in rows]
    assert [line["request"] for line in lines] == [row["request"] for row in rows]
    assert {line["status"] for line in lines} == {""}
    response = lines[0]["response"]
    assert set(response) == {"candidates", "usageMetadata", "modelVersion", "createTime", "responseId"}
    assert set(response["candidates"][0]) == {"content", "finishReason", "avgLogprobs", "score", "logprobsResult"}
    assert response["usageMetadata"]["billablePromptUsage"] == {"textCount": len("question 0") + len("Well")}
    assert sum(in_vertex_world.rows_bought.values()) == 6
    assert in_vertex_world.rejected == []


def test_stats_are_strings_on_the_wire(in_vertex_world: VertexWorld, client: genai.Client) -> None:
    run_job(client, [{"request": scoring_request("q")}])
    (job,) = in_vertex_world.wait_for_jobs()
    with authorized_session(in_vertex_world) as session:
        resource = session.get(vertex_url(in_vertex_world, f"batchPredictionJobs/{job.id}"), timeout=10).json()
    assert resource["completionStats"] == {"successfulCount": "1"}


def test_batch_and_online_give_the_same_probabilities(in_vertex_world: VertexWorld, client: genai.Client) -> None:
    request = scoring_request("same question", "Because")
    run_job(client, [{"request": request}])
    (job,) = in_vertex_world.wait_for_jobs()
    batch = json.loads(in_vertex_world.objects.read(f"{job.output_directory}/predictions.jsonl"))["response"]
    session = genai_client(in_vertex_world)
    contents = [types.Content.model_validate(turn) for turn in request["contents"]]
    online = session.models.generate_content(model=FLASH, contents=contents, config=scoring_config())
    assert online.candidates is not None
    result = online.candidates[0].logprobs_result
    assert result is not None
    tops = (result.top_candidates or [types.LogprobsResultTopCandidates()])[0].candidates or []
    written = batch["candidates"][0]["logprobsResult"]["topCandidates"][0]["candidates"]
    assert [token.log_probability for token in tops] == [token["logProbability"] for token in written]
    assert in_vertex_world.rows_bought == {canonical_request_hash(FLASH, in_vertex_world.online_calls[0].request): 2}


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ('displayName="kl-1"', ["kl-1"]),
        ('displayName!="kl-1"', ["other", "kl-0"]),
        ('displayName:"kl-*"', ["kl-1", "kl-0"]),
        ('displayName="kl-0" AND state="JOB_STATE_SUCCEEDED"', ["kl-0"]),
        ('displayName="kl-0" AND state="JOB_STATE_FAILED"', []),
        ('displayName="kl-0" OR displayName="other"', ["other", "kl-0"]),
        ('(displayName="kl-0" OR displayName="other") AND createTime>"2020-01-01T00:00:00Z"', ["other", "kl-0"]),
        ('createTime<"2020-01-01T00:00:00Z"', []),
        (None, ["other", "kl-1", "kl-0"]),
    ],
)
def test_list_filters_and_pages(
    in_vertex_world: VertexWorld, client: genai.Client, query: str | None, names: list[str]
) -> None:
    for name in ("kl-0", "kl-1", "other"):
        run_job(client, [{"request": scoring_request("q")}], name)
    in_vertex_world.wait_for_jobs()
    config = types.ListBatchJobsConfig(page_size=2, filter=query)
    assert [job.display_name for job in client.batches.list(config=config)] == names


def test_a_cancelled_job_passes_cancelling_and_keeps_its_finished_rows(
    make_vertex_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_vertex_world(job_seconds=2.0, cancel_seconds=0.2)
    for name, value in world.environment().items():
        monkeypatch.setenv(name, value)
    client = genai_client(world)
    created = run_job(client, [{"request": scoring_request(f"q{index}")} for index in range(40)])
    while not world.jobs[0].rows_finished:
        time.sleep(0.02)
    client.batches.cancel(name=str(created.name))
    assert client.batches.get(name=str(created.name)).state == types.JobState.JOB_STATE_CANCELLING
    (job,) = world.wait_for_jobs()
    assert job.state == "JOB_STATE_CANCELLED"
    assert 0 < job.rows_finished < 40
    assert len(output_rows(client.batches.get(name=str(created.name)))) == job.rows_finished
    assert sum(world.rows_bought.values()) == job.rows_finished


def test_a_deleted_job_disappears_and_the_ledger_keeps_it(in_vertex_world: VertexWorld, client: genai.Client) -> None:
    created = run_job(client, [{"request": scoring_request("q")}])
    in_vertex_world.wait_for_jobs()
    client.batches.delete(name=str(created.name))
    with pytest.raises(errors.ClientError) as failure:
        client.batches.get(name=str(created.name))
    assert failure.value.code == 404
    assert list(client.batches.list()) == []
    assert [job.deleted for job in in_vertex_world.jobs] == [True]


def test_a_job_is_not_found_in_another_location(in_vertex_world: VertexWorld, client: genai.Client) -> None:
    created = run_job(client, [{"request": scoring_request("q")}])
    elsewhere = genai.Client(vertexai=True, project=in_vertex_world.project, location="europe-west4")
    with pytest.raises(errors.ClientError) as failure:
        elsewhere.batches.get(name=str(created.name))
    assert failure.value.code == 404


@pytest.mark.parametrize("location", ["global", "us", "eu", "europe-west4"])
def test_every_kind_of_location_answers(in_vertex_world: VertexWorld, location: str) -> None:
    with genai.Client(vertexai=True, project=in_vertex_world.project, location=location) as client:
        client.models.generate_content(model=LITE, contents="hi", config=scoring_config())
    assert len(in_vertex_world.online_calls) == 1


def test_two_hundred_calls_at_once_are_answered_and_their_number_is_recorded(
    in_vertex_world: VertexWorld,
) -> None:
    in_vertex_world.faults.latency_s = 0.3

    async def ask() -> None:
        client = genai_client(in_vertex_world).aio
        calls = [
            client.models.generate_content(model=FLASH, contents=f"q{index}", config=scoring_config())
            for index in range(200)
        ]
        await asyncio.gather(*calls)
        await client.aclose()

    asyncio.run(ask())
    assert len(in_vertex_world.online_calls) == 200
    assert 20 < in_vertex_world.max_online_in_flight <= 200


def test_count_tokens_rises_by_one_with_a_token_of_the_vocabulary(
    in_vertex_world: VertexWorld, client: genai.Client
) -> None:
    token = max(in_vertex_world.language_model.distribution(FLASH, [], None, "").texts, key=len)
    counts = [client.models.count_tokens(model=FLASH, contents=token * times).total_tokens for times in (1, 2, 5)]
    assert counts == [1, 2, 5]


def test_the_developer_api_wants_its_key_and_has_no_logprobs(in_vertex_world: VertexWorld) -> None:
    url = f"{in_vertex_world.url}/v1beta/models/{FLASH}:generateContent"
    body = scoring_request("hi")
    assert requests.post(url, json=body, timeout=10).status_code == 400
    key = {"x-goog-api-key": in_vertex_world.api_key}
    refused = requests.post(url, json=body, headers=key, timeout=10)
    assert refused.json()["error"]["message"] == f"Logprobs is not enabled for models/{FLASH}"
    plain = {**body, "generationConfig": {"maxOutputTokens": 200}}
    assert requests.post(url, json=plain, headers=key, timeout=10).json()["candidates"]


def test_calls_without_a_token_of_the_world_are_401(in_vertex_world: VertexWorld, client: genai.Client) -> None:
    project = f"{in_vertex_world.url}/v1beta1/projects/{in_vertex_world.project}/locations/us-central1"
    for headers in ({}, {"Authorization": "Bearer ya29.forged"}):
        answer = requests.get(f"{project}/batchPredictionJobs", headers=headers, timeout=10)
        assert answer.status_code == 401
        assert answer.json()["error"]["status"] == "UNAUTHENTICATED"
    client.models.generate_content(model=FLASH, contents="hi", config=scoring_config())
    in_vertex_world.expire_tokens()
    with pytest.raises(errors.ClientError, match="401"):
        client.models.generate_content(model=FLASH, contents="hi", config=scoring_config())


def test_a_forged_grant_gets_no_token(in_vertex_world: VertexWorld) -> None:
    url = f"{in_vertex_world.url}/token"
    grant = "urn:ietf:params:oauth:grant-type:jwt-bearer"
    assert requests.post(url, data={"grant_type": "password"}, timeout=10).status_code == 400
    forged = requests.post(url, data={"grant_type": grant, "assertion": "e30.e30.AAAA"}, timeout=10)
    assert forged.json()["error"] == "invalid_grant"


_CHILD = """
import os, sys, time
from google import genai
from google.cloud import storage
client = genai.Client(vertexai=True, project=os.environ["GOOGLE_CLOUD_PROJECT"], location=os.environ["GOOGLE_CLOUD_LOCATION"])
bucket = storage.Client().create_bucket("bucket", location="us-central1")
bucket.blob("in.jsonl").upload_from_string(sys.argv[1])
client.batches.create(model="gemini-2.5-flash", src="gs://bucket/in.jsonl", config={"display_name": "dn", "dest": "gs://bucket/o"})
print("created", flush=True)
time.sleep(60)
"""  # noqa: E501


def test_a_killed_process_leaves_its_job_and_the_ledger(vertex_world: VertexWorld, tmp_path: Path) -> None:
    row = json.dumps({"request": scoring_request("q")})
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, row],
        env=kept | vertex_world.environment(),
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"created\n"
        child.kill()
    (job,) = vertex_world.wait_for_jobs()
    assert (job.display_name, job.state, job.rows_finished) == ("dn", "JOB_STATE_SUCCEEDED", 1)
    assert sum(vertex_world.rows_bought.values()) == 1


def test_run_by_hand_it_prints_its_environment_and_stops_when_asked(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.vertex_world", "--responses", str(tmp_path / "in")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(8)]
        process.terminate()
        _, warnings = process.communicate(timeout=20)
    names = {line.split("=")[0].removeprefix("export ") for line in lines if line.startswith("export")}
    assert {"GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST", "GOOGLE_VERTEX_BASE_URL"} <= names, warnings
    assert process.returncode == 0
    assert "rejected: []" in warnings
    assert len(list((tmp_path / "in").glob("*.json"))) == 3
