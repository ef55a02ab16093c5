"""Probe: a forward that may be watched is watched, its frontier found, and a forward from that alone checked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..attach import observes_only
from ..torch_state import Generators, autocast_state
from .columns import masked
from .effects import leaves_of
from .frontier import Frontier, poison, sliced, through
from .rounding import BOUNDS
from .views import rank_and_processes
from .watch import Refused, Watch


def unwatchable(model: nn.Module, frozen: Mapping[str, nn.Module]) -> str | None:
    """-> why frozen modules of this model cannot be left out of a forward; None where no reason is known."""
    for name, module in frozen.items():
        for inner, m in module.named_modules():
            where = f"{name}.{inner}" if inner else name
            if _has_hooks(m):
                return f"a hook is registered on {where}, which would see no forward"
            if isinstance(m, torch.jit.ScriptModule):
                return f"{where} is scripted"
    for name, m in model.named_modules():
        if getattr(m, "_compiled_call_impl", None) is not None or "_orig_mod" in m._modules:
            return f"{name or 'the model'} is compiled, which hides what it reads"
        if isinstance(m, nn.SyncBatchNorm) and m.training and rank_and_processes()[1] > 1:
            return f"{name} waits for other processes, whose forwards differ from this one's"
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "a global module hook is registered"
    return None


@dataclass
class Forward:
    """One forward of a model that is to be understood."""

    model: nn.Module
    device: torch.device
    original: Callable  # the model's forward
    args: tuple
    kwargs: dict
    frozen: Mapping[str, nn.Module]
    batch_size: int
    lengths: Tensor | None  # int64 [B], of samples that are padded
    # Makes the context of a forward over some samples of the batch (None: all), where kept rows stand in for modules.
    under: Callable[[Tensor | None], AbstractContextManager]
    rows: list[Tensor] = field(default_factory=list)  # what is kept of this batch, once it was watched

    def watched(self, num_frozen: int, kept: torch.dtype | None) -> tuple[Any, Frontier | Refused]:
        """Runs the forward. Returns (output, frontier), or in place of the frontier why there is none."""
        before = Generators()
        watch = Watch(self.model, self.frozen, self.args, self.kwargs, self.batch_size)
        with self.under(None), through(self.frozen, watch.call), watch:
            output = self.original(*self.args, **self.kwargs)
        after = Generators()
        try:
            watch.finish(output)
            self.lengths = lengths_of(self.kwargs, self.lengths)
            length = None if self.lengths is None else padded_length(self.args, self.kwargs)
            frontier = Frontier.of(
                watch, num_frozen, self.batch_size, length, kept, self.args, self.kwargs, autocast_state(self.device)
            )
            with _restored(self.model), torch.no_grad():
                self.rows = self._computed(frontier, watch)
                before.restore()
                self._check_replaced(frontier, output)
            return output, frontier
        except Refused as reason:
            return output, reason
        finally:
            after.restore()
            if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
                torch.clear_autocast_cache()  # what was cast without a graph must not serve a forward with one

    def _computed(self, frontier: Frontier, watch: Watch) -> list[Tensor]:
        """-> the rows that are kept, computed half by half.

        Raises:
            Refused: a sample depends on its batch, or its rows cannot be kept.
        """
        halves = []
        try:
            for part in torch.arange(self.batch_size, device="cpu").tensor_split(2):
                with self.under(part):
                    some = sliced((self.args, self.kwargs), part, self.batch_size)
                    halves.append(frontier.computed(self.original, *some))
            rows = [torch.cat(pair) for pair in zip(*halves, strict=True)]
        except Exception as error:
            raise Refused(f"the frozen modules cannot run on half of a batch: {error}") from error
        columns = zip(frontier.columns, frontier.kept_names, frontier.kept, strict=True)
        for i, (column, name, place) in enumerate(columns):
            if rows[i].dtype != column.dtype:
                raise Refused(f"{name} gives {rows[i].dtype} in one forward and {column.dtype} in another")
            if len(rows[i]) != self.batch_size:
                raise Refused(f"{name} gives {len(rows[i])} rows for {self.batch_size} samples")
            if column.dtype.is_floating_point and not bool(rows[i].isfinite().all()):
                raise Refused(f"{name} gives values that are not finite")
            end = watch.ends[place]
            if column.padded:
                assert self.lengths is not None  # of a column that is padded
                rows[i], end = masked(rows[i], self.lengths), masked(end, self.lengths[[0, -1]])
            mine = rows[i][[0, -1]]
            if mine.shape != end.shape or not _close(mine, end):
                raise Refused(f"{name} gives a sample other features in another batch")
        return rows

    def _check_replaced(self, frontier: Frontier, output: Any) -> None:
        """
        Raises:
            Refused: a forward from kept rows and poison gives something else than the watched one.
        """
        leaves, spec = tree_flatten((self.args, self.kwargs))
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and i not in frontier.inputs_needed:
                leaves[i] = poison(x.shape, x.dtype, x.device)
        args, kwargs = tree_unflatten(leaves, spec)
        try:
            # Copies: what trains may write to its input in place.
            with frontier.replaced([row.clone() for row in self.rows], frontier.length):
                found = self.original(*args, **kwargs)
        except Exception as error:
            raise Refused(f"a forward from kept features alone fails: {error}") from error
        ours, theirs = (list(leaves_of(tree)) for tree in (found, output))
        if len(ours) != len(theirs) or not all(map(self._same, ours, theirs)):
            raise Refused("a forward from kept features alone gives something else than the watched one")

    def _same(self, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if self.lengths is not None and a.shape[:2] == (self.batch_size, padded_length(self.args, self.kwargs)):
            a, b = masked(a, self.lengths), masked(b, self.lengths)
        return _close(a, b)


def padded_length(args: tuple, kwargs: Mapping) -> int | None:
    """-> what samples are padded to: the attention mask [B, L] shows it, else the first input [B, L, ...]."""
    found = [kwargs.get("attention_mask"), *tree_leaves((args, kwargs))]
    return next((x.shape[1] for x in found if isinstance(x, Tensor) and x.dim() >= 2), None)


def lengths_of(kwargs: Mapping, given: Tensor | None) -> Tensor | None:
    """-> int64 [B] on the CPU, the lengths of samples: those that are given, else by their attention mask [B, L].

    None: nobody says.

    Raises:
        Refused: a sample's padding is not behind it.
    """
    lengths, mask = None if given is None else given.to("cpu", torch.int64), kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        return lengths
    mask = mask.cpu().bool()
    lengths = mask.sum(1) if lengths is None else lengths
    if not torch.equal(mask, torch.arange(mask.shape[1], device="cpu") < lengths[:, None]):
        raise Refused("attention_mask has padding in front of a sample or inside it: pad behind (padding_side='right')")
    return lengths


def _close(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, or as far apart as kernels that choose their order of summation by the batch may be."""
    if torch.equal(a, b):
        return True
    if not a.is_floating_point() or bool(a.isnan().any()):
        return False
    bound = max(BOUNDS[None], 4 * torch.finfo(a.dtype).eps) * float(b.abs().max())
    return float((a.double() - b.double()).abs().max()) <= bound


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Buffers, such as running statistics of layers that train, are afterwards what they were before.

    Inside, hooks that only observe, such as those that watch the order of execution, are not called.
    """
    kept = [(b, b.clone()) for b in model.buffers()]
    tables = [(t, dict(t)) for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks) if t]
    for table, hooks in tables:
        for key in [key for key, hook in hooks.items() if observes_only(hook)]:
            del table[key]
    try:
        yield
    finally:
        for table, hooks in tables:
            table.clear()
            table.update(hooks)
        for b, value in kept:
            # Through .data: the graph of the watched forward must not see a newer version.
            if not torch.equal(b, value):
                b.data.copy_(value)


def _has_hooks(module: nn.Module) -> bool:
    tables = module._forward_hooks, module._forward_pre_hooks
    return any(not observes_only(hook) for table in tables for hook in table.values())
