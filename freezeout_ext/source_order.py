"""In which order a module's forward calls its children, as far as its source tells. Nothing is run."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import groupby

from torch import nn

# Children whose entries run in turn: for a, b in zip(self.a, self.b).
Group = tuple[str, ...]
# Calls that hand their arguments on without running them.
PASSING = {"zip", "enumerate", "list", "tuple", "reversed", "iter"}
ASKING = {"len", "isinstance", "hasattr", "type", "callable", "range"}


def run_order(module: nn.Module, children: Iterable[str]) -> list[Group] | None:
    """Names of children -> groups of these names, in the order in which type(module).forward runs them.

    A group of several names stands for lists whose entries run in turn.

    Returns: None where the source is not there, mentions a child in several places, or does not mention one.
    """
    wanted = set(children)
    sequence = _Reader(type(module), wanted).sequence(type(module).forward)
    groups = [group for group, _ in groupby(sequence)]
    seen = [name for group in groups for name in group]
    if len(seen) != len(set(seen)) or set(seen) != wanted:
        return None
    return groups


@lru_cache(maxsize=512)
def adds(kind: type[nn.Module]) -> bool:
    """Whether the source of forward adds something up, as residual blocks do."""
    tree = _tree(inspect.unwrap(kind.forward))
    nodes = ast.walk(tree) if tree is not None else ()
    return any(isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add) for node in nodes)


class _Reader:
    """Walks a method in the order of execution and notes where it mentions children that it could run."""

    def __init__(self, kind: type, children: set[str]) -> None:
        self._kind, self._children = kind, children
        self._depth = 0
        self._self = ""
        self._aliases: dict[str, list[Group]] = {}

    def sequence(self, method: Callable) -> list[Group]:
        tree = _tree(inspect.unwrap(method))
        if tree is None or not tree.args.args:
            return []
        outer = self._self, self._aliases
        self._self, self._aliases = tree.args.args[0].arg, {}
        self._depth += 1
        found = [group for statement in tree.body for group in self._visit(statement)]
        self._depth -= 1
        self._self, self._aliases = outer
        return found

    def _visit(self, node: ast.AST) -> list[Group]:
        visit = getattr(self, f"_visit_{type(node).__name__}", None)
        return visit(node) if visit else self._inside(ast.iter_child_nodes(node))

    def _inside(self, nodes: Iterable[ast.AST]) -> list[Group]:
        return [group for node in nodes for group in self._visit(node)]

    def _visit_Assign(self, node: ast.Assign) -> list[Group]:
        found = self._visit(node.value)
        target = node.targets[0]
        if isinstance(target, ast.Name):
            self._aliases.pop(target.id, None)
            if _only_passes(node.value):
                self._aliases[target.id] = found
                return []
        return found

    def _visit_Name(self, node: ast.Name) -> list[Group]:
        return self._aliases.get(node.id, []) if isinstance(node.ctx, ast.Load) else []

    def _visit_If(self, node: ast.If) -> list[Group]:
        test = [] if isinstance(node.test, ast.Compare | ast.UnaryOp | ast.Attribute) else self._visit(node.test)
        return test + _either(self._inside(node.body), self._inside(node.orelse))

    def _visit_IfExp(self, node: ast.IfExp) -> list[Group]:
        return _either(self._visit(node.body), self._visit(node.orelse))

    def _visit_Compare(self, node: ast.Compare) -> list[Group]:
        return []

    def _visit_For(self, node: ast.For) -> list[Group]:
        found = self._visit(node.iter)
        body = self._inside(node.body)
        indexed = dict.fromkeys(name for group in body for name in group)
        if not found and len(indexed) > 1 and _is_indexed(node):
            return [tuple(indexed)]
        return found + body

    def _visit_Call(self, node: ast.Call) -> list[Group]:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ASKING:
            return []
        given = self._inside([*node.args, *(keyword.value for keyword in node.keywords)])
        if name == "zip":
            flat = dict.fromkeys(child for group in given for child in group)
            return [tuple(flat)] if flat else []
        method = self._own_attribute(node.func)
        if method is not None and method not in self._children:
            function = inspect.getattr_static(self._kind, method, None)
            if inspect.isfunction(function) and self._depth < 6:
                return given + self.sequence(function)
        return given + self._mentioned(node.func)

    def _visit_Attribute(self, node: ast.Attribute) -> list[Group]:
        name = self._own_attribute(node)
        return [(name,)] if name in self._children else []

    def _mentioned(self, function: ast.AST) -> list[Group]:
        """self.child(...), self.child.method(...), self.child[i](...)"""
        while isinstance(function, ast.Attribute | ast.Subscript):
            name = self._own_attribute(function)
            if name is not None:
                return [(name,)] if name in self._children else []
            function = function.value
        return self._visit(function)

    def _own_attribute(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self._self:
            return node.attr
        return None


def _either(one: list[Group], other: list[Group]) -> list[Group]:
    """What runs where one of two branches does: the longer one, if the other is part of it in the same order."""
    short, long = sorted((one, other), key=len)
    rest = iter(long)
    return long if all(group in rest for group in short) else one + other


def _only_passes(value: ast.AST) -> bool:
    calls = [node for node in ast.walk(value) if isinstance(node, ast.Call)]
    return all(isinstance(call.func, ast.Name) and call.func.id in PASSING for call in calls)


def _is_indexed(loop: ast.For) -> bool:
    """Whether the loop's body takes entries of its children by the loop's variable."""
    variables = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
    return any(
        isinstance(node, ast.Subscript)
        and any(isinstance(inner, ast.Name) and inner.id in variables for inner in ast.walk(node.slice))
        and isinstance(node.value, ast.Attribute)
        for statement in loop.body
        for node in ast.walk(statement)
    )


@lru_cache(maxsize=512)
def _tree(function: Callable) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    found: Iterator = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return next(found, None)
