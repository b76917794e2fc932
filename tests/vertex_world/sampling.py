"""P's responses, sampled from a language model with a known distribution and written as the product reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.vertex_world.language_model import Distribution, FloatArray, LanguageModel, prompt_turns
from tests.vertex_world.wire import SENTINEL, float32_json

_DRAWS = 20


class Step(NamedTuple):
    """One sampled token, as indices into the distribution: ``top`` is sorted by falling log-probability."""

    chosen: int
    top: list[int]
    distribution: Distribution

    @property
    def text(self) -> str:
        return self.distribution.texts[self.chosen]

    @property
    def ends_turn(self) -> bool:
        return self.chosen == self.distribution.eos

    def logprob(self, index: int) -> float | int:
        """As the service reports it: float32, and -2**100 for a token that was masked."""
        value = float(self.distribution.logprobs[index])
        return float32_json(value if value > -np.inf else SENTINEL)


def sample_step(distribution: Distribution, rng: np.random.Generator, top: int, *, greedy: bool = False) -> Step:
    """Draw one token and list the ``top`` most probable ones."""
    order = top_indices(distribution.logprobs, max(top, 1))
    if greedy:
        return Step(order[0], order[:top], distribution)
    cumulative = np.cumsum(np.exp(distribution.logprobs))
    chosen = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return Step(min(chosen, len(cumulative) - 1), order[:top], distribution)


def top_indices(logprobs: FloatArray, count: int) -> list[int]:
    """Indices of the ``count`` largest values, falling; equal values in order of index."""
    if count >= len(logprobs):
        return np.argsort(-logprobs, kind="stable").tolist()
    largest = np.sort(np.argpartition(-logprobs, count - 1)[:count])
    return largest[np.argsort(-logprobs[largest], kind="stable")].tolist()


def sample_responses(
    language_model: LanguageModel,
    model_name: str,
    prompt: str | Sequence[Mapping[str, str]],
    n: int,
    max_tokens: int,
    seed: int = 0,
    *,
    system: str | None = None,
    top_logprobs: int = 20,
) -> dict[str, Any]:
    """The content of one response file: ``n`` responses of ``model_name`` to ``prompt``.

    The tokens of a text are those that the tokenizer would find in it, as they mostly are in what models write: a token
    that would merge with those before it is drawn again. Log-probabilities are rounded to float32, as they come from
    the service. The end of a turn is not a position.
    """
    rng = np.random.default_rng([seed, n, max_tokens])
    turns = prompt_turns(prompt)
    responses: list[dict[str, Any]] = []
    for _ in range(n):
        steps: list[Step] = []
        finish_reason = "MAX_TOKENS"
        text = ""
        while len(steps) < max_tokens:
            known = language_model.distribution(model_name, turns, system, text)
            step = sample_step(known, rng, top_logprobs)
            for _ in range(_DRAWS):
                if step.ends_turn or language_model.count_tokens(text + step.text) == len(steps) + 1:
                    break
                step = sample_step(known, rng, top_logprobs)
            if step.ends_turn:
                finish_reason = "STOP"
                break
            steps.append(step)
            text += step.text
        responses.append(
            {
                "model": model_name,
                "text": text,
                "finish_reason": finish_reason,
                "logprobs": {"content": [_position(step) for step in steps]},
            }
        )
    asked = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    content = {"prompt": asked, "model": model_name, "responses": responses}
    return content if system is None else {**content, "system": system}


def _position(step: Step) -> dict[str, Any]:
    return {**_candidate(step, step.chosen), "top_logprobs": [_candidate(step, index) for index in step.top]}


def _candidate(step: Step, index: int) -> dict[str, Any]:
    return {
        "token": step.distribution.texts[index],
        "logprob": step.logprob(index),
        "token_id": step.distribution.ids[index],
    }


def write_response_files(
    directory: Path,
    language_model: LanguageModel,
    model_name: str,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    n: int,
    max_tokens: int,
    seed: int = 0,
    **options: Any,
) -> list[Path]:
    """Write one file per prompt (``prompt_000.json``, …; ``options`` as in `sample_responses`); returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for index, prompt in enumerate(prompts):
        content = sample_responses(language_model, model_name, prompt, n, max_tokens, seed + index, **options)
        path = directory / f"prompt_{index:03d}.json"
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        paths.append(path)
    return paths
