"""What a run or a comparison shows on the terminal: live progress, lines and tables."""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from .trainer import Trainer

REFRESH_SECONDS = 0.5


class Reporter:
    """Is told what a run does; here it says nothing."""

    def start(self, trainer: "Trainer") -> None:
        """The run begins, or goes on at trainer.step."""

    def step(self, step: int) -> None:
        """`step` steps are done."""

    def epoch(self, row: dict) -> None:
        """An epoch is done and safe on disk; row is its line in the log."""

    def close(self) -> None:
        """The run ended, in whatever way."""


class LineReporter(Reporter):
    """One line an epoch and one a transition."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout

    def start(self, trainer: "Trainer") -> None:
        self._epochs, self._num_layers = trainer.epochs, len(trainer.layer_names)

    def epoch(self, row: dict) -> None:
        for transition in row["transitions"]:
            self.line(transition_line(transition, self._num_layers))
        self.line(epoch_line(row, self._epochs, self._num_layers))

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class BarReporter(LineReporter):
    """LineReporter's lines above a live bar (rich). Drawn from the training thread, twice a second: no second thread
    takes time from the steps that are measured."""

    def __init__(self, stream: TextIO | None = None, *, title: str = "", epochs: bool = True) -> None:
        super().__init__(stream)
        from rich import progress
        from rich.console import Console

        self._title, self._show_epochs = title, epochs
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("steps"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=Console(file=self.stream),
            auto_refresh=False,
            transient=True,
        )

    def start(self, trainer: "Trainer") -> None:
        super().start(trainer)
        self._drawn = time.perf_counter()
        self._task = self._bar.add_task(self._title or trainer.config.model, total=trainer.total_steps)
        self._bar.update(self._task, completed=trainer.step)
        self._bar.start()

    def step(self, step: int) -> None:
        now = time.perf_counter()
        if now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._bar.update(self._task, completed=step, refresh=True)

    def epoch(self, row: dict) -> None:
        if self._show_epochs:
            super().epoch(row)

    def line(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class TensorBoardReporter(Reporter):
    """Each number of a row as a TensorBoard scalar over steps."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs TensorBoard: pip install 'freezeout_ext[tensorboard]'") from None
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step)

    def start(self, trainer: "Trainer") -> None:
        self._writer = self._open(trainer.step + 1)
        self._names = trainer.layer_names

    def epoch(self, row: dict) -> None:
        for name, value in row.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])
        for i, (name, rate) in enumerate(zip(self._names, row["learning_rates"], strict=True)):
            self._writer.add_scalar(f"learning_rate/{i:02d} {name}", rate, row["step"])
        self._writer.flush()

    def close(self) -> None:
        if hasattr(self, "_writer"):
            self._writer.close()


class Reporters(Reporter):
    """Tells several."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def start(self, trainer: "Trainer") -> None:
        for reporter in self._reporters:
            reporter.start(trainer)

    def step(self, step: int) -> None:
        for reporter in self._reporters:
            reporter.step(step)

    def epoch(self, row: dict) -> None:
        for reporter in self._reporters:
            reporter.epoch(row)

    def close(self) -> None:
        for reporter in self._reporters:
            reporter.close()


def has_live_bar(stream: TextIO) -> bool:
    """Whether a live bar can be shown: `stream` is a terminal and rich is there; says so where only rich is missing."""
    if not stream.isatty():
        return False
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        print("no live progress without rich: pip install 'freezeout_ext[train]'", file=sys.stderr)
        return False
    return True


def epoch_line(row: dict, epochs: int, num_layers: int) -> str:
    val = f"  val {percent(row['val_accuracy'])}" if "val_accuracy" in row else ""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.4f}"
        f"  train {percent(row['train_accuracy'])}{val}  test {percent(row['test_accuracy'])}"
        f"  frozen {row['num_frozen']:>{len(str(num_layers))}}/{num_layers}"
        f"  {milliseconds(row['seconds_per_step'])}/step"
        f"  {row['examples_per_second']:,.0f} images/s  {mebibytes(row['peak_memory_bytes'])}"
    )


def transition_line(transition: dict, num_layers: int) -> str:
    before, after = transition["seconds_per_step_before"], transition["seconds_per_step_after"]
    return (
        f"step {transition['step']}: froze {', '.join(transition['layers'])}"
        f" ({transition['num_frozen']} of {num_layers} layers; {transition['parameters_frozen']:,} parameters,"
        f" {transition['state_bytes_freed']:,} bytes of optimizer state freed);"
        f" {milliseconds(before)} -> {milliseconds(after)} a step"
    )


def phases_rows(phases: list[dict], transitions: list[dict], num_layers: int) -> list[tuple[str, ...]]:
    """A row for each stretch between two transitions, header first; what a step saves there where that is known."""
    opened_by = {t["num_frozen"]: t for t in transitions}
    header = ["from step", "frozen", "newly frozen", "steps", "ms/step", "peak MiB"]
    is_engaged = any("predicted_saving" in t for t in transitions)
    rows = [tuple(header + ["saved, predicted", "measured", "engagement"] * is_engaged)]
    for phase in phases:
        transition = opened_by.get(phase["num_frozen"])
        row = [
            str(phase["first_step"]),
            f"{phase['num_frozen']} of {num_layers}",
            _names(transition["layers"]) if transition else "",
            str(phase["steps"]),
            _number(phase["seconds_per_step"], 1e3, 2),
            _number(phase["memory_bytes"], 2**-20, 1),
        ]
        if is_engaged:
            row += saving_cells(transition) if transition else [""] * 3
        rows.append(tuple(row))
    return rows


def saving_cells(row: dict) -> list[str]:
    """Predicted, measured, engagement: the numbers and their standard deviations."""
    measured, ratio = row["measured_saving"], row["engagement"]
    if row["measured_error"] is None:
        engagement = "-"  # too few steps
    elif ratio is None:
        engagement = "in the noise"
    else:
        engagement = f"{ratio:.2f} ± {row['engagement_error']:.2f}"
    return [
        _percent_error(row["predicted_saving"], row["predicted_error"]),
        _percent_error(measured, row["measured_error"]),
        engagement,
    ]


def _names(layers: Sequence[str]) -> str:
    return ", ".join(layers) if len(layers) < 3 else f"{layers[0]} .. {layers[-1]}"


def _percent_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"


def graphs_text(result: dict) -> str:
    """How often torch.compile compiled, "" where it was not asked."""
    graphs = result.get("graphs_compiled") or {}
    counts = ", ".join(f"{count} with {k} frozen" for k, count in graphs.items())
    return f"graphs compiled: {counts}" if counts else ""


def run_summary(result: dict) -> str:
    """The table of a run's phases, and its last line."""
    compiled = f"{text}\n" if (text := graphs_text(result)) else ""
    rows = phases_rows(result["phases"], result["transitions"], len(result["layers"]))
    return (
        f"{table(rows, left=[2])}\npeak memory: {result['memory_measured']}\n{compiled}"
        f"test accuracy {percent(result['test_accuracy'])} after {result['total_steps']} steps,"
        f" {result['train_seconds']:.1f} s of training"
    )


def table(rows: Sequence[Sequence[str]], *, left: Iterable[int] = ()) -> str:
    """rows (the first is the header) as aligned text, numbers to the right, columns in `left` to the left."""
    left = set(left)
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(widths[c]) if c in left else cell.rjust(widths[c]) for c, cell in enumerate(row)]
        return "  ".join(cells).rstrip()

    header, *body = rows
    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, body)])


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def milliseconds(seconds: float | None) -> str:
    return "- ms" if seconds is None else f"{1000 * seconds:.2f} ms"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def _number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"
