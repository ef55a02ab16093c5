"""What the code of functions and classes names, read from the bytecode: globals, attributes, what is written."""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

WRITES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR"}
WRITING_FUNCTIONS = {"setattr", "delattr", "globals", "exec", "eval", "compile", "open", "input", "print", "__import__"}
WRITING_METHODS = {
    "__setattr__", "__delattr__", "__setitem__", "__dict__", "register_buffer", "register_module", "register_parameter",
    "add_module",
}  # fmt: skip
# What a traced value answers otherwise than a tensor.
ASKS = {
    "hasattr", "type", "callable", "id", "is_torch_fx_proxy",
    # What is no function of the arguments: a trace would keep the answer.
    "get_default_dtype", "are_deterministic_algorithms_enabled", "is_grad_enabled", "is_inference_mode_enabled",
    "get_float32_matmul_precision", "get_num_threads", "is_autocast_enabled", "get_autocast_dtype", "initial_seed",
    "fork_rng", "get_rng_state", "set_rng_state", "manual_seed", "default_generator", "a match statement",
}  # fmt: skip
# Methods that no operator calls, or an operator that `writes` finds.
NOT_WHILE_RUNNING = {
    "__init__", "__new__", "__post_init__", "__del__", "__init_subclass__", "__set_name__", "__dir__", "__sizeof__",
    "__repr__", "__str__", "__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__",
    "__setattr__", "__delattr__", "__setitem__", "__delitem__", "__set__", "__delete__", "__prepare__",
}  # fmt: skip
LIST_WRITERS = {"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"}


@dataclass(frozen=True)
class Code:
    """What a function's code names: attributes and strings, globals, imports, and into what the code writes."""

    names: frozenset[str]
    globals: frozenset[str]
    writes: str | None
    imports: frozenset[str]
    adds_in_place: bool


@functools.cache
def code_of(code: types.CodeType) -> Code:
    """-> what the code and the functions written inside it name."""
    names: set[str] = set()
    globals_, imports, writes, adds = set(), set(), None, False
    for each in _nested(code):
        names.update(c for c in each.co_consts if isinstance(c, str) and len(c) < 100)
        instructions = list(dis.get_instructions(each))
        for i, instruction in enumerate(instructions):
            name, op = instruction.argval, instruction.opname
            if op in ("STORE_SUBSCR", "DELETE_SUBSCR") and _into_argument(instructions[max(i - 4, 0) : i], each):
                continue
            if op == "STORE_ATTR" and name == "requires_grad":
                continue  # of a tensor: seen in the module's state and in its output
            if op in WRITES or (op == "STORE_DEREF" and name in code.co_freevars):
                writes = writes or (name if isinstance(name, str) else "an element of a container or tensor")
            elif op in ("LOAD_GLOBAL", "LOAD_NAME"):
                globals_.add(name)
            elif op.startswith("MATCH_"):
                names.add("a match statement")
            elif op == "INPLACE_ADD" or (op == "BINARY_OP" and instruction.argrepr.endswith("=")):
                adds = True
            elif op == "IMPORT_NAME":
                imports.add(name.split(".")[0])
            elif op in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
                names.add(name)
    return Code(frozenset(names), frozenset(globals_), writes, frozenset(imports), adds)


def _into_argument(before: list[dis.Instruction], code: types.CodeType) -> bool:
    """Whether an element is written into the function's own **kwargs, or into a cache of keys and values.

    No module that is given such a cache is part of a prefix.
    """
    at = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    keywords = code.co_varnames[at : at + 1] if code.co_flags & inspect.CO_VARKEYWORDS else ()
    loaded = [i.argval for i in before if i.opname.startswith("LOAD_FAST")]
    into_keywords = len(before) > 1 and before[-2].opname.startswith("LOAD_FAST") and before[-2].argval in keywords
    return into_keywords or any(str(name).startswith("past_key") for name in loaded)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def of_torch(cls: type) -> bool:
    return cls.__module__.startswith(("torch.nn.", "torch.ao.nn."))


def of_user(cls: type) -> list[type]:
    """-> the class and its bases, those of torch and of Python left out."""
    return [each for each in cls.__mro__ if not each.__module__.startswith(("torch.", "builtins"))]


def operators_of(classes: list[type]) -> set[str]:
    """-> the methods of the classes that Python calls by itself while other code runs."""
    found = {name for each in classes for name, value in vars(each).items() if isinstance(value, types.FunctionType)}
    return {name for name in found if name.startswith("__") and name.endswith("__")} - NOT_WHILE_RUNNING


def functions_of(value: Any) -> list[types.FunctionType]:
    """The functions behind a class's attribute: a method, a static or class method, a property."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    parts = [value.fget] if isinstance(value, property) else [getattr(value, "func", value)]
    return [part for part in parts if isinstance(part, types.FunctionType)]


@functools.cache
def codes_of(cls: type) -> tuple[Code, ...]:
    """-> the code of a class's forward and of all methods that it names in turn."""
    return () if of_torch(cls) else tuple(_codes(cls, torchs=False))


def _codes(cls: type, *, torchs: bool = True) -> list[Code]:
    names, done, found = {"forward"}, set[str](), []
    while names - done:
        name = (names - done).pop()
        done.add(name)
        for function in [f for each in cls.__mro__ for f in functions_of(vars(each).get(name))]:
            if torchs or not function.__module__.startswith("torch."):
                found.append(code_of(function.__code__))
                names |= found[-1].names
    return found


def entered(cls: type) -> set[str]:
    """-> the methods of a class with which a call of a module begins, with those that a forward of torch's names."""
    own = of_user(cls)
    names = {"forward"}
    torchs = next((c for c in cls.__mro__ if "forward" in vars(c)), nn.Module)
    if torchs not in own:
        names.update(*(code.names for code in _codes(torchs)), ())
    return names - {"__init__"}


def may_write_lists(cls: type) -> bool:
    """Whether the forward of a class may change a list among the arguments."""
    return any(code.adds_in_place or code.names & LIST_WRITERS for code in codes_of(cls))


def asks_identity(model: nn.Module, name: str) -> bool:
    """Whether the code around a module asks what a value's type is, which a placeholder answers otherwise."""
    parts = name.split(".")
    around: list[type] = [type(model.get_submodule(".".join(parts[:i]))) for i in range(len(parts))]
    return any("type" in code.globals for kind in around for code in codes_of(kind))
