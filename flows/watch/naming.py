"""The name of a flow run in Prefect's lists: which models, and where the results are."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import replace

from httpx import HTTPError
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from flows.config.comparison import Comparison
from flows.config.folders import SETTINGS
from flows.config.templates import RunValues, names_the_run
from flows.runtime.server import has_server
from flows.watch.markdown import one_line

logger = logging.getLogger(__name__)

_LONGEST_NAME = 200
_BETWEEN = " ‖ "
_GIVEN_BY_PREFECT = re.compile("[a-z0-9]+-[a-z]+(-[a-z])?")  # by its server, by its form; another was given by a person


def run_name(models_p: Collection[str], model_q: str, folder: str, figure: str | None = None) -> str:
    """``gemini-2.5-flash-lite ‖ gemini-2.5-flash in results/2026-11-28: 0.617 nats/token (0.372 to 0.861)``."""
    models = f"{', '.join(sorted(models_p)) or 'P'}{_BETWEEN}{model_q}"
    return one_line(f"{models} in {folder}{'' if figure is None else f': {figure}'}", _LONGEST_NAME)


def name_run(models_p: Collection[str], comparison: Comparison, line: str | None = None) -> None:
    """Name the flow run by its models and its folder as soon as these are known, and by its figure at the end.

    Not where a folder has the run's first name in it: a retry would look for the folder of the second.

    Parameters
    ----------
    line : str, optional
        Of the report; what it begins with is the figure.
    """
    context, values = FlowRunContext.get(), RunValues.of_this_run()
    written, config = comparison.written, comparison.config
    if context is None or context.flow_run is None or not has_server():
        return
    if any(names_the_run(str(getattr(written, setting))) for setting in SETTINGS):
        return
    before = values.flow_run_name or ""
    if not _GIVEN_BY_PREFECT.fullmatch(before) and _BETWEEN not in before:
        return
    figure = None if line is None else line.partition(", ")[0]
    name = run_name(models_p, config.model2, str(config.output_dir), figure)
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_name(context.flow_run.id, name)
    except (HTTPError, PrefectException) as error:
        logger.warning("the run keeps the name %s: %s", before, error)
        return
    context.flow_run.name = name
    replace(values, flow_run_name=name).note()
