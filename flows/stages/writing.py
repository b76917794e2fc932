"""The results of a run: files for programs, rows for people."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import pickle
import platform
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import polars as pl

from backends.storage import remove
from flows.config.comparison import Comparison
from flows.config.models import RunConfig
from flows.folder.layout import OutputFolder
from flows.folder.output import made_locally, publish_from
from flows.stages.first_lists import write_first_lists
from flows.stages.measuring import FileTexts, Measured
from flows.stages.prompts import difference
from flows.watch.ending import Results
from flows.watch.report import Excerpt, RunReport
from kl.estimators.censored import SpreadPrior
from kl.estimators.divergence import ESTIMATOR_VERSION
from kl.finished.run import Run
from kl.output.atomic import write_many_atomic
from kl.output.files import candidate_rows, result_paths, write_candidates, write_responses, write_summary, write_tokens
from kl.output.glance import figures, glance
from kl.output.headline import headline
from kl.output.kl_json import ScoredResponse, scored_responses, write_kl_json
from kl.output.report.charts import certainty_chart
from kl.output.report.page import prompt_text, write_report
from kl.output.room import refusal_of
from kl.statistics.dataset import summarise_dataset
from kl.statistics.summary import RunFacts, Summary
from kl.tables.responses import ResponseInfo, info_frame, response_rows
from kl.tables.schemas import TOKENS
from kl.tables.totals import response_totals, token_batches

logger = logging.getLogger(__name__)

_BESIDES = 2  # the candidate table and the page are written beside the other files
_SHOWN = 5  # tokens and positions in Prefect
_PACKAGES = ("tokenkl", "prefect", "numpy", "polars", "scipy", "google-genai", "google-cloud-storage")


def write_results(measured: Measured, comparison: Comparison, record: Mapping[str, Any]) -> Results:
    """Write every file of the output contract but ``run.json``, which is written when all is said.

    Where the output folder is remote, the files are made on the local disk, which must have room for the token table
    twice and for the candidate table five times; memory does not grow with them.
    """
    config, place = comparison.config, comparison.folder
    lists = [part.candidates for part in measured.parts if part.candidates is not None]
    with made_locally(place.path) as folder, ThreadPoolExecutor(_BESIDES, thread_name_prefix="writing") as beside:
        made, facts = OutputFolder(folder), _facts(measured, config)
        waiting = [beside.submit(write_candidates, lists, made.candidates, facts)] if config.candidates else []
        write_tokens([part.tokens for part in measured.parts if part.tokens is not None], made.tokens, facts)
        # A bracket or "=" in a folder's name is neither a pattern nor a partition.
        tokens = pl.scan_parquet(made.tokens, glob=False, hive_partitioning=False)
        totals = response_totals(tokens)
        rows = response_rows(totals, info_frame(measured.responses))
        write_responses(rows, made.responses, facts)
        summary = summarise_dataset(tokens, measured.responses, facts, measured.twice, totals=totals)
        write_summary(summary, made.summary)
        report = _report(summary, measured, comparison, record)
        run = {"warnings": report.warnings} | _run_info(measured, config, record)
        finished = Run(folder, summary, tokens, rows.lazy(), candidate_rows(lists) if config.candidates else None, run)
        # In a copy of the context, by which log lines find their run.
        page = beside.submit(copy_context().run, _write_page, finished, made.report, measured)
        report = replace(report, excerpt=_excerpt(finished))
        scored = scored_responses(token_batches(tokens, TOKENS.names()), rows)
        # What is published is here no more, and the token table is read until the last of the files is written.
        is_first = config.first_repeats is not None
        if is_first:
            write_first_lists(measured.files, comparison, made.first_lists)

        def tables() -> Iterator[str]:
            for written in waiting:
                written.result()
            optional = [made.candidates] * config.candidates + [made.report] * page.result()
            optional += [made.first_lists] * is_first
            yield from (path.name for path in (made.tokens, *optional, made.responses, made.summary))

        publish_from(folder, place.path, chain(_per_file(measured, scored, folder, config), tables()))
    if not config.candidates:
        remove(place.candidates)  # those of an earlier run are of other rows, perhaps
    if not is_first:
        remove(place.first_lists)
    if page.result():
        report.paths.insert(0, str(place.report))
    else:
        report.warnings.append(
            "report.html could not be written (the log says why); one that is there is of an earlier run. The other "
            "results are whole."
        )
    return Results(report, summary.to_json(), run, measured.twice.rows())


def _write_page(run: Run, target: Path, measured: Measured) -> bool:
    """Whether the page is written. What people look at is never worth a run: all figures are in the other files."""

    def prompts(wanted: Collection[str]) -> dict[str, str]:
        files = (file for file in _texts(measured) if file.source_file in wanted)
        return {file.source_file: prompt_text(file.prompt) for file in files if file.prompt is not None}

    try:
        write_report(run, target, prompts=prompts)
    except Exception as error:
        if refusal_of(error) is not None:
            raise
        logger.exception("report.html is not written; the other results are whole")
        return False
    return True


def _excerpt(run: Run) -> Excerpt:
    chart = certainty_chart(run.summary)
    positions = run.worst_positions(_SHOWN).to_dicts()
    return Excerpt(run.summary.by_token[:_SHOWN], positions, None if chart is None else chart.svg())


def _facts(measured: Measured, config: RunConfig) -> RunFacts:
    verdict = measured.diagnostic.verdict()
    diagnostic = measured.diagnostic
    return RunFacts(
        model_p=", ".join(sorted(measured.models_p)) or None,
        model_q=config.model2,
        estimator=config.estimator,
        top_logprobs=config.k,
        wanted_tokens=config.wanted_tokens,
        prior_var=_variance(measured.priors.q),
        prior_var_again=_variance(measured.priors.twice),
        samplings=sorted(measured.samplings, key=repr),
        alignment={
            "verdict": verdict.level,
            "reasons": list(verdict.reasons),
            "overlap": diagnostic.overlap,
            "mean_shared_mass_p": diagnostic.mean_shared_mass_p,
            "top_absent": diagnostic.top_absent,
            "id_mismatch": diagnostic.id_mismatch,
            "ambiguous_mass": diagnostic.ambiguous_mass,
            "unseen_q": diagnostic.unseen_q,
            "positions_by_id_bytes_text": list(diagnostic.n_by_key),
        },
    )


def _variance(prior: SpreadPrior | None) -> float | None:
    return None if prior is None else prior.variance


def _per_file(measured: Measured, scored: Iterator[ScoredResponse], folder: Path, config: RunConfig) -> Iterator[str]:
    """Write a result file per input file; gives the name of each, below the folder, when it is finished."""
    targets = result_paths(file.source_file for file in measured.files)
    files = _with_scored(_texts(measured), scored)
    writers = (
        (folder / targets[file.source_file], partial(_write_file, file, of_file, config)) for file, of_file in files
    )
    for target in write_many_atomic(writers):
        yield target.relative_to(folder).as_posix()


def _texts(measured: Measured) -> Iterator[FileTexts]:
    for part in measured.parts:
        yield from pickle.loads(part.texts.read_bytes())


def _with_scored(
    files: Iterable[FileTexts], scored: Iterator[ScoredResponse]
) -> Iterator[tuple[FileTexts, Iterable[ScoredResponse]]]:
    """Each file with its responses that have tokens, which must be taken before the next file is."""
    tables = groupby(scored, key=lambda response: response.source_file)
    name, of_file = next(tables, (None, ()))
    for file in files:
        if file.source_file == name:
            yield file, of_file
            name, of_file = next(tables, (None, ()))
        else:
            yield file, ()
    if name is not None:
        raise ValueError(f"the token table has {name} out of the order of the input files.")


def _write_file(file: FileTexts, scored: Iterable[ScoredResponse], config: RunConfig, path: Path) -> None:
    write_kl_json(
        path,
        prompt=file.prompt,
        model_p=file.model_p,
        model_q=config.model2,
        responses=file.responses,
        scored=scored,
        error=file.error,
    )


def _run_info(measured: Measured, config: RunConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "config": json.loads(config.model_dump_json()),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in _PACKAGES},
        "model1": sorted(measured.models_p),
        "model1_versions": sorted(measured.versions_p),
        "model2": config.model2,
        "model2_versions": sorted(measured.versions_q),
        "estimator_version": ESTIMATOR_VERSION,
        "no_exact_kl": {why: positions._asdict() for why, positions in measured.no_exact.items()},
        "prompt_counts": asdict(measured.priors.counts) | {"n_odd": measured.n_odd_counts},
        **record,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _report(summary: Summary, measured: Measured, comparison: Comparison, record: Mapping[str, Any]) -> RunReport:
    place = comparison.folder
    warnings = list(summary.warnings)
    warnings += [
        f"no exact KL at {positions.n:,} positions, the first {positions.first}: {why}."
        for why, positions in measured.no_exact.items()
    ]
    warnings += _count_warnings(measured)
    if comparison.config.first_repeats is not None:
        warnings.append("every figure is of the first position of each response alone, those per response too")
    verdict = measured.diagnostic.verdict()
    warnings += [f"alignment: {reason}" for reason in verdict.reasons]
    warnings += difference(record)
    warnings += [record["going_on"]] if record.get("going_on") else []
    proven = record.get("preflight_version")
    versions = measured.versions_q | ({proven} if isinstance(proven, str) else set())
    if len(versions) > 1:
        warnings.append(f"the answers come from {len(versions)} versions of model 2: {', '.join(sorted(versions))}")
    if summary.noise_floor is not None and measured.versions_p and summary.noise_floor.of != "q":
        others = set(summary.noise_floor.versions) - measured.versions_p
        if others:
            warnings.append(
                f"noise floor: P was asked again as {', '.join(sorted(others))}, and its responses were written by "
                f"{', '.join(sorted(measured.versions_p))}: the floor has the change of P in it"
            )
    optional = [place.candidates] * comparison.config.candidates
    optional += [place.first_lists] * (comparison.config.first_repeats is not None)
    paths = (place.summary, place.responses, place.tokens, *optional, place.run)
    return RunReport(
        n_positions=summary.counts.positions,
        n_measured=summary.counts.measured,
        missing=dict(summary.counts.missing_by_reason),
        skipped=dict(Counter(_skipped(info) for info in measured.responses if info.reason is not None)),
        repaired=measured.repaired,
        line=glance(summary),
        figures=figures(summary),
        headline=headline(summary),
        warnings=warnings,
        paths=[*map(str, paths), f"{place.path}/*_kl.json ({len(measured.files)} files)"],
        alarms=summary.alarms,
    )


def _count_warnings(measured: Measured) -> Iterator[str]:
    """What Q's counts of the prompt's tokens do not show."""
    counts = measured.priors.counts
    if counts.n_steps and not counts.usable:
        yield (
            f"model 2's counts of the prompt's tokens rise by one a position at {counts.n_right:,} of "
            f"{counts.n_steps:,} steps, and are what the prompt and the position make at {counts.n_base:,} of "
            f"{counts.n_judged:,} positions: they do not count P's tokens (or none, or those of another tokenizer), so "
            "that they do not show whether prefixes were trimmed or tokenised otherwise"
        )
    if measured.n_odd_counts:
        yield (
            f"model 2's counts of the prompt's tokens decide nothing at {measured.n_odd_counts:,} positions: they "
            "differ by more than tokenising can make (tokens of a cache left out, perhaps), or no majority says what "
            "the prompt itself counts; whether the prefix was trimmed or tokenised otherwise is not known there"
        )


def _skipped(info: ResponseInfo) -> str:
    assert info.reason is not None
    return info.reason
