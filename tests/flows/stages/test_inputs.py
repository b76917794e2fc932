"""Which files a run reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.errors import ConfigError
from backends.storage import as_location, remove_folder, write_bytes_atomic
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.stages.inputs import file_defect, find_inputs, read_ahead, read_input


def test_results_below_the_input_folder_are_no_input_and_do_not_count_as_files(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "a-results").mkdir(parents=True)
    for name in ("a-results/x_kl.json", "a-results/y_kl.json", "b.json", "c.json", "d.json"):
        (folder / name).write_text("{}")
    values = {"input_dir": folder, "output_dir": folder / "a-results", "model2": "q", "pattern": "**/*.json"}
    found = find_inputs(validate(RunConfig, values | {"max_files": 2}))
    assert [file.source_file for file in found] == ["b.json", "c.json"]


NAMES = ("a.json", "b.JSON", "c.txt", ".hidden.json", "x/a.json", "x/y/b.json", "x/y/z/c[1].json", "d#?%20 é.json")
PATTERNS = ("*.json", "**/*.json", "x/*.json", "x/**/*.json", "**/y/*.json", "*/*/*.json", "?.json", "[ab].*",
            "**/c[[]1].json", "**", "x", "x/y/b.json", "./*.json", "*")  # fmt: skip


@pytest.fixture
def remote_folder() -> Iterator[Path]:
    folder = as_location("memory://inputs/in")
    yield folder
    remove_folder(folder)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_in_a_bucket_what_it_means_on_a_disk(pattern: str, tmp_path: Path, remote_folder: Path) -> None:
    for name in NAMES:
        write_bytes_atomic(tmp_path / "in" / name, b"{}")
        write_bytes_atomic(remote_folder / name, b"{}")

    def found(folder: Path) -> list[str] | str:
        try:
            config = validate(RunConfig, {"input_dir": folder, "output_dir": "out", "model2": "q", "pattern": pattern})
            return [file.source_file for file in find_inputs(config)]
        except ConfigError as error:
            return str(error).replace(str(folder), "")

    assert found(remote_folder) == found(tmp_path / "in")


@pytest.mark.parametrize("pattern", ["a**", "../*.json", "/*.json"])
def test_a_pattern_that_cannot_be_used_is_refused_in_a_bucket(pattern: str, remote_folder: Path) -> None:
    write_bytes_atomic(remote_folder / "a.json", b"{}")
    with pytest.raises(ConfigError, match="--input-dir/--pattern: pattern"):
        find_inputs(validate(RunConfig, {**REMOTE, "pattern": pattern}))


REMOTE = {"input_dir": "memory://inputs/in", "output_dir": "memory://inputs/in/results", "model2": "q"}
RESPONSES = b'{"prompt": "p", "responses": []}'


def test_results_below_a_remote_input_folder_are_no_input(remote_folder: Path) -> None:
    for name in ("b.json", "results/x_kl.json", "results2/c.json"):
        write_bytes_atomic(remote_folder / name, b"{}")
    found = find_inputs(validate(RunConfig, {**REMOTE, "pattern": "**/*.json", "max_files": 2}))
    assert [file.source_file for file in found] == ["b.json", "results2/c.json"]


def test_a_remote_file_is_read_once_and_again_when_a_later_run_finds_it_changed(remote_folder: Path) -> None:
    config = validate(RunConfig, REMOTE)
    write_bytes_atomic(remote_folder / "a.json", RESPONSES)
    (file,) = find_inputs(config)
    assert read_input(file).prompt.turns[0].content == "p"
    write_bytes_atomic(remote_folder / "a.json", RESPONSES.replace(b'"p"', b'"other"'))
    assert read_input(file).prompt.turns[0].content == "p"
    (again,) = read_ahead(find_inputs(config))
    assert read_input(again).prompt.turns[0].content == "other"


def test_a_remote_file_that_is_gone_is_a_file_that_cannot_be_read(remote_folder: Path) -> None:
    write_bytes_atomic(remote_folder / "a.json", RESPONSES)
    (file,) = find_inputs(validate(RunConfig, REMOTE))
    remove_folder(remote_folder)
    (file,) = read_ahead([file])
    assert file_defect(read_input(file)).kind == "unreadable-file"
