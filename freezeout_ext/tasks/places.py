"""TaskFault, and the line of a user's file where a fault lies."""

import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor


class TaskFault(ValueError):
    """One sentence on what is wrong with a task, with the line of its file where that is known."""


def where_raised(file: Path | None, error: BaseException) -> str:
    """ "my_task.py, line 12: ", the last line of the file that the error passed through; "" where it passed none."""
    if file is None:
        return ""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file.name}, line {error.lineno}: "
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    # An error in a loader's worker comes as text.
    lines = lines or [int(n) for n in re.findall(rf'File "{re.escape(str(file))}", line (\d+)', str(error))]
    return f"{file.name}, line {lines[-1]}: " if lines else ""


def place_of(file: Path | None, function: Callable | None) -> str:
    """ "my_task.py, line 12: ", where the function begins; "" where it is none of the file's."""
    code = getattr(function, "__code__", None)
    if file is None or code is None or code.co_filename != str(file):
        return ""
    return f"{file.name}, line {code.co_firstlineno}: "


def line_of_name(source: str, name: str) -> int:
    """The first line of the source that assigns or defines `name`."""
    pattern = re.compile(rf"(async\s+)?(def\s+|class\s+)?{re.escape(name)}\b")
    return next((k for k, line in enumerate(source.splitlines(), 1) if pattern.match(line)), 1)


def kind(value: object) -> str:
    """What a value is, in a few words: "a tensor [2, 10] of int64", "a dict of input_ids, attention_mask"."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, list(value)[:5]))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
