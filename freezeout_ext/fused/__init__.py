"""SGD, AdamW and Adam over all active tensors in one call: the optimizers, their torch ops, the ops' references."""

from freezeout_ext.fused.adamw import FusedAdam, FusedAdamW
from freezeout_ext.fused.adamw_op import fused_adamw_, fused_adamw_reference_
from freezeout_ext.fused.optimizer import FusedOptimizer
from freezeout_ext.fused.sgd import FusedSGD
from freezeout_ext.fused.sgd_op import fused_sgd_, fused_sgd_reference_

__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "FusedOptimizer",
    "FusedSGD",
    "fused_adamw_",
    "fused_adamw_reference_",
    "fused_sgd_",
    "fused_sgd_reference_",
]
