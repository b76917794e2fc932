"""A backend that can do everything, and backends that break the contract in one thing each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from backends.base import (
    NOT_SUBMITTED,
    WAITING,
    Backend,
    BackendOptions,
    Capabilities,
    Sample,
    SampleRequest,
    ScoreRequest,
    WorkEstimate,
)
from backends.errors import ModelNotUsableError
from kl.records import Candidate, Position, Prompt, Response, Score, ScoreFailure, Turn

CHARACTERS = [*"\n !\"',-.?", *(chr(code) for code in range(ord("A"), ord("z") + 1))]
MODEL, NO_MODEL = "counts", "county"


class ToyOptions(BackendOptions):
    sharpness: float = Field(default=2.0, gt=0)


class Toy(Backend):
    """Characters are as probable as they are frequent in the context; can do all that a backend can."""

    Options: ClassVar[type[BackendOptions]] = ToyOptions
    capabilities = Capabilities(
        len(CHARACTERS),
        full_vocabulary=True,
        samples=True,
        token_ids=True,
        remote=False,
        deferred=True,
        wanted_tokens=True,
    )

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        sharpness = getattr(options, "sharpness", None)
        return {"k": request.top_logprobs, "full": request.full_vocabulary, "sharpness": sharpness}

    async def preflight(self, model: str) -> str | None:
        if model != MODEL:
            raise ModelNotUsableError(f"unknown model {model!r}; use {MODEL!r}.", backend="toy", model=model)
        return "counts-1"

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        for request in requests:
            for position, key, prefix in request.contexts():
                await asyncio.sleep(0)
                for result in self.results(request, position, key, prefix):
                    yield result

    async def submit(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        for key in [key for request in requests for key in request.keys]:
            self.job(key).touch()
            yield ScoreFailure(key, WAITING, "a job has it.")

    async def collect(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        answers = {answer.key: answer async for answer in self.score(requests)}
        for key, answer in answers.items():
            if not self.job(key).exists():
                yield ScoreFailure(key, NOT_SUBMITTED, "no job has it.")
            elif not self.job(key).read_text():
                self.job(key).write_text("looked at")
                yield ScoreFailure(key, WAITING, "its job still runs.")
            else:
                yield answer

    def job(self, key: str) -> Path:
        assert self.state_dir is not None, "jobs need a folder"
        return self.state_dir / key

    def results(self, request: ScoreRequest, position: int, key: str, prefix: str) -> Iterator[Any]:
        logprobs = self.logprobs(self.context(request, position, prefix))
        full = logprobs.astype(np.float32) if request.full_vocabulary else None
        top = self.listed(logprobs, request.top_logprobs)
        wanted = self.wanted(request, key, top, logprobs)
        yield Score(key, top, model_version="counts-1", full_logprobs=full, wanted=wanted)

    def wanted(
        self, request: ScoreRequest, key: str, top: Sequence[Candidate], logprobs: np.ndarray
    ) -> tuple[Candidate, ...]:
        if request.wanted is None:
            return ()
        named = {item.token for item in request.wanted[request.keys.index(key)]} - {item.token for item in top}
        whole = self.listed(logprobs, len(CHARACTERS))
        return tuple(item for item in whole if item.token in named)

    def context(self, request: ScoreRequest, position: int, prefix: str) -> str:
        return request.prompt.canonical() + prefix

    def logprobs(self, context: str) -> np.ndarray:
        counts = np.array([context.count(item) + 3 * context.count(context[-1] + item) for item in CHARACTERS])
        weights = (1.0 + counts) ** self.options.sharpness  # pyright: ignore[reportAttributeAccessIssue]
        return np.log(weights / weights.sum())

    def listed(self, logprobs: np.ndarray, k: int) -> tuple[Candidate, ...]:
        order = np.argsort(-logprobs, kind="stable")[:k].tolist()
        return tuple(Candidate(CHARACTERS[index], float(logprobs[index]), index) for index in order)

    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        for request in requests:
            settings = request.settings
            rng = np.random.default_rng(settings.seed + request.index)
            text, positions = "", []
            for _ in range(settings.max_tokens):
                logprobs = self.logprobs(request.prompt.canonical() + text)
                drawn = int(rng.choice(len(CHARACTERS), p=np.exp(logprobs)))
                sampled = Candidate(CHARACTERS[drawn], float(logprobs[drawn]), drawn)
                positions.append(Position(sampled, self.listed(logprobs, settings.top_logprobs)))
                text += CHARACTERS[drawn]
            response = Response("", request.index, request.prompt, request.model, text, tuple(positions), "MAX_TOKENS")
            yield Sample(request.key, response)


# Breaches. Each class keeps the contract but for one thing.


class NotFrozen(Toy):
    class Options(ToyOptions):
        model_config = ConfigDict(frozen=False)


class TakesAnySetting(Toy):
    class Options(ToyOptions):
        model_config = ConfigDict(extra="ignore")


class OtherOptions(Toy):
    class Options(BaseModel):
        sharpness: float = 2.0


class NoCapabilities(Toy):
    capabilities = {"max_top_logprobs": 20}  # noqa: RUF012


class NoListAtAll(Toy):
    capabilities = Toy.capabilities._replace(max_top_logprobs=0)


class SamplesUnclaimed(Toy):
    capabilities = Toy.capabilities._replace(samples=False)


class Unwritten(Backend):
    capabilities = Capabilities(max_top_logprobs=20)


class IdentityOfTuples(Toy):
    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        return {"settings": (1, 2)}


class IdentityOfObjects(Toy):
    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        return {"options": options}


class IdentityOfText(Toy):
    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        return super().identity(options, request) | {"characters": len(request.text)}


class IdentityWithoutLength(Toy):
    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        return {name: value for name, value in super().identity(options, request).items() if name != "k"}


class IdentityWithoutOption(Toy):
    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        return {name: value for name, value in super().identity(options, request).items() if name != "sharpness"}


class IdentityWithoutFull(Toy):
    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        return {name: value for name, value in super().identity(options, request).items() if name != "full"}


class CostsWithoutService(Toy):
    @classmethod
    def cost_usd(cls, options: BackendOptions, model: str, input_tokens: int, output_tokens: int) -> float | None:
        return 1.0


class CountsGroups(Toy):
    @classmethod
    def estimate(cls, options: BackendOptions, request: ScoreRequest) -> WorkEstimate:
        return replace(super().estimate(options, request), requests=1)


class NoGroups(Toy):
    def parallel_groups(self) -> int:
        return 0


class AlwaysInFlight(Toy):
    def in_flight(self) -> Mapping[str, str]:
        return {"a key": "a job"}


class RefusesAll(Toy):
    async def preflight(self, model: str) -> str | None:
        raise ModelNotUsableError(f"{model} is switched off.")


class VersionNumber(Toy):
    async def preflight(self, model: str) -> str | None:
        await super().preflight(model)
        return 1  # pyright: ignore[reportReturnType]


class AcceptsAll(Toy):
    async def preflight(self, model: str) -> str | None:
        return None


class VagueRefusal(Toy):
    async def preflight(self, model: str) -> str | None:
        if model != MODEL:
            raise ModelNotUsableError("failed:\n404")
        return None


class ForgetfulError(ModelNotUsableError):
    def __reduce__(self) -> tuple[Any, ...]:
        return ForgetfulError, self.args


class ForgetfulRefusal(Toy):
    async def preflight(self, model: str) -> str | None:
        if model != MODEL:
            raise ForgetfulError(f"unknown model {model!r}.", backend="toy", model=model)
        return None


class ClosesOnce(Toy):
    closed = False

    async def __aexit__(self, *exc: object) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class Mutated(Toy):
    """Answers that `change` makes of the right one."""

    def results(self, request: ScoreRequest, position: int, key: str, prefix: str) -> Iterator[Any]:
        for score in super().results(request, position, key, prefix):
            yield from self.change(score, request)

    def change(self, score: Score, request: ScoreRequest) -> Iterable[Any]:
        raise NotImplementedError


def mutated(change: Any, **attributes: Any) -> type[Backend]:
    """A backend whose right answers go through ``change(score, request)``, which gives those that are yielded."""
    return type("Changed", (Mutated,), {"change": lambda self, score, request: change(score, request)} | attributes)


def failing(reason: str, message: str) -> type[Backend]:
    return mutated(lambda score, request: [ScoreFailure(score.key, reason, message)])


def with_logprobs(change: Any) -> type[Backend]:
    """Lists in which ``change(list of log-probabilities)`` gives the log-probabilities."""

    def changed(score: Score, request: ScoreRequest) -> list[Score]:
        values = change([candidate.logprob for candidate in score.top])
        top = [candidate._replace(logprob=value) for candidate, value in zip(score.top, values, strict=True)]
        return [replace(score, top=tuple(top))]

    return mutated(changed)


def with_candidate(**fields: Any) -> type[Backend]:
    """Lists whose first candidate is another one."""
    return mutated(lambda score, request: [replace(score, top=(score.top[0]._replace(**fields), *score.top[1:]))])


def normalised(values: list[float]) -> list[float]:
    return [value - math.log(math.fsum(map(math.exp, values))) for value in values]


class Drifting(Toy):
    """Another answer at every call."""

    calls = 0

    def logprobs(self, context: str) -> np.ndarray:
        Drifting.calls += 1
        return super().logprobs(context + "z" * Drifting.calls)


class ByOrder(Toy):
    """Gives a context the answer of the one before it in the call."""

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        before = None
        async for result in super().score(requests):
            assert isinstance(result, Score)
            yield replace(before or result, key=result.key)
            before = result


class WithoutSystem(Toy):
    def context(self, request: ScoreRequest, position: int, prefix: str) -> str:
        return replace(request.prompt, system=None).canonical() + prefix


class WithoutHistory(Toy):
    def context(self, request: ScoreRequest, position: int, prefix: str) -> str:
        return Prompt(request.prompt.turns[-1:], request.prompt.system).canonical() + prefix


class WithoutPrefix(Toy):
    def context(self, request: ScoreRequest, position: int, prefix: str) -> str:
        return request.prompt.canonical()


class WithoutPrompt(Toy):
    def context(self, request: ScoreRequest, position: int, prefix: str) -> str:
        return "." + prefix


class FeedsAnyIds(Toy):
    def context(self, request: ScoreRequest, position: int, prefix: str) -> str:
        return super().context(request, position, prefix) + str((request.token_ids or ())[:position])


class StopsAtNothing(Toy):
    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        if not any(request.keys for request in requests):
            yield ScoreFailure("none", "nothing-asked", "nothing was asked.")
        async for result in super().score(requests):
            yield result


class SharedQueue(Toy):
    """Results of all calls go through one queue."""

    def __init__(self, options: BackendOptions, state_dir: Path | None = None) -> None:
        super().__init__(options, state_dir)
        self.queue: asyncio.Queue[Score | ScoreFailure] = asyncio.Queue()

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        results = [result async for result in super().score(requests)]
        for result in results:
            self.queue.put_nowait(result)
            await asyncio.sleep(0)
        for _ in results:
            yield await self.queue.get()
            await asyncio.sleep(0)


class OneCallOnly(Toy):
    """A second call waits for the end of the first, which never comes if its results were not all taken."""

    async def __aenter__(self) -> OneCallOnly:
        self.free = asyncio.Event()
        self.free.set()
        return self

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        await self.free.wait()
        self.free.clear()
        async for result in super().score(requests):
            yield result
        self.free.set()


class SlowToClose(Toy):
    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        try:
            async for result in super().score(requests):
                yield result
        finally:
            await asyncio.sleep(0.3)


class IgnoresCancel(Toy):
    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        try:
            await asyncio.sleep(0.2)
        except asyncio.CancelledError:
            await asyncio.sleep(0.2)
        async for result in super().score(requests):
            yield result


class ForgetsWhatWasAsked(Toy):
    """Takes what an earlier run has asked for as answered."""

    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        assert self.state_dir is not None
        record = self.state_dir / "asked"
        asked = record.read_text().split() if record.exists() else []
        record.write_text("\n".join([*asked, *(key for request in requests for key in request.keys)]))
        await asyncio.sleep(0.05)
        async for result in super().score(requests):
            if result.key not in asked:
                yield result


class SpeaksAtLength(Toy):
    async def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        await asyncio.sleep(0.05)
        async for result in super().score(requests):
            yield result

    async def interrupted(self) -> str | None:
        return "Some jobs go on:\none, two"


class ReportsObjects(Toy):
    def report(self) -> dict[str, Any]:
        return {"options": self.options}


class ReportsAList(Toy):
    def report(self) -> dict[str, Any]:
        return ["a job"]  # pyright: ignore[reportReturnType]


class SamplesOthers(Toy):
    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        others = [replace(request, prompt=Prompt((Turn("user", "other"),))) for request in requests]
        async for result in super().sample(others):
            assert isinstance(result, Sample)
            yield Sample(result.key, replace(result.response, prompt=requests[0].prompt))


class SamplesOne(Toy):
    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        async for result in super().sample(requests[:1]):
            yield result


class SamplesOtherTexts(Toy):
    async def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        async for result in super().sample(requests):
            assert isinstance(result, Sample)
            yield Sample(result.key, replace(result.response, text=result.response.text + "!"))


class SubmitsNothing(Toy):
    def job(self, key: str) -> Path:
        return super().job(f"{key}-{id(self)}")


class CollectsUnasked(Toy):
    async def collect(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        async for result in self.score(requests):
            yield result


class LosesOne(Toy):
    async def submit(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        results = [result async for result in super().submit(requests)]
        for result in results[1:]:
            yield result


class DefersUnclaimed(Toy):
    capabilities = Toy.capabilities._replace(deferred=False)


def half_of_the_vocabulary(score: Score, request: ScoreRequest) -> list[Score]:
    full = score.full_logprobs
    return [replace(score, full_logprobs=None if full is None else full[::2])]


def other_ids(score: Score, request: ScoreRequest) -> list[Score]:
    top = [candidate._replace(token_id=(candidate.token_id or 0) + 1) for candidate in score.top]
    return [replace(score, top=tuple(top))]


def wanted_as(change: Callable[[tuple[Candidate, ...], ScoreRequest], tuple[Candidate, ...]]) -> type[Toy]:
    return mutated(lambda score, request: [replace(score, wanted=change(score.wanted, request))])


def with_other_values(wanted: tuple[Candidate, ...], request: ScoreRequest) -> tuple[Candidate, ...]:
    return tuple(item._replace(logprob=(item.logprob or 0.0) - 0.1) for item in wanted)


def with_another(wanted: tuple[Candidate, ...], request: ScoreRequest) -> tuple[Candidate, ...]:
    return (*wanted, Candidate("~", -90.0)) if request.wanted else ()


class ListsWhatIsWanted(Toy):
    def wanted(
        self, request: ScoreRequest, key: str, top: Sequence[Candidate], logprobs: np.ndarray
    ) -> tuple[Candidate, ...]:
        return super().wanted(request, key, (), logprobs)


@dataclass(frozen=True)
class Breach:
    """A backend, the check that finds what is wrong with it, and words of its message."""

    id: str
    check: str
    backend: type[Backend]
    message: str
    changes: dict[str, Any] = field(default_factory=dict)


OPTIONS, CAPABLE = "options are frozen and refuse unknown settings", "capabilities are declared"
IDENTITY, IDENTITY_CHANGES = (
    "identity is json and the same for every response",
    "identity changes with what changes the answer",
)
ONE_RESULT, LISTS = "every key gets exactly one result", "lists are log probabilities"
STORED = "results survive being stored"
READ, FULL = "the whole context is read", "a full vocabulary is whole and agrees with the list"
BUILT, ESTIMATE = "a backend can be built without being entered", "an estimate needs no call"
REFUSES, CANCELLED = "preflight refuses an unknown model", "a cancelled call ends and can be taken up again"
CLOSED = "closing the results early leaves the backend usable"
DEFERRED = "what is submitted is collected later"
WANTED = "wanted tokens have the models values"

BREACHES = [
    Breach("options that can be set", OPTIONS, NotFrozen, "could be set"),
    Breach("a misspelt option is ignored", OPTIONS, TakesAnySetting, "no_such_setting"),
    Breach("options of one's own", OPTIONS, OtherOptions, "no subclass"),
    Breach("no capabilities", CAPABLE, NoCapabilities, "set it to a backends.base.Capabilities"),
    Breach("lists of length 0", CAPABLE, NoListAtAll, "max_top_logprobs is 0"),
    Breach("sample() that is not claimed", CAPABLE, SamplesUnclaimed, "samples is False, but"),
    Breach("jobs that are not claimed", CAPABLE, DefersUnclaimed, "deferred is False, but"),
    Breach("a submission that is forgotten", DEFERRED, SubmitsNothing, "no job has it."),
    Breach("a collect that asks", DEFERRED, CollectsUnasked, "a score for a key where 'not-submitted' is due"),
    Breach("a submitted key that is lost", DEFERRED, LosesOne, "results for"),
    Breach("nothing written", CAPABLE, Unwritten, "preflight, score"),
    Breach("identity of tuples", IDENTITY, IdentityOfTuples, "lists for tuples"),
    Breach("identity of objects", IDENTITY, IdentityOfObjects, "is not JSON"),
    Breach("identity of the text", IDENTITY, IdentityOfText, "bought twice"),
    Breach("identity without top_logprobs", IDENTITY_CHANGES, IdentityWithoutLength, "with top_logprobs changed"),
    Breach("identity without full", IDENTITY_CHANGES, IdentityWithoutFull, "with full_vocabulary changed"),
    Breach("identity without an option", IDENTITY_CHANGES, IdentityWithoutOption, "with the options {'sharpness'"),
    Breach("a cost without a service", ESTIMATE, CostsWithoutService, "nothing leaves the machine"),
    Breach("one request for all positions", ESTIMATE, CountsGroups, "1 requests for 5 positions"),
    Breach("no group at a time", BUILT, NoGroups, "parallel_groups() is 0"),
    Breach("something in flight at first", BUILT, AlwaysInFlight, "in_flight() is"),
    Breach("a version that is no text", "preflight accepts the model", VersionNumber, "returned 1"),
    Breach("unknown models accepted", REFUSES, AcceptsAll, "'county' was accepted"),
    Breach("a refusal that names nothing", REFUSES, VagueRefusal, "write one line"),
    Breach("an error that loses its attributes", "errors travel between processes", ForgetfulRefusal, "arrived as"),
    Breach("a key without a result", ONE_RESULT, mutated(lambda score, request: []), "no result"),
    Breach("two results", ONE_RESULT, mutated(lambda score, request: [score, score]), "answered twice"),
    Breach("a foreign key", ONE_RESULT, mutated(lambda s, r: [s, replace(s, key="x")]), "'x' was not asked"),
    Breach("a result of another kind", ONE_RESULT, mutated(lambda s, r: [s, (s.key, s.top)]), "neither a Score"),
    Breach("a reason in prose", ONE_RESULT, failing("It failed.", "it failed."), "no short code"),
    Breach("a message of two lines", ONE_RESULT, failing("failed", "it\nfailed."), "not one line"),
    Breach("contexts that fail", "every context gets a score", failing("busy", "try later."), "busy: try later"),
    Breach("no cases", "every context gets a score", Toy, "no cases", {"cases": ()}),
    Breach("an empty list", LISTS, mutated(lambda s, r: [replace(s, top=())]), "0 candidates"),
    Breach("too long a list", LISTS, mutated(lambda s, r: [replace(s, top=s.top * 2)]), "40 candidates"),
    Breach("an id twice", LISTS, mutated(lambda s, r: [replace(s, top=s.top[:1] * 2)]), "stands in the list twice"),
    Breach("a rising list", LISTS, mutated(lambda s, r: [replace(s, top=s.top[::-1])]), "does not fall"),
    Breach("probabilities", LISTS, with_logprobs(lambda v: [math.exp(x) for x in v]), "above 0"),
    Breach("logarithms to base 10", LISTS, with_logprobs(lambda v: [x / math.log(10) for x in v]), "add up to"),
    Breach("not reported", LISTS, with_logprobs(lambda v: [*v[:-1], None]), "None (NoneType) is no finite float"),
    Breach("minus infinity", LISTS, with_logprobs(lambda v: [*v[:-1], -math.inf]), "-inf (float) is no finite"),
    Breach("not a number", LISTS, with_logprobs(lambda v: [math.nan, *v[1:]]), "nan (float) is no finite float"),
    Breach("a token that is None", LISTS, with_candidate(token=None), "the token None with the id"),
    Breach("an id that is a float", LISTS, with_candidate(token_id=7.0), "with the id 7.0"),
    Breach("an id of numpy", LISTS, with_candidate(token_id=np.int64(7)), "with the id np.int64(7)"),
    Breach("bytes that are a text", LISTS, with_candidate(token_bytes="a"), "has the token_bytes 'a'"),
    Breach("masked tokens", LISTS, with_logprobs(lambda v: [*v[:-1], -(2.0**100)]), "mark of a masked token"),
    Breach("float32", LISTS, with_logprobs(lambda v: list(np.float32(v))), "(float32) is no finite float"),
    Breach(
        "a full vocabulary unasked",
        LISTS,
        mutated(lambda s, r: [replace(s, full_logprobs=np.zeros(3, np.float32))]),
        "came unasked",
    ),
    Breach(
        "renormalised lists",
        "a shorter list is the beginning of the longer one",
        with_logprobs(normalised),
        "the first has [0.0] in a list of 1",
    ),
    Breach("answers that drift", "equal requests get equal scores", Drifting, "nats apart where 0 is allowed"),
    Breach("answers by order", "positions may be asked apart", ByOrder, "nats apart"),
    Breach("system text dropped", READ, WithoutSystem, "without the system text"),
    Breach("history dropped", READ, WithoutHistory, "without the earlier turns"),
    Breach("prefix dropped", READ, WithoutPrefix, "the prefix did not reach"),
    Breach("prompt dropped", READ, WithoutPrompt, "all prompts have one answer"),
    Breach(
        "a reason that is a list", STORED, mutated(lambda s, r: [replace(s, finish_reason=["x"])]), "cannot be written"
    ),
    Breach(
        "a version that is a number", STORED, mutated(lambda s, r: [replace(s, model_version=1)]), "model_version=1"
    ),
    Breach(
        "a count that is a text", STORED, mutated(lambda s, r: [replace(s, input_tokens="12")]), "input_tokens='12'"
    ),
    Breach("no full vocabulary", FULL, mutated(lambda s, r: [replace(s, full_logprobs=None)]), "is None"),
    Breach("half of the vocabulary", FULL, mutated(half_of_the_vocabulary), "the whole vocabulary adds up to 0."),
    Breach("ids that are not the index", FULL, mutated(other_ids), "which full_logprobs does not say"),
    Breach("a wanted token left out", WANTED, wanted_as(lambda w, r: w[:-1]), "was asked for, and is missing"),
    Breach("no wanted token", WANTED, wanted_as(lambda w, r: ()), "was asked for, and is missing"),
    Breach("wanted tokens by rank", WANTED, wanted_as(lambda w, r: w[::-1]), "the list does not fall"),
    Breach("other values for wanted tokens", WANTED, wanted_as(with_other_values), "in a longer list"),
    Breach("wanted tokens that are listed", WANTED, ListsWhatIsWanted, "tokens of the list stand in wanted, too"),
    Breach("a token that nobody wanted", WANTED, wanted_as(with_another), "nobody asked for it"),
    Breach("wanted tokens unasked", WANTED, wanted_as(lambda w, r: w or (Candidate("~", -9.0),)), "came unasked"),
    Breach("foreign ids fed", "token ids of another model are not fed", FeedsAnyIds, "with ids from 0"),
    Breach("samples of something else", "samples are what score would say", SamplesOthers, "nats apart"),
    Breach("fewer samples than asked", "samples are what score would say", SamplesOne, "1 results for 2 requests"),
    Breach("samples with other texts", "samples are what score would say", SamplesOtherTexts, "do not add up"),
    Breach("an answer to nothing", "nothing asked is nothing answered", StopsAtNothing, "no requests: 1 results"),
    Breach("one queue for all calls", "calls at the same time keep apart", SharedQueue, "belong to another call"),
    Breach("a report of objects", "the report is json", ReportsObjects, "is not JSON"),
    Breach("a report that is a list", "the report is json", ReportsAList, "it is a list"),
    Breach("an interruption in two lines", CANCELLED, SpeaksAtLength, "return one line or None"),
    Breach("slow to close", CLOSED, SlowToClose, "closing the results did not end within 0.1 s"),
    Breach("one call at a time", CLOSED, OneCallOnly, "did not end within 0.5 s", {"deadline_s": 0.5}),
    Breach("a cancel that is ignored", CANCELLED, IgnoresCancel, "went on for more than 0.1 s"),
    Breach("a cancel that is ignored for long", CANCELLED, IgnoresCancel, "went on to its end", {"close_s": 5.0}),
    Breach("a second run without the rest", CANCELLED, ForgetsWhatWasAsked, "after a call was cancelled"),
    Breach("foreign keys in flight", CANCELLED, AlwaysInFlight, "1 keys that nobody has asked for"),
]
RAISED = [
    Breach("a usable model refused", "preflight accepts the model", RefusesAll, "switched off"),
    Breach("closing twice fails", "closing twice is harmless", ClosesOnce, "closed already"),
]
