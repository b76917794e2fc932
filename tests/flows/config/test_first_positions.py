"""Settings of first positions, and what is left of a response."""

from __future__ import annotations

from typing import Any

import pytest

from backends.errors import ConfigError
from flows.config.models import RunConfig
from flows.config.reading import validate

START = {"input_dir": "in", "output_dir": "out", "model2": "q"}
FIRST = {"positions": {"first": True, "repeats": 4}}
TEST = {"kl_per_token": 0, "test": "permutation", "of": "q", "compared_with": "previous"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"positions": {"first": True, "per_response": 2}}, r"or first \(true\)"),
        ({"positions": {"per_response": 2, "repeats": 2}}, "repeats is for first positions"),
        ({"noise_floor": {"first": True}}, "noise_floor asks again at a sample of positions"),
        (FIRST | {"noise_floor": {"fraction": 0.1}}, "positions.first goes without noise_floor"),
        (FIRST | {"top_logprobs": "full"}, "positions.first goes without top_logprobs 'full'"),
        (FIRST | {"wanted_tokens": True}, "positions.first goes without wanted_tokens"),
        ({"alert": TEST}, r"alert.test: permutation is for positions: \{first: true\}"),
        (FIRST | {"alert": TEST | {"of": "pq"}}, "set of: q and compared_with: previous"),
        (FIRST | {"alert": TEST | {"compared_with": {"baseline": "x"}}}, "set of: q and compared_with: previous"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        validate(RunConfig, START | settings)


def test_repeats_are_known_of_first_positions_alone():
    assert validate(RunConfig, START | FIRST | {"alert": TEST}).first_repeats == 4
    assert validate(RunConfig, START | {"positions": {"per_response": 4}}).first_repeats is None
