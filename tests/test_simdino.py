"""SimDINO: the loss and its bounds, groups of images, processes, the head, and going on from weights."""

import math

import numpy as np
import pytest
import torch

import simdino
from tests.helpers import as_processes, flags, logged, main, parsed, refused, state, train, unit


def outputs(views=5, batch=6, dim=4):
    """Unit rows of a student (V, B, p) and of a teacher (2, B, p)."""
    return unit(views, batch, dim), unit(2, batch, dim, seed=1)


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("views, group, total", [(2, 0, None), (5, 3, 12), (3, 2, None)])
def test_loss_equals_the_formula_in_numpy(views, group, total, smooth):
    student, teacher = (x.numpy() for x in outputs(views))
    cosines = [teacher[i, b] @ student[v, b] for i in range(2) for v in range(views) if v != i for b in range(6)]
    assert len(cosines) == 6 * (2 * views - 2)
    rates, m, size = [], total or 6, group or 6
    for i in range(2):
        z = (student[i] + teacher[i]) / 2 if smooth else student[i]
        for start in range(0, 6, size):
            part = z[start : start + size]
            eigenvalues = np.linalg.eigvalsh(np.eye(4) + 4 / (m * 0.1) * part.T @ part)
            rates.append((4 + m) / (4 * m) * np.log(eigenvalues).sum() / 2)
    expected = -0.7 * np.mean(cosines) - np.mean(rates)
    loss = simdino.simdino_loss(*outputs(views), group, total, 0.1, 0.7, smooth)
    assert loss.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    "rows, total, eps, low, high",
    [(512, 512, 0.05, 0.0250, 2.2834), (512, 512, 0.5, None, 0.8240), (64, 512, 0.05, None, 0.4496)],
)
def test_coding_rate_of_equal_and_of_evenly_spread_rows(rows, total, eps, low, high):
    """With p = 256 outputs: of the whole batch of 512, and of 64 of them, whose covariance is divided by 512."""
    bounds = simdino.bounds(256, rows, total, eps)
    spread = torch.eye(256).double().repeat(2, 1)[:rows].expand(2, -1, -1)
    for value, z in zip(bounds, (unit(1, 1, 256).expand(2, rows, -1), spread), strict=True):
        assert simdino.coding_rate(z, rows, total, eps).item() == pytest.approx(value, rel=1e-12)
    assert bounds[1] == pytest.approx(high, abs=5e-5)
    if rows == total:
        assert bounds[0] == pytest.approx((256 + 512) / (256 * 512) / 2 * math.log(1 + 256 / eps), rel=1e-12)
        assert low is None or bounds[0] == pytest.approx(low, abs=5e-5)


@pytest.mark.parametrize("group, smooth", [(0, True), (3, True), (2, False)])
def test_loss_has_the_right_gradient_and_none_for_the_teacher(group, smooth):
    student, teacher = (x.requires_grad_() for x in outputs(3))
    loss = lambda s: simdino.simdino_loss(s, teacher, group, smooth=smooth)  # noqa: E731
    assert torch.autograd.gradcheck(loss, student)
    loss(student).backward()
    assert teacher.grad is None


def test_a_crop_is_not_compared_with_itself():
    """Of two crops: the teacher says e1 of the first and e2 of the second."""
    wanted = torch.eye(2).double()[:, None]
    assert simdino.similarity(wanted, wanted).item() == 0 and simdino.similarity(wanted.flip(0), wanted).item() == 1


def test_images_may_change_places_within_a_group():
    student, teacher = outputs()
    swap = lambda order: simdino.simdino_loss(student[:, order], teacher[:, order], 3).item()  # noqa: E731
    same = swap([0, 1, 2, 3, 4, 5])
    assert swap([2, 0, 1, 4, 3, 5]) == pytest.approx(same, abs=1e-13)
    assert swap([3, 4, 5, 0, 1, 2]) == pytest.approx(same, abs=1e-13)  # groups, too
    assert abs(swap([3, 1, 2, 0, 4, 5]) - same) > 1e-4


@pytest.mark.parametrize("group", [0, 3])
def test_a_failed_factorisation_makes_the_loss_infinite(group):
    """cholesky_ex returns numbers all the same, here of a matrix with negative eigenvalues."""
    student, _ = outputs()
    assert simdino.coding_rate(student, group, eps=0.05).isfinite()
    assert not simdino.coding_rate(student, group, eps=-0.05).isfinite()


@pytest.mark.parametrize("group", [0, 3])
def test_two_processes_have_the_loss_and_gradient_of_one(group, monkeypatch):
    """The average of their gradients has to be the gradient itself."""
    weight = unit(4, 4, seed=3).requires_grad_()
    student, teacher = outputs(4, 12)

    def loss(part):
        z = torch.nn.functional.normalize(student[:, part] @ weight, dim=2)
        return simdino.simdino_loss(z, teacher[:, part], group, 12 if group else None)

    whole = loss(slice(0, 12))
    (gradient,) = torch.autograd.grad(whole, weight)
    losses = torch.stack(as_processes(monkeypatch, simdino, loss, (slice(0, 6),), (slice(6, 12),)))
    assert losses.mean().item() == pytest.approx(whole.item(), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(losses.mean(), weight)[0], gradient, atol=1e-12, rtol=1e-10)
    assert gradient.abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ model
def test_head_gives_unit_vectors_of_three_layers():
    head = simdino.Head(7, out_dim=6, hidden_dim=5).double()
    x = torch.randn(3, 7, dtype=torch.float64)
    h = x
    for layer in (0, 2, 4):
        h = h @ head.mlp[layer].weight.T + head.mlp[layer].bias
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2))) if layer < 4 else h
    assert (head(x) - h / h.norm(dim=1, keepdim=True)).abs().max() < 1e-12
    assert [m.num_features for m in simdino.Head(7, 6, 5, norm=True).mlp if hasattr(m, "num_features")] == [5, 5]


# -------------------------------------------------------------------------------------------------- arguments
def test_defaults_are_the_published():
    args = parsed("simdino", "--image-size", 224)
    assert (args.arch, args.batch_size, args.group, args.local_crops, args.out_dim) == ("vit_base", 512, 64, 10, 256)
    assert (args.eps, args.coeff, args.smooth, args.teacher_momentum, args.epochs) == (0.05, 1, True, 0.996, 100)
    assert parsed("simdino", "--batch-size", 64).group == 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("--group 1", "--group 1: one image alone cannot be spread"),
        ("--group 6", "--group 6 does not divide the 16 images of a process: try 2, or 0 (all)"),
        ("--group 8 --accum 4", "--group 8 does not divide the 4 images of a process: try 4"),
        ("--out-dim 1", "--out-dim: must be at least 2"),
        ("--eps 0", "--eps: must be greater than 0"),
    ],
)
def test_mistakes(words, message, capsys, tmp_path):
    assert message in refused(capsys, main, "simdino", *flags("simdino", tmp_path, *words.split()))


# ------------------------------------------------------------------------------------------------------- runs
def test_groups_do_not_depend_on_micro_batches_and_the_teacher_is_saved(tmp_path, capsys):
    words = ["--max-steps", 2, "--precision", "fp64", "--group", 4]
    whole, parts = (train("simdino", tmp_path / str(n), *words, "--accum", n)["model"] for n in (1, 2))
    assert max((whole[k] - parts[k]).abs().max() for k in whole) < 1e-10
    low, high = simdino.bounds(8, 4, 16, 0.05)
    assert f"coding rate {low:.3f} (equal outputs) to {high:.3f}" in capsys.readouterr().out
    for record in (r for r in logged(tmp_path / "2") if "loss" in r):
        assert low - 1e-9 <= record["coding_rate"] <= high and abs(record["similarity"]) <= 1
    saved = state(tmp_path / "1", "backbone.pt")["backbone"]
    assert all(torch.equal(v, whole[f"teacher_backbone.{k}"]) for k, v in saved.items())
    words = ["--max-steps", 1, "--init", tmp_path / "1/last.pt"]
    main("simdino", *flags("simdino", tmp_path / "more", *words))
    assert "head        kept" in capsys.readouterr().out
    main("simdino", *flags("simdino", tmp_path / "other", *words, "--out-dim", 6))
    assert "head        fresh: that of the file has other sizes" in capsys.readouterr().out
