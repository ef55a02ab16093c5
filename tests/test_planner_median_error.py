"""median_error by hand, and against the scatter of medians that are drawn."""

import random
from statistics import median, stdev

import pytest

from freezeout_ext.planner.median_error import median_error


def test_by_hand():
    assert median_error([]) is median_error([1.0]) is None
    assert median_error([1.0, 2.0, 6.0]) == pytest.approx(1.2533 * 7**0.5 / 3**0.5)
    # From eight on an outlier does not count: the deviations are 0, 1, 1, 2, 2, 3, 3, 93; their median 2.
    assert median_error([4, 5, 6, 7, 8, 9, 10, 100]) == pytest.approx(1.2533 * 1.4826 * 2 / 8**0.5)


@pytest.mark.parametrize("n", [5, 40])
def test_is_the_scatter_of_medians(n):
    rng = random.Random(0)
    draws = [[rng.gauss(10, 2) for _ in range(n)] for _ in range(2000)]
    # The factor is that of large n: 1.20 would be exact for n = 5.
    assert median([median_error(values) for values in draws]) == pytest.approx(stdev(map(median, draws)), rel=0.1)
