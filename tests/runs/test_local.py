"""The whole job on a real model in this process: what anybody can try."""

import hashlib
import json
import shutil
import time
import urllib.request
from pathlib import Path

import polars as pl
import pytest

from kl import load_run
from kl.output.report.verdict import verdict
from tests import ROOT
from tests.programs import Run

EXAMPLE = ROOT / "examples" / "responses"


def run_example(run_program: Run, output: Path, *arguments: str) -> pl.DataFrame:
    done = run_program("flows.run", "--config", ROOT / "examples/quickstart.yaml", "--output-dir", output, *arguments)
    assert done.code == 0, done.err
    return pl.read_parquet(output / "tokens.parquet")


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("responses")
    for path in sorted(EXAMPLE.glob("*.json"))[:3]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def example(run_program: Run, tmp_path_factory: pytest.TempPathFactory, three_files: Path) -> Path:
    """The results for the three files, with the settings of the quickstart."""
    output = tmp_path_factory.mktemp("example") / "out"
    run_example(run_program, output, "--input-dir", str(three_files))
    return output


def test_the_report_of_a_run_is_a_page(example: Path) -> None:
    page = (example / "report.html").read_text(encoding="utf-8")
    assert verdict(load_run(example).summary).sentence in page
    assert "Why is the sky blue?" in page
    assert "Q promotes" in page


def test_a_report_that_cannot_be_written_is_a_warning(
    example: Path, three_files: Path, run_program: Run, tmp_path: Path
) -> None:
    output = shutil.copytree(example, tmp_path / "out")
    (output / "report.html").unlink()
    (output / "report.html" / "in the way").mkdir(parents=True)
    run_example(run_program, output, "--input-dir", str(three_files))
    assert "report.html could not be written" in json.loads((output / "run.json").read_text())["warnings"][-1]


@pytest.mark.usefixtures("example")
def test_each_task_run_is_named_after_its_response(prefect_api: str, three_files: Path) -> None:
    expected = {f"{path.name}#0" for path in three_files.glob("*.json")}
    until = time.monotonic() + 60  # the server records task runs a little after they ended
    while expected != (names := _task_runs_among(expected, prefect_api)):
        assert time.monotonic() < until, names
        time.sleep(0.5)


def _task_runs_among(names: set[str], api: str) -> set[str]:
    body = json.dumps({"task_runs": {"name": {"any_": sorted(names)}}}).encode()
    request = urllib.request.Request(f"{api}/task_runs/filter", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return {item["name"] for item in json.loads(answer.read())}


def test_the_results_have_the_form_that_the_contract_says(example: Path, three_files: Path) -> None:
    tokens = pl.read_parquet(example / "tokens.parquet")
    for source in three_files.glob("*.json"):
        given = json.loads(source.read_text())
        result = json.loads((example / f"{source.stem}_kl.json").read_text())
        assert result["prompt"] == given["prompt"]
        assert (result["model1"], result["model2"]) == ("smollm2-135m", "smollm2-135m@int4")
        assert result["num_responses"] == len(result["responses"]) == 1
        response = result["responses"][0]
        content = given["responses"][0]["logprobs"]["content"]
        assert response["text"] == given["responses"][0]["text"]
        assert response["num_tokens"] == len(content) == len(response["kl_per_token"]) == len(response["token_details"])
        assert response["statistics"].keys() >= {"mean_kl", "median_kl", "std_kl", "min_kl", "max_kl", "total_kl"}
        rows = tokens.filter(pl.col("source_file") == source.name)
        assert response["kl_per_token"] == rows["kl_estimate"].to_list()
        assert [detail["token"] for detail in response["token_details"]] == [item["token"] for item in content]
        assert [detail["position"] for detail in response["token_details"]] == list(range(len(content)))
        assert response["statistics"]["total_kl"] == pytest.approx(sum(response["kl_per_token"]))
    summary = json.loads((example / "summary.json").read_text())
    assert summary["counts"]["measured"] == tokens.height
    run = json.loads((example / "run.json").read_text())
    assert run["config"]["model2"] == "smollm2-135m@int4"
    assert run["contexts_asked"] == run["contexts_scored_now"] == 2 * tokens.height
    assert not (example / ".parts").exists()


def test_a_prompt_that_was_written_otherwise_for_p_is_named(
    run_program: Run, tmp_path: Path, three_files: Path
) -> None:
    texts = [json.loads(path.read_text()) for path in sorted(three_files.glob("*.json"))]
    written = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    systems = ("You are a helpful AI assistant named SmolLM, trained by Hugging Face", "Be short.", None)
    folder = tmp_path / "in"
    folder.mkdir()
    for number, (document, system) in enumerate(zip(texts, systems, strict=True)):
        if system is not None:
            text = written.format(system, document["prompt"])
            document["rendered_prompt_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        (folder / f"{number}.json").write_text(json.dumps(document))
    flags = ("--input-dir", str(folder), "--set", "positions.per_response=2", "--top-logprobs", "20")
    for _ in range(2):  # a second run asks nothing, and knows it still
        tokens = run_example(run_program, tmp_path / "out", *flags)
        assert tokens.height > 0
        run = json.loads((tmp_path / "out/run.json").read_text())
        found = run["rendered_prompts"]
        assert (found["n"], found["stated_by_p"], found["differ"]) == (3, 2, ["1.json"])
        (line,) = (line for line in run["warnings"] if "chat templates differ" in line)
        assert "in 1 of 2 files (1.json)" in line


def test_a_model_against_itself_differs_nowhere(run_program: Run, tmp_path: Path, three_files: Path) -> None:
    tokens = run_example(run_program, tmp_path / "out", "--input-dir", str(three_files), "--model2", "smollm2-135m")
    assert tokens["kl_exact"].max() == 0
    # The examples were sampled on another processor, whose float32 sums may differ from this one's. A KL is of second
    # order in the deviations, so that it lies far below the largest of them.
    noise = max((tokens["logprob_p"] - tokens["logprob_q"]).abs().max(), 1e-9)
    assert noise < 1e-3
    assert tokens["kl_lower"].max() <= noise
    assert tokens["kl_estimate"].max() <= noise


def test_figures_made_while_scoring_are_those_of_kept_vocabularies(
    run_program: Run, tmp_path: Path, example: Path, three_files: Path
) -> None:
    reduced = pl.read_parquet(example / "tokens.parquet")
    assert pl.read_parquet(example / "scores/*/*.parquet")["full_logprobs"].null_count() == 2 * reduced.height
    kept = run_example(
        run_program, tmp_path / "out", "--input-dir", str(three_files), "--set", "keep_vocabularies=true"
    )
    assert reduced["kl_exact"].null_count() == 0
    for name in ("kl", "reverse_kl", "js", "tv"):
        found = kept[f"{name}_exact"]
        assert found.to_list() == pytest.approx(reduced[f"{name}_exact"].to_list(), abs=1e-12, rel=1e-12)
        assert (kept[f"{name}_lower"] <= found + 1e-6).all()
    assert (kept["tv_exact"] ** 2 <= kept["kl_exact"] / 2).all()  # Pinsker
    stored = pl.read_parquet(tmp_path / "out/scores/*/*.parquet")
    assert stored["full_logprobs"].null_count() == 0
    # What a run of an earlier version left, too: nothing is asked again.
    again = run_example(run_program, tmp_path / "out", "--input-dir", str(three_files))
    assert again["kl_exact"].to_list() == kept["kl_exact"].to_list()
    assert json.loads((tmp_path / "out/run.json").read_text())["contexts_asked"] == 0


def test_p_is_computed_anew_beside_another_q_and_where_its_half_is_lost(
    run_program: Run, tmp_path: Path, example: Path, three_files: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(example, output)
    n = pl.read_parquet(output / "tokens.parquet").height
    first = pl.read_parquet(output / "tokens.parquet")["kl_exact"].to_list()
    other = run_example(run_program, output, "--input-dir", str(three_files), "--model2", "smollm2-135m@int8")
    assert other["kl_exact"].null_count() == 0
    assert other["kl_exact"].mean() < 0.01
    assert json.loads((output / "run.json").read_text())["contexts_asked"] == 2 * n
    back = run_example(run_program, output, "--input-dir", str(three_files))
    assert back["kl_exact"].to_list() == first
    assert json.loads((output / "run.json").read_text())["contexts_asked"] == 0
    for path in output.glob("scores/*/*.parquet"):  # a kill between the two halves of a pair
        frame = pl.read_parquet(path)
        frame.filter(pl.col("model") == "smollm2-135m").with_columns(
            exact_versus=pl.lit(None, pl.String)
        ).write_parquet(path.with_name(f"half-{path.name}"))
        path.unlink()
    again = run_example(run_program, output, "--input-dir", str(three_files))
    assert again["kl_exact"].to_list() == first
    assert json.loads((output / "run.json").read_text())["contexts_asked"] == 2 * n


def test_another_system_text_is_another_model(run_program: Run, tmp_path: Path, three_files: Path) -> None:
    pirate = ("--model2", "smollm2-135m", "--set", "backend.system=You are a pirate.")
    tokens = run_example(run_program, tmp_path / "out", "--input-dir", str(three_files), *pirate)
    assert tokens["kl_exact"].mean() > 0.01


def test_a_run_with_the_top_twenty_only_has_no_exact_value(run_program: Run, tmp_path: Path, three_files: Path) -> None:
    tokens = run_example(run_program, tmp_path / "out", "--input-dir", str(three_files), "--top-logprobs", "20")
    assert tokens["kl_exact"].null_count() == tokens["entropy_p_upper"].null_count() == tokens.height
    assert tokens["kl_lower"].null_count() == 0


def test_responses_of_another_model_get_no_exact_value_and_a_warning(run_program: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    document = json.loads((EXAMPLE / "000_why-is-the-sky-blue.json").read_text())
    document["model"] = document["responses"][0]["model"] = "smollm2-135m@int8"
    (folder / "a.json").write_text(json.dumps(document))
    output = tmp_path / "out"
    done = run_program(
        "flows.run", "--config", ROOT / "examples/quickstart.yaml", "--input-dir", folder, "--output-dir", output
    )
    assert done.code == 0, done.err
    assert "smollm2-135m@int8 gives other values than those on record" in done.out
    assert pl.read_parquet(output / "tokens.parquet")["kl_exact"].null_count() == 6


def test_a_full_sample_is_the_unsampled_run_and_a_part_of_it_asks_a_part(run_program: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(sorted(EXAMPLE.glob("*.json"))[2], folder)
    plain = run_example(run_program, tmp_path / "all", "--input-dir", str(folder))
    run_example(run_program, tmp_path / "full", "--input-dir", str(folder), "--set", "positions.fraction=1.0")
    for name in ("tokens.parquet", "summary.json"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()
    part = run_example(run_program, tmp_path / "part", "--input-dir", str(folder), "--set", "positions.per_response=5")
    assert part["selected"].sum() == 5
    assert part["pi"].unique().to_list() == [5 / plain.height]
    assert part.filter("selected")["kl_exact"].to_list() == plain.filter(part["selected"])["kl_exact"].to_list()
    run = json.loads((tmp_path / "part" / "run.json").read_text())
    assert run["contexts_asked"] == 10


def test_models_without_common_tokens_are_refused_unless_forced(run_program: Run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    document = json.loads((EXAMPLE / "003_list-three-uses-of-copper.json").read_text())
    for position in document["responses"][0]["logprobs"]["content"]:
        position.pop("token_id")
        for index, item in enumerate(position["top_logprobs"]):
            if item["token"] != position["token"]:
                item["token"] = f"other piece {index}"
            item.pop("token_id")
    (folder / "a.json").write_text(json.dumps(document))
    arguments = ("--backend", "local", "--model2", "smollm2-135m@int8", "--input-dir", folder)
    done = run_program("flows.run", *arguments, "--output-dir", tmp_path / "out")
    assert done.code == 2, done.err
    assert "error: the models cannot be compared token by token" in done.err
    assert "different tokenizers" in done.err
    forced = run_program("flows.run", *arguments, "--output-dir", tmp_path / "out", "--force")
    assert forced.code in (0, 3), forced.err
    assert "0 to ask" in forced.err
    assert "different tokenizers" in forced.out


def test_asking_q_about_p_s_tokens_leaves_none_of_them_unknown(
    run_program: Run, tmp_path: Path, example: Path, three_files: Path
) -> None:
    output, settings = tmp_path / "out", ("--input-dir", str(three_files), "--top-logprobs", "20")
    plain = run_example(run_program, output, *settings)
    wanted = (*settings, "--set", "wanted_tokens=true")
    tokens = run_example(run_program, output, *wanted)
    asked = json.loads((output / "run.json").read_text())["contexts_asked"]
    assert asked == tokens.height  # other keys: nothing of the first run serves, and all of it stays
    exact = pl.read_parquet(example / "tokens.parquet")["kl_exact"]
    assert tokens["p_mass_missing_in_q"].max() == 0 < plain["p_mass_missing_in_q"].max()
    assert tokens["logprob_q"].null_count() == 0 < plain["logprob_q"].null_count()
    assert not tokens["k1_censored"].any()
    assert (tokens["kl_lower"] <= exact + 1e-6).all()
    assert tokens["kl_lower"].mean() > 1.05 * plain["kl_lower"].mean()
    assert (tokens["kl_estimate"] - exact).pow(2).mean() < 0.5 * (plain["kl_estimate"] - exact).pow(2).mean()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["wanted_tokens"] is True
    assert summary["alignment"]["overlap"] < 0.99  # of what Q lists by itself

    again = run_example(run_program, output, *wanted)
    assert json.loads((output / "run.json").read_text())["contexts_asked"] == 0
    assert again.equals(tokens)
    # Each way finds its own answers again, also with the other's beside them.
    back = run_example(run_program, output, *settings)
    assert json.loads((output / "run.json").read_text())["contexts_asked"] == 0
    assert back.equals(plain)
