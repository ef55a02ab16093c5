"""What FreezeOut refuses or warns of: arguments, the optimizer, DDP, a model compiled as a whole."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from .arguments import check_kind
from .attach import TransientHook
from .layers import Layers, find_layers
from .param_groups import GROUP_KEYS
from .schedule import Schedule


def checked_model(model: nn.Module) -> nn.Module:
    """The module whose layers are to freeze: the one inside torch.compile(model)."""
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    model = bare(model)
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "model must not be an nn.DataParallel: its replicas would run without what is frozen; use "
            "torch.nn.parallel.DistributedDataParallel (freezeout_ext.integrations.distributed), or pass model.module "
            "and train on one device"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(f"model must be the bare module, got a {type(model).__name__}; pass model.module")
    return model


def checked_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    schedulers: Sequence[LRScheduler] = (),
) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers as a tuple; none may have an LR scheduler but `schedulers`."""
    optimizers = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    if not optimizers:
        raise ValueError("optimizer must be an optimizer or several, got none")
    holder: dict[nn.Parameter, int] = {}
    for i, each in enumerate(optimizers):
        check_optimizer(each)
        if _has_scheduler(each) and not any(getattr(s, "optimizer", None) is each for s in schedulers):
            raise ValueError(
                "optimizer must not have an LR scheduler yet: FreezeOut splits its groups; attach the scheduler after "
                "FreezeOut(..., anneal=False), or pass schedulers=[...] too"
            )
        if any(each is other for other in optimizers[:i]):
            raise ValueError(f"optimizer must hold each optimizer once, got the same {type(each).__name__} twice")
        for group in each.param_groups:
            for p in group["params"]:
                if holder.setdefault(p, i) != i:
                    raise ValueError(
                        f"optimizer must hold each parameter once, optimizers {holder[p]} and {i} share one of shape "
                        f"{tuple(p.shape)}"
                    )
    return optimizers


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if any(GROUP_KEYS[0] in group for group in optimizer.param_groups):
        raise ValueError("optimizer must not be held by another FreezeOut; call its close() first")
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise TypeError(
            "optimizer must not be a ZeroRedundancyOptimizer: it deals out parameters and groups to the ranks once, at "
            "its construction, so frozen ones would keep their place and a rank could be left with none that train; "
            "shard with torch.distributed.fsdp.fully_shard, which follows each transition"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer must take several param groups, LBFGS reads only the first")


class SchedulerConflict(UserWarning):
    """An LR scheduler beside a FreezeOut that sets the rates: raised, unless a filter of `warnings` says otherwise."""


def warn_of_schedulers(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether an LR scheduler was attached. Raises or warns `SchedulerConflict` then."""
    found = any(map(_has_scheduler, optimizers))
    if found:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SchedulerConflict, append=True)  # behind the user's own filters
            warnings.warn(
                "an LR scheduler was attached to the optimizer, but FreezeOut sets the learning rates itself, and its "
                "rates are used: pass anneal=False to FreezeOut and keep the scheduler, or leave the scheduler out",
                SchedulerConflict,
                stacklevel=3,
            )
    return found


def _has_scheduler(optimizer: torch.optim.Optimizer) -> bool:
    # torch.optim.lr_scheduler wraps step() to notice a wrong order of calls.
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def checked_layers(model: nn.Module, layers: Layers | Sequence | None) -> Layers:
    if not isinstance(layers, Layers):
        return find_layers(model, layers)
    inside = set(model.parameters())
    for i, layer in enumerate(layers):
        if not inside.issuperset(layer.parameters.values()):
            raise ValueError(
                f"layers must be of this model, layer {i} ({layer.name}) holds parameters that are not in it"
            )
    return layers


class Cache(Protocol):
    """What keeps the outputs of the frozen layers, so that these need not run (features.FeatureCache)."""

    def attach(self, freezeout: Any) -> None:
        """Called once, at the end of FreezeOut's construction: layers that start frozen are frozen already."""

    def detach(self) -> None:
        """Called by FreezeOut.close()."""

    def state_dict(self) -> dict:
        """What the kept outputs are of; what lies in a folder is on disk when this returns."""

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises ValueError where the state is of something else."""

    @property
    def takes_part(self) -> bool:
        """Whether a forward now would read or keep outputs. A GraphedStep asks."""

    def rows(self) -> tuple[Tensor, ...] | None:
        """What a forward now reads, gathered; None where it must run on its own."""

    def given(self, rows: tuple[Tensor, ...]) -> AbstractContextManager[None]:
        """Inside, forwards run on these rows."""


def checked_cache(cache: Cache | None) -> Cache | None:
    """The cache, if it is one, or None."""
    missing = [name for name in ("attach", "detach", "takes_part", "rows", "given") if not hasattr(type(cache), name)]
    if cache is not None and missing:
        raise TypeError(f"cache must be a FeatureCache or None, got {type(cache).__name__} without {missing[0]}")
    return cache


def warn_of_given(layers: Layers) -> None:
    """Says which layers change their way of computing because they came frozen and now run in eval mode."""
    changed = [layer.name for layer in layers.given if any(map(_depends_on_mode, layer.submodules))]
    if changed:
        warnings.warn(
            f"{', '.join(changed)} came with requires_grad=False and belong to the frozen prefix: from now on they run "
            "in eval mode (batch norms on their running statistics, no dropout); to leave them in training mode pass "
            "layers=[...] without them",
            stacklevel=3,
        )


def _depends_on_mode(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0


class DDPCheck:
    """Raises in the forward pass where DDP's reducer was built for other parameters than those that train now.

    Such a reducer leaves buckets unreduced without a word. Outside of a process group nothing is watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle: RemovableHandle | None = None
        self._verified: object = None  # the reducer that was seen to be right

    def watch(self) -> None:
        """To be called at each transition."""
        self._verified = None
        if self._handle is None and dist.is_available() and dist.is_initialized():
            self._handle = self._model.register_forward_pre_hook(TransientHook(self._check))

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        was_open = self._handle is not None
        self.close()
        try:
            yield
        finally:
            if was_open:
                self.watch()

    def _check(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        ddp = nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if ddp is None or not torch.is_grad_enabled() or ddp.reducer is self._verified:
            return
        wrapped = ddp._get_ddp_logging_data()["num_parameter_tensors"]
        active = sum(
            p.requires_grad and name not in ddp.parameters_to_ignore for name, p in ddp.module.named_parameters()
        )
        if wrapped != active:
            raise RuntimeError(
                f"DistributedDataParallel must be wrapped again after a transition: it was built for {wrapped} "
                f"parameters and {active} train now, the ranks would diverge; "
                "use freezeout_ext.integrations.distributed.DDPFollower(freezeout)"
            )
        self._verified = ddp.reducer


def bare(model: nn.Module) -> nn.Module:
    """The module inside torch.compile(model), whose names and parameters are those to freeze."""
    return getattr(model, "_orig_mod", model)


def warn_if_beyond_limit(model: nn.Module, schedule: Schedule) -> None:
    """Warns where a compiled model needs more graphs than torch makes before it gives up: one a transition."""
    if model is bare(model) and getattr(model, "_compiled_call_impl", None) is None:
        return
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    graphs = 1 + len({schedule.num_frozen(schedule.milestone(i)) for i in range(schedule.num_layers)} - {0})
    if graphs > limit:
        warnings.warn(
            f"the model is compiled as a whole: {graphs} sets of frozen layers need a graph each, and torch turns it "
            f"eager for good after {limit} (torch._dynamo.config.recompile_limit); pass max_transitions={limit - 2} "
            "or less, or compile layer by layer with freezeout_ext.integrations.compile.CompiledLayers(freezeout)",
            stacklevel=3,
        )
