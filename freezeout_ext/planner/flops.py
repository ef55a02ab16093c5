"""flop_costs: the cost of each layer counted, not measured."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..batch import Batch, call
from ..layers import Layers, find_layers
from .costs import StepCosts
from .marks import LayerMarks


def flop_costs(
    model: nn.Module, example_inputs: Batch, *, backward: float = 2.0, layers: Layers | None = None
) -> StepCosts:
    """forward_i = FLOP of layer i's convolutions and products; backward_i = `backward` * forward_i; all else free.

    This is the paper's model: a frozen forward costs as much as a forward, and each active layer a whole backward.
    The paper takes backward = 1. 2 is nearer the truth.
    The model may be on the meta device. The model is not changed.

    Args:
        example_inputs: one batch.
        backward: FLOP of the backward pass, divided by those of the forward pass.
    Source: Brock et al. 2017, arXiv 1706.04983, section 3 (its speed-up counts FLOP).
    """
    if not backward > 0:
        raise ValueError(f"backward must be > 0, got {backward}")
    layers = layers or find_layers(model)
    # Eval mode leaves running statistics as they are.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter, LayerMarks(model, layers, counter.get_total_flops) as marks:
            start = marks.now()
            call(model, example_inputs)
            end = marks.now()
    finally:
        for module in training:
            module.training = True
    forward = marks.forward_intervals(start, end)
    back = tuple(backward * flop for flop in forward)
    return StepCosts(
        layers=tuple(layer.name for layer in layers),
        forward=forward,
        frozen_forward=forward,
        backward=back,
        backward_first=back,
        optimizer=(0.0,) * len(layers),
        unit="FLOP",
        source=f"FLOP counted, backward = {backward:g} x forward",
    )
