"""Barlow Twins: the loss against NumPy and known values, over processes; the projector; the two learning rates."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import barlowtwins
from barlowtwins import BarlowTwins, barlow_twins_loss
from common.resnet import resnet
from tests.helpers import EXACT, SMALL, as_processes, records, rows, train

EPS = 1e-5


def outputs(batch=24, dim=7, seed=0):
    """Two related batches with means and variances of every size, in float64."""
    (z1, z2), (scale, shift) = rows(2, batch, dim, seed=seed), rows(2, dim, seed=seed + 1)
    return z1 * scale.exp() + shift, (z1 + z2) * scale.exp() - shift


def hadamard(n):
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return torch.from_numpy(matrix)


def by_hand(z1, z2, lambd):
    """Equations 1 and 2 with loops over the entries of C."""
    z1, z2 = z1.numpy(), z2.numpy()
    loss, dim = 0.0, z1.shape[1]
    for i in range(dim):
        for j in range(dim):
            a, b = z1[:, i], z2[:, j]
            covariance = np.mean((a - a.mean()) * (b - b.mean()))
            c = covariance / np.sqrt((a.var() + EPS) * (b.var() + EPS))
            loss += (1 - c) ** 2 if i == j else lambd * c**2
    return loss


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("lambd", [0.0, 0.0051, 1.0])
def test_loss_is_the_formula(lambd):
    z1, z2 = outputs()
    for n in (24, 7, 5):  # more rows than dimensions, as many, fewer
        assert barlow_twins_loss(z1[:n], z2[:n], lambd).item() == pytest.approx(
            by_hand(z1[:n], z2[:n], lambd), abs=1e-9
        )
    assert barlow_twins_loss(z1[:, :3], z2[:, :3], 1.0).item() != pytest.approx(by_hand(z1[:, 1:4], z2[:, 1:4], 1.0))


def test_standardisation_is_that_of_batch_norm():
    z, _ = outputs()
    norm = nn.BatchNorm1d(z.shape[1], affine=False).double()
    torch.testing.assert_close(barlowtwins.standardize(z), norm(z), atol=1e-12, rtol=0)


def test_known_values():
    """Columns of a Hadamard matrix are white and uncorrelated, so C is known up to the eps of the variance."""
    columns, shrunk = hadamard(16), 1 / (1 + EPS)  # column 0 is constant
    white, others = columns[:, 1:6], columns[:, 6:11]
    assert barlow_twins_loss(white, white, 0.7).item() == pytest.approx(0, abs=1e-8)  # C = I
    assert barlow_twins_loss(white, others, 0.7).item() == pytest.approx(5, abs=1e-12)  # C = 0: D
    assert barlow_twins_loss(white, -white, 0.7).item() == pytest.approx(5 * (1 + shrunk) ** 2, abs=1e-12)  # C = -I
    equal = columns[:, [1, 1, 1]]  # C = 1 everywhere: agreement is perfect, redundancy too
    assert barlow_twins_loss(equal, equal, 0.7).item() == pytest.approx(0.7 * 6 * shrunk**2, abs=1e-8)
    turned = white.roll(1, dims=1)  # C is a permutation: no dimension agrees with itself
    assert barlow_twins_loss(white, turned, 0.7).item() == pytest.approx(5 + 0.7 * 5 * shrunk**2, abs=1e-12)


def test_loss_of_unrelated_views_is_what_the_start_announces():
    batch, dim, lambd = 64, 256, 0.1
    z1, z2 = rows(2, batch, dim)
    assert barlow_twins_loss(z1, z2, lambd).item() == pytest.approx(dim + lambd * dim**2 / batch, rel=0.05)


def test_shift_and_scale_of_a_dimension_do_not_matter():
    z1, z2 = outputs()
    z1, z2 = 100 * z1, 100 * z2  # variances far above eps
    scale = torch.linspace(0.5, 20, z1.shape[1], dtype=torch.float64)
    expected = barlow_twins_loss(z1, z2, 0.0051).item()
    assert barlow_twins_loss(z1 * scale - 3, z2 / scale + 8, 0.0051).item() == pytest.approx(expected, rel=1e-4)
    assert barlow_twins_loss(z1, z2 * -1, 0.0051).item() != pytest.approx(expected, rel=0.1)


def test_constant_dimension_costs_one_and_gives_no_nan():
    z1, z2 = outputs()
    dead = [torch.cat([z, torch.full((len(z), 1), 3.0)], dim=1).requires_grad_() for z in (z1, z2)]
    loss = barlow_twins_loss(*dead, 0.5)
    assert loss.item() == pytest.approx(barlow_twins_loss(z1, z2, 0.5).item() + 1, abs=1e-9)
    loss.backward()
    assert all(z.grad.isfinite().all() for z in dead)
    zeros = torch.zeros(4, 3, requires_grad=True)  # all is constant
    barlow_twins_loss(zeros, zeros, 0.5).backward()
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("batch", [24, 8])
def test_two_processes_have_the_loss_and_gradient_of_one(batch, monkeypatch):
    """The average of their gradients has to be the gradient itself, not 1 / W of it as from a sum outside autograd.

    8 rows, 4 of each process, are fewer than the 9 dimensions.
    """
    weight = torch.linspace(-1, 1, 63, dtype=torch.float64).view(7, 9).cos().requires_grad_()
    z1, z2 = outputs(batch)

    def loss(z1, z2):
        return barlow_twins_loss(z1 @ weight, z2 @ weight, 0.3)

    whole = loss(z1, z2)
    (gradient,) = torch.autograd.grad(whole, weight)
    losses = as_processes(monkeypatch, barlowtwins, loss, *zip(z1.chunk(2), z2.chunk(2), strict=True))
    torch.testing.assert_close(torch.stack(losses), whole.expand(2), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sum(losses) / 2, weight)[0], gradient, atol=1e-12, rtol=1e-10)
    assert gradient.abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ model
def test_projector():
    model = BarlowTwins(resnet(*SMALL), hidden_dim=24, dim=10)
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    linear = [layer for layer in model.projector if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(24, model.backbone.dim), (24, 24), (10, 24)]
    assert all(layer.bias is None for layer in linear)


# ---------------------------------------------------------------------------------------------------- optimiser
@pytest.fixture
def steps():
    """What every optimiser step of a run used: (optimizer class, groups without their tensors, gradients)."""
    seen = []

    def record(optimizer, *_):
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        tensors = [[p.ndim for p in g["params"]] for g in optimizer.param_groups]
        gradients = [[p.grad.clone() for p in g["params"]] for g in optimizer.param_groups]
        seen.append((type(optimizer).__name__, groups, tensors, gradients))

    handle = register_optimizer_step_pre_hook(record)
    yield seen
    handle.remove()


def test_two_learning_rates_through_warm_up_and_cosine(steps, tmp_path):
    """64 images in batches of 16, 5 epochs of which 1 of warm-up: 20 steps, 4 of warm-up."""
    train("barlowtwins", tmp_path, "--epochs", 5)
    log = records(tmp_path)
    assert len(steps) == 20
    for step, (name, (weights, biases), (many, one), _) in enumerate(steps):
        if step < 4:
            factor = step / 4
        else:
            q = (1 + math.cos(math.pi * (step - 4) / 16)) / 2
            factor = q + 0.001 * (1 - q)
        assert name == "LARS" and set(many) == {2, 4} and set(one) == {1}
        assert weights["lr"] == pytest.approx(0.2 * 16 / 256 * factor, rel=1e-12)
        assert biases["lr"] == pytest.approx(0.0048 * 16 / 256 * factor, rel=1e-12)
        assert log[step + 1]["lr"] == weights["lr"]
        assert (weights["adapt"], weights["weight_decay"]) == (True, 1e-6)
        assert (biases["adapt"], biases["weight_decay"]) == (False, 0.0)
    assert barlowtwins.cosine(20, 20, 4, final=0.001) == pytest.approx(0.001)


def test_scale_loss_scales_gradients_but_not_the_shown_loss(steps, tmp_path):
    for scale in (1, 0.25):
        words = [*EXACT, "--max-steps", 1, "--optimizer", "sgd", "--lr-biases", 0.3, "--scale-loss", scale]
        train("barlowtwins", tmp_path / str(scale), *words)
    assert records(tmp_path / "1")[1]["loss"] == records(tmp_path / "0.25")[1]["loss"] > 1
    (name, (_, biases), _, whole), (*_, quarter) = steps
    assert name == "SGD" and biases["weight_decay"] == 0
    largest = 0.0
    for a, b in zip(itertools.chain(*whole), itertools.chain(*quarter), strict=True):
        torch.testing.assert_close(b, a / 4, atol=1e-15, rtol=1e-9)
        largest = max(largest, a.abs().max().item())
    assert largest > 0.01


def test_accumulated_loss_is_the_mean_over_micro_batches(steps, tmp_path, monkeypatch):
    parts = []
    loss = barlowtwins.barlow_twins_loss
    monkeypatch.setattr(barlowtwins, "barlow_twins_loss", lambda *a: parts.append(loss(*a)) or parts[-1])
    train("barlowtwins", tmp_path, *EXACT, "--max-steps", 1, "--accum", 2)
    assert len(parts) == 2 and parts[0] != parts[1]
    assert records(tmp_path)[1]["loss"] == pytest.approx(sum(parts).item() / 2, rel=1e-12)
