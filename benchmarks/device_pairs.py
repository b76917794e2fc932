"""Exact pairs of two checkpoints on a device: what bodies, heads and the comparison of vocabularies take.

    python benchmarks/device_pairs.py                         # real shapes on a GPU, a small one on a processor
    python benchmarks/device_pairs.py --shapes tiny --repeats 1

Random weights of real shapes in bfloat16 (float32 on a processor), P and Q resident, through the backend's own passes:
`Passes.hidden` for each model, then heads and `Passes.reduced` with both top-20 lists. Heads alone are timed apart. The
ratio is that of the two bare forward passes, bodies and heads, to the whole. Medians over the repeats after two to warm
up; the table is Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # started as a file, the project itself is not on the path
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the path was set above
import transformers  # noqa: E402

from backends.transformers.loading import LoadedModel  # noqa: E402
from backends.transformers.passes import Fed, Passes, Rows  # noqa: E402

# name → hidden size, of the feed-forward, layers, heads, key heads, vocabulary, tied, sequences × tokens
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 1000, True, 4, 16),
    "135M": (576, 1536, 30, 9, 3, 49_152, True, 32, 256),
    "1.2B": (2048, 8192, 16, 32, 8, 128_256, True, 16, 256),
    "8B": (4096, 14_336, 32, 32, 8, 128_256, False, 8, 256),
}


class Words:
    """A vocabulary whose tokens are their numbers."""

    stop_ids = frozenset[int]()

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def is_added(self, index: int) -> bool:
        """No id is a control token."""
        return False

    def token_bytes(self, index: int) -> bytes:
        """The number."""
        return str(index).encode()


def model_of(shape: str, seed: int, device: torch.device) -> LoadedModel:
    """A random llama of a shape, in the place of one that was loaded."""
    width, inner, layers, heads, key_heads, vocabulary, tied, _, length = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=length,
    )  # fmt: skip
    torch.manual_seed(seed)
    with device:
        model = transformers.LlamaForCausalLM._from_config(
            config, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, attn_implementation="sdpa"
        )
    checkpoint: Any = SimpleNamespace(name=shape, version=shape)
    return LoadedModel(checkpoint, model.eval().requires_grad_(False), (Words(vocabulary), None, length))


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Milliseconds, the median."""
    spent: list[float] = []
    for repeat in range(repeats + 2 * (repeats > 1)):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if repeat >= 2 * (repeats > 1):
            spent.append(1000 * (time.perf_counter() - began))
    return median(spent)


def row(shape: str, device: torch.device, repeats: int, compiled: bool) -> str:
    """The figures of a shape."""
    p, q = (model_of(shape, seed, device) for seed in (0, 1))
    vocabulary, n, length = SHAPES[shape][5], *SHAPES[shape][-2:]
    ids = torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(0)).tolist()
    fed, passes = [Fed(each, range(length)) for each in ids], Passes(n * length, compiled=compiled)

    def bodies() -> list[torch.Tensor]:
        return [torch.cat(passes.hidden(model, fed)) for model in (p, q)]

    hidden = bodies()
    sides = [Rows(model, each, 20, False, [()] * (n * length)) for model, each in zip((p, q), hidden, strict=True)]

    def heads() -> None:
        at_once = passes.rows_at_once([p, q])
        with torch.inference_mode():
            for start in range(0, n * length, at_once):
                for model, each in zip((p, q), hidden, strict=True):
                    model.logits(each[start : start + at_once])

    def reduce() -> None:
        for _ in passes.reduced(sides, pair=True):
            pass

    of_bodies, of_heads, of_both = (timed(work, device, repeats) for work in (bodies, heads, reduce))
    reduction, forward = of_both - of_heads, of_bodies + of_heads
    rate = 1000 * n * length / (forward + reduction)
    return (
        f"| {shape} | {n * length:,} | {of_bodies:.1f} | {of_heads:.1f} | {reduction:.1f} | {reduction / forward:.0%} "
        f"| {forward / (forward + reduction):.2f} | {rate:,.0f} |"
    )


def main() -> None:
    """Measure, and print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ["135M", "1.2B", "8B"] if device.type == "cuda" else ["tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=usual)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="the backend's option")
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n")  # noqa: T201
    print("| shape | tokens | two bodies, ms | two heads, ms | comparison, ms | of the forward passes "  # noqa: T201
          "| forward passes of all | positions/s |")  # fmt: skip
    print("|---|" + "---|" * 7)  # noqa: T201
    for shape in given.shapes:
        print(row(shape, device, given.repeats, given.compile), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
