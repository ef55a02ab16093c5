"""The compiled half, `freezeout_ext._C`, or the reason why it is missing.

`C` is the module, or None where the module is missing.
`import_error` is the reason, or None where the module is there.
Nothing here warns. Whoever needs the module warns.
"""

from importlib import metadata
from typing import Any

# torch before _C: both need an OpenMP runtime named libgomp.so.1, and the loader gives both the copy that came first.
import torch

try:
    import freezeout_ext._C as C

    import_error: str | None = None
except ModuleNotFoundError:
    C = None  # type: ignore[assignment]  # None is the module's absence
    import_error = "freezeout_ext._C was not compiled for this Python; install the package with pip"
except ImportError as error:
    C = None  # type: ignore[assignment]
    import_error = f"freezeout_ext._C does not load: {error}"


def version() -> str:
    """The installed package's version, as pyproject.toml states it."""
    return metadata.version("freezeout_ext")


def build_info() -> dict[str, Any]:
    """What was compiled, and with what, as a dict.

    version: str.
    compiler: str; None where the compiled half is missing.
    build_type: str; None where the compiled half is missing.
    openmp: bool.
    cuda: bool.
    cuda_version: str; None without CUDA.
    cuda_architectures: list of str, such as "sm_80".
    module: path of the compiled file, str; None where the compiled half is missing.
    error: why the compiled half is missing, str; absent where it is there.
    """
    if C is not None:
        return {**C.build_info(), "module": C.__file__}
    return {
        "version": version(),
        "compiler": None,
        "build_type": None,
        "openmp": False,
        "cuda": False,
        "cuda_version": None,
        "cuda_architectures": [],
        "module": None,
        "error": import_error,
    }


def cuda_unavailable_reason(device: torch.device | int | None = None) -> str | None:
    """Why the compiled CUDA half cannot run on `device`; None where it can run.

    torch and the driver are asked. The compiled half creates no CUDA context of its own.

    Args:
        device: a CUDA device. Default: torch's current one.
    """
    if C is None:
        return import_error
    info = C.build_info()
    if not info["cuda"]:
        return "freezeout_ext was built without CUDA; reinstall it where nvcc is found, or with FREEZEOUT_CUDA=1"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    driver, runtime = C.cuda_versions()
    # A runtime works with every driver of its own major version or a later one.
    if driver // 1000 < runtime // 1000:
        found = f"serves CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "is missing"
        return f"freezeout_ext was built with CUDA {info['cuda_version']}, but the NVIDIA driver {found}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    oldest = min(int(name.removeprefix("sm_")) for name in info["cuda_architectures"])
    if 10 * major + minor < oldest:
        return f"freezeout_ext was built for sm_{oldest} and newer, the device is sm_{major}{minor}"
    return None
