"""The llama architecture in numpy: one pass gives the log-probabilities of every position of many contexts.

A score is kept under the hash of its context, so it must not depend on what follows the context, on which positions or
which other contexts are computed with it, or on how many threads there are. BLAS rounds differently for different
shapes and numbers of threads. Therefore a context is worked through in chunks of `CHUNK` rows, counted from its start
and filled up with zeros. The chunks of a batch go through each matrix together, as blocks of rows of one product, whose
every block has the bits of a product of its own (`_keeps_blocks` proves it for the BLAS at hand, or they go one by
one); attention is computed chunk by chunk. Each product runs on one BLAS thread; the engine's own threads divide the
chunks. So every figure follows from its context alone, and equal contexts give equal bits. Bits may still differ
between kinds of processors, for which BLAS has different code.

Keys and values are kept by chunk under the ids that lead there: contexts that begin alike share them.

Sources: Touvron et al., *LLaMA*, arXiv 2302.13971; Su et al., *RoFormer*, arXiv 2104.09864; Ainslie et al., *GQA*,
arXiv 2305.13245; Zhang & Sennrich, *RMSNorm*, arXiv 1910.07467.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np

from backends.local.config import LlamaConfig
from backends.local.gguf import FloatArray, GGUFFile

CHUNK = 48  # rows of a block; a multiple of the tile heights 12, 16 and 24 of common BLAS kernels
AT_ONCE = 8  # chunks that a thread takes through a layer together: weights are read once for all of them
ENGINE = "numpy-llama/1"  # to be raised when the numbers change: it is part of the key of every score
_KEPT_BYTES = 400_000_000  # keys and values of chunks that later contexts may begin with

T = TypeVar("T")
R = TypeVar("R")


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


class Chunk:
    """The rows of a context from ``start`` on, a multiple of `CHUNK`; ``end`` is before the next, or the context's."""

    __slots__ = ("end", "ids", "key", "start")

    def __init__(self, ids: Sequence[int], start: int) -> None:
        self.ids, self.start, self.end = ids, start, min(start + CHUNK, len(ids))
        self.key = np.asarray(ids[: self.end], dtype=np.int32).tobytes()

    def before(self) -> Iterator[Chunk]:
        """The chunks of the same context before it."""
        return (Chunk(self.ids, start) for start in range(0, self.start, CHUNK))


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
        self._kept: OrderedDict[bytes, FloatArray] = OrderedDict()
        self.at_once = AT_ONCE if _keeps_blocks(self) else 1

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
        starts = sorted({row // CHUNK * CHUNK for row in rows})
        for first in range(0, len(starts), AT_ONCE):
            chunks = [Chunk(ids, start) for start in starts[first : first + AT_ONCE]]
            for chunk, hidden in zip(chunks, self.hidden(chunks), strict=True):
                asked = [row for row in rows if chunk.start <= row < chunk.start + CHUNK]
                with one_blas_thread():
                    logits = self.logits(hidden)
                yield [(row, log_softmax(logits[row - chunk.start])) for row in asked]

    def hidden(self, chunks: Sequence[Chunk]) -> list[FloatArray]:
        """What the last layer gives for each chunk: shape (CHUNK, width), no meaning beyond the chunk's ids.

        What comes before a chunk is computed too, where it is not kept.
        """
        wanted = {chunk.key: chunk for chunk in chunks}
        todo = {key: chunk for chunk in chunks for key, chunk in self._lacking(chunk)} | wanted
        made: dict[bytes, FloatArray] = {}
        n_threads = blas_threads()
        with one_blas_thread():
            for group in _grouped(sorted(todo.values(), key=lambda chunk: chunk.start), self.at_once * n_threads):
                # A chunk's keys are looked up by all that go on from it, in this group too.
                for chunk in group:
                    self._kept[chunk.key] = np.zeros(
                        (self.config.n_layers, 2, self.config.n_kv_heads, CHUNK, self.config.head_dim), np.float32
                    )
                try:
                    found = self._through_layers(group, n_threads)
                except BaseException:
                    for chunk in group:
                        del self._kept[chunk.key]
                    raise
                made |= {key: rows for key, rows in found.items() if key in wanted}
        self._forget(chunks)
        return [made[chunk.key] for chunk in chunks]

    def _lacking(self, chunk: Chunk) -> Iterator[tuple[bytes, Chunk]]:
        """The chunks before one that are not kept."""
        for before in chunk.before():
            if before.key in self._kept:
                self._kept.move_to_end(before.key)
            else:
                yield before.key, before

    def _forget(self, used: Sequence[Chunk]) -> None:
        """Let go of chunks that are not full, as nothing goes on from them, and of the oldest over the limit."""
        for chunk in used:
            if chunk.end < chunk.start + CHUNK:
                self._kept.pop(chunk.key, None)
        n_bytes = sum(kept.nbytes for kept in self._kept.values())
        in_use = {before.key for chunk in used for before in chunk.before()}
        for key in [key for key in self._kept if key not in in_use]:
            if n_bytes <= _KEPT_BYTES:
                break
            n_bytes -= self._kept.pop(key).nbytes

    def _through_layers(self, chunks: Sequence[Chunk], n_threads: int) -> dict[bytes, FloatArray]:
        """All layers, the chunks divided among threads, which wait for each other where they need keys and values."""
        shares = shares_of(chunks, n_threads)
        ready = threading.Barrier(len(shares))

        def work(share: Sequence[Chunk]) -> list[FloatArray]:
            try:
                return self._share_through_layers(share, ready)
            except BaseException:
                ready.abort()
                raise

        found = [rows for of_share in in_threads(work, shares) for rows in of_share]
        return {chunk.key: rows for chunk, rows in zip(chunks, found, strict=True)}

    def _share_through_layers(self, chunks: Sequence[Chunk], ready: threading.Barrier) -> list[FloatArray]:
        x = np.zeros((len(chunks), CHUNK, self.config.width), np.float32)
        for block, chunk in zip(x, chunks, strict=True):
            block[: chunk.end - chunk.start] = self.embedding[list(chunk.ids[chunk.start : chunk.end])]
        positions = np.concatenate([np.arange(chunk.start, chunk.start + CHUNK) for chunk in chunks])
        own = [self._kept[chunk.key] for chunk in chunks]
        before = [[self._kept[earlier.key] for earlier in chunk.before()] for chunk in chunks]

        def attend(layer: int, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
            blocks = [slice(start, start + CHUNK) for start in range(0, len(q), CHUNK)]
            for kept, rows in zip(own, blocks, strict=True):
                kept[layer, 0] = k[rows].transpose(1, 0, 2)
                kept[layer, 1] = v[rows].transpose(1, 0, 2)
            ready.wait()
            mixed = np.empty((len(q), self.config.n_heads * self.config.head_dim), np.float32)
            for kept, earlier, rows in zip(own, before, blocks, strict=True):
                keys, values = np.concatenate([*(part[layer] for part in earlier), kept[layer]], axis=2)
                mixed[rows] = self._mixed(q[rows], keys, values)
            return mixed

        return list(self._layers(x.reshape(-1, self.config.width), positions, attend).reshape(x.shape))

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
            return self.logits(x[-1:])[0]

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

    def logits(self, hidden: FloatArray) -> FloatArray:
        """Unnormalised log-probabilities, shape (n, V)."""
        return rms_norm(hidden, self.output_norm, self.config.norm_eps) @ self.output.T

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


def _keeps_blocks(model: Llama) -> bool:
    """Whether each block of `CHUNK` rows of a product has the bits that it has alone, for every shape of the model."""
    layer = model.layers[0]
    weights = {linear.weight.shape: linear.weight for linear in layer if isinstance(linear, Linear)}
    weights[model.output.shape] = model.output
    with one_blas_thread():
        for (_, width), weight in weights.items():
            x = np.random.default_rng(width).standard_normal((3 * CHUNK, width), dtype=np.float32)
            if not np.array_equal(x[CHUNK : 2 * CHUNK] @ weight.T, (x @ weight.T)[CHUNK : 2 * CHUNK]):
                return False
    return True


def _grouped(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def shares_of(items: Sequence[T], n: int) -> list[Sequence[T]]:
    """At most ``n`` nearly equal parts, each of items in a row and none empty."""
    n = min(n, len(items))
    return [items[len(items) * part // n : len(items) * (part + 1) // n] for part in range(n)]


def in_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``work`` for each item, each in a thread of its own; of several errors, one that is no broken barrier."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(len(items)) as pool:
        found = [pool.submit(work, item) for item in items]
    errors = sorted(
        (error for future in found if (error := future.exception()) is not None),
        key=lambda error: isinstance(error, threading.BrokenBarrierError),
    )
    if errors:
        raise errors[0]
    return [future.result() for future in found]


def blas_threads() -> int:
    """How many threads BLAS would use: what the user, or the number of processors, allows."""
    return max((library.num_threads for library in _blas_controller().lib_controllers), default=1)


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
