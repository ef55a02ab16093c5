"""Where a model's layers are, by the names that the user lists or by timm's groups of parameters."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .structure import Unit, divisible, has_parameters, is_stage, joined, main_module, parts_of


def named_units(model: nn.Module, layers: Sequence) -> list[Unit]:
    if isinstance(layers, str | nn.Module) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence with one entry a layer, got {type(layers).__name__}")
    found: list[Unit] = []
    holder: dict[str, int] = {}
    for i, entry in enumerate(layers):
        unit = Unit()
        for item in entry if isinstance(entry, list | tuple) else [entry]:
            unit.absorb(_resolve(model, item, f"layers[{i}]"))
        names = [*unit.modules, *unit.loose]
        if not names:
            raise ValueError(f"layers[{i}] must name at least one module or parameter, got {entry!r}")
        unit.name = names[0] if names else ""
        for name in names:
            for held, j in holder.items():
                if name == held or name.startswith(held + ".") or held.startswith(name + "."):
                    raise ValueError(f"layers must not overlap, layers[{j}] holds {held} and layers[{i}] {name}")
        holder |= dict.fromkeys(names, i)
        found.append(unit)
    return found


def _resolve(model: nn.Module, item: str | nn.Module, argument: str) -> Unit:
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(item, nn.Module):
        found = {name: module for name, module in modules.items() if module is item}
        if not found:
            raise ValueError(f"{argument} must be a module inside the model, got a {type(item).__name__} that is not")
        return Unit(modules=found)
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
    return Unit(modules=top, loose=loose)


def _inside(name: str, modules: dict[str, nn.Module]) -> bool:
    return any(name.startswith(module + ".") for module in modules)


def timm_units(model: nn.Module) -> list[Unit]:
    """One unit for each group of the model's own `group_matcher`; a group that is a whole stage is divided further."""
    from timm.models import group_parameters

    timm_model: Any = model
    names: Any = _EveryName(model)
    groups = group_parameters(names, timm_model.group_matcher(coarse=False))
    owner = {name: group for group, names in groups.items() for name in names}
    units = {group: Unit() for group in sorted(groups)}
    _place("", model, owner, units)
    found: list[Unit] = []
    for unit in units.values():
        unit.name = next(iter([*unit.modules, *unit.loose]), "")
        found += _divided(unit, model)
    return found


class _EveryName:
    """What group_parameters asks of a model, with all names of parameters of shared modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._model.named_parameters(remove_duplicate=False)


def _divided(unit: Unit, model: nn.Module) -> list[Unit]:
    """The blocks of a unit whose main module is a stage with a known order of execution, or the unit as it is."""
    name, stage = main_module(unit)
    if stage is None or not is_stage(stage) or not divisible(unit, model):
        return [unit]
    parts = parts_of(name, stage)
    if len(parts) < 2:
        return [unit]
    before = dict.fromkeys(list(unit.modules)[: list(unit.modules).index(name)])
    for other, module in unit.modules.items():
        if other != name:
            parts[0 if other in before else -1].modules[other] = module
    parts[0].loose |= unit.loose
    return parts


def _place(name: str, module: nn.Module, owner: dict[str, int], units: dict[int, Unit]) -> None:
    """Gives the module to the one group that owns all its parameters, or its parts to theirs."""
    inside = {owner[joined(name, inner)] for inner, _ in module.named_parameters(remove_duplicate=False)}
    if name and len(inside) == 1:
        units[inside.pop()].modules[name] = module
        return
    for inner, p in module.named_parameters(recurse=False):
        units[owner[joined(name, inner)]].loose[joined(name, inner)] = p
    for inner, child in module._modules.items():
        if child is not None and has_parameters(child):
            _place(joined(name, inner), child, owner, units)
