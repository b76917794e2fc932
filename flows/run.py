"""Compare the responses of model P on disk with model Q: the flow ``kl-divergence`` and ``python -m flows.run``."""

from __future__ import annotations

if __name__ == "__main__":
    # Prefect reads its settings when it is imported, so that the program prepares them before it loads this module.
    from importlib import import_module

    from flows.commands.run import main

    raise SystemExit(main(lambda: import_module("flows.run").kl_divergence))

from prefect import flow, unmapped
from prefect.states import State

from backends.errors import TokenKLError
from flows.config.models import RunConfig
from flows.runtime.hooks import settle_jobs
from flows.stages.open_run import RunEndedError, end_of, open_run
from flows.stages.tasks import measure, read, score, write
from flows.watch.report import PendingReport, RunReport


@flow(name="kl-divergence", on_cancellation=[settle_jobs], on_crashed=[settle_jobs], on_failure=[settle_jobs])
def kl_divergence(config: RunConfig) -> State[RunReport] | State[PendingReport]:
    """KL(P‖Q) per token, response and data set, from P's responses on disk and a backend that asks Q.

    Ends as Failed, with one line, if nothing could be asked at all; positions that could not be measured are part of a
    result and counted in it.
    """
    try:
        with open_run(config) as run:
            with run.asking(read(run)) as plan:
                for groups in run.waves(plan):
                    run.take(groups, score.map(groups, unmapped(run.scorer)))
            measured = measure(run, plan)
            return run.end(write(run, measured))
    except (RunEndedError, TokenKLError, OSError) as error:
        return end_of(error)
