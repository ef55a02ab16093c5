"""verdict: who won a comparison, in one sentence."""

from .values import judge_of, metric_text, points_text

# A difference that chance makes less often than this has a winner.
CLEAR = 0.05


def verdict(summary: dict) -> str:
    """Who won, in one sentence: the freezing arm that is most ahead of full training at equal seconds, or not ahead.

    With several such arms the chance that one of them is ahead by accident is as many times larger. So p is multiplied
    by their number (Bonferroni).
    """
    judge = judge_of(summary)
    metric = judge.removeprefix("test_")
    rated = [arm for arm in summary["arms"] if "ahead_of_rival" in arm]
    if not rated:
        higher = summary["metric"]["higher_is_better"] if "metric" in summary else True
        best = max(summary["arms"], key=lambda arm: arm[judge]["mean"] if higher else -arm[judge]["mean"])
        return (
            f"Nobody won: no arm stood against a cosine shortened to its own seconds. Best test {metric}:"
            f" {metric_text(metric, best[judge]['mean'])}, {best['name']}."
        )
    arm = max(rated, key=lambda each: each["ahead_of_rival"]["mean"])
    return sentence(arm["name"], arm["train_seconds"]["mean"], arm["ahead_of_rival"], metric, len(rated))


def sentence(name: str, seconds: float, lead: dict, metric: str, arms: int = 1) -> str:
    """Who won, in one sentence.

    Args:
        name: of what is ahead, or behind.
        seconds: that it took.
        lead: over its rival, see `summary.lead_over`.
        metric: its name.
        arms: how many stood each against a rival of its own.
    """
    times, n = f"{seconds:.1f} s against {lead['seconds']:.1f} s", lead["n"]
    by = points_text(metric, abs(lead["mean"]))
    if lead["sd"] is None:
        return (
            f"Nobody won: one seed shows no winner. {name} ended {by} {_side(lead)} {lead['rival']} ({times});"
            " take --seeds 5."
        )
    if lead["test"]["p"] is None:
        return f"Nobody won: all {n} seeds show {name} {by} {_side(lead)} {lead['rival']}, without a scatter."
    p = min(1.0, lead["test"]["p"] * arms)
    several = f", p times {arms} for as many arms" if arms > 1 else ""
    error = points_text(metric, lead["sd"] / n**0.5)
    how_sure = f"(standard error {error}, p = {p:.2g}, n = {n}{several}; {times})"
    if p >= CLEAR:
        return f"Nobody won: {name} ended {by} {_side(lead)} {lead['rival']}, within the noise {how_sure}."
    if lead["mean"] > 0:
        return f"{name} won: at equal seconds it is {by} ahead of {lead['rival']} {how_sure}."
    return f"Full training won: shortened to equal seconds, {lead['rival']} is {by} ahead of {name} {how_sure}."


def _side(lead: dict) -> str:
    return "ahead of" if lead["mean"] >= 0 else "behind"
