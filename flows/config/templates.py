"""Folders whose names have fields, such as ``results/{date}``: filled in once, at the start of a run.

Dates are UTC and those of the run's scheduled start, so that a late or retried run keeps its folder.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from backends.errors import ConfigError, did_you_mean

# Those that every C library writes alike; %x and %c, say, depend on the machine's language.
_DIRECTIVES = frozenset("aAbBdfGHIjmMpSuUVwWyYzZ%")
# The same for all runs of a deployment. The others differ; a history in such a place would have one row.
_FIXED_FIELDS = ("deployment_name", "deployment.name", "flow.name")


@dataclass(frozen=True, slots=True)
class RunValues:
    """What the fields stand for. The id and name of the flow run are ``None`` before there is one (a dry run)."""

    scheduled_for: datetime
    flow_run_id: str | None = None
    flow_run_name: str | None = None
    flow_name: str = "kl-divergence"
    deployment_name: str | None = None

    @classmethod
    def of_this_run(cls) -> RunValues:
        """Those of the flow run that is under way; asked of the server once, at the start: later it may be away."""
        # Imported late: a program prepares Prefect's settings before anything loads it.
        from prefect.runtime import deployment, flow_run

        run_id = flow_run.id
        if run_id is not None and run_id in _known:
            return _known[run_id]
        values = cls(
            scheduled_for=flow_run.scheduled_start_time.astimezone(UTC),
            flow_run_id=flow_run.id,
            flow_run_name=flow_run.name,
            flow_name=flow_run.flow_name,
            deployment_name=deployment.name,
        )
        values.note()
        return values

    def note(self) -> None:
        """These are the values of their run from now on."""
        if self.flow_run_id is not None:
            _known[self.flow_run_id] = self

    @classmethod
    def of_a_dry_run(cls) -> RunValues:
        """Those of a run that would start now."""
        return cls(datetime.now(UTC))


_known: dict[str, RunValues] = {}  # flow run → its values


def _scheduled(values: RunValues) -> datetime:
    return values.scheduled_for


def _day_before(values: RunValues) -> datetime:
    return values.scheduled_for - timedelta(days=1)


class _Moment(NamedTuple):
    """A field that is a time: which one, and how it is written without a format of its own."""

    of: Callable[[RunValues], datetime]
    format: str
    takes_format: bool


_MOMENTS = {
    "date": _Moment(_scheduled, "%Y-%m-%d", True),
    "yesterday": _Moment(_day_before, "%Y-%m-%d", True),
    "year": _Moment(_scheduled, "%Y", False),
    "month": _Moment(_scheduled, "%m", False),
    "day": _Moment(_scheduled, "%d", False),
    "hour": _Moment(_scheduled, "%H", False),
    # With its year: the last days of December may be in the first week of the next one.
    "week": _Moment(_scheduled, "%G-W%V", False),
    "flow_run.scheduled_start_time": _Moment(_scheduled, "%Y-%m-%dT%H-%M-%SZ", True),
}
# Field → attribute of `RunValues`.
_NAMES = {
    "flow_run_id": "flow_run_id",
    "flow_run_name": "flow_run_name",
    "deployment_name": "deployment_name",
    "flow_run.id": "flow_run_id",
    "flow_run.name": "flow_run_name",
    "deployment.name": "deployment_name",
    "flow.name": "flow_name",
}
FIELDS = (*_MOMENTS, *_NAMES)


class _Part(NamedTuple):
    """Literal text, and the field after it (None at the end)."""

    text: str
    field: str | None
    format: str


def _parts(template: str) -> Iterator[_Part]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"{template!r}: {error}. Write a field as {{date}}, a brace itself as {{{{ or }}}}."
        ) from error
    for text, field, form, conversion in parsed:
        if field is not None:
            _check_field(template, field.strip(), form or "", conversion)
        yield _Part(text, None if field is None else field.strip(), form or "")


def _check_field(template: str, field: str, form: str, conversion: str | None) -> None:
    if field not in FIELDS:
        hint = did_you_mean(field, FIELDS)
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ConfigError(
            f"{template!r} has the unknown field {{{field}}}.{hint} Known: {known}. A brace itself is {{{{ or }}}}."
        )
    if conversion:
        raise ConfigError(f"{template!r}: {{{field}!{conversion}}} is not possible; write {{{field}}}.")
    if not form:
        return
    moment = _MOMENTS.get(field)
    if moment is None or not moment.takes_format:
        raise ConfigError(f"{template!r}: {{{field}}} takes no format; {{date:{form}}} would.")
    _check_format(template, field, form)


def _check_format(template: str, field: str, form: str) -> None:
    found = re.findall("%(.?)", form)
    unknown = [letter for letter in found if letter not in _DIRECTIVES]
    if unknown or not any(letter != "%" for letter in found):
        what = f"%{unknown[0]} is not known" if unknown else "it holds no part of a date"
        raise ConfigError(f"{template!r}: in {{{field}:{form}}} {what}; write for example {{{field}:%Y/%m/%d}}.")
    if {"", ".", ".."} & set(re.split(r"[/\\]", form)) or "{" in form or "}" in form:
        raise ConfigError(
            f"{template!r}: {{{field}:{form}}} is no part of a path; write for example {{date:%Y/%m/%d}}."
        )


def check_template(template: str) -> None:
    """Refuse what cannot be filled in.

    Raises
    ------
    ConfigError
        With the template, the field and the fields that exist.
    """
    for _ in _parts(template):
        pass


def check_history_template(template: str) -> None:
    """As `check_template`; and refuse fields that differ from run to run, as a history is of many runs."""
    changing = [part.field for part in _parts(template) if part.field not in (None, *_FIXED_FIELDS)]
    if changing:
        raise ConfigError(
            f"{template!r}: a history is of many runs, and {{{changing[0]}}} differs between them; only "
            f"{', '.join(f'{{{name}}}' for name in _FIXED_FIELDS)} can be part of its path."
        )


def double_brace_warning(template: str) -> str | None:
    """What to say of a template in which a field stands in double braces, where nothing is filled in."""
    names = "|".join(re.escape(name) for name in FIELDS)
    found = re.search(rf"\{{\{{\s*({names})\s*(:[^{{}}]*)?\}}\}}", template)
    if found is None:
        return None
    return f"{template!r}: {found[0]} is a name with braces in it; the field is written {{{found[1]}}}"


def differs_between_runs(template: str) -> bool:
    """Whether two runs of one deployment get two folders."""
    return any(part.field not in (None, *_FIXED_FIELDS) for part in _parts(template))


def has_fields(template: str) -> bool:
    """Whether there is anything to fill in."""
    return any(part.field is not None for part in _parts(template))


def fixed_part(template: str) -> str:
    """The text before the first field; all of it if there is none."""
    fixed = ""
    for part in _parts(template):
        fixed += part.text
        if part.field is not None:
            break
    return fixed


def names_the_run(template: str) -> bool:
    """Whether it has a field that is known only when there is a flow run."""
    return any(_NAMES.get(part.field or "") in ("flow_run_id", "flow_run_name") for part in _parts(template))


def escaped(path: str) -> str:
    """A template that stands for ``path`` itself."""
    return path.replace("{", "{{").replace("}", "}}")


def fill(template: str, values: RunValues) -> str:
    """The path that a template stands for. A value never adds a level: slashes in names become dashes.

    The id or name of a flow run that does not exist yet stays as it is written.

    Raises
    ------
    ConfigError
        If the template has a fault, or asks for the name of a deployment and there is none.
    """
    return "".join(
        part.text + ("" if part.field is None else _value(template, part.field, part.format, values))
        for part in _parts(template)
    )


def _value(template: str, field: str, form: str, values: RunValues) -> str:
    if field in _MOMENTS:
        moment = _MOMENTS[field]
        pieces = re.split(r"([/\\])", form or moment.format)
        written = [piece if piece in ("/", "\\") else moment.of(values).strftime(piece) for piece in pieces]
        return "".join(written)
    value: str | None = getattr(values, _NAMES[field])
    if value:
        return _inside_folder(value)
    if _NAMES[field] == "deployment_name":
        raise ConfigError(
            f"{template!r} needs the name of a deployment, and this run belongs to none; start it from a deployment, "
            f"or write a name for {{{field}}}."
        )
    return f"{{{field}}}"


def _inside_folder(value: str) -> str:
    """A name as one part of a path: no separators, no control characters, no dots that could mean the folder above."""
    plain = re.sub(r"[/\\{}\x00-\x1f\x7f]", "-", value)
    return re.sub(r"^\.+", lambda dots: "-" * len(dots[0]), plain)
