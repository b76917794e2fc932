"""What reading P's files costs, from the bytes of a file to columns that were checked.

    python benchmarks/reading.py                                          # files of 40 responses of 100 tokens
    python benchmarks/reading.py --responses 2 --tokens 10 --repeats 1

Files with token ids; with the bytes of each token, as OpenAI's; with two masked tokens at the end of each list; with
one wrong value in each response, which are read entry by entry. The figures are of one core, medians over the repeats
of the processor time of this process; the next columns are how many times as fast that is as ``json.loads`` in the same
run, what share it is of the speed of a copy in memory, and the most memory that Python and NumPy held meanwhile beyond
the file, as a multiple of the file. The table is Markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

from kl.input.responses import parse_responses  # noqa: E402

VOCABULARY = 20_000
LISTED = 20
LISTED_MASS = 0.9


def document(n_responses: int, n_tokens: int, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file with lists of falling log-probabilities, changed position by position."""
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, size=(VOCABULARY, 8), dtype=np.uint8)
    words = [" " + row.tobytes()[: 2 + row[0] % 6].decode() for row in letters]
    often = 1 / np.arange(1, VOCABULARY + 1)  # as words are in a text
    responses: list[dict[str, Any]] = []
    for _ in range(n_responses):
        rows: list[dict[str, Any]] = []
        for _ in range(n_tokens):
            ids = rng.choice(VOCABULARY, LISTED, replace=False, p=often / often.sum()).tolist()
            weights = np.sort(rng.exponential(size=LISTED) ** 2)[::-1]
            logprobs = np.log(LISTED_MASS * weights / weights.sum()).astype(np.float32).tolist()
            top = [
                {"token": words[number], "logprob": value, "token_id": number}
                for number, value in zip(ids, logprobs, strict=True)
            ]
            rows.append({**top[rng.integers(3)], "top_logprobs": top})
            change(rows[-1])
        text = "".join(row["token"] for row in rows)
        responses.append({"text": text, "finish_reason": "length", "logprobs": {"content": rows}})
    return json.dumps({"prompt": "What is it?", "model": "p", "responses": responses}).encode()


def with_ids(row: dict[str, Any]) -> None:
    """As made."""


def with_bytes(row: dict[str, Any]) -> None:
    """Bytes in the place of ids."""
    for entry in (row, *row["top_logprobs"]):
        entry.pop("token_id", None)
        entry["bytes"] = list(entry["token"].encode())


def with_masked(row: dict[str, Any]) -> None:
    """Two marks for masked tokens at the end of the list."""
    for entry in row["top_logprobs"][-2:]:
        entry["logprob"] = -9999.0


def with_doubts(row: dict[str, Any]) -> None:
    """A whole number that is written as a float."""
    row["token_id"] = float(row["token_id"])


KINDS = {"ids": with_ids, "bytes": with_bytes, "masked tokens": with_masked, "entry by entry": with_doubts}


def measured(function: Callable[[bytes], object], data: bytes) -> float:
    """Seconds of processor time."""
    gc.collect()
    began = time.process_time()
    function(data)
    return time.process_time() - began


def peak(data: bytes) -> int:
    """Bytes that were held at most while a file was read."""
    gc.collect()
    tracemalloc.start()
    parse_responses(data, "a.json")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def line(kind: str, data: bytes, n_positions: int, repeats: int) -> str:
    """The row of one kind of file."""
    ways: dict[str, Callable[[bytes], object]] = {
        "read": lambda file: parse_responses(file, "a.json"),
        "json": json.loads,
        "copy": bytearray,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, function in ways.items():
            seconds[way].append(measured(function, data))
    read, plain, copied = (median(values) for values in seconds.values())
    figures = [
        f"{len(data) / read / 1e6:.0f}",
        f"{n_positions / read:,.0f}",
        f"{plain / read:.2f}",
        f"{copied / read:.4f}",
        f"{peak(data) / len(data):.1f}",
    ]
    return f"| {kind} | {' | '.join(figures)} |"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--responses", type=int, default=40, help="responses of a file")
    options.add_argument("--tokens", type=int, default=100, help="tokens of a response")
    options.add_argument("--repeats", type=int, default=7)
    chosen = options.parse_args()
    print("| file | MB/s | positions/s | × json.loads | share of a copy | peak, × file |")  # noqa: T201
    print("|---|---|---|---|---|---|")  # noqa: T201
    for kind, change in KINDS.items():
        data = document(chosen.responses, chosen.tokens, change)
        print(line(kind, data, chosen.responses * chosen.tokens, chosen.repeats))  # noqa: T201


if __name__ == "__main__":
    main()
