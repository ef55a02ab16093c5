"""One run of one arm of bench_finetune.py, by the CPU time of the process."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from finetune_arms import Arm
from finetune_tasks import Experiment, cosine, evaluate, fresh
from torch import Tensor
from torch.nn import functional

from freezeout_ext import FreezeOut
from freezeout_ext.features import FeatureCache
from freezeout_ext.memory import SavedBytes, held_memory


class Clock:
    """CPU seconds of a run, and the same in full training steps that are timed between the run's own.

    Attributes:
        seconds: of the process while the clock ran.
        full_steps: the same, over the seconds of a full training step at that time.
    """

    def __init__(self, full_step: Callable[[], None], steps: int, every: float) -> None:
        self._full_step, self._steps, self._every = full_step, steps, every
        self.seconds = self.full_steps = 0.0
        self.yardsticks: list[float] = []

    def start(self) -> None:
        self._last = self._yardstick()
        self._since = time.process_time()

    def lap(self, *, end: bool = False) -> None:
        seconds = time.process_time() - self._since
        if seconds < self._every and not end:
            return
        before, self._last = self._last, self._yardstick()
        self.seconds += seconds
        self.full_steps += seconds / (0.5 * (before + self._last))
        self._since = time.process_time()

    def _yardstick(self) -> float:
        start = time.process_time()
        for _ in range(self._steps):
            self._full_step()
        self.yardsticks.append((time.process_time() - start) / self._steps)
        return self.yardsticks[-1]


class Run:
    """One run of one arm of an experiment."""

    def __init__(self, experiment: Experiment, arm: Arm, seed: int) -> None:
        self.experiment, self.arm, self.seed = experiment, arm, seed
        self.images = experiment.train(seed)
        self.model = experiment.make_model(seed).to(memory_format=torch.channels_last).train()
        self.steps_per_epoch = len(self.images) // experiment.batch_size
        self.total = round(arm.length * experiment.epochs * self.steps_per_epoch)
        self.step = self.memory = 0
        self.freezeout = self.cache = self.loader = self.scheduler = self.counted = None

    def row(self) -> dict:
        """Trains. Returns the row: what the run reached and what the run took."""
        clock = Clock(self._full_step(), *self.experiment.timed)
        torch.manual_seed(self.seed)
        clock.start()
        self._prepare()
        while self.step < self.total:
            for batch in self._epoch():
                self._train_step(*batch)
                clock.lap()
                if self.step == self.total:
                    break
        clock.lap(end=True)
        found = {"steps": self.total, "cpu_seconds": clock.seconds, "full_steps": clock.full_steps}
        found |= {"full_step_seconds": sum(clock.yardsticks) / len(clock.yardsticks), "memory_bytes": self.memory}
        if self.cache is not None:
            report = self.cache.report()
            names = ("rows", "of_rows", "bytes", "hits", "misses", "samples_read", "samples_skipped", "notes")
            found["cache"] = {name: getattr(report, name) for name in names}
        if self.freezeout is not None:
            found["transitions"] = [[t.step, t.num_frozen] for t in self.freezeout.transitions]
            self.freezeout.close()
        if self.cache is not None:
            self.cache.close()
        accuracy, loss = evaluate(self.model, self.experiment.test(self.seed))
        return found | {"accuracy": accuracy, "loss": loss}

    def _prepare(self) -> None:
        arm, experiment = self.arm, self.experiment
        for epoch in range(arm.adapt):
            batches = fresh(self.images, experiment.batch_size, 900 + self.seed, epoch)
            torch.optim.swa_utils.update_bn((inputs for inputs, _ in batches), self.model)
        self.optimizer = experiment.make_optimizer(self.model.parameters(), arm.rate)
        if arm.views is not None:
            self.cache = FeatureCache(self.images, views=arm.views, dtype=arm.kept, seed=self.seed)
            self.loader = self.cache.loader(experiment.batch_size, shuffle=True, drop_last=True)
        if arm.freezes:
            how_scale, t_0 = arm.rule or ("linear", 1.0)
            self.freezeout = FreezeOut(
                self.model,
                self.optimizer,
                total_steps=self.total,
                start_frozen=arm.start,
                t_0=t_0,
                how_scale=how_scale,
                anneal=arm.anneal,
                cache=self.cache,
            )
        if not arm.anneal:
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _epoch(self) -> Iterator[tuple]:
        if self.loader is not None:
            return iter(self.loader)
        return fresh(self.images, self.experiment.batch_size, self.seed, self.step // self.steps_per_epoch)

    def _rate(self, step: int) -> float:
        rate = cosine(step, self.total)
        if self.arm.thaw is not None and step >= self._thaw_step:
            rate *= self.arm.thaw[2]
        elif self.freezeout is not None and self.freezeout.num_frozen > self.arm.start:
            rate *= self.arm.rate_after
        return rate

    @property
    def _thaw_step(self) -> int:
        return round(self.arm.thaw[0] * self.total)

    def _train_step(self, inputs: Tensor, targets: Tensor, keys: object = None) -> None:
        num_frozen = 0 if self.freezeout is None else self.freezeout.num_frozen
        counting = self.counted is None or num_frozen < self.counted
        saved = SavedBytes(self.model) if counting else None
        counted = nullcontext() if saved is None else saved.watch()
        with counted, nullcontext() if keys is None else self.cache.samples(keys):
            loss = functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        if saved is not None:
            held = held_memory(self.model, [self.optimizer], saved.total)
            self.memory = max(self.memory, held.weights + held.gradients + held.state + held.saved)
            self.counted = num_frozen
        self.optimizer.zero_grad()
        if self.freezeout is not None:
            self.freezeout.step()
            # Before the next batch is fetched: a batch of kept features has no inputs for thawed layers.
            if self.arm.thaw is not None and self.step + 1 == self._thaw_step:
                self.freezeout.thaw_to(self.arm.thaw[1])
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1

    def _full_step(self) -> Callable[[], None]:
        """A step of full training of another copy of the net on one batch."""
        with torch.random.fork_rng([]):
            model = self.experiment.make_model(self.seed).to(memory_format=torch.channels_last).train()
        # Rate 0: the yardstick's weights stay finite and its work the same.
        optimizer = self.experiment.make_optimizer(model.parameters(), 0.0)
        inputs, targets = next(fresh(self.images, self.experiment.batch_size, 0, 0))

        def step() -> None:
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            step()
        return step
