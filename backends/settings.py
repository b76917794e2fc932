"""Settings that a user writes and a backend is given, apart from the contract: a command line loads these alone."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SampleSettings(BaseModel):
    """How responses are sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(default=1.0, ge=0, le=2, description="Softmax temperature; 0 is greedy.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus mass.")
    max_tokens: int = Field(default=256, ge=1, description="Longest response, tokens.")
    top_logprobs: int = Field(default=20, ge=1, description="Candidates recorded per position.")
    seed: int = Field(default=0, ge=0, description="Seed of the first response; response i uses seed + i.")
