"""The folder that a program writes to: proven before any work is done, filled from a local one if it is remote."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backends.errors import ConfigError
from backends.storage import PARALLEL, in_order, is_remote, publish, remove, scratch_folder, write_bytes_atomic
from kl.output.atomic import write_json_atomic


def prepare_output(folder: Path, *, inside: str | None = None, flag: str = "--output-dir") -> None:
    """Make the folder that ``flag`` names, and one ``inside`` it, and prove that files can be written there.

    Raises
    ------
    ConfigError
        If something else has that name, or the folder cannot be made or written to.
    """
    target = folder if inside is None else folder / inside
    probe = target / f".{uuid.uuid4().hex}.tmp"
    try:
        if is_remote(target):
            write_bytes_atomic(probe, b"")
            remove(probe)
            return
        target.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error
    except OSError as error:
        reason = "a file has that name" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise ConfigError(f"{flag}: {target} cannot be written to: {reason}. Choose another folder.") from error


@contextmanager
def made_locally(folder: Path) -> Generator[Path]:
    """Where the files of an output folder are made: in it, or in a scratch folder from which they are published."""
    if is_remote(folder):
        with scratch_folder() as scratch:
            yield scratch
    else:
        yield folder


def publish_from(made_in: Path, folder: Path, names: Iterable[str]) -> None:
    """Bring finished files of `made_locally` to their places, several at a time while ``names`` goes on to make them.

    Raises
    ------
    ConfigError, OSError
        If the storage refuses or does not answer.
    """
    if made_in == folder:
        for _ in names:
            pass
        return
    with ThreadPoolExecutor(PARALLEL) as pool:
        for _ in in_order(pool, lambda _, name: publish(made_in / name, folder / name), names):
            pass


def write_json(path: Path, payload: Any) -> None:
    """Write a strict JSON file, local or remote, whole or not at all."""
    with made_locally(path.parent) as folder:
        write_json_atomic(folder / path.name, payload)
        publish_from(folder, path.parent, [path.name])
