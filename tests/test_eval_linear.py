"""Linear evaluation: protocols, optimisers and schedules against NumPy, heads beside each other, resume, bad input."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from scipy import stats

import eval_linear
from common import augment, rng
from common.augment import View
from common.checkpoint import load_backbone
from common.datasets import open_dataset, open_labelled
from common.features import pool_stage
from common.optim import precision
from common.resnet import resnet
from common.vit import ViT, vit
from eval_linear import PROTOCOLS, Head, Probe, Protocol, adapt, features, fit, held_out, schedule, standardize
from tests.helpers import (
    SCRIPTS,
    SMALL,
    assert_close,
    different,
    launch,
    logged,
    main,
    refused,
    state,
    write_colours,
    write_images,
    write_vit,
)

TINY = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 0 --log-every 1 --seed 3".split()
NO_AMP = precision("fp32", torch.device("cpu"))[0]
SHORT = {  # several batch sizes, lengths, optimisers and views, all in seconds: batches of 8, 16 and 32
    "moco": {"batch": 8, "epochs": 2, "drops": (1,), "lr": 3.0},
    "simsiam": {"batch": 32, "epochs": 3},
    "mae": {"batch": 16, "epochs": 3, "warmup": 1},
    "multihead": {"batch": 16, "epochs": 2, "drops": (1,)},
}


@pytest.fixture
def short(monkeypatch):
    """Protocols for 64 images, of which the loader delivers 8 at a time."""
    table = {name: dataclasses.replace(PROTOCOLS[name], **changes) for name, changes in SHORT.items()}
    monkeypatch.setattr(eval_linear, "PROTOCOLS", table)
    monkeypatch.setattr(eval_linear, "MICRO", 8)


def run(out, *words, source="fake:64"):
    """(result, saved probes) of the script, run in this process."""
    result = main("eval_linear", *TINY, "--data", source, "--out", out, *words)
    return result, state(out, "linear_last.pt")["probes"]


# -------------------------------------------------------------------------------------------------- protocols
def test_total_learning_rates_of_the_published_protocols():
    totals = {name: p.lr * p.batch / 256 for name, p in PROTOCOLS.items()}
    expected = {"moco": 30, "simsiam": 1.6, "swav": 0.3, "barlow": 0.3, "mocov3": 12, "mae": 6.4, "dino": 0.004}
    assert totals == pytest.approx(
        expected | {"multihead": 0.01, "simclr": 1.6, "byol": 0.8, "obow": 10, "directclr": 0.1}
    )
    assert {n for n, p in PROTOCOLS.items() if p.batch % eval_linear.MICRO} == set()
    assert adapt("mocov3", resnet(*SMALL)).lr * 4 == pytest.approx(0.4)  # its ResNet-50
    large = ViT(1024, 0, 16, 8, 16)
    assert adapt("mae", large).epochs == 50 and adapt("mae", ViT(24, 1, 2, 8, 16)).epochs == 90


def test_protocol_of_a_method():
    assert {name.replace("_", "") for name in SCRIPTS} <= eval_linear.AUTO.keys()
    assert set(eval_linear.AUTO.values()) <= PROTOCOLS.keys()
    spelt = {"MoCo": "moco", "MMSelfSup, MoCo v3": "mocov3", "Barlow Twins": "barlow", "DINO": "dino", "byol": "byol"}
    spelt |= {"simclr": "simclr", "one of Barlow Twins, VICReg": "barlow", "VICReg or Barlow Twins": "barlow"}
    assert {name: eval_linear.auto(name, resnet(*SMALL)) for name in spelt} == {k: (v, "") for k, v in spelt.items()}


def test_a_guessed_protocol_says_so():
    """A flat file, of Barlow Twins, VICReg or DINO, has no name, and that of a library tells no method."""
    guesses = {"unknown": "swav", "solo-learn": "swav", "": "swav", "one of VICReg, SCAN": "barlow"}
    guesses |= {"MMSelfSup": "swav", "one of MoCo, SwAV": "moco"}
    for method, expected in guesses.items():
        name, why = eval_linear.auto(method, resnet(*SMALL))
        shown = f" ({method})" if " " in method or method in ("solo-learn", "MMSelfSup") else ""
        assert name == expected and why.startswith(f"method unknown{shown}, protocol {name} is a guess")
    name, why = eval_linear.auto("random", resnet(*SMALL))
    assert name == "swav" and "random network has none" in why and "is a guess" in why


@pytest.mark.parametrize("positions, expected", [("sincos-xy", "mae"), ("sincos-yx", "mocov3"), ("learned", "dino")])
def test_flat_files_of_vits_are_told_by_their_positions(positions, expected, tmp_path):
    """MAE's encoders, published without a decoder, have a fixed table. That of DINO and timm is learned."""
    network = vit("vit_tiny", 32, heads=3, depth=1, patch_size=8, positions=positions)
    torch.save({"model": network.state_dict()}, tmp_path / "flat.pt")
    backbone, meta = load_backbone(tmp_path / "flat.pt")
    name, why = eval_linear.auto(meta["method"], backbone)
    assert name == expected and ("is a guess" in why) == (positions == "learned")
    assert eval_linear.auto("random", backbone)[1]


def rates(protocol, steps, *at):
    return [schedule(protocol, step, steps) for step in at]


def test_schedules():
    moco, small = PROTOCOLS["moco"], resnet(*SMALL)
    assert rates(moco, 10, 0, 599, 600, 799, 800, 999) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    simsiam = PROTOCOLS["simsiam"]  # per epoch: epoch 30 of 90 is cos(60 degrees)
    last = (1 - math.cos(math.pi / 90)) / 2
    assert rates(simsiam, 7, 0, 6, 210, 216, 315, 89 * 7) == pytest.approx([1, 1, 0.75, 0.75, 0.5, last])
    mae = PROTOCOLS["mae"]  # per step: 10 epochs up, 80 down
    assert rates(mae, 8, 0, 1, 40, 80, 400, 720) == pytest.approx([0, 1 / 80, 0.5, 1, 0.5, 0])
    brief = adapt("moco", small, epochs=10)
    assert brief.epochs == 10 and rates(brief, 3, 17, 18, 23, 24) == pytest.approx([1, 0.1, 0.1, 0.01])
    assert adapt("mae", small, epochs=9).warmup == pytest.approx(1)
    places = adapt("multihead", small, epochs=28, drops=(7.0, 14.0, 21.0))
    assert rates(places, 1, 6, 7, 14, 27) == pytest.approx([1, 0.1, 0.01, 0.001])
    assert adapt("swav", small, drops=(1.0,)).drops == ()


def test_loader_batch_divides_every_batch():
    assert eval_linear.micro_batch([256, 4096, 16384, 1024]) == 256
    assert eval_linear.micro_batch([32]) == 32 and eval_linear.micro_batch([512]) == 256
    assert eval_linear.micro_batch([300]) == 150


# --------------------------------------------------------------------------------------------------- features
def test_pooled_stages():
    """As the table of Goyal et al.'s heads has them; a map of other size comes to the same number. conv1: the first
    window holds 6 x 6 pixels and padding, which counts. layer1: windows of 16, 8 apart."""
    table = {(64, 112): 9216, (256, 56): 9216, (512, 28): 8192, (1024, 14): 9216, (2048, 7): 8192}
    for (channels, side), numbers in table.items():
        for size in (side, side + 1):
            assert pool_stage(torch.zeros(2, channels, size, size)).flatten(1).shape == (2, numbers)
    assert pool_stage(torch.ones(1, 64, 112, 112))[0, 0, 0, :3].tolist() == pytest.approx([0.6 * 0.6, 0.6, 0.6])
    x = torch.randn(1, 256, 56, 56)
    torch.testing.assert_close(pool_stage(x)[0, 5, 2, 4], x[0, 5, 16:32, 32:48].mean())
    maps = resnet("resnet18", 0.25, 32).stages(torch.randn(1, 3, 32, 32))
    sizes = [(16, 24), (16, 24), (32, 16), (64, 8), (128, 4)]
    assert [tuple(pool_stage(m).shape[1:]) for m in maps] == [(channels, side, side) for channels, side in sizes]


def test_features_of_a_resnet():
    torch.manual_seed(0)
    backbone, x = resnet(*SMALL).eval(), torch.randn(3, 3, 16, 16)
    found = features(backbone, x, {"pool", "stages"}, NO_AMP)
    assert torch.equal(found["pool"][0], backbone(x)) and not found["pool"][0].requires_grad
    torch.testing.assert_close(found["stages"][4].mean((2, 3)), found["pool"][0])
    half = features(backbone, x, {"pool"}, torch.autocast("cpu", torch.bfloat16))
    assert half["pool"][0].dtype == torch.float32


def test_features_of_a_vit():
    torch.manual_seed(0)
    backbone, x, outputs = ViT(24, 5, 2, 8, 16).eval(), torch.randn(3, 3, 16, 16), []
    for block in backbone.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    found = features(backbone, x, {"pool", "cls", "blocks"}, NO_AMP)
    blocks = [backbone.norm(o)[:, 0] for o in outputs[-5:]]
    torch.testing.assert_close(found["blocks"][0], torch.cat(blocks[1:], 1))
    assert torch.equal(found["cls"][0], blocks[-1]) and torch.equal(found["pool"][0], found["cls"][0])
    alone = features(backbone, x, {"cls"}, NO_AMP)
    assert alone.keys() == {"cls"} and torch.equal(alone["cls"][0], found["cls"][0])
    base = ViT(768, 2, 12, 8, 16).eval()
    tokens = base.tokens(x)
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(features(base, x, {"blocks"}, NO_AMP)["blocks"][0], expected)


# ---------------------------------------------------------------------------------------------------- lighting
def test_lighting_equals_the_formula():
    """x + sum_k alpha_k scale_k axis_k, alpha normal with the given deviation; nothing is clipped."""
    axes, scales = np.array(augment.PCA_AXES), np.array([0.2175, 0.0188, 0.0045])
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-3)
    n, view = 6, View(8, flip=0.0, lighting=0.5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    u = rng.uniforms(1, 2, range(n), 0, augment.DRAWS)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plan = [(name, torch.from_numpy(rows), torch.from_numpy(a)) for name, rows, a in view.plan(u)]
    ours = augment.augment(images, plan, view.mean, view.std)
    a, b, c, d = u[:, 36:40].T
    radii, angles = np.sqrt(-2 * np.log(1 - np.stack([a, c, a], 1))), 2 * np.pi * np.stack([b, d, b], 1)
    alpha = radii * np.concatenate([np.cos(angles[:, :2]), np.sin(angles[:, 2:])], 1)
    shift = 0.5 * (alpha * scales) @ axes.T
    expected = images.double() / 255 + torch.from_numpy(shift)[:, :, None, None]
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (view.mean, view.std))
    torch.testing.assert_close(ours.double(), (expected - mean) / std, atol=1e-5, rtol=0)
    assert abs(shift).max() > 0.05


def test_lighting_is_normal_and_moves_no_other_draw():
    z = rng.normals(rng.uniforms(0, 0, range(20_000), 0, augment.DRAWS)[:, 36:40])
    assert min(stats.kstest(z[:, k], "norm").pvalue for k in range(4)) > 1e-3
    np.testing.assert_allclose(np.corrcoef(z.T), np.eye(4), atol=0.04)
    few, all_draws = (rng.uniforms(0, 1, range(9), 2, n) for n in (36, augment.DRAWS))
    np.testing.assert_array_equal(all_draws[:, :36], few)
    plain, light = View(8, jitter=(0.4,) * 4, jitter_p=0.5), View(8, jitter=(0.4,) * 4, jitter_p=0.5, lighting=0.1)
    u = rng.uniforms(0, 0, range(50), 0, augment.DRAWS)
    plan = light.plan(u)
    assert [s[0] for s in plan[-3:]] == ["red", "green", "blue"]
    for (a, rows_a, amounts_a), (b, rows_b, amounts_b) in zip(plain.plan(u), plan[:-3], strict=True):
        assert a == b and (rows_a == rows_b).all() and (amounts_a == amounts_b).all()


# ------------------------------------------------------------------------------------------------ classifiers
def test_batch_norm_of_heads_has_no_parameters():
    head = Head([(4, 3, 3), (6, 2, 2)], 10, norm=1e-5)
    assert [tuple(p.shape) for p in head.parameters()] == [(10, 36), (10,), (10, 24), (10,)]
    assert [type(m).__name__ for m in head.modules()].count("BatchNorm2d") == 2
    wide = Head([(2048,)], 100)
    weight, bias = wide.parameters()
    assert weight.std().item() == pytest.approx(0.01, rel=0.02) and not bias.any()
    normed = Head([(2048,)], 100, norm=1e-6)
    assert len(list(normed.parameters())) == 2 and normed.parts[0][0].eps == 1e-6


def slow_training(weight, bias, x, labels, batches, protocol, rate):
    """The optimisers in NumPy: softmax regression, whole batches. Returns weight and bias after the last step."""
    params, buffers = [weight, bias], [np.zeros_like(weight), np.zeros_like(bias)]
    for step, rows in enumerate(batches):
        logits = x[rows] @ params[0].T + params[1]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(rows)), labels[rows]] -= 1
        grads = [p.T @ x[rows] / len(rows), p.mean(0)]
        for k in range(2):
            w, lars = params[k], protocol.optimiser.startswith("lars")
            decay = protocol.weight_decay * (k == 0 or protocol.optimiser != "lars-weights")
            g = grads[k] + decay * w
            if lars and (k == 0 or protocol.optimiser == "lars-all") and np.linalg.norm(w) > 0:
                g = g * 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
            buffers[k] = g if step == 0 and not lars else 0.9 * buffers[k] + g
            params[k] = w - rate(step) * (g + 0.9 * buffers[k] if protocol.optimiser == "nesterov" else buffers[k])
    return params


@pytest.mark.parametrize("micro", [32, 8])
@pytest.mark.parametrize("optimiser", ["sgd", "nesterov", "lars-all", "lars-weights"])
def test_training_equals_numpy(optimiser, micro):
    """Whole batches in NumPy against micro-batches of 32 (all of it) and 8, bias of norm 0 included."""
    generator = np.random.default_rng(0)
    x, labels = generator.standard_normal((96, 7)), generator.integers(0, 4, 96)
    protocol = Protocol(32, 2, optimiser, 4.0, 1e-2)  # total rate 0.5, cosine per epoch: 1, then 1/2
    probe = Probe("any", protocol, 4.0, (0, 0), [(7,)], 4, 112, micro, dtype=torch.float64)
    start = [p.detach().numpy().copy() for p in probe.parameters]
    assert not start[1].any() and probe.steps == 3
    for epoch in range(2):
        for index in range(112 // micro):  # 112 images: the 16 left at the end of the epoch are not used
            rows = np.arange(index * micro, index * micro + micro) % 96
            found = {(0, "pool"): [torch.from_numpy(x[rows])]}
            probe.learn(found, torch.from_numpy(labels[rows]), epoch, index)
    batches = [np.arange(i * 32, i * 32 + 32) for i in range(3)] * 2
    expected = slow_training(*start, x, labels, batches, protocol, lambda step: 0.5 if step < 3 else 0.25)
    for p, e in zip(probe.parameters, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), e, atol=1e-12)
    assert np.abs(expected[1]).max() > 0 and np.abs(expected[0] - start[0]).max() > 1e-6


def test_accuracy_counts():
    """Against NumPy's sorting, with fewer than five classes, and with a classifier that gives no numbers."""
    torch.manual_seed(0)
    x, labels = torch.randn(50, 6), torch.randint(0, 8, (50,))
    protocol = Protocol(4, 1, "sgd", 1.0, 0.0)
    probe = Probe("any", protocol, 1.0, (0, 0), [(6,)], 8, 50, 2)
    source = type("Source", (), {"test": lambda self, probes: iter([({(0, "pool"): [x]}, labels)])})()
    ((top1, top5),) = eval_linear.evaluate(source, [probe])[probe]
    order = np.argsort(-probe.head([x])[0].detach().numpy(), axis=1)
    hit = order == labels.numpy()[:, None]
    assert top1 == pytest.approx(2 * hit[:, 0].sum()) and top5 == pytest.approx(2 * hit[:, :5].sum())
    assert 0 < top1 < top5 < 100 and probe.head.training
    probe.parameters[0].data.fill_(math.nan)
    assert eval_linear.evaluate(source, [probe])[probe] == [[0.0, 0.0]]


# ------------------------------------------------------------------------------------------------- whole runs
def test_heads_do_not_affect_each_other(short, tmp_path):
    """Batches of 8, 16 and 32, five views, in one pass and one at a time: the same bits."""
    result, together = run(tmp_path / "all", "--protocol", ",".join(SHORT), "--lr", "0.5,2")
    assert len(together) == 8 and len(result["heads"]) == 6 + 2 * 5
    for name in SHORT:
        alone_result, alone = run(tmp_path / name, "--protocol", name, "--lr", 2)
        assert list(alone) == [f"{name} lr 2"]
        assert different(alone[f"{name} lr 2"], together[f"{name} lr 2"]) == []
        assert alone_result["heads"].items() <= result["heads"].items()
    assert different(together["moco lr 2"]["head"], together["moco lr 0.5"]["head"]) != []
    assert [e for e, _ in together["moco lr 2"]["results"]] == [1, 2]  # a shorter protocol just stops
    assert [e for e, _ in together["mae lr 2"]["results"]] == [1, 2, 3]


@pytest.mark.parametrize("stop_at", [5, 16, 24])
def test_interrupted_run_equals_uninterrupted(stop_at, short, tmp_path, monkeypatch):
    """A signal in the middle of a batch that is still being summed up, at the end of an epoch, and of the last one."""
    words = ["--protocol", ",".join(SHORT)]
    result, whole = run(tmp_path / "a", *words)
    real, calls = eval_linear.Source.epoch, []

    def epoch(self, *rest):
        for batch in real(self, *rest):
            calls.append(1)
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(eval_linear.Source, "epoch", epoch)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "b", *words)
    assert stop.value.code == 75 and len(calls) == stop_at
    continued, parts = run(tmp_path / "b", *words)
    assert len(calls) == 3 * 8
    assert different(whole, parts) == [] and continued == result
    again, _ = run(tmp_path / "b", *words)  # complete: nothing is trained again
    assert len(calls) == 3 * 8 and again == result
    assert json.loads((tmp_path / "b/eval_linear.json").read_text()) == result


def test_a_rate_that_ends_above_chance_is_named_once(short, tmp_path, capsys):
    run(tmp_path, "--protocol", "moco,multihead", "--lr", "0.001,1e5")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    for name, line in zip(("moco", "multihead"), warnings, strict=True):
        assert f"the loss of {name} lr 100000 is" in line and "that of chance 2.303: lower --lr" in line
        assert "--protocol small" in line


def test_max_steps_evaluates_and_goes_on(short, tmp_path):
    words = ["--protocol", "moco,mae"]
    result, whole = run(tmp_path / "a", *words)
    for _ in range(2):  # the second time there is nothing left to do but to evaluate
        cut, _ = run(tmp_path / "b", *words, "--max-steps", 11)
        assert not cut["complete"] and cut["heads"]["mae lr 0.1"]["last"]["epoch"] == 1.375
    continued, parts = run(tmp_path / "b", *words)
    assert continued == result and result["complete"] and different(whole, parts) == []


def test_epochs_between_evaluations(short, tmp_path):
    """The last epoch of a protocol is evaluated whatever --val-every is."""
    _, probes = run(tmp_path, "--protocol", "moco,mae", "--val-every", 3)
    assert [[e for e, _ in p["results"]] for p in probes.values()] == [[2], [3]]


TWICE = {  # two micro-batches per step and synchronised batch norm; 102 test images are one batch: a process has none
    "accumulated": (512, "--protocol simsiam,multihead --batch-size 512 --epochs 1 --precision fp64".split()),
    "two protocols": (64, "--protocol moco,mae --batch-size 16 --epochs 2 --precision fp64".split()),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    jobs = {k: [*TINY, "--data", f"fake:{n}", "--out", folder / k, *words] for k, (n, words) in TWICE.items()}
    jobs["small"] = [*TINY, "--data", "fake:64", "--out", folder / "small", "--epochs", 2]
    launch(*(("eval_linear", words) for words in jobs.values()))
    return folder


@pytest.mark.parametrize("kind", TWICE)
def test_two_processes_equal_one(kind, two_processes, tmp_path):
    images, words = TWICE[kind]
    result, one = run(tmp_path, *words, source=f"fake:{images}")
    assert_close(one, state(two_processes / kind, "linear_last.pt")["probes"], atol=1e-8, rtol=1e-7)
    assert json.loads((two_processes / kind / "eval_linear.json").read_text()) == result


def test_two_processes_equal_one_on_a_small_set(two_processes, tmp_path):
    result = main("eval_linear", *TINY, "--data", "fake:64", "--out", tmp_path, "--epochs", 2)
    assert json.loads((two_processes / "small" / "eval_linear.json").read_text()) == result


def test_backbone_stays_as_it_is(short, tmp_path, monkeypatch):
    backbones, real = [], eval_linear.load_pretrained
    monkeypatch.setattr(eval_linear, "load_pretrained", lambda *a: backbones.append(real(*a)) or backbones[0])
    fresh = real(eval_linear.parse_args([*TINY, "--data", "fake:64"]))[0].state_dict()
    run(tmp_path, "--protocol", "moco,multihead")
    assert different(fresh, backbones[0][0].state_dict()) == []


@pytest.mark.parametrize("tamper", [lambda b: b.bn1.running_mean.add_(1e-6), lambda b: b.layer1.train()])
def test_a_changed_backbone_is_an_error(tamper, short, tmp_path, monkeypatch, capsys):
    real = eval_linear.features
    monkeypatch.setattr(eval_linear, "features", lambda b, *rest: (real(b, *rest), tamper(b))[0])
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--protocol", "moco", "--lr", 0.1)
    assert stop.value.code == 1 and "backbone has changed" in capsys.readouterr().err
    assert not (tmp_path / "eval_linear.json").exists()


def test_digits_are_learned(tmp_path, capsys):
    """Handwritten digits are nearly separable even in the first stage of a random network: chance is 10."""
    words = ["--protocol", "multihead", "--batch-size", 32, "--epochs", 2]
    result, _ = run(tmp_path, *words, source="digits")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    assert result["best"]["top1"] > 60 and result["best"]["head"].startswith("multihead lr 0.01 feat")
    best = max(row["best"]["top1"] for row in result["heads"].values())
    assert result["best"]["top1"] == best and any("best" in line and result["best"]["head"] in line for line in lines)


def test_large_sets_take_the_protocol_of_the_method(tmp_path, monkeypatch, capsys):
    """A guess stands in the output and in the result."""
    monkeypatch.setattr(eval_linear, "SMALL", 32)
    words = ["--arch", "vit_tiny", "--width", 0.25, "--batch-size", 32, "--epochs", 1]
    result, _ = run(tmp_path, *words, source="fake:32")
    assert list(result["heads"]) == ["dino lr 0.001"] and "protocol dino is a guess" in result["note"]
    assert "protocol    dino: a random network" in capsys.readouterr().out
    words = ["--pretrained", write_vit(tmp_path / "mae.pt"), *TINY[6:], "--data", "fake:32", "--out", tmp_path / "mae"]
    result = main("eval_linear", *words, "--batch-size", 32, "--epochs", 1)
    assert list(result["heads"]) == ["mae lr 0.1"] and "guess" not in result["note"]
    assert "protocol    mae: that of mae" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- small sets
def small(out, *words, data="fake:64"):
    """The result of the script, which takes the protocol for small sets by itself."""
    return main("eval_linear", *TINY, "--data", data, "--out", out, *words)


def test_a_tenth_is_held_out_evenly():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), 30))
    held = held_out(labels, 0)
    assert held.sum() == 21 and set(np.bincount(labels[held])) == {3}
    assert not np.array_equal(held, held_out(labels, 1)) and np.array_equal(held, held_out(labels, 0))
    assert [held_out(np.zeros(n), 0).sum() for n in (10, 11, 19, 20, 99, 104)] == [1, 1, 1, 2, 9, 10]


def test_standardized_features():
    """Against NumPy; the second set by the statistics of the first. What is constant, up to rounding, becomes 0."""
    generator = np.random.default_rng(0)
    x, y = (generator.normal(3, 2, (n, 4)) * [1, 1e-3, 1, 1] + [0, 0, 7, 0] for n in (50, 9))
    x[:, 2], x[:, 3] = 0.1, 0
    a, b = (t.numpy() for t in standardize(*(torch.from_numpy(t).float() for t in (x, y)))[:2])
    mean, std = x.mean(0), x.std(0)
    np.testing.assert_allclose(a[:, :2], (x - mean)[:, :2] / std[:2], atol=1e-4)
    np.testing.assert_allclose(b[:, :2], (y - mean)[:, :2] / std[:2], atol=1e-4)
    assert not a[:, 2:].any() and not b[:, 2:].any()
    small = standardize(*[torch.from_numpy(x).float() * 1e-4] * 2)[0]  # rates mean the same on features of any scale
    np.testing.assert_allclose(small, a, atol=1e-4)


def test_small_training_equals_numpy():
    """39 samples in batches of 8: 7 are left out in each epoch. Cosine per step, momentum 0.9, from zero."""
    generator = np.random.default_rng(0)
    x, labels = generator.standard_normal((39, 5)), generator.integers(0, 3, 39)
    head = fit(torch.from_numpy(x), torch.from_numpy(labels), 3, 2.0, 3, 8, seed=4)
    batches = [rng.permutation(4, epoch, 39)[i * 8 : i * 8 + 8] for epoch in range(3) for i in range(4)]
    rate = lambda step: 2 * 8 / 256 * (1 + math.cos(math.pi * step / 12)) / 2  # noqa: E731
    protocol = Protocol(8, 3, "sgd", 2.0, 0.0)
    weight, bias = slow_training(np.zeros((3, 5)), np.zeros(3), x, labels, batches, protocol, rate)
    np.testing.assert_allclose(head.weight.detach(), weight, atol=1e-12)
    np.testing.assert_allclose(head.bias.detach(), bias, atol=1e-12)
    assert np.abs(weight).max() > 0.01


def test_small_digits(tmp_path, capsys):
    """By itself, without a flag. The rate is the one of the smallest held-out loss."""
    meta = {"method": "simsiam", "arch": SMALL[0], "width": SMALL[1], "image_size": 16, "channels": 3}
    meta |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    torch.manual_seed(3)
    torch.save({"backbone": resnet(*SMALL).state_dict(), "meta": meta}, tmp_path / "own.pt")
    words = ["--pretrained", tmp_path / "own.pt", *TINY[6:], "--data", "digits", "--out", tmp_path / "out"]
    result = main("eval_linear", *words)
    why = "fewer than 100,000 training images; that of the method: --protocol simsiam"
    assert f"protocol    small: {why}" in capsys.readouterr().out and "note" not in result
    ((name, row),) = result["heads"].items()
    best = min(row["held_out"], key=lambda rate: row["held_out"][rate]["loss"])
    assert name == f"small lr {best}" and len(row["held_out"]) == 9 and row["held_out"][best]["top1"] > 90
    assert row["last"]["top1"] > 85 and row["epochs"] == 400 and row["batch"] == 256
    names, left = {path.name for path in (tmp_path / "out").iterdir()}, {"confusion_linear.png", "per_class_linear.csv"}
    assert names >= left | {"eval_linear.json", "evaluations.jsonl"} and "linear_last.pt" not in names


def test_test_images_do_not_choose_the_rate(tmp_path, monkeypatch):
    first = small(tmp_path / "a", "--epochs", 5, data="digits")

    def wrong(*words):
        data, test = open_labelled(*words)
        test.labels = (test.labels + 1) % 10
        return data, test

    monkeypatch.setattr(eval_linear, "open_labelled", wrong)
    second = small(tmp_path / "b", "--epochs", 5, data="digits")
    (a, row), (b, other) = (next(iter(result["heads"].items())) for result in (first, second))
    assert a == b and row["held_out"] == other["held_out"]
    assert row["last"]["top1"] > 70 and other["last"]["top1"] < 20


def test_small_protocol_fits_any_size(tmp_path, capsys, monkeypatch):
    """At least 2,000 steps, 20 epochs. A batch larger than the set is all of it. One rate needs no held-out images."""
    real = eval_linear.fit
    monkeypatch.setattr(eval_linear, "fit", lambda *rest: real(*rest[:4], 1, *rest[5:]))  # one epoch is enough here

    def numbers(n, *words):
        (row,) = small(tmp_path / "any", *words, data=f"fake:{n}")["heads"].values()
        return row["batch"], row["epochs"]

    assert numbers(40) == (40, 2000) and numbers(300, "--lr", 0.1) == (256, 2000) and numbers(640) == (256, 1000)
    assert numbers(40, "--batch-size", 512) == (40, 2000) and numbers(40, "--batch-size", 8) == (8, 400)
    assert numbers(640, "--batch-size", 4, "--lr", 3) == (4, 20)
    few = {"data": write_colours(tmp_path / "few", 4)}
    assert "8 are too few" in refused(capsys, small, tmp_path, **few)
    assert "held_out" not in small(tmp_path, "--lr", 0.1, **few)["heads"]["small lr 0.1"]


def test_small_beside_others(short, tmp_path):
    """Every classifier is the one that it is alone, and results of other settings stay."""
    words = ["--lr", "0.5,2", "--epochs", 2]
    both, probes = run(tmp_path / "a", "--protocol", "moco,small", *words)
    alone, same = run(tmp_path / "b", "--protocol", "moco", *words)
    few = small(tmp_path / "b", "--protocol", "small", *words)
    assert both["heads"] == alone["heads"] | few["heads"] and different(probes, same) == []
    entries = logged(tmp_path / "b", "evaluations.jsonl")
    assert [entry["result"] for entry in entries] == [alone, few] and "moco" in entries[0]["args"]["protocol"]
    assert json.loads((tmp_path / "b/eval_linear.json").read_text()) == few


def test_batches_larger_than_the_set_name_what_works(tmp_path, capsys):
    error = refused(capsys, run, tmp_path, "--protocol", "simsiam")
    assert "batches of 4096 images, the training set has 64" in error and "--protocol small" in error
    assert small(tmp_path, "--protocol", "small", "--epochs", 3)["complete"]


@pytest.mark.parametrize("protocol", ["moco", "small"])
def test_features_that_are_not_finite(protocol, short, tmp_path, capsys):
    """A file whose weights are damaged is named as such, not a rate that is too high."""
    write_vit(tmp_path / "vit.pt")
    state = torch.load(tmp_path / "vit.pt")
    state["backbone"]["norm.weight"].fill_(3e38)  # finite, but nothing that is computed with it
    torch.save(state, tmp_path / "vit.pt")
    words = ["--pretrained", tmp_path / "vit.pt", *TINY[6:], "--data", "fake:64", "--out", tmp_path]
    error = refused(capsys, main, "eval_linear", *words, "--protocol", protocol)
    assert "not finite" in error and "damaged" in error and "--lr" not in error


# -------------------------------------------------------------------------------------------------- bad input
CASES = {
    "unknown protocol": ("--protocol moco,mocov4", "'mocov4'"),
    "no rate": ("--lr 0.1,fast", "--lr"),
    "negative rate": ("--lr -1", "--lr"),
    "empty rate": ("--lr 0.1,", "--lr"),
    "infinite rate": ("--lr inf", "--lr"),
    "drops": ("--drops 3;4", "--drops"),
    "no epochs": ("--epochs 0", "--epochs"),
    "batch larger than data": ("--protocol simsiam", "--protocol small"),
    "steps of small": ("--protocol small --max-steps 2", "--max-steps does nothing with --protocol small"),
    "drops of a cosine": ("--protocol swav,small --drops 2", "--drops does nothing with --protocol swav,small"),
    "stages of a ViT": ("--protocol multihead --arch vit_tiny --width 0.25", "ResNet"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_flags(case, capsys, tmp_path):
    words, expected = CASES[case]
    words = ["--data", "fake:64", "--out", tmp_path, *words.split()]
    assert expected in refused(capsys, main, "eval_linear", *TINY, *words)


def test_bad_data(capsys, tmp_path):
    write_images(tmp_path, ["flat/train/1.png", "flat/val/1.png", "odd/train/cat/1.png", "odd/val/dog/1.png"])
    for name, expected in (("flat", "no labels"), ("odd", "different classes (cat, dog")):
        assert expected in refused(capsys, main, "eval_linear", *TINY, "--data", tmp_path / name, "--out", tmp_path)


def test_another_recipe_is_not_continued(short, capsys, tmp_path):
    words = ["--protocol", "moco", "--lr", 0.1]
    run(tmp_path, *words, "--max-steps", 3)
    error = refused(capsys, run, tmp_path, "--protocol", "moco", "--lr", "0.2")
    assert "--lr: 0.1 before, now 0.2" in error and "--no-resume" in error
    error = refused(capsys, run, tmp_path, *words, source="digits")
    assert "the training images: " in error and "the test images: " in error
    run(tmp_path, *words)  # complete
    other, _ = run(tmp_path, "--protocol", "mae")  # so that it is in nobody's way
    assert other["complete"] and list(other["heads"]) == ["mae lr 0.1"]


# ------------------------------------------------------------------------------------------------------ lists
def test_places_list(tmp_path):
    """Places205's .csv files have spaces, not commas."""
    write_images(tmp_path, ["a/abbey/gsun 1.jpg", "w/yard/gsun_2.jpg"])
    (tmp_path / "train_places205.csv").write_text("a/abbey/gsun 1.jpg 0\nw/yard/gsun_2.jpg 204\n")
    dataset = open_dataset(str(tmp_path), "train", tmp_path / "train_places205.csv")
    assert dataset.labels.tolist() == [0, 1] and dataset.classes == ["0", "204"]
    assert dataset.path(0).endswith("a/abbey/gsun 1.jpg")


NAMES = ["train_val2018/Aves/1/b.jpg", "train_val2018/Fungi/2/a.jpg"]
NATURE = {  # in another order than the annotations, ids with gaps
    "images": [{"id": 7, "file_name": NAMES[0]}, {"id": 3, "file_name": NAMES[1]}],
    "annotations": [{"image_id": 3, "category_id": 8141}, {"image_id": 7, "category_id": 0}],
}


@pytest.mark.parametrize("root", [".", "train_val2018"])  # the names begin with the folder that holds the images
def test_inaturalist_json(root, tmp_path):
    write_images(tmp_path, NAMES, size=(12, 12))
    (tmp_path / "train2018.json").write_text(json.dumps(NATURE))
    dataset = open_dataset(str(tmp_path / root), "train", tmp_path / "train2018.json")
    assert dataset.labels.tolist() == [0, 1] and dataset.classes == ["0", "8141"] and dataset.path(1).endswith(NAMES[1])
    assert dataset[1][0].shape == (3, 12, 12)
    (tmp_path / "test2018.json").write_text(json.dumps({"images": NATURE["images"]}))
    assert open_dataset(str(tmp_path / root), "val", tmp_path / "test2018.json").labels is None


BAD_JSON = {
    "text": ("no json", "images"),
    "list": ([1, 2], "images"),
    "no names": ({"images": [{"id": 1}]}, "file_name"),
    "nothing": ({"images": []}, "names no image"),
    "missing file": ({"images": [{"id": 1, "file_name": "nowhere.jpg"}]}, "nowhere.jpg"),
    "no annotation": (NATURE | {"annotations": NATURE["annotations"][1:]}, "a.jpg"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_inaturalist_json(case, tmp_path, capsys):
    content, expected = BAD_JSON[case]
    write_images(tmp_path, NAMES)
    (tmp_path / "train.json").write_text(content if isinstance(content, str) else json.dumps(content))
    error = refused(capsys, open_dataset, str(tmp_path), "train", tmp_path / "train.json")
    assert expected in error and "--train-list" in error
