"""Let model P write responses, with its top log-probabilities: ``sample-responses`` and ``python -m flows.sample``."""

from __future__ import annotations

if __name__ == "__main__":
    # Prefect reads its settings when it is imported, so that the program prepares them before it loads this module.
    from importlib import import_module

    from flows.commands.sample import main

    raise SystemExit(main(lambda: import_module("flows.sample").sample_responses))

import logging

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from backends.errors import TokenKLError
from flows.config.sampling import SampleConfig
from flows.config.templates import RunValues
from flows.folder.layout import OutputFolder
from flows.folder.lock import made_output, run_lock
from flows.folder.room import one_line_on_room
from flows.runtime.logs import expected_errors_in_one_line, run_logging
from flows.runtime.terminal import console, print_pairs
from flows.sampling.asking import Sampler, SampleReport
from flows.sampling.plan import check_cost, check_sampling, count_prompts, plan_rows, plan_sampling, with_folder
from flows.sampling.state import SamplingState, leave_no_lock

logger = logging.getLogger(__name__)


@task(cache_policy=NO_CACHE)
def sample(config: SampleConfig) -> SampleReport:
    """Write a file per prompt and model; responses that are there already are left alone."""
    assert config.output_dir is not None, "checked with the settings"
    check_sampling(config)
    folder = OutputFolder(SamplingState(config.output_dir).folder)
    with (
        made_output(OutputFolder(config.output_dir)),
        run_lock(folder) as check_lock,
        one_line_on_room(config.output_dir, folder.path, config),
    ):
        plan = plan_sampling(config, make_identity=True)
        for note in plan.notes:
            logger.warning("%s", note)
        if plan.n_left_alone:
            logger.info("%d of %d files are there already and are left alone", plan.n_left_alone, len(plan.targets))
        count_prompts(plan)
        check_cost(plan)
        report = Sampler(plan).run()
        check_lock()
        if not report.missing:
            plan.state.clear()
    if not report.missing:
        leave_no_lock(folder)
    return report


@flow(name="sample-responses")
def sample_responses(config: SampleConfig) -> SampleReport | State[SampleReport] | State[None]:
    """Write P's responses with their log-probabilities, for `flows.run` to read.

    Responses that cannot be had are part of the result and counted in it.
    """
    expected_errors_in_one_line()
    try:
        config = with_folder(config, RunValues.of_this_run())
        with run_logging():
            if config.dry_run:
                print_pairs(console(), plan_rows(plan_sampling(config, make_identity=False)))
                return Completed(message="dry run: nothing was asked")
            return sample(config)
    except (TokenKLError, OSError) as error:
        return Failed(message=str(error), data=error)
