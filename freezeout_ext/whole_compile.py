"""A model compiled as one unit turns eager for good after a few transitions: said before the run."""

import warnings

from torch import nn

from .schedule import Schedule


def bare(model: nn.Module) -> nn.Module:
    """The module inside torch.compile(model), whose names and parameters are those to freeze."""
    return getattr(model, "_orig_mod", model)


def warn_if_beyond_limit(model: nn.Module, schedule: Schedule) -> None:
    """Warns where a compiled model needs more graphs than torch makes before it gives up: one a transition."""
    if model is bare(model) and getattr(model, "_compiled_call_impl", None) is None:
        return
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    graphs = 1 + len({schedule.num_frozen(schedule.milestone(i)) for i in range(schedule.num_layers)} - {0})
    if graphs > limit:
        warnings.warn(
            f"the model is compiled as a whole: {graphs} sets of frozen layers need a graph each, and torch turns it "
            f"eager for good after {limit} (torch._dynamo.config.recompile_limit); pass max_transitions={limit - 2} "
            "or less, or compile layer by layer with freezeout_ext.integrations.compile.CompiledLayers(freezeout)",
            stacklevel=3,
        )
