"""An argument is what was asked for, or an error that names the argument, the expectation and the finding."""

import math
from typing import Any


def check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    """A whole number in least..most; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be <= {most}, got {value}")


def check_number(name: str, value: object, least: float = 0.0) -> None:
    """A real number from `least` on; infinity, nan, True and False are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be >= {least:g}, got {value}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_kind(name: str, value: object, kind: Any, what: str, *, optional: bool = False) -> None:
    """An instance of `kind`, which the message calls `what`, or None where that is allowed."""
    if not isinstance(value, kind) and not (optional and value is None):
        raise TypeError(f"{name} must be {what}{' or None' * optional}, got {_shown(value)}")


def check_callable(name: str, value: object, of: str) -> None:
    """A callable of `of`, which says the signature."""
    if not callable(value):
        raise TypeError(f"{name} must be callable with {of}, got {_shown(value)}")


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
