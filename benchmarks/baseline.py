"""The usual method, written plainly: what the other figures are held against.

    python benchmarks/baseline.py                            # 8,192 positions
    python benchmarks/baseline.py --positions 200 --repeats 1

Both lists of a position become dictionaries and are scaled to 1; a token that one of them lacks has the smallest
probability that is listed there; KL is summed over all tokens of both. This is the estimate ``floor`` of
`docs/estimators.md`, and no more than that: no bound, no check, no file. The figure is positions a second of the
processor time of this process, the median of the repeats.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.token_rows import Lists, drawn_lists

TopLogprobs = list[dict[str, Any]]  # of a position, as the service's JSON has it


def floor_of(top_p: TopLogprobs, top_q: TopLogprobs) -> float:
    """KL of one position, nats."""
    p, q = scaled(top_p), scaled(top_q)
    least_p, least_q = min(p.values()), min(q.values())
    total = 0.0
    for token in p.keys() | q.keys():
        of_p, of_q = p.get(token, least_p), q.get(token, least_q)
        total += of_p * math.log(of_p / of_q)
    return total


def scaled(top: TopLogprobs) -> dict[str, float]:
    """The probabilities of a list, made to add up to 1."""
    probs = {item["token"]: math.exp(item["logprob"]) for item in top}
    total = sum(probs.values())
    return {token: prob / total for token, prob in probs.items()}


def plain(lists: Lists) -> list[TopLogprobs]:
    """The lists as JSON has them."""
    return [[{"token": item.token, "logprob": item.logprob} for item in top] for top in lists]


def seconds(tops_p: Sequence[TopLogprobs], tops_q: Sequence[TopLogprobs]) -> float:
    """Processor time for all positions."""
    began = time.process_time()
    for top_p, top_q in zip(tops_p, tops_q, strict=True):
        floor_of(top_p, top_q)
    return time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)
    lines = ["| lists | positions/s |", "|---|---|"]
    for kind, peaked in (("flat", False), ("peaked", True)):
        tops_p, tops_q = map(plain, drawn_lists(given.positions, peaked=peaked))
        taken = median(seconds(tops_p, tops_q) for _ in range(given.repeats))
        lines.append(f"| {kind} | {given.positions / taken:,.0f} |")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
