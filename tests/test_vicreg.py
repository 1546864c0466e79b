"""VICReg: the loss against loops in NumPy, known values, over processes; the projector; the terms in the log."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import vicreg
from common.resnet import resnet
from tests.helpers import EXACT, SMALL, as_processes, main, records, refused, rows, train
from vicreg import VICReg, vicreg_loss, vicreg_terms


def outputs(batch, dim):
    """Two related batches with means and variances of every size, on both sides of 1, in float64."""
    (z1, z2), (scale, shift) = rows(2, batch, dim, seed=0), rows(2, dim, seed=1)
    return z1 * scale.exp() + shift, (z1 + z2) * scale.exp() - shift


def by_hand(z1, z2, sim, std, cov):
    """Equations 1 to 6 with loops over dimensions; the variance term is the mean of the views, as in the code."""
    z1, z2 = z1.numpy(), z2.numpy()
    (n, d), total = z1.shape, sim * np.mean((z1 - z2) ** 2)
    for z in (z1, z2):
        z = z - z.mean(axis=0)
        for i in range(d):
            for j in range(d):
                c = sum(z[b, i] * z[b, j] for b in range(n)) / (n - 1)
                total += std / 2 * max(0, 1 - math.sqrt(c + 1e-4)) / d if i == j else cov * c**2 / d
    return total


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("batch, dim", [(24, 7), (5, 12), (6, 6), (2, 3)])
@pytest.mark.parametrize("weights", [(25, 25, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_loss_is_the_formula(batch, dim, weights):
    """With more images than dimensions and with fewer."""
    z1, z2 = outputs(batch, dim)
    expected = by_hand(z1, z2, *weights)
    assert vicreg_loss(z1, z2, *weights).item() == pytest.approx(expected, rel=1e-12, abs=1e-10) and expected > 0


def test_known_values():
    """Columns of a Hadamard matrix are uncorrelated and have a variance of 16/15."""
    matrix = np.ones((1, 1))
    while len(matrix) < 16:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    white = torch.from_numpy(matrix[:, 1:6])
    assert vicreg_loss(white, white, 25, 25, 1).item() == pytest.approx(0, abs=1e-12)
    assert vicreg_loss(white, -white, 25, 25, 1).item() == pytest.approx(25 * 4, abs=1e-12)
    equal = torch.from_numpy(matrix[:, [1, 1, 1]])  # every covariance is 16/15, six of them differ from variances
    assert vicreg_loss(equal, equal, 25, 25, 1).item() == pytest.approx(2 * 6 / 3 * (16 / 15) ** 2, abs=1e-12)
    constant = rows(1, 9).expand(64, -1)
    assert vicreg_loss(constant, constant, 25, 25, 1).item() == pytest.approx(24.75, abs=1e-12)
    assert vicreg_loss(constant, constant + 3, 2, 50, 1).item() == pytest.approx(18 + 49.5, abs=1e-12)
    half = 0.5 * white  # deviation 0.516
    assert vicreg_terms(half, white)[1].item() == pytest.approx((1 - math.sqrt(4 / 15 + 1e-4)) / 2, abs=1e-12)


def test_unrelated_views_have_the_loss_that_the_docstring_says():
    z1, z2 = rows(2, 2048, 512)
    terms = [term.item() for term in vicreg_terms(z1, z2)]
    assert terms == pytest.approx([2, 0.2 / 25, 2 * 511 / 2047], rel=0.3, abs=0)
    assert vicreg_loss(z1, z2, 25, 25, 1).item() == pytest.approx(50.605, abs=0.15)


def test_single_precision_is_enough_at_the_papers_sizes():
    """The sum of squares of all covariances is far larger than that of the pairs alone when outputs are white."""
    z1, z2 = rows(2, 96, 384)
    exact, single = (vicreg_terms(a, b) for a, b in ((z1, z2), (z1.float(), z2.float())))
    assert [x.item() for x in single] == pytest.approx([x.item() for x in exact], rel=1e-5)


@pytest.mark.parametrize("dim", [7, 40])
def test_two_processes_have_the_loss_and_gradient_of_one(dim, monkeypatch):
    weight = torch.linspace(-1, 1, 9 * dim, dtype=torch.float64).view(9, dim).cos().requires_grad_()
    z1, z2 = outputs(24, 9)
    loss = vicreg_loss(z1 @ weight, z2 @ weight, 25, 25, 1)
    (gradient,) = torch.autograd.grad(loss, weight)
    halves = zip(z1.chunk(2), z2.chunk(2), strict=True)
    losses = as_processes(monkeypatch, vicreg, lambda a, b: vicreg_loss(a @ weight, b @ weight, 25, 25, 1), *halves)
    assert sum(losses).item() / 2 == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sum(losses) / 2, weight)[0], gradient, atol=1e-10, rtol=1e-12)
    assert gradient.abs().max() > 1e-3


def test_order_of_the_images_does_not_matter():
    z1, z2 = outputs(12, 5)
    order = rows(12).argsort()
    expected = vicreg_loss(z1, z2, 25, 25, 1).item()
    assert vicreg_loss(z1[order], z2[order], 25, 25, 1).item() == pytest.approx(expected, rel=1e-12)
    assert vicreg_loss(z1[order], z2, 25, 25, 1).item() != pytest.approx(expected, rel=1e-3)


def test_constant_outputs_give_no_nan():
    z = torch.zeros(4, 3, requires_grad=True)
    vicreg_loss(z, z + 1, 25, 25, 1).backward()
    assert z.grad.isfinite().all()


# --------------------------------------------------------------------------------------------- model and training
def test_projector_follows_the_official_code():
    model = VICReg(resnet(*SMALL), hidden_dim=24, dim=10)
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    linear = model.projector[::3]
    assert [tuple(layer.weight.shape) for layer in linear] == [(24, model.backbone.dim), (24, 24), (10, 24)]
    assert [layer.bias is not None for layer in linear if isinstance(layer, nn.Linear)] == [True, True, False]


def test_rate_and_terms_of_a_run(tmp_path):
    """One rate for all groups, through warm-up and cosine; the terms that are logged add up to the loss."""
    weights = {"--sim-coeff": 3, "--std-coeff": 20, "--cov-coeff": 2}
    words = [word for item in weights.items() for word in item]
    saved = train("vicreg", tmp_path, *EXACT, "--max-steps", 8, *words)
    assert len({group["lr"] for group in saved["optimizer"]["param_groups"]}) == 1
    for step, record in records(tmp_path).items():
        q = (1 + math.cos(math.pi * (step - 5) / 12)) / 2
        factor = (step - 1) / 4 if step < 5 else q + 0.001 * (1 - q)
        assert record["lr"] == pytest.approx(0.2 * 16 / 256 * factor, rel=1e-12)
        terms = [record[name] for name in ("invariance", "variance", "covariance")]
        total = sum(w * t for w, t in zip(weights.values(), terms, strict=True))
        assert record["loss"] == pytest.approx(total, rel=1e-3) and min(terms) > 0


@pytest.mark.parametrize("words", ["--sim-coeff -1", "--std-coeff nan", "--cov-coeff x", "--dim 1", "--hidden-dim 0"])
def test_mistakes_end_in_one_line(words, capsys):
    assert words.split()[0] in refused(capsys, main, "vicreg", "--data", "fake:64", *words.split())
