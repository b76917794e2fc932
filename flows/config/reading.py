"""Settings as they are written, in YAML files, flags and ``--set`` pairs, and as the models that they make.

Flags win over the file, the file over the environment, the environment over the defaults.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from backends.errors import ConfigError, did_you_mean

ModelT = TypeVar("ModelT", bound=BaseModel)

# A mapping of settings that may be written as one of them alone: ``backend: local``.
SHORT_FORMS = {"backend": "name", "task_runner": "kind"}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key written twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is set twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, or in a section of it: ``FILE#SECTION``.

    Raises
    ------
    ConfigError
        If it cannot be read, is not valid YAML, sets a key twice, or is no mapping; or has no such section.
    """
    name, mark, section = path.name.rpartition("#")
    if mark and not path.exists():
        found = read_yaml(path.with_name(name)).get(section)
        if not isinstance(found, dict):
            raise ConfigError(f"the configuration file {path.with_name(name)} has no section {section!r}.")
        return _long_forms(found)
    try:
        # The loader only adds a check to SafeLoader.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # ValueError: such as 2026-13-45
        detail = " ".join(str(error).split())
        raise ConfigError(f"the configuration file {path} is not valid YAML: {detail}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"the configuration file {path} must be a mapping of settings, such as 'model2: NAME'.")
    return _long_forms(values)


def _long_forms(values: dict[str, Any]) -> dict[str, Any]:
    for setting, name in SHORT_FORMS.items():
        if isinstance(values.get(setting), str):
            values[setting] = {name: values[setting]}
    return values


def merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put changes into values, mapping by mapping."""
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            merge(values[name], value)
        else:
            values[name] = dict(value) if isinstance(value, Mapping) else value


def parse_set(pair: str) -> dict[str, Any]:
    """The settings that ``--set KEY=VALUE`` means.

    Raises
    ------
    ConfigError
        If it is not a path of names, "=", and a value.
    """
    path, equals, text = pair.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {pair!r} is not KEY=VALUE; write for example --set backend.poll_interval_s=30.")
    value: Any = _set_value(text)
    if len(names) == 1 and names[0] in SHORT_FORMS and isinstance(value, str):
        names.append(SHORT_FORMS[names[0]])
    for name in reversed(names):
        value = {name: value}
    return value


def _set_value(text: str) -> Any:
    """Numbers, yes and no, null, and what is written with quotes, brackets or braces as in YAML; else the text itself.

    As plain YAML, a system text such as ``Answer: in short`` would be a mapping, and ``Use #tags`` would lose its end.
    """
    try:
        value: Any = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text
    stripped = text.strip()
    if stripped.startswith(("{", "[", "'", '"')) or isinstance(value, int | float):
        return value
    return None if stripped in {"null", "~"} else text


def build_config(
    model: type[ModelT],
    config_file: Path | None,
    flags: Mapping[str, Any],
    sets: Sequence[str] = (),
) -> ModelT:
    """The configuration from a YAML file, flags and ``--set`` pairs, in rising order of precedence.

    Raises
    ------
    ConfigError
        One line that names the setting, the value and what is allowed.
    """
    values = read_yaml(config_file) if config_file else {}
    merge(values, {name: value for name, value in flags.items() if value is not None})
    for pair in sets:
        merge(values, parse_set(pair))
    return validate(model, values)


def validate(model: type[ModelT], values: Mapping[str, Any]) -> ModelT:
    """Validate settings that come as plain values.

    Raises
    ------
    ConfigError
        One line with every problem.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = dict.fromkeys(_problem(model, item) for item in error.errors())
        raise ConfigError("; ".join(problems) + ".") from error


# What pydantic says of Python's types, in the words of who writes a YAML file.
_PLAIN_WORDS = {
    "path_type": "should be a path",
    "tuple_type": "should be a list",
    "model_type": "should be a mapping of settings",
    "dict_type": "should be a mapping of settings",
}


def _problem(model: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    description = _description(model, location)
    if item["type"] == "missing":
        flag = "--" + location[0].replace("_", "-") if len(location) == 1 else f"--set {'.'.join(location)}=…"
        return f"{'.'.join(location)} is not set ({flag}): {description}"
    if item["type"] == "extra_forbidden":
        known = _fields_beside(model, location)
        hint = did_you_mean(location[-1], known)
        return f"unknown setting {'.'.join(location)!r}.{hint} Known: {', '.join(sorted(known))}"
    message = _PLAIN_WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
    if not location:
        return message
    return f"{'.'.join(location)}: {message.rstrip('.')}, got {item['input']!r}. {description}".rstrip(". ")


def inner_model(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that holds settings of its own; None for a plain one."""
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _fields_beside(model: type[BaseModel], location: list[str]) -> list[str]:
    """The settings that exist where an unknown one was written."""
    for name in location[:-1]:
        inner = inner_model(model.model_fields[name])
        assert inner is not None, "only a model has settings inside"
        model = inner
    return list(model.model_fields)


def _description(model: type[BaseModel], location: list[str]) -> str:
    """What the innermost setting that a location names is for, with its bounds."""
    text = ""
    inner: type[BaseModel] | None = model
    for name in location:
        field = inner.model_fields.get(name) if inner is not None else None
        if field is None:
            break
        text, inner = field.description or text, inner_model(field)
    return text.rstrip(".")
