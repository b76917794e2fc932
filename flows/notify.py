"""What an event about the models sets off: ``drift-alert``, a flow that the triggers in ``prefect.yaml`` start."""

from __future__ import annotations

if __name__ == "__main__":
    # Prefect reads its settings when it is imported, so that the program prepares them before it loads this module.
    from importlib import import_module

    from flows.commands.notify import main

    raise SystemExit(main(lambda: import_module("flows.notify").drift_alert))

import re
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.states import Completed, State

from flows.watch.markdown import escaped, one_line

_LONGEST_VALUE = 500


@flow(name="drift-alert")
def drift_alert(event: str, payload: dict[str, Any]) -> State[None]:
    """Say what an event reports, in the log, the final state and an artifact: its figures, and where the results are.

    Parameters
    ----------
    event
        Name of the event, such as tokenkl.drift.detected.
    payload
        What the event carries: figures, models, folders.
    """
    rows = [(name, one_line(str(value), _LONGEST_VALUE)) for name, value in payload.items()]
    line = f"{event}: {', '.join(f'{name} = {text}' for name, text in rows)}"
    get_run_logger().warning("%s", line)
    table = "\n".join(f"| {name} | {escaped(text)} |" for name, text in rows)
    create_markdown_artifact(
        f"# {event}\n\n| | |\n|---|---|\n{table}\n", key=re.sub(r"[^a-z0-9]+", "-", event.lower()), description=event
    )
    return Completed(message=line)
