"""NPID's losses, negatives, bank, frozen normaliser and schedule."""

import math
import re

import numpy as np
import pytest
import torch

from common import rng
from common.augment import DRAWS, JITTER
from common.datasets import open_dataset
from common.loader import Loader
from common.resnet import resnet
from npid import NPID, augmentation, full_softmax_loss, nce_lines, nce_loss, negatives, similarity, staircase
from tests.helpers import EXACT, SMALL, different, records, rows, state, train, unit


def example(b=5, n=40, d=6, k=9):
    """Features, bank and columns (B, K+1): images 3, 4 ... with their negatives. A small and a large N take different
    ways through `similarity`."""
    indices = torch.arange(b) + 3
    columns = torch.cat([indices[:, None], negatives(0, 0, indices, k, n)], 1)
    return unit(b, d, seed=1), unit(n, d, seed=2), columns


def slow_nce(f, bank, columns, z, temperature):
    """The published loss, one image and one column at a time."""
    k, n = columns.shape[1] - 1, len(bank)
    total = 0.0
    for i in range(len(f)):
        for c, j in enumerate(columns[i]):
            p = math.exp(sum(bank[j] * f[i]) / temperature) / z
            denominator = p + k / n + 1e-7
            total -= math.log(p / denominator) if c == 0 else math.log((k / n) / denominator)
    return total / len(f)


# ------------------------------------------------------------------------------------------------------ losses
@pytest.mark.parametrize("n", [40, 1000])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_nce_equals_numpy(n, temperature):
    f, bank, columns = example(n=n)
    z = torch.tensor(2.5 * n, dtype=torch.float64)
    slow = slow_nce(f.numpy(), bank.numpy(), columns.numpy(), z.item(), temperature)
    assert nce_loss(f, bank, columns, z, temperature).item() == pytest.approx(slow, abs=1e-10)


def test_nce_of_equal_similarities():
    """All P = 1/N: ln(K + 1) + K ln(1 + 1/K), up to the epsilon of the official code."""
    bank = torch.ones(50, 4, dtype=torch.float64) / 2
    columns = torch.randint(50, (6, 21), generator=torch.Generator().manual_seed(0))
    loss = nce_loss(bank[:6], bank, columns, 50 * math.exp(1 / 0.07), 0.07)
    assert loss.item() == pytest.approx(math.log(21) + 20 * math.log(1 + 1 / 20), abs=1e-5)


@pytest.mark.parametrize("p, sign", [(0.5, -1), (1.0, 0), (2.0, 1)])
def test_nce_is_at_rest_where_p_is_one(p, sign):
    """With every image once among the negatives, a feature on its own row is drawn to it if P < 1, pushed off if P > 1:
    why exp(1/tau) has to stay below Z."""
    f, bank = torch.eye(8, dtype=torch.float64)[:1].requires_grad_(), torch.eye(8, dtype=torch.float64)
    nce_loss(f, bank, torch.tensor([[0, *range(8)]]), math.exp(1 / 0.5) / p, 0.5).backward()
    assert f.grad[0, 0].item() == pytest.approx(sign * 2 / 3, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_full_softmax_equals_numpy(temperature):
    f, bank, indices = unit(5, 6, seed=1), unit(30, 6, seed=2), torch.tensor([7, 0, 29, 3, 11])
    similar = np.exp(f.numpy() @ bank.numpy().T / temperature)
    slow = -np.log(similar[np.arange(5), indices] / similar.sum(1)).mean()
    assert full_softmax_loss(f, bank, indices, temperature).item() == pytest.approx(slow, abs=1e-10)
    equal = torch.ones(37, 4, dtype=torch.float64) / 2
    loss = full_softmax_loss(equal[:2], equal, torch.arange(2), temperature)
    assert loss.item() == pytest.approx(math.log(37), abs=1e-12)


@pytest.mark.parametrize("n", [40, 400])
def test_gradient_reaches_the_features_only(n):
    f, bank, columns = (x.requires_grad_(x.is_floating_point()) for x in example(n=n))
    for loss in (
        lambda f: nce_loss(f, bank, columns, 99.0, 0.5),
        lambda f: full_softmax_loss(f, bank, columns[:, 0], 0.5),
    ):
        assert torch.autograd.gradcheck(loss, (f,))
        f.grad = None
        loss(f).backward()
        assert bank.grad is None and f.grad.abs().sum() > 0


def test_single_precision_keeps_the_small_terms():
    """At ImageNet's size most negatives contribute about 1e-4 each; summed in fp32 they still agree with fp64."""
    f, bank, columns = example(2, 5000, 128, 4096)
    exact = nce_loss(f, bank, columns, 1e4, 0.07).item()
    assert nce_loss(f.float(), bank.float(), columns, 1e4, 0.07).item() == pytest.approx(exact, rel=2e-6)


def test_both_ways_to_the_similarities_agree():
    """With K + 1 = 10 columns, up to 320 images are multiplied with the whole bank, more are gathered."""
    f, bank, columns = example(n=300, k=9)
    expected = np.einsum("bd,bkd->bk", f.numpy(), bank.numpy()[columns.numpy()]) / 0.07
    for v in (bank, torch.cat([bank, unit(100, 6, seed=3)])):  # no column points to the rows beyond 300
        np.testing.assert_allclose(similarity(f, v, columns, 0.07).numpy(), expected, atol=1e-12)


# --------------------------------------------------------------------------------------------------- negatives
def slow_negatives(seed, epoch, indices, k, n):
    u = np.floor(rng.uniforms(seed, epoch, indices, rng.SCRIPT, k) * 2**32).astype(np.int64)
    return (u * n) >> 32


def test_negatives_are_the_uniforms_of_the_loader():
    indices = torch.tensor([0, 5, 1_281_166])
    for seed, epoch, n in ((0, 0, 1_281_167), (3, 199, 50_000), (2**40, 7, 2)):
        expected = slow_negatives(seed, epoch, indices.numpy(), 33, n)
        np.testing.assert_array_equal(negatives(seed, epoch, indices, 33, n).numpy(), expected)


def test_negatives_belong_to_the_sample():
    """The same for any batch that holds the sample, other for another sample, epoch or seed."""
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:24]
    whole = negatives(1, 2, indices, 50, 1000)
    assert torch.equal(torch.cat([negatives(1, 2, part, 50, 1000) for part in indices.split(6)]), whole)
    assert torch.equal(negatives(1, 2, indices.flip(0), 50, 1000), whole.flip(0))
    assert torch.equal(negatives(1, 2, indices, 70, 1000)[:, :50], whole)
    for other in (negatives(2, 2, indices, 50, 1000), negatives(1, 3, indices, 50, 1000), whole.roll(1, 0)):
        assert (other == whole).double().mean() < 0.02  # 1 in 1000 by chance


@pytest.mark.parametrize("n", [50, 1000])
def test_negatives_are_uniform(n):
    """Chi-square of single draws and of consecutive pairs, within 5 standard deviations on either side."""
    draws = negatives(0, 0, torch.arange(400), 1000, n)
    assert draws.min() == 0 and draws.max() == n - 1
    coarse = draws * 10 // n
    for values, count in ((draws, n), (10 * coarse[:, ::2] + coarse[:, 1::2], 100)):
        observed = torch.bincount(values.flatten(), minlength=count).double()
        expected = values.numel() / count
        chi2 = ((observed - expected) ** 2 / expected).sum().item()
        assert abs(chi2 - (count - 1)) < 5 * math.sqrt(2 * (count - 1))


# --------------------------------------------------------------------------------------- bank and normaliser
def test_model():
    torch.manual_seed(0)
    model = NPID(resnet(*SMALL), 3000, 128)
    assert model.bank.shape == (3000, 128) and model.bank.abs().max() <= math.sqrt(3 / 128)
    assert model.bank.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)
    assert {"bank", "Z"} <= model.state_dict().keys() - dict(model.named_parameters()).keys()
    torch.manual_seed(0)
    assert torch.equal(NPID(resnet(*SMALL), 3000, 128).bank, model.bank)
    x = rows(4, 3, 16, 16).float()
    torch.testing.assert_close(model(x).norm(dim=1), torch.ones(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32


def test_z_is_that_of_the_first_batch_and_stays(tmp_path):
    """Z = N times the mean of exp(v . f / tau) over the K + 1 columns, of the untrained model; resumed runs keep it.
    Bank and Z are saved in last.pt, not in backbone.pt."""
    more = ["--nce-k", 20, *EXACT]
    first = train("npid", tmp_path, "--max-steps", 1, *more)["model"]["Z"]
    later = train("npid", tmp_path, "--max-steps", 6, *more)["model"]
    whole = train("npid", tmp_path / "whole", "--max-steps", 6, *more)["model"]["Z"]
    assert torch.equal(first, later["Z"]) and torch.equal(first, whole) and later["bank"].shape == (64, 16)
    assert not {"bank", "Z"} & {name.rpartition(".")[2] for name in state(tmp_path, "backbone.pt")["backbone"]}

    torch.manual_seed(3)
    model = NPID(resnet(*SMALL), 64, 16).double()
    loader = Loader(open_dataset("fake:64", "train"), augmentation(16), 16, seed=3, workers=0, dtype=torch.float64)
    batch = next(loader.epoch(0))
    f = model(*batch.views()).detach().numpy()
    total = 0.0
    for i, index in enumerate(batch.indices.tolist()):
        drawn = slow_negatives(3, 0, [index], 20, 64)[0]
        total += sum(math.exp(model.bank[j].numpy() @ f[i] / 0.25) for j in [index, *drawn])
    assert first.item() == pytest.approx(64 * total / (16 * 21), rel=1e-10)


def test_full_softmax_needs_no_z_starts_near_chance_and_resumes(tmp_path, capsys):
    words = ["--full-softmax", "--temperature", 10, "--max-steps"]
    train("npid", tmp_path / "parts", *words, 3)
    out = capsys.readouterr().out
    assert "ln(64) = 4.16" in out and "negatives" not in out and "of chance" in out
    parts, whole = train("npid", tmp_path / "parts", *words, 6), train("npid", tmp_path / "whole", *words, 6)
    assert parts["model"]["Z"] == 0 and different(parts, whole) == []
    first = records(tmp_path / "parts")[1]["loss"]
    assert first == pytest.approx(math.log(64), abs=0.05)  # tau 10 makes all similarities equal


# ------------------------------------------------------------------------------------------- what the user reads
def test_announced_loss_is_that_of_random_features(tmp_path, capsys):
    train("npid", tmp_path, "--data", "fake:600", "--dim", 128, "--temperature", 0.1, "--max-steps", 1)
    out = capsys.readouterr().out
    assert "K = 600 per image, as --nce-k 4096 exceeds N" in out
    announced = float(re.search(r"baseline .* = ([\d.]+) untrained", out)[1])
    torch.manual_seed(0)
    bank, f = torch.empty(600, 128).uniform_(-math.sqrt(3 / 128), math.sqrt(3 / 128)), unit(600, 128).float()
    columns = torch.cat([torch.arange(600)[:, None], negatives(0, 0, torch.arange(600), 600, 600)], 1)
    z = 600 * similarity(f, bank, columns, 0.1).exp().mean()
    assert nce_loss(f, bank, columns, z, 0.1).item() == pytest.approx(announced, abs=0.1)


@pytest.mark.parametrize("words, warned", [("0.07", True), ("0.16", False), ("0.07 --full-softmax", False)])
def test_too_low_a_temperature_is_announced(words, warned, tmp_path, capsys):
    """The proposed one is not objected to; nor is any for the full softmax, nor 0.07 for a number like ImageNet's."""
    flags = ["--data", "fake:600", "--max-steps", 1, "--dim", 128, "--temperature", *words.split()]
    train("npid", tmp_path, *flags)
    out = capsys.readouterr().out
    assert ("600 images need --temperature 0.16 or more" in out) == warned == ("warning" in out)
    assert "warning" not in nce_lines(1_281_167, 4096, 128, 0.07)


# ------------------------------------------------------------------------------------------------------- recipe
def test_grey_comes_before_the_jitter_of_every_image():
    (view,) = augmentation(32)
    u = rng.uniforms(0, 0, np.arange(500), 0, DRAWS)
    steps = view.plan(u)
    names = [name for name, _, _ in steps]
    assert names.count("gray") == 1 and names.index("gray") < names.index("brightness")
    for name in ("brightness", "contrast", "saturation", "hue"):
        touched = np.sort(np.concatenate([r for n, r, _ in steps if n == name]))
        assert np.array_equal(touched, np.arange(500)), name  # every image, once, whatever its draw
    assert u[:, JITTER].max() > 0.9


def test_learning_rate_falls_at_60_and_80_percent(tmp_path):
    per_epoch = 5004
    total = 200 * per_epoch
    for epoch, factor in ((0, 1), (119, 1), (120, 0.1), (159, 0.1), (160, 0.01), (199, 0.01)):
        first, last = epoch * per_epoch, (epoch + 1) * per_epoch - 1
        assert (staircase(first, total), staircase(last, total)) == (pytest.approx(factor),) * 2
    assert [staircase(s, 100, 4) for s in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    train("npid", tmp_path, "--epochs", 5, "--warmup-epochs", 0)
    peak = 0.03 * 16 / 256
    rates = [r["lr"] for r in records(tmp_path).values()]
    assert rates == pytest.approx([peak] * 12 + [peak / 10] * 4 + [peak / 100] * 4)
