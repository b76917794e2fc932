"""What each registered backend is: for whom it can answer, what it needs, and its options with their bounds."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from backends.base import Backend, Capabilities
from backends.errors import ConfigError
from backends.registry import Registered, load_backend

_KINDS = {"object": "mapping", "array": "list", "string": "text", "boolean": "true or false"}
_BOUNDS = {
    "exclusiveMinimum": "above {}",
    "minimum": "at least {}",
    "exclusiveMaximum": "below {}",
    "maximum": "at most {}",
}


@dataclass(frozen=True, slots=True)
class OptionText:
    """One option: the values that it takes, its default as JSON (None: it must be set), and what it is for."""

    name: str
    values: str
    default: str | None
    about: str


@dataclass(frozen=True, slots=True)
class BackendText:
    """A backend as people read of it.

    Where its class cannot be loaded, ``problem`` says why in one line, and nothing is known but ``name``, ``target``
    and ``origin``. ``needs`` is what must be there beside the program.
    """

    name: str
    target: str
    origin: str
    about: str = ""
    needs: tuple[str, ...] = ()
    capabilities: Capabilities | None = None
    options: tuple[OptionText, ...] = ()
    problem: str | None = None

    @property
    def roles(self) -> str:
        """Whether it can be P (write responses), Q (be asked about them), or both."""
        if self.capabilities is None:
            return "unknown"
        return "P and Q" if self.capabilities.samples else "Q"


def describe(name: str, place: Registered) -> BackendText:
    """A backend's text; its class is imported."""
    try:
        backend = load_backend(name, {name: place.target})
    except ConfigError as error:
        return BackendText(name, place.target, place.origin, problem=str(error))
    return BackendText(
        name,
        place.target,
        place.origin,
        (inspect.getdoc(backend) or "").split("\n\n", 1)[0].replace("\n", " "),
        backend.needs,
        backend.capabilities,
        option_texts(backend),
    )


def option_texts(backend: type[Backend]) -> tuple[OptionText, ...]:
    """A backend's options, in the order in which they are written."""
    schema = backend.Options.model_json_schema()
    texts: list[OptionText] = []
    for name, field in backend.Options.model_fields.items():
        part: dict[str, Any] = schema["properties"][name]
        default = None if field.is_required() else _json(field.get_default(call_default_factory=True))
        texts.append(OptionText(name, _values(part, schema.get("$defs", {})), default, field.description or ""))
    return tuple(texts)


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _values(part: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """``integer, at least 1, at most 1000`` of a part of a JSON schema."""
    if "$ref" in part:
        return _values(defs[part["$ref"].rsplit("/", 1)[1]], defs)
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(_values(each, defs) for each in part["anyOf"]))
    if "enum" in part or "const" in part:
        return ", ".join(map(str, part.get("enum", [part.get("const")])))
    bounds = [text.format(part[name]) for name, text in _BOUNDS.items() if name in part]
    kind = str(part.get("type", "any value"))
    return ", ".join([_KINDS.get(kind, kind), *bounds])


def short_text(each: BackendText) -> Iterator[str]:
    """A backend in a few lines, with an empty one at the end."""
    yield f"{each.name}  ({each.origin}; {each.target})"
    if each.problem is not None or each.capabilities is None:
        yield f"  cannot be used: {each.problem}"
    else:
        can = each.capabilities
        flags = [name for name in can._fields if getattr(can, name) is True]
        yield f"  {each.about}"
        yield f"  can be {each.roles}; lists of up to {can.max_top_logprobs:,}; {', '.join(flags) or 'nothing more'}"
        for need in each.needs:
            yield f"  needs {need}"
    yield ""


def full_text(each: BackendText) -> Iterator[str]:
    """A backend with its options."""
    yield from list(short_text(each))[:-1]
    for option in each.options:
        default = "must be set" if option.default is None else f"default {option.default}"
        yield f"  backend.{option.name}  ({option.values}; {default})"
        if option.about:
            yield f"      {option.about}"
    yield ""
