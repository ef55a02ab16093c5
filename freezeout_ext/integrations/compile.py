"""torch.compile layer by layer: a transition compiles the two layers it changes anew, and the others stay."""

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..arguments import check_kind
from ..freezeout import FreezeOut, Transition

logger = logging.getLogger("freezeout_ext")

# One block's graphs: training, at the frontier (its input needs no gradient), frozen, evaluation; each for a second
# batch shape too.
GRAPHS_PER_BLOCK = 8


class CompiledLayers:
    """layer(x) -> torch.compile(layer)(x) for each block of each layer, in place, parameter names unchanged.

    What torch compiles as one unit is compiled anew whenever something in the unit freezes. The 8th time it turns eager
    for good. With CompiledLayers a transition makes two graphs: of the layer that froze, without a backward, and of the
    layer behind it, whose input no longer needs a gradient.

    Blocks of one class share their graphs and their limit of graphs. The limit is raised for these blocks alone.
    A graph break is an error, unless `fullgraph=False` is passed. A limit that is reached all the same is an error.

    A compiled forward cannot be watched.
    Make CompiledLayers after the first `step()` to have the layers' order checked.

    Args:
        freezeout: whose layers to compile, from its next forward on.
        arguments: of torch.compile.

    Attributes:
        blocks: name -> compiled module.
        left_out: name -> why the module stays eager.
        graphs: number of frozen layers -> graphs that were compiled meanwhile.

    Raises:
        TypeError: freezeout is none.
        ValueError: a block is compiled already.
    """

    def __init__(self, freezeout: FreezeOut, **arguments: Any) -> None:
        check_kind("freezeout", freezeout, FreezeOut, "a FreezeOut")
        self.graphs: dict[int, int] = {0: 0} | {freezeout.num_frozen: 0}
        self.blocks: dict[str, nn.Module] = {}
        self.left_out: dict[str, str] = {}
        self._freezeout = freezeout
        self._arguments = {"fullgraph": True, **arguments}
        freezeout.skip_order_check()
        for layer in freezeout.layers:
            for name, module in _whole_sequentials(freezeout.model, layer.modules).items():
                self._sort(name, module)
        if not self.blocks:
            warnings.warn(
                "no layer holds a block that could be compiled: "
                + ", ".join(f"{name} ({reason})" for name, reason in list(self.left_out.items())[:3])
                + "; pass layers=[...] of FreezeOut with the modules that run several others",
                stacklevel=2,
            )
        limit = GRAPHS_PER_BLOCK * len(self.blocks)
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            self._arguments.setdefault("recompile_limit", limit)
        else:
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, limit)
        for module in self.blocks.values():
            module._compiled_call_impl = self._counted(torch.compile(_entry(module), **self._arguments))
        self._remove_hook = freezeout.register_transition_hook(self._log)

    def __repr__(self) -> str:
        lines = [f"{sum(self.graphs.values())} graphs of {len(self.blocks)} blocks: {', '.join(self.blocks)}"]
        lines += [f"with {num_frozen} frozen: {count} graphs" for num_frozen, count in self.graphs.items()]
        return "\n".join(lines + [f"eager: {name} ({reason})" for name, reason in self.left_out.items()])

    def close(self) -> None:
        """Makes all layers eager again."""
        self._remove_hook()
        for module in self.blocks.values():
            module._compiled_call_impl = None

    def _sort(self, name: str, module: nn.Module) -> None:
        if not list(module.children()):
            self.left_out[name] = f"a single {type(module).__name__}: nothing to fuse"
        elif isinstance(module, nn.ModuleList | nn.ModuleDict):
            self.left_out[name] = f"a {type(module).__name__} has no forward"
        elif module._compiled_call_impl is not None:
            raise ValueError(f"layers must not be compiled already, {name} is")
        else:
            self.blocks[name] = module

    def _counted(self, compiled: Callable) -> Callable:
        stats = torch._dynamo.utils.counters["stats"]

        def call(*args: Any, **kwargs: Any) -> Any:
            before = stats["unique_graphs"]
            output = compiled(*args, **kwargs)
            if made := stats["unique_graphs"] - before:
                num_frozen = self._freezeout.num_frozen
                self.graphs[num_frozen] = self.graphs.get(num_frozen, 0) + made
            return output

        return call

    def _log(self, freezeout: FreezeOut, transition: Transition) -> None:
        self.graphs.setdefault(transition.num_frozen, 0)
        logger.info(
            "step %d: %d graphs compiled so far; the next forward compiles the layers at the frontier anew",
            transition.step, sum(self.graphs.values()),
        )  # fmt: skip


def _whole_sequentials(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of a layer, those that are all children of one nn.Sequential replaced by the Sequential."""
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        block = model.get_submodule(parent)
        children = [f"{parent}.{child}" for child, _ in block.named_children()]
        if (
            parent
            and type(block) is nn.Sequential
            and len(children) > 1
            and all(child in modules for child in children)
        ):
            found[parent] = block
        else:
            found[name] = module
    return found


def _entry(module: nn.Module) -> Callable:
    if not isinstance(module, nn.Sequential):
        return module._call_impl  # its forward is one code object a class: equal blocks share their graphs

    # Sequential.forward is torch's own code, which torch.compile skips: without a frame of ours it would stay eager.
    def sequential(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    return sequential
