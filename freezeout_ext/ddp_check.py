"""A DistributedDataParallel that still waits for gradients of frozen layers is an error, not ranks that diverge."""

import torch
import torch.distributed as dist
from torch import nn

from .transient_hook import TransientHook


class DDPCheck:
    """Raises in the forward pass where DDP's reducer was built for other parameters than those that train now.

    Such a reducer leaves buckets unreduced without a word. Nothing is watched outside of a process group.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle = None
        self._verified = None  # the reducer that was seen to be right

    def watch(self) -> None:
        """To be called at each transition."""
        self._verified = None
        if self._handle is None and dist.is_available() and dist.is_initialized():
            self._handle = self._model.register_forward_pre_hook(TransientHook(self._check))

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

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
