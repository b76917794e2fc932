"""Settings as they are written: YAML files and ``--set`` pairs, as plain values that are not validated yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from backends.errors import ConfigError

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
    """The settings in a YAML file.

    Raises
    ------
    ConfigError
        If it cannot be read, is not valid YAML, sets a key twice, or is no mapping.
    """
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
