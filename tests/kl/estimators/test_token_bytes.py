"""Which token an entry names, in all the ways that sources write tokens, and on two sides that write otherwise."""

import math

import numpy as np
import pytest

from kl.estimators.align import align
from kl.estimators.bounds import cells, lower_bounds
from kl.estimators.token_bytes import byte_functions, writing_of
from kl.estimators.token_keys import choose_key
from kl.pieces import visible_bytes
from kl.records import Candidate
from tests.kl.pairs import gaussian_pair, true_divergences

CHARACTER_OF = {byte: character for character, byte in visible_bytes().items()}


def texts(*tokens):
    return [tuple(Candidate(token, -1.0 - at) for at, token in enumerate(tokens))]


def bytes_of(candidate, beside, other=()):
    """What is read of a candidate on a side that also lists ``beside``, where the other side lists ``other``."""
    side = [(candidate, *texts(*beside)[0])] if beside else [(candidate,)]
    return byte_functions(side, texts(*other) if other else [()])[0](candidate)


TEXT, BYTE_LEVEL, SENTENCE_PIECE = (" the",), ("Ġthe",), ("▁the",)


@pytest.mark.parametrize(
    ("side", "writing"),
    [
        ((" the", "Ġ", "▁"), "text"),
        (("the", "Ġthe", "Ã©", "Ċ", "<|im_end|>"), "byte-level"),
        (("Ġthe", "<｜end▁of▁sentence｜>", "  "), "byte-level"),
        (("Ġthe", "你好"), "unknown"),
        (("Ġthe", "\n"), "unknown"),
        (("▁the", "é", "<0x0A>", "\n\n"), "sentence-piece"),
        (("你好", "é"), "text"),
        (("the", "é"), "unknown"),
        ((" ", "the"), "unknown"),
    ],
)
def test_a_side_shows_how_it_writes_tokens(side, writing):
    assert writing_of(texts(*side)) == writing


def test_a_side_that_states_parts_of_characters_knows_its_texts():
    assert writing_of([(Candidate("\ufffd", -1.0, token_bytes=b"\xe2"), Candidate("é", -2.0))]) == "text"


@pytest.mark.parametrize(
    ("token", "beside", "read"),
    [
        ("é", TEXT, "é".encode()),
        ("Ã©", TEXT, "Ã©".encode()),
        ("Ã©", BYTE_LEVEL, "é".encode()),
        ("é", BYTE_LEVEL, b"\xe9"),
        ("âĢ", BYTE_LEVEL, b"\xe2\x80"),
        ("Ċ", BYTE_LEVEL, b"\n"),
        ("<|im_end|>", BYTE_LEVEL, b"<|im_end|>"),
        ("▁été", SENTENCE_PIECE, " été".encode()),
        ("<｜end▁of▁sentence｜>", SENTENCE_PIECE, "<｜end▁of▁sentence｜>".encode()),
        ("<0xE2>", SENTENCE_PIECE, b"\xe2"),
        ("<0xE2>", TEXT, b"\xe2"),
        ("<0x0A>", SENTENCE_PIECE, b"\n"),
        ("<0x0A>", (*SENTENCE_PIECE, "\n"), None),
        ("<0x20>", (*SENTENCE_PIECE, "▁"), None),
        ("<0x20>", TEXT, None),
        ("<0xE2>", BYTE_LEVEL, None),
        ("bytes:\\xe2\\x80", TEXT, b"\xe2\x80"),
        ("\\xe2\\x80", TEXT, None),
        ("token_id:7042", TEXT, None),
        ("", TEXT, None),
        ("\ufffd", TEXT, None),
        (" \ufffd", TEXT, None),
        ("é", (), None),
        ("Ġthe", ("the", "你"), None),
        ("the", (), b"the"),
        ("你", (), "你".encode()),
    ],
)
def test_a_text_is_read_as_its_side_writes(token, beside, read):
    assert bytes_of(Candidate(token, -0.5), beside) == read


@pytest.mark.parametrize(
    ("token", "stated", "read"),
    [
        ("\ufffd", b"\xe2", b"\xe2"),
        (" \ufffd", b" \xe2\x99", b" \xe2\x99"),
        ("a\ufffd\ufffd", b"a\xe2\x99", b"a\xe2\x99"),
        ("", b"\xe2\x99", b"\xe2\x99"),
        (" ", b" \xf0\x9f", b" \xf0\x9f"),
        ("\\xe2\\x80", b"\xe2\x80", b"\xe2\x80"),
        ("<0xF0>", b"\xf0\x9f", b"\xf0\x9f"),
        ("Ġthe", b" the", b" the"),
        ("🌊", b"\x8a", b"\x8a"),
        ("<|im_end|>", b"", b"<|im_end|>"),
        ("\ufffd", b"\xef\xbf\xbd", None),
        (" \ufffd", b" \xef\xbf\xbd", None),
        ("", b"\xef\xbf\xbd", None),
        ("", b"", None),
        ("", b"the", None),
        ("the", b" the", None),
        ("a\ufffd", b"b\xe2", None),
    ],
)
def test_stated_bytes_count_if_they_can_be_the_tokens_own(token, stated, read):
    assert bytes_of(Candidate(token, -0.5, token_bytes=stated), TEXT) == read


def test_bytes_of_a_raw_piece_are_no_more_than_the_piece():
    assert bytes_of(Candidate("Ġthe", -0.5, token_bytes="Ġthe".encode()), BYTE_LEVEL) == b" the"


def test_one_byte_is_not_certain_where_the_vocabulary_has_longer_parts():
    part = Candidate("\ufffd", -1.0, token_bytes=b"\xf0\x9f")
    read_p, _ = byte_functions([(Candidate("<0xF0>", -0.5), Candidate(" the", -1.0))], [(part,)])
    assert read_p(Candidate("<0xF0>", -0.5)) is None


def test_an_escape_that_states_its_own_text_says_no_more_than_one_that_states_nothing() -> None:
    lists = [(Candidate("<0x0A>", -0.5, None, b"<0x0A>"), Candidate("▁the", -1.0), Candidate("\n", -2.0))]
    read, _ = byte_functions(lists, [])
    assert [read(candidate) for candidate in lists[0]] == [None, b" the", b"\n"]


class TestIds:
    """Ids that nothing proves, or that the texts speak against."""

    def test_unclear_texts_prove_nothing(self):
        lists = [(Candidate("", -0.5, 7),)], [(Candidate("", -0.5, 7),)]
        assert choose_key(*lists, *byte_functions(*lists)).key == "text"
        aligned = align(*lists)
        assert (aligned.overlap[0], aligned.open_p[0], aligned.open_q[0]) == (0, math.exp(-0.5), math.exp(-0.5))

    def test_one_id_for_two_texts_or_two_ids_for_one_text_are_open(self):
        rows = [tuple(Candidate(f"t{i}", -1.0 - i, i) for i in range(100))] * 3
        other = [
            rows[0],
            tuple(c._replace(token="new") if c.token_id == 3 else c for c in rows[0]),
            tuple(c._replace(token_id=500) if c.token_id == 5 else c for c in rows[0]),
        ]
        aligned = align(rows, other)
        assert aligned.choice.key == "id"
        assert aligned.overlap.tolist() == [100, 99, 99]
        np.testing.assert_allclose(aligned.open_p, [0.0, math.exp(-4.0), math.exp(-6.0)])
        np.testing.assert_allclose(aligned.open_q, aligned.open_p)

    def test_a_doubted_sampled_token_is_not_missing(self):
        rows = [tuple(Candidate(f"t{i}", -1.0 - i, i) for i in range(100))]
        other = [tuple(c._replace(token="new") if c.token_id == 3 else c for c in rows[0])]
        assert not align(rows, other, [rows[0][3]]).sampled_clear[0]


def test_a_text_that_names_two_tokens_once_names_none_anywhere_in_the_response():
    twice = (Candidate("x", -0.9), Candidate("x", -1.5), Candidate("y", -2.0))
    once = (Candidate("x", -0.4), Candidate("y", -2.0))
    aligned = align([twice, once], [once, once])
    assert aligned.overlap.tolist() == [1, 1]
    assert aligned.open_p[1] == aligned.open_q[1] == math.exp(-0.4)


PARTS = (b" \xe2", b"(\xf0\x9f", b"\x99 a")


class TestCutTexts:
    """What a side shows of a token that the other side names with a part of a character."""

    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("copies", [False, True])
    def test_one_model_shown_and_stated_differs_by_nothing(self, part, copies):
        law = {b" the": 0.4, part: 0.25, b" a": 0.15, b" it": 0.08}
        shown = [(token.decode("utf-8", "ignore"), math.log(value)) for token, value in law.items()]
        lists_p = [tuple(Candidate(text, value, None, text.encode() if copies else None) for text, value in shown)] * 2
        stated = [Candidate(token.decode("utf-8", "replace"), math.log(p), None, token) for token, p in law.items()]
        for lists in ((lists_p, [tuple(stated)] * 2), ([tuple(stated)] * 2, lists_p)):
            assert all((values <= 1e-9).all() for values in lower_bounds(cells(align(*lists))))

    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize(
        "sign", [Candidate("\ufffd", -3.0), Candidate("", -3.0, None, b"\xe2"), Candidate("<0xE2>", -3.0)]
    )
    def test_a_side_that_shows_parts_otherwise_shows_whole_texts(self, part, sign):
        text = part.decode("utf-8", "ignore")
        other = [(Candidate("\ufffd", -1.0, None, part),)]
        read = byte_functions([(Candidate(text, -0.5), Candidate(" the", -1.0), sign)], other)[0]
        assert read(Candidate(text, -0.5)) == text.encode()

    def test_a_blank_keeps_its_identity_where_nothing_shows_that_parts_are_hidden(self):
        clean = [(Candidate(" ", -0.5), Candidate(" the", -1.0), Candidate("\n", -2.0))]
        assert all(read(Candidate(" ", -0.5)) == b" " for read in byte_functions(clean, clean))


# Every way to write one side, from the bytes of each token; None stands for "no bytes".
WRITINGS = {
    "text, parts as nothing": lambda token: (_whole(token) or "", None),
    "text, parts as nothing with no bytes": lambda token: (_whole(token) or "", token if _whole(token) else b""),
    "text, parts left out": lambda token: (token.decode("utf-8", "ignore"), None),
    "text, parts left out of the bytes too": lambda token: (token.decode("utf-8", "ignore"),) * 2,
    "text and the bytes of U+FFFD": lambda token: (token.decode("utf-8", "replace"),) * 2,
    "text, the first byte of parts": lambda token: (_whole(token) or f"<0x{token[0]:02X}>", None),
    "text and bytes": lambda token: (token.decode("utf-8", "replace"), token),
    "raw pieces of byte-level BPE": lambda token: ("".join(CHARACTER_OF[byte] for byte in token), None),
}
TOKENS = (
    *(b" the", b" sea", b"the", b"\n", b" ", "é".encode(), " é".encode(), "Ã©".encode(), "’".encode(), b"<|end|>"),
    *(b"\xf0", b"\xf0\x9f", b" \xf0\x9f", b"\xe2\x99", b"\xe2\x80", b"\xc3", b" \xc3", b"\x8a", b"\x99", b"\xe9"),
)


def _whole(token):
    text = token.decode("utf-8", "replace")
    return None if "\ufffd" in text else text


def written(logs, write, k):
    """The k best of each row, each token as ``write`` has it."""
    lists = []
    for row in logs:
        shown = [write(TOKENS[i]) for i in np.argsort(-row, kind="stable")[:k]]
        stated = [part.encode() if isinstance(part, str) else part for _, part in shown]
        values = -np.sort(-row)[:k]
        lists.append(
            tuple(
                Candidate(text, float(value), token_bytes=own)
                for (text, _), own, value in zip(shown, stated, values, strict=True)
            )
        )
    return lists


@pytest.mark.parametrize("write_q", WRITINGS.values(), ids=WRITINGS.keys())
@pytest.mark.parametrize("write_p", WRITINGS.values(), ids=WRITINGS.keys())
def test_however_two_sides_write_equal_models_differ_by_nothing(write_p, write_q):
    logs, _ = gaussian_pair(5, 60, len(TOKENS), 0.0, zipf=0.3)
    for k in (8, 14):
        low = lower_bounds(cells(align(written(logs, write_p, k), written(logs, write_q, k))))
        assert all((values <= 1e-9).all() for values in low)


@pytest.mark.parametrize("write_q", WRITINGS.values(), ids=WRITINGS.keys())
@pytest.mark.parametrize("write_p", WRITINGS.values(), ids=WRITINGS.keys())
def test_however_two_sides_write_bounds_hold(write_p, write_q):
    logp, logq = gaussian_pair(6, 60, len(TOKENS), 0.7, zipf=0.3)
    low = lower_bounds(cells(align(written(logp, write_p, 9), written(logq, write_q, 11))))
    for values, true in zip(low, true_divergences(logp, logq), strict=True):
        assert (values <= true + 1e-9).all()


def test_text_bytes_and_raw_pieces_are_matched_whole():
    logs, _ = gaussian_pair(5, 60, len(TOKENS), 0.0, zipf=0.3)
    for name in ("text and bytes", "raw pieces of byte-level BPE"):
        aligned = align(written(logs, WRITINGS[name], 14), written(logs, WRITINGS["text and bytes"], 14))
        assert (aligned.overlap == 14).all()
