"""timm for tests; torchvision, which it imports and whose wheels need a CUDA build of torch, is a stub where absent."""

import enum
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MISSING = "timm is not installed: pip install freezeout_ext[timm]" if importlib.util.find_spec("timm") is None else None


class Stub(types.ModuleType):
    """Any name is an empty class: timm's models use none of them, its data pipeline would."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__") or name == "v2":
            raise AttributeError(name)
        modes = ["NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"]
        value = enum.Enum(name, modes) if name == "InterpolationMode" else type(name, (torch.nn.Module,), {})
        setattr(self, name, value)
        return value


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torchvision without transforms.v2."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision" and "v2" not in name:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def importable_timm() -> Iterator[types.ModuleType]:
    stubbed = importlib.util.find_spec("torchvision") is None
    if stubbed:
        sys.meta_path.append(StubFinder())
    try:
        import timm

        yield timm
    finally:
        if stubbed:
            sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, StubFinder)]
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
