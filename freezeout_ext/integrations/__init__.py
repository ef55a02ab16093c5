"""FreezeOut inside other trainers: distributed, compile (torch alone), lightning, transformers (their libraries)."""

import torch.distributed as dist

from ..freezeout import FreezeOut


def in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def follow_if_distributed(freezeout: FreezeOut) -> None:
    """A DDPFollower for whatever DistributedDataParallel the trainer around `freezeout` makes."""
    if in_process_group():
        from .distributed import DDPFollower

        DDPFollower(freezeout)
