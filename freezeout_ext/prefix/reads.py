"""What the forward of a module can read besides its arguments: by its code's names, its attributes, its globals.

Read through so that all of it can be put under guard. A module is refused where that is not possible: code that writes
attributes, containers or globals, that draws from Python's or numpy's generators, that reaches for files, the clock or
the environment; objects that cannot be compared. Functions of torch and of libraries of nets are taken to depend on
their arguments alone.
"""

import enum
import functools
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import OwnMethod
from .code import (
    ASKS,
    NOT_WHILE_RUNNING,
    WRITING_FUNCTIONS,
    WRITING_METHODS,
    Code,
    code_of,
    entered,
    functions_of,
    of_torch,
    of_user,
    operators_of,
)
from .judge import Refused

# Immutable: their identity or value is all there is to compare.
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
MAY_HAVE_FIELDS = (*PLAIN[:6], enum.Enum, list, tuple, set, frozenset, dict, Tensor)  # as subclasses, or set on them
TRUSTED = {
    "torch", "timm", "transformers", "torchvision", "einops", "math", "cmath", "operator", "functools", "itertools",
    "collections", "typing", "types", "abc", "enum", "dataclasses", "builtins", "copy", "warnings", "logging",
    "inspect", "contextlib", "packaging", "typing_extensions", "numbers", "string", "re", "huggingface_hub",
}  # fmt: skip
# Of their objects (a config, a logger, a registry of functions) what can be compared is compared.
OBJECTS_OF = {"timm", "transformers", "logging", "warnings", "re", "typing"}
DYNAMIC = {"getattr", "vars", "dir", "locals", "__getattribute__", "attrgetter"}  # any attribute may be meant
KNOWN_BY_NAME = {"isinstance", *DYNAMIC, *ASKS, *WRITING_FUNCTIONS}  # so not under another name
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STATE_DICT_ONLY = "_non_persistent_buffers_set"


@dataclass
class Reads:
    """All that the forward of one module can read, found by `read`.

    Attributes:
        modules: the module and all below it.
        sources: each gives what stands now in one place: attributes, globals, a container, a closure's cell.
        sized: mappings, lists and sets, of which the length counts.
        tensors: parameters, buffers and other tensors.
    """

    modules: list[nn.Module]
    sources: list[Callable[[], Iterable]] = field(default_factory=list)
    sized: list[Any] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)


def read(unit: nn.Module, *, tensors: bool = True) -> Reads:
    """-> all that the forward of the unit can read.

    Args:
        tensors: False leaves parameters, buffers and other tensors out, and of foreign objects (a config) all that no
            code names: a trainer writes there.

    Raises:
        Refused: it writes, draws random numbers that are not torch's, or reads what cannot be compared.
    """
    reader = _Reader(unit)
    reader.read()
    if not tensors:
        reader = _Reader(unit, without=("_parameters", "_buffers"), named=reader.names)
        reader.read()
        reader.found.tensors.clear()
    return reader.found


def asks(module: nn.Module) -> str | None:
    """-> by which function a call of the module, its submodules' calls apart, asks what a trace would answer for good.

    Raises:
        Refused: see `read`.
    """
    reader = _Reader(module)
    reader.read(submodules=False)
    return next(iter(sorted(reader.names & ASKS)), None)


class _Reader:
    def __init__(self, unit: nn.Module, without: tuple[str, ...] = (), named: set[str] | None = None) -> None:
        self.unit = unit
        self.names: set[str] = set()  # that any code has named
        self._named = named
        self._without = (STATE_DICT_ONLY, *without)
        self.found = Reads(list(unit.modules()))
        self._inside = set(self.found.modules)
        self._seen: dict[Any, Any] = {}

    def read(self, *, submodules: bool = True) -> None:
        known = -1
        while known < len(self.names):  # a method may be called by code that is read after the method's class
            known = len(self.names)
            self.found, self._seen = Reads(list(self.unit.modules())), {}
            for module in self.found.modules:
                if submodules or module is self.unit:
                    self.module(module)
                elif not of_torch(type(module)):
                    self._class(type(module), set())  # methods that the unit's code names

    def module(self, module: nn.Module) -> None:
        cls = type(module)
        names = self.names if of_torch(cls) else self.names | self._class(cls, entered(cls))
        needs_all = of_torch(cls) or bool(names & DYNAMIC)
        # What is installed on the unit itself is the engine.
        attributes = {k: v for k, v in vars(module).items() if k != "forward" or module is not self.unit}
        for key in self._without:
            attributes.pop(key, None)
        # What the forward names comes first: it must not be lost with an attribute that holds it too.
        self._attributes(vars(module), attributes, f"a {cls.__name__}", lambda key: needs_all or key in names)

    def _attributes(self, table: Any, attributes: dict, of: str, needed: Callable[[str], bool]) -> None:
        """Notes the attributes that can be compared, and how many there are.

        Raises:
            Refused: one that is needed cannot be compared.
        """
        keys = []
        for key in sorted(attributes, key=needed, reverse=True):
            found = self.found
            mark = len(found.sources), len(found.sized), len(found.tensors), len(self._seen)
            try:
                if "_hooks" not in key:
                    self.value(attributes[key], f"attribute {key} of {of}")
                keys.append(key)
            except Refused:
                if needed(key):
                    raise
                del found.sources[mark[0] :], found.sized[mark[1] :], found.tensors[mark[2] :]
                while len(self._seen) > mark[3]:
                    self._seen.popitem()
        self._entries(table, keys)
        self.found.sized.append(table)  # an attribute that is new may stand before one of the class

    def _entries(self, table: Any, keys: Iterable[str]) -> None:
        if keys := tuple(keys):
            self.found.sources.append(partial(itemgetter(*keys, keys[0]), table))

    def _class(self, cls: type, names: set[str]) -> set[str]:
        """Reads the methods of a class by these names, by those that any code named, and all that they name in turn.

        Operators are read too: no code names them. Returns all names.
        """
        own = of_user(cls)
        names, done = names | (self.names - NOT_WHILE_RUNNING) | operators_of(own), set[str]()
        self.found.sized += [vars(each) for each in own]  # a name that is new may stand before one of a base
        while names - done:
            name = (names - done).pop()
            done.add(name)
            for each in own:
                if name not in vars(each):
                    continue
                value = vars(each)[name]
                self._entries(vars(each), (name,))
                for function in functions_of(value):
                    names |= self._function(function)
                if not functions_of(value):
                    self.value(value, f"{name} of class {each.__name__}")
        return names

    def _function(self, function: types.FunctionType) -> set[str]:
        """-> the names that a function's code reads; what it reads of globals and closures is noted."""
        code, where = code_of(function.__code__), function.__qualname__
        names = set(code.names | (code.globals & (DYNAMIC | ASKS)))
        self.names |= names
        if ("code", id(function)) in self._seen:
            return names
        self._seen["code", id(function)] = function
        if code.writes:
            raise Refused(f"{where} writes {code.writes}")
        if found := sorted((code.globals & WRITING_FUNCTIONS) | (code.names & WRITING_METHODS)):
            raise Refused(f"{where} uses {found[0]}")
        if foreign := sorted(code.imports - TRUSTED):
            raise Refused(f"{where} imports {foreign[0]}")
        globals_, absent = function.__globals__, code.globals - function.__globals__.keys()
        for name in sorted(code.globals & globals_.keys()):
            self._entries(globals_, (name,))
            self.value(globals_[name], f"global {name} of {where}", code)
        # A global may come to stand before a builtin of its name.
        self.found.sources.append(partial(map, globals_.get, sorted(absent)))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name == "__class__":  # for super(), whose methods are read with the class
                continue
            try:
                self.value(cell.cell_contents, f"closure of {where}", code)
            except ValueError:  # an empty cell
                continue
            self.found.sources.append(lambda cell=cell: (cell.cell_contents,))  # type: ignore[misc]
        self.found.sources.append(lambda: (function.__code__, function.__defaults__, function.__kwdefaults__))
        for default in (function.__defaults__, function.__kwdefaults__):
            self.value(default, f"default of {where}")
        self._attributes(vars(function), dict(vars(function)), where, lambda key: key in names)
        return names

    def value(self, value: Any, where: str, code: Code | None = None) -> None:
        """Notes what has to be compared so that the value stays what it is.

        Args:
            where: the value was found.
            code: of the function that names the value: what that names, too, may be read of the value.
        """
        if type(value) in PLAIN or isinstance(value, OwnMethod) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, MAY_HAVE_FIELDS):
            self._fields(value, where)
        if isinstance(value, PLAIN):
            return
        root = (getattr(value, "__module__", None) or "").split(".")[0]
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout != torch.strided:
                raise Refused(f"{where} is a {type(value).__name__}, {value.layout}")
            self.found.tensors.append(value)
        elif isinstance(value, nn.Module):
            if value not in self._inside:
                raise Refused(f"{where} is a module outside of it")
        elif isinstance(value, types.ModuleType):
            self._python_module(value, where, code)
        elif isinstance(value, list | tuple | set | frozenset | dict | types.MappingProxyType):
            self._container(value, where, code)
        elif isinstance(value, types.FunctionType):
            if root not in TRUSTED:
                self._function(value)
        elif isinstance(value, types.MethodType | partial):
            for part in _parts(value):
                self.value(part, where, code)
        elif isinstance(value, type):
            if root not in TRUSTED:
                self._class(value, {"__init__", "__new__", "__post_init__", "forward"})
                self._class(type(value), set())
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            if value.__name__ in KNOWN_BY_NAME or not _trusted(getattr(value, "__self__", None)):
                raise Refused(f"{where} is {getattr(value, '__qualname__', value)}, which may change by itself")
        elif isinstance(value, functools._lru_cache_wrapper):
            self.value(value.__wrapped__, where, code)
        elif type(value).__module__.split(".")[0] in OBJECTS_OF or _pure_op(value):
            table, named = getattr(value, "__dict__", {}), self._named
            self._attributes(table, {k: v for k, v in table.items() if named is None or k in named}, where, _no)
            if named is not None:
                self.found.sized.pop()
        elif isinstance(getattr(value, "__dict__", None), dict) and _is_all_in_dict(type(value)):
            self._class(type(value), set())
            self._attributes(vars(value), dict(vars(value)), where, lambda key: True)
        else:
            raise Refused(f"{where} is a {type(value).__name__}, which cannot be compared")

    def _fields(self, value: Any, where: str) -> None:
        """What was set on an object of a subclass of Python's own kinds, or on a tensor; an enum's value."""
        table = getattr(value, "__dict__", None)
        if table or (table is not None and not isinstance(value, Tensor)):
            self._attributes(table, dict(table), where, lambda key: key == "_value_" or key in self.names)
        if type(value).__module__.split(".")[0] not in TRUSTED:
            self._class(type(value), set())

    def _container(self, items: Any, where: str, code: Code | None) -> None:
        mapping = isinstance(items, dict | types.MappingProxyType)
        for item in items.values() if mapping else items:
            self.value(item, where, code)
        if isinstance(items, tuple | frozenset):  # immutable
            return
        self.found.sized.append(items)
        if items:
            keys_too: Any = partial(chain.from_iterable, items.items()) if mapping else partial(iter, items)
            self.found.sources.append(keys_too)

    def _python_module(self, module: types.ModuleType, where: str, code: Code | None) -> None:
        root = module.__name__.split(".")[0]
        names = code.names if code else frozenset()
        self._entries(vars(module), sorted(names & vars(module).keys()))
        if root in TRUSTED or (root == "numpy" and "random" not in names and module.__name__ != "numpy.random"):
            return
        # A module in C, or one of Python's own: random, time, os.
        if not hasattr(module, "__file__") or root == "numpy" or root in sys.stdlib_module_names:
            raise Refused(f"{where} is the module {module.__name__}")
        for name in names & vars(module).keys():
            self.value(vars(module)[name], f"{module.__name__}.{name}", code)


def _no(key: str) -> bool:
    return False


def _parts(value: Any) -> tuple:
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    return value.__self__, value.__func__


def _trusted(owner: Any) -> bool:
    """Whether a function in C gives the same for the same arguments, by whose method it is."""
    if isinstance(owner, types.ModuleType):
        return owner.__name__.split(".")[0] in TRUSTED
    own = isinstance(owner, type | None) or type(owner).__module__.split(".")[0] == "torch"
    return own and not isinstance(owner, torch.Generator)


def _pure_op(value: Any) -> bool:
    return callable(value) and type(value).__module__.startswith(("torch._ops", "torch.jit"))


def _is_all_in_dict(cls: type) -> bool:
    """Whether an object's state is its `__dict__`: no slots, and no more memory than for the dict and weakrefs."""
    return cls.__basicsize__ <= object.__basicsize__ + 16 and not any(vars(c).get("__slots__") for c in cls.__mro__)
