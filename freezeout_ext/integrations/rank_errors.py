"""Ranks that disagree, and ranks that are gone: said in a sentence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch.distributed as dist

from ..freezeout import FreezeOut
from . import in_process_group


class LostRank(RuntimeError):
    """Another process of the run is gone, or no longer does what this one does."""


def check_same_on_all_ranks(freezeout: FreezeOut, group: dist.ProcessGroup | None = None) -> None:
    """Raises ValueError, on every rank, unless schedule, layers and step are those of rank 0: what freezes when."""
    mine = {
        **asdict(freezeout.schedule),
        "layers": len(freezeout.layers),
        "step": freezeout.step_count,
        "num_frozen": freezeout.num_frozen,
    }
    every: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group=group)
    for rank, other in enumerate(every):
        for name in mine:
            if other[name] != every[0][name]:
                raise ValueError(
                    f"{name} must be the same on all ranks, rank 0 has {every[0][name]!r}, rank {rank} {other[name]!r}"
                )


@contextmanager
def lost_rank_explained(step: Callable[[], int]) -> Iterator[None]:
    """Turns what a collective raises when a peer died into LostRank, whose message names the step."""
    try:
        yield
    except RuntimeError as error:
        if in_process_group() and any(text in str(error) for text in _LOST):
            raise LostRank(
                f"lost contact with another rank in step {step()}: it ended, or hangs; its own output "
                "says why. Start all ranks again from the last checkpoint"
            ) from error
        raise


# gloo, then NCCL
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL", "aborted")
