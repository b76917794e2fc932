"""An output folder that cannot be used is the user's mistake, found before any work."""

from pathlib import Path

import pytest
from filelock import FileLock

from backends.errors import ConfigError
from flows.folder.layout import OutputFolder
from flows.folder.lock import made_output, run_lock
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


def end_in_an_error(folder: OutputFolder, *kept: Path) -> None:
    with pytest.raises(ConfigError), made_output(folder, inside="scores"), run_lock(folder):  # noqa: PT012
        for path in kept:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        raise ConfigError("no")


def test_a_run_that_kept_nothing_leaves_no_folder(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    end_in_an_error(folder, folder.path / ".history.parquet.lock", folder.path / ".sampling" / "identity")
    assert list(tmp_path.iterdir()) == []


def test_what_was_kept_or_was_there_before_stays(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    end_in_an_error(folder, folder.jobs / "job.json")
    assert (folder.jobs / "job.json").exists()
    folder = OutputFolder(tmp_path / "mine")
    folder.path.mkdir()
    end_in_an_error(folder)
    assert folder.scores.is_dir()


def test_a_folder_that_another_run_has_taken_stays(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    other = FileLock(folder.lock)
    with pytest.raises(ConfigError), made_output(folder):  # noqa: PT012 - the other run comes within
        other.acquire()
        raise ConfigError("no")
    assert folder.lock.exists()
    other.release()
