"""The tokenizer of a server, as far as it lends it: texts to ids, ids to texts, conversations to ids.

What was asked is kept. The synchronous face is that of a tokenizer in this process (`backends.local.contexts`), for
what was fetched before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from backends.base import ScoreRequest
from backends.errors import BackendError
from backends.local.tokenizer import PromptRefusedError
from backends.openai_compatible.client import Client, Json
from backends.service.retry import StatusError
from kl.pieces import visible_bytes
from kl.records import Prompt

Dialect = Literal["llama_cpp", "vllm"]

# What may be the name of a control token. Written by a person or a model it is text, and must not become one.
_CONTROL_NAME = re.compile(r"<[^<>\s]{2,40}>|\[/?[A-Z_]{2,20}\]")
_CUT = "\ufdd0"  # reserved by Unicode for use inside a program
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
_ANCHOR = "a"
_MOST_AT_ONCE = 64


class ServerVocabulary:
    """A server's tokenizer.

    Parameters
    ----------
    client : Client
    dialect : str
        Which server's ``/tokenize`` it is.
    model : str
    template_fields : dict
        What goes into each request that writes a conversation (``chat_template_kwargs``).
    raw : bool
        Whether prompts are given as they are, without the chat template.
    size : int, optional
        Number of tokens, where the server says it.
    """

    def __init__(
        self, client: Client, dialect: Dialect, model: str, template_fields: Json, *, raw: bool, size: int | None
    ) -> None:
        self._client, self._dialect, self._model = client, dialect, model
        self._template_fields, self._raw, self._size = template_fields, raw, size
        self._encoded: dict[str, list[int] | PromptRefusedError] = {}
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._prompts: dict[Prompt, list[int] | PromptRefusedError] = {}
        self._visible = visible_bytes()
        self._separator: tuple[list[int], str] | None = None

    # What was fetched, as a tokenizer in this process has it.

    def __len__(self) -> int:
        return self._size or 2**31

    def encode(self, text: str) -> list[int]:
        """Ids of a text that was fetched."""
        return _given(self._encoded[text])

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token; of one whose bytes the server does not say, some that are no text."""
        return self._bytes.get(index, b"\xff")

    def is_token(self, text: str) -> bool:
        """Whether a text that was fetched is one token."""
        ids = self._encoded.get(text)
        return isinstance(ids, list) and len(ids) == 1

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt that was fetched, up to where the answer begins."""
        return _given(self._prompts[prompt])

    def text_of(self, index: int) -> str:
        """The text of a token that was fetched; a part of a character is U+FFFD."""
        return self._texts[index]

    # Fetching.

    async def is_own(self, request: ScoreRequest) -> bool:
        """Whether P's ids are this vocabulary's: each stands for the text that P gives it.

        Ids that are parts of a character are compared together. A last one beyond the text ends the turn and is never
        fed: it may be any.
        """
        ids, ends = request.token_ids, request.prefix_ends
        if ids is None or len(ids) != len(ends):
            return False
        in_text = ids[:-1] if ends and ends[-1] == len(request.text) else ids
        if not all(0 <= index < len(self) for index in in_text):
            return False
        await self.fetch_texts(in_text)
        parts: list[int] = []
        start = 0
        for index, end in zip(in_text, [*ends, len(request.text)][1:], strict=False):
            parts.append(index)
            said = self._texts[index] if len(parts) == 1 else await self._text_of_ids(parts)
            if request.text[start:end] != said.rstrip("\ufffd"):
                return False
            if not said.endswith("\ufffd"):
                parts, start = [], end
        return True

    async def fetch_prefixes(self, request: ScoreRequest) -> None:
        """What it needs in addition where the text is fed."""
        gaps = {position for position, _ in request.gaps}
        prefixes = [prefix for position, _, prefix in request.contexts() if position not in gaps]
        for text in dict.fromkeys(
            [*prefixes, *(request.text[start:end] for start, end in pairwise(request.prefix_ends))]
        ):
            await self._fetch_encoded(text)

    async def fetch_prompt(self, prompt: Prompt) -> None:
        """The ids of a prompt."""
        if prompt not in self._prompts:
            try:
                self._prompts[prompt] = await self._write(prompt)
            except PromptRefusedError as error:
                self._prompts[prompt] = error
            except StatusError as error:
                self._prompts[prompt] = PromptRefusedError(f"the server cannot write this conversation: {error}")

    async def counts(self, prompts: Sequence[Prompt]) -> list[int | None]:
        """How many tokens each prompt is, up to where the answer begins; None for one that it cannot write."""
        for prompt in prompts:
            await self.fetch_prompt(prompt)
        found = (self._prompts[prompt] for prompt in prompts)
        return [None if isinstance(ids, PromptRefusedError) else len(ids) for ids in found]

    async def rendered(self, prompt: Prompt) -> str:
        """A prompt as the model is given it, control tokens by their names."""
        await self.fetch_prompt(prompt)
        return await self._text_of_ids(self.prompt_ids(prompt))

    async def _write(self, prompt: Prompt) -> list[int]:
        messages = messages_of(prompt)
        if self._raw:
            return await self._raw_ids(messages)
        if self._dialect == "vllm":
            fields = {"messages": messages, "add_generation_prompt": True, **self._template_fields}
            return (await self._client.post("/tokenize", {"model": self._model, **fields}))["tokens"]
        for message in messages:
            if _CUT in message["content"]:
                raise PromptRefusedError("the prompt holds the character U+FDD0, which is no text; remove it.")
            message["content"] = _CONTROL_NAME.sub(lambda match: match[0][0] + _CUT + match[0][1:], message["content"])
        text = (await self._client.post("/apply-template", {"messages": messages, **self._template_fields}))["prompt"]
        ids: list[int] = []
        for number, part in enumerate(text.split(_CUT)):
            body = {"content": part, "add_special": number == 0, "parse_special": True}
            ids += (await self._client.post("/tokenize", body))["tokens"]
        # Where the template itself writes the first token of a text, the tokenizer adds it a second time.
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] and text.startswith(await self._text(ids[0])) else ids

    async def _raw_ids(self, messages: Sequence[Json]) -> list[int]:
        text = raw_text(messages)
        if self._dialect == "vllm":
            return (await self._client.post("/tokenize", {"model": self._model, "prompt": text}))["tokens"]
        start = (await self._client.post("/tokenize", {"content": "", "add_special": True}))["tokens"]
        return [*start, *[index for index, _ in await self._pieces(text)]]

    async def _fetch_encoded(self, text: str) -> None:
        if text not in self._encoded:
            try:
                self._encoded[text] = [index for index, _ in await self._pieces(text)] if text else []
            except PromptRefusedError as error:
                self._encoded[text] = error

    async def encoded(self, text: str) -> list[int]:
        """Ids of a text; nothing in it becomes a control token.

        Raises
        ------
        PromptRefusedError
            If the server's tokens do not say that text.
        """
        await self._fetch_encoded(text)
        return self.encode(text)

    async def _pieces(self, text: str) -> list[tuple[int, bytes]]:
        """(id, bytes) of a text's tokens; together they are the text."""
        try:
            wanted = text.encode()
        except UnicodeEncodeError as error:
            raise PromptRefusedError(f"the text is not Unicode: {error.reason} at character {error.start}.") from error
        found = await self._tokenized(text)
        if b"".join(piece for _, piece in found) != wanted:  # some tokenizers put a blank before a text
            anchor = await self._tokenized(_ANCHOR)
            found = (await self._tokenized(_ANCHOR + text))[len(anchor) :]
        if b"".join(piece for _, piece in found) != wanted:
            raise PromptRefusedError("the server's tokens of the text do not add up to it; it cannot be asked by ids.")
        self._bytes |= dict(found)
        return found

    async def _tokenized(self, text: str) -> list[tuple[int, bytes]]:
        if self._dialect == "llama_cpp":
            body = {"content": text, "add_special": False, "parse_special": False, "with_pieces": True}
            items = (await self._client.post("/tokenize", body))["tokens"]
            return [(item["id"], _as_bytes(item["piece"])) for item in items]
        found: list[tuple[int, bytes]] = []
        for part in _apart(text):  # its tokenizer reads the name of a control token as that token
            body = {"model": self._model, "prompt": part, "add_special_tokens": False, "return_token_strs": True}
            said = await self._client.post("/tokenize", body)
            found += zip(said["tokens"], map(self._shown_bytes, said["token_strs"]), strict=True)
        return found

    def _shown_bytes(self, piece: str) -> bytes:
        """The bytes behind a token as a tokenizer names it: bytes as characters, or a sign in place of blanks."""
        if (byte := _BYTE.fullmatch(piece)) is not None:
            return bytes([int(byte[1], 16)])
        if all(character in self._visible for character in piece):
            return bytes(self._visible[character] for character in piece)
        return piece.replace(_SPACE, " ").encode("utf-8", "replace")

    async def fetch_texts(self, ids: Iterable[int]) -> None:
        """The texts of tokens."""
        missing = [index for index in dict.fromkeys(ids) if index not in self._texts]
        for start in range(0, len(missing), _MOST_AT_ONCE):
            await self._fetch_some(missing[start : start + _MOST_AT_ONCE])

    async def _fetch_some(self, ids: Sequence[int]) -> None:
        separator, mark = await self._separated()
        joined = [*separator, *(part for index in ids for part in (index, *separator))]
        texts = (await self._text_of_ids(joined)).split(mark)[1:-1]
        if len(texts) != len(ids):
            texts = [await self._text(index) for index in ids]
        for index, text in zip(ids, texts, strict=True):
            self._texts[index] = text
            if text and "\ufffd" not in text:
                self._bytes[index] = text.encode()

    async def _separated(self) -> tuple[list[int], str]:
        if self._separator is None:
            mark = "\n#|#\n"
            self._separator = [index for index, _ in await self._tokenized(mark)], mark
        return self._separator

    async def _text(self, index: int) -> str:
        """Of one token, behind a letter: some tokenizers leave out a blank at the beginning."""
        anchor = [item for item, _ in await self._tokenized(_ANCHOR)]
        before = await self._text_of_ids(anchor)
        return (await self._text_of_ids([*anchor, index])).removeprefix(before)

    async def text_of_ids(self, ids: Sequence[int]) -> str:
        """What some tokens say together."""
        return await self._text_of_ids(ids)

    async def _text_of_ids(self, ids: Sequence[int]) -> str:
        said = await self._client.post("/detokenize", {"model": self._model, "tokens": list(ids)})
        text = said.get("content" if self._dialect == "llama_cpp" else "prompt")
        if not isinstance(text, str):
            raise BackendError("/detokenize answers in a shape that is not known.")
        return text

    async def is_exact(self) -> bool:
        """Whether ids come back as the text that they were made of: some tokenizers tidy blanks up."""
        text = "He said , it 's fine . No ? 1, 2, 🌊 Straße"
        return await self._text_of_ids(await self.encoded(text)) in (text, " " + text)


def _given(value: list[int] | PromptRefusedError) -> list[int]:
    if isinstance(value, PromptRefusedError):
        raise value
    return value


def _as_bytes(piece: Any) -> bytes:
    return piece.encode() if isinstance(piece, str) else bytes(piece)


def _apart(text: str) -> list[str]:
    """The text in parts, so that no name of a control token is whole in any."""
    cuts = [0, *(match.start() + 1 for match in _CONTROL_NAME.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if start < end]


def messages_of(prompt: Prompt) -> list[Json]:
    """A prompt as the messages of a chat request."""
    system = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
    roles = {"user": "user", "model": "assistant"}
    return [*system, *({"role": roles[turn.role], "content": turn.content} for turn in prompt.turns)]


def raw_text(messages: Sequence[Json]) -> str:
    """The text of a prompt that no template writes.

    Raises
    ------
    PromptRefusedError
        If it is more than one user turn.
    """
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise PromptRefusedError("template is none: one user turn is continued, without system text and history.")
    return messages[0]["content"]
