"""The results of a run: files for programs, rows for people."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from backends.storage.files import download, in_parallel, is_remote, remove_folder, scratch_folder
from flows.config.models import RunConfig
from flows.folder.output import made_locally, publish_from
from flows.stages.inputs import InputFile, file_defect, read_ahead, read_input
from flows.stages.measuring import Measured
from flows.stages.report import RunReport
from kl.output.files import result_paths, write_responses, write_run_info, write_summary, write_tokens
from kl.output.headline import headline
from kl.output.kl_json import ResponseText, write_kl_json
from kl.statistics.summary import RunFacts, Summary, summarise_dataset
from kl.tables.responses import ResponseInfo, summarise_responses
from kl.tables.schemas import TOKENS

_PACKAGES = ("tokenkl", "prefect", "numpy", "polars", "scipy", "google-genai", "google-cloud-storage")


def write_results(measured: Measured, config: RunConfig, record: Mapping[str, Any]) -> RunReport:
    """Write every file of the output contract; the parts that they were made from are removed.

    Where the output folder is remote, the files are made on the local disk, which must have room for the token table
    twice; memory does not grow with it.
    """
    output = config.output_dir
    with made_locally(output) as folder, _on_disk(measured.parts) as parts:
        write_tokens(parts, folder / "tokens.parquet")
        # A bracket or "=" in a folder's name is neither a pattern nor a partition.
        tokens = pl.scan_parquet(folder / "tokens.parquet", glob=False, hive_partitioning=False)
        write_responses(summarise_responses(tokens, measured.responses), folder / "responses.parquet")
        summary = summarise_dataset(tokens, measured.responses, _facts(measured, config))
        write_summary(summary, folder / "summary.json")
        publish_from(folder, output, ("tokens.parquet", "responses.parquet", "summary.json"))
        publish_from(folder, output, _per_file(measured, parts, folder, config))
        write_run_info(_run_info(measured, config, record), folder / "run.json")
        publish_from(folder, output, ("run.json",))
    remove_folder(output / ".parts")
    return _report(summary, measured, config, record)


@contextmanager
def _on_disk(parts: Sequence[Path]) -> Generator[list[Path]]:
    """The parts of the token table as local files of the same names."""
    if not any(is_remote(part) for part in parts):
        yield list(parts)
        return
    with scratch_folder() as scratch:
        in_parallel(lambda part: download(part, scratch / part.name), parts)
        yield [scratch / part.name for part in parts]


def _facts(measured: Measured, config: RunConfig) -> RunFacts:
    verdict = measured.diagnostic.verdict()
    diagnostic = measured.diagnostic
    return RunFacts(
        model_p=", ".join(sorted(measured.models_p)) or None,
        model_q=config.model2,
        estimator=config.estimator,
        top_logprobs=config.k,
        prior_var=None if measured.prior is None else measured.prior.variance,
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


def _per_file(measured: Measured, parts: Sequence[Path], folder: Path, config: RunConfig) -> Iterator[str]:
    """Write a result file per input file; gives the name of each, below the folder, when it is finished."""
    targets = result_paths(file.source_file for file in measured.files)
    by_name = {part.name: part for part in parts}
    for index, file in enumerate(read_ahead(measured.files)):
        part = by_name.get(f"{index:08d}.parquet")
        tokens = (
            pl.read_parquet(part, glob=False, hive_partitioning=False)
            if part is not None
            else pl.DataFrame(schema=TOKENS)
        )
        target = targets[file.source_file]
        _write_file(file, tokens, config, folder / target)
        yield target


def _write_file(file: InputFile, tokens: pl.DataFrame, config: RunConfig, target: Path) -> None:
    parsed = read_input(file)
    texts = [ResponseText(response.response_idx, response.text) for response in parsed.responses]
    texts += [ResponseText(item.response_idx, item.text, item.kind, item.message) for item in parsed.unreadable]
    models = {response.model for response in parsed.responses if response.model is not None}
    defect = file_defect(parsed)
    write_kl_json(
        target,
        prompt=parsed.prompt,
        model_p=parsed.model or (models.pop() if len(models) == 1 else None),
        model_q=config.model2,
        responses=sorted(texts, key=lambda text: text.response_idx),
        tokens=tokens,
        error=defect.message if defect is not None else None,
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
        "other_writers": measured.other_writers,
        **record,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _report(summary: Summary, measured: Measured, config: RunConfig, record: Mapping[str, Any]) -> RunReport:
    output = config.output_dir
    warnings = list(summary.warnings)
    if measured.other_writers:
        first = measured.other_writers[0]
        warnings.append(f"no exact KL for {len(measured.other_writers)} responses, such as {first}")
    verdict = measured.diagnostic.verdict()
    warnings += [f"alignment: {reason}" for reason in verdict.reasons]
    proven = record.get("preflight_version")
    versions = measured.versions_q | ({proven} if isinstance(proven, str) else set())
    if len(versions) > 1:
        warnings.append(f"the answers come from {len(versions)} versions of model 2: {', '.join(sorted(versions))}")
    names = ("summary.json", "responses.parquet", "tokens.parquet", "run.json")
    return RunReport(
        n_positions=summary.counts.positions,
        n_measured=summary.counts.measured,
        missing=dict(summary.counts.missing_by_reason),
        skipped=dict(Counter(_skipped(info) for info in measured.responses if info.reason is not None)),
        repaired=measured.repaired,
        headline=headline(summary),
        warnings=warnings,
        paths=[str(output / name) for name in names] + [f"{output}/*_kl.json ({len(measured.files)} files)"],
    )


def _skipped(info: ResponseInfo) -> str:
    assert info.reason is not None
    return info.reason
