"""FreezeOut: the one place where schedule, layers and optimizer meet."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .attach import pin, unpin
from .checks import DDPCheck, OrderCheck, bare, check_optimizer, warn_if_beyond_limit
from .layers import Layer, Layers, find_layers
from .param_groups import join_groups, let_scaler_skip, set_rate, split_groups
from .prefix import Prefix, PrefixReport
from .schedule import Schedule

logger = logging.getLogger("freezeout_ext")


@dataclass(frozen=True)
class Transition:
    """One moment at which layers froze: the step, what froze, and what it freed (bytes of optimizer state)."""

    step: int
    num_frozen: int
    layers: tuple[str, ...]
    parameters_frozen: int
    state_bytes_freed: int
    seconds: float


class FreezeOut:
    """lr_i(step) = base_lr * lr_factor(i, step) for each layer i, which is frozen once step >= t_i * total_steps.

    Call `step()` once after each `optimizer.step()` (under gradient accumulation: once per optimizer step). A frozen
    layer no longer needs gradients, has no `.grad` and no optimizer state, and its modules stay in eval mode, also
    after `model.train()`. Its param groups stay in `optimizer.param_groups` with `lr=0` and `frozen=True`.

    The optimizer's groups are split in place, one for each layer in each group, all hyperparameters kept. So an LR
    scheduler, and a state to load, come after FreezeOut.

    Args:
        model: where the layers are found (the bare module: not the DistributedDataParallel around it).
        optimizer: any torch optimizer, or several of them, over all trainable parameters of the model; others in it
            train to the end.
        total_steps, t_0, how_scale, warmup_steps, max_transitions: see `Schedule`.
        scale_lr: multiply layer i's rate by 1 / t_i. None: yes, but no for the Adam family, whose steps do not grow
            in proportion to the rate's sum.
        layers: overrides `find_layers`' search, in its form, or `Layers` that it returned.
        anneal: False leaves the rates of active layers to you (an LR scheduler) and only freezes.
        prefix: how the forward of the frozen layers runs: "exact" (the original modules, bit-equal: as one CUDA graph
            on a GPU, as they are on a CPU), "folded" (batch norms folded into weights, error about 1e-6), "bf16",
            "fp16" (the same in half precision), "off" (nothing is installed). See `prefix_report()`.
        measure_prefix: False uses each checked engine without timing it against the modules, so that the path does not
            depend on the clock: two runs from one seed then give bit-identical weights in every mode.

    Raises:
        ValueError, TypeError: an argument is out of its range, a parameter is not in the optimizer, an LR scheduler or
            another FreezeOut holds the optimizer; at the first forward: layers that do not run in their order.

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
        warmup_steps: int = 0,
        max_transitions: int | None = None,
        anneal: bool = True,
        prefix: str = "exact",
        measure_prefix: bool = True,
    ) -> None:
        self.optimizers = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
        for each in self.optimizers:
            check_optimizer(each)
        given, model = model, bare(model)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise TypeError(f"model must be the bare module, got a {type(model).__name__}; pass model.module")
        self.model = model
        self.optimizer = optimizer
        self.anneal = anneal
        self.layers = layers if isinstance(layers, Layers) else find_layers(model, layers)
        self.schedule = Schedule(
            num_layers=len(self.layers),
            total_steps=total_steps,
            t_0=t_0,
            how_scale=how_scale,
            scale_lr=all("betas" not in o.defaults for o in self.optimizers) if scale_lr is None else scale_lr,
            warmup_steps=warmup_steps,
            max_transitions=max_transitions,
        )
        self._prefix = Prefix(model, self.layers, mode=prefix, measure=measure_prefix)
        warn_if_beyond_limit(given, self.schedule)
        self.step_count = 0
        self.num_frozen = 0
        self._closed = False
        self.transitions: list[Transition] = []
        self._transition_hooks: dict[int, Callable[[FreezeOut, Transition], None]] = {}
        self._layer_of = {p: i for i, layer in enumerate(self.layers) for p in layer.parameters.values()}
        self._unsplit = split_groups(self.optimizers, self._layer_of, self.layers)
        self._on_load = [o.register_load_state_dict_post_hook(lambda _: self._adopt_groups()) for o in self.optimizers]
        self._order = OrderCheck(model, self.layers)
        self._ddp_check = DDPCheck(model)
        self._adopt_groups()

    def __repr__(self) -> str:
        return (
            f"FreezeOut(step {self.step_count} of {self.schedule.total_steps}, "
            f"{self.num_frozen} of {len(self.layers)} layers frozen, t_0={self.schedule.t_0}, "
            f"how_scale={self.schedule.how_scale!r}, scale_lr={self.schedule.scale_lr})"
        )

    def step(self) -> None:
        """Counts one optimizer step, freezes the layers that are due and sets the next learning rates.

        A transition happens whole or, where something in it raises, not at all, and the step is not counted.
        """
        if self._closed:
            raise RuntimeError("step() must not be called after close()")
        self._order.close()
        step = self.step_count + 1
        due = self.schedule.num_frozen(step)
        if due > self.num_frozen:
            self._freeze(due, step)
        if step == self.schedule.total_steps + 1:
            warnings.warn(
                f"step {step} is beyond total_steps={self.schedule.total_steps}: the learning rates are 0", stacklevel=2
            )
        self.step_count = step
        self._set_learning_rates()

    def learning_rates(self) -> list[float]:
        """lr_i(step) of each layer, 0 where frozen (of its first param group, where it has several)."""
        rates: dict[int, float] = {}
        for group in self._groups():
            rates.setdefault(group["layer"], float(group["lr"]))
        return [rates[i] for i in range(len(self.layers))]

    def register_transition_hook(self, hook: Callable[["FreezeOut", Transition], None]) -> Callable[[], None]:
        """Calls hook(freezeout, transition) at the end of each transition; if it raises, nothing was frozen.

        Returns: a function that removes the hook.
        """
        key = max(self._transition_hooks, default=0) + 1
        self._transition_hooks[key] = hook

        def remove() -> None:
            self._transition_hooks.pop(key, None)

        return remove

    def skip_order_check(self) -> None:
        """Leaves it to the caller that the layers run in their order: compiled layers cannot be watched."""
        self._order.close()

    def prefix_report(self) -> PrefixReport:
        """What runs the frozen layers' forward now: route, what was fused, what fell back and why, error, time."""
        return self._prefix.report()

    @property
    def prefix_is_settled(self) -> bool:
        """Whether the frozen layers' forward stays as it is until the next transition: captured, checked, timed."""
        return self._prefix.is_settled

    def state_dict(self) -> dict:
        """The step, what it is a step of, and the log of transitions; plain containers."""
        return {
            "step": self.step_count,
            "schedule": asdict(self.schedule),
            "layers": [layer.name for layer in self.layers],
            # A tuple: torch.distributed.checkpoint takes a list of dicts apart and then wants as many to load into.
            "transitions": tuple(asdict(transition) for transition in self.transitions),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Freezes (or thaws) to the state's step; before or after the optimizer's own state is loaded.

        Raises:
            ValueError: the state is of another schedule or other layers; nothing was changed.
        """
        found, expected = state_dict["schedule"], asdict(self.schedule)
        for name in expected:
            if found.get(name) != expected[name]:
                raise ValueError(
                    f"state_dict must be of the same schedule, {name} is {found.get(name)!r} there, "
                    f"{expected[name]!r} here"
                )
        names = [layer.name for layer in self.layers]
        if state_dict["layers"] != names:
            raise ValueError(f"state_dict must be of the same layers, got {state_dict['layers']}, here {names}")
        due = self.schedule.num_frozen(state_dict["step"])
        if due:
            # The run that was saved has shown the order, and some frozen modules compute otherwise under hooks.
            self._order.close()
        if due > self.num_frozen:
            self._freeze(due, state_dict["step"])
        else:
            self._thaw(due)
        self.step_count = state_dict["step"]
        self.transitions = [Transition(**{**t, "layers": tuple(t["layers"])}) for t in state_dict["transitions"]]
        self._set_learning_rates()

    def close(self) -> None:
        """Gives model and optimizer back as they came: all layers trainable, groups whole, rates at their base."""
        if self._closed:
            return
        self._order.close()
        self._ddp_check.close()
        for handle in self._on_load:
            handle.remove()
        self._thaw(0)
        for optimizer, unsplit in zip(self.optimizers, self._unsplit, strict=True):
            join_groups(optimizer, unsplit)
        self._closed = True

    # The transition

    def _freeze(self, num_frozen: int, step: int) -> None:
        start = time.perf_counter()
        layers = self.layers[self.num_frozen : num_frozen]
        with ExitStack() as undo:
            freed = sum(self._freeze_layer(layer, undo) for layer in layers)
            for group in self._groups():
                undo.callback(set_rate, group, float(group["lr"]))
            undo.callback(self._set_group_flags, self.num_frozen)
            self._set_group_flags(num_frozen)
            undo.callback(setattr, self, "num_frozen", self.num_frozen)
            self.num_frozen = num_frozen
            self._ddp_check.watch()
            undo.callback(self._prefix.freeze, self._prefix.num_frozen)
            self._prefix.freeze(num_frozen)
            transition = Transition(
                step=step,
                num_frozen=num_frozen,
                layers=tuple(layer.name for layer in layers),
                parameters_frozen=sum(layer.num_parameters for layer in layers),
                state_bytes_freed=freed,
                seconds=time.perf_counter() - start,
            )
            for hook in list(self._transition_hooks.values()):
                hook(self, transition)
            undo.pop_all()
        self.transitions.append(transition)
        logger.info(
            "step %d: froze %s; %d of %d layers frozen, %d parameters, %d bytes of optimizer state freed",
            step, ", ".join(transition.layers), num_frozen, len(self.layers), transition.parameters_frozen, freed,
        )  # fmt: skip

    def _freeze_layer(self, layer: Layer, undo: ExitStack) -> int:
        """Freezes one layer, registers how to undo it, and returns the bytes of optimizer state it freed."""
        freed = 0
        for p in layer.parameters.values():
            undo.callback(_restore_parameter, p, p.grad)
            p.grad = None
            p.requires_grad_(False)
            for optimizer in self.optimizers:
                state = optimizer.state.pop(p, None)
                if state is not None:
                    undo.callback(optimizer.state.__setitem__, p, state)
                    freed += sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
        for module in layer.submodules:
            undo.callback(unpin, module, module.training)
            pin(module)
        return freed

    def _thaw(self, num_frozen: int) -> None:
        self._prefix.freeze(num_frozen)
        for layer in self.layers[num_frozen : self.num_frozen]:
            for p in layer.parameters.values():
                p.requires_grad_(True)
            for module in layer.submodules:
                unpin(module, self.model.training)
        for group in self._groups():
            if num_frozen <= group["layer"] < self.num_frozen:
                set_rate(group, group["base_lr"])
        self.num_frozen = num_frozen
        self._set_group_flags(num_frozen)

    # The optimizers' groups

    def _groups(self) -> Iterator[dict]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups

    def _adopt_groups(self) -> None:
        """Marks each group with its layer and base rate, also after a state was loaded, and frees frozen state."""
        for group in self._groups():
            group["layer"] = self._layer_of.get(next(iter(group["params"]), None), len(self.layers) - 1)
            group.setdefault("base_lr", float(group["lr"]))
        for layer in self.layers[: self.num_frozen]:
            for p in layer.parameters.values():
                for optimizer in self.optimizers:
                    optimizer.state.pop(p, None)
        self._set_group_flags(self.num_frozen)
        self._set_learning_rates()

    def _set_group_flags(self, num_frozen: int) -> None:
        for group in self._groups():
            group["frozen"] = group["layer"] < num_frozen
            if group["frozen"]:
                set_rate(group, 0.0)
        for optimizer in self.optimizers:
            let_scaler_skip(optimizer)

    def _set_learning_rates(self) -> None:
        step, factor_of = self.step_count, self.schedule.lr_factor
        factors = [factor_of(i, step) for i in range(len(self.layers))]
        for group in self._groups():
            if "base_lr" not in group:  # add_param_group
                return self._adopt_groups()
            if self.anneal or group["frozen"]:
                set_rate(group, group["base_lr"] * factors[group["layer"]])


def _restore_parameter(p: nn.Parameter, grad: Tensor | None) -> None:
    p.requires_grad_(True)
    p.grad = grad
