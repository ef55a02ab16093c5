"""The processes of one run: which of them this is, its part of each batch, and the model that talks to the others."""

import datetime
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..freezeout import FreezeOut
from ..integrations.distributed import DDPFollower
from .config import TrainConfig

# Of a collective: a rank that is waited for longer is lost. Evaluation on the first rank alone must fit in.
TIMEOUT = datetime.timedelta(minutes=15)


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `world`. Without a process group it is the only one."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check(self, config: TrainConfig) -> None:
        if self.world == 1:
            return
        if config.batch_size % self.world:
            raise ValueError(
                f"batch_size must be a multiple of the {self.world} processes that share it, got {config.batch_size}"
            )
        for name in ("graph", "compile"):
            if getattr(config, name):
                raise ValueError(f"{name} must be off with several processes")

    def sum(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait_for_all(self) -> None:
        if self.world > 1:
            dist.barrier()

    def wrapped(self, model: nn.Module, freezeout: FreezeOut | None) -> tuple[nn.Module, DDPFollower | None]:
        """The model whose backward averages over the ranks, and what keeps it right at each transition."""
        if self.world == 1:
            return model, None
        ddp = nn.parallel.DistributedDataParallel(model)
        return ddp, None if freezeout is None else DDPFollower(freezeout, ddp)


@contextmanager
def ranks_of_torchrun(device: str | None) -> Iterator[Ranks]:
    """The process group that torchrun's environment describes, on `device` ("auto": CUDA where there is one)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    cuda = device == "cuda" or (device in (None, "auto") and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    yield Ranks(dist.get_rank(), world)
    gc.collect()  # gloo may abort at exit while a reducer lives
    dist.destroy_process_group()
