"""DINO: the loss, the head, the centre, the schedules, what is frozen and clipped, and going on from weights."""

import importlib
import math

import numpy as np
import pytest
import torch

import dino
from tests.helpers import EXACT, different, flags, launch, logged, main, parsed, refused, state, train

VIT = {"out_dim": 12, "hidden_dim": 10, "bottleneck_dim": 6}


def network(drop_path=0.0, **head):
    torch.manual_seed(3)
    return dino.DINO(dino.transformer("vit_tiny", 16, 0.25, depth=2), drop_path, **VIT | head).double()


def crops(*sizes, batch=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64) for size in sizes]


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("views", [2, 5])
def test_loss_equals_the_formula_in_numpy(views):
    shapes = (views, 4, 6), (2, 4, 6), (6,)
    student, teacher, center = (torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum()

    total, pairs = 0.0, 0
    for i in range(2):
        for v in range(views):
            if v == i:
                continue
            pairs += 1
            for b in range(4):
                p = softmax((teacher[i, b] - center).numpy() / 0.05)
                total -= (p * np.log(softmax(student[v, b].numpy() / 0.1))).sum() / 4
    loss = dino.dino_loss(student, teacher, center, 0.1, 0.05).item()
    assert pairs == 2 * views - 2
    assert loss == pytest.approx(total / pairs, abs=1e-10)


def test_equal_outputs_give_the_logarithm_of_their_number():
    loss = dino.dino_loss(torch.ones(4, 3, 65), torch.rand(2, 3, 65), torch.zeros(65), 0.1, 0.04)
    assert loss.item() == pytest.approx(math.log(65), abs=1e-5)


def test_loss_has_the_right_gradient_and_none_for_the_teacher():
    student = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    center = torch.zeros(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: dino.dino_loss(s, teacher, center, 0.1, 0.04), student)
    dino.dino_loss(student, teacher, center, 0.1, 0.04).backward()
    assert teacher.grad is None


def test_a_crop_does_not_predict_itself():
    """The teacher is certain of output 0 for crop 0 and of output 1 for crop 1; so is the student."""
    sure = 40 * torch.eye(2).double()[:, None]  # (2, 1, 2)
    same = dino.dino_loss(sure, sure, torch.zeros(2).double(), 1.0, 1.0).item()
    swapped = dino.dino_loss(sure.flip(0), sure, torch.zeros(2).double(), 1.0, 1.0).item()
    assert same == pytest.approx(40, abs=1e-9) and swapped == pytest.approx(0, abs=1e-9)


def test_entropies_of_both_collapses():
    certain, flat = torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)
    certain[..., 3] = 100
    spread = 100 * torch.eye(8).view(2, 4, 8)  # every sample another output
    zero = torch.zeros(8)
    for outputs, expected in ((flat, (1, 1)), (certain, (0, 0)), (spread, (0, 1))):
        assert [x.item() for x in dino.entropies(outputs, zero, 1.0)] == pytest.approx(expected, abs=1e-6)


def test_both_collapses_are_named_with_their_cure():
    assert "lower --teacher-temp" in dino.collapsed(0.999, 1.0)
    assert "one output" in dino.collapsed(0.0, 0.001)
    assert dino.collapsed(0.7, 0.9) is None and dino.collapsed(0.0, 0.9) is None


# ------------------------------------------------------------------------------------------------------ model
def test_head_compares_unit_vectors_with_unit_vectors():
    head = dino.Head(7, out_dim=20, hidden_dim=5, bottleneck_dim=4).double()
    x = torch.randn(6, 7, dtype=torch.float64)
    h = x
    for layer in (0, 2, 4):  # by hand, GELU with the error function
        weight, bias = head.mlp[layer].weight, head.mlp[layer].bias
        h = h @ weight.T + bias
        if layer < 4:
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    v = head.last_layer.parametrizations.weight.original1
    expected = (h / h.norm(dim=1, keepdim=True)) @ (v / v.norm(dim=1, keepdim=True)).T
    assert (head(x) - expected).abs().max() < 1e-12
    assert not head.last_layer.parametrizations.weight.original0.requires_grad
    trained = dino.Head(7, 20, 5, 4, norm=True, train_norm=True)
    assert trained.last_layer.parametrizations.weight.original0.requires_grad
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in trained.mlp) == 2


@pytest.mark.parametrize("name", ["dino", "ibot", "esvit"])
def test_scores_of_prototypes_are_in_single_precision(name):
    """Under autocast the last layer alone would move the teacher's softmax at 0.04 by a hundredth of its mass."""
    head = importlib.import_module(name).Head(24, 300)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(torch.randn(5, 24))
    assert z.dtype == torch.float32 and (z != z.bfloat16().float()).float().mean() > 0.9


def test_outputs_stand_in_the_order_of_the_crops():
    model, views = network(), crops(16, 16, 8, 8)
    student, teacher = model(views)
    assert student.shape == (4, 3, 12) and teacher.shape == (2, 3, 12)
    for v, x in enumerate(views):
        assert (student[v] - model.head(model.backbone(x))).abs().max() < 1e-12
    assert (teacher - student[:2]).abs().max() < 1e-12 and not teacher.requires_grad


def test_only_the_student_drops_branches():
    model, views = network(drop_path=0.9), crops(16, 16, 8)
    u = torch.zeros(3, 3, 4, dtype=torch.float64)  # every branch with a probability above 0 is dropped
    student, teacher = model(views, u)
    plain = model(views)
    assert torch.equal(teacher, plain[1]) and not torch.allclose(student, plain[0])
    first = model.backbone.blocks[0]
    model.backbone.blocks = torch.nn.ModuleList([first])  # the first block is never dropped, the last always
    assert (student - model(views)[0]).abs().max() < 1e-12


def test_moving_averages_by_hand():
    model = network()
    before = [p.clone() for p in model.teacher_head.parameters()]
    with torch.no_grad():
        for p in model.head.parameters():
            p.add_(1.0)
    model.update_teacher(0.75)
    for p, old in zip(model.teacher_head.parameters(), before, strict=True):
        assert (p - (old + 0.25)).abs().max() < 1e-12
    model.update_center(torch.full((12,), 4.0).double(), 0.9)
    model.update_center(torch.full((12,), 1.0).double(), 0.9)
    assert model.center.numpy() == pytest.approx(np.full(12, 0.9 * 0.4 + 0.1))


def test_schedules():
    assert [dino.teacher_temp(e, 0.04, 0.07, 4) for e in range(6)] == pytest.approx(
        [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    )
    assert dino.teacher_temp(0, 0.04, 0.07, 0) == 0.07
    values = [dino.half_cosine(step, 8, 0.04, 0.4) for step in (0, 4, 8)]
    assert values == pytest.approx([0.04, 0.22, 0.4])
    assert dino.half_cosine(2, 8, 0.996, 1) == pytest.approx(1 - 0.004 * (1 + math.cos(math.pi / 4)) / 2)


def test_every_gradient_is_clipped_by_itself():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    dino.clip_each(parameters, 1.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.8]) and parameters[2].grad is None
    assert parameters[1].grad.tolist() == pytest.approx([0.3, 0.4])


# -------------------------------------------------------------------------------------------------- arguments
def test_recipes_by_kind_of_network():
    args = parsed("dino", "--image-size", 224)
    assert (args.lr, args.weight_decay, args.weight_decay_end, args.drop_path) == (5e-4, 0.04, 0.4, 0.1)
    assert (args.global_scale, args.local_scale, args.local_size) == ([0.4, 1.0], [0.05, 0.4], 96)
    args = parsed("dino", "--arch", "resnet50", "--image-size", 224)
    assert (args.optimizer, args.lr, args.weight_decay, args.weight_decay_end) == ("sgd", 0.03, 1e-4, 1e-4)
    assert (args.global_scale, args.local_scale, args.local_size) == ([0.14, 1.0], [0.05, 0.14], 96)
    small = parsed("dino", "--image-size", 32)
    assert (small.local_size, small.local_scale) == (16, [0.2, 0.4])
    assert parsed("dino", "--weight-decay", 0.1).weight_decay_end == 0.1


def test_views_are_those_of_the_paper():
    first, second, *local = dino.augmentation(224, [0.4, 1], 96, [0.05, 0.4], 8)
    assert [v.size for v in (first, second, *local)] == [224, 224] + [96] * 8
    assert [(v.blur_p, v.solarize_p) for v in (first, second, local[0])] == [(1, 0), (0.1, 0.2), (0.5, 0)]
    assert {v.interpolation for v in (first, second, *local)} == {"bicubic"} and local[7].area == (0.05, 0.4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--local-size", 9], "--local-size 9 is not a multiple of the patch size 4: try 12"),
        (["--patch-size", 5], "--image-size 32 is not a multiple of the patch size 5: try 35"),
        (["--local-scale", 0.5, 0.2], "--local-scale 0.5 0.2: the least share comes first"),
        (["--teacher-temp-epochs", 200], "--teacher-temp-epochs 200 must not exceed --epochs 100"),
        (["--out-dim", 1], "--out-dim: must be at least 2"),
        (["--arch", "resnet18", "--drop-path", 0.1], "--drop-path is for ViTs"),
        (["--optimizer", "sgd"], "--optimizer sgd needs --lr and --weight-decay"),
    ],
)
def test_mistakes(words, message, capsys):
    assert message in refused(capsys, parsed, "dino", "--image-size", 32, *words)


# ------------------------------------------------------------------------------------------------------- runs
def test_last_layer_rests_in_the_first_epoch_and_the_teacher_follows(tmp_path):
    name = "head.last_layer.parametrizations.weight.original1"
    begun = train("dino", tmp_path / "a", "--max-steps", 4)["model"]
    later = train("dino", tmp_path / "b", "--max-steps", 6)["model"]
    torch.manual_seed(3)
    args = parsed("dino", *flags("dino", tmp_path / "a"))
    backbone = dino.transformer(args.arch, args.image_size, args.width, args.patch_size, args.depth)
    model = dino.DINO(backbone, out_dim=args.out_dim, hidden_dim=args.hidden_dim, bottleneck_dim=args.bottleneck_dim)
    assert torch.equal(begun[name], model.state_dict()[name]) and not torch.equal(later[name], begun[name])
    assert not torch.equal(begun["head.mlp.0.weight"], model.state_dict()["head.mlp.0.weight"])
    saved = state(tmp_path / "b", "backbone.pt")["backbone"]
    teacher = {k.removeprefix("teacher_backbone."): v for k, v in later.items() if k.startswith("teacher_backbone.")}
    assert not different(saved, teacher)
    assert not torch.equal(saved["norm.weight"], later["backbone.norm.weight"])


def test_centre_over_two_processes_by_a_hand_made_sequence(tmp_path):
    """The centre after two steps is that of one process with the whole batch, and moves by a tenth of the mean."""
    words = ["--max-steps", 2, *EXACT]
    launch(("dino", flags("dino", tmp_path / "two", *words)))
    one, two = train("dino", tmp_path / "one", *words)["model"], state(tmp_path / "two")["model"]
    assert (one["center"] - two["center"]).abs().max() < 1e-12 and one["center"].abs().max() > 0


def test_resnet_and_batch_norm_in_the_head(tmp_path):
    words = ["--data", "fake:64", "--arch", "resnet18", "--width", 0.125, "--image-size", 16, "--batch-size", 16]
    words += ["--epochs", 1, "--warmup-epochs", 0, "--workers", 2, "--knn-every", 0, "--head-norm", "--log-every", 1]
    words += ["--local-crops", 2, "--out-dim", 12, "--hidden-dim", 8, "--out", tmp_path]
    main("dino", *words)
    log = [r for r in logged(tmp_path) if "loss" in r]
    assert len(log) == 4 and all(0 <= r["entropy"] <= 1 and 0 <= r["entropy_mean"] <= 1.0001 for r in log)


def official(path, model):
    """A file as the official code writes it, of a model's student and of a teacher that is the student, doubled."""
    student = {f"module.backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    student |= {f"module.head.{k}": v for k, v in model.head.state_dict().items()}
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, old in names.items():
        student = {k.replace(new, old): v for k, v in student.items()}
    torch.save({"student": student, "teacher": {k[7:]: 2 * v for k, v in student.items()}, "epoch": 3}, path)


def test_going_on_from_published_weights_keeps_or_renews_the_head(tmp_path, capsys):
    args = parsed("dino", *flags("dino", tmp_path))
    sizes = {"out_dim": args.out_dim, "hidden_dim": args.hidden_dim, "bottleneck_dim": args.bottleneck_dim}
    model = dino.DINO(dino.transformer(args.arch, args.image_size, args.width, depth=args.depth), **sizes)
    official(tmp_path / "file.pth", model)
    fresh = dino.DINO(dino.transformer(args.arch, args.image_size, args.width, depth=args.depth), **sizes)
    dino.init_head(tmp_path / "file.pth", fresh)
    assert "head        kept" in capsys.readouterr().out
    assert not different({k: 2 * v for k, v in model.head.state_dict().items()}, fresh.head.state_dict())
    fresh.reset_teacher()
    assert not different(fresh.head.state_dict(), fresh.teacher_head.state_dict())
    other = dino.DINO(
        dino.transformer(args.arch, args.image_size, args.width, depth=args.depth), **sizes | {"out_dim": 9}
    )
    dino.init_head(tmp_path / "file.pth", other)
    assert "fresh: that of the file has other sizes" in capsys.readouterr().out
    torch.save(model.backbone.state_dict(), tmp_path / "backbone.pth")
    main("dino", *flags("dino", tmp_path / "run", "--max-steps", 1, "--init", tmp_path / "backbone.pth"))
    assert "head        fresh: the file has none" in capsys.readouterr().out
    main("dino", *flags("dino", tmp_path / "more", "--max-steps", 1, "--init", tmp_path / "run/last.pt"))
    assert "head        kept" in capsys.readouterr().out
