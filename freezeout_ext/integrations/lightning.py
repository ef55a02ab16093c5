"""FreezeOut in Lightning: Trainer(callbacks=[FreezeOutCallback(t_0=0.5)])."""

import math
from typing import Any

from torch import nn

from ..freezeout import FreezeOut
from . import follow_if_distributed

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "freezeout_ext.integrations.lightning needs Lightning: pip install freezeout_ext[lightning]"
    ) from error


class FreezeOutCallback(Callback):
    """freezeout.step() once for each optimizer step of the Trainer, resumed from the Trainer's own checkpoints.

    `configure_optimizers` returns optimizers without an LR scheduler: FreezeOut anneals each layer on its own.
    total_steps is what the Trainer will run (max_steps, or max_epochs of its loader), unless given.

    Args:
        module: name of the submodule of the LightningModule whose layers to freeze; None: its only child with
            trainable parameters, or else the LightningModule itself.
        arguments: of FreezeOut (t_0, how_scale, layers, ...).

    Attributes:
        freezeout: the FreezeOut, from on_fit_start on.
    """

    def __init__(self, *, module: str | None = None, **arguments: Any) -> None:
        self.freezeout: FreezeOut | None = None
        self._module = module
        self._arguments = arguments
        self._state: dict | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The optimizers exist and their state is not yet loaded, which needs the split groups.
        if any(config.scheduler is not None for config in trainer.lr_scheduler_configs):
            raise ValueError(
                "configure_optimizers must return no LR scheduler: FreezeOut gives each layer a cosine of its own"
            )
        total_steps = self._arguments.get("total_steps", trainer.estimated_stepping_batches)
        if not math.isfinite(total_steps):
            raise ValueError("the Trainer must have max_steps or max_epochs, or the callback total_steps: got neither")
        if self.freezeout is not None:
            self.freezeout.close()
        arguments = {**self._arguments, "total_steps": int(total_steps)}
        self.freezeout = FreezeOut(self._target(pl_module), trainer.optimizers, **arguments)
        if self._state is not None:
            self.freezeout.load_state_dict(self._state)
            self._state = None
        follow_if_distributed(self.freezeout)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # global_step counts the steps of all optimizers.
        while self.freezeout.step_count < trainer.global_step // len(trainer.optimizers):
            self.freezeout.step()

    def state_dict(self) -> dict:
        return self.freezeout.state_dict() if self.freezeout else {}

    def load_state_dict(self, state_dict: dict) -> None:
        self._state = state_dict or None

    def _target(self, pl_module: LightningModule) -> nn.Module:
        if self._module is not None:
            return pl_module.get_submodule(self._module)
        trained = [child for child in pl_module.children() if any(p.requires_grad for p in child.parameters())]
        loose = any(p.requires_grad for p in pl_module.parameters(recurse=False))
        return trained[0] if len(trained) == 1 and not loose else pl_module
