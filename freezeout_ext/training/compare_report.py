"""What `freezeout compare` prints: the arms side by side, and what each FreezeOut saved when."""

from .engagement import engagement_text
from .report import graphs_text, phases_rows, table


def comparison_tables(summary: dict) -> str:
    """The text that `freezeout compare` ends in."""
    config, where = summary["config"], summary["conditions"]
    device = where["device"]
    if device == "cpu":
        device += f" ({where['cpu']}), {where['threads']} thread{'s' * (where['threads'] != 1)}"
    parts = [
        f"{config['data']}, {config['model']}, batch {config['batch_size']}, {config['optimizer']} lr {config['lr']:g},"
        f" seeds {', '.join(map(str, summary['seeds']))}\n"
        f"{device}; torch {where['torch']}, commit {where['commit'] or '-'}",
        table(arms_rows(summary["arms"]), left=[0]),
    ]
    for arm in summary["arms"]:
        if arm["kind"] == "freezeout" and arm["transitions"]:
            rows = phases_rows(arm["phases"], arm["transitions"], arm["num_layers"])
            text = "\n".join(filter(None, (graphs_text(arm), engagement_text(arm))))
            parts.append(f"{arm['name']}: between its transitions\n{table(rows, left=[2])}\n{text}")
    parts.append(
        "p: two-sided paired t-test of the difference in accuracy over the seeds."
        " ms/step: median over the steps between two transitions."
        f" peak memory: {summary['memory_measured']}."
    )
    return "\n\n".join(parts)


def arms_rows(arms: list[dict]) -> list[tuple[str, ...]]:
    """One row an arm, header first."""
    targets = [found["accuracy"] for found in arms[0]["time_to_accuracy"]]
    has_energy = all(arm["train_joules"] for arm in arms)
    header = ("", "test accuracy, %", "over full", "p", "seconds", "saved", "steps", "ms/step", "peak MiB")
    header += tuple(f"s to {100 * target:.1f} %" for target in targets) + ("kJ",) * has_energy
    rows = [header]
    for arm in arms:
        gain, ratio = arm.get("accuracy_over_full"), arm.get("seconds_over_full")
        p = (arm.get("accuracy_over_full_test") or {}).get("p")
        first, last = arm["phases"][0], arm["phases"][-1]
        rows.append(
            (
                arm["name"],
                f"{_mean_sd(arm['test_accuracy'], 100, 2)} (n={arm['test_accuracy']['n']})",
                _mean_sd(gain, 100, 2, sign="+") if gain else "",
                "" if p is None else f"{p:.3f}",
                _mean_sd(arm["train_seconds"], 1, 2),
                f"{100 * (1 - ratio['mean']):.1f} %" if ratio else "",
                str(arm["total_steps"]),
                _change(first["seconds_per_step"], last["seconds_per_step"], 1e3, 2),
                _change(first["memory_bytes"], last["memory_bytes"], 2**-20, 1),
                *(_time_to(found, arm["test_accuracy"]["n"]) for found in arm["time_to_accuracy"]),
                *([_mean_sd(arm["train_joules"], 1e-3, 3)] if has_energy else []),
            )
        )
    return rows


def _change(before: float | None, after: float | None, factor: float, digits: int) -> str:
    texts = ["-" if value is None else f"{value * factor:.{digits}f}" for value in (before, after)]
    return texts[0] if texts[0] == texts[1] else " -> ".join(texts)


def _time_to(found: dict, runs: int) -> str:
    if found["seconds"] is None:
        return "never"
    part = "" if found["reached"] == runs else f" ({found['reached']} of {runs})"
    return f"{found['seconds']['mean']:.2f}{part}"


def _mean_sd(values: dict, factor: float, digits: int, sign: str = "") -> str:
    mean = f"{values['mean'] * factor:{sign}.{digits}f}"
    return mean if values["sd"] is None else f"{mean} ± {values['sd'] * factor:.{digits}f}"
