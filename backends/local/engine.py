"""The llama architecture in numpy: one pass gives the log-probabilities of every position of many contexts.

A score is kept under the hash of its context, so it must not depend on what follows the context, on which positions or
which other contexts are computed with it, or on how many threads there are. BLAS rounds differently for different
shapes and numbers of threads. Therefore the bits of a row are, by definition, those that it has where its context is
worked through in chunks of `CHUNK` rows, counted from its start, the last filled up with zeros. Only the rows that are
needed, and are not kept, are computed: they go through each matrix together, in whole blocks of `CHUNK` rows, at places
where a row has the bits that it has in its chunk (`backends.local.blas` proves for the BLAS at hand which these are, or
each chunk goes alone). Attention is computed chunk by chunk. Each product runs on one BLAS thread; the engine's own
threads divide the rows. So every figure follows from its context alone, and equal contexts give equal bits. Bits may
still differ between kinds of processors, for which BLAS has different code.

Keys, values and outputs of rows are kept under the ids that lead there: contexts that begin alike share them.

Sources: Touvron et al., *LLaMA*, arXiv 2302.13971; Su et al., *RoFormer*, arXiv 2104.09864; Ainslie et al., *GQA*,
arXiv 2305.13245; Zhang & Sennrich, *RMSNorm*, arXiv 1910.07467.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from backends.local.blas import CHUNK, blas_threads, find_period, in_threads, one_blas_thread, places, spread
from backends.local.config import LlamaConfig
from backends.local.gguf import FloatArray, GGUFFile
from backends.local.rows import Cache, Chunk, Rows, Run, packs_of

AT_ONCE = 12  # blocks of rows that a thread takes through a layer together, about: each weight is read once for all
LOGITS_AT_ONCE = 4  # blocks of rows for which a thread computes logits together
ENGINE = "numpy-llama/1"  # to be raised when the numbers change: it is part of the key of every score
_PERIODS: dict[frozenset[tuple[tuple[int, ...], int]], int | None] = {}

T = TypeVar("T")


class Linear(NamedTuple):
    """``x @ weight.T + bias``, with weight of shape (out, in)."""

    weight: FloatArray
    bias: FloatArray | None

    def __call__(self, x: FloatArray) -> FloatArray:
        """Shape (n, in) to shape (n, out)."""
        product = x @ self.weight.T
        return product if self.bias is None else product + self.bias


class Layer(NamedTuple):
    """The weights of one block."""

    attn_norm: FloatArray
    q: Linear
    k: Linear
    v: Linear
    attn_output: Linear
    ffn_norm: FloatArray
    gate: Linear
    up: Linear
    down: Linear


class Llama:
    """A model in memory. Not for several threads at once: it keeps the rows of the last pass."""

    def __init__(self, file: GGUFFile, bits: int | None = None) -> None:
        """Load the weights; ``bits`` rounds the matrices and the embedding, norms and biases stay exact."""
        self.config = LlamaConfig.from_gguf(file)
        self.embedding = file.load("token_embd.weight", bits)
        self.output = file.load("output.weight", bits) if "output.weight" in file.tensors else self.embedding
        self.output_norm = file.load("output_norm.weight")
        self.layers = [_load_layer(file, index, bits) for index in range(self.config.n_layers)]
        self._frequencies = _frequencies(self.config, file)
        self._rows = Rows(self.config)
        period = self._period()
        self.at_once, self.period = (AT_ONCE, period) if period else (1, CHUNK)

    def _period(self) -> int | None:
        """Of the model's products, by their shapes."""
        weights = {linear.weight.shape: linear.weight for linear in self.layers[0] if isinstance(linear, Linear)}
        products = [*((weight, AT_ONCE) for weight in weights.values()), (self.output, LOGITS_AT_ONCE)]
        shapes = frozenset((weight.shape, n_blocks) for weight, n_blocks in products)
        if shapes not in _PERIODS:
            with one_blas_thread():
                _PERIODS[shapes] = find_period(products)
        return _PERIODS[shapes]

    def logprobs(self, ids: Sequence[int], rows: Sequence[int]) -> Iterator[list[tuple[int, FloatArray]]]:
        """Log-probabilities of the token after each asked row, some chunks at a time.

        Parameters
        ----------
        ids : sequence of int
            Token ids from the start of the context.
        rows : sequence of int, rising
            Row r asks for the token that follows ``ids[: r + 1]``; the last is below the model's context length.

        Yields
        ------
        list of (row, float32 of shape (V,))
            In nats.

        Raises
        ------
        FloatingPointError
            If the weights give no finite numbers.
        """
        for starts in _grouped(sorted({row // CHUNK * CHUNK for row in rows}), AT_ONCE):
            chunks = [Chunk(ids, start) for start in starts]
            asked = [[row for row in rows if chunk.start <= row < chunk.end] for chunk in chunks]
            hidden = [
                outputs[[row - chunk.start for row in some]]
                for chunk, outputs, some in zip(chunks, self.hidden(chunks), asked, strict=True)
            ]
            flat = [row for some in asked for row in some]
            with one_blas_thread():
                yield list(zip(flat, map(log_softmax, self.logits(np.concatenate(hidden), flat)), strict=True))

    def hidden(self, chunks: Sequence[Chunk]) -> list[FloatArray]:
        """What the last layer gives for the rows of each chunk: shape (end - start, width).

        Rows before a chunk are computed too, where they are not kept.
        """
        try:
            paths, runs = self._rows.of(chunks)
            n_threads = blas_threads()
            with one_blas_thread():
                for group in _grouped(self._packs(runs, n_threads), n_threads):
                    self._through_layers(group)
        except BaseException:
            self._rows = Rows(self.config)  # some of them were not computed
            raise
        found = [self._rows.outputs(path) for path in paths]
        self._rows.forget()
        return found

    def _packs(self, runs: Sequence[Run], n_threads: int) -> list[list[Run]]:
        """What goes through the layers together on one thread: as many packs for each."""
        if self.at_once == 1:
            return [[run] for run in runs]
        n_rows = sum(len(run.ids) for run in runs)
        return packs_of(runs, -(-n_rows // (self.at_once * CHUNK * n_threads)) * n_threads)

    def _through_layers(self, packs: Sequence[Sequence[Run]]) -> None:
        """All layers, a thread for each pack; they wait for each other where they need keys and values."""
        ready = threading.Barrier(len(packs))

        def work(pack: Sequence[Run]) -> None:
            try:
                self._pack_through_layers(pack, ready)
            except BaseException:
                ready.abort()
                raise

        in_threads(work, packs)

    def _pack_through_layers(self, runs: Sequence[Run], ready: threading.Barrier) -> None:
        config, rows = self.config, np.concatenate([run.own for run in runs])
        positions = [position for run in runs for position in run.positions]
        at = places(positions, self.period)
        firsts = np.cumsum([0, *(len(run.ids) for run in runs[:-1])]).tolist()
        x = spread(self.embedding[[token for run in runs for token in run.ids]], at)
        mixed = np.zeros((len(x), config.n_heads * config.head_dim), np.float32)

        def attend(layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
            self._rows.store(layer, rows, k[at], v[at])
            ready.wait()
            for run, first in zip(runs, firsts, strict=True):
                keys, values = self._rows.keys_values(layer, run.path)
                own = slice(at[first], at[first] + len(run.ids))
                # A run's rows stand where they stand in the chunk: the products are those of the whole chunk.
                block = np.zeros((CHUNK, *q.shape[1:]), np.float32)
                in_block = slice(run.start % CHUNK, run.start % CHUNK + len(run.ids))
                block[in_block] = q[own]
                mixed[own] = self._mixed(block, keys, values)[in_block]
            return mixed

        where = np.zeros(len(x), np.int64)
        where[at] = positions
        self._rows.store_outputs(rows, self._layers(x, where, attend)[at])

    def feed(self, cache: Cache, ids: Sequence[int]) -> FloatArray:
        """Append ``ids`` to the cache of a response that is being written; logits of the next token, shape (V,).

        Their last bits differ from those of `logprobs`, since the products have other shapes.
        """
        x = np.empty((0, self.config.width), np.float32)
        with one_blas_thread():
            for at in range(0, len(ids), CHUNK):
                piece, start = ids[at : at + CHUNK], len(cache.ids)
                cache.reserve(start + len(piece))

                def attend(layer: int, q: FloatArray, k: FloatArray, v: FloatArray, start: int = start) -> FloatArray:
                    keys, values = cache.store(layer, start, k.transpose(1, 0, 2), v.transpose(1, 0, 2))
                    return self._mixed(q, keys, values)

                x = self._layers(self.embedding[list(piece)], np.arange(start, start + len(piece)), attend)
                cache.ids.extend(piece)
            return (self._normed(x[-1:]) @ self.output.T)[0]

    def _layers(self, x: FloatArray, positions: np.ndarray[Any, np.dtype[np.int64]], attend: _Attend) -> FloatArray:
        """Output of the last layer for rows of embeddings, shape (n, width); ``attend`` mixes the values of a layer."""
        config = self.config
        angles = positions[:, None] * self._frequencies
        turn = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        for index, layer in enumerate(self.layers):
            h = rms_norm(x, layer.attn_norm, config.norm_eps)
            q = rotate(layer.q(h).reshape(len(x), config.n_heads, config.head_dim), turn)
            k = rotate(layer.k(h).reshape(len(x), config.n_kv_heads, config.head_dim), turn)
            v = layer.v(h).reshape(len(x), config.n_kv_heads, config.head_dim)
            q *= np.float32(config.head_dim**-0.5)
            x += layer.attn_output(attend(index, q, k, v))
            h = rms_norm(x, layer.ffn_norm, config.norm_eps)
            gate = silu(layer.gate(h))
            gate *= layer.up(h)
            x += layer.down(gate)
        return x

    def logits(self, hidden: FloatArray, positions: Sequence[int]) -> Iterator[FloatArray]:
        """Unnormalised log-probabilities of rows of `hidden`, shape (n, width), that stand at some positions.

        Yields
        ------
        float32 of shape (V,)
            Of one row after the other; the next ones may be written over it.
        """
        at = places(positions, self.period)
        x = self._normed(spread(hidden, at))
        size = CHUNK * min(self.at_once, LOGITS_AT_ONCE)
        logits = np.empty((min(size, len(x)), len(self.output)), np.float32)
        first = -size
        for place in at:
            if place >= first + size:
                first = place // size * size
                some = x[first : first + size]
                np.matmul(some, self.output.T, out=logits[: len(some)])
            yield logits[place - first]

    def _normed(self, hidden: FloatArray) -> FloatArray:
        return rms_norm(hidden, self.output_norm, self.config.norm_eps)

    def _mixed(self, q: FloatArray, keys: FloatArray, values: FloatArray) -> FloatArray:
        """Causal attention of the last n rows: q (n, heads, head_dim) to keys and values (kv heads, m, head_dim)."""
        config, n = self.config, len(q)
        start = keys.shape[1] - n
        # Query heads that share a key head stand together: one product for each key head.
        weights = q.transpose(1, 0, 2).reshape(config.n_kv_heads, -1, config.head_dim) @ keys.transpose(0, 2, 1)
        by_head = weights.reshape(config.n_heads, n, start + n)
        by_head[:, :, start:] += _mask(n)
        softmax(by_head)
        mixed = np.matmul(weights, values, dtype=np.float32).reshape(config.n_heads, n, config.head_dim)
        return mixed.transpose(1, 0, 2).reshape(n, -1)


_Attend = Callable[[int, FloatArray, FloatArray, FloatArray], FloatArray]  # layer, q, k, v → (n, heads * head_dim)


def _load_layer(file: GGUFFile, index: int, bits: int | None) -> Layer:
    def linear(name: str) -> Linear:
        weight, bias = f"blk.{index}.{name}.weight", f"blk.{index}.{name}.bias"
        return Linear(file.load(weight, bits), file.load(bias) if bias in file.tensors else None)

    return Layer(
        attn_norm=file.load(f"blk.{index}.attn_norm.weight"),
        q=linear("attn_q"),
        k=linear("attn_k"),
        v=linear("attn_v"),
        attn_output=linear("attn_output"),
        ffn_norm=file.load(f"blk.{index}.ffn_norm.weight"),
        gate=linear("ffn_gate"),
        up=linear("ffn_up"),
        down=linear("ffn_down"),
    )


def _frequencies(config: LlamaConfig, file: GGUFFile) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Radians per position of each pair of dimensions, shape (n_rotated / 2,)."""
    frequencies = config.rope_scale * config.rope_base ** (-np.arange(0, config.n_rotated, 2) / config.n_rotated)
    if "rope_freqs.weight" in file.tensors:  # Llama 3: long wavelengths are stretched
        frequencies = frequencies / file.load("rope_freqs.weight").astype(np.float64)
    return frequencies


def rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    """Each row of ``x`` divided by its root mean square, times ``weight``."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float64)
    return x * (1.0 / np.sqrt(mean_square + eps)).astype(np.float32) * weight


def rotate(x: FloatArray, turn: tuple[FloatArray, FloatArray]) -> FloatArray:
    """Turn neighbouring pairs of dimensions of ``x``, shape (n, heads, head_dim), by their angles.

    Neighbours, because GGUF files of this architecture store the query and key matrices permuted for that.
    """
    cos, sin = turn[0][:, None, :], turn[1][:, None, :]
    n_rotated = 2 * cos.shape[-1]
    even, odd = x[..., 0:n_rotated:2], x[..., 1:n_rotated:2]
    turned = x.copy()
    turned[..., 0:n_rotated:2] = even * cos - odd * sin
    turned[..., 1:n_rotated:2] = even * sin + odd * cos
    return turned


@functools.lru_cache(maxsize=CHUNK)
def _mask(n: int) -> FloatArray:
    """What is added so that no row sees a later one."""
    return np.triu(np.full((n, n), -np.inf, np.float32), 1)


def softmax(x: FloatArray) -> None:
    """In place, over the last axis."""
    x -= x.max(axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= x.sum(axis=-1, keepdims=True)


def silu(x: FloatArray) -> FloatArray:
    """``x`` times its logistic function."""
    with np.errstate(over="ignore"):  # exp(-x) = inf for x below -88 gives the right 0
        return x / (np.float32(1) + np.exp(-x))


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log-probabilities in nats of one row of logits, computed in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    log_total = np.log(np.exp(shifted).sum())
    if not np.isfinite(log_total):
        raise FloatingPointError(
            "the weights give logits that are not finite; the model file is damaged or not meant for float32."
        )
    return np.subtract(shifted, log_total, out=shifted).astype(np.float32)


def _grouped(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))
