"""Which processes work on the tasks of a run."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from backends.errors import MissingDependencyError
from backends.extras import install_extra

_PACKAGES = {"threads": (), "dask": ("prefect_dask", "distributed"), "ray": ("prefect_ray", "ray")}
_MOST_LOCAL_WORKERS = 4  # each is a process of some 300 MB


class TaskRunnerConfig(BaseModel):
    """Which processes work on the tasks of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["threads", "dask", "ray"] = Field(
        default="threads", description="threads of one process, or a dask or ray cluster."
    )
    address: str | None = Field(
        default=None,
        min_length=1,
        description="Address of an existing cluster: tcp://HOST:8786 (dask), ray://HOST:10001 or auto (ray). Default: "
        "processes on this machine, for the run.",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Worker processes to start, 1 to 1000; with an address, how many the limits on calls and jobs are "
        "divided among if that is more than are connected. Default: one per processor, at most 4.",
    )
    threads_per_worker: int | None = Field(
        default=None, ge=1, le=1000, description="Tasks that a dask worker works on at once, 1 to 1000. Default: 4."
    )

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _no_idle_setting(self) -> TaskRunnerConfig:
        if self.kind == "threads" and (self.address, self.workers, self.threads_per_worker) != (None, None, None):
            raise ValueError("kind threads has no address and no size; set kind to dask or ray, or leave these out")
        if self.threads_per_worker is not None and (self.kind == "ray" or self.address is not None):
            raise ValueError("threads_per_worker is for dask workers that the run starts; leave it out here")
        return self

    def check_installed(self) -> None:
        """Refuse a cluster whose packages are not there; they are not imported.

        Raises
        ------
        MissingDependencyError
            With what to install.
        """
        missing = [repr(name) for name in _PACKAGES[self.kind] if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(
                f"task_runner {self.kind} needs {', '.join(missing)}: {install_extra(self.kind)}"
            )

    @property
    def local_workers(self) -> int:
        """How many processes a cluster of this machine has."""
        return self.workers or min(os.cpu_count() or 1, _MOST_LOCAL_WORKERS)
