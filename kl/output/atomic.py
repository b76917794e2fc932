"""Writes files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from kl.output.room import named_when_refused

_SETTLING = 16  # files at once; a journal commits them together
_strict = partial(json.JSONEncoder, ensure_ascii=False, allow_nan=False)
_COMPACT = _strict(separators=(",", ":"))


def write_json_atomic(path: Path, payload: Any) -> None:
    """Write ``payload`` as strict JSON, indented for people.

    Raises
    ------
    ValueError
        If a number in it is NaN or infinite.
    TypeError
        If it holds something that JSON has no form for.
    """
    data = json_bytes(payload, indent=2) + b"\n"
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def json_bytes(payload: Any, *, indent: int | None = None) -> bytes:
    """Strict JSON in UTF-8, without spaces unless it is indented; raises as `write_json_atomic`."""
    text = (_COMPACT if indent is None else _strict(indent=indent)).encode(payload)
    # Half of a surrogate pair has no UTF-8 form; this writes it as \\udXXX, which is what JSON calls it.
    return text.encode("utf-8", errors="backslashreplace")


def write_atomic(target: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` fill a file of a temporary name beside ``target``; sync it and rename it to ``target``."""
    _settle(_written(target, write), target)


def write_many_atomic(files: Iterable[tuple[Path, Callable[[Path], Any]]]) -> Iterator[Path]:
    """`write_atomic` for each target and writer of ``files``, in this thread and in their order.

    Gives each target when it is there. A disk needs milliseconds to be sure of a file: it is asked for several at once,
    while the next ones are written.
    """
    ahead: deque[tuple[Path, Future[None]]] = deque()
    with ThreadPoolExecutor(_SETTLING) as pool:
        for target, write in files:
            ahead.append((target, pool.submit(_settle, _written(target, write), target)))
            if len(ahead) > _SETTLING:
                yield _settled(*ahead.popleft())
        while ahead:
            yield _settled(*ahead.popleft())


def _settled(target: Path, settling: Future[None]) -> Path:
    settling.result()
    return target


def _written(target: Path, write: Callable[[Path], Any]) -> Path:
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with named_when_refused(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _settle(temporary: Path, target: Path) -> None:
    try:
        with named_when_refused(target):
            _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory; it syncs the entry with the file
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
