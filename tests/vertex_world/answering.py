"""From a validated request to an answer: what the model itself does, the same online and in a batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from tests.vertex_world.faults import Faults
from tests.vertex_world.language_model import Distribution, FloatArray, LanguageModel
from tests.vertex_world.ledger import Ledger
from tests.vertex_world.models import MODELS, ModelSpec
from tests.vertex_world.sampling import Step, sample_step, top_indices
from tests.vertex_world.validation import check_model, parse_request
from tests.vertex_world.wire import SENTINEL, ApiError, canonical_request_hash, float32_json, now, rfc3339

Channel = Literal["online", "batch", "developer"]
DAILY_QUOTA = "Resource exhausted: the daily limit of logprobs requests for this model has been reached."
DAILY_LIMIT = "LogprobsRequestsPerDayPerProjectPerBaseModel"
_DEFAULT_TOP_P = 0.95  # of the service, when a request names none
_DEFAULT_MAX_TOKENS = 256
_CACHE_BLOCK, _CACHED_RATE = 128, 0.2  # of counts that leave out what was in a cache
_THOUGHT_TOKENS = 64


class Answer(NamedTuple):
    """The body of an answer, and the hash of its request."""

    response: dict[str, Any]
    request_hash: str


@dataclass
class Service:
    """The models behind all endpoints.

    ``reshape_logprobs`` says whether temperature, topP and topK also change the log-probabilities that are reported.
    Nobody has settled what the service does, so the harsher case is the default: a caller who wants the model's own
    probabilities sends temperature 1, topP 1 and no topK.
    """

    language_model: LanguageModel
    models: dict[str, ModelSpec]
    faults: Faults
    ledger: Ledger
    reshape_logprobs: bool = True

    def resolve(self, model: str, location: str, where: str) -> ModelSpec:
        """The model of that name in that location, or 404."""
        spec = {**MODELS, **self.models}.get(model)
        if spec is None or spec.shut or (spec.locations is not None and location not in spec.locations):
            message = (
                f"Publisher Model `{where}` was not found or your project does not have access to it. Please ensure "
                "you are using a valid model version. For more information, see: "
                "https://cloud.google.com/vertex-ai/generative-ai/docs/learn/model-versions"
            )
            raise ApiError(404, message)
        return spec

    def parse(self, spec: ModelSpec, model: str, body: Any, channel: Channel) -> dict[str, Any]:
        """Check a request against the schema and the model; returns it in canonical spelling."""
        request = parse_request(body)
        config = request.get("generationConfig", {})
        if channel == "developer" and config.get("responseLogprobs") and not spec.developer_logprobs:
            raise ApiError(400, f"Logprobs is not enabled for models/{model}")
        check_model(spec, request)
        return request

    def answer(self, spec: ModelSpec, model: str, request: dict[str, Any], channel: Channel) -> Answer:
        """Answer a parsed request, or raise the `ApiError` that a fault gives it."""
        request_hash = canonical_request_hash(model, request)
        attempt = self.ledger.next_attempt(request_hash)
        faults = self.faults
        if faults.hits(faults.failing_rate, "failing", request_hash):
            raise faults.error(400, "Request contains an invalid argument.")
        if channel == "batch" and faults.hits(faults.row_error_rate, "row_error", request_hash, attempt):
            raise faults.error(429)
        if faults.hits(faults.blocked_rate, "blocked", request_hash):
            return Answer(self._blocked(spec, request), request_hash)
        quota = faults.logprobs_daily_quota
        left = quota.get(model) if isinstance(quota, dict) else quota
        wants_logprobs = request.get("generationConfig", {}).get("responseLogprobs")
        if wants_logprobs and not self.ledger.take_logprobs_quota(model, left):
            faults.count("logprobs_daily_quota")
            if faults.quota_sentence is not None:
                raise ApiError(429, faults.quota_sentence)
            raise faults.error(429, DAILY_QUOTA, DAILY_LIMIT)
        seen = self._as_seen(request)
        return Answer(self._generate(spec, model, seen, request_hash, attempt, channel), request_hash)

    def count_tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of countTokens."""
        total = self._prompt_tokens(body)
        characters = sum(len(text) for text in _texts(body))
        return {
            "totalTokens": total,
            "totalBillableCharacters": characters,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": total}],
        }

    def _prompt_tokens(self, request: dict[str, Any]) -> int:
        count = sum(self.language_model.count_tokens(text) for text in _texts(request))
        if request.get("contents", [{}])[-1].get("role") != "model":
            return count
        prefix = _joined(request["contents"][-1])
        return count + self.faults.turn_header - sum(prefix.count(merged) for merged in self.faults.merges)

    def _as_seen(self, request: dict[str, Any]) -> dict[str, Any]:
        """The request as it reaches the model."""
        *turns, last = request["contents"]
        text = _joined(last)
        if last.get("role") != "model" or not text[-1:].isspace():
            return request
        if self.faults.refuses_white_space:
            raise self.faults.error(400, "The last turn cannot end with trailing white space.")
        if not self.faults.trims_prefill:
            return request
        self.faults.count("trims_prefill")
        kept = [{**last, "parts": [{"text": text.rstrip()}]}] if text.strip() else []
        return {**request, "contents": [*turns, *kept]}

    def _blocked(self, spec: ModelSpec, request: dict[str, Any]) -> dict[str, Any]:
        tokens = self._prompt_tokens(request)
        return {
            "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
            "usageMetadata": {"promptTokenCount": tokens, "totalTokenCount": tokens},
            **self._tail(spec),
        }

    def _tail(self, spec: ModelSpec) -> dict[str, Any]:
        number = self.ledger.next_answer()
        limit = self.faults.model_version_change_after
        changed = limit is not None and number >= limit
        if changed:
            self.faults.count("model_version_change")
        return {
            "modelVersion": f"{spec.version}-002" if changed else spec.version,
            "createTime": rfc3339(now()),
            "responseId": hashlib.blake2b(str(number).encode(), digest_size=12).hexdigest(),
        }

    def _generate(
        self,
        spec: ModelSpec,
        model: str,
        request: dict[str, Any],
        request_hash: str,
        attempt: int,
        channel: Channel,
    ) -> dict[str, Any]:
        config = request.get("generationConfig", {})
        budget = config.get("maxOutputTokens", _DEFAULT_MAX_TOKENS)
        thinks = _thinks(spec, config) or self.faults.hits(self.faults.thoughts_rate, "thoughts", request_hash)
        thoughts = min(budget, _THOUGHT_TOKENS) if thinks else 0
        seed = config.get("seed", attempt)
        candidates: list[dict[str, Any]] = []
        visible = 0
        for index in range(config.get("candidateCount", 1)):
            rng = np.random.default_rng([int(request_hash[:12], 16), seed & 0xFFFFFFFF, index])
            steps, finish_reason = self._decode(model, request, budget - thoughts, rng, request_hash)
            visible += sum(not step.ends_turn for step in steps)
            candidate = self._candidate(steps, finish_reason, config, request_hash, attempt, channel)
            candidates.append({**candidate, "index": index} if index else candidate)
        answer = {
            "candidates": candidates,
            "usageMetadata": self._usage(request, request_hash, visible, thoughts, channel),
            **self._tail(spec),
        }
        if self.faults.extra_fields:
            self.faults.count("extra_fields")
            answer = {"serviceTier": "STANDARD", **answer}
            answer["usageMetadata"]["futureTokenCount"] = 0
            answer["candidates"][0]["groundingScore"] = 0.5
        return answer

    def _decode(
        self, model: str, request: dict[str, Any], budget: int, rng: np.random.Generator, request_hash: str
    ) -> tuple[list[Step], str]:
        """Sample up to ``budget`` tokens. A first token that ends the turn is returned as the only step."""
        config = request.get("generationConfig", {})
        turns = [(turn.get("role", "user"), _joined(turn)) for turn in request["contents"]]
        prefix = turns.pop()[1] if turns[-1][0] == "model" else ""
        for merged in self.faults.merges:
            prefix = prefix.replace(merged, f"\0{merged}")
        system = _joined(request["systemInstruction"]) if "systemInstruction" in request else None
        steps: list[Step] = []
        text = ""
        while len(steps) < budget:
            known = self.language_model.distribution(model, turns, system, prefix + text)
            step = self._step(known, config, rng, request_hash)
            if step.ends_turn:
                always = self.faults.eos_logprobs == "always"
                return [*steps, step] if always or not steps else steps, "STOP"
            steps.append(step)
            text += step.text
            if any(stop in text for stop in config.get("stopSequences", [])):
                return steps, "STOP"
        return steps, "MAX_TOKENS"

    def _step(self, known: Distribution, config: dict[str, Any], rng: np.random.Generator, request_hash: str) -> Step:
        shaped = known._replace(logprobs=_reshaped(known.logprobs, config))
        top = config.get("logprobs", 0)
        step = sample_step(shaped, rng, top, greedy=config.get("temperature", 1) == 0)
        if top and self.faults.hits(self.faults.chosen_absent_rate, "chosen_absent", request_hash):
            outside = top_indices(shaped.logprobs, top + 1)[-1]
            step = step._replace(chosen=outside)
        if self.reshape_logprobs:
            return step
        return step._replace(distribution=known, top=top_indices(known.logprobs, top) if top else [])

    def _candidate(
        self,
        steps: list[Step],
        finish_reason: str,
        config: dict[str, Any],
        request_hash: str,
        attempt: int,
        channel: Channel,
    ) -> dict[str, Any]:
        text = "".join(step.text for step in steps)
        content: dict[str, Any] = {"role": "model"}
        if text:
            content["parts"] = [{"text": _cut(text, config.get("stopSequences", []))}]
        candidate: dict[str, Any] = {"content": content, "finishReason": finish_reason}
        if not steps:
            return candidate
        mean = sum(step.logprob(step.chosen) for step in steps) / len(steps)
        candidate["avgLogprobs"] = float32_json(mean)
        if channel == "batch":
            candidate["score"] = float32_json(mean * len(steps))
        if config.get("responseLogprobs") and not self._withheld(steps, request_hash, attempt):
            is_short = len(steps) > 1 and self.faults.hits(self.faults.short_lists_rate, "short_lists", request_hash)
            listed = steps[:-1] if is_short else steps
            candidate["logprobsResult"] = self._logprobs(listed, bool(config.get("logprobs")), request_hash)
        return candidate

    def _withheld(self, steps: list[Step], request_hash: str, attempt: int) -> bool:
        if self.faults.eos_logprobs == "absent" and steps[0].ends_turn:
            self.faults.count("eos_logprobs")
            return True
        return self.faults.hits(self.faults.no_logprobs_rate, "no_logprobs", request_hash, attempt)

    def _logprobs(self, steps: list[Step], listed: bool, request_hash: str) -> dict[str, Any]:
        result: dict[str, Any] = {"chosenCandidates": [_token(step, step.chosen) for step in steps]}
        if not listed:
            return result
        lists = [[_token(step, index) for index in step.top] for step in steps]
        if self.faults.hits(self.faults.sentinel_rate, "sentinel", request_hash):
            for tokens in lists:
                for token in tokens[-3:]:
                    token["logProbability"] = float32_json(SENTINEL)
        if self.faults.padded_lists:
            lists = [[*tokens, {"logProbability": float32_json(SENTINEL)}, {"tokenId": 0}] for tokens in lists]
        result["topCandidates"] = [{"candidates": tokens} for tokens in lists]
        return result

    def _usage(
        self, request: dict[str, Any], request_hash: str, visible: int, thoughts: int, channel: Channel
    ) -> dict[str, Any]:
        prompt = self._prompt_tokens(request)
        if self.faults.counts == "constant":
            prompt = self.language_model.count_tokens(_joined(request["contents"][0]))
        elif self.faults.counts == "uncached" and self.faults.draw("cached", request_hash) < _CACHED_RATE:
            prompt -= _CACHE_BLOCK
        usage: dict[str, Any] = {
            "promptTokenCount": prompt,
            "totalTokenCount": prompt + visible + thoughts,
            "trafficType": "ON_DEMAND",
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": prompt}],
        }
        if self.faults.counts == "absent":
            del usage["promptTokenCount"]
        if visible:
            usage["candidatesTokenCount"] = visible
            usage["candidatesTokensDetails"] = [{"modality": "TEXT", "tokenCount": visible}]
        if thoughts:
            usage["thoughtsTokenCount"] = thoughts
        if channel == "batch":
            usage["billablePromptUsage"] = {"textCount": sum(map(len, _texts(request)))}
        return usage


def _thinks(spec: ModelSpec, config: dict[str, Any]) -> bool:
    thinking = config.get("thinkingConfig", {})
    if "thinkingLevel" in thinking:
        return True
    return thinking.get("thinkingBudget", -1 if spec.thinking in {"on", "forced"} else 0) != 0


def _reshaped(logprobs: FloatArray, config: dict[str, Any]) -> FloatArray:
    """After temperature, topK and topP, in this order; what is cut off is -inf."""
    temperature = config.get("temperature", 1)
    shaped = logprobs / temperature if temperature not in {0, 1} else logprobs
    if shaped is not logprobs:
        shaped = shaped - np.log(np.exp(shaped - shaped.max()).sum()) - shaped.max()
    top_k = int(config.get("topK", 0))
    top_p = config.get("topP", _DEFAULT_TOP_P)
    if not top_k and top_p >= 1:
        return shaped
    order = np.argsort(-shaped, kind="stable")
    keep = len(order) if not top_k else top_k
    if top_p < 1:
        keep = min(keep, int(np.searchsorted(np.cumsum(np.exp(shaped[order])), top_p)) + 1)
    cut = np.full_like(shaped, -np.inf)
    kept = order[:keep]
    cut[kept] = shaped[kept] - np.log(np.exp(shaped[kept]).sum())
    return cut


def _token(step: Step, index: int) -> dict[str, Any]:
    text = step.distribution.texts[index]
    token: dict[str, Any] = {"token": text} if text else {}  # proto JSON leaves out an empty string
    return {**token, "tokenId": step.distribution.ids[index], "logProbability": step.logprob(index)}


def _joined(content: dict[str, Any]) -> str:
    return "".join(part["text"] for part in content["parts"])


def _texts(request: dict[str, Any]) -> list[str]:
    system = [request["systemInstruction"]] if "systemInstruction" in request else []
    return [_joined(content) for content in (*request.get("contents", []), *system)]


def _cut(text: str, stops: list[str]) -> str:
    return text[: min([text.index(stop) for stop in stops if stop in text], default=len(text))]
