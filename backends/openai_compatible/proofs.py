"""What a server can do, proven by what it answers: a field that is ignored is answered with status 200, too."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from backends.errors import ModelNotUsableError
from backends.local.tokenizer import PromptRefusedError
from backends.openai_compatible.answers import Entry, ListError, usable
from backends.openai_compatible.asking import Answered, Asker, Told
from backends.openai_compatible.client import Client
from backends.openai_compatible.found import Found
from backends.openai_compatible.options import Mode, OpenAICompatibleOptions
from backends.openai_compatible.presets import PRESETS, Prefill
from backends.openai_compatible.server import Server, look_at
from backends.openai_compatible.vocabulary import ServerVocabulary
from backends.service.retry import StatusError, with_retries
from kl.records import UNKNOWN_LOGPROB, Prompt, Turn

logger = logging.getLogger(__name__)
T = TypeVar("T")

_PROMPT = Prompt((Turn("user", "Continue the row of numbers: 1, 2, 3, 4, 5, 6, 7, 8"),))
_PREFIX, _NEXT = "1, 2, 3, 4,", "5"
_OTHER_PREFIX = "1, 2, 3,"
_ONE_TOKEN = "a"  # of every vocabulary, with a blank before it or without
_FEW = 5
_PROBED = 20
_DRAWS = 3
LONGEST = 1000
_LEAST_MASS = 0.02  # of the best five: logits that happen to be negative have less
_LIMIT = re.compile(
    r"max(?:imum)?(?: allowed)?:? (\d+)|at most (\d+)|less than or equal to (\d+)|between \d+ and (\d+)"
)
# Else the model's own generation_config is in force, which cuts and moves what is sampled.
_NEUTRAL = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
_USUAL_LIMITS = (100, 50, 20, 10, 8, 5)


async def prove(client: Client, options: OpenAICompatibleOptions, model: str, *, deadline_s: float) -> Found:
    """Ask a server what it is, and a dozen tiny questions.

    Raises
    ------
    ModelNotUsableError
        In one line, with what it cannot do.
    RetryableBackendError
        If it does not answer.
    """
    proof = _Proof(client, options, model, deadline_s)
    server = await proof.repeated(lambda: look_at(client, model, options.preset))
    try:
        return await proof.of(server)
    except StatusError as error:
        permanent = error.status in (400, 404)
        raise ModelNotUsableError(f"{model} cannot be asked: {error}", permanent=permanent, model=model) from error
    except ListError as error:
        raise ModelNotUsableError(f"{model} cannot be asked: {error}", permanent=True, model=model) from error


async def probe_again(
    client: Client, options: OpenAICompatibleOptions, found: Found, *, deadline_s: float
) -> Found | None:
    """What was proven before, where the server still answers the fixed question alike: a few tiny requests.

    What is in no identity is as the server now says it: other models, its context, the longest list.
    """
    proof = _Proof(client, options, found.model, deadline_s)
    server = await proof.repeated(lambda: look_at(client, found.model, options.preset))
    if server.facts != {name: found.server[name] for name in found.server if name in server.facts}:
        return None
    if server.served.get(found.model) != found.served.get(found.model):
        return None
    try:
        now = await proof.probed(found, server)
    except (StatusError, ListError, KeyError):
        return None
    if not found.same_weights(now):
        return None
    return found.model_copy(
        update={"served": server.served, "context": server.context, "slots": server.slots, "longest": now.longest}
    )


def vocabulary_of(
    client: Client, options: OpenAICompatibleOptions, model: str, kind: str, size: int | None
) -> ServerVocabulary:
    """The tokenizer of a server that lends it."""
    fields = {name: options.body[name] for name in ("chat_template_kwargs", "chat_template") if name in options.body}
    dialect = "llama_cpp" if kind == "llama_cpp" else "vllm"
    return ServerVocabulary(client, dialect, model, fields, raw=options.template == "none", size=size)


def asker_of(
    client: Client, options: OpenAICompatibleOptions, model: str, kind: str, forced: int | None, *, lent: bool
) -> Asker:
    """What sends the requests for lists; ``lent`` is whether the server lends a tokenizer that is exact."""
    neutral = _NEUTRAL if kind in ("vllm", "sglang") else {}
    fields, llama = PRESETS[options.preset].body | neutral | options.body, kind == "llama_cpp"
    as_ids = lent and not llama
    return Asker(client, model, fields, fast=options.cache == "fast", forced=forced, llama=llama, as_ids=as_ids)


class _Proof:
    def __init__(self, client: Client, options: OpenAICompatibleOptions, model: str, deadline_s: float) -> None:
        self.client, self.options, self.model, self.deadline_s = client, options, model, deadline_s
        self.told: list[Told] = []

    async def repeated(self, call: Callable[[], Awaitable[T]]) -> T:
        return await with_retries(call, what=f"look at {self.model}", deadline_s=self.deadline_s, first_wait_s=0.2)

    async def ask(self, call: Callable[[], Awaitable[Answered]]) -> Answered:
        for _ in range(_DRAWS):
            answered = await self.repeated(call)
            self.told.append(answered.told)
            if answered.lists[-1]:  # by texts it is whole for most tokens that are drawn, not for all
                return answered
        raise ListError("colliding-texts", "several candidates share one text, so that some are not listed.")

    async def list_of(self, call: Callable[[], Awaitable[Answered]], k: int) -> list[Entry]:
        return usable((await self.ask(call)).lists[-1], k).entries

    async def of(self, server: Server) -> Found:
        """Everything, in the order of what serves best."""
        vocabulary = await self.lent(server)
        forced = None
        if server.kind == "llama_cpp":
            if vocabulary is None:
                raise ModelNotUsableError(
                    f"{self.model}: the server has no /tokenize and /apply-template.", model=self.model
                )
            forced = (await vocabulary.encoded("a"))[0]
        asker = asker_of(self.client, self.options, self.model, server.kind, forced, lent=vocabulary is not None)
        route = await self.route(asker, vocabulary, server)
        if vocabulary is not None and route[1] == "ids":
            server.facts["template_ids"] = _hash(vocabulary.prompt_ids(_PROMPT))
        return await self.measured(asker, vocabulary, server, *route)

    async def lent(self, server: Server) -> ServerVocabulary | None:
        """The server's tokenizer, if it lends one whose ids and texts are exact."""
        vocabulary = vocabulary_of(self.client, self.options, self.model, server.kind, server.vocabulary)
        try:
            await self.repeated(lambda: vocabulary.fetch_prompt(_PROMPT))
            vocabulary.prompt_ids(_PROMPT)
            if await vocabulary.is_exact():
                return vocabulary
            logger.warning(
                "%s: the server's /detokenize tidies blanks up, so that ids cannot be told from their texts", self.model
            )
        except (StatusError, PromptRefusedError, KeyError, TypeError) as error:
            logger.info("%s: the server lends no tokenizer: %s", self.model, error)
        return None

    async def route(
        self, asker: Asker, vocabulary: ServerVocabulary | None, server: Server
    ) -> tuple[Mode, str, bool, Prefill | None]:
        """(route, form, echo, spelling) of the first way that is proven."""
        if self.options.mode == "write":
            return "write", "text", False, None
        refused: list[str] = []
        modes: Sequence[Mode] = ("prompt", "ids", "prefill") if self.options.mode == "auto" else (self.options.mode,)
        for mode in modes:
            for form in ("ids", "text"):
                if (form == "ids" and vocabulary is None) or (form == "text" and mode != "prefill" and not self.raw):
                    continue
                if mode == "prefill" and (form == "ids" or self.raw):
                    continue
                try:
                    spelling = await self.try_one(mode, form, asker, vocabulary)
                except (StatusError, ListError) as error:
                    refused.append(f"{mode} by {form}: {error}")
                    logger.info("%s: not %s by %s: %s", self.model, mode, form, error)
                    continue
                return mode, form, mode == "prompt" and form == "text", spelling
        why = "; ".join(refused) or "it lends no tokenizer, and with template none nothing was left to try"
        raise ModelNotUsableError(
            f"{self.model} can be asked in none of the ways {', '.join(modes)}: {why}"[:900],
            permanent=True,
            model=self.model,
        )

    @property
    def raw(self) -> bool:
        return self.options.template == "none"

    async def try_one(self, mode: Mode, form: str, asker: Asker, vocabulary: ServerVocabulary | None) -> Prefill | None:
        if mode == "prefill":
            return await self.spelled(asker)
        if vocabulary is not None and form == "ids":
            ids, other = [await self.context(vocabulary, prefix) for prefix in (_PREFIX, _OTHER_PREFIX)]
            ask = asker.whole if mode == "prompt" else asker.by_ids
            lists = [
                await self.list_of(lambda sent=sent: ask([*sent, sent[0]] if mode == "prompt" else sent, _FEW), _FEW)
                for sent in (ids, other)
            ]
        elif mode == "prompt":
            lists = [
                await self.list_of(lambda sent=sent: self.echoed(asker, sent, _FEW), _FEW)
                for sent in (_PREFIX + " 5", _OTHER_PREFIX + " 4")
            ]
        else:
            lists = [
                await self.list_of(lambda sent=sent: asker.by_text(sent, _FEW), _FEW)
                for sent in (_PREFIX, _OTHER_PREFIX)
            ]
        _check_mass(lists[0])
        if _apart(*lists) == 0.0:
            raise ListError("prompt-ignored", "two prompts have one list: the prompt does not reach the model.")
        return None

    async def echoed(self, asker: Asker, text: str, k: int) -> Answered:
        return (await asker.echoed(text, k))[1]

    async def context(self, vocabulary: ServerVocabulary, prefix: str) -> list[int]:
        return [*vocabulary.prompt_ids(_PROMPT), *await vocabulary.encoded(prefix)]

    async def spelled(self, asker: Asker) -> Prefill:
        """The first spelling of a prefill that the server goes on from, and does not answer or begin anew."""
        refused: list[str] = []
        for spelling in PRESETS[self.options.preset].prefill:
            try:
                await self.check_prefill(asker, spelling)
            except (StatusError, ListError) as error:
                refused.append(f"{spelling}: {error}")
                continue
            return spelling
        raise ListError("no-prefill", f"no way of continuing an answer works ({'; '.join(refused)})")

    async def check_prefill(self, asker: Asker, spelling: Prefill) -> None:
        bare = await self.ask(lambda: asker.by_chat(_PROMPT, "", _FEW, spelling))
        short = await self.ask(lambda: asker.by_chat(_PROMPT, _ONE_TOKEN, _FEW, spelling))
        full = await self.ask(lambda: asker.by_chat(_PROMPT, _PREFIX, _FEW, spelling))
        spaced = await self.ask(lambda: asker.by_chat(_PROMPT, _PREFIX + " ", _FEW, spelling))
        best = usable(full.lists[0], _FEW).entries
        _check_mass(best)
        counts = [item.told.input_tokens for item in (bare, short, full)]
        if None in counts:
            raise ListError(
                "no-prefill", "its answers do not count the prompt's tokens: an ended turn would not be seen"
            )
        n_bare, n_short, n_full = (count or 0 for count in counts)
        # What ends a turn, or begins another, is a token at least.
        if not (n_short == n_bare + 1 and n_short < n_full):
            raise ListError(
                "no-prefill",
                f"a prefill of one token makes {n_short - n_bare} tokens of a prompt of {n_bare}, one of "
                f"eleven characters {n_full - n_bare}: the turn is ended, or the prefill is left out",
            )
        if not await self.goes_on(asker, best, spelling):
            raise ListError("no-prefill", f"after {_PREFIX!r} it does not say {_NEXT!r}: the answer is begun anew")
        after_space = usable(spaced.lists[0], _FEW).entries
        if _apart(best, after_space) == 0.0:
            logger.warning(
                "%s: a prefill that ends in white space is answered as if it were trimmed; positions after white space "
                "are told by their counts and left out (retokenised)", self.model,
            )  # fmt: skip

    async def goes_on(self, asker: Asker, best: Sequence[Entry], spelling: Prefill) -> bool:
        said = await self.first_text(best)
        if said and not said.strip(" "):  # some tokenizers have no blank and digit in one token
            close = await self.list_of(lambda: asker.by_chat(_PROMPT, _PREFIX.replace(" ", ""), _FEW, spelling), _FEW)
            said = await self.first_text(close)
        return said.strip(" ") == _NEXT

    async def first_text(self, best: Sequence[Entry]) -> str:
        token = best[0].token_id
        if token is None or best[0].text:
            return best[0].text
        texts = vocabulary_of(self.client, self.options, self.model, "vllm", None)
        await self.repeated(lambda: texts.fetch_texts([token]))
        return texts.text_of(token)

    # What is measured by the route that was found.

    async def ask_by(self, asker: Asker, sent: Sent, k: int, **changes: object) -> Answered:
        """The answer by a route; its last list is that of the context."""
        route, context = sent
        if route == "prompt" and not isinstance(context, str):
            return await self.ask(lambda: asker.whole([*context, context[0]], k, **changes))
        if route == "prompt":
            return await self.ask(lambda: self.echoed(asker, f"{context} {_NEXT}", k))
        if route == "write":
            return await self.ask(lambda: asker.by_chat(_PROMPT, "", k, "plain", **changes))
        if route == "prefill":
            spelling = self.spelling or "plain"
            return await self.ask(lambda: asker.by_chat(_PROMPT, str(context), k, spelling, **changes))
        if isinstance(context, str):
            return await self.ask(lambda: asker.by_text(context, k, **changes))
        return await self.ask(lambda: asker.by_ids(context, k, **changes))

    spelling: Prefill | None = None

    async def sent_by(self, route: Mode, form: str, vocabulary: ServerVocabulary | None, prefix: str) -> Sent:
        if form == "ids" and vocabulary is not None:
            return route, await self.context(vocabulary, prefix)
        return route, prefix

    async def probed(self, found: Found, server: Server) -> Found:
        """The same with the list that the server now gives at the fixed context."""
        vocabulary = await self.lent(server) if found.lent else None
        if found.lent and vocabulary is None:
            raise ListError("server-changed", "it does not lend its tokenizer as before")
        if vocabulary is not None and found.form == "ids":
            now = _hash(vocabulary.prompt_ids(_PROMPT))
            if now != found.server.get("template_ids"):
                raise ListError("server-changed", "its template writes a prompt otherwise")
        forced = (await vocabulary.encoded("a"))[0] if vocabulary is not None and found.kind == "llama_cpp" else None
        asker = asker_of(self.client, self.options, self.model, found.kind, forced, lent=vocabulary is not None)
        self.spelling = found.prefill
        sent = await self.sent_by(found.route, found.form, vocabulary, _PREFIX)
        longest = await self.longest(asker, sent)
        answered = await self.ask_by(asker, sent, min(_PROBED, longest))
        if found.fingerprint is not None and answered.told.fingerprint != found.fingerprint:
            raise ListError("server-changed", "its answers have another system_fingerprint")
        return found.model_copy(
            update={"longest": longest, "probe": _labelled(usable(answered.lists[-1], _PROBED).entries)}
        )

    async def measured(
        self,
        asker: Asker,
        vocabulary: ServerVocabulary | None,
        server: Server,
        route: Mode,
        form: str,
        echo: bool,
        spelling: Prefill | None,
    ) -> Found:
        self.spelling = spelling
        sent, other = [await self.sent_by(route, form, vocabulary, prefix) for prefix in (_PREFIX, _OTHER_PREFIX)]
        longest = await self.longest(asker, sent)
        k = min(_PROBED, longest)
        first = usable((await self.ask_by(asker, sent, k)).lists[-1], k).entries
        await self.ask_by(asker, other, k)
        again = usable((await self.ask_by(asker, sent, k)).lists[-1], k).entries
        noise = _apart(first, again)
        hot = (await self.ask_by(asker, sent, k, temperature=2)).lists[-1]
        _check_known(hot)
        after_sampling = _apart(first, usable(hot, k).entries) > max(10 * noise, 1e-3)
        if after_sampling:
            logger.warning(
                "%s: the server reports its values after sampling; they are asked at temperature 1", self.model
            )
        writes_after = after_sampling if route != "prompt" else await self.writes_after_sampling(asker, sent[1], noise)
        fingerprints = {told.fingerprint for told in self.told}
        names = {told.model for told in self.told}
        probe = _labelled(first)
        return Found(
            model=self.model,
            kind=server.kind,
            server=server.facts,
            served=server.served,
            route=route,
            form="ids" if form == "ids" else "text",
            lent=vocabulary is not None,
            echo=echo,
            prefill=spelling,
            longest=longest,
            context=server.context,
            slots=server.slots,
            fingerprint=fingerprints.pop() if len(fingerprints) == 1 else None,
            answers_as=names.pop() if len(names) == 1 else None,
            noise_nats=noise,
            after_sampling=after_sampling,
            writes_after_sampling=writes_after,
            probe=probe,
            probe_id=_hash(probe),
        )

    async def writes_after_sampling(self, asker: Asker, context: Sequence[int] | str, noise: float) -> bool:
        """Whether the temperature moves the lists of what is generated: the prompt's lists do not tell."""
        sent: Sent = "ids", context
        try:
            plain, hot = [
                await self.list_of(lambda heat=heat: self.ask_by(asker, sent, _FEW, temperature=heat), _FEW)
                for heat in (1, 2)
            ]
        except (StatusError, ListError) as error:
            logger.warning("%s: responses can be written at temperature 1 only: %s", self.model, error)
            return True
        return _apart(plain, hot) > max(10 * noise, 1e-3)

    async def longest(self, asker: Asker, sent: Sent) -> int:
        """How long a list may be: as many entries as come, or the limit that a refusal names."""
        tried = LONGEST
        for following in (*_USUAL_LIMITS, 1):
            try:
                listed = (await self.ask_by(asker, sent, tried)).lists[-1]
                _check_known([item for item in listed if item.logprob is not None])
                return len(usable(listed, tried).entries)
            except ListError as error:
                if error.reason != "colliding-texts":
                    raise
                tried = min(following, tried - 1)
            except StatusError as error:
                named = _LIMIT.search(str(error))
                said = int(next(group for group in named.groups() if group)) if named else following
                tried = said if 0 < said < tried else min(following, tried - 1)
        raise ListError("no-logprobs", "no length of list is accepted")


Sent = tuple[Mode, Sequence[int] | str]


def _check_mass(entries: Sequence[Entry]) -> None:
    mass = math.fsum(math.exp(item.logprob) for item in entries if item.logprob is not None)
    if mass < _LEAST_MASS:
        raise ListError(
            "no-log-probabilities",
            f"the best {len(entries)} hold a mass of {mass:.3g}: these are no log-probabilities.",
        )


def _check_known(listed: Sequence[Entry]) -> None:
    known = [item for item in listed if item.logprob is not None and item.logprob > UNKNOWN_LOGPROB]
    if len(known) < len(listed):
        raise ListError(
            "after-sampling",
            f"{len(listed) - len(known)} of {len(listed)} listed tokens have no value: the server cuts the list by its "
            "sampling settings. vLLM: start it with --logprobs-mode raw_logprobs.",
        )


def _apart(first: Sequence[Entry], second: Sequence[Entry]) -> float:
    """The largest difference of two lists, in nats; a token that one lacks is at most the other's last."""
    one, two = _labelled(first), _labelled(second)
    apart = [abs(one[token] - two[token]) for token in one.keys() & two.keys()]
    for here, there in ((one, two), (two, one)):
        least = min(there.values())
        apart += [max(0.0, here[token] - least) for token in here.keys() - there.keys()]
    return max(apart)


def _labelled(entries: Sequence[Entry]) -> dict[str, float]:
    return {
        (f"#{item.token_id}" if item.token_id is not None else item.text): item.logprob
        for item in entries
        if item.logprob is not None
    }


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
