"""Which files a run reads."""

from pathlib import Path

from flows.config import RunConfig, validate
from flows.inputs import find_inputs


def test_results_below_the_input_folder_are_no_input_and_do_not_count_as_files(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "a-results").mkdir(parents=True)
    for name in ("a-results/x_kl.json", "a-results/y_kl.json", "b.json", "c.json", "d.json"):
        (folder / name).write_text("{}")
    values = {"input_dir": folder, "output_dir": folder / "a-results", "model2": "q", "pattern": "**/*.json"}
    found = find_inputs(validate(RunConfig, values | {"max_files": 2}))
    assert [file.source_file for file in found] == ["b.json", "c.json"]
