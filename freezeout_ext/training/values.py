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


def metric_text(metric: str, value: float) -> str:
    return percent(value) if in_percent(metric) else f"{value:.4f}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def milliseconds(seconds: float | None) -> str:
    return "- ms" if seconds is None else f"{1000 * seconds:.2f} ms"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def points_text(metric: str, value: float) -> str:
    """A difference of a metric: "1.25 points of accuracy"."""
    return f"{100 * value:.2f} points of {metric}" if in_percent(metric) else f"{value:.4g} of {metric}"
