"""What Prefect itself costs for each group of responses, and whether that grows with their number.

    python benchmarks/prefect_groups.py                # 1,000 groups
    python benchmarks/prefect_groups.py --groups 20 --repeats 1

The task of a run is mapped over groups whose answers are there at once, in as many threads as a run over jobs has, with
the temporary server that a run by hand starts. The figures are groups a second of wall time in each quarter of the
groups, and processor time of this process for each group; medians over the repeats. The table is Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

from flows.runtime.environment import prepare_environment  # noqa: E402

prepare_environment()

from prefect import flow, unmapped  # noqa: E402 - its settings were prepared above
from prefect.task_runners import ThreadPoolTaskRunner  # noqa: E402

from flows.cluster.mapping import results_of, tasks_run_by  # noqa: E402
from flows.stages.plan import Group  # noqa: E402
from flows.stages.scorers import Scorer  # noqa: E402
from flows.stages.scoring import GroupOutcome  # noqa: E402
from flows.stages.tasks import score  # noqa: E402

WORKERS = 50  # of a run over batch jobs


class NoWork:
    """Has its answers at once, and notes when it was asked."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def score(self, group: Group) -> GroupOutcome:
        """Nothing was asked of anybody."""
        self.asked.append(time.perf_counter())
        return GroupOutcome(0, {}, (), {})


@flow(name="groups")
def map_groups(n: int) -> tuple[list[float], float]:
    """When each group came to its turn, in seconds from the begin, and the processor time of all."""
    groups = [Group(f"group {number}", ()) for number in range(n)]
    scorer = NoWork()
    with ThreadPoolTaskRunner(WORKERS) as runner, tasks_run_by(runner):
        began, spent = time.perf_counter(), time.process_time()
        futures: list[Any] = score.map(groups, unmapped(cast(Scorer, scorer)))
        for _, result in results_of(futures, lambda: False):
            assert isinstance(result, GroupOutcome), result
        return [moment - began for moment in sorted(scorer.asked)], time.process_time() - spent


def quarters(moments: Sequence[float]) -> list[float]:
    """Groups a second in each quarter of the groups."""
    n = len(moments)
    marks = [0.0, *(moments[n * quarter // 4 - 1] for quarter in (1, 2, 3, 4))]
    return [n / 4 / (after - before) for before, after in pairwise(marks)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1000, help="4 or more")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    map_groups(4)  # the server, and what Prefect loads
    found = [map_groups(given.groups) for _ in range(given.repeats)]
    rates = [median(values) for values in zip(*(quarters(moments) for moments, _ in found), strict=True)]
    whole = median(given.groups / moments[-1] for moments, _ in found)
    cpu_ms = median(1000 * spent / given.groups for _, spent in found)
    cells = " | ".join(f"{rate:.0f}" for rate in [*rates, whole])
    lines = ["| groups | 1st quarter, groups/s | 2nd | 3rd | 4th | all | CPU ms a group |", "|---|" + "---|" * 6]
    print("\n".join([*lines, f"| {given.groups:,} | {cells} | {cpu_ms:.2f} |"]))  # noqa: T201


if __name__ == "__main__":
    main()
