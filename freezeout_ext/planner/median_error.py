"""median_error: the standard deviation of the median of a few noisy times."""

from collections.abc import Sequence
from statistics import median, stdev

FEW = 8


def median_error(values: Sequence[float]) -> float | None:
    """1.2533 * sd / sqrt(n), the standard deviation of a median where the values scatter normally; None for n < 2.

    sd is that of the values where they are few. Else sd is 1.4826 times their median absolute deviation, which a few
    interrupted steps do not move.
    """
    n = len(values)
    if n < 2:
        return None
    if n < FEW:
        sd = stdev(values)
    else:
        middle = median(values)
        sd = 1.4826 * median(abs(value - middle) for value in values)
    return 1.2533 * sd / n**0.5
