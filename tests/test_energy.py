"""EnergyMeter against counters that are files or a stand-in for NVML."""

import sys
from types import SimpleNamespace

import torch

from freezeout_ext.training import energy
from freezeout_ext.training.energy import EnergyMeter


def test_rapl_counts_microjoules_and_wraps_around(tmp_path, monkeypatch):
    (tmp_path / "max_energy_range_uj").write_text("10000000\n")
    (tmp_path / "energy_uj").write_text("4000000\n")
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    meter = EnergyMeter(torch.device("cpu"))
    (tmp_path / "energy_uj").write_text("9500000\n")
    assert meter.joules() == 5.5
    (tmp_path / "energy_uj").write_text("1000000\n")
    assert meter.joules() == 1.5
    assert meter.joules() == 0


def test_a_cpu_without_a_counter_reports_none(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert EnergyMeter(torch.device("cpu")).joules() is None


def test_nvml_is_asked_for_the_device_by_uuid(monkeypatch):
    counts = iter([1000, 3000, 4500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counts) if handle == "GPU-1-2" else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    assert EnergyMeter(torch.device("cuda")).joules() == 1.5


def test_a_cuda_device_without_nvml_reports_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(torch.device("cuda")).joules() is None
