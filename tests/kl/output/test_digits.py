"""Numbers are written as exactly as they are known."""

import pytest

from kl.output.digits import at_least, at_most, rounded


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (0.61634, 0.0951, "0.616"),
        (0.61634, 0.12, "0.62"),
        (1234.56, 31.0, "1,235"),
        (0.0, 0.0042, "0.0000"),
        (0.123456, None, "0.1235"),
        (0.123456, 0.0, "0.1235"),
        (12345.6, None, "12,346"),
        (-3.0, None, "-3"),
        (1.39e-11, 2.4e-12, "1.39e-11"),
    ],
)
def test_two_digits_of_the_standard_error_or_four_significant_ones(value: float, se: float | None, text: str) -> None:
    assert rounded(value, se) == text


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        (0.43128, "0.4312", "0.4313"),
        (0.1, "0.1", "0.1"),
        (0.99999, "0.9999", "1"),
        (1e-6, "1e-06", "1e-06"),
        (-0.43128, "-0.4313", "-0.4312"),
        (12345.6, "12,345", "12,346"),
        (0.0, "0", "0"),
    ],
)
def test_a_bound_is_written_on_its_own_side(value: float, least: str, most: str) -> None:
    assert (at_least(value), at_most(value)) == (least, most)
