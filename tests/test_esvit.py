"""EsViT: matching of regions, the two heads and centres, networks, and views first, regions later."""

import math

import numpy as np
import pytest
import torch

import esvit
from common.resnet import resnet
from common.swin import swin
from tests.helpers import EXACT, different, flags, launch, logged, main, parsed, refused, state, train

HEAD = {"out_dim": 12, "hidden_dim": 10, "bottleneck_dim": 6}


def network(arch="swin_tiny", drop_path=0.0, regions=True):
    torch.manual_seed(3)
    build = {"swin_tiny": swin, "resnet18": resnet}[arch]
    backbone = build("swin_tiny", 16, 0.125) if build is swin else resnet("resnet18", 0.125, 16)
    return esvit.EsViT(backbone, drop_path, regions, **HEAD).double()


def crops(*sizes, batch=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("counts", [[4, 4], [4, 4, 2, 2, 2]])
def test_region_loss_equals_a_loop(counts):
    rows, large = sum(counts), counts[0]
    student, teacher, features, keys, center = draw((2, rows, 7), (2, 8, 7), (2, rows, 5), (2, 8, 5), (7,))
    student, teacher, features, keys, center = (x.numpy() for x in (student, teacher, features, keys, center))

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    def cos(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    starts, terms = np.cumsum([0, *counts]), []
    for i in range(2):
        for v, count in enumerate(counts):
            if v == i:
                continue
            total = 0.0
            for b in range(2):
                for n in range(starts[v], starts[v] + count):
                    alike = [cos(features[b, n], keys[b, i * large + m]) for m in range(large)]
                    best = i * large + int(np.argmax(alike))
                    p = softmax((teacher[b, best] - center) / 0.05)
                    total -= (p * np.log(softmax(student[b, n] / 0.1))).sum()
            terms.append(total / (2 * count))
    tensors = [torch.from_numpy(x) for x in (student, teacher, features, keys)]
    loss = esvit.region_loss(*tensors, counts, torch.from_numpy(center), 0.1, 0.05).item()
    assert loss == pytest.approx(np.mean(terms), abs=1e-10) and len(terms) == 2 * (len(counts) - 1)


def test_equal_outputs_give_the_logarithm_of_their_number():
    features, keys = draw((2, 10, 5), (2, 8, 5))
    loss = esvit.region_loss(torch.ones(2, 10, 33), torch.rand(2, 8, 33), features, keys, [4, 4, 2], 0.0, 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(33), abs=1e-5)


def test_the_match_is_the_most_similar_region_and_has_no_gradient():
    """Two regions per crop, whose features are the same two directions, swapped in the second crop."""
    e = torch.eye(2, dtype=torch.float64)
    features = torch.cat([e, e.flip(0)])[None].requires_grad_()  # crop 0: a b, crop 1: b a
    keys, sure = features.detach().clone(), 40 * torch.cat([e, e.flip(0)])[None]
    student = sure.clone().requires_grad_()
    loss = esvit.region_loss(student, sure, features, keys, [2, 2], 0.0, 1.0, 1.0)
    assert loss.item() == pytest.approx(0, abs=1e-9)  # by place it would be 40
    loss.backward()
    assert features.grad is None and student.grad is not None


def test_gradients_of_the_region_loss():
    student, teacher, features, keys = draw((1, 5, 4), (1, 4, 4), (1, 5, 3), (1, 4, 3))
    counts = [2, 2, 1]
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: esvit.region_loss(s, teacher, features, keys, counts, 0.0, 0.1, 0.04), student
    )


# ------------------------------------------------------------------------------------------------------ model
@pytest.mark.parametrize("arch", ["swin_tiny", "resnet18"])
def test_regions_stand_in_the_order_of_the_crops_and_views_are_their_means(arch):
    model, views = network(arch).eval(), crops(16, 16, 8)
    student, teacher, regions, teacher_regions, features, keys = model(views)
    maps = [esvit.region_features(model.backbone, x) for x in views]
    assert regions.shape[1] == sum(x.shape[1] for x in maps) and torch.equal(keys, features[:, : keys.shape[1]])
    assert (features - torch.cat(maps, 1)).abs().max() < 1e-12 and not features.requires_grad
    for v, x in enumerate(views):
        assert (student[v] - model.head(model.backbone(x))).abs().max() < 1e-12
    assert (regions - model.region_head(torch.cat(maps, 1).flatten(0, 1)).view(regions.shape)).abs().max() < 1e-12
    assert (teacher - student[:2]).abs().max() < 1e-12 and not teacher.requires_grad
    assert (teacher_regions - regions[:, : keys.shape[1]]).abs().max() < 1e-12 and not teacher_regions.requires_grad
    assert not torch.allclose(model.head(features), model.region_head(features))


def test_the_two_heads_begin_apart_and_the_teacher_as_a_copy():
    model = network()
    assert not torch.equal(model.head.mlp[0].weight, model.region_head.mlp[0].weight)
    for name in ("backbone", "head", "region_head"):
        assert not different(getattr(model, name).state_dict(), getattr(model, f"teacher_{name}").state_dict())
    before = {k: v.clone() for k, v in model.named_parameters()}
    with torch.no_grad():
        for k, p in model.named_parameters():
            if not k.startswith("teacher_"):
                p.add_(1.0)
    model.update_teacher(0.75)
    for k, p in model.named_parameters():
        assert (p - before[k] - (0.25 if k.startswith("teacher_") else 1.0)).abs().max() < 1e-12, k


def test_each_head_has_its_centre():
    model = network()
    means = torch.stack([torch.full((12,), 4.0), torch.full((12,), -2.0)]).double()
    for _ in range(2):
        model.update_centers(means, 0.9)
    assert model.centers.numpy() == pytest.approx(np.array([[0.76] * 12, [-0.38] * 12]))
    assert network(regions=False).centers.shape == (1, 12)


def test_only_the_student_drops_branches():
    model, views = network(drop_path=0.5), crops(16, 16, 8)
    u = torch.zeros(3, 3, model.backbone.draws, dtype=torch.float64)
    dropped, plain = model(views, u), model(views)
    assert torch.equal(dropped[1], plain[1]) and torch.equal(dropped[3], plain[3])
    assert not torch.allclose(dropped[0], plain[0]) and not torch.allclose(dropped[2], plain[2])


# -------------------------------------------------------------------------------------------------- arguments
def test_defaults_are_the_papers():
    args = parsed("esvit", "--image-size", 224)
    assert (args.arch, args.epochs, args.batch_size, args.lr) == ("swin_tiny", 300, 512, 5e-4)
    assert (args.teacher_temp_start, args.teacher_temp, args.teacher_temp_epochs) == (0.04, 0.07, 30)
    assert (args.drop_path, args.train_last_norm, args.local_size) == (0.1, True, 96)
    assert parsed("esvit", "--arch", "swin_base").drop_path == 0.2
    assert parsed("esvit", "--epochs", 5).teacher_temp_epochs == 0
    assert parsed("esvit", "--arch", "resnet50").drop_path == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch-size", 5], "--image-size 32 is not a multiple of the patch size 5: try 35"),
        (["--local-size", 9], "--local-size 9 is not a multiple of the patch size 2: try 10"),
        (["--global-scale", 0.5, 0.2], "--global-scale 0.5 0.2: the least share comes first"),
        (["--teacher-temp-epochs", 400], "--teacher-temp-epochs 400 must not exceed --epochs 300"),
        (["--out-dim", 1], "--out-dim: must be at least 2"),
        (["--arch", "resnet18", "--window", 4], "--window is for Swin"),
    ],
)
def test_mistakes(words, message, capsys):
    assert message in refused(capsys, parsed, "esvit", "--image-size", 32, *words)


# ------------------------------------------------------------------------------------------------------- runs
def test_centres_of_two_processes_are_those_of_one(tmp_path):
    words = ["--max-steps", 2, *EXACT]
    launch(("esvit", flags("esvit", tmp_path / "two", *words)))
    one, two = train("esvit", tmp_path / "one", *words)["model"], state(tmp_path / "two")["model"]
    assert (one["centers"] - two["centers"]).abs().max() < 1e-12 and one["centers"].abs().amax(1).min() > 0


def test_views_first_then_regions(tmp_path, capsys):
    views = train("esvit", tmp_path / "views", "--no-regions", "--max-steps", 6)["model"]
    assert not any("region" in k for k in views) and "regions" not in logged(tmp_path / "views")[-1]
    capsys.readouterr()
    words = ["--init", tmp_path / "views/last.pt", "--max-steps", 1]
    main("esvit", *flags("esvit", tmp_path / "both", *words))
    out = capsys.readouterr().out
    assert "head        kept" in out and "region_head fresh: the file has none" in out
    both = state(tmp_path / "both")["model"]  # after a step whose rate is 0
    assert torch.equal(both["teacher_head.mlp.0.weight"], views["teacher_head.mlp.0.weight"])
    assert torch.equal(both["backbone.norm.weight"], views["teacher_backbone.norm.weight"])


def test_a_resnet_learns_from_its_last_map(tmp_path):
    words = ["--data", "fake:64", "--arch", "resnet18", "--width", 0.125, "--image-size", 16, "--batch-size", 16]
    words += ["--epochs", 1, "--warmup-epochs", 0, "--workers", 2, "--knn-every", 0, "--log-every", 1]
    main("esvit", *words, "--local-crops", 2, "--out-dim", 12, "--hidden-dim", 8, "--out", tmp_path)
    names = ("entropy", "entropy_mean", "regions", "regions_mean")
    assert all(0 <= r[name] <= 1.0001 for r in logged(tmp_path) if "loss" in r for name in names)
