"""Files of responses: what is in them already, and how responses get into them."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from backends.base import SampleRequest
from backends.errors import ConfigError
from backends.storage import files_in, local_copies
from flows.config.sampling import SampleConfig, folder_name
from flows.folder.output import write_json
from flows.sampling.prompts import Asked
from kl.input.responses import RENDERED, parse_responses
from kl.input.writer import document_head
from kl.output.atomic import json_bytes

logger = logging.getLogger("flows.sample")

Entry = dict[str, Any]

_NUMBERED = re.compile(r"\d{3,}_")

SAMPLED_BY = "backend_identity_sha256"  # files of earlier versions do not state it
# What a file of responses must agree with; files of earlier versions state the others only.
_ALWAYS = ("prompt", "system", "model", "sampling", "continues")


@dataclass(eq=False)
class Target:
    """One file: the responses of a model to a prompt.

    ``entries`` are the responses that are there, by their number, packed: of many files none may be whole for long, and
    a response is megabytes as objects; ``is_there`` is whether the file is.
    """

    path: Path
    model: str
    asked: Asked
    head: Entry
    entries: dict[int, bytes] = field(default_factory=dict[int, bytes])
    is_there: bool = False

    @property
    def n_there(self) -> int:
        """How many responses are there."""
        return len(self.entries)

    @property
    def n_wanted(self) -> int:
        """How many responses the file is to hold."""
        return int(self.head["num_responses"])

    @property
    def missing(self) -> list[int]:
        """The numbers of the responses that are not there."""
        return [index for index in range(self.n_wanted) if index not in self.entries]

    def put(self, index: int, entry: Entry) -> None:
        """Take in a response."""
        self.entries[index] = zlib.compress(json.dumps(entry).encode("ascii"), 1)

    def let_go(self) -> None:
        """Keep in memory only which responses are in the file."""
        self.entries = {index: b"" for index in self.entries}

    def request(self, config: SampleConfig, index: int, key: str) -> SampleRequest:
        """What a backend is asked for one of them."""
        asked, name = self.asked, f"{self.path.stem}#{index}"
        settings = config.sampling.settings
        return SampleRequest(key, name, self.model, asked.prompt, settings, index, asked.prefix, asked.prefix_ids)

    def write(self) -> list[str]:
        """Write the file with the responses that are there; a line for each that the readers refuse."""
        document = self.head | {"responses": [_unpacked(self.entries[index]) for index in sorted(self.entries)]}
        write_json(self.path, document)
        self.is_there = True
        if self.asked.continues is not None:
            return []  # what goes on from a prefix is no input of a run
        read = parse_responses(json_bytes(document), self.path.name)
        return [item.message for item in read.unreadable]


def _unpacked(packed: bytes) -> Entry:
    return json.loads(zlib.decompress(packed))


def targets_of(config: SampleConfig, asked: Sequence[Asked], *, states_top_k: bool) -> list[Target]:
    """The files that a configuration asks for, with what is in them; nothing is written.

    Parameters
    ----------
    states_top_k : bool
        Whether it is known that no top-k cut is made, so that the files can say so: one that is not stated could be
        any.

    Raises
    ------
    ConfigError
        If there is a file of other responses under the name of one of these.
    """
    folder = config.output_dir
    assert folder is not None, "checked with the settings"
    several = len(config.models) > 1
    if several:
        _check_layout(config, folder)
    sampling = config.sampling.settings.model_dump() | ({"top_k": 0} if states_top_k else {})
    targets: list[Target] = []
    for model in config.models:
        place, mine = folder / folder_name(model) if several else folder, list[Target]()
        for item in asked:
            head = document_head(item.prompt, model, sampling) | {"num_responses": config.num_responses}
            if item.continues is not None:
                head["continues"] = dict(item.continues)
            mine.append(Target(place, model, item, head))
        there = [path for path in files_in(place, ".json") if _NUMBERED.match(path.name)]
        _take_in(mine, there)
        _name_new(mine, place, there)
        targets += mine
    return targets


def _name_new(targets: Sequence[Target], place: Path, there: Sequence[Path]) -> None:
    """Name the files that are not there after the place of their prompt, or, where that number is taken, at the end."""
    taken = {int(path.name.partition("_")[0]) for path in there}
    spare = count(max([len(targets), *(number + 1 for number in taken)]))
    for number, target in enumerate(targets):
        if not target.is_there:
            chosen = next(spare) if number in taken else number
            target.path = place / f"{chosen:03d}_{_slug(target.asked)}.json"


def _slug(item: Asked) -> str:
    text = item.prompt.turns[-1].content
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"


def _check_layout(config: SampleConfig, folder: Path) -> None:
    # One model alone has no folder of its own; a second one must not make it be asked again.
    alone = [path for path in files_in(folder, ".json") if _NUMBERED.match(path.name)]
    for path, copy in local_copies(alone[:1]):
        model = _read(path, copy).get("model")
        if model in config.models:
            raise ConfigError(
                f"{folder} holds responses of {model} from a sampling of this model alone. Move them to "
                f"{folder / folder_name(str(model))} to go on with several models, or choose another output_dir."
            )


def _take_in(targets: Sequence[Target], there: Sequence[Path]) -> None:
    """Read the files that are there; each is known by its prompt, for its number changes when others come or go.

    Raises
    ------
    ConfigError
        If one holds other responses.
    """
    by_context = {_context(target.head): target for target in targets}
    for path, copy in local_copies(there):
        document = _read(path, copy)
        target = by_context.get(_context(document))
        if target is None:
            continue
        entries = dict(_numbered(path, document))
        same = all(document.get(name) == target.head.get(name) for name in _ALWAYS)
        n_asked = document.get("num_responses", len(entries))
        if not same or n_asked != target.n_wanted or max(entries, default=0) >= target.n_wanted:
            raise ConfigError(
                f"{path} holds responses that were sampled otherwise. Choose another output_dir, or move it."
            )
        if target.is_there:
            logger.warning("%s and %s answer one prompt; the one with more responses counts", target.path, path)
            if len(entries) <= target.n_there:
                continue
        target.path, target.entries, target.is_there = path, dict.fromkeys(entries, b""), True
        target.head |= {name: document[name] for name in (SAMPLED_BY, RENDERED) if name in document}
        if target.missing:
            for index, entry in entries.items():
                target.put(index, entry)


def _context(document: Mapping[str, Any]) -> str:
    """What is asked in a file, however it is sampled."""
    begun = document.get("continues")
    prefix = begun.get("prefix") if isinstance(begun, Mapping) else None
    return json.dumps([document.get("prompt"), document.get("system"), prefix], sort_keys=True)


def _read(path: Path, copy: Path) -> Entry:
    try:
        document: Any = json.loads(copy.read_text(encoding="utf-8"))
        document.get("model"), len(document["responses"])
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no file of responses ({error}). Choose another output_dir, or move it."
        ) from error
    return document


def _numbered(path: Path, document: Mapping[str, Any]) -> Iterator[tuple[int, Entry]]:
    """The responses of a file by their number; files of earlier versions hold all of them, in order."""
    for place, entry in enumerate(document["responses"]):
        number = entry.get("sample", place) if isinstance(entry, dict) else None
        if not isinstance(number, int):
            raise ConfigError(f"{path} is no file of responses ({entry!r:.40}). Choose another output_dir, or move it.")
        yield number, entry
