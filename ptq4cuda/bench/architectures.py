"""Well-known architectures with random weights, for tests and timings where trained networks are not at hand.

    net = build("resnet18", width=0.25)
    calibrate_batch_norm(net, images(32, 64))

Weights are random but behave like trained ones where quantization looks:

- He initialisation keeps the energy of activations from layer to layer. Half of the energy of a spatial kernel is in
  its mean: filters see smooth images, and pass less of white noise.
- BatchNorm weights are log-normal: the ranges of channels differ by an order of magnitude. Biases lie around +0.4 of
  the weight, so that a ReLU cuts a third of the values, and nearly all of some channels. Running statistics are those
  of images.
- The last BatchNorm of a residual branch is damped, against what it is added to. Without that, and with no bias, a
  random network of this depth is chaotic: it turns noise of -60 dB at its input into -20 dB at its output, where a
  trained one averages it away.
- The weights of the plain network follow Student's t distribution with 3 degrees of freedom: heavy tails, as in
  networks trained without BatchNorm.

Accuracy of a random network means nothing; its noise, bytes and seconds do. The names of the layers are this file's
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptq4cuda.compat import BatchNorm

Builder = Callable[..., nn.Module]


def images(n: int, size: int = 224, seed: int = 0) -> Tensor:
    """Return smooth random images [n, 3, size, size] of mean 0 and standard deviation 1, with edges.

    Noise of several octaves, colours that go together as in photographs, and in each image one half-plane that is
    darker, so that there is an edge.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, 3, size, size)
    for octave in range(2, 7):
        cells = min(2**octave, size)
        noise = torch.randn(n, 4, cells, cells, generator=generator)
        noise = F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False)
        x += (noise[:, :1] + 0.4 * noise[:, 1:]) / 2**octave
    ramp = torch.linspace(-1.0, 1.0, size)
    angle = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    side = angle.cos() * ramp.view(1, 1, size) + angle.sin() * ramp.view(1, size, 1)
    x -= 0.3 * (side > 0.4 * torch.randn(n, 1, 1, generator=generator)).float()[:, None]
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def waves(n: int, length: int = 4000, seed: int = 0) -> Tensor:
    """Return random sounds [n, 1, length] of mean 0 and standard deviation 1: tones that die away, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    period, phase, start, decay = torch.rand(4, n, 6, 1, generator=generator)
    t = torch.arange(length) / length - 0.8 * start
    tones = (2 * math.pi * t * 200.0 ** (0.3 + 0.7 * period) + 6.28 * phase).sin() * (-(2 + 20 * decay) * t).exp()
    x = (tones * (t > 0)).sum(1, keepdim=True) + 0.05 * torch.randn(n, 1, length, generator=generator)
    return (x - x.mean()) / x.std()


@torch.no_grad()
def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights anew, as the docstring of this file says; return the network."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape or like.shape, generator=generator)

    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            weight = module.weight
            fan_in = module.in_channels if isinstance(module, nn.ConvTranspose2d) else weight[0].numel()
            weight.copy_(normal(weight))
            if weight.dim() == 4 and weight.shape[-1] > 1:
                weight.add_(normal(weight, *weight.shape[:2], 1, 1)).mul_(math.sqrt(0.5))
            weight.mul_(math.sqrt(2.0 / fan_in))
            if module.bias is not None:
                module.bias.copy_(0.1 * normal(module.bias))
        elif isinstance(module, BatchNorm):
            module.weight.copy_((0.5 * normal(module.weight)).exp())
            module.bias.copy_(module.weight * (0.4 + 0.6 * normal(module.bias)))
    for module in net.modules():
        branch = getattr(module, "branch", None)
        if isinstance(branch, nn.Module) and getattr(module, "residual", True):
            last = [norm for norm in branch.modules() if isinstance(norm, BatchNorm)][-1]
            last.weight.mul_(0.3)
            last.bias.mul_(0.3)
    return net


@torch.no_grad()
def calibrate_batch_norm(net: nn.Module, batch: Tensor) -> nn.Module:
    """Set the running statistics of every BatchNorm to those of a batch; return the network in evaluation mode."""
    norms = [module for module in net.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    net(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


def _channels(channels: float, width: float) -> int:
    """Scale a number of channels to a multiple of 8."""
    return max(8, int(channels * width + 4) // 8 * 8)


def _conv(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)


def _conv_bn(
    cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Builder | None = nn.ReLU
) -> nn.Sequential:
    layers = [_conv(cin, cout, kernel, stride, groups), nn.BatchNorm2d(cout)]
    return nn.Sequential(*layers, *([act(inplace=True)] if act is not None else []))


def _head(channels: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


# --- residual networks ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)), the sum in place."""

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.relu = branch, shortcut, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y = self.branch(x)
        y += self.shortcut(x)
        return self.relu(y)


def _resnet(blocks: Sequence[int], bottleneck: bool, num_classes: int, width: float) -> nn.Module:
    channels = _channels(64, width)
    layers: list[nn.Module] = [_conv_bn(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(blocks):
        inner = _channels(64 * 2**stage, width)
        out = 4 * inner if bottleneck else inner
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            if bottleneck:
                branch = nn.Sequential(
                    _conv_bn(channels, inner, 1), _conv_bn(inner, inner, 3, stride), _conv_bn(inner, out, 1, act=None)
                )
            else:
                branch = nn.Sequential(_conv_bn(channels, inner, 3, stride), _conv_bn(inner, out, act=None))
            same = stride == 1 and channels == out
            layers.append(Residual(branch, nn.Identity() if same else _conv_bn(channels, out, 1, stride, act=None)))
            channels = out
    return nn.Sequential(*layers, _head(channels, num_classes))


def build_resnet18(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """ResNet-18 (He et al. 2016)."""
    return randomize(_resnet((2, 2, 2, 2), False, num_classes, width))


def build_resnet50(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """ResNet-50 (He et al. 2016), with the stride on the 3 x 3 convolution."""
    return randomize(_resnet((3, 4, 6, 3), True, num_classes, width))


class PreActivation(nn.Module):
    """A residual block whose BatchNorm and ReLU come before its convolutions."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), _conv(cin, cout, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(cout), _conv(cout, cout)
        self.shortcut = _conv(cin, cout, 1, stride) if stride != 1 or cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


def build_preact_resnet18(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """ResNet-18 with pre-activation (He et al. 2016, "Identity mappings"), with a stem of 3 x 3."""
    channels = _channels(64, width)
    layers: list[nn.Module] = [_conv(3, channels)]
    for stage in range(4):
        out = _channels(64 * 2**stage, width)
        layers += [PreActivation(channels, out, 2 if stage else 1), PreActivation(out, out, 1)]
        channels = out
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), _head(channels, num_classes)]
    return randomize(nn.Sequential(*layers))


# --- without shortcuts ------------------------------------------------------------------------------------------


def build_vgg16_bn(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """VGG-16 with BatchNorm (Simonyan, Zisserman 2014)."""
    layers: list[nn.Module] = []
    channels = 3
    for out, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append(_conv_bn(channels, _channels(out, width)))
            channels = _channels(out, width)
        layers.append(nn.MaxPool2d(2))
    hidden = _channels(4096, width)
    layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49 * channels, hidden), nn.ReLU(True), nn.Dropout()]
    layers += [nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, num_classes)]
    return randomize(nn.Sequential(*layers))


def build_plain(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """Ten convolutions without BatchNorm, with heavy-tailed weights."""
    layers: list[nn.Module] = []
    channels = 3
    for out in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512):
        stride = 2 if _channels(out, width) != channels and channels != 3 else 1
        layers += [nn.Conv2d(channels, _channels(out, width), 3, stride, 1), nn.ReLU(inplace=True)]
        channels = _channels(out, width)
    net = randomize(nn.Sequential(*layers, _head(channels, num_classes)))
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            # Student's t: a normal variable over the root of a mean of squares; its variance is 3.
            normal = torch.randn(4, *module.weight.shape, generator=generator)
            heavy = normal[0] / normal[1:].square().mean(0).sqrt()
            std = module.weight.std()
            module.weight.data.copy_(heavy / heavy.std() * std)
    return net


# --- depthwise --------------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = cin * expand
        self.branch = nn.Sequential(
            *([_conv_bn(cin, inner, 1, act=nn.ReLU6)] if expand > 1 else []),
            _conv_bn(inner, inner, 3, stride, inner, act=nn.ReLU6),
            _conv_bn(inner, cout, 1, act=None),
        )
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return x + self.branch(x) if self.residual else self.branch(x)


def build_mobilenet_v2(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018)."""
    stages = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    channels = _channels(32, width)
    layers: list[nn.Module] = [_conv_bn(3, channels, 3, 2, act=nn.ReLU6)]
    for expand, out, count, stride in stages:
        for index in range(count):
            layers.append(InvertedResidual(channels, _channels(out, width), stride if index == 0 else 1, expand))
            channels = _channels(out, width)
    last = _channels(1280, max(width, 0.1))
    layers += [_conv_bn(channels, last, 1, act=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return randomize(nn.Sequential(*layers, nn.Linear(last, num_classes)))


class SqueezeExcitation(nn.Module):
    """x times a gate for each channel."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.pool, self.reduce = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, inner, 1)
        self.act, self.expand = nn.SiLU(inplace=True), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return x * torch.sigmoid(self.expand(self.act(self.reduce(self.pool(x)))))


class MBConv(nn.Module):
    """EfficientNet's block."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = cin * expand
        self.branch = nn.Sequential(
            *([_conv_bn(cin, inner, 1, act=nn.SiLU)] if expand > 1 else []),
            _conv_bn(inner, inner, kernel, stride, inner, act=nn.SiLU),
            SqueezeExcitation(inner, max(4, cin // 4)),
            _conv_bn(inner, cout, 1, act=None),
        )
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y = self.branch(x)
        if self.residual:
            y += x
        return y


def build_efficientnet_b0(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """EfficientNet-B0 (Tan, Le 2019): squeeze-excitation and SiLU."""
    stages = (
        *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
        *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
    )
    channels = _channels(32, width)
    layers: list[nn.Module] = [_conv_bn(3, channels, 3, 2, act=nn.SiLU)]
    for expand, out, count, stride, kernel in stages:
        for index in range(count):
            layers.append(MBConv(channels, _channels(out, width), kernel, stride if index == 0 else 1, expand))
            channels = _channels(out, width)
    last = _channels(1280, width)
    layers += [_conv_bn(channels, last, 1, act=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return randomize(nn.Sequential(*layers, nn.Linear(last, num_classes)))


class Shuffle(nn.Module):
    """ShuffleNetV2's block: half of the channels pass, then the halves are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            _conv_bn(half, half, 1), _conv_bn(half, half, 3, 1, half, act=None), _conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        n, c, h, w = x.shape
        left, right = x.chunk(2, dim=1)
        y = torch.cat((left, self.branch(right)), dim=1)
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def build_shufflenet(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """A small ShuffleNetV2 (Ma et al. 2018)."""
    channels = _channels(24, width)
    layers: list[nn.Module] = [_conv_bn(3, channels, 3, 2)]
    for out in (_channels(116, width), _channels(232, width)):
        layers += [_conv_bn(channels, out, 3, 2), Shuffle(out), Shuffle(out)]
        channels = out
    return randomize(nn.Sequential(*layers, _head(channels, num_classes)))


# --- concatenation ----------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and convolution twice over all features so far."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        inner = 4 * growth
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), _conv(channels, inner, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), _conv(inner, growth)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return the new features."""
        y = self.conv1(F.relu(self.bn1(torch.cat(features, 1)), inplace=True))
        return self.conv2(F.relu(self.bn2(y), inplace=True))


class DenseBlock(nn.Module):
    """Layers that read all layers before them."""

    def __init__(self, channels: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(channels + i * growth, growth) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


def build_densenet(num_classes: int = 1000, width: float = 1.0, blocks: Sequence[int] = (6, 12, 24, 16)) -> nn.Module:
    """DenseNet (Huang et al. 2017); by default DenseNet-121, with a growth of 32 times the width."""
    growth = _channels(32, width)
    channels = 2 * growth
    layers: list[nn.Module] = [_conv_bn(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for index, count in enumerate(blocks):
        layers.append(DenseBlock(channels, growth, count))
        channels += count * growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if index < len(blocks) - 1:
            layers += [_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return randomize(nn.Sequential(*layers, _head(channels, num_classes)))


class Inception(nn.Module):
    """Parallel convolutions of several sizes and a pool, joined."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.a = self._branch(channels, out, 1)
        self.b = nn.Sequential(self._branch(channels, out // 2, 1), self._branch(out // 2, out, 3))
        self.c = nn.Sequential(self._branch(channels, out // 2, 1), self._branch(out // 2, out, 5))
        self.d = self._branch(channels, out, 1)

    @staticmethod
    def _branch(cin: int, cout: int, kernel: int) -> nn.Sequential:
        return nn.Sequential(_conv(cin, cout, kernel), nn.BatchNorm2d(cout), nn.LeakyReLU(0.1, inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(pooled)], 1)


def build_inception(num_classes: int = 1000, width: float = 1.0) -> nn.Module:
    """Inception blocks (Szegedy et al. 2015) with BatchNorm and LeakyReLU."""
    channels = _channels(64, width)
    layers: list[nn.Module] = [_conv_bn(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for out in (64, 96, 128):
        layers += [Inception(channels, _channels(out, width)), nn.MaxPool2d(2, ceil_mode=True)]
        channels = 4 * _channels(out, width)
    return randomize(nn.Sequential(*layers, _head(channels, num_classes)))


# --- image to image ---------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Features go down and up again, and across; half of the steps up are transposed convolutions."""

    def __init__(self, out_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(zip((3, *widths[:-1]), widths, strict=True))
        self.down = nn.ModuleList(nn.Sequential(_conv_bn(a, b), _conv_bn(b, b)) for a, b in pairs)
        upwards = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(a, b, 2, 2, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            if index % 2 == 0
            else _conv_bn(a, b)
            for index, (a, b) in enumerate(upwards)
        )
        self.join = nn.ModuleList(_conv_bn(2 * b, b) for _, b in upwards)
        self.last = nn.Conv2d(widths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return images of the input's size."""
        across = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else F.max_pool2d(x, 2))
            across.append(x)
        across.pop()
        for index, (up, join) in enumerate(zip(self.up, self.join, strict=True)):
            x = up(x) if index % 2 == 0 else up(F.interpolate(x, scale_factor=2, mode="nearest"))
            x = join(torch.cat([x, across.pop()], 1))
        return self.last(x)


def build_unet(num_classes: int = 21, width: float = 1.0) -> nn.Module:
    """A U-Net (Ronneberger et al. 2015) with BatchNorm, four steps down and up."""
    return randomize(UNet(num_classes, [_channels(c, width) for c in (64, 128, 256, 512, 512)]))


# --- sound ------------------------------------------------------------------------------------------------------


def _conv1d_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv1d(cin, cout, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(cout), nn.ReLU(inplace=True))


class Residual1d(nn.Module):
    """Two convolutions along time, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        last = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.branch = nn.Sequential(_conv1d_bn(channels, channels), last, nn.BatchNorm1d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return F.relu(x + self.branch(x))


def build_audio(num_classes: int = 35, width: float = 1.0) -> nn.Module:
    """A network on waveforms [N, 1, L] (after M5, Dai et al. 2017) with BatchNorm and residual blocks."""
    channels = _channels(64, width)
    layers: list[nn.Module] = [_conv1d_bn(1, channels, 31, 4), nn.MaxPool1d(4)]
    for _ in range(3):
        layers += [Residual1d(channels), _conv1d_bn(channels, 2 * channels), nn.MaxPool1d(4)]
        channels *= 2
    head = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return randomize(nn.Sequential(*layers, *head))


ARCHITECTURES: dict[str, Builder] = {
    "resnet18": build_resnet18,
    "resnet50": build_resnet50,
    "preact_resnet18": build_preact_resnet18,
    "vgg16_bn": build_vgg16_bn,
    "plain": build_plain,
    "mobilenet_v2": build_mobilenet_v2,
    "efficientnet_b0": build_efficientnet_b0,
    "shufflenet": build_shufflenet,
    "densenet": build_densenet,
    "inception": build_inception,
    "unet": build_unet,
}
