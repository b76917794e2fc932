"""Numbers are written as exactly as they are known."""

import pytest

from kl.output.digits import rounded


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
    ],
)
def test_two_digits_of_the_standard_error_or_four_significant_ones(value: float, se: float | None, text: str) -> None:
    assert rounded(value, se) == text
