"""What is known beforehand of servers and services; every word of it is proven before it is relied on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Prefill = Literal["plain", "flags", "prefix"]
Name = Literal["vllm", "llama_cpp", "sglang", "mistral", "together", "fireworks", "deepseek", "openrouter"]

# How a chat request says that its last message is to be continued: in the request, and in the message.
SPELLINGS: dict[Prefill, tuple[dict[str, Any], dict[str, Any]]] = {
    "flags": ({"add_generation_prompt": False, "continue_final_message": True}, {}),
    "prefix": ({}, {"prefix": True}),
    "plain": ({}, {}),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of server.

    ``base_url`` is None where the user runs the server; ``api_key_env`` is the service's own name for its key.
    ``prefill`` are the spellings that are tried, in order; ``body`` goes into every request for log-probabilities.
    """

    base_url: str | None = None
    api_key_env: str | None = None
    prefill: tuple[Prefill, ...] = ("flags", "prefix", "plain")
    body: dict[str, Any] = field(default_factory=dict[str, Any])


PRESETS: dict[Name | None, Preset] = {
    None: Preset(),
    "vllm": Preset(prefill=("flags",)),
    "llama_cpp": Preset(prefill=("flags", "plain")),
    "sglang": Preset(prefill=("flags",)),
    "mistral": Preset("https://api.mistral.ai/v1", "MISTRAL_API_KEY", ("prefix",)),
    "together": Preset("https://api.together.xyz/v1", "TOGETHER_API_KEY", ("plain", "prefix")),
    "fireworks": Preset(
        "https://api.fireworks.ai/inference/v1",
        "FIREWORKS_API_KEY",
        ("plain",),
        {"context_length_exceeded_behavior": "error"},  # else a prompt that is too long is cut without a word
    ),
    "deepseek": Preset("https://api.deepseek.com/beta", "DEEPSEEK_API_KEY", ("prefix",)),
    "openrouter": Preset("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", ("plain", "prefix")),
}
