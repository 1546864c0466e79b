"""BYOL: the loss, the heads and the published schedules."""

import math

import numpy as np
import pytest
import torch

import byol
from common.resnet import resnet
from tests.helpers import SMALL, parsed, records, refused, rows, train


def test_loss_equals_the_formula_in_numpy():
    p1, p2, z1, z2 = rows(4, 6, 5)
    total = 0.0
    for prediction, target in ((p1, z2), (p2, z1)):
        for p, z in zip(prediction.numpy(), target.numpy(), strict=True):
            total += 2 - 2 * np.dot(p, z) / math.sqrt(np.dot(p, p) * np.dot(z, z))
    assert byol.byol_loss(p1, p2, z1, z2).item() == pytest.approx(total / 6, abs=1e-10)


def test_loss_of_identical_orthogonal_and_opposite_outputs():
    e = torch.eye(6, dtype=torch.float64)
    a, b = e[:3] * 2, e[3:] * 5
    assert byol.byol_loss(a, b, b, a).item() == pytest.approx(0, abs=1e-12)  # each predicts the other view's target
    assert byol.byol_loss(a, b, a, b).item() == pytest.approx(4, abs=1e-12)  # its own view's target does not count
    assert byol.byol_loss(a, b, -b, -a).item() == pytest.approx(8, abs=1e-12)


def test_heads_have_the_layers_of_the_paper():
    args = parsed("byol")
    model = byol.BYOL(resnet(*SMALL), args.dim, args.hidden_dim).double()
    for head, inputs in ((model.projector, 64), (model.predictor, 256), (model.target_projector, 64)):
        shapes = [(name, tuple(p.shape)) for name, p in head.named_parameters()]
        first, norm = [("0.weight", (4096, inputs)), ("0.bias", (4096,))], [("1.weight", (4096,)), ("1.bias", (4096,))]
        assert shapes == [*first, *norm, ("3.weight", (256, 4096))]
        x = rows(5, inputs)
        h = x @ head[0].weight.T + head[0].bias
        h = ((h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()).clamp(min=0) @ head[3].weight.T
        torch.testing.assert_close(head(x), h, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("epochs", "lr", "tau", "weight_decay"),
    [
        *[(epochs, 0.45, 0.97, 1e-6) for epochs in (1, 40)],
        *[(epochs, 0.45, 0.99, 1e-6) for epochs in (70, 100)],
        *[(epochs, 0.3, 0.99, 1e-6) for epochs in (200, 300)],
        *[(epochs, 0.2, 0.996, 1.5e-6) for epochs in (600, 1000, 3000)],
    ],
)
def test_epochs_pick_the_published_schedule_and_flags_come_first(epochs, lr, tau, weight_decay):
    args = parsed("byol", "--epochs", epochs)
    assert (args.lr, args.tau, args.weight_decay) == (lr, tau, weight_decay)
    args = parsed("byol", "--epochs", epochs, "--tau", 0, "--weight-decay", 0)
    assert (args.lr, args.tau, args.weight_decay) == (lr, 0, 0)


def test_start_names_the_row_and_resuming_compares_its_values(tmp_path, capsys):
    train("byol", tmp_path, "--max-steps", 2)
    shown = capsys.readouterr().out
    assert "tau 0.97 to 1, weight decay 1e-06" in shown and "nearest published (40 epochs)" in shown
    train("byol", tmp_path, "--max-steps", 3, "--lr", 0.45, "--tau", 0.97, "--weight-decay", 1e-6)
    assert list(records(tmp_path)) == [1, 2, 3]  # the same recipe, spelt out
    error = refused(capsys, train, "byol", tmp_path, "--epochs", 90)
    assert "--epochs was 4, is 90" in error and "--tau was 0.97, is 0.99" in error
