"""find_layers: a model -> its layers in forward order, each trainable parameter in exactly one of them."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile

from torch import nn

from .text import table

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True, eq=False)
class Layer:
    """What freezes together: top modules by dotted name (disjoint subtrees) and their trainable parameters by name.

    `submodules` are all modules of these subtrees that no later layer holds as well: those that go to eval mode.
    """

    name: str
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    submodules: tuple[nn.Module, ...]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def is_called(self, name: str) -> bool:
        """Whether `name` is the layer's, that of one of its modules, or of what holds these."""
        return any(own == name or own.startswith(f"{name}.") for own in (self.name, *self.modules))


class Layers(Sequence[Layer]):
    """The layers 0..L of a model in forward order; prints as a table of layer, modules and parameters.

    given: what stands in front of them and came without a trainable parameter: frozen before FreezeOut sees it.
    """

    def __init__(self, layers: Iterable[Layer], given: Iterable[Layer] = ()) -> None:
        self._layers = tuple(layers)
        self.given = tuple(given)

    def __getitem__(self, index):
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def count_through(self, last: int | str, argument: str) -> int:
        """So many layers are meant: a number as it is, or a layer's name: that layer and all before it.

        A stage's name means all of its layers. The name of one that came frozen (`given`) means none of 0..L.

        Raises:
            TypeError, ValueError: not a number of layers; no layer has that name.
        """
        if not isinstance(last, int | str) or isinstance(last, bool):
            raise TypeError(f"{argument} must be a number of layers or a layer's name, got {last!r}")
        if isinstance(last, int):
            if not 0 <= last <= len(self):
                raise ValueError(f"{argument} must be in 0..{len(self)}, got {last}")
            return last
        named = [i for i, layer in enumerate(self) if layer.is_called(last)]
        if not named and not any(layer.is_called(last) for layer in self.given):
            names = ", ".join(layer.name for layer in (*self.given, *self))
            raise ValueError(f"{argument} must name a layer, nothing is called {last!r}; the layers are {names}")
        return named[-1] + 1 if named else 0

    def __repr__(self) -> str:
        rows = [("layer", "name", "parameters", "modules")]
        rows += [
            (str(i), layer.name, f"{layer.num_parameters:,}", ", ".join(layer.modules) or "-")
            for i, layer in enumerate(self)
        ]
        rows.append(("total", "", f"{sum(layer.num_parameters for layer in self):,}", ""))
        return table(rows, left=[1, 3], rule=False)


@dataclass
class _Unit:
    """A layer in the making: modules and loose parameters by dotted name."""

    name: str = ""
    modules: dict[str, nn.Module] = field(default_factory=dict)
    loose: dict[str, nn.Parameter] = field(default_factory=dict)
    opens: bool = False  # a norm that waits for the layer behind it
    leaf: bool = False  # bare weights, so that a norm behind it is its own

    def absorb(self, other: "_Unit") -> None:
        self.modules |= other.modules
        self.loose |= other.loose


def find_layers(model: nn.Module, layers: Sequence | None = None) -> Layers:
    """model -> Layers: stem, blocks, head in forward order.

    Found by structure: what Sequential, ModuleList and ModuleDict repeat is one layer each; a norm belongs to the
    convolution or linear before it, or opens the layer behind it where a block precedes it (pre-activation nets); a
    module without parameters goes with the layer before it in the same Sequential; a last Sequential of linears is
    one layer, the head. A timm model's own `group_matcher` is used where there is one.

    Args:
        layers: overrides the search: a sequence with one entry a layer, each a module, the name of a module or
            parameter (with * and ? as wildcards; a name stands for its whole subtree), or a list of these.

    Tied parameters belong to the last layer that holds them. Layers without a trainable parameter are left out; those
    in front of all others are the result's `given`.

    Raises:
        ValueError: nothing is trainable; an entry of `layers` names nothing or what another one holds; a trainable
            parameter is in no layer.
        TypeError: an entry of `layers` is none of the above.
    """
    if layers is not None:
        units = _named_units(model, layers)
    elif hasattr(model, "group_matcher"):
        units = _timm_units(model)
    else:
        units = _merge(_units("", model, root=True))
    found = _assign_parameters(model, units)
    trained = [layer for layer in found if layer.parameters]
    if not trained:
        raise ValueError("model must have a parameter with requires_grad=True, found none")
    return Layers(trained, given=takewhile(_came_frozen, found))


def _assign_parameters(model: nn.Module, units: list[_Unit]) -> list[Layer]:
    # What is tied or shared ends with the last layer that holds it.
    owner = {p: i for i, unit in enumerate(units) for p in _unit_parameters(unit)}
    holder = {module: i for i, unit in enumerate(units) for module in _submodules(unit)}
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for p, name in names.items() if p not in owner]
    if missing:
        raise ValueError(
            f"layers must hold every trainable parameter, {len(missing)} are in none: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}"
        )
    found, tied = [], set()
    for i, unit in enumerate(units):
        held = [p for p in dict.fromkeys(_unit_parameters(unit)) if p in names]
        tied |= {names[p] for p in held if owner[p] != i}
        parameters = {names[p]: p for p in held if owner[p] == i}
        submodules = tuple(module for module in dict.fromkeys(_submodules(unit)) if holder[module] == i)
        if next(_unit_parameters(unit), None) is not None:
            found.append(Layer(unit.name, unit.modules, parameters, submodules))
    if tied:
        warnings.warn(
            f"{', '.join(sorted(tied))}: used by several layers, freezes with the last of them; until then the "
            "backward pass reaches the first of them and freezing saves less",
            stacklevel=3,
        )
    return found


def _came_frozen(layer: Layer) -> bool:
    return not any(p.requires_grad for module in layer.modules.values() for p in module.parameters()) and not (
        layer.parameters
    )


def _unit_parameters(unit: _Unit) -> Iterator[nn.Parameter]:
    yield from unit.loose.values()
    for module in unit.modules.values():
        yield from module.parameters()


def _submodules(unit: _Unit) -> Iterator[nn.Module]:
    for module in unit.modules.values():
        yield from module.modules()


# By structure


def _units(prefix: str, module: nn.Module, *, root: bool = False) -> Iterator[_Unit]:
    """The pieces of an opened module in registration order, before norms and passive modules find their layer."""
    loose = {_join(prefix, name): p for name, p in module.named_parameters(recurse=False)}
    # Not named_children(), which hides the second place of a shared module.
    children = [(_join(prefix, name), child) for name, child in module._modules.items() if child is not None]
    trained = [child for _, child in children if _has_parameters(child)]
    for name, child in children:
        if root and len(trained) > 1 and child is trained[-1] and _is_head(child):
            pieces = iter([_Unit(name, {name: child})])
        else:
            pieces = _pieces(name, child, in_order=isinstance(module, nn.Sequential))
        for unit in pieces:
            if loose and any(map(_has_parameters, unit.modules.values())):
                unit.loose, loose = {**loose, **unit.loose}, {}
            yield unit
    if loose:
        yield _Unit(next(iter(loose)), loose=loose, leaf=True)


def _pieces(name: str, module: nn.Module, *, in_order: bool) -> Iterator[_Unit]:
    unit = _Unit(name, {name: module})
    if _is_norm(module):
        unit.opens = True
        yield unit
    elif not _has_parameters(module):
        # Outside a Sequential nothing tells where it runs: it must not be switched off with a wrong layer.
        if in_order:
            yield unit
    elif not list(module.children()):
        unit.leaf = True
        yield unit
    elif isinstance(module, CONTAINERS) or _repeats(module):
        yield from _units(name, module)
    else:
        yield unit


def _merge(pieces: Iterable[_Unit]) -> list[_Unit]:
    """Norms to the bare layer before them or the layer behind them, passive modules to the layer before them."""
    units: list[_Unit] = []
    waiting = _Unit()
    for piece in pieces:
        passive = not piece.loose and not any(map(_has_parameters, piece.modules.values()))
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
            waiting = _Unit()
    if waiting.modules:
        units = units or [_Unit(next(iter(waiting.modules)))]
        units[-1].absorb(waiting)
    return units


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, NORMS):
        return True
    parameters = list(module.parameters())
    # RMSNorm variants, PReLU, LayerScale: vectors that scale or shift what a layer gave.
    return bool(parameters) and not list(module.children()) and all(p.dim() <= 1 for p in parameters)


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, CONTAINERS) and any(_has_parameters(child) for child in module.children())


def _repeats(module: nn.Module) -> bool:
    """Whether some list inside `module` holds two blocks of one class, so that it is a stage and not a block."""
    for child in module.modules():
        if isinstance(child, CONTAINERS):
            kinds = [type(block) for block in child.children() if _is_block(block)]
            if len(kinds) > len(set(kinds)):
                return True
    return False


def _is_head(module: nn.Module) -> bool:
    leaves = [m for m in module.modules() if list(m.parameters(recurse=False))]
    return isinstance(module, nn.Sequential) and all(isinstance(m, nn.Linear) or _is_norm(m) for m in leaves)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


# By name


def _named_units(model: nn.Module, layers: Sequence) -> list[_Unit]:
    if isinstance(layers, str | nn.Module) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence with one entry a layer, got {type(layers).__name__}")
    units: list[_Unit] = []
    holder: dict[str, int] = {}
    for i, entry in enumerate(layers):
        unit = _Unit()
        for item in entry if isinstance(entry, list | tuple) else [entry]:
            unit.absorb(_resolve(model, item, f"layers[{i}]"))
        names = [*unit.modules, *unit.loose]
        unit.name = names[0] if names else ""
        for name in names:
            for held, j in holder.items():
                if name == held or name.startswith(held + ".") or held.startswith(name + "."):
                    raise ValueError(f"layers must not overlap, layers[{j}] holds {held} and layers[{i}] {name}")
        holder |= dict.fromkeys(names, i)
        units.append(unit)
    return units


def _resolve(model: nn.Module, item: str | nn.Module, argument: str) -> _Unit:
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(item, nn.Module):
        found = {name: module for name, module in modules.items() if module is item}
        if not found:
            raise ValueError(f"{argument} must be a module inside the model, got a {type(item).__name__} that is not")
        return _Unit(modules=found)
    if not isinstance(item, str):
        raise TypeError(f"{argument} must be a module, a name or a list of these, got {type(item).__name__}")
    matched = {name: module for name, module in modules.items() if fnmatchcase(name, item)}
    top = {name: module for name, module in matched.items() if not _inside(name, matched)}
    loose = {name: p for name, p in model.named_parameters() if fnmatchcase(name, item) and not _inside(name, top)}
    if not top and not loose:
        known = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"{argument} must name a module or parameter, nothing is called {item!r}; top modules: {known}"
        )
    return _Unit(modules=top, loose=loose)


def _inside(name: str, modules: dict[str, nn.Module]) -> bool:
    return any(name.startswith(module + ".") for module in modules)


def _timm_units(model: nn.Module) -> list[_Unit]:
    from timm.models import group_parameters

    groups = group_parameters(model, model.group_matcher(coarse=False))
    owner = {name: group for group, names in groups.items() for name in names}
    units = {group: _Unit() for group in sorted(groups)}
    _place("", model, owner, units)
    for unit in units.values():
        unit.name = next(iter([*unit.modules, *unit.loose]), "")
    return list(units.values())


def _place(name: str, module: nn.Module, owner: dict[str, int], units: dict[int, _Unit]) -> None:
    """Gives the module to the one group that owns all its parameters, or its parts to theirs."""
    inside = {owner[_join(name, inner)] for inner, _ in module.named_parameters()}
    if name and len(inside) == 1:
        units[inside.pop()].modules[name] = module
        return
    for inner, p in module.named_parameters(recurse=False):
        units[owner[_join(name, inner)]].loose[_join(name, inner)] = p
    for inner, child in module.named_children():
        if _has_parameters(child):
            _place(_join(name, inner), child, owner, units)
