"""Which models there are and what each of them can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

MULTI_REGIONS = frozenset({"global", "us", "eu"})


@dataclass(frozen=True)
class ModelSpec:
    """One model.

    ``locations`` is None for a model that is everywhere. A budget of 0 switches thinking off unless ``thinking`` is
    ``forced``; other budgets lie in ``[min_budget, max_budget]``, and -1 lets the model decide.
    """

    version: str
    logprobs: bool = True
    prefill: bool = True
    thinking: Literal["none", "off", "on", "forced"] = "off"  # without a thinkingConfig
    min_budget: int = 1
    max_budget: int = 24576
    thinking_level: bool = False
    locations: frozenset[str] | None = None
    shut: bool = False
    developer_logprobs: bool = False  # at the Gemini Developer API


_FLASH_25 = ModelSpec("gemini-2.5-flash", thinking="on")
_NO_LOGPROBS = ModelSpec(
    "gemini-3.5-flash", logprobs=False, thinking="on", thinking_level=True, locations=MULTI_REGIONS
)
_NO_PREFILL = replace(_NO_LOGPROBS, prefill=False)
_SHUT = ModelSpec("gemini-2.0-flash-001", thinking="none", shut=True)

MODELS: dict[str, ModelSpec] = {
    "gemini-2.5-flash": _FLASH_25,
    "gemini-2.5-flash-lite": replace(_FLASH_25, version="gemini-2.5-flash-lite", thinking="off", min_budget=512),
    "gemini-2.5-pro": replace(_FLASH_25, version="gemini-2.5-pro", thinking="forced", min_budget=128, max_budget=32768),
    **{
        name: replace(_SHUT, version=name)
        for name in (
            "gemini-2.0-flash",
            "gemini-2.0-flash-001",
            "gemini-2.0-flash-lite",
            "gemini-2.0-flash-lite-001",
        )
    },
    **{
        name: replace(_NO_LOGPROBS, version=name)
        for name in ("gemini-3-pro-preview", "gemini-3.1-pro-preview", "gemini-3.5-flash")
    },
    **{
        name: replace(_NO_PREFILL, version=name)
        for name in ("gemini-3.5-flash-lite", "gemini-3.6-flash", "gemini-3.7-flash", "gemini-3.8-flash")
    },
}
