"""What is known of work under way beside how much of it is done: what it has cost, and the states of its jobs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from backends.base import NOT_SUBMITTED, WAITING, Backend, BackendOptions, Sample
from backends.service.counting import TokenCounts
from kl.records import Score, ScoreFailure

_NOT_ASKED = frozenset({WAITING, NOT_SUBMITTED})


class Spending:
    """What the answers of this run have cost so far, by the service's own counts; callable from any thread.

    Parameters
    ----------
    backend : type of Backend
        Knows the prices.
    options : BackendOptions
    estimate_usd : float or None
        What all of it may cost; None if it is not known.
    is_limit : bool
        That it is what all of it may cost at most, if each is asked once.
    """

    def __init__(
        self, backend: type[Backend], options: BackendOptions, estimate_usd: float | None, *, is_limit: bool = False
    ) -> None:
        self._backend, self._options = backend, options
        word = "at most" if is_limit else "about"
        self._limit = "" if estimate_usd is None else f" of {word} {estimate_usd:.4f}"
        self._lock = threading.Lock()
        self._tokens: dict[str, tuple[int, int]] = {}
        self._has_unknown = False

    def note(self, model: str, result: Score | Sample | ScoreFailure) -> None:
        """Take in what was counted of an answer; one that failed, or was not counted, may be charged all the same."""
        with self._lock:
            if isinstance(result, ScoreFailure):
                self._has_unknown |= result.reason not in _NOT_ASKED
                return
            self._has_unknown |= result.input_tokens is None  # a count of 0 tokens that came out may be left out
            before = self._tokens.get(model, (0, 0))
            self._tokens[model] = before[0] + (result.input_tokens or 0), before[1] + (result.output_tokens or 0)

    def text(self) -> str:
        """``0.0123 of about 0.0456 USD spent``; nothing where nothing is charged."""
        if not self._backend.capabilities.remote:
            return ""
        with self._lock:
            tokens, has_unknown = dict(self._tokens), self._has_unknown
        costs = [self._backend.cost_usd(self._options, model, *counts) for model, counts in tokens.items()]
        known = [cost for cost in costs if cost is not None]
        if costs and not known:
            n_in, n_out = (sum(counts[which] for counts in tokens.values()) for which in (0, 1))
            return f"{n_in:,} + {n_out:,} tokens spent, price not known"
        if not known:
            return ""
        at_least = "at least " if has_unknown or len(known) < len(costs) else ""
        return f"{at_least}{sum(known):.4f}{self._limit} USD spent"


def counted_text(counts: TokenCounts) -> str:
    """How the input tokens of an estimate are known."""
    if not counts.n_prompts:
        return "estimated from the texts"
    what = "1 prompt was" if counts.n_prompts == 1 else f"{counts.n_prompts:,} prompts were"
    return f"{what} counted by the model's own tokenizer, any others estimated with that"


def compared_text(estimated: int, n_asked: int, counted: int, n_counted: int) -> str:
    """``estimated 1.23 M input tokens, the service counted 1.20 M``; nothing where there is nothing to compare."""
    if not (estimated and counted):
        return ""
    if n_counted == n_asked:
        return f"estimated {_tokens(estimated)} input tokens, the service counted {_tokens(counted)}"
    return (
        f"estimated {_tokens(estimated)} input tokens for {n_asked:,} requests, "
        f"the service counted {_tokens(counted)} for the {n_counted:,} that it answered"
    )


def _tokens(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count:,}"


def details_of(backend: Backend, spending: Spending) -> Callable[[], list[str]]:
    """What a `ProgressReporter` says beside the count: jobs by state, and what was spent."""

    def details() -> list[str]:
        jobs = jobs_text(backend.report()) if backend.capabilities.deferred else ""
        return [text for text in (jobs, spending.text()) if text]

    return details


def jobs_text(report: Mapping[str, Any]) -> str:
    """``12 jobs: 3 running, 9 succeeded``, from `Backend.report`; nothing where there are none."""
    states = Counter(str(job["state"]) for job in report.get("jobs", ()))
    counts = ", ".join(f"{count:,} {state.lower().replace('_', ' ')}" for state, count in sorted(states.items()))
    return f"{states.total():,} job{'' if states.total() == 1 else 's'}: {counts}" if states else ""
