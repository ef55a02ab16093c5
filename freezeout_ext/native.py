"""The compiled half, `freezeout_ext._C`, or the reason why it is not there.

`C` is the module or None, `import_error` the reason or None. Nothing here warns: whoever needs the module does.
"""

from importlib import metadata
from typing import Any

# Before _C: both need an OpenMP runtime by the name libgomp.so.1, and the loader serves the copy that came first.
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
    """What was compiled, and with what.

    version (str), compiler (str), build_type (str), openmp (bool), cuda (bool), cuda_version (str or None),
    cuda_architectures (list of str, "sm_80"), module (path of the compiled file, str or None), and error (str),
    present only where the compiled half is missing.
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
    """Why the compiled CUDA half cannot run on `device` (default: torch's current one); None if it can.

    Asks torch and the driver; creates no CUDA context of its own.
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
