"""The settings of the Vertex backends."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from backends.base import BackendOptions
from backends.vertex.prices import Price

NEEDS = "Application Default Credentials (gcloud auth application-default login) and a project (GOOGLE_CLOUD_PROJECT)"


class GeminiOptions(BackendOptions):
    """Settings of both backends."""

    project_id: str | None = Field(default=None, description="Google Cloud project. Default: GOOGLE_CLOUD_PROJECT.")
    location: str = Field(default="us-central1", min_length=1, description="Vertex AI location.")
    retry_deadline_s: float = Field(
        default=600.0, gt=0, description="Seconds for which one call is repeated under throttling and faults."
    )
    request_timeout_s: float = Field(default=120.0, gt=0, description="Seconds until one call counts as lost.")
    prices: dict[str, Price] = Field(
        default_factory=dict[str, Price],
        description="USD per million tokens by model, online list price, in place of the built-in table: "
        "{gemini-2.5-flash: {input: 0.30, output: 2.50}}.",
    )
    keep_raw: bool = Field(
        default=False, description="Keep the service's own rows, compressed, in scores/raw (--reuse-raw reads them)."
    )


class VertexOnlineOptions(GeminiOptions):
    """Settings of the backend ``vertex_online``."""

    project_id: str | None = Field(
        default=None,
        description="Google Cloud project. Default: GOOGLE_CLOUD_PROJECT; without one, GOOGLE_API_KEY or "
        "GEMINI_API_KEY selects the Gemini Developer API.",
    )
    max_concurrent: int = Field(
        default=10, ge=1, le=1000, description="Calls in flight over all responses, 1 to 1000; fewer under throttling."
    )


class VertexBatchOptions(GeminiOptions):
    """Settings of the backend ``vertex_batch``."""

    bucket_name: str | None = Field(
        default=None, description="Bucket for batch files; made when absent. Default: {project_id}-kl-batch."
    )
    poll_interval_s: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="Longest pause between looks at a job in seconds, above 0, up to 3600; the first are shorter.",
    )
    wait_deadline_s: float = Field(
        default=4 * 86400.0,
        gt=0,
        description="Seconds to wait for a job (4 days: 72 h in the queue, 24 h of work); a later run attaches to it.",
    )
    output_deadline_s: float = Field(
        default=30.0, ge=0, description="Seconds after a job's end within which its output must appear."
    )
    on_cancel: Literal["leave", "cancel"] = Field(
        default="leave", description="What becomes of running jobs when the run is stopped: leave or cancel."
    )
    max_attempts: int = Field(
        default=8, ge=1, le=20, description="Jobs that may be made for a row before it is given up, 1 to 20."
    )
    max_jobs_in_flight: int = Field(
        default=50, ge=1, le=1000, description="Jobs that may run at once, 1 to 1000; the service queues some of them."
    )
    max_rows_per_job: int = Field(
        default=200_000, ge=1, le=200_000, description="Rows in one input file, 1 to 200000 (the service's limit)."
    )
    max_file_bytes: int = Field(
        default=950_000_000,
        ge=1_000_000,
        le=1_000_000_000,
        description="Size of one input file in bytes, 1e6 to 1e9 (the service's limit).",
    )
