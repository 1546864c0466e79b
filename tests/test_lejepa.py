"""LeJEPA: SIGReg against a loop and closed forms, over processes and in chunks; directions; crops; what a run logs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lejepa
from common.resnet import resnet
from lejepa import LeJEPA, expected, lejepa_loss, lejepa_terms, random_directions, sigreg
from tests.helpers import EXACT, SMALL, TINY, as_processes, main, parsed, records, refused, rows, state, train, unit

FLOOR = 1.05246  # 17 knots up to 3; of the whole line sqrt(2 pi) (1 - 1/sqrt(3)) = 1.05943


def by_hand(z, directions, knots):
    """T of every direction by the trapezoid rule on the whole of [-3, 3], in complex numbers; their mean."""
    z, n, total = z.numpy(), len(z), 0.0
    ts = np.linspace(-3, 3, 2 * knots - 1)
    for a in directions.numpy():
        values = []
        for t in ts:
            empirical = sum(np.exp(1j * t * (row @ a)) for row in z) / n
            values.append(abs(empirical - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2))
        total += n * sum((values[i] + values[i + 1]) / 2 * (ts[i + 1] - ts[i]) for i in range(len(ts) - 1))
    return total / len(directions)


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("n, dim, slices, knots", [(6, 4, 5, 17), (1, 3, 2, 5), (9, 1, 1, 2), (5, 7, 3, 4)])
def test_sigreg_is_the_formula(n, dim, slices, knots):
    z, directions = 1.3 * rows(n, dim) + 0.4, unit(slices, dim)
    value = sigreg(z, directions, knots)
    assert value.item() == pytest.approx(by_hand(z, directions, knots), abs=1e-10)
    assert sigreg(-z, directions, knots).item() == pytest.approx(value.item(), rel=1e-12)  # its t and -t agree
    assert sigreg(z.flip(0), directions, knots).item() == pytest.approx(value.item(), rel=1e-12)


def test_known_values():
    """Equal zeros; quantiles of the normal distribution; normal numbers of another deviation, by the whole integral."""
    directions = unit(3, 6)
    assert sigreg(torch.zeros(40, 6, dtype=torch.float64), directions).item() == pytest.approx(0.4020476 * 40, abs=2e-6)
    assert expected(17) == pytest.approx((FLOOR, 0.4020476), abs=5e-6)
    one = torch.ones(1, 1, dtype=torch.float64)
    for n, value in ((64, 8.3e-4), (256, 1.652e-4), (1024, 3.4e-5)):
        quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
        assert sigreg(quantiles, one).item() == pytest.approx(value, rel=0.02)
    for s in (0.5, 2.0):
        closed = math.sqrt(2 * math.pi) * (1 / math.sqrt(2 * s**2 + 1) - 2 / math.sqrt(s**2 + 2) + 1 / math.sqrt(3))
        assert sigreg(s * quantiles, one, 101).item() / n == pytest.approx(closed, rel=0.02)


@pytest.mark.parametrize("n", [8, 64])
def test_normal_numbers_have_the_floor_whatever_their_number(n):
    values = [sigreg(rows(n, 4, seed=seed), unit(64, 4, seed=seed)).item() for seed in range(200)]
    assert np.mean(values) == pytest.approx(FLOOR, abs=4 * np.std(values) / math.sqrt(200))
    assert np.std(values) < 1


@pytest.mark.parametrize("views, large", [(2, 2), (3, 2), (4, 1), (3, 3)])
def test_loss_is_the_formula(views, large):
    z, directions = rows(views, 6, 5), unit(4, 5)
    centre = z[:large].numpy().mean(axis=0)
    invariance = np.mean([np.mean((centre - z[v].numpy()) ** 2) for v in range(views)])
    normality = np.mean([by_hand(z[v], directions, 9) for v in range(views)])
    assert lejepa_loss(z, large, directions, 9, 0.3).item() == pytest.approx(
        0.7 * invariance + 0.3 * normality, abs=1e-10
    )
    if views == 2:
        assert lejepa_terms(z, 2, directions)[0].item() == pytest.approx(F.mse_loss(*z).item() / 4, rel=1e-12)


def test_gradient_is_right_and_reaches_every_crop():
    z, directions = rows(3, 4, 3).requires_grad_(), unit(2, 3)
    assert torch.autograd.gradcheck(lambda z: lejepa_loss(z, 2, directions, 5, 0.2), z, atol=1e-8, rtol=1e-6)
    lejepa_terms(z, 2, directions)[0].backward()
    assert (z.grad.abs().amax((1, 2)) > 1e-3).all()


def test_chunks_change_neither_value_nor_gradient_and_no_inside_is_stored(monkeypatch):
    directions, results, stored = unit(12, 5), [], []
    for most in (2**22, 7 * 17 * 5, 1):  # all at once, parts of 5 directions, one by one
        monkeypatch.setattr(lejepa, "MOST", most)
        z = rows(7, 5).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
            value = sigreg(z, directions)
        results.append((value.detach(), torch.autograd.grad(value, z)[0]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-13, rtol=1e-12)
    assert max(stored) <= 12 * 16 * 2 < 7 * 12 * 16


def test_two_processes_have_the_loss_and_gradient_of_one(monkeypatch):
    """The invariance is a mean over own images, SIGReg is that of all; with several chunks, too."""
    weight = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5).cos().requires_grad_()
    z, directions = rows(3, 12, 7), unit(9, 5)

    def loss(z):
        return lejepa_loss(z @ weight, 2, directions, 17, 0.3)

    (gradient,) = torch.autograd.grad(loss(z), weight)
    for most in (2**22, 6 * 17 * 2):
        monkeypatch.setattr(lejepa, "MOST", most)
        losses = as_processes(monkeypatch, lejepa, loss, (z[:, :6],), (z[:, 6:],))
        assert sum(losses).item() / 2 == pytest.approx(loss(z).item(), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(sum(losses) / 2, weight)[0], gradient, atol=1e-10, rtol=1e-12)
    assert gradient.abs().max() > 1e-2
    moments = as_processes(monkeypatch, lejepa, lejepa.moments, (z[:, :6],), (z[:, 6:],))
    flat = z.reshape(-1, 7).numpy()
    wanted = np.sqrt(np.mean(flat.mean(axis=0) ** 2)), np.sqrt(np.mean(flat.var(axis=0)))
    assert all([x.item() for x in own] == pytest.approx(wanted, rel=1e-12) for own in moments)


def test_directions_belong_to_seed_and_step():
    first = random_directions(3, 7, 400, 5)
    torch.manual_seed(99)  # what a process draws otherwise does not matter
    assert torch.equal(random_directions(3, 7, 400, 5), first)
    assert not torch.allclose(random_directions(3, 8, 400, 5), first)
    assert not torch.allclose(random_directions(4, 7, 400, 5), first)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(400, dtype=torch.float64))
    spread = first.T @ first / 400  # on the sphere all directions are equally likely
    torch.testing.assert_close(spread, torch.eye(5, dtype=torch.float64) / 5, atol=0.05, rtol=0)


# --------------------------------------------------------------------------------------------------- model, crops
def test_crops_of_two_sizes_keep_their_order():
    torch.manual_seed(0)
    model = LeJEPA(lejepa.transformer("vit_tiny", 16, 0.125, 4, 2), 12, 6, drop_path=0.5).double().eval()
    views = [rows(3, 3, size, size) for size in (16, 16, 8, 8)]
    z = model(views)
    assert z.shape == (4, 3, 6)
    alone = [model.projector(model.backbone(view)) for view in views]
    torch.testing.assert_close(z, torch.stack(alone), atol=1e-12, rtol=0)
    u = torch.zeros(3, 4, 4, dtype=torch.float64)  # the least number drops each branch that may be dropped
    keep = model(views, u + 0.999)
    assert not torch.allclose(model(views, u), keep)
    u[:, 2:] = 0.999  # only the large crops lose branches
    torch.testing.assert_close(model(views, u)[2:], keep[2:], atol=1e-12, rtol=0)
    assert not torch.allclose(model(views, u)[:2], keep[:2])


def test_projector():
    model = LeJEPA(resnet(*SMALL), hidden_dim=24, dim=10)
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    shapes = [tuple(layer.weight.shape) for layer in model.projector[::3]]
    assert shapes == [(24, model.backbone.dim), (24, 24), (10, 24)] and model.projector[6].bias is not None


@pytest.mark.parametrize(
    "words, crops, decay",
    [
        ("/x", [(224, 0.3, 1.0)] * 2 + [(96, 0.05, 0.3)] * 6, 0.05),
        ("/x --arch vit_large --patch-size 14", [(224, 0.3, 1.0)] * 2 + [(98, 0.05, 0.3)] * 6, 0.05),
        ("/x --arch resnet50", [(224, 0.3, 1.0)] * 2, 5e-4),
        ("/x --arch resnet50 --global-crops 4 --local-crops 1", [(224, 0.3, 1.0)] * 4 + [(96, 0.05, 0.3)], 5e-4),
        ("cifar10 --arch resnet18", [(32, 0.2, 1.0)] * 2, 5e-4),
        ("cifar10 --local-crops 3", [(32, 0.2, 1.0)] * 2 + [(12, 0.05, 0.3)] * 3, 0.05),
    ],
)
def test_recipes(words, crops, decay):
    args = parsed("lejepa", "--data", *words.split())
    sizes = (args.image_size, args.global_crops, args.global_scale, args.local_size, args.local_crops, args.local_scale)
    views = lejepa.augmentation(*sizes)
    assert [(v.size, *v.area) for v in views] == crops
    for v in views:
        assert (v.flip, v.jitter, v.jitter_p, v.gray_p) == (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (v.solarize_p, v.blur_p) == (0.2, 0.5 if args.image_size > 64 else 0)
    assert (args.weight_decay, args.drop_path) == (decay, 0.0 if "resnet" in words else 0.1)
    assert (args.lambd, args.slices, args.knots, args.dim, args.hidden_dim) == (0.05, 1024, 17, 512, 2048)
    assert args.lr * args.batch_size / 256 == 5e-4


# ----------------------------------------------------------------------------------------------------- training
def test_a_step_has_its_directions_and_the_log_its_terms(tmp_path, monkeypatch, capsys):
    """Micro-batches share the directions of their step; decay is for weights; terms add up to the loss."""
    seen, real = [], lejepa.lejepa_loss
    monkeypatch.setattr(lejepa, "lejepa_loss", lambda *x: seen.append(x[2]) or real(*x))
    words = ["--lambd", 0.2, "--slices", 5]
    train("lejepa", tmp_path / "a", *EXACT, "--max-steps", 2, "--accum", 2, *words)
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2]) and seen[0].shape == (5, 16)
    assert torch.equal(seen[2], seen[3]) and torch.equal(seen[2], random_directions(3, 1, 5, 16))
    words += ["--hidden-dim", 8, "--dim", 16, "--max-steps", 2, "--weight-decay", 0.3, "--out", tmp_path / "b"]
    main("lejepa", *TINY.split(), *EXACT, *words)  # a ResNet
    assert [group["weight_decay"] for group in state(tmp_path / "b")["optimizer"]["param_groups"]] == [0.3, 0]
    for record in records(tmp_path / "b").values():
        assert record["loss"] == pytest.approx(0.8 * record["invariance"] + 0.2 * record["sigreg"], rel=1e-3)
        assert record["ratio"] == pytest.approx(record["sigreg"] / FLOOR, rel=1e-3)
        assert record["sd"] > 0 and record["mean"] >= 0
    printed = capsys.readouterr().out
    assert "0.2 x 1.052 = 0.2105 for normal outputs that agree, 1.287 for outputs of 0" in printed  # 0.2 x 0.402 x 16


@pytest.mark.parametrize(
    "words, message",
    [
        ("--slices 0", "--slices: must be greater than 0"),
        ("--slices 2.5", "--slices: expected a whole number"),
        ("--knots 1", "--knots: must be at least 2"),
        ("--lambd 1.5", "--lambd: must be at most 1"),
        ("--global-crops 0", "--global-crops: must be greater than 0"),
        ("--global-crops 1 --local-crops 0", "one crop have nothing to agree with"),
        ("--global-scale 0.9 0.3", "the least share comes first"),
        ("--arch resnet18 --drop-path 0.1", "--drop-path is for ViTs"),
        ("--arch vit_giant", "unknown, expected one of"),
        ("--patch-size 4 --local-crops 1 --local-size 10", "not a multiple of the patch size 4: try 12"),
        ("--patch-size 5", "--image-size 16 is not a multiple of the patch size 5"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    start = ["--data", "fake:64", "--image-size", 16, "--batch-size", 16, "--out", tmp_path]
    assert message in refused(capsys, main, "lejepa", *start, *words.split())
