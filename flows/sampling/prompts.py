"""The prompts that models answer: written in the configuration, read from a data set, or positions to go on from."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backends.errors import ConfigError, MissingDependencyError
from backends.extras import install_extra
from backends.storage import exists, read_bytes
from flows.config.sampling import DatasetConfig, SampleConfig
from kl.input.problems import Notes
from kl.input.prompts import read_prompt
from kl.records import Prompt

logger = logging.getLogger("flows.sample")

_TOLD = 5  # records that cannot be used are told one by one up to here
_ABOUT = ("token", "token_id", "source", "score", "is_infinite", "scores")  # of a position, kept with it


@dataclass(frozen=True, slots=True)
class Asked:
    """What the responses of one file answer; with ``continues`` they go on from a prefix."""

    prompt: Prompt
    prefix: str = ""
    prefix_ids: tuple[int, ...] | None = None
    continues: Mapping[str, Any] | None = None


class Prompts(NamedTuple):
    """What is asked, and how many records could not be used."""

    asked: tuple[Asked, ...]
    n_unusable: int


class _Record(NamedTuple):
    """A value that may be a prompt, and what it is called in messages."""

    name: str
    value: Any
    system: Any = None


def find_prompts(config: SampleConfig, system: str | None) -> Prompts:
    """The prompts of a configuration, each once; what cannot be used is said, a line each.

    Parameters
    ----------
    system : str, optional
        The system text that the backend gives in place of any other; an empty one means none.

    Raises
    ------
    ConfigError
        If a file cannot be read, or nothing in it can be used.
    """
    unusable: list[str] = []
    if config.continue_from is not None:
        asked: Iterable[Asked] = _positions(config.continue_from, unusable)
    elif config.dataset is not None:
        asked = _of_dataset(config.dataset, unusable)
    else:
        records = (_Record(f"prompt {index}", text) for index, text in enumerate(config.prompts))
        asked = _usable(records, unusable)
    settled = [replace(item, prompt=_with_system(item.prompt, config.system, system)) for item in asked]
    distinct = _distinct(settled)
    for line in unusable[:_TOLD]:
        logger.warning("%s", line)
    if len(unusable) > _TOLD:
        logger.warning("… and %d further records that cannot be used", len(unusable) - _TOLD)
    if len(distinct) < len(settled):
        logger.warning("%d prompts are there more than once; each is sampled once", len(settled) - len(distinct))
    if not distinct:
        raise ConfigError(f"no prompt is left to sample: {unusable[0] if unusable else 'none fits the settings'}")
    return Prompts(tuple(distinct), len(unusable))


def check_source(config: SampleConfig) -> None:
    """Refuse a file that is not there, and a data set whose package is not; neither is read.

    Raises
    ------
    ConfigError
        In one line.
    """
    dataset = config.dataset
    if dataset is not None and dataset.source == "huggingface" and importlib.util.find_spec("datasets") is None:
        raise _no_datasets()
    for setting, path in (("continue_from", config.continue_from), ("dataset", dataset and dataset.file_path)):
        if path is not None and not exists(path):
            raise ConfigError(f"{setting}: {path} does not exist.")


def _with_system(prompt: Prompt, of_file: str | None, of_backend: str | None) -> Prompt:
    system = of_backend if of_backend is not None else prompt.system if prompt.system is not None else of_file
    return Prompt(prompt.turns, system or None)


def _distinct(asked: Iterable[Asked]) -> list[Asked]:
    """Each context once; a position that has the context of an earlier one is named with that."""
    found: dict[tuple[Prompt, str], Asked] = {}
    for item in asked:
        first = found.setdefault((item.prompt, item.prefix), item)
        if first is not item and item.continues is not None:
            also = {name: item.continues[name] for name in ("token", "source") if name in item.continues}
            named = dict(first.continues or {})
            found[item.prompt, item.prefix] = replace(first, continues=named | {"also": [*named.get("also", []), also]})
    return list(found.values())


def _usable(records: Iterable[_Record], unusable: list[str]) -> Iterator[Asked]:
    for record in records:
        prompt = _read(record, unusable)
        if prompt is not None:
            yield Asked(prompt)


def _read(record: _Record, unusable: list[str]) -> Prompt | None:
    notes = Notes(record.name)
    prompt = read_prompt({"prompt": record.value, "system": record.system}, notes)
    if notes.first_defect is not None or prompt is None:
        unusable.append(notes.problems()[0].message if notes.problems() else f"{record.name} is no prompt")
        return None
    return prompt


# Data sets.


def _of_dataset(config: DatasetConfig, unusable: list[str]) -> Iterator[Asked]:
    """As many prompts as are wanted, in the order that the settings say."""
    if config.source == "huggingface":
        place, rows = str(config.dataset_name), _hub_rows(config)
    else:
        assert config.file_path is not None, "checked with the settings"
        place, rows = str(config.file_path), _file_rows(config.source, config.file_path)
    order: Iterable[int] = range(len(rows))
    if config.sampling_mode == "random":  # a permutation: with more prompts the first ones stay the same
        order = np.random.default_rng(config.seed).permutation(len(rows)).tolist()
    records = (record for index in order if (record := _record(config, place, index, rows[index], unusable)))
    fitting = (item for item in _usable(records, unusable) if _fits(config, item.prompt))
    return islice(fitting, config.num_prompts)


def _fits(config: DatasetConfig, prompt: Prompt) -> bool:
    length = sum(len(turn.content) for turn in prompt.turns)
    return config.min_length <= length and (config.max_length is None or length <= config.max_length)


def _record(config: DatasetConfig, place: str, index: int, row: Any, unusable: list[str]) -> _Record | None:
    """A row as a record; None for one of another language, or without a prompt, which is then noted."""
    name = f"{place}, record {index}"
    if isinstance(row, str):
        return _Record(name, row)
    if not isinstance(row, Mapping):
        unusable.append(f"{name} is no text and no object; it is left out.")
        return None
    if config.language is not None and row.get("language") != config.language:
        return None
    field = "conversation.0.content" if config.use_wildchat_format else config.prompt_field
    try:
        return _Record(name, _field(row, field), row.get("system"))
    except (KeyError, IndexError, TypeError, ValueError):
        known = ", ".join(map(str, row)) or "nothing"
        unusable.append(f"{name} has no {field!r} (it has {known}); set dataset.prompt_field. It is left out.")
        return None


def _field(row: Any, path: str) -> Any:
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for part in path.split("."):
        row = row[int(part)] if isinstance(row, list | tuple) else row[part]
    return row


def _file_rows(source: str, path: Path) -> Sequence[Any]:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"dataset: {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"dataset: {path} is not UTF-8 (byte {error.start}).") from error
    if source == "file":
        return [line.strip() for line in text.split("\n") if line.strip()]
    if source == "jsonl":
        return [_json_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"dataset: {path} is not JSON: {error}. One object a line is source jsonl.") from error
    if not isinstance(rows, list):
        raise ConfigError(f"dataset: {path} holds a {type(rows).__name__}; it must be a list of texts or records.")
    return rows


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ConfigError(f"dataset: line {number} of {path} is not JSON: {error}.") from error


def _hub_rows(config: DatasetConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _no_datasets() from error
    try:
        return datasets.load_dataset(config.dataset_name, split=config.split)
    except Exception as error:  # whatever the Hub, the disk or a script of the data set raises
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"dataset {config.dataset_name!r}, split {config.split!r}, cannot be loaded: {type(error).__name__}: {said}"
        ) from error


def _no_datasets() -> MissingDependencyError:
    return MissingDependencyError(
        f"dataset.source huggingface needs the package datasets, which is not installed: {install_extra('hf-datasets')}"
    )


# Positions to go on from.


def _positions(path: Path, unusable: list[str]) -> Iterator[Asked]:
    try:
        records = json.loads(read_bytes(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"continue_from: {path} cannot be read: {error}. flows.analyze --threshold writes it."
        ) from error
    if not isinstance(records, list):
        raise ConfigError(f"continue_from: {path} is no list of positions; flows.analyze --threshold writes one.")
    for index, record in enumerate(records):
        name = f"{path}, position {index}"
        if not isinstance(record, dict) or not isinstance(record.get("prefix"), str):
            unusable.append(f"{name} has no 'prefix' that is a text; it is left out.")
            continue
        prompt = _read(_Record(name, record.get("prompt"), record.get("system")), unusable)
        ids = record.get("prefix_token_ids")
        if ids is not None and not (isinstance(ids, list) and all(type(item) is int and item >= 0 for item in ids)):
            unusable.append(f"{name}: 'prefix_token_ids' is no list of whole numbers; it is left out.")
            continue
        if prompt is not None:
            about = {field: record[field] for field in _ABOUT if field in record}
            named = {"prefix": record["prefix"], **({} if ids is None else {"prefix_token_ids": ids}), **about}
            yield Asked(prompt, record["prefix"], None if ids is None else tuple(ids), named)
