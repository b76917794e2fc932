"""The tree of errors that is drawn in `backends.errors` is the one that exists."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

import pytest

import backends
import backends.errors
import flows
import kl
from backends.errors import TokenKLError, did_you_mean

ROOMS = (backends, flows, kl)
LINE = re.compile(r"    (?P<lines>[│├└─ ]*)(?P<name>\w+Error)\b(?: \(also (?P<also>\w+)\))?")


def drawn() -> dict[str, set[str]]:
    """Class → its bases, as the picture has them."""
    found: dict[str, set[str]] = {}
    above: list[str] = []
    for line in (backends.errors.__doc__ or "").splitlines():
        if match := LINE.match(line):
            depth = len(match["lines"]) // 4
            above[depth:] = [match["name"]]
            bases = {match["also"]} if match["also"] else set[str]()
            found[match["name"]] = bases | set(above[depth - 1 : depth])
    return found


def existing() -> dict[str, set[str]]:
    """The same of all classes in the three packages."""
    for room in ROOMS:
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            importlib.import_module(module.name)
    names = tuple(f"{room.__name__}." for room in ROOMS)
    ours = [kind for kind in below(TokenKLError) if kind.__module__.startswith(names)]
    return {kind.__name__: {base.__name__ for base in kind.__bases__} - {"Exception"} for kind in ours}


def below(kind: type) -> Iterator[type]:
    yield kind
    for child in kind.__subclasses__():
        yield from below(child)


def test_the_tree_that_is_drawn_is_the_whole_tree() -> None:
    assert drawn() == existing()


@pytest.mark.parametrize(
    ("name", "hint"), [("locl", " Did you mean 'local'?"), ("local", " Did you mean 'local'?"), ("zzz", "")]
)
def test_a_misspelt_name_is_told_what_is_close(name: str, hint: str) -> None:
    assert did_you_mean(name, {"local": 1, "vertex_batch": 2}) == hint
