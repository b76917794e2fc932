"""From a request to scores: its contexts in the form that a server takes, the calls, and what is checked of answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from backends.base import ScoreRequest
from backends.errors import BackendError, RetryableBackendError
from backends.local.contexts import Asked, contexts_of
from backends.local.tokenizer import PromptRefusedError
from backends.openai_compatible.answers import Entry, ListError, usable
from backends.openai_compatible.asking import Answered, Asker, Told
from backends.openai_compatible.client import Client
from backends.openai_compatible.found import Found
from backends.openai_compatible.options import OpenAICompatibleOptions
from backends.openai_compatible.proofs import asker_of, vocabulary_of
from backends.openai_compatible.vocabulary import ServerVocabulary, messages_of, raw_text
from backends.openai_compatible.wanted import check_can, entries_of, lacking, values_of, wanted_ids
from backends.service.bought import BoughtAnswers
from backends.service.breaker import NOT_ASKED, AskingStoppedError, Breaker
from backends.service.limit import CallLimit
from backends.service.merging import merged
from backends.service.retry import StatusError, with_retries
from kl.records import Candidate, Prompt, Score, ScoreFailure
from kl.tables.context_counts import RETOKENISED

_FIRST_WAIT_S = 0.2
_NO_LIMIT = 2**31
_TOO_LONG_REASON = "context-too-long"
_TOO_LONG = re.compile(
    r"exceed_context_size|context.length|maximum context|too long|context window|must be at least 1, got 0",
    re.IGNORECASE,
)
_AT_ONCE = 16  # chains of one response


class Unit(NamedTuple):
    """One call and the keys that it answers, each with the place of its list among those of the answer."""

    call: Callable[[], Awaitable[Answered]]
    places: tuple[tuple[str, int], ...]
    what: str
    contexts: Mapping[str, Asked] = MappingProxyType({})  # of those that are asked for tokens by name


@dataclass(eq=False)
class Scorer:
    """Scores of one model of one server; to be prepared before it is used.

    Attributes
    ----------
    client : Client
    options : OpenAICompatibleOptions
    found : Found
    limit : CallLimit
        Over all that ask the server.
    calls : Counter
        Counts calls by outcome.
    version : str
        What scores call the model.
    bought : BoughtAnswers
        Of responses that the model writes.
    vocabulary : ServerVocabulary, optional
        Where the server lends its tokenizer.
    asker : Asker
    """

    client: Client
    options: OpenAICompatibleOptions
    found: Found
    limit: CallLimit
    calls: Counter[str]
    version: str
    bought: BoughtAnswers
    vocabulary: ServerVocabulary | None = field(default=None, init=False)
    asker: Asker = field(init=False)
    _breaker: Breaker = field(init=False)

    def __post_init__(self) -> None:
        self._breaker = Breaker(self.found.model, self._ask_once, self.options.retry_deadline_s)

    async def prepare(self) -> Self:
        """Fetch what each request needs of the server's tokenizer."""
        found, forced = self.found, None
        if found.lent:
            n_vocab = found.server.get("n_vocab")
            vocabulary = vocabulary_of(self.client, self.options, found.model, found.kind, n_vocab)
            self.vocabulary = vocabulary
            if found.kind == "llama_cpp":
                forced = (await self.fetched(lambda: vocabulary.encoded("a")))[0]
        lent = self.vocabulary is not None
        self.asker = asker_of(self.client, self.options, found.model, found.kind, forced, lent=lent)
        return self

    async def fetched(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """What a call for the tokenizer gives, repeated while it may."""
        deadline_s = self.options.retry_deadline_s
        return await with_retries(call, what="tokenize", deadline_s=deadline_s, first_wait_s=_FIRST_WAIT_S)

    async def rendered(self, prompt: Prompt) -> str | None:
        """What the model is given for a prompt, where the server lends its tokenizer; the chat route hides it.

        Raises
        ------
        PromptRefusedError
            If the server cannot write the prompt.
        """
        if self.found.form != "ids" or self.vocabulary is None:
            return None
        vocabulary = self.vocabulary
        return await self.fetched(lambda: vocabulary.rendered(prompt))

    async def score(self, request: ScoreRequest) -> AsyncGenerator[Score | ScoreFailure]:
        """One result for each key; positions in their order where the server works on one at a time.

        Raises
        ------
        ConfigError
            If tokens are asked for by name, and the server cannot be asked so.
        """
        if request.wanted is not None:
            check_can(self.found)
        try:
            await self._breaker.passed()
            failed, units = await self._prepared(request)
        except AskingStoppedError as error:
            failed, units = [ScoreFailure(key, NOT_ASKED, str(error)) for key in request.keys], []
        except PromptRefusedError as error:
            failed, units = [ScoreFailure(key, "prompt-refused", str(error), final=True) for key in request.keys], []
        except (StatusError, RetryableBackendError) as error:
            failed, units = (
                [ScoreFailure(key, "tokenizer", f"the server's tokenizer failed: {error}") for key in request.keys],
                [],
            )
        for failure in failed:
            # The server's context belongs to no key: started with a longer one, it may well answer.
            yield replace(failure, final=False) if failure.reason == _TOO_LONG_REASON else failure
        waiting = iter(units)

        async def work() -> AsyncGenerator[Score | ScoreFailure]:
            for unit in waiting:
                async with aclosing(self._answered(unit, request.top_logprobs)) as answered:
                    async for result in answered:
                        yield result

        workers = min(self.limit.most, len(units), _AT_ONCE)
        if not workers:
            return
        if self.found.kind == "llama_cpp":
            workers = 1  # a response's positions in order: the cache, if it may be used, has the one before
        async with aclosing(merged([work() for _ in range(workers)])) as results:
            async for result in results:
                yield result

    # Preparing.

    async def _prepared(self, request: ScoreRequest) -> tuple[list[ScoreFailure], list[Unit]]:
        if self.found.form == "ids":
            return await self._by_ids(request)
        if self.found.route == "prompt":
            return self._by_echo(request)
        gaps = dict(request.gaps)
        failed = [_gap(key, gaps[position]) for position, key, _ in request.contexts() if position in gaps]
        contexts = [(key, prefix) for position, key, prefix in request.contexts() if position not in gaps]
        return failed, [self._by_text(request, key, prefix) for key, prefix in contexts]

    def _by_text(self, request: ScoreRequest, key: str, prefix: str) -> Unit:
        k, asker = request.top_logprobs, self.asker
        if self.found.route == "prefill":
            spelling = self.found.prefill or "plain"
            return Unit(lambda: asker.by_chat(request.prompt, prefix, k, spelling), ((key, 0),), request.name)
        text = raw_text(messages_of(request.prompt)) + prefix
        return Unit(lambda: asker.by_text(text, k), ((key, 0),), request.name)

    async def _by_ids(self, request: ScoreRequest) -> tuple[list[ScoreFailure], list[Unit]]:
        vocabulary = self.vocabulary
        assert vocabulary is not None, "ids are asked by what lends a tokenizer"
        await self.fetched(lambda: vocabulary.fetch_prompt(request.prompt))
        own = await self.fetched(lambda: vocabulary.is_own(request))
        if not own:
            await self.fetched(lambda: vocabulary.fetch_prefixes(request))
        whole = self.found.route == "prompt"
        # The server wants room for one generated token; a last token of no meaning is added where all is one request.
        limit = _NO_LIMIT if self.found.context is None else self.found.context - (2 if whole else 1)
        if own:
            contexts, failed = _of_own(request, vocabulary.prompt_ids(request.prompt), limit)
        else:
            by_text = replace(request, token_ids=None, wanted=None)  # by name only where P's ids are the server's
            contexts, failed = contexts_of(by_text, vocabulary, _Template(vocabulary), limit)
        if request.wanted is not None and own:
            named = await self.fetched(lambda: wanted_ids(request, vocabulary))
            contexts = [item._replace(wanted=named[item.key]) for item in contexts]
        contexts.sort(key=lambda item: item.length)
        if not whole:
            return failed, [self._one(request, item) for item in contexts]
        lists = {id(item.ids): item.ids for item in contexts}
        return failed, [
            self._whole(request, ids, [item for item in contexts if item.ids is ids]) for ids in lists.values()
        ]

    def _one(self, request: ScoreRequest, item: Asked) -> Unit:
        ids, k = item.ids[: item.length], request.top_logprobs
        return Unit(lambda: self.asker.by_ids(ids, k), ((item.key, 0),), request.name, _named([item]))

    def _whole(self, request: ScoreRequest, ids: Sequence[int], contexts: Sequence[Asked]) -> Unit:
        sent = [*ids[: contexts[-1].length], ids[0]]
        places = tuple((item.key, item.length) for item in contexts)
        return Unit(lambda: self.asker.whole(sent, request.top_logprobs), places, request.name, _named(contexts))

    def _by_echo(self, request: ScoreRequest) -> tuple[list[ScoreFailure], list[Unit]]:
        """The whole text at once; a position is answered if the server cut all before it as P did."""
        gaps = dict(request.gaps)
        prompt = raw_text(messages_of(request.prompt))
        asked = [(position, key) for position, key, _ in request.contexts() if position not in gaps]
        failed = [_gap(key, gaps[position]) for position, key, _ in request.contexts() if position in gaps]
        if not asked:
            return failed, []
        ends = request.prefix_ends
        last = asked[-1][0]
        end = ends[last + 1] if last + 1 < len(ends) else len(request.text)
        # The text goes on for one token, whose list is that of the last position.
        text = prompt + (request.text[:end] if end > ends[last] else request.text[:end] + ".")

        async def call() -> Answered:
            tokens, answered = await self.asker.echoed(text, request.top_logprobs)
            at = {where: number for number, where in enumerate(accumulate(map(len, tokens), initial=0))}
            lists: list[list[Entry]] = []
            for position, _ in asked:
                numbers = [at.get(len(prompt) + place, -1) for place in ends[: position + 1]]
                alike = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
                inside = alike and 0 <= numbers[0] and numbers[-1] < len(tokens)
                lists.append(answered.lists[numbers[-1]] if inside else [_OTHERWISE])
            return Answered(lists, answered.told)

        return failed, [Unit(call, tuple((key, number) for number, (_, key) in enumerate(asked)), request.name)]

    # Asking.

    async def _answered(self, unit: Unit, k: int) -> AsyncGenerator[Score | ScoreFailure]:
        try:
            answered = await self.call(unit.call, f"ask {self.found.model} about {unit.what}")
            self.check_server(answered.told)
            await self.fetch_texts(item for _, place in unit.places for item in answered.lists[place])
        except (BackendError, PromptRefusedError) as error:
            failure = self.failure(error)
            for key, _ in unit.places:
                yield failure.of(key)
            return
        for result in self._read(unit, answered, k):
            yield await self._with_wanted(unit, result)

    async def _with_wanted(self, unit: Unit, result: Score | ScoreFailure) -> Score | ScoreFailure:
        """The same with the values of the tokens that are asked for by name, if any are."""
        context = unit.contexts.get(result.key)
        if context is None or isinstance(result, ScoreFailure):
            return result
        tokens = lacking(result, context.wanted)
        if not tokens:
            return result
        ids, longest = context.ids[: context.length], self.found.longest
        try:
            answers = await self.call(
                lambda: values_of(self.asker, ids, tokens, longest),
                f"ask {self.found.model} about {unit.what}",
                # Else what the position has would be bought again; of a whole response it is one call of many.
                goes_on=len(unit.places) == 1,
            )
            for answer in answers:
                self.check_server(answer.told)
            entries = entries_of(answers, tokens)
            await self.fetch_texts(entries)
        except (BackendError, PromptRefusedError) as error:
            return self.failure(error).of(result.key)
        told = [answer.told for answer in answers]
        return replace(
            result,
            wanted=tuple(map(self.candidate, entries)),
            input_tokens=_sum([result.input_tokens, *(each.input_tokens for each in told)]),
            output_tokens=_sum([result.output_tokens, *(each.output_tokens for each in told)]),
        )

    async def fetch_texts(self, entries: Iterable[Entry]) -> None:
        """The texts of candidates that are listed by their ids alone."""
        texts = self.vocabulary
        if texts is not None:
            missing = {item.token_id for item in entries if item.token_id is not None and not item.token_bytes}
            await self.fetched(lambda: texts.fetch_texts(missing))

    async def call(self, call: Callable[[], Awaitable[Any]], what: str, *, goes_on: bool = False) -> Any:
        """One call within the limit, repeated while it may; counts its outcome. ``goes_on`` as of `CallLimit.slot`."""
        again = False

        async def once() -> Any:
            nonlocal again
            before, again = again, True
            async with self.limit.slot(first=before or goes_on, goes_on=goes_on and not before):
                await self._breaker.passed()
                try:
                    answer = await call()
                except RetryableBackendError as error:
                    self.calls["throttled" if error.status == 429 else "fault"] += 1
                    self.limit.note(throttled=error.status == 429)
                    raise
                except StatusError:
                    self.calls["refused"] += 1
                    raise
                except ListError:
                    self.calls["unusable"] += 1
                    raise
            self.calls["answered"] += 1
            self.limit.note(throttled=False)
            self._breaker.answered()
            return answer

        deadline_s, attempt = self.options.retry_deadline_s, partial(self._breaker.repeated, once)
        return await with_retries(
            attempt, what=what, deadline_s=deadline_s, first_wait_s=_FIRST_WAIT_S, sleep=self.limit.sleep
        )

    async def _ask_once(self) -> None:
        """One tiny request, whatever it is answered."""
        body: dict[str, Any] = {"model": self.found.model, "max_tokens": 1}
        if self.found.route in ("prefill", "write") and self.options.template != "none":
            await self.client.post("chat/completions", body | {"messages": [{"role": "user", "content": "Hi"}]})
        else:
            await self.client.post("completions", body | {"prompt": "Hi"})

    def check_server(self, told: Told) -> None:
        """Refuse the answer of another server, or of another model, than was proven.

        Raises
        ------
        ListError
            With both names.
        """
        for name, proven, now in (
            ("system_fingerprint", self.found.fingerprint, told.fingerprint),
            ("model", self.found.answers_as, told.model),
        ):
            if proven is not None and now != proven:
                raise ListError(
                    "server-changed", f"the answer is of {name} {now!r}, and {proven!r} was proven. Run again."
                )

    def failure(self, error: Exception) -> Failed:
        """Why a call has no answer."""
        if isinstance(error, AskingStoppedError):
            return Failed(NOT_ASKED, str(error))
        if isinstance(error, RetryableBackendError):
            return Failed("deadline", f"{error}; given up after {self.options.retry_deadline_s:g} s.")
        if isinstance(error, StatusError):
            too_long = _TOO_LONG.search(str(error)) is not None
            return Failed(_TOO_LONG_REASON if too_long else "refused", str(error))
        return Failed(error.reason if isinstance(error, ListError) else "unexpected-shape", str(error))

    def _read(self, unit: Unit, answered: Answered, k: int) -> Iterator[Score | ScoreFailure]:
        told = answered.told
        # The counts are those of the whole call, and belong to the longest of its contexts.
        last = max(unit.places, key=lambda place: place[1])[0]
        counts = (told.input_tokens, told.output_tokens)
        for key, place in unit.places:
            try:
                if answered.lists[place] == [_OTHERWISE]:
                    raise ListError(RETOKENISED, "the server cuts the text before this position otherwise than P did.")
                if not answered.lists[place]:
                    raise ListError(
                        "colliding-texts", "several candidates share one text, so that some are not listed."
                    )
                best = usable(answered.lists[place], k)
            except ListError as error:
                yield ScoreFailure(key, error.reason, str(error))
                continue
            n_in, n_out = counts if key == last else (None, None)
            yield Score(
                key,
                tuple(map(self.candidate, best.entries)),
                None,
                self.version,
                told.finish_reason,
                n_in,
                n_out,
                best.n_dropped,
            )

    def candidate(self, entry: Entry) -> Candidate:
        """A candidate with its text: by its id, from the server's table, else as it is listed."""
        if entry.token_id is None or self.vocabulary is None:
            return Candidate(entry.text, entry.logprob, entry.token_id, entry.token_bytes)
        # Of a part of a character the bytes are not said by every way in which a token is come by.
        text = entry.text if entry.token_bytes else self.vocabulary.text_of(entry.token_id)
        exact = entry.token_bytes or (text.encode() if text and "\ufffd" not in text else None)
        return Candidate(text, entry.logprob, entry.token_id, exact)


class Failed(NamedTuple):
    """A failure that has no key yet."""

    reason: str
    message: str

    def of(self, key: str) -> ScoreFailure:
        """The failure of one key."""
        return ScoreFailure(key, self.reason, self.message)


def _named(contexts: Iterable[Asked]) -> dict[str, Asked]:
    return {item.key: item for item in contexts if item.wanted}


def _sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


_OTHERWISE = Entry(None, "", None, None, -1)


def _gap(key: str, reason: str) -> ScoreFailure:
    message = "no text says what P had written here, and the server is not fed P's token ids."
    return ScoreFailure(key, reason, message, final=True)


def _of_own(request: ScoreRequest, prompt_ids: Sequence[int], limit: int) -> tuple[list[Asked], list[ScoreFailure]]:
    """The contexts of P's own ids, and those that are too long or empty."""
    whole = [*prompt_ids, *(request.token_ids or ())]
    contexts: list[Asked] = []
    failed: list[ScoreFailure] = []
    for position, key in zip(request.positions, request.keys, strict=True):
        length = len(prompt_ids) + position
        if 0 < length <= limit:
            contexts.append(Asked(key, whole, length))
        elif length:
            message = f"the context has {length} tokens, the server takes {limit}; start it with a longer context."
            failed.append(ScoreFailure(key, _TOO_LONG_REASON, message))
        else:
            failed.append(ScoreFailure(key, "empty-context", "there is nothing to predict from.", final=True))
    return contexts, failed


class _Template(NamedTuple):
    vocabulary: ServerVocabulary

    def encode(self, prompt: Prompt) -> list[int]:
        return self.vocabulary.prompt_ids(prompt)
