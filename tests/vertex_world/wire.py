"""Shapes on the wire: errors, numbers, times, hashes."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import numpy as np

STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
}
MESSAGE = {
    401: "Request had invalid authentication credentials.",
    403: "The caller does not have permission to do this.",
    404: "The requested URL was not found on this server.",
    429: "Resource exhausted. Please try again later. Please refer to "
    "https://cloud.google.com/vertex-ai/generative-ai/docs/error-code-429 for more details.",
    500: "Internal error encountered.",
    503: "The service is currently unavailable.",
}
ROW_TITLE = {400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error"}
SENTINEL = -(2.0**100)


class ApiError(Exception):
    """An answer of the service that is an error.

    ``malformed`` says that the request itself was wrong, as opposed to a model that cannot do what was asked.
    """

    def __init__(
        self,
        code: int,
        message: str | None = None,
        *,
        status: str | None = None,
        details: list[dict[str, Any]] | None = None,
        malformed: bool = False,
    ) -> None:
        self.code = code
        self.message = message or MESSAGE[code]
        self.status = status or STATUS[code]
        self.details = details
        self.malformed = malformed
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The JSON of the error, over HTTP and inside a row's status."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, "status": self.status}
        if self.details:
            error["details"] = self.details
        return {"error": error}

    def row_status(self) -> str:
        """The text in `status` of a failed row."""
        return f"{ROW_TITLE.get(self.code, 'Error')}: {json.dumps(self.body(), separators=(',', ':'))}"


def quota_details(limit: str, unit: str, project: str) -> list[dict[str, Any]]:
    """The details of a 429: the limit in the service's own name, and the project of the caller."""
    metadata = {
        "service": "aiplatform.googleapis.com",
        "consumer": f"projects/{project}",
        "quota_limit": limit,
        "quota_unit": unit,
    }
    violation = {"subject": f"project:{project}", "description": f"Quota exceeded for project {project}."}
    return [
        {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "RATE_LIMIT_EXCEEDED", "metadata": metadata},
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [violation]},
    ]


def malformed(message: str, details: list[dict[str, Any]] | None = None) -> ApiError:
    """A 400 that is the caller's own fault."""
    return ApiError(400, message, details=details, malformed=True)


def float32_json(value: float) -> float | int:
    """A float32 field as proto JSON prints it: shortest digits, and zero as the integer 0."""
    shortest = float(str(np.float32(value)))
    return 0 if shortest == 0 else shortest


def now() -> datetime:
    return datetime.now(UTC)


def rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def canonical_request_hash(model: str, request: dict[str, Any]) -> str:
    """Hash of a validated request (see `validation.parse_request`): equal for all spellings of one request."""
    text = json.dumps([model, request], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def mangled_echo(value: Any) -> Any:
    """An echoed request as some service versions return it: keys in another order, nulls injected."""
    if isinstance(value, list):
        return [mangled_echo(item) for item in value]
    if not isinstance(value, dict):
        return value
    mangled = {key: mangled_echo(value[key]) for key in sorted(value, reverse=True)}
    if "text" in mangled:
        return {"file_data": None, "function_call": None, **mangled, "inline_data": None}
    if "contents" in mangled:
        return {**mangled, "tools": None, "cachedContent": None}
    return mangled
