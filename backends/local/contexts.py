"""Contexts as ids: from a request to the lists of ids that a model in this process is fed.

The context of a score is the ids of the prompt, written by the model's chat template, followed by P's tokens: as ids
where they are this model's own (`own_token_ids`), else the tokenised text of the prefix.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

from backends.base import SampleRequest, ScoreRequest
from backends.errors import TokenKLError
from backends.local.tokenizer import PromptRefusedError, split_text
from kl.pieces import escaped_bytes, is_whole
from kl.records import Candidate, Prompt, Score, ScoreFailure
from kl.tables.context_counts import RETOKENISED

logger = logging.getLogger(__name__)

_OTHERWISE = (
    "P wrote {} tokens before this position, all of them tokens of this model too, which cuts their text into {} other "
    "ones: its list would be of another context. Sample with token ids, which are then fed."
)


class Vocabulary(Protocol):
    """Texts to ids and back, as `backends.local.tokenizer.Tokenizer`; ``len()`` is the number of tokens."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of what somebody wrote; nothing in it becomes a control token."""
        ...

    def token_bytes(self, index: int) -> bytes:
        """The exact bytes that a token stands for."""
        ...

    def is_token(self, text: str) -> bool:
        """Whether a text is a token that somebody's text can be encoded to."""
        ...


class Template(Protocol):
    """Writes a conversation as ids, up to where the answer begins."""

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of everything before the answer."""
        ...


def lengths(template: Template, prompts: Iterable[Prompt]) -> list[int | None]:
    """How many tokens each prompt is as a template writes it; None for one that the model has no form for."""
    found: list[int | None] = []
    for prompt in prompts:
        try:
            found.append(len(template.encode(prompt)))
        except PromptRefusedError:
            found.append(None)
    return found


class Asked(NamedTuple):
    """One context: the token after the first ``length`` of ``ids``; contexts may share one list.

    ``wanted`` are the model's ids of the tokens that are asked for by name.
    """

    key: str
    ids: Sequence[int]
    length: int
    wanted: tuple[int, ...] = ()


def together(requests: Sequence[ScoreRequest]) -> Iterator[list[ScoreRequest]]:
    """Each request with those that have the other halves of its pairs."""
    home = {key: number for number, request in enumerate(requests) for key in request.keys}
    left = dict(enumerate(requests))
    for number in range(len(requests)):
        if number in left:
            others = {home[key] for key in requests[number].counterparts if key in home} & left.keys()
            yield [left.pop(each) for each in sorted({number, *others})]


def caught(
    name: str, keys: Sequence[str], results: Iterator[Sequence[Score | ScoreFailure]], engine: str
) -> Iterator[list[Score | ScoreFailure]]:
    """The same results; whatever goes wrong becomes a failure of the keys that are left."""
    left = dict.fromkeys(keys)
    try:
        for some in results:
            for result in some:
                left.pop(result.key, None)
            yield list(some)
    except PromptRefusedError as error:
        yield [ScoreFailure(key, "prompt-refused", str(error), final=True) for key in left]
    except TokenKLError as error:
        yield [ScoreFailure(key, "model-not-usable", str(error)) for key in left]
    except Exception as error:
        logger.exception("%s: the %s failed", name, engine)
        message = f"the {engine} failed: {type(error).__name__}: {error}. The program or the model file is at fault."
        yield [ScoreFailure(key, "engine-error", message) for key in left]


def contexts_of(
    request: ScoreRequest, tokenizer: Vocabulary, template: Template, limit: int
) -> tuple[list[Asked], list[ScoreFailure]]:
    """What each position asks, those of one list of ids together, and the positions that cannot be asked.

    Parameters
    ----------
    limit : int
        The most tokens that a context may have.

    Raises
    ------
    PromptRefusedError
        If the template has no form for the prompt.
    """
    contexts, refused = _contexts(request, tokenizer, template)
    too_long = [_too_long(context, limit) for context in contexts if context.length > limit]
    wanted = _wanted_ids(request, tokenizer)
    fitting = [context._replace(wanted=wanted.get(context.key, ())) for context in contexts if context.length <= limit]
    return _by_sequence(fitting), [*refused, *too_long]


def _too_long(context: Asked, limit: int) -> ScoreFailure:
    message = f"the context has {context.length} tokens, the model takes {limit}; use a model with a longer context."
    return ScoreFailure(context.key, "context-too-long", message, final=True)


def _contexts(
    request: ScoreRequest, tokenizer: Vocabulary, template: Template
) -> tuple[list[Asked], list[ScoreFailure]]:
    """What each position asks, and the positions that have no context in this model's tokens."""
    prompt_ids = template.encode(request.prompt)
    own = own_token_ids(request, tokenizer)
    whole = [*prompt_ids, *(own or ())]
    contexts: list[Asked] = []
    refused: list[ScoreFailure] = []
    gaps = dict(request.gaps) if own is None else {}
    comparable = own is None and _has_tokens_of(request, tokenizer)
    for position, key, prefix in request.contexts():
        if position in gaps:
            message = "no text says what P had written here, and P's token ids are not this model's."
            refused.append(ScoreFailure(key, gaps[position], message, final=True))
            continue
        try:
            prefix_ids = tokenizer.encode(prefix) if own is None else []
        except PromptRefusedError as error:
            refused.append(ScoreFailure(key, "prompt-refused", str(error), final=True))
            continue
        if comparable and not _cut_alike(request.prefix_ends[: position + 1], prefix_ids, tokenizer):
            refused.append(ScoreFailure(key, RETOKENISED, _OTHERWISE.format(position, len(prefix_ids))))
            continue
        ids = prompt_ids + prefix_ids if own is None else whole
        context = Asked(key, ids, len(ids) if own is None else len(prompt_ids) + position)
        if context.length:
            contexts.append(context)
        else:
            message = "the context is empty and the model has no begin-of-text token; there is nothing to predict from."
            refused.append(ScoreFailure(key, "empty-context", message, final=True))
    return contexts, refused


def _has_tokens_of(request: ScoreRequest, tokenizer: Vocabulary) -> bool:
    """Whether all of P's tokens are tokens here, so that P's tokenizer may be this one though its ids are not known."""
    return all(tokenizer.is_token(request.text[start:end]) for start, end in pairwise(request.prefix_ends))


def _cut_alike(ends: Sequence[int], ids: Sequence[int], tokenizer: Vocabulary) -> bool:
    """Whether the tokens of a prefix are P's: they end at the same places."""
    lengths = map(len, split_text([tokenizer.token_bytes(index) for index in ids]))
    return list(accumulate(lengths, initial=0)) == list(ends)


def own_token_ids(request: ScoreRequest, tokenizer: Vocabulary) -> tuple[int, ...] | None:
    """P's token ids if they are this vocabulary's: each in range, and standing for exactly the text P gives it.

    A last one beyond the text ends the turn and is never fed: it may be of any name and number.
    """
    ids, ends = request.token_ids, request.prefix_ends
    if ids is None or len(ids) != len(ends):
        return None
    in_text = ids[:-1] if ends and ends[-1] == len(request.text) else ids
    if not all(0 <= index < len(tokenizer) for index in in_text):
        return None
    at = 0
    texts = split_text([tokenizer.token_bytes(index) for index in in_text])
    for end, text in zip(ends, texts, strict=False):
        if end != at or not request.text.startswith(text, at):
            return None
        at += len(text)
    return ids if at == len(request.text) else None


def context_of_sample(request: SampleRequest, tokenizer: Vocabulary, template: Template, limit: int) -> list[int]:
    """The ids that a response is written after: the prompt's, and those of its prefix as stated if they are its text.

    Raises
    ------
    PromptRefusedError
        If the model has no form for them, or no room for an answer.
    """
    context = [*template.encode(request.prompt), *_prefix_ids(request, tokenizer)]
    if not 0 < len(context) <= limit:
        raise PromptRefusedError(f"the prompt has {len(context)} tokens, model {request.model!r} takes 1 to {limit}.")
    return context


def _prefix_ids(request: SampleRequest, tokenizer: Vocabulary) -> Sequence[int]:
    ids = request.prefix_ids
    if ids is not None and all(0 <= index < len(tokenizer) for index in ids):
        if b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace") == request.prefix:
            return ids
    return tokenizer.encode(request.prefix) if request.prefix else ()


def _by_sequence(contexts: list[Asked]) -> list[Asked]:
    """The same contexts, shortest first, as beginnings of as few lists of ids as serve all.

    The ids of a shorter text are mostly the beginning of those of a longer one. Where they are not (the longer text
    goes on within a word) the context has a list of its own, whose last chunks are computed for it alone.
    """
    lists: list[Sequence[int]] = []
    found: list[Asked] = []
    for context in sorted(contexts, key=lambda context: context.length, reverse=True):
        ids, length = context.ids, context.length
        tried = (*lists[:1], *lists[-1:])
        home = next((known for known in tried if known is ids or known[:length] == ids[:length]), None)
        if home is None:
            lists.append(home := ids)
        found.append(context._replace(ids=home))
    return found[::-1]


# Tokens that are asked for by name.


def _wanted_ids(request: ScoreRequest, tokenizer: Vocabulary) -> dict[str, tuple[int, ...]]:
    """By key, this model's ids of the tokens that are asked for; what is not certainly one of them is left out.

    P's id counts where P's ids are this vocabulary's, unless the token's text says otherwise; else the bytes.
    """
    if request.wanted is None:
        return {}
    by_id = own_token_ids(request, tokenizer) is not None
    known: dict[Candidate, int | None] = {}
    found: dict[str, tuple[int, ...]] = {}
    for key, tokens in zip(request.keys, request.wanted, strict=True):
        for token in tokens:
            if token not in known:
                known[token] = _own_id(token, tokenizer, by_id=by_id)
        found[key] = tuple(index for token in tokens if (index := known[token]) is not None)
    return found


def _own_id(token: Candidate, tokenizer: Vocabulary, *, by_id: bool) -> int | None:
    said = token.token_bytes or (token.token.encode("utf-8", "surrogatepass") if is_whole(token.token) else None)
    if not by_id or token.token_id is None:
        return None if said is None else ids_by_bytes(tokenizer).get(said)
    if not 0 <= token.token_id < len(tokenizer):
        return None
    exact = tokenizer.token_bytes(token.token_id)
    return token.token_id if said in (None, exact) or escaped_bytes(token.token) == exact else None


@functools.lru_cache(maxsize=4)
def ids_by_bytes(tokenizer: Vocabulary) -> dict[bytes, int]:
    """The token that stands for some bytes, where it is the only one."""
    known = [tokenizer.token_bytes(index) for index in range(len(tokenizer))]
    counts = Counter(known)
    return {token: index for index, token in enumerate(known) if counts[token] == 1}
