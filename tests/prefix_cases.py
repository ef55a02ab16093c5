"""Small nets of many shapes, a few-line freezing of their layers, and the comparison with plain eager freezing."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from freezeout_ext.attach import is_pinned, pin, unpin
from freezeout_ext.layers import Layers, find_layers
from freezeout_ext.models import build_model
from freezeout_ext.prefix import Prefix


def conv_bn(channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class ShyOfHooks(nn.Module):
    """Computes otherwise in eval mode where it finds hooks on itself, as nn.TransformerEncoderLayer does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hooked = self._forward_hooks or self._forward_pre_hooks
        return self.conv(x) * (2 if hooked and not self.training else 1)


class Bottleneck(nn.Module):
    """The block of ResNet-50, in the usual writing: relu in place and `out += x`."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * width
        self.a, self.b, self.c = conv_bn(channels, width, 1), conv_bn(width, width, 3, stride), conv_bn(width, out, 1)
        self.relu = nn.ReLU(inplace=True)
        self.down = conv_bn(channels, out, 1, stride) if stride > 1 or channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.c(self.relu(self.b(self.relu(self.a(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class ResNet50(nn.Module):
    """conv1, bn1, relu and the pool written out in forward: no chain, glue between frozen modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Bottleneck(8, 4), Bottleneck(16, 4))
        self.layer2 = nn.Sequential(Bottleneck(16, 6, 2), Bottleneck(24, 6))
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = 3 * channels
        act = nn.ReLU6(inplace=True)
        self.body = nn.Sequential(
            *conv_bn(channels, hidden, 1),
            act,
            *conv_bn(hidden, hidden, 3, stride, hidden),
            act,
            *conv_bn(hidden, out, 1),
        )
        self.skip = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [InvertedResidual(8, 8, 1), InvertedResidual(8, 12, 2), InvertedResidual(12, 12, 1)]
        self.features = nn.Sequential(nn.Sequential(*conv_bn(3, 8), nn.ReLU6(inplace=True)), *blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.ModuleList(Encoder(16) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class UNet(nn.Module):
    """Skips leave every encoder, so that they cross any frontier in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(*conv_bn(3, 6), nn.ReLU())
        self.down2 = nn.Sequential(*conv_bn(6, 8), nn.ReLU())
        self.middle = nn.Sequential(*conv_bn(8, 8), nn.ReLU())
        self.up2 = nn.Sequential(*conv_bn(16, 6), nn.ReLU())
        self.up1 = nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        x = self.up2(torch.cat((F.interpolate(c, size=b.shape[2:]), b), 1))
        x = self.up1(torch.cat((F.interpolate(x, size=a.shape[2:]), a), 1))
        return x.mean((2, 3))


class Branches(nn.Module):
    """Two frozen branches on one input, tuples between them."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(3, 6), conv_bn(3, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.a(x), {"b": self.b(x).relu()}

    def __init__(self) -> None:
        super().__init__()
        self.fork = self.Fork()
        self.join = nn.Sequential(*conv_bn(10, 8), nn.ReLU())
        self.blocks = nn.Sequential(Bottleneck(8, 2), Bottleneck(8, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, rest = self.fork(x)
        x = self.join(torch.cat([F.relu(a), rest["b"]], dim=1))
        return self.head(self.blocks(x).mean((2, 3)))


class Shared(nn.Module):
    """One convolution that runs twice, and a function of the input beside the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = conv_bn(3, 6), nn.Sequential(*conv_bn(6, 6), nn.ReLU())
        self.last, self.head = nn.Sequential(*conv_bn(9, 8), nn.ReLU()), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(F.relu(self.stem(x))))
        return self.head(self.last(torch.cat((y, x.abs()), 1)).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "densenet": lambda: build_model("densenet-16-4", image_size=16),
    "wrn": lambda: build_model("wrn-16-1", image_size=16),
    "vgg": lambda: build_model("vgg-11-x0.125", image_size=16),
    "resnet-18": lambda: build_model("resnet-18-x0.125", image_size=16),
    "resnet-50": ResNet50,
    "mobilenet": MobileNet,
    "vit": ViT,
    "unet": UNet,
    "branches": Branches,
    "shared": Shared,
}


def trained(name: str) -> nn.Module:
    """A net whose running statistics are not those of the start."""
    torch.manual_seed(1)
    model = NETS[name]().train()
    for _ in range(2):
        model(images(8))
    return model


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 16, 16)


def freeze(model: nn.Module, num_frozen: int, layers: Layers | None = None) -> Layers:
    """Plain freezing: what FreezeOut does to layers, without an optimizer."""
    layers = layers or find_layers(model)
    for i, layer in enumerate(layers):
        for p in layer.parameters.values():
            p.requires_grad_(i >= num_frozen)
            p.grad = p.grad if i >= num_frozen else None
        for module in layer.submodules:
            if i >= num_frozen:
                unpin(module)
            elif not is_pinned(module):
                pin(module)
    return layers


def pair(model: nn.Module, num_frozen: int, mode: str, **options) -> tuple[nn.Module, nn.Module, Prefix]:
    """-> a copy with plain freezing, the model with a prefix as well, and the prefix."""
    plain = copy.deepcopy(model)
    freeze(plain, num_frozen)
    layers = freeze(model, num_frozen)
    prefix = Prefix(model, layers, mode=mode, measure=options.pop("measure", False), **options)
    prefix.freeze(num_frozen)
    return plain, model, prefix


def one_step(model: nn.Module, seed: int, batch: int = 6, run: Callable | None = None) -> dict[str, Tensor]:
    """Loss, gradients and buffers of one forward and backward with everything random seeded."""
    torch.manual_seed(seed)
    x, y = images(batch), torch.randint(10, (batch,))
    model.zero_grad()
    output = run(model, x) if run else model(x)
    loss = F.cross_entropy(output, y)
    loss.backward()
    found = {"output": output.detach(), "loss": loss.detach(), "random": torch.rand(1)}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def assert_same_steps(plain: nn.Module, model: nn.Module, batches=(6, 6, 5, 6), run: Callable | None = None) -> None:
    """Bit for bit, a smaller batch among them; the first steps are watched, the others run the prefix."""
    for seed, batch in enumerate(batches):
        expected, found = one_step(plain, seed, batch, run), one_step(model, seed, batch, run)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(value, found[name]), f"{name} in step {seed}"


def steps_until_installed(model: nn.Module, prefix: Prefix) -> None:
    """Watched, and again where somebody looked at a value inside a chain."""
    for seed in range(8):
        if prefix.is_settled:
            return
        one_step(model, seed)
    raise AssertionError(prefix.report())


def perturb_frontier(prefix: Prefix, size: float, seed: int) -> None:
    """From now on the installed prefix, of mode "exact", gives its outputs plus noise of `size` times their maximum."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf + size * leaf.abs().max() * (2 * torch.rand(leaf.shape, generator=generator) - 1)
        return leaf

    for part in prefix._chains:
        engine = part.trial.engine
        part.trial.engine = lambda *inputs, engine=engine: tree_map(noisy, engine(*inputs))


def assert_within_perturbation(
    model: nn.Module, plain: nn.Module, folded: nn.Module, prefix: Prefix, step: Callable[[nn.Module], dict]
) -> None:
    """Outputs and gradients are off by no more than what noise at the frontier, as large as the reported error, makes.

    Measured on the nets here against noise of 1e-7 of the frontier's maximum: at most 2.2 times its effect, 5 in the
    VGG, whose error at the frontier is 2e-6. Against noise of the reported error: at most 0.8 times. Twice is allowed.

    Args:
        model: an unfrozen copy of what the others were made from. plain: with plain freezing. folded: with `prefix`.
    """
    report = prefix.report()
    # The forwards watched before moved the statistics of the active layers.
    plain.load_state_dict(folded.state_dict())
    runs = []
    for seed in (1, 2, 3):
        _, noisy, its_prefix = pair(copy.deepcopy(model), report.num_frozen, "exact")
        for _ in range(8):  # chains that are cut once are watched again
            step(noisy)
        assert its_prefix.report().calls
        for mine, theirs in zip(noisy.buffers(), folded.buffers(), strict=True):
            if not torch.equal(mine, theirs):  # a frozen one would be a change that the prefix must see
                mine.copy_(theirs)
        perturb_frontier(its_prefix, max(report.error, 1e-7), seed)
        runs.append(step(noisy))
    expected, found = step(plain), step(folded)
    assert expected.keys() == found.keys()
    # Where a true gradient is 0 (a bias in front of a norm) all of it is rounding: judged by all gradients' scale.
    scale = max(value.abs().max() for key, value in expected.items() if key.startswith("gradient"))
    for key, value in expected.items():
        effect = max((value - run[key]).abs().max() for run in runs)
        floor = 1e-6 * max(scale, value.abs().max())
        assert (value - found[key]).abs().max() <= 2 * effect + floor, f"{key} at {report.num_frozen}"
