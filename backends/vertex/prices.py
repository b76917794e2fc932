"""What the Gemini models cost, as far as it is known; configuration wins over this table."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from backends.vertex.wire import model_id

# USD per million tokens, Vertex AI list prices of November 2026 (online); batch is half of them.
PRICES_AS_OF = "2026-11-22"
BATCH_SHARE = 0.5
_PER_MILLION = 1e-6


class Price(BaseModel):
    """USD per million tokens, online; a batch job costs half."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: float = Field(ge=0, description="USD per million input tokens, online.")
    output: float = Field(ge=0, description="USD per million output tokens, online.")


_PRICES = {
    "gemini-2.0-flash": Price(input=0.15, output=0.60),
    "gemini-2.0-flash-lite": Price(input=0.075, output=0.30),
    "gemini-2.5-flash": Price(input=0.30, output=2.50),
    "gemini-2.5-flash-lite": Price(input=0.10, output=0.40),
    "gemini-2.5-pro": Price(input=1.25, output=10.0),
    "gemini-3-flash-preview": Price(input=0.50, output=3.00),
    "gemini-3.1-flash-lite": Price(input=0.25, output=1.50),
    "gemini-3.1-pro-preview": Price(input=2.00, output=12.0),
    "gemini-3.5-flash": Price(input=1.50, output=9.00),
    "gemini-3.5-flash-lite": Price(input=0.30, output=2.50),
    "gemini-4-argon": Price(input=2.00, output=10.0),
}


def price_of(model: str, overrides: Mapping[str, Price]) -> Price | None:
    """The price of a model: the configuration's, else the table's, also for its previews and dated versions."""
    name = model_id(model)
    if name in overrides:
        return overrides[name]
    if model in overrides:
        return overrides[model]
    known = [base for base in _PRICES if name == base or name.startswith((f"{base}-preview", f"{base}-0", f"{base}@"))]
    return _PRICES[max(known, key=len)] if known else None


def token_cost(price: Price | None, input_tokens: int, output_tokens: int, share: float = 1.0) -> float | None:
    """What that many tokens cost; None without a price."""
    if price is None:
        return None
    return share * _PER_MILLION * (price.input * input_tokens + price.output * output_tokens)
