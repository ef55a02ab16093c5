"""FreezeOut in Lightning: Trainer(callbacks=[FreezeOutCallback(t_0=0.5)])."""

import math
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..arguments import check_kind
from ..features import CacheLoader, keys_in
from ..freezeout import FreezeOut
from . import follow_if_distributed

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "freezeout_ext.integrations.lightning needs Lightning: pip install freezeout_ext[lightning]"
    ) from error


# The states of the cache and its loader, among FreezeOut's.
CACHE = "cache"


class FreezeOutCallback(Callback):
    """freezeout.step() once for each batch in which an optimizer stepped.

    A run that the Trainer resumes from its own checkpoint goes on, within an epoch too.
    With one optimizer the batches counted are the optimizer's steps, under gradient accumulation too.
    Several optimizers may step unequally often.
    FreezeOut anneals each layer on its own, so `configure_optimizers` returns no LR scheduler.
    With `anneal=False` it may return one.

    Args:
        module: name of the submodule of the LightningModule whose layers to freeze. None: the only child with trainable
            parameters, or else the LightningModule itself.
        arguments: of FreezeOut (t_0, how_scale, layers, ...). `total_steps` is what the Trainer will run (max_steps, or
            max_epochs of its loader), unless given. With `cache=` the Trainer is given `cache.loader(...)`; each
            training step then runs over the keys, which come last in the batch.

    Attributes:
        freezeout: the FreezeOut, from on_fit_start on.

    Raises:
        TypeError: module is no text.
        ValueError: module is no name of a submodule; at the start of a fit, an LR scheduler beside annealing, or a
            total_steps that cannot be known.
    """

    def __init__(self, *, module: str | None = None, **arguments: Any) -> None:
        check_kind("module", module, str, "the name of a submodule", optional=True)
        self.freezeout: FreezeOut | None = None
        self._module = module
        self._arguments = arguments
        self._state: dict | None = None
        self._samples = ExitStack()
        self._global_step = 0  # at the last look
        self._loader: CacheLoader | None = None
        self._at: dict | None = None  # where the loader is to go on

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The optimizers exist and their state is not yet loaded, which needs the split groups.
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if schedulers and self._arguments.get("anneal", True):
            raise ValueError(
                "configure_optimizers must return no LR scheduler: FreezeOut gives each layer a cosine of its own; "
                "FreezeOutCallback(anneal=False) keeps the scheduler and only freezes"
            )
        if self.freezeout is not None:
            self.freezeout.close()
        arguments = {"total_steps": self._total_steps(trainer), "schedulers": schedulers, **self._arguments}
        self.freezeout = FreezeOut(self._target(pl_module), trainer.optimizers, **arguments)
        if self._state is not None:
            self.freezeout.load_state_dict(self._state)
            if self.freezeout.cache is not None and CACHE in self._state:
                self.freezeout.cache.load_state_dict(self._state[CACHE]["features"])
                self._at = self._state[CACHE]["loader"]
            self._state = None
        follow_if_distributed(self.freezeout)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._global_step = trainer.global_step
        loader = trainer.train_dataloader
        self._loader = loader if isinstance(loader, CacheLoader) else None
        if self._loader is not None and self._at is not None:
            # Lightning does it too, but for loaders that it has made before it loads states.
            self._loader.load_state_dict(self._at)
        self._at = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        if "cache" in self._arguments:
            self._samples.enter_context(self._arguments["cache"].samples(keys_in(batch)))

    def on_exception(self, *_: Any) -> None:
        self._samples.close()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._samples.close()
        # global_step counts the steps of all optimizers.
        if trainer.global_step > self._global_step:
            self._global_step = trainer.global_step
            assert self.freezeout is not None  # made as the fit started
            self.freezeout.step()

    def state_dict(self) -> dict:
        if self.freezeout is None:
            return {}
        state, cache = self.freezeout.state_dict(), self.freezeout.cache
        if cache is not None and self._loader is not None:
            state[CACHE] = {"features": cache.state_dict(), "loader": self._loader.state_dict()}
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        self._state = state_dict or None

    def _total_steps(self, trainer: Trainer) -> int:
        if "total_steps" in self._arguments:
            return self._arguments["total_steps"]
        if len(trainer.optimizers) > 1 and trainer.max_steps != -1:
            raise ValueError(
                "total_steps must be given where the Trainer has max_steps and several optimizers: max_steps counts "
                "the steps of all of them, total_steps the batches in which any of them steps"
            )
        total_steps = trainer.estimated_stepping_batches
        if not math.isfinite(total_steps):
            raise ValueError("the Trainer must have max_steps or max_epochs, or the callback total_steps: got neither")
        return int(total_steps)

    def _target(self, pl_module: LightningModule) -> nn.Module:
        if self._module is not None:
            try:
                return pl_module.get_submodule(self._module)
            except AttributeError as error:
                raise ValueError(f"module must be a submodule of the LightningModule, got {self._module!r}") from error
        trained = [child for child in pl_module.children() if any(p.requires_grad for p in child.parameters())]
        loose = any(p.requires_grad for p in pl_module.parameters(recurse=False))
        return trained[0] if len(trained) == 1 and not loose else pl_module
