"""DirectCLR: the loss against NumPy, groups of channels, effective rank, what the loss sees."""

import math

import numpy as np
import pytest
import torch

import directclr
from common.features import effective_rank, singular_values, spectrum, spectrum_slope
from common.resnet import resnet
from directclr import DirectCLR, channel_groups, directclr_loss
from tests.helpers import EXACT, flags, main, records, refused, rows, train


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_loss_equals_numpy(temperature):
    """One anchor and one candidate at a time; the own view's images are no candidates."""
    z1, z2 = (z.numpy() for z in rows(2, 6, 5))
    cos = np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in z2] for a in z1]) / temperature
    losses = [
        math.log(sum(math.exp(s) for s in line)) - line[i] for table in (cos, cos.T) for i, line in enumerate(table)
    ]
    found = directclr_loss(torch.from_numpy(z1), torch.from_numpy(z2), temperature)
    assert found.item() == pytest.approx(np.mean(losses), abs=1e-10)


def test_equal_rows_give_chance():
    z = torch.ones(9, 4, dtype=torch.float64)
    assert directclr_loss(z, z, 0.1).item() == pytest.approx(math.log(9), abs=1e-12)


def test_only_the_first_channels_have_a_gradient_from_the_loss(monkeypatch, tmp_path):
    seen, real = [], directclr.directclr_loss
    monkeypatch.setattr(directclr, "directclr_loss", lambda a, b, t: seen.append(a.shape) or real(a, b, t))
    train("directclr", tmp_path, "--d0", 5, "--max-steps", 1)
    assert seen == [(16, 5)]
    seen.clear()
    train("directclr", tmp_path / "group", "--projector", "group", "--max-steps", 1)
    assert seen == [(16, 8)] * 8  # 64 features
    r1, r2 = (r.requires_grad_() for r in rows(2, 6, 10))
    directclr_loss(r1[:, :4], r2[:, :4], 0.1).backward()
    assert r1.grad[:, :4].abs().min() > 0 and not r1.grad[:, 4:].any()


def test_groups_divide_the_channels_and_change_with_the_step():
    groups = channel_groups(3, 7, 20, groups=6)
    assert groups.shape == (6, 3) and len(set(groups.flatten().tolist())) == 18
    assert torch.equal(groups, channel_groups(3, 7, 20, groups=6))
    assert not torch.equal(groups, channel_groups(3, 8, 20, groups=6))


def test_default_channels_are_the_papers_share(tmp_path, capsys):
    train("directclr", tmp_path, "--max-steps", 1)
    assert "first 11 of 64 channels" in capsys.readouterr().out  # 64 x 360 / 2048 = 11.25
    model = DirectCLR(resnet("resnet50", image_size=224), "mlp")
    assert model.projector(torch.zeros(2, 2048)).shape == (2, 128)


def test_too_many_channels_are_refused(tmp_path, capsys):
    words = flags("directclr", tmp_path, "--d0", 65)
    assert "--d0 65: the features have 64 channels" in refused(capsys, main, "directclr", *words)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.5])
def test_slope_of_a_known_spectrum(alpha):
    """Centred orthonormal columns, times k^(-alpha / 2): the eigenvalues of their covariance fall as k^-alpha."""
    z = torch.randn(300, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(0))[0] * torch.arange(1, 41, dtype=z.dtype) ** (-alpha / 2)
    assert spectrum_slope(3 * z + 5) == pytest.approx(alpha, abs=1e-9)
    assert spectrum(z)["alpha"] == pytest.approx(alpha, abs=1e-3)
    assert math.isnan(spectrum_slope(torch.ones(9, 8))) and spectrum(torch.ones(9, 8)) == {"rankme": 1.0}


def test_effective_rank_of_known_matrices():
    eye = torch.eye(64, dtype=torch.float64)
    assert effective_rank(eye).item() == pytest.approx(64.0, abs=2e-3)  # the 1e-7 adds 0.0013
    assert effective_rank(torch.ones(50, 8)).item() == pytest.approx(1.0, abs=1e-4)
    line = torch.arange(50.0)[:, None] * torch.tensor([1.0, 2.0, -1.0]) + 5
    assert effective_rank(line, center=True).item() == pytest.approx(1.0, abs=1e-4)
    z = rows(1, 40, 7)[0]
    for shape in (z, z.T):  # both products of the matrix with itself
        assert singular_values(shape).numpy() == pytest.approx(np.linalg.svd(z.numpy(), compute_uv=False))
    p = np.linalg.svd(z.numpy() - z.numpy().mean(0), compute_uv=False)
    p = p / p.sum() + 1e-7
    assert effective_rank(z, center=True).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_rank_is_logged_at_the_steps_that_log(tmp_path):
    train("directclr", tmp_path, "--max-steps", 4, "--log-every", 2, *EXACT)
    logged = records(tmp_path).values()
    assert len(logged) == 2 and all(1 <= r["rank"] <= 16 for r in logged)
