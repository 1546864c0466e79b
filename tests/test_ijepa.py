"""I-JEPA's masks by group, loss, predictor, moving average, what it says of its targets, its recipe and its files."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import ijepa
from common.rng import uniforms
from common.vit import vit
from ijepa import IJEPA, TRIES, block_masks, block_size, ijepa_loss, step_masks, target_rows, target_statistics
from tests.helpers import different, flags, main, parsed, records, refused, rows, state, train

SMALL = {"grid": (8, 8), "min_keep": 4}
RULES = [
    {"grid": (14, 14)},
    {"grid": (8, 8), "min_keep": 10},  # where some contexts take patches of targets
    {"grid": (6, 9), "min_keep": 3, "targets": 3, "context_scale": (0.5, 0.7)},
    {"grid": (8, 8), "min_keep": 4, "whole_grid": True, "cut": "random"},
]


def numbers(images, rules, first=0):
    count = 2 * (rules.get("targets", 4) + TRIES) + math.prod(rules["grid"])
    return uniforms(5, 0, range(first, first + images), 100, count)


def draws(groups, images, rules):
    """(sizes, contexts, targets) of many groups."""
    for g in range(groups):
        sizes = uniforms(5, g, [0], 102, 2)[0]
        yield sizes, *block_masks(sizes, numbers(images, rules, g * images), **rules)


def tensor_pair(pair):
    return [torch.from_numpy(part) for part in pair]


def tiny(seed=0, **shape):
    torch.manual_seed(seed)
    shape = {"predictor_dim": 24, "predictor_depth": 1} | shape
    return IJEPA(vit("vit_tiny", 32, 0.125, 4, 2, 3, pool="norm-mean", class_token=False), **shape).double()


# ------------------------------------------------------------------------------------------------------- masks
def slow_masks(sizes, u, grid, targets=4, context_scale=(0.85, 1.0), min_keep=10, whole_grid=False, cut="first"):
    """Image by image and place by place, as sets of (row, column)."""
    high, wide = grid

    def sides(number, scale, aspect):
        area, ratio = int(high * wide * (scale[0] + number * (scale[1] - scale[0]))), aspect[0] + number * aspect[1]
        return min(round((area * ratio) ** 0.5), high - 1), min(round((area / ratio) ** 0.5), wide - 1)

    def block(pair, size):
        top, left = (int(n * (most - s + whole_grid)) for n, most, s in zip(pair, grid, size, strict=True))
        return {(y, x) for y in range(top, top + size[0]) for x in range(left, left + size[1])}

    target, context = sides(sizes[0], (0.15, 0.2), (0.75, 0.75)), sides(sizes[1], context_scale, (1.0, 0.0))
    contexts, found = [], []
    for row in u.tolist():
        places = [row[2 * i : 2 * i + 2] for i in range(targets + TRIES)]
        blocks = [block(pair, target) for pair in places[:targets]]
        tries = [block(pair, context) for pair in places[targets:]]
        seen = next(c for n in range(targets, -1, -1) for t in tries if len(c := t.difference(*blocks[:n])) > min_keep)
        order = row[2 * (targets + TRIES) :] if cut == "random" else range(high * wide)
        contexts.append(sorted((y * wide + x for y, x in seen), key=lambda i, order=order: order[i]))
        found.append([sorted(y * wide + x for y, x in b) for b in blocks])
    return [sorted(c[: min(map(len, contexts))]) for c in contexts], found


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_masks_equal_a_slow_loop(rules):
    for g, (sizes, context, targets) in enumerate(draws(6, 12, rules)):
        assert (context.tolist(), targets.tolist()) == slow_masks(sizes, numbers(12, rules, 12 * g), **rules)


@pytest.mark.parametrize(
    "grid, images, numbers_of_patches", [((14, 14), 128, (33.4, 52, 88)), ((16, 16), 128, (44, 69, 115))]
)
def test_facts_of_the_published_masks(grid, images, numbers_of_patches):
    """Sizes agree within a group, contexts never touch targets or are empty, nothing is in the last row or column."""
    found, sides = [], set()
    for sizes, context, targets in draws(40, images, {"grid": grid}):
        assert context.shape[1] > 10 and targets.shape[:2] == (images, 4)
        mask, hidden = np.zeros((2, images, math.prod(grid)), bool)
        np.put_along_axis(mask, context, True, 1)
        np.put_along_axis(hidden, targets.reshape(images, -1), True, 1)
        assert not (mask & hidden).any() and np.array_equal(mask.sum(1), np.full(images, context.shape[1]))
        there = (mask | hidden).reshape(images, *grid)
        assert not there[:, -1].any() and not there[:, :, -1].any()
        height, width = block_size(sizes[0], grid, (0.15, 0.2), (0.75, 1.5))
        assert targets.shape[2] == height * width
        sides.add((height, width))
        found.append((targets.shape[2], context.shape[1], hidden.sum(1).mean()))
    assert np.mean(found, 0) == pytest.approx(numbers_of_patches, rel=0.03)
    (high, wide), (higher, narrower) = (block_size(u, grid, (0.15, 0.2), (0.75, 1.5)) for u in (0.0, 0.999))
    assert high < wide and higher > narrower and len(sides) > 2, "small blocks are wide, large ones tall"


def test_variants_of_the_masks():
    """The whole grid is used, and what a context loses is anywhere; larger groups lose more."""
    sums, lengths = {}, {}
    for name, changes in {"published": {}, "whole": {"whole_grid": True}, "random": {"cut": "random"}}.items():
        for images in (16, 128):
            context = np.zeros(64)
            masks = [c for _, c, _ in draws(1024 // images, images, SMALL | changes)]
            for part in masks:
                context += np.bincount(part.reshape(-1), minlength=64)
            lengths[name, images] = np.mean([c.shape[1] for c in masks])
        sums[name] = context.reshape(8, 8) / 1024
    assert lengths["published", 16] > lengths["published", 128] > 4
    assert not sums["published"][-1].any() and sums["whole"][-1].min() > 0 and sums["whole"][:, -1].min() > 0
    below = {name: part[4:7].sum() / part[:3].sum() for name, part in sums.items()}
    assert below["published"] < 0.6 < 0.8 < below["random"] < 1.25


def test_masks_belong_to_group_and_image():
    """Whoever has a part of a group sees its part of the masks; images that change places take theirs with them."""
    order = np.random.default_rng(0).permutation(40)[:32]
    whole = step_masks(7, 1, 9, order, order, 8, **SMALL)
    assert [part.shape[0] for pair in whole for part in pair] == [8] * 8
    assert len({(c.shape[1], t.shape[2]) for c, t in whole}) > 1, "groups have sizes of their own"
    images = [pair for part in whole for pair in zip(*part, strict=True)]
    for first, last in ((0, 16), (4, 20), (10, 13), (31, 32)):
        parts = step_masks(7, 1, 9, order, order[first:last], 8, **SMALL)
        own = [pair for part in parts for pair in zip(*part, strict=True)]
        assert different([*map(tensor_pair, own)], [*map(tensor_pair, images[first:last])]) == []
    swapped = order.copy()
    swapped[8:16] = order[8:16][::-1]
    for (c, t), (a, b) in zip(whole, step_masks(7, 1, 9, swapped, swapped, 8, **SMALL), strict=True):
        assert all(np.array_equal(x, y) or np.array_equal(x, y[::-1]) for x, y in ((c, a), (t, b)))
    for changed in (step_masks(7, 2, 9, order, order, 8, **SMALL), step_masks(7, 1, 10, order, order, 8, **SMALL)):
        pairs = [pair for groups in zip(changed, whole, strict=True) for pair in zip(*groups, strict=True)]
        assert not all(np.array_equal(a, b) for a, b in pairs)


# -------------------------------------------------------------------------------------------------------- loss
def slow_loss(prediction, target, weight):
    """Number by number, in NumPy."""
    total = 0.0
    for p, z, w in zip(prediction.numpy(), target.numpy(), weight.numpy(), strict=True):
        z = (z - z.mean()) / np.sqrt(((z - z.mean()) ** 2).mean() + 1e-5)
        terms = [0.5 * d * d if d < 1 else d - 0.5 for d in np.abs(p - z)]
        total += w * sum(terms) / len(terms)
    return total


def test_loss_is_the_formula_and_its_gradient_is_right():
    prediction, target, weight = 2 * rows(7, 6), 3 * rows(7, 6, seed=1) + 2, rows(7).softmax(0)
    assert ijepa_loss(prediction, target, weight).item() == pytest.approx(
        slow_loss(prediction, target, weight), abs=1e-10
    )
    prediction.requires_grad_()
    target.requires_grad_()
    ijepa_loss(prediction, target, weight).backward()
    assert target.grad is None and (prediction.grad != 0).all()
    assert torch.autograd.gradcheck(lambda p: ijepa_loss(p, target.detach(), weight), prediction)


def test_known_values():
    """A prediction of 0 of normal targets: E min(z^2 / 2, |z| - 1 / 2). Of constant targets the loss is small, too."""
    z = np.linspace(-10, 10, 200_001)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    exact = np.sum(np.where(abs(z) < 1, z * z / 2, abs(z) - 0.5) * density) * (z[1] - z[0])
    assert exact == pytest.approx(0.42466, abs=5e-6)
    target, weight = rows(200, 1024), torch.full((200,), 1 / 200, dtype=torch.float64)
    assert ijepa_loss(torch.zeros_like(target), target, weight).item() == pytest.approx(exact, abs=1e-3)
    same = rows(1, 1024).expand(200, -1)
    assert ijepa_loss(torch.nn.functional.layer_norm(same, (1024,)), same, weight).item() < 1e-20


def test_statistics_tell_a_collapse_from_learning():
    place, image = torch.arange(16).repeat(3), torch.arange(3).repeat_interleave(16)
    weight = torch.full((48,), 1 / 48, dtype=torch.float64)

    def found(target):
        return [v.item() for v in target_statistics(target, (image, place), weight).values()]

    assert found(rows(1, 1, 64).expand(3, 16, -1)) == pytest.approx([0, 0, 0], abs=1e-6)
    images, positions, trivial = found(rows(1, 16, 64).expand(3, -1, -1))  # positions are told apart, images are not
    assert (images, trivial) == pytest.approx((0, 0), abs=1e-6) and 0.9 < positions < 1
    images, positions, trivial = found(rows(3, 1, 64).expand(-1, 16, -1))
    assert positions == pytest.approx(0, abs=1e-6) and 0.7 < images < 0.9 and 0.2 < trivial < 0.4
    z = torch.nn.functional.layer_norm(target := rows(3, 16, 64), (64,)).numpy()
    images, positions, trivial = found(target)
    assert images == pytest.approx(np.sqrt(z.mean(1).var(0).mean()), abs=1e-10)
    assert positions == pytest.approx(np.sqrt(z.var(1).mean()), abs=1e-10)
    at = torch.from_numpy(z.mean(0)).repeat(3, 1)
    assert trivial == pytest.approx(slow_loss(at, target.flatten(0, 1), weight), abs=1e-10)


# ------------------------------------------------------------------------------------------------------- model
def step(model, x, order, first, last, group):
    """Loss of the images first to last of a batch, as the page computes it."""
    masks = step_masks(7, 1, 9, order, order[first:last], group, **SMALL)
    at, weight = target_rows([targets for _, targets in masks], x.device, x.dtype)
    prediction, target = model(x[first:last], [*map(tensor_pair, masks)])
    return ijepa_loss(prediction, target[at], weight)


@pytest.mark.parametrize("group", [4, 8, 2])
def test_parts_of_a_batch_average_to_the_whole_in_value_and_gradient(group):
    """Two processes or micro-batches, also where they share a group; and images of a group may change places."""
    model, x, order, found = tiny(), rows(8, 3, 32, 32), np.arange(8)[::-1] + 3, []
    turned = np.arange(8).reshape(-1, group)[:, ::-1].reshape(-1)
    for images, batch, parts in (
        (x, order, [(0, 8)]),
        (x, order, [(0, 4), (4, 8)]),
        (x[turned.copy()], order[turned], [(0, 8)]),
    ):
        model.zero_grad()
        loss = sum(step(model, images, batch, *part, group) for part in parts) / len(parts)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in found[1:]:
        assert max((a - b).abs().max() for a, b in zip(found[0], other, strict=True)) < 1e-10


def test_encoder_sees_the_context_only_and_targets_the_image():
    model, x, masks = tiny(), rows(2, 3, 32, 32), next(draws(1, 2, SMALL))[1:]
    context, targets = tensor_pair(masks)
    prediction, target = model(x, [(context, targets)])
    assert prediction.shape == (2 * 4 * targets.shape[2], 24) and target.shape == (2, 64, 24)
    assert torch.equal(target, model.target_backbone.tokens(x)) and not target.requires_grad
    patch = next(i for i in range(64) if i not in context[0])
    x[0, :, patch // 8 * 4 : patch // 8 * 4 + 4, patch % 8 * 4 : patch % 8 * 4 + 4] += 3
    again, other = model(x, [(context, targets)])
    assert torch.equal(again, prediction) and not torch.equal(other[0], target[0])
    patch = int(context[0, 0])
    x[0, :, patch // 8 * 4 : patch // 8 * 4 + 4, patch % 8 * 4 : patch % 8 * 4 + 4] += 3
    assert not torch.equal(model(x, [(context, targets)])[0], prediction)


def test_each_block_is_predicted_by_itself_at_its_places():
    """Without blocks a prediction is the token of its place alone; with them it sees no other target block."""
    plain, model = tiny(predictor_depth=0), tiny(predictor_depth=2)
    _, context, targets = next(draws(1, 3, SMALL))
    context, targets, tokens = torch.from_numpy(context), torch.from_numpy(targets), rows(3, context.shape[1], 24)
    queries = plain.mask_token[0] + plain.predictor_pos_embed[0][targets]
    torch.testing.assert_close(
        plain.predict(tokens, context, targets), plain.predictor_proj(plain.predictor_norm(queries))
    )
    whole = model.predict(tokens, context, targets)
    for i in range(4):
        torch.testing.assert_close(model.predict(tokens, context, targets[:, i : i + 1]), whole[:, i : i + 1])
    order = torch.randperm(context.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.predict(tokens[:, order], context[:, order], targets), whole)
    assert not torch.allclose(model.predict(tokens[:, order], context, targets), whole, rtol=0, atol=1e-6)


def test_names_sizes_and_start():
    with torch.device("meta"):
        model = IJEPA(vit("vit_huge", 224, pool="norm-mean", class_token=False))
    assert model.predictor_pos_embed.shape == (1, 256, 384) and len(model.predictor_blocks) == 12
    assert round(sum(p.numel() for p in model.backbone.parameters()) / 1e6) == 631
    names = {n.partition(".")[0] for n in model.state_dict()}
    predictor = {f"predictor_{part}" for part in ("embed", "pos_embed", "blocks", "norm", "proj")}
    assert names == {"backbone", "target_backbone", "mask_token"} | predictor
    model = tiny(predictor_dim=192)
    layers = [model.backbone.patch_embed.proj, model.backbone.blocks[0].mlp.fc1, model.predictor_blocks[0].attn.qkv]
    assert all(0.017 < layer.weight.std() < 0.023 and not layer.bias.any() for layer in layers)
    x = rows(2, 3, 32, 32)
    assert torch.equal(model.backbone(x), model.target_backbone(x))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith("target_") or "pos_embed" in n for n in trained) and "mask_token" in trained


def test_moving_average():
    model = tiny()
    with torch.no_grad():
        for p in model.backbone.parameters():
            p.add_(1)
    model.update_target(0.75)
    for (name, a), b in zip(model.backbone.named_parameters(), model.target_backbone.parameters(), strict=True):
        torch.testing.assert_close(b, a - 0.75, rtol=0, atol=1e-12, msg=name)
    assert [ijepa.target_momentum(k, 100, 0.99) for k in (0, 50, 100)] == pytest.approx([0.99, 0.995, 1], abs=1e-15)


# ------------------------------------------------------------------------------------------------------ recipe
def test_recipe_is_the_papers():
    args = parsed("ijepa", "--data", "/images")
    assert (args.arch, args.image_size, args.batch_size, args.group) == ("vit_huge", 224, 2048, 128)
    assert (args.epochs, args.warmup_epochs, args.tau, args.targets) == (300, 40, 0.996, 4)
    rates = [rate * 2048 / 256 for rate in (args.warmup_lr, args.lr, args.min_lr)]
    assert rates == pytest.approx([2e-4, 1e-3, 1e-6]) and (args.weight_decay, args.weight_decay_end) == (0.04, 0.4)
    assert (args.predictor_dim, args.predictor_depth, args.whole_grid, args.cut) == (384, 12, False, "first")
    assert (args.target_scale, args.target_aspect, args.context_scale) == ([0.15, 0.2], [0.75, 1.5], [0.85, 1.0])
    (view,) = ijepa.augmentation(224)
    assert (view.area, view.interpolation, view.flip, view.jitter_p) == ((0.3, 1.0), "bilinear", 0.0, 0)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--arch vit_base", (384, 6, 128)),
        ("--arch vit_tiny --batch-size 64", (192, 6, 64)),
        ("--arch vit_tiny --width 0.5 --depth 4 --batch-size 96", (96, 2, 96)),
        ("--arch vit_small --heads 7 --width 2.625 --batch-size 300", (364, 6, 100)),
        ("--group 0 --predictor-dim 96 --predictor-depth 3", (96, 3, 2048)),
    ],
)
def test_sizes_that_go_with_others(words, expected):
    args = parsed("ijepa", *words.split())
    assert (args.predictor_dim, args.predictor_depth, args.group) == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train("ijepa", out, "--max-steps", 7, "--tau", 0.5, "--lr", 0.01)
    return out


def test_a_single_image_says_nothing_of_the_spread_of_images(tmp_path, capsys):
    """Of one image per micro-batch the deviation over images is 0, which is no collapse."""
    train("ijepa", tmp_path, "--max-steps", 2, "--accum", 16, "--group", 0, "--warmup-epochs", 0)
    assert "std_images" not in records(tmp_path)[2] and "nearly equal" not in "".join(capsys.readouterr())


def test_rates_decay_and_files_of_a_run(run):
    """Schedules count from 1: 4 steps of warm-up, 12 of cosine; the decay rises over all 16."""
    rates = [r["lr"] for r in records(run).values()]
    peak, first, last = (rate * 16 / 256 for rate in (0.01, 2.5e-5, 1.25e-7))
    expected = [first + (peak - first) * n / 4 for n in (1, 2, 3)] + [peak]
    expected += [last + (peak - last) * (1 + math.cos(math.pi * n / 12)) / 2 for n in (1, 2, 3)]
    assert rates == pytest.approx(expected, rel=1e-9)
    saved, decay = state(run), 0.4 - 0.36 * (1 + math.cos(math.pi * 7 / 16)) / 2
    groups = saved["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == pytest.approx([decay, 0]) and groups[0]["betas"] == (0.9, 0.999)
    assert records(run)[7].keys() >= {"std_images", "std_positions", "trivial"}
    exported, model = state(run, "backbone.pt"), saved["model"]
    assert saved["backbone_prefix"] == "target_backbone."
    for name, value in exported["backbone"].items():
        assert torch.equal(value, model[f"target_backbone.{name}"])
    assert not torch.equal(model["backbone.norm.weight"], model["target_backbone.norm.weight"])
    assert exported["meta"].items() >= {"method": "ijepa", "pool": "norm-mean", "class_token": False}.items()


def test_loaded_weights_start_both_encoders(run, tmp_path):
    """Those of the target in the file."""
    again = train("ijepa", tmp_path, "--max-steps", 1, "--tau", 1, "--lr", 0.01, "--init", run / "last.pt")["model"]
    before = state(run, "backbone.pt")["backbone"]
    after = {k.removeprefix("target_backbone."): v for k, v in again.items() if k.startswith("target_backbone.")}
    assert different(before, after) == []
    assert not torch.equal(again["backbone.norm.weight"], before["norm.weight"])


def test_picture_of_the_masks(run):
    """Of eight by eight patches those of context and targets are shown, the others are grey."""
    with Image.open(run / "masks.png") as picture:
        side, pixels = 164, np.asarray(picture)
    assert pixels.shape[1] == 6 * side + 4, "original, context and four targets"
    panels = [pixels[24 : 20 + 6 * side, 4 + i * side :][:, :160] for i in range(6)]
    panels = [np.stack([p[i * side : i * side + 160] for i in range(6)]) for p in panels]
    shown = [(p != 204).any(3)[:, 10::20, 10::20] for p in panels]
    assert shown[0].all()
    for part in shown[2:]:
        assert len({image.sum() for image in part}) == 1 and not (part & shown[1]).any()
        for image in part:
            rows_, columns = image.any(1), image.any(0)
            assert image.sum() == rows_.sum() * columns.sum() and not image[-1].any() and not image[:, -1].any()
    assert len({image.sum() for image in shown[1]}) == 1 and np.array_equal(panels[1][shown_at(shown[1])],
                                                                           panels[0][shown_at(shown[1])])  # fmt: skip


def shown_at(mask):
    return mask.repeat(20, 1).repeat(20, 2)


@pytest.mark.parametrize(
    "script, words",
    [
        ("eval_knn", ""),
        ("eval_linear", "--protocol small,dino,mae --epochs 1 --batch-size 64"),
        ("eval_finetune", "--epochs 1 --batch-size 32 --max-steps 1"),
        ("visualize", "--spectrum"),
    ],
)
def test_evaluations_take_the_file(script, words, run, tmp_path):
    data = ["--data", "fake:64", "--workers", 0, "--out", tmp_path]
    main(script, "--pretrained", run / "backbone.pt", *data, *words.split())
    assert any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "words, expected",
    [
        ("--group 3", "--group 3 does not divide --batch-size 16: try 2"),
        ("--group 32", "--group 32 does not divide --batch-size 16: try 16"),
        ("--context-scale 0.02 0.1", "--min-keep 4: a context block of 1 x 1 patches has not more: lower it"),
        ("--min-keep 60", "--min-keep 60: a context block of 7 x 7 patches has not more"),
        ("--target-scale 0.7 0.9", "targets leave no context of more patches in"),
        ("--target-scale 0.5 0.2", "--target-scale 0.5 0.2: the smaller number comes first"),
        ("--target-scale 0 0.2", "--target-scale: must be greater than 0"),
        ("--warmup-lr 1", "--warmup-lr 1.0 must not exceed --lr"),
        ("--predictor-dim 20", "--predictor-dim 20 must be a multiple of 12, for 4 and heads: try 24"),
        ("--tau 1.5", "--tau: must be at most 1"),
        ("--patch-size 5", "--patch-size"),
    ],
)
def test_mistakes(words, expected, capsys, tmp_path):
    assert expected in refused(capsys, main, "ijepa", *flags("ijepa", tmp_path, *words.split()))


def test_there_is_no_attention_of_a_class_token(run, tmp_path, capsys):
    words = ["--pretrained", run / "backbone.pt", "--data", "fake:64", "--attention", "--out", tmp_path]
    assert "has no class token" in refused(capsys, main, "visualize", *words)
