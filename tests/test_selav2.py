"""SeLa-v2: labels against a dense Sinkhorn-Knopp in double precision, how even they are, frozen prototypes.

What it shares with DeepCluster-v2 is in test_deepclusterv2.py.
"""

import numpy as np
import pytest
import torch

import selav2
from selav2 import sinkhorn_labels
from tests.helpers import train, unit

SHARP = {"temperature": 0.1, "lambd": 25.0}


def powers(lambd, iterations):
    return [lambd ** min(1.0, 2 * (i + 1) / iterations) for i in range(iterations)]


def dense_plan(z, c, iterations, temperature=0.1, lambd=25.0, extrapolate=True):
    """The plan (n, K) after the same iterations, as a matrix whose rows and columns are scaled in turn."""
    p = np.exp(np.asarray(z) @ np.asarray(c).T / temperature)
    p /= p.sum(1, keepdims=True)
    b, last, tried = np.ones(len(c)), 1.0, []
    for power in powers(lambd, iterations):
        b = b ** (power / last)
        q = p**power * b
        q /= q.sum(1, keepdims=True)
        factor, last = (len(p) / len(b)) / q.sum(0), power
        if power == lambd and extrapolate:
            tried.append((np.log(b), np.log(factor)))
        if len(tried) > 1:  # the combination of the last two whose correction is shortest
            (b1, f1), (b2, f2) = tried[-2:]
            w = (f2 @ (f2 - f1)) / ((f2 - f1) @ (f2 - f1))
            b = np.exp(w * (b1 + f1) + (1 - w) * (b2 + f2))
        else:
            b = b * factor
    q = p**lambd * b
    return q / q.sum(1, keepdims=True)


def clustered(n, dim, centres, spread, seed=0):
    """Unit rows around centres of unequal weight."""
    generator = torch.Generator().manual_seed(seed)
    which = (centres * torch.rand(n, generator=generator) ** 2).long()
    return torch.nn.functional.normalize(unit(centres, dim)[which] + spread * unit(n, dim, seed=seed + 1), dim=1)


@pytest.mark.parametrize("chunk", [2**20, 50])
@pytest.mark.parametrize("iterations", [1, 2, 10, 25])
def test_labels_equal_a_dense_sinkhorn(iterations, chunk, monkeypatch):
    monkeypatch.setattr(selav2, "CHUNK", {"cpu": chunk})
    z, c = clustered(97, 6, 9, 0.8), unit(7, 6, seed=5)
    labels = sinkhorn_labels(z, c, iterations=iterations, **SHARP)
    assert labels.dtype == torch.int64 and labels.tolist() == dense_plan(z, c, iterations).argmax(1).tolist()


def test_labels_are_those_of_the_paper_in_the_end():
    """SeLa's algorithm: r = (1 / K) / (P^lambda c), c = (1 / N) / (r P^lambda), until nothing changes."""
    z, c = clustered(60, 5, 8, 0.9), unit(6, 5, seed=5)
    p = np.exp(z.numpy() @ c.numpy().T / 0.1)
    p = (p / p.sum(1, keepdims=True)).T ** 4  # (K, N), as there
    columns = np.full(60, 1 / 60)
    for _ in range(1000):
        r = 1 / 6 / (p @ columns)
        columns = 1 / 60 / (r @ p)
    plan = r[:, None] * p * columns
    np.testing.assert_allclose(plan.sum(1), 1 / 6, rtol=1e-8)
    assert sinkhorn_labels(z, c, 0.1, 4.0, 400).tolist() == plan.argmax(0).tolist()
    np.testing.assert_allclose(dense_plan(z, c, 400, lambd=4.0, extrapolate=False), 60 * plan.T, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [1.5, 1.0, 0.5, 0.2])
def test_labels_are_nearly_uniform(spread, dtype):
    """Where the nearest prototypes are far from it, or leave some without any image."""
    z, c = clustered(2000, 16, 30, spread).to(dtype), unit(20, 16, seed=5).to(dtype)
    nearest = torch.bincount((z @ c.T).argmax(1), minlength=20)
    default = selav2.parse_args(["--data", "/x"]).iterations
    counts = torch.bincount(sinkhorn_labels(z, c, iterations=default, **SHARP), minlength=20)
    assert nearest.max() > 3 * nearest.min() and counts.max() < 2.5 * counts.min()


def test_single_precision_does_not_overflow():
    """P^lambda spans 1e-217 to 1 here: only its logarithm fits."""
    z, c = clustered(300, 8, 5, 0.1).float(), unit(9, 8, seed=5).float()
    exact = sinkhorn_labels(z.double(), c.double(), iterations=200, **SHARP)
    labels = sinkhorn_labels(z, c, iterations=200, **SHARP)
    assert (labels == exact).float().mean() > 0.98
    assert sinkhorn_labels(z, c, temperature=1e-3, lambd=1e4, iterations=5).max() < 9


def test_processes_share_rows_and_sums(monkeypatch):
    """Each adds its own sums; the labels are those of all rows, also where one process has none."""
    z, c = clustered(97, 6, 9, 0.8), unit(7, 6, seed=5)
    sums = []
    monkeypatch.setattr(selav2, "all_reduce", lambda used: sums.append(used) or used)
    whole = sinkhorn_labels(z, c, iterations=8, **SHARP)
    for part in (slice(0, 60), slice(60, 97), slice(97, 97)):
        total = iter(sums[:8])
        monkeypatch.setattr(selav2, "all_reduce", lambda used, total=total: next(total))
        assert torch.equal(sinkhorn_labels(z[part], c, iterations=8, **SHARP), whole[part])


def test_prototypes_are_frozen_at_first_and_unit_afterwards(tmp_path):
    words = ["--freeze-steps", 2, "--max-steps"]
    start, frozen, moved = (train("selav2", tmp_path, *words, n)["model"] for n in (1, 2, 3))
    for head in range(3):
        name = f"prototypes.{head}.weight"
        assert torch.equal(start[name], frozen[name]) and (frozen[name] != moved[name]).any(1).all()
        torch.testing.assert_close(moved[name].norm(dim=1), torch.ones(len(moved[name])), rtol=0, atol=1e-6)
    assert not torch.equal(start["projector.3.weight"], frozen["projector.3.weight"])


def test_prototypes_are_frozen_for_an_epoch_by_default(tmp_path):
    flags = "--data fake:64 --arch resnet18 --width 0.125 --image-size 16 --batch-size 16 --epochs 4 --dim 8"
    flags += " --hidden-dim 16 --workers 0 --knn-every 0 --warmup-epochs 0"
    saved = []
    for steps in (1, 4, 5):
        selav2.main(selav2.parse_args([*flags.split(), "--out", str(tmp_path), "--max-steps", str(steps)]))
        saved.append(torch.load(tmp_path / "last.pt", weights_only=True)["model"]["prototypes.0.weight"])
    assert torch.equal(saved[0], saved[1]) and not torch.equal(saved[1], saved[2])
