"""The planted entry: where it stands, what it is, and that nothing else is touched."""

import pytest
import torch

from labelaug.data.plant import plant_entry


def batch(n=200):
    x = torch.randn(n, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(n) % 2


def test_def_planted_entry():
    """Entry (0, 0, 0) is γy exactly, every other entry is as before, and the images given stay as they were."""
    x, labels = batch()
    before = x.clone()
    planted = plant_entry(x, labels, gamma=0.25)
    assert torch.equal(planted[:, 0, 0, 0], torch.where(labels == 1, 0.25, -0.25))
    changed = planted != x
    changed[:, 0, 0, 0] = False
    assert not changed.any()
    assert torch.equal(x, before) and planted.data_ptr() != x.data_ptr()
    assert not torch.equal(planted[:, 0, 0, 0], torch.where(labels == 0, 0.25, -0.25))  # label 1 is y = +1
    assert (planted[:, 0, 0, 0] != x[:, 0, 0, 0]).all()


def test_noise_is_uniform_around_the_entry():
    """|entry - γy| ≤ noise with mean 0 and variance noise²/3, each within 4.5 standard errors (false alarms 7e-6)."""
    x, labels = batch(20_000)
    noise, n = 0.4, 20_000
    planted = plant_entry(x, labels, gamma=0.25, noise=noise, generator=torch.Generator().manual_seed(1))
    rest = (planted[:, 0, 0, 0] - plant_entry(x, labels, gamma=0.25)[:, 0, 0, 0]).double()
    assert rest.abs().max() <= noise + 1e-6  # one rounding in float32
    assert rest.abs().max() > 0.999 * noise  # missed with probability e^-20
    assert abs(rest.mean()) < 4.5 * noise / (3 * n) ** 0.5
    # The square of a uniform variable on [-a, a] has variance 4a⁴/45.
    assert abs((rest**2).mean() - noise**2 / 3) < 4.5 * noise**2 * (4 / 45 / n) ** 0.5
    assert abs((rest**2).mean() - noise**2 / 12) > 4.5 * noise**2 * (4 / 45 / n) ** 0.5  # width noise, not 2·noise
    changed = planted != x
    changed[:, 0, 0, 0] = False
    assert not changed.any()


def test_noise_comes_from_the_generator_alone():
    x, labels = batch()
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 5, 6)]
    first, again, other = (plant_entry(x, labels, gamma=0.1, noise=0.1, generator=g) for g in generators)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(gamma=0.0), "gamma must be positive, got 0.0"),
        (dict(gamma=-0.1), "gamma must be positive, got -0.1"),
        (dict(gamma=float("nan")), "gamma must be positive, got nan"),
        (dict(noise=-0.1), "noise must be at least 0, got -0.1"),
        (dict(noise=float("nan")), "noise must be at least 0, got nan"),
        (dict(noise=0.1, generator=None), "needs a generator"),
        (dict(labels=torch.tensor([0, 1, 2, 1])), r"labels must be 0 or 1, got \[0, 1, 2\]"),
        (dict(labels=torch.tensor([-1, 1, -1, 1])), r"labels must be 0 or 1, got \[-1, 1\]"),
        (dict(labels=torch.tensor([0, 1])), r"labels \[n\], got \(4, 3, 4, 5\) and \(2,\)"),
        (dict(x=torch.zeros(4, 60)), r"x must be \[n, C, H, W\]"),
    ],
)
def test_refusals(change, message):
    x, labels = batch(4)
    arguments = dict(x=x, labels=labels, gamma=0.1, noise=0.0, generator=torch.Generator()) | change
    x, labels = arguments.pop("x"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message):
        plant_entry(x, labels, **arguments)
