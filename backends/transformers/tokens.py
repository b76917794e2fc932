"""Tokenizers and chat templates of checkpoints, with the rules of `backends.local.tokenizer`.

Control tokens are recognised in the text of the chat template alone, never in what a person or a model wrote, and
every token has its exact bytes. Templates are rendered by transformers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from backends.local.tokenizer import STOP_TEXTS, PromptRefusedError, hidden, is_hidden, shown
from backends.transformers.checkpoints import unusable
from kl.pieces import visible_bytes
from kl.records import Prompt

UNUSED = "<unused {}>"  # the name of an id that is no token
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"  # how SentencePiece writes a blank
_PROBES = ("Hello, world", " two  blanks\n\n", "12 345 ½", "Grüße, 日本語 🙂", "don't <tag> {x: [1]}")
_CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# The template is told of no clock, so that it writes the same on every day.
_NO_CLOCK = "{% set strftime_now = tokenkl_has_no_clock +%}"


class CheckpointTokenizer:
    """Texts to ids and back; ``len()`` is the size of the vocabulary, up to the highest id."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        """Take over a tokenizer of transformers that has a ``tokenizer.json``.

        Raises
        ------
        ModelNotUsableError
            If its tokens have no exact bytes, or its texts change.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "to_str"):
            what = f"its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json, which exact bytes are read from"
            raise unusable(name, f"{what}; convert it to a fast tokenizer.")
        # Many a tokenizer.json keeps how its training cut or filled up texts.
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer, self._backend = tokenizer, backend
        description: dict[str, Any] = json.loads(backend.to_str())
        self._added = {entry["id"]: entry for entry in description["added_tokens"]}
        self._byte_level = "ByteLevel" in _types(description["decoder"])
        if not self._byte_level and not {"ByteFallback", "Metaspace", "Replace"} & set(_types(description["decoder"])):
            raise unusable(name, f"its tokens have no exact bytes (decoder {_types(description['decoder'])}).")
        self._plain = _from(_plain(description), type(backend))
        self._whole = _from(description, type(backend))
        ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._names = {index: text for text, index in ids.items()}
        self._size = 1 + max(self._names)
        self._byte_of = visible_bytes()
        self._shown: dict[int, tuple[str, bytes]] = {}
        self.stop_ids = _stop_ids(tokenizer, ids, self._added)
        for probe in _PROBES:
            try:
                self.encode(probe)
            except PromptRefusedError as error:
                raise unusable(name, f"its tokenizer changes texts such as {probe!r}: {error}") from error

    def __len__(self) -> int:
        return self._size

    def is_added(self, index: int) -> bool:
        """Whether an id is no piece of text: a token that was added by its name, or no token at all."""
        return index in self._added or index not in self._names

    def is_unused(self, index: int) -> bool:
        """Whether a row of the vocabulary is no token: models pad it."""
        return index not in self._names

    def token_bytes(self, index: int) -> bytes:
        """The exact bytes that a token stands for; an added token stands for its name, and so does no token."""
        name = self._names.get(index)
        if name is None:
            return UNUSED.format(index).encode()
        if index in self._added:
            return name.encode()
        if self._byte_level:
            known = all(character in self._byte_of for character in name)
            return bytes(self._byte_of[character] for character in name) if known else name.encode()
        byte = _BYTE.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()

    def token(self, index: int) -> tuple[str, bytes]:
        """How a list shows a token, and its exact bytes."""
        if index not in self._shown:
            exact = self.token_bytes(index)
            self._shown[index] = exact.decode("utf-8", "replace"), exact
        return self._shown[index]

    def is_token(self, text: str) -> bool:
        """Whether a text is a token of the vocabulary that somebody's text can be encoded to."""
        return text.encode("utf-8", "surrogatepass") in self._pieces

    @functools.cached_property
    def _pieces(self) -> frozenset[bytes]:
        return frozenset(self.token_bytes(index) for index in self._names if index not in self._added)

    def encode(self, text: str) -> list[int]:
        """Ids of what somebody wrote, as it stands; nothing in it becomes a control token.

        Raises
        ------
        PromptRefusedError
            If the text is no Unicode, or the vocabulary has no tokens for it.
        """
        _check_unicode(text)
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if b"".join(map(self.token_bytes, ids)) != text.encode():
            raise PromptRefusedError(
                "the tokens of this vocabulary do not add up to the text; this model cannot be asked about it."
            )
        control = [index for index in ids if self._added.get(index, {}).get("special")]
        if control:
            raise PromptRefusedError(f"the text becomes the control token {self._names[control[0]]!r}.")
        return ids

    def encode_start(self, text: str) -> list[int]:
        """Ids of a plain text that a model is to go on from, with the begin-of-text token if the model wants it."""
        empty: list[int] = self._tokenizer("", add_special_tokens=True)["input_ids"]
        begin = self._tokenizer.bos_token_id
        _check_unicode(text)
        ids: list[int] = self._whole.encode(text, add_special_tokens=False).ids
        return [*(empty[:1] if begin is not None and empty[:1] == [begin] else ()), *ids]

    def hide_control(self, text: str) -> str:
        """The text with the names of control tokens written so that `encode_template` reads them as plain text."""
        return self._control.sub(lambda match: hidden(match[0]), text)

    def encode_template(self, text: str) -> list[int]:
        """Ids of the text of a chat template, where control tokens are recognised.

        Raises
        ------
        PromptRefusedError
            If a name of a control token was hidden in it, and the vocabulary depends on what stands before a text.
        """
        if not is_hidden(text):
            _check_unicode(text)
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        if not self._byte_level:
            raise PromptRefusedError(
                "the prompt holds the name of a control token, which this kind of vocabulary cannot write as text."
            )
        ids, at = [], 0
        for match in [*self._any_added.finditer(text), None]:
            ids += self.encode(shown(text[at : match.start() if match else len(text)]))
            if match:
                ids.append(self._ids_of_added[match[0].strip() if match[0].strip() else match[0]])
                at = match.end()
        return ids

    @functools.cached_property
    def _ids_of_added(self) -> dict[str, int]:
        return {entry["content"]: index for index, entry in self._added.items()}

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        return _any_of([re.escape(entry["content"]) for entry in self._added.values() if entry["special"]])

    @functools.cached_property
    def _any_added(self) -> re.Pattern[str]:
        # Some tokens take the blanks beside them.
        return _any_of(
            [
                (r"\s*" if entry["lstrip"] else "") + re.escape(entry["content"]) + (r"\s*" if entry["rstrip"] else "")
                for entry in self._added.values()
            ]
        )


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(sorted(filter(None, patterns), key=len, reverse=True)) or r"(?!)")


def _types(part: Any) -> list[str]:
    """The kinds of a decoder or normaliser, those inside a sequence included."""
    if part is None:
        return []
    inner = part.get("decoders") or part.get("normalizers") or part.get("pretokenizers") or ()
    return [str(part["type"]), *(kind for each in inner for kind in _types(each))]


def _plain(description: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer for a text in the middle: nothing is put before it, and nothing in it is changed."""
    return dict(description) | {
        "normalizer": _without_changes(description["normalizer"]),
        "pre_tokenizer": _without_prefix(description["pre_tokenizer"]),
        "post_processor": None,
    }


def _from(description: Mapping[str, Any], kind: Any) -> Any:
    """A tokenizer that reads control tokens as plain text."""
    made = kind.from_str(json.dumps(description))
    made.encode_special_tokens = True
    return made


def _without_changes(normalizer: Any) -> Any:
    """Of the rules that change a text only the one that writes blanks as SentencePiece does."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        kept = [rule for rule in map(_without_changes, normalizer["normalizers"]) if rule is not None]
        return {"type": "Sequence", "normalizers": kept} if kept else None
    writes_blanks = normalizer["type"] == "Replace" and normalizer["content"] == _SPACE
    return normalizer if writes_blanks and normalizer["pattern"] == {"String": " "} else None


def _without_prefix(pre_tokenizer: Any) -> Any:
    if pre_tokenizer is None:
        return None
    if pre_tokenizer["type"] == "Sequence":
        return dict(pre_tokenizer) | {"pretokenizers": list(map(_without_prefix, pre_tokenizer["pretokenizers"]))}
    if pre_tokenizer["type"] == "Metaspace":
        return dict(pre_tokenizer) | {"prepend_scheme": "never"}
    if pre_tokenizer["type"] == "ByteLevel":
        return dict(pre_tokenizer) | {"add_prefix_space": False}
    return pre_tokenizer


def _stop_ids(tokenizer: Any, ids: Mapping[str, int], added: Mapping[int, Any]) -> frozenset[int]:
    known = {ids[text] for text in STOP_TEXTS if text in ids and ids[text] in added}
    return frozenset(known if tokenizer.eos_token_id is None else known | {int(tokenizer.eos_token_id)})


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptRefusedError(f"the text is not Unicode: {error.reason} at character {error.start}.") from error


class CheckpointTemplate:
    """Writes a conversation the way the checkpoint's chat template does, or one turn as plain text."""

    def __init__(
        self,
        hf_tokenizer: Any,
        tokenizer: CheckpointTokenizer,
        kind: str,
        values: Mapping[str, Any],
        today: date | None,
    ) -> None:
        self._hf, self._tokenizer, self._values = hf_tokenizer, tokenizer, dict(values)
        source: str | None = None
        if kind == "own" and hf_tokenizer.chat_template is not None:
            source = hf_tokenizer.get_chat_template()
        self._source = None if source is None else _dated(source, today)

    def text(self, prompt: Prompt) -> str:
        """Everything before the answer as text, control tokens of the template by their names.

        Raises
        ------
        PromptRefusedError
            If there is no form for this prompt.
        """
        return self._text(_messages(prompt))

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of everything before the answer.

        System text ``None`` leaves the template its own default; an empty text is an empty system turn, which is how
        one gets rid of a default. Without a template one turn is continued as plain text.

        Raises
        ------
        PromptRefusedError
            If there is no form for this prompt.
        """
        messages = _messages(prompt)
        if self._source is None:
            return self._tokenizer.encode_start(self._text(messages))
        for message in messages:
            message["content"] = self._tokenizer.hide_control(message["content"])
        return self._tokenizer.encode_template(self._text(messages))

    def _text(self, messages: list[dict[str, str]]) -> str:
        if self._source is None:
            if len(messages) != 1 or messages[0]["role"] != "user":
                raise PromptRefusedError(
                    "there is no chat template: the model continues one user turn, without system text and history."
                )
            return messages[0]["content"]
        try:
            return self._hf.apply_chat_template(
                messages, chat_template=self._source, add_generation_prompt=True, tokenize=False, **self._values
            )
        except Exception as error:
            line = " ".join(str(error).split())
            hint = " Set backend.today to a date." if "no_clock" in line else ""
            raise PromptRefusedError(f"the chat template cannot write this conversation: {line}.{hint}") from error


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    messages = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    messages += [
        {"role": "assistant" if turn.role == "model" else "user", "content": turn.content} for turn in prompt.turns
    ]
    if any(is_hidden(message["content"]) for message in messages):
        raise PromptRefusedError("the prompt holds the character U+FDD0, which is no text; remove it.")
    return messages


def _dated(template: str, today: date | None) -> str:
    """The template with the day that it asks for written in, or without a clock."""
    if today is None:
        return _NO_CLOCK + template
    return _CLOCK.sub(lambda match: json.dumps(today.strftime(match[2])), template)
