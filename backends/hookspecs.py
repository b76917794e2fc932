"""The hook through which backends are found. Third parties use the entry-point group ``tokenkl.backends``."""

from collections.abc import Callable

import pluggy

PROJECT = "tokenkl"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_backends(register: Callable[[str, str], None]) -> None:
    """Announce backends: ``register("local", "backends.local.backend:LocalBackend")``.

    Called on every start. Import nothing heavy here; the target is imported when a run names it.
    """
