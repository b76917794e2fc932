"""Batch files that nobody needs any more: ``python -m flows.clean``."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from backends.errors import ConfigError, TokenKLError
from backends.storage import exists, is_remote
from backends.vertex.cleaning.inventory import Action, Deletion, Inventory, Totals
from backends.vertex.jobs.ledger import JobLedger
from flows.commands.arguments import Parser, exit_code_of, make_parser, parse_config
from flows.config.backend import resolve_backend
from flows.config.cleaning import CleanConfig, parse_duration
from flows.folder.layout import OutputFolder
from flows.folder.members import store_of
from flows.runtime.environment import prepare_environment, say
from flows.runtime.progress import ProgressReporter
from flows.runtime.terminal import console, print_grid, print_lines
from flows.sampling.state import SamplingState
from flows.watch.report import EXIT_COMPLETE, EXIT_ERROR, EXIT_INCOMPLETE
from kl.signs import on_a_line

if TYPE_CHECKING:
    from backends.vertex.cleaning.cleaner import BucketCleaner

logger = logging.getLogger(__name__)

_LONGEST_JOB_DAYS = 4

_DESCRIPTION = (
    "List, and with --yes delete, what vertex_batch left in its bucket: files below batch_input/ and batch_output/ "
    "whose names it gave itself. The files of a job go together, when the newest of them is older than --older-than "
    "and the service says that the job has ended. Files of jobs that wait or run stay, and so do those whose job's "
    "state cannot be learnt."
)
_EXAMPLES = (
    ("what would be deleted", "--project-id P"),
    ("delete, sparing what a run has not read", "--project-id P --output-dir results/a --yes"),
    ("bucket and output folder of a run", "--config run.yaml --older-than 12h"),
    ("and let the bucket do it from now on", "--project-id P --set-lifecycle --yes"),
)
_EPILOG = (
    "exit codes: 0 done (also: nothing to do, no such bucket); 3 done, but files stayed because a job's state could "
    "not be learnt or a deletion failed; 2 a mistake in the settings or the call; 1 anything else"
)
_ABOUT_SET = (
    "Set any setting by its path; may be repeated, wins over all others. Of the backend's options two count here: "
    "backend.retry_deadline_s=600 and backend.request_timeout_s=60, how long a refused call is repeated and one call "
    "may take."
)


def unread_jobs(output_dirs: Sequence[Path], stores: Sequence[Path] = ()) -> dict[str, str]:
    """Keys of the jobs that runs have on record and have not read to the end, each with its folder or shared store.

    Raises
    ------
    ConfigError
        If a folder holds no records, which would protect nothing, or one that cannot be read.
    """
    unread: dict[str, str] = {}
    places_of = {
        output_dir: (OutputFolder(output_dir, store_of(output_dir)).jobs, SamplingState(output_dir).jobs)
        for output_dir in output_dirs
    }
    for place in stores:
        jobs = OutputFolder(place, place).jobs
        if not (exists(jobs) if is_remote(jobs) else jobs.is_dir()):
            raise ConfigError(
                f"--scores-dir {place}: there are no job records ({jobs}), hence nothing to protect. Give a store that "
                "runs with vertex_batch share, or leave it out."
            )
        places_of[place] = (jobs,)
    for output_dir, places in places_of.items():
        found = [folder for folder in places if (exists(folder) if is_remote(folder) else folder.is_dir())]
        if not found:
            raise ConfigError(
                f"--output-dir {output_dir}: there are no job records ({places[0]}), hence nothing to protect. "
                "Give the output folder of a run or of a sampling with vertex_batch, or leave it out."
            )
        entries = (entry for folder in found for entry in JobLedger(folder).entries())
        unread |= {entry.job_key: str(output_dir) for entry in entries if not entry.ended}
    return unread


def main(arguments: Sequence[str] | None = None) -> int:
    """Clean from the command line; returns the exit code."""
    try:
        return exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))
    except TokenKLError as error:
        say(f"error: {error}")
        return EXIT_ERROR


def _run(arguments: Sequence[str]) -> int:
    prepare_environment()
    config = parse_config(_parser(), CleanConfig, _joined(arguments))
    unread = unread_jobs(config.output_dir, config.scores_dir)
    return asyncio.run(_clean(_cleaner(config), config, unread))


def _parser() -> Parser:
    unused = ("backend", "max_concurrent")
    return make_parser(
        "clean", _DESCRIPTION, CleanConfig, examples=_EXAMPLES, epilog=_EPILOG, skip=unused, about_set=_ABOUT_SET
    )


def _joined(arguments: Sequence[str]) -> list[str]:
    # argparse takes "-1d" for a flag and would say that the duration is missing.
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--older-than" and re.match(r"-[0-9]", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _cleaner(config: CleanConfig) -> BucketCleaner:
    if config.backend.name != "vertex_batch":
        raise ConfigError(f"the backend {config.backend.name} keeps no files in a bucket; only vertex_batch does.")
    # Imported late: the SDKs take seconds, and --help or a mistake in the call needs none of them.
    from backends.vertex.batch import VertexBatchOptions
    from backends.vertex.cleaning.cleaner import BucketCleaner
    from backends.vertex.service.client import check_location, require_project

    _, options, _ = resolve_backend(config)
    assert isinstance(options, VertexBatchOptions)
    project = require_project(options.project_id)
    bucket = options.bucket_name or f"{project}-kl-batch"
    location = check_location(options.location)
    return BucketCleaner(project, location, bucket, options.retry_deadline_s, options.request_timeout_s)


async def _clean(cleaner: BucketCleaner, config: CleanConfig, unread: dict[str, str]) -> int:
    async with cleaner:
        inventory = await cleaner.take_inventory(parse_duration(config.older_than), datetime.now(UTC), unread)
        if inventory is None:
            _say(f"gs://{cleaner.bucket} does not exist: there is nothing to clean, and no rule to set.")
            return EXIT_COMPLETE
        _show_inventory(cleaner.bucket, cleaner.location, inventory, config)
        await _check_rule(cleaner, inventory, config)
        if not config.yes:
            _say("dry run: nothing was changed; --yes does it.")
            return EXIT_INCOMPLETE if inventory.total(Action.UNDECIDED).files else EXIT_COMPLETE
        failed = (await _delete(cleaner, inventory)).failed if inventory.total(Action.DELETE).files else 0
        if config.rule_days is not None:
            await cleaner.set_lifecycle(config.rule_days)
            _say(f"the lifecycle rule of gs://{cleaner.bucket} is set: {config.rule_days} days.")
        complete = not (failed or inventory.total(Action.UNDECIDED).files)
        return EXIT_COMPLETE if complete else EXIT_INCOMPLETE


async def _delete(cleaner: BucketCleaner, inventory: Inventory) -> Deletion:
    with ProgressReporter("files deleted", inventory.total(Action.DELETE).files) as progress:
        deletion = await cleaner.delete(inventory, progress.advance)
    _say(f"deleted: {_amount(deletion.deleted)}")
    if deletion.replaced:
        _say(f"kept: {_files(deletion.replaced)}: replaced by another of the same name meanwhile")
    if deletion.failed:
        _say(f"not deleted: {_files(deletion.failed)}, the last because of: {deletion.last_failure}")
    return deletion


async def _check_rule(cleaner: BucketCleaner, inventory: Inventory, config: CleanConfig) -> None:
    """Say what the lifecycle rule changes; refuse one that would delete what is not ours."""
    days = config.rule_days
    if days is None:
        return
    if inventory.foreign.files:
        raise ConfigError(
            f"no lifecycle rule is set: it would also delete {_files(inventory.foreign.files)} in "
            f"gs://{cleaner.bucket} that vertex_batch did not write, such as {inventory.foreign_example}. "
            "Move what you need, delete the rest, "
            "or leave --set-lifecycle and --lifecycle-days out."
        )
    state = await cleaner.lifecycle(days)
    before = " and ".join(str(age) for age in state.ours)
    change = "is set already" if state.as_asked else f"to be set in place of {before} days" if before else "to be set"
    others = f"; {state.others} other rules stay" if state.others else ""
    _say(f"lifecycle rule: delete what lies below batch_input/ and batch_output/ after {days} days: {change}{others}.")
    if days <= _LONGEST_JOB_DAYS:
        _say(
            f"warning: a batch job may wait for 72 h and run for 24 h; a rule of {days} days may delete its input "
            "under it, and its output before a run reads it."
        )


def _show_inventory(bucket: str, location: str, inventory: Inventory, config: CleanConfig) -> None:
    _say(f"gs://{bucket}, jobs looked up in {location}; older than {config.older_than}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("below", overflow="fold")
    for title in ("files", "bytes", "oldest (UTC)", "newest (UTC)"):
        table.add_column(title, justify="right", no_wrap=True)
    for prefix, totals in inventory.by_prefix.items():
        cells = (prefix, f"{totals.files:,}", f"{totals.size:,}", _time(totals.oldest), _time(totals.newest))
        table.add_row(*(Text(on_a_line(cell)) for cell in cells))
    print_grid(console(), table)
    for decision, judged in sorted(inventory.judged().items(), key=lambda item: (item[0].action.value, item[0].reason)):
        _say(f"{decision.action.value}: {_amount(judged.totals)}: {decision.reason} (such as {judged.example})")
    if inventory.foreign.files:
        example = inventory.foreign_example
        _say(f"kept: {_amount(inventory.foreign)}: not named as vertex_batch names its files (such as {example})")
    if not inventory.total(Action.DELETE).files:
        _say(f"nothing to delete that is older than {config.older_than}.")
    elif not (config.output_dir or config.scores_dir):
        _say("note: without --output-dir or --scores-dir, output that a run has not read yet is not spared.")


def _amount(totals: Totals) -> str:
    return f"{_files(totals.files)}, {totals.size:,} bytes"


def _files(count: int) -> str:
    return f"{count:,} file" if count == 1 else f"{count:,} files"


def _time(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def _say(text: str) -> None:
    print_lines(console(), [text])


if __name__ == "__main__":
    raise SystemExit(main())
