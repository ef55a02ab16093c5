"""Several processes: DistributedDataParallel follows the transitions, and what a step sends is measured."""

import logging
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..arguments import check_kind
from ..attach import TransientHook
from ..freezeout import FreezeOut
from .rank_errors import LostRank, check_same_on_all_ranks, lost_rank_explained

__all__ = ["DDPFollower", "LostRank", "Traffic", "check_same_on_all_ranks", "lost_rank_explained"]

logger = logging.getLogger("freezeout_ext")


@dataclass(frozen=True)
class Traffic:
    """What one optimizer step hands to the collectives from `step` on, in bytes per rank."""

    step: int
    num_frozen: int
    gradient_bytes: int  # the reducer's buckets
    buffer_bytes: int  # broadcast at each forward


class DDPFollower:
    """sum of the buckets' bytes == bytes of the parameters that still train, also after each transition.

    Where layers froze or were thawed, the module is wrapped again at the top of the next iteration.
    It is wrapped once for several layers, and without the broadcast of DDP's constructor.
    The DistributedDataParallel object stays the same, so that whoever holds it (Accelerate, Lightning, Transformers)
    need not know.
    Buffers of frozen layers are no longer broadcast.

    Args:
        freezeout: of the bare module. Its schedule, layers and step must be the same on all ranks.
        ddp: what wraps the module. None: what is seen to wrap the module at its first forward.

    Attributes:
        traffic: what a step sends, from each transition on.

    Raises:
        TypeError: freezeout or ddp is none.
        ValueError: the ranks were not given the same schedule.
    """

    def __init__(self, freezeout: FreezeOut, ddp: DistributedDataParallel | None = None) -> None:
        check_kind("freezeout", freezeout, FreezeOut, "a FreezeOut")
        check_kind("ddp", ddp, DistributedDataParallel, "a DistributedDataParallel", optional=True)
        self.freezeout = freezeout
        self.traffic: list[Traffic] = []
        self._ignored: set[str] = set()  # as the user had it
        self._ddp: DistributedDataParallel | None = None
        self._num_frozen: int | None = None  # at the last look
        self._remove_hook = freezeout.register_transition_hook(self._sync_frozen)
        if ddp is not None:
            self._attach(ddp)
        else:
            self._handle = freezeout.model.register_forward_pre_hook(TransientHook(self._find), prepend=True)

    def close(self) -> None:
        self._handle.remove()
        self._remove_hook()

    def _find(self, *_: object) -> None:
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None:
            return
        self._handle.remove()
        self._attach(ddp)
        if self._is_due():  # a resumed run; this iteration's forward has begun, its graph has not
            self._wrap_again()
            if ddp.require_backward_grad_sync:
                ddp.reducer.prepare_for_forward()

    def _attach(self, ddp: DistributedDataParallel) -> None:
        check_same_on_all_ranks(self.freezeout, ddp.process_group)
        self._ddp, self._ignored = ddp, set(ddp.parameters_to_ignore)
        self._handle = ddp.register_forward_pre_hook(TransientHook(self._before_forward), prepend=True)
        self._record()

    def _wrapper(self) -> DistributedDataParallel:
        assert self._ddp is not None  # asked for once it is attached
        return self._ddp

    def _is_due(self) -> bool:
        ddp = self._wrapper()
        built_for = ddp._get_ddp_logging_data()["num_parameter_tensors"]
        names = (name for name, p in ddp.module.named_parameters() if p.requires_grad)
        return built_for != sum(name not in ddp.parameters_to_ignore for name in names)

    def _before_forward(self, *_: object) -> None:
        if self._num_frozen != self.freezeout.num_frozen:
            self._num_frozen = self.freezeout.num_frozen
            if self._is_due():
                self._wrap_again()

    def _sync_frozen(self, *_: object) -> None:
        # Each rank's running statistics are its own until the next forward's broadcast, which frozen ones get no more.
        if self._ddp is not None and self._ddp.broadcast_buffers and self._ddp.modules_buffers:
            self._ddp._sync_buffers()

    def _wrap_again(self) -> None:
        """The reducer of DDP(module, init_sync=False), as DDP itself makes it anew when it is unpickled."""
        ddp = self._wrapper()
        ddp.parameters_to_ignore = self._ignored | _frozen_buffers(ddp.module, self.freezeout)
        parameters, sparse = ddp._build_params_for_reducer()
        names = ddp._build_debug_param_to_name_mapping(parameters)
        ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
        ddp._has_rebuilt_buckets = False
        if ddp.static_graph:
            ddp.static_graph = False  # its first iteration is special, and comes again
            ddp._set_static_graph()
        for hook, state in ddp._comm_hooks:
            dist._register_comm_hook(ddp.reducer, state, hook)
        self._record()
        was, now = self.traffic[-2:]
        logger.info(
            "step %d: DDP wrapped again, %d bytes of gradients a step (were %d), %d of buffers (were %d)",
            now.step, now.gradient_bytes, was.gradient_bytes, now.buffer_bytes, was.buffer_bytes,
        )  # fmt: skip

    def _record(self) -> None:
        ddp = self._wrapper()
        buckets = ddp._get_ddp_logging_data()["bucket_sizes"]
        sent = ddp.modules_buffers if ddp.broadcast_buffers else []
        self.traffic.append(
            Traffic(
                step=self.freezeout.step_count,
                num_frozen=self.freezeout.num_frozen,
                gradient_bytes=sum(int(size) for size in buckets.split(",")),
                buffer_bytes=sum(b.numel() * b.element_size() for b in sent),
            )
        )


def _frozen_buffers(module: nn.Module, freezeout: FreezeOut) -> set[str]:
    frozen = {m for layer in freezeout.layers[: freezeout.num_frozen] for m in layer.submodules}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, m in module.named_modules(remove_duplicate=False)
        if m in frozen
        for name, _ in m.named_buffers(recurse=False)
    }
