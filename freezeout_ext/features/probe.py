"""Probe: a forward that may be watched is watched, its frontier found, and a forward from that alone checked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .effects import Generators, leaves_of
from .frontier import Frontier, poison, sliced, through
from .rounding import BOUNDS
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
        if isinstance(m, nn.SyncBatchNorm) and m.training and _is_spread():
            return f"{name} waits for other processes, whose forwards differ from this one's"
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "a global module hook is registered"
    return None


class Seen(Refused):
    """Poison reached an output; `again`: a second watch that follows shared memory may do better."""


@dataclass
class Forward:
    """One forward of a model that is to be understood.

    original: the model's forward.
    frozen: name -> module.
    lengths: of the samples, int64 [B], where they are padded.
    under: makes the context in which it runs over some samples of the batch (None: all), such as one where kept rows of
        fewer layers stand in for modules.
    rows: what is kept of this batch, once it was watched.
    """

    model: nn.Module
    device: torch.device
    original: Callable
    args: tuple
    kwargs: dict
    frozen: Mapping[str, nn.Module]
    batch_size: int
    lengths: Tensor | None
    under: Callable[[Tensor | None], AbstractContextManager]
    rows: list[Tensor] = field(default_factory=list)

    @property
    def inputs(self) -> tuple[tuple, dict]:
        return self.args, self.kwargs

    def watched(self, num_frozen: int, kept: torch.dtype | None, *, aliases: bool) -> tuple[Any, Any]:
        """Runs the forward. Returns (output, frontier), or in place of the frontier why there is none."""
        before = Generators()
        watch = Watch(self.model, self.frozen, self.args, self.kwargs, self.batch_size, aliases=aliases)
        with self.under(None), through(self.frozen, watch.call), watch:
            output = self.original(*self.args, **self.kwargs)
        after = Generators()
        try:
            watch.finish(output)
            length = None
            if self.lengths is not None:
                length = padded_length(self.args, self.kwargs)
                right_padded(self.kwargs, self.lengths)
            frontier = Frontier.of(
                watch, num_frozen, self.batch_size, length, kept, self.args, self.kwargs,
                autocast_state(self.device),
            )  # fmt: skip
            with _restored(self.model), torch.no_grad():
                ends = [watch.calls[call].ends[leaf] for call, leaf in frontier.kept]
                self.rows = self.check(frontier, ends, output, before)
            return output, frontier
        except Refused as reason:
            return output, reason
        finally:
            after.restore()
            if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
                torch.clear_autocast_cache()  # what was cast without a graph must not serve a forward with one

    def check(self, frontier: Frontier, ends: list[Tensor | None], output: Any, before: "Generators") -> list[Tensor]:
        """-> the rows that are kept.

        Args:
            ends: the first and the last sample's rows, as the watched forward had them.

        Raises:
            Refused: a forward from the frontier gives something else, or samples depend on their batch.
        """
        given = []
        for column, name, row, end in zip(
            frontier.columns, _kept_names(frontier), self._computed(frontier), ends, strict=True
        ):
            if row.dtype != column.dtype:
                raise Refused(f"{name} gives {row.dtype} in one forward and {column.dtype} in another")
            if row.is_floating_point() and not bool(row.isfinite().all()):
                raise Refused(f"{name} gives values that are not finite")
            given.append(self._without_padding(column.padded, row))
            assert end is not None  # it has a row a sample, see Frontier.of
            both = torch.tensor([0, self.batch_size - 1], device="cpu")
            mine = torch.cat([given[-1][:1], given[-1][-1:]])
            if mine.shape != end.shape or not _close(mine, self._without_padding(column.padded, end, both)):
                raise Refused(f"{name} gives a sample other features in another batch")
        before.restore()
        args, kwargs = self._poisoned(frontier)
        try:
            # Copies: what trains may write to its input in place.
            with frontier.replaced([row.clone() for row in given], frontier.length):
                found = self.original(*args, **kwargs)
        except Exception as error:
            raise Seen(f"a forward from kept features alone fails: {error}") from error
        ours, theirs = (list(leaves_of(tree)) for tree in (found, output))
        if len(ours) != len(theirs) or not all(map(self._same, ours, theirs)):
            raise Seen("a forward from kept features alone gives something else than the watched one")
        return given

    def _computed(self, frontier: Frontier) -> list[Tensor]:
        """-> the rows of the batch, computed half by half where that can be done."""
        if not frontier.sliceable:
            with self.under(None):
                return frontier.computed(self.original, *self.inputs)
        halves = []
        for part in torch.arange(self.batch_size, device="cpu").tensor_split([self.batch_size // 2]):
            with self.under(part):
                try:
                    rows = frontier.computed(self.original, *sliced(self.inputs, part, self.batch_size))
                except Exception as error:
                    raise Refused(f"the frozen modules cannot run on half of a batch: {error}") from error
            for name, row in zip(_kept_names(frontier), rows, strict=True):
                if not row.dim() or len(row) != len(part):
                    raise Refused(f"{name} gives {tuple(row.shape)} for {len(part)} samples")
            halves.append(rows)
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]

    def _without_padding(self, padded: bool, rows: Tensor, part: Tensor | None = None) -> Tensor:
        if not padded:
            return rows
        assert self.lengths is not None  # something is padded
        lengths = self.lengths if part is None else self.lengths[part]
        valid = torch.arange(rows.shape[1], device="cpu") < lengths[:, None]
        return rows.masked_fill(~valid.to(rows.device).view(*valid.shape, *[1] * (rows.dim() - 2)), 0)

    def _poisoned(self, frontier: Frontier) -> tuple:
        leaves, spec = tree_flatten(self.inputs)
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and i not in frontier.inputs_needed:
                leaves[i] = poison(x.shape, x.dtype, x.device)
        return tree_unflatten(leaves, spec)

    def _same(self, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if self.lengths is not None and a.dim() > 1 and len(a) == self.batch_size:
            length = padded_length(self.args, self.kwargs)
            if a.shape[1] == length:
                a, b = self._without_padding(True, a), self._without_padding(True, b)
        return _close(a, b)


def padded_length(args: tuple, kwargs: Mapping) -> int | None:
    """-> what samples are padded to, as an attention mask [B, L] or input_ids show it."""
    for name in ("attention_mask", "input_ids", "inputs_embeds"):
        x = kwargs.get(name)
        if isinstance(x, Tensor) and x.dim() >= 2 and (name != "attention_mask" or x.dim() == 2):
            return x.shape[1]
    first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() >= 2), None)
    return None if first is None else first.shape[1]


def lengths_of(kwargs: Mapping) -> Tensor | None:
    """-> the lengths of samples by their attention mask [B, L], on the CPU; None where there is no such mask."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        return None
    return mask.sum(1).to(torch.int64).cpu()


def right_padded(kwargs: Mapping, lengths: Tensor) -> None:
    """
    Raises:
        Refused: a sample's padding is not behind it.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point():
        expected = torch.arange(mask.shape[1], device="cpu") < lengths[:, None]
        if not torch.equal(expected, mask.cpu().bool()):
            raise Refused(
                "attention_mask has padding in front of a sample or inside it: pad behind (padding_side='right')"
            )


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    """-> whether autocast is on there, and its dtype."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _kept_names(frontier: Frontier) -> list[str]:
    names = list(frontier.modules)
    return [names[call] for call, _ in frontier.kept]


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
        for key in [key for key, hook in hooks.items() if getattr(hook, "observes_only", False)]:
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
    return any(not getattr(hook, "observes_only", False) for table in tables for hook in table.values())


def _is_spread() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
