"""Which files a run reads."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.errors import ConfigError
from backends.storage import as_location, remove_folder, write_bytes_atomic
from flows.config.models import RunConfig
from flows.config.reading import validate
from flows.stages.inputs import file_defect, find_inputs, read_ahead, read_input, read_inputs


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


@pytest.mark.parametrize("folder", ["disk", "bucket"])
def test_a_file_with_several_prompts_is_so_many_files(folder: str, tmp_path: Path, remote_folder: Path) -> None:
    place = tmp_path / "in" if folder == "disk" else remote_folder
    lines = [f'{{"prompt": "{name}", "responses": []}}' for name in "abab"]
    write_bytes_atomic(place / "x.jsonl", "\n".join(lines).encode())
    write_bytes_atomic(place / "y.jsonl", RESPONSES)
    values = {"input_dir": place, "output_dir": tmp_path / "out", "model2": "q", "pattern": "*.jsonl"}
    found = list(read_inputs(find_inputs(validate(RunConfig, values))))
    assert [(file.source_file, parsed.prompt and parsed.prompt.turns[0].content) for file, parsed in found] == [
        ("x.jsonl#0", "a"), ("x.jsonl#1", "b"), ("y.jsonl", "p"),
    ]  # fmt: skip
    files = [file for file, _ in found]
    assert [file.size for file in files[:2]] == [2 * len(lines[0])] * 2
    assert list(read_inputs(files)) == found, "parts are taken as they are"
    assert list(read_ahead(files)) == files


def test_a_file_that_changes_while_its_parts_are_read_is_no_input(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(RESPONSES + b"\n" + RESPONSES.replace(b'"p"', b'"q"'))
    values = {"input_dir": tmp_path, "output_dir": tmp_path / "out", "model2": "q", "pattern": "*.jsonl"}
    (first, _), *_ = read_inputs(find_inputs(validate(RunConfig, values)))
    path.write_bytes(RESPONSES + b"\n" + RESPONSES.replace(b'"p"', b'"longer"'))
    with pytest.raises(ConfigError, match="changed while it was read"):
        read_input(first)


def test_where_only_lines_are_the_pattern_for_them_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(RESPONSES)
    with pytest.raises(ConfigError, match=r"Files that match '\*.jsonl': 1\."):
        find_inputs(validate(RunConfig, {"input_dir": tmp_path, "output_dir": tmp_path / "out", "model2": "q"}))


def test_links_in_a_circle_and_links_to_nothing_are_files_that_cannot_be_read_and_the_others_are_read(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, target in {"a.json": "b.json", "b.json": "a.json", "c.json": "nowhere", "d": ".", "e": "../in"}.items():
        (folder / name).symlink_to(target)
    (folder / "f.json").write_text("[]")
    for pattern in ("*.json", "**/*.json"):
        files = find_inputs(
            validate(RunConfig, {"input_dir": folder, "output_dir": tmp_path / "o", "model2": "q", "pattern": pattern})
        )
        defects = {file.source_file: file_defect(parsed) for file, parsed in read_inputs(files)}
        assert list(defects) == ["a.json", "b.json", "c.json", "f.json"]
        assert [defects[name].message.split(". ")[0] for name in ("a.json", "b.json", "c.json")] == [
            "a.json: the file cannot be read: Too many levels of symbolic links",
            "b.json: the file cannot be read: Too many levels of symbolic links",
            "c.json: the file cannot be read: No such file or directory",
        ]
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    with pytest.raises(ConfigError, match="circle' does not exist or is no directory"):
        find_inputs(validate(RunConfig, {"input_dir": circle, "output_dir": tmp_path / "o", "model2": "q"}))
