"""Wide residual networks for small images (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from torch import Tensor, nn

from ..arguments import check_count
from .parts import init_weights, pre_activation_head


class WideBlock(nn.Module):
    """y = shortcut + conv3x3(relu(bn(conv3x3(a)))), a = relu(bn(x)).

    The shortcut is x, or a 1x1 conv of a where the channels change.

    Shapes: [N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        changes = stride != 1 or channels != out_channels
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.relu(self.bn2(self.conv1(out)))
        return shortcut + self.conv2(out)


class WideResNet(nn.Module):
    """logits = head(blocks(stem(x))): three groups of n = (depth - 4) / 6 pre-activation blocks, 16, 32, 64 x width.

    Layers 0..L: the stem conv, 3n blocks in order, the head (last bn and fc). So L = 3n + 1: 19 for (40, 4).

    Shapes: [N, in_channels, H, W] -> [N, num_classes]. The maps have sides of H, H/2 and H/4.

    Args:
        depth: 6n + 4: the convolutions, the 1x1 shortcuts included, as the paper counts them.
        width: the widening factor k.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError, TypeError: depth not 6n + 4 with n >= 1, a count below 1.

    Parameters for (40, 4): 8,949,210 with 10 classes, 8.9 M in the paper.
    """

    def __init__(self, depth: int = 40, width: int = 4, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        check_count("depth", depth, 10)
        check_count("width", width, 1)
        if (depth - 4) % 6:
            raise ValueError(f"WRN depth must be 6n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}")
        channels = 16
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        for out_channels in (16 * width, 32 * width, 64 * width):
            for k in range((depth - 4) // 6):
                stride = 2 if k == 0 and blocks else 1
                blocks.append(WideBlock(channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = pre_activation_head(channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))
