"""What a process elsewhere is told of a run: nothing that depends on its own folder, environment or installation."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path

from backends.errors import ConfigError
from backends.storage.files import exists, is_remote
from flows.config.models import BackendChoice, RunConfig, resolve_backend
from flows.stages.inputs import InputFile

# Settings of the run that a backend may know under the same name: both say the same.
_SHARED = ("project_id", "location", "bucket_name", "max_concurrent", "keep_raw")
# Limits on what a service sees at once; a backend counts in its own process only.
_LIMITS = ("max_concurrent", "max_jobs_in_flight")
# Of other versions, numbers may differ in their last bits and what is sent between processes may not be readable.
_SAME_VERSIONS = ("tokenkl", "prefect", "numpy", "scipy", "polars")


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a task elsewhere needs in order to ask for a run.

    ``config`` is complete: folders are absolute, and the backend's options are those of one process, with nothing left
    to the environment. ``flow_run_id`` is what the backend records with remote jobs; ``sample`` an input file and its
    size, to be seen by every worker.
    """

    run_id: str
    flow_run_id: str | None
    config: RunConfig
    sample: tuple[InputFile, int]
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())


def absolute(path: Path) -> Path:
    """A location that means the same in every working directory."""
    return path if is_remote(path) else path.absolute()


def absolute_file(file: InputFile) -> InputFile:
    """An input file that can be read from every working directory."""
    return replace(file, path=absolute(file.path))


def size_of(file: InputFile) -> int:
    """How many bytes an input file has; -1 if it cannot be seen."""
    if file.stored is not None:
        return file.stored.size if exists(file.path) else -1
    try:
        return file.path.stat().st_size
    except OSError:
        return -1


def worker_config(config: RunConfig, n_processes: int) -> RunConfig:
    """The configuration of one of ``n_processes`` that share the limits on the service."""
    _, options, _ = resolve_backend(config)
    values = {name: getattr(options, name) for name in type(options).model_fields}
    values |= {name: max(1, limit // n_processes) for name, limit in _limits(values).items()}
    known = {name: values[name] for name in _SHARED if values.get(name) is not None}
    folders = {name: absolute(getattr(config, name)) for name in ("input_dir", "output_dir")}
    backend = BackendChoice(**{"name": config.backend.name, **values})
    return config.model_copy(update={**known, **folders, "backend": backend})


def smallest_limit(config: RunConfig) -> int | None:
    """The smallest limit on what a service sees at once; None if the backend has none."""
    _, options, _ = resolve_backend(config)
    limits = _limits({name: getattr(options, name) for name in type(options).model_fields})
    return min(limits.values(), default=None)


def _limits(values: dict[str, object]) -> dict[str, int]:
    found = {name: values.get(name) for name in _LIMITS}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def installed_versions() -> dict[str, str]:
    """What must be the same everywhere."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in _SAME_VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from its sources
            versions[package] = "not installed"
    return versions


def check_installation(ticket: Ticket) -> None:
    """Prove that this process has the flow's programs and sees its input.

    Raises
    ------
    ConfigError
        With what differs.
    """
    host = socket.gethostname()
    mine = installed_versions()
    others = [
        f"{name} {mine[name]} (the flow: {theirs})" for name, theirs in ticket.versions.items() if mine[name] != theirs
    ]
    if others:
        raise ConfigError(f"the worker on {host} has other versions: {', '.join(others)}. Install the same everywhere.")
    file, size = ticket.sample
    seen = size_of(file)
    if seen != size:
        found = "does not see it" if seen < 0 else f"sees {seen} bytes"
        raise ConfigError(
            f"the input file {file.path} has {size} bytes, but the worker on {host} {found}. Use folders that all "
            "workers share: a gs:// address, or a disk that is mounted at the same place everywhere."
        )
