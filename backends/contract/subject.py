"""What the contract suite examines: a backend, a model, and a few responses that are awkward on purpose."""

from __future__ import annotations

import asyncio
import functools
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from backends.base import Backend, BackendOptions, ScoreRequest
from backends.keys import context_keys
from kl.records import Prompt, Score, ScoreFailure, Turn

T = TypeVar("T")
Place = tuple[str, int]
"""Where a context stands: name of the case, position."""
Problems = Iterator[str]

_USUAL_TOP_LOGPROBS = 20
_SHOWN = 5


class ContractBreach(AssertionError):
    """A backend does not keep the contract; the message says what is asked for and what was seen."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, and the token texts of a response to it."""

    name: str
    prompt: Prompt
    tokens: tuple[str, ...]


def _asked(text: str) -> tuple[Turn, ...]:
    return (Turn("user", text),)


CASES = (
    Case("plain", Prompt(_asked("Greet me.")), ("Hello", " there", ",", " friend", ".")),
    Case("other prompt", Prompt(_asked("Count to three.")), ("One", ",", " two")),
    Case(
        "emoji and scripts",
        Prompt(_asked('Write "Grüße" 👩\u200d👩\u200d👧 in 日本語\\.')),
        ("Grüße", " 👩\u200d👩\u200d👧", "日本", "語", " e\u0301", "\u2028", "שלום", "🙂", '"', "\\n", "\ufeff", "."),
    ),
    Case(
        "control and empty tokens",
        Prompt(_asked("Show me your special tokens: <|im_start|> <eos>")),
        ("", "<|im_end|>", "", "\n", "\t", "</s>", "", "<end_of_turn>", "[INST]", "\r\n", "  "),
    ),
    Case("system text", Prompt(_asked("Name a colour."), "Answer in one word, in French."), ("Rouge", ".")),
    Case("empty system text", Prompt(_asked("Name a fruit."), ""), ("Apple",)),
    Case(
        "several turns",
        Prompt((Turn("user", "My name is Ada."), Turn("model", "Nice to meet you!"), Turn("user", "My name?"))),
        ("Ada", "!"),
    ),
)
"""Every position of these is asked, the empty prefix included."""


class Call(NamedTuple):
    """Requests of one call, and which context each key stands for."""

    requests: tuple[ScoreRequest, ...]
    places: dict[str, Place]


@dataclass(eq=False)
class Subject:
    """A backend with what the suite needs to use it. Making one calls nothing.

    Attributes
    ----------
    backend : type of Backend
        The class, not an instance.
    model : str
        A model that can be used. A few hundred contexts of a few tokens are asked of it, in about a dozen calls.
    unknown_model : str or None
        A name that `preflight` must refuse; None only for a service that takes any name.
    options : mapping
        The backend's options, as after ``--set backend.``.
    changed_options : sequence of mappings
        Further options, each of which changes the answers; each must then change the identity.
    cases : sequence of Case
        The first is asked most. Leave one out only if no answer is possible: for a model without a system role, say.
    without : set of str
        Capabilities of the class that the server behind this model lacks, where it depends on the server.
    noise_nats : float
        How far two answers to one request may be apart; 0 is the claim that the model is deterministic.
    deadline_s : float
        Seconds that one call of `score`, `sample` or `preflight` may take.
    close_s : float
        Seconds within which a cancelled call must end.
    """

    backend: type[Backend]
    model: str
    unknown_model: str | None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    changed_options: Sequence[Mapping[str, Any]] = ()
    cases: Sequence[Case] = CASES
    without: frozenset[str] = frozenset()
    noise_nats: float = 0.0
    deadline_s: float = 120.0
    close_s: float = 30.0
    _discovered: dict[str, BackendOptions] = field(default_factory=dict[str, BackendOptions], init=False, repr=False)

    @property
    def top_logprobs(self) -> int:
        """The length of list that the suite asks for."""
        return min(_USUAL_TOP_LOGPROBS, self.backend.capabilities.max_top_logprobs)

    def new_options(self, **changes: Any) -> BackendOptions:
        """Options validated as the flow does it, complete where the service knows the rest; not in an event loop."""
        options = self.backend.Options.model_validate({**self.options, **changes})
        if not self.backend.capabilities.discovers:
            return options
        known = repr(sorted(changes.items()))
        if known not in self._discovered:
            self._discovered[known] = asyncio.run(self._discover(options))
        return self._discovered[known]

    async def _discover(self, options: BackendOptions) -> BackendOptions:
        with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
            async with self.backend(options, state_dir=Path(folder)) as backend:
                return await in_time(backend.discover(self.model), "discover()", self.deadline_s)

    def bare_request(self, case: Case, **changes: Any) -> ScoreRequest:
        """A request for a case that asks no position; ``changes`` are fields of `ScoreRequest`."""
        ends = tuple(sum(map(len, case.tokens[:index])) for index in range(len(case.tokens)))
        bare = ScoreRequest(
            name=case.name,
            model=self.model,
            prompt=case.prompt,
            text="".join(case.tokens),
            prefix_ends=ends,
            token_ids=None,
            positions=(),
            keys=(),
            top_logprobs=self.top_logprobs,
        )
        return replace(bare, **changes)

    def request(self, case: Case, **changes: Any) -> ScoreRequest:
        """All contexts of a case, under keys that nothing has asked for before."""
        bare = self.bare_request(case, **changes)
        identity = self.backend.identity(self.new_options(), bare) | {"contract": secrets.token_hex(8)}
        keys = tuple(context_keys(bare.model, bare.prompt, identity, case.tokens, bare.token_ids))
        return replace(bare, positions=tuple(range(len(keys))), keys=keys)

    @functools.cached_property
    def first_call(self) -> tuple[Call, list[Score | ScoreFailure]]:
        """Every context of every case, and what a fresh backend yields for them in one call; asked once and kept."""
        call = planned(self.request(case) for case in self.cases)
        return call, self.results(call)

    @functools.cached_property
    def answers(self) -> dict[Place, Score]:
        """The score of every context of every case.

        Raises
        ------
        ContractBreach
            If a context has no score.
        """
        return scored(*self.first_call)

    def scores(self, call: Call) -> dict[Place, Score]:
        """What a fresh backend answers.

        Raises
        ------
        ContractBreach
            If a context has no score.
        """
        return scored(call, self.results(call))

    def results(self, call: Call) -> list[Score | ScoreFailure]:
        """What a fresh backend yields for a call, however many results that are."""
        return self.use(lambda backend: self.collect(backend, call))

    async def collect(self, backend: Backend, call: Call) -> list[Score | ScoreFailure]:
        """What `score` of an entered backend yields for a call."""
        found: list[Score | ScoreFailure] = []

        async def work() -> None:
            async for result in backend.score(call.requests):
                found.append(result)

        await in_time(work(), f"score() of {len(call.places)} contexts", self.deadline_s)
        return found

    def use(self, work: Callable[[Backend], Coroutine[Any, Any, T]], state_dir: Path | None = None) -> T:
        """Run ``work(backend)`` with a fresh backend that was entered and is left afterwards."""
        options = self.new_options()

        async def main() -> T:
            with tempfile.TemporaryDirectory(prefix="tokenkl-contract-") as folder:
                async with self.backend(options, state_dir=state_dir or Path(folder)) as backend:
                    return await work(backend)

        return asyncio.run(main())


async def in_time(work: Awaitable[T], what: str, limit_s: float) -> T:
    """Await ``work``, at most ``limit_s`` seconds.

    Raises
    ------
    ContractBreach
        If it takes longer.
    """
    scope = asyncio.timeout(limit_s)
    try:
        async with scope:
            return await work
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise ContractBreach(f"{what} did not end within {limit_s:g} s.") from error


def planned(requests: Iterable[ScoreRequest]) -> Call:
    """Requests with every key in them once, the way a run plans them: it never asks a key twice."""
    places: dict[str, Place] = {}
    kept: list[ScoreRequest] = []
    for request in requests:
        fresh = request.only(set(request.keys) - places.keys())
        places |= {key: (request.name, position) for position, key in zip(fresh.positions, fresh.keys, strict=True)}
        kept.append(fresh)
    return Call(tuple(kept), places)


def restricted(request: ScoreRequest, wanted: Callable[[int, str], bool]) -> ScoreRequest:
    """The request with only the positions for which ``wanted(position, key)``."""
    return request.only(
        {key for position, key in zip(request.positions, request.keys, strict=True) if wanted(position, key)}
    )


def scored(call: Call, results: Iterable[Score | ScoreFailure]) -> dict[Place, Score]:
    """The results by place.

    Raises
    ------
    ContractBreach
        If a context has no score.
    """
    by_key = {result.key: result for result in results}
    found: dict[Place, Score] = {}
    problems: list[str] = []
    for key, place in call.places.items():
        match by_key.get(key):
            case Score() as score:
                found[place] = score
            case ScoreFailure(reason=reason, message=message):
                problems.append(f"{shown(place)}: {reason}: {message}")
            case _:
                problems.append(f"{shown(place)}: no result.")
    if problems:
        raise ContractBreach(joined(problems))
    return found


def shown(place: Place) -> str:
    """A place in words."""
    return f"{place[0]!r}, position {place[1]}"


def joined(problems: Sequence[str]) -> str:
    """The first few problems, a line each, and how many more there are."""
    more = [f"… and {len(problems) - _SHOWN} more."] if len(problems) > _SHOWN else []
    return "\n".join([*problems[:_SHOWN], *more])


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the contract asks for.

    Attributes
    ----------
    name : str
        In words; also ``str(check)``.
    rule : str
        What is asked for, in a sentence.
    find_problems : callable
        Yields a line for each breach that it finds in a subject.
    applies : callable
        Whether a subject claims what is checked.
    """

    name: str
    rule: str
    find_problems: Callable[[Subject], Problems]
    applies: Callable[[Subject], bool]

    def __str__(self) -> str:
        return self.name

    def run(self, subject: Subject) -> None:
        """Examine a backend.

        Raises
        ------
        ContractBreach
            If it does not keep this part of the contract. What the backend itself raises comes through.
        """
        problems: list[str] = []
        try:
            for problem in self.find_problems(subject):
                problems.append(problem)
        except ContractBreach as error:
            problems.append(str(error))
        if problems:
            raise ContractBreach(f"{subject.backend.__name__}: {self.rule}\n{joined(problems)}")


def check(
    applies: Callable[[Subject], bool] = lambda subject: True,
) -> Callable[[Callable[[Subject], Problems]], Check]:
    """Make a function that yields problems a `Check`, named and described by its name and docstring."""

    def make(function: Callable[[Subject], Problems]) -> Check:
        name = function.__name__.replace("_", " ")
        return Check(name, " ".join((function.__doc__ or "").split()), function, applies)

    return make
