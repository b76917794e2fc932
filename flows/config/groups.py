"""In which order and under which titles the form of a deployment shows the settings of a comparison."""

from __future__ import annotations

from typing import Any

# Prefect's form has no groups of its own: settings of a group stand together, and its name begins their titles.
GROUPS = {
    "Comparison": {
        "input_dir": "P's responses",
        "model2": "model Q",
        "backend": "who is asked",
        "output_dir": "results",
        "dry_run": "dry run",
    },
    "Google Cloud": {"project_id": "project", "location": "location", "bucket_name": "bucket"},
    "Amount": {
        "pattern": "which files",
        "max_files": "most files",
        "positions": "sample of positions",
        "top_logprobs": "candidates per position",
        "wanted_tokens": "P's tokens by name",
        "noise_floor": "noise floor",
    },
    "Cost": {"max_cost_usd": "limit, USD", "preflight": "proof before buying"},
    "Pace": {
        "max_concurrent": "calls at once",
        "responses_per_job": "responses per job",
        "stage": "stage",
        "task_runner": "who computes",
    },
    "Result": {
        "estimator": "estimator",
        "force": "in spite of other tokens",
        "candidates": "keep lists",
        "keep_vocabularies": "keep vocabularies",
        "keep_raw": "keep raw rows",
        "reuse_raw": "reuse raw rows of",
    },
    "Drift": {"alert": "alert", "fail_on_drift": "fail on drift", "history": "history file"},
}


def in_groups(schema: dict[str, Any]) -> None:
    """Order and name the settings in a JSON schema; one that belongs to no group stays as it is, at the end."""
    fields = schema["properties"]
    shown = [
        (name, f"{group}: {title}")
        for group, titles in GROUPS.items()
        for name, title in titles.items()
        if name in fields
    ]
    schema["properties"] = {name: fields[name] | {"title": title} for name, title in shown} | {
        name: field for name, field in fields.items() if name not in dict(shown)
    }
