"""FreezeOut in Transformers: add_freezeout(trainer, t_0=0.5); trainer.train()."""

from typing import Any, cast

import torch

from ..arguments import check_kind
from ..features import FeatureCache
from ..freezeout import FreezeOut
from . import follow_if_distributed

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "freezeout_ext.integrations.transformers needs Transformers: pip install freezeout_ext[transformers]"
    ) from error


# FreezeOut's state in the Trainer's trainer_state.json, among those of its callbacks.
STATE, CACHE = "freezeout", "freezeout_cache"


class FreezeOutCallback(TrainerCallback):
    """freezeout.step() once for each optimizer step. `add_freezeout` makes it; training sets its `freezeout`."""

    def __init__(self) -> None:
        self.freezeout: FreezeOut | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            freezeout, saved_by = self._made(), _saved_by(state)
            # Saved by an earlier release: what is frozen is then a function of the step alone.
            saved = saved_by.get(STATE) or {**freezeout.state_dict(), "step": state.global_step}
            freezeout.load_state_dict(saved)
            if freezeout.cache is not None and CACHE in saved_by:
                freezeout.cache.load_state_dict(saved_by[CACHE])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        freezeout = self._made()
        while freezeout.step_count < state.global_step:
            freezeout.step()
        _saved_by(state)[STATE] = freezeout.state_dict()
        self._keep(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep(state, control)

    def _keep(self, state: TrainerState, control: TrainerControl) -> None:
        """Brings what the cache keeps to disk where a checkpoint follows."""
        cache = self._made().cache
        if cache is not None and control.should_save:
            _saved_by(state)[CACHE] = cache.state_dict()

    def _made(self) -> FreezeOut:
        assert self.freezeout is not None  # made with the scheduler, before training begins
        return self.freezeout


def _saved_by(state: TrainerState) -> dict[str, Any]:
    """The states of the callbacks, by name."""
    return cast("dict[str, Any]", state.stateful_callbacks)  # declared as the list that it is made from


def add_freezeout(trainer: Trainer, **arguments: Any) -> FreezeOutCallback:
    """Trains `trainer` with FreezeOut: each layer on its own cosine in place of the Trainer's LR scheduler.

    The Trainer makes its optimizer as ever, or is given one without a scheduler.
    The steps of the warm-up are those of the Trainer's arguments.
    `total_steps` is what the Trainer will run.
    `anneal=False` keeps the Trainer's scheduler and only freezes.

    Args:
        trainer: a transformers.Trainer.
        arguments: of FreezeOut (t_0, how_scale, layers, ...). With `cache=FeatureCache(train_dataset, ...)` the cache's
            loader takes the place of the Trainer's.

    Returns: the callback, which was added to the trainer. Its `freezeout` exists once training has started.

    Raises:
        TypeError: trainer is none.
        ValueError: the trainer was given an LR scheduler.
    """
    check_kind("trainer", trainer, Trainer, "a transformers.Trainer")
    if trainer.lr_scheduler is not None:
        raise ValueError("trainer must not have an LR scheduler: pass optimizers=(optimizer, None)")
    callback = FreezeOutCallback()
    create_scheduler = trainer.create_scheduler
    changed: Any = trainer  # methods and a scheduler of ours take the places of its own

    # The one moment at which the optimizer exists, the number of steps is known and no state is loaded yet.
    def create(num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if callback.freezeout is not None:
            callback.freezeout.close()
        optimizer = trainer.optimizer if optimizer is None else optimizer
        assert trainer.model is not None  # the optimizer was made for it
        wrapped: Any = getattr(optimizer, "optimizer", optimizer)  # by Accelerate
        callback.freezeout = FreezeOut(
            trainer.model,
            wrapped,
            **{
                "total_steps": num_training_steps,
                "warmup_steps": trainer.args.get_warmup_steps(num_training_steps),
                **arguments,
            },
        )
        follow_if_distributed(callback.freezeout)
        if not arguments.get("anneal", True):
            return create_scheduler(num_training_steps, optimizer)
        changed.lr_scheduler = _Rates(callback.freezeout)
        return changed.lr_scheduler

    if "cache" in arguments:
        _train_on(trainer, arguments["cache"])
    changed.create_scheduler = create
    trainer.add_callback(callback)
    return callback


def _train_on(trainer: Trainer, cache: FeatureCache) -> None:
    """Batches come from the cache's loader, and each training step runs over their keys."""
    training_step, args = trainer.training_step, trainer.args
    # As the Trainer's own: without the columns that the model does not take.
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
    loader = cache.loader(
        args.train_batch_size, collate_fn=collate, drop_last=args.dataloader_drop_last, seed=args.seed,
        num_workers=args.dataloader_num_workers,
    )  # fmt: skip

    def step(model: torch.nn.Module, inputs: dict, *rest: Any, **named: Any) -> torch.Tensor:
        keys = inputs.pop(loader.key_name)
        with cache.samples(keys):
            return training_step(model, inputs, *rest, **named)

    changed: Any = trainer
    changed.get_train_dataloader = lambda: loader
    changed.training_step = step


class _Rates:
    """The LR scheduler that the Trainer asks for. FreezeOut sets the rates. `_Rates` reports the last layer's rate."""

    def __init__(self, freezeout: FreezeOut) -> None:
        self._freezeout = freezeout

    def step(self) -> None:
        pass

    def get_last_lr(self) -> list[float]:
        return self._freezeout.learning_rates()[-1:]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        pass
