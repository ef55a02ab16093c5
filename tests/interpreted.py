"""The Triton kernels on a CPU: under Triton's interpreter, beside the compiled ones of the same process."""

import importlib
import os
import sys
from types import ModuleType
from unittest import mock

import freezeout_ext
import freezeout_ext.kernels


def load() -> ModuleType:
    """A second freezeout_ext.kernels, made by a second Triton.

    Triton reads TRITON_INTERPRET where a kernel is defined, its own library's kernels at its first import.
    """
    parts = ("triton", "freezeout_ext.kernels")
    # Compiled modules are loaded once a process.
    again = [name for name in sys.modules if name.startswith(parts) and not name.startswith("triton._C")]
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.dict(sys.modules),
        mock.patch.object(freezeout_ext, "kernels", freezeout_ext.kernels),
    ):
        for name in again:
            del sys.modules[name]
        kernels = importlib.import_module("freezeout_ext.kernels")
        # Lasting, but for the second Triton alone.
        importlib.import_module("triton").knobs.runtime.interpret = True
    return kernels
