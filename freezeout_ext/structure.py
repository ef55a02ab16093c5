"""Where a model's layers are, by its structure: containers, blocks of a class, the sources of forward."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .source_order import adds, run_order

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass
class Unit:
    """A layer in the making: modules and loose parameters by dotted name."""

    name: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    loose: dict[str, nn.Parameter] = field(default_factory=dict)
    opens: bool = False  # a norm that waits for the layer behind it
    leaf: bool = False  # bare weights, so that a norm behind it is its own

    def absorb(self, other: "Unit") -> None:
        self.modules |= other.modules
        self.loose |= other.loose

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.loose.values()
        for module in self.modules.values():
            yield from module.parameters()

    def submodules(self) -> Iterator[nn.Module]:
        for module in self.modules.values():
            yield from module.modules()

    def size(self) -> int:
        return sum(p.numel() for p in set(self.parameters()) if p.requires_grad)


def find_units(model: nn.Module) -> list[Unit]:
    """The units of a model in the order in which they run, as far as containers and the sources of forward tell.

    A unit that holds more than half of all parameters is opened, unless it is one of several blocks of a class.
    """
    opened: set[nn.Module] = set()
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    while True:
        units = _merge(_units("", model, opened, root=True))
        large = [unit for unit in units if 2 * unit.size() > total and divisible(unit, model, opened)]
        if not large:
            return units
        stage = main_module(large[0])[1]
        assert stage is not None  # a divisible unit has one
        opened.add(stage)


def parts_of(name: str, stage: nn.Module) -> list[Unit]:
    """The units of a module of that name, which is opened."""
    return _merge(_units(name, stage, set()))


def main_module(unit: Unit) -> tuple[str, nn.Module | None]:
    """The module of a unit that holds more than half of its parameters, by name."""
    for name, module in unit.modules.items():
        if 2 * Unit(modules={name: module}).size() > unit.size():
            return name, module
    return "", None


def divisible(unit: Unit, model: nn.Module, opened: Iterable[nn.Module] = ()) -> bool:
    """Whether the unit's main module is no block among its like, and its parts run in an order that is known."""
    name, module = main_module(unit)
    if module is None or module in opened or not _trained_children(module):
        return False
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, CONTAINERS):
        return False
    if is_repeated(name, module, model) and not is_stage(module):
        return False
    return isinstance(module, CONTAINERS) or _children_in_order(module)[1]


def is_repeated(name: str, module: nn.Module, model: nn.Module) -> bool:
    """Whether the module stands beside another one of its class."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return sum(type(child) is type(module) for child in parent.children()) > 1


def _units(prefix: str, module: nn.Module, opened: set[nn.Module], *, root: bool = False) -> Iterator[Unit]:
    """The pieces of an opened module in the order of execution, before norms and passive modules find their layer."""
    loose = {joined(prefix, name): p for name, p in module.named_parameters(recurse=False)}
    children, _ = _children_in_order(module)
    trained = [child for _, child in children if has_parameters(child)]
    for inner, child in children:
        name = joined(prefix, inner)
        if root and len(trained) > 1 and child is trained[-1] and _is_head(child) and child not in opened:
            pieces = iter([Unit(name, {name: child})])
        else:
            pieces = _pieces(name, child, opened, in_order=isinstance(module, nn.Sequential))
        for unit in pieces:
            if loose and any(map(has_parameters, unit.modules.values())):
                unit.loose, loose = {**loose, **unit.loose}, {}
            yield unit
    if loose:
        yield Unit(next(iter(loose)), loose=loose, leaf=True)


def _pieces(name: str, module: nn.Module, opened: set[nn.Module], *, in_order: bool) -> Iterator[Unit]:
    unit = Unit(name, {name: module})
    if _is_norm(module):
        unit.opens = True
        yield unit
    elif not has_parameters(module):
        # Outside a Sequential nothing tells where it runs: it must not be switched off with a wrong layer.
        if in_order:
            yield unit
    elif not list(module.children()):
        unit.leaf = True
        yield unit
    elif isinstance(module, CONTAINERS) or module in opened or is_stage(module):
        yield from _units(name, module, opened)
    else:
        yield unit


def _children_in_order(module: nn.Module) -> tuple[list[tuple[str, nn.Module]], bool]:
    """(children by name in the order in which forward runs them, whether that order is known).

    An order that is not known is the order of registration. Lists whose entries run in turn give their entries in turn.
    """
    # Not named_children(), which hides the second place of a shared module.
    children = {name: child for name, child in module._modules.items() if child is not None}
    trained = _trained_children(module)
    if isinstance(module, CONTAINERS):
        return list(children.items()), isinstance(module, nn.Sequential)
    groups = run_order(module, trained)
    if groups is None:
        return list(children.items()), len(trained) < 2
    ordered: list[tuple[str, nn.Module]] = []
    for group in groups:
        lists: list[Any] = [children[name] for name in group]
        sizes = {len(each) if isinstance(each, nn.ModuleList) else 0 for each in lists}
        if len(group) == 1:
            ordered.append((group[0], lists[0]))
        elif sizes == {0} or len(sizes) > 1:
            return list(children.items()), False
        else:
            for i in range(sizes.pop()):
                ordered += [(f"{name}.{i}", each[i]) for name, each in zip(group, lists, strict=True)]
    return ordered + [(name, child) for name, child in children.items() if name not in trained], True


def _trained_children(module: nn.Module) -> list[str]:
    return [name for name, child in module._modules.items() if child is not None and has_parameters(child)]


def _merge(pieces: Iterable[Unit]) -> list[Unit]:
    """Pieces -> units. A norm joins the bare layer before it, or else the layer behind it.

    A module without parameters joins the layer before it.
    """
    units: list[Unit] = []
    waiting = Unit()
    for piece in pieces:
        passive = not piece.loose and not any(map(has_parameters, piece.modules.values()))
        if piece.opens and units and units[-1].leaf and not waiting.modules:
            units[-1].absorb(piece)
        elif piece.opens or (passive and (waiting.modules or not units)):
            waiting.absorb(piece)
        elif passive:
            units[-1].absorb(piece)
        else:
            waiting.absorb(piece)
            waiting.name, waiting.leaf = piece.name, piece.leaf
            units.append(waiting)
            waiting = Unit()
    if waiting.modules:
        units = units or [Unit(next(iter(waiting.modules)))]
        units[-1].absorb(waiting)
    return units


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, NORMS):
        return True
    parameters = list(module.parameters())
    # RMSNorm variants, PReLU, LayerScale: vectors that scale or shift what a layer gave.
    return bool(parameters) and not list(module.children()) and all(p.dim() <= 1 for p in parameters)


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, CONTAINERS) and any(has_parameters(child) for child in module.children())


def is_stage(module: nn.Module) -> bool:
    """Whether some list inside `module` holds two blocks of one class, so that it is a stage and not a block.

    A holder that adds something to what its blocks give is a residual block. In it, blocks of a single weight (a
    convolution with its norm) do not count.
    """
    lists: list[nn.Module]
    for holder in module.modules():
        if isinstance(holder, CONTAINERS):
            lists, residual = ([holder] if holder is module else []), False
        else:
            lists, residual = list(_lists(holder)), adds(type(holder))  # type: ignore[arg-type]  # takes Module.__hash__ for the class's
        for each in lists:
            blocks = [b for b in each.children() if _is_block(b) and not (residual and _num_weights(b) < 2)]
            if len(blocks) > len(set(map(type, blocks))):
                return True
    return False


def _lists(holder: nn.Module) -> Iterator[nn.Module]:
    """The containers in which a module keeps its parts."""
    for child in holder.children():
        if isinstance(child, CONTAINERS):
            yield child
            yield from _lists(child)


def _num_weights(module: nn.Module) -> int:
    return sum(p.dim() > 1 for p in module.parameters())


def _is_head(module: nn.Module) -> bool:
    leaves = [m for m in module.modules() if list(m.parameters(recurse=False))]
    return isinstance(module, nn.Sequential) and all(isinstance(m, nn.Linear) or _is_norm(m) for m in leaves)


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
