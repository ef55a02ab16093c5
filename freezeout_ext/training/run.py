"""Run: training that can be stopped at any moment, and goes on there."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..integrations.distributed import LostRank, lost_rank_explained
from ..planner import StepCosts
from ..tasks import Task, faults_of
from .config import TrainConfig, faults_of_input
from .costing import kept_costs
from .course import has_whole_steps
from .engagement import with_engagement
from .measure import COUNTED_MEMORY, CUDA_MEMORY, conditions, transitions_measured
from .ranks import Ranks
from .reporters import Reporter
from .run_folder import RunFolder
from .trainer import Trainer, TrainingFailed


class Run:
    """One run in one folder. `prepare` finds every fault of the input. `train` does the rest."""

    told_of_threads = False  # once a process

    def __init__(self, trainer: Trainer, folder: RunFolder) -> None:
        self.trainer, self.folder = trainer, folder

    @classmethod
    @faults_of_input()
    def prepare(
        cls,
        config: TrainConfig,
        out: str | Path,
        *,
        task: Task,
        resume: bool = False,
        ranks: Ranks = Ranks(),  # noqa: B008, frozen
    ) -> "Run":
        """Makes the model, and finds the checkpoint to go on from.

        The folder is this run's own until the run has been trained.

        Args:
            resume: the run in `out` goes on, or starts where there is none.

        Raises:
            BadInput: one sentence on what is wrong with the input; nothing was written.
        """
        config = config.resolved()
        folder = RunFolder(out)
        state = None
        if resume and folder.holds_run():
            if ranks.is_first:
                folder.lock()
            if difference := folder.load_config().difference(config):
                raise ValueError(f"the run in {folder.path} is another one: {difference}")
            state = folder.load_checkpoint(config)
        else:
            folder.check_free()
        with faults_of(task.file):
            trainer = Trainer(config, task, ranks)
        if state is not None:
            try:
                trainer.load_state_dict(state)
            except ValueError as error:
                raise ValueError(f"{folder.checkpoint_path}: {error}") from None
            folder.check_log(trainer.epoch)
        ranks.wait_for_all()  # before the first one writes what the others look for
        if ranks.is_first and not folder.holds_run():
            folder.create(config)
        return cls(trainer, folder)

    @faults_of_input()
    def costs(self) -> StepCosts | None:
        """The costs of the run's steps, which its folder keeps; None where no saving can be predicted from them.

        The costs of one process know no communication.
        """
        trainer = self.trainer
        if trainer.freezeout is None or trainer.ranks.world > 1 or not has_whole_steps(trainer.config):
            return None
        return kept_costs(self.folder.path / "costs.json", trainer.config, trainer.task, trainer.layer_names)

    def train(self, reporter: Reporter, costs: StepCosts | None = None) -> dict:
        """Trains to the end, one checkpoint an epoch, and returns what result.json then holds.

        Args:
            reporter: is told of each step and epoch, and closed at the end.
            costs: of the run's steps, to put the predicted saving beside the measured one.
        """
        trainer = self.trainer
        try:
            with lost_rank_explained(lambda: trainer.step), faults_of(trainer.task.file):
                return self._train_first(reporter, costs) if trainer.ranks.is_first else self._train_other()
        except LostRank as error:
            raise TrainingFailed(f"{error}: add --resume") from error
        finally:
            if trainer.feed.cache is not None:
                trainer.feed.cache.close()
            self.folder.unlock()
            reporter.close()

    def _train_other(self) -> dict:
        while self.trainer.epoch < self.trainer.epochs:
            self.trainer.train_epoch()
        self.trainer.ranks.wait_for_all()
        return {}

    def _train_first(self, reporter: Reporter, costs: StepCosts | None) -> dict:
        trainer, folder, task = self.trainer, self.folder, self.trainer.task
        sign = 1 if task.higher_is_better else -1
        folder.cut_log(trainer.epoch)
        judge = f"val_{task.metric_name}"
        best = max((sign * row[judge] for row in folder.read_log() if judge in row), default=float("-inf"))
        reporter.start(trainer)
        while trainer.epoch < trainer.epochs:
            row = trainer.train_epoch(reporter.step)
            if task.validation is not None:
                row |= trainer.evaluate("val", task.validation, reporter.evaluating)
            row |= trainer.evaluate("test", task.evaluation, reporter.evaluating)
            if judge in row and sign * row[judge] > best:
                best = sign * row[judge]
                folder.save_best({"epoch": trainer.epoch, "model": trainer.model.state_dict()})
            folder.append_log(row)
            folder.save_checkpoint(trainer.state_dict())
            reporter.epoch(row)
            if trainer.threads_wait and not Run.told_of_threads:
                Run.told_of_threads = True
                reporter.note(trainer.threads_wait)
        result = self._result(folder.read_log()[-1])
        if costs is not None:
            result = with_engagement(result, costs, result["config"])
        folder.save_result(result)
        trainer.ranks.wait_for_all()
        return result

    def _result(self, last: dict) -> dict:
        trainer = self.trainer
        phases = [phase.summary() for phase in trainer.phases]
        report = trainer.feed.cache.report() if trainer.feed.cache else None
        if trainer.feed.cache is not None and trainer.device.type == "cpu":  # there memory is counted
            for phase in phases:
                phase["memory_bytes"] += trainer.feed.cache.bytes * (phase["num_frozen"] > 0)
        return {
            **{name: last[name] for name in last if name.startswith(("train_", "val_", "test_"))},
            "metric": {"name": trainer.task.metric_name, "higher_is_better": trainer.task.higher_is_better},
            "total_steps": trainer.total_steps,
            "steps_per_epoch": trainer.length.steps_per_epoch,
            "layers": trainer.layer_names,
            "phases": phases,
            "transitions": transitions_measured(trainer.transitions, trainer.phases),
            "peak_memory_bytes": max(phase["memory_bytes"] for phase in phases),
            "features": None if report is None else asdict(report) | {"text": str(report)},
            "memory_measured": CUDA_MEMORY if trainer.device.type == "cuda" else COUNTED_MEMORY,
            "graphs_compiled": trainer.compiled.graphs if trainer.compiled else None,
            "processes": trainer.ranks.world,
            "traffic": [vars(t) for t in trainer.follower.traffic] if trainer.follower else None,
            "config": trainer.config.to_dict(),
            "conditions": conditions(trainer.device),
        }


def trained(
    config: TrainConfig,
    folder: RunFolder,
    task: Task,
    make_reporter: Callable[[], Reporter],
    costs: StepCosts | None = None,
) -> dict:
    """The result of the run of `config` in `folder`, which is trained to its end where it is not yet."""
    result = folder.load_result()
    if result is not None and TrainConfig.from_dict(result["config"]) == config:
        return result
    return Run.prepare(config, folder.path, resume=True, task=task).train(make_reporter(), costs)
