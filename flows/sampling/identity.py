"""Who writes: the responses of one model in one folder come from one server, or one set of weights."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from backends.base import Backend
from backends.errors import ConfigError
from flows.sampling.files import SAMPLED_BY
from flows.sampling.plan import SamplePlan, digest

logger = logging.getLogger("flows.sample")


async def check_identities(plan: SamplePlan, backend: Backend) -> None:
    """Find out who answers; what is on record of it, and in the heads of files, must agree.

    Raises
    ------
    ConfigError
        If what is unfinished was begun by another.
    ModelNotUsableError
        If it cannot be found out.
    """
    before = plan.state.identities()
    now = {model: await _identity(plan, backend, model) for model in {item.model: None for item in plan.requests}}
    for model, identity in now.items():
        known = before.get(model, identity)
        changed = sorted(name for name in known.keys() | identity.keys() if known.get(name) != identity.get(name))
        if changed:
            raise _other(plan, model, f"changed: {', '.join(changed)}")
        stated = digest(identity)
        others = [item for item in plan.targets if item.model == model and item.head.get(SAMPLED_BY, stated) != stated]
        for target in others:
            if target.missing:
                raise _other(plan, model, f"{target.path.name} states another")
        if others:
            logger.warning(
                "%s: %d files that are there come from another server or other weights (%s)",
                model, len(others), others[0].path.name,
            )  # fmt: skip
    plan.state.keep_identities(before | now)
    plan.state_identities({model: digest(identity) for model, identity in now.items()})


async def _identity(plan: SamplePlan, backend: Backend, model: str) -> dict[str, Any]:
    options = await backend.discover(model) if backend.capabilities.discovers else plan.options
    found = await asyncio.to_thread(backend.sampling_identity, options, model, plan.config.sampling.settings)
    return json.loads(json.dumps(found))


def _other(plan: SamplePlan, model: str, how: str) -> ConfigError:
    return ConfigError(
        f"{model}: the responses in {plan.config.output_dir} were begun with another server or other weights ({how}). "
        "Go on with that one, or choose another output_dir."
    )
