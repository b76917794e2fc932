"""Whole vocabularies to figures, on the device that has the logits: nothing of the size of a vocabulary leaves it.

Logits are taken as float32. The four divergences are sums of terms that are at least 0 token by token, each from
r = log p/q, so that nothing cancels: with ``m = (p + q)/2`` and ``d = (p - q)/(p + q) = tanh(r/2)``

==========  ==========================================================
KL(P‖Q)     p (r - 1 + exp(-r)), from ``expm1`` where r is small
KL(Q‖P)     q (-r - 1 + exp(r))
JS          m ((1 + d) log(1 + d) + (1 - d) log(1 - d)) / 2
TV          m |d|
==========  ==========================================================

An error of a normaliser moves r everywhere, and by that the first three only in the second order.
"""

# pyright: reportMissingImports=false
# torch is in no installation that uv makes by itself.

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kl.estimators.divergence import PADDING_MASS

Tensor = Any  # torch.Tensor; torch is imported when the first model is loaded

_SMALL = 1.0  # |r| below which expm1 is used


class Lists(NamedTuple):
    """The k most probable tokens of n rows by falling logit, equals by rising id.

    ``ids`` int64 and ``logprobs`` float64, shapes (n, k); ``log_total`` of the logits, float64, shape (n, 1).
    """

    ids: Tensor
    logprobs: Tensor
    log_total: Tensor


def log_total(logits: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials of each row, shape (n, V) to (n, 1), float64 where the device has it."""
    import torch

    top = logits.amax(dim=1, keepdim=True).float()
    shifted = torch.exp(logits.float() - top)
    wide = _wide(logits)
    return top.to(wide) + torch.log(shifted.sum(dim=1, keepdim=True, dtype=wide))


def _wide(values: Tensor) -> Any:
    import torch

    return torch.float32 if values.device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def lists(logits: Tensor, total: Tensor, k: int) -> Lists:
    """The lists of n rows of logits, shape (n, V); ``total`` is their `log_total`."""
    ids = top_ids(logits, min(k, logits.shape[1]))
    return Lists(ids, logits.gather(1, ids).to(total.dtype) - total, total)


def top_ids(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest of each row, equals by rising id: shape (n, V) to (n, k).

    The vocabulary is read once, for the largest of every group of neighbouring ids: with values and ids in one order,
    the k largest of all are in the k groups whose largest are the largest.
    """
    import torch

    n, size = logits.shape
    width = max(1, 2 ** round(math.log2(math.sqrt(size / k))))
    n_groups = size // width
    if n_groups <= k:
        return _sorted_ids(logits, torch.arange(size, device=logits.device).expand(n, size), k)
    whole = logits[:, : n_groups * width].view(n, n_groups, width)
    largest = whole.amax(dim=2)
    groups = _sorted_ids(largest, torch.arange(n_groups, device=logits.device).expand(n, n_groups), k)
    inside = torch.arange(width, device=logits.device)
    ids = (groups[:, :, None] * width + inside).view(n, -1)
    rest = torch.arange(n_groups * width, size, device=logits.device).expand(n, -1)
    ids = torch.cat([ids, rest], dim=1)
    return _sorted_ids(logits.gather(1, ids), ids, k)


def _sorted_ids(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Of the ids of some values those of the k largest, equals by rising id: one whole number orders both."""
    import torch

    bits = (values.float() + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    rising = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    found = torch.topk((rising << 32) + (0x7FFFFFFF - ids), k, dim=1).values
    return 0x7FFFFFFF - (found & 0xFFFFFFFF)


def divergences(logits_p: Tensor, logits_q: Tensor, total_p: Tensor, total_q: Tensor) -> Tensor:
    """KL(P‖Q), KL(Q‖P), JS and TV of n rows, shape (4, n), float32: nats, the last without unit.

    Parameters
    ----------
    logits_p, logits_q : floating, shape (n, V)
        Of one numbering, ``-inf`` for an impossible token.
    total_p, total_q : shape (n, 1)
        `log_total` of them.
    """
    import torch

    p_logits, q_logits = logits_p.float(), logits_q.float()
    p, q = torch.exp(p_logits - total_p.float()), torch.exp(q_logits - total_q.float())
    # From the logits, whose difference is exact where they are near; -inf on both sides is no difference.
    r = torch.where(p_logits == q_logits, 0.0, p_logits - q_logits) - (total_p - total_q).float()
    small = r.abs() < _SMALL
    near = torch.where(small, r, 0.0)
    kl = torch.where(small, p * (near + torch.expm1(-near)), torch.where(p > 0, p * r, 0.0) - p + q)
    reverse = torch.where(small, q * (torch.expm1(near) - near), torch.where(q > 0, -q * r, 0.0) - q + p)
    mean, d = (p + q) / 2, torch.tanh(r / 2)
    js = mean * (torch.special.xlog1py(1 + d, d) + torch.special.xlog1py(1 - d, -d)) / 2
    return torch.stack([kl.sum(dim=1), reverse.sum(dim=1), js.sum(dim=1), (mean * d.abs()).sum(dim=1)])


def compared(logits_p: Tensor, logits_q: Tensor, total_p: Tensor, total_q: Tensor, *, compiled: bool = False) -> Tensor:
    """`divergences` of two models whose vocabularies have one numbering, of which one may go on.

    As `kl.estimators.divergence.exact_of_padded`: over the tokens that both have; NaN where those that one of them has
    alone hold more than ``PADDING_MASS``.
    """
    import torch

    function = _compiled() if compiled else divergences
    common = min(logits_p.shape[1], logits_q.shape[1])
    if logits_p.shape[1] == logits_q.shape[1]:
        return function(logits_p, logits_q, total_p, total_q)
    sides = (logits_p, total_p), (logits_q, total_q)
    alone: Tensor = sum(torch.exp(logits[:, common:].float() - total.float()).sum(dim=1) for logits, total in sides)
    found = function(
        *(logits[:, :common] for logits, _ in sides), *(log_total(logits[:, :common]) for logits, _ in sides)
    )
    return torch.where(alone <= PADDING_MASS, found, torch.nan)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    import torch

    return torch.compile(divergences, dynamic=True)
