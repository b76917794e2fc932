"""The folder that a program writes to, proven before any work is done."""

from __future__ import annotations

import uuid
from pathlib import Path

from backends.errors import ConfigError


def prepare_output(folder: Path, *, inside: str | None = None) -> None:
    """Make the folder, and one ``inside`` it, and prove that files can be written there.

    Raises
    ------
    ConfigError
        If something else has that name, or the folder cannot be made or written to.
    """
    target = folder if inside is None else folder / inside
    probe = target / f".{uuid.uuid4().hex}.tmp"
    try:
        target.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "a file has that name" if isinstance(error, FileExistsError) else error.strerror or str(error)
        raise ConfigError(f"--output-dir: {target} cannot be written to: {reason}. Choose another folder.") from error
