"""The contract between the flow and a backend.

A backend is built once per process from its validated `Options`, used from one event loop, and closed at the end::

    async with BackendClass(options) as backend:
        await backend.preflight("model-name")
        async for result in backend.score(requests):
            ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from backends.asked import Sample, SampleRequest, ScoreRequest, WorkEstimate
from backends.errors import ConfigError
from backends.settings import SampleSettings
from kl.records import Prompt, Score, ScoreFailure
from kl.text_tokens import prompt_tokens_of, text_tokens

__all__ = [
    "NOT_SUBMITTED",
    "UNREAD",
    "WAITING",
    "Backend",
    "BackendOptions",
    "Capabilities",
    "Sample",
    "SampleRequest",
    "SampleSettings",
    "ScoreRequest",
    "WorkEstimate",
    "compares_pairs",
    "own_name",
]

# Reasons of a failure that `Backend.submit` and `Backend.collect` give to keys that have no answer yet.
WAITING = "waiting"
NOT_SUBMITTED = "not-submitted"

# Below `Backend.state_dir`, for responses that were paid for and not handed out; removed when every response is in
# its file.
UNREAD = "unread"


class BackendOptions(BaseModel):
    """Settings every backend has; each backend's own `Options` adds to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str | None = Field(
        default=None,
        description="System text given to this backend's model in place of the one in the response file; "
        "an empty text asks for none. Default: the file's own.",
    )


class Capabilities(NamedTuple):
    """What a backend can do, known without a call.

    ``max_top_logprobs`` is the longest list it reports; ``full_vocabulary`` that it can report every token;
    ``samples`` that it can write responses; ``token_ids`` that it feeds P's token ids, where they are its own, instead
    of the text (the ids then belong to the key of a score); ``remote`` that it sends texts to a service, which may cost
    money; ``deferred`` that its answers come from jobs that outlive the process (`Backend.submit`, `Backend.collect`);
    ``exact_pairs`` that it compares the whole vocabularies of two of its models itself (`ScoreRequest.counterparts`);
    ``one_pass`` that all positions of a response may be one request, so that a response's tokens are charged once;
    ``discovers`` that what decides the identity of its answers is known to the service alone (`Backend.discover`);
    ``recorded`` that its answers are on record, so that a context asked a second time gets the same one;
    ``wanted_tokens`` that it gives values for tokens that are asked for by name (`ScoreRequest.wanted`).
    """

    max_top_logprobs: int
    full_vocabulary: bool = False
    samples: bool = False
    token_ids: bool = False
    remote: bool = True
    deferred: bool = False
    exact_pairs: bool = False
    one_pass: bool = False
    discovers: bool = False
    recorded: bool = False
    wanted_tokens: bool = False


def _unlocked() -> None:
    """Nobody else uses the backend's folder."""


class Backend(ABC):
    """A source of log-probabilities. Subclass it, name it in a `register_backends` hook, and that is a plugin.

    Parameters
    ----------
    options : BackendOptions
        Validated `Options` of the backend.
    state_dir : Path, optional
        Where the backend may keep what must survive a crash, such as the names of its remote jobs.

    Attributes
    ----------
    name : str or None
        What the class is registered as. It is not inherited: a subclass is another backend.
    needs : tuple of str
        What must be there beside the program, each in a few words for the list of backends.
    template_tokens : int
        About how many tokens a chat template puts around each turn, and before the answer; for estimates.
    run_id : str or None
        The flow run that uses the backend, set before it is entered; a backend with remote jobs records it with them.
    check_lock : callable
        Set before it is entered; raises if another process may use ``state_dir`` by now. A backend with remote jobs
        calls it just before it makes one.
    """

    Options: ClassVar[type[BackendOptions]] = BackendOptions
    capabilities: ClassVar[Capabilities]
    needs: ClassVar[tuple[str, ...]] = ()
    template_tokens: ClassVar[int] = 5
    name: ClassVar[str | None] = None
    run_id: str | None = None
    check_lock: Callable[[], None] = staticmethod(_unlocked)

    def __init__(self, options: BackendOptions, state_dir: Path | None = None) -> None:
        self.options = options
        self.state_dir = state_dir

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    @classmethod
    def identity(cls, options: BackendOptions, request: ScoreRequest) -> dict[str, Any]:
        """Everything beside model, prompt and prefix that changes the answer, as JSON types.

        It is hashed into the key under which a score is kept. Backends that send the same request to the same model
        return the same identity, so that a change of backend buys nothing twice.

        Raises
        ------
        ConfigError
            If the class has no `name`, where this is not overridden.
        """
        name = own_name(cls)
        if name is None:
            raise ConfigError(
                f"{cls.__name__} has no name for its scores. Set name to what it is registered as, or write identity()."
            )
        return {"backend": name, "top_logprobs": request.top_logprobs, "full": request.full_vocabulary}

    @classmethod
    def sampling_identity(cls, options: BackendOptions, model: str, settings: SampleSettings) -> dict[str, Any]:
        """As `identity`, of a model that writes responses: those of one sampling come from one."""
        return cls.identity(options, ScoreRequest("", model, Prompt(()), "", (), None, (), (), settings.top_logprobs))

    @classmethod
    def cost_usd(cls, options: BackendOptions, model: str, input_tokens: int, output_tokens: int) -> float | None:
        """The price of that many tokens, or None where it is not known; 0 where nothing leaves the machine."""
        return None if cls.capabilities.remote else 0.0

    @classmethod
    def request_bytes(cls, request: ScoreRequest) -> int:
        """How many bytes a request's contexts are as text."""
        prompt = len(request.prompt.canonical().encode("utf-8"))
        return sum(prompt + len(prefix.encode("utf-8")) for _, _, prefix in request.contexts())

    @classmethod
    def estimate(cls, options: BackendOptions, request: ScoreRequest) -> WorkEstimate:
        """What a request comes to; calls nothing."""
        if not request.positions:
            return WorkEstimate()
        n = len(request.positions)
        prompt_tokens = n * prompt_tokens_of(request.prompt, cls.template_tokens).tokens
        input_tokens = prompt_tokens + sum(request.positions)
        cost = cls.cost_usd(options, request.model, input_tokens, n)
        return WorkEstimate(n, cls.request_bytes(request), input_tokens, n, cost, prompt_tokens)

    @classmethod
    def estimate_sample(cls, options: BackendOptions, request: SampleRequest) -> WorkEstimate:
        """What a response comes to at most, for it may end before ``max_tokens``; calls nothing."""
        n_bytes = len(request.prompt.canonical().encode("utf-8")) + len(request.prefix.encode("utf-8"))
        n_prompt, n_prefix = prompt_tokens_of(request.prompt, cls.template_tokens).tokens, len(request.prefix_ids or ())
        if request.prefix and request.prefix_ids is None:
            n_prompt += ceil(text_tokens(request.prefix).tokens)
        n_in, n_out = n_prompt + n_prefix, request.settings.max_tokens
        return WorkEstimate(1, n_bytes, n_in, n_out, cls.cost_usd(options, request.model, n_in, n_out), n_prompt)

    async def count_prompt_tokens(self, model: str, prompts: Sequence[Prompt]) -> Sequence[int | None] | None:
        """How many tokens a model is given for each prompt, by its own tokenizer and template; nothing is charged.

        None, for all or for one, where nobody knows: then the estimate by rule stands. The backend is entered. It is
        asked for a few prompts of a run, before anything is bought, and what it raises or takes longer than seconds
        for is done without.

        Raises
        ------
        BackendError
            If the service does not count now.
        """
        return None

    def parallel_groups(self) -> int:
        """How many groups of responses may be at work at once."""
        return 4

    def in_flight(self) -> Mapping[str, str]:
        """Keys that an earlier run has already asked for, with the name of the remote job that answers them.

        The flow asks for the keys of one job together, so that the backend can wait for it instead of buying again.
        """
        return {}

    def report(self) -> dict[str, Any]:
        """What the run's record should say of the backend's work (job names, calls), as JSON types.

        Of a backend with the capability ``deferred`` it is also called while work is under way, from other threads, for
        the ``state`` of each of its ``jobs``.
        """
        return {}

    @classmethod
    def parse_raw(cls, key: str, row: dict[str, Any]) -> Score | ScoreFailure:
        """Read a row that was kept with ``keep_raw`` again.

        Raises
        ------
        ConfigError
            If the backend keeps no rows.
        """
        raise ConfigError(f"{cls.__name__} keeps no raw rows.")

    def stop_asking(self, why: str) -> bool:
        """Send nothing more, and let what is in flight be answered: what is left over fails as ``not-asked``.

        Returns whether it does so; a backend for which nothing is lost when it is cut short need not.
        """
        return False

    async def interrupted(self) -> str | None:
        """Settle what must be settled when the user stops a run; returns one line on what goes on elsewhere.

        All `score` iterators were closed before. It has two seconds.
        """
        return None

    def going_on(self) -> str | None:
        """One line on what goes on elsewhere, and is charged, when the session ends; None if nothing does."""
        return None

    async def abandoned(self, run_id: str) -> str | None:
        """As `interrupted`, for a run whose process is gone: by what is on record, with the same end if repeated."""
        return None

    async def discover(self, model: str, *, call: bool = True) -> BackendOptions:
        """Find out what decides the identity of answers and only the service knows; called before anything is planned.

        Gives the options with it, which `identity` is then given. Only with the capability ``discovers``. It may send a
        few tiny requests where nothing on record (in ``state_dir``) serves, and answers from the record where the
        service cannot be reached, so that what was bought stays readable. Without ``call``, in a dry run, the backend
        is not entered and only the record serves; the options are then given back as they are where there is none.

        Raises
        ------
        ModelNotUsableError
            If nothing is on record and the service does not say it.
        """
        raise NotImplementedError(f"{type(self).__name__} has nothing to discover")

    async def rendered_prompt(self, prompt: Prompt, model: str) -> str | None:
        """The text that a model is given for a prompt, as its template writes it; None where nobody says.

        The backend is entered. It may ask the service where that costs nothing.

        Raises
        ------
        PromptRefusedError
            If the model has no form for the prompt.
        """
        return None

    async def rendered_prompt_sha256(self, prompt: Prompt, model: str) -> str | None:
        """The hash of that text; None where nobody says. Overridden where the hash is known and the text is not."""
        from kl.input.responses import prompt_sha256  # late: it loads Polars, which a command's help does not need

        text = await self.rendered_prompt(prompt, model)
        return None if text is None else prompt_sha256(text)

    def check(self, model: str) -> None:  # noqa: B027 - most have nothing to check
        """Refuse what can be known to be wrong without a call: names, credentials, packages, files.

        It is called before anything is made or started, and is quick.

        Raises
        ------
        ConfigError
            In one line, with what to do.
        """

    @abstractmethod
    async def preflight(self, model: str) -> str | None:
        """Prove with one tiny request that ``model`` gives log-probabilities and continues a prefill.

        Returns the model version that the service reports, if any.

        Raises
        ------
        ModelNotUsableError
            If the model cannot be used, with the reason.
        """

    async def preflight_sampling(self, model: str, settings: SampleSettings) -> str | None:
        """Prove with a tiny request that ``model`` writes responses with log-probabilities; as `preflight` otherwise.

        A model that writes need not continue a prefill. Overridden where `preflight` asks for more than that.
        """
        return await self.preflight(model)

    @abstractmethod
    def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Yield exactly one result for each key asked, in any order."""

    def submit(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """Have jobs made for all keys and wait for none: a `WAITING` failure for each key that a job has.

        A score only where a job that was read before holds it. Only with the capability ``deferred``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no jobs that outlive the process")

    def collect(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        """As `score`, with one look at each job on record: `WAITING` for keys whose job still runs.

        What a job left out goes into a follow-up job. Keys that were in no job are `NOT_SUBMITTED`. Only with the
        capability ``deferred``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no jobs that outlive the process")

    def sample(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Sample | ScoreFailure]:
        """Yield exactly one result for each response asked, in any order, as it is there.

        Only with the capability ``samples``. A failure is of one response; what holds for all is raised.
        """
        raise NotImplementedError(f"{type(self).__name__} does not sample responses")


def own_name(backend: type[Backend]) -> str | None:
    """The `name` that a class gives itself; None if it has none or another one's."""
    return vars(backend).get("name")


def compares_pairs(backend: type[Backend]) -> bool:
    """Whether a class says of itself that it has ``exact_pairs``: what a subclass reports may be another vocabulary."""
    return "capabilities" in vars(backend) and backend.capabilities.exact_pairs
