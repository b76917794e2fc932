"""What is asked of a response, whatever its source writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.config.comparison import Comparison
from flows.config.models import BackendChoice, RunConfig
from flows.config.templates import RunValues
from kl.input.responses import parse_responses
from kl.records import Response


def entry(token: str, token_id: int | None, logprob: float = -0.5) -> dict[str, Any]:
    fields = {"token": token, "logprob": logprob} | ({} if token_id is None else {"token_id": token_id})
    return {**fields, "top_logprobs": [fields]}


def read(*content: dict[str, Any]) -> Response:
    document = {"text": "ab", "finish_reason": "stop", "logprobs": {"content": content}}
    data = json.dumps({"prompt": "Hi", "model": "p", "responses": [document]}).encode()
    (response,) = parse_responses(data, "a.json").responses
    return response


def comparison(tmp_path: Path) -> Comparison:
    choice = BackendChoice(name="local")
    config = RunConfig(input_dir=tmp_path, output_dir=tmp_path / "out", model2="smollm2-135m", backend=choice)
    return Comparison.of(config, RunValues.of_a_dry_run())


def test_an_end_token_without_an_id_leaves_the_others_their_ids_and_keys(tmp_path: Path) -> None:
    place = comparison(tmp_path)
    content = [entry("a", 5), entry("b", 6)]
    stopped, without = read(*content, entry("<|im_end|>", None)), read(*content)
    assert stopped.has_stop
    asked, before = place.request(stopped, "q"), place.request(without, "q")
    assert asked is not None
    assert before is not None
    assert asked.token_ids is not None
    assert asked.token_ids[:2] == before.token_ids == (5, 6)
    assert asked.keys[:2] == before.keys
    assert len(asked.keys) == 3


def test_a_position_without_a_usable_list_is_not_asked(tmp_path: Path) -> None:
    content = [entry(token, number) for number, token in enumerate("ab0123456")]
    content[1]["top_logprobs"][0]["logprob"] = 3.0
    document = {"text": "ab0123456", "logprobs": {"content": content}}
    data = json.dumps({"prompt": "Hi", "model": "p", "responses": [document]}).encode()
    (response,) = parse_responses(data, "a.json").responses
    asked = comparison(tmp_path).request(response, "q")
    assert asked is not None
    assert asked.positions == (0, *range(2, 9))
