"""The networks against torchvision's own, their start, and their sizes."""

import copy

import pytest
import torch
from torch import nn

from labelaug._torchvision import load
from labelaug.models import _Shortcut, _Strided, mlp, resnet, vgg16

BUILD = {
    "mlp": lambda generator, width=6: mlp(3, (width,), 4, generator=generator),
    "resnet-18": lambda generator, width=6: resnet(18, 3, 4, width=width, generator=generator),
    "resnet-50": lambda generator, width=6: resnet(50, 3, 4, width=width, generator=generator),
    "vgg16": lambda generator, width=6: vgg16(3, 4, width=width, generator=generator),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def count(model):
    return sum(p.numel() for p in model.parameters())


def torchvision_resnet(depth, num_classes):
    """torchvision's network with the stem for small images, without numbers in it."""
    load()
    from torchvision import models

    with torch.device("meta"):
        model = getattr(models, f"resnet{depth}")(num_classes=num_classes)
        model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def torchvision_vgg16(num_classes):
    load()
    from torchvision import models

    with torch.device("meta"):
        return nn.Sequential(
            *models.vgg16_bn().features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)
        )


def gradients(layer, x, weights):
    """Of the weighted sum of a layer's outputs, with respect to its inputs and its parameters."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad((layer(x) * weights).sum(), [x, *layer.parameters()])


def convolved(network, x):
    """Every convolution of the network, what it gets, and the shape of what it gives."""
    seen, hooks = [], []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            hooks.append(layer.register_forward_hook(lambda *call: seen.append((call[0], call[1][0], call[2].shape))))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return seen


def alike(ours, theirs, x):
    """Give theirs the numbers of ours; hold outputs against each other, with and without the batch's own statistics."""
    theirs.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()}, assign=True)
    for mode in (False, True, False):  # the last with the running statistics that the second left
        with torch.no_grad():
            found, expected = ours.train(mode)(x), theirs.train(mode)(x)
        # float64; the order of summation in the mean over pixels may differ.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert (ours.train()(x) - expected).abs().max() > 1e-3  # the two modes do differ


@pytest.mark.parametrize(
    ("depth", "parameters"), [(18, 11_173_962), (34, 21_282_122), (50, 23_520_842), (101, 42_512_970)]
)
def test_resnet_is_torchvisions_with_a_small_stem(depth, parameters):
    ours, theirs = resnet(depth, 3, 10, generator=seeded()), torchvision_resnet(depth, 10)
    assert count(ours) == count(theirs) == parameters
    names = [(name, tensor.shape) for name, tensor in ours.state_dict().items()]
    assert sorted(names) == sorted((name, tensor.shape) for name, tensor in theirs.state_dict().items())
    alike(ours.double(), theirs, torch.randn(3, 3, 10, 12, generator=seeded(1), dtype=torch.float64))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 9), (1, 2)])
def test_a_shortcut_is_the_strided_convolution(stride, size):
    """torchvision's own two layers, in float64: outputs, all gradients, statistics and the names of the numbers."""
    ours = _Shortcut(3, 6, stride).double()
    theirs = nn.Sequential(nn.Conv2d(3, 6, 1, stride, bias=False), nn.BatchNorm2d(6)).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-1, 1, generator=seeded(2))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, *size, generator=seeded(1), dtype=torch.float64)
    found, expected = ours(x), theirs(x)
    weights = torch.randn(expected.shape, generator=seeded(3), dtype=torch.float64)
    pairs = [(found, expected), *zip(gradients(ours, x, weights), gradients(theirs, x, weights), strict=True)]
    for one, other in [*pairs, (ours[1].running_var, theirs[1].running_var)]:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # sums of at most 216 products
    if stride == 2 and size[0] > 1:
        others = theirs(x.roll(1, 3))  # the other columns of pixels are another function
        assert (others - expected).abs().max() > 0.1


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 5), (2, 2), (6, 9)])
def test_a_strided_convolution_is_torchs_own_for_any_size(size):
    """In float64, outputs and gradients; and in bfloat16, where the gradient of a weight at one pixel was not set."""
    ours, theirs = _Strided(3, 6, 3, 2, padding=1), nn.Conv2d(3, 6, 3, 2, padding=1).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, *size, generator=seeded(1), dtype=torch.float64)
    weights = torch.randn(theirs(x).shape, generator=seeded(2), dtype=torch.float64)
    expected = gradients(theirs, x, weights)
    for one, other in zip(gradients(ours.double(), x, weights), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    ours.float().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(ours, x.float().contiguous(memory_format=torch.channels_last), weights.float())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 0.03 * other.norm()  # some numbers that are each rounded to 2^-9


@pytest.mark.parametrize("name", [name for name in BUILD if name != "mlp"])
def test_no_convolution_of_one_pixel_is_strided(name):
    """oneDNN's AVX2 kernels for its gradient write beyond their buffers; a layer of torchvision's is the control."""

    def strided(model):
        convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        assert len(convolutions) > 10
        return [layer for layer in convolutions if layer.kernel_size == (1, 1) and layer.stride != (1, 1)]

    assert not strided(BUILD[name](seeded()))
    assert len(strided(torchvision_resnet(18, 10))) == 3


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
def test_gradients_in_channels_last_are_those_of_contiguous_float64(channels, width):
    """Each layer by itself, in every network, at the input that it gets: narrow layers, where AVX2 kernels went wrong.

    Layer by layer, since one ReLU that is rounded to its other side changes the gradients of a whole network.
    """
    networks = [(resnet(depth, channels, 4, width=width, generator=seeded()), (16, 8)) for depth in (18, 50)]
    networks.append((vgg16(channels, 4, width=width, generator=seeded()), (32, 32)))
    for network, size in networks:
        network.to(memory_format=torch.channels_last)
        x = torch.randn(20, channels, *size, generator=seeded(1)).contiguous(memory_format=torch.channels_last)
        seen = convolved(network, x)
        assert len(seen) > 10
        for layer, x, shape in seen:
            weights = torch.randn(shape, generator=seeded(2))
            found = gradients(layer, x, weights.contiguous(memory_format=torch.channels_last))
            expected = gradients(copy.deepcopy(layer).double(), x.double().contiguous(), weights.double())
            for one, other in zip(found, expected, strict=True):
                # Sums of up to some thousand products, each rounded to 2^-24.
                assert (one - other).norm() <= 1e-5 * other.norm(), (layer, list(x.shape))


def test_vgg16_is_torchvisions_with_one_dense_layer():
    ours, theirs = vgg16(3, 10, generator=seeded()), torchvision_vgg16(10)
    assert count(ours) == count(theirs) == 14_728_266
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]
    alike(ours.double(), theirs, torch.randn(3, 3, 32, 33, generator=seeded(1), dtype=torch.float64))


def test_mlp_is_layers_of_relus():
    """By hand, for two hidden layers and for none, which is logistic regression."""
    x = torch.randn(9, 3, generator=seeded(1), dtype=torch.float64)
    for widths in ((7, 5), ()):
        model = mlp(3, widths, 4, generator=seeded()).double()
        parameters, hidden = list(model.parameters()), x
        assert [tuple(p.shape) for p in parameters[::2]] == {0: [(4, 3)], 2: [(7, 3), (5, 7), (4, 5)]}[len(widths)]
        for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
            hidden = (hidden @ weight.T + bias).clamp(min=0)
        torch.testing.assert_close(model(x), hidden @ parameters[-2].T + parameters[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet-18", "resnet-50", "vgg16"])
def test_width_scales_every_layer(name):
    """No dimension but those of channels is 64 or more: an eighth of the width is an eighth of each of them."""
    wide, narrow = (BUILD[name](seeded(), width).state_dict() for width in (64, 8))
    for name, tensor in wide.items():
        assert tuple(narrow[name].shape) == tuple(d // 8 if d >= 64 else d for d in tensor.shape), name


@pytest.mark.parametrize("name", BUILD)
def test_the_start_is_torchs_own_from_the_generator(name):
    """Bit for bit a reader's draws: layers in order, weight before bias, uniform on ±1/√(fan-in)."""
    found = BUILD[name](seeded(3)).state_dict()
    reader, bounds = seeded(3), {}
    for key, tensor in found.items():
        layer, _, kind = key.rpartition(".")
        if tensor.ndim > 1:
            bounds[layer] = (tensor.shape[1:].numel()) ** -0.5
        if layer in bounds:
            drawn = torch.rand(tensor.shape, generator=reader) * (2 * bounds[layer]) - bounds[layer]
            # A rounding of the affine map from [0, 1): some units in the last place of the bound.
            torch.testing.assert_close(tensor, drawn, rtol=0, atol=4e-7 * bounds[layer])
            assert tensor.abs().max() <= bounds[layer]
        else:
            neutral = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
            assert (tensor == neutral[kind]).all(), key
    assert len(bounds) > 1
    again, other = BUILD[name](seeded(3)).state_dict(), BUILD[name](seeded(4)).state_dict()
    assert all(torch.equal(found[key], again[key]) for key in found)
    assert not any(torch.equal(found[f"{layer}.weight"], other[f"{layer}.weight"]) for layer in bounds)


def test_torchs_own_start_is_on_the_same_interval():
    """Their largest of 512 or more values is above 0.9 of the bound (false alarm 0.9^512), and never above it."""
    for layer, fan_in in ((nn.Linear(36, 512), 36), (nn.Conv2d(4, 512, 3), 36)):
        for parameter in layer.parameters():
            assert 0.9 < parameter.abs().max() * fan_in**0.5 < 1 + 1e-6


def test_nothing_is_drawn_from_the_global_stream():
    before = torch.get_rng_state()
    for build in BUILD.values():
        build(seeded())
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    assert not torch.equal(before, torch.get_rng_state())


def test_shapes():
    """Any size of image from one pixel on (VGG: 32), and training on the smallest batch that has statistics."""
    for size in ((1, 1), (8, 5), (32, 32)):
        assert resnet(18, 2, 3, width=2, generator=seeded())(torch.randn(2, 2, *size)).shape == (2, 3)
    for size in ((32, 32), (47, 64)):
        assert vgg16(2, 3, width=2, generator=seeded())(torch.randn(2, 2, *size)).shape == (2, 3)
    assert mlp(5, (), 3, generator=seeded())(torch.randn(4, 5)).shape == (4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: resnet(20, 3, 10, generator=g), r"depth must be one of \(18, 34, 50, 101\), got 20"),
        (lambda g: resnet(18, 0, 10, generator=g), "at least 1 .* got 0, 64, 10"),
        (lambda g: resnet(18, 3, 10, width=0, generator=g), "at least 1 .* got 3, 0, 10"),
        (lambda g: resnet(18, 3, 1, generator=g), "classes at least 2, got 3, 64, 1"),
        (lambda g: vgg16(0, 10, generator=g), "got 0, 64, 10"),
        (lambda g: vgg16(3, 10, width=-1, generator=g), "got 3, -1, 10"),
        (lambda g: vgg16(3, 1, generator=g), "got 3, 64, 1"),
        (lambda g: mlp(0, (4,), 2, generator=g), "at least 1 .* got 0, 0, 2"),
        (lambda g: mlp(3, (4, 0), 2, generator=g), "got 3, 0, 2"),
        (lambda g: mlp(3, (4,), 1, generator=g), "got 3, 1, 1"),
    ],
)
def test_sizes_that_make_no_network_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(seeded())
