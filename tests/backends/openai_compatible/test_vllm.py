"""Prompt mode, and what goes wrong with it, over HTTP against a server whose numbers are the numpy engine's."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import UNREAD, Sample, SampleRequest, ScoreRequest
from backends.errors import ConfigError, ModelNotUsableError
from backends.openai_compatible.answers import Entry, may_lack
from backends.openai_compatible.backend import OpenAICompatibleBackend
from backends.openai_compatible.options import OpenAICompatibleOptions
from backends.settings import SampleSettings
from kl.columns import TopLists
from kl.records import Score, ScoreFailure
from tests.openai_world import vllm as stand_in
from tests.openai_world.asking import PROMPT, Results, asked, box, discovered, reference, request_of
from tests.openai_world.vllm import Faults, VllmShaped

RECORDED = Path(stand_in.__file__).parent / "recorded"
TEXT = "It looks blue 🌊."


@pytest.fixture
def server() -> Iterator[VllmShaped]:
    with VllmShaped() as server:
        yield server


def options(server: VllmShaped, **more: Any) -> dict[str, Any]:
    return {"base_url": server.address, "retry_deadline_s": 20, **more}


def values(results: list[Score | ScoreFailure]) -> list[list[float | None]]:
    assert all(isinstance(result, Score) for result in results), results
    return [[item.logprob for item in result.top] for result in results if isinstance(result, Score)]


def sampled(options: dict[str, Any], n: int = 1, **settings: Any) -> list[Any]:
    """A few responses of three tokens."""

    async def work() -> list[Any]:
        async with OpenAICompatibleBackend(OpenAICompatibleOptions(**options)) as backend:
            asked_for = SampleSettings(**{"max_tokens": 3, "top_logprobs": 4, **settings})
            return [
                item
                async for item in backend.sample(
                    [SampleRequest(f"k{i}", "one", "smol", PROMPT, asked_for, i) for i in range(n)]
                )
            ]

    return asyncio.run(work())


def reasons(results: list[Score | ScoreFailure]) -> set[str]:
    return {result.reason for result in results if isinstance(result, ScoreFailure)}


def test_prompts_are_counted_with_their_template(server: VllmShaped) -> None:
    found = discovered(options(server))
    long = replace(PROMPT, system="You are a careful teacher.")

    async def work() -> Any:
        async with OpenAICompatibleBackend(found) as backend:
            return await backend.count_prompt_tokens("smol", [PROMPT, long])

    template = box().template
    assert asyncio.run(work()) == [len(template.encode(PROMPT)), len(template.encode(long))]


@pytest.mark.parametrize(
    "name",
    [
        "vllm_completions_prompt_logprobs",
        "vllm_completions_logprobs_ids",
        "vllm_tokenize_text",
        "vllm_tokenize_chat_prefill",
        "vllm_chat_prefill",
        "vllm_chat_prefill_without_flags",
        "vllm_partial_utf8_prompt_logprobs",
        "vllm_error_logprobs_21",
    ],
)
def test_the_server_answers_as_vllm_did(server: VllmShaped, name: str) -> None:
    recorded = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    body = recorded["request"]["body"] | ({"temperature": 0} if "temperature" in recorded["request"]["body"] else {})
    call = urllib.request.Request(
        server.address.removesuffix("/v1") + recorded["request"]["path"],
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(call) as answer:
            said = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = json.loads(error.read())
    if name == "vllm_chat_prefill_without_flags":  # another token was drawn, which stands in the list
        said, recorded["response"] = said["usage"], recorded["response"]["usage"]
    _assert_within(said, recorded["response"])


_BY_CHANCE = {"id", "created", "text", "message", "token_ids", "token", "bytes", "decoded_token"}


def _assert_within(said: Any, recorded: Any) -> None:
    """What is said was recorded, to float32's rounding; which token was drawn aside."""
    if isinstance(said, dict):
        for name in said.keys() - _BY_CHANCE:
            _assert_within(said[name], recorded[name])
    elif isinstance(said, list):
        assert len(said) == len(recorded)
        for one, other in zip(said, recorded, strict=True):
            _assert_within(one, other)
    elif isinstance(said, float) or (isinstance(said, int) and said > 1000):  # ranks of improbable tokens differ by one
        assert said == pytest.approx(recorded, abs=1e-3, rel=1e-3)
    else:
        assert said == recorded


def test_all_positions_are_one_request_and_agree_with_the_numpy_engine(server: VllmShaped) -> None:
    request = request_of(TEXT)
    results, report = asked(options(server), [request])
    for found, expected in zip(values(results), reference(request), strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
    assert report["servers"]["smol"]["mode"] == "prompt_logprobs"
    assert report["calls"] == {"answered": 1}
    counts = [result.input_tokens for result in results if isinstance(result, Score)]
    assert counts[:-1] == [None] * (len(counts) - 1)
    (sent,) = [prompt for prompt in server.asked() if len(prompt) == counts[-1]]
    assert list(sent[-len(counts) : -1]) == list(request.token_ids or ())[:-1]


def test_position_by_position_and_by_prefill_the_lists_are_the_same(server: VllmShaped) -> None:
    request = request_of("It looks blue", ids=None)
    expected = reference(request)
    for mode, places in (("ids", 4), ("prefill", 4)):
        results, report = asked(options(server, mode=mode), [request])
        assert report["servers"]["smol"]["mode"] == mode
        for found, best in zip(values(results), expected, strict=True):
            # In a chat list the sampled token may stand in place of the last.
            assert found[:places] == pytest.approx(best[:places], abs=1e-3)


def test_a_model_that_only_writes_is_never_q(server: VllmShaped) -> None:
    server.faults = Faults(no_flags=True, no_tokenizer=True)
    complete = discovered(options(server, mode="write"))
    with pytest.raises(ModelNotUsableError, match="cannot be Q"):
        OpenAICompatibleBackend.identity(complete, request_of("It"))

    async def work() -> Any:
        async with OpenAICompatibleBackend(complete) as backend:
            request = SampleRequest("k", "one", "smol", PROMPT, SampleSettings(max_tokens=3, top_logprobs=4))
            return [item async for item in backend.sample([request])]

    (sample,) = asyncio.run(work())
    assert isinstance(sample, Sample), sample
    assert "".join(position.sampled.token for position in sample.response.positions) == sample.response.text


def test_a_written_list_holds_no_sampled_token_in_place_of_its_last(server: VllmShaped) -> None:
    samples = sampled(options(server, mode="write"), 3, temperature=1.5, max_tokens=6, top_logprobs=3)
    positions = [position for sample in samples for position in sample.response.positions]
    assert {len(item.top) for item in positions} == {2, 3}
    assert not any(item.top[-1].token == item.sampled.token for item in positions if len(item.top) == 3)


def test_missing_prefill_flags_are_found_out(server: VllmShaped) -> None:
    server.faults = Faults(no_flags=True)
    with pytest.raises(ModelNotUsableError, match="the turn is ended"):
        discovered(options(server, mode="prefill"))


@pytest.mark.parametrize(
    ("faults", "message"),
    [(Faults(ends_turn=True), "the turn is ended"), (Faults(no_usage=True), "do not count")],
    ids=["ends_turn", "no_usage"],
)
def test_a_turn_that_one_token_ends_is_no_prefill(server: VllmShaped, faults: Faults, message: str) -> None:
    server.faults = faults
    with pytest.raises(ModelNotUsableError, match=message):
        discovered(options(server, mode="prefill"))


def test_an_echo_that_is_ignored_is_refused(server: VllmShaped) -> None:
    server.faults = Faults(no_tokenizer=True, no_echo=True)
    with pytest.raises(ModelNotUsableError, match="echo is ignored"):
        discovered(options(server, mode="prompt", template="none"))


def test_lists_whose_texts_collide_are_no_scores(server: VllmShaped) -> None:
    server.faults = Faults(no_tokenizer=True)
    complete = discovered(options(server, mode="prompt", template="none")).model_dump()
    request = request_of(" is blue", ids=None)
    results, report = asked(complete, [request])
    assert report["servers"]["smol"]["mode"] == "echo"
    assert len(values(results)) == 2
    by_one = discovered(options(server, mode="ids", template="none")).model_dump()
    server.faults = Faults(no_tokenizer=True, collide=True)
    results, _ = asked(complete, [request])
    assert reasons(results) == {"colliding-texts"}
    assert any(position.may_lack for sample in sampled(by_one, 3) for position in sample.response.positions)


def test_a_list_by_texts_is_whole_or_may_lack_entries() -> None:
    def lacks(texts: str, own: str, k: int = 3) -> bool:
        entries = [Entry(None, text, None, -1.0 - number) for number, text in enumerate(texts)]
        return may_lack(entries, Entry(None, own, None, None), k)

    assert [lacks("abc", "a"), lacks("abc", "z"), lacks("abcz", "z")] == [False] * 3
    assert [lacks("ab", "a"), lacks("abz", "z")] == [True] * 2
    assert not may_lack([Entry(7, "", None, -1.0)], Entry(7, "", None, -1.0), 3)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (Faults(logits=True), "above 0"),
        (Faults(shift=True), "cut or shifted"),
        (Faults(no_prompt=True), "ignores them"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str([n for n, v in vars(value).items() if v is True]),
)
def test_a_server_whose_lists_are_none_is_refused_in_one_line(server: VllmShaped, faults: Faults, message: str) -> None:
    server.faults = faults
    with pytest.raises(ModelNotUsableError, match=message) as raised:
        discovered(options(server, mode="prompt"))
    assert "\n" not in str(raised.value)
    assert raised.value.permanent


def test_values_after_sampling_are_noticed(server: VllmShaped) -> None:
    server.faults = Faults(processed=True)
    found = discovered(options(server, mode="ids")).found
    assert found is not None
    assert found.after_sampling
    found = discovered(options(server, mode="prompt")).found
    assert found is not None
    assert (found.after_sampling, found.writes_after_sampling) == (False, True)
    assert sampled(options(server), temperature=0.5)[0].reason == "after-sampling"
    (sample,) = sampled(options(server))
    assert isinstance(sample, Sample), sample
    assert {(body["top_k"], body["repetition_penalty"]) for path, body in server.requests if "/v1/" in path} == {
        (-1, 1)
    }


def test_a_prompt_that_is_cut_later_is_a_failure_and_no_score(server: VllmShaped) -> None:
    complete = discovered(options(server)).model_dump()
    server.faults = Faults(shift=True)
    results, _ = asked(complete, [request_of(TEXT)])
    assert reasons(results) == {"cut-prompt"}
    assert not any(isinstance(result, Score) for result in results)


@pytest.mark.parametrize("fault", ["nulls", "clipped"])
def test_values_that_are_none_are_dropped_and_counted(server: VllmShaped, fault: str) -> None:
    complete = discovered(options(server)).model_dump()
    server.faults = Faults(**{fault: True})
    request = request_of("It looks blue")
    results, _ = asked(complete, [request])
    assert {result.n_dropped for result in results if isinstance(result, Score)} == {2}
    for found, expected in zip(values(results), reference(request, 3), strict=True):
        assert found == pytest.approx(expected, abs=1e-3)


def test_throttled_calls_are_repeated_and_nothing_is_lost(server: VllmShaped) -> None:
    complete = discovered(options(server)).model_dump()
    server.faults = Faults(throttled=3)
    results, report = asked(complete, [request_of("It looks blue")])
    assert len(values(results)) == 3
    assert report["calls"] == {"answered": 1, "throttled": 3}


def test_a_key_that_is_refused_ends_the_asking(server: VllmShaped, caplog: pytest.LogCaptureFixture) -> None:
    complete = discovered(options(server, mode="ids", max_concurrent=2, retry_deadline_s=1)).model_dump()
    n_before, server.faults = len(server.requests), Faults(refused_after=2)
    results, report = asked(complete, [request_of("It looks blue" + " and blue" * 30)])
    assert len(results) > 50
    assert reasons(results) == {"not-asked"}
    assert len(values([result for result in results if isinstance(result, Score)])) == 2
    assert report["calls"]["refused"] <= 4
    asked_for = [path for path, _ in server.requests[n_before:] if path.startswith("/v1")]
    assert len(asked_for) <= 2 + 4 + 5, "and the tiny requests of a second"
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith("smol refuses every call (completions: 401 auth: bad key)")


def test_an_answer_of_another_server_is_refused(server: VllmShaped) -> None:
    complete = discovered(options(server)).model_dump()
    server.faults = Faults(fingerprint="vllm-0.33.0-other")
    results, _ = asked(complete, [request_of("It looks blue")])
    assert reasons(results) == {"server-changed"}


def test_another_model_behind_one_name_has_another_identity(tmp_path: Path) -> None:
    def identity(model: str) -> dict[str, Any]:
        with VllmShaped(model=model) as server:
            server_options = discovered({"base_url": server.address}, tmp_path)
            return OpenAICompatibleBackend.identity(server_options, request_of("It", ids=None))

    assert identity("smollm2-135m") == identity("smollm2-135m") != identity("smollm2-135m@int3")


def test_what_is_on_record_serves_while_the_server_is_away(server: VllmShaped, tmp_path: Path) -> None:
    found = discovered(options(server), tmp_path).found
    n_proofs = len(server.requests)
    assert discovered(options(server), tmp_path).found == found
    assert len(server.requests) - n_proofs < n_proofs / 2
    address = server.address
    server.faults = Faults(throttled=10**9)
    assert discovered({"base_url": address, "retry_deadline_s": 0.5}, tmp_path).found == found


def test_the_limit_of_lists_is_found_and_said(server: VllmShaped) -> None:
    complete = discovered(options(server))
    assert complete.found is not None
    assert complete.found.longest == 20
    with pytest.raises(
        ModelNotUsableError, match=r"top_logprobs is 21, and the server gives lists of 20.*--max-logprobs"
    ):
        asked(complete.model_dump(), [request_of("It", k=21)])


def test_a_longer_context_and_longer_lists_after_a_restart_are_seen(
    server: VllmShaped, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    request = request_of("one two three four five six seven eight nine ten " * 6)
    monkeypatch.setattr(stand_in, "CONTEXT", 80)
    results, _ = asked(options(server), [request], tmp_path)
    failed = [result for result in results if isinstance(result, ScoreFailure)]
    assert {(result.reason, result.final) for result in failed} == {("context-too-long", False)}
    assert values(results[: len(results) - len(failed)])
    monkeypatch.setattr(stand_in, "CONTEXT", 200)
    server.longest = 30
    results, report = asked(options(server), [request], tmp_path)
    assert len(values(results)) == len(request.keys)
    assert report["servers"]["smol"]["longest_list"] == 30


@pytest.mark.parametrize("change", ["root", "template"])
def test_what_preflight_compares_decides_which_record_serves(server: VllmShaped, change: str, tmp_path: Path) -> None:
    async def planned_and_checked() -> Any:
        async with OpenAICompatibleBackend(OpenAICompatibleOptions(**options(server)), state_dir=tmp_path) as backend:
            complete = await backend.discover("smol")
        async with OpenAICompatibleBackend(complete, state_dir=tmp_path) as backend:
            assert await backend.preflight("smol")
        return OpenAICompatibleBackend.identity(complete, request_of("It", ids=None))

    before = asyncio.run(planned_and_checked())
    if change == "root":
        server.root = "ANOTHER_DIR"
    else:
        server.faults = Faults(system="Today is the 27th.")
    after = asyncio.run(planned_and_checked())
    assert after != before
    assert asyncio.run(planned_and_checked()) == after


def test_a_tokenizer_that_tidies_blanks_names_no_candidates(server: VllmShaped) -> None:
    server.faults = Faults(tidies=True)
    results, report = asked(options(server), [request_of("The sky", ids=None)])
    assert report["servers"]["smol"]["mode"] == "prefill"
    candidates = [item for result in results if isinstance(result, Score) for item in result.top]
    assert candidates
    assert all(item.token and item.token_id is None for item in candidates)
    assert not any("return_tokens_as_token_ids" in body for _, body in server.requests)


def test_ids_of_another_vocabulary_are_not_fed(server: VllmShaped) -> None:
    right, _ = asked(options(server), [request_of("It looks blue")])
    other, _ = asked(options(server), [request_of("It looks blue", ids=(5, 6, 7))])
    assert values(other) == values(right)


def test_a_key_is_sent_and_shown_nowhere(server: VllmShaped, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1234567890")
    complete = discovered(options(server, api_key_env="MY_KEY"), tmp_path)
    assert "sk-secret-1234567890" in server.headers[-1]["Authorization"]
    records = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "sk-secret" not in complete.model_dump_json() + records


def with_wanted(request: ScoreRequest, known: Results) -> ScoreRequest:
    """The request for the tokens of longer lists by name."""
    lists = [[item._replace(logprob=None) for item in result.top] for result in known if isinstance(result, Score)]
    assert len(lists) == len(request.keys)
    return replace(request, wanted=TopLists.of(lists))


@pytest.mark.parametrize("mode", ["prompt", "ids"])
def test_tokens_asked_for_by_name_have_their_values(server: VllmShaped, mode: str) -> None:
    server.longest = 40
    found = options(server, mode=mode)
    longer, _ = asked(found, [request_of(TEXT, k=30)])
    results, _ = asked(found, [with_wanted(request_of(TEXT, k=4), longer)])
    for result, known in zip(results, longer, strict=True):
        assert isinstance(result, Score)
        assert isinstance(known, Score)
        assert result.top == known.top[:4]
        assert {item.token_id: item.logprob for item in result.wanted} == {
            item.token_id: item.logprob for item in known.top[4:]
        }
        assert [item.token for item in result.wanted] == [item.token for item in known.top[4:]]


def test_a_server_that_ignores_tokens_asked_for_by_name_gives_no_score(server: VllmShaped) -> None:
    longer, _ = asked(options(server), [request_of(TEXT, k=20)])
    server.faults.no_chosen = True
    results, _ = asked(options(server), [with_wanted(request_of(TEXT, k=4), longer)])
    assert not any(isinstance(result, Score) for result in results)
    assert reasons(results) == {"wanted-ignored"}


class Stopping(list[tuple[str, dict[str, Any]]]):
    """Requests, at the first of which for a list the backend is told to make no more."""

    backend: OpenAICompatibleBackend | None = None

    def append(self, request: tuple[str, dict[str, Any]]) -> None:
        super().append(request)
        if self.backend is not None and request[0] == "/v1/completions":
            self.backend.stop_asking("the disk takes no more")
            self.backend = None


def test_an_answer_in_flight_is_completed_by_its_tokens_when_no_more_is_asked(server: VllmShaped) -> None:
    found = OpenAICompatibleOptions(**options(server, mode="ids", max_concurrent=1))
    longer, _ = asked(found.model_dump(), [request_of(TEXT, k=20)])
    request = with_wanted(request_of(TEXT, k=4), longer)

    async def work() -> list[Score | ScoreFailure]:
        async with OpenAICompatibleBackend(found) as backend:
            await backend.discover("smol")
            server.requests = requests = Stopping()
            requests.backend = backend
            return [result async for result in backend.score([request])]

    results = asyncio.run(work())
    (score,) = (result for result in results if isinstance(result, Score))
    assert len(score.wanted) == 16
    assert reasons(results) == {"not-asked"}
    assert [path for path, _ in server.requests].count("/v1/completions") == 2


def test_a_server_that_cannot_be_asked_by_name_ends_the_run_in_one_line(server: VllmShaped) -> None:
    longer, _ = asked(options(server), [request_of(TEXT, k=20)])
    with pytest.raises(ConfigError, match=r"wanted_tokens is on, but this server \(vllm, asked by text\)"):
        asked(options(server, mode="prefill"), [with_wanted(request_of(TEXT, k=4), longer)])


def test_credentials_are_in_no_address_and_in_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://user:sekret@127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="no credentials") as raised:
        _ = OpenAICompatibleOptions().address
    assert "sekret" not in str(raised.value)
    for name, text in (("Ocp-Apim-Subscription-Key", "abc123456"), ("Authorization", "Bearer sk-1 ${X}")):
        with pytest.raises(ValueError, match="looks like a credential"):
            OpenAICompatibleOptions(headers={name: text})
    assert OpenAICompatibleOptions(headers={"Authorization": "Bearer ${X}", "X-Title": "mine"}).headers


@pytest.mark.parametrize("fault", ["thinks", "loses_tokenizer"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_response_that_was_paid_for_is_not_bought_again(
    server: VllmShaped, fault: str, restarted: bool, tmp_path: Path
) -> None:
    server.faults = Faults(thinks=fault == "thinks", loses_tokenizer=fault == "loses_tokenizer")
    given = OpenAICompatibleOptions(**options(server, mode="write" if fault == "thinks" else "auto"))
    request = SampleRequest("k", "one", "smol", PROMPT, SampleSettings(max_tokens=3, top_logprobs=4))

    async def work() -> tuple[Any, Any]:
        async with OpenAICompatibleBackend(given, tmp_path) as backend:
            (first,) = [item async for item in backend.sample([request])]
            server.faults = Faults()
            if not restarted:
                return first, [item async for item in backend.sample([request])] if not first.final else []
        asked = list(OpenAICompatibleBackend(given, tmp_path).in_flight())
        assert asked == ([] if first.final else ["k"])
        async with OpenAICompatibleBackend(given, tmp_path) as backend:
            return first, [item async for item in backend.sample([request])] if not first.final else []

    first, then = asyncio.run(work())
    assert isinstance(first, ScoreFailure)
    assert first.final == (fault == "thinks")
    assert [type(item) for item in then] == ([] if first.final else [Sample])
    assert sum(body.get("max_tokens", 0) == 3 for _, body in server.requests) == 1
    assert list((tmp_path / UNREAD).iterdir()) == []
