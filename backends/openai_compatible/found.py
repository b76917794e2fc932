"""What was found out about a server, and proven: it decides the identity of its answers, and outlives the process."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from backends.openai_compatible.presets import Prefill
from backends.storage import read_bytes, write_bytes_atomic

logger = logging.getLogger(__name__)

_KEPT = 20  # servers that were once behind one name


class Found(BaseModel):
    """One model of one server, and how it may be asked.

    Attributes
    ----------
    model : str
    kind : str
        What the server is: of ``openai`` nothing is known but its interface.
    server : dict
        What the server says of itself that decides its answers (version, file, quantisation, template); JSON types.
    served : dict
        What it says of each model that it serves; empty where it does not say.
    route, form : str
        How it is asked, and whether with ids or with text.
    lent : bool
        Whether it lends a tokenizer whose ids and texts are exact.
    echo : bool
        With the route ``prompt``: through ``echo`` in place of ``prompt_logprobs``.
    prefill : str, optional
        How it is told to continue a message.
    longest : int
        The longest list that it gives.
    context : int, optional
        How many tokens it takes, the answer's included.
    slots : int
        How many requests it works on side by side, where it says so.
    fingerprint, answers_as : str, optional
        What its answers hold as ``system_fingerprint`` and as ``model``; None where they change by themselves.
    noise_nats : float
        How far two answers to one request were apart.
    after_sampling : bool
        Whether the temperature moves its values: then they are of temperature 1 because that is what is asked.
    writes_after_sampling : bool
        The same for the lists of what it generates, however Q is asked.
    probe : dict of str to float
        Its list at a fixed context, by token: weights that were exchanged under one name give another.
    probe_id : str
        The hash of that list as it was first seen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    kind: Literal["llama_cpp", "vllm", "sglang", "openai"]
    server: dict[str, Any]
    served: dict[str, dict[str, Any]]
    route: Literal["prompt", "ids", "prefill", "write"]
    form: Literal["ids", "text"]
    lent: bool
    echo: bool = False
    prefill: Prefill | None = None
    longest: int
    context: int | None = None
    slots: int = 1
    fingerprint: str | None = None
    answers_as: str | None = None
    noise_nats: float = 0.0
    after_sampling: bool = False
    writes_after_sampling: bool
    probe: dict[str, float]
    probe_id: str

    def identity(self, model: str) -> dict[str, Any]:
        """What decides the answers of a model of this server, as JSON types."""
        own = {"probe": self.probe_id, "fingerprint": self.fingerprint} if model == self.model else {}
        return own | {
            "kind": self.kind,
            "server": self.server,
            "served": self.served.get(model, {}),
            "route": f"echo {self.route}" if self.echo else self.route,
            "form": self.form,
            "prefill": self.prefill,
        }

    def same_weights(self, other: Found) -> bool:
        """Whether two probes are of one model, as far as the noise of either lets tell."""
        allowed = max(_LEAST_APART_NATS, _NOISE_TIMES * max(self.noise_nats, other.noise_nats))
        best = sorted(self.probe, key=lambda token: -self.probe[token])[:_COMPARED]
        return all(abs(self.probe[token] - other.probe.get(token, -1e9)) <= allowed for token in best)


# What rounding on other hardware or beside other requests moves a likely token by, at most; other weights move it more.
_LEAST_APART_NATS, _NOISE_TIMES, _COMPARED = 0.05, 4.0, 3


class Record:
    """What was found of a model at an address, on a disk or in a bucket: the servers that were there, newest last."""

    def __init__(self, state_dir: Path | None, *asked: object) -> None:
        name = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:24]
        self._path = None if state_dir is None else state_dir / "openai_compatible" / f"{name}.json"

    def all(self) -> list[Found]:
        """Empty where nothing is on record, or it is of another version of this program."""
        if self._path is None:
            return []
        try:
            return [Found.model_validate(item) for item in json.loads(read_bytes(self._path))]
        except FileNotFoundError:
            return []
        except (ValueError, ValidationError) as error:
            logger.warning("%s cannot be read, and the server is asked anew: %s", self._path, type(error).__name__)
            return []

    def newest(self) -> Found | None:
        """What was there last."""
        return (self.all() or [None])[-1]

    def keep(self, found: Found) -> None:
        """Put one at the end."""
        if self._path is None:
            return
        others = [item for item in self.all() if item != found]
        if [*others, found] != self.all():
            kept = [item.model_dump(mode="json") for item in (*others, found)][-_KEPT:]
            write_bytes_atomic(self._path, json.dumps(kept, indent=1).encode())
