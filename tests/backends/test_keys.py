"""The key of a score changes with everything that changes the answer, and with nothing else."""

import pytest

from backends.keys import context_keys
from kl.records import Prompt, Turn

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
