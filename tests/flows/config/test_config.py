"""Settings from file, flags, environment and defaults; every mistake is one line that names it."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backends.errors import ConfigError
from flows.commands.arguments import make_parser, parse_config
from flows.config.backend import check_capabilities, resolve_backend
from flows.config.models import RunConfig


def config_of(*arguments: str) -> RunConfig:
    return parse_config(make_parser("prog", "", RunConfig), RunConfig, arguments)


BASE = ("--input-dir", "in", "--output-dir", "out", "--model2", "q")


def test_the_seed_flags_have_their_names_and_defaults() -> None:
    config = config_of(*BASE)
    assert config.backend.name == "vertex_batch"
    assert (config.top_logprobs, config.pattern, config.max_files) == (20, "*.json", None)
    backend, options, _ = resolve_backend(config_of(*BASE, "--project-id", "proj"))
    assert backend.__name__ == "VertexBatchBackend"
    assert (options.location, options.bucket_name, options.poll_interval_s) == ("us-central1", None, 10)


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_flags_win_over_the_file_and_set_over_both(yaml_file) -> None:
    file = yaml_file("input_dir: a\noutput_dir: b\nmodel2: from-file\nmax_files: 3\nbackend: {name: local}\n")
    config = config_of("--config", file, "--model2", "from-flag", "--set", "max_files=9")
    assert (str(config.input_dir), config.model2, config.max_files, config.backend.name) == (
        "a",
        "from-flag",
        9,
        "local",
    )


def test_the_file_wins_over_the_environment_and_the_environment_over_the_default(yaml_file, monkeypatch) -> None:
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "env-project")
    monkeypatch.setenv("GOOGLE_CLOUD_LOCATION", "europe-west4")
    _, options, _ = resolve_backend(config_of(*BASE))
    assert (options.project_id, options.location) == ("env-project", "europe-west4")
    file = yaml_file("project_id: file-project\nlocation: us-east1\n")
    _, options, _ = resolve_backend(config_of(*BASE, "--config", file))
    assert (options.project_id, options.location) == ("file-project", "us-east1")


def test_backend_options_come_from_file_and_set(yaml_file) -> None:
    file = yaml_file("project_id: p\nbackend:\n  name: vertex_batch\n  poll_interval_s: 3\n  max_attempts: 2\n")
    _, options, _ = resolve_backend(config_of(*BASE, "--config", file, "--set", "backend.poll_interval_s=0.5"))
    assert (options.poll_interval_s, options.max_attempts) == (0.5, 2)


def test_a_setting_that_the_backend_has_no_use_for_is_noted(monkeypatch) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    _, _, notes = resolve_backend(config_of(*BASE, "--backend", "local", "--bucket-name", "my-bucket"))
    assert len(notes) == 1
    assert "bucket_name = 'my-bucket' is not used" in notes[0]


def test_the_full_vocabulary_is_refused_where_it_is_not_to_be_had() -> None:
    config = config_of(*BASE, "--top-logprobs", "full", "--project-id", "p")
    backend, _, _ = resolve_backend(config)
    with pytest.raises(ConfigError, match="'full', but the backend vertex_batch reports at most 20"):
        check_capabilities(config, backend)


@dataclass(frozen=True)
class Mistake:
    id: str
    expected: str
    arguments: tuple[str, ...] = ()
    base: tuple[str, ...] = BASE
    file: str | None = field(default=None)


MISTAKES = [
    Mistake("nothing set", r"input_dir is not set \(--input-dir\).*output_dir.*model2", base=()),
    Mistake("unknown flag", "unrecognized arguments: --modle2 x; see python -m flows.prog --help", ("--modle2", "x")),
    Mistake("flag without value", "--pattern: expected one argument", ("--pattern",)),
    Mistake("too many logprobs", "top_logprobs: must be 1 or more.*got 'many'", ("--top-logprobs", "many")),
    Mistake("no logprobs", "top_logprobs: must be 1 or more", ("--top-logprobs", "0")),
    Mistake("logprobs in words", "top_logprobs: .*'many'", ("--top-logprobs", "many")),
    Mistake("no file", "max_files: .*greater than or equal to 1, got '0'.*at least 1", ("--max-files", "0")),
    Mistake("fraction of a file", "max_files: .*integer.*'1.5'", ("--max-files", "1.5")),
    Mistake("no concurrency", "max_concurrent: .*1 to 1000", ("--max-concurrent", "0")),
    Mistake("empty model", "model2: .*at least 1 character", ("--model2", "")),
    Mistake("unknown estimator", "estimator: .*'mean'", ("--estimator", "mean")),
    Mistake(
        "wanted tokens beside all",
        "adds nothing to top_logprobs 'full'",
        ("--set", "wanted_tokens=true", "--top-logprobs", "full"),
    ),
    Mistake("output over input", "output_dir is the input_dir", ("--output-dir", "./in")),
    Mistake("set without value", "'backend.x' is not KEY=VALUE", ("--set", "backend.x")),
    Mistake("set of nothing", r"unknown setting 'pattrn'. Did you mean 'pattern'\?", ("--set", "pattrn=*.json")),
    Mistake("missing file", "cannot be read: No such file", ("--config", "nowhere.yaml")),
    Mistake("unknown key in file", r"unknown setting 'modle2'. Did you mean 'model2'\?", file="modle2: x\n"),
    Mistake("a list in the file", "must be a mapping of settings", file="- a\n- b\n"),
    Mistake("broken YAML", "is not valid YAML", file="a: [1,\n"),
    Mistake("a key twice", "'model2' is set twice", file="model2: a\nmodel2: b\n"),
    Mistake("a boolean for a number", "top_logprobs: ", file="top_logprobs: true\n"),
    Mistake("bytes that are no text", "is not valid YAML", file="\udcff"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.id)
def test_a_mistake_is_one_line_that_names_it(mistake: Mistake, tmp_path: Path) -> None:
    arguments = [*mistake.base, *mistake.arguments]
    if mistake.file is not None:
        path = tmp_path / "run.yaml"
        path.write_bytes(mistake.file.encode("utf-8", "surrogateescape"))
        arguments += ["--config", str(path)]
    with pytest.raises(ConfigError, match=mistake.expected) as caught:
        config_of(*arguments)
    assert "\n" not in str(caught.value)


BACKEND_MISTAKES = [
    (
        "unknown backend",
        ("--backend", "vertex"),
        r"unknown backend 'vertex'. Did you mean .*Known: .*local.*vertex_batch",
    ),
    ("unknown option", ("--set", "backend.pol_interval_s=3"), "Did you mean 'poll_interval_s'"),
    (
        "option out of bounds",
        ("--set", "backend.poll_interval_s=0"),
        r"backend.poll_interval_s: .*greater than 0, got 0",
    ),
    ("option of another kind", ("--set", "backend.max_attempts=often"), "backend.max_attempts: .*'often'"),
    (
        "two projects",
        ("--project-id", "a", "--set", "backend.project_id=b"),
        "project_id is 'a', but backend.project_id is 'b'",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), [case[1:] for case in BACKEND_MISTAKES], ids=[c[0] for c in BACKEND_MISTAKES]
)
def test_a_mistake_about_the_backend_is_one_line(arguments: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        resolve_backend(config_of(*BASE, *arguments))
    assert "\n" not in str(caught.value)


def test_set_names_a_backend_and_then_its_options() -> None:
    config = config_of(*BASE, "--set", "backend=local", "--set", "backend.system=Be brief.")
    backend, options, _ = resolve_backend(config)
    assert (backend.__name__, options.system) == ("LocalBackend", "Be brief.")


@pytest.mark.parametrize(
    "text",
    ["Answer: in short", "Use #tags, not words", "You are # 1", "- dash", "2026-13-45", "2026-01-01", " padded "],
)
def test_a_text_given_with_set_arrives_as_it_is_written(text: str) -> None:
    _, options, _ = resolve_backend(config_of(*BASE, "--backend", "local", "--set", f"backend.system={text}"))
    assert options.system == text


def test_set_takes_quoted_texts_numbers_lists_and_null_as_yaml_has_them() -> None:
    config = config_of(*BASE, "--set", "model2='7'", "--set", "max_files=null", "--set", "positions={fraction: 0.2}")
    assert (config.model2, config.max_files) == ("7", None)
    assert config.positions is not None
    assert config.positions.fraction == 0.2


@pytest.mark.parametrize("value", ["all", "5.5", "true", "0", "''"])
def test_a_number_of_candidates_that_is_not_allowed_is_named_once(value: str) -> None:
    with pytest.raises(
        ConfigError, match="must be 1 or more candidates per position, as many as the backend reports, or 'full'"
    ) as caught:
        config_of(*BASE, "--set", f"top_logprobs={value}")
    assert str(caught.value).count("top_logprobs: ") == 1


@pytest.mark.parametrize("name", ["max_files", "max_cost_usd", "max_concurrent", "model2"])
def test_a_yes_or_no_is_no_number_and_no_text(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: a yes or no is not allowed here, got True"):
        config_of(*BASE, "--set", f"{name}=true")


def test_the_bounds_of_an_inner_setting_are_in_its_message() -> None:
    with pytest.raises(ConfigError, match=r"positions\.fraction: .*got 0\. Share of the positions, above 0, up to 1"):
        config_of(*BASE, "--set", "positions.fraction=0")


@pytest.mark.parametrize("text", ["noise_floor: {fraction: 0.05}", "noise_floor:\n  fraction: 0.05\n  seed: 0"])
def test_a_noise_floor_is_a_sample_of_positions(text: str, yaml_file) -> None:
    by_file = config_of(*BASE, "--config", yaml_file(text))
    assert by_file == config_of(*BASE, "--set", "noise_floor.fraction=0.05")
    assert (by_file.noise_floor.sample.size(40), config_of(*BASE).noise_floor) == (2, None)
    with pytest.raises(ConfigError, match=r"noise_floor: set one of fraction \(0\.2\) and per_response"):
        config_of(*BASE, "--set", "noise_floor.seed=1")
    with pytest.raises(ConfigError, match=r"noise_floor\.fraction: .*got 0\b"):
        config_of(*BASE, "--set", "noise_floor.fraction=0")


@pytest.mark.parametrize("name", ["input_dir", "output_dir"])
def test_an_empty_path_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: the path is empty"):
        config_of(*BASE, "--set", f"{name}=")


@pytest.mark.parametrize("name", ["input_dir", "output_dir", "reuse_raw"])
def test_a_folder_may_be_in_a_bucket(name: str) -> None:
    config = config_of(*BASE, "--set", f"{name}=gs://bucket/x/")
    assert str(getattr(config, name)) == "gs://bucket/x"
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_one_place_in_a_bucket_is_not_input_and_output(yaml_file) -> None:
    with pytest.raises(ConfigError, match=r"output_dir is the input_dir \(gs://bucket/x\)"):
        config_of(*BASE, "--set", "input_dir=gs://bucket/x", "--set", "output_dir=gcs://bucket/x/")


def test_a_home_folder_in_a_file_is_the_users(yaml_file, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = config_of("--config", yaml_file("input_dir: ~/responses\noutput_dir: out\nmodel2: q\n"))
    assert config.input_dir == tmp_path / "responses"


def test_a_value_that_yaml_cannot_build_is_one_line(yaml_file) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML: month must be in"):
        config_of("--config", yaml_file("model2: 2026-13-45\n"))


def test_a_file_with_windows_line_ends_and_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfinput_dir: in\r\noutput_dir: out\r\nmodel2: q\r\n")
    assert config_of("--config", str(path)).model2 == "q"


def test_help_names_every_setting_and_what_it_may_be() -> None:
    text = " ".join(make_parser("prog", "", RunConfig, skip=("positions",)).format_help().split())
    for part in ("{censored,floor,lower,bucket}", "N|full", "USD", "vertex_online", "positions.per_response"):
        assert part in text


def test_wanted_tokens_are_refused_where_they_cannot_be_asked_for() -> None:
    config = config_of(*BASE, "--set", "wanted_tokens=true", "--project-id", "p")
    backend, _, _ = resolve_backend(config)
    with pytest.raises(ConfigError, match="wanted_tokens is on, but the backend vertex_batch cannot be asked"):
        check_capabilities(config, backend)
    local = config_of(*BASE, "--set", "wanted_tokens=true", "--backend", "local")
    check_capabilities(local, resolve_backend(local)[0])


def test_q_is_watched_by_what_it_says_now() -> None:
    watched = (*BASE, "--set", "alert.kl_per_token=0", "--set", "alert.of=q", "--set", "alert.compared_with=previous")
    with pytest.raises(
        ConfigError, match=r"of: q asks what Q says now, but scores_dir \(shared\).*leave scores_dir out"
    ):
        config_of(*watched, "--scores-dir", "shared")


def test_q_is_watched_by_lists_that_are_kept() -> None:
    watched = (*BASE, "--set", "alert.kl_per_token=0", "--set", "alert.of=q")
    with pytest.raises(ConfigError, match="of: q compares Q now with Q in an earlier run, which compared_with names"):
        config_of(*watched)
    watched = (*watched, "--set", "alert.compared_with=previous")
    assert config_of(*watched).watches_q
    with pytest.raises(ConfigError, match=r"alert\.of: q compares the lists of two runs, which candidates: false"):
        config_of(*watched, "--set", "candidates=false")
