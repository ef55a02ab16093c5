"""An optimizer's param groups: split into one a layer, joined again, their learning rates set, their state freed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .arguments import check_kind
from .layers import Layers

# What FreezeOut adds to each group.
GROUP_KEYS = ("layer", "base_lr", "frozen")


def set_rate(group: dict, rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class ParamGroups:
    """The groups of one or several optimizers: group g of layer i holds the parameters of both, with a rate of its own.

    Args:
        optimizers: whose groups are split in place. Parameters of no layer go with the last one.
        layers: what each group is split by.
        schedulers: LR schedulers attached to these optimizers, told of the split.

    Attributes:
        layer_of: parameter -> index of its layer.

    Raises:
        ValueError: a trainable parameter is in none of the optimizers; nothing was changed.
        TypeError: nothing is known about the lists of a scheduler; nothing was changed.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], layers: Layers, schedulers: Sequence[LRScheduler] = ()
    ) -> None:
        self.layer_of = {p: i for i, layer in enumerate(layers) for p in layer.parameters.values()}
        self._optimizers, self._layers = optimizers, layers
        self._num_frozen = 0
        self._set_aside: list[tuple[torch.optim.Optimizer, nn.Parameter, dict]] = []
        self._unsplit = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        held = {p for groups in self._unsplit for params in groups for p in params}
        for i, layer in enumerate(layers):
            for name, p in layer.parameters.items():
                if p not in held:
                    raise ValueError(f"optimizer must hold every trainable parameter, {name} of layer {i} is not in it")
        for scheduler in schedulers:
            check_scheduler(scheduler)
        self._schedulers = schedulers
        self._on_load: list = []
        for optimizer in optimizers:
            origin = self._split(optimizer)
            for scheduler in self._of(optimizer):
                _pick_lists(scheduler, len(set(origin)), origin)

    def __iter__(self) -> Iterator[dict]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    def watch_loads(self, loaded: Callable[[], None]) -> None:
        """Calls loaded() after each load_state_dict of an optimizer."""
        self._on_load = [o.register_load_state_dict_post_hook(lambda _: loaded()) for o in self._optimizers]

    def adopt(self) -> None:
        """Marks each group with its layer and base rate, at first and after a state was loaded.

        A loaded state of a layer that is frozen now is set aside: FreezeOut's own state may be loaded next, and thaw
        the layer.
        """
        for group in self:
            first: Any = next(iter(group["params"]), None)
            group["layer"] = self.layer_of.get(first, len(self._layers) - 1)
            group.setdefault("base_lr", float(group["lr"]))
        self._set_aside.clear()
        for p, i in self.layer_of.items():
            if i < self._num_frozen:
                for optimizer in self._optimizers:
                    if (state := optimizer.state.pop(p, None)) is not None:
                        self._set_aside.append((optimizer, p, state))
        self.set_frozen(self._num_frozen)

    def give_back_set_aside(self) -> None:
        """FreezeOut's state was loaded. Layers that it thawed get the optimizer's state that was loaded before."""
        for optimizer, p, state in self._set_aside:
            if self.layer_of[p] >= self._num_frozen:
                optimizer.state.setdefault(p, state)
        self.forget_set_aside()

    def forget_set_aside(self) -> None:
        self._set_aside.clear()

    def set_frozen(self, num_frozen: int, undo: ExitStack | None = None) -> None:
        """group["frozen"] = layer < num_frozen; a frozen group's rate is 0.

        A group that is thawed gets its base rate times the last layer's rate over the last layer's base rate.

        Args:
            undo: what is called to take this back.
        """
        self._adopt_new()
        if undo is not None:
            for group in self:
                undo.callback(set_rate, group, float(group["lr"]))
            undo.callback(self.set_frozen, self._num_frozen)
        self._num_frozen = num_frozen
        last = [group for group in self if group["layer"] == len(self._layers) - 1]
        scale = next((float(g["lr"]) / g["base_lr"] for g in last if g["base_lr"] and not g.get("frozen")), 1.0)
        for group in self:
            was, group["frozen"] = group.get("frozen", False), group["layer"] < num_frozen
            if group["frozen"]:
                set_rate(group, 0.0)
            elif was:
                set_rate(group, group["base_lr"] * scale)
        for optimizer in self._optimizers:
            let_scaler_skip(optimizer)

    def set_factors(self, factors: Sequence[float]) -> None:
        """lr = base_lr * factors[layer]."""
        self._adopt_new()
        for group in self:
            set_rate(group, group["base_lr"] * factors[group["layer"]])

    def keep_frozen_at_zero(self) -> None:
        """An LR scheduler writes to the groups of frozen layers too."""
        self._adopt_new()
        for group in self:
            if group["frozen"]:
                set_rate(group, 0.0)

    def _adopt_new(self) -> None:
        """add_param_group may have been called since."""
        for group in self:
            if "base_lr" not in group:
                return self.adopt()

    def rates(self) -> list[float]:
        """The rate of each layer's first group."""
        rates: dict[int, float] = {}
        for group in self:
            rates.setdefault(group["layer"], float(group["lr"]))
        return [rates[i] for i in range(len(self._layers))]

    def join(self) -> None:
        """Undoes the split: groups whole, at their base rates; those added since stay."""
        for handle in self._on_load:
            handle.remove()
        for optimizer, unsplit in zip(self._optimizers, self._unsplit, strict=True):
            groups = optimizer.param_groups
            place_of = {p: i for i, group in enumerate(groups) for p in group["params"]}
            split = {place_of[p] for params in unsplit for p in params}
            whole = {place_of[params[0]]: params for params in unsplit if params}
            whole |= {i: group["params"] for i, group in enumerate(groups) if i not in split}  # added since
            joined = [{**groups[i], "params": params} for i, params in whole.items()]
            for scheduler in self._of(optimizer):
                _pick_lists(scheduler, len(groups), list(whole))
            for group in joined:
                set_rate(group, group.get("base_lr", group["lr"]))
                for key in GROUP_KEYS:
                    group.pop(key, None)
            optimizer.param_groups[:] = joined

    def _of(self, optimizer: torch.optim.Optimizer) -> Iterator[LRScheduler]:
        return (scheduler for scheduler in self._schedulers if scheduler.optimizer is optimizer)

    def _split(self, optimizer: torch.optim.Optimizer) -> list[int]:
        """Splits the groups in place; returns for each new one the place of the group that it was in."""
        split, origin = [], []
        for i_group, group in enumerate(optimizer.param_groups):
            parts: dict[int, list] = {}
            for p in group["params"]:
                parts.setdefault(self.layer_of.get(p, len(self._layers) - 1), []).append(p)
            for i in sorted(parts):
                part = {**group, "params": parts[i]}
                if isinstance(group["lr"], Tensor):
                    part["lr"] = group["lr"].clone()
                split.append(part)
                origin.append(i_group)
        optimizer.param_groups[:] = split
        return origin


# What torch's schedulers hold for each group.
_LISTS = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def check_scheduler(scheduler: LRScheduler) -> None:
    """Raises TypeError where a scheduler holds lists of which nothing is known: one might have an entry a group."""
    check_kind("schedulers", scheduler, LRScheduler, "torch LR schedulers")
    if type(scheduler).__module__ != "torch.optim.lr_scheduler":
        size = len(scheduler.optimizer.param_groups)
        unknown = [k for k, v in vars(scheduler).items() if isinstance(v, list) and k not in _LISTS and len(v) == size]
        if unknown:
            raise TypeError(
                f"schedulers must be of torch.optim.lr_scheduler, or attached after FreezeOut: {', '.join(unknown)} of "
                f"{type(scheduler).__name__} may have an entry for each param group, which FreezeOut splits"
            )
    for inner in getattr(scheduler, "_schedulers", ()):
        check_scheduler(inner)


def _pick_lists(scheduler: LRScheduler, size: int, places: list[int]) -> None:
    """list[k] -> list[places[k]] for each list of a scheduler with an entry for each of `size` groups."""
    for name in _LISTS:
        value = vars(scheduler).get(name)
        if isinstance(value, list) and len(value) == size:
            setattr(scheduler, name, [value[i] for i in places])
    for inner in getattr(scheduler, "_schedulers", ()):
        _pick_lists(inner, size, places)


def let_scaler_skip(optimizer: torch.optim.Optimizer) -> None:
    """GradScaler.step fails if it checked no gradient, unless the optimizer says that it sees to infinities itself.

    An optimizer whose parameters are all frozen has no gradient and nothing to update. So while it is idle it says so.
    """
    marked: Any = optimizer  # whose class declares none of these attributes
    idle = all(group["frozen"] for group in optimizer.param_groups)
    if idle and not hasattr(optimizer, "_was_amp_aware"):
        marked._was_amp_aware = getattr(optimizer, "_step_supports_amp_scaling", False)
        marked._step_supports_amp_scaling = True
        marked._forget_inf = optimizer.register_step_pre_hook(_forget_inf)
    elif not idle and hasattr(optimizer, "_was_amp_aware"):
        marked._step_supports_amp_scaling = marked._was_amp_aware
        marked._forget_inf.remove()
        del marked._was_amp_aware, marked._forget_inf


def _forget_inf(optimizer: Any, *_: object) -> None:
    # torch's loops refuse the sum over no devices that GradScaler sets.
    if hasattr(optimizer, "found_inf"):
        optimizer.found_inf = optimizer.grad_scale = None
