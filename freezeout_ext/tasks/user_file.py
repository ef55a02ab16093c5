"""load_task: the task of a user's own file, my_task.py or my_task.py:name."""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from .places import TaskFault, kind, line_of_name, where_raised
from .task import Task

DEFAULT_NAME = "task"


def load_task(text: str) -> Task:
    """The task that a file holds under a name: a Task, or a function without arguments that returns one.

    The task's `name` holds the file's name and the task's own.
    The task's `fingerprint` is a hash of the file's code. Comments are left out.
    Two samples were run through the task, see `Task.check`.

    Args:
        text: path of a Python file, and after a colon the name in it. Without a name: "task", or the file's only Task.

    Raises:
        TaskFault: the file is missing, the file raises, or the file has no such task. One sentence, with the line.
    """
    path, name = (text, "") if text.endswith(".py") else text.rpartition(":")[::2]
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise TaskFault(f"task must be a Python file, my_task.py or my_task.py:name, {text} is none")
    source = _read(file)
    module = _imported(file)
    name = name or _only_name(file, module)
    if not hasattr(module, name):
        raise TaskFault(f"{file.name} must define {name}, a Task or a function that returns one{_others(file, module)}")
    found = getattr(module, name)
    place, demand = f"{file.name}, line {line_of_name(source, name)}: ", f"{name} must be a Task"
    if not isinstance(found, Task) and callable(found) and not isinstance(found, type):
        demand = f"{name}() must return a Task"
        with faults_of(file):
            found = found()
    if not isinstance(found, Task):
        raise TaskFault(f"{place}{demand}, got {kind(found)}")
    title = file.name if name == DEFAULT_NAME else f"{file.name}:{name}"
    found = replace(found, name=title, file=file, fingerprint=_fingerprint(source))
    found.check()
    return found


@contextmanager
def faults_of(file: Path | None) -> Iterator[None]:
    """Turns errors that a user's own lines raise into a TaskFault, which names the line. Other errors pass through."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, TaskFault) or not (where := where_raised(file, error)):
            raise
        if isinstance(error, SystemExit):
            raise TaskFault(f"{where}the file must define a task and not exit") from error
        text = " ".join(str(error).split()) or "no message"
        if isinstance(error, SyntaxError):
            text = error.msg
        if "Original Traceback" in str(error):  # a worker's error, which holds its whole traceback
            text = " ".join(str(error).strip().splitlines()[-1].split())
            raise TaskFault(f"{where}{text}") from error
        raise TaskFault(f"{where}{type(error).__name__}: {text}") from error


def _tasks(module: ModuleType) -> dict[str, Task]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Task)}


def _only_name(file: Path, module: ModuleType) -> str:
    there = _tasks(module)
    if hasattr(module, DEFAULT_NAME) or not there:
        return DEFAULT_NAME
    if len(there) > 1:
        raise TaskFault(f"{file.name} holds {len(there)} tasks, name one: {_listed(file, there)}")
    return next(iter(there))


def _others(file: Path, module: ModuleType) -> str:
    there = _tasks(module)
    return f"; it holds {_listed(file, there)}" if there else ""


def _listed(file: Path, there: dict[str, Task]) -> str:
    return ", ".join(f"{file.name}:{name}" for name in there)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskFault(f"{file.name} must be a Python file in UTF-8: {error}") from None


def _fingerprint(source: str) -> str:
    return hashlib.sha256(ast.dump(ast.parse(source)).encode()).hexdigest()[:16]


def _imported(file: Path) -> ModuleType:
    # The module has a name of its own, so that a file called like an installed package does not hide the package. The
    # module is registered, so that what the file defines can be found again by name.
    name = f"freezeout_task_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # of a .py file there are both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # for its neighbours, as Python does for a script
    try:
        with faults_of(file):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
