"""paired_test: does one arm differ from another, run by run with the same seeds?"""

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def paired_test(differences: Sequence[float]) -> dict | None:
    """t = mean / (sd / sqrt(n)); p = P(|T| >= |t|), T Student with n - 1 degrees of freedom; 95 % interval of the mean.

    None for fewer than two differences. Where all are equal their scatter is unknown (accuracies are counted in whole
    images: it happens by chance): the interval, t and p are None.

    Source: Student 1908; Abramowitz and Stegun 26.7.3, 26.7.4 for whole degrees of freedom.
    """
    n = len(differences)
    if n < 2:
        return None
    mean, sd = fmean(differences), stdev(differences)
    if sd == 0:
        return {"mean": mean, "low": None, "high": None, "t": None, "p": None, "n": n}
    error = sd / math.sqrt(n)
    margin = student_quantile(0.95, n - 1) * error
    return {
        "mean": mean,
        "low": mean - margin,
        "high": mean + margin,
        "t": mean / error,
        "p": 1 - student_probability(mean / error, n - 1),
        "n": n,
    }


def student_probability(t: float, freedom: int) -> float:
    """P(|T| <= |t|) of Student's distribution with `freedom` degrees of freedom."""
    theta = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def student_quantile(probability: float, freedom: int) -> float:
    """t with P(|T| <= t) = probability, by bisection to 1e-12 of it."""
    low, high = 0.0, 1.0
    while student_probability(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_probability(middle, freedom) < probability else (low, middle)
    return high
