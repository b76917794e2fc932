"""``flows.analyze --report``: the page of a finished run, from the files in its folder."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Collection
from pathlib import Path
from tempfile import mkdtemp

import polars as pl

from backends.errors import ConfigError
from backends.storage import download, exists, is_remote, local_copies
from flows.folder.finished import load_run
from flows.folder.layout import OutputFolder
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


def open_page(run_dir: Path, page: Path | None, top: int) -> str:
    """Open the page of a run in the browser; gives a line that says where it is.

    Parameters
    ----------
    page : Path, optional
        Where it was just written. Default: the one that the run wrote; where a run has none, one is made in a temporary
        folder. What is not on a disk of this machine is copied there.
    top : int
        As of `write_report_of`.

    Raises
    ------
    ConfigError
        As `write_report_of`.
    """
    found = page or OutputFolder(run_dir).report
    is_there = exists(found)
    if not is_there or is_remote(found):
        local = Path(mkdtemp(prefix="tokenkl-")) / found.name
        if is_there:
            download(found, local)
        else:
            write_report_of(run_dir, local, top)
        found = local
    opened = webbrowser.open(found.resolve().as_uri())
    return f"opened in the browser: {found}" if opened else f"no browser could be started; open this file: {found}"


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
