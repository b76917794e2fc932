"""``python -m flows.analyze`` on folders as flows.run leaves them."""

import json
import re
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

import polars as pl
import pytest

from flows.analyze import main
from flows.commands.two_runs import comparable_column, verdict
from flows.folder.finished import load_run, worst_positions
from kl.finished.reading import summary_from_json
from kl.output.atomic import write_json_atomic
from kl.output.files import write_part, write_responses, write_summary, write_tokens
from kl.output.headline import headline
from kl.output.report.verdict import verdict as verdict_of
from kl.records import Sampling
from kl.statistics.dataset import summarise_dataset
from kl.statistics.intervals import Estimate
from kl.statistics.summary import RunFacts
from kl.tables.responses import ResponseInfo, summarise_responses
from kl.tables.schemas import TOKENS
from tests import ROOT
from tests.kl.conftest import Answer, build_tokens

# Six prompts, KL per token .1 to .6.
STEADY = [Answer(f"f{i}.json", f"prompt{i}", 0, [0.1 * (i + 1)] * 4) for i in range(6)]


def shifted(answers, shift):
    """The same responses with another KL: ``shift(prompt number, KL)``."""
    return [answer._replace(kl=[shift(i, value) for value in answer.kl]) for i, answer in enumerate(answers)]


def write_run(folder, answers, *, model="q-model", estimator="censored", top_logprobs=20, change=None, alignment=None):
    """A finished run in ``folder``; ``change`` edits the token table first."""
    tokens = build_tokens(answers)
    if change is not None:
        tokens = change(tokens).select(pl.col(name).cast(kind) for name, kind in TOKENS.items())
    write_part(tokens, folder / "part.parquet")
    write_tokens([folder / "part.parquet"], folder / "tokens.parquet")
    (folder / "part.parquet").unlink()
    stored = pl.scan_parquet(folder / "tokens.parquet", glob=False)
    infos = [ResponseInfo(answer.source_file, answer.response_idx, answer.prompt_id) for answer in answers]
    facts = RunFacts("p-model", model, estimator, top_logprobs, 0.2, [Sampling(1.0, 1.0, 0)], alignment)
    write_responses(summarise_responses(stored, infos), folder / "responses.parquet")
    write_summary(summarise_dataset(stored, infos, facts), folder / "summary.json")
    write_json_atomic(folder / "run.json", {"model2": model})
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The run over `STEADY`, which tests copy: writing one takes longer."""
    return write_run(tmp_path_factory.mktemp("written"), STEADY)


@pytest.fixture
def steady(written, tmp_path):
    return shutil.copytree(written, tmp_path / "steady")


def analyze(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(capsys, *arguments):
    """The one line that a call ends with, exit code 2."""
    code, out, err = analyze(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    return err


class TestOneRun:
    def test_prints_the_headline_of_the_run(self, steady, capsys):
        code, out, err = analyze(capsys, steady)
        assert (code, err) == (0, "")
        for label, text in headline(load_run(steady).summary):
            assert re.search(rf"^{re.escape(label)} +{re.escape(text)} *$", out, re.MULTILINE), label
        assert re.search(r"^P +p-model *$", out, re.MULTILINE)
        assert re.search(r"^Q +q-model *$", out, re.MULTILINE)

    def test_writes_nothing_unless_asked(self, steady, capsys, tmp_path):
        before = files_of(steady)
        analyze(capsys, steady)
        assert files_of(steady) == before
        assert [path.name for path in tmp_path.iterdir()] == ["steady"]

    def test_writes_the_page_of_the_run(self, steady, capsys, tmp_path):
        turns = [
            {"role": role, "content": text} for role, text in (("user", "Why?"), ("model", "So."), ("user", "And?"))
        ]
        write_json_atomic(steady / "f3_kl.json", {"prompt": turns, "system": "Be."})
        code, out, _ = analyze(capsys, steady, "--report", tmp_path / "a b" / "r.html", "--top", 2)
        assert (code, out.splitlines()[-1]) == (0, str(tmp_path / "a b" / "r.html"))
        page = (tmp_path / "a b" / "r.html").read_text(encoding="utf-8")
        assert verdict_of(load_run(steady).summary).sentence in page
        assert "system: Be.\\n\\nuser: Why?\\n\\nmodel: So.\\n\\nuser: And?" in page
        assert page.count('class="before"') == 2 + 2  # under the verdict, and in the table
        assert "--report belongs to RUN_DIR" in refusal(capsys, "--compare", steady, steady, "--report", "x.html")

    def test_repeats_the_warnings(self, tmp_path, capsys):
        run = write_run(tmp_path / "a", [*STEADY, Answer("g.json", "prompt7", 0, [0.1, None])])
        assert "warning: 1 of 26 positions asked were not measured (blocked 1)" in analyze(capsys, run)[1]

    def test_says_when_the_lists_do_not_match(self, tmp_path, capsys):
        alignment = {"verdict": "refuse", "reasons": ["only 3.0% of the listed tokens are listed by both models"]}
        run = write_run(tmp_path / "a", STEADY, alignment=alignment)
        assert "warning: only 3.0% of the listed tokens" in analyze(capsys, run)[1]
        assert "warning: B: only 3.0% of the listed tokens" in analyze(capsys, "--compare", run, run)[1]

    def test_tables_have_the_worst_first_and_as_many_rows_as_asked(self, steady, capsys, tmp_path):
        code, out, _ = analyze(capsys, steady, "--top", 3, "--json", tmp_path / "out.json")
        assert code == 0
        found = json.loads((tmp_path / "out.json").read_text("utf-8"))
        assert [row["token"] for row in found["worst_tokens"]] == ["t0", "t1", "t2"]
        assert [row["source_file"] for row in found["worst_positions"]] == ["f5.json"] * 3
        assert [row["position"] for row in found["worst_positions"]] == [0, 1, 2]
        assert [row["source_file"] for row in found["worst_responses"]] == ["f5.json", "f4.json", "f3.json"]
        assert "f5.json#0, 2" in out
        assert "f5.json#0, 3" not in out
        assert found["summary"] == json.loads((steady / "summary.json").read_text("utf-8"))
        assert found["headline"][0] == ["P", "p-model"]

    def test_csv_files_hold_what_is_shown_unrounded(self, steady, tmp_path, capsys):
        def odd(tokens):
            return tokens.with_columns(token=pl.when(pl.col("position") > 0).then(pl.lit('"a,\n')).otherwise("token"))

        run = write_run(tmp_path / "odd", STEADY, change=odd)
        code = analyze(capsys, run, "--top", 2, "--csv", tmp_path / "csv")[0]
        assert code == 0
        names = ["headline", "summary", "worst_positions", "worst_responses", "worst_tokens"]
        assert sorted(path.stem for path in (tmp_path / "csv").iterdir()) == names
        summary = load_run(run).summary
        positions = pl.read_csv(tmp_path / "csv" / "worst_positions.csv")
        assert positions["kl_estimate"].to_list() == [0.1 * 6] * 2
        assert positions["token"].to_list() == ["t0", '"a,\n']
        figures = dict(pl.read_csv(tmp_path / "csv" / "summary.csv").iter_rows())
        assert float(figures["kl_per_token.estimate.value"]) == summary.kl_per_token.estimate.value
        assert figures["model_q"] == "q-model"
        tokens = pl.read_csv(tmp_path / "csv" / "worst_tokens.csv")
        assert tokens["kl_sum"].to_list() == [row["kl_sum"] for row in summary.by_token[:2]]

    def test_json_on_standard_output_stands_there_alone(self, steady, capsys, tmp_path):
        code, out, err = analyze(capsys, steady, "--json", "-", "--csv", tmp_path / "csv")
        assert (code, err) == (0, "")
        assert json.loads(out)["summary"] == json.loads((steady / "summary.json").read_text("utf-8"))

    def test_json_has_the_positions_above_a_threshold(self, capsys, tmp_path):
        def with_infinite(tokens):
            first = (pl.col("source_file") == "f0.json") & (pl.col("position") == 0)
            why = pl.when(first).then(pl.lit("infinite"))
            return tokens.with_columns(kl_estimate=pl.when(~first).then("kl_estimate"), reason=why, error=why)

        run = write_run(tmp_path / "run", STEADY, change=with_infinite)
        code, out, _ = analyze(capsys, run, "--threshold", "0.55", "--top", 1, "--json", "-")
        assert code == 0
        found = json.loads(out)
        assert found["n_positions"] == len(found["positions"]) == 5
        assert [(row["score"], row["reason"]) for row in found["positions"]] == [
            (None, "infinite"),
            *[(0.1 * 6, None)] * 4,
        ]

    def test_nothing_is_padded_in_a_pipe_and_nothing_is_wider_than_a_terminal(self, steady, capsys, monkeypatch):
        out = analyze(capsys, steady)[1]
        assert [line for line in out.splitlines() if line != line.rstrip()] == []
        for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "LINES": "24"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        shown = analyze(capsys, steady)[1]
        assert "\x1b[1m" in shown
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        tables = plain[plain.index("Tokens with") :]
        assert max(map(len, tables.splitlines())) <= 80
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b[3" not in analyze(capsys, steady)[1]

    def test_a_position_stands_with_the_text_before_it(self, tmp_path):
        run = write_run(tmp_path / "a", [Answer("a.json", "p", 0, [0.1] * 11 + [5.0]), Answer("b.json", "p", 0, [4.0])])
        worst = worst_positions(load_run(run), 2)
        assert [row["before"] for row in worst] == ["t3t4t5t6t7t8t9t10", None]

    def test_infinite_positions_and_responses_come_first(self, tmp_path, capsys):
        def make_infinite(tokens):
            at = (pl.col("source_file") == "f0.json") & (pl.col("position") == 1)
            return tokens.with_columns(
                kl_estimate=pl.when(~at).then("kl_estimate"),
                reason=pl.when(at).then(pl.lit("infinite")),
                error=pl.when(at).then(pl.lit("P allows a token that Q excludes")),
            )

        out = analyze(capsys, write_run(tmp_path / "a", STEADY, change=make_infinite), "--top", 1)[1]
        assert re.search(r"^f0\.json#0, 1 .*infinite", out, re.MULTILINE)
        assert re.search(r"^f0\.json#0 +4 of 4 +infinite +infinite", out, re.MULTILINE)

    def test_control_characters_of_tokens_do_not_reach_the_terminal(self, tmp_path, capsys):
        def escape(tokens):
            return tokens.with_columns(token=pl.lit("\x1b[2J\n"))

        out = analyze(capsys, write_run(tmp_path / "a", STEADY, change=escape))[1]
        assert "\x1b" not in out
        assert r"\x1b[2J\n" in out

    def test_a_run_without_any_measured_position_says_so(self, tmp_path, capsys):
        run = write_run(tmp_path / "a", [Answer("a.json", "p", 0, [None, None])])
        code, out, _ = analyze(capsys, run, "--csv", tmp_path / "csv")
        assert code == 0
        positions = pl.read_csv(tmp_path / "csv" / "worst_positions.csv")
        assert (positions.height, positions.columns[:3]) == (0, ["source_file", "response_idx", "position"])
        assert out.count("none: nothing has an estimate") == 3
        assert "not known: nothing was measured" in out

    def test_a_folder_with_brackets_and_equals_signs_is_read(self, tmp_path, capsys):
        assert analyze(capsys, write_run(tmp_path / "k=20 [a]", STEADY))[0] == 0

    def test_a_summary_that_an_earlier_version_wrote_lacks_figures_and_is_read(self, steady, capsys):
        path = steady / "summary.json"
        summary = json.loads(path.read_text())
        for name in ("perplexity", "logprob_difference", "top_token"):
            assert isinstance(summary.pop(name), dict)
        path.write_text(json.dumps(summary))
        assert load_run(steady).summary.perplexity is None
        assert main([str(steady)]) == 0
        shown = capsys.readouterr().out
        assert "Same top p" in shown
        assert "Perplexity" not in shown


@pytest.fixture
def opened(tmp_path):
    """The addresses that a browser was started with."""
    record = tmp_path / "opened"
    (tmp_path / "browser").write_text(f'#!/bin/sh\necho "$1" >> {record}\n')
    (tmp_path / "browser").chmod(0o755)
    webbrowser.register("recorder", None, webbrowser.GenericBrowser([str(tmp_path / "browser"), "%s"]), preferred=True)
    return lambda: record.read_text().splitlines()


class TestOpen:
    def test_opens_the_page_of_the_run_or_makes_one_elsewhere(self, steady, capsys, opened):
        before = files_of(steady)
        code, out, _ = analyze(capsys, steady, "--open")
        assert code == 0
        made = Path(opened()[0].removeprefix("file://"))
        assert "</html>" in made.read_text("utf-8")
        assert f"opened in the browser: {made}" in out
        assert files_of(steady) == before
        (steady / "report.html").write_text("of the run", encoding="utf-8")
        analyze(capsys, steady, "--open")
        assert opened()[1] == (steady / "report.html").as_uri()

    def test_opens_what_was_just_written(self, steady, capsys, opened, tmp_path):
        analyze(capsys, steady, "--report", tmp_path / "page.html", "--open")
        assert opened() == [(tmp_path / "page.html").as_uri()]


class TestRefusedFolder:
    def test_that_does_not_exist(self, tmp_path, capsys):
        assert f"{tmp_path / 'none'} is not a folder" in refusal(capsys, tmp_path / "none")

    @pytest.mark.parametrize("name", ["tokens.parquet", "responses.parquet", "summary.json", "run.json"])
    def test_that_lacks_a_result(self, steady, capsys, name):
        (steady / name).unlink()
        assert f"holds no finished run ({name} not found)" in refusal(capsys, steady)

    def test_that_a_run_is_still_writing_to(self, steady, capsys):
        (steady / ".parts" / "tokens").mkdir(parents=True)
        assert "is not finished" in refusal(capsys, steady)

    @pytest.mark.parametrize("name", ["tokens.parquet", "responses.parquet"])
    @pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" + b"\0" * 40])
    def test_with_a_damaged_table(self, steady, capsys, name, content):
        (steady / name).write_bytes(content)
        assert f"{name} cannot be read" in refusal(capsys, steady)

    @pytest.mark.parametrize("name", ["tokens.parquet", "responses.parquet"])
    def test_with_a_table_cut_off_in_the_middle(self, steady, capsys, name):
        whole = (steady / name).read_bytes()
        (steady / name).write_bytes(whole[:100] + b"\0" * 300 + whole[400:])
        assert "cannot be read" in refusal(capsys, steady)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0}', '{"format": 1}'])
    def test_with_a_damaged_summary_or_one_of_another_version(self, steady, capsys, content):
        (steady / "summary.json").write_text(content, encoding="utf-8")
        assert "summary.json" in refusal(capsys, steady)

    def test_with_a_summary_field_of_another_version(self, steady, capsys):
        summary = json.loads((steady / "summary.json").read_text("utf-8"))
        (steady / "summary.json").write_text(json.dumps(summary | {"new_figure": 1}), encoding="utf-8")
        assert "was written by another version" in refusal(capsys, steady)

    def test_but_not_one_without_the_columns_that_earlier_versions_did_not_write(self, steady, capsys):
        def shown():
            assert main([str(steady)]) == 0
            return capsys.readouterr().out

        now = shown()
        pl.read_parquet(steady / "tokens.parquet").drop("is_stop", "flags").write_parquet(steady / "tokens.parquet")
        assert shown() == now

    def test_with_a_column_of_another_version(self, steady, capsys):
        pl.read_parquet(steady / "tokens.parquet").drop("kl_lower").write_parquet(steady / "tokens.parquet")
        assert "kl_lower" in refusal(capsys, steady)

    def test_whose_files_are_of_two_runs(self, steady, tmp_path, capsys):
        other = write_run(tmp_path / "other", STEADY[:5])
        (steady / "tokens.parquet").write_bytes((other / "tokens.parquet").read_bytes())
        assert "not of one run" in refusal(capsys, steady)


class TestRefusedCall:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "give either RUN_DIR or --compare A B"),
            (["a", "--compare", "a", "b"], "give either RUN_DIR or --compare A B"),
            (["--compare", "a"], "--compare takes two or more folders"),
            (
                ["--compare", "a", "b", "--label", "c=1 GB"],
                "--label c=1 GB: give RUN_DIR=TEXT with a folder of --compare",
            ),
            (["a", "--csv", "a.csv"], "--csv a.csv: a run is shown as several tables; give a folder"),
            (["a", "--top", "0"], "--top is 0"),
            (["a", "--top", "51"], "--top is 51"),
            (["a", "--top", "x"], "invalid int value"),
            (["--compare", "a", "b", "--top", "5"], "--top belongs to RUN_DIR"),
            (["a", "--tops", "5"], "unrecognized arguments"),
            (["--compare", "a", "b", "--open"], "--open belongs to RUN_DIR"),
        ],
    )
    def test_is_one_line(self, capsys, arguments, message):
        assert message in refusal(capsys, *arguments)

    def test_a_json_file_that_cannot_be_written_is_one_line(self, steady, capsys, tmp_path):
        (tmp_path / "file").write_text("x", encoding="utf-8")
        code, _, err = analyze(capsys, steady, "--json", tmp_path / "file" / "out.json")
        assert code == 2
        assert "cannot be written" in err


class TestCompare:
    def compare(self, tmp_path, capsys, shift, answers=STEADY, **settings):
        a = write_run(tmp_path / "a", answers, model="model-a")
        b = write_run(tmp_path / "b", shifted(answers, shift), model="model-b", **settings)
        code, out, err = analyze(capsys, "--compare", a, b, "--json", tmp_path / "out.json")
        assert (code, err) == (0, "")
        return out, json.loads((tmp_path / "out.json").read_text("utf-8"))

    def test_says_which_is_further_from_p_with_the_paired_interval(self, tmp_path, capsys):
        out, found = self.compare(tmp_path, capsys, lambda i, kl: kl + 0.2 + 0.01 * (i % 2))
        # Differences .2 and .21 by turns: mean .205, SE sqrt(6/5 * 6 * .005²)/6 = .002236; t(.975, 5) = 2.571
        assert "B is further from P than A by 0.2050 nats per token (95 % CI 0.1993 to 0.2107, 6 prompts)." in out
        assert "B is further from P than A by 0.8200 nats per response (95 % CI 0.7970 to 0.8430, 6 prompts)." in out
        assert found["per_token"]["value"] == pytest.approx(-0.205)
        assert found["per_token"]["ci_high"] == pytest.approx(-0.205 + 2.5706 * 0.002236, abs=1e-5)
        assert f"A = model-a ({tmp_path / 'a'}): 0.350 nats per token (95 % CI 0.154 to 0.546)" in out
        assert "Paired by the censored estimate over 24 positions that both runs measured." in out

    def test_says_it_of_a_too(self, tmp_path, capsys):
        out, found = self.compare(tmp_path, capsys, lambda i, kl: kl / 2)
        assert "A is further from P than B by 0.175 nats per token (95 % CI" in out
        assert found["per_token"]["value"] == pytest.approx(0.175)

    def test_says_when_the_two_cannot_be_told_apart(self, tmp_path, capsys):
        out, _ = self.compare(tmp_path, capsys, lambda i, kl: kl + 0.05 * (-1) ** i)
        assert "A and B cannot be told apart per token: the difference is " in out
        assert "A and B cannot be told apart per response" in out
        assert "further" not in out

    def test_of_a_run_with_itself_is_zero(self, tmp_path, capsys):
        out, _ = self.compare(tmp_path, capsys, lambda i, kl: kl)
        assert "A and B are equally far from P: the difference per token is 0 for every prompt." in out

    def test_of_fewer_prompts_than_an_interval_needs_says_so(self, tmp_path, capsys):
        out, _ = self.compare(tmp_path, capsys, lambda i, kl: kl + 0.2, answers=STEADY[:3])
        assert "B is further from P than A by 0.2 nats per token in these data, but without an interval" in out
        assert "3 prompts, at least 5 are needed" in out

    def test_counts_what_only_one_run_measured(self, tmp_path, capsys):
        out, _ = self.compare(tmp_path, capsys, lambda i, kl: None if i == 2 else kl + 0.1)
        assert (
            "Paired by the censored estimate over 20 positions that both runs measured; left out: 4 only A measured."
            in out
        )

    def test_estimates_of_different_kinds_are_compared_by_the_censored_one(self, tmp_path, capsys):
        # B reports the bucket, half the KL; its censored estimates are those of A.
        def report_bucket(tokens):
            return tokens.with_columns(kl_estimate=pl.col("kl_bucket"))

        out, found = self.compare(tmp_path, capsys, lambda i, kl: kl, estimator="bucket", change=report_bucket)
        assert "the difference per token is 0 for every prompt" in out
        assert "they are compared by their censored estimates" in out
        assert found["compared_by"] == "kl_censored"

    def test_two_runs_with_the_exact_kl_are_compared_by_it(self, tmp_path, capsys):
        def add_exact(tokens):
            return tokens.with_columns(kl_exact=pl.col("kl_censored") * 2)

        a, b = (write_run(tmp_path / name, STEADY, change=add_exact) for name in "ab")
        code, out, _ = analyze(capsys, "--compare", a, b, "--json", tmp_path / "out.json")
        found = json.loads((tmp_path / "out.json").read_text("utf-8"))
        assert code == 0
        assert found["compared_by"] == "kl_exact"
        assert found["a_per_token"]["value"] == pytest.approx(0.70)
        assert "Paired by the exact KL over 24 positions" in out

    def test_an_exact_kl_is_not_set_against_an_estimate(self, tmp_path, capsys):
        def add_exact(tokens):
            return tokens.with_columns(kl_exact=pl.col("kl_censored") * 2)

        out, found = self.compare(tmp_path, capsys, lambda i, kl: kl, change=add_exact)
        assert "the difference per token is 0 for every prompt" in out
        assert found["compared_by"] == "kl_estimate"

    def test_an_exact_kl_in_part_is_not_used(self, tmp_path, capsys):
        def add_some(tokens):
            return tokens.with_columns(kl_exact=pl.when(pl.col("position") > 0).then("kl_censored"))

        a, b = (write_run(tmp_path / name, STEADY, change=add_some) for name in "ab")
        assert "Paired by the censored estimate over 24" in analyze(capsys, "--compare", a, b)[1]

    def test_an_estimator_that_understates_differences_is_named(self, tmp_path, capsys):
        a, b = (write_run(tmp_path / name, STEADY, estimator="lower") for name in "ab")
        out = analyze(capsys, "--compare", a, b)[1]
        assert "warning: both report the estimator 'lower', which misses more of a large KL" in out

    def test_different_list_lengths_are_pointed_out(self, tmp_path, capsys):
        out, _ = self.compare(tmp_path, capsys, lambda i, kl: kl, top_logprobs=10)
        assert "warning: A was measured with 20 candidates per position, B with 10" in out

    @pytest.mark.parametrize(
        ("column", "value"), [("token", "other"), ("logprob_p", -1.5), ("prompt_id", "another"), ("token_id", 7)]
    )
    def test_refuses_runs_over_different_responses(self, tmp_path, capsys, column, value):
        a = write_run(tmp_path / "a", STEADY)
        b = write_run(tmp_path / "b", STEADY, change=lambda tokens: tokens.with_columns(pl.lit(value).alias(column)))
        line = refusal(capsys, "--compare", a, b)
        assert f"f0.json#0 position 0: {column} is" in line
        assert "the two runs must be over the same responses of P" in line

    def test_refuses_runs_without_a_common_response(self, tmp_path, capsys):
        a, b = write_run(tmp_path / "a", STEADY[:3]), write_run(tmp_path / "b", STEADY[3:])
        assert "share no response" in refusal(capsys, "--compare", a, b)

    def test_refuses_an_unfinished_run(self, tmp_path, capsys):
        a = write_run(tmp_path / "a", STEADY)
        (tmp_path / "b").mkdir()
        assert f"{tmp_path / 'b'} holds no finished run" in refusal(capsys, "--compare", a, tmp_path / "b")


class TestCompareMany:
    """Five runs over the same responses, KL × 1, 1.01, 2, 3 and one that lacks a prompt."""

    @pytest.fixture(scope="class")
    @classmethod
    def folders(cls, tmp_path_factory):
        place = tmp_path_factory.mktemp("many")
        scales = {"a": 2.0, "b": 1.0, "c": 1.01, "d": 3.0}
        runs = [
            write_run(place / name, shifted(STEADY, lambda i, kl, by=scale: kl * by), model=f"model-{name}")
            for name, scale in scales.items()
        ]
        part = shifted(STEADY, lambda i, kl: None if i == 5 else kl * 1.5)
        return [*runs, write_run(place / "e=1", part, model="model-e")]

    def test_ranks_them_with_differences_from_the_nearest(self, folders, tmp_path, capsys):
        label = f"{folders[-1]}=1.2 GB"
        code, out, err = analyze(capsys, "--compare", *folders, "--label", label, "--json", tmp_path / "out.json")
        assert (code, err) == (0, "")
        found = json.loads((tmp_path / "out.json").read_text("utf-8"))
        assert [row["model_q"] for row in found["runs"]] == [f"model-{name}" for name in "bcead"]
        # Five prompts that all measured, KL .1 to .5.
        assert [row["kl_per_token"] for row in found["runs"]] == pytest.approx([0.3, 0.303, 0.45, 0.6, 0.9])
        assert (found["n_positions"], found["n_left_out"], found["n_comparisons"]) == (20, 4, 10)
        assert found["level_of_differences"] == pytest.approx(0.995)
        last = found["runs"][-1]
        # Differences 2 × (.1 … .5): mean .6, SE = sqrt(5/4 × Σ(d - .6)²)/5 = .1414; t(.9975, 4) = 5.598
        assert last["above_nearest"] == pytest.approx(0.6)
        assert last["above_nearest_high"] == pytest.approx(0.6 + 5.5976 * 0.141421, abs=1e-4)
        assert last["told_apart"] is False
        assert [row["label"] for row in found["runs"]] == [None, None, "1.2 GB", None, None]
        assert re.search(r"^model-e +1\.2 GB +0\.45 ", out, re.MULTILINE)
        assert re.search(r"^model-b +0\.300? .* the nearest", out, re.MULTILINE)
        assert "4 positions that some of the runs measured and not all take no part" in out
        assert "These intervals hold together for all 10 differences between two of 5 runs (each is of 99.5 %)" in out

    def test_is_divided_where_a_terminal_is_narrow(self, folders, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        out = analyze(capsys, "--compare", *folders)[1]
        rows = [line.rstrip() for line in out.splitlines() if line.startswith("model-")]
        assert max(map(len, rows)) <= 80
        assert len(rows) >= 15
        for number, line in enumerate(rows):
            assert line.startswith(f"model-{'bcead'[number % 5]} ")

    def test_is_a_table_of_programs_too(self, folders, tmp_path, capsys):
        code, out, _ = analyze(capsys, "--compare", *folders, "--csv", tmp_path / "candidates.csv")
        frame = pl.read_csv(tmp_path / "candidates.csv")
        assert code == 0
        assert str(tmp_path / "candidates.csv") in out
        assert frame["rank"].to_list() == [1, 2, 3, 4, 5]
        assert frame["kl_per_token"].to_list() == pytest.approx([0.3, 0.303, 0.45, 0.6, 0.9])
        assert frame["told_apart"].to_list()[0] is None

    def test_is_a_picture_too(self, folders, tmp_path, capsys, monkeypatch):
        out = analyze(capsys, "--compare", *folders, "--figures", tmp_path / "figures")[1]
        assert out.endswith(f"{tmp_path / 'figures' / 'candidates.svg'}\n{tmp_path / 'figures' / 'candidates.png'}\n")
        assert (tmp_path / "figures" / "candidates.png").read_bytes().startswith(b"\x89PNG")
        monkeypatch.setitem(sys.modules, "resvg_py", None)  # as if it were not installed
        out = analyze(capsys, folders[0], "--figures", tmp_path / "without")[1]
        assert "warning: no PNG was made (a browser can turn an SVG into one, too): they need resvg-py" in out
        names = sorted(path.name for path in (tmp_path / "without").iterdir())
        assert names == ["by-position.svg", "by-prompt.svg", "certainty.svg", "distribution.svg"]

    def test_refuses_another_p_and_a_folder_named_twice(self, folders, tmp_path, capsys):
        other = write_run(tmp_path / "o", STEADY, change=lambda tokens: tokens.with_columns(token=pl.lit("other")))
        line = refusal(capsys, "--compare", *folders[:2], other)
        assert f"f0.json#0 position 0: token is 't0' in {folders[0]} and 'other' in {other}" in line
        assert f"{other} is named 2 times" in refusal(capsys, "--compare", folders[0], other, other)


class TestVerdict:
    def test_of_an_unknown_difference_says_why(self):
        unknown = Estimate(None, None, None, None, 0, 0, 0, None, "infinite at 2 of 9 measured positions")
        assert verdict(unknown, "token") == (
            "The difference per token is not known: infinite at 2 of 9 measured positions."
        )

    def test_of_an_interval_around_zero_shows_both_signs(self):
        estimate = Estimate(0.012, 0.02, -0.03, 0.054, 90, 0, 12, 1.0, None)
        assert verdict(estimate, "token") == (
            "A and B cannot be told apart per token: the difference is +0.012 nats (95 % CI -0.030 to +0.054, "
            "12 prompts; above 0 B is nearer to P)."
        )

    def test_of_equal_means_without_an_interval(self):
        estimate = Estimate(0.0, None, None, None, 9, 0, 1, None, "1 prompt, at least 5 are needed")
        assert "are equal, without an interval (1 prompt" in verdict(estimate, "response")


class TestSummaryFromJson:
    def test_gives_back_the_summary(self, tmp_path):
        run = write_run(tmp_path / "a", [*STEADY, Answer("g.json", "prompt7", 0, [0.1, None])])
        summary = load_run(run).summary
        assert summary_from_json(json.loads(json.dumps(summary.to_json()))) == summary
        tokens = pl.scan_parquet(run / "tokens.parquet")
        facts = RunFacts("p-model", "q-model", "censored", 20, 0.2, [Sampling(1.0, 1.0, 0)], None)
        infos = [ResponseInfo(a.source_file, 0, a.prompt_id) for a in [*STEADY, Answer("g.json", "prompt7", 0, [])]]
        assert summarise_dataset(tokens, infos, facts) == summary

    def test_of_a_run_whose_k1_was_not_computed(self, tmp_path):
        run = write_run(tmp_path / "a", STEADY)
        data = load_run(run).summary.to_json()
        data["sampled_token"] |= {"k1_per_token": None, "not_computed": "temperature 0"}
        assert summary_from_json(data).sampled_token.k1_per_token is None


class TestProgram:
    def test_starts_without_prefect_and_shows_its_help(self):
        code = "import sys, flows.analyze; print(sorted({'prefect', 'google', 'httpx'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.strip() == "[]"
        shown = subprocess.run(
            [sys.executable, "-m", "flows.analyze", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
        )
        for word in ("RUN_DIR", "--compare A [B ...]", "--top N", "--json FILE", "exit codes"):
            assert word in " ".join(shown.stdout.split())


def test_runs_by_one_estimator_are_compared_by_what_they_report(tmp_path):
    a = load_run(write_run(tmp_path / "a", STEADY, estimator="bucket")).summary
    assert comparable_column(a, a) == "kl_estimate"


def test_the_headline_stands_out_where_colours_are_shown(steady, capsys, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b" not in analyze(capsys, steady)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1;32mKL(P‖Q) per token" in analyze(capsys, steady)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    out = analyze(capsys, steady)[1]
    assert "\x1b[1mKL(P‖Q) per token" in out
    assert "\x1b[1;32m" not in out
