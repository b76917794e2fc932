"""Requests and clients that the tests of the world share."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from google import genai
from google.api_core.exceptions import Conflict
from google.auth.transport.requests import AuthorizedSession
from google.cloud import storage
from google.genai import types
from google.oauth2 import service_account

from tests.vertex_world.world import VertexWorld

FLASH = "gemini-2.5-flash"
LITE = "gemini-2.5-flash-lite"


def genai_client(world: VertexWorld) -> genai.Client:
    """The real client, as the product builds it."""
    return genai.Client(vertexai=True, project=world.project, location=world.location)


def authorized_session(world: VertexWorld) -> AuthorizedSession:
    """Raw HTTP with the world's service account, for what the SDK does not let through."""
    key_file = world.environment()["GOOGLE_APPLICATION_CREDENTIALS"]
    credentials = service_account.Credentials.from_service_account_file(
        key_file, scopes=["https://www.googleapis.com/auth/cloud-platform"]
    )
    return AuthorizedSession(credentials)


def vertex_url(world: VertexWorld, rest: str, location: str = "us-central1") -> str:
    """The URL of a resource below the world's project."""
    return f"{world.url}/v1beta1/projects/{world.project}/locations/{location}/{rest}"


def scoring_config(**changes: Any) -> types.GenerateContentConfig:
    """One token with its 20 best, unthinking."""
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_output_tokens": 1,
        "response_logprobs": True,
        "logprobs": 20,
        "thinking_config": types.ThinkingConfig(thinking_budget=0),
    }
    return types.GenerateContentConfig(**{**settings, **changes})


def scoring_request(prompt: str, prefix: str = "", **changes: Any) -> dict[str, Any]:
    """The same as the JSON of a batch row; ``changes`` go into generationConfig, where None removes."""
    config: dict[str, Any] = {
        "temperature": 1.0,
        "topP": 1.0,
        "maxOutputTokens": 1,
        "responseLogprobs": True,
        "logprobs": 20,
        "thinkingConfig": {"thinking_budget": 0},
        **changes,
    }
    contents = [{"role": "user", "parts": [{"text": prompt}]}]
    if prefix:
        contents.append({"role": "model", "parts": [{"text": prefix}]})
    return {
        "contents": contents,
        "generationConfig": {name: value for name, value in config.items() if value is not None},
    }


def upload_rows(rows: list[dict[str, Any]], name: str, bucket: str = "bucket") -> str:
    """Write a job's input with the real client; returns its URI."""
    with storage.Client() as client:
        try:
            client.create_bucket(bucket, location="us-central1")
        except Conflict:
            client.get_bucket(bucket)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        client.bucket(bucket).blob(f"in/{name}.jsonl").upload_from_string(text)
    return f"gs://{bucket}/in/{name}.jsonl"


def ask(world: VertexWorld, prompt: str = "q", client: genai.Client | None = None) -> types.GenerateContentResponse:
    """One online call with the real client; the environment must be the world's."""
    with contextlib.nullcontext(client) if client else genai_client(world) as client:
        return client.models.generate_content(model=FLASH, contents=prompt, config=scoring_config())


def start_job(world: VertexWorld, rows: int = 10, name: str = "a") -> types.BatchJob:
    """A job of ``rows`` prompts q0, q1, … with keys k0, k1, …"""
    lines = [{"key": f"k{index}", "request": scoring_request(f"q{index}")} for index in range(rows)]
    source = upload_rows(lines, name)
    with genai_client(world) as client:
        return client.batches.create(
            model=FLASH, src=source, config={"display_name": name, "dest": f"gs://bucket/out/{name}"}
        )


def bought(world: VertexWorld) -> int:
    """Rows and calls answered, without the tiny requests that prove the models usable."""
    probes = sum(1 for call in world.online_calls if "Continue the row" in str(call.request) and call.status == 200)
    return sum(world.rows_bought.values()) - probes


def files(world: VertexWorld, index: int = 0) -> dict[str, bytes]:
    """What lies in the output folder of job number ``index``."""
    folder = world.jobs[index].output_directory
    if folder is None:
        return {}
    return {uri.removeprefix(folder + "/"): world.objects.read(uri) for uri in world.objects.list(folder + "/")}


def rows_of(world: VertexWorld, index: int = 0) -> list[dict[str, Any]]:
    """Its output rows, in the order of files and lines."""
    return [
        json.loads(line)
        for name, content in files(world, index).items()
        if not name.startswith("incremental")
        for line in content.split(b"\n")
        if line
    ]
