"""Let model P write responses, with its top log-probabilities: ``sample-responses`` and ``python -m flows.sample``."""

from __future__ import annotations

if __name__ == "__main__":
    # Prefect reads its settings when it is imported, so that the program prepares them before it loads this module.
    from importlib import import_module

    from flows.commands.sample import main

    raise SystemExit(main(lambda: import_module("flows.sample").sample_responses))

import json
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed, State

from backends.base import Backend, BackendOptions, SampleRequest
from backends.errors import BackendError, ConfigError, TokenKLError
from backends.session import BackendSession
from backends.storage import as_location, files_in, local_copies
from flows.config.backend import resolve_backend
from flows.config.models import SampleConfig
from flows.config.templates import RunValues, fill
from flows.folder.output import prepare_output, write_json
from flows.runtime.logs import run_logging
from flows.runtime.terminal import ProgressReporter
from kl.input.writer import response_document
from kl.records import Prompt, Response, ScoreFailure, Turn

logger = logging.getLogger(__name__)

_ASKED = ("prompt", "system", "model", "sampling")


@task(cache_policy=NO_CACHE)
def sample(config: SampleConfig) -> list[str]:
    """Write one file per prompt; prompts whose file is there already are left alone."""
    backend, options, _ = resolve_backend(config)
    if not backend.capabilities.samples:
        raise ConfigError(f"the backend {config.backend.name} does not write responses; 'local' does.")
    if config.sampling.top_logprobs > backend.capabilities.max_top_logprobs:
        raise ConfigError(
            f"sampling.top_logprobs is {config.sampling.top_logprobs}, but the backend {config.backend.name} reports "
            f"at most {backend.capabilities.max_top_logprobs}."
        )
    prepare_output(config.output_dir)
    targets = [config.output_dir / f"{index:03d}_{_slug(text)}.json" for index, text in enumerate(config.prompts)]
    system = _system(config, options)
    there = set(files_in(config.output_dir, ".json"))
    missing = [index for index, path in enumerate(targets) if path not in there]
    _check_same(targets, there, config, system)
    if missing:
        with BackendSession(backend(options, state_dir=config.output_dir)) as session:
            session.run(session.backend.preflight(config.model1))
            with ProgressReporter("prompts sampled", len(missing)) as progress:
                for index in missing:
                    document = session.run(_write_responses(session.backend, config, index))
                    write_json(targets[index], document)
                    progress.advance(1)
    return [str(path) for path in targets]


async def _write_responses(backend: Backend, config: SampleConfig, index: int) -> dict[str, Any]:
    prompt = Prompt((Turn("user", config.prompts[index]),), _system(config, backend.options))
    requests = [
        SampleRequest(f"{index}/{i}", f"{index:03d}#{i}", config.model1, prompt, config.sampling, i)
        for i in range(config.num_responses)
    ]
    found: dict[str, Response] = {}
    async for result in backend.sample(requests):
        if isinstance(result, ScoreFailure):
            raise BackendError(f"prompt {index}: {result.message}")
        found[result.key] = result.response
    return response_document(prompt, config.model1, _sampling(config), [found[item.key] for item in requests])


def _system(config: SampleConfig, options: BackendOptions) -> str | None:
    return config.system if options.system is None else options.system


def _sampling(config: SampleConfig) -> dict[str, Any]:
    # 0 is off: said, because a top-k that is not stated could have been any.
    return config.sampling.model_dump() | {"top_k": 0}


def _check_same(targets: Sequence[Path], there: Collection[Path], config: SampleConfig, system: str | None) -> None:
    """Refuse files of other responses under the names of these."""
    prompts = dict(zip(targets, config.prompts, strict=True))
    for path, copy in local_copies([path for path in targets if path in there]):
        try:
            document: Any = json.loads(copy.read_text(encoding="utf-8"))
            found = (*(document.get(name) for name in _ASKED), len(document["responses"]))
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no file of responses ({error}). Choose another output_dir, or move it."
            ) from error
        asked = (prompts[path], system, config.model1, _sampling(config), config.num_responses)
        if asked != found:
            raise ConfigError(
                f"{path} holds responses that were sampled otherwise. Choose another output_dir, or move it."
            )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "prompt"


@flow(name="sample-responses")
def sample_responses(config: SampleConfig) -> list[str] | State[list[str]]:
    """Write P's responses with their log-probabilities; returns the paths of the files."""
    try:
        folder = as_location(fill(str(config.output_dir), RunValues.of_this_run()))
        with run_logging():
            return sample(config.model_copy(update={"output_dir": folder}))
    except (TokenKLError, OSError) as error:
        return Failed(message=str(error), data=error)
