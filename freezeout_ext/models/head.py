"""The head of the pre-activation nets, DenseNet and WideResNet."""

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
