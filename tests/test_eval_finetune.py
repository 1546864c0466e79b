"""eval_finetune.py: layer-wise rates, augmentation, few labels, and that processes and interruptions change nothing."""

import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as V

import eval_finetune as ft
from common.augment import EvalView, View, uniforms
from common.checkpoint import load_backbone
from common.data import Arrays, build
from common.resnet import resnet
from common.vit import vit
from tests.helpers import ROOT, command, tensors

VIT = "--pretrained SMALL_VIT --data fake:64 --epochs 4 --warmup-epochs 1"
RESNET = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --data fake:64 --epochs 4 --lr 0.1"
RUN = "--batch-size 16 --workers 2 --log-every 1 --seed 3"


@pytest.fixture(scope="session", autouse=True)
def small_vit(tmp_path_factory):
    """A file with a ViT of two blocks, which the line VIT names."""
    torch.manual_seed(0)
    network = vit("vit_tiny", 16, width=0.125, depth=2)
    meta = {"method": "mae", "arch": "vit_tiny", "width": 0.125, "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    FILES["SMALL_VIT"] = tmp_path_factory.mktemp("vit") / "backbone.pt"
    torch.save({"backbone": network.state_dict(), "meta": meta | network.config}, FILES["SMALL_VIT"])


FILES = {}


def words(line, out, *more):
    return [str(FILES.get(w, w)) for w in [*line.split(), *RUN.split(), "--out", out, *more]]


def run(line, out, *more):
    return ft.main(ft.parse_args(words(line, out, *more)))


def state(out):
    return torch.load(out / "finetune_last.pt", weights_only=True)


def losses(out):
    lines = [json.loads(line) for line in (out / "finetune.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in lines if "loss" in r}


# ------------------------------------------------------------------------------------------------ learning rates
def base(depth=12):
    backbone = vit("vit_tiny", 16, width=0.0625, depth=depth, positions="sincos-xy")
    return ft.Classifier(backbone, 10)


def test_layers_of_a_vit_of_twelve_blocks():
    """MAE: the embedding 0, block i i + 1, everything above 13."""
    ids = {name: ft.layer_id(name, 12) for name, _ in base().named_parameters()}
    assert {ids[f"backbone.{n}"] for n in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    for i in range(12):
        assert {v for k, v in ids.items() if k.startswith(f"backbone.blocks.{i}.")} == {i + 1}
    above = ("backbone.fc_norm.weight", "backbone.fc_norm.bias", "head.weight", "head.bias")
    assert {ids[n] for n in above} == {13}
    assert set(ids.values()) == set(range(14))


def test_scales_and_weight_decay_of_a_vit():
    model = base()
    of = {id(p): g for g in ft.parameter_groups(model, 0.05, 0.65) for p in g["params"]}
    named = dict(model.named_parameters())
    assert len(of) == len(named)  # each exactly once
    scale = {name: of[id(p)]["scale"] for name, p in named.items()}
    assert scale["backbone.pos_embed"] == pytest.approx(0.65**13) == pytest.approx(0.0036972, rel=1e-4)
    assert scale["backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(0.65**12)
    assert scale["backbone.blocks.11.norm1.bias"] == pytest.approx(0.65)
    assert scale["head.weight"] == scale["backbone.fc_norm.weight"] == 1
    without = {name for name, p in named.items() if of[id(p)]["weight_decay"] == 0}
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.fc_norm.weight", "head.bias"} <= without
    weights = {n for n in named if n.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight"))}
    assert without == named.keys() - weights


def test_layers_of_a_resnet_and_the_multiplier_of_its_classifier():
    model = ft.Classifier(resnet("resnet18", 0.125, 16), 10)
    of = {id(p): g for g in ft.parameter_groups(model, 1e-4, 1.0, 100.0, decay_all=True) for p in g["params"]}
    scales = {name: of[id(p)]["scale"] for name, p in model.named_parameters()}
    assert {name for name, s in scales.items() if s == 100} == {"head.weight", "head.bias"}
    assert set(scales.values()) == {1.0, 100.0}
    assert {g["weight_decay"] for g in of.values()} == {1e-4}
    ids = {name: ft.layer_id(name, 4) for name in scales}
    assert ids["backbone.conv1.weight"] == ids["backbone.bn1.bias"] == 0
    assert ids["backbone.layer4.1.bn2.weight"] == 4 and ids["head.weight"] == 5


def test_schedules():
    """MAE's formula with its fractional epoch, whose end is scaled by layer too; drops at 12 and 16 of 20."""
    steps, epochs, warm, peak, low = 7, 100, 5, 2e-3, 1e-6
    for step in (0, 3, 34, 35, 36, 400, 699):
        epoch = step / steps
        expected = peak * epoch / warm
        if epoch >= warm:
            expected = low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))
        value = peak * ft.schedule(step, epochs * steps, warm * steps, "cosine", low / peak)
        assert value == pytest.approx(expected, rel=1e-12)
    factors = [ft.schedule(e * 50, 20 * 50, 0, "step") for e in range(20)]
    assert factors == pytest.approx([1] * 12 + [0.2] * 4 + [0.04] * 4)
    assert ft.schedule(12 * 50 - 1, 20 * 50, 0, "step") == 1


def options(line, share=1.0, **meta):
    args = ft.parse_args(["--pretrained", "random", "--data", "digits", *line.split()])
    backbone = SimpleNamespace(**({} if meta["arch"].startswith("vit") else {"stages": None}))
    return ft.complete(args, backbone, {"width": 1.0, "image_size": 224, **meta}, share)


def test_defaults_are_those_of_the_papers():
    def row(args):
        return (args.recipe, args.epochs, args.batch_size, args.lr, args.weight_decay, args.layer_decay, args.drop_path)

    assert row(options("", arch="vit_base")) == ("vit", 100, 1024, 5e-4, 0.05, 0.65, 0.1)
    assert row(options("", arch="vit_large")) == ("vit", 50, 1024, 1e-3, 0.05, 0.75, 0.2)
    assert row(options("", arch="vit_huge")) == ("vit", 50, 1024, 1e-3, 0.05, 0.75, 0.3)
    assert row(options("--labels 1%", 0.01, arch="resnet50")) == ("semi", 20, 256, 0.01, 5e-4, 1, 0)
    assert row(options("--labels 10%", 0.1, arch="resnet50")) == ("semi", 20, 256, 0.01, 1e-4, 1, 0)
    assert row(options("", arch="resnet50"))[:3] == ("plain", 30, 256)
    b = options("", arch="vit_base")
    mixing = (b.mixup, b.cutmix, b.smoothing, b.erase, b.rand_augment, b.warmup_epochs, b.min_lr)
    assert mixing == (0.8, 1.0, 0.1, 0.25, 9, 5, 1e-6)
    assert options("--recipe plain", arch="vit_base").mixup == 0
    assert options("--lr 3 --drop-path 0", arch="vit_base").lr == 3
    assert ft.GRID == [(a, h) for a in (0.1, 0.01, 0.001) for h in (1, 10, 100)]


# ------------------------------------------------------------------------------------------------------ the model
def test_a_vit_gets_a_fresh_norm_and_loses_its_own():
    torch.manual_seed(0)
    backbone = vit("vit_tiny", 16, width=0.0625, depth=2)
    with torch.no_grad():
        backbone.norm.weight.fill_(7.0)
    model = ft.Classifier(backbone, 10)
    names = {name for name, _ in model.named_parameters()}
    assert "backbone.norm.weight" not in names and "backbone.fc_norm.weight" in names
    assert (model.backbone.fc_norm.weight == 1).all() and model.backbone.fc_norm.eps == 1e-6
    assert model.backbone.pos_embed.requires_grad and all(p.requires_grad for p in model.parameters())
    assert 0 < model.head.weight.std() < 4e-5 and (model.head.bias == 0).all()
    x = torch.randn(3, 3, 16, 16)
    y, position = backbone.embed(x)
    y = torch.cat([(backbone.cls_token + position).expand(3, -1, -1), y], 1)
    for block in backbone.blocks:
        y = block(y)
    y = torch.nn.functional.layer_norm(y[:, 1:].mean(1), (12,), eps=1e-6)
    torch.testing.assert_close(model(x), torch.nn.functional.linear(y, model.head.weight))


def test_positions_are_interpolated_and_trained(tmp_path):
    """Pre-trained at 16 pixels and 4 patches of 8, fine-tuned at 32: 16 patches, whose positions move."""
    torch.manual_seed(0)
    network = vit("vit_tiny", 16, width=0.125, patch_size=8, depth=2)
    meta = {"method": "mae", "arch": "vit_tiny", "width": 0.125, "image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save({"backbone": network.state_dict(), "meta": meta | network.config}, tmp_path / "backbone.pt")
    line = f"--pretrained {tmp_path}/backbone.pt --image-size 32 --data fake:64 --epochs 2 --warmup-epochs 1 --lr 0.1"
    before = load_backbone(tmp_path / "backbone.pt", image_size=32)[0].pos_embed
    result = run(line, tmp_path / "out", "--max-steps", 4)
    after = state(tmp_path / "out")["model"]["backbone.pos_embed"]
    assert after.shape == before.shape == (1, 17, 24)
    assert (after != before).any(2)[0, 1:].all() and result["image_size"] == 32
    again, meta = load_backbone(tmp_path / "out" / "finetune_last.pt")  # what was fine-tuned is a backbone again
    assert torch.equal(again.pos_embed, after) and meta["pool"] == "mean"


def test_frozen_layers_stay_as_they_are(tmp_path):
    run(RESNET, tmp_path / "a", "--freeze", 3, "--max-steps", 3)
    start, _ = load_backbone("random", "resnet18", 0.125, 16, seed=3)
    after = state(tmp_path / "a")["model"]
    for name, value in start.state_dict().items():
        frozen = name.startswith(("conv1", "bn1", "layer1", "layer2"))
        same = torch.equal(value, after[f"backbone.{name}"])
        assert same == frozen, name  # running statistics included
    run(VIT, tmp_path / "b", "--freeze", 2, "--max-steps", 3, "--lr", 0.1)
    start, _ = load_backbone(FILES["SMALL_VIT"])
    after = state(tmp_path / "b")["model"]
    for name, value in start.state_dict().items():
        if not name.startswith("norm."):
            frozen = name.startswith(("cls", "pos", "patch", "blocks.0."))
            assert torch.equal(value, after[f"backbone.{name}"]) == frozen, name


# --------------------------------------------------------------------------------------------------- augmentation
def picture(size=24, seed=0):
    """A smooth colour image that uses no full range, so that every operation has something to do."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(20, 230, (6, 6, 3), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def bicubic(image, inverse, fill):
    """PIL's bicubic transform, pixel by pixel: inverse(x, y) is where the centre of an output pixel comes from."""
    source = np.asarray(image, dtype=float)
    height, width = source.shape[:2]
    out = np.empty_like(source)

    def kernel(t, a=-1.0):
        t = abs(t)
        near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
        return near if t < 1 else far if t < 2 else 0.0

    for y in range(height):
        for x in range(width):
            u, v = inverse(x + 0.5, y + 0.5)
            if not (0 <= u < width and 0 <= v < height):
                out[y, x] = fill
                continue
            u, v = u - 0.5, v - 0.5
            value = 0
            for j in range(math.floor(v) - 1, math.floor(v) + 3):
                for i in range(math.floor(u) - 1, math.floor(u) + 3):
                    pixel = source[min(max(j, 0), height - 1), min(max(i, 0), width - 1)]
                    value = value + pixel * kernel(u - i) * kernel(v - j)
            out[y, x] = np.clip(value, 0, 255)
    return out


def turned(degrees, size):
    """Rotation about the centre of the image, counter-clockwise on the screen."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return lambda x, y: (c * (x - size / 2) - s * (y - size / 2) + size / 2,
                         s * (x - size / 2) + c * (y - size / 2) + size / 2)  # fmt: skip


# operation -> what it does at m = 0.9 and sign 1: either by torchvision on tensors, or where pixels come from
AT_NINE = {
    "autocontrast": V.autocontrast,
    "equalize": V.equalize,
    "invert": V.invert,
    "posterize": lambda x: V.posterize(x, 1),  # 4 - int(3.6) bits stay
    "solarize": lambda x: V.solarize(x, 26),  # 256 - int(230.4)
    "solarize_add": lambda x: torch.where(x < 128, (x.int() + 99).clamp(max=255), x.int()).to(torch.uint8),
    "color": lambda x: V.adjust_saturation(x, 1.81),
    "contrast": lambda x: V.adjust_contrast(x, 1.81),
    "brightness": lambda x: V.adjust_brightness(x, 1.81),
    "sharpness": lambda x: V.adjust_sharpness(x, 1.81),
    "rotate": turned(27, 24),
    "shear_x": lambda x, y: (x + 0.27 * y, y),
    "shear_y": lambda x, y: (x, y + 0.27 * x),
    "translate_x": lambda x, y: (x + 0.405 * 24, y),
    "translate_y": lambda x, y: (x, y + 0.405 * 24),
}


@pytest.mark.parametrize("name", ft.OPERATIONS)
def test_operation_against_torchvision_or_a_slow_reference(name):
    image, fill = picture(), (124, 116, 104)
    result = np.asarray(ft.OPERATIONS[name](image, 0.9, 1, fill)).astype(int)
    if name.startswith(("rotate", "shear", "translate")):
        expected = bicubic(image, AT_NINE[name], fill)
        assert (result == fill).all(2).any(), "something comes in from outside"
    else:
        expected = AT_NINE[name](V.pil_to_tensor(image)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(result - expected).max() <= 1
    assert np.abs(result - np.asarray(image).astype(int)).max() > 5, "it does something"


def test_strengths_at_both_ends():
    """Negative signs, no change at strength 0, and what the strongest settings are."""
    image, fill = picture(), (1, 2, 3)
    same = {n for n in ft.OPERATIONS if n not in ("autocontrast", "equalize", "invert", "posterize")}
    for name in same - {"rotate"}:
        assert ft.OPERATIONS[name](image, 0.0, 1, fill) == image, name
    assert len(ft.OPERATIONS) == 15
    pixels = V.pil_to_tensor(image)
    dark = V.pil_to_tensor(ft.OPERATIONS["brightness"](image, 1.0, -1, fill))
    assert (dark.int() - (pixels.float() * 0.1).round().int()).abs().max() <= 1  # never below 0.1
    assert torch.equal(V.pil_to_tensor(ft.OPERATIONS["posterize"](image, 0.5, 1, fill)), V.posterize(pixels, 2))
    assert V.pil_to_tensor(ft.OPERATIONS["posterize"](image, 1.0, 1, fill)).max() == 0
    assert torch.equal(V.pil_to_tensor(ft.OPERATIONS["solarize"](image, 1.0, 1, fill)), V.invert(pixels))
    left, right = (bicubic(image, lambda x, y, s=s: (x + s * 0.15 * y, y), fill) for s in (1, -1))
    for sign, expected in ((1, left), (-1, right)):
        result = np.asarray(ft.OPERATIONS["shear_x"](image, 0.5, sign, fill))
        assert np.abs(result - expected).max() <= 1


def test_rand_augment_draws(monkeypatch):
    """Two operations, each with probability 1/2, from 15 alike, at N(9, 0.5) clipped to 10, of either sign."""
    calls = []
    for name in ft.OPERATIONS:
        monkeypatch.setitem(ft.OPERATIONS, name, lambda i, m, s, f, n=name: calls.append((n, m, s)) or i)
    counts = []
    for u in uniforms(0, 0, np.arange(4000), 5, 8):
        before = len(calls)
        ft.rand_augment(None, u, 9, None)
        counts.append(len(calls) - before)
    assert np.bincount(counts, minlength=3) / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    names, strengths, signs = zip(*calls, strict=True)
    share = np.array([names.count(n) for n in ft.OPERATIONS]) / len(names)
    assert share == pytest.approx(np.full(15, 1 / 15), abs=0.02)
    strengths = np.array(strengths)
    assert np.median(strengths) == pytest.approx(0.9, abs=0.005) and strengths.max() == 1.0
    assert np.quantile(strengths, [0.1587, 0.8413]) == pytest.approx([0.85, 0.95], abs=0.005)
    assert (strengths == 1).mean() == pytest.approx(0.0228, abs=0.01)
    assert np.mean(signs) == pytest.approx(0, abs=0.06)


def test_crops_are_mirrored_then_augmented():
    """As they leave the loader, against a crop of the whole image that torchvision mirrors, and PIL augments."""
    images = np.stack([np.asarray(picture(seed=i)) for i in range(12)])
    view = View(24, crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, mean=(0.5, 0.25, 0.75), std=(1, 1, 1))
    loader = ft.Crops(Arrays(images, np.arange(12)), [view], 12, seed=1, workers=2)
    loader.flip, loader.magnitude = 0.5, 9.0
    batch = next(loader.epoch(4))
    u = uniforms(1, 4, batch.host_indices, 0, 40)
    mirrored = 0
    for row, index in enumerate(batch.host_indices):
        image = Image.fromarray(images[index])
        if u[row, 22] < 0.5:  # this column decides on the flip in every recipe
            mirrored += 1
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ft.rand_augment(image, u[row, 23:31], 9.0, (128, 64, 191))
        assert torch.equal(batch.images[0][row], V.pil_to_tensor(image))
    assert 0 < mirrored < 12


def test_random_erasing():
    n, size = 4000, 32
    x = ft.erase(torch.full((n, 3, size, size), 9.0), uniforms(0, 0, np.arange(n), ft.ERASE, 24), 0.25)
    gone = (x != 9).any(1)
    hit = gone.flatten(1).any(1)
    assert hit.float().mean() == pytest.approx(0.25, abs=0.03)
    rows, columns = gone[hit].any(2).sum(1), gone[hit].any(1).sum(1)
    area = gone[hit].flatten(1).sum(1)
    assert torch.equal(area, rows * columns)  # a rectangle
    share, aspect = area / size**2, rows / columns
    assert 0.01 < share.min() < 0.05 and 0.25 < share.max() < 0.36
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert aspect.min() > 0.25 and aspect.max() < 4 and aspect.log().mean().abs() < 0.05
    noise = x[gone[:, None].expand_as(x)]
    assert noise.mean().abs() < 0.01 and noise.std() == pytest.approx(1, abs=0.01)
    first = int(hit.nonzero()[0])  # on its own, in another batch, the same image is erased in the same way
    alone = ft.erase(torch.full((2, 3, size, size), 9.0), uniforms(0, 0, [first, first], ft.ERASE, 24), 0.25)
    assert torch.equal(alone[1], x[first])


def test_lambda_is_the_area_after_clipping():
    size, groups = 20, 400
    lam, box = ft.draw_mixing(3, 7, groups * ft.GROUP, size)
    assert (lam.reshape(groups, -1) == lam[:: ft.GROUP, None]).all()
    lam, box = lam[:: ft.GROUP], box[:: ft.GROUP]
    cut = box.any(1)
    assert cut.mean() == pytest.approx(0.5, abs=0.08)
    clipped = 0
    for value, (top, left, bottom, right) in zip(lam[cut], box[cut], strict=True):
        inside = np.zeros((size, size))
        inside[top:bottom, left:right] = 1
        assert value == pytest.approx(1 - inside.mean(), abs=1e-12)
        clipped += bottom - top != right - left
    assert clipped > 20 and box.min() == 0 and box.max() == size
    mixed = lam[~cut]  # Beta(0.8, 0.8): variance 1 / (4 (2 * 0.8 + 1))
    assert mixed.mean() == pytest.approx(0.5, abs=0.05) and mixed.var() == pytest.approx(1 / 10.4, abs=0.02)
    assert not ft.draw_mixing(3, 7, 640, size, cutmix=0)[1].any()
    assert (ft.draw_mixing(3, 8, groups * ft.GROUP, size)[0][:: ft.GROUP] != lam).all()
    only_cut, boxes = ft.draw_mixing(3, 7, 640, size, mixup=0)
    assert only_cut == pytest.approx(1 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / size**2)


def test_mixed_images_and_targets():
    torch.manual_seed(0)
    x, targets = torch.randn(6, 3, 8, 8), ft.smooth(torch.tensor([0, 1, 2, 3, 3, 0]), 4, 0.1)
    lam = torch.tensor([0.3, 0.3, 1 - 15 / 64, 1 - 15 / 64, 0.9, 0.9], dtype=torch.float64)
    box = torch.zeros(6, 4, dtype=torch.int64)
    box[2:4] = torch.tensor([2, 0, 5, 5])
    mixed, mixed_targets = ft.mix(x, targets, lam, box)
    torch.testing.assert_close(mixed[0], 0.3 * x[0] + 0.7 * x[1])
    torch.testing.assert_close(mixed[1], 0.3 * x[1] + 0.7 * x[0])
    expected = x[2].clone()
    expected[:, 2:5, 0:5] = x[3][:, 2:5, 0:5]
    assert torch.equal(mixed[2], expected)
    torch.testing.assert_close(mixed[5], 0.9 * x[5] + 0.1 * x[4])
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed_targets[0], torch.tensor([0.025 + 0.27, 0.025 + 0.63, 0.025, 0.025]))
    torch.testing.assert_close(mixed_targets[2, 2], torch.tensor(0.025 + 0.9 * 49 / 64))


def test_smoothing_by_hand():
    """Off 0.1 / C, on 0.9 + 0.1 / C; the loss is that of torch's own label smoothing: it is smoothed once."""
    targets = ft.smooth(torch.tensor([2, 0]), 5, 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.02, 0.02, 0.92, 0.02, 0.02], [0.92, 0.02, 0.02, 0.02, 0.02]]))
    logits = torch.randn(2, 5)
    ours = torch.nn.functional.cross_entropy(logits, targets)
    theirs = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0]), label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


# -------------------------------------------------------------------------------------------------- few labels
def test_balanced_draw():
    """ImageNet's sizes: 1 % of 1,281,167 images is 12,811, 12 or 13 of each class."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(1000), [732] * 104 + [1300] * 894 + [1442, 1397]))
    labels = np.concatenate([labels, np.arange(1281167 - len(labels)) % 896 + 104])
    drawn = ft.balanced(labels, 0.01, 0)
    assert len(labels) == 1281167 and len(drawn) == 12811 == len(set(drawn))
    assert set(np.bincount(labels[drawn])) == {12, 13} and (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, ft.balanced(labels, 0.01, 0))
    many = np.arange(20000) % 10
    assert len(np.intersect1d(ft.balanced(many, 0.1, 0), ft.balanced(many, 0.1, 1))) < 0.15 * 2000
    few = ft.balanced(np.array([5] * 90 + [7] * 3), 0.5, 0)
    assert list(np.bincount(np.array([5] * 90 + [7] * 3)[few])[[5, 7]]) == [23, 3]
    assert len(ft.balanced(np.arange(10).repeat(10), 0.01, 0)) == 10  # at least one of each


def tree(folder, names=("one", "two"), count=6):
    for split in ("train", "val"):
        for c, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((16, 16, 3), 40 + 150 * c, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{name} {i}.png")
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_lists_of_labelled_images(tmp_path, capsys):
    tree(tmp_path)
    data = build(str(tmp_path), "train")
    where = {"/".join(data.path(i).split("/")[-2:]): i for i in range(len(data))}
    text = tmp_path / "list.txt"
    text.write_text("# as SimCLR's\ntwo 3.png\n\none 0.png\ntwo/4.png\ntrain/one/1.png 0\none/1.png\n")
    expected = sorted([where["two/two 3.png"], where["one/one 0.png"], where["two/4.png"], where["one/1.png"]])
    subset, how = ft.few_labels(data, str(text), 0)
    assert list(subset.indices) == expected and "4 of 24" in how and "list.txt" in how
    assert [subset[i][1] for i in range(4)] == list(data.labels[expected])
    for line, reason in (("3.png", "class/file"), ("three.png", "not among"), ("", "names no image")):
        text.write_text(line)
        with pytest.raises(SystemExit) as stop:
            ft.few_labels(data, str(text), 0)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and reason in error and str(text) in error and error.count("\n") == 1


# -------------------------------------------------------------------------------------------------- whole runs
EXACT = ["--precision", "fp64", "--max-steps", "3"]


def test_two_processes_equal_one(tmp_path):
    """The recipe of ViTs with all that is random, and a ResNet. One process has no test image."""
    script = tmp_path / "both.py"
    lines = [words(VIT, tmp_path / "vit2", *EXACT), words(RESNET, tmp_path / "res2", "--labels", "50%", *EXACT)]
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport eval_finetune as ft\n"
        "from common.distributed import finish\nft.finish = lambda: None\n"
        f"for words in {lines!r}:\n    ft.main(ft.parse_args(words))\nfinish()\n"
    )
    command(script, processes=2, check=0)
    for name, line, more in (("vit", VIT, []), ("res", RESNET, ["--labels", "50%"])):
        run(line, tmp_path / name, *more, *EXACT)
        one, two = state(tmp_path / name), state(tmp_path / f"{name}2")
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"{name}2"), abs=1e-10)
        assert len(losses(tmp_path / name)) == 3 and one["history"] == two["history"] != []
        a, b = tensors(one), tensors(two)
        assert a.keys() == b.keys() and len(a) > 50
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-8, rtol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


def test_micro_batches_change_nothing(tmp_path):
    run(VIT, tmp_path / "a", *EXACT)
    run(VIT, tmp_path / "b", *EXACT, "--accum", 4, "--workers", 0)
    assert losses(tmp_path / "a") != {} and state(tmp_path / "a")["step"] == 3
    a, b = (tensors(state(tmp_path / x)["model"]) for x in "ab")
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-9, rtol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("line", [VIT, RESNET])
def test_resumed_run_equals_uninterrupted_bit_for_bit(line, tmp_path):
    """Cut in the middle of the second epoch of four steps, then between two epochs."""
    whole = run(line, tmp_path / "a", "--max-steps", 12)
    run(line, tmp_path / "b", "--max-steps", 6)
    assert [h["step"] for h in state(tmp_path / "b")["history"]] == [4, 6]
    run(line, tmp_path / "b", "--max-steps", 8)
    parts = run(line, tmp_path / "b", "--max-steps", 12)
    again = run(line, tmp_path / "b", "--max-steps", 12)  # nothing is left to do
    out = {"lr", "head_lr", "step", "epoch", "top1", "top5", "best_top1", "best_top5", "best_epoch"}
    assert {k: whole[k] for k in out} == {k: parts[k] for k in out} == {k: again[k] for k in out}
    a, b = (tensors(state(tmp_path / x)) for x in "ab")
    assert [n for n in a if not torch.equal(a[n], b[n]) and "max_steps" not in n] == []
    assert a.keys() == b.keys() and losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [h["step"] for h in state(tmp_path / "b")["history"]] == [4, 8, 12]


def test_terminated_run_saves_and_continues(tmp_path, monkeypatch):
    """SIGTERM in the last step of an epoch: its validation is made up for by the run that continues."""
    schedule = ft.schedule

    def terminated(step, *rest):
        signal.raise_signal(signal.SIGTERM) if step == 3 else None
        return schedule(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ft, "schedule", terminated)
        run(RESNET, tmp_path / "a", "--log-every", 100)
    assert stop.value.code == 75
    stopped = state(tmp_path / "a")
    assert stopped["step"] == 4 and stopped["history"] == []
    run(RESNET, tmp_path / "a", "--max-steps", 8)
    run(RESNET, tmp_path / "b", "--max-steps", 8)
    a, b = (state(tmp_path / x) for x in "ab")
    assert a["history"] == b["history"] and [h["step"] for h in a["history"]] == [4, 8]
    a, b = tensors(a["model"]), tensors(b["model"])
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_drop_path_and_erasing_belong_to_the_sample(tmp_path):
    """Two runs agree bit for bit; without drop path, or with another seed, they differ."""
    once, again, off, other = (
        (run(VIT, tmp_path / name, "--max-steps", 2, "--lr", 0.1, *more), losses(tmp_path / name))[1]
        for name, more in (("a", []), ("b", ["--workers", 0]), ("c", ["--drop-path", 0]), ("d", ["--seed", 4]))
    )
    assert once == again
    assert once[2] != off[2] and once[1] != other[1]


def test_grid_prints_and_reports_nine_runs(tmp_path, capsys):
    line = RESNET.replace("--lr 0.1", "--labels 50% --grid").replace("--epochs 4", "--epochs 1")
    result = run(line, tmp_path)
    printed = capsys.readouterr().out
    lines = [text for text in printed.splitlines() if text.startswith("result ")]
    assert len(lines) == 9 and len(result["grid"]) == 9
    assert [(r["lr"], r["head_lr"]) for r in result["grid"]] == ft.GRID
    assert result["top1"] == max(r["top1"] for r in result["grid"])
    assert "balanced draw with seed 3" in result["labels"] and "32 of 64" in result["labels"]
    assert "balanced draw with seed 3" in printed
    last = json.loads(printed.splitlines()[-1])
    assert last == json.loads((tmp_path / "eval_finetune.json").read_text()) == json.loads(json.dumps(result))
    # each is the run that its two flags give alone
    alone = run(line.replace("--grid", "--lr 0.01 --head-lr 10"), tmp_path / "alone")
    assert alone["top1"] == result["grid"][4]["top1"]
    a, b = (tensors(state(tmp_path / x)["model"]) for x in ("alone", "lr0.01_head10"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_of_the_grid_may_diverge(tmp_path, monkeypatch):
    monkeypatch.setattr(ft, "GRID", [(1e30, 100.0), (0.01, 1.0)])
    result = run(RESNET.replace("--lr 0.1", "--labels 50% --grid"), tmp_path)
    bad, good = result["grid"]
    assert bad["diverged_at_step"] >= 2 and bad["top1"] == 0
    assert result["lr"] == 0.01 and good["epoch"] == 4


def test_accuracy_counts_every_image_once(monkeypatch):
    """Against a loop over 45 images in batches of 7, of which the last is incomplete; NaN is never right."""

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return (x.mean((2, 3)) @ torch.linspace(-1, 1, 24).double().view(3, 8)) * torch.linspace(1, 2, 8)

    monkeypatch.setattr(ft, "EVAL_BATCH", 7)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (45, 16, 16, 3), dtype=np.uint8), rng.integers(0, 8, 45)
    view = EvalView(16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    args = SimpleNamespace(workers=2)
    top1, top5 = ft.accuracy(Fixed(), Arrays(images, labels), view, args, "cpu", torch.no_grad(), torch.float64)
    hits1 = hits5 = 0
    for image, label in zip(images, labels, strict=True):
        scores = ((image / 255 - [0.4, 0.5, 0.6]) / 0.2).mean((0, 1)) @ np.linspace(-1, 1, 24).reshape(3, 8)
        ranking = np.argsort(-scores * np.linspace(1, 2, 8))
        hits1, hits5 = hits1 + (ranking[0] == label), hits5 + (label in ranking[:5])
    assert (top1, top5) == (round(100 * hits1 / 45, 3), round(100 * hits5 / 45, 3)) and hits5 > hits1 > 0
    monkeypatch.setattr(Fixed, "forward", lambda self, x: torch.full((len(x), 8), float("nan")))
    assert ft.accuracy(Fixed(), Arrays(images, labels), view, args, "cpu", torch.no_grad(), torch.float64) == [0, 0]


def test_it_learns(tmp_path):
    """Two colours are told apart after a few steps, by either kind of network."""
    tree(tmp_path)
    for line in ("SMALL_VIT --lr 0.05 --layer-decay 1 --recipe plain", "random --arch resnet18 --width 0.125 --lr 1"):
        line = f"--pretrained {line} --image-size 16 --data {tmp_path} --warmup-epochs 1 --val-every 5"
        result = run(line, tmp_path / "out", "--epochs", 15, "--batch-size", 12, "--no-resume")
        assert result["top1"] == 100 == result["top5"]


CASES = {
    "percentage": ("--labels 0%", "above 0%"),
    "no list": ("--labels nowhere.txt", "nowhere.txt"),
    "no file names": ("--labels setup.cfg", "setup.cfg"),
    "recipe of another network": ("--recipe vit", "--recipe vit"),
    "grid without few labels": ("--grid", "--grid"),
    "grid with a rate": ("--labels 50% --grid", "--grid"),
    "drop path of a ResNet": ("--drop-path 0.1", "--drop-path"),
    "too many layers frozen": ("--freeze 6", "--freeze 6"),
    "negative decay": ("--layer-decay -1", "--layer-decay"),
    "decay above one": ("--layer-decay 1.5", "--layer-decay"),
    "no validation": ("--val-every 0", "--val-every"),
    "odd pairs": ("--mixup 0.8 --batch-size 15", "--batch-size"),
    "batch larger than data": ("--batch-size 65", "--batch-size 65"),
    "warm-up": ("--warmup-epochs 4", "--warmup-epochs"),
    "erase": ("--erase 1.5", "--erase"),
    "no weights": ("--pretrained nowhere.pt", "nowhere.pt"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_get_one_line(case, capsys, tmp_path):
    line, expected = CASES[case]
    with pytest.raises(SystemExit) as stop:
        run(RESNET, tmp_path, *line.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error, error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_another_recipe_is_not_resumed(tmp_path, capsys):
    run(RESNET, tmp_path, "--max-steps", 1)
    with pytest.raises(SystemExit) as stop:
        run(RESNET, tmp_path, "--max-steps", 1, "--head-lr", 10)
    assert stop.value.code == 2
    assert "--head-lr was 1.0, is 10.0" in capsys.readouterr().err
    run(RESNET, tmp_path, "--max-steps", 1, "--head-lr", 10, "--no-resume")


def test_files_of_pretraining_are_left_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text("kept\n")
    (tmp_path / "last.pt").write_text("kept")
    run(VIT, tmp_path, "--max-steps", 2)
    assert (tmp_path / "log.jsonl").read_text() == "kept\n" and (tmp_path / "last.pt").read_text() == "kept"
    assert not list(tmp_path.glob("*.tmp*"))
    first = json.loads((tmp_path / "finetune.jsonl").read_text().splitlines()[0])
    assert {"command", "args", "versions", "commit"} <= first.keys()
    assert Image.open(tmp_path / "finetune_views.png").size[0] > 96
