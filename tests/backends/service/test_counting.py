"""What a backend counts of a few prompts corrects the estimate of all; what goes wrong with it changes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from backends.base import Backend, BackendOptions, Capabilities, ScoreRequest, WorkEstimate
from backends.errors import RetryableBackendError
from backends.service.counting import TextSample, TokenCounts, count_texts, worth_counting
from kl.records import Prompt, Score, ScoreFailure, Turn
from kl.text_tokens import prompt_tokens_of

MODEL = "q"
# Tokens of a model whose vocabulary knows both languages better than the rule says.
TRUTH = {"Latin": 0.7, "Cyrillic": 0.4}
WORDS = {"Latin": "water lake winter market village bridge", "Cyrillic": "озеро вода зима рынок деревня мост"}


class Service(Backend):
    """Counts by the table above, and says how often it was asked."""

    capabilities: ClassVar[Capabilities] = Capabilities(max_top_logprobs=20)
    name = "a-service"
    template_tokens: ClassVar[int] = 0
    asked: list[Prompt]
    fails_after = 10**9
    waits_s = 0.0

    def __init__(self, state_dir: Path | None = None) -> None:
        super().__init__(BackendOptions(), state_dir)
        self.asked = []

    @classmethod
    def cost_usd(cls, options: BackendOptions, model: str, input_tokens: int, output_tokens: int) -> float | None:
        return input_tokens * 1e-6 + output_tokens * 4e-6

    async def count_prompt_tokens(self, model: str, prompts: Sequence[Prompt]) -> Sequence[int | None] | None:
        await asyncio.sleep(self.waits_s)
        if len(self.asked) >= self.fails_after:
            raise RetryableBackendError("429 slow down", status=429)
        self.asked += prompts
        return [true_count(prompt) for prompt in prompts]

    async def preflight(self, model: str) -> str | None:
        raise NotImplementedError

    def score(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Score | ScoreFailure]:
        raise NotImplementedError


def true_count(prompt: Prompt) -> int:
    found = prompt_tokens_of(prompt)
    return round(found.tokens * TRUTH[found.script] * (1 + 0.1 * (len(prompt.turns[0].content) % 3 - 1)))


def prompt(number: int) -> Prompt:
    """Of a length that differs a hundredfold; a tenth of them in Russian."""
    words = WORDS["Latin" if number % 10 else "Cyrillic"].split()
    n_words = 5 + (number * number * 37) % 200
    return Prompt((Turn("user", f"{number}: " + " ".join(words[(number + i) % 6] for i in range(n_words))),))


def plan_of(n: int) -> tuple[TextSample, dict[str, WorkEstimate]]:
    """What a plan draws, and its estimates by script: three responses of 10 positions to each prompt."""
    sample, parts = TextSample(), dict[str, WorkEstimate]()
    for number in range(n):
        found = prompt_tokens_of(prompt(number))
        sample.note_prompt(MODEL, prompt(number), 30, 0)
        n_prompt = 30 * found.tokens
        cost = Service.cost_usd(BackendOptions(), MODEL, n_prompt + 135, 30)
        work = WorkEstimate(30, 0, n_prompt + 135, 30, cost, n_prompt)
        parts[found.script] = parts.get(found.script, WorkEstimate()) + work
    return sample, parts


def corrected(counts: TokenCounts, parts: dict[str, WorkEstimate]) -> WorkEstimate:
    fixed = (counts.corrected(work, MODEL, script, Service, BackendOptions()) for script, work in parts.items())
    return sum(fixed, WorkEstimate())


def test_of_many_prompts_64_are_counted_and_all_are_right(tmp_path: Path) -> None:
    sample, parts = plan_of(500)
    service = Service(tmp_path)
    counts = asyncio.run(count_texts(service, sample))
    truth = sum(30 * true_count(prompt(number)) + 135 for number in range(500))
    before, after = sum(parts.values(), WorkEstimate()), corrected(counts, parts)
    assert abs(before.input_tokens / truth - 1) > 0.1
    assert after.input_tokens == pytest.approx(truth, rel=0.04)
    assert after.cost_usd == pytest.approx(truth * 1e-6 + 15_000 * 4e-6, rel=0.04)
    assert counts.n_prompts == len(service.asked) - 1 <= 64  # and one for what the template adds
    assert {prompt_tokens_of(item).script for item in service.asked} == set(TRUTH)


def test_few_prompts_are_all_counted_and_then_it_is_exact(tmp_path: Path) -> None:
    sample, parts = plan_of(40)
    after = corrected(asyncio.run(count_texts(Service(tmp_path), sample)), parts)
    assert after.input_tokens == pytest.approx(sum(30 * true_count(prompt(i)) + 135 for i in range(40)), abs=2)


def test_a_run_that_goes_on_asks_nothing_again(tmp_path: Path) -> None:
    first = asyncio.run(count_texts(Service(tmp_path), plan_of(300)[0]))
    again = Service(tmp_path)
    assert asyncio.run(count_texts(again, plan_of(300)[0])) == first
    assert again.asked == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"fails_after": 0}, "tokens are estimated, since they cannot be counted now: 429 slow down"),
        ({"waits_s": 5.0}, "counting tokens took longer than 0.05 s"),
    ],
)
def test_a_service_that_does_not_count_leaves_the_estimate_and_one_line(
    settings: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    sample, parts = plan_of(20)
    service = Service()
    vars(service).update(settings)
    with caplog.at_level(logging.INFO):
        counts = asyncio.run(count_texts(service, sample, deadline_s=0.05))
    assert corrected(counts, parts) == sum(parts.values(), WorkEstimate())
    assert counts == TokenCounts()
    assert [record.message for record in caplog.records if line in record.message] == [caplog.records[-1].message]
    assert len(caplog.records) == 1


def test_what_was_counted_before_a_service_failed_serves() -> None:
    sample, parts = plan_of(300)
    service = Service()
    service.fails_after = 32
    counts = asyncio.run(count_texts(service, sample))
    assert counts.n_prompts == 31
    truth = sum(30 * true_count(prompt(number)) + 135 for number in range(300))
    assert corrected(counts, parts).input_tokens == pytest.approx(truth, rel=0.08)


def test_a_backend_that_knows_nothing_of_counting_is_none_the_worse() -> None:
    class Old(Service):
        count_prompt_tokens = Backend.count_prompt_tokens

    assert asyncio.run(count_texts(Old(), plan_of(5)[0])) == TokenCounts()
    own = WorkEstimate(1, 10, 500, 1, 0.5)  # of an estimate() that says nothing of prompts
    assert TokenCounts(4, {(MODEL, ""): 2.0}).corrected(own, MODEL, "Latin", Old, BackendOptions()) == own


@pytest.mark.parametrize("content", ["", "[]", '{"q": 3}', '{"q": {"k": "many"}}'])
def test_a_record_that_is_damaged_is_counted_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "token_counts").write_text(content)
    sample, _ = plan_of(5)
    assert asyncio.run(count_texts(Service(tmp_path), sample)).n_prompts == 5


def test_the_tokens_of_another_vocabulary_correct_the_prefixes_too() -> None:
    """P wrote a token for each word; this service makes 0.7 of the rule's tokens of them."""
    words = [f" {word}" for word in WORDS["Latin"].split() * 20]
    ends = [sum(map(len, words[:index])) for index in range(len(words))]
    request = ScoreRequest(
        "r", MODEL, prompt(1), "".join(words), tuple(ends), None, tuple(range(len(words))), ("k",) * len(words), 20
    )
    sample = TextSample()
    sample.note_prompt(MODEL, request.prompt, len(words), 0)
    sample.note_response(request)
    work = Service.estimate(BackendOptions(), request)
    counts = asyncio.run(count_texts(Service(), sample))
    after = counts.corrected(work, MODEL, "Latin", Service, BackendOptions())
    whole = Prompt((Turn("user", request.text),))
    truth = len(words) * true_count(prompt(1)) + sum(range(len(words))) * true_count(whole) / len(words)
    assert counts.n_prompts == 1
    assert after.input_tokens == pytest.approx(truth, rel=0.01)


def test_nothing_is_asked_where_nothing_is_spent() -> None:
    class Here(Service):
        capabilities: ClassVar[Capabilities] = Capabilities(max_top_logprobs=20, remote=False)

    priced = WorkEstimate(1, 1, 1, 1, 0.01)
    assert worth_counting(Service, priced)
    assert not worth_counting(Here, priced)
    assert not worth_counting(Service, WorkEstimate(1, 1, 1, 1, None))
    assert not worth_counting(Service, WorkEstimate())
    assert worth_counting(Service, priced, 0.005)
    assert not worth_counting(Service, priced, 0.004)  # above the limit whatever is counted
