"""Through: calls of modules' forwards go through somebody else for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def through(modules: Mapping[str, nn.Module], call: Callable) -> Iterator[None]:
    """Calls of modules' forwards become call(name, module, original, args, kwargs); all as before afterwards."""
    before = {}
    try:
        for name, module in modules.items():
            if module in before:
                continue
            before[module] = module.__dict__.get("forward")
            module.__dict__["forward"] = _Through(call, name, module, module.forward)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


class _Through:
    def __init__(self, call: Callable, name: str, module: nn.Module, original: Callable) -> None:
        self._given = call, name, module, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, name, module, original = self._given
        return call(name, module, original, args, kwargs)

    def __reduce__(self) -> tuple:
        # A copy or a pickle of the module runs its own forward.
        return _same, (self._given[3],)


def _same(forward: Callable) -> Callable:
    return forward
