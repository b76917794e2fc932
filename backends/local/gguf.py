"""GGUF files: header, tensors as float32, content hash.

The header is parsed here and not by `gguf.GGUFReader`, which takes seconds for a vocabulary of 50,000 entries. Only the
dequantisation is that package's, and it is imported when the first tensor is read.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.errors import MissingDependencyError, ModelNotUsableError
from backends.extras import install_extra

FloatArray = NDArray[np.float32]

BACKEND = "local"
PACKAGES = ("gguf", "tokenizers", "jinja2", "threadpoolctl")

GROUP = 32  # weights that share one scale when rounded
_PIECE = 1 << 18  # weights dequantised at a time: small enough for the cache, large enough to hide Python
_ROWS = 16  # gguf works through its input in groups of this many rows
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def find_packages() -> None:
    """Look for the optional packages, without importing them.

    Raises
    ------
    MissingDependencyError
        That names those that are missing and the command that installs them.
    """
    missing = [repr(name) for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"the local backend needs {', '.join(missing)}: {install_extra('local')}")


def require_packages() -> None:
    """Import the optional packages.

    Raises
    ------
    MissingDependencyError
        That names the missing one and the command that installs it.
    """
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingDependencyError(
                f"the local backend needs the package {name!r} ({error}): {install_extra('local')}"
            ) from error


def unusable(path: Path, what: str) -> ModelNotUsableError:
    """The error for a model file that cannot be used, in one line."""
    return ModelNotUsableError(f"{path}: {what}", backend=BACKEND, model=str(path))


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: ``shape`` rows first, ``type_id`` of ggml, ``offset`` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


class _Cursor:
    """Reads little-endian values one after the other, never beyond the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> int:
        start, self.at = self.at, self.at + size
        if size < 0 or self.at > len(self.data):
            raise EOFError(f"{size} bytes wanted at byte {start} of {len(self.data)}")
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        size = self.scalar("Q")
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8")

    def value(self, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self.text()
        if type_id == _ARRAY:
            return self.array()
        raise ValueError(f"unknown metadata type {type_id}")

    def array(self) -> list[Any]:
        type_id, length = self.scalar("I"), self.scalar("Q")
        if type_id in _SCALARS:
            dtype = np.dtype(_SCALARS[type_id]).newbyteorder("<")
            start = self.take(length * dtype.itemsize)
            return np.frombuffer(self.data, dtype, length, start).tolist()
        self.take(length)  # every entry has at least a byte: a damaged length fails here and not after minutes
        self.at -= length
        return self.texts(length) if type_id == _STRING else [self.value(type_id) for _ in range(length)]

    def texts(self, length: int) -> list[str]:
        """As so many of `text`, quickly: vocabularies have tens of thousands."""
        found: list[str] = []
        data, size_at = self.data, struct.Struct("<Q").unpack_from
        for _ in range(length):
            start = self.at + 8
            self.take(8 + size_at(data, self.at)[0])
            found.append(data[start : self.at].decode("utf-8"))
        return found


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A model file whose header was read."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def need(self, key: str) -> Any:
        """A metadata value that must be there.

        Raises
        ------
        ModelNotUsableError
            If it is not.
        """
        if key not in self.metadata:
            raise unusable(
                self.path, f"the metadata key {key!r} is missing; convert the model again with a current converter."
            )
        return self.metadata[key]

    def load(self, name: str, bits: int | None = None) -> FloatArray:
        """The tensor as float32, rounded to ``bits`` if given."""
        info = self.tensors[name]
        values = _dequantize(np.memmap(self.path, np.uint8, "r"), info)
        if bits is not None:
            round_in_groups(values, bits)
        return values.reshape(info.shape)

    def check_tensors(self, bits: int | None) -> None:
        """Prove that every tensor has a type that can be read, lies inside the file, and can be rounded.

        Raises
        ------
        ModelNotUsableError
            That names the tensor.
        """
        size = self.path.stat().st_size
        for info in self.tensors.values():
            block, block_bytes = _readable(self.path, info)
            end = info.offset + info.size // block * block_bytes
            if end > size:
                raise unusable(
                    self.path,
                    f"tensor {info.name!r} ends at byte {end}, the file at {size}: it is cut; fetch it again.",
                )
            if bits is not None and len(info.shape) == 2 and info.shape[-1] % GROUP:
                raise unusable(
                    self.path,
                    f"tensor {info.name!r} has rows of {info.shape[-1]}, which groups of {GROUP} do not divide; "
                    f"use the model without @int{bits}.",
                )


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file.

    Raises
    ------
    ModelNotUsableError
        If the file is no GGUF file of version 2 or 3, or is damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] != b"GGUF":
                raise unusable(path, f"not a GGUF file (it begins with {start[:4]!r}, a GGUF file with b'GGUF').")
            version = int.from_bytes(start[4:], "little")
            if version not in (2, 3):
                raise unusable(
                    path,
                    f"GGUF version {version} (or big-endian) is not supported; versions 2 and 3, little-endian, are.",
                )
            return _parse(path, _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as error:
        raise unusable(path, f"cannot be read: {error.strerror or error}.") from error
    except (EOFError, ValueError, struct.error) as error:
        raise unusable(path, f"the GGUF header is damaged ({error}); fetch the file again.") from error


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    cursor.take(8)
    n_tensors, n_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar("I"))
    found = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.at // alignment) * alignment
    placed = {info.name: TensorInfo(info.name, info.shape, info.type_id, base + info.offset) for info in found}
    return GGUFFile(path, metadata, placed)


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.text()
    fastest_first = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
    return TensorInfo(name, tuple(reversed(fastest_first)), cursor.scalar("I"), cursor.scalar("Q"))


def _readable(path: Path, info: TensorInfo) -> tuple[int, int]:
    """(weights, bytes) of one block. A block of zeros is tried, because gguf knows types that it cannot read."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(info.type_id)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise unusable(
            path, f"tensor {info.name!r} has a type that cannot be read ({error}); use F32, F16, BF16 or a Q type."
        ) from error
    return block, block_bytes


def _dequantize(data: NDArray[np.uint8], info: TensorInfo) -> FloatArray:
    import gguf

    kind = gguf.GGMLQuantizationType(info.type_id)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    n_blocks = info.size // block
    raw = data[info.offset : info.offset + n_blocks * block_bytes]
    values = np.empty(info.size, np.float32)
    step = _PIECE // block
    for first in range(0, n_blocks, step):
        count = min(step, n_blocks - first)
        piece = np.asarray(raw[first * block_bytes : (first + count) * block_bytes])
        # The blocks are independent, so the rows may be cut anew: a few long ones are faster than many short ones.
        rows = piece.reshape(_ROWS if count % _ROWS == 0 else 1, -1)
        values[first * block : (first + count) * block] = gguf.quants.dequantize(rows, kind).reshape(-1)
    return values


def round_in_groups(values: FloatArray, bits: int) -> None:
    """Round in place to ``bits``, in groups of 32 with one scale each: 8 bits as ggml's Q8_0, fewer by Q4_0's rule.

    Q8_0 is symmetric: the largest magnitude becomes 127. With Q4_0 the weight of largest magnitude, with its sign,
    becomes the lowest of 2**bits levels, so that all of them are used; one of the other sign and nearly that magnitude
    is cut. The scales stay float32, where a file keeps float16.
    Source: ``quantize_row_q8_0_ref`` and ``quantize_row_q4_0_ref`` in
    https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c

    Parameters
    ----------
    values : float32, shape (n,)
        With n a multiple of 32.
    bits : int
        2 to 8; the levels are -127 .. 127 for 8, else -2**(bits-1) .. 2**(bits-1) - 1.
    """
    groups = values.reshape(-1, GROUP)
    for first in range(0, len(groups), _PIECE // GROUP):
        piece = groups[first : first + _PIECE // GROUP]
        if bits == 8:
            _round_symmetric(piece, np.float32(127))
        else:
            _round_signed(piece, np.float32(2 ** (bits - 1)))


def _round_symmetric(groups: FloatArray, highest: np.float32) -> None:
    scale = np.abs(groups).max(axis=1, keepdims=True) / highest
    scale[scale == 0] = 1
    np.divide(groups, scale, out=groups)
    np.rint(groups, out=groups)
    np.multiply(groups, scale, out=groups)


def _round_signed(groups: FloatArray, lowest: np.float32) -> None:
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    scale = largest / -lowest
    scale[scale == 0] = 1
    np.divide(groups, scale, out=groups)
    np.floor(groups + np.float32(0.5), out=groups)  # a half goes up, as in ggml
    np.minimum(groups, lowest - 1, out=groups)
    np.multiply(groups, scale, out=groups)


def content_hash(path: Path) -> str:
    """SHA-256 of the file in hexadecimal digits; computed again only when its size or time of change differs."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
