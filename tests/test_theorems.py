"""Each labelled statement of the book has a test named as its label; those of the first three sections stand here."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import entr

from labelaug.data.synthetic import Box, TwoFeatureTask, counterexample_task, sample
from labelaug.losses import binary_soft_cross_entropy, soft_cross_entropy
from labelaug.mixing import mix
from labelaug.paths import NOTEBOOKS
from labelaug.targets import binary_targets, one_hot_targets


def signed_loss(margin: torch.Tensor, smoothing: float) -> torch.Tensor:
    """φ_ε(s), through the package's own binary loss and target at a positive example."""
    target = binary_targets(torch.ones(1, dtype=torch.long), smoothing=smoothing, dtype=torch.float64)
    return torch.stack([binary_soft_cross_entropy(s[None], target) for s in margin])


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.75, 1.5])
def test_prop_smoothing_margin(smoothing):
    cstar = math.log((2 - smoothing) / smoothing)
    s = torch.tensor([cstar], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(signed_loss(s, smoothing).sum(), s)
    assert abs(slope.item()) < 1e-12  # stationary and strictly convex: the minimiser
    minimum = entr(smoothing / 2) + entr(1 - smoothing / 2)
    assert signed_loss(s.detach(), smoothing).item() == pytest.approx(minimum, abs=1e-12)
    grid = torch.linspace(-10, 10, 401, dtype=torch.float64)
    assert (signed_loss(grid, smoothing) >= minimum - 1e-12).all()
    # Negative control: the convention ε/(K-1) would put the minimum at log((1-ε)/ε), where the slope is not zero.
    if smoothing < 1:
        other = torch.tensor([math.log((1 - smoothing) / smoothing)], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(signed_loss(other, smoothing).sum(), other)
        assert abs(slope.item()) > 1e-3


def test_prop_smoothing_margin_without_and_with_negative_smoothing():
    grid = torch.tensor([1.0, 10.0, 30.0], dtype=torch.float64)
    plain = signed_loss(grid, 0.0)
    assert (plain.diff() < 0).all() and 0 <= plain[-1] < 1e-12  # decreasing towards 0
    assert signed_loss(10 * grid, -0.1)[-1] < -10  # unbounded below


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.8])
def test_only_mixed_pairs_of_two_classes_ask_for_a_finite_logit(lam):
    """A pair of one class keeps the target 0 or 1, whose loss falls for ever; two classes have a minimum, log odds."""
    targets = binary_targets(torch.tensor([1, 1, 0, 0]), dtype=torch.float64)
    mixed = mix(targets, torch.full((4,), lam, dtype=torch.float64), torch.tensor([1, 2, 3, 0]))
    grid = torch.linspace(-20, 20, 801, dtype=torch.float64)
    best = [grid[torch.stack([binary_soft_cross_entropy(z[None], t[None]) for z in grid]).argmin()] for t in mixed]
    assert best[0] == 20 and best[2] == -20  # at the end of the grid, wherever it ends
    for found, t in zip(best[1::2], (lam, 1 - lam), strict=True):
        assert found.item() == pytest.approx(math.log(t / (1 - t)), abs=0.05)  # one step of the grid


def test_lem_mixing():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    first, second = (
        one_hot_targets(torch.randint(4, (50,), generator=generator), 4, dtype=torch.float64) for _ in range(2)
    )
    lam = 0.3
    mixed = soft_cross_entropy(z, lam * first + (1 - lam) * second)
    assert mixed.item() == pytest.approx(
        (lam * soft_cross_entropy(z, first) + (1 - lam) * soft_cross_entropy(z, second)).item()
    )
    # A loss that is not affine in its target must fail: squared error is not.
    square = [((z - t) ** 2).sum() for t in (lam * first + (1 - lam) * second, first, second)]
    assert abs(square[0] - lam * square[1] - (1 - lam) * square[2]) > 1

    x, w = torch.randn(50, 7, generator=generator, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    w.requires_grad_()
    partner, weights = torch.randperm(50, generator=generator), torch.rand(50, generator=generator, dtype=torch.float64)
    inputs, targets = mix(x, weights, partner), mix(first[:, 0], weights, partner)
    assert torch.allclose(inputs @ w, mix(x @ w, weights, partner), atol=1e-12)
    (gradient,) = torch.autograd.grad(binary_soft_cross_entropy(inputs @ w, targets), w)
    residual = torch.sigmoid(mix(x @ w, weights, partner)) - targets
    by_hand = (weights * residual) @ x + ((1 - weights) * residual) @ x[partner]
    assert torch.allclose(gradient, by_hand / 50, atol=1e-12)
    # Mixing does not commute with a model that is not linear.
    assert (torch.tanh(inputs) @ w - mix(torch.tanh(x) @ w, weights, partner)).abs().max() > 1e-2


def adam_steps(gradients: np.ndarray) -> np.ndarray:
    """Steps of torch.optim.Adam, in units of the learning rate, on a sequence of gradients."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([w], lr=1.0, eps=0.0)
    positions = [0.0]
    for g in gradients:
        w.grad = torch.tensor([g], dtype=torch.float64)
        optimiser.step()
        positions.append(w.item())
    return np.diff(positions)


def test_lem_adam_reach():
    rng = np.random.default_rng(0)
    worst = max(np.abs(adam_steps(rng.standard_cauchy(3000))).max() for _ in range(3))
    assert worst < 7.3
    assert np.allclose(adam_steps(np.full(500, 0.2)), -1.0, rtol=1e-6)  # equal gradients: stride 1
    # The bound is nearly attained by the gradients of the equality case of Cauchy-Schwarz, g_{t-j} ~ (β1/β2)^j after
    # a long silence, and a bound of 7.2 would be false.
    extreme = np.concatenate([np.full(20000, 1e-100), (0.9 / 0.999) ** np.arange(400)[::-1]])
    assert 7.2 < np.abs(adam_steps(extreme))[-1] < 7.3


def test_lem_adam_reach_bias_correction_is_at_most_one():
    t = np.arange(1, 100_000)
    assert (np.sqrt(1 - 0.999**t) <= 1 - 0.9**t + 1e-15).all()
    assert not (np.sqrt(1 - 0.5**t) <= 1 - 0.9**t).all()  # not for any pair of betas


def test_def_two_feature():
    inside = TwoFeatureTask(gamma=0.1, high=Box(0.2, 1.2))
    x, labels = sample(inside, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = 2.0 * labels.double() - 1
    assert torch.equal(x[:, inside.low], (0.1 * y)[:, None].expand(-1, 5))
    assert torch.linalg.eigvalsh(torch.cov(x[labels == 1][:, inside.high_coordinates].T)).min() > 0.05
    assert inside.departures() == () and counterexample_task().departures() == ()
    assert TwoFeatureTask(gamma=0.2, high=Box(0.2, 1.2)).departures()  # equality does not separate better


def test_def_synthetic():
    task = TwoFeatureTask(gamma=0.1, high=Box(0.2, 10.2))
    x, labels = sample(task, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned = x * (2.0 * labels.double() - 1)[:, None]
    high = turned[:, task.high_coordinates]
    assert high.min() >= 0.2 and high.max() <= 10.2
    # Mean of 100,000 uniform values: standard error 2.89/√1e5 = 0.0091; 4.5 of them, two-sided odds 7e-6.
    assert abs(high.mean().item() - 5.2) < 4.5 * 2.887 / 100_000**0.5


def test_every_labelled_statement_of_the_book_has_its_test():
    text = "".join("".join(cell["source"]) + "\n" for path in NOTEBOOKS.glob("*.ipynb") for cell in cells(path))
    labels = re.findall(r"^:label: ((?:def|lem|prop|thm|cor)-[\w-]+)", text, re.M)
    assert len(labels) >= 6 and len(set(labels)) == len(labels)
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    missing = [label for label in labels if f"def test_{label.replace('-', '_')}(" not in tests]
    assert not missing, f"no test is named after {missing}"


def test_letters_that_change_their_meaning_are_in_the_table_of_notation():
    """Each section that a row names uses the letter; no other uses one of four Greek letters, or of five capitals.

    Of the capitals only those in mathematics outside proofs count; words and names of TeX are taken out.
    """
    rows = re.findall(
        r"^\| \$(\\?\w+)\$ \| (.*\{doc\}.*) \|$",
        (NOTEBOOKS.parent / "book" / "notation.md").read_text(encoding="utf-8"),
        re.M,
    )
    named = {letter: set(re.findall(r"\{doc\}`(\w+)`", text)) for letter, text in rows}
    prose = {
        path.stem: "\n".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
        for path in NOTEBOOKS.glob("*.ipynb")
    }

    def using(letter):
        """In mathematics: a name of TeX that goes no further, or the letter alone behind a $, a bracket or a space."""
        pattern = rf"{re.escape(letter)}(?![a-zA-Z])" if letter[0] == "\\" else rf"(?<![\w\\]){letter}(?![a-zA-Z])"
        return {name for name, text in prose.items() if re.search(pattern, text)}

    def stating(letter):
        """Outside proofs, in mathematics."""
        found = set()
        for name, text in prose.items():
            text = re.sub(r"(?ms)^(:{3,}|`{3,})\{prf:proof\}.*?^\1\s*$", "", text)
            formulas = " ".join(re.findall(r"\$\$.*?\$\$|\$[^$]+\$|```\{math\}.*?```", text, re.S))
            formulas = re.sub(r"\\(?:text|operatorname|mathrm)\{[^{}]*\}|:label: \S+|\\[a-zA-Z]+", " ", formulas)
            if letter in formulas:
                found.add(name)
        return found

    assert {"\\kappa", "\\rho", "\\tau", "\\beta", "F", "c", "M"} <= named.keys()
    for letter, sections in named.items():
        assert sections <= using(letter), letter
    for letter in ("\\kappa", "\\rho", "\\tau", "\\beta"):
        assert named[letter] == using(letter), letter
    for letter in "AFSTZ":
        assert named[letter] == stating(letter), letter


def test_notebooks_are_stored_without_outputs():
    for path in NOTEBOOKS.glob("*.ipynb"):
        code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
        assert code and all(not cell["outputs"] and cell["execution_count"] is None for cell in code), path.name


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]
