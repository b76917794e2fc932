"""Tokenizers and chat templates of GGUF files of the llama architecture.

Two kinds of vocabulary: ``gpt2`` (byte-level BPE with merges) and ``llama`` (SentencePiece, merges by score). Both give
the ids of llama.cpp, whose rules are the reference for these files.
Control tokens are recognised in the text of the chat template alone, never in what a person or a model wrote.
"""

from __future__ import annotations

import codecs
import functools
import heapq
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Protocol

from backends.errors import BackendError
from backends.local.gguf import GGUFFile, unusable
from kl.pieces import visible_bytes
from kl.records import Prompt

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # token types of GGUF
_SPACE = "▁"  # how SentencePiece writes a blank

# Tokens that end an answer whatever the metadata say, as in llama.cpp.
STOP_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<|end_of_text|>",
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre → expressions applied one after the other (llama.cpp, llama-vocab.cpp).
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "falcon3": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
    "deepseek-r1-qwen": (_LLAMA3.replace("{1,3}", ""),),
}
# These take a word that is in the vocabulary as it stands, without merging, and begin every text with BOS.
_LLAMA3_LIKE = ("llama-bpe", "llama3", "llama-v3", "falcon3")


class PromptRefusedError(BackendError):
    """A text or a prompt that this model's vocabulary or template has no form for; asking again does not help."""


class _Vocabulary(Protocol):
    """What differs between the two kinds."""

    begins_with_bos: bool
    space_after_special: bool

    def encode(self, text: str) -> list[int]: ...
    def decode(self, index: int) -> bytes: ...


class _ByteLevel:
    """BPE over bytes, each written as a visible character (Radford et al. 2019, GPT-2)."""

    space_after_special = False

    def __init__(self, file: GGUFFile, tokens: list[str], types: list[int]) -> None:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        pre = str(file.metadata.get("tokenizer.ggml.pre", "default"))
        if pre not in _SPLITS:
            raise unusable(file.path, f"tokenizer.ggml.pre {pre!r} is not supported; {', '.join(sorted(_SPLITS))} are.")
        self.begins_with_bos = pre in _LLAMA3_LIKE
        merges = [_halves(merge) for merge in file.need("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != _CONTROL}
        try:
            self._bpe = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=self.begins_with_bos))
        except Exception as error:  # the package raises nothing narrower
            raise unusable(file.path, f"the tokenizer's merges do not fit its vocabulary: {error}.") from error
        splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
        to_visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_visible])
        self._tokens = tokens
        self._byte_of = visible_bytes()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        if b"".join(self.decode(index) for index in ids) != text.encode():
            raise PromptRefusedError(
                "the vocabulary has no token for some byte of the text; this model cannot be asked about it."
            )
        return ids

    def decode(self, index: int) -> bytes:
        token = self._tokens[index]
        if all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return token.encode()


def _halves(merge: str) -> tuple[str, str]:
    cut = merge.index(" ", 1)  # a merge is "left right"; no half is empty
    return merge[:cut], merge[cut + 1 :]


class _SentencePiece:
    """Neighbours are joined, best score first and leftmost among equals; what is in no piece becomes its bytes.

    Kudo & Richardson, *SentencePiece*, arXiv 1808.06226; the order of equals as in llama.cpp.
    """

    begins_with_bos = True

    def __init__(self, file: GGUFFile, tokens: list[str], types: list[int]) -> None:
        scores: list[float] = file.need("tokenizer.ggml.scores")
        self.space_after_special = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
        if file.metadata.get("tokenizer.ggml.precompiled_charsmap") or file.metadata.get(
            "tokenizer.ggml.remove_extra_whitespaces"
        ):
            raise unusable(file.path, "a SentencePiece vocabulary that normalises its text is not supported.")
        self._tokens, self._types = tokens, types
        joinable = [index for index, kind in enumerate(types) if kind in (_NORMAL, _USER_DEFINED)]
        self._ids = {tokens[index]: index for index in joinable}
        self._ranks = {tokens[index]: -scores[index] for index in joinable}
        self._byte_ids = {int(tokens[index][3:5], 16): index for index, kind in enumerate(types) if kind == _BYTE}

    def encode(self, text: str) -> list[int]:
        symbols = self._joined(list(text.replace(" ", _SPACE)))
        return [index for symbol in symbols for index in self._ids_of(symbol)]

    def _joined(self, symbols: list[str]) -> list[str]:
        """Join in place: a symbol that went into its left neighbour becomes empty."""
        after = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        heap: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (rank := self._ranks.get(symbols[left] + symbols[right])) is not None:
                heapq.heappush(heap, (rank, left, right, symbols[left] + symbols[right]))

        for left in range(len(symbols) - 1):
            consider(left, left + 1)
        while heap:
            _, left, right, piece = heapq.heappop(heap)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != piece:
                continue  # one of the two has been joined to another neighbour since
            symbols[left], symbols[right] = piece, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [symbol for symbol in symbols if symbol]

    def _ids_of(self, symbol: str) -> list[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        try:
            return [self._byte_ids[byte] for byte in symbol.encode()]
        except KeyError as error:
            raise PromptRefusedError(
                f"the vocabulary has no token for the byte {error}; this model cannot be asked about it."
            ) from None

    def decode(self, index: int) -> bytes:
        if self._types[index] == _BYTE:
            return bytes([int(self._tokens[index][3:5], 16)])
        text = self._tokens[index]
        return (text.replace(_SPACE, " ") if self._types[index] == _NORMAL else text).encode()


class Tokenizer:
    """Texts to ids and back; ``len()`` is the size of the vocabulary."""

    def __init__(self, file: GGUFFile) -> None:
        """Build from a file's metadata.

        Raises
        ------
        ModelNotUsableError
            For a kind of vocabulary that is not supported.
        """
        tokens: list[str] = file.need("tokenizer.ggml.tokens")
        types: list[int] = file.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
        kind = file.need("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise unusable(
                file.path,
                f"tokenizer {kind!r} is not supported; 'gpt2' (byte-level BPE) and 'llama' (SentencePiece) are.",
            )
        self._words: _Vocabulary = (_ByteLevel if kind == "gpt2" else _SentencePiece)(file, tokens, types)
        self._tokens = tokens
        self._shown: dict[int, tuple[str, bytes]] = {}
        self._special = {
            token: at
            for at, (token, of) in enumerate(zip(tokens, types, strict=True))
            if of in (_CONTROL, _USER_DEFINED)
        }
        self._control = _any_of(token for token, at in self._special.items() if types[at] == _CONTROL)
        self._user_defined = _any_of(token for token, at in self._special.items() if types[at] == _USER_DEFINED)
        self._any_special = _any_of(self._special)
        self.bos = self._token_at(file, "bos")
        self.eos = self._token_at(file, "eos")
        self._adds_bos = bool(file.metadata.get("tokenizer.ggml.add_bos_token", self._words.begins_with_bos))
        by_key = {file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
        by_text = {self._special.get(text) for text in STOP_TEXTS}
        self.stop_ids = frozenset(index for index in by_key | by_text if index is not None)

    def __len__(self) -> int:
        return len(self._tokens)

    def _token_at(self, file: GGUFFile, name: str) -> str:
        index: int | None = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return self._tokens[index] if index is not None and 0 <= index < len(self._tokens) else ""

    def is_added(self, index: int) -> bool:
        """Whether a token is no piece of text: a control token, or one that somebody added by its name."""
        return self._tokens[index] in self._special

    def token_bytes(self, index: int) -> bytes:
        """The exact bytes that a token stands for; a control token stands for its name."""
        return self._tokens[index].encode() if self._tokens[index] in self._special else self._words.decode(index)

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
        ordinary = (index for index, token in enumerate(self._tokens) if token not in self._special)
        return frozenset(self._words.decode(index) for index in ordinary)

    def encode(self, text: str) -> list[int]:
        """Ids of what somebody wrote; nothing in it becomes a control token.

        Raises
        ------
        PromptRefusedError
            If the text is no Unicode (half a surrogate pair), or holds a byte that is in no token.
        """
        return self._encode(text, self._user_defined)

    def encode_template(self, text: str) -> list[int]:
        """Ids of the text of a chat template, where control tokens are recognised; with BOS if the model wants it."""
        ids = self._encode(text, self._any_special, template=True)
        first = self._special.get(self.bos)
        return [first, *ids] if self._adds_bos and first is not None and ids[:1] != [first] else ids

    def _encode(self, text: str, special: re.Pattern[str], *, template: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptRefusedError(f"the text is not Unicode: {error.reason} at character {error.start}.") from error
        ids: list[int] = []
        at = 0
        for match in [*special.finditer(text), None]:
            between = text[at : match.start() if match else len(text)]
            if between and template:
                ids += self._words.encode(" " * self._words.space_after_special + shown(between))
            elif between:
                ids += self._words.encode(between)
            if match:
                ids.append(self._special[match[0]])
                at = match.end()
        return ids

    def hide_control(self, text: str) -> str:
        """The text with the names of control tokens written so that `encode_template` reads them as plain text."""
        return self._control.sub(lambda match: hidden(match[0]), text)


# What is hidden stands between two of a character that Unicode reserves for use inside a program, each byte as a
# character of the last private plane: no template and no vocabulary looks for either.
_MARK, _HIDDEN = "\ufdd0", 0x10F000
_HIDDEN_TEXT = re.compile(f"{_MARK}([{chr(_HIDDEN)}-{chr(_HIDDEN + 255)}]+){_MARK}")


def hidden(name: str) -> str:
    """The name of a control token as a template may carry it without its being recognised."""
    return _MARK + "".join(chr(_HIDDEN + byte) for byte in name.encode()) + _MARK


def is_hidden(text: str) -> bool:
    """Whether a text holds something hidden, or something that would be taken for it."""
    return _MARK in text


def shown(text: str) -> str:
    """The text with what was hidden in it."""
    return _HIDDEN_TEXT.sub(lambda match: bytes(ord(character) - _HIDDEN for character in match[1]).decode(), text)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def split_text(pieces: Sequence[bytes]) -> list[str]:
    """The text of each token, so that they add up: a character counts for the token that completes it.

    A character that the last token leaves incomplete is in none of them; bytes that are no UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(piece) for piece in pieces]


class ChatTemplate:
    """Writes a conversation the way the model was trained to read it."""

    def __init__(self, file: GGUFFile, tokenizer: Tokenizer, *, plain: bool = False) -> None:
        """Compile the file's own template; with ``plain`` it is as if there were none.

        Raises
        ------
        ModelNotUsableError
            If it is not valid.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._tokenizer = tokenizer
        self._errors = jinja2.TemplateError
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # Templates call it on a conversation they cannot write. Given no clock, they write the same on every day.
        given = {"raise_exception": _refuse}
        source = None if plain else file.metadata.get("tokenizer.chat_template")
        try:
            self._template = None if source is None else environment.from_string(source, globals=given)
        except jinja2.TemplateError as error:
            raise unusable(file.path, f"its chat template is not valid: {error}.") from error

    def text(self, prompt: Prompt) -> str:
        """Everything before the answer as text, control tokens of the template by their names.

        Raises
        ------
        PromptRefusedError
            If there is no form for this prompt.
        """
        return self._text(self._messages(prompt))

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of everything before the answer.

        System text ``None`` leaves the template its own default; an empty text is an empty system turn, which is how
        one gets rid of a default. A model without a template is no chat model: it continues one turn as plain text.

        Raises
        ------
        PromptRefusedError
            If there is no form for this prompt.
        """
        messages = self._messages(prompt)
        for message in messages:
            message["content"] = self._tokenizer.hide_control(message["content"])
        return self._tokenizer.encode_template(self._text(messages))

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        messages = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        messages += [
            {"role": "assistant" if turn.role == "model" else "user", "content": turn.content} for turn in prompt.turns
        ]
        if any(is_hidden(message["content"]) for message in messages):
            raise PromptRefusedError("the prompt holds the character U+FDD0, which is no text; remove it.")
        return messages

    def _text(self, messages: list[dict[str, str]]) -> str:
        if self._template is None:
            return self._plain(messages)
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=self._tokenizer.bos,
                eos_token=self._tokenizer.eos,
            )
        except (self._errors, TypeError) as error:
            raise PromptRefusedError(f"the model's chat template cannot write this conversation: {error}.") from error

    def _plain(self, messages: list[dict[str, str]]) -> str:
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise PromptRefusedError(
                "the model has no chat template: it continues one user turn, without system text and history."
            )
        return messages[0]["content"]


def _refuse(message: str) -> NoReturn:
    raise PromptRefusedError(f"the model's chat template refuses this conversation: {message}")
