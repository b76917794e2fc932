"""A bucket's rule that deletes old batch files, beside the rules that others made."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google.api_core.exceptions

from backends.errors import BackendError, RetryableBackendError


@dataclass(frozen=True, slots=True)
class LifecycleState:
    """The bucket's rules: the days of those that are ours, how many others there are, whether all is as asked."""

    ours: tuple[int, ...]
    others: int
    as_asked: bool


def lifecycle_state(rules: Iterable[Mapping[str, Any]], prefixes: Sequence[str], days: int) -> LifecycleState:
    """How rules compare with the one that deletes what lies below ``prefixes`` after ``days``."""
    rules = list(rules)
    ours = tuple(int(rule["condition"]["age"]) for rule in rules if _is_ours(rule, prefixes))
    return LifecycleState(ours, len(rules) - len(ours), as_asked=ours == (days,))


def merged_rules(rules: Iterable[Mapping[str, Any]], prefixes: Sequence[str], days: int) -> list[dict[str, Any]]:
    """The rules that are not ours, unchanged and in their order, then ours."""
    ours = {"action": {"type": "Delete"}, "condition": {"age": days, "matchesPrefix": list(prefixes)}}
    return [*(dict(rule) for rule in rules if not _is_ours(rule, prefixes)), ours]


def _is_ours(rule: Mapping[str, Any], prefixes: Sequence[str]) -> bool:
    condition = rule.get("condition", {})
    return (
        rule["action"] == {"type": "Delete"}
        and set(condition) == {"age", "matchesPrefix"}
        and sorted(condition["matchesPrefix"]) == sorted(prefixes)
    )


def read_rules(client: Any, bucket: str) -> list[dict[str, Any]]:
    """All lifecycle rules of a bucket; ``client`` is a storage client.

    Raises
    ------
    BackendError
        If there is one that the client would leave out.
    """
    return _rules(client.get_bucket(bucket, retry=None))


def write_rule(client: Any, bucket: str, prefixes: Sequence[str], days: int) -> None:
    """Put the rule beside the others, in place of one with another number of days; one attempt.

    Raises
    ------
    RetryableBackendError
        If the settings of the bucket changed between reading and writing: they must be read again.
    """
    handle = client.get_bucket(bucket, retry=None)
    rules = _rules(handle)
    if lifecycle_state(rules, prefixes, days).as_asked:
        return
    handle.lifecycle_rules = merged_rules(rules, prefixes, days)
    try:
        handle.patch(if_metageneration_match=handle.metageneration, retry=None)
    except google.api_core.exceptions.PreconditionFailed as error:
        raise RetryableBackendError(f"the settings of gs://{bucket} changed meanwhile") from error


def _rules(handle: Any) -> list[dict[str, Any]]:
    # The client warns of kinds of rules that it does not know and leaves them out: writing the rest would delete them.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return [dict(rule) for rule in handle.lifecycle_rules]
        except UserWarning as error:
            raise BackendError(
                f"gs://{handle.name} has a lifecycle rule of a kind that this version does not know and would delete. "
                "Set the rule in the console, or with a newer google-cloud-storage."
            ) from error
