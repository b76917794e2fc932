"""The llama architecture in numpy: one pass gives the log-probabilities of every position.

A score is kept under the hash of its context, so it must not depend on what follows the context, on which positions
are asked, or on how many threads there are. BLAS rounds differently for different shapes and numbers of threads.
Therefore a sequence is worked through in chunks of `CHUNK` rows, counted from its start and filled up with zeros, on
one BLAS thread: every product has a shape that follows from the position alone, and equal contexts give equal bits.
Bits may still differ between kinds of processors, for which BLAS has different code.

Sources: Touvron et al., *LLaMA*, arXiv 2302.13971; Su et al., *RoFormer*, arXiv 2104.09864; Ainslie et al., *GQA*,
arXiv 2305.13245; Zhang & Sennrich, *RMSNorm*, arXiv 1910.07467.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from backends.local.config import LlamaConfig
from backends.local.gguf import FloatArray, GGUFFile

CHUNK = 48  # rows of every matrix product; a multiple of the tile heights 16 and 24 of common BLAS kernels
ENGINE = "numpy-llama/1"  # to be raised when the numbers change: it is part of the key of every score


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


class Cache:
    """Ids, keys and values of the rows seen so far; one buffer per layer, shape (2, kv heads, capacity, head_dim)."""

    def __init__(self, config: LlamaConfig) -> None:
        self.ids: list[int] = []
        self._buffers = [
            np.zeros((2, config.n_kv_heads, 0, config.head_dim), np.float32) for _ in range(config.n_layers)
        ]

    def reserve(self, rows: int) -> None:
        """Make room for that many rows, and more than before by half, so that growing row by row copies little."""
        for index, buffer in enumerate(self._buffers):
            if buffer.shape[2] < rows:
                # Zeros, not empty: a row that is masked out is multiplied by 0, and 0 times a stray NaN is NaN.
                capacity = max(rows, buffer.shape[2] * 3 // 2)
                grown = np.zeros((*buffer.shape[:2], capacity, buffer.shape[3]), np.float32)
                grown[:, :, : buffer.shape[2]] = buffer
                self._buffers[index] = grown

    def store(self, layer: int, start: int, keys: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Put the rows of one layer, shape (kv heads, n, head_dim), at ``start``; returns all rows up to their end."""
        buffer, end = self._buffers[layer], start + keys.shape[1]
        buffer[0, :, start:end] = keys
        buffer[1, :, start:end] = values
        return buffer[0, :, :end], buffer[1, :, :end]


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
        self._last_pass: Cache | None = None

    def logprobs(self, ids: Sequence[int], rows: Sequence[int]) -> Iterator[list[tuple[int, FloatArray]]]:
        """Log-probabilities of the token after each asked row, chunk by chunk.

        Parameters
        ----------
        ids : sequence of int
            Token ids from the start of the context.
        rows : sequence of int, rising
            Row r asks for the token that follows ``ids[: r + 1]``; the last is below the model's context length.

        Yields
        ------
        list of (row, float32 of shape (V,))
            In nats. The rows asked in one chunk.

        Raises
        ------
        FloatingPointError
            If the weights give no finite numbers.
        """
        cache = self._resume(ids, rows[0])
        cache.reserve((rows[-1] // CHUNK + 1) * CHUNK)
        for start in range(len(cache.ids), rows[-1] + 1, CHUNK):
            with one_blas_thread():
                hidden = self._advance(cache, ids[start : start + CHUNK], CHUNK)
                asked = [row for row in rows if start <= row < start + CHUNK]
                logits = self._logits(hidden) if asked else hidden
                found = [(row, log_softmax(logits[row - start])) for row in asked]
            yield found
        self._last_pass = cache

    def _resume(self, ids: Sequence[int], first_row: int) -> Cache:
        """The rows of the last pass that this one shares: whole chunks before the first row asked."""
        cache, self._last_pass = self._last_pass or Cache(self.config), None
        same = next(
            (at for at, (old, new) in enumerate(zip(cache.ids, ids, strict=False)) if old != new),
            min(len(cache.ids), len(ids)),
        )
        del cache.ids[min(same, first_row) // CHUNK * CHUNK :]
        return cache

    def feed(self, cache: Cache, ids: Sequence[int]) -> FloatArray:
        """Append ``ids`` to the cache of a response that is being written; logits of the next token, shape (V,).

        Their last bits differ from those of `logprobs`, since the products have other shapes.
        """
        hidden = np.empty((0, self.config.width), np.float32)
        with one_blas_thread():
            for start in range(0, len(ids), CHUNK):
                piece = ids[start : start + CHUNK]
                hidden = self._advance(cache, piece, len(piece))
            return self._logits(hidden[-1:])[0]

    def _advance(self, cache: Cache, ids: Sequence[int], n_rows: int) -> FloatArray:
        """Append ``ids`` to the cache; output of the last layer, shape (n_rows, width), no meaning beyond the ids."""
        start = len(cache.ids)
        cache.reserve(start + n_rows)
        x = np.zeros((n_rows, self.config.width), np.float32)
        x[: len(ids)] = self.embedding[list(ids)]
        angles = np.arange(start, start + n_rows)[:, None] * self._frequencies
        turn = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        for index, layer in enumerate(self.layers):
            x += self._attention(index, layer, rms_norm(x, layer.attn_norm, self.config.norm_eps), turn, cache, start)
            h = rms_norm(x, layer.ffn_norm, self.config.norm_eps)
            x += layer.down(silu(layer.gate(h)) * layer.up(h))
        cache.ids.extend(ids)
        return x

    def _logits(self, hidden: FloatArray) -> FloatArray:
        """Unnormalised log-probabilities, shape (n, V)."""
        return rms_norm(hidden, self.output_norm, self.config.norm_eps) @ self.output.T

    def _attention(
        self, index: int, layer: Layer, h: FloatArray, turn: tuple[FloatArray, FloatArray], cache: Cache, start: int
    ) -> FloatArray:
        config, n = self.config, len(h)
        q = rotate(layer.q(h).reshape(n, config.n_heads, config.head_dim), turn)
        k = rotate(layer.k(h).reshape(n, config.n_kv_heads, config.head_dim), turn)
        v = layer.v(h).reshape(n, config.n_kv_heads, config.head_dim)
        keys, values = cache.store(index, start, k.transpose(1, 0, 2), v.transpose(1, 0, 2))
        q *= np.float32(config.head_dim**-0.5)
        # Query heads that share a key head stand together: one product for each key head.
        weights = q.transpose(1, 0, 2).reshape(config.n_kv_heads, -1, config.head_dim) @ keys.transpose(0, 2, 1)
        by_head = weights.reshape(config.n_heads, n, start + n)
        by_head[:, :, start:][:, np.triu(np.ones((n, n), np.bool_), 1)] = -np.inf
        softmax(by_head)
        mixed = np.matmul(weights, values, dtype=np.float32).reshape(config.n_heads, n, config.head_dim)
        return layer.attn_output(mixed.transpose(1, 0, 2).reshape(n, -1))


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
    return (shifted - log_total).astype(np.float32)


@functools.cache
def _blas_controller() -> Any:
    import threadpoolctl  # pyright: ignore[reportMissingTypeStubs]

    controller: Any = threadpoolctl.ThreadpoolController()
    return controller.select(user_api="blas")


@contextmanager
def one_blas_thread() -> Generator[None, None, None]:
    """BLAS on one thread inside: how it divides a product among threads changes the rounding.

    Raises
    ------
    RuntimeError
        If BLAS does not obey.
    """
    controller = _blas_controller()
    for library in controller.lib_controllers:
        # The setting is the process's. Newer versions let only the thread that came first change it, and ignore any
        # other without a word; as long as the engine computes, it is the one that must have its way.
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)
    with controller.limit(limits=1):
        refusing = [library.filepath for library in controller.lib_controllers if library.num_threads != 1]
        if refusing:
            raise RuntimeError(f"{refusing[0]} cannot be set to one thread; start with OPENBLAS_NUM_THREADS=1.")
        yield
