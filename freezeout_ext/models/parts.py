"""What the nets share: the pre-activation head, He's initialisation and the checks of their sizes."""

from collections import OrderedDict

from torch import nn


def pre_activation_head(channels: int, num_classes: int) -> nn.Sequential:
    """logits = fc(mean over H, W of relu(bn(x))).

    Shapes: [N, channels, H, W] -> [N, num_classes].
    """
    return nn.Sequential(
        OrderedDict(
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(channels, num_classes),
        )
    )


def init_weights(model: nn.Module) -> None:
    """Convolutions N(0, 2 / (k * k * out_channels)), linear biases 0.

    Norms and linear weights keep torch's initialisation.

    Source: He et al. 2015, arXiv 1502.01852, with the fan-out, as the code of all the nets' authors has it.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def check_width(width: float, narrowest: int) -> None:
    """Raise ValueError unless width * narrowest is at least one channel."""
    if not 1 <= narrowest * width < float("inf"):
        raise ValueError(f"width must be >= {1 / narrowest:g} (one channel of {narrowest}), got {width}")
