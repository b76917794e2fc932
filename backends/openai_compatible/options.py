"""The settings of the backend ``openai_compatible``."""

from __future__ import annotations

import os
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from backends.base import BackendOptions
from backends.errors import ConfigError
from backends.openai_compatible.found import Found
from backends.openai_compatible.presets import PRESETS, Name

Mode = Literal["prompt", "ids", "prefill", "write"]

# Fields that decide what is asked, or that would reshape or cut it: they are the program's to set.
_RESERVED = frozenset(
    "model prompt messages max_tokens max_completion_tokens temperature top_p top_k min_p n best_of stream echo "
    "logprobs top_logprobs prompt_logprobs logit_bias post_sampling_probs truncate_prompt_tokens cache_prompt seed "
    "stop add_generation_prompt continue_final_message return_tokens_as_token_ids return_token_ids "
    "logprob_token_ids".split()
)
_FROM_ENVIRONMENT = re.compile(r"\$\{(\w+)\}")
_SECRET_HEADERS = re.compile(r"key|auth|token|secret|cookie|password", re.IGNORECASE)
_VARIABLE_ALONE = re.compile(r"(?:[A-Za-z-]+ )?\$\{\w+\}")


class OpenAICompatibleOptions(BackendOptions):
    """Settings of the backend ``openai_compatible``."""

    base_url: str | None = Field(
        default=None,
        description="Where the server is, up to and with /v1: http://127.0.0.1:8000/v1. Default: that of the preset, "
        "else OPENAI_BASE_URL.",
    )
    preset: Name | None = Field(
        default=None, description="What the server is, where it is a known one; it is found out in any case."
    )
    api_key_env: str | None = Field(
        default=None,
        pattern=r"^\w+$",
        description="Name of the environment variable with the key (not the key). Default: that of the preset, else "
        "none is sent.",
    )
    headers: dict[str, str] = Field(
        default_factory=dict[str, str],
        description="Further headers. ${NAME} in a value is read from the environment; credentials only so.",
    )
    body: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="Further fields of each request, such as a pinned provider: {provider: {only: [NAME]}}.",
    )
    mode: Literal["auto"] | Mode = Field(
        default="auto",
        description="How Q is asked: prompt (all positions of a response in one request), ids (a request a position, "
        "by completions), prefill (a request a position, by chat); auto takes the first that is proven. With write it "
        "is only asked for responses (P), by chat.",
    )
    template: Literal["chat", "none"] = Field(
        default="chat",
        description="chat writes the conversation by the server's chat template; none gives the prompt as it is, for "
        "base models: one user turn without system text.",
    )
    cache: Literal["off", "fast"] = Field(
        default="off",
        description="llama.cpp's prompt cache: off is repeatable, one request at a time; fast is 25 to 40 times as "
        "fast, and its answers depend on what was asked before (0.0025 nats a token, as much as a light rounding).",
    )
    max_concurrent: int = Field(
        default=10, ge=1, le=1000, description="Calls in flight over all responses, 1 to 1000; fewer under throttling."
    )
    request_timeout_s: float = Field(default=600.0, gt=0, description="Seconds until one call counts as lost.")
    retry_deadline_s: float = Field(
        default=600.0, gt=0, description="Seconds for which one call is repeated under throttling and faults."
    )
    usd_per_million_input: float | None = Field(
        default=None, ge=0, description="Price of a million prompt tokens, USD."
    )
    usd_per_million_output: float | None = Field(
        default=None, ge=0, description="Price of a million generated tokens, USD."
    )
    found: Found | None = Field(
        default=None, description="What the server was found to be and to prove; the program fills it in."
    )

    @field_validator("body")
    @classmethod
    def _own_fields_only(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_RESERVED & value.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} may not be set here: they decide what is asked")
        return value

    @field_validator("headers")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if _SECRET_HEADERS.search(name) and not _VARIABLE_ALONE.fullmatch(text):
                raise ValueError(
                    f"the value of {name} looks like a credential; write it as ${{NAME}} of a variable, and that alone"
                )
        return value

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        return None if value is None else _plain(value)

    @model_validator(mode="after")
    def _both_prices(self) -> OpenAICompatibleOptions:
        if (self.usd_per_million_input is None) != (self.usd_per_million_output is None):
            raise ValueError("set both of usd_per_million_input and usd_per_million_output, or neither")
        return self

    @property
    def address(self) -> str:
        """Where the server is.

        Raises
        ------
        ConfigError
            If nothing says it, or the variable holds more than an address.
        """
        found = self.base_url or PRESETS[self.preset].base_url
        if not found and (given := os.environ.get("OPENAI_BASE_URL")):
            try:
                found = _plain(given)
            except ValueError as error:
                raise ConfigError(f"the environment variable OPENAI_BASE_URL is not usable: {error}.") from error
        if not found:
            raise ConfigError(
                "no server: set backend.base_url (http://127.0.0.1:8000/v1), a preset or OPENAI_BASE_URL."
            )
        return found.rstrip("/")

    def credentials(self) -> dict[str, str]:
        """The headers of each call, with what the environment holds.

        Raises
        ------
        ConfigError
            If a variable is not set.
        """
        headers = {
            name: _FROM_ENVIRONMENT.sub(lambda match: _variable(match[1]), text) for name, text in self.headers.items()
        }
        named = self.api_key_env or PRESETS[self.preset].api_key_env
        return headers | ({"Authorization": f"Bearer {_variable(named)}"} if named else {})


def _plain(address: str) -> str:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write it as http://HOST:PORT/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address holds no credentials and no query; use api_key_env or headers")
    return address.rstrip("/")


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"the environment variable {name}, which holds a credential of the server, is not set.")
    return value
