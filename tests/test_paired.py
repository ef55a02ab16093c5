"""paired_test against tables of Student's distribution."""

import pytest

from freezeout_ext.training.paired import paired_test, student_probability, student_quantile

# Degrees of freedom -> t with P(|T| <= t) = 0.95, from printed tables.
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 29: 2.0452}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom):
    # The tables have four digits.
    assert student_quantile(0.95, freedom) == pytest.approx(TABLE[freedom], abs=5e-5)
    assert student_probability(-TABLE[freedom], freedom) == pytest.approx(0.95, abs=1e-5)


def test_cauchy_and_two_degrees_in_closed_form():
    assert student_probability(1.0, 1) == pytest.approx(0.5)
    assert student_probability(1.0, 2) == pytest.approx(1 / 3**0.5)
    assert student_probability(0.0, 7) == 0


def test_paired_differences():
    found = paired_test([0.10, 0.20, 0.15])
    assert found["mean"] == pytest.approx(0.15)
    assert found["t"] == pytest.approx(0.15 / (0.05 / 3**0.5))
    assert found["p"] == pytest.approx(0.035099, abs=1e-6)  # by scipy.stats.ttest_1samp
    assert (found["low"], found["high"]) == pytest.approx((0.025793, 0.274207), abs=1e-6)
    assert found["n"] == 3
    assert paired_test([-0.10, -0.20, -0.15])["p"] == found["p"]


def test_too_few_or_equal_differences():
    assert paired_test([0.1]) is None
    for value in (0.0, 0.5):
        assert paired_test([value] * 3) == {"mean": value, "low": None, "high": None, "t": None, "p": None, "n": 3}
