"""OBoW: bags of words and the loss against slow loops, the queue of words, crops and patches, the order of a step."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import obow
from common.augment import DRAWS, FLIP, EvalView, View
from common.resnet import resnet
from obow import OBoW, bow_loss, bow_targets
from tests.helpers import (
    EXACT,
    SMALL,
    flags,
    launch,
    main,
    pairs,
    parsed,
    photo,
    records,
    refused,
    rows,
    state,
    train,
)

BELOW_ONE = 1 - 2.0**-53


def small_model(levels=2, words=12):
    torch.manual_seed(0)
    return OBoW(resnet(*SMALL), levels, words, kappa=3.0).double()


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


# ----------------------------------------------------------------------------------------------- bags of words
def slow_least(x, words):
    """Squared distance to the nearest word, of each cell of each image."""
    cells = np.asarray(x, np.float64).reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    return np.array([[min(((c - w) ** 2).sum() for w in np.asarray(words)) for c in image] for image in cells])


def slow_bags(x, words, mu, inv_delta, momentum):
    mu = momentum * mu + (1 - momentum) * slow_least(x, words).mean()
    bags = np.zeros((len(x), len(words)))
    for b, image in enumerate(np.asarray(x)):
        for i in range(image.shape[1]):
            for j in range(image.shape[2]):
                weights = np.exp(-inv_delta / mu * ((image[:, i, j] - words) ** 2).sum(1))
                bags[b] = np.maximum(bags[b], weights / weights.sum())
        bags[b] /= bags[b].sum()
    return bags, mu


@pytest.mark.parametrize("most", [1, 2 * 12 * 7, 2**26])
@pytest.mark.parametrize("inv_delta, momentum", [(15.0, 0.99), (0.5, 0.0), (40.0, 1.0)])
def test_bags_equal_a_slow_loop(inv_delta, momentum, most):
    """Whether distances are computed at once or in parts of one or two of the five images; inputs stay as they are."""
    x, words, mu = rows(5, 3, 3, 4).relu(), rows(7, 3), torch.tensor(0.8, dtype=torch.float64)
    before = x.clone(), words.clone(), mu.clone()
    bags, new = bow_targets(x, words, mu, inv_delta, momentum, most)
    expected, expected_mu = slow_bags(x.numpy(), words.numpy(), 0.8, inv_delta, momentum)
    np.testing.assert_allclose(bags.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert new.item() == pytest.approx(expected_mu, rel=1e-12)
    assert all(map(torch.equal, before, (x, words, mu))) and bags.sum(1).tolist() == pytest.approx([1] * 5)
    single, _ = bow_targets(x.float(), words.float(), mu.float(), inv_delta, momentum, most)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, atol=2e-5)


def test_bags_where_features_have_collapsed():
    """All cells and words are equal, so that mu falls to 0, below which rounding would bring it: bags are even."""
    x = torch.full((4, 50, 3, 3), 0.1)
    bags, mu = bow_targets(x, x[0, :, 0, 0].expand(6, 50), torch.tensor(0.0), momentum=0.0)
    assert 0 <= mu < 1e-6
    torch.testing.assert_close(bags, torch.full((4, 6), 1 / 6))


def test_mu_on_two_processes_follows_a_hand_made_sequence(tmp_path, monkeypatch):
    """From 0.5 on, a hundredth of the way to the mean distance that a loop finds for the whole batch; bags take the new
    value; micro-batches share the hundredth."""
    seen = []

    def record(x, words, mu, inv_delta, momentum):
        seen.append((x.clone(), words.clone(), momentum))
        return bow_targets(x, words, mu, inv_delta, momentum)

    words = [*EXACT, "--max-steps", 2]
    launch(("obow", flags("obow", tmp_path / "two", *words)))
    monkeypatch.setattr(obow, "bow_targets", record)
    train("obow", tmp_path / "one", *words)
    saved = state(tmp_path / "two")["model"]
    for level in range(2):
        mu = 0.5
        for x, v, momentum in seen[level::2]:
            assert momentum == 0.99 and x.shape[0] == 16 and x.shape[2] == (4, 3)[level]
            mu = 0.99 * mu + 0.01 * slow_least(x.numpy(), v.numpy()).mean()
        assert saved[f"levels.{level}.mu"].item() == pytest.approx(mu, rel=1e-10)
    train("obow", tmp_path / "micro", *words, "--accum", 2)
    assert len(seen) == 2 * 2 + 2 * 4 and {m for *_, m in seen[4:]} == {math.sqrt(0.99)}


# -------------------------------------------------------------------------------------------------------- loss
def test_loss_equals_a_slow_loop():
    """Two kinds of crops, three and one per image; the first crop of all images comes first. Bags may hold zeros."""
    logits, bags = [4 * rows(2, 3 * 5, 6), rows(2, 5, 6, seed=1)], rows(2, 5, 6, seed=2).abs()
    bags[:, 0, :3] = 0
    bags /= bags.sum(2, keepdim=True)
    total = 0.0
    for scores in logits:
        terms = []
        for level in range(2):
            for i, row in enumerate(scores[level].numpy()):
                y, q = bags[level, i % 5].numpy(), np.exp(row) / np.exp(row).sum()
                terms.append(sum(a * math.log(a / b) for a, b in zip(y, q, strict=True) if a > 0))
        total += np.mean(terms)
    assert bow_loss(logits, bags).item() == pytest.approx(total, rel=1e-12)
    trained = [x.clone().requires_grad_() for x in logits]
    assert torch.autograd.gradcheck(lambda *x: bow_loss(x, bags.requires_grad_()), trained)
    bow_loss(trained, bags).backward()
    assert bags.grad is None


def test_loss_of_perfect_and_of_equal_predictions():
    bags = F.softmax(rows(2, 4, 9), dim=2)
    assert bow_loss([bags.log(), bags.log() + 5], bags).item() == pytest.approx(0, abs=1e-12)
    entropy = -(bags * bags.log()).sum(2).mean().item()
    even = torch.zeros(2, 12, 9, dtype=torch.float64)
    assert bow_loss([even, even], bags).item() == pytest.approx(2 * (math.log(9) - entropy), rel=1e-12)


def test_perplexities_of_known_bags():
    """Four images, each with two words of its own; then all with the same two of eight."""
    own = torch.eye(8).view(4, 2, 8).sum(1) / 2
    together, single = obow.perplexities(torch.stack([own, own[:1].expand(4, 8)]))
    assert together.tolist() == pytest.approx([8, 2]) and single.tolist() == pytest.approx([2, 2])


# ----------------------------------------------------------------------------------------------------- geometry
@pytest.mark.parametrize("size, expected", [(224, [160, 256, 96, 24]), (32, [23, 37, 14, 3]), (96, [69, 110, 41, 10])])
def test_sizes_go_with_the_image(size, expected):
    assert obow.sizes(size) == expected
    _, grid, patch, jitter = expected
    first, last = (
        obow.places(torch.full((1, 27), u, dtype=torch.float64), grid, patch, jitter, 9) for u in (0.0, BELOW_ONE)
    )
    apart = (grid - patch - jitter) // 2
    assert sorted(first[0][0].tolist()) == [0] * 3 + [apart] * 3 + [2 * apart] * 3
    assert all((b - a == jitter).all() for a, b in zip(first, last, strict=True))
    assert grid - 2 < max(last[0].max(), last[1].max()) + patch <= grid


def test_patches_are_different_cells_all_equally_likely():
    """At 224 px rows and columns begin at 0, 68 and 136, each of the 25 offsets is equally likely."""
    top, left = obow.places(drawn(6000, 27), 256, 96, 24, 5)
    offsets = [x - x.div(68, rounding_mode="floor").clamp(max=2) * 68 for x in (top, left)]
    cells = (top - offsets[0]) // 68 * 3 + (left - offsets[1]) // 68
    assert all(len(set(row)) == 5 for row in cells.tolist())
    for values, count in ((cells, 9), *((x, 25) for x in offsets)):
        found = np.bincount(values.flatten().numpy())
        assert len(found) == count and abs(found / found.mean() - 1).max() < 0.1


def test_each_coordinate_has_its_own_number():
    """One uniform at a time: for each cell first down, then across; the last nine only choose."""
    order = torch.arange(9).double() / 9
    start = torch.stack(obow.places(torch.cat([torch.zeros(18).double(), order])[None], 256, 96, 24, 9))
    assert start[0, 0].tolist() == [0] * 3 + [68] * 3 + [136] * 3 and start[1, 0].tolist() == [0, 68, 136] * 3
    for k in range(18):
        u = torch.cat([torch.zeros(18).double(), order])[None]
        u[0, k] = 0.5
        moved = torch.stack(obow.places(u, 256, 96, 24, 9)) - start
        assert moved[k % 2, 0, k // 2] == 12 and moved.abs().sum() == 12
    chosen = torch.cat([torch.zeros(18).double(), 1 - order - 0.1])[None]
    assert obow.places(chosen, 256, 96, 24, 2)[0].tolist() == [[136, 136]]
    assert obow.places(chosen, 256, 96, 24, 2)[1].tolist() == [[136, 68]]


def test_patches_hold_the_pixels_of_their_places():
    x = rows(3, 3, 37, 37).contiguous(memory_format=torch.channels_last)
    top, left = obow.places(drawn(3, 27), 37, 14, 3, 5)
    patches = obow.cut(x, top, left, 14)
    assert patches.shape == (15, 3, 14, 14) and patches.is_contiguous(memory_format=torch.channels_last)
    for i, patch in enumerate(patches):
        v, b = divmod(i, 3)
        assert torch.equal(patch, x[b, :, top[b, v] : top[b, v] + 14, left[b, v] : left[b, v] + 14])


def test_views_follow_the_recipe():
    teacher, *crops, grid = obow.augmentation(224)
    crop = View(160, area=(0.08, 0.6), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, blur_p=0.5)
    assert crops == [crop, crop] and crop.blur_sigma == (0.1, 2.0) and crop.flip == 0.5
    assert grid == dataclasses.replace(crop, size=256, area=(0.6, 1.0), blur_p=0.0)
    assert (teacher.size, teacher.flip) == (224, 0.5)
    small = obow.augmentation(32, 3, (0.2, 0.5), 0, flip=0.0)
    assert [v.size for v in small] == [32, 23, 23, 23] and {v.flip for v in small} == {0.0}
    assert {(v.area, v.blur_p) for v in small[1:]} == {((0.2, 0.5), 0.0)}


@pytest.mark.parametrize("size, shape", [(64, (90, 120)), (96, (130, 100))])
def test_the_teacher_sees_the_central_crop_mirrored_or_not(size, shape):
    image = torch.from_numpy(photo(*shape)).permute(2, 0, 1)
    view, usual = obow.augmentation(size)[0], EvalView(size)
    u = np.full((3, DRAWS), 0.9)
    u[1, FLIP] = 0.49
    assert torch.equal(view.crop(image, u[0]), usual.crop(image)) and view.box(u[0], *shape) == usual.box(None, *shape)
    assert torch.equal(view.crop_batch(image.permute(1, 2, 0)[None], u[:1])[0].permute(2, 0, 1), usual.crop(image))
    assert view.mirrored(u).tolist() == [False, True, False]
    ((name, rows_, _),) = view.plan(u)
    assert name == "flip" and rows_.tolist() == [1]


# -------------------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("side, kept", [(14, 12), (7, 5), (6, 4), (5, 3), (4, 4), (3, 3)])
def test_the_border_is_left_out_where_3_x_3_cells_remain(side, kept):
    x = torch.arange(side * side).view(1, 1, side, side)
    found = obow.inner(x)
    assert found.shape[2:] == (kept, kept) and found[0, 0, 0, 0] == (0 if side == kept else side + 1)


def test_outputs_equal_the_formula():
    """Crops of a kind are normalised together, kinds apart, words among themselves; logits are kappa f W."""
    model = small_model()
    before = copy.deepcopy(model)
    x, kinds = rows(4, 3, 24, 24), (rows(8, 3, 17, 17), rows(20, 3, 10, 10))
    f, *outputs = model(x, *kinds)
    maps, logits = outputs[:2], outputs[2:]
    features = [before.backbone(each) for each in kinds]
    assert torch.equal(f, features[0]) and not f.requires_grad
    for m, expected in zip(maps, before.target_backbone.stages(x)[-2:], strict=True):
        torch.testing.assert_close(m, obow.inner(expected))
        assert not m.requires_grad
    assert [m.shape for m in maps] == [(4, 32, 4, 4), (4, 64, 3, 3)]
    for level, vocabulary in enumerate(before.levels):
        parameters = {name: p.detach().numpy() for name, p in vocabulary.layers.named_parameters()}
        v = vocabulary.words.numpy()
        h = v / np.sqrt((v**2).sum(1, keepdims=True)) @ parameters["0.weight"].T
        h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * parameters["1.weight"] + parameters["1.bias"]
        w = np.maximum(h, 0) @ parameters["3.weight"].T + parameters["3.bias"]
        w /= np.sqrt((w**2).sum(1, keepdims=True))
        assert h.shape == (12, 128) and w.shape == (12, 64) and (v >= 0).all() and (v == 0).mean() > 0.3
        for scores, each in zip(logits, features, strict=True):
            np.testing.assert_allclose(scores[level].detach().numpy(), 3 * each.detach().numpy() @ w.T, atol=1e-10)
    bow_loss(logits, F.softmax(rows(2, 4, 12), dim=2)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) is name.startswith("target_"), name


def test_teacher_starts_as_a_copy_and_moves_by_parameters_only():
    model = small_model()
    both = pairs(model.state_dict(), {"backbone.": "target_backbone."})
    assert len(both) > 100 and all(torch.equal(model.state_dict()[a], model.state_dict()[b]) for a, b in both)
    for i, value in enumerate(model.state_dict().values()):
        value.fill_(i % 50)
    before = copy.deepcopy(model.state_dict())
    model.update_target(0.75)
    parameters, sources = dict(model.named_parameters()), {b: a for a, b in both}
    for name, value in model.state_dict().items():
        source = sources.get(name) if name in parameters else None
        expected = 0.75 * before[name] + 0.25 * before[source] if source else before[name]
        torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize("levels", [1, 2])
def test_new_words_are_averages_of_3_x_3_cells_at_the_drawn_place(levels):
    model, maps = small_model(levels), [rows(4, 32, 5, 6), rows(4, 64, 3, 3)][-levels:]
    u = drawn(4, levels)
    u[0], u[1] = 0.0, BELOW_ONE
    found = model.pick(maps, u)
    assert len(found) == levels
    for level, x in enumerate(maps):
        across = x.shape[3] - 2
        count = (x.shape[2] - 2) * across
        for b in range(4):
            place = min(int(u[b, level] * count), count - 1)
            i, j = divmod(place, across)
            expected = x[b, :, i : i + 3, j : j + 3].mean((1, 2))
            torch.testing.assert_close(found[level][b], expected, rtol=0, atol=1e-12)


def test_words_leave_in_the_order_in_which_they_came():
    """Twelve words, four new ones per step from two micro-batches."""
    model = small_model()
    first = [level.words.clone() for level in model.levels]
    for step in range(4):
        parts = [[torch.full((2, c), 10.0 * step + part).double() for c in (32, 64)] for part in range(2)]
        model.enqueue(*parts)
        for level, old in zip(model.levels, first, strict=True):
            known = [0.0, 0.0, 1.0, 1.0, 10.0, 10.0, 11.0, 11.0, 20.0, 20.0, 21.0, 21.0]
            known = [30.0, 30.0, 31.0, 31.0, *known[4:]] if step == 3 else known[: 4 * step + 4]
            assert level.words[: len(known), 0].tolist() == known and level.words.std(1)[: len(known)].max() == 0
            assert torch.equal(level.words[len(known) :], old[len(known) :])
            assert level.oldest == (4 * step + 4) % 12


# ----------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("accum", [1, 2])
def test_order_of_a_step(accum, tmp_path, monkeypatch):
    """The teacher moves before its pass, by the weights that the last step left; all bags of a step come from the words
    that it began with, and the new ones, in the order of the batch, enter after the optimiser's step."""
    events = []
    for name in ("update_target", "forward", "targets", "pick", "enqueue"):
        original = getattr(OBoW, name)

        def record(self, *args, original=original, name=name):
            values = {n: v.detach().clone() for n, v in self.state_dict().items()}
            result = original(self, *args)
            events.append((name, values, args, result))
            return result

        monkeypatch.setattr(OBoW, name, record)
    words = [*EXACT, "--max-steps", 3, "--accum", accum, "--alpha", 0.6, "--lr", 2, "--warmup-epochs", 0]
    saved = train("obow", tmp_path, *words)["model"]
    names = [name for name, *_ in events]
    assert names == (["update_target", *["forward", "targets", "pick"] * accum, "enqueue"]) * 3
    calls = {name: [e for e in events if e[0] == name] for name in names}
    rates = [args[0] for _, _, args, _ in calls["update_target"]]
    assert rates == pytest.approx([1 - 0.4 * (math.cos(math.pi * k / 16) + 1) / 2 for k in range(3)], abs=1e-15)
    steps = range(3)
    for step in steps:
        now = [e for i, e in enumerate(events) if i // (3 * accum + 2) == step]
        start, end = now[0][1], now[-1][1]
        weight = "backbone.layer4.1.conv2.weight"
        moved = rates[step] * start["target_" + weight] + (1 - rates[step]) * start[weight]
        torch.testing.assert_close(now[1][1]["target_" + weight], moved, rtol=0, atol=1e-12)
        assert not torch.equal(start[weight], end[weight])
        after = calls["update_target"][step + 1][1] if step < 2 else saved
        for level in range(2):
            name = f"levels.{level}.words"
            assert all(torch.equal(e[1][name], start[name]) for e in now)
            new = torch.cat([e[3][level] for e in now if e[0] == "pick"])
            at = 16 * step % 32
            assert torch.equal(after[name][at : at + 16], new) and len(new) == 16
            rest = [i for i in range(32) if not at <= i < at + 16]
            assert torch.equal(after[name][rest], start[name][rest])


def test_loaded_weights_start_student_and_teacher_and_the_student_is_exported(tmp_path):
    first = train("obow", tmp_path / "a", "--max-steps", 2, "--lr", 1)["model"]
    words = ["--max-steps", 3, "--lr", 1, "--alpha", 1, "--init", tmp_path / "a" / "last.pt"]
    second = train("obow", tmp_path / "b", *words)["model"]
    trained = dict(small_model().named_parameters())
    names = [(a, b) for a, b in pairs(second, {"backbone.": "target_backbone."}) if a in trained]
    assert len(names) > 50 and all(torch.equal(second[b], first[a]) for a, b in names)
    exported = state(tmp_path / "b", "backbone.pt")["backbone"]
    assert all(torch.equal(v, second[f"backbone.{n}"]) for n, v in exported.items())
    assert not torch.equal(second["backbone.conv1.weight"], first["backbone.conv1.weight"])


def test_log_tells_the_words_in_use_and_collapse_with_its_cure(tmp_path, capsys, monkeypatch):
    """Nothing is said while words of the start may be left."""
    train("obow", tmp_path / "a", "--max-steps", 5, "--levels", 1, "--patches", 0)
    first = records(tmp_path / "a")[1]
    assert {"words4", "per_image4"} <= first.keys() and "words3" not in first
    assert 1 <= first["per_image4"] <= first["words4"] <= 32
    assert "collapse" not in capsys.readouterr().err
    original = bow_targets
    monkeypatch.setattr(obow, "bow_targets", lambda x, *rest: original(x * 0, *rest))
    train("obow", tmp_path / "b", "--max-steps", 4)
    assert "collapse" not in capsys.readouterr().err
    train("obow", tmp_path / "b", "--max-steps", 5)
    assert "same bag (collapse): lower --lr" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ recipe, mistakes
def test_defaults_are_the_papers():
    expected = {"lr": 0.03, "batch_size": 256, "epochs": 200, "warmup_epochs": 10, "weight_decay": 1e-4}
    expected |= {"momentum": 0.9, "kappa": 8, "inv_delta": 15, "alpha": 0.99, "crops": 2, "crop_min": 0.08}
    expected |= {"crop_max": 0.6, "patches": 5, "grid_min": 0.6, "levels": 2, "image_size": 224, "arch": "resnet50"}
    args = vars(parsed("obow", "--data", "/imagenet"))
    assert {name: args[name] for name in expected} == expected
    sizes = {data: parsed("obow", "--data", data).image_size for data in ("digits", "cifar10", "stl10")}
    assert sizes == {"digits": 32, "cifar10": 32, "stl10": 96}  # 16 px leave no word


def test_learning_rate_falls_to_a_thousandth(tmp_path):
    train("obow", tmp_path, "--lr", 1.6, "--epochs", 2)
    rates = [r["lr"] for r in records(tmp_path).values()]
    assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    last = 0.001 + 0.999 * (1 + math.cos(math.pi * 3 / 4)) / 2
    assert len(rates) == 8 and rates[-1] == pytest.approx(0.1 * last)


@pytest.mark.parametrize("images, words", [(64, 16), (410, 48), (20_000, 1024)])
def test_words_without_a_flag(images, words, tmp_path, capsys):
    """An eighth of the images, in whole batches, at least one of them, at most 1024 of small images."""
    flags = f"--data fake:{images} --arch resnet18 --width 0.125 --image-size 24 --batch-size 16 --knn-every 0"
    main("obow", *flags.split(), "--max-steps", 1, "--workers", 0, "--out", tmp_path)
    assert f"words       {words:,} per level" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ("--words 100", "--words 100 is not divisible by --batch-size 16: try 96"),
        ("--words 4", "--words 4 is not divisible by --batch-size 16: try 16"),
        ("--image-size 16", "--image-size 16 leaves less than the 3 x 3 cells"),
        ("--crop-min 0.7", "--crop-min 0.7 exceeds --crop-max 0.6"),
        ("--patches 10", "--patches: must be at most 9"),
        ("--inv-delta 0", "--inv-delta: must be greater than 0"),
        ("--alpha 1.5", "--alpha: must be at most 1"),
        ("--levels 3", "--levels"),
        ("--arch vit_tiny", "--arch vit_tiny: unknown"),
        ("--arch torchvision:resnet18", "only our ResNets have the maps"),
        ("--batch-size 4 --accum 4 --words 8", "batch norm needs at least 2 images"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    start = "--data fake:64 --image-size 24 --batch-size 16 --epochs 4".split()
    assert message in refused(capsys, main, "obow", *start, *words.split(), "--out", tmp_path)
