"""``python -m flows.clean`` as a user starts it: what it says, what it does, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from google.cloud import storage

from backends.vertex.jobs.ledger import JobLedger
from flows.config.cleaning import CleanConfig, parse_duration
from flows.config.reading import build_config
from flows.folder.layout import OutputFolder
from flows.folder.members import note_store
from tests import ROOT
from tests.programs import Done, Run
from tests.vertex_world.fixtures import in_vertex_world, vertex_world
from tests.vertex_world.testing import FLASH, genai_client, scoring_request
from tests.vertex_world.world import VertexWorld

__all__ = ["in_vertex_world", "vertex_world"]

BUCKET = "stand-in-project-kl-batch"
ENDED, RUNNING = "tokenkl-" + "a" * 40, "tokenkl-" + "b" * 40
Clean = Callable[..., Done]


@pytest.fixture
def clean(run_program: Run) -> Clean:
    """The program in a newcomer's environment."""

    def run(*arguments: object, world: VertexWorld | None = None, **environment: str) -> Done:
        done = run_program("flows.clean", *arguments, env=(world.environment() if world else {}) | environment)
        assert "Traceback" not in done.err
        return done

    return run


@pytest.fixture
def world(in_vertex_world: VertexWorld) -> VertexWorld:
    """A bucket with the files of a job that ended and of one that runs."""
    world = in_vertex_world
    world.objects.create_bucket(BUCKET)
    world.faults.job_outcomes = ["SUCCEEDED", "NEVER"]
    row = json.dumps({"key": "k", "request": scoring_request("q")}).encode()
    with genai_client(world) as client:
        for key in (ENDED, RUNNING):
            world.objects.write(f"gs://{BUCKET}/batch_input/a_{key}.jsonl", row)
            destination = f"gs://{BUCKET}/batch_output/a_{key}"
            config = {"display_name": key, "dest": destination}
            client.batches.create(model=FLASH, src=f"gs://{BUCKET}/batch_input/a_{key}.jsonl", config=config)
    while not world.jobs[0].settled:
        world.jobs[0].cancelled.wait(0.02)
    return world


def left(world: VertexWorld) -> list[str]:
    return [uri.removeprefix(f"gs://{BUCKET}/") for uri in world.objects.list(f"gs://{BUCKET}/")]


def rules() -> list[dict]:
    with storage.Client() as client:
        return [dict(rule) for rule in client.get_bucket(BUCKET).lifecycle_rules]


def test_help_is_quick_to_read_and_loads_no_sdk(run_process: Run) -> None:
    done = run_process("flows.clean", "--help")
    assert done.code == 0
    for text in ("--older-than", "--yes", "--set-lifecycle", "--lifecycle-days", "--output-dir", "exit codes"):
        assert text in done.out
    code = (
        "import sys, flows.clean; print([m for m in ('prefect', 'google.genai', 'google.cloud') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("0s", timedelta(0)),
        ("30m", timedelta(minutes=30)),
        ("12h", timedelta(hours=12)),
        ("7d", timedelta(days=7)),
        ("2w", timedelta(weeks=2)),
        ("36500d", timedelta(days=36500)),
    ],
)
def test_durations_have_a_number_and_a_unit(text: str, duration: timedelta) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text", ["7", "7x", "-1d", "", "d", "1.5d", "7 d", "7D", "٧d", "1d12h", "36501d", "99999999w", "9" * 30 + "d"]
)
def test_other_durations_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="whole number with a unit"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--older-than", "7"), ("older_than", "'7'", "30m")),
        (("--older-than", "7x"), ("older_than", "'7x'")),
        (("--older-than", "-1d"), ("older_than", "'-1d'")),
        (("--lifecycle-days", "0"), ("lifecycle_days", "'0'")),
        (("--output-dir", "/no/such/run"), ("/no/such/run", "no job records")),
        (("--bucket-name", "Ends-"), ("'Ends-'", "not the name of a bucket")),
        (("--location", "a/b"), ("'a/b'",)),
        (("--set", "backend.name=local"), ("local", "vertex_batch")),
        (("--yes", "--nonsense"), ("--nonsense",)),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(
    clean: Clean, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = clean("--project-id", "p", *arguments, STORAGE_EMULATOR_HOST="http://127.0.0.1:9")
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert all(word in done.err for word in words)


def test_without_a_project_it_says_how_to_set_one(clean: Clean) -> None:
    done = clean()
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "--project-id" in done.err


def test_without_credentials_it_says_how_to_get_them(clean: Clean, tmp_path: Path) -> None:
    done = clean("--project-id", "p", GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "absent.json"))
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "GOOGLE_APPLICATION_CREDENTIALS" in done.err


def test_the_file_of_a_run_gives_bucket_and_output_folder(tmp_path: Path) -> None:
    text = "input_dir: in\noutput_dir: out\nmodel2: q\nbucket_name: mine\nmax_concurrent: 50\nlifecycle_days: 9\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = build_config(CleanConfig, tmp_path / "run.yaml", {"older_than": "1h"})
    assert (config.bucket_name, config.output_dir, config.older_than) == ("mine", (Path("out"),), "1h")
    assert (config.rule_days, config.yes) == (9, False)
    flags = {"output_dir": ["x", "y"]}
    assert build_config(CleanConfig, tmp_path / "run.yaml", flags).output_dir == (Path("x"), Path("y"))
    with pytest.raises(ValueError, match="unknown setting 'older_then'"):
        build_config(CleanConfig, None, {"older_then": "7d"})


@pytest.mark.parametrize(
    ("values", "days"),
    [
        ({}, None),
        ({"set_lifecycle": True}, 7),
        ({"lifecycle_days": 30}, 30),
        ({"set_lifecycle": True, "lifecycle_days": 1}, 1),
    ],
    ids=["neither", "the switch alone", "the days alone", "both"],
)
def test_the_rule_is_set_by_its_switch_or_by_its_days(values: dict, days: int | None) -> None:
    assert build_config(CleanConfig, None, values).rule_days == days


def test_it_shows_what_it_would_delete_and_does_so_with_yes(clean: Clean, world: VertexWorld) -> None:
    young = clean(world=world)
    assert young.code == 0
    assert "nothing to delete that is older than 7d" in young.out
    before = left(world)
    dry = clean("--older-than", "0s", world=world)
    assert dry.code == 0
    assert left(world) == before
    input_line = next(line for line in dry.out.splitlines() if line.startswith("batch_input/"))
    sizes = [len(world.objects.read(f"gs://{BUCKET}/{name}")) for name in before if name.startswith("batch_input/")]
    assert input_line.split()[1:3] == ["2", f"{sum(sizes):,}"]
    assert "to delete: 2 files" in dry.out
    assert [line for line in dry.out.splitlines() if line != line.rstrip()] == []
    assert "the batch job has ended" in dry.out
    assert f"kept: 1 file, {sizes[1]:,} bytes: the batch job is RUNNING (such as {RUNNING})" in dry.out
    assert "dry run: nothing was changed" in dry.out
    assert "not spared" in dry.out
    done = clean("--older-than", "0s", "--yes", world=world)
    assert done.code == 0
    assert "deleted: 2 files" in done.out
    assert left(world) == [f"batch_input/a_{RUNNING}.jsonl"]


def test_the_output_that_a_run_still_has_to_read_is_spared(clean: Clean, world: VertexWorld, tmp_path: Path) -> None:
    JobLedger(tmp_path / "out" / "scores" / "jobs").record(ENDED, "place", "input", "output", ["key"])
    before = left(world)
    done = clean("--older-than", "0s", "--yes", "--output-dir", tmp_path / "out", world=world)
    assert done.code == 0
    assert f"the run in {tmp_path / 'out'} has not read all rows" in done.out
    assert left(world) == before


def test_a_bucket_that_does_not_exist_is_one_line_and_success(clean: Clean, vertex_world: VertexWorld) -> None:
    done = clean("--yes", "--set-lifecycle", world=vertex_world)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [f"gs://{BUCKET} does not exist: there is nothing to clean, and no rule to set."]


def test_what_stays_because_a_state_is_not_known_gives_exit_code_3(clean: Clean, world: VertexWorld) -> None:
    before = left(world)
    done = clean("--older-than", "0s", "--yes", "--project-id", "other", "--bucket-name", BUCKET, world=world)
    assert done.code == 3
    assert "kept, undecided: 3 files" in done.out
    assert left(world) == before


def test_the_rule_is_shown_first_and_set_with_yes(clean: Clean, world: VertexWorld) -> None:
    dry = clean("--set-lifecycle", world=world)
    assert (dry.code, rules()) == (0, [])
    assert "after 7 days: to be set" in dry.out
    done = clean("--lifecycle-days", 3, "--yes", world=world)
    assert done.code == 0
    assert "after 3 days: to be set." in done.out
    assert "warning: a batch job may wait for 72 h" in done.out
    prefixes = ["batch_input/", "batch_output/"]
    assert rules() == [{"action": {"type": "Delete"}, "condition": {"age": 3, "matchesPrefix": prefixes}}]
    assert len(left(world)) == 3  # the files are young
    again = clean("--set-lifecycle", world=world)
    assert "after 7 days: to be set in place of 3 days." in again.out
    assert "warning" not in again.out


def test_a_rule_that_would_delete_files_of_others_is_refused(clean: Clean, world: VertexWorld) -> None:
    world.objects.write(f"gs://{BUCKET}/batch_input/mine.jsonl", b"x")
    before = left(world)
    done = clean("--older-than", "0s", "--set-lifecycle", "--yes", world=world)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "batch_input/mine.jsonl" in done.err
    assert (rules(), left(world)) == ([], before)


class _Forbidden(BaseHTTPRequestHandler):
    """A storage service that allows nothing."""

    def do_GET(self) -> None:
        body = json.dumps({"error": {"code": 403, "message": "no storage.objects.list access"}}).encode()
        self.send_response(403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


def test_without_rights_it_is_one_line_and_exit_code_1(clean: Clean, vertex_world: VertexWorld) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Forbidden) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        done = clean(world=vertex_world, STORAGE_EMULATOR_HOST=address)
        server.shutdown()
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1
    assert "roles/storage.objectAdmin" in done.err


def test_jobs_that_any_run_of_a_shared_store_has_not_read_are_spared(
    world: VertexWorld, clean: Clean, tmp_path: Path
) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    JobLedger(store / "jobs").record(ENDED, "p/l/b", "i", "o", ["k"])
    note_store(OutputFolder(out, store))
    for flags in (("--output-dir", out), ("--scores-dir", store)):
        done = clean("--project-id", "stand-in-project", "--older-than", "0s", *flags, world=world)
        assert "nothing to delete" in done.out
        assert str(flags[1]) in done.out
    assert f"{out}: there are no job records" in clean("--project-id", "p", "--scores-dir", out, world=world).err
