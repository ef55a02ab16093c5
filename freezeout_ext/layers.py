"""find_layers: a model -> its layers in forward order, each trainable parameter in exactly one of them."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from .arguments import check_kind
from .named import named_units, timm_units
from .structure import Unit, find_units, is_repeated, main_module
from .text import table


@dataclass(frozen=True, eq=False)
class Layer:
    """What freezes together.

    name: of its main module.
    modules: dotted name -> module; their subtrees are disjoint.
    parameters: name -> trainable parameter, of these subtrees.
    submodules: all modules of these subtrees that no later layer holds as well. They go to eval mode.
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

    Args:
        layers: in forward order.
        given: what stands in front of them and came without a trainable parameter, so frozen already.
    """

    def __init__(self, layers: Iterable[Layer], given: Iterable[Layer] = ()) -> None:
        self._layers, self.given = _checked("layers", layers), _checked("given", given)

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


def _checked(name: str, layers: Iterable[Layer]) -> tuple[Layer, ...]:
    check_kind(name, layers, Iterable, "several Layer")
    layers = tuple(layers)
    for i, layer in enumerate(layers):
        check_kind(f"{name}[{i}]", layer, Layer, "a Layer")
    return layers


def find_layers(model: nn.Module, layers: Sequence | None = None) -> Layers:
    """model -> Layers: stem, blocks, head in forward order.

    How layers are found:

    - Each entry that a Sequential, ModuleList or ModuleDict repeats is one layer.
    - A norm belongs to the convolution or linear before it. Behind a block it opens the next layer (pre-activation).
    - A module without parameters goes with the layer before it in the same Sequential.
    - A last Sequential of linears is one layer, the head.
    - A module that holds most of the parameters is opened.
    - Children are taken in the order in which the source of forward mentions them, if the source tells.
    - A timm model's own `group_matcher` is used. Groups that are whole stages are divided into blocks.

    Tied parameters belong to the last layer that holds them. Layers without a trainable parameter are left out; those
    in front of all others are the result's `given`.

    Args:
        model: whose layers to find.
        layers: in place of the search, a sequence with one entry a layer. An entry is a module, the name of a module
            or parameter, or a list of these. A name stands for its whole subtree and may hold the wildcards * and ?.

    Raises:
        ValueError: nothing is trainable; an entry of `layers` names nothing, or what another one holds; a trainable
            parameter is in no layer.
        TypeError: model is no module; the model or a layer is scripted; an entry of `layers` is none of the above.
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    _refuse_scripted("model", model)
    if layers is not None:
        units = named_units(model, layers)
    else:
        units = timm_units(model) if hasattr(model, "group_matcher") else find_units(model)
    found = _assign_parameters(model, units)
    for name, module in [each for layer in found for each in layer.modules.items()]:
        _refuse_scripted(f"layer {name}", module)
    trained = [layer for layer in found if layer.parameters]
    if not trained:
        raise ValueError("model must have a parameter with requires_grad=True, found none")
    if layers is None:
        _warn_of_large_layers(model, trained)
    return Layers(trained, given=takewhile(_came_frozen, found))


def _refuse_scripted(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{name} must not be scripted or traced, got a {type(module).__name__}, which takes no hooks: pass the "
            "module that it was made of"
        )


def _warn_of_large_layers(model: nn.Module, layers: list[Layer]) -> None:
    """Little can freeze where there are few layers, or where one of them is most of the model."""
    if len(layers) < 3:
        names = ", ".join(layer.name for layer in layers)
        warnings.warn(
            f"only {len(layers)} layer{'s were' if len(layers) > 1 else ' was'} found ({names}), so that little or "
            f"nothing can freeze; pass layers=[...] with more, in the order in which they run{_parts(model, layers)}",
            stacklevel=4,
        )
    total = sum(layer.num_parameters for layer in layers)
    for layer in layers[:-1]:
        name, module = main_module(Unit(modules=layer.modules))
        if 3 * layer.num_parameters <= total or (module is not None and is_repeated(name, module, model)):
            continue
        warnings.warn(
            f"layer {layer.name} holds {layer.num_parameters / total:.0%} of the trainable parameters and freezes as "
            f"a whole; to divide it pass layers=[...] with its parts in its place{_parts(model, [layer])}",
            stacklevel=4,
        )


def _parts(model: nn.Module, layers: list[Layer]) -> str:
    """What the layers could be divided into, for a message."""
    parts = []
    for layer in layers:
        for name, module in layer.modules.items():
            inside = [f"{name}.{n}" for n, child in module.named_children() if any(True for _ in child.parameters())]
            parts += inside
    return ": " + ", ".join(map(repr, parts)) if parts else " (its modules have no parts)"


def _assign_parameters(model: nn.Module, units: list[Unit]) -> list[Layer]:
    # What is tied or shared ends with the last layer that holds it.
    owner = {p: i for i, unit in enumerate(units) for p in unit.parameters()}
    holder = {module: i for i, unit in enumerate(units) for module in unit.submodules()}
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for p, name in names.items() if p not in owner]
    if missing:
        raise ValueError(
            f"layers must hold every trainable parameter, {len(missing)} are in none: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}"
        )
    found, tied = [], set()
    for i, unit in enumerate(units):
        held = [p for p in dict.fromkeys(unit.parameters()) if p in names]
        tied |= {names[p] for p in held if owner[p] != i}
        parameters = {names[p]: p for p in held if owner[p] == i}
        submodules = tuple(module for module in dict.fromkeys(unit.submodules()) if holder[module] == i)
        if next(unit.parameters(), None) is not None:
            # A module that a later layer holds as well runs with that one.
            modules = {name: module for name, module in unit.modules.items() if module in submodules}
            found.append(Layer(unit.name, modules, parameters, submodules))
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
