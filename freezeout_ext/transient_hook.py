"""A hook that copies and pickles of the module do not keep."""

from collections.abc import Callable
from typing import Any


class TransientHook:
    """Calls function(*args) and returns nothing; a deepcopy or a pickle of the module holds a hook that does nothing.

    `observes_only` hooks change no tensor: the frozen prefix need not keep away from them.
    """

    observes_only = True

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __reduce__(self) -> tuple:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    return None
