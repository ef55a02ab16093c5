"""DenseNet-BC for small images (Huang et al. 2017, arXiv 1608.06993)."""

import torch
from torch import Tensor, nn

from ..arguments import check_count
from .parts import init_weights, pre_activation_head


class Bottleneck(nn.Module):
    """y = cat(x, conv3x3(relu(bn(conv1x1(relu(bn(x))))))).

    Shapes: [N, C, H, W] -> [N, C + growth, H, W]; the inner 1x1 has 4 * growth channels.
    """

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        return torch.cat((x, out), 1)


class Transition(nn.Module):
    """y = avg_pool2x2(conv1x1(relu(bn(x)))).

    Shapes: [N, C, H, W] -> [N, C', H // 2, W // 2].
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.relu(self.bn(x))))


class DenseNet(nn.Module):
    """logits = head(blocks(stem(x))): three dense blocks of n = (depth - 4) / 6 bottlenecks, two halving transitions.

    Layers 0..L: the stem conv, then 3n bottlenecks and 2 transitions in order, then the head (last bn and fc).
    So L = 3n + 3: 39 for (76, 12).

    Shapes: [N, in_channels, H, W] -> [N, num_classes]; H, W >= 4. The maps have sides of H, H/2 and H/4.

    Args:
        depth: 6n + 4. The convolutions, those of the two transitions included, and fc are counted.
        growth: channels that each bottleneck adds; the stem has twice as many.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError, TypeError: depth not 6n + 4 with n >= 1, a count below 1.

    Parameters for (76, 12): 486,730 with 10 classes.
    """

    def __init__(self, depth: int = 76, growth: int = 12, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        check_count("depth", depth, 10)
        check_count("growth", growth, 1)
        if (depth - 4) % 6:
            raise ValueError(f"DenseNet-BC depth must be 6n + 4 (10, 16, 22, ..., 40, 76, 100), got {depth}")
        channels = 2 * growth
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for stage in range(3):
            if stage:
                blocks.append(Transition(channels, channels // 2))
                channels //= 2
            for _ in range((depth - 4) // 6):
                blocks.append(Bottleneck(channels, growth))
                channels += growth
        self.blocks = nn.Sequential(*blocks)
        self.head = pre_activation_head(channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))
