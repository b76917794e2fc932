"""The model behind the answers: its distributions, its divergences, its responses, and how they look on the wire."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vertex_world import Faults, SyntheticModel, VertexWorld, exact_kl, sample_responses
from tests.vertex_world.fixtures import make_vertex_world, vertex_world
from tests.vertex_world.language_model import Contents, Distribution
from tests.vertex_world.testing import FLASH, LITE, authorized_session, scoring_request, vertex_url

__all__ = ["make_vertex_world", "vertex_world"]

pytestmark = pytest.mark.world

QUESTION = [("user", "Why?")]


def ask(world: VertexWorld, body: dict[str, Any], model: str = FLASH) -> dict[str, Any]:
    with authorized_session(world) as session:
        url = vertex_url(world, f"publishers/google/models/{model}:generateContent")
        answer = session.post(url, json=body, timeout=10)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("size", [300, 1000, 4000])
def test_distributions_are_normalised_and_depend_on_everything_asked(size: int) -> None:
    model = SyntheticModel(size, noise={FLASH: 0.3})
    known = model.distribution(FLASH, QUESTION, None, "So")
    assert known.logprobs.shape == (size,)
    assert np.exp(known.logprobs).sum() == pytest.approx(1, abs=1e-12)
    again = SyntheticModel(size, noise={FLASH: 0.3}).distribution(FLASH, QUESTION, None, "So")
    assert np.array_equal(known.logprobs, again.logprobs)
    others = [
        model.distribution(LITE, QUESTION, None, "So"),
        model.distribution(FLASH, [("user", "Why")], None, "So"),
        model.distribution(FLASH, QUESTION, "Be brief.", "So"),
        model.distribution(FLASH, QUESTION, None, "So "),
        SyntheticModel(size, seed=1, noise={FLASH: 0.3}).distribution(FLASH, QUESTION, None, "So"),
    ]
    assert not any(np.allclose(known.logprobs, other.logprobs) for other in others)


def test_the_vocabulary_has_the_tokens_that_break_readers() -> None:
    model = SyntheticModel(500)
    assert len(set(model.texts)) == len(set(model.ids)) == 500
    assert (model.texts[0], model.ids[0]) == ("", 1)
    assert {"<ctrl63>", "  ", "\n\n", "🙂", "\u2028", '"', "\\"} <= set(model.texts)
    assert any(unicodedata.name(text[0]).startswith("CJK") for text in model.texts if text.strip()[:1].isalpha())


def test_the_divergence_is_that_of_the_definition_and_grows_with_the_noise() -> None:
    class Coin:
        def distribution(self, model: str, contents: Contents, system: str | None, prefix: str) -> Distribution:
            heads = {"p": 0.5, "q": 0.25}[model]
            return Distribution(["h", "t"], [2, 3], np.log([heads, 1 - heads]), None)

        def count_tokens(self, text: str) -> int:
            return len(text)

    # .5 ln(.5/.25) + .5 ln(.5/.75)
    assert exact_kl(Coin(), "p", "q", "x") == pytest.approx(0.1438410362258904)
    model = SyntheticModel(noise={"a": 0.1, "b": 0.3, "c": 1.0})
    means = [np.mean([exact_kl(model, "base", name, "x", str(i)) for i in range(50)]) for name in ("a", "b", "c")]
    assert 0 < means[0] < means[1] < means[2]
    assert exact_kl(model, "base", "another base", "x") == 0
    turns = [{"role": "user", "content": "x"}]
    assert exact_kl(model, "base", "a", turns, "p") == exact_kl(model, "base", "a", "x", "p")


def test_responses_are_those_of_the_input_contract(tmp_path: Path, vertex_world: VertexWorld) -> None:
    paths = vertex_world.write_responses(tmp_path / "in", LITE, ["Why?", "How?"], n=3, max_tokens=12, seed=5)
    assert [path.name for path in paths] == ["prompt_000.json", "prompt_001.json"]
    content = json.loads(paths[0].read_text(encoding="utf-8"))
    assert content == sample_responses(vertex_world.language_model, LITE, "Why?", 3, 12, 5)
    assert content["prompt"] == "Why?"
    assert len(content["responses"]) == 3
    for response in content["responses"]:
        positions = response["logprobs"]["content"]
        assert "".join(position["token"] for position in positions) == response["text"]
        assert len(positions) == 12 or response["finish_reason"] == "STOP"
        prefix = ""
        for position in positions:
            listed = [candidate["logprob"] for candidate in position["top_logprobs"]]
            assert len(listed) == 20
            assert listed == sorted(listed, reverse=True)
            known = vertex_world.language_model.distribution(LITE, QUESTION, None, prefix)
            exact = known.logprobs[list(known.ids).index(position["token_id"])]
            assert position["logprob"] == pytest.approx(exact, rel=1e-6, abs=1e-9)
            prefix += position["token"]


def test_sampled_tokens_follow_the_distribution() -> None:
    model = SyntheticModel(300, exponents=(1.0, 1.0))
    drawn = sample_responses(model, LITE, "Why?", 4000, 1, 3)["responses"]
    known = model.distribution(LITE, QUESTION, None, "")
    for index in np.argsort(-known.logprobs)[:5]:
        share = np.mean([response["text"] == known.texts[index] for response in drawn])
        probability = np.exp(known.logprobs[index])
        assert abs(share - probability) < 5 * np.sqrt(probability / 4000)


def test_a_system_text_and_turns_are_kept_in_the_file() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}, {"role": "user", "content": "c"}]
    content = sample_responses(SyntheticModel(300), LITE, turns, 1, 3, system="Be brief.")
    assert (content["prompt"], content["system"]) == (turns, "Be brief.")


def test_a_certain_token_has_the_integer_zero_on_the_wire(make_vertex_world: Callable[..., VertexWorld]) -> None:
    world = make_vertex_world(language_model=SyntheticModel(certain_rate=1.0))
    with authorized_session(world) as session:
        url = vertex_url(world, f"publishers/google/models/{FLASH}:generateContent")
        text = session.post(url, json=scoring_request("Why?"), timeout=10).text
    assert '"logProbability": 0}' in text
    assert '"logProbability": 0.0' not in text


def test_the_empty_token_has_no_key_and_a_turn_that_ends_at_once_has_no_parts(
    make_vertex_world: Callable[..., VertexWorld],
) -> None:
    world = make_vertex_world(language_model=SyntheticModel(eos_probability=0.999999))
    (candidate,) = ask(world, scoring_request("Why?"))["candidates"]
    assert candidate["content"] == {"role": "model"}
    assert candidate["finishReason"] == "STOP"
    (chosen,) = candidate["logprobsResult"]["chosenCandidates"]
    assert set(chosen) == {"tokenId", "logProbability"}
    assert chosen["tokenId"] == 1
    assert candidate["logprobsResult"]["topCandidates"][0]["candidates"][0] == chosen
    world.faults.eos_logprobs = "absent"
    assert "logprobsResult" not in ask(world, scoring_request("Why?"))["candidates"][0]


def test_sampling_online_gives_one_list_per_visible_token(vertex_world: VertexWorld) -> None:
    body = scoring_request("Why?", maxOutputTokens=30, seed=4)
    answer = ask(vertex_world, body)
    result = answer["candidates"][0]["logprobsResult"]
    tokens = [token.get("token", "") for token in result["chosenCandidates"]]
    assert "".join(tokens) == answer["candidates"][0]["content"]["parts"][0]["text"]
    assert len(tokens) == len(result["topCandidates"]) == answer["usageMetadata"]["candidatesTokenCount"]
    mean = np.mean([token["logProbability"] for token in result["chosenCandidates"]])
    assert answer["candidates"][0]["avgLogprobs"] == pytest.approx(mean, rel=1e-6)
    assert ask(vertex_world, body)["candidates"] == answer["candidates"]


def test_logprobs_are_absent_unless_asked_for_and_unlisted_without_a_number(vertex_world: VertexWorld) -> None:
    silent = ask(vertex_world, scoring_request("Why?", responseLogprobs=None, logprobs=None))
    assert "logprobsResult" not in silent["candidates"][0]
    bare = ask(vertex_world, scoring_request("Why?", logprobs=None))
    assert set(bare["candidates"][0]["logprobsResult"]) == {"chosenCandidates"}


def listed(answer: dict[str, Any]) -> list[float]:
    top = answer["candidates"][0]["logprobsResult"]["topCandidates"][0]["candidates"]
    return [token["logProbability"] for token in top]


def test_temperature_and_top_p_change_what_is_reported_unless_told_otherwise(
    make_vertex_world: Callable[..., VertexWorld],
) -> None:
    reshaping, plain = make_vertex_world(), make_vertex_world(reshape_logprobs=False)
    base = listed(ask(reshaping, scoring_request("Why?")))
    assert listed(ask(reshaping, scoring_request("Why?", temperature=0.5))) != base
    assert -1.2676506e30 in listed(ask(reshaping, scoring_request("Why?", topP=0.5)))
    assert -1.2676506e30 in listed(ask(reshaping, scoring_request("Why?", topK=3)))
    for changes in ({"temperature": 0.5}, {"topP": 0.5}, {"topK": 3}, {}):
        assert listed(ask(plain, scoring_request("Why?", **changes))) == base


def test_stop_sequences_end_a_response_before_them(make_vertex_world: Callable[..., VertexWorld]) -> None:
    world = make_vertex_world(faults=Faults(), language_model=SyntheticModel(eos_probability=0))
    text = ask(world, scoring_request("Why?", maxOutputTokens=20, seed=1))["candidates"][0]["content"]["parts"][0][
        "text"
    ]
    stop = text[10:14]
    stopped = ask(world, scoring_request("Why?", maxOutputTokens=20, seed=1, stopSequences=[stop]))["candidates"][0]
    # Another request hash draws other tokens, so only what the option promises is checked.
    assert stop not in stopped["content"]["parts"][0]["text"]
