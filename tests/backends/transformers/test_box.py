"""The box's model as a checkpoint against the numpy engine: two implementations of one model, both in float32."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Backend, SampleRequest, SampleSettings, ScoreRequest
from backends.local.backend import LocalBackend
from backends.transformers.backend import TransformersBackend
from backends.transformers.options import TransformersOptions
from kl.records import Prompt, Score, Turn
from tests.backends.transformers.asking import ask, example, paired, sample, scores
from tests.backends.transformers.checkpoints import box_model

NATS = 1e-4
LOCAL, ROUNDED = "smollm2-135m", "smollm2-135m@int4"


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return box_model(tmp_path_factory.mktemp("rounded") / "int4", 4)


def test_scores_and_figures_are_those_of_the_numpy_engine(box: Path, rounded: Path) -> None:
    def asked(p: str, q: str) -> list[ScoreRequest]:
        return paired(example(p, 2, 8), example(q, 2, 8))

    here = scores(asked(str(box), str(rounded)))
    answers = ask(asked(LOCAL, ROUNDED), LocalBackend)
    there = [answers[key] for each in asked(LOCAL, ROUNDED) for key in each.keys]
    kl = []
    for ours, theirs in zip(here, there, strict=True):
        assert isinstance(theirs, Score)
        assert ours.input_tokens == theirs.input_tokens
        assert ours.exact is not None
        assert theirs.exact is not None
        np.testing.assert_allclose(ours.exact[1:5], theirs.exact[1:5], rtol=0, atol=NATS)
        values = {candidate.token_id: candidate.logprob for candidate in theirs.top}
        shared = [candidate for candidate in ours.top if candidate.token_id in values]
        assert len(shared) >= 19
        assert [candidate.logprob for candidate in shared] == pytest.approx(
            [values[candidate.token_id] for candidate in shared], abs=NATS
        )
        kl.append(ours.exact.kl)
    assert np.mean(kl) > 0.1  # four bits


def test_prompts_are_counted_as_they_are_given_to_the_numpy_engine(box: Path) -> None:
    prompts = [example(LOCAL, number, 2).prompt for number in (0, 1)]

    async def counts(backend: Backend, model: str) -> Any:
        async with backend:
            return await backend.count_prompt_tokens(model, prompts)

    here = asyncio.run(counts(TransformersBackend(TransformersOptions()), str(box)))
    answers = ask([example(LOCAL, number, 2) for number in (0, 1)], LocalBackend)
    first = [answers[f"{LOCAL} {number} 0"] for number in (0, 1)]
    assert here == [score.input_tokens for score in first if isinstance(score, Score)]
    assert asyncio.run(counts(LocalBackend(LocalBackend.Options()), LOCAL)) == here


def test_samples_are_those_of_the_numpy_engine(box: Path) -> None:
    prompts = [Prompt((Turn("user", text),)) for text in ("Count to 12.", "What is copper used for, in a word?")]
    settings = SampleSettings(max_tokens=6, temperature=0.8, top_p=0.9, seed=7)

    def asked(model: str) -> list[SampleRequest]:
        return [SampleRequest(f"{at}", f"#{at}", model, prompt, settings, at) for at, prompt in enumerate(prompts)]

    for ours, theirs in zip(sample(asked(str(box))), sample(asked(LOCAL), LocalBackend), strict=True):
        assert ours.key == theirs.key
        one, other = ours.response, theirs.response
        assert (one.text, one.finish_reason, one.has_stop) == (other.text, other.finish_reason, other.has_stop)
        for here, there in zip(one.positions, other.positions, strict=True):
            assert here.sampled[::2] == there.sampled[::2]
            assert here.sampled.logprob == pytest.approx(there.sampled.logprob, abs=NATS)
            assert here.top[0].logprob == pytest.approx(there.top[0].logprob, abs=NATS)
