"""Events for Prefect's automations: a comparison drifted, a model's version changed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid5

from prefect.events import emit_event

from flows.watch.history import Row

logger = logging.getLogger(__name__)

DRIFT = "tokenkl.drift.detected"
VERSION_CHANGED = "tokenkl.model-version.changed"


def comparison_resource(row: Row, history: str) -> dict[str, str]:
    """What the events are about: the comparison of two models that one history follows; the same for all its runs."""
    text = json.dumps([row["model1"], row["model2"], history], ensure_ascii=False)
    return {
        "prefect.resource.id": f"tokenkl.comparison.{hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "prefect.resource.name": f"KL(P‖Q), P = {row['model1'] or 'not stated'}, Q = {row['model2']}",
    }


def run_payload(row: Row, history: str) -> dict[str, Any]:
    """What every event says of the run."""
    names = ("model1", "model2", "model1_versions", "model2_versions", "flow_run_name", "deployment")
    return {name: row[name] for name in names} | {
        "flow_run_id": row["run_id"],
        "results": row["output_dir"],
        "history": history,
    }


def version_changes(row: Row, earlier: Row | None) -> list[dict[str, Any]]:
    """For each model with a version that its last run did not have: which, from, to. Unknown ones are no change."""
    changes: list[dict[str, Any]] = []
    for which in ("model1", "model2"):
        before: list[str] = [] if earlier is None else earlier[f"{which}_versions"] or []
        now: list[str] = row[f"{which}_versions"]
        if before and set(now) - set(before):
            message = f"{row[which]} ({which}) is now {', '.join(now)}; it was {', '.join(before)}"
            changes.append({"message": message, "which": which, "model": row[which], "from": before, "to": now})
    return changes


def emit(name: str, about: str, resource: Mapping[str, str], payload: Mapping[str, Any], run_id: str) -> bool:
    """Emit an event, once for each run however often it is retried: the server drops one whose id it has.

    A failure is an error in the log and nothing more: the results are on disk.

    Parameters
    ----------
    about : str
        Tells events of one name and one run apart.
    """
    try:
        sent = emit_event(name, dict(resource), payload=dict(payload), id=uuid5(UUID(run_id), name + about))
    except Exception:
        logger.exception("the event %s was not emitted; the results are written", name)
        return False
    if sent is None:
        logger.error("the event %s was not emitted, as Prefect takes no events here; the results are written", name)
    return sent is not None
