from collections.abc import Callable
from typing import Any

def build_info() -> dict[str, Any]: ...
def cuda_versions() -> tuple[int, int]: ...
def affine_relu(
    x: int,
    y: int,
    scale: int,
    shift: int,
    *,
    rows: int,
    channels: int,
    x_stride: int,
    y_stride: int,
    relu: bool,
    dtype: str,
    threads: int,
) -> None: ...
def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def use_cpu_isa(name: str) -> None: ...

class TensorReader:
    def __init__(
        self,
        tensor_type: type,
        parameter_type: type,
        dtypes: dict[Any, tuple[int, int]],
        increment_version: Callable[[list[Any]], None],
        *,
        exchange: bool,
    ) -> None: ...
    @property
    def exchanges(self) -> bool: ...

class TensorBatch:
    def __init__(
        self,
        *,
        formula: int,
        dtype: int,
        device_type: int,
        device_index: int,
        work: list[tuple[int, list[int], int, int, int, int]],
        groups: list[tuple[float, float, float, float, tuple[float, float, float], int]],
    ) -> None: ...
    @property
    def device_type(self) -> int: ...
    @property
    def device_index(self) -> int: ...
    def table(self) -> bytes: ...
    def set_table(self, address: int, stream: int) -> None: ...
    def run(self, *, num_threads: int, schedule_step: int, grad_scale: int, found_inf: int) -> bool: ...

class PreparedStep:
    def __init__(
        self,
        reader: TensorReader,
        *,
        formula: int,
        groups: list[Any],
        state: dict[Any, Any],
        native: list[list[bool]],
        schedule: list[tuple[float, float, float]] | None,
    ) -> None: ...
    def run(
        self, groups: Any, state: Any, num_threads: int, inputs: list[tuple[Any, Any, Any]] | None
    ) -> str | tuple[list[tuple[int, int]] | None, bool]: ...
    @property
    def batches(self) -> list[TensorBatch]: ...
