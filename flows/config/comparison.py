"""A run's configuration with all that follows from it: resolved once, then passed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from backends.base import Backend, BackendOptions, ScoreRequest
from backends.errors import ModelNotUsableError
from backends.keys import context_keys
from backends.storage import is_remote
from flows.config.backend import check_capabilities, resolve_backend
from flows.config.folders import resolve_folders
from flows.config.models import RunConfig
from flows.config.templates import RunValues
from flows.folder.layout import OutputFolder
from kl.records import Response
from kl.statistics.position_sampling import Drawn, draw

Side = Literal["p", "q"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """P's responses against model Q: what is asked, of whom, and where the answers go.

    Attributes
    ----------
    written, config : RunConfig
        As the user wrote it, and with its folders filled in.
    backend, options : type of Backend, BackendOptions
        Who is asked about Q; the options are complete, with nothing left to the environment.
    notes : tuple of str
        Settings that this backend has no use for.
    folder : OutputFolder
    """

    written: RunConfig
    config: RunConfig
    backend: type[Backend]
    options: BackendOptions
    notes: tuple[str, ...]
    folder: OutputFolder

    @classmethod
    def of(cls, written: RunConfig, values: RunValues) -> Comparison:
        """Resolve a configuration.

        Raises
        ------
        ConfigError
            If the backend is not there or cannot do what is asked, or a folder cannot be named.
        """
        backend, options, notes = resolve_backend(written)
        check_capabilities(written, backend)
        config = resolve_folders(written, values)
        return cls(written, config, backend, options, tuple(notes), OutputFolder(config.output_dir))

    def made_absolute(self) -> Comparison:
        """The same for processes that have another working directory."""
        folders = {name: absolute(getattr(self.config, name)) for name in ("input_dir", "output_dir")}
        config = self.config.model_copy(update=folders)
        return replace(self, config=config, folder=OutputFolder(config.output_dir))

    def build_backend(self, run_id: str | None = None) -> Backend:
        """The backend, not entered yet; ``run_id`` is the flow run that it works for."""
        built = self.backend(self.options, state_dir=self.folder.scores)
        built.run_id = run_id
        return built

    def sides(self) -> tuple[Side, ...]:
        """Q is always asked; P too where its full vocabulary is wanted, which no response file holds."""
        return ("q", "p") if self.config.full_vocabulary else ("q",)

    def drawn(self, response: Response) -> Drawn | None:
        """Which positions are measured, with their probabilities; None if all are."""
        return None if self.config.positions is None else draw(response, self.config.positions.sample)

    def request(self, response: Response, side: Side) -> ScoreRequest | None:
        """All contexts of a response that can be asked; None if the file names no P that this backend has."""
        model = self.config.model2 if side == "q" else response.model
        if model is None:
            return None
        bare = self._bare_request(response, side, model)
        try:
            identity = self.backend.identity(self.options, bare)
        except ModelNotUsableError:
            if side == "q":
                raise
            return None
        tokens = [position.sampled.token for position in response.positions]
        keys = list(context_keys(model, bare.prompt, identity, tokens, bare.token_ids))
        positions = self._askable(response, bare.token_ids is not None)
        return replace(bare, positions=tuple(positions), keys=tuple(keys[position] for position in positions))

    def _bare_request(self, response: Response, side: Side, model: str) -> ScoreRequest:
        prompt = response.prompt
        if side == "q" and self.options.system is not None:
            prompt = replace(prompt, system=self.options.system)
        return ScoreRequest(
            name=response.name,
            model=model,
            prompt=prompt,
            text=response.text,
            prefix_ends=tuple(response.prefix_ends().tolist()),
            token_ids=_own_ids(response) if self.backend.capabilities.token_ids else None,
            positions=(),
            keys=(),
            top_logprobs=self.config.k,
            full_vocabulary=self.config.full_vocabulary,
            gaps=response.gaps,
        )

    def _askable(self, response: Response, by_ids: bool) -> Sequence[int]:
        """The drawn positions whose prefix can be said in a request: some have no text."""
        unaskable = set[int]() if by_ids else {position for position, _ in response.gaps}
        drawn = self.drawn(response)
        return [
            index
            for index in range(len(response.positions))
            if index not in unaskable and (drawn is None or bool(drawn.selected[index]))
        ]


def _own_ids(response: Response) -> tuple[int, ...] | None:
    ids = [position.sampled.token_id for position in response.positions]
    return tuple(token_id for token_id in ids if token_id is not None) if None not in ids else None


def absolute(path: Path) -> Path:
    """A location that means the same in every working directory."""
    return path if is_remote(path) else path.absolute()
