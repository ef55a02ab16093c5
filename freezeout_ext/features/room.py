"""Room: how many bytes a device, the host or a disk has left for features."""

import shutil
from pathlib import Path

import torch

# The part of free memory that may be taken. The rest is left to the model and the batches.
SHARE = 0.8


def room_for(needed: int, device: torch.device, folder: Path | None, limit: int | None, taken: int) -> int:
    """-> bytes that may be taken, at most `needed`. Bytes that were `taken` already count against the limit."""
    if limit is not None:
        return max(0, min(needed, limit - taken))
    return min(needed, int(SHARE * _free(device, folder)))


def _free(device: torch.device, folder: Path | None) -> int:
    if folder is not None:
        return shutil.disk_usage(folder).free
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
