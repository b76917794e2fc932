"""What is to be asked: every context once, without what is on disk, in groups that become tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from backends.base import Backend, BackendOptions, ScoreRequest, WorkEstimate
from backends.errors import ModelNotUsableError
from backends.keys import context_keys
from backends.scores.store import ScoreStore
from flows.config.models import RunConfig
from flows.stages.inputs import InputFile, read_ahead, read_input
from kl.input.responses import InputProblem, positions_inside_a_character
from kl.records import Response
from kl.statistics.position_sampling import Drawn, draw

Side = Literal["p", "q"]


@dataclass(frozen=True, slots=True)
class Asker:
    """Turns a response into the contexts that a model is asked about."""

    config: RunConfig
    backend: type[Backend]
    options: BackendOptions

    def sides(self) -> tuple[Side, ...]:
        """Q is always asked; P too where its full vocabulary is wanted, which no response file holds."""
        return ("q", "p") if self.config.full_vocabulary else ("q",)

    def drawn(self, response: Response) -> Drawn | None:
        """Which positions are measured, with their probabilities; None if all are."""
        return None if self.config.positions is None else draw(response, self.config.positions.sample)

    def request(self, response: Response, side: Side) -> ScoreRequest | None:
        """All contexts of a response that can be asked; None if the file names no P that this backend has."""
        model = self.config.model2 if side == "q" else response.model
        if model is None:
            return None
        prompt = response.prompt
        if side == "q" and self.options.system is not None:
            prompt = replace(prompt, system=self.options.system)
        ids = _own_ids(response) if self.backend.capabilities.token_ids else None
        bare = ScoreRequest(
            name=response.name,
            model=model,
            prompt=prompt,
            text=response.text,
            prefix_ends=tuple(response.prefix_ends().tolist()),
            token_ids=ids,
            positions=(),
            keys=(),
            top_logprobs=self.config.k,
            full_vocabulary=self.config.full_vocabulary,
        )
        try:
            identity = self.backend.identity(self.options, bare)
        except ModelNotUsableError:
            if side == "q":
                raise
            return None
        tokens = [position.sampled.token for position in response.positions]
        keys = list(context_keys(model, prompt, identity, tokens, ids))
        unaskable = set() if ids is not None else set(positions_inside_a_character(response))
        drawn = self.drawn(response)
        positions = tuple(
            index
            for index in range(len(keys))
            if index not in unaskable and (drawn is None or bool(drawn.selected[index]))
        )
        return replace(bare, positions=positions, keys=tuple(keys[index] for index in positions))


def _own_ids(response: Response) -> tuple[int, ...] | None:
    ids = [position.sampled.token_id for position in response.positions]
    return tuple(token_id for token_id in ids if token_id is not None) if None not in ids else None


@dataclass(frozen=True, slots=True)
class Ask:
    """Positions of one response that one model is asked about."""

    file: InputFile
    response_idx: int
    side: Side
    positions: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Group:
    """What one task asks: named after its first response."""

    name: str
    asks: tuple[Ask, ...]

    @property
    def n_positions(self) -> int:
        """How many contexts the group asks."""
        return sum(len(ask.positions) for ask in self.asks)


@dataclass(slots=True)
class Plan:
    """The work of a run, by reference: no response is held.

    ``n_positions`` counts the positions of all readable responses, ``n_selected`` those that are measured,
    ``n_contexts`` the distinct contexts among them (of
    both models where both are asked), ``n_stored`` those that are on disk already, ``n_in_flight`` those that a job of
    an earlier run answers. ``estimate`` is for the contexts that are not on disk.
    """

    files: list[InputFile]
    groups: list[Group] = field(default_factory=list[Group])
    problems: list[InputProblem] = field(default_factory=list[InputProblem])
    n_responses: int = 0
    n_unreadable: int = 0
    n_positions: int = 0
    n_selected: int = 0
    n_prompts: int = 0
    n_contexts: int = 0
    n_stored: int = 0
    n_in_flight: int = 0
    estimate: WorkEstimate = field(default_factory=WorkEstimate)

    @property
    def n_to_ask(self) -> int:
        """Contexts that are asked now."""
        return sum(group.n_positions for group in self.groups)


def make_plan(files: list[InputFile], asker: Asker, store: ScoreStore, in_flight: Mapping[str, str]) -> Plan:
    """Read every file once and decide what is missing.

    Equal contexts can only come from equal prompts; 64 bits of each key are kept per prompt while planning.
    """
    plan = Plan(files)
    seen: dict[str, set[int]] = {}
    by_job: dict[str, list[Ask]] = {}
    fresh: list[list[Ask]] = []
    for file in read_ahead(files):
        parsed = read_input(file)
        plan.problems += parsed.problems
        plan.n_unreadable += len(parsed.unreadable)
        if parsed.prompt is None:
            continue
        stored = store.known_keys(parsed.prompt.prompt_id)
        asked = seen.setdefault(parsed.prompt.prompt_id, set())
        for response in parsed.responses:
            plan.n_responses += 1
            plan.n_positions += len(response.positions)
            drawn = asker.drawn(response)
            plan.n_selected += len(response.positions) if drawn is None else int(drawn.selected.sum())
            new: list[Ask] = []
            for side in asker.sides():
                request = asker.request(response, side)
                missing = _missing(request, stored, asked, plan)
                if request is not None and missing:
                    to_ask = _restrict(request, missing)
                    plan.estimate += asker.backend.estimate(asker.options, to_ask)
                for job, positions in _by_job(missing, in_flight).items():
                    ask = Ask(file, response.response_idx, side, np.asarray(positions, dtype=np.int32))
                    by_job.setdefault(job, []).append(ask) if job else new.append(ask)
            if new:
                fresh.append(new)
    plan.n_prompts = len(seen)
    plan.n_in_flight = sum(len(ask.positions) for asks in by_job.values() for ask in asks)
    plan.groups = [_group(asks) for asks in by_job.values()] + list(_chunks(fresh, asker.config.responses_per_job))
    return plan


def _missing(request: ScoreRequest | None, stored: set[str], asked: set[int], plan: Plan) -> list[tuple[int, str]]:
    missing: list[tuple[int, str]] = []
    for position, key in zip(request.positions, request.keys, strict=True) if request else ():
        short = int(key[:16], 16)
        if short in asked:
            continue
        asked.add(short)
        plan.n_contexts += 1
        if key in stored:
            plan.n_stored += 1
        else:
            missing.append((position, key))
    return missing


def _restrict(request: ScoreRequest, pairs: Sequence[tuple[int, str]]) -> ScoreRequest:
    return replace(request, positions=tuple(p for p, _ in pairs), keys=tuple(k for _, k in pairs))


def _by_job(missing: list[tuple[int, str]], in_flight: Mapping[str, str]) -> dict[str, list[int]]:
    jobs: dict[str, list[int]] = {}
    for position, key in missing:
        jobs.setdefault(in_flight.get(key, ""), []).append(position)
    return jobs


def _chunks(fresh: list[list[Ask]], size: int) -> Iterator[Group]:
    for start in range(0, len(fresh), size):
        yield _group([ask for asks in fresh[start : start + size] for ask in asks])


def _group(asks: list[Ask]) -> Group:
    first = f"{asks[0].file.source_file}#{asks[0].response_idx}"
    others = len({(ask.file.source_file, ask.response_idx) for ask in asks}) - 1
    return Group(f"{first} +{others}" if others else first, tuple(asks))


def requests_of(group: Group, asker: Asker) -> Iterator[tuple[str, ScoreRequest]]:
    """(prompt id, request) of each part of a group, read back from the input files."""
    for ask in group.asks:
        parsed = read_input(ask.file)
        response = next((item for item in parsed.responses if item.response_idx == ask.response_idx), None)
        request = asker.request(response, ask.side) if response is not None else None
        if response is None or request is None:
            continue  # the file changed under the run; measuring reports its positions as not scored
        wanted = set(ask.positions.tolist())
        pairs = [pair for pair in zip(request.positions, request.keys, strict=True) if pair[0] in wanted]
        yield response.prompt.prompt_id, _restrict(request, pairs)
