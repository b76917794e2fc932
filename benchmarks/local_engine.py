"""The local engine against the processor: tokens a second, and the share of the matrix products' own peak.

    python benchmarks/local_engine.py                                   # on 1 and on all cores
    python benchmarks/local_engine.py --responses 2 --tokens 20 --repeats 1

Scores are those of `backends.local` for the responses of one prompt, whose keys and values are computed once; the
responses go through each matrix together. The peak is that of a float32 product of two large matrices on as many
threads as are measured, in turn with the scores, so that both see the same machine; the floating-point operations of
the engine are those of its matrices and its attention for the tokens that were asked for, without what pads them. The
last column compares the whole vocabularies of the model and of its weights rounded to four bits, both models computed.
Medians over the repeats; the table is Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - the path was set above
import threadpoolctl  # noqa: E402

from backends.base import ScoreRequest  # noqa: E402
from backends.local.backend import LocalBackend  # noqa: E402
from backends.local.blas import in_threads, one_blas_thread  # noqa: E402
from backends.local.models import LocalModel, find_model, load_model  # noqa: E402
from kl.records import Prompt, Score, Turn  # noqa: E402

MODEL, ROUNDED = "smollm2-135m", "smollm2-135m@int4"
PROMPT = Prompt((Turn("user", "Tell me, in a few sentences, how a lighthouse works and who looked after it." * 3),))
PEAK_SIZE = 1536


def requests(n: int, tokens: int, model: str, *, full: bool = False, start: int = 0) -> list[ScoreRequest]:
    """Responses of random tokens that stand for text, all different."""
    tokenizer = load_model(find_model(model)).tokenizer
    made: list[ScoreRequest] = []
    for number in range(start, start + n):
        drawn = np.random.default_rng(number).permutation(np.arange(300, 20_000)).tolist()
        ids = [index for index in drawn if tokenizer.token_bytes(index).isascii()][:tokens]
        texts = [tokenizer.token_bytes(index).decode() for index in ids]
        ends = np.cumsum([0, *map(len, texts[:-1])]).tolist()
        keys = tuple(f"{model} {number} {position}" for position in range(tokens))
        positions = tuple(range(tokens))
        made.append(
            ScoreRequest(f"{number}", model, PROMPT, "".join(texts), tuple(ends), tuple(ids), positions, keys, 20, full)
        )
    return made


def paired(n: int, tokens: int, start: int) -> list[list[ScoreRequest]]:
    """The same of both models, each beside the other."""
    both = [requests(n, tokens, model, full=True, start=start) for model in (MODEL, ROUNDED)]
    return [
        [replace(one, counterparts=other.keys), replace(other, counterparts=one.keys)]
        for one, other in zip(*both, strict=True)
    ]


def score(calls: Sequence[Sequence[ScoreRequest]]) -> float:
    """Seconds that the backend takes for calls made at once, as the groups of a run make them."""

    async def one(backend: LocalBackend, call: Sequence[ScoreRequest]) -> int:
        return sum([isinstance(result, Score) async for result in backend.score(call)])

    async def every() -> int:
        async with LocalBackend(LocalBackend.Options()) as backend:
            return sum(await asyncio.gather(*(one(backend, call) for call in calls)))

    began = time.perf_counter()
    n = asyncio.run(every())
    spent = time.perf_counter() - began
    assert n == sum(len(request.keys) for call in calls for request in call)
    return spent


def peak(threads: int) -> float:
    """Floating-point operations a second of large products, one on each thread."""
    pairs = [np.ones((2, PEAK_SIZE, PEAK_SIZE), np.float32) for _ in range(threads)]

    def product(pair: np.ndarray) -> None:
        for _ in range(4):
            pair[0] @ pair[1]

    with one_blas_thread():
        began = time.perf_counter()
        in_threads(product, pairs)
        return 4 * threads * 2 * PEAK_SIZE**3 / (time.perf_counter() - began)


def operations(model: LocalModel, n: int, tokens: int) -> float:
    """Of matrices, attention and the vocabulary for the responses; the rows of their prompt are kept from before."""
    config = model.engine.config
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    a_layer = config.width * (2 * q + 2 * kv + 3 * config.ffn_width)
    prompt = len(model.template.encode(PROMPT))
    rows = n * (tokens - 1)
    seen = n * (tokens * prompt + tokens**2 / 2)
    of_layers = config.n_layers * 2 * (rows * a_layer + seen * 2 * q)
    return of_layers + 2.0 * n * tokens * config.width * config.vocabulary


def row(threads: int, n: int, tokens: int, repeats: int) -> str:
    """The figures on so many threads."""
    model = load_model(find_model(MODEL))
    load_model(find_model(ROUNDED))
    with threadpoolctl.threadpool_limits(threads, user_api="blas"):
        rates: dict[str, list[float]] = {"tokens": [], "share": [], "pairs": []}
        for repeat in range(repeats + 1):
            fresh = 1000 * (repeat + 100 * threads)  # other responses each time: rows that were computed are kept
            before = peak(threads)
            spent = score([[request] for request in requests(n, tokens, MODEL, start=fresh)])
            limit = (before + peak(threads)) / 2
            both = score(paired(n, tokens, fresh + 500))
            if repeat == 0 and repeats > 1:
                continue  # to warm up
            rates["tokens"].append(n * tokens / spent)
            rates["share"].append(operations(model, n, tokens) / spent / limit)
            rates["pairs"].append(n * tokens / both)
    shown: dict[str, Callable[[float], str]] = {
        "tokens": "{:,.0f}".format,
        "share": "{:.0%}".format,
        "pairs": "{:,.0f}".format,
    }
    return f"| {threads} | " + " | ".join(shown[name](median(values)) for name, values in rates.items()) + " |"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=16, help="responses of one prompt")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    given = parser.parse_args()
    size = f"{given.responses} responses of {given.tokens} tokens, median of {given.repeats}"
    print(f"{platform.machine()}, numpy {np.__version__}, {size}\n")  # noqa: T201
    print("| threads | positions a second | of the peak of matrix products | exact pairs a second |")  # noqa: T201
    print("|---|---|---|---|")  # noqa: T201
    for threads in given.threads:
        print(row(threads, given.responses, given.tokens, given.repeats), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
