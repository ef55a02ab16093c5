"""Eligible: what of a model speaks against keeping the outputs of its frozen modules, before any forward is watched."""

from collections.abc import Mapping

import torch
from torch import nn


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


def _has_hooks(module: nn.Module) -> bool:
    tables = module._forward_hooks, module._forward_pre_hooks
    return any(not getattr(hook, "observes_only", False) for table in tables for hook in table.values())


def _is_spread() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )
