"""NPID's losses, negatives, memory bank, frozen normaliser and schedule."""

import math
import re

import numpy as np
import pytest
import torch

from common.augment import DRAWS, JITTER, plan, uniforms
from common.data import Loader, build
from common.resnet import resnet
from npid import NPID, augmentation, full_softmax_loss, nce_loss, negatives, parse_args, similarity, step_decay
from tests.helpers import records, state, tensors, train

DOUBLE = ["--precision", "fp64"]


def rows(n, d, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


def example(b=5, n=40, d=6, k=9):
    """Features, bank and columns (B, K+1): images 3, 4 ... with their negatives. A small and a large N take different
    ways through `similarity`."""
    indices = torch.arange(b) + 3
    columns = torch.cat([indices[:, None], negatives(0, 0, indices, k, n)], 1)
    return rows(b, d, 1), rows(n, d, 2), columns


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
    columns = torch.tensor([[0, *range(8)]])
    nce_loss(f, bank, columns, math.exp(1 / 0.5) / p, 0.5).backward()
    assert f.grad[0, 0].item() == pytest.approx(sign * 2 / 3, abs=1e-6) if sign else abs(f.grad[0, 0].item()) < 1e-6


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_full_softmax_equals_numpy(temperature):
    f, bank = rows(5, 6, 1), rows(30, 6, 2)
    indices = torch.tensor([7, 0, 29, 3, 11])
    similar = np.exp(f.numpy() @ bank.numpy().T / temperature)
    slow = -np.log(similar[np.arange(5), indices] / similar.sum(1)).mean()
    assert full_softmax_loss(f, bank, indices, temperature).item() == pytest.approx(slow, abs=1e-10)


@pytest.mark.parametrize("n", [2, 37])
def test_full_softmax_of_equal_embeddings_is_chance(n):
    bank = torch.ones(n, 4, dtype=torch.float64) / 2
    assert full_softmax_loss(bank[:2], bank, torch.arange(2), 0.07).item() == pytest.approx(math.log(n), abs=1e-12)


@pytest.mark.parametrize("n", [40, 400])
def test_gradient_reaches_the_features_only(n):
    f, bank, columns = example(n=n)
    f.requires_grad_()
    bank.requires_grad_()
    losses = [
        lambda f: nce_loss(f, bank, columns, torch.tensor(99.0, dtype=torch.float64), 0.5),
        lambda f: full_softmax_loss(f, bank, columns[:, 0], 0.5),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, (f,))
        f.grad = None
        loss(f).backward()
        assert bank.grad is None and f.grad.abs().sum() > 0


def test_single_precision_keeps_the_small_terms():
    """At ImageNet's size most negatives contribute about 1e-4 each; summed in fp32 they still agree with fp64."""
    f, bank = rows(2, 128, 1), rows(5000, 128, 2)
    columns = torch.cat([torch.tensor([[5], [6]]), negatives(0, 0, torch.tensor([5, 6]), 4096, 5000)], 1)
    exact = nce_loss(f, bank, columns, 1e4, 0.07).item()
    single = nce_loss(f.float(), bank.float(), columns, 1e4, 0.07).item()
    assert single == pytest.approx(exact, rel=2e-6)


def test_both_ways_to_the_similarities_agree():
    """With K + 1 = 10 columns, up to 320 images are multiplied with the whole bank, more are gathered."""
    f, bank, columns = example(n=300, k=9)
    expected = np.einsum("bd,bkd->bk", f.numpy(), bank.numpy()[columns.numpy()]) / 0.07
    for v in (bank, torch.cat([bank, rows(100, 6, 3)])):  # no column points to the rows beyond 300
        np.testing.assert_allclose(similarity(f, v, columns, 0.07).numpy(), expected, atol=1e-12)


# --------------------------------------------------------------------------------------------------- negatives
def test_negatives_are_the_uniforms_of_the_loader():
    indices = torch.tensor([0, 5, 1_281_166])
    for seed, epoch, n in ((0, 0, 1_281_167), (3, 199, 50_000), (2**40, 7, 2)):
        u = np.floor(uniforms(seed, epoch, indices.numpy(), 100, 33) * 2**32).astype(np.int64)
        np.testing.assert_array_equal(negatives(seed, epoch, indices, 33, n).numpy(), (u * n) >> 32)


def test_negatives_belong_to_the_sample():
    """The same for any batch that holds the sample, other for another sample, epoch or seed."""
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:24]
    whole = negatives(1, 2, indices, 50, 1000)
    parts = torch.cat([negatives(1, 2, part, 50, 1000) for part in indices.split(6)])
    assert torch.equal(whole, parts)
    order = torch.arange(23, -1, -1)
    assert torch.equal(negatives(1, 2, indices[order], 50, 1000), whole[order])
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


# --------------------------------------------------------------------------------------------------------- bank
def tiny_model(images=12, dim=5):
    torch.manual_seed(0)
    return NPID(resnet("resnet18", 0.0625, 16), images, dim).double()


def test_bank_update_equals_a_slow_loop():
    model = tiny_model()
    before, f, indices = model.bank.numpy().copy(), rows(4, 5), torch.tensor([7, 0, 11, 3])
    for momentum in (0.5, 0.9, 0.0):
        expected = before.copy()
        for i, j in enumerate(indices.tolist()):
            v = momentum * before[j] + (1 - momentum) * f[i].numpy()
            expected[j] = v / math.sqrt((v * v).sum())
        model.bank.copy_(torch.from_numpy(before))
        model.update(indices, f.clone().requires_grad_(), momentum)
        np.testing.assert_allclose(model.bank.numpy(), expected, atol=1e-12)
        assert not model.bank.requires_grad
    np.testing.assert_allclose(model.bank[indices].numpy(), f.numpy(), atol=1e-12)  # momentum 0: the feature itself


def test_model():
    model = tiny_model(images=3000, dim=128)
    assert model.bank.shape == (3000, 128)
    assert model.bank.abs().max() <= math.sqrt(3 / 128)
    assert model.bank.square().sum(1).mean().item() == pytest.approx(1, abs=0.01)
    assert {"bank", "Z"} <= model.state_dict().keys() - dict(model.named_parameters()).keys()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x).norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(tiny_model().bank, tiny_model().bank)  # from the seed
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny_model().float()(x.float()).dtype == torch.float32


@pytest.mark.parametrize("accum", [1, 2])
def test_a_step_writes_the_rows_of_its_images(accum, tmp_path):
    """After one of four steps 16 of 64 rows are unit vectors; after an epoch all are."""
    images = Loader(build("fake:64", "train"), augmentation(16), 16, seed=3).order(0)
    for steps in (1, 4):
        bank = train("npid", tmp_path, "--max-steps", steps, "--accum", accum)["model"]["bank"]
        unit = ((bank.norm(dim=1) - 1).abs() < 1e-6).nonzero().flatten()
        assert unit.tolist() == sorted(images[: 16 * steps].tolist())


# ----------------------------------------------------------------------------------------------- the normaliser
def test_z_is_that_of_the_first_batch_and_stays(tmp_path):
    """Z = N times the mean of exp(v . f / tau) over the K + 1 columns, of the untrained model; resumed runs keep it."""
    more = ["--nce-k", 20, *DOUBLE]
    first = train("npid", tmp_path, "--max-steps", 1, *more)["model"]["Z"]
    later = train("npid", tmp_path, "--max-steps", 6, *more)["model"]["Z"]
    whole = train("npid", tmp_path / "whole", "--max-steps", 6, *more)["model"]["Z"]
    assert torch.equal(first, later) and torch.equal(first, whole)

    torch.manual_seed(3)
    model = NPID(resnet("resnet18", 0.125, 16), 64, 16).double()
    data = build("fake:64", "train")
    loader = Loader(data, augmentation(16), 16, seed=3, workers=0, dtype=torch.float64)
    batch = next(loader.epoch(0))
    f = model(*batch.views()).detach().numpy()
    total = 0.0
    for i, index in enumerate(batch.indices.tolist()):
        drawn = (np.floor(uniforms(3, 0, [index], 100, 20)[0] * 2**32).astype(np.int64) * 64) >> 32
        total += sum(math.exp(model.bank[j].numpy() @ f[i] / 0.25) for j in [index, *drawn])
    assert first.item() == pytest.approx(64 * total / (16 * 21), rel=1e-10)


def test_full_softmax_needs_no_z_and_starts_near_chance(tmp_path, capsys):
    trained = train("npid", tmp_path, "--max-steps", 2, "--full-softmax", "--temperature", 10)
    assert trained["model"]["Z"] == 0
    out = capsys.readouterr().out
    assert "ln(64) = 4.16" in out and "negatives" not in out and "of chance" in out
    assert records(tmp_path)[1]["loss"] == pytest.approx(math.log(64), abs=0.05)  # tau 10 makes all similarities equal


def test_resumed_full_softmax_is_bit_equal(tmp_path):
    train("npid", tmp_path / "parts", "--max-steps", 3, "--full-softmax")
    parts = tensors(train("npid", tmp_path / "parts", "--max-steps", 6, "--full-softmax"))
    whole = tensors(train("npid", tmp_path / "whole", "--max-steps", 6, "--full-softmax"))
    assert [n for n in whole if not torch.equal(whole[n], parts[n])] == []


# ------------------------------------------------------------------------------------------- what the user reads
def test_announced_loss_is_that_of_random_features(tmp_path, capsys):
    train("npid", tmp_path, "--data", "fake:600", "--dim", 128, "--temperature", 0.1, "--max-steps", 1)
    out = capsys.readouterr().out
    assert "K = 600 per image, as --nce-k 4096 exceeds N" in out
    announced = float(re.search(r"chance .* = ([\d.]+) untrained", out)[1])
    torch.manual_seed(0)
    bank, f = torch.empty(600, 128).uniform_(-math.sqrt(3 / 128), math.sqrt(3 / 128)), rows(600, 128).float()
    columns = torch.cat([torch.arange(600)[:, None], negatives(0, 0, torch.arange(600), 600, 600)], 1)
    z = 600 * similarity(f, bank, columns, 0.1).exp().mean()
    assert nce_loss(f, bank, columns, z, 0.1).item() == pytest.approx(announced, abs=0.1)


def test_too_low_a_temperature_is_announced(tmp_path, capsys):
    """The proposed one is not objected to; nor is any for the full softmax, nor 0.07 for a number like ImageNet's."""
    for more, warned in ((["0.07"], True), (["0.16"], False), (["0.07", "--full-softmax"], False)):
        train(
            "npid",
            tmp_path,
            "--data",
            "fake:600",
            "--max-steps",
            1,
            "--no-resume",
            "--dim",
            128,
            "--temperature",
            *more,
        )
        out = capsys.readouterr().out
        assert ("600 images need --temperature 0.16 or more" in out) == warned == ("warning" in out)
    assert 1 / 0.07 < math.log(1_281_167) + 0.5 / (128 * 0.07**2)


@pytest.mark.parametrize("flag", [["--nce-k", "0"], ["--temperature", "0"], ["--bank-momentum", "1"]])
def test_impossible_values_end_with_one_line(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train("npid", tmp_path, *flag)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and flag[0] in err


# ------------------------------------------------------------------------------------------------------- recipe
def test_recipe_is_the_papers():
    args = parse_args(["--data", "/images"])
    assert (args.arch, args.dim, args.temperature, args.nce_k, args.bank_momentum) == ("resnet50", 128, 0.07, 4096, 0.5)
    assert (args.lr, args.batch_size, args.weight_decay, args.momentum) == (0.03, 256, 1e-4, 0.9)
    assert (args.epochs, args.warmup_epochs, args.full_softmax) == (200, 0, False)
    (view,) = augmentation(224)
    assert (view.crop, view.flip, view.gray_p, view.gray_first) == ((0.2, 1.0), 0.5, 0.2, True)
    assert (view.jitter, view.jitter_p, view.blur_p, view.solarize_p) == ((0.4,) * 4, 1.0, 0.0, 0.0)


def test_grey_comes_before_the_jitter_of_every_image():
    (view,) = augmentation(32)
    u = uniforms(0, 0, np.arange(500), 0, DRAWS)
    steps = plan(view, u)
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
        assert (step_decay(first, total), step_decay(last, total)) == (pytest.approx(factor),) * 2
    assert [step_decay(s, 100, 4) for s in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    train("npid", tmp_path, "--epochs", 5, "--warmup-epochs", 0)
    peak = 0.03 * 16 / 256
    rates = [r["lr"] for r in records(tmp_path).values()]
    assert rates == pytest.approx([peak] * 12 + [peak / 10] * 4 + [peak / 100] * 4)


def test_bank_and_z_are_in_last_pt_but_not_in_the_backbone(tmp_path):
    train("npid", tmp_path, "--max-steps", 1)
    assert state(tmp_path)["model"]["bank"].shape == (64, 16)
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)["backbone"]
    assert not any("bank" in k or k == "Z" for k in backbone)
