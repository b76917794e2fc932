"""A checkpoint keeps the contract, as text, as ids, as P and as Q."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.contract import Check, Subject, checks_for
from backends.transformers.backend import TransformersBackend


def subject(folder: str) -> Subject:
    changed = [{"dtype": "bfloat16"}, {"template": "none"}, {"models": {folder: {"dtype": "float16"}}}]
    # Sequences of other lengths are multiplied as other shapes, which round differently.
    return Subject(
        TransformersBackend, folder, unknown_model="./no/such/folder", changed_options=changed, noise_nats=1e-4
    )


@pytest.fixture(scope="module")
def tiny_subject(tiny: Path) -> Subject:
    return subject(str(tiny))


@pytest.mark.parametrize("check", checks_for(subject("-")), ids=str)
def test_transformers(check: Check, tiny_subject: Subject) -> None:
    check.run(tiny_subject)
