"""What the code of functions and classes names, read from the bytecode, and whether the code is in a small subset."""

import builtins
import dis
import functools
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Their functions are taken to depend on their arguments, and on what their modules hold.
TRUSTED = {
    "torch", "timm", "transformers", "torchvision", "einops", "math", "cmath", "operator", "functools", "itertools",
    "collections", "typing", "types", "abc", "enum", "dataclasses", "builtins", "copy", "warnings", "logging",
    "inspect", "contextlib", "packaging", "typing_extensions", "numbers", "string", "re", "huggingface_hub",
}  # fmt: skip
WRITES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}  # what a library writes besides is seen
LIST_WRITERS = {"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"}
# What a traced value answers otherwise than a tensor, or a trace would keep the answer to.
ASKS = {"hasattr", "type", "callable", "id", "__class__", "is_torch_fx_proxy", "is_grad_enabled", "is_autocast_enabled"}

# The subset of Python that code of the user's own may be written in.
OPCODES = {
    "CACHE", "COPY", "COPY_FREE_VARS", "DUP_TOP", "DUP_TOP_TWO", "EXTENDED_ARG", "NOP", "NOT_TAKEN", "POP_TOP",
    "PUSH_NULL", "RESUME", "ROT_TWO", "ROT_THREE", "ROT_FOUR", "SWAP", "MAKE_CELL", "LOAD_CLOSURE", "MAKE_FUNCTION",
    "STORE_DEREF", "RERAISE", "RAISE_VARARGS", "LOAD_ASSERTION_ERROR", "LOAD_COMMON_CONSTANT",
    "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR",
    "RETURN_VALUE", "RETURN_CONST", "RETURN_GENERATOR", "YIELD_VALUE", "GEN_START",
    "PRECALL", "KW_NAMES", "CALL", "CALL_KW", "CALL_METHOD", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX",
    "CALL_INTRINSIC_1", "COMPARE_OP", "IS_OP", "CONTAINS_OP", "TO_BOOL", "GET_ITER", "FOR_ITER", "END_FOR", "POP_ITER",
    "UNPACK_SEQUENCE", "UNPACK_EX", "LIST_EXTEND", "LIST_APPEND", "LIST_TO_TUPLE", "DICT_MERGE", "DICT_UPDATE",
}  # fmt: skip
OPCODE_FAMILIES = (
    "LOAD_FAST", "STORE_FAST", "DELETE_FAST", "BINARY_", "UNARY_", "INPLACE_", "BUILD_TUPLE", "BUILD_LIST",
    "BUILD_SLICE", "BUILD_MAP", "BUILD_CONST_KEY_MAP", "JUMP_", "POP_JUMP_",
)  # fmt: skip
COMPREHENSIONS = {"<listcomp>", "<genexpr>"}
BUILTINS = {
    "abs", "all", "any", "bool", "dict", "enumerate", "float", "int", "len", "list", "max", "min",
    "range", "reversed", "slice", "sum", "super", "tuple", "zip", "AssertionError", "NotImplementedError",
    "RuntimeError", "TypeError", "ValueError",
}  # fmt: skip
OF_MODULES = {"children", "forward", "functional", "get", "items", "keys", "nn", "training", "values"}
MAKE_TENSORS = {"arange", "eye", "full", "linspace", "ones", "tensor", "zeros", "rearrange"}
MAY_BE_NONE = {"grad", "grad_fn", "names"}


@dataclass(frozen=True)
class Code:
    """What a function's code names: attributes and strings, globals, imports, and into what the code writes.

    Attributes:
        outside: of the subset of Python, None where all is in it.
        attributes: that are read of some object.
    """

    names: frozenset[str]
    attributes: frozenset[str]
    globals: frozenset[str]
    imports: frozenset[str]
    writes: str | None
    outside: str | None
    adds_in_place: bool


@functools.cache
def code_of(code: types.CodeType) -> Code:
    """-> what the code and the functions written inside it name."""
    strings, attributes, globals_, imports = set[str](), set[str](), set[str](), set[str]()
    writes = outside = None
    adds = False
    for each in _nested(code):
        constants = [c for constant in each.co_consts for c in (constant if type(constant) is tuple else [constant])]
        strings.update(c for c in constants if isinstance(c, str) and len(c) < 100)
        if each is not code and each.co_name not in COMPREHENSIONS:
            outside = "a function inside it"
        if each.co_freevars and (each is code) and set(each.co_freevars) != {"__class__"}:
            outside = "variables of the function around it"
        before: Any = None
        for instruction in dis.get_instructions(each):
            name, op, given, before = instruction.argval, instruction.opname, before, instruction.argval
            if op == "IS_OP" and given is not None:  # whose answer for a stand-in is another one than for a value
                outside = outside or "`is`, but of None"
            if op not in OPCODES and not op.startswith(OPCODE_FAMILIES):
                outside = outside or op
            if op == "STORE_ATTR" and name == "requires_grad":
                continue  # of a tensor: seen in the module's state and in its output
            if op in WRITES or (op == "STORE_DEREF" and name in code.co_freevars):
                writes = name
            elif op in ("LOAD_GLOBAL", "LOAD_NAME"):
                globals_.add(name)
            elif op == "INPLACE_ADD" or (op == "BINARY_OP" and instruction.argrepr.endswith("=")):
                adds = True
            elif op == "IMPORT_NAME":
                imports.add(name.split(".")[0])
            elif op in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
                attributes.add(name)
    if "YIELD_VALUE" in {i.opname for i in dis.get_instructions(code)}:
        outside = "yield"
    if "out" in strings:
        outside = outside or "out="
    names = frozenset(strings | attributes)
    return Code(names, frozenset(attributes), frozenset(globals_), frozenset(imports), writes, outside, adds)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


@functools.cache
def of_tensors() -> frozenset[str]:
    """-> attributes that read tensors, and torch's functions of tensors. None writes what it is given."""
    functions = torch.overrides.get_overridable_functions().values()
    names = {function.__name__ for each in functions for function in each} | set(dir(Tensor)) | set(dir(math))
    names |= {name for name, value in vars(torch).items() if isinstance(value, torch.dtype | torch.memory_format)}
    read = {name for name in names if not name.endswith("_") and not name.startswith("_")}
    return frozenset((read | MAKE_TENSORS | OF_MODULES) - MAY_BE_NONE)


def is_trusted(value: Any) -> bool:
    """Whether a function, class or module of Python's is one of a library that is trusted."""
    where = value.__globals__["__name__"] if isinstance(value, types.FunctionType) else value.__module__
    return str(where).split(".")[0] in TRUSTED


def is_trusted_in_c(function: Any) -> bool:
    """Whether a function in C gives the same for the same arguments, by whose method it is."""
    owner = getattr(function, "__self__", None)
    if owner is builtins:
        return function.__name__ in BUILTINS
    if isinstance(owner, types.ModuleType):
        return owner.__name__.split(".")[0] in TRUSTED
    own = isinstance(owner, type | None) or type(owner).__module__.split(".")[0] == "torch"
    return own and not isinstance(owner, torch.Generator)


def of_torch(cls: type) -> bool:
    return cls.__module__.startswith(("torch.nn.", "torch.ao.nn."))


def written_by_others(cls: type) -> list[type]:
    """-> the class and its bases, those of torch and of Python left out."""
    return [each for each in cls.__mro__ if not each.__module__.startswith(("torch.", "builtins"))]


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
    while names - done:
        name = (names - done).pop()
        done.add(name)
        for function in [f for each in written_by_others(cls) for f in functions_of(vars(each).get(name))]:
            found.append(code_of(function.__code__))
            names |= found[-1].names
    return tuple(found)


def asks(cls: type) -> str | None:
    """-> by which function the forward of a class would take a traced value for something else than a tensor."""
    return next((name for code in codes_of(cls) for name in sorted((code.globals | code.names) & ASKS)), None)


def may_write_lists(cls: type) -> bool:
    """Whether the forward of a class may change a list among the arguments."""
    return any(code.adds_in_place or code.names & LIST_WRITERS for code in codes_of(cls))


def asks_identity(model: nn.Module, name: str) -> bool:
    """Whether the code around a module asks what a value's type is, which a placeholder answers otherwise."""
    parts = name.split(".")
    around: list[type] = [type(model.get_submodule(".".join(parts[:i]))) for i in range(len(parts))]
    return any("type" in code.globals for kind in around for code in codes_of(kind))
