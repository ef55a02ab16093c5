"""Reporters: what a run shows while it trains."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..text import duration
from .tables import epoch_line, transition_line

if TYPE_CHECKING:
    from .trainer import Trainer

REFRESH_SECONDS = 0.5
# Without a live bar: lines of progress come after so many seconds without one, the first after fewer.
FIRST_SECONDS, SILENT_SECONDS = 2.0, 15.0


def say(text: str) -> None:
    """Prints a line at once, also where stdout is no terminal."""
    print(text, flush=True)


class Reporter:
    """Is told what a run does; here it says nothing."""

    def start(self, trainer: "Trainer") -> None:
        """The run begins, or goes on at trainer.step."""

    def step(self, step: int) -> None:
        """`step` steps are done."""

    def evaluating(self, done: int, total: int) -> None:
        """`done` of `total` batches of an evaluation are done; 0 where it begins."""

    def epoch(self, row: dict) -> None:
        """An epoch is done and safe on disk; row is its line in the log."""

    def note(self, text: str) -> None:
        """Something about the run that a reader should know."""

    def close(self) -> None:
        """The run ended, in whatever way."""


class Progress:
    """Lines that say how far something is and how long it will take. In its first seconds there is none, then few."""

    def __init__(self, what: str, say: Callable[[str], None] = say) -> None:
        self._what, self._say = what, say
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` parts are done."""
        now = time.perf_counter()
        if self._first is None:
            self._first, self._began = done, now  # a resumed run does not begin at 0
            self._next = now + FIRST_SECONDS
        if now < self._next or done == total:
            return
        self._next = now + SILENT_SECONDS
        left = ""
        if done > self._first:
            left = f", about {duration((now - self._began) * (total - done) / (done - self._first))} left"
        self._say(f"{self._what}: {done} of {total}{left}")


class LineReporter(Reporter):
    """Lines of progress: few of steps and evaluations, one an epoch and one a transition.

    Args:
        stream: stdout by default.
        title: of the run; its config's by default.
        epochs: whether epochs and transitions have their lines.
    """

    def __init__(self, stream: TextIO | None = None, *, title: str = "", epochs: bool = True) -> None:
        self._title, self._show_epochs, self._stream = title, epochs, stream or sys.stdout

    def start(self, trainer: "Trainer") -> None:
        self._epochs, self._num_layers, self._total = trainer.epochs, len(trainer.layer_names), trainer.total_steps
        self._name = self._title or trainer.config.title
        self._progress = Progress(f"{self._name}, steps", self.line)
        self._progress(trainer.step, self._total)

    def step(self, step: int) -> None:
        self._progress(step, self._total)

    def evaluating(self, done: int, total: int) -> None:
        if done == 0:
            self._evaluation = Progress(f"{self._name}, evaluating, batches", self.line)
        self._evaluation(done, total)

    def epoch(self, row: dict) -> None:
        if self._show_epochs:
            for transition in row["transitions"]:
                self.line(transition_line(transition, self._num_layers))
            self.line(epoch_line(row, self._epochs, self._num_layers))

    def note(self, text: str) -> None:
        self.line(f"note: {text}")

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarReporter(LineReporter):
    """LineReporter's lines above a live bar (rich).

    The bar is drawn from the training thread, twice a second: no second thread takes time from measured steps.
    """

    def __init__(self, stream: TextIO | None = None, **shown: Any) -> None:
        super().__init__(stream, **shown)
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("steps"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=Console(file=self._stream),
            auto_refresh=False,
            transient=True,
        )

    def start(self, trainer: "Trainer") -> None:
        super().start(trainer)
        self._drawn = time.perf_counter()
        self._task = self._bar.add_task(self._name, total=self._total)
        self._bar.update(self._task, completed=trainer.step)
        self._bar.start()

    def step(self, step: int) -> None:
        now = time.perf_counter()
        if now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._bar.update(self._task, completed=step, refresh=True)

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
        for name in ("start", "step", "evaluating", "epoch", "note", "close"):
            setattr(self, name, partial(self._tell, [getattr(reporter, name) for reporter in reporters]))

    def _tell(self, told: list[Callable], *given: Any) -> None:
        for each in told:
            each(*given)


def has_live_bar(stream: TextIO | None) -> bool:
    """Whether a live bar can be shown: `stream` is a terminal and rich is there. Says so where only rich is missing."""
    if stream is None or not stream.isatty():
        return False
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        print("no live progress without rich: pip install 'freezeout_ext[train]'", file=sys.stderr)
        return False
    return True
