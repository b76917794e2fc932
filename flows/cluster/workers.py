"""What the workers of a cluster must have, proven before anything is bought."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from backends.errors import ConfigError
from backends.storage import exists, is_remote
from flows.cluster.runners import Cluster

# Of other versions, numbers may differ in their last bits and what is sent between processes may not be readable.
_SAME_VERSIONS = ("tokenkl", "prefect", "numpy", "scipy", "polars")
_SERVER_S = 20.0


def installed_versions() -> dict[str, str]:
    """What must be the same everywhere."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in _SAME_VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from its sources
            versions[package] = "not installed"
    return versions


@dataclass(frozen=True, slots=True)
class Needs:
    """What a worker must see: an input file and a folder of the output, as absolute locations."""

    input_file: Path
    output_dir: Path
    versions: dict[str, str] = field(default_factory=installed_versions)


def check_workers(cluster: Cluster, kind: str, needs: Needs) -> None:
    """Prove that every worker has the program, sees the folders and reaches the Prefect server.

    Raises
    ------
    ConfigError
        With what a worker lacks.
    """
    for error in cluster.everywhere(check_worker, needs, cluster.api_url):
        if isinstance(error, ConfigError):
            raise error
        if isinstance(error, Exception):
            line = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConfigError(
                f"a worker of the {kind} cluster could not begin: {line}. Install tokenkl with the same extras on all "
                "workers."
            ) from error


def check_worker(needs: Needs, api_url: str) -> None:
    """Prove that this process can work for a run.

    Raises
    ------
    ConfigError
        With what differs here.
    """
    host = socket.gethostname()
    mine = installed_versions()
    others = [
        f"{name} {mine[name]} (the flow: {theirs})" for name, theirs in needs.versions.items() if mine[name] != theirs
    ]
    if others:
        raise ConfigError(f"the worker on {host} has other versions: {', '.join(others)}. Install the same everywhere.")
    for what, path in (("input file", needs.input_file), ("output folder", needs.output_dir)):
        if not (exists(path) if is_remote(path) else path.exists()):
            raise ConfigError(
                f"the worker on {host} does not see the run's {what} {path}. Use folders that all workers share: a "
                "gs:// address, or a disk that is mounted at the same place everywhere."
            )
    _check_server(host, api_url)


def _check_server(host: str, api_url: str) -> None:
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=_SERVER_S):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # Prefect may know a certificate that this process does not
        raise ConfigError(
            f"the worker on {host} does not reach the Prefect server at {api_url} ({reason}). Start one that all "
            "machines reach (prefect server start --host 0.0.0.0) and set PREFECT_API_URL to its address."
        ) from error
