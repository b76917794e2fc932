"""A run's configuration with all that follows from it: resolved once, then passed on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from backends.base import Backend, BackendOptions, ScoreRequest, compares_pairs
from backends.errors import ModelNotUsableError
from backends.keys import context_keys, wanted_keys
from backends.storage import is_remote
from flows.config.backend import check_capabilities, resolve_backend
from flows.config.folders import resolve_folders
from flows.config.models import RunConfig
from flows.config.submitted import values_for
from flows.config.templates import RunValues
from flows.folder.layout import OutputFolder
from flows.folder.refusals import Refusal
from kl.columns import NO_ID, Positions, TopLists
from kl.records import Response
from kl.statistics.noise_floor import AskedAgain
from kl.statistics.position_sampling import Drawn, draw, draw_again

# Whose answer: of a number, Q's when it is asked that many times.
Side = Literal["p", "q", "again"] | int

# In the identity of what is asked a second time: another score than the first one of the same context.
_AGAIN = {"asked": 2}


@dataclass(frozen=True, slots=True)
class Comparison:
    """P's responses against model Q: what is asked, of whom, and where the answers go.

    Attributes
    ----------
    written, config : RunConfig
        As the user wrote it, and with its folders filled in.
    backend, options : type of Backend, BackendOptions
        Who is asked about Q; the options are complete, with nothing left to the environment.
    notes : tuple of str
        Settings that this backend has no use for.
    folder : OutputFolder
    refused : mapping of str to Refusal
        Models that wrote responses and cannot be asked again; Q is asked twice in their place, but where their second
        answers to a response were bought before.
    unasked : frozenset of str
        Models that cannot be asked again in this run, but may be in the next.
    """

    written: RunConfig
    config: RunConfig
    backend: type[Backend]
    options: BackendOptions
    notes: tuple[str, ...]
    folder: OutputFolder
    refused: Mapping[str, Refusal] = field(default_factory=dict[str, Refusal])
    unasked: frozenset[str] = frozenset()

    @classmethod
    def of(cls, written: RunConfig, values: RunValues) -> Comparison:
        """Resolve a configuration.

        Raises
        ------
        ConfigError
            If the backend is not there or cannot do what is asked, or a folder cannot be named.
        """
        backend, options, notes = resolve_backend(written)
        check_capabilities(written, backend)
        config = resolve_folders(written, values_for(written, values))
        return cls(written, config, backend, options, tuple(notes), OutputFolder(config.output_dir, config.scores_dir))

    def check(self) -> None:
        """Refuse what can be known to be wrong before anything is made or started; nothing is called.

        Raises
        ------
        ConfigError
            In one line.
        """
        self.config.task_runner.check_installed()
        self.build_backend().check(self.config.model2)

    def made_absolute(self) -> Comparison:
        """The same for processes that have another working directory."""
        names = ("input_dir", "output_dir", "scores_dir")
        folders = {name: absolute(path) for name in names if (path := getattr(self.config, name)) is not None}
        config = self.config.model_copy(update=folders)
        return replace(self, config=config, folder=OutputFolder(config.output_dir, config.scores_dir))

    def without(self, refused: Mapping[str, Refusal], unasked: Iterable[str] = ()) -> Comparison:
        """The same, with Q asked twice in the place of refused models, and others not asked again for now."""
        return replace(self, refused={**self.refused, **refused}, unasked=self.unasked | frozenset(unasked))

    @property
    def place(self) -> str:
        """Where models are asked: another project or location may have what this one refuses."""
        options = self.options.model_dump(include={"project_id", "location"})
        return "/".join(str(value) for value in options.values() if value) or self.config.backend.name

    def build_backend(self, run_id: str | None = None) -> Backend:
        """The backend, not entered yet; ``run_id`` is the flow run that it works for."""
        built = self.backend(self.options, state_dir=self.folder.scores)
        built.run_id = run_id
        return built

    def sides(self) -> tuple[Side, ...]:
        """Q is always asked; P too where its full vocabulary is wanted, which no response file holds; one again."""
        models: tuple[Side, ...] = ("q", "p") if self.config.full_vocabulary else ("q",)
        return (*models, "again") if self.config.noise_floor is not None else (*models, *self.repeats())

    def repeats(self) -> range:
        """The times, from the second on, that Q is asked about each first position."""
        return range(2, (self.config.first_repeats or 1) + 1)

    def drawn(self, response: Response) -> Drawn | None:
        """Which positions are measured, with their probabilities; None if all are."""
        if self.config.positions is None or self.config.positions.first:
            return None  # of first positions no other is read
        return draw(response, self.config.positions.sample)

    def drawn_again(self, response: Response) -> Drawn | None:
        """Which positions are asked a second time, with their probabilities; None if none are."""
        noise = self.config.noise_floor
        return None if noise is None else draw_again(response, noise.sample, self.drawn(response))

    def asked_again(self, response: Response) -> AskedAgain:
        """Who is asked a second time: P, whose first answer is on record; Q where P cannot be, or Q is watched."""
        if self.config.watches_q:
            return "q"
        named = self._named(response, "p", whole=False)
        if named is None:
            return "q"
        refusal = self.refused.get(named[0].model)
        if refusal is None:
            return "p"
        bought = refusal.kept and self._request(response, named, self.drawn_again(response), _AGAIN).keys
        return "p" if bought and refusal.kept.issuperset(bought) else "q"

    @property
    def pairs(self) -> bool:
        """Whether the backend compares the whole vocabularies of P and Q itself, and they are not kept."""
        return self.config.full_vocabulary and not self.config.keep_vocabularies and compares_pairs(self.backend)

    def request(self, response: Response, side: Side) -> ScoreRequest | None:
        """All contexts of a response that can be asked; None if the file names no P that this backend has."""
        if side == "again":
            named = self._named(response, self.asked_again(response), whole=False)
            return None if named is None else self._request(response, named, self.drawn_again(response), _AGAIN)
        if isinstance(side, int):
            named = self._named(response, "q", whole=False)
            return None if named is None else self._request(response, named, None, {"asked": side})
        made = self._first_request(response, side)
        if made is None or not self.pairs:
            return made
        other = self._first_request(response, "p" if side == "q" else "q")
        keys = {} if other is None else dict(zip(other.positions, other.keys, strict=True))
        return replace(made, counterparts=tuple(keys.get(position, "") for position in made.positions))

    def _first_request(self, response: Response, side: AskedAgain) -> ScoreRequest | None:
        named = self._named(response, side, whole=self.config.full_vocabulary)
        if named is None:
            return None
        made = self._request(response, named, self.drawn(response), {})
        return self._with_wanted(made, response) if side == "q" and self.config.wanted_tokens else made

    def _with_wanted(self, request: ScoreRequest, response: Response) -> ScoreRequest:
        wanted = _named_by(Positions.of(response.positions), request.positions)
        return replace(request, wanted=wanted, keys=tuple(wanted_keys(request.keys, wanted)))

    def _request(
        self, response: Response, named: tuple[ScoreRequest, dict[str, Any]], drawn: Drawn | None, more: dict[str, Any]
    ) -> ScoreRequest:
        """The request at the drawn positions; ``more`` is put to its identity."""
        bare, identity = named
        tokens = Positions.of(response.positions).sampled.texts()
        keys = list(context_keys(bare.model, bare.prompt, identity | more, tokens, bare.token_ids))
        positions = _askable(response, bare.token_ids is not None, drawn)
        return replace(bare, positions=tuple(positions), keys=tuple(keys[position] for position in positions))

    def _named(
        self, response: Response, side: AskedAgain, *, whole: bool
    ) -> tuple[ScoreRequest, dict[str, Any]] | None:
        """A request without positions and its identity; None if the file names no P that this backend has."""
        model = self.config.model2 if side == "q" else response.model
        if model is None:
            return None
        bare = self._bare_request(response, side, model, whole=whole)
        try:
            return bare, self.backend.identity(self.options, bare)
        except ModelNotUsableError:
            if side == "q":
                raise
            return None

    def _bare_request(self, response: Response, side: AskedAgain, model: str, *, whole: bool) -> ScoreRequest:
        prompt = response.prompt
        if side == "q" and self.options.system is not None:
            prompt = replace(prompt, system=self.options.system)
        return ScoreRequest(
            name=response.name,
            model=model,
            prompt=prompt,
            text=response.text,
            prefix_ends=tuple(response.prefix_ends().tolist()),
            token_ids=_own_ids(response) if self.backend.capabilities.token_ids else None,
            positions=(),
            keys=(),
            top_logprobs=self.config.k,
            full_vocabulary=whole,
            gaps=response.gaps,
        )


def _named_by(positions: Positions, asked: Sequence[int]) -> TopLists:
    """The tokens that P lists at the positions asked, and the sampled one where it is none of them; without values."""
    at = np.array(asked, dtype=np.int64)
    lists, sampled = positions.tops.take(at), positions.sampled.take(at)
    rows, ids = lists.rows, lists.entries.ids
    own_ids, same_text = sampled.ids[rows], lists.entries.codes() == sampled.codes()[rows]
    # Of a part of a character the text is another one in a list than in the response.
    same = np.where((ids == NO_ID) | (own_ids == NO_ID), same_text, ids == own_ids)
    absent = np.bincount(rows[same], minlength=len(at)) == 0
    others = TopLists(sampled, np.arange(len(at) + 1)).kept(absent)
    both = lists.followed_by(others)
    return TopLists(both.entries.with_logprobs(np.full(len(both.entries), np.nan)), both.offsets)


def _askable(response: Response, by_ids: bool, drawn: Drawn | None) -> Sequence[int]:
    """The drawn positions that P has a list at and whose prefix can be said in a request: some have no text."""
    unaskable = set[int]() if by_ids else {position for position, _ in response.gaps}
    unaskable |= Positions.of(response.positions).defects.keys()
    return [
        index
        for index in range(len(response.positions))
        if index not in unaskable and (drawn is None or bool(drawn.selected[index]))
    ]


def _own_ids(response: Response) -> tuple[int, ...] | None:
    """P's ids of all tokens that are in some prefix; the last one is in none, and may lack its own."""
    ids = Positions.of(response.positions).sampled.ids.tolist()
    return None if NO_ID in (ids[:-1] if response.has_stop else ids) else tuple(ids)


def absolute(path: Path) -> Path:
    """A location that means the same in every working directory."""
    return path if is_remote(path) else path.absolute()
