"""Model Q's lists from files: a second log of the same texts, another engine's answers, somebody else's data."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from pydantic import Field, field_validator

from backends.base import Backend, BackendOptions, Capabilities, ScoreRequest
from backends.errors import ModelNotUsableError
from backends.files.contexts import ANY_MODEL, Asked, Contexts, Found, usable
from backends.files.index import Index, changed, index_of, last_turn, question_id
from backends.storage import Location, is_remote
from kl.columns import Positions
from kl.input.responses import ResponseFile
from kl.records import Position, Prompt, Response, Score, ScoreFailure
from kl.tables.context_counts import RETOKENISED

logger = logging.getLogger(__name__)

NOT_IN_FILES = "not-in-files"
_MOST_BYTES = 100_000_000  # of JSON, whose responses are in memory parsed
_SHOWN = 20  # of a kind of warning
_TOGETHER = 4  # positions of one response, from which on all of them are made objects at once
_RAW = (
    "%s: %s was given its prompt as it is, without a chat template. Its lists are of P's contexts only "
    "if P was given the same text: P's files then note `raw-prompt` too."
)


class FilesOptions(BackendOptions):
    """Where Q's files are."""

    dir: Location = Field(description="Folder with Q's responses, in any form that input files may have.")
    pattern: str = Field(default="*.json*", min_length=1, description="Which files of the folder are read (glob).")
    content_sha256: str | None = Field(
        default=None, description="Hash of the files' contents; found by the run, under which answers are kept."
    )

    @field_validator("dir", mode="before")
    @classmethod
    def _home(cls, value: Any) -> Any:
        # A path in a YAML file or after "=" has not been through a shell.
        return os.path.expanduser(value) if isinstance(value, str) and "://" not in value else value


class FilesBackend(Backend):
    """Answers from files: Q's lists are those of its logged responses, where one has the same tokens before it."""

    Options: ClassVar[type[BackendOptions]] = FilesOptions
    name = "files"
    needs = ("a folder with Q's responses (backend.dir)",)
    capabilities: ClassVar[Capabilities] = Capabilities(
        max_top_logprobs=1_000_000, token_ids=True, remote=False, discovers=True, recorded=True
    )

    def __init__(self, options: BackendOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        self._index: Index | None = None
        self._parsed: OrderedDict[str, tuple[int, Contexts]] = OrderedDict()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._absent: set[str] = set()
        self._told: set[str] = set()
        self._raw_is_said = False
        self._unreadable: Counter[str] = Counter()

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        """The contents of all files, and how many entries of their lists are taken.

        Raises
        ------
        ConfigError
            If the files cannot be read.
        """
        own = cast("FilesOptions", options)
        digest = own.content_sha256 or index_of(own.dir, own.pattern).digest
        return {"backend": cls.name, "files_sha256": digest, "top_logprobs": request.top_logprobs}

    async def discover(self, model: str, *, call: bool = True) -> BackendOptions:
        """The options with the hash of the files, which are read for it; a dry run reads them too.

        Raises
        ------
        ConfigError
            If the files cannot be read.
        """
        own = cast("FilesOptions", self.options)
        index = await asyncio.to_thread(index_of, own.dir, own.pattern)
        folder = own.dir if is_remote(own.dir) else own.dir.absolute()
        return own.model_copy(update={"dir": folder, "content_sha256": index.digest})

    async def preflight(self, model: str) -> str | None:
        """Find a response of the model; returns its version, or name.

        Raises
        ------
        ModelNotUsableError
            With the models that the files name.
        """
        return await asyncio.to_thread(self._find_model, model)

    def _find_model(self, model: str) -> str | None:
        names: Counter[str] = Counter()
        index = self._opened()
        for prompt_id in index.places:
            for logged in self._contexts(prompt_id).logged:
                response = logged.response
                if logged.is_of(model):
                    return response.model_version or response.model
                names[response.model or "no name"] += 1
        known = (
            ", ".join(f"{name} ({n:,} responses)" for name, n in names.most_common(10)) or "nothing that can be read"
        )
        raise ModelNotUsableError(
            f"no response in {self._folder} is of the model {model!r}; there are: {known}. Set model2 to one of them, "
            f"or to {ANY_MODEL!r}.",
            permanent=True,
            backend=self.name,
            model=model,
        )

    async def rendered_prompt_sha256(self, prompt: Prompt, model: str) -> str | None:
        """What the model's responses to a prompt state of it."""
        return await asyncio.to_thread(self._stated_prompt, prompt, model)

    def _stated_prompt(self, prompt: Prompt, model: str) -> str | None:
        with self._lock:
            contexts = self._contexts_of(prompt)
        logged = () if contexts is None else (item.response for item in contexts.logged if item.is_of(model))
        return next((item.rendered_prompt_sha256 for item in logged if item.rendered_prompt_sha256), None)

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Yield one result for each key asked, response by response.

        Raises
        ------
        ConfigError
            If the files are not those that the answers are kept under.
        """
        for request in requests:
            for result in await asyncio.to_thread(self._answers, request):
                yield result

    def report(self) -> dict[str, Any]:
        """How many contexts were found, and why the others were not."""
        index = self._index
        files = {} if index is None else {"files": index.n_files, "prompts_in_files": len(index.places)}
        return {
            **files,
            "contexts": dict(sorted(self._counts.items())),
            "prompts_not_in_files": len(self._absent),
            "responses_not_readable": dict(sorted(self._unreadable.items())),
        }

    def _answers(self, request: ScoreRequest) -> list[Score | ScoreFailure]:
        results: list[Score | ScoreFailure]
        with self._lock:
            contexts = self._contexts_of(request.prompt)
            if contexts is None:
                message = self._note_absent(request)
                results = [ScoreFailure(key, NOT_IN_FILES, message, final=True) for key in request.keys]
            else:
                results = list(_looked_up(request, contexts))
            for result in results:
                self._counts["answered" if isinstance(result, Score) else result.reason] += 1
        return results

    def _contexts_of(self, prompt: Prompt) -> Contexts | None:
        prompt_id = question_id(prompt)
        return self._contexts(prompt_id) if prompt_id in self._opened().places else None

    def _opened(self) -> Index:
        own = cast("FilesOptions", self.options)
        if self._index is None:
            self._index = index_of(own.dir, own.pattern)
            if own.content_sha256 not in (None, self._index.digest):
                raise changed(own.dir)
        return self._index

    @property
    def _folder(self) -> Path:
        return cast("FilesOptions", self.options).dir

    def _contexts(self, prompt_id: str) -> Contexts:
        """The responses to a prompt, parsed; those that were used last are kept."""
        if prompt_id in self._parsed:
            self._parsed.move_to_end(prompt_id)
            return self._parsed[prompt_id][1]
        places = self._opened().places[prompt_id]
        files = [place.read() for place in places]
        for file in files:
            self._note_unreadable(file)
        contexts = Contexts.of([response for file in files for response in file.responses])
        self._parsed[prompt_id] = sum(place.size for place in places), contexts
        while len(self._parsed) > 1 and sum(size for size, _ in self._parsed.values()) > _MOST_BYTES:
            self._parsed.popitem(last=False)
        return contexts

    def _note_unreadable(self, file: ResponseFile) -> None:
        """Say which of Q's responses cannot be read, once for each place."""
        if file.source_file in self._told:
            return
        self._told.add(file.source_file)
        if not self._raw_is_said and any(problem.kind == "raw-prompt" for problem in file.problems):
            self._raw_is_said = True
            logger.warning(_RAW, self._folder, file.source_file)
        for response in file.unreadable:
            self._unreadable[response.kind] += 1
            if self._unreadable.total() <= _SHOWN:
                logger.warning("%s: %s", self._folder, response.message)

    def _note_absent(self, request: ScoreRequest) -> str:
        near = self._opened().last_turns.get(last_turn(request.prompt), 0)
        other = (
            f" {near:,} in them end with the same turn and have another system text, or other turns before."
            if near
            else ""
        )
        message = f"no file of {self._folder} has this prompt.{other} Give P and Q the same prompts."
        prompt_id = question_id(request.prompt)
        if prompt_id not in self._absent:
            self._absent.add(prompt_id)
            if len(self._absent) <= _SHOWN:
                logger.warning("%s: %s", request.name, message)
        return message


def _looked_up(request: ScoreRequest, contexts: Contexts) -> Iterator[Score | ScoreFailure]:
    """The answer at each position asked."""
    asked = Asked.of(request)
    by_ids = bool(asked.by_id) and contexts.shares_vocabulary(asked, request.model)
    lists: dict[int, Positions | list[Position]] = {}
    uses: Counter[int] = Counter()

    def read(found: Found) -> Position:
        positions = Positions.of(found.logged.response.positions)
        number = id(found.logged)
        uses[number] += 1
        if uses[number] == _TOGETHER:
            lists[number] = list(positions)
        return lists.get(number, positions)[found.position]

    for position, key, _ in request.contexts():
        reason: str | None = None
        for found in contexts.find(request, asked, position, by_ids=by_ids):
            entry = read(found)
            why = usable(entry)
            if why is None:
                yield _score(key, found.logged.response, entry, request.top_logprobs)
                break
            reason = reason or why
        else:
            yield _failure(request, contexts, position, key, reason)


def _score(key: str, response: Response, entry: Position, k: int) -> Score:
    """What Q's log says at a position: its own token too, which may be P's and outside the list."""
    return Score(
        key,
        entry.top[:k],
        None if entry.sampled.logprob is None else entry.sampled,
        response.model_version or response.model,
        n_dropped=entry.n_dropped,
    )


def _failure(request: ScoreRequest, contexts: Contexts, position: int, key: str, reason: str | None) -> ScoreFailure:
    gaps = dict(request.gaps)
    if reason is not None:
        message = (
            "the files have this position, and its list cannot be used as Q's; they say why when they are P's input."
        )
        return ScoreFailure(key, reason, message, final=True)
    if position in gaps:
        message = "no text says what P had written here, and no response in the files has the same token ids."
        return ScoreFailure(key, gaps[position], message, final=True)
    if not any(logged.is_of(request.model) for logged in contexts.logged):
        message = f"the files have this prompt, and no response of {request.model!r} to it."
        return ScoreFailure(key, NOT_IN_FILES, message, final=True)
    if contexts.is_cut_otherwise(request, position):
        message = "the files have this text, cut into other tokens: their list is of another context."
        return ScoreFailure(key, RETOKENISED, message, final=True)
    message = f"no response of {request.model!r} in the files begins with these {position} tokens."
    return ScoreFailure(key, NOT_IN_FILES, message, final=True)
