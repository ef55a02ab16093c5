"""What the code of functions and classes names: globals, attributes, what is written; read from the bytecode."""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

WRITES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR"}
WRITING_FUNCTIONS = {"setattr", "delattr", "globals", "exec", "eval", "compile", "open", "input", "print", "__import__"}
WRITING_METHODS = {
    "__setattr__", "__delattr__", "__setitem__", "__dict__", "register_buffer", "register_module", "register_parameter",
    "add_module",
}  # fmt: skip
# What a traced value answers otherwise than a tensor.
ASKS = {"hasattr", "type", "callable", "id", "is_torch_fx_proxy"}
LIST_WRITERS = {"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"}


@dataclass(frozen=True)
class Code:
    """What a function's code names: attributes and strings, globals; whether it writes, and into what."""

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


def functions_of(value: Any) -> list[types.FunctionType]:
    """The functions behind a class's attribute: a method, a static or class method, a property."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    parts = [value.fget] if isinstance(value, property) else [getattr(value, "func", value)]
    return [part for part in parts if isinstance(part, types.FunctionType)]


@functools.cache
def codes_of(cls: type) -> tuple[Code, ...]:
    """-> the code of a class's forward and of all methods that it names in turn."""
    names, done, found = {"forward"}, set[str](), []
    while not of_torch(cls) and names - done:
        name = (names - done).pop()
        done.add(name)
        for function in [f for each in cls.__mro__ for f in functions_of(vars(each).get(name))]:
            if not function.__module__.startswith("torch."):
                found.append(code_of(function.__code__))
                names |= found[-1].names
    return tuple(found)


def asks(cls: type) -> str | None:
    """-> by which function the forward of a class would take a traced value for something else than a tensor."""
    return next((name for code in codes_of(cls) for name in sorted((code.globals | code.names) & ASKS)), None)


def may_write_lists(cls: type) -> bool:
    """Whether the forward of a class may change a list that it is given."""
    return any(code.adds_in_place or code.names & LIST_WRITERS for code in codes_of(cls))
