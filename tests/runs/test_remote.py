"""Input and output in a bucket, through the command line and over real HTTP: as on a disk, and as safe."""

from __future__ import annotations

import json
import re
import shutil
import signal
import webbrowser
from pathlib import Path

import polars as pl
import pytest

from tests.process_worker import kill_group, wait_for
from tests.programs import Process, Run, Start, finish
from tests.vertex_world.fixtures import make_vertex_world, vertex_world
from tests.vertex_world.testing import bought
from tests.vertex_world.world import VertexWorld

__all__ = ["make_vertex_world", "vertex_world"]

P, Q = "gemini-2.5-flash-lite", "gemini-2.5-flash"
OUT = "gs://data/out"
FAST = ("--set", "backend.poll_interval_s=0.1")
REMOTE = ("--input-dir", "gs://data/in", "--output-dir", OUT, "--model2", Q)


def upload_responses(world: VertexWorld, folder: Path, n_prompts: int, **options: int) -> int:
    """The same responses in a local folder and in the bucket; returns how many positions they have."""
    prompts = [f"Question {index}?" for index in range(n_prompts)]
    paths = world.write_responses(folder, P, prompts, seed=3, **options)
    world.objects.create_bucket("data")
    n_positions = 0
    for path in paths:
        world.objects.write(f"gs://data/in/{path.name}", path.read_bytes())
        responses = json.loads(path.read_bytes())["responses"]
        n_positions += sum(len(response["logprobs"]["content"]) for response in responses)
    return n_positions


def objects(world: VertexWorld) -> list[str]:
    """What lies in the output folder, without locks."""
    names = [uri.removeprefix(f"{OUT}/") for uri in world.objects.list(f"{OUT}/")]
    return [name for name in names if ".lock/" not in name]


def n_stored(world: VertexWorld) -> int:
    """Answers that are safe in the bucket, in journals or as parts."""
    names = [name for name in objects(world) if name.startswith("scores/journals/")]
    parts = [name for name in objects(world) if re.fullmatch(r"scores/\w{20,}/\w+\.parquet", name)]
    in_parts = sum(pl.read_parquet(world.objects.read(f"{OUT}/{name}"), columns=["key"]).height for name in parts)
    return in_parts + sum(world.objects.read(f"{OUT}/{name}").count(b"\n") for name in names)


def test_a_bucket_gives_what_a_disk_gives(run_program: Run, vertex_world: VertexWorld, tmp_path: Path) -> None:
    world, env = vertex_world, vertex_world.environment()
    upload_responses(world, tmp_path / "in", 5, n=2, max_tokens=15)
    world.objects.write("gs://data/in/broken.json", b"{")
    (tmp_path / "in" / "broken.json").write_bytes(b"{")
    local = run_program("flows.run", "--input-dir", tmp_path / "in", "--output-dir", tmp_path / "out", "--model2", Q,
                        "--keep-raw", *FAST, env=env)  # fmt: skip
    assert local.code == 3, local.err
    n_jobs = len(world.jobs)

    dry = run_program("flows.run", *REMOTE, "--dry-run", env=env)
    assert dry.code == 0, dry.err
    assert objects(world) == []
    remote = run_program("flows.run", *REMOTE, "--keep-raw", *FAST, env=env)
    assert remote.code == 3, remote.err
    assert "gs://data/out/summary.json" in remote.out
    assert "gs://data/out/report.html" in remote.out
    # The jobs of the local run have the same names: they are found, and nothing is bought.
    assert len(world.jobs) == n_jobs
    assert set(world.rows_bought.values()) <= {1, 2}  # the tiny request of each run is the only one repeated

    made = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file() and path.suffix != ".lock")
    made.remove(".lock")
    assert made == sorted(name for name in objects(world) if "/" not in name)
    for name in made:
        if name not in ("run.json", "history.parquet", "report.html"):  # these speak of times and folders
            assert world.objects.read(f"{OUT}/{name}") == (tmp_path / "out" / name).read_bytes(), name
    run = json.loads(world.objects.read(f"{OUT}/run.json"))
    assert run["config"]["input_dir"] == "gs://data/in"
    assert {name.split("/")[0] for name in objects(world)} == {*made, "scores"}

    requests = len(world.requests)
    again = run_program("flows.run", *REMOTE, "--keep-raw", *FAST, env=env)
    assert again.code == 3, again.err
    assert {line.path for line in world.requests[requests:] if "storage" not in line.path} <= {"/token"}
    assert world.objects.read(f"{OUT}/tokens.parquet") == (tmp_path / "out" / "tokens.parquet").read_bytes()

    shown = run_program("flows.analyze", OUT, "--json", "gs://data/shown.json", env=env)
    assert shown.code == 0, shown.err
    assert json.loads(world.objects.read("gs://data/shown.json"))["run"] == OUT
    compared = run_program("flows.analyze", "--compare", OUT, tmp_path / "out", env=env)
    assert compared.code == 0, compared.err
    flags = ("--threshold", "0.02", "--top-k", "3", "--out", "gs://data/high.json", "--csv", "gs://data/high.csv")
    high = run_program("flows.analyze", "--result-dir", OUT, *flags, env=env)
    assert high.code == 0, high.err
    positions = json.loads(world.objects.read("gs://data/high.json"))
    assert pl.read_csv(world.objects.read("gs://data/high.csv"))["score"].to_list() == [p["score"] for p in positions]
    assert len(positions) > 3
    assert len(positions[0]["lists"]["q"]) == 20
    elsewhere = ("--output-dir", "gs://data/reread", "--reuse-raw", OUT)
    reread = run_program("flows.run", *REMOTE[:2], *REMOTE[4:], *elsewhere, *FAST, env=env)
    assert reread.code == 3, reread.err
    assert len(world.jobs) == n_jobs
    assert world.objects.read("gs://data/reread/tokens.parquet") == world.objects.read(f"{OUT}/tokens.parquet")
    others = [shutil.copytree(tmp_path / "out", tmp_path / name) for name in ("copy", "another")]
    many = (
        "--compare",
        OUT,
        tmp_path / "out",
        "gs://data/reread",
        *others,
        "--csv",
        "gs://data/many",
        "--figures",
        "gs://data/many",
    )
    table = run_program("flows.analyze", *many, env=env)
    assert table.code == 0, table.err
    ranked = pl.read_csv(world.objects.read("gs://data/many/candidates.csv"))["run"]
    assert (ranked[0], len(ranked)) == (OUT, 5)
    assert world.objects.read("gs://data/many/candidates.png").startswith(b"\x89PNG")
    opened: list[str] = []
    webbrowser.register("recorder", None, _Recorder(opened), preferred=True)
    page = run_program("flows.analyze", OUT, "--open", env=env)
    assert page.code == 0, page.err
    assert Path(opened[0].removeprefix("file://")).read_bytes() == world.objects.read(f"{OUT}/report.html")


class _Recorder(webbrowser.BaseBrowser):
    """A browser that keeps the addresses it is given."""

    def __init__(self, addresses: list[str]) -> None:
        super().__init__()
        self.addresses = addresses

    def open(self, url: str, new: int = 0, autoraise: bool = True) -> bool:
        self.addresses.append(url)
        return True


def kill(process: Process) -> None:
    assert process.poll() is None, process.communicate()
    kill_group(process)


@pytest.mark.slow
def test_runs_killed_in_a_bucket_buy_nothing_twice(make_vertex_world, start_program: Start, tmp_path: Path) -> None:
    def start(world: VertexWorld, *arguments: str) -> Process:
        return start_program("flows.run", *REMOTE, *arguments, env=world.environment())

    # Both at the same time, because each is taken up again only when the lease of the killed run has run out.
    online, batch = make_vertex_world(), make_vertex_world(job_seconds=4.0)
    online.faults.latency_s = 0.3
    n_online = upload_responses(online, tmp_path / "online", 10, n=1, max_tokens=30)
    n_batch = upload_responses(batch, tmp_path / "batch", 4, n=1, max_tokens=10)

    flags = ("--backend", "vertex_online", "--max-concurrent", "10")
    killed = start(batch, *FAST)
    wait_for(lambda: len(batch.jobs) >= 2 or killed.poll() is not None)
    kill(killed)
    killed = start(online, *flags)
    wait_for(lambda: n_stored(online) >= 60 or killed.poll() is not None)
    kill(killed)
    wait_for(lambda: online.ledger._in_flight == 0)  # calls that nobody waits for any more are answered, and charged
    lost = bought(online) - n_stored(online)
    assert n_stored(online) < n_online

    again = [start(batch, *FAST), start(online, *flags)]
    for process in again:
        done = finish(process)
        assert done.code == 0, done.err
    assert bought(online) <= n_online + lost
    assert bought(batch) <= n_batch
    for world, n_positions in ((online, n_online), (batch, n_batch)):
        tokens = pl.read_parquet(world.objects.read(f"{OUT}/tokens.parquet"))
        assert tokens.height == n_positions == tokens["error"].null_count()
        assert not any(name.startswith(("scores/journals/", ".parts/")) for name in objects(world))


@pytest.mark.slow
def test_two_runs_at_once_do_not_share_a_folder_in_a_bucket(
    vertex_world: VertexWorld, start_program: Start, run_program: Run, tmp_path: Path
) -> None:
    world = vertex_world
    world.faults.job_outcomes = ["NEVER"]
    upload_responses(world, tmp_path / "in", 1, n=1, max_tokens=8)
    first = start_program("flows.run", *REMOTE, *FAST, env=world.environment())
    wait_for(lambda: len(world.jobs) == 1 or first.poll() is not None)
    second = run_program("flows.run", *REMOTE, *FAST, env=world.environment())
    assert second.code == 2, second.err
    assert re.search(rf"error: another run is using {OUT} \(process {first.pid} on .*\); wait for it", second.err)
    first.send_signal(signal.SIGTERM)
    done = finish(first)
    assert done.code == 130, done.err
    assert len(world.jobs) == 1
    *_, newest = world.objects.list(f"{OUT}/.lock/")
    assert json.loads(world.objects.read(newest))["released"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--input-dir", "gs://absent/in"),
            "--input-dir/--pattern: gs://absent/in: the bucket 'absent' does not",
        ),
        (("--output-dir", "gs://absent/out"), "--output-dir: gs://absent/out/.* the bucket 'absent' does not exist"),
        (("--input-dir", "gs://data/nothing"), "no file in gs://data/nothing matches"),
        (("--input-dir", "gs://"), "input_dir: 'gs://' names no bucket"),
        (("--output-dir", "gs://data/in"), "output_dir is the input_dir"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(
    flags: tuple[str, ...], message: str, run_program: Run, vertex_world: VertexWorld, tmp_path: Path
) -> None:
    upload_responses(vertex_world, tmp_path / "in", 1, n=1, max_tokens=4)
    done = run_program("flows.run", *REMOTE, *flags, env=vertex_world.environment())
    assert done.code == 2, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in done.err


def test_responses_are_sampled_into_a_bucket(
    run_process: Run, run_program: Run, vertex_world: VertexWorld, tmp_path: Path
) -> None:
    vertex_world.objects.create_bucket("data")
    config = tmp_path / "sample.yaml"
    config.write_text(
        "backend: local\nmodel1: smollm2-135m\noutput_dir: gs://data/sampled\nprompts: [Hi, Ho]\n"
        "sampling: {max_tokens: 3}\n"
    )
    for run in (run_process, run_program):
        done = run("flows.sample", "--config", config, env=vertex_world.environment())
        assert done.code == 0, done.err
    assert vertex_world.objects.list("gs://data/sampled/") == [
        "gs://data/sampled/000_hi.json",
        "gs://data/sampled/001_ho.json",
    ]
    document = json.loads(vertex_world.objects.read("gs://data/sampled/001_ho.json"))
    assert (document["prompt"], len(document["responses"])) == ("Ho", 1)
