"""How metrics, times and sizes are named and written."""


def judge_of(summary: dict) -> str:
    """The name of the evaluation's metric in a summary; earlier versions knew accuracy alone."""
    return f"test_{summary['metric']['name']}" if "metric" in summary else "test_accuracy"


def metric_of(row: dict) -> str:
    """The name of the metric in a row of a log, or in a result: "loss" where there is no other."""
    names = [name.removeprefix("test_") for name in row if name.startswith("test_")]
    return next((name for name in names if name != "loss"), "loss")


def in_percent(metric: str) -> bool:
    """Whether a metric is shown in percent: accuracies are."""
    return metric.endswith("accuracy")


def scale(metric: str) -> tuple[float, int, str]:
    """(factor, digits, what to put behind the metric's name) of a metric's values."""
    return (100, 2, ", %") if in_percent(metric) else (1, 4, "")


def metric_text(metric: str, value: float) -> str:
    factor, digits, _ = scale(metric)
    return number(value, digits, factor, unit=" %" * in_percent(metric))


def number(
    value: float | None,
    digits: int,
    factor: float = 1.0,
    error: float | None = None,
    *,
    sign: str = "",
    unit: str = "",
    none: str = "-",
) -> str:
    """ "-", "1.25 %", "1.25 ± 0.10 %" of value * factor."""
    if value is None:
        return none
    scatter = "" if error is None else f" ± {factor * error:.{digits}f}"
    return f"{factor * value:{sign}.{digits}f}{scatter}{unit}"


def points_text(metric: str, value: float) -> str:
    """A difference of a metric: "1.25 points of accuracy"."""
    return f"{100 * value:.2f} points of {metric}" if in_percent(metric) else f"{value:.4g} of {metric}"
