"""Cleaning the bucket: what goes, what stays and why; nothing of others, of running jobs, or replaced meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from google.cloud import storage

from backends.errors import BackendError, ConfigError
from backends.vertex.batch import VertexBatchBackend, VertexBatchOptions
from backends.vertex.cleaning.cleaner import LONGEST_JOB, BucketCleaner
from backends.vertex.cleaning.inventory import PREFIXES, Action, BucketFile, Deletion, Inventory
from backends.vertex.cleaning.lifecycle import lifecycle_state, merged_rules
from tests.backends.conftest import request_for, score_all
from tests.vertex_world.testing import FLASH, genai_client, scoring_request
from tests.vertex_world.world import VertexWorld

BUCKET = "old-files"
DAY = timedelta(days=1)


def key_of(index: int) -> str:
    return f"tokenkl-{index:040x}"


def input_of(index: int) -> str:
    return f"batch_input/some.file-r0_{key_of(index)}.jsonl"


def write(world: VertexWorld, name: str, content: bytes = b"x") -> None:
    world.objects.write(f"gs://{BUCKET}/{name}", content)


def left(world: VertexWorld) -> list[str]:
    return [uri.removeprefix(f"gs://{BUCKET}/") for uri in world.objects.list(f"gs://{BUCKET}/")]


@pytest.fixture
def world(in_vertex_world: VertexWorld) -> VertexWorld:
    in_vertex_world.objects.create_bucket(BUCKET)
    return in_vertex_world


def start_jobs(world: VertexWorld, *indices: int) -> None:
    """A job of one row for each index, with files named as the product names them."""
    row = json.dumps({"key": "k", "request": scoring_request("q")}).encode()
    with genai_client(world) as client:
        for index in indices:
            write(world, input_of(index), row + b"\n")
            destination = f"gs://{BUCKET}/batch_output/some.file-r0_{key_of(index)}"
            config = {"display_name": key_of(index), "dest": destination}
            client.batches.create(model=FLASH, src=f"gs://{BUCKET}/{input_of(index)}", config=config)


def cleaner(world: VertexWorld, **settings: Any) -> BucketCleaner:
    values = {"project_id": world.project, "location": "us-central1", "bucket": BUCKET, "deadline_s": 20} | settings
    return BucketCleaner(**values, timeout_s=20)


def inventory(
    world: VertexWorld,
    later: timedelta = DAY,
    older_than: timedelta = timedelta(0),
    now: datetime | None = None,
    unread: Mapping[str, str] | None = None,
    **settings: Any,
) -> Inventory | None:
    async def work() -> Inventory | None:
        async with cleaner(world, **settings) as bucket:
            return await bucket.take_inventory(older_than, now or datetime.now(UTC) + later, unread or {})

    return asyncio.run(work())


def clean(
    world: VertexWorld, advance: Callable[[int], None] = lambda n: None, **asked: Any
) -> tuple[Inventory, Deletion]:
    found = inventory(world, **asked)
    assert found is not None

    async def work() -> Deletion:
        async with cleaner(world) as bucket:
            return await bucket.delete(found, advance)

    return found, asyncio.run(work())


def reasons(found: Inventory | None) -> dict[str, tuple[Action, str]]:
    assert found is not None
    return {key: (decision.action, decision.reason) for key, decision in found.decisions.items()}


def file(name: str, size: int = 1) -> BucketFile:
    return BucketFile(name, size, datetime.now(UTC), 1)


HEX = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    "name",
    [
        f"batch_input/a_tokenkl-{HEX}.jsonl",
        f"batch_input/a.b-c_d_tokenkl-{HEX}.jsonl",
        f"batch_output/a_tokenkl-{HEX}/prediction-model-2026-01-01T00:00:00.000Z/predictions.jsonl",
        f"batch_output/a_tokenkl-{HEX}/prediction-model-x/incremental_predictions-00000-of-00001.jsonl",
    ],
)
def test_names_that_the_backend_gives_are_ours(name: str) -> None:
    assert file(name).job_key == f"tokenkl-{HEX}"


@pytest.mark.parametrize(
    "name",
    [
        f"other/a_tokenkl-{HEX}.jsonl",
        f"x/batch_input/a_tokenkl-{HEX}.jsonl",
        f"batch_input/tokenkl-{HEX}.jsonl",
        f"batch_input/a_tokenkl-{HEX}.jsonl.bak",
        f"batch_input/a_tokenkl-{HEX}.jsonl\n",
        f"batch_input/a_tokenkl-{HEX[:-1]}.jsonl",
        f"batch_input/a_tokenkl-{HEX}0.jsonl",
        f"batch_input/a_tokenkl-{HEX.upper()}.jsonl",
        f"batch_input/sub/a_tokenkl-{HEX}.jsonl",
        f"batch_input/a_tokenkl-{HEX}/prediction-model-x/predictions.jsonl",
        f"batch_output/a_tokenkl-{HEX}.jsonl",
        f"batch_output/a_tokenkl-{HEX}/notes.txt",
        f"batch_output/a_tokenkl-{HEX}/prediction-model-x/",
        f"batch_output/a_{HEX}/prediction-model-x/predictions.jsonl",
        f"batch_output/sub/a_tokenkl-{HEX}/prediction-model-x/predictions.jsonl",
        "batch_input/",
        "batch_input/prompts.jsonl",
    ],
)
def test_all_other_names_are_not(name: str) -> None:
    assert file(name).job_key is None


def test_everything_that_the_backend_leaves_is_found_and_deleted(world, responses, tmp_path: Path) -> None:
    options = VertexBatchOptions(project_id=world.project, bucket_name=BUCKET, poll_interval_s=0.05)
    groups = [[request_for(response, VertexBatchBackend, options)] for response in responses(prompts=2, n=1)]
    score_all(VertexBatchBackend(options, tmp_path / "state"), groups)
    assert len(left(world)) == 4
    found, done = clean(world)
    assert found.foreign.files == 0
    assert {prefix: totals.files for prefix, totals in found.by_prefix.items()} == dict.fromkeys(PREFIXES, 2)
    assert (done.deleted.files, done.failed, done.replaced) == (4, 0, 0)
    assert done.deleted.size == found.total(Action.DELETE).size > 0
    assert left(world) == []


def test_what_is_not_ours_stays_and_is_counted(world) -> None:
    others = ["batch_input/mine.jsonl", f"batch_output/notes_{key_of(1)}.txt", f"elsewhere/x_{key_of(1)}.jsonl"]
    for name in others:
        write(world, name)
    write(world, "batch_output/", b"")
    start_jobs(world, 1)
    world.wait_for_jobs()
    found, done = clean(world)
    assert (found.foreign.files, found.foreign_example) == (2, "batch_input/mine.jsonl")
    assert done.deleted.files == 2
    assert left(world) == sorted([*others, "batch_output/"])


def test_a_survey_changes_nothing(world) -> None:
    start_jobs(world, 1)
    world.wait_for_jobs()
    before = left(world)
    found = inventory(world)
    assert found is not None
    assert found.total(Action.DELETE).files == len(before) == 2
    assert left(world) == before
    assert not [line for line in world.requests if line.method == "DELETE"]


def test_files_stay_while_their_job_may_need_them_and_go_when_it_has_ended(world) -> None:
    states = ["NEVER", "NEVER_STARTS", "PAUSED", "JOB_STATE_FROBNICATED", "FAILED", "EXPIRED", "CANCELLED", "SUCCEEDED"]
    world.faults.job_outcomes = list(states)
    world.faults.job_error_details = True  # which the SDK cannot read
    start_jobs(world, *range(len(states)))
    wait_until(lambda: [job.state for job in world.jobs].count("JOB_STATE_RUNNING") == 1 and len(ended(world)) == 6)
    found, _ = clean(world)
    actions = {state: reasons(found)[key_of(index)] for index, state in enumerate(states)}
    assert actions["NEVER"] == (Action.KEEP, "the batch job is RUNNING")
    assert actions["NEVER_STARTS"][0] is actions["PAUSED"][0] is Action.KEEP
    assert actions["JOB_STATE_FROBNICATED"][0] is Action.UNDECIDED
    assert "FROBNICATED" in actions["JOB_STATE_FROBNICATED"][1]
    assert {actions[state][0] for state in states[4:]} == {Action.DELETE}
    assert [name for name in left(world) if name.startswith("batch_input/")] == [input_of(index) for index in range(4)]


def ended(world: VertexWorld) -> list[str]:
    active = {"JOB_STATE_QUEUED", "JOB_STATE_PENDING", "JOB_STATE_RUNNING"}
    return [job.state for job in world.jobs if job.state not in active]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = datetime.now(UTC) + timedelta(seconds=10)
    while not condition():
        assert datetime.now(UTC) < deadline
        time.sleep(0.02)


def test_of_several_jobs_with_one_name_all_must_have_ended(world) -> None:
    world.faults.job_outcomes = ["SUCCEEDED", "NEVER"]
    start_jobs(world, 1, 1)
    wait_until(lambda: len(ended(world)) == 1)
    found, done = clean(world)
    assert found.decisions[key_of(1)].action is Action.KEEP
    assert done.deleted.files == 0
    assert input_of(1) in left(world)


def test_without_the_right_to_read_jobs_nothing_goes_and_few_questions_are_asked(world, caplog) -> None:
    for index in range(40):
        write(world, input_of(index))
    # The stand-in knows one project; storage asks for no rights.
    found = inventory(world, later=30 * DAY, project_id="another-project")
    assert found is not None
    assert found.total(Action.UNDECIDED).files == 40
    assert len([line for line in world.requests if "batchPredictionJobs" in line.path]) <= 8
    assert [record for record in caplog.records if "403" in record.message and "are kept" in record.message]


def test_a_look_up_that_fails_for_a_moment_is_repeated(world) -> None:
    start_jobs(world, 1)
    world.wait_for_jobs()
    world.faults.http_script = {"list": ["503", "reset"]}
    found = inventory(world)
    assert found is not None
    assert found.total(Action.DELETE).files == 2


def test_a_job_goes_as_a_whole_when_its_newest_file_is_old_enough(world) -> None:
    write(world, input_of(1))
    between = datetime.now(UTC)
    write(world, f"batch_output/some.file-r0_{key_of(1)}/prediction-model-x/predictions.jsonl")
    write(world, input_of(2))
    found = inventory(world, now=between + 30 * DAY, older_than=30 * DAY)
    assert set(reasons(found).values()) == {(Action.KEEP, "not older than asked, or part of a job with newer files")}


def test_files_that_appear_after_the_survey_stay(world) -> None:
    start_jobs(world, 1)
    world.wait_for_jobs()
    found = inventory(world, later=timedelta(0))
    late = f"batch_output/some.file-r0_{key_of(1)}/prediction-model-late/predictions.jsonl"
    write(world, late)

    async def work() -> Deletion:
        async with cleaner(world) as bucket:
            return await bucket.delete(found, lambda n: None)

    assert asyncio.run(work()).deleted.files == 2
    assert left(world) == [late]


@pytest.mark.parametrize(
    ("age", "action"),
    [(LONGEST_JOB - DAY / 24, Action.KEEP), (LONGEST_JOB + DAY / 24, Action.DELETE)],
    ids=["young", "old"],
)
def test_files_without_a_job_go_when_no_job_could_still_use_them(world, age: timedelta, action: Action) -> None:
    write(world, input_of(1))
    found = inventory(world, later=age, older_than=DAY)
    assert found is not None
    assert found.decisions[key_of(1)].action is action
    assert "us-central1" in found.decisions[key_of(1)].reason


def test_what_a_run_has_not_read_stays(world) -> None:
    start_jobs(world, 1, 2)
    world.wait_for_jobs()
    found, done = clean(world, unread={key_of(1): "results/a"})
    assert found.decisions[key_of(1)].action is Action.KEEP
    assert "results/a" in found.decisions[key_of(1)].reason
    assert done.deleted.files == 2
    assert all(key_of(1) in name for name in left(world))


def test_a_file_that_is_replaced_meanwhile_survives(world) -> None:
    for index in range(30):
        write(world, input_of(index))

    told: list[int] = []

    def replace_the_last(n: int) -> None:
        if not told:  # the first is gone, the last not yet in turn
            write(world, input_of(29), b"new content")
        told.append(n)

    _, done = clean(world, replace_the_last, later=30 * DAY)
    assert (done.deleted.files, done.replaced, done.failed) == (29, 1, 0)
    assert left(world) == [input_of(29)]
    assert world.objects.read(f"gs://{BUCKET}/{input_of(29)}") == b"new content"


def test_under_faults_every_file_is_deleted_once_and_counted_once(world) -> None:
    for index in range(6):
        write(world, input_of(index))
    world.faults.http_script = {
        "storage.list": ["503", None, "reset"],
        "storage.other": ["lost", "lost-503", "503", "429", "reset"],  # the client reads the bucket now and then, too
    }
    _, done = clean(world, later=30 * DAY)
    assert (done.deleted.files, done.deleted.size, done.failed, done.replaced) == (6, 6, 0, 0)
    assert left(world) == []
    assert sum(world.faults.injected.values()) == 7


def test_more_files_than_a_page_are_all_seen(world) -> None:
    folder = f"batch_output/some.file-r0_{key_of(1)}/prediction-model-x"
    for index in range(1010):
        write(world, f"{folder}/predictions-{index:05d}-of-01010.jsonl")
    told: list[int] = []
    _, done = clean(world, told.append, later=30 * DAY)
    assert done.deleted.files == sum(told) == 1010
    assert left(world) == []


def test_a_bucket_that_is_absent_gives_none(world) -> None:
    assert inventory(world, bucket="no-such-bucket") is None


def test_a_name_that_no_bucket_can_have_is_the_users_mistake(world) -> None:
    with pytest.raises(ConfigError, match="'-x' is not the name of a bucket"):
        inventory(world, bucket="-x")


Answer = Callable[[str, str, dict[str, str], bytes], tuple[int, Any]]


@contextmanager
def storage_service(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A storage service that says what a test wants: ``answer(method, path, query, body)`` gives status and JSON."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            status, content = answer(self.command, unquote(parts.path), query, body)
            data = b"" if status == 204 else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_DELETE = do_PATCH = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
        try:
            yield
        finally:
            server.shutdown()


def refusal(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"code": status, "message": message}}


def listing(query: dict[str, str], files: int) -> tuple[int, Any]:
    names = [input_of(index) for index in range(files)] if query["prefix"] == PREFIXES[0] else []
    about = {"size": "1", "timeCreated": "2026-01-01T00:00:00Z", "generation": "7"}
    return 200, {"items": [{"name": name, **about} for name in names]}


def test_without_the_right_to_list_one_error_names_the_role(world, monkeypatch) -> None:
    with (
        storage_service(lambda *call: refusal(403, "no storage.objects.list access"), monkeypatch),
        pytest.raises(BackendError, match=r"no storage\.objects\.list access.*roles/storage\.objectAdmin"),
    ):
        inventory(world)


def test_a_file_under_retention_is_counted_and_the_others_go(world, monkeypatch) -> None:
    def answer(method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        if method == "DELETE":
            assert query["ifGenerationMatch"] == "7"
            return refusal(403, "Object is subject to retention") if path.endswith(input_of(3)) else (204, None)
        return listing(query, files=30) if "prefix" in query else (200, {"name": BUCKET})

    with storage_service(answer, monkeypatch):
        _, done = clean(world)
    assert (done.deleted.files, done.failed) == (29, 1)
    assert done.last_failure
    assert "retention" in done.last_failure


@pytest.mark.parametrize("second", [412, 404], ids=["precondition failed", "not found"])
def test_a_deletion_whose_answer_was_lost_is_a_deletion(world, monkeypatch, second: int) -> None:
    asked: list[str] = []

    def answer(method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        if method == "DELETE":
            asked.append(path)
            return refusal(503 if asked.count(path) == 1 else second, "no longer there")
        if path.endswith(".jsonl"):
            return refusal(404, "not found")
        return listing(query, files=3) if "prefix" in query else (200, {"name": BUCKET})

    with storage_service(answer, monkeypatch):
        _, done = clean(world)
    assert (done.deleted.files, done.replaced, done.failed) == (3, 0, 0)
    assert len(asked) == 6


def test_without_the_right_to_delete_it_is_given_up_early(world, monkeypatch) -> None:
    calls: list[str] = []

    def answer(method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        if method == "DELETE":
            calls.append(path)
            return refusal(403, "no storage.objects.delete access")
        return listing(query, files=200) if "prefix" in query else (200, {"name": BUCKET})

    with (
        storage_service(answer, monkeypatch),
        pytest.raises(BackendError, match=r"storage\.objects\.delete.*failures in a row; 0 files were deleted"),
    ):
        clean(world)
    assert len(calls) < 40


FOREIGN_RULES = [
    {"action": {"type": "SetStorageClass", "storageClass": "NEARLINE"}, "condition": {"age": 7}},
    {"action": {"type": "Delete"}, "condition": {"age": 7, "matchesPrefix": ["batch_input/"]}},
    {"action": {"type": "Delete"}, "condition": {"age": 7, "matchesPrefix": [*PREFIXES, "tmp/"]}},
    {"action": {"type": "Delete"}, "condition": {"age": 7, "matchesPrefix": list(PREFIXES), "isLive": False}},
    {"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": 1}},
]


def rule(days: int) -> dict[str, Any]:
    return {"action": {"type": "Delete"}, "condition": {"age": days, "matchesPrefix": list(PREFIXES)}}


def set_rule(world: VertexWorld, days: int) -> None:
    async def work() -> None:
        async with cleaner(world) as bucket:
            await bucket.set_lifecycle(days)
            assert (await bucket.lifecycle(days)).as_asked

    asyncio.run(work())


def rules_of(client: storage.Client) -> list[dict[str, Any]]:
    return [dict(item) for item in client.get_bucket(BUCKET).lifecycle_rules]


def test_the_rule_joins_those_of_others_and_setting_it_again_writes_nothing(world) -> None:
    with storage.Client() as client:
        bucket = client.get_bucket(BUCKET)
        bucket.lifecycle_rules = FOREIGN_RULES
        bucket.patch()
        set_rule(world, 7)
        assert rules_of(client) == [*FOREIGN_RULES, rule(7)]
        written = len([line for line in world.requests if line.method == "PATCH"])
        set_rule(world, 7)
        assert len([line for line in world.requests if line.method == "PATCH"]) == written
        set_rule(world, 30)
        assert rules_of(client) == [*FOREIGN_RULES, rule(30)]


def test_our_rule_is_recognised_in_any_order_of_prefixes_and_doubles_become_one() -> None:
    turned = rule(7)
    turned["condition"]["matchesPrefix"] = list(reversed(PREFIXES))
    assert lifecycle_state([turned], PREFIXES, 7).as_asked
    state = lifecycle_state([rule(7), FOREIGN_RULES[0], turned], PREFIXES, 7)
    assert (state.ours, state.others, state.as_asked) == ((7, 7), 1, False)
    assert merged_rules([rule(7), FOREIGN_RULES[0], turned], PREFIXES, 7) == [FOREIGN_RULES[0], rule(7)]


def test_a_rule_that_somebody_adds_at_the_same_moment_is_kept(world, monkeypatch) -> None:
    state: dict[str, Any] = {"metageneration": "1", "rules": []}

    def answer(method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        if method == "PATCH":
            if state["metageneration"] == "1":
                state.update(metageneration="2", rules=[FOREIGN_RULES[0]])
            if query["ifMetagenerationMatch"] != state["metageneration"]:
                return refusal(412, "conditionNotMet")
            state.update(metageneration="3", rules=json.loads(body)["lifecycle"]["rule"])
        about = {"name": BUCKET, "metageneration": state["metageneration"]}
        return 200, about | {"lifecycle": {"rule": state["rules"]}}

    with storage_service(answer, monkeypatch):
        set_rule(world, 7)
    assert state["rules"] == [FOREIGN_RULES[0], rule(7)]


def test_a_rule_of_an_unknown_kind_is_not_lost(world) -> None:
    unknown = {"action": {"type": "Teleport"}, "condition": {"age": 1}}
    with storage.Client() as client:
        bucket = client.get_bucket(BUCKET)
        bucket.lifecycle_rules = [unknown]
        bucket.patch()
    with pytest.raises(BackendError, match="a kind that this version does not know"):
        set_rule(world, 7)
    assert len([line for line in world.requests if line.method == "PATCH"]) == 1
