"""Writes files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json_atomic(path: Path, payload: Any, *, indent: int | None = 2) -> None:
    """Write ``payload`` as strict JSON.

    Raises
    ------
    ValueError
        If a number in it is NaN or infinite.
    TypeError
        If it holds something that JSON has no form for.
    """
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, indent=indent)
    # Half of a surrogate pair has no UTF-8 form; this writes it as \\udXXX, which is what JSON calls it.
    data = text.encode("utf-8", errors="backslashreplace") + b"\n"
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def write_atomic(target: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` fill a file of a temporary name beside ``target``; sync it and rename it to ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
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
