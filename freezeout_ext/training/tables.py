"""What runs and comparisons say: lines and tables, for a terminal and for a page."""

from collections.abc import Iterable
from typing import NamedTuple

from ..text import table
from .summary import verdict
from .values import in_percent, judge_of, metric_of, metric_text, number, scale

Rows = list[tuple[str, ...]]


class Table(NamedTuple):
    """Rows, header first, and the columns that are aligned to the left."""

    rows: Rows
    left: tuple[int, ...] = ()


def as_text(blocks: Iterable[str | Table]) -> str:
    return "\n\n".join(block if isinstance(block, str) else table(block.rows, left=block.left) for block in blocks)


def run_blocks(result: dict) -> list[str | Table]:
    """What `freezeout train` ends in."""
    metric = metric_of(result)
    lines = [f"peak memory: {result['memory_measured']}", graphs_text(result)]
    lines.append(
        f"test {metric} {metric_text(metric, result[f'test_{metric}'])} after {result['total_steps']} steps,"
        f" {result['train_seconds']:.1f} s of training"
    )
    phases = phases_rows(result["phases"], result["transitions"], len(result["layers"]))
    blocks: list[str | Table] = [Table(phases, (2,)), _lines(*lines)]
    if features := result.get("features"):
        blocks.append(features["text"])
    if result.get("traffic"):
        blocks.append(Table(traffic_rows(result)))
    if text := engagement_text(result):
        blocks.append(text)
    return blocks


def comparison_blocks(summary: dict, *, all_phases: bool = False) -> list[str | Table]:
    """What `freezeout compare` ends in; the last one is the verdict.

    Args:
        all_phases: of each arm that freezes, not of FreezeOut's alone.
    """
    where = summary["conditions"]
    device = where["device"]
    if device == "cpu":
        device += f" ({where['cpu']}), {where['threads']} thread{'s' * (where['threads'] != 1)}"
    blocks: list[str | Table] = [
        f"{what_was_trained(summary['config'])}, seeds {', '.join(map(str, summary['seeds']))}\n"
        f"{device}; torch {where['torch']}, commit {where['commit'] or '-'}",
        Table(arms_rows(summary), (0,)),
    ]
    for arm in summary["arms"]:
        if arm.get("features"):
            blocks.append(_lines(f"{arm['name']}:", arm["features"]["text"], kept_text(arm)))
        if arm["transitions"] and (all_phases or arm["kind"] == "freezeout"):
            rows = phases_rows(arm["phases"], arm["transitions"], arm["num_layers"])
            blocks += [f"{arm['name']}: between its transitions", Table(rows, (2,))]
            if text := _lines(graphs_text(arm), engagement_text(arm)):
                blocks.append(text)
    note = (
        "p: two-sided paired t-test over the seeds, of the difference to full training; ahead: of full training on a"
        " cosine shortened to the same seconds. ms/step: median over the steps between two transitions."
        f" peak memory: {summary['memory_measured']}."
    )
    return [*blocks, note, verdict(summary)]


def _lines(*lines: str) -> str:
    return "\n".join(filter(None, lines))


def kept_text(arm: dict) -> str:
    """One line on what the kept features of an arm have saved; "" where that cannot be said."""
    found = arm.get("kept_saving")
    if not found:
        return ""
    ratio = "" if found["engagement"] is None else f"; engagement {found['engagement']:.2f}"
    return (
        f"saves {100 * found['measured_saving']:.1f} % of full training's time, filling counted, "
        f"{100 * found['predicted_saving']:.1f} % predicted{ratio}"
    )


def what_was_trained(config: dict) -> str:
    net = "" if config["model"] == "own" else f", {config['model']}"
    lr = "" if config["lr"] is None else f" lr {config['lr']:g}"
    optimizer = "its own optimizer" if config["optimizer"] == "task" else config["optimizer"]
    start = f", frozen from the start: {config['start_frozen']}" if config.get("start_frozen") else ""
    thaw = f", thawed to {config['thaw_to'].replace('@', ' at ')} of the run" if config.get("thaw_to") else ""
    return f"{config['data']}{net}, batch {config['batch_size']}, {optimizer}{lr}{start}{thaw}"


def arms_rows(summary: dict) -> Rows:
    """One row an arm, header first."""
    arms, judge = summary["arms"], judge_of(summary)
    metric = judge.removeprefix("test_")
    factor, digits, unit = scale(metric)
    targets = [found["accuracy"] for found in arms[0]["time_to_accuracy"]]
    is_rated = any("ahead_of_rival" in arm for arm in arms)
    header = ("", f"test {metric}{unit}", "over full", "p", *(("ahead", "p") if is_rated else ()), "seconds", "saved")
    shown = [f"{100 * target:.1f} %" if in_percent(metric) else f"{target:.4g}" for target in targets]
    header += ("steps", "ms/step", "peak MiB", *(f"s to {target}" for target in shown))

    def difference(found: dict) -> str:
        return number(found["mean"], digits, factor, found["sd"], sign="+")

    rows = [header]
    for arm in arms:
        gain, ratio, lead = arm.get("accuracy_over_full"), arm.get("seconds_over_full"), arm.get("ahead_of_rival")
        ends = arm["phases"][0], arm["phases"][-1]
        ahead = [difference(lead), _p(lead["test"])] if lead else ["", ""]
        rows.append(
            (
                arm["name"],
                f"{number(arm[judge]['mean'], digits, factor, arm[judge]['sd'])} (n={arm[judge]['n']})",
                difference(gain) if gain else "",
                _p(arm.get("accuracy_over_full_test")),
                *(ahead if is_rated else ()),
                number(arm["train_seconds"]["mean"], 2, error=arm["train_seconds"]["sd"]),
                f"{100 * (1 - ratio['mean']):.1f} %" if ratio else "",
                str(arm["total_steps"]),
                " -> ".join(dict.fromkeys(number(phase["seconds_per_step"], 2, 1e3) for phase in ends)),
                " -> ".join(dict.fromkeys(number(phase["memory_bytes"], 1, 2**-20) for phase in ends)),
                *(_time_to(found, arm[judge]["n"]) for found in arm["time_to_accuracy"]),
            )
        )
    return rows


def _p(test: dict | None) -> str:
    return "" if test is None or test["p"] is None else f"{test['p']:.3f}"


def _time_to(found: dict, runs: int) -> str:
    if found["seconds"] is None:
        return "never"
    part = "" if found["reached"] == runs else f" ({found['reached']} of {runs})"
    return f"{found['seconds']['mean']:.2f}{part}"


def epoch_line(row: dict, epochs: int, num_layers: int) -> str:
    metric = metric_of(row)
    judged = "".join(
        f"  {split} {metric_text(metric, row[f'{split}_{metric}'])}"
        for split in ("train", "val", "test")
        if f"{split}_{metric}" in row and not (split == "train" and metric == "loss")
    )
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.4f}{judged}"
        f"  frozen {row['num_frozen']:>{len(str(num_layers))}}/{num_layers}"
        f"  {number(row['seconds_per_step'], 2, 1e3)} ms/step"
        f"  {row['examples_per_second']:,.0f} samples/s  {number(row['peak_memory_bytes'], 1, 2**-20)} MiB"
    )


def transition_line(transition: dict, num_layers: int) -> str:
    before, after = (number(transition[f"seconds_per_step_{side}"], 2, 1e3) for side in ("before", "after"))
    frozen = f"{transition['num_frozen']} of {num_layers} layers"
    if _thaws(transition):
        what = f"thawed {', '.join(transition['layers'])} (still frozen: {frozen};"
        what += f" {-transition['parameters_frozen']:,} parameters train again)"
    else:
        what = f"froze {', '.join(transition['layers'])} ({frozen}; {transition['parameters_frozen']:,} parameters,"
        what += f" {transition['state_bytes_freed']:,} bytes of optimizer state freed)"
    return f"step {transition['step']}: {what}; {before} ms -> {after} ms a step"


def phases_rows(phases: list[dict], transitions: list[dict], num_layers: int) -> Rows:
    """A row for each stretch between two transitions, header first; what a step saves there where that is known."""
    opened_by = {t["step"]: t for t in transitions}
    header = ["from step", "frozen", "newly frozen", "steps", "ms/step", "peak MiB"]
    is_engaged = any("predicted_saving" in t for t in transitions)
    rows = [tuple(header + ["saved, predicted", "measured", "engagement"] * is_engaged)]
    for phase in phases:
        transition = opened_by.get(phase["first_step"])
        row = [
            str(phase["first_step"]),
            f"{phase['num_frozen']} of {num_layers}",
            _moved(transition) if transition else "",
            str(phase["steps"]),
            number(phase["seconds_per_step"], 2, 1e3),
            number(phase["memory_bytes"], 1, 2**-20),
        ]
        if is_engaged:
            row += saving_cells(transition) if transition else [""] * 3
        rows.append(tuple(row))
    return rows


def saving_cells(row: dict) -> list[str]:
    """Predicted, measured, engagement: the numbers and their standard deviations."""
    cells = [
        number(row[f"{what}_saving"], 1, 100, row[f"{what}_error"], unit=" %") for what in ("predicted", "measured")
    ]
    if row["measured_error"] is None:
        return [*cells, "-"]  # too few steps
    return [*cells, number(row["engagement"], 2, error=row["engagement_error"], none="in the noise")]


def _moved(transition: dict) -> str:
    layers = transition["layers"]
    names = ", ".join(layers) if len(layers) < 3 else f"{layers[0]} .. {layers[-1]}"
    return f"thawed: {names}" if _thaws(transition) else names


def _thaws(transition: dict) -> bool:
    return transition["parameters_frozen"] < 0


def graphs_text(result: dict) -> str:
    """How often torch.compile compiled, "" where it was not asked."""
    graphs = result.get("graphs_compiled") or {}
    counts = ", ".join(f"{count} with {k} frozen" for k, count in graphs.items())
    return f"graphs compiled: {counts}" if counts else ""


def engagement_text(result: dict) -> str:
    """What stands below the table of a result (or an arm of a comparison): the whole run's line and the warnings."""
    found = result.get("engagement")
    if not found or not result["transitions"]:
        return ""
    lines = [f"saved of the {found['clock']} of a step with nothing frozen; predicted: {found['source']}"]
    if found["whole_run"]["measured_saving"] is not None:
        predicted, measured, engagement = saving_cells(found["whole_run"])
        lines.append(f"all steps: predicted {predicted}, measured {measured}, engagement {engagement}")
    return "\n".join(lines + [f"warning: {text}" for text in found["warnings"]])


def traffic_rows(result: dict) -> Rows:
    """What each rank sent a step, from each time that DDP was wrapped on."""
    rows: Rows = [("from step", "layers frozen", "KiB of gradients a step", "KiB of buffers")]
    for t in result["traffic"]:
        kib = [f"{t[name] / 1024:,.1f}" for name in ("gradient_bytes", "buffer_bytes")]
        rows.append((str(t["step"]), f"{t['num_frozen']} of {len(result['layers'])}", *kib))
    return rows
