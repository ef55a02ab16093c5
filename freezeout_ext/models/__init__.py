"""The paper's nets for small images, by name: build_model("wrn-16-2", num_classes=100)."""

import re

from torch import nn

from ..arguments import check_count
from .densenet import DenseNet
from .resnet import ResNet
from .vgg import VGG
from .wide_resnet import WideResNet

__all__ = ["VGG", "DenseNet", "ResNet", "WideResNet", "build_model", "model_names"]

_FORMS = {
    "wrn-DEPTH-WIDTH": "WideResNet, DEPTH 6n + 4: wrn-16-1, wrn-16-2, wrn-40-4",
    "densenet-DEPTH-GROWTH": "DenseNet-BC, DEPTH 6n + 4: densenet-40-12, densenet-76-12",
    "vgg-DEPTH[-xWIDTH]": "VGG with batch norm, DEPTH 11, 13, 16 or 19: vgg-16, vgg-11-x0.25",
    "resnet-DEPTH[-xWIDTH]": "ResNet, DEPTH 18 or 34: resnet-18, resnet-18-x0.25",
}
MOST_LAYERS = 10_000
_NAME = re.compile(r"(wrn|densenet)-(\d+)-(\d+)|(vgg|resnet)-(\d+)(?:-x(\d+(?:\.\d+)?))?", re.ASCII)


def model_names() -> list[str]:
    """The forms of name that build_model takes, one line each, with examples."""
    return [f"{form}: {meaning}" for form, meaning in _FORMS.items()]


def build_model(name: str, num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """The net called `name`, freshly initialised from torch's generator.

    Shapes: its forward takes [N, in_channels, H, W] to logits [N, num_classes].

    Args:
        name: a form of model_names(), such as "wrn-40-4", "densenet-76-12", "vgg-16", "resnet-18", "vgg-16-x0.25".
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: H = W of the images, at least 4. Only VGG depends on image_size: VGG stops pooling at one pixel.

    Raises:
        ValueError: a name of no known form, or a depth or width that its net does not have.
        TypeError: a count that is not a whole number.
    """
    check_count("num_classes", num_classes, 1)
    check_count("in_channels", in_channels, 1)
    check_count("image_size", image_size, 4)
    found = _NAME.fullmatch(name)
    if not found:
        raise ValueError(f"model must be one of {', '.join(_FORMS)} (such as wrn-16-2, vgg-16), got {name!r}")
    if int(found[2] or found[5]) > MOST_LAYERS:
        raise ValueError(f"model must have a depth <= {MOST_LAYERS}, got {name!r}")
    try:
        if found[1]:
            net = WideResNet if found[1] == "wrn" else DenseNet
            return net(int(found[2]), int(found[3]), num_classes=num_classes, in_channels=in_channels)
        depth, width = int(found[5]), float(found[6] or 1)
        if found[4] == "resnet":
            return ResNet(depth, width, num_classes=num_classes, in_channels=in_channels)
        return VGG(depth, width, num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from None
