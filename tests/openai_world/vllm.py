"""A server that answers as vLLM 0.32 does (recorded in ``recorded/``), with the numbers of the numpy engine.

Only what the recordings show is imitated. `Faults` are what other servers, other flags and bad days do.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from aiohttp import web

from backends.local.models import find_model, load_model
from kl.records import Prompt, Turn

MODEL = "smol"
CONTEXT = 2048
MOST_CHOSEN = 128
_MASKED = -9999.0
_KNOWN: dict[str, dict[tuple[int, ...], np.ndarray]] = {}  # by model: what was computed, 200 kB a prefix


@dataclass
class Faults:
    """What is wrong with the server.

    Attributes
    ----------
    throttled : int
        How many of the next requests for lists are answered with 429.
    refused_after : int, optional
        From how many requests for lists on all are answered with 401.
    shift : bool
        A prompt's lists lose their first, as where a prompt is cut.
    logits, processed : bool
        ``--logprobs-mode`` raw_logits and processed_logprobs.
    nulls, clipped : bool
        The last entries of a list are null, or -9999 and -100.
    no_prompt, no_echo, no_ids : bool
        ``prompt_logprobs``, ``echo``, and prompts of ids, are ignored or refused.
    no_flags : bool
        The flags of a prefill are ignored.
    ends_turn : bool
        So are they, and one token ends a turn of the assistant, with no header after it.
    no_usage : bool
        Answers do not count tokens.
    system : str
        What the template writes into a conversation without system text.
    thinks : bool
        Chat answers of several tokens hold a thought.
    loses_tokenizer : bool
        ``no_tokenizer`` from the first answer of several tokens on.
    tidies : bool
        /detokenize leaves out blanks before punctuation.
    collide : bool
        Lists show the first letter of a token alone.
    no_chosen : bool
        ``logprob_token_ids`` are ignored.
    no_tokenizer : bool
        Neither /tokenize nor /detokenize.
    fingerprint : str
    """

    throttled: int = 0
    refused_after: int | None = None
    shift: bool = False
    logits: bool = False
    processed: bool = False
    nulls: bool = False
    clipped: bool = False
    no_prompt: bool = False
    no_echo: bool = False
    no_ids: bool = False
    no_flags: bool = False
    ends_turn: bool = False
    no_usage: bool = False
    system: str = ""
    thinks: bool = False
    loses_tokenizer: bool = False
    tidies: bool = False
    collide: bool = False
    no_tokenizer: bool = False
    no_chosen: bool = False
    fingerprint: str = "vllm-0.32.0-66d70269"


@dataclass
class VllmShaped:
    """The server, on a port of its own, until it is left; ``lists`` counts the requests for lists by prompt."""

    model: str = "smollm2-135m"
    longest: int = 20
    root: str = "MODEL_DIR"
    faults: Faults = field(default_factory=Faults)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    address: str = ""

    def __post_init__(self) -> None:
        self._model = load_model(find_model(self.model))
        self._known: dict[tuple[int, ...], np.ndarray] = _KNOWN.setdefault(self.model, {})
        self._computing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        for path, answer in {
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
        }.items():
            app.router.add_post(path, self._posted(path, answer))
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/v1"

    def asked(self, path: str = "/v1/completions") -> Counter[tuple[int, ...]]:
        """How often each prompt of ids was sent."""
        return Counter(tuple(body["prompt"]) for where, body in self.requests if where == path)

    def _posted(self, path: str, answer: Any) -> Any:
        async def handle(request: web.Request) -> web.Response:
            body = await request.json()
            self.requests.append((path, body))
            self.headers.append(dict(request.headers))
            if path.startswith("/v1") and self.faults.throttled > 0:
                self.faults.throttled -= 1
                return web.json_response({"error": {"message": "slow down", "type": "rate_limit"}}, status=429)
            if path.startswith("/v1") and self.faults.refused_after is not None:
                self.faults.refused_after -= 1
                if self.faults.refused_after < 0:
                    return web.json_response({"error": {"message": "bad key", "type": "auth"}}, status=401)
            if not path.startswith("/v1") and self.faults.no_tokenizer:
                return web.json_response({"detail": "Not Found"}, status=404)
            if body.get("model", MODEL) != MODEL:
                return _refused(f"The model `{body['model']}` does not exist.", 404, "model")
            try:
                return web.json_response(await asyncio.to_thread(answer, body))
            except _RefusedError as error:
                return _refused(str(error), 400, error.param)

        return handle

    async def _models(self, request: web.Request) -> web.Response:
        entry = {"id": MODEL, "object": "model", "created": 1, "owned_by": "vllm", "root": self.root, "parent": None}
        return web.json_response({"object": "list", "data": [entry | {"max_model_len": CONTEXT}]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    # The tokenizer.

    def _tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        if "messages" in body:
            ids = self._conversation(body)
        else:  # the name of a control token in a text is read as that token
            ids = self._model.tokenizer.encode_template(body["prompt"])
        said: dict[str, Any] = {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": None}
        return said | ({"token_strs": [self._name(index) for index in ids]} if body.get("return_token_strs") else {})

    def _name(self, index: int) -> str:
        return self._model.tokenizer._tokens[index]

    def _detokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self._text(body["tokens"])
        return {"prompt": re.sub(r" (?=[.,?!])", "", text) if self.faults.tidies else text}

    def _text(self, ids: Sequence[int]) -> str:
        return b"".join(map(self._model.tokenizer.token_bytes, ids)).decode("utf-8", "replace")

    def _conversation(self, body: dict[str, Any]) -> list[int]:
        messages = list(body["messages"])
        if self.faults.ends_turn and messages[-1]["role"] == "assistant":
            before = self._conversation({"messages": messages[:-1]})
            return [*before, *self._model.tokenizer.encode_template(messages[-1]["content"] + "<|im_end|>")]
        goes_on = bool(body.get("continue_final_message")) and not self.faults.no_flags
        begins = body.get("add_generation_prompt", True)
        if goes_on and begins:
            raise _RefusedError("Cannot set both `add_generation_prompt` and `continue_final_message` to True.", "")
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else self.faults.system or None
        last = messages.pop()["content"] if goes_on else ""
        roles = {"user": "user", "assistant": "model"}
        turns = tuple(Turn(roles[item["role"]], item["content"]) for item in messages)
        ids = self._model.template.encode(Prompt(turns, system))
        return ids + (self._model.tokenizer.encode_template(last) if last else [])

    # Completions.

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return self._model.tokenizer.encode_template(prompt)
        if self.faults.no_ids:
            raise _RefusedError("prompt must be a string", "prompt")
        if any(not 0 <= index < len(self._model.tokenizer) for index in prompt):
            raise _RefusedError("Token id is out of vocabulary", "prompt")
        return list(prompt)

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self._prompt(body)
        k, wanted = body.get("logprobs"), body.get("prompt_logprobs")
        for name, value in (("logprobs", k), ("prompt_logprobs", wanted)):
            if value is not None and value > self.longest:
                kind = "sample" if name == "logprobs" else "prompt"
                raise _RefusedError(
                    f"Requested {kind} logprobs of {value}, which is greater than max allowed: {self.longest} "
                    f"(parameter={name}, value={value})", name,
                )  # fmt: skip
        chosen = body.get("logprob_token_ids")
        if chosen is not None and len(chosen) > MOST_CHOSEN:
            raise _RefusedError(f"logprob_token_ids has {len(chosen)} ids, at most {MOST_CHOSEN}", "logprob_token_ids")
        generated, lists = self._generate(ids, body)
        choice: dict[str, Any] = {
            "index": 0,
            "text": self._text(generated),
            "logprobs": None,
            "finish_reason": self._finish(generated),
            "token_ids": generated if body.get("return_token_ids") else None,
            "prompt_logprobs": None,
            "prompt_token_ids": ids if body.get("return_token_ids") else None,
        }
        if generated and generated[-1] in self._model.tokenizer.stop_ids:
            choice["text"] = self._text(generated[:-1])
        if k is not None:
            choice["logprobs"] = self._legacy(generated, lists, k, body)
            if chosen is not None and not self.faults.no_chosen:
                given = {token: float(lists[0][token]) for token in (*generated, *chosen)}
                choice["logprobs"]["top_logprobs"] = [{self._key(token, body): v for token, v in given.items()}]
        if wanted is not None and not self.faults.no_prompt:
            choice["prompt_logprobs"] = self._prompt_lists(ids, wanted)
        if body.get("echo") and k is not None and not self.faults.no_echo:
            before = self._legacy(ids[1:], self._before(ids), k, body)
            for name, first in (
                ("tokens", self._shown(ids[0], body)),
                ("token_logprobs", None),
                ("top_logprobs", None),
            ):
                choice["logprobs"][name] = [first, *before[name], *choice["logprobs"][name]]
        return self._answer("text_completion", ids, generated, choice)

    def _answer(
        self, kind: str, ids: Sequence[int], generated: Sequence[int], choice: dict[str, Any]
    ) -> dict[str, Any]:
        self.faults.no_tokenizer |= self.faults.loses_tokenizer and len(generated) > 1
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": len(generated),
            "total_tokens": len(ids) + len(generated),
        }
        said = {
            "id": "cmpl-1", "object": kind, "created": 1, "model": MODEL, "choices": [choice],
            "system_fingerprint": self.faults.fingerprint,
        }  # fmt: skip
        return said if self.faults.no_usage else said | {"usage": usage}

    def _finish(self, generated: Sequence[int]) -> str:
        return "stop" if generated[-1] in self._model.tokenizer.stop_ids else "length"

    def _logprobs(self, ids: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        """The distribution after each of some rows; each prefix is computed once."""
        prefixes = {row: tuple(ids[: row + 1]) for row in rows}
        with self._computing:
            missing = [row for row, prefix in prefixes.items() if prefix not in self._known]
            for chunk in self._model.engine.logprobs(ids, missing) if missing else ():
                self._known |= {prefixes[row]: values for row, values in chunk}
        return [self._known[prefix] for prefix in prefixes.values()]

    def _before(self, ids: Sequence[int]) -> list[np.ndarray]:
        """The distribution before each token but the first."""
        return self._logprobs(ids, range(len(ids) - 1))

    def _generate(self, ids: Sequence[int], body: dict[str, Any]) -> tuple[list[int], list[np.ndarray]]:
        rng = np.random.default_rng(body.get("seed"))
        temperature, most = body.get("temperature", 1), body.get("max_tokens", 16)
        if len(ids) + most > CONTEXT:
            raise _RefusedError(f"This model's maximum context length is {CONTEXT} tokens.", "input_tokens")
        written: list[int] = []
        lists: list[np.ndarray] = []
        while len(written) < most:
            (values,) = self._logprobs([*ids, *written], [len(ids) + len(written) - 1])
            scaled = values.astype(np.float64) / max(temperature, 1e-9)
            weights = np.exp(scaled - scaled.max())
            token = (
                int(values.argmax()) if temperature == 0 else int(rng.choice(len(values), p=weights / weights.sum()))
            )
            written.append(token)
            lists.append(np.log(weights / weights.sum()) if self.faults.processed else values)
            if token in self._model.tokenizer.stop_ids:
                break
        return written, lists

    # Lists.

    def _best(self, values: np.ndarray, k: int, own: int) -> list[tuple[int, float | None, int]]:
        """(id, value, rank) of the k best, the own token first, beside them if it is not among them."""
        best = np.argpartition(-values, k)[:k]
        chosen = [int(index) for index in best[np.lexsort((best, -values[best]))]]
        ranks = {token: rank for rank, token in enumerate(chosen, 1)}
        if own not in ranks:
            ranks[own] = int((values > values[own]).sum()) + 1
        tokens = dict.fromkeys([own, *chosen])
        shift = 30.0 if self.faults.logits else 0.0
        found: list[tuple[int, float | None, int]] = [(t, float(values[t]) + shift, ranks[t]) for t in tokens]
        for token in chosen[-2:] if k > 2 else []:
            place = next(n for n, item in enumerate(found) if item[0] == token)
            if self.faults.nulls:
                found[place] = (token, None, found[place][2])
            if self.faults.clipped:
                found[place] = (token, _MASKED if token == chosen[-1] else -100.0, found[place][2])
        return found

    def _prompt_lists(self, ids: Sequence[int], k: int) -> list[Any]:
        lists: list[Any] = [None]
        for own, values in zip(ids[1:], self._before(ids), strict=True):
            lists.append(
                {
                    str(token): {"logprob": value, "rank": rank, "decoded_token": self._plain(token)}
                    for token, value, rank in self._best(values, k, own)
                }
            )
        return [None, *lists[2:]] if self.faults.shift else lists

    def _legacy(
        self, tokens: Sequence[int], lists: Sequence[np.ndarray], k: int, body: dict[str, Any]
    ) -> dict[str, Any]:
        found = [self._best(values, k, own) for own, values in zip(tokens, lists, strict=True)]
        return {
            "text_offset": [0] * len(tokens),
            "token_logprobs": [items[0][1] for items in found],
            "tokens": [self._shown(token, body) for token in tokens],
            # By text: those that share one are one entry.
            "top_logprobs": [{self._key(token, body): value for token, value, _ in items} for items in found],
        }

    def _shown(self, token: int, body: dict[str, Any]) -> str:
        return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self._plain(token)

    def _key(self, token: int, body: dict[str, Any]) -> str:
        shown = self._shown(token, body)
        return shown.strip().lower()[:1] if self.faults.collide else shown

    def _plain(self, token: int) -> str:
        return self._model.tokenizer.token_bytes(token).decode("utf-8", "ignore")

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self._conversation(body)
        generated, lists = self._generate(ids, body)
        k = body.get("top_logprobs", 0)
        if k > self.longest:
            raise _RefusedError(
                f"Requested sample logprobs of {k}, which is greater than max allowed: {self.longest}", ""
            )
        content: list[dict[str, Any]] = []
        for token, values in zip(generated, lists, strict=True):
            items = [self._chat_entry(each, value, body) for each, value, _ in self._best(values, k, token)[:k]]
            content.append(self._chat_entry(token, float(values[token]), body) | {"top_logprobs": items})
        said = generated[:-1] if generated[-1] in self._model.tokenizer.stop_ids else generated
        thought = "Let me see." if self.faults.thinks and len(generated) > 1 else None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self._text(said), "reasoning": thought},
            "logprobs": {"content": content},
            "finish_reason": self._finish(generated),
        }
        return self._answer("chat.completion", ids, generated, choice)

    def _chat_entry(self, token: int, value: float | None, body: dict[str, Any]) -> dict[str, Any]:
        shown = self._shown(token, body)
        return {"token": shown, "logprob": value, "bytes": list(shown.encode())}


class _RefusedError(Exception):
    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def _refused(message: str, status: int, param: str) -> web.Response:
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    error = {"message": message, "type": kind, "param": param, "code": status}
    return web.json_response({"error": error}, status=status)
