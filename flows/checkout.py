"""Where a deployed run works: the pull step of ``prefect.yaml``."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from backends.errors import ConfigError

_VARIABLE = "TOKENKL_HOME"


def enter_checkout(directory: str) -> dict[str, str]:
    """Go to the folder of ``prefect.yaml``: ``TOKENKL_HOME`` of the worker, else the one that was deployed from.

    Raises
    ------
    ConfigError
        If it is not there; the run's log says so too, where Prefect would only say that a process ended.
    """
    home = os.environ.get(_VARIABLE) or directory
    if not Path(home, "prefect.yaml").is_file():
        origin = f"{_VARIABLE} of the worker" if os.environ.get(_VARIABLE) else "the folder that was deployed from"
        message = (
            f"{home} ({origin}) has no prefect.yaml on this worker's machine. Start the worker with {_VARIABLE} set to "
            "its checkout, or to a folder of `tokenkl init`, or deploy from a folder that the worker has too."
        )
        run_id = os.environ.get("PREFECT__FLOW_RUN_ID")
        if run_id is not None:
            run = {"flow_run_id": run_id, "flow_run_name": run_id, "flow_name": ""}
            logging.getLogger("prefect.flow_runs").error("%s", message, extra=run)
        raise ConfigError(message)
    os.chdir(home)
    return {"directory": home}
