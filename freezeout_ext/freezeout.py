"""FreezeOut: the one place where schedule, layers and optimizer meet."""

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from .arguments import check_callable, check_flag, check_kind
from .checks import (
    Cache,
    DDPCheck,
    checked_cache,
    checked_layers,
    checked_model,
    checked_optimizers,
    warn_if_beyond_limit,
    warn_of_given,
    warn_of_schedulers,
)
from .layers import Layers
from .order import OrderCheck
from .param_groups import ParamGroups
from .prefix import Prefix
from .readings import Readings
from .schedule import Schedule
from .state import checked_state, due, state_of
from .transition import FrozenLayers, Transition

logger = logging.getLogger("freezeout_ext")


class FreezeOut(Readings):
    """lr_i(step) = base_lr * lr_factor(i, step) for each layer i, which is frozen once step >= t_i * total_steps.

    Call `step()` once after each `optimizer.step()`; under gradient accumulation, once per optimizer step.

    A frozen layer needs no gradient. Its `.grad` and its optimizer state are freed. Its modules stay in eval mode until
    `close()`, also after `model.train()`. Its param groups stay in the optimizer with `lr=0` and `frozen=True`.

    The optimizer's groups are split in place: one group for each layer, with all hyperparameters of the group that it
    came from. So load the optimizer's state after FreezeOut is made. An LR scheduler comes after FreezeOut too, and
    needs `anneal=False`.

    What is frozen follows from the step and the last `freeze_to` or `thaw_to`. A layer that was thawed by hand trains
    at the rate of the first layer that the rule has not frozen, starts without momentum, and freezes with that layer.
    Layers in front that came with requires_grad=False are part of the frozen prefix (`layers.given`).

    Args:
        model: the bare module, not the DistributedDataParallel around it.
        optimizer: any torch optimizer, or several. They hold all trainable parameters of the model; others train to
            the end.
        total_steps: optimizer steps of the whole run.
        t_0: see `Schedule`.
        how_scale: see `Schedule`.
        scale_lr: multiply layer i's rate by 1 / t_i. None: no for the Adam family, whose steps do not grow in
            proportion to the rate's sum; yes for others.
        layers: what to take for layers: a list in the form of `find_layers`, or `Layers` that `find_layers` returned.
        start_frozen: so many layers are frozen before the first step; or the layer of that name and all before it.
            Gradients, optimizer state and saved activations never exist for them. The rule counts the others alone.
        milestones: see `Schedule`.
        warmup_steps: see `Schedule`.
        max_transitions: see `Schedule`.
        anneal: False only freezes, and leaves the rates of active layers to you.
        schedulers: LR schedulers that the optimizer has already; needs `anneal=False`. They follow the split groups.
        prefix: how the frozen layers run. "exact": the original modules, bit-equal (on a GPU as one CUDA graph).
            "folded": batch norms folded into weights, an error of about 1e-6. "bf16", "fp16": the same in half
            precision. "off": nothing is installed. See `prefix_report()`.
        measure_prefix: False uses each engine that passed its check without timing it. The path then does not depend
            on the clock: two runs from one seed give bit-identical weights in every mode.
        cache: keeps what the frozen layers give, see `FeatureCache`.

    Raises:
        TypeError, ValueError: an argument is out of its range; a trainable parameter is not in the optimizer; an LR
            scheduler or another FreezeOut holds the optimizer; at the first forward, layers do not run in their order.

    Source: Brock et al. 2017, arXiv 1706.04983.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        total_steps: int,
        t_0: float = 0.8,
        how_scale: str | float = "cubic",
        scale_lr: bool | None = None,
        layers: Layers | Sequence | None = None,
        start_frozen: int | str = 0,
        milestones: Sequence[float] | None = None,
        warmup_steps: int = 0,
        max_transitions: int | None = None,
        anneal: bool = True,
        schedulers: Sequence[LRScheduler] = (),
        prefix: str = "exact",
        measure_prefix: bool = True,
        cache: Cache | None = None,
    ) -> None:
        # First all that can be refused, then all that changes something.
        self.model = checked_model(model)
        self.optimizer = optimizer
        check_flag("anneal", anneal)
        check_kind("schedulers", schedulers, Sequence, "a sequence of LR schedulers")
        if schedulers and anneal:
            raise ValueError("schedulers must be empty where FreezeOut sets the rates: pass anneal=False beside them")
        self.optimizers = checked_optimizers(optimizer, schedulers)
        check_flag("measure_prefix", measure_prefix)
        self.cache = checked_cache(cache)
        self.anneal = anneal
        self.layers = checked_layers(self.model, layers)
        self.schedule = Schedule(
            num_layers=len(self.layers),
            total_steps=total_steps,
            t_0=t_0,
            how_scale=how_scale,
            scale_lr=all("betas" not in o.defaults for o in self.optimizers) if scale_lr is None else scale_lr,
            warmup_steps=warmup_steps,
            max_transitions=max_transitions,
            start_frozen=self.layers.count_through(start_frozen, "start_frozen"),
            milestones=milestones,
        )
        in_prefix = [*self.layers.given, *self.layers]
        self._prefix = Prefix(self.model, in_prefix, mode=prefix, measure=measure_prefix)
        warn_if_beyond_limit(model, self.schedule)
        warn_of_given(self.layers)
        self.step_count = 0
        self.transitions: list[Transition] = []
        self._by_hand: tuple[int, int] | None = None  # step and number of frozen layers of the last move by hand
        self._saved_bytes: int | None = None
        self._closed = False
        self._at_steps: list[RemovableHandle] = []
        self._groups = ParamGroups(self.optimizers, self.layers, schedulers)
        self._order = OrderCheck(self.model, in_prefix)
        self._ddp_check = DDPCheck(self.model)
        self._frozen = FrozenLayers(
            self.model, self.layers, self.optimizers, self._groups, self._prefix, self._ddp_check
        )
        self._groups.watch_loads(self._adopt_groups)
        try:
            self._adopt_groups()
            self._frozen.pin_given()
            self._move_to(due(self.schedule, 0, None), 0)
            if cache is not None:
                cache.attach(self)
        except BaseException:
            self.close()
            raise

    def step(self) -> None:
        """Counts one optimizer step, freezes the layers that are due and sets the next learning rates.

        A transition happens whole or, where something in it raises, not at all, and the step is not counted.

        Raises:
            RuntimeError: after close().
            SchedulerConflict: an LR scheduler was attached although FreezeOut sets the rates.
        """
        self._check_open("step")
        if self.anneal and warn_of_schedulers(self.optimizers) and not self._at_steps:
            # Whatever the scheduler sets, the optimizer steps with FreezeOut's rates.
            self._at_steps = [o.register_step_pre_hook(lambda *_: self._set_learning_rates()) for o in self.optimizers]
        self._order.close()
        self._groups.forget_set_aside()
        step = self.step_count + 1
        num_frozen = due(self.schedule, step, self._by_hand)
        if num_frozen > self.num_frozen:
            self._move_to(num_frozen, step)
        if step == self.schedule.total_steps + 1:
            warnings.warn(
                f"step {step} is beyond total_steps={self.schedule.total_steps}: the learning rates are 0", stacklevel=2
            )
        self.step_count = step
        self._set_learning_rates()

    def freeze_to(self, num_frozen: int | str) -> None:
        """At least the first `num_frozen` layers are frozen from now on: a number, or a layer's name and all before it.

        The same transition as at a milestone, whole or not at all. The last layer never freezes. The rule freezes
        further layers at its next milestone.

        Raises:
            ValueError, TypeError: fewer layers than are frozen now, all layers, or no layer of that name.
        """
        n = self._checked_move("freeze_to", num_frozen)
        if n < self.num_frozen:
            raise ValueError(f"freeze_to must not thaw: {self.num_frozen} layers are frozen, got {n}; use thaw_to({n})")
        self._move_by_hand(n)

    def thaw_to(self, num_frozen: int | str) -> None:
        """Only the first `num_frozen` layers stay frozen: a number, or a layer's name and all before it.

        Thawed layers start without momentum (their optimizer state was freed) and with the gradient of the next
        backward pass. They train at the rate of the first layer that the rule has not frozen, and freeze with it.

        Raises:
            ValueError, TypeError: more layers than are frozen now, or no layer of that name.
        """
        n = self._checked_move("thaw_to", num_frozen)
        if n > self.num_frozen:
            raise ValueError(
                f"thaw_to must not freeze: {self.num_frozen} layers are frozen, got {n}; use freeze_to({n})"
            )
        self._move_by_hand(n)

    def register_transition_hook(self, hook: Callable[["FreezeOut", Transition], None]) -> Callable[[], None]:
        """Calls hook(freezeout, transition) at the end of each transition; if it raises, nothing was frozen or thawed.

        Returns: a function that removes the hook.
        """
        check_callable("hook", hook, "(freezeout, transition)")
        return self._frozen.add_hook(partial(hook, self))

    def skip_order_check(self) -> None:
        """Leaves it to the caller that the layers run in their order: compiled layers cannot be watched."""
        self._order.close()

    # State

    def state_dict(self) -> dict:
        """The step, what it is a step of, the last move by hand, and the log of transitions; plain containers."""
        return state_of(self.step_count, self._by_hand, self.schedule, self.layers, self.transitions)

    def load_state_dict(self, state_dict: dict) -> None:
        """Freezes (or thaws) to the state's step, whole or not at all; before or after the optimizer's own state.

        Raises:
            ValueError, TypeError: the state is damaged, of another schedule or of other layers; nothing was changed.
        """
        self._check_open("load_state_dict")
        step, by_hand, transitions = checked_state(state_dict, self.schedule, self.layers)
        num_frozen = due(self.schedule, step, by_hand)
        self._move_to(num_frozen, step)
        if num_frozen:
            # The saved run verified the order of execution. nn.TransformerEncoderLayer, for one, computes differently
            # in eval mode when it has hooks.
            self._order.close()
        self._groups.give_back_set_aside()
        self.step_count, self._by_hand, self.transitions = step, by_hand, transitions
        self._set_learning_rates()

    def close(self) -> None:
        """Gives model and optimizer back as they came: all layers trainable, groups whole, rates at their base."""
        if self._closed:
            return
        self._closed = True
        for handle in self._at_steps:
            handle.remove()
        if self.cache is not None:
            self.cache.detach()
        self._order.close()
        self._ddp_check.close()
        self._frozen.close()
        self._groups.join()

    # The transition

    def _checked_move(self, argument: str, num_frozen: int | str) -> int:
        self._check_open(argument)
        n = self.layers.count_through(num_frozen, argument)
        if n == len(self.layers):
            raise ValueError(f"{argument} must leave a layer to train, got {num_frozen!r}: all {n} layers")
        return n

    def _move_by_hand(self, num_frozen: int) -> None:
        self._move_to(num_frozen, self.step_count, by_hand=True)
        self._by_hand = (self.step_count, num_frozen)
        self._set_learning_rates()

    def _move_to(self, num_frozen: int, step: int, *, by_hand: bool = False) -> None:
        transition = self._frozen.move_to(num_frozen, step, by_hand=by_hand)
        if transition is not None:
            self.transitions.append(transition)
            logger.info("%s", transition)

    def _check_open(self, name: str) -> None:
        if self._closed:
            raise RuntimeError(f"{name}() must not be called after close()")

    # The optimizers' groups

    def _adopt_groups(self) -> None:
        self._groups.adopt()
        self._set_learning_rates()

    def _set_learning_rates(self) -> None:
        if not self.anneal:
            return self._groups.keep_frozen_at_zero()
        frozen, rule = self.num_frozen, self.schedule.num_frozen(self.step_count)
        factors = self.schedule.lr_factors(self.step_count, start=max(frozen, rule))
        thawed = factors[:1] * (rule - frozen)
        self._groups.set_factors([0.0] * frozen + thawed + factors)
