"""FusedSGD, fused_sgd_ (the torch op) and fused_sgd_reference_: SGD over all active tensors in one call."""

from freezeout_ext.fused.op import fused_sgd_, fused_sgd_reference_
from freezeout_ext.fused.optimizer import FusedSGD

__all__ = ["FusedSGD", "fused_sgd_", "fused_sgd_reference_"]
