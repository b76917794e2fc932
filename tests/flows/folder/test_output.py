"""An output folder that cannot be used is the user's mistake, found before any work."""

from pathlib import Path

import pytest

from backends.errors import ConfigError
from flows.folder.output import prepare_output


def test_folders_are_made_and_left_empty(tmp_path: Path) -> None:
    prepare_output(tmp_path / "a" / "b", inside="scores")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/b", "a/b/scores"]


def test_a_file_with_the_folders_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match=r"--output-dir: .*out cannot be written to: a file has that name\. Choose"):
        prepare_output(tmp_path / "out")


def test_a_file_in_the_place_of_the_scores_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores").write_text("")
    with pytest.raises(ConfigError, match="scores cannot be written to: a file has that name"):
        prepare_output(tmp_path, inside="scores")


def test_a_folder_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output-dir: .*Choose another folder"):
        prepare_output(tmp_path / "file" / "out")
