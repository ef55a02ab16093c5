"""ResNet with a 3x3 stem for small images (He et al. 2015, arXiv 1512.03385)."""

from collections import OrderedDict

from torch import Tensor, nn

from .parts import check_width, init_weights

# Blocks in each of the four stages.
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
CHANNELS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """y = relu(shortcut(x) + bn(conv3x3(relu(bn(conv3x3(x)))))).

    The shortcut is x, or bn(conv1x1(x)) where the shape changes.

    Shapes: [N, C, H, W] -> [N, C', ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            conv = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.shortcut(x) + out)


class ResNet(nn.Module):
    """logits = fc(mean over H, W of blocks(relu(bn(conv3x3(x))))): four stages of basic blocks.

    Layers 0..L: the stem (conv and bn), the blocks in order, fc. So L = 9 for ResNet-18.

    Shapes: [N, in_channels, H, W] -> [N, num_classes]. The maps have sides of H, H/2, H/4 and H/8.

    Args:
        depth: 18 or 34.
        width: factor of all channels, below 1 for small nets.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError, TypeError: another depth, a width that leaves no channel.

    Parameters for ResNet-18: 11,173,962 with 10 classes.
    """

    def __init__(self, depth: int = 18, width: float = 1.0, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"ResNet depth must be one of {', '.join(map(str, STAGES))}, got {depth}")
        check_width(width, CHANNELS[0])
        channels = int(CHANNELS[0] * width)
        conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels), relu=nn.ReLU()))
        blocks = []
        for stage, (count, full_channels) in enumerate(zip(STAGES[depth], CHANNELS, strict=True)):
            for k in range(count):
                out_channels = int(full_channels * width)
                blocks.append(BasicBlock(channels, out_channels, stride=2 if stage and k == 0 else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        fc = nn.Linear(channels, num_classes)
        self.head = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=fc))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))
