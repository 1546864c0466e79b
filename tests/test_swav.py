"""SwAV against slow references: Sinkhorn, the loss, multi-crop, the queue, frozen prototypes and the defaults."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import swav
from common.augment import IMAGENET_STD
from common.datasets import Arrays
from common.loader import Loader
from common.resnet import resnet
from swav import SwAV, augmentation, code_sizes, parse_args, sinkhorn, swav_loss
from tests.helpers import SMALL, TINY, as_processes, logged, main, records, refused, rows, state, unit

FLAGS = "--dim 8 --hidden-dim 16 --crops 2 1 --sizes 16 12".split()


def cosines(batch, prototypes, dim=8, seed=0):
    return unit(batch, dim, seed=seed) @ unit(prototypes, dim, seed=seed + 100).T


def sinkhorn_of_the_paper(scores, epsilon, iterations):
    """Rows and columns of the transport plan Q (K, B), divided in turn, in double precision."""
    q = np.exp(np.asarray(scores, dtype=np.float64) / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= q.shape[0]
        q /= q.sum(axis=0, keepdims=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


def run(out, *flags):
    """A run without the flags that all tests of scripts share, so that defaults show."""
    main("swav", *TINY.split(), *FLAGS, *flags, "--out", out)
    return state(out)


def model_of(prototypes=6, queue=0, seed=0):
    torch.manual_seed(seed)
    return SwAV(resnet(*SMALL), 8, 16, prototypes, queue)


# ---------------------------------------------------------------------------------------------------- Sinkhorn
@pytest.mark.parametrize("batch, prototypes", [(16, 16), (40, 7), (5, 60), (1, 3)])
@pytest.mark.parametrize("epsilon, iterations", [(0.05, 1), (0.05, 3), (0.03, 3), (0.5, 20)])
def test_sinkhorn_equals_the_paper(batch, prototypes, epsilon, iterations):
    """Also in single precision, and it leaves its input; a common shift of all scores does not matter."""
    scores = cosines(batch, prototypes)
    before, expected = scores.clone(), sinkhorn_of_the_paper(scores, epsilon, iterations)
    np.testing.assert_allclose(sinkhorn(scores, epsilon, iterations), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(scores, before)
    np.testing.assert_allclose(sinkhorn(scores + 500, epsilon, iterations), expected, rtol=1e-9, atol=1e-9)
    single = sinkhorn(scores.float(), epsilon, iterations)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("world, queue", [(2, 5), (3, 10)])
def test_codes_do_not_depend_on_how_a_queue_is_divided(world, queue, monkeypatch):
    """Its rows that do not divide by the processes: some have one more."""
    scores = torch.tanh(rows(queue + 4 * world, 6))
    parts = [torch.cat([scores[:queue][queue * r // world : queue * (r + 1) // world],
                        scores[queue:][4 * r : 4 * r + 4]]) for r in range(world)]  # fmt: skip
    found = as_processes(monkeypatch, swav, sinkhorn, *((part, 0.3, 3) for part in parts))
    found = torch.cat([codes[-4:] for codes in found])
    np.testing.assert_allclose(found, sinkhorn(scores, 0.3, 3)[queue:], atol=1e-12)


def test_sinkhorn_marginals():
    """Each sample hands out exactly 1; each prototype receives B / K once the iterations have converged."""
    scores = cosines(48, 12)
    few, many = sinkhorn(scores, 0.2, 3), sinkhorn(scores, 0.2, 300)
    for q in (few, many):
        torch.testing.assert_close(q.sum(1), torch.ones(48, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (q > 0).all()
    even = torch.full((12,), 48 / 12, dtype=torch.float64)
    torch.testing.assert_close(many.sum(0), even, rtol=0, atol=1e-9)
    assert 1e-6 < (few.sum(0) - even).abs().max() < (torch.softmax(scores / 0.2, 1).sum(0) - even).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 300.0, 60000.0])
def test_sinkhorn_does_not_overflow(dtype, scale):
    """exp(60000 / 0.05) fits no float type, and already exp(1 / 0.05) does not fit into float16. Autocast changes
    nothing."""
    scores = (scale * cosines(30, 6)).to(dtype)
    q = sinkhorn(scores, 0.05, 3)
    assert q.dtype == torch.float32 and q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(30), rtol=0, atol=1e-5)
    if scale == 1.0:
        expected = sinkhorn_of_the_paper(scores.double(), 0.05, 3)
        np.testing.assert_allclose(q, expected, rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn(scores, 0.05, 3), q)


def test_a_sample_far_from_everything_keeps_its_own_code():
    """Scores lower than all others by more than a float's range: alone it decides nothing, but it is a sample."""
    scores = cosines(10, 4).float()
    scores[3] -= 1e4
    q = sinkhorn(scores, 0.05, 3)
    assert q.isfinite().all() and q[3].sum().item() == pytest.approx(1, abs=1e-5)


# -------------------------------------------------------------------------------------------------------- loss
def slow_loss(scores, codes, temperature):
    terms = []
    for i in range(2):
        for v in range(len(scores)):
            if v != i:
                logits = scores[v] / temperature
                p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
                terms.append(-np.mean((codes[i] * np.log(p)).sum(axis=1)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 3, 8])
def test_loss_equals_numpy(views):
    """Chance is ln K; the gradient is right, and none reaches the codes."""
    scores = torch.stack([cosines(4, 5, seed=v) for v in range(views)]).requires_grad_()
    codes = torch.stack([sinkhorn(s, 0.05, 3) for s in scores[:2]])
    assert not codes.requires_grad
    expected = slow_loss(scores.detach().numpy(), codes.numpy(), 0.1)
    assert swav_loss(scores, codes, 0.1).item() == pytest.approx(expected, abs=1e-10)
    assert swav_loss(torch.full_like(scores, 0.3), codes, 0.1).item() == pytest.approx(math.log(5), rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: swav_loss(s, codes, 0.1), scores)
    codes = torch.full((2, 4, 5), 0.2, dtype=torch.float64, requires_grad=True)
    swav_loss(scores, codes, 0.1).backward()
    assert codes.grad is None and (scores.grad != 0).all()


def test_loss_is_the_mean_over_code_crops_of_the_mean_over_the_others():
    """The crop that made a code never predicts it."""
    codes = torch.eye(4, dtype=torch.float64)[[0, 1]][:, None]  # crop 0 has code 0, crop 1 code 1
    scores = torch.zeros(4, 1, 4, dtype=torch.float64)
    scores[0, 0, 0] = scores[1, 0, 1] = 100.0  # only ever right about their own code
    wrong, uniform = 100 / 0.1, math.log(4)
    assert swav_loss(scores, codes, 0.1).item() == pytest.approx((2 * wrong + 4 * uniform) / 6, rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.03])
@pytest.mark.parametrize("above", [False, True])
def test_a_constant_output_is_left_where_crops_correlate_more_than_epsilon_over_t(epsilon, above):
    """The docstring's rule for short runs: deviations that two crops share to this degree grow, others shrink."""
    shared, *own = rows(3, 1000, 20, seed=0)
    rho = epsilon / 0.1 + (0.08 if above else -0.08)
    deviations = torch.stack([rho**0.5 * shared + (1 - rho) ** 0.5 * noise for noise in own])
    deviations -= deviations.mean(1, keepdim=True)
    scale = torch.tensor(1e-4, dtype=torch.float64, requires_grad=True)
    scores = scale * deviations
    codes = torch.stack([sinkhorn(s, epsilon, 3) for s in scores.detach()])
    swav_loss(scores, codes, 0.1).backward()
    assert (scale.grad < 0) == above


# ------------------------------------------------------------------------------------------- model and multi-crop
def test_one_backbone_pass_per_resolution():
    model, seen, heads = model_of().eval(), [], []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    model.projector.register_forward_pre_hook(lambda module, inputs: heads.append(len(inputs[0])))
    views = [rows(3, 3, size, size).float() for size in (16, 16, 12, 24, 12, 16)]
    z, scores = model(views)
    assert sorted(seen) == [(3, 3, 24, 24), (6, 3, 12, 12), (9, 3, 16, 16)] and heads == [18]
    assert z.shape == (6, 3, 8) and scores.shape == (6, 3, 6)
    for v, view in enumerate(views):  # in eval mode each view is on its own, so the order can be checked
        features = F.normalize(model.projector(model.backbone(view)), dim=1)
        torch.testing.assert_close(z[v], features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores[v], features @ model.prototypes.weight.T)


def test_scores_are_cosines_in_single_precision_under_autocast():
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        z, scores = model([rows(4, 3, 16, 16).float()] * 2)
    assert z.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=2), torch.ones(2, 4))
    torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(6))
    assert scores.abs().max() <= 1 + 1e-6


def views_of(args):
    return augmentation(args.crops, args.sizes, args.crop_min, args.crop_max, args.flip, args.color_strength)


def test_recipe_is_the_papers():
    args = parse_args(["--data", "/imagenet"])
    assert [(v.size, v.area) for v in views_of(args)] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    for v in views_of(args):
        assert (v.jitter, v.jitter_p, v.gray_p, v.flip) == ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5)
        assert (v.blur_p, v.blur_sigma, v.std, v.solarize_p) == (0.5, (0.1, 2.0), IMAGENET_STD, 0.0)
    weak = parse_args(["--data", "/imagenet", "--color-strength", "0.5"])
    assert {v.jitter for v in views_of(weak)} == {(0.4, 0.4, 0.4, 0.1)}
    assert (args.batch_size, args.lr, args.epochs, args.warmup_epochs) == (4096, 0.6, 800, 10)
    assert (args.temperature, args.epsilon, args.iterations, args.weight_decay) == (0.1, 0.05, 3, 1e-6)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("/x --crops 2", [(224, 0.08, 1.0)] * 2),
        ("cifar10", [(32, 0.08, 1.0)] * 2),
        ("cifar10 --crops 2 4", [(32, 0.14, 1.0)] * 2 + [(14, 0.05, 0.14)] * 4),
        (
            "/x --crops 2 4 --sizes 160 96 --crop-min .08 .05 --crop-max 1 .14",
            [(160, 0.08, 1.0)] * 2 + [(96, 0.05, 0.14)] * 4,
        ),
        (
            "/x --crops 3 1 2 --sizes 128 96 64 --crop-min .3 .2 .1 --crop-max 1 .5 .3",
            [(128, 0.3, 1.0)] * 3 + [(96, 0.2, 0.5)] + [(64, 0.1, 0.3)] * 2,
        ),
    ],
)
def test_crops_by_flags(flags, expected):
    args = parse_args(["--data", *flags.split()])
    views = views_of(args)
    assert [(v.size, *v.area) for v in views] == expected
    assert args.image_size == expected[0][0]  # what evaluations will use
    assert all(v.blur_p == (0.5 if args.image_size > 64 else 0) for v in views)


@pytest.mark.parametrize(
    "flags",
    [
        "--crops 1 6",
        "--crops 2 0",
        "--sizes 224 --crops 2 6",
        "--sizes 224 96 --crops 2",
        "--sizes 224 96 --image-size 160",
        "--sizes 224 7",
        "--image-size 16 --crops 2 1",  # small crops of 7 pixels, by default
        "--crops 2 2 2",
        "--crop-min .5 .3 --crop-max .4 .4",
        "--crop-min 0 .05",
        "--prototypes 1",
        "--queue -1",
        "--iterations 0",
    ],
)
def test_wrong_flags_end_with_one_line(flags, capsys):
    assert flags.split()[0] in refused(capsys, parse_args, ["--data", "/x", *flags.split()])


def test_every_image_is_decoded_once_for_all_its_crops():
    class Counting(Arrays):
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)

    asked = []
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), dtype=np.uint8)
    views = augmentation([2, 3], [16, 8], [0.14, 0.05], [1.0, 0.14])
    batches = list(Loader(Counting(images, np.zeros(12)), views, 4, workers=0).epoch(0))
    assert [[x.shape[-1] for x in b.views()] for b in batches] == [[16, 16, 8, 8, 8]] * 3
    assert sorted(asked) == list(range(12))


# ------------------------------------------------------------------------------------------------------- queue
def test_queue_keeps_the_newest_batches_first():
    model, kept = model_of(queue=10), torch.zeros(2, 0, 8)
    for seed in range(4):
        z = unit(2, 4, 8, seed=seed).float()
        model.enqueue(z)
        kept = torch.cat([z, kept], 1)[:, :10]
        assert torch.equal(model.queue[:, : kept.shape[1]], kept) and (model.queue[:, kept.shape[1] :] == 0).all()


def test_codes_of_batch_and_queue():
    """Queue and batch are balanced together; the codes are those of the batch, crop by crop."""
    model = model_of(queue=10).double()
    model.queue.copy_(unit(2, 10, 8, seed=5))
    scores = torch.stack([cosines(4, 6, seed=v) for v in range(3)])
    alone, together = model.codes(scores, 0.05, 3, False), model.codes(scores, 0.05, 3, True)
    assert alone.shape == together.shape == (2, 4, 6)
    for crop in range(2):
        np.testing.assert_allclose(alone[crop], sinkhorn_of_the_paper(scores[crop], 0.05, 3), rtol=1e-10)
        both = torch.cat([model.queue[crop] @ model.prototypes.weight.T, scores[crop]]).detach()
        np.testing.assert_allclose(together[crop], sinkhorn_of_the_paper(both, 0.05, 3)[10:], rtol=1e-10)
    assert (alone - together).abs().max() > 1e-3


def test_processes_share_the_queue_without_gap_or_overlap(monkeypatch):
    model, asked = model_of(queue=10), []
    model.queue.copy_(unit(2, 10, 8, seed=5))
    monkeypatch.setattr(swav, "world_size", lambda: 3)
    monkeypatch.setattr(swav, "sinkhorn", lambda scores, *rest: asked.append(scores[:-4]) or scores)
    for process in range(3):
        monkeypatch.setattr(swav, "rank", lambda process=process: process)
        model.codes(torch.zeros(2, 4, 6), 0.05, 3, True)
    assert [len(part) for part in asked[::2]] == [3, 3, 4]
    for crop in range(2):
        torch.testing.assert_close(torch.cat(asked[crop::2]), model.queue[crop] @ model.prototypes.weight.T)


# ---------------------------------------------------------------------------------------------------- training
TWO = ["--epochs", 2, "--prototypes", 8, "--queue", 24, "--queue-epoch", 1]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Two epochs of four steps, batch 16, with a queue of 24 rows from epoch 1 on; what was seen on the way."""
    seen = {"rows": [], "hits": [], "z": [], "out": tmp_path_factory.mktemp("watched")}
    codes, enqueue, balance = SwAV.codes, SwAV.enqueue, swav.sinkhorn

    def record(model, scores, *rest):
        seen["hits"].append(set(scores[:2].argmax(2).flatten().tolist()))
        return codes(model, scores, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwAV, "codes", record)
        patch.setattr(SwAV, "enqueue", lambda m, z: seen["z"].append(z.detach().clone()) or enqueue(m, z))
        patch.setattr(swav, "sinkhorn", lambda s, *r: seen["rows"].append(len(s)) or balance(s, *r))
        seen["state"] = run(seen["out"], *TWO)
    return seen


def test_queue_is_filled_from_its_epoch_on_and_used_when_full(watched):
    """24 rows need two batches of 16: epoch 1 begins with step 5, so step 7 is the first to use the queue."""
    assert watched["rows"] == [16, 16] * 6 + [40, 40] * 2
    assert len(watched["z"]) == 4
    expected = torch.cat([watched["z"][-1], watched["z"][-2]], dim=1)[:, :24]
    assert torch.equal(watched["state"]["model"]["queue"], expected)


def test_prototypes_in_use_are_counted_per_epoch(watched):
    noted = [r["prototypes_used"] for r in logged(watched["out"]) if "prototypes_used" in r]
    expected = [len(set.union(*watched["hits"][e * 4 : e * 4 + 4])) / 8 for e in range(2)]
    assert noted == expected and watched["state"]["model"]["hits"].sum().item() == 8 * expected[1]


def test_learning_rate_rule(watched):
    """Peak 0.6 (B / 256)^0.75, that is 4.8 at 4096; from a sixteenth of it up, then half a cosine to a thousandth."""
    peak = 0.6 * (16 / 256) ** 0.75
    rates = [r["lr"] for r in records(watched["out"]).values()]
    up = np.linspace(peak / 16, peak, 5)[:4]
    down = peak * (0.001 + 0.999 * 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)))
    assert rates == pytest.approx([*up, *down], rel=1e-12)
    assert 0.6 * (4096 / 256) ** 0.75 == pytest.approx(4.8, rel=1e-12)


def test_every_parameter_gets_decay_and_layer_wise_rates(watched):
    """As in the official code; a projector's bias that takes plain steps moves all embeddings to one point."""
    (group,) = watched["state"]["optimizer"]["param_groups"]
    assert group["adapt"] and group["weight_decay"] == 1e-6 and group["momentum"] == 0.9
    assert len(group["params"]) == len(list(model_of(8).parameters()))


def test_prototypes_are_frozen_at_first_and_unit_afterwards(watched, tmp_path):
    initial, words = model_of(8, seed=3), ["--prototypes", 8, "--freeze-steps", 2, "--queue", 0, "--max-steps"]
    frozen, moved = run(tmp_path, *words, 2)["model"], run(tmp_path, *words, 3)["model"]
    assert torch.equal(frozen["prototypes.weight"], initial.prototypes.weight)
    assert not torch.equal(frozen["projector.3.weight"], initial.projector[3].weight)
    assert (frozen["prototypes.weight"] != moved["prototypes.weight"]).any(1).all()
    torch.testing.assert_close(moved["prototypes.weight"].norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)
    default = run(tmp_path / "default", *TWO, "--max-steps", 4)["model"]["prototypes.weight"]
    assert torch.equal(default, initial.prototypes.weight), "frozen for an epoch by default"
    assert not torch.equal(watched["state"]["model"]["prototypes.weight"], initial.prototypes.weight)


# ---------------------------------------------------------------------------------------------------- defaults
@pytest.mark.parametrize(
    "asked, batch, images, expected",
    [
        ((None, None), 4096, 1_281_167, (3000, 0)),  # the official recipes: 4096 without a queue,
        ((None, None), 256, 1_281_167, (3000, 3840)),  # 256 with one of 3840
        ((None, None), 512, 1_281_167, (3000, 3584)),
        ((None, None), 64, 10_000, (1000, 1280)),
        ((None, None), 64, 1_438, (143, 128)),
        ((None, None), 256, 1_438, (143, 0)),
        ((None, None), 16, 64, (6, 0)),
        ((None, None), 4, 9, (2, 0)),
        ((300, 7), 64, 1000, (300, 7)),
        ((3000, None), 64, 1000, (3000, 896)),  # whole batches, no more than there are images
    ],
)
def test_sizes_of_prototypes_and_queue(asked, batch, images, expected):
    assert code_sizes(*asked, batch, images) == expected


def test_smaller_defaults_are_said_in_one_line(tmp_path, capsys):
    saved = run(tmp_path / "a", "--max-steps", 1)["model"]
    out, err = capsys.readouterr()
    assert saved["prototypes.weight"].shape == (6, 8) and saved["queue"].shape == (2, 0, 8)
    assert [line for line in out.splitlines() if "a tenth of the images" in line and "no queue" in line]
    assert "ln(6) = 1.79" in out and "--prototypes" not in err
    run(tmp_path / "b", "--max-steps", 1, "--prototypes", 200, "--queue", 16)
    assert "raise --queue or lower --prototypes" in capsys.readouterr().err


@pytest.mark.parametrize("epsilon", [0.05, 0.005])
def test_codes_hold_no_subnormal_numbers(epsilon):
    scores = torch.linspace(-1, 1, 12).repeat(6, 1) * torch.linspace(0.5, 1, 6)[:, None]
    codes = sinkhorn(scores, epsilon, 3)
    assert (codes[codes > 0] >= torch.finfo(torch.float32).tiny).all() and codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(6))
