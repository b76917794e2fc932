"""What is damaged in a store, taken out of it and kept: named in a line each, in a folder that no reader looks into."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import polars as pl

from backends.scores.journal import BrokenLine
from backends.scores.parts import Part, packed
from backends.scores.rows import SCORES
from backends.storage import read_bytes, remove, write_bytes_atomic

logger = logging.getLogger(__name__)

SET_ASIDE = "set_aside"  # in a store
JOURNALS = "journals"  # in a store, and of what is set aside
_SHOWN, _KEY_SHOWN = 3, 12


def harm_of(part: Part) -> str:
    """What cannot be used of a part, as the end of a line."""
    if part.broken is not None:
        return f"holds no scores that can be read ({part.broken[:200]})"
    return _damaged_text(part.damaged)


def _damaged_text(damaged: pl.DataFrame) -> str:
    some = damaged.select("key", "why").head(_SHOWN).iter_rows()
    shown = "; ".join(f"{key[:_KEY_SHOWN] if key else 'one'}: {why}" for key, why in some)
    more = f"; and {damaged.height - _SHOWN} more" if damaged.height > _SHOWN else ""
    return f"has {damaged.height} damaged score{'s' * (damaged.height > 1)} ({shown}{more})"


def put_right(root: Path, prompt_id: str, path: Path) -> Part | None:
    """Take out of a part what cannot be used, and keep it.

    Nobody else may be changing the store. Gives the part if nothing is wrong with it, None if another, or none, is in
    its place now. A kill in between leaves some rows twice, which is no harm.
    """
    try:
        content = read_bytes(path)  # anew: what was read before may have been damaged on its way
    except FileNotFoundError:
        return None  # another run was quicker
    part = Part(path.name, content)
    if not part.is_harmed:
        return part
    if part.broken is not None:
        kept = _keep_file(root / SET_ASIDE / prompt_id / path.name, content)
    else:
        kept = keep_rows(root, prompt_id, part.damaged)
        sound = part.rows(SCORES.names())
        if not sound.is_empty():
            name, content = packed(sound)
            write_bytes_atomic(path.with_name(name), content)
    remove(path)
    logger.warning("%s %s: set aside in %s, and asked again", path, harm_of(part), kept)
    return None


def keep_rows(root: Path, prompt_id: str, damaged: pl.DataFrame) -> Path:
    """Keep damaged rows, which have ``why``; gives where."""
    name, content = packed(damaged.drop("why"))
    target = root / SET_ASIDE / prompt_id / name
    write_bytes_atomic(target, content)
    return target


def keep_journaled(root: Path, prompt_id: str, damaged: pl.DataFrame) -> None:
    """Keep damaged rows of journals that are taken in."""
    kept = keep_rows(root, prompt_id, damaged)
    logger.warning("a journal in %s %s: set aside in %s, and asked again", root, _damaged_text(damaged), kept)


def keep_lines(root: Path, broken: Iterable[BrokenLine]) -> None:
    """Keep lines of journals that are no rows."""
    for path, group in groupby(broken, attrgetter("path")):
        lines = list(group)
        kept = _keep_file(root / SET_ASIDE / JOURNALS / path.name, b"".join(item.line for item in lines))
        logger.warning(
            "%s: %d lines are no scores (%s); set aside in %s, and asked again",
            path, len(lines), " ".join(lines[0].why.split())[:200], kept,
        )  # fmt: skip


def _keep_file(target: Path, content: bytes) -> Path:
    """Under a name that only the same content has, so that doing it again changes nothing."""
    target = target.with_name(f"{target.stem}.{zlib.crc32(content):08x}{target.suffix}")
    write_bytes_atomic(target, content)
    return target
