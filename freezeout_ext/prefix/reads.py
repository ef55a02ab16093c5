"""What the forward of a module can read besides its arguments: by its code's names, its attributes, its globals.

Read through so that all of it can be put under guard. A module is refused where that is not possible: code that writes
attributes, containers or globals, that draws from Python's or numpy's generators, that reaches for files, the clock or
the environment; objects that cannot be compared. Functions of torch and of libraries of nets are taken to depend on
their arguments alone.
"""

import enum
import functools
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import OwnMethod
from .code import ASKS, WRITING_FUNCTIONS, WRITING_METHODS, Code, code_of, functions_of, of_torch
from .judge import Refused

# Immutable: their identity or value is all there is to compare.
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
TRUSTED = {
    "torch", "timm", "transformers", "torchvision", "einops", "math", "cmath", "operator", "functools", "itertools",
    "collections", "typing", "types", "abc", "enum", "dataclasses", "builtins", "copy", "warnings", "logging",
    "inspect", "contextlib", "packaging", "typing_extensions", "numbers", "string", "re", "huggingface_hub",
}  # fmt: skip
# Any attribute may be meant.
DYNAMIC = {"getattr", "vars", "dir", "locals", "__getattribute__", "attrgetter"}
PINNED = ("train", "reset_running_stats")  # what this package puts on frozen modules, which a forward does not read
HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


@dataclass
class Reads:
    """All that the forward of one module can read, found by `read`.

    Attributes:
        modules: the module and all below it.
        tables: globals, classes' attributes, objects' attributes, and the names in them that count.
        attributes: each module's `vars`, the names in it that count, and the names that do not even by being there.
        containers: lists, tuples, sets, mappings and closures' cells, of which all counts.
        tensors: parameters, buffers and other tensors.
    """

    modules: list[nn.Module]
    tables: list[tuple[Any, tuple[str, ...]]] = field(default_factory=list)
    attributes: list[tuple[dict, tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    _seen: dict[int, Any] = field(default_factory=dict)


def read(unit: nn.Module) -> Reads:
    """-> all that the forward of the unit can read.

    Raises:
        Refused: it writes, draws random numbers that are not torch's, or reads what cannot be compared.
    """
    reader = _Reader(unit)
    for module in reader.found.modules:
        reader.module(module)
    return reader.found


class _Reader:
    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit
        self.found = Reads(list(unit.modules()))
        self._inside = set(self.found.modules)
        self._names: set[str] = set()

    def module(self, module: nn.Module) -> None:
        cls = type(module)
        names: set[str] = set()
        if not of_torch(cls):
            names = self._class(cls, {"forward"})
        everything = of_torch(cls) or bool(names & DYNAMIC)
        installed = PINNED + (("forward",) if module is self.unit else ())
        kept = {k: v for k, v in vars(module).items() if k not in installed and not k.endswith(HOOKS)}
        keys = []
        for key, value in sorted(kept.items(), key=lambda item: item[0] not in names):
            mark = self._mark()
            try:
                self.value(value, f"attribute {key} of a {cls.__name__}")
                keys.append(key)
            except Refused:
                if everything or key in names:
                    raise
                self._back_to(mark)
        self.found.attributes.append((vars(module), tuple(keys), installed))

    def _class(self, cls: type, names: set[str]) -> set[str]:
        """Reads the methods of a class by these names and all that they name in turn."""
        names = set(names)
        done: set[str] = set()
        while names - done:
            for name in names - done:
                done.add(name)
                for each in cls.__mro__:
                    if each.__module__.startswith(("torch.", "builtins")) or each is object or name not in vars(each):
                        continue
                    value = vars(each)[name]
                    self.found.tables.append((vars(each), (name,)))
                    for function in functions_of(value):
                        names |= self._function(function)
                    if not functions_of(value):
                        self.value(value, f"{name} of class {each.__name__}")
        return names

    def _function(self, function: types.FunctionType) -> set[str]:
        """-> the names that a function's code reads; what it reads of globals and closures is noted."""
        code, where = code_of(function.__code__), function.__qualname__
        if id(function) in self.found._seen:
            return set(code.names)
        self.found._seen[id(function)] = function
        if code.writes:
            raise Refused(f"{where} writes {code.writes}")
        if found := sorted((code.globals & WRITING_FUNCTIONS) | (code.names & WRITING_METHODS)):
            raise Refused(f"{where} uses {found[0]}")
        if foreign := sorted(code.imports - TRUSTED):
            raise Refused(f"{where} imports {foreign[0]}")
        names = set(code.names | (code.globals & (DYNAMIC | ASKS)))
        for name in code.globals:
            if name in function.__globals__:
                self.found.tables.append((function.__globals__, (name,)))
                self.value(function.__globals__[name], f"global {name} of {where}", code)
        for cell in function.__closure__ or ():
            try:
                self.value(cell.cell_contents, f"closure of {where}", code)
            except ValueError:  # an empty cell
                continue
            self.found.containers.append(cell)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.value(default, f"default of {where}")
        return names

    def value(self, value: Any, where: str, code: Code | None = None) -> None:
        """Notes what has to be compared so that the value stays what it is."""
        if isinstance(value, (*PLAIN, OwnMethod)) or id(value) in self.found._seen:
            return
        self.found._seen[id(value)] = value
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
                raise Refused(f"{where} is a {type(value).__name__}")
            self.found.tensors.append(value)
        elif isinstance(value, nn.Module):
            if value not in self._inside:
                raise Refused(f"{where} is a module outside of it")
        elif isinstance(value, types.ModuleType):
            self._python_module(value, where, code)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                self.value(item, where, code)
            self.found.containers.append(value)
        elif isinstance(value, dict | types.MappingProxyType):
            for item in value.values():
                self.value(item, where, code)
            self.found.containers.append(value)
        else:
            self._callable_or_object(value, where, code)

    def _python_module(self, module: types.ModuleType, where: str, code: Code | None) -> None:
        root = module.__name__.split(".")[0]
        if root in TRUSTED:
            return
        names = code.names if code else frozenset()
        if root == "numpy" and "random" not in names and module.__name__ != "numpy.random":
            return
        # A module in C, or one of Python's own: random, time, os.
        if not hasattr(module, "__file__") or root == "numpy" or root in _STANDARD:
            raise Refused(f"{where} is the module {module.__name__}")
        for name in names & vars(module).keys():
            self.found.tables.append((vars(module), (name,)))
            self.value(vars(module)[name], f"{module.__name__}.{name}", code)

    def _callable_or_object(self, value: Any, where: str, code: Code | None) -> None:
        root = (getattr(value, "__module__", None) or "").split(".")[0]
        if isinstance(value, types.FunctionType):
            if root not in TRUSTED:
                self._function(value)
        elif isinstance(value, types.MethodType):
            self.value(value.__self__, where, code)
            self.value(value.__func__, where, code)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(part, where, code)
        elif isinstance(value, type):
            if root not in TRUSTED:
                self._class(value, {"__init__", "__new__", "__call__", "__post_init__", "forward"})
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, type) and not _trusted(owner):
                raise Refused(f"{where} is {getattr(value, '__qualname__', value)}, which may change by itself")
        elif isinstance(value, functools._lru_cache_wrapper):
            self.value(value.__wrapped__, where, code)
        elif type(value).__module__.split(".")[0] in _OBJECTS_OF or _pure_op(value):
            self._attributes(value, where)
        elif isinstance(getattr(value, "__dict__", None), dict) and _is_all_in_dict(type(value)):
            self._class(type(value), {"__call__", "__getattr__"} | set(code.names if code else ()))
            for key, item in vars(value).items():
                self.value(item, f"{where}.{key}", code)
            self.found.containers.append(vars(value))
        else:
            raise Refused(f"{where} is a {type(value).__name__}, which cannot be compared")

    def _attributes(self, value: Any, where: str) -> None:
        """Of a library's object (a config, a registry of functions, a logger) what can be compared."""
        table, keys = getattr(value, "__dict__", {}), []
        for key, item in table.items():
            mark = self._mark()
            try:
                self.value(item, where)
                keys.append(key)
            except Refused:
                self._back_to(mark)
        self.found.tables.append((table, tuple(keys)))

    def _mark(self) -> tuple[int, int, int, int]:
        found = self.found
        return len(found.tables), len(found.containers), len(found.tensors), len(found._seen)

    def _back_to(self, mark: tuple[int, int, int, int]) -> None:
        found = self.found
        del found.tables[mark[0] :], found.containers[mark[1] :], found.tensors[mark[2] :]
        while len(found._seen) > mark[3]:
            found._seen.popitem()


_OBJECTS_OF = {"timm", "transformers", "logging", "warnings", "re", "typing"}
_STANDARD = {"random", "time", "os", "sys", "secrets", "uuid", "datetime", "threading", "subprocess", "io", "pathlib"}


def _trusted(owner: Any) -> bool:
    if isinstance(owner, types.ModuleType):
        return owner.__name__.split(".")[0] in TRUSTED
    return type(owner).__module__.split(".")[0] == "torch" and not isinstance(owner, torch.Generator)


def _pure_op(value: Any) -> bool:
    return callable(value) and type(value).__module__.startswith(("torch._ops", "torch.jit"))


def _is_all_in_dict(cls: type) -> bool:
    """Whether an object's state is its `__dict__`: no slots, and no more memory than for the dict and weakrefs."""
    return cls.__basicsize__ <= object.__basicsize__ + 16 and not any(vars(c).get("__slots__") for c in cls.__mro__)
