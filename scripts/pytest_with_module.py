"""pytest on the compiled module at a path in place of the installed one: pytest_with_module.py _C.so [args]."""

import importlib.util
import sys

import pytest

NAME = "freezeout_ext._C"


def main(path: str, arguments: list[str]) -> int:
    import torch  # noqa: F401  its OpenMP runtime first

    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
