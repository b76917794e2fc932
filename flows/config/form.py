"""What the form of a deployment, and Prefect's check of its parameters, know of the backends.

The options are loaded without their backends, which bring SDKs and take seconds: every run of a deployment builds this
schema.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import GetJsonSchemaHandler

_OPTIONS = {
    "vertex_batch": "backends.vertex.options:VertexBatchOptions",
    "vertex_online": "backends.vertex.options:VertexOnlineOptions",
    "local": "backends.base:BackendOptions",
    "files": "backends.files.backend:FilesOptions",
    "openai_compatible": "backends.openai_compatible.options:OpenAICompatibleOptions",
    "transformers": "backends.transformers.options:TransformersOptions",
}
_FILLED_IN_BY_THE_PROGRAM = {"found", "content_sha256"}


def backend_schema(handler: GetJsonSchemaHandler) -> dict[str, Any]:
    """A choice among the built-in backends, each with its options, and any other by its name."""
    other = {
        "title": "another, installed as a plugin",
        "type": "object",
        "properties": {
            "name": {"title": "Name", "type": "string", "minLength": 1, "not": {"enum": list(_OPTIONS)}},
        },
        "required": ["name"],
        "additionalProperties": True,
    }
    return {"anyOf": [*(_choice(name, handler) for name in _OPTIONS), other]}


def options_class(name: str) -> Any:
    """The options of a built-in backend."""
    module, _, attribute = _OPTIONS[name].partition(":")
    return getattr(import_module(module), attribute)


def _choice(name: str, handler: GetJsonSchemaHandler) -> dict[str, Any]:
    found = handler.resolve_ref_schema(handler(options_class(name).__pydantic_core_schema__))
    options = {key: field for key, field in found["properties"].items() if key not in _FILLED_IN_BY_THE_PROGRAM}
    # An option of its own list has one value to choose: the form fills it in.
    kind = {"title": "Backend", "type": "string", "enum": [name], "default": name}
    return {
        "title": name,
        "type": "object",
        "properties": {"name": kind, **options},
        "required": ["name", *found.get("required", [])],
        "additionalProperties": False,
    }
