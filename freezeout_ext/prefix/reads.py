"""What the forward of a module can read besides its arguments: by its code's names, its attributes, its globals.

Read through so that all of it can be put under guard. Code of the user's own must be in a small subset of Python (see
code.py), and all that its modules hold must be comparable. Libraries of nets are read by what their code names, and
taken not to hide what they do. Anything else is refused.
"""

import enum
import logging
import re
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
    BUILTINS,
    TRUSTED,
    Code,
    code_of,
    functions_of,
    is_trusted,
    is_trusted_in_c,
    of_tensors,
    of_torch,
    written_by_others,
)
from .judge import Refused

# Immutable: their identity or value is all there is to compare.
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
WRITERS = {"setattr", "delattr", "globals", "exec", "eval", "open", "print", "register_buffer", "register_parameter"}
RUN_BEFORE = {"__init__", "__new__", "__repr__", "__init_subclass__"}
NEVER_CALLED = {"extra_repr", "reset_parameters", "train"}  # by a forward, of the methods of torch's own modules
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


class _Reader:
    def __init__(self, unit: nn.Module, without: tuple[str, ...] = (), named: set[str] | None = None) -> None:
        self.unit = unit
        self.names: set[str] = set()  # that any code has named
        self._named = named
        self._without = (STATE_DICT_ONLY, *without)
        self._users: dict[str, str] = {}  # attributes that the user's own code reads, and where
        self._keys: set[str] = set()  # attributes that are compared

    def read(self) -> None:
        known = -1
        while known < len(self._users):  # a method may be named by code that is read after the method's class
            known = len(self._users)
            self.found, self._seen = Reads(list(self.unit.modules())), dict[Any, Any]()
            for module in self.found.modules:
                self.module(module)
        for name in sorted(self._users.keys() - self._keys - of_tensors()):
            raise Refused(f"{self._users[name]} uses .{name}")

    def module(self, module: nn.Module) -> None:
        cls, own = type(module), written_by_others(type(module))
        if users := [each for each in own if not is_trusted(each)]:
            self._by_name(vars(module).values(), f"an attribute of {cls.__name__}")
            self._users_class(users, methods=True)
            self._keys.update(n for c in cls.__mro__ if of_torch(c) for n in vars(c) if n[0] == "_" and n[:2] != "__")
        if not of_torch(cls):
            inherited = (vars(each) for each in cls.__mro__ if of_torch(each) and each is not nn.Module)
            names = {name for name in chain.from_iterable(inherited) if not name.startswith("__")}
            self._class(own, {"forward"} | names - NEVER_CALLED)
        # What is installed on the unit itself is the engine.
        attributes = {k: v for k, v in vars(module).items() if k != "forward" or module is not self.unit}
        for key in self._without:
            attributes.pop(key, None)
        for table in (vars(module), module._parameters, module._buffers, module._modules):
            self._keys.update(table)
        self._attributes(vars(module), attributes, f"a {cls.__name__}")

    def _users_class(self, users: list[type], *, methods: bool) -> None:
        """Notes all that the classes hold, but for functions that no code names.

        Raises:
            Refused: Python may run a method that no code names, or, without `methods`, there is one.
        """
        for each in users:
            for name, value in vars(each).items():
                if functions := functions_of(value):
                    of_dataclass = name == "__eq__" and functions[0].__code__.co_filename == "<string>"
                    if name not in RUN_BEFORE and not of_dataclass and (name.startswith("__") or not methods):
                        raise Refused(f"{each.__name__} defines {name}")
                elif not name.startswith("__"):
                    self.value(value, f"{name} of class {each.__name__}")
            self._keys.update(vars(each))
            self.found.sized.append(vars(each))
            self._entries(vars(each), [name for name in vars(each) if not name.startswith("__")])

    def _attributes(self, table: Any, attributes: dict, of: str) -> None:
        """Notes the attributes, and how many there are: one that is new may stand before one of the class."""
        for key, value in attributes.items():
            if "_hooks" not in key:
                self.value(value, f"attribute {key} of {of}")
        self._entries(table, attributes)
        self.found.sized.append(table)

    def _entries(self, table: Any, keys: Iterable[str]) -> None:
        if keys := tuple(keys):
            self.found.sources.append(partial(itemgetter(*keys, keys[0]), table))

    def _class(self, own: list[type], names: set[str]) -> None:
        """Reads the methods of classes by these names and all that they name in turn."""
        names, done = names | self._users.keys(), set[str]()
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

    def _function(self, function: types.FunctionType) -> frozenset[str]:
        """-> the names that a function's code reads; what it reads of globals and closures is noted."""
        code, where = code_of(function.__code__), function.__qualname__
        self.names |= code.names
        if ("code", id(function)) in self._seen:
            return code.names
        self._seen["code", id(function)] = function
        globals_, absent = function.__globals__, code.globals - function.__globals__.keys()
        if is_trusted(function):
            if found := sorted((code.globals | code.names) & WRITERS):
                raise Refused(f"{where} uses {found[0]}")
            if code.writes:
                raise Refused(f"{where} writes {code.writes}")
            if foreign := sorted(code.imports - TRUSTED):
                raise Refused(f"{where} imports {foreign[0]}")
            self._closure(function, where, code)
        else:
            self._users |= dict.fromkeys(code.attributes, where)
            self._by_name([globals_.get(name) for name in code.globals], where)
            self._by_name([*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()], where)
            if code.outside or absent - BUILTINS or vars(function):
                raise Refused(f"{where} uses {code.outside or sorted([*(absent - BUILTINS), *vars(function)])[0]}")
        for name in sorted(code.globals & globals_.keys()):
            self._entries(globals_, (name,))
            self.value(globals_[name], f"global {name} of {where}", code)
        # A global may come to stand before a builtin of its name.
        self.found.sources.append(partial(map, globals_.get, sorted(absent)))
        self.found.sources.append(lambda: (function.__code__, function.__defaults__, function.__kwdefaults__))
        self.found.sized.append(vars(function))
        for default in (function.__defaults__, function.__kwdefaults__):
            self.value(default, f"default of {where}")
        return code.names

    def _by_name(self, values: Iterable, where: str) -> None:
        """A library's function, wherever the user's own code has it from, is one that may be named."""
        for value in values:
            in_python = isinstance(value, types.FunctionType) and is_trusted(value)
            if in_python or isinstance(value, types.BuiltinFunctionType):
                self._users[value.__name__] = where

    def _closure(self, function: types.FunctionType, where: str, code: Code) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name == "__class__":  # for super(), whose methods are read with the class
                continue
            try:
                self.value(cell.cell_contents, f"closure of {where}", code)
            except ValueError:  # an empty cell
                continue
            self.found.sources.append(lambda cell=cell: (cell.cell_contents,))  # type: ignore[misc]

    def value(self, value: Any, where: str, code: Code | None = None) -> None:
        """Notes what has to be compared so that the value stays what it is.

        Args:
            where: the value was found.
            code: of the function that names the value: what that names, too, may be read of the value.
        """
        if type(value) in PLAIN or isinstance(value, OwnMethod) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        root = type(value).__module__.split(".")[0]
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout != torch.strided:
                raise Refused(f"{where} is a {type(value).__name__}, {value.layout}")
            self.found.tensors.append(value)
            if vars(value):
                self._object(value, where)
        elif isinstance(value, nn.Module):
            if value not in self.found.modules:
                raise Refused(f"{where} is a module outside of it")
        elif root not in TRUSTED:
            self._object(value, where)
        elif isinstance(value, PLAIN):
            return
        elif isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] not in TRUSTED:
                raise Refused(f"{where} is the module {value.__name__}")
            names = code.names if code else frozenset()
            self._entries(vars(value), sorted(names & vars(value).keys()))
        elif isinstance(value, list | tuple | set | frozenset | dict | types.MappingProxyType):
            self._container(value, where, code)
        elif isinstance(value, types.FunctionType):
            if not is_trusted(value):
                self._function(value)
        elif isinstance(value, types.MethodType | partial):
            for part in _parts(value):
                self.value(part, where, code)
        elif isinstance(value, type):
            if not is_trusted(value):
                raise Refused(f"{where} is the class {value.__name__}")
        elif isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            if not is_trusted_in_c(value):
                raise Refused(f"{where} is {getattr(value, '__qualname__', value)}, which may change by itself")
        elif isinstance(value, logging.Logger | re.Pattern):
            return
        else:
            self._object(value, where)

    def _object(self, value: Any, where: str) -> None:
        """An object of which attributes are read: its class runs no code of its own for that."""
        cls = type(value)
        own = [] if isinstance(value, Tensor) else [each for each in written_by_others(cls) if not is_trusted(each)]
        is_all = isinstance(value, Tensor) or cls.__basicsize__ <= object.__basicsize__ + 16  # dict and weakrefs
        if not is_all or any(vars(each).get("__slots__") for each in cls.__mro__):
            raise Refused(f"{where} is a {cls.__name__}, which cannot be compared")
        self._users_class(own, methods=False)
        self._keys.update(vars(value))
        # A trainer writes into a library's config.
        named = None if own or isinstance(value, Tensor) else self._named
        self._attributes(vars(value), {k: v for k, v in vars(value).items() if named is None or k in named}, where)
        if named is not None:
            self.found.sized.pop()

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


def _parts(value: Any) -> tuple:
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    return value.__self__, value.__func__
