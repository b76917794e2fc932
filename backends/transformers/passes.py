"""Forward passes over many sequences, packed by tokens, and what is made of their rows on the device."""

# pyright: reportMissingImports=false
# torch is in no installation that uv makes by itself.

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from backends.transformers.loading import LoadedModel, Tensor
from backends.transformers.reduction import compared, lists, log_total

logger = logging.getLogger(__name__)
T = TypeVar("T")

_TOKENS_PER_PASS = {"cpu": 1024, "mps": 2048}
_TOKENS_ON_GPU = 8192
_LOGIT_BYTES = {"cpu": 1 << 25}  # float32 logits of one model that are reduced together
_LOGIT_BYTES_ON_GPU = 1 << 28
_SHARED = 0.9  # of the smaller vocabulary that must be pieces of text on both sides, for it to be one vocabulary


class Fed(NamedTuple):
    """Ids that are fed, and the rows whose next token is asked."""

    ids: Sequence[int]
    rows: Sequence[int]


class Reduced(NamedTuple):
    """What is known of n rows, on the host: lists per model, figures of the pair, vocabularies where they are kept.

    ``lists`` has for each model ids and log-probabilities, (n, k) each; ``figures`` is KL, reverse KL, JS and TV,
    shape (4, n), or None for a model alone; ``full`` are float32 log-probabilities, (n, V), for each model that is
    asked for them; ``finite`` says which rows are numbers, shape (n,); ``wanted`` is the log-probability of one token
    of each row, shape (n,), of a model alone.
    """

    lists: list[tuple[Any, Any]]
    figures: Any | None
    full: list[Any | None]
    finite: Any
    wanted: Any | None


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
        self._numberings: dict[tuple[int, int], bool] = {}

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

    def reduced(
        self,
        models: Sequence[LoadedModel],
        hidden: Sequence[Tensor],
        k: Sequence[int],
        full: Sequence[bool],
        *,
        pair: bool,
        wanted: Sequence[int] | None = None,
    ) -> Iterator[tuple[slice, Reduced]]:
        """The rows of one model, or of two that are compared row by row, chunk by chunk.

        With ``pair`` and one model it is compared with itself. ``wanted`` is a token for each row of a model alone.
        """
        start, n = 0, len(hidden[0])
        while start < n:
            rows = slice(start, min(n, start + self.rows_at_once(models)))
            try:
                found = self._reduced(
                    models, [each[rows] for each in hidden], k, full, pair, None if wanted is None else wanted[rows]
                )
            except Exception as error:
                if not is_out_of_memory(error) or rows.stop - rows.start == 1:
                    raise
                self._shrink(models[0], error)
                continue
            yield rows, found
            start = rows.stop

    def _reduced(
        self,
        models: Sequence[LoadedModel],
        hidden: Sequence[Tensor],
        k: Sequence[int],
        full: Sequence[bool],
        pair: bool,
        wanted: Sequence[int] | None,
    ) -> Reduced:
        import torch

        with torch.inference_mode():
            logits = [model.logits(rows) for model, rows in zip(models, hidden, strict=True)]
            totals = [log_total(each) for each in logits]
            listed = [lists(each, total, size) for each, total, size in zip(logits, totals, k, strict=True)]
            figures = None
            if pair:
                other = logits[-1].to(logits[0].device)
                if self._one_numbering(models[0], models[-1]):
                    figures = compared(logits[0], other, compiled=self._compiled).cpu()
                else:
                    figures = torch.full((4, len(other)), torch.nan)
            kept = [
                _full(each, total) if keep else None for each, total, keep in zip(logits, totals, full, strict=True)
            ]
            finite = torch.stack([torch.isfinite(total[:, 0]).cpu() for total in totals]).all(dim=0)
            return Reduced(
                [(each.ids.cpu().numpy(), each.logprobs.cpu().numpy()) for each in listed],
                None if figures is None else figures.numpy(),
                kept,
                finite.numpy(),
                None if wanted is None else _values(logits[0], totals[0], wanted),
            )

    def _one_numbering(self, p: LoadedModel, q: LoadedModel) -> bool:
        """Whether token i of one is token i of the other, as far as both go and are pieces of text.

        Control tokens may have other names: a model is often tuned with ones that were kept free for that.
        """
        place = id(p), id(q)
        if place not in self._numberings:
            both = [(a, b) for a, b in zip(p.pieces, q.pieces, strict=False) if a is not None and b is not None]
            same = all(a == b for a, b in both)
            self._numberings[place] = p is q or (same and len(both) > _SHARED * min(len(p.pieces), len(q.pieces)))
        return self._numberings[place]

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


def _full(logits: Tensor, total: Tensor) -> Any:
    return (logits.to(total.dtype) - total).float().cpu().numpy()


def _values(logits: Tensor, total: Tensor, ids: Sequence[int]) -> Any:
    import torch

    at = torch.tensor(ids, device=logits.device)[:, None]
    return (logits.gather(1, at).to(total.dtype) - total)[:, 0].cpu().numpy()
