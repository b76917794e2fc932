"""Forward passes over many sequences, packed by tokens, and what is made of their rows on the device."""

# pyright: reportMissingImports=false
# torch is in no installation that uv makes by itself.

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from backends.transformers.loading import LoadedModel, Tensor
from backends.transformers.reduction import compared, lists, log_total

logger = logging.getLogger(__name__)

_TOKENS_PER_PASS = {"cpu": 1024, "mps": 2048}
_TOKENS_ON_GPU = 8192
_LOGIT_BYTES = {"cpu": 1 << 25}  # float32 logits of one model that are reduced together
_LOGIT_BYTES_ON_GPU = 1 << 28
_SHARED = 0.9  # of the smaller vocabulary that must be pieces of text on both sides, for it to be one vocabulary


class Fed(NamedTuple):
    """Ids that are fed, and the rows whose next token is asked."""

    ids: Sequence[int]
    rows: Sequence[int]


class Rows(NamedTuple):
    """Rows of one model, and what is asked of each.

    Attributes
    ----------
    model : LoadedModel
    hidden : Tensor, shape (n, width)
    k : int
        Length of the lists.
    full : bool
        Whether the vocabularies are kept.
    wanted : sequence of n sequences of int
        Ids whose values are asked for beside the list.
    """

    model: LoadedModel
    hidden: Tensor
    k: int
    full: bool
    wanted: Sequence[Sequence[int]]

    def part(self, rows: slice) -> Rows:
        """Some of the rows."""
        return self._replace(hidden=self.hidden[rows], wanted=self.wanted[rows])


class Reduced(NamedTuple):
    """What is known of n rows of a model, on the host: numpy arrays.

    ``ids`` and ``logprobs`` are the lists, shape (n, k); ``wanted`` the values of the ids asked for, row by row;
    ``full`` float32 log-probabilities, shape (n, V), where they are kept; ``finite`` which rows are numbers.
    """

    ids: Any
    logprobs: Any
    wanted: list[list[float]]
    full: Any | None
    finite: Any


class Compared(NamedTuple):
    """The sides of some rows, and KL, reverse KL, JS and TV of two that are compared, shape (4, n)."""

    sides: tuple[Reduced, ...]
    figures: Any | None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory does not suffice, of a GPU or of the machine."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


class Passes:
    """Runs models within a bound of tokens, which memory may lower.

    Parameters
    ----------
    tokens_per_pass : int, optional
        Default: by the kind of device.
    compiled : bool
        Whether the comparison of vocabularies is compiled.
    """

    def __init__(self, tokens_per_pass: int | None, *, compiled: bool = False) -> None:
        self._given, self._compiled = tokens_per_pass, compiled
        self._shrunk = 1
        # By the models themselves: an address may be given to another model once one is forgotten.
        self._numberings: WeakKeyDictionary[LoadedModel, WeakKeyDictionary[LoadedModel, bool]] = WeakKeyDictionary()

    def tokens(self, model: LoadedModel) -> int:
        """How many tokens a pass of a model may have."""
        usual = self._given or _TOKENS_PER_PASS.get(model.device.type, _TOKENS_ON_GPU)
        return max(1, usual // self._shrunk)

    def rows_at_once(self, models: Sequence[LoadedModel]) -> int:
        """How many rows of logits are reduced together."""
        usual = min(
            _LOGIT_BYTES.get(model.device.type, _LOGIT_BYTES_ON_GPU) // (4 * model.n_vocabulary) for model in models
        )
        return max(1, usual // self._shrunk)

    def hidden(self, model: LoadedModel, sequences: Sequence[Fed]) -> list[Tensor]:
        """What the head is given at the rows of each sequence, shape (rows, width) each."""
        found: list[Tensor | None] = [None] * len(sequences)
        todo = sorted(range(len(sequences)), key=lambda at: len(sequences[at].ids), reverse=True)
        while todo:
            pack = _pack(todo, sequences, self.tokens(model))
            try:
                made = _hidden(model, [sequences[at] for at in pack])
            except Exception as error:
                if not is_out_of_memory(error) or len(pack) == 1:
                    raise
                self._shrink(model, error)
                continue
            for at, rows in zip(pack, made, strict=True):
                found[at] = rows
            del todo[: len(pack)]
        return [rows for rows in found if rows is not None]

    def reduced(self, sides: Sequence[Rows], *, pair: bool) -> Iterator[tuple[slice, Compared]]:
        """The rows of one model, or of two that are compared row by row, chunk by chunk.

        With ``pair`` and one model it is compared with itself.
        """
        start, n = 0, len(sides[0].hidden)
        while start < n:
            rows = slice(start, min(n, start + self.rows_at_once([side.model for side in sides])))
            try:
                found = self._reduced([side.part(rows) for side in sides], pair=pair)
            except Exception as error:
                if not is_out_of_memory(error) or rows.stop - rows.start == 1:
                    raise
                self._shrink(sides[0].model, error)
                continue
            yield rows, found
            start = rows.stop

    def _reduced(self, sides: Sequence[Rows], *, pair: bool) -> Compared:
        import torch

        with torch.inference_mode():
            logits = [side.model.logits(side.hidden) for side in sides]
            totals = [log_total(each) for each in logits]
            figures = None
            if pair and self._one_numbering(sides[0].model, sides[-1].model):
                other, total = (each.to(logits[0].device) for each in (logits[-1], totals[-1]))
                figures = compared(logits[0], other, totals[0], total, compiled=self._compiled).cpu().numpy()
            elif pair:
                figures = np.full((4, len(logits[0])), np.nan)
            reduced = tuple(_reduced(*each) for each in zip(sides, logits, totals, strict=True))
            return Compared(reduced, figures)

    def _one_numbering(self, p: LoadedModel, q: LoadedModel) -> bool:
        """Whether token i of one is token i of the other, as far as both go and are pieces of text.

        Control tokens may have other names: a model is often tuned with ones that were kept free for that.
        """
        known = self._numberings.setdefault(p, WeakKeyDictionary())
        if q not in known:
            both = [(a, b) for a, b in zip(p.pieces, q.pieces, strict=False) if a is not None and b is not None]
            same = all(a == b for a, b in both)
            known[q] = p is q or (same and len(both) > _SHARED * min(len(p.pieces), len(q.pieces)))
        return known[q]

    def _shrink(self, model: LoadedModel, error: BaseException) -> None:
        self._shrunk *= 2
        if model.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        logger.warning(
            "%s: memory does not suffice (%s); going on with %d tokens a pass.",
            model.checkpoint.version,
            " ".join(str(error).split())[:120],
            self.tokens(model),
        )


def _pack(todo: Sequence[int], sequences: Sequence[Fed], room: int) -> Sequence[int]:
    """The first of some sequences, longest first, that fit in a pass with what fills them up; at least one."""
    longest = len(sequences[todo[0]].ids)
    return todo[: max(1, room // longest)]


def _hidden(model: LoadedModel, sequences: Sequence[Fed]) -> list[Tensor]:
    import torch

    longest = len(sequences[0].ids)
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence.ids)] = torch.tensor(sequence.ids, dtype=torch.long)
    with torch.inference_mode():
        hidden = model.hidden(ids.to(model.device))
        return [
            rows[torch.tensor(sequence.rows, device=rows.device)]
            for rows, sequence in zip(hidden, sequences, strict=True)
        ]


def _reduced(side: Rows, logits: Tensor, total: Tensor) -> Reduced:
    import torch

    listed = lists(logits, total, side.k)
    longest = max(map(len, side.wanted), default=0)
    padded = [[*ids, *[0] * (longest - len(ids))] for ids in side.wanted]
    at = torch.tensor(padded, dtype=torch.long, device=logits.device)
    values: list[list[float]] = (
        (logits.gather(1, at).to(total.dtype) - total).tolist() if longest else [[]] * len(padded)
    )
    return Reduced(
        listed.ids.cpu().numpy(),
        listed.logprobs.cpu().numpy(),
        [row[: len(ids)] for row, ids in zip(values, side.wanted, strict=True)],
        (logits.to(total.dtype) - total).float().cpu().numpy() if side.full else None,
        torch.isfinite(total[:, 0]).cpu().numpy(),
    )
