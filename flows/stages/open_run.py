"""A run under way: its lock, its session with the backend, signals, log, and the ends that come before a result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from backends.base import Backend
from backends.errors import BackendError, ConfigError, ModelNotUsableError
from backends.service.counting import count_texts, worth_counting
from backends.session import BackendSession, SessionClosedError
from backends.storage import exists, is_remote, remove_folder, scratch_folder
from flows.cluster.mapping import ended, results_of, tasks_run_by
from flows.cluster.runners import LazyCluster, cluster_of
from flows.cluster.workers import Needs, check_workers
from flows.config.comparison import Comparison, absolute
from flows.config.folders import folder_record
from flows.config.models import RunConfig
from flows.config.submitted import forget_submission, note_submission, put_last
from flows.config.templates import RunValues
from flows.folder.layout import Stores
from flows.folder.lock import FolderInUseError, made_output, run_lock
from flows.folder.members import Member, check_store, member_of, note_store
from flows.folder.output import prepare_output
from flows.folder.refusals import Refusal, note_refusals
from flows.folder.room import DiskRefusedError, Reserve, one_line_on_room
from flows.runtime.interrupts import InterruptedRunError, stop_on_signal
from flows.runtime.logs import expected_errors_in_one_line, run_logging
from flows.runtime.progress import ProgressReporter
from flows.stages.dry_run import check_cost, check_readable, discovered, plan_rows, plan_without_calls, without_refused
from flows.stages.inputs import InputFile, parsed_files_kept
from flows.stages.passes import check_first_answers, first_to_judge
from flows.stages.pending import pending_state, skipped_state, unchanged_state
from flows.stages.plan import Group, Plan, bought_again, make_plan
from flows.stages.prompts import rendered_before, rendered_prompts
from flows.stages.scorers import Scorer, StoringScorer, TravellingScorer
from flows.stages.scoring import GroupOutcome
from flows.watch.artifacts import progress_artifacts, show_plan, show_report
from flows.watch.ending import DriftContext, RunOutcome, drift_context
from flows.watch.naming import name_run
from flows.watch.report import RunReport
from flows.watch.spending import Spending, compared_text, details_of
from kl.records import Score, ScoreFailure

logger = logging.getLogger("flows.run")

_PROBLEMS_SHOWN = 100
_COUNTED = {"run": "contexts scored", "submit": "contexts in jobs", "collect": "contexts looked at"}


class RunEndedError(Exception):
    """A run that has nothing to measure ended in order, in ``state``."""

    def __init__(self, state: State[Any]) -> None:
        super().__init__(state.message)
        self.state = state


def end_of(error: Exception) -> State[Any]:
    """How a run ends that did not come to its result: in one line, if it is no fault of this program."""
    if isinstance(error, RunEndedError):
        return error.state
    return Failed(message=str(error), data=error)


@contextmanager
def open_run(written: RunConfig) -> Generator[OpenRun]:
    """Inside a flow run: everything that must be held, and let go, around its stages.

    Raises
    ------
    RunEndedError
        If this is a dry run, or a collect that found another run at work.
    ConfigError
        If a setting, a folder or the backend cannot be used.
    """
    expected_errors_in_one_line()
    comparison = Comparison.of(written, RunValues.of_this_run())
    if written.dry_run:
        with run_logging(), parsed_files_kept():
            raise RunEndedError(_dry_run(comparison))
    comparison.check()
    folder = comparison.folder
    run = OpenRun(comparison)
    with ExitStack() as stack:
        stack.enter_context(made_output(folder, inside=None if folder.shared else folder.own_scores.name))
        if folder.shared is not None:
            prepare_output(folder.shared, flag="--scores-dir")
        try:
            run.check_folder = stack.enter_context(run_lock(comparison.folder, run.stop))
        except FolderInUseError as error:
            if written.stage == "collect":
                raise RunEndedError(skipped_state(error)) from error
            raise
        stack.enter_context(run_logging())
        check_store(folder)
        note_store(folder)
        if folder.shared is not None:
            run.member = stack.enter_context(member_of(folder.shared, run.stop))
        stack.enter_context(parsed_files_kept())
        run.cluster = stack.enter_context(cluster_of(written.task_runner))
        stack.enter_context(one_line_on_room(comparison.folder.path, comparison.folder.scores, comparison.config))
        if is_remote(comparison.folder.path):
            run.token_parts = stack.enter_context(scratch_folder())
        run.begin()
        yield run


def _dry_run(comparison: Comparison) -> State[RunReport]:
    plan = plan_without_calls(comparison)
    rows = plan_rows(plan, comparison)
    for label, text in rows:
        logger.info("%s: %s", label, text)
    show_plan(rows, comparison.config)
    check_readable(plan, comparison.config.input_dir)
    check_cost(plan, comparison.config.max_cost_usd)
    return Completed(message="dry run: nothing was asked")


class OpenRun:
    """What the stages of a run share. Not a dataclass: Prefect would search the fields of a task's parameters.

    Parameters
    ----------
    comparison : Comparison

    Attributes
    ----------
    stores : Stores
    backend : Backend
        From `begin` on; entered within ``asking``.
    context : DriftContext
        From `begin` on.
    scorer : Scorer
        Within ``asking``.
    cluster : LazyCluster or None
        What works on tasks that compute; None for this process.
    token_parts : Path
        On this machine's disk.
    ended : list of State
        Of the groups' tasks, for the graph that Prefect draws.
    check_folder : callable
        Raises `backends.storage.LeaseLostError` if the folder is not this run's any more.
    member : Member or None
        This run among those that use a shared store of scores.
    """

    stores: Stores
    backend: Backend
    context: DriftContext
    scorer: Scorer
    check_folder: Callable[[], None]

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.cluster: LazyCluster | None = None
        self.member: Member | None = None
        self.token_parts: Path = comparison.folder.token_parts
        self._session: BackendSession | None = None
        self._started = datetime.now(UTC)
        self._proven: str | None = None
        self._plan: Plan
        self._outcomes: list[GroupOutcome] = []
        self.ended: list[State[Any]] = []
        self._error: Exception | None = None
        self._report: dict[str, Any] = {}
        self._going_on: str | None = None
        self._was_unfinished = False
        self._prompts: dict[str, Any] | None = None

    def begin(self) -> None:
        """Read what is on record, for the answers and for the end of the run.

        Only when the folder's lock is held: a run that had it before may have written until then.
        """
        self.comparison = discovered(without_refused(self.comparison), call=True)
        self._look()
        for note in self.comparison.notes:
            logger.warning("%s", note)
        self.context = drift_context(self.comparison)
        unfinished = self.comparison.folder.unfinished
        self._was_unfinished = exists(unfinished)
        remove_folder(unfinished)  # of a run that did not end

    def _look(self) -> None:
        """See what is on disk and in jobs now."""
        stores, member = self.comparison.folder.stores, self.member
        self.stores = stores(None, nullcontext) if member is None else stores(member.journals, member.alone)
        self.backend = self.comparison.build_backend(flow_run.id)
        self.backend.check_lock = self.check_lock

    def plan(self, files: list[InputFile]) -> Plan:
        """What is to be asked; where others use the store, this run alone asks it: what others ask is waited for.

        A collect waits for nothing: its plan names the other run then.
        """
        while True:
            plan = make_plan(
                files, self.comparison, self.stores.scores, self.backend.in_flight(), self.backend.parallel_groups()
            )
            if self.member is None or self.member.holds(plan.missing):
                return plan
            if holders := self.member.claim(plan.missing):
                if self.comparison.config.stage == "collect":
                    return replace(plan, in_use=f"another run asks some of its contexts in {self.stores.scores.root}")
                self.member.wait(plan.missing, holders)
            self._look()  # others may have written until the claim

    def check_lock(self) -> None:
        """Raise `backends.storage.LeaseLostError` if the folder, or what is claimed in a store, may be another's."""
        self.check_folder()
        if self.member is not None:
            self.member.check()

    def stop(self) -> None:
        """Stop what is being asked; from any thread."""
        if self._session is not None:
            self._session.cancel()

    @contextmanager
    def asking(self, plan: Plan) -> Generator[Plan]:
        """While groups are scored: the session with the backend, signals, progress, and what works on the tasks.

        Gives the plan that stands: another one if a model cannot be asked again.

        Raises
        ------
        RunEndedError
            At the end, if nothing is measured yet.
        InterruptedRunError
            At the end, if the user stopped the run.
        """
        if plan.in_use is not None:
            raise RunEndedError(skipped_state(FolderInUseError(plan.in_use)))
        _log_problems(plan)
        check_readable(plan, self.comparison.config.input_dir)
        name_run(plan.models_p, self.comparison)
        with ExitStack() as sessions:
            session = sessions.enter_context(self._opened())
            plan = self._checked(plan, session)
            plan = self._plan = self._preflight(plan, session)
            if session.backend is not self.backend:  # planned again by what others wrote since, which it has not seen
                sessions.close()
                session = sessions.enter_context(self._opened())
            _log_plan(plan)
            if self.comparison.config.stage == "submit":  # from here on there may be jobs
                note_submission(self.comparison.written, self.comparison.config.output_dir, RunValues.of_this_run())
            with self._jobs_named():
                if plan.n_to_ask:
                    self._prompts = rendered_prompts(plan.files, self.comparison, session)
                else:
                    self._prompts = rendered_before(self.comparison)
                with stop_on_signal(session) as stopped:
                    with self._scoring(plan, session):
                        yield plan
                    if stopped.is_set():
                        line = session.interrupt() or "nothing goes on elsewhere."
                        raise InterruptedRunError(line, self.comparison.config)
                self._report = self.backend.report()
                if self._error is not None:
                    raise self._error
            self._going_on = self.backend.going_on()
            cut_short = session.cancelled
        self.check_lock()
        self._log_counted(plan)
        if cut_short:
            raise SessionClosedError("asking was stopped before its end, for a reason that is in the log; run again.")
        if self.member is None:  # others may be reading the parts
            self.stores.scores.compact_all()
        self._end_if_pending(plan)

    @contextmanager
    def _jobs_named(self) -> Generator[None]:
        """An end before the end says which jobs go on; that of the user says it itself."""
        try:
            yield
        except InterruptedRunError:
            raise
        except Exception:
            if line := self.backend.going_on():
                logger.warning("%s", line)
            raise

    def _opened(self) -> BackendSession:
        """The session that `stop` cancels."""
        self._session = BackendSession(self.backend)
        return self._session

    def _checked(self, plan: Plan, session: BackendSession) -> Plan:
        """The plan with what its texts are by the backend's own tokenizer, if it is within the limit of cost."""
        config, comparison = self.comparison.config, self.comparison
        # A collect makes follow-up jobs at most, for what was within the limit when it was submitted.
        if config.stage != "collect":
            worth_it = worth_counting(comparison.backend, plan.estimate, config.max_cost_usd)
            if plan.n_to_ask > plan.n_in_flight and worth_it:
                plan = plan.counted(session.run(count_texts(session.backend, plan.texts)), comparison)
            check_cost(plan, config.max_cost_usd)
        # Workers that the run starts itself have its folders and programs; they begin when there is work for them.
        if self.cluster is not None and config.task_runner.address is not None:
            needs = Needs(absolute(plan.files[0].path), absolute(config.output_dir))
            check_workers(self.cluster.get(), config.task_runner.kind, needs)
        return plan

    def _preflight(self, plan: Plan, session: BackendSession) -> Plan:
        """Prove that the models can be used; gives the plan that stands then."""
        config = self.comparison.config
        if not config.preflight or config.stage == "collect" or plan.n_to_ask <= plan.n_in_flight:
            return plan
        self._proven = session.run(self.backend.preflight(config.model2))
        refused: dict[str, Refusal] = {}
        unasked: set[str] = set()
        store, in_flight = self.stores.scores, self.backend.in_flight()
        for model in sorted(+plan.again.fresh):
            try:
                if model != config.model2:
                    session.run(self.backend.preflight(model))
            except BackendError as error:
                if isinstance(error, ModelNotUsableError) and error.permanent:
                    kept = bought_again(plan.files, self.comparison, store, in_flight, model)
                    refused[model] = Refusal(str(error), kept)
                    logger.warning("noise floor: %s cannot be asked again, so that Q is asked twice: %s", model, error)
                else:
                    unasked.add(model)
                    logger.warning("noise floor: %s is not asked again in this run, but by the next: %s", model, error)
        if not refused and not unasked:
            return plan
        if refused:
            note_refusals(self.comparison.folder, refused, self.comparison.place)
        self.comparison = self.comparison.without(refused, unasked)
        return self._checked(self.plan(plan.files), session)

    @contextmanager
    def _scoring(self, plan: Plan, session: BackendSession) -> Generator[None]:
        config, comparison = self.comparison.config, self.comparison
        spending = Spending(comparison.backend, comparison.options, plan.estimate.cost_usd)

        def on_result(model: str, result: Score | ScoreFailure) -> None:
            spending.note(model, result)
            progress.advance(1)

        with (
            ProgressReporter(_COUNTED[config.stage], plan.n_to_ask, details_of(self.backend, spending)) as progress,
            progress_artifacts(config, progress),
        ):
            if self.cluster is not None and not self.comparison.backend.capabilities.remote:
                self.scorer = TravellingScorer(self.comparison.made_absolute(), self.stores, on_result)
                with self.cluster.get().tasks():
                    yield
                return
            place = comparison.folder.scores if self.member is None else self.member.journals.parent
            reserve = Reserve(place, _entries_in_flight(plan, comparison))
            self.scorer = StoringScorer(self.comparison, self.stores, session, on_result, reserve)
            workers = max(1, min(len(plan.groups), self.backend.parallel_groups()))
            with (
                reserve.kept() if plan.n_to_ask else nullcontext(),
                ThreadPoolTaskRunner(workers) as runner,
                tasks_run_by(runner),
            ):
                yield

    def waves(self, plan: Plan) -> Iterator[list[Group]]:
        """The groups that are asked together: all, or the first alone where it can be judged before the rest is bought.

        Jobs take as long for one group as for all, so that a backend with jobs makes them at once.
        """
        groups, backend = plan.groups, self.comparison.backend.capabilities
        n_first = 0
        if backend.remote and not backend.deferred and not self.comparison.config.force:
            n_first = first_to_judge([group.n_positions for group in groups])
        if n_first == len(groups):
            n_first = 0
        if n_first:
            yield groups[:n_first]
            if self._error is not None or self._session is None or self._session.cancelled:
                return
            files = {selection.file: None for group in groups[:n_first] for selection in group.selections}
            try:
                check_first_answers(list(files), self.comparison, self.comparison.folder.stores())
            except ConfigError as error:
                self._error = error
                return
        yield groups[n_first:]

    def take(self, groups: Sequence[Group], futures: list[PrefectFuture[Any]]) -> None:
        """Take home what the task of each group found, as it ends."""
        session = self._session
        self.ended += [ended(future.task_run_id, group.name) for group, future in zip(groups, futures, strict=True)]
        for number, result in results_of(futures, lambda: session is not None and session.cancelled):
            if isinstance(result, Exception):
                self._note_failure(groups[number], result)
            else:
                self._outcomes.append(self.scorer.keep(groups[number], result))

    def _note_failure(self, group: Group, error: Exception) -> None:
        if isinstance(error, SessionClosedError):
            return  # the user stopped the run, or another group has the reason
        if isinstance(error, DiskRefusedError):
            if isinstance(self._error, DiskRefusedError):
                error.n_lost += self._error.n_lost
            self._error = error  # the scorer ends the others, when they have what is in flight
            return
        if isinstance(error, ConfigError | OSError):
            self._error = self._error or error  # it holds for every group
            self.stop()
            return
        line = " ".join(str(error).split()) or type(error).__name__
        logger.error("a group of responses was not scored: %s: %s", group.name, line)

    def _end_if_pending(self, plan: Plan) -> None:
        comparison = self.comparison
        state = pending_state(comparison.config, plan, self._outcomes, self._report)
        if state is None and not self._was_unfinished:
            state = unchanged_state(comparison, plan, self._outcomes)
        if state is not None:
            remove_folder(comparison.folder.unfinished)
            self._note_end(state)
            raise RunEndedError(state)

    def _note_end(self, state: State[Any] | None) -> None:
        """Keep the record of submissions to folders of other days; ``state`` is None where all was measured."""
        written, folder = self.comparison.written, self.comparison.config.output_dir
        if state is None or state.name == "Unchanged":
            forget_submission(written, folder)
        elif written.stage == "collect" and not state.result(raise_on_failure=False).n_waiting:
            put_last(written, folder)

    def _log_counted(self, plan: Plan) -> None:
        """How far the estimate was right."""
        if not self.comparison.backend.capabilities.remote:
            return
        counted = sum(n_in for outcome in self._outcomes for n_in, _ in outcome.tokens.values())
        n_scored = sum(outcome.n_scored for outcome in self._outcomes)
        if line := compared_text(plan.estimate.input_tokens, plan.n_to_ask, counted, n_scored):
            logger.info("%s", line)

    def record(self) -> dict[str, Any]:
        """What ``run.json`` says of how the results came about."""
        plan, outcomes, comparison = self._plan, self._outcomes, self.comparison
        return {
            "started_at": self._started.isoformat(timespec="seconds"),
            "contexts": plan.n_contexts,
            "contexts_on_disk": plan.n_stored,
            "contexts_in_earlier_jobs": plan.n_in_flight,
            "contexts_asked": plan.n_to_ask,
            "contexts_scored_now": sum(outcome.n_scored for outcome in outcomes),
            "contexts_refused_now": sum(outcome.n_final for outcome in outcomes),
            "asked_again": {"positions": dict(plan.again.n_drawn), "estimate": asdict(plan.estimate_again)},
            "estimate": asdict(plan.estimate) | {"prompts_counted": plan.counts.n_prompts},
            "preflight_version": self._proven,
            "model_versions_now": sorted({version for outcome in outcomes for version in outcome.versions}),
            "backend_report": self._report,
            "going_on": self._going_on,
            "rendered_prompts": self._prompts,
            "spent": self.spent(),
            "folders": folder_record(comparison.written, comparison.config),
        }

    def spent(self) -> dict[str, Any]:
        """What this run was charged for, by the service's own counts; answers that failed are not among them."""
        spent: dict[str, Any] = {}
        for model in sorted({model for outcome in self._outcomes for model in outcome.tokens}):
            counts = [outcome.tokens[model] for outcome in self._outcomes if model in outcome.tokens]
            n_in, n_out = sum(count[0] for count in counts), sum(count[1] for count in counts)
            cost = self.comparison.backend.cost_usd(self.comparison.options, model, n_in, n_out)
            spent[model] = {"input_tokens": n_in, "output_tokens": n_out, "cost_usd": cost}
        return spent

    def end(self, outcome: RunOutcome) -> State[RunReport]:
        """Show what was found; gives what the flow returns."""
        self._note_end(None)
        show_report(outcome.report, self.comparison.config, self.spent())
        return outcome.state


def _entries_in_flight(plan: Plan, comparison: Comparison) -> int:
    """How many candidates the answers may have that are in flight at once; jobs keep what they answered."""
    can = comparison.backend.capabilities
    if can.deferred or not can.remote:
        return 0
    parts = (len(item.positions) for group in plan.groups for item in group.selections)
    together = max(parts, default=0) if can.one_pass else 1
    n_answers = min(plan.n_to_ask, getattr(comparison.options, "max_concurrent", 1) * together)
    return n_answers * comparison.config.k * (2 if comparison.config.wanted_tokens else 1)


def _log_problems(plan: Plan) -> None:
    defects = [problem for problem in plan.problems if not problem.repaired]
    if len(defects) == 1 and not plan.n_responses:
        return  # the run ends with it
    for problem in defects[:_PROBLEMS_SHOWN]:
        logger.warning("%s", problem.message)
    if len(defects) > _PROBLEMS_SHOWN:
        logger.warning("… and %d more; responses.parquet names them all", len(defects) - _PROBLEMS_SHOWN)


def _log_plan(plan: Plan) -> None:
    logger.info(
        "%d responses in %d files: %d positions, %d contexts, %d of them on disk, %d to ask in %d groups",
        plan.n_responses, len(plan.files), plan.n_positions, plan.n_contexts, plan.n_stored, plan.n_to_ask,
        len(plan.groups),
    )  # fmt: skip
