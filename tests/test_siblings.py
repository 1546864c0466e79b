"""What pages of two views share: gradients, views that pass apart, moving averages, recipes, mistakes, and copies."""

import copy
import dataclasses
import importlib
import inspect
import math
import pkgutil

import pytest
import torch

import barlowtwins
import byol
import moco
import mocov3
import nnclr
import simclr
import simsiam
import vicreg
from common.resnet import resnet
from tests.helpers import EXACT, SMALL, main, pairs, parsed, refused, rows, state, train, unit

TARGETS = {"backbone.": "target_backbone.", "projector.": "target_projector."}
MODELS = {
    "simsiam": lambda: simsiam.SimSiam(resnet(*SMALL), dim=16, pred_dim=4),
    "simclr": lambda: simclr.SimCLR(resnet(*SMALL), dim=8),
    "barlowtwins": lambda: barlowtwins.BarlowTwins(resnet(*SMALL), hidden_dim=24, dim=10),
    "vicreg": lambda: vicreg.VICReg(resnet(*SMALL), hidden_dim=24, dim=10),
    "nnclr": lambda: nnclr.NNCLR(resnet(*SMALL), dim=8, hidden_dim=12, pred_dim=6, queue=24),
    "byol": lambda: byol.BYOL(resnet(*SMALL), dim=8, hidden_dim=12),
    "moco": lambda: moco.MoCo(resnet(*SMALL), dim=8, queue=24),
    "mocov3": lambda: mocov3.MoCoV3(resnet(*SMALL), dim=8, hidden_dim=12),
    "mocov3-vit": lambda: mocov3.MoCoV3(mocov3.transformer("vit_tiny", 16, 0.25, 4, 2), dim=8, hidden_dim=12),
}
APART = ["simsiam", "barlowtwins", "vicreg", "nnclr", "byol", "mocov3", "mocov3-vit"]
AVERAGED = [name for name in MODELS if name.startswith(("byol", "moco"))]
MOMENTUM = {"byol": "--tau", "moco": "--key-momentum", "mocov3": "--key-momentum"}


def small_model(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def images(batch=4):
    return rows(2, batch, 3, 16, 16, seed=0).unbind()


# ------------------------------------------------------------------------------------------------------- loss
LOSSES = {  # loss, inputs, how many of them, the first ones, are trained
    "simsiam": (simsiam.simsiam_loss, rows(4, 6, 5), 2),
    "simclr": (lambda a, b: simclr.nt_xent(a, b, 0.5), rows(2, 4, 3), 2),
    "byol": (byol.byol_loss, rows(4, 6, 5), 2),
    "barlowtwins": (lambda a, b: barlowtwins.barlow_twins_loss(a, b, 0.3), rows(2, 6, 4), 2),
    "vicreg": (lambda a, b: vicreg.vicreg_loss(a, b, 3, 2, 0.5), rows(2, 6, 4), 2),
    "nnclr": (lambda p1, p2, n1, n2: nnclr.nnclr_loss(n1, n2, p1, p2, 0.5), rows(4, 6, 5), 2),
    "moco": (lambda q, k, queue: moco.info_nce(q, k, queue, 0.2), (unit(3, 8), unit(3, 8, seed=1), unit(9, 8)), 1),
    "mocov3": (lambda *x: mocov3.mocov3_loss(*x, 0.2), rows(4, 6, 5), 2),
}


@pytest.mark.parametrize("script", LOSSES)
def test_gradient_is_right_and_reaches_what_is_trained_only(script):
    loss, inputs, trained = LOSSES[script]
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss(*inputs).backward()
    assert all(x.grad.abs().max() > 0 for x in inputs[:trained]) and all(x.grad is None for x in inputs[trained:])
    rest = [x.detach() for x in inputs[trained:]]
    assert torch.autograd.gradcheck(lambda *x: loss(*x, *rest), inputs[:trained], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("script", [name for name in LOSSES if name != "moco"])
def test_views_may_change_places(script):
    loss, inputs, _ = LOSSES[script]
    swapped = [inputs[i ^ 1] for i in range(len(inputs))]
    assert loss(*swapped).item() == pytest.approx(loss(*inputs).item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------------ views
@pytest.mark.parametrize("name", APART)
def test_views_pass_apart_and_are_normalised_by_their_batch(name):
    """Also through the target, here another network; what running averages hold does not matter."""
    model = small_model(name)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if key.startswith("target_"):
                tensor.add_(torch.randn_like(tensor))
    views = images()
    out = model(*views)
    for i, buffer in enumerate(model.buffers()):
        if buffer.is_floating_point():
            buffer.fill_(1 + i)
    z = [model.projector(model.backbone(x)) for x in views]
    expected = [model.predictor(x) for x in z] if hasattr(model, "predictor") else []
    if hasattr(model, "target_backbone"):
        z = [model.target_projector(model.target_backbone(x)) for x in views]
    torch.testing.assert_close(out, (*expected, *z), rtol=0, atol=1e-12)
    assert len({x.sum().item() for x in out}) == len(out)


def test_views_of_simclr_pass_together():
    model, (x1, x2) = small_model("simclr"), images()
    assert not torch.allclose(model(x1, x2)[0], model(x1, 5 * x2 + 3)[0])


# --------------------------------------------------------------------------------------------- moving average
@pytest.mark.parametrize("name", AVERAGED)
def test_target_starts_as_a_copy_and_no_gradient_reaches_it(name):
    model = small_model(name)
    values = model.state_dict()
    both = pairs(values, TARGETS)
    assert len(both) == sum(key.startswith("target_") for key in values) > 30
    for online, target in both:
        assert torch.equal(values[online], values[target]), online
        assert values[online].data_ptr() != values[target].data_ptr(), online
    out = model(*images(), torch.arange(4)) if name == "moco" else model(*images())
    trained = 1 if name == "moco" else 2
    assert [x.requires_grad for x in out] == [True] * trained + [False] * (len(out) - trained)
    sum(x.square().sum() + x[:, 0].sum() for x in out[:trained]).backward()
    fixed = {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    for key, p in model.named_parameters():
        assert p.requires_grad is not (key.startswith("target_") or (name == "mocov3-vit" and key in fixed)), key
        assert (p.grad is None) is not p.requires_grad, key


@pytest.mark.parametrize("name", AVERAGED)
def test_moving_average_moves_parameters_but_no_buffers(name):
    model = small_model(name)
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():  # everything differs between the networks, statistics too
        value.copy_(torch.rand(value.shape, generator=generator) * 100)
    before = copy.deepcopy(model.state_dict())
    model.update_target(0.75)
    after, parameters, both = model.state_dict(), dict(model.named_parameters()), pairs(before, TARGETS)
    for online, target in both:
        expected = 0.75 * before[target] + 0.25 * before[online] if target in parameters else before[target]
        torch.testing.assert_close(after[target], expected, rtol=1e-12, atol=0, msg=target)
    assert [key for key in before if key not in dict(both).values() and not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("script", MOMENTUM)
def test_order_of_a_step(script, accum, tmp_path, monkeypatch):
    """BYOL averages once after the optimiser's step, the MoCos once before the keys; against a slow loop over the
    weights that the online network had at each call."""
    calls = []
    model = {"byol": byol.BYOL, "moco": moco.MoCo, "mocov3": mocov3.MoCoV3}[script]
    order = ["update_target", *["forward"] * accum]
    order = {"byol": order[::-1], "moco": [*order, "enqueue"], "mocov3": order}[script]
    for name in set(order):
        original = getattr(model, name)

        def record(self, *args, original=original, name=name):
            calls.append((name, {n: p.detach().clone() for n, p in self.named_parameters()}))
            return original(self, *args)

        monkeypatch.setattr(model, name, record)
    words = [*EXACT, "--max-steps", 4, "--accum", accum, MOMENTUM[script], 0.6, "--lr", 5, "--warmup-epochs", 0]
    saved = train(script, tmp_path, *words)["model"]
    assert [name for name, _ in calls] == order * 4
    start = calls[0][1]
    expected = {target: start[online] for online, target in pairs(start, TARGETS)}
    rate = iter([0.6] * 4 if script == "moco" else [1 - 0.4 * (math.cos(math.pi * k / 16) + 1) / 2 for k in range(4)])
    for name, seen in [*calls, ("end", saved)]:
        for target, value in expected.items():
            torch.testing.assert_close(seen[target], value, rtol=0, atol=1e-12, msg=target)
        if name == "update_target":
            m, last = next(rate), seen
            expected = {t: m * expected[t] + (1 - m) * seen[o] for o, t in pairs(seen, TARGETS)}
    before, after, end = (state["projector.0.weight"] for state in (start, last, saved))
    assert torch.equal(after, end) is (script == "byol") and not torch.equal(before, end)
    passes = {v.item() for name, v in saved.items() if name.endswith("num_batches_tracked")}
    assert passes == {4 * accum * (1 if script == "moco" else 2)}  # of either network: it normalises each view once


@pytest.mark.parametrize("script", MOMENTUM)
def test_loaded_weights_start_both_networks_and_the_online_one_is_exported(script, tmp_path):
    """With a momentum of 1 the target stays what --init made it: the online network of the file, to the bit."""
    first = train(script, tmp_path / "a", "--max-steps", 3, "--lr", 5)["model"]
    words = ["--max-steps", 3, "--lr", 5, MOMENTUM[script], 1, "--init", tmp_path / "a" / "last.pt"]
    second = train(script, tmp_path / "b", *words)["model"]
    names = pairs((n for n, p in small_model(script).named_parameters()), TARGETS)
    assert [t for o, t in names if not torch.equal(second[t], first[o])] == []
    assert sum(not torch.equal(second[o], first[o]) for o, _ in names) > len(names) / 2
    exported = state(tmp_path / "b", "backbone.pt")["backbone"]
    assert [n for n, v in exported.items() if not torch.equal(v, second[f"backbone.{n}"])] == []


@pytest.mark.parametrize("page", [byol, mocov3])
def test_momentum_rises_from_its_start_to_one(page):
    values = [page.target_momentum(k, 100, 0.99) for k in range(101)]
    assert (values[0], values[50], values[100]) == pytest.approx((0.99, 0.995, 1), abs=1e-15)
    assert values[25] == pytest.approx(1 - 0.005 * (1 + math.sqrt(0.5)), abs=1e-15) and values == sorted(values)


# ---------------------------------------------------------------------------------------------------- recipes
MOCO = {"lr": 0.03, "batch_size": 256, "weight_decay": 1e-4, "epochs": 200, "dim": 128, "key_momentum": 0.999}
RECIPES = {
    "simsiam": {"lr": 0.05, "batch_size": 512, "weight_decay": 1e-4, "epochs": 100, "dim": 2048, "pred_dim": 512},
    "simclr": {"lr": 0.3, "batch_size": 4096, "weight_decay": 1e-6, "epochs": 1000, "warmup_epochs": 10, "dim": 128}
    | {"temperature": 0.1, "lr_rule": "linear", "crop_min": 0.08},
    "byol": {"lr": 0.2, "batch_size": 4096, "weight_decay": 1.5e-6, "epochs": 1000, "warmup_epochs": 10, "dim": 256}
    | {"hidden_dim": 4096, "tau": 0.996, "optimizer": "lars", "crop_min": 0.08},
    "barlowtwins": {"lr": 0.2, "batch_size": 2048, "weight_decay": 1e-6, "epochs": 1000, "warmup_epochs": 10}
    | {"dim": 8192, "hidden_dim": 8192, "lambd": 0.0051, "lr_biases": 0.0048, "scale_loss": 1 / 16}
    | {"optimizer": "lars", "crop_min": 0.08},
    "vicreg": {"lr": 0.2, "batch_size": 2048, "weight_decay": 1e-6, "epochs": 1000, "warmup_epochs": 10, "dim": 8192}
    | {"hidden_dim": 8192, "sim_coeff": 25, "std_coeff": 25, "cov_coeff": 1, "crop_min": 0.08},
    "nnclr": {"lr": 0.3, "batch_size": 4096, "weight_decay": 1e-6, "epochs": 1000, "warmup_epochs": 10, "dim": 256}
    | {"hidden_dim": 2048, "pred_dim": 4096, "temperature": 0.1, "queue": None, "crop_min": 0.08},
    "directclr": {"lr": 0.3, "batch_size": 4096, "weight_decay": 1e-6, "epochs": 100, "warmup_epochs": 10, "d0": None}
    | {"temperature": 0.1},
    "pixpro": {"lr": 1.0, "batch_size": 1024, "weight_decay": 1e-5, "epochs": 100, "warmup_epochs": 5, "dim": 256}
    | {"hidden_dim": 4096, "power": 2, "threshold": 0.7, "tau": 0.99, "transform_layers": 1},
    "moco_ft": MOCO | {"temperature": 0.2, "head": "mlp", "pos_alpha": 2.0, "neg_alpha": 1.6},
    "moco": MOCO | {"temperature": 0.2, "head": "mlp"},
    "moco --v1": MOCO | {"temperature": 0.07, "head": "linear"},
    "moco --v1 --head mlp --temperature 0.1": {"head": "mlp", "temperature": 0.1},
}


@pytest.mark.parametrize("words", RECIPES)
def test_defaults_are_the_papers(words):
    args = vars(parsed(*words.split(), "--data", "/imagenet"))
    expected = {"arch": "resnet50", "momentum": 0.9, "warmup_epochs": 0, "image_size": 224} | RECIPES[words]
    assert {name: args[name] for name in expected} == expected


BYOL = {"jitter": (0.4, 0.4, 0.2, 0.1), "blur_p": 1.0, "area": (0.08, 1.0), "interpolation": "bicubic"}
SIMCLR = {"area": (0.08, 1.0), "interpolation": "bicubic", "mean": (0.0,) * 3, "std": (1.0,) * 3}
SECOND = {"blur_p": 0.1, "solarize_p": 0.2}
VIEWS = {  # settings of the page; how both views differ from those of MoCo v2; how the second differs from the first
    "simsiam": ({}, {}, {}),
    "simclr": ({"strength": 0.5}, SIMCLR | {"jitter": (0.4, 0.4, 0.4, 0.1)}, {}),
    "simclr 1.0": ({}, SIMCLR | {"jitter": (0.8, 0.8, 0.8, 0.2)}, {}),
    "byol": ({}, BYOL, SECOND),
    "barlowtwins": ({}, BYOL, SECOND),
    "vicreg": ({}, BYOL, SECOND),
    "nnclr": ({}, BYOL, SECOND),
    "moco": ({}, {}, {}),
    "moco v1": ({"v1": True}, {"jitter": (0.4,) * 4, "jitter_p": 1.0, "gray_first": True, "blur_p": 0.0}, {}),
    "mocov3": ({}, BYOL | {"area": (0.2, 1.0), "interpolation": "bilinear"}, SECOND),
    "pixpro": ({}, BYOL | {"interpolation": "bilinear"}, SECOND),
    "directclr": ({}, BYOL, SECOND),
    "moco_ft": ({}, {}, {}),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_follow_the_recipe(name):
    settings, changes, second = VIEWS[name]
    augmentation = importlib.import_module(name.split()[0]).augmentation
    view = {"size": 224, "area": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "interpolation": "bilinear", "flip": 0.5}
    view |= {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.2, "gray_first": False, "blur_p": 0.5}
    view |= {"blur_sigma": (0.1, 2.0), "solarize_p": 0.0, "lighting": 0.0}
    view |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)} | changes
    assert [dataclasses.asdict(v) for v in augmentation(224, **settings)] == [view, view | second]
    small = {"size": 32, "area": (0.3, 1.0), "flip": 0.0, "blur_p": 0.0}  # no blur; the flags reach both views
    views = [dataclasses.asdict(v) for v in augmentation(32, 0.3, 0.0, **settings)]
    assert views == [view | small, view | second | small]


@pytest.mark.parametrize("words", ["simclr", "byol", "byol --optimizer sgd", "barlowtwins", "vicreg", "mocov3"])
def test_optimisers_decay_weights_only(words, tmp_path):
    script, *more = words.split()
    saved = train(script, tmp_path, *more, "--max-steps", 1, "--lr", 0.4, "--weight-decay", 0.003)
    weights, others = saved["optimizer"]["param_groups"]
    assert (weights["weight_decay"], others["weight_decay"]) == (0.003, 0)
    assert (weights["adapt"], others["adapt"], weights["momentum"], others["momentum"]) == (True, False, 0.9, 0.9)
    assert weights.get("trust") == (None if more else 0.001)
    trained = [p.ndim > 1 for p in small_model(script).parameters() if p.requires_grad]
    assert (len(weights["params"]), len(others["params"])) == (sum(trained), len(trained) - sum(trained))


@pytest.mark.parametrize(
    "words, message",
    [
        ("byol --optimizer sgd --lr 0.1", "--optimizer sgd needs --lr and --weight-decay"),
        ("byol --tau 1.5", "--tau: must be at most 1"),
        ("byol --tau nan", "--tau: expected a finite number"),
        ("moco --key-momentum 1.5", "--key-momentum: must be at most 1"),
        ("moco --temperature 0", "--temperature: must be greater than 0"),
        ("moco --queue -1", "--queue: must be greater than 0"),
        ("moco --dim 0", "--dim: must be greater than 0"),
        ("moco --bn-splits 3", "--bn-splits 3: 16 images on 1 processes"),
        ("mocov3 --optimizer adamw --lr 0.1", "--optimizer adamw needs --lr and --weight-decay"),
        ("mocov3 --arch vit_small --optimizer lars", "those of the table are for adamw"),
        ("mocov3 --key-momentum -1", "--key-momentum: must be at least 0"),
        ("mocov3 --patch-size 4", "--patch-size is for ViTs"),
        ("mocov3 --train-patch-embed", "--train-patch-embed is for ViTs"),
        ("mocov3 --temperature 0", "--temperature: must be greater than 0"),
        ("mocov3 --batch-size 4 --accum 4", "needs 2 images or more"),
        (
            "mocov3 --arch vit_tiny --epochs 20 --warmup-epochs 40",
            "--warmup-epochs 40 must be smaller than --epochs 20",
        ),
        ("mocov3 --arch vit_tiny --image-size 16 --patch-size 5", "choose 15 or 20, or --patch-size"),
        ("mocov3 --arch vit_giant", "vit_huge"),
        ("dino --arch vit_giant --image-size 224", "vit_huge"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    script, *more = words.split()
    assert message in refused(capsys, main, script, "--data", "fake:64", "--batch-size", 16, "--out", tmp_path, *more)


# ----------------------------------------------------------------------------------------------------- copies
AVERAGES = "byol.BYOL pixpro.PixPro moco.MoCo moco_ft.MoCoFT mocov3.MoCoV3 densecl.DenseCL interclr.InterCLR"
COPIES = {
    **dict.fromkeys("reset_target update_target".split(), f"{AVERAGES} simclrv2.SimCLRv2"),
    "target_momentum": "byol pixpro mocov3 obow",
    "key_order": "moco moco_ft densecl interclr",
    "enqueue": "moco.MoCo moco_ft.MoCoFT interclr.InterCLR simclrv2.SimCLRv2",
    "info_nce": "moco densecl",
    "own_share": "interclr scan",
    **dict.fromkeys("patchify unpatchify statistics".split(), "mae cae"),
    **dict.fromkeys("hog default_cell".split(), "maskfeat cae"),
    **dict.fromkeys("Head augmentation teacher_temp collapsed clip_each".split(), "dino esvit ibot"),
    "entropies": "dino esvit",
    "dino_loss": "dino ibot",
    **dict.fromkeys("reset_teacher update_teacher".split(), "dino.DINO simdino.SimDINO ibot.iBOT"),
    "forward": "dino.DINO simdino.SimDINO",
    "update_centers": "esvit.EsViT ibot.iBOT",
    "transformer": "dino simdino ibot",
    "half_cosine": "dino esvit ijepa ibot",
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_equal(name):
    sources = [inspect.getsource(pkgutil.resolve_name(f"{holder}.{name}")) for holder in COPIES[name].split()]
    assert len(sources) > 1 and len(set(sources)) == 1
