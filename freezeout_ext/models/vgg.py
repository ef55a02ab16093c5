"""VGG with batch norm for small images (Simonyan and Zisserman 2014, arXiv 1409.1556)."""

from torch import Tensor, nn

from ..arguments import check_count
from .parts import check_width, init_weights

# Convolutions in each of the five stages.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class ConvUnit(nn.Module):
    """y = max_pool2x2(relu(bn(conv3x3(x)))), or without the pooling.

    Shapes: [N, C, H, W] -> [N, C', H, W], or [N, C', H // 2, W // 2].
    """

    def __init__(self, channels: int, out_channels: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.bn(self.conv(x))))


class VGG(nn.Module):
    """logits = classifier(mean over H, W of features(x)): five stages of conv units, each stage halving the map.

    Layers 0..L: the depth - 3 conv units in order, the classifier. So L = depth - 3: 13 for VGG-16.
    The classifier is that of the FreezeOut authors: two hidden linear layers with bn and relu, a third bn.

    Shapes: [N, in_channels, H, W] -> [N, num_classes].
    A stage ends without pooling once an image of image_size is down to one pixel. At 32 all five stages pool, at 8 the
    first three. The maps of larger images are averaged at the end.

    Args:
        depth: 11, 13, 16 or 19.
        width: factor of all channels and of the hidden size, below 1 for small nets.
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: H = W of the images for which the pooling is chosen.

    Raises:
        ValueError, TypeError: another depth, a width that leaves no channel, a count below 1.

    Parameters for VGG-16: 15,252,426 with 10 classes.
    """

    def __init__(
        self,
        depth: int = 16,
        width: float = 1.0,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"VGG depth must be one of {', '.join(map(str, STAGES))}, got {depth}")
        check_width(width, CHANNELS[0])
        check_count("image_size", image_size, 1)
        channels, size, units = in_channels, image_size, []
        for convs, full_channels in zip(STAGES[depth], CHANNELS, strict=True):
            for k in range(convs):
                pool = k == convs - 1 and size > 1
                out_channels = int(full_channels * width)
                units.append(ConvUnit(channels, out_channels, pool))
                channels = out_channels
                size = size // 2 if pool else size
        self.features = nn.Sequential(*units)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        hidden = [nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU()]
        hidden += [nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU(), nn.BatchNorm1d(channels)]
        self.classifier = nn.Sequential(*hidden, nn.Linear(channels, num_classes))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))
