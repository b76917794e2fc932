"""What bytes a token stands for, in the ways that sources write tokens: whole texts, bytes, raw tokenizer pieces.

A source that writes ``""`` or U+FFFD for a part of a character does not say which part: such a token has no bytes.
"""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"
_LOSSY = REPLACEMENT.encode()
_ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte pieces
ESCAPES = ("<0x", "bytes:\\x")  # how tokens begin that are written as their bytes
NAMED_BY_ID = "token_id:"  # vLLM, on request: the number in the place of the text
_SPECIAL = re.compile(r"[▁Ġ ]?(<[^<>\n]+>|\[[^\[\]\n]+\])")
_ESCAPED = re.compile(r"bytes:((?:\\x[0-9A-Fa-f]{2})+)")  # OpenAI, for a token that is a part of a character


def visible_bytes() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = visible_bytes()


def is_whole(token: str) -> bool:
    """Whether a text can be a token's own: "" and U+FFFD are how different parts of characters look alike."""
    return token != "" and REPLACEMENT not in token


def is_special(token: str) -> bool:
    """Whether a token is named as those are that are no text (``<|eot|>``, ``[EOS]``); one without a name may be."""
    return token == "" or _SPECIAL.fullmatch(token) is not None


def escaped_bytes(token: str) -> bytes | None:
    """The bytes of a token that is written as such: ``<0xE2>`` is one byte, not six characters."""
    if found := _ONE_BYTE.fullmatch(token):
        return bytes.fromhex(found[1])
    if found := _ESCAPED.fullmatch(token):
        return bytes.fromhex(found[1].replace("\\x", ""))
    return None


def own_bytes(token: str, token_bytes: bytes | None) -> bytes | None:
    """The bytes that a token stands for; None where its source does not say."""
    escaped = escaped_bytes(token)
    if escaped is not None:
        return escaped
    if token_bytes and _LOSSY not in token_bytes:
        return token_bytes
    return token.encode("utf-8", "surrogatepass") if is_whole(token) else None


def byte_level(token: str) -> bytes | None:
    """The bytes of a raw piece of byte-level BPE (``Ġthe``); None if it holds a character that stands for no byte."""
    if not all(character in _BYTE_OF for character in token):
        return None
    return bytes(_BYTE_OF[character] for character in token)


def sentence_piece(token: str) -> bytes:
    """The bytes of a raw piece of SentencePiece (``▁the``, ``<0xE2>``)."""
    return escaped_bytes(token) or token.replace("▁", " ").encode("utf-8", "surrogatepass")
