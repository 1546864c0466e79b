"""NT-Xent and its decoupled form, SimCLR's model and its two rules of the learning rate."""

import functools
import math

import numpy as np
import pytest
import torch

import simclr
from common.resnet import resnet
from simclr import SimCLR, dcl_loss, nt_xent
from tests.helpers import as_processes, flags, main, records, refused, rows, train


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_loss_equals_numpy(temperature):
    """Equation 1 of the paper, one anchor and one candidate at a time."""
    z1, z2 = rows(2, 6, 5)
    z = np.concatenate([z1, z2])
    n, b = len(z), len(z1)

    def sim(i, k):
        return math.exp(z[i] @ z[k] / math.sqrt((z[i] @ z[i]) * (z[k] @ z[k])) / temperature)

    losses = [-math.log(sim(i, (i + b) % n) / sum(sim(i, k) for k in range(n) if k != i)) for i in range(n)]
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(sum(losses) / n, abs=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_decoupled_loss_equals_numpy(weighted, temperature):
    """The partner is no candidate; weights are 2 - exp(s_i / sigma) over the mean of all pairs' (DCLW)."""
    z1, z2 = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in rows(2, 6, 5).numpy())
    z, b, total = np.concatenate([z1, z2]), 6, 0.0
    similar = [math.exp(z1[i] @ z2[i] / 0.5) for i in range(b)]
    for i in range(2 * b):
        weight = 2 - similar[i % b] / np.mean(similar) if weighted else 1
        others = sum(math.exp(z[i] @ z[k] / temperature) for k in range(2 * b) if k % b != i % b)
        total += math.log(others) - weight * (z[i] @ z[(i + b) % (2 * b)]) / temperature
    assert dcl_loss(*rows(2, 6, 5), temperature, weighted).item() == pytest.approx(total / (2 * b), abs=1e-10)


@pytest.mark.parametrize("b", [1, 2, 17])
def test_equal_embeddings_give_chance(b):
    z = torch.ones(b, 4, dtype=torch.float64)
    assert nt_xent(z, z, 0.1).item() == pytest.approx(math.log(2 * b - 1), abs=1e-12)
    if b > 1:
        for weighted in (False, True):
            assert dcl_loss(z, z, 0.1, weighted).item() == pytest.approx(math.log(2 * b - 2), abs=1e-12)


@pytest.mark.parametrize("loss", [nt_xent, dcl_loss, functools.partial(dcl_loss, weighted=True)])
def test_two_processes_have_the_loss_and_gradient_of_one(loss, monkeypatch):
    """DCLW's weights have no gradient: those of a finite difference are held fixed, so gradcheck is for the others."""
    weight = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5).cos().requires_grad_()
    z1, z2 = rows(2, 12, 7)
    whole = loss(z1 @ weight, z2 @ weight, 0.5)
    (gradient,) = torch.autograd.grad(whole, weight)
    halves = zip(z1.chunk(2), z2.chunk(2), strict=True)
    losses = as_processes(monkeypatch, simclr, lambda a, b: loss(a @ weight, b @ weight, 0.5), *halves)
    assert sum(losses).item() / 2 == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sum(losses) / 2, weight)[0], gradient, atol=1e-10, rtol=1e-12)
    if not isinstance(loss, functools.partial):
        views = [z[:4].clone().requires_grad_() for z in (z1, z2)]
        assert torch.autograd.gradcheck(lambda *z: loss(*z, 0.5), views, atol=1e-7, rtol=1e-6)


def test_decoupled_runs(tmp_path, capsys):
    losses = set()
    for words in ([], ["--decoupled"], ["--decoupled", "dclw"]):
        main("simclr", *flags("simclr", tmp_path / "".join(words), "--max-steps", 1, *words))
        losses.add(records(tmp_path / "".join(words))[1]["loss"])
    assert len(losses) == 3 and "ln(30) = 3.40" in capsys.readouterr().out
    assert "--decoupled" in refused(capsys, main, "simclr", "--data", "fake:64", "--decoupled", "dclx")


def test_model_follows_the_official_code():
    model = SimCLR(resnet("resnet50", image_size=224, zero_init_residual=True))
    first, _, _, second, norm = model.projector
    assert (first.in_features, first.out_features, second.out_features) == (2048, 2048, 128)
    assert first.bias is None and second.bias is None
    assert norm.weight.requires_grad and not norm.bias.requires_grad
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert model.backbone.layer1[0].bn3.weight.abs().sum() == 0  # zero gamma


@pytest.mark.parametrize("width, millions", [(1, 23.51), (2, 93.91), (4, 375.38)])
def test_width_gives_the_published_parameter_counts(width, millions):
    """Encoder sizes of the SimCLR v2 table, derived from the layer description."""
    with torch.device("meta"):
        count = sum(p.numel() for p in resnet("resnet50", width).parameters())
    assert round(count / 1e6, 2) == millions


def test_both_learning_rate_rules(tmp_path):
    """At 16 images: 0.3 x 16/256 and 0.075 x sqrt(16) (appendix B.1)."""
    for rule, peak in (("linear", 0.3 * 16 / 256), ("sqrt", 0.075 * 4)):
        state = train("simclr", tmp_path / rule, "--max-steps", 5, "--lr-rule", rule)
        assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(peak)  # the first step after warm-up
