"""iBOT: masks, the loss of patches, one head for crops and patches, the centre of all patches, and processes."""

import math

import numpy as np
import pytest
import torch

import ibot
from common.rng import uniforms
from tests.helpers import as_processes, different, flags, logged, main, parsed, refused, rows, state, train

GRID, B = (4, 4), 6
HEAD = {"out_dim": 12, "hidden_dim": 10, "bottleneck_dim": 6}


def network(drop_path=0.0, **head):
    torch.manual_seed(3)
    backbone = ibot.transformer("vit_tiny", 16, 0.125, patch_size=4, depth=2)
    model = ibot.iBOT(backbone, drop_path, **HEAD | head).double()
    with torch.no_grad():
        model.mask_token.copy_(rows(1, 1, backbone.dim))
        model.teacher_head.mlp[0].bias.add_(0.1)  # the teacher says something else
    return model


def crops(local=1, part=slice(None)):
    return [rows(B, 3, size, size, seed=v)[part] for v, size in enumerate([16, 16, *[8] * local])]


def numbers(images=range(B)):
    return uniforms(4, 0, images, 100, 6)


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


# ------------------------------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("shape", ["block", "random"])
def test_half_of_the_crops_are_masked_to_a_share_between_two(shape):
    """Statistics of 8,000 masks of the official code at 14 x 14: half are masked, 29.5 % of the patches there (30 % are
    asked for) with blocks, 29.6 with single patches; in the corners 1.6 % of all crops with blocks, else 15 %."""
    mask, _, _ = ibot.masked(numbers(range(2000)), (14, 14), shape=shape)
    mask = mask.flatten(0, 1).numpy()
    count = mask.sum(1)
    assert (count > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert mask[count > 0].mean() == pytest.approx(0.295, abs=0.008)
    assert count.max() <= 98 and count[count > 0].min() >= (19 if shape == "random" else 12)
    assert mask[:, [0, 13, 182, 195]].mean() == pytest.approx(0.016 if shape == "block" else 0.148, abs=0.006)


@pytest.mark.parametrize("shape", ["block", "random"])
def test_a_mask_belongs_to_its_image(shape):
    """Whatever other images are in the batch; the two crops of an image have masks of their own."""
    whole, _, _ = ibot.masked(numbers(range(40)), (8, 8), probability=1.0, shape=shape)
    part, _, _ = ibot.masked(numbers(range(30, 20, -1)), (8, 8), probability=1.0, shape=shape)
    assert torch.equal(part, whole[:, list(range(30, 20, -1))])
    assert len({row.numpy().tobytes() for row in whole.flatten(0, 1)}) == 80


def test_masks_are_those_of_the_numbers():
    """The first three numbers are of the first crop. Random masks have the whole number below the share asked for."""
    u = np.array([[0.2, 0.25, 0.3, 0.9, 0.5, 0.1], [0.6, 0.0, 0.0, 0.4, 1 - 1e-9, 0.7]])
    mask, places, weights = ibot.masked(u, (5, 5), (0.1, 0.5), 0.5, "random")
    assert mask.sum(2).tolist() == [[5, 0], [0, 12]]  # 0.2 and 0.5 of 25
    assert places.tolist() == [i for i, x in enumerate(mask.flatten().tolist()) if x]
    assert weights.numpy() == pytest.approx([1 / 5 / 4] * 5 + [1 / 12 / 4] * 12, rel=1e-12)
    assert not ibot.masked(u, (5, 5), (0.0, 0.03))[0].any()  # a share of less than a patch


# ------------------------------------------------------------------------------------------------------- loss
def test_loss_of_patches_equals_the_formula_in_numpy():
    """The mean over all crops of the mean over their masked patches, 0 where none is masked."""
    mask, places, weights = ibot.masked(numbers(), GRID)
    student, teacher, center = (rows(2, B, 16, 7, seed=i).numpy() for i in range(3))
    center, total = center[0, 0, 0], 0.0
    for v in range(2):
        for b in range(B):
            terms = []
            for n in np.flatnonzero(mask[v, b]):
                p, q = softmax((teacher[v, b, n] - center) / 0.05), softmax(student[v, b, n] / 0.1)
                terms.append(-(p * np.log(q)).sum())
            total += np.mean(terms) if terms else 0.0
    assert 0 < mask.any(2).sum() < 2 * B and len({*mask.sum(2).flatten().tolist()}) > 3
    given = [torch.from_numpy(x.reshape(-1, 7)[places]) for x in (student, teacher)]
    loss = ibot.patch_loss(*given, weights, torch.from_numpy(center), 0.1, 0.05).item()
    assert loss == pytest.approx(total / (2 * B), abs=1e-10)


def test_equal_outputs_give_the_logarithm_of_their_number_times_the_share_of_masked_crops():
    mask, places, weights = ibot.masked(numbers(), GRID)
    outputs = torch.ones(len(places), 33).double(), torch.rand(len(places), 33).double()
    loss = ibot.patch_loss(*outputs, weights, 0.0, 0.1, 0.04).item()
    assert loss == pytest.approx(math.log(33) * mask.any(2).double().mean().item(), rel=1e-12)
    assert ibot.patch_loss(*(x[:0] for x in outputs), weights[:0], 0.0, 0.1, 0.04) == 0


def test_loss_of_patches_has_the_right_gradient_and_none_for_the_teacher():
    student, teacher = (rows(4, 5, seed=i).requires_grad_() for i in range(2))
    weights = torch.tensor([0.5, 0.1, 0.2, 0.2])
    assert torch.autograd.gradcheck(lambda s: ibot.patch_loss(s, teacher, weights, 0.0, 0.1, 0.04), student)
    ibot.patch_loss(student, teacher, weights, 0.0, 0.1, 0.04).backward()
    assert teacher.grad is None


# ------------------------------------------------------------------------------------------------------ model
@pytest.mark.parametrize("local", [0, 2])
def test_outputs_are_those_of_the_whole_head(local):
    """The mean of the teacher's outputs for all patches is that of all outputs, though they are never made; patches are
    those of the crop and place that the mask tells; only the student's large crops are masked."""
    model, views = network(train_norm=True), crops(local)
    with torch.no_grad():
        for head in (model.head, model.teacher_head):
            head.last_layer.parametrizations.weight.original0.mul_(rows(12, 1).exp())
    mask, places, _ = ibot.masked(numbers(), GRID)
    student, teacher, patches, teacher_patches, mean = model(views, mask, places)
    own, whole = [], []
    for v in range(2):
        own += [model.head(x) for x in model.backbone.tokens(views[v], mask=mask[v], token=model.mask_token)]
        whole += [model.teacher_head(x) for x in model.teacher_backbone.tokens(views[v])]
    own, whole = (torch.stack(x).unflatten(0, (2, B)) for x in (own, whole))  # (2, B, 1 + L, K)
    small = [model.head(model.backbone(x)) for x in views[2:]]
    expected = torch.stack([*own[:, :, 0], *small]), whole[:, :, 0], own[:, :, 1:][mask], whole[:, :, 1:][mask]
    found = (student, teacher, patches, teacher_patches)
    for x, y in zip((*found, mean), (*expected, whole[:, :, 1:].mean((0, 1, 2))), strict=True):
        assert x.shape == y.shape and (x - y).abs().max() < 1e-12
    assert not (teacher.requires_grad or teacher_patches.requires_grad or mean.requires_grad)
    plain = model.head(model.backbone(views[0]))
    assert [torch.allclose(x, y) for x, y in zip(student[0], plain, strict=True)] == (~mask[0].any(1)).tolist()


def test_only_the_student_drops_branches_each_crop_its_own():
    model, views = network(drop_path=0.5), crops()
    mask, places, _ = ibot.masked(numbers(), GRID)
    u = torch.ones(B, 3, 4, dtype=torch.float64)
    u[2, 1] = 0  # of the third image's second crop all that can be dropped
    plain, kept, dropped = (model(views, mask, places, x) for x in (None, torch.ones_like(u), u))
    changed = (kept[0] - dropped[0]).abs().amax(2) > 1e-9
    assert changed.nonzero().tolist() == [[1, 2]] and not torch.allclose(plain[0], kept[0])
    assert all(torch.equal(plain[i], dropped[i]) for i in (1, 3, 4))


def test_teacher_and_centres_by_hand():
    model = network()
    before = {k: v.clone() for k, v in model.named_parameters()}
    with torch.no_grad():
        for k, p in model.named_parameters():
            if not k.startswith("teacher_"):
                p.add_(before[k.replace("backbone", "teacher_backbone")] if k.startswith("backbone") else 1.0)
    student = {k: v.clone() for k, v in model.named_parameters()}
    model.update_teacher(0.75)
    for k, p in model.named_parameters():
        if k.startswith("teacher_"):
            expected = 0.75 * before[k] + 0.25 * student[k.removeprefix("teacher_")]
            assert (p - expected).abs().max() < 1e-12, k
    assert not model.mask_token.grad and "teacher_mask_token" not in before
    for _ in range(2):
        model.update_centers(torch.tensor([[4.0], [-2.0]]).double().expand(2, 12), 0.9)
    assert model.centers.numpy() == pytest.approx(np.array([[0.76] * 12, [-0.38] * 12]))


# -------------------------------------------------------------------------------------------------- processes
def test_two_processes_have_the_loss_gradient_centres_and_entropies_of_one(monkeypatch):
    """Although they mask different numbers of patches."""
    model = network()
    parameters = [p for p in model.parameters() if p.requires_grad]
    given = ibot.masked(numbers(), GRID)
    parts = [slice(0, B // 2), slice(B // 2, B)]
    count = [len(ibot.masked(numbers(range(B))[part], GRID)[1]) for part in parts]
    assert count[0] != count[1] and sum(count) == len(given[1])

    def terms(part):
        mask, places, weights = ibot.masked(numbers()[part], GRID)
        student, teacher, *patches, mean = model(crops(part=part), mask, places)
        loss = ibot.dino_loss(student, teacher, model.centers[0], 0.1, 0.05)
        loss = loss + ibot.patch_loss(*patches, weights, model.centers[1], 0.1, 0.07)
        means = ibot.process_mean(torch.stack([teacher.mean((0, 1)), mean]))
        return loss, means, torch.stack(ibot.entropies(patches[1], model.centers[1], 0.07))

    whole, means, entropies = terms(slice(None))
    gradient = torch.autograd.grad(whole, parameters)
    losses, *others = zip(*as_processes(monkeypatch, ibot, terms, *[(part,) for part in parts]), strict=True)
    loss = torch.stack(losses).mean()
    assert loss.item() == pytest.approx(whole.item(), abs=1e-10)
    for a, b in zip(torch.autograd.grad(loss, parameters), gradient, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    for found, expected in zip(others, (means, entropies), strict=True):
        assert all((x - expected).abs().max() < 1e-12 for x in found)


def test_entropies_of_both_collapses():
    certain, flat, spread = 100 * torch.eye(8)[[3] * 8], torch.zeros(8, 8), 100 * torch.eye(8)
    for outputs, expected in ((flat, (1, 1)), (certain, (0, 0)), (spread, (0, 1)), (flat[:0], (0, 0))):
        for shaped in (outputs, outputs.view(2, len(outputs) // 2, 8)):
            assert [x.item() for x in ibot.entropies(shaped, 0.0, 1.0)] == pytest.approx(expected, abs=1e-6)


# -------------------------------------------------------------------------------------------------- arguments
def test_defaults_are_those_of_the_official_vit_small():
    args = parsed("ibot", "--image-size", 224)
    assert (args.arch, args.epochs, args.batch_size, args.lr, args.out_dim) == ("vit_small", 800, 1024, 5e-4, 8192)
    assert (args.global_scale, args.local_scale, args.local_size) == ([0.25, 1], [0.05, 0.25], 96)
    assert (args.local_crops, args.mask_share, args.mask_ratio) == (10, 0.5, [0.1, 0.5])
    assert (args.teacher_temp, args.teacher_patch_temp, args.teacher_temp_epochs) == (0.07, 0.07, 30)
    assert (args.train_last_norm, parsed("ibot", "--arch", "vit_base").train_last_norm) == (True, False)
    assert parsed("ibot", "--epochs", 5).teacher_temp_epochs == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--arch resnet50", "--arch resnet50: unknown, expected one of vit_tiny"),
        ("--patch-size 5", "--image-size 32 is not a multiple of the patch size 5: try 35"),
        ("--local-size 9", "--local-size 9 is not a multiple of the patch size 4: try 12"),
        ("--local-scale 0.5 0.2", "--local-scale 0.5 0.2: the least share comes first"),
        ("--mask-ratio 0.5 0.2", "--mask-ratio 0.5 0.2: the least share comes first"),
        ("--mask-ratio 0.5 1.2", "--mask-ratio: must be at most 1"),
        ("--mask-ratio 0 0.01", "--mask-ratio up to 0.01 masks none of the 8 x 8 patches of a large crop: take more"),
        ("--patch-size 32", "--mask-ratio up to 0.5 masks none of the 1 x 1 patches of a large crop"),
        ("--mask-share 0", "--mask-share: must be greater than 0"),
        ("--teacher-temp-epochs 900", "--teacher-temp-epochs 900 must not exceed --epochs 800"),
    ],
)
def test_mistakes(words, message, capsys):
    assert message in refused(capsys, parsed, "ibot", "--image-size", 32, *words.split())


# ------------------------------------------------------------------------------------------------------- runs
def test_last_layer_rests_in_the_first_epoch_and_the_teacher_is_saved(tmp_path):
    words = ["--mask-shape", "random", "--head-norm", "--out-dim", 12, "--epochs", 2]
    begun, later = (train("ibot", tmp_path / str(n), "--max-steps", n, *words)["model"] for n in (2, 6))
    name = "head.last_layer.parametrizations.weight.original"
    for i in range(2):
        start = torch.ones(12, 1) if i == 0 else begun[f"teacher_{name}{i}"]
        assert torch.allclose(begun[f"{name}{i}"], start) and not torch.equal(begun[f"{name}{i}"], later[f"{name}{i}"])
    assert begun["mask_token"].abs().max() > 0 and later["centers"].abs().amax(1).min() > 0
    saved = state(tmp_path / "6", "backbone.pt")["backbone"]
    assert all(torch.equal(v, later[f"teacher_backbone.{k}"]) for k, v in saved.items())
    log = [r for r in logged(tmp_path / "6") if "loss" in r]
    for name in ("entropy", "entropy_mean", "patches", "patches_mean"):
        assert all(0 <= r[name] <= 1.0001 for r in log)
    assert len(log) == 6 and all(0 <= r["patch_loss"] < r["loss"] for r in log)


def official(path, model, shared=True):
    """A file as the official code writes it: its head has a second last layer, the first once more if it is shared."""
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    head = {f"head.{k}": v for k, v in model.head.state_dict().items()}
    for new, old in names.items():
        head = {k.replace(new, old): v for k, v in head.items()}
        head[f"head.last_layer2.{old}"] = head[f"head.last_layer.{old}"] + (not shared)
    teacher = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()} | head
    student = {f"module.{k}": v - 1 for k, v in teacher.items()} | {"module.backbone.masked_embed": torch.ones(1, 24)}
    torch.save({"student": student, "teacher": teacher, "ibot_loss": {"center": torch.ones(1, 12)}, "epoch": 3}, path)
    return path


def test_going_on_from_published_weights_keeps_or_renews_the_head(tmp_path, capsys):
    args = parsed("ibot", *flags("ibot", tmp_path))
    sizes = {"out_dim": args.out_dim, "hidden_dim": args.hidden_dim, "bottleneck_dim": args.bottleneck_dim}
    model = ibot.iBOT(ibot.transformer(args.arch, args.image_size, args.width, None, args.depth), **sizes)
    words = ["--max-steps", 1, "--init", official(tmp_path / "shared.pth", model)]
    begun = train("ibot", tmp_path / "a", *words)["model"]  # one step, whose rate is 0
    assert "head        kept" in capsys.readouterr().out
    for name in ("backbone", "teacher_backbone", "head", "teacher_head"):
        found = {k.removeprefix(f"{name}."): v for k, v in begun.items() if k.startswith(f"{name}.")}
        assert not different(found, getattr(model, name.removeprefix("teacher_")).state_dict()), name
    main("ibot", *flags("ibot", tmp_path / "b", "--max-steps", 1, "--init", tmp_path / "a/last.pt"))
    assert "head        kept" in capsys.readouterr().out
    fresh = ibot.iBOT(ibot.transformer(args.arch, args.image_size, args.width, None, args.depth), **sizes)
    ibot.init_head(official(tmp_path / "two.pth", model, shared=False), fresh)
    assert "head        fresh: that of the file has another shape" in capsys.readouterr().out
