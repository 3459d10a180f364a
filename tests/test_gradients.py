"""Norms of gradients: the estimate without bias against closed forms, draws of known variance and a plain recount."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from labelaug.methods import ERM, Mixup
from labelaug.training.deep import DeepSetting
from labelaug.training.gradients import gradient_norms
from labelaug.training.linear import ORDER

N, D, K = 8, 3, 4


def problem(seed=0):
    """A linear model without batch normalisation: K logits of D features and an offset, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(K, (N,), generator=generator)
    model = nn.Linear(D, K, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, x, labels


def norms(setting, *, draws, epoch=0, seed=0):
    model, x, labels = problem()
    return gradient_norms(model, x, labels, num_classes=K, setting=setting, seed=seed, epoch=epoch, draws=draws)


def example_gradients():
    """Closed form of softmax regression, row i: (p_i - e_{y_i}) ⊗ (x_i, 1), weight first, then offset."""
    model, x, labels = problem()
    with torch.no_grad():
        residual = torch.softmax(model(x), -1) - torch.eye(K, dtype=torch.float64)[labels]
        return torch.cat([(residual[:, :, None] * x[:, None, :]).flatten(1), residual], 1)


def parameters():
    return torch.cat([p.detach().flatten() for p in problem()[0].parameters()])


def unbiased(vectors):
    """(‖Σg‖² - Σ‖g‖²)/(M(M-1)) of the last two axes, written as a mean over pairs i ≠ j."""
    m = vectors.shape[-2]
    products = vectors @ np.swapaxes(vectors, -1, -2)
    return products[..., ~np.eye(m, dtype=bool)].mean(-1)


def test_prop_unbiased_gradient():
    """Items 1 and 3 on minibatches of a linear model, whose gradients are known.

    Minibatches of B without replacement: E g = ḡ and tr Cov g = (1/B)(N-B)/(N-1)·tr of the examples' covariance.
    Means over R seeds lie within 4.5 standard errors, taken from their own spread; two-sided odds 7e-6 each.
    """
    examples, size, draws, repeats, penalty = example_gradients(), 2, 4, 400, 0.3
    mean = examples.mean(0)
    spread = (examples - mean).square().sum(-1).mean() * (N - size) / (N - 1) / size
    setting = DeepSetting(0.1, 1, size, weight_decay=penalty)
    found = [norms(setting, draws=draws, seed=seed) for seed in range(repeats)]
    column = {name: np.array([one[name] for one in found]) for name in found[0]}

    def off(values, expected):
        return (values.mean() - float(expected)) / (values.std(ddof=1) / math.sqrt(repeats))

    assert abs(off(column["squared_objective_gradient"], mean @ mean)) < 4.5
    penalised = mean + penalty * parameters()
    assert abs(off(column["squared_penalised_gradient"], penalised @ penalised)) < 4.5
    assert abs(off(column["minibatch_gradient"] ** 2, mean @ mean + spread)) < 4.5
    # Full-batch: no draw enters.
    np.testing.assert_allclose(column["clean_gradient"], float(mean.norm()), rtol=1e-12)
    np.testing.assert_allclose(column["parameter_norm"], float(parameters().norm()), rtol=1e-12)
    # Negative control: the squared norm of the mean is too large by tr Cov/M, and the same test sees it.
    naive = ((draws - 1) * column["squared_objective_gradient"] + column["minibatch_gradient"] ** 2) / draws
    assert off(naive, mean @ mean) > 4.5
    assert abs(off(naive, mean @ mean + spread / draws)) < 4.5


@pytest.mark.parametrize("length", [0.0, 2.0])
def test_prop_unbiased_gradient_variance(length):
    """Item 2: Var = (4/M) ḡᵀΣḡ + 2 tr Σ²/(M(M-1)), for Gaussian vectors with a diagonal Σ.

    A variance estimated from R values of kurtosis κ has relative standard error √((κ-1)/R): 4.5 of them.
    """
    dim, draws, repeats = 5, 6, 20_000
    scale = np.arange(1, dim + 1) / dim
    mean = length * np.ones(dim) / math.sqrt(dim)
    rng = np.random.default_rng(3)
    values = unbiased(mean + scale * rng.standard_normal((repeats, draws, dim)))
    expected = 4 / draws * (mean**2 * scale**2).sum() + 2 * (scale**4).sum() / (draws * (draws - 1))
    kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2
    assert abs(values.var() / expected - 1) < 4.5 * math.sqrt((kurtosis - 1) / repeats)
    assert abs(values.mean() - length**2) < 4.5 * math.sqrt(expected / repeats)
    assert (values < 0).any() == (length == 0)  # it can fall below zero, where the norm is small


def test_at_full_batches_nothing_is_drawn():
    """ERM with one batch: the three gradients are one, with the closed form, and the estimate has no error."""
    mean, theta, penalty = example_gradients().mean(0), parameters(), 0.2
    found = norms(DeepSetting(0.1, 1, N, weight_decay=penalty), draws=2)
    length = float(mean.norm())
    assert found["clean_gradient"] == pytest.approx(length, rel=1e-12)
    assert found["minibatch_gradient"] == pytest.approx(length, rel=1e-12)
    assert found["squared_objective_gradient"] == pytest.approx(length**2, rel=1e-12)
    assert found["squared_penalised_gradient"] == pytest.approx(float((mean + penalty * theta).norm()) ** 2, rel=1e-12)


def test_the_method_of_the_epoch_is_measured():
    """From the switch on the objective is ERM's; the clean gradient never mixes."""
    plain, mixed = DeepSetting(0.1, 4, N, method=ERM), DeepSetting(0.1, 4, N, method=Mixup(1.0))
    switched = DeepSetting(0.1, 4, N, method=Mixup(1.0), switch_epoch=2)
    for epoch, like in ((1, mixed), (2, plain)):
        assert norms(switched, draws=3, epoch=epoch) == norms(like, draws=3, epoch=epoch)
    before, after = norms(mixed, draws=3, epoch=2), norms(plain, draws=3, epoch=2)
    assert before["clean_gradient"] == after["clean_gradient"]
    assert before["minibatch_gradient"] != after["minibatch_gradient"]


def test_fewer_than_two_draws_are_refused():
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        norms(DeepSetting(0.1, 1, N), draws=1)


@pytest.mark.parametrize("labels", [1, -1])
def test_labels_that_are_none_are_refused(labels):
    model, x, good = problem()
    with pytest.raises(ValueError, match=r"labels must be integers in 0\.\.3"):
        gradient_norms(
            model, x, good + labels * K, num_classes=K, setting=DeepSetting(0.1, 1, N), seed=0, epoch=0, draws=2
        )


def layered():
    """Batch normalisation in training mode and, beside it, in evaluation mode; dropout; a frozen weight; a gradient."""
    layers = [nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, K)]
    model = nn.Sequential(*layers).to(torch.float64)
    model[3].eval()
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    return model


def state(model):
    """All that a measurement could leave behind: in the model, in torch and in NumPy."""
    return {
        "numbers": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [layer.training for layer in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global stream, which nothing may use
        "threads": torch.get_num_threads(),
        "taped": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("taped", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_a_measurement_leaves_nothing_behind(taped, fails):
    """Also one that a teacher breaks off in its course, after the clean gradient has moved the running means."""
    model, (_, x, labels) = layered(), problem()

    def broken(inputs):
        raise KeyboardInterrupt

    setting = DeepSetting(0.1, 1, 4, labels="teacher" if fails else "data")
    arguments = {"num_classes": K, "setting": setting, "seed": 0, "epoch": 0, "draws": 3}
    with torch.set_grad_enabled(taped):
        before = state(model)
        if fails:
            with pytest.raises(KeyboardInterrupt):
                gradient_norms(model, x, labels, teacher=broken, **arguments)
        else:
            gradient_norms(model, x, labels, **arguments)
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)
        model[1](model[0](x))  # control: a forward pass in training mode is seen
        with pytest.raises(AssertionError):
            torch.testing.assert_close(state(model), before, rtol=0, atol=0)


def test_the_draws_come_from_streams_of_their_own():
    """[seed, 6, purpose, epoch]: apart from those of training, so that a measurement sees other minibatches."""
    examples, size, draws = example_gradients(), 3, 5
    order = np.random.default_rng([2, 6, ORDER, 7])
    order.permutation(N)  # of the clean gradient
    drawn = torch.stack([examples[torch.from_numpy(order.permutation(N)[:size])].mean(0) for _ in range(draws)])
    found = norms(DeepSetting(0.1, 9, size), draws=draws, epoch=7, seed=2)
    assert found["minibatch_gradient"] == pytest.approx(drawn.square().sum(1).mean().sqrt().item(), rel=1e-12)
    assert found["squared_objective_gradient"] == pytest.approx(float(unbiased(drawn.numpy())), rel=1e-9)
