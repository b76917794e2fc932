"""What is to be asked: every context once, without what is on disk, in groups that become tasks."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backends.base import ScoreRequest, WorkEstimate, compares_pairs
from backends.keys import short_key
from backends.scores.index import MOST_KEYS, UsedLast
from backends.scores.store import Compared, ScoreStore
from backends.service.counting import TextSample, TokenCounts, counts_here
from flows.config.comparison import Comparison, Side
from flows.stages.inputs import InputFile, read_ahead, read_input, read_inputs
from kl.input.problems import InputProblem
from kl.text_tokens import prompt_tokens_of

_ALL_BITS = 2**64 - 1
_MOST_PACKED = 50_000  # contexts of a prompt; to pack and unpack more with each file would take long
_REPEATS_TOGETHER = 1000  # responses of which a job asks some contexts again; their texts are in memory together


@dataclass(frozen=True, slots=True)
class Selection:
    """Positions of one response that one model is asked about."""

    file: InputFile
    response_idx: int
    side: Side
    positions: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Group:
    """What one task asks: named after its first response."""

    name: str
    selections: tuple[Selection, ...]

    @property
    def n_positions(self) -> int:
        """How many contexts the group asks."""
        return sum(len(selection.positions) for selection in self.selections)

    @property
    def n_responses(self) -> int:
        """How many responses they are of."""
        return len({(selection.file.source_file, selection.response_idx) for selection in self.selections})


@dataclass(slots=True)
class AgainPlan:
    """What is asked a second time: ``n_drawn`` positions, by model; ``fresh`` contexts that no answer or job is for.

    ``unpriced`` are models without a known price.
    """

    n_drawn: Counter[str] = field(default_factory=Counter[str])
    fresh: Counter[str] = field(default_factory=Counter[str])
    unpriced: set[str] = field(default_factory=set[str])

    def note(self, request: ScoreRequest, fresh: int) -> None:
        """Count one response."""
        self.n_drawn[request.model] += len(request.positions)
        self.fresh[request.model] += fresh


class Part(NamedTuple):
    """Requests of which one correction of the estimate holds: of one model, with prompts of one script."""

    model: str
    script: str
    again: bool


@dataclass(slots=True)
class Plan:
    """The work of a run, by reference: no response is held.

    ``n_positions`` counts the positions of all readable responses, ``n_selected`` those that are measured,
    ``n_contexts`` the distinct contexts among them (of both models where both are asked, without what is left to a
    later run), ``n_stored`` those that are on disk already, ``n_in_flight`` those that a job of an earlier run answers.
    ``n_damaged`` and ``n_broken`` count the stored scores that could not be used, and the parts that could not be read:
    what they answered is asked. ``parts`` are estimates for the contexts that are not on disk; of the models
    ``unpriced`` no price is known. ``again`` is the part of all these that asks a model a second time. ``texts`` may be
    counted by the backend's own tokenizer, ``counts`` says what came of it, if it was done. ``missing`` has the
    contexts that are asked: prompt id → the first 64 bits of each key. ``in_use`` says why none of it may be asked:
    another run is at it.
    """

    files: list[InputFile]
    groups: list[Group] = field(default_factory=list[Group])
    problems: list[InputProblem] = field(default_factory=list[InputProblem])
    models_p: set[str] = field(default_factory=set[str])
    n_responses: int = 0
    n_unreadable: int = 0
    n_positions: int = 0
    n_selected: int = 0
    n_prompts: int = 0
    n_contexts: int = 0
    n_stored: int = 0
    n_in_flight: int = 0
    n_damaged: int = 0
    n_broken: int = 0
    parts: dict[Part, WorkEstimate] = field(default_factory=dict[Part, WorkEstimate])
    unpriced: set[str] = field(default_factory=set[str])
    again: AgainPlan = field(default_factory=AgainPlan)
    texts: TextSample = field(default_factory=TextSample)
    counts: TokenCounts = field(default_factory=TokenCounts)
    missing: dict[str, array[int]] = field(default_factory=dict[str, "array[int]"])
    in_use: str | None = None

    @property
    def n_to_ask(self) -> int:
        """Contexts that are asked now."""
        return sum(group.n_positions for group in self.groups)

    @property
    def estimate(self) -> WorkEstimate:
        """What all of it comes to."""
        return sum(self.parts.values(), WorkEstimate())

    @property
    def estimate_again(self) -> WorkEstimate:
        """What of it is asked a second time."""
        return sum((work for part, work in self.parts.items() if part.again), WorkEstimate())

    def counted(self, counts: TokenCounts, comparison: Comparison) -> Plan:
        """The same with the estimate that the counts of some texts correct."""
        backend, options = comparison.backend, comparison.options
        parts = {
            part: counts.corrected(work, part.model, part.script, backend, options) for part, work in self.parts.items()
        }
        return replace(self, parts=parts, counts=counts)


def make_plan(
    files: list[InputFile], comparison: Comparison, store: ScoreStore, in_flight: Mapping[str, str], at_once: int
) -> Plan:
    """Read every file once and decide what is missing.

    Equal contexts can only come from equal prompts; 64 bits of each key are kept per prompt while planning.

    Parameters
    ----------
    in_flight : mapping
        Key → name of the job of an earlier run that answers it (`Backend.in_flight`).
    at_once : int
        How many groups may be at work at once (`Backend.parallel_groups`).
    """
    plan = Plan([])
    seen = _Seen()
    known = UsedLast[str, _Stored](MOST_KEYS, lambda stored: len(stored.keys))
    by_job: dict[str, list[Selection]] = {}
    fresh: list[list[Selection]] = []
    repeats: list[Selection] = []
    for file, parsed in read_inputs(files):
        plan.files.append(file)
        plan.problems += parsed.problems
        plan.n_unreadable += len(parsed.unreadable)
        if parsed.prompt is None:
            continue
        prompt_id = parsed.prompt.prompt_id
        stored = known.of(prompt_id, partial(_stored, store, prompt_id, comparison))
        asked = seen.of(prompt_id)
        for response in parsed.responses:
            plan.n_responses += 1
            if response.model is not None:
                plan.models_p.add(response.model)
            plan.n_positions += len(response.positions)
            drawn = comparison.drawn(response)
            plan.n_selected += len(response.positions) if drawn is None else int(drawn.selected.sum())
            new: list[Selection] = []
            for side in comparison.sides():
                request = comparison.request(response, side)
                missing = _missing(request, stored, asked, plan)
                if side == "again" and request is not None and _waits(request.model, comparison, in_flight):
                    n_missing, missing = len(missing), [item for item in missing if item[1] in in_flight]
                    plan.n_contexts -= n_missing - len(missing)
                plan.missing.setdefault(prompt_id, array("Q")).extend(short_key(key) for _, key in missing)
                jobs = _by_job(missing, in_flight)
                if request is not None:
                    if missing:
                        _add_estimate(plan, comparison, request.only({key for _, key in missing}), side)
                    if side == "again":
                        plan.again.note(request, len(jobs.get("", ())))
                    _note_texts(plan, comparison, request, len(parsed.responses))
                for job, positions in jobs.items():
                    selection = Selection(file, response.response_idx, side, np.asarray(positions, dtype=np.int32))
                    later = side == "again" or isinstance(side, int)
                    together = repeats if later and comparison.backend.capabilities.deferred else new
                    (by_job.setdefault(job, []) if job else together).append(selection)
            if new:
                fresh.append(new)
    plan.n_prompts, plan.n_damaged, plan.n_broken = len(seen), store.n_damaged, store.n_broken
    plan.n_in_flight = sum(len(selection.positions) for job in by_job.values() for selection in job)
    # Few contexts of each response, which as jobs of their own would each take the place of a job of many.
    joint = [
        replace(group, name=f"{group.name}, again")
        for group in _chunks([[selection] for selection in repeats], _REPEATS_TOGETHER)
    ]
    # They may take half of the places at most: the others share what is left, and must not become one group.
    free = at_once - len(by_job)
    size = group_size(comparison, len(fresh), free - min(len(joint), free // 2))
    plan.groups = [_group(selections) for selections in by_job.values()] + list(_chunks(fresh, size)) + joint
    return plan


def _add_estimate(plan: Plan, comparison: Comparison, request: ScoreRequest, side: Side) -> None:
    """Count what is asked of one response."""
    work = comparison.backend.estimate(comparison.options, request)
    script = prompt_tokens_of(request.prompt, comparison.backend.template_tokens).script
    part = Part(request.model, script, side == "again")
    plan.parts[part] = plan.parts.get(part, WorkEstimate()) + work
    if work.cost_usd is None:
        (plan.again if part.again else plan).unpriced.add(request.model)


def _note_texts(plan: Plan, comparison: Comparison, request: ScoreRequest, n_responses: int) -> None:
    """Have the texts of a response drawn for counting, whatever of it is on disk: a later run draws the same."""
    if comparison.backend.capabilities.remote or (comparison.config.dry_run and counts_here(comparison.backend)):
        around = comparison.backend.template_tokens
        plan.texts.note_prompt(request.model, request.prompt, n_responses * len(request.positions), around)
        plan.texts.note_response(request)


def _waits(model: str, comparison: Comparison, in_flight: Mapping[str, str]) -> bool:
    """Whether second answers that no job is for are left to a later run; a collect must not wait for them, either."""
    return model in comparison.unasked or (comparison.config.stage == "collect" and bool(in_flight))


def bought_again(
    files: list[InputFile], comparison: Comparison, store: ScoreStore, in_flight: Mapping[str, str], model: str
) -> frozenset[str]:
    """The keys of a model's second answers that are on disk, or that a job answers."""
    bought: set[str] = set()
    known_keys = store.keys_in_turn()
    for file in read_ahead(files):
        for response in read_input(file).responses:
            if response.model == model and comparison.asked_again(response) == "p":
                request, known = comparison.request(response, "again"), known_keys(response.prompt.prompt_id)
                bought.update(key for key in (request.keys if request else ()) if key in known or key in in_flight)
    return frozenset(bought)


def group_size(comparison: Comparison, n_responses: int, free: int) -> int:
    """How many responses a group has.

    Where a group is a job and ``auto`` is set: one, or as many as it takes that all jobs run at once.
    """
    size = comparison.config.responses_per_job
    if size != "auto":
        return size
    return max(1, -(-n_responses // max(free, 1))) if comparison.backend.capabilities.deferred else 1


class _Seen:
    """The contexts that were planned, by prompt: numbers of 64 bits.

    A set of them takes ten times the memory of an array, and files to one prompt mostly follow each other.
    """

    def __init__(self) -> None:
        self._packed: dict[str, array[int]] = {}
        self._sets: dict[str, set[int]] = {}
        self._last = ""

    def of(self, prompt_id: str) -> set[int]:
        """Those of a prompt, to be added to until another prompt is asked for."""
        before = self._sets.get(self._last)
        if prompt_id != self._last and before is not None and len(before) < _MOST_PACKED:
            self._packed[self._last] = array("Q", self._sets.pop(self._last))
        self._last = prompt_id
        if prompt_id not in self._sets:
            self._sets[prompt_id] = set(self._packed.pop(prompt_id, ()))
        return self._sets[prompt_id]

    def __len__(self) -> int:
        return len(self._packed) + len(self._sets)


class _Stored(NamedTuple):
    """Keys that need not be asked again; where figures of pairs are wanted, what there is of them."""

    keys: Set[str]
    compared: Compared | None = None

    def has(self, key: str, counterpart: str) -> bool:
        """Whether a key need not be asked again, beside its counterpart if it has one."""
        paired = not counterpart or self.compared is None or self.compared.has(key, counterpart)
        return key in self.keys and paired


def _stored(store: ScoreStore, prompt_id: str, comparison: Comparison) -> _Stored:
    if not (comparison.config.full_vocabulary and compares_pairs(comparison.backend)):
        return _Stored(store.known_keys(prompt_id))
    compared = store.compared(prompt_id)
    if comparison.pairs:
        return _Stored(store.known_keys(prompt_id), compared)
    return _Stored(compared.whole | compared.failed)  # answers without their vocabulary do not do


def _missing(request: ScoreRequest | None, stored: _Stored, asked: set[int], plan: Plan) -> list[tuple[int, str]]:
    missing: list[tuple[int, str]] = []
    if request is None:
        return missing
    counterparts = request.counterparts or ("",) * len(request.keys)
    for position, key, counterpart in zip(request.positions, request.keys, counterparts, strict=True):
        # One context may be compared with those of several P: then it is asked beside each.
        short = hash((key, counterpart)) & _ALL_BITS if counterpart else short_key(key)
        if short in asked:
            continue
        asked.add(short)
        plan.n_contexts += 1
        if stored.has(key, counterpart):
            plan.n_stored += 1
        else:
            missing.append((position, key))
    return missing


def _by_job(missing: list[tuple[int, str]], in_flight: Mapping[str, str]) -> dict[str, list[int]]:
    jobs: dict[str, list[int]] = {}
    for position, key in missing:
        jobs.setdefault(in_flight.get(key, ""), []).append(position)
    return jobs


def _chunks(fresh: list[list[Selection]], size: int) -> Iterator[Group]:
    for start in range(0, len(fresh), size):
        yield _group([selection for selections in fresh[start : start + size] for selection in selections])


def _group(selections: Iterable[Selection]) -> Group:
    group = Group("", tuple(selections))
    first = f"{group.selections[0].file.source_file}#{group.selections[0].response_idx}"
    others = group.n_responses - 1
    return Group(f"{first} +{others}" if others else first, group.selections)


def requests_of(group: Group, comparison: Comparison) -> Iterator[tuple[str, ScoreRequest]]:
    """(prompt id, request) of each part of a group, read back from the input files: each once, as many groups read."""
    for file, selections in groupby(group.selections, attrgetter("file")):
        responses = {response.response_idx: response for response in read_input(file).responses}
        for selection in selections:
            response = responses.get(selection.response_idx)
            request = comparison.request(response, selection.side) if response is not None else None
            if response is None or request is None:
                continue  # the file changed under the run; measuring reports its positions as not scored
            positions = set(selection.positions.tolist())
            pairs = zip(request.positions, request.keys, strict=True)
            yield response.prompt.prompt_id, request.only({key for position, key in pairs if position in positions})
