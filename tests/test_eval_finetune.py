"""Fine-tuning: layers, augmentation, mixing; of both scripts, that processes and interruptions change nothing."""

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
import eval_semi
from common import rng
from common.augment import EvalView
from common.checkpoint import load_backbone
from common.datasets import Arrays
from common.loader import Loader
from common.resnet import resnet
from common.run import Run
from common.swin import swin
from common.vit import TABLE, path_factors, resize_table, vit
from tests import helpers
from tests.helpers import (
    EXACT,
    SMALL,
    assert_close,
    different,
    launch,
    main,
    refused,
    write_colours,
    write_images,
    write_vit,
)

BASE = "--data fake:64 --epochs 4 --batch-size 16 --workers 2 --log-every 1 --seed 3"
RESNET = "eval_finetune", f"{BASE} --lr 0.1 --pretrained random --arch resnet18 --width 0.125 --image-size 16"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Script and flags of runs of both scripts with both kinds of network."""
    vit = f"{BASE} --warmup-epochs 1 --pretrained {write_vit(tmp_path_factory.mktemp('vit') / 'backbone.pt')}"
    few = {"semi": RESNET[1], "semi vit": f"{vit} --drop-path 0.5"}
    few = {name: ("eval_semi", f"{line} --labels 50% --val-every 1") for name, line in few.items()}
    return {"vit": ("eval_finetune", vit), "resnet": RESNET, **few}


def run(case, out, *more):
    return main(case[0], *case[1].split(), "--out", out, *more)


def state(out):
    (path,) = out.glob("*_last.pt")
    return helpers.state(out, path.name)


def losses(out):
    (path,) = (p for p in out.glob("*.jsonl") if p.name != "evaluations.jsonl")
    return {step: record["loss"] for step, record in helpers.records(out, path.name).items()}


# ------------------------------------------------------------------------------------------------ learning rates
def test_layers_rates_and_weight_decay_of_a_vit_of_twelve_blocks():
    """MAE: the embedding is layer 0, block i layer i + 1, all above layer 13."""
    model = ft.Classifier(vit("vit_tiny", 16, width=0.0625, depth=12), 10)
    named = dict(model.named_parameters())
    ids = {name: ft.layer_id(name, 12) for name in named}
    assert {ids[f"backbone.{n}"] for n in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    for i in range(12):
        assert {v for k, v in ids.items() if k.startswith(f"backbone.blocks.{i}.")} == {i + 1}
    above = ("backbone.fc_norm.weight", "backbone.fc_norm.bias", "head.weight", "head.bias")
    assert {ids[n] for n in above} == {13}
    assert set(ids.values()) == set(range(14))
    of = {id(p): g for g in ft.parameter_groups(model, 0.05, 0.65) for p in g["params"]}
    assert len(of) == len(named)  # each exactly once
    scale = {name: of[id(p)]["scale"] for name, p in named.items()}
    assert scale["backbone.pos_embed"] == pytest.approx(0.65**13) == pytest.approx(0.0036972, rel=1e-4)
    assert scale["backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(0.65**12)
    assert scale["backbone.blocks.11.norm1.bias"] == pytest.approx(0.65)
    assert scale["head.weight"] == scale["backbone.fc_norm.weight"] == 1
    without = {name for name, p in named.items() if of[id(p)]["weight_decay"] == 0}
    weights = {n for n in named if n.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight"))}
    assert without == named.keys() - weights


def test_layers_of_a_resnet_and_the_multiplier_of_its_classifier():
    model = ft.Classifier(resnet(*SMALL), 10)
    of = {id(p): g for g in ft.parameter_groups(model, 1e-4, 1.0, 100.0, decay_all=True) for p in g["params"]}
    scales = {name: of[id(p)]["scale"] for name, p in model.named_parameters()}
    assert {name for name, s in scales.items() if s == 100} == {"head.weight", "head.bias"}
    assert set(scales.values()) == {1.0, 100.0}
    assert {g["weight_decay"] for g in of.values()} == {1e-4}
    ids = {name: ft.layer_id(name, 4) for name in scales}
    assert ids["backbone.conv1.weight"] == ids["backbone.bn1.bias"] == 0
    assert ids["backbone.layer4.1.bn2.weight"] == 4 and ids["head.weight"] == 5


def test_defaults_are_those_of_the_papers():
    def options(arch, *more, method="mae"):
        args = helpers.parsed("eval_finetune", "--pretrained", "random", *more)
        backbone = SimpleNamespace(**{"stages" if arch.startswith("resnet") else "patch_size": None})
        meta = {"arch": arch, "width": 1.0, "image_size": 224, "channels": 3, "method": method}
        return vars(ft.complete(args, backbone, meta))

    names = ("recipe", "epochs", "batch_size", "lr", "weight_decay", "layer_decay", "drop_path", "head_lr")
    for arch, *expected in (
        ("vit_base", "vit", 100, 1024, 5e-4, 0.05, 0.65, 0.1, 1),
        ("vit_large", "vit", 50, 1024, 1e-3, 0.05, 0.75, 0.2, 1),
        ("vit_huge", "vit", 50, 1024, 1e-3, 0.05, 0.75, 0.3, 1),
        ("resnet50", "plain", 30, 256, 0.01, 1e-4, 1, 0, 1),
    ):
        assert [options(arch)[name] for name in names] == expected
    names = ("epochs", "batch_size", "warmup_epochs", "layer_decay", "drop_path", "clip", "relative_positions")
    for method, arch, peak, warmup_lr, min_lr, *expected in (  # rates as they are at the batch of the recipe
        ("SimMIM", "vit_base", 5e-3, 1e-6, 1e-6, 100, 2048, 20, 0.65, 0.1, 5, True),
        ("simmim", "swin_base", 5e-3, 1e-6, 1e-6, 100, 2048, 20, 0.9, 0.1, 5, True),
        ("simmim", "swin_large", 5e-3, 1e-6, 1e-6, 100, 2048, 20, 0.7, 0.2, 5, True),
        ("MaskFeat", "vit_base", 8e-3, 4e-8, 4e-6, 100, 2048, 20, 0.65, 0.1, 0, False),
        ("maskfeat", "vit_large", 8e-3, 8e-8, 8e-6, 50, 2048, 5, 0.75, 0.1, 0, False),
        ("CAE", "vit_base", 8e-3, 0, 1e-6, 100, 4096, 5, 0.65, 0.1, 0, True),
        ("cae", "vit_large", 2e-3, 0, 1e-6, 50, 4096, 5, 0.75, 0.2, 0, True),
    ):
        found = options(arch, method=method)
        assert [found[name] for name in names] == expected and found["recipe"] == method.lower()
        assert found["lr"] * found["batch_size"] / 256 == pytest.approx(peak)
        assert (found["warmup_lr"], found["min_lr"], found["weight_decay"]) == (warmup_lr, min_lr, 0.05)
        assert (found["rand_augment"], found["color_jitter"], found["erase"], found["mixup"]) == (9.0, 0.0, 0.25, 0.8)
    assert options("vit_base", "--recipe", "vit", method="simmim")["batch_size"] == 1024
    mixed = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "erase": 0.25, "rand_augment": 9, "warmup_epochs": 5}
    assert (mixed | {"min_lr": 1e-6}).items() <= options("vit_base").items()
    assert {"epochs": 100, "mixup": 0, "erase": 0}.items() <= options("vit_base", "--recipe", "plain").items()
    own = {"lr": 3, "drop_path": 0, "out": "runs/random"}
    assert own.items() <= options("vit_base", "--lr", 3, "--drop-path", 0).items()


def test_rates():
    """100 epochs of 10 steps, 20 of them warm-up; SimMIM's cosine has begun at step 0, that of others begins then."""
    steps = (0, 100, 200, 600, 1000)

    def rates(recipe, **more):
        args = SimpleNamespace(recipe=recipe, **more)
        return [ft.learning_rate(step, 1000, 200, 5e-3, args) for step in steps]

    def low(share):
        return 1e-6 + (5e-3 - 1e-6) * (1 + math.cos(math.pi * share)) / 2

    warm = [1e-6, (5e-3 + 1e-6) / 2]
    found = rates("simmim", warmup_lr=1e-6, min_lr=1e-6)
    assert found == pytest.approx([*warm, low(0.2), low(0.6), 1e-6]) and found[2] < 0.91 * 5e-3
    assert rates("maskfeat", warmup_lr=1e-6, min_lr=1e-6) == pytest.approx([*warm, 5e-3, low(0.5), 1e-6])
    assert rates("vit", warmup_lr=0, min_lr=1e-6)[:2] == [0, 2.5e-3]


# ------------------------------------------------------------------------------------------------------ the model
def recipe(name, **more):
    return SimpleNamespace(**{"recipe": name, "freeze": 0, "relative_positions": name in ("simmim", "cae")} | more)


@pytest.mark.parametrize("name", ["simmim", "vit", "plain"])
def test_shared_relative_positions_become_those_of_each_block(name):
    """What the blocks compute stays, in every recipe; the tables are trained like their blocks, without decay."""
    torch.manual_seed(0)
    backbone = vit("vit_tiny", 16, width=0.125, depth=2, positions="none", relative="shared", layer_scale=0.1)
    torch.nn.init.normal_(backbone.rel_pos_bias[TABLE])
    x, table = torch.randn(3, 3, 16, 16), backbone.rel_pos_bias[TABLE].clone()
    backbone.norm = torch.nn.Identity()
    before = backbone.tokens(x)
    model = ft.classifier(backbone, 10, recipe(name))
    assert torch.equal(backbone.tokens(x), before) and backbone.relative == "block"
    of = {id(p): g for g in ft.parameter_groups(model, 0.05, 0.65) for p in g["params"]}
    for i, block in enumerate(backbone.blocks):
        own = block.attn.get_parameter(TABLE)
        assert torch.equal(own, table) and own.requires_grad
        assert (of[id(own)]["scale"], of[id(own)]["weight_decay"]) == (pytest.approx(0.65 ** (2 - i)), 0)
    model(x).square().sum().backward()
    assert all(block.attn.get_parameter(TABLE).grad.any() for block in backbone.blocks)


def test_where_there_were_no_relative_positions():
    """Zeros in SimMIM's and CAE's recipes; CAE keeps its norm, after the mean, and fixed positions."""
    for name, positions in (("cae", "sincos-yx"), ("cae", "learned"), ("simmim", "sincos-xy"), ("maskfeat", "learned")):
        backbone = vit("vit_tiny", 16, width=0.125, depth=2, positions=positions)
        torch.nn.init.normal_(backbone.norm.weight)
        norm = backbone.norm
        model = ft.classifier(backbone, 10, recipe(name))
        tables = [p for n, p in model.named_parameters() if n.endswith(TABLE)]
        assert len(tables) == (0 if name == "maskfeat" else 2) and not any(t.any() for t in tables)
        assert torch.equal(backbone.fc_norm.weight, norm.weight) is (name == "cae")
        assert backbone.pos_embed.requires_grad is ((name, positions) != ("cae", "sincos-yx"))
        assert all(p.requires_grad for n, p in model.named_parameters() if not n.endswith("pos_embed"))
        assert 0 < model.head.weight.std() < 4e-5
    model = ft.classifier(swin("swin_tiny", 16, 0.25, depths=(2, 2)), 10, recipe("simmim"))
    assert 0.015 < model.head.weight.std() < 0.025 and model.path_factors is path_factors


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
    x, before = torch.randn(3, 3, 16, 16), []
    backbone.blocks[-1].register_forward_hook(lambda module, inputs, tokens: before.append(tokens[:, 1:].mean(1)))
    model(x)
    y = torch.nn.functional.layer_norm(before[0], (12,), eps=1e-6)
    torch.testing.assert_close(model(x), torch.nn.functional.linear(y, model.head.weight))


def test_positions_are_interpolated_and_trained(tmp_path):
    """Pre-trained at 16 pixels and 4 patches of 8, fine-tuned at 32: 16 patches, whose positions move."""
    write_vit(tmp_path / "backbone.pt", patch_size=8)
    case = "eval_finetune", f"{BASE} --pretrained {tmp_path}/backbone.pt --image-size 32 --warmup-epochs 1 --lr 0.1"
    before = load_backbone(tmp_path / "backbone.pt", image_size=32)[0].pos_embed
    result = run(case, tmp_path / "out", "--max-steps", 4)
    after = state(tmp_path / "out")["model"]["backbone.pos_embed"]
    assert after.shape == before.shape == (1, 17, 24)
    assert (after != before).any(2)[0, 1:].all() and result["image_size"] == 32
    again, meta = load_backbone(tmp_path / "out" / "finetune_last.pt")  # a fine-tuned network is a backbone again
    assert torch.equal(again.pos_embed, after) and meta["pool"] == "mean" and meta["method"] == "mae"


def test_a_swin_gets_other_windows(tmp_path, capsys):
    """Pre-trained at 24 pixels with windows of 3, fine-tuned at 32 with windows of 4, by the recipe of its method."""
    torch.manual_seed(0)
    network = swin("swin_tiny", 24, 0.25, 4, 3, (1, 1))
    meta = {"method": "simmim", "arch": "swin_tiny", "width": 0.25, "image_size": 24, "channels": 3}
    meta |= {"mean": [0.5] * 3, "std": [0.5] * 3, **network.config}
    torch.save({"backbone": network.state_dict(), "meta": meta}, tmp_path / "swin.pt")
    case = "eval_finetune", f"{BASE} --pretrained {tmp_path}/swin.pt --image-size 32 --max-steps 1 --warmup-epochs 0"
    assert run(case, tmp_path / "a")["recipe"] == "simmim"
    assert "the maps, which are padded: 8 x 8 by 3, 4 x 4 by 3; --window" in capsys.readouterr().out
    run(case, tmp_path / "b", "--window", 4, "--lr", 1e-9)
    assert "padded" not in capsys.readouterr().out
    again, meta = load_backbone(tmp_path / "b" / "finetune_last.pt")
    assert (meta["window"], meta["image_size"], meta["method"]) == ([4, 4], 32, "simmim")
    name = f"layers.0.blocks.0.attn.{TABLE}"
    expected = resize_table(network.state_dict()[name], (3, 3), (4, 4))
    torch.testing.assert_close(again.state_dict()[name], expected, atol=1e-6, rtol=0)


def test_a_vit_of_simmim_is_fine_tuned_and_read_again(tmp_path, capsys):
    """At another size; what is left is a network with relative positions of each block, and a classifier."""
    write_vit(tmp_path / "vit.pt", positions="none", relative="shared")
    case = "eval_finetune", f"{BASE} --pretrained {tmp_path}/vit.pt --recipe simmim --image-size 24 --warmup-epochs 1"
    run(case, tmp_path / "a", "--max-steps", 3, "--lr", 0.1)
    saved = state(tmp_path / "a")
    again, meta = load_backbone(tmp_path / "a" / "finetune_last.pt")
    assert (meta["relative"], meta["pool"], meta["positions"], again.grid) == ("block", "mean", "none", (12, 12))
    assert all(torch.equal(v, saved["model"][f"backbone.{k}"]) for k, v in again.state_dict().items())
    assert again.blocks[1].attn.get_parameter(TABLE).shape == (23 * 23 + 3, 3)
    main("predict", "--pretrained", tmp_path / "a" / "finetune.pt", "--data", "fake:20", "--out", tmp_path / "p")
    x = torch.randn(2, 3, 24, 24)
    assert (again.attention(x).sum(3) - 1).abs().max() < 1e-5 and again(x).isfinite().all()


def test_clipping_and_colours(monkeypatch, runs, tmp_path):
    """What the flags say reaches the optimiser's step and the views."""
    seen, update = [], Run.update
    monkeypatch.setattr(Run, "update", lambda self, *rest: seen.append(rest[1]) or update(self, *rest))
    for more in (
        ["--color-jitter", 0.4, "--rand-augment", 0],
        ["--clip", 0.5, "--rand-augment", 0],
        ["--color-jitter", 0.3],
    ):
        monkeypatch.setattr(ft, "validate", lambda run, *rest: seen.append(run.loader.specs[0]))
        with pytest.raises(ValueError, match="max"):  # of the accuracies, of which there are none
            run(runs["vit"], tmp_path / "-".join(map(str, more)), *more, "--max-steps", 1)
    views, clips = [s for s in seen if not isinstance(s, float)][::2], [s for s in seen if isinstance(s, float)]
    assert clips == [0.0, 0.5, 0.0]
    assert [(type(v).__name__, v.jitter, v.jitter_p) for v in views[:2]] == [
        ("View", (0.4, 0.4, 0.4, 0.0), 1.0),
        ("View", (0.0,) * 4, 0.0),
    ]
    assert type(views[2]) is ft.Augmented and views[2].jitter_p == 0


def test_frozen_layers_stay_as_they_are(runs, tmp_path):
    """Running statistics included."""
    file, kept = runs["vit"][1].split()[-1], {"resnet": ("conv1", "bn1", "layer1", "layer2")}
    kept["vit"] = "cls", "pos", "patch", "blocks.0."
    for name, freeze, source in (("resnet", 3, ("random", *SMALL, 3)), ("vit", 2, (file,))):
        run(runs[name], tmp_path / name, "--freeze", freeze, "--max-steps", 3, "--lr", 0.1)
        after = state(tmp_path / name)["model"]
        start = {k: v for k, v in load_backbone(*source)[0].state_dict().items() if not k.startswith("norm.")}
        same = {k for k, v in start.items() if torch.equal(v, after[f"backbone.{k}"])}
        assert same == {k for k in start if k.startswith(kept[name])}


# --------------------------------------------------------------------------------------------------- augmentation
def picture(size=24, seed=0):
    """A smooth colour image that uses no full range, so that every operation has something to do."""
    small = np.random.default_rng(seed).integers(20, 230, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def bicubic(image, inverse, fill):
    """PIL's bicubic transform: inverse(x, y) is where the centres of the output pixels come from."""
    source, size = np.asarray(image, dtype=float), image.width

    def kernel(t, a=-1.0):
        t = np.abs(t)
        near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
        return np.where(t < 1, near, np.where(t < 2, far, 0))

    y, x = np.mgrid[:size, :size] + 0.5
    u, v = (t + 0 * x for t in inverse(x, y))
    total = 0
    for dy, dx in np.ndindex(4, 4):
        i, j = np.floor(u - 0.5) - 1 + dx, np.floor(v - 0.5) - 1 + dy
        pixels = source[j.astype(int).clip(0, size - 1), i.astype(int).clip(0, size - 1)]
        total = total + pixels * (kernel(u - 0.5 - i) * kernel(v - 0.5 - j))[..., None]
    inside = (0 <= u) & (u < size) & (0 <= v) & (v < size)
    return np.where(inside[..., None], total.clip(0, 255), fill)


C, S = math.cos(math.radians(27)), math.sin(math.radians(27))
# operation -> what it does at m = 0.9 and sign 1: either by torchvision on tensors, or where pixels come from
AT_NINE = {
    **{name: getattr(V, name) for name in ("autocontrast", "equalize", "invert")},
    "posterize": lambda x: V.posterize(x, 1),  # 4 - int(3.6) bits stay
    "solarize": lambda x: V.solarize(x, 26),  # 256 - int(230.4)
    "solarize_add": lambda x: torch.where(x < 128, (x.int() + 99).clamp(max=255), x.int()).to(torch.uint8),
    "color": lambda x: V.adjust_saturation(x, 1.81),
    "contrast": lambda x: V.adjust_contrast(x, 1.81),
    "brightness": lambda x: V.adjust_brightness(x, 1.81),
    "sharpness": lambda x: V.adjust_sharpness(x, 1.81),
    "rotate": lambda x, y: (C * (x - 12) - S * (y - 12) + 12, S * (x - 12) + C * (y - 12) + 12),  # counter-clockwise
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

    def applied(name, m, sign=1):
        return V.pil_to_tensor(ft.OPERATIONS[name](image, m, sign, fill)).int()

    pixels = V.pil_to_tensor(image)
    assert len(ft.OPERATIONS) == 15
    for name in ft.OPERATIONS.keys() - {"autocontrast", "equalize", "invert", "posterize", "rotate"}:
        assert torch.equal(applied(name, 0.0), pixels.int()), name
    assert (applied("brightness", 1.0, -1) - (pixels.float() * 0.1).round().int()).abs().max() <= 1  # never below 0.1
    assert torch.equal(applied("posterize", 0.5), V.posterize(pixels, 2).int()) and applied("posterize", 1.0).max() == 0
    assert torch.equal(applied("solarize", 1.0), V.invert(pixels).int())
    for sign in (1, -1):
        expected = bicubic(image, lambda x, y, s=sign: (x + s * 0.15 * y, y), fill)
        assert np.abs(applied("shear_x", 0.5, sign).permute(1, 2, 0).numpy() - expected).max() <= 1


def test_rand_augment_draws(monkeypatch):
    """Two operations, each with probability 1/2, from 15 alike, at N(9, 0.5) clipped to 10, of either sign."""
    calls = []
    for name in ft.OPERATIONS:
        monkeypatch.setitem(ft.OPERATIONS, name, lambda i, m, s, f, n=name: calls.append((n, m, s)) or i)
    counts = []
    for u in rng.uniforms(0, 0, np.arange(4000), 5, 8):
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


def test_crops_are_flipped_then_augmented():
    """As they leave the loader, against a crop of the whole image that PIL flips and augments; no flip follows."""
    images = np.stack([np.asarray(picture(seed=i)) for i in range(12)])
    how = {"area": (1.0, 1.0), "ratio": (1.0, 1.0), "magnitude": 9.0, "mean": (0.5, 0.25, 0.75), "std": (1, 1, 1)}
    batch = next(Loader(Arrays(images, np.arange(12)), [ft.Augmented(24, **how)], 12, seed=1, workers=2).epoch(4))
    u = rng.uniforms(1, 4, batch.keys, 0, 40)
    flipped = u[:, 22] < 0.5  # this column decides in every recipe
    for row, index in enumerate(batch.indices):
        image = Image.fromarray(images[index])
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped[row] else image
        image = ft.rand_augment(image, u[row, 23:31], 9.0, (128, 64, 191))
        assert torch.equal(batch.images[0][row], V.pil_to_tensor(image))
    assert 0 < flipped.sum() < 12 and (batch.boxes(0)[:, 6].numpy() == flipped).all()
    mean = torch.tensor(how["mean"]).view(3, 1, 1)
    torch.testing.assert_close(batch.views()[0], batch.images[0] / 255 - mean)


def test_random_erasing():
    n, size = 4000, 32
    x = ft.erase(torch.full((n, 3, size, size), 9.0), rng.uniforms(0, 0, np.arange(n), rng.ERASE, 24), 0.25)
    gone = (x != 9).any(1)
    hit = gone.flatten(1).any(1)
    assert hit.float().mean() == pytest.approx(0.25, abs=0.03)
    rows, columns = gone[hit].any(2).sum(1), gone[hit].any(1).sum(1)
    area, aspect = gone[hit].flatten(1).sum(1), rows / columns
    share = area / size**2
    assert torch.equal(area, rows * columns) and 0.01 < share.min() < 0.05 and 0.25 < share.max() < 0.36  # rectangles
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert aspect.min() > 0.25 and aspect.max() < 4 and aspect.log().mean().abs() < 0.05
    noise = x[gone[:, None].expand_as(x)]
    assert noise.mean().abs() < 0.01 and noise.std() == pytest.approx(1, abs=0.01)
    first = int(hit.nonzero()[0])  # on its own, in another batch, the same image is erased in the same way
    alone = ft.erase(torch.full((2, 3, size, size), 9.0), rng.uniforms(0, 0, [first, first], rng.ERASE, 24), 0.25)
    assert torch.equal(alone[1], x[first])


def test_lambda_is_the_area_after_clipping():
    size, groups = 20, 400
    lam, box = ft.draw_mixing(3, 7, groups * ft.GROUP, size)
    assert (lam.reshape(groups, -1) == lam[:: ft.GROUP, None]).all()
    lam, box = lam[:: ft.GROUP], box[:: ft.GROUP]
    cut = box.any(1)
    assert cut.mean() == pytest.approx(0.5, abs=0.08)
    height, width = (box[cut, 2:] - box[cut, :2]).T
    assert lam[cut] == pytest.approx(1 - height * width / size**2, abs=1e-12)
    assert (height != width).sum() > 20 and box.min() == 0 and box.max() == size
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


def test_smoothing_is_that_of_torch_and_done_once():
    labels, logits = torch.tensor([2, 0]), torch.randn(2, 5)
    ours = torch.nn.functional.cross_entropy(logits, ft.smooth(labels, 5, 0.1))
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))


# -------------------------------------------------------------------------------------------------- whole runs
def test_processes_and_micro_batches_change_nothing(runs, tmp_path):
    """The recipe of ViTs with all that is random, and a ResNet with all labels or few. A process has no test image."""
    cases, more = {k: runs[k] for k in ("vit", "resnet", "semi")}, [*EXACT, "--max-steps", 3]
    launch(*((script, [*line.split(), "--out", tmp_path / f"{k}2", *more]) for k, (script, line) in cases.items()))
    for name, case in cases.items():
        run(case, tmp_path / name, *more)
        one, two = state(tmp_path / name), state(tmp_path / f"{name}2")
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"{name}2"), abs=1e-10)
        assert len(losses(tmp_path / name)) == 3 and one["history"] == two["history"] != []
        assert_close(one, two, atol=1e-8, rtol=1e-7)
    run(runs["vit"], tmp_path / "parts", *more, "--accum", 4, "--workers", 0)
    assert_close(*(state(tmp_path / x)["model"] for x in ("vit", "parts")), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["vit", "resnet", "semi", "semi vit"])
def test_resumed_run_equals_uninterrupted_bit_for_bit(name, runs, tmp_path):
    """Cut in the middle of an epoch, then between two epochs; then nothing is left to do."""
    each = 2 if "semi" in name else 4  # steps of an epoch
    whole = run(runs[name], tmp_path / "a", "--max-steps", 3 * each)
    run(runs[name], tmp_path / "b", "--max-steps", each + each // 2)
    assert [h["step"] for h in state(tmp_path / "b")["history"]] == [each, each + each // 2]
    *_, parts, again = (run(runs[name], tmp_path / "b", "--max-steps", n * each) for n in (2, 3, 3))
    assert whole == parts == again
    assert different(*(state(tmp_path / x) for x in "ab"), but=("max_steps",)) == []
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [h["step"] for h in state(tmp_path / "b")["history"]] == [each, 2 * each, 3 * each]


def test_terminated_run_saves_and_continues(tmp_path, monkeypatch):
    """SIGTERM in the last step of an epoch: the run that continues makes up for the validation of that epoch."""
    schedule = ft.cosine

    def terminated(step, *rest):
        signal.raise_signal(signal.SIGTERM) if step == 3 else None
        return schedule(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ft, "cosine", terminated)
        run(RESNET, tmp_path / "a", "--log-every", 100)
    stopped = state(tmp_path / "a")
    assert stop.value.code == 75 and stopped["step"] == 4 and stopped["history"] == []
    for name in "ab":
        run(RESNET, tmp_path / name, "--max-steps", 8)
    a, b = (state(tmp_path / x) for x in "ab")
    assert a["history"] == b["history"] and [h["step"] for h in a["history"]] == [4, 8]
    assert different(a["model"], b["model"]) == []


def test_drop_path_and_erasing_belong_to_the_sample(runs, tmp_path):
    """Two runs agree bit for bit; without drop path, or with another seed, they differ."""
    once, again, off, other = (
        (run(runs["vit"], tmp_path / name, "--max-steps", 2, "--lr", 0.1, *more), losses(tmp_path / name))[1]
        for name, more in (("a", []), ("b", ["--workers", 0]), ("c", ["--drop-path", 0]), ("d", ["--seed", 4]))
    )
    assert once == again
    assert once[2] != off[2] and once[1] != other[1]


def test_accuracy_counts_every_image_once():
    """Against NumPy on 45 images in batches of 7, of which the last is incomplete; NaN is never right."""
    torch.manual_seed(0)
    model, generator, mean = torch.nn.Module(), np.random.default_rng(0), (0.4, 0.5, 0.6)
    model.head = torch.nn.Linear(3, 8).double()
    images, labels = generator.integers(0, 256, (45, 16, 16, 3), dtype=np.uint8), generator.integers(0, 8, 45)
    what = (Arrays(images, labels), EvalView(16, mean=mean, std=(0.2, 0.2, 0.2)), 2, torch.no_grad(), 7)
    weight, bias = (p.detach().numpy() for p in model.head.parameters())
    scores = ((images / 255 - mean) / 0.2).mean((1, 2)) @ weight.T + bias
    hits = np.argsort(-scores, 1)[:, :5] == labels[:, None]
    top1, top5 = (round(100 * hits[:, :k].any(1).mean(), 3) for k in (1, 5))
    model.forward = lambda x: model.head(x.mean((2, 3)))
    assert ft.accuracy(model, *what) == [top1, top5] and top5 > top1 > 0
    model.forward = lambda x: torch.full((len(x), 8), float("nan"))
    assert ft.accuracy(model, *what) == [0, 0]


@pytest.mark.parametrize("script", ["eval_finetune --recipe plain", "eval_semi --labels 100% --head-lr 1"])
def test_it_learns(script, tmp_path):
    """Two colours are told apart after a few steps, by either kind of network."""
    line = f"{script} --image-size 16 --data {write_colours(tmp_path)} --epochs 30 --warmup-epochs 1 --batch-size 12"
    vit = f"{write_vit(tmp_path / 'vit.pt')} --lr 0.05 --layer-decay 1"
    for network in (vit, "random --arch resnet18 --width 0.125 --lr 1"):
        result = run(f"{line} --workers 0 --no-resume --pretrained {network}".split(" ", 1), tmp_path / "out")
        assert result["top1"] == 100 == result["top5"]


MISTAKES = ["--recipe vit", "--drop-path 0.1", "--freeze 6", "--layer-decay -1", "--layer-decay 1.5", "--val-every 0"]
MISTAKES += ["--mixup 0.8 --batch-size 15", "--batch-size 65", "--warmup-epochs 4", "--erase 1.5", "--rand-augment 11"]
MISTAKES += ["--labels 1%", "--pretrained nowhere.pt", "--window 4", "--color-jitter 2", "--recipe simmim"]


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_get_one_line(line, capsys, tmp_path):
    assert line.split()[-2] in refused(capsys, run, RESNET, tmp_path, *line.split())


def test_another_recipe_is_not_resumed(tmp_path, capsys):
    run(RESNET, tmp_path, "--max-steps", 1)
    other = ("--max-steps", 1, "--head-lr", 10)
    assert "--head-lr was 1.0, is 10.0" in refused(capsys, run, RESNET, tmp_path, *other)
    run(RESNET, tmp_path, *other, "--no-resume")


def test_a_result_is_that_of_these_weights_and_images(tmp_path, capsys):
    """The file of --pretrained is overwritten by a longer run, the lists become others of the same length."""
    names = {f"{which}/{c}/{i}.png": c for which in "abv" for c in "xy" for i in range(8)}
    write_images(tmp_path, [*names], size=(16, 16))
    for which in "abv":
        lines = (f"{name} {c}\n" for name, c in names.items() if name[0] == which)
        (tmp_path / f"{which}.txt").write_text("".join(lines))
    words = ["--data", tmp_path, "--train-list", tmp_path / "a.txt", "--val-list", tmp_path / "v.txt", "--max-steps", 1]
    words += ["--pretrained", write_vit(tmp_path / "backbone.pt"), "--out", tmp_path / "out", "--batch-size", 16]
    main("eval_finetune", *words)
    main("eval_finetune", *words)
    for flag, part in (("--train-list", "training"), ("--val-list", "test")):
        assert f"the {part} images are others" in refused(
            capsys, main, "eval_finetune", *words, flag, tmp_path / "b.txt"
        )
    file = torch.load(tmp_path / "backbone.pt")
    file["backbone"]["norm.bias"] += 1
    torch.save(file, tmp_path / "backbone.pt")
    assert "the weights of --pretrained are others" in refused(capsys, main, "eval_finetune", *words)


def test_files_of_pretraining_are_left_alone(runs, tmp_path):
    kept = [tmp_path / name for name in ("log.jsonl", "last.pt", "backbone.pt", "views.png")]
    for path in kept:
        path.write_text("kept")
    result = run(runs["vit"], tmp_path, "--max-steps", 2)
    assert {path.read_text() for path in kept} == {"kept"} and not list(tmp_path.glob("*.tmp*"))
    first, last = helpers.logged(tmp_path, "finetune.jsonl")[0], (tmp_path / "eval_finetune.json").read_text()
    assert {"command", "args", "versions", "commit"} <= first.keys() and json.loads(last) == result
    assert Image.open(tmp_path / "finetune_views.png").size[0] > 96


@pytest.mark.parametrize(
    "name, cure",
    [
        ("semi", "--head-lr (now 1000) or --lr (now 0.1), or let --grid choose"),
        ("resnet", "--lr (now 0.1) or --head-lr (now 1000)"),
    ],
)
def test_a_loss_above_that_of_guessing_is_named(name, cure, runs, tmp_path, capsys):
    run(runs[name], tmp_path, "--head-lr", 1000, "--epochs", 1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "guessing" in line]
    ratio = helpers.logged(tmp_path, f"{runs[name][0][5:]}.jsonl")[-2]["loss"] / math.log(10)
    assert f"the loss of the last step is {ratio:.3g} times that of guessing: lower {cure}" in line and ratio > 5
    run(runs[name], tmp_path, "--head-lr", 1000, "--epochs", 7, "--no-resume")
    assert "epochs the loss is" in capsys.readouterr().err


@pytest.mark.parametrize("size, resized", [(16, 16), (64, 64), (96, 110), (448, 448)])
def test_margin_of_the_test_view(size, resized, runs, tmp_path, monkeypatch):
    """None above 224 pixels, as MAE's code has it, and none for small images; else 256/224."""
    for name, script in (("resnet", ft), ("semi", eval_semi)):
        seen = []
        monkeypatch.setattr(script, "validate", lambda run, test, view, args, seen=seen: seen.append(view) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(runs[name], tmp_path / name, "--image-size", size)
        assert seen[0].size == size and seen[0].resized(500, 700) == (resized, resized * 7 // 5)
