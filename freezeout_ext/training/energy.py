"""EnergyMeter: joules that a device's own counter has seen."""

from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap/intel-rapl:0")


class EnergyMeter:
    """joules() = energy since the last call: of the CUDA device (NVML), or of the CPU's first package (RAPL).

    None where the device reports none: NVML needs the package nvidia-ml-py, RAPL a file that may be readable by root
    alone. The counters cover the whole device, other programs on it too.
    """

    def __init__(self, device: torch.device) -> None:
        self._read, self._wrap = _nvml(device) if device.type == "cuda" else _rapl()
        self._last = self._read() if self._read else 0.0

    def joules(self) -> float | None:
        if self._read is None:
            return None
        now = self._read()
        used, self._last = now - self._last, now
        return used if used >= 0 else used + self._wrap


def _nvml(device: torch.device):
    try:
        import pynvml

        pynvml.nvmlInit()
        # By its uuid: CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # NVML has an error class for each of its codes, and older devices have no counter
        return None, 0.0
    return (lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3), 0.0


def _rapl(folder: Path | None = None):
    folder = folder or RAPL
    try:
        wrap = int((folder / "max_energy_range_uj").read_text()) / 1e6
        (folder / "energy_uj").read_text()
    except (OSError, ValueError):
        return None, 0.0
    return (lambda: int((folder / "energy_uj").read_text()) / 1e6), wrap
