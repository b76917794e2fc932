"""Who asks about a group of responses, and where: this process what sends texts to a service, a cluster what computes.

What a service answers is paid for, so that the process which alone writes the score store asks it. What is computed may
be computed again: it travels, and its answers come home.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from prefect.states import Failed, State

from backends.errors import BackendError, ConfigError, TokenKLError
from backends.session import BackendSession, SessionClosedError
from flows.config.comparison import Comparison
from flows.folder.layout import Stores
from flows.folder.room import DiskRefusedError, Reserve, disk_refused
from flows.stages.plan import Group, requests_of
from flows.stages.scoring import GroupOutcome, OnResult, store_answers
from kl.records import Score, ScoreFailure

logger = logging.getLogger("flows.run")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a backend said elsewhere of a group's contexts, and the error that ended it, if one did."""

    results: list[Score | ScoreFailure]
    error: BackendError | None


class StoringScorer:
    """Asks from this process, and stores each answer as it arrives.

    Not a dataclass: Prefect would search its fields, for every task, for results of other tasks.

    Parameters
    ----------
    comparison : Comparison
    stores : Stores
    session : BackendSession
    on_result : callable
        Told each context that is settled, as of `flows.stages.scoring.store_answers`.
    reserve : Reserve
        Given up when the disk takes no more.
    """

    def __init__(
        self,
        comparison: Comparison,
        stores: Stores,
        session: BackendSession,
        on_result: OnResult,
        reserve: Reserve,
    ) -> None:
        self._comparison, self._stores, self._session = comparison, stores, session
        self._on_result, self._reserve = on_result, reserve
        self._refusing = threading.Lock()
        self._refusal: OSError | None = None
        self._waits = False  # for what is in flight

    def score(self, group: Group) -> GroupOutcome | State[GroupOutcome]:
        """Have a group answered; every answer is on disk before this returns."""
        if self._refusal is not None:
            return _failed(disk_refused(self._refusal))
        asked = list(requests_of(group, self._comparison))
        backend, stage = self._session.backend, self._comparison.config.stage
        ask = {"run": backend.score, "submit": backend.submit, "collect": backend.collect}[stage]
        results = ask([request for _, request in asked])
        work = store_answers(
            results, asked, self._stores, self._on_result, only_looks=stage == "collect", on_refused=self._stop_asking
        )
        try:
            return self._session.run(work)
        except DiskRefusedError as error:
            if not self._waits:
                self._session.cancel()
            return _failed(error)
        except (ConfigError, OSError) as error:
            # It holds for every group: no rights, no credentials, a disk that fails. The others must not go on buying.
            self._session.cancel()
            return _failed(error)
        except SessionClosedError as error:
            # A group that met the refusal may be the one that was cut short: the others do not know the reason.
            return _failed(error if self._refusal is None else disk_refused(self._refusal))
        except TokenKLError as error:
            return _failed(error)

    def _stop_asking(self, error: OSError) -> bool:
        """Ask for nothing more, and have what is in flight stored where room was kept for it."""
        with self._refusing:
            if self._refusal is None:
                self._refusal = error
                self._reserve.give_up()
                self._waits = self._session.backend.stop_asking(f"the disk takes no more: {error}")
                if self._waits:
                    logger.error("%s: no more is asked; answers in flight are waited for", error)
            return self._waits

    def keep(self, group: Group, outcome: GroupOutcome) -> GroupOutcome:
        """What the task returned is on disk already."""
        return outcome


def _failed(error: Exception) -> State[GroupOutcome]:
    return Failed(message=str(error), data=error)


class TravellingScorer:
    """Asks a backend that computes where the task is, and stores the answers when they are home.

    Parameters
    ----------
    comparison : Comparison
        With absolute folders: it is sent to the workers.
    stores : Stores
    on_result : callable
        Told each context that is settled, as of `flows.stages.scoring.store_answers`.
    """

    def __init__(self, comparison: Comparison, stores: Stores, on_result: OnResult) -> None:
        self._comparison = comparison
        self._at_home = (stores, on_result)

    def __getstate__(self) -> dict[str, object]:
        return {"_comparison": self._comparison}

    def score(self, group: Group) -> Answers | State[Answers]:
        """Have a group answered; nothing is stored, so that doing it again changes nothing."""
        requests = [request for _, request in requests_of(group, self._comparison)]
        found = Answers([], None)
        try:
            with BackendSession(self._comparison.backend(self._comparison.options)) as session:

                async def work() -> None:
                    async for result in session.backend.score(requests):
                        found.results.append(result)

                session.run(work())
        except BackendError as error:
            return Answers(found.results, error)
        except (TokenKLError, OSError) as error:
            return Failed(message=str(error), data=portable(error))
        return found

    def keep(self, group: Group, answers: Answers) -> GroupOutcome:
        """Store what a task brought home."""

        async def again() -> AsyncIterator[Score | ScoreFailure]:
            for result in answers.results:
                yield result
            if answers.error is not None:
                raise answers.error

        stores, on_result = self._at_home
        asked = list(requests_of(group, self._comparison))
        return asyncio.run(store_answers(again(), asked, stores, on_result))


Scorer = StoringScorer | TravellingScorer


def portable(error: Exception) -> Exception:
    """The same error, or if it cannot be sent between processes, one of the nearest kind that can."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever keeps it from being sent
        kinds: tuple[type[Exception], ...] = (ConfigError, TokenKLError, OSError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
        return kind(str(error))
    return error
