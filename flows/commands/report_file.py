"""``flows.analyze --report``: the page of a finished run, from the files in its folder."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import polars as pl

from backends.errors import ConfigError
from backends.storage import exists, local_copies
from flows.folder.finished import load_run
from flows.folder.output import made_locally, publish_from
from kl.finished.run import Run
from kl.input.problems import Notes
from kl.input.prompts import read_prompt
from kl.output.files import result_paths
from kl.output.report.page import prompt_text, write_report


def write_report_of(run_dir: Path, target: Path, top: int) -> None:
    """Write the page of a run to a file, on a disk or in a bucket.

    Raises
    ------
    ConfigError
        If there is no finished run, its files cannot be read or do not belong together, or the file cannot be written.
    """
    run = load_run(run_dir, with_lists=True)

    def prompts(wanted: Collection[str]) -> dict[str, str]:
        return _prompts(run, wanted)

    try:
        with made_locally(target.parent) as folder:
            write_report(run, folder / target.name, prompts=prompts, top=top)
            publish_from(folder, target.parent, [target.name])
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise ConfigError(f"{target} cannot be made from {run_dir}: {' '.join(str(error).split())}") from error


def _prompts(run: Run, wanted: Collection[str]) -> dict[str, str]:
    """The prompts of some input files, as the results of these files state them, where they are still there."""
    sources = run.responses.select("source_file").unique().collect().to_series().to_list()
    results = {name: run.folder / path for name, path in result_paths(sources).items() if name in wanted}
    names = [name for name, path in results.items() if exists(path)]
    found: dict[str, str] = {}
    for name, (_, copy) in zip(names, local_copies(results[name] for name in names), strict=True):
        prompt = read_prompt(json.loads(copy.read_bytes()), Notes(name))
        if prompt is not None:
            found[name] = prompt_text(prompt)
    return found
