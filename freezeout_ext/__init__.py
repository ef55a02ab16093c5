"""FreezeOut for PyTorch: layers anneal, freeze and leave the backward pass one by one (arXiv 1706.04983)."""

from .features import FeatureCache
from .freezeout import FreezeOut
from .fused import FusedAdam, FusedAdamW, FusedSGD
from .graphed import GraphedStep
from .layers import Layer, Layers, find_layers
from .native import build_info, version
from .schedule import Schedule
from .transition import Transition

__version__ = version()

__all__ = [
    "FeatureCache",
    "FreezeOut",
    "FusedAdam",
    "FusedAdamW",
    "FusedSGD",
    "GraphedStep",
    "Layer",
    "Layers",
    "Schedule",
    "Transition",
    "__version__",
    "build_info",
    "find_layers",
]
