"""Networks, from inputs to logits: plain torch modules that start from a generator of the caller's.

Convolutional and dense layers start as torch's own do (weights and biases uniform on ±1/√(fan-in)), drawn in the order
in which the layers stand; batch normalisation starts as the identity. Nothing is drawn from torch's global stream.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_VGG16 = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool")  # channels over the width


def mlp(num_inputs: int, widths: Sequence[int], num_classes: int, *, generator: torch.Generator) -> nn.Sequential:
    """ReLU network ``[n, num_inputs] -> [n, num_classes]`` logits in float32; no hidden layer is logistic regression.

    Raises: ValueError unless all sizes are positive and there are two classes or more.
    """
    sizes = [num_inputs, *widths, num_classes]
    _check(num_inputs, min(sizes), num_classes)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.utils.skip_init(nn.Linear, fan_in, fan_out), nn.ReLU()]
    return _start(nn.Sequential(*layers[:-1]), generator)


def resnet(
    depth: int, num_channels: int, num_classes: int, *, width: int = 64, generator: torch.Generator
) -> nn.Module:
    """Residual network for small images, ``[n, C, H, W] -> [n, K]`` logits: one 3×3 convolution as stem, no pooling.

    Args: depth: 18 or 34 (two 3×3 convolutions a block), 50 or 101 (bottlenecks); width: channels of the first stage,
        64 in He et al.; the later ones have 2, 4 and 8 times as many.
    Raises: ValueError for another depth or sizes that are not positive.
    Source: He et al. (2016), with the stem that is usual for 32×32 images: 11,173,962 parameters for depth 18, K = 10.
    """
    if depth not in _RESNETS:
        raise ValueError(f"depth must be one of {tuple(_RESNETS)}, got {depth}")
    _check(num_channels, width, num_classes)
    return _start(_ResNet(*_RESNETS[depth], num_channels, num_classes, width), generator)


def vgg16(num_channels: int, num_classes: int, *, width: int = 64, generator: torch.Generator) -> nn.Module:
    """VGG-16 with batch normalisation and one dense layer, ``[n, C, H, W] -> [n, K]`` logits; H and W at least 32.

    Source: Simonyan & Zisserman (2015), configuration D, as it is usually cut for 32×32 images.
    """
    _check(num_channels, width, num_classes)
    layers: list[nn.Module] = []
    fan_in = num_channels
    for item in _VGG16:
        if item == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [_conv(fan_in, item * width, 3, bias=True), nn.BatchNorm2d(item * width), nn.ReLU()]
            fan_in = item * width
    head = nn.utils.skip_init(nn.Linear, fan_in, num_classes)
    return _start(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), generator)


class _Basic(nn.Module):
    """Two 3×3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, fan_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(fan_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(fan_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class _Bottleneck(nn.Module):
    """1×1, 3×3 (which takes the stride), 1×1 to four times the width, and the shortcut."""

    expansion = 4

    def __init__(self, fan_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(fan_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(fan_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


_RESNETS = {
    18: (_Basic, (2, 2, 2, 2)),
    34: (_Basic, (3, 4, 6, 3)),
    50: (_Bottleneck, (3, 4, 6, 3)),
    101: (_Bottleneck, (3, 4, 23, 3)),
}


class _ResNet(nn.Module):
    """Stem, four stages of blocks, mean over the pixels, one dense layer; parameters are named as in torchvision."""

    def __init__(self, block, blocks: Sequence[int], num_channels: int, num_classes: int, width: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(num_channels, width, 3), nn.BatchNorm2d(width)
        fan_in = width
        for stage, count in enumerate(blocks):
            members = []
            for index in range(count):
                members.append(block(fan_in, width * 2**stage, 2 if stage > 0 and index == 0 else 1))
                fan_in = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*members))
        self.fc = nn.utils.skip_init(nn.Linear, fan_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        return self.fc(out.mean((2, 3)))


class _Strided(nn.Conv2d):
    """A strided convolution; where an image is one pixel wide, with stride 1 along that pixel, which is the same.

    There oneDNN's AVX-512 kernel for the gradient of a bfloat16 weight leaves parts of it unset.
    """

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride if x.shape[3] > 1 else (self.stride[0], 1)
        return F.conv2d(x, self.weight, self.bias, stride, self.padding)


def _conv(fan_in: int, fan_out: int, size: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    kind = nn.Conv2d if stride == 1 else _Strided
    return nn.utils.skip_init(kind, fan_in, fan_out, size, stride, padding=size // 2, bias=bias)


class _Shortcut(nn.Sequential):
    """Every ``stride``-th pixel, a 1×1 convolution, normalisation.

    The convolution has stride 1 because oneDNN's AVX2 kernel for the gradient of a strided 1×1 convolution writes
    beyond its buffers where fewer channels come in than a block holds (its issue 6035); the function is the same.
    """

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__(_conv(fan_in, fan_out, 1), nn.BatchNorm2d(fan_out))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.stride, :: self.stride])


def _shortcut(fan_in: int, fan_out: int, stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 and fan_in == fan_out else _Shortcut(fan_in, fan_out, stride)


def _start(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw the start of every convolutional and dense layer, in order."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            with torch.no_grad():
                for parameter in filter(lambda p: p is not None, (layer.weight, layer.bias)):
                    parameter.uniform_(-bound, bound, generator=generator)
    return model


def _check(num_inputs: int, least: int, num_classes: int) -> None:
    if num_inputs < 1 or least < 1 or num_classes < 2:
        raise ValueError(f"sizes must be at least 1 and classes at least 2, got {num_inputs}, {least}, {num_classes}")
