"""Linear evaluation: protocols, optimisers and schedules against NumPy, heads beside each other, resume, bad input."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

import eval_linear
from common import augment, data
from common.augment import View, uniforms
from common.optim import precision
from common.resnet import resnet
from common.vit import ViT
from eval_linear import PROTOCOLS, Head, Probe, Protocol, adapt, features, pool_stage, schedule
from tests.helpers import SCRIPTS, command, tensors

TINY = "--pretrained random --arch resnet18 --width 0.125 --image-size 16 --workers 0 --log-every 1 --seed 3".split()
NO_AMP = precision("fp32", torch.device("cpu"))[0]
SMALL = {  # several batch sizes, lengths, optimisers and views, all in seconds: batches of 8, 16 and 32
    "moco": {"batch": 8, "epochs": 2, "drops": (1,), "lr": 3.0},
    "simsiam": {"batch": 32, "epochs": 3},
    "mae": {"batch": 16, "epochs": 3, "warmup": 1},
    "multihead": {"batch": 16, "epochs": 2, "drops": (1,)},
}


@pytest.fixture
def small(monkeypatch):
    """Protocols for 64 images, of which the loader delivers 8 at a time."""
    table = {name: dataclasses.replace(PROTOCOLS[name], **changes) for name, changes in SMALL.items()}
    monkeypatch.setattr(eval_linear, "PROTOCOLS", table)
    monkeypatch.setattr(eval_linear, "MICRO", 8)


def run(out, *words, source="fake:64"):
    """(result, saved probes) of the script, run in this process."""
    words = [*TINY, "--data", source, "--out", out, *words]
    result = eval_linear.main(eval_linear.parse_args([str(w) for w in words]))
    return result, torch.load(out / "linear_last.pt", weights_only=True)["probes"]


def different(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and a
    return [name for name in a if not torch.equal(a[name], b[name])]


# -------------------------------------------------------------------------------------------------- protocols
def test_total_learning_rates_of_the_published_protocols():
    totals = {name: p.lr * p.batch / 256 for name, p in PROTOCOLS.items()}
    expected = {"moco": 30, "simsiam": 1.6, "swav": 0.3, "barlow": 0.3, "mocov3": 12, "mae": 6.4, "dino": 0.004}
    assert totals == pytest.approx(expected | {"multihead": 0.01})
    assert {n for n, p in PROTOCOLS.items() if p.batch % eval_linear.MICRO} == set()
    small = resnet("resnet18", 0.125, 16)
    assert adapt("mocov3", small).lr * 4 == pytest.approx(0.4)  # its ResNet-50
    large = type("Large", (nn.Module,), {"dim": 1024})()
    assert adapt("mae", large).epochs == 50 and adapt("mae", ViT(24, 1, 2, 8, 16)).epochs == 90


def test_protocol_of_a_method():
    assert set(SCRIPTS) <= eval_linear.AUTO.keys() and set(eval_linear.AUTO.values()) <= PROTOCOLS.keys()
    small = resnet("resnet18", 0.125, 16)
    spelt = {
        "MoCo": "moco",
        "MMSelfSup, MoCo v3": "mocov3",
        "Barlow Twins": "barlow",
        "byol": "simsiam",
        "DINO": "dino",
    }
    assert {name: eval_linear.auto(name, small) for name in spelt} == spelt
    assert eval_linear.auto("random", small) == "moco" and eval_linear.auto("", ViT(24, 1, 2, 8, 16)) == "mocov3"


def rates(protocol, steps, *at):
    return [schedule(protocol, step, steps) for step in at]


def test_schedules():
    moco = PROTOCOLS["moco"]
    assert rates(moco, 10, 0, 599, 600, 799, 800, 999) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    simsiam = PROTOCOLS["simsiam"]  # per epoch: epoch 30 of 90 is cos(60 degrees)
    assert rates(simsiam, 7, 0, 6, 210, 216, 315) == pytest.approx([1, 1, 0.75, 0.75, 0.5])
    assert rates(simsiam, 7, 89 * 7)[0] == pytest.approx((1 - math.cos(math.pi / 90)) / 2)
    mae = PROTOCOLS["mae"]  # per step: 10 epochs up, 80 down
    assert rates(mae, 8, 0, 1, 40, 80, 400, 720) == pytest.approx([0, 1 / 80, 0.5, 1, 0.5, 0])
    short = adapt("moco", resnet("resnet18", 0.125, 16), epochs=10)
    assert short.epochs == 10 and rates(short, 3, 17, 18, 23, 24) == pytest.approx([1, 0.1, 0.1, 0.01])
    assert adapt("mae", resnet("resnet18", 0.125, 16), epochs=9).warmup == pytest.approx(1)
    places = adapt("multihead", resnet("resnet18", 0.125, 16), epochs=28, drops=(7.0, 14.0, 21.0))
    assert rates(places, 1, 6, 7, 14, 27) == pytest.approx([1, 0.1, 0.01, 0.001])
    assert adapt("swav", resnet("resnet18", 0.125, 16), drops=(1.0,)).drops == ()


def test_loader_batch_divides_every_batch():
    assert eval_linear.micro_batch([256, 4096, 16384, 1024]) == 256
    assert eval_linear.micro_batch([32]) == 32 and eval_linear.micro_batch([512]) == 256
    assert eval_linear.micro_batch([300]) == 150


# --------------------------------------------------------------------------------------------------- features
STAGES = {(64, 112): 9216, (256, 56): 9216, (512, 28): 8192, (1024, 14): 9216, (2048, 7): 8192}


@pytest.mark.parametrize("channels, side", STAGES)
def test_pooled_sizes_of_resnet50(channels, side):
    """As the table of Goyal et al.'s heads has them; a map of other size comes to the same number."""
    assert pool_stage(torch.zeros(2, channels, side, side)).flatten(1).shape == (2, STAGES[channels, side])
    assert pool_stage(torch.zeros(1, channels, side + 1, side + 1)).flatten(1).shape == (1, STAGES[channels, side])


def test_pooling_windows():
    """conv1: the first window holds 6 x 6 pixels and padding, which counts. layer1: windows of 16, 8 apart."""
    assert pool_stage(torch.ones(1, 64, 112, 112))[0, 0, 0, :3].tolist() == pytest.approx([0.6 * 0.6, 0.6, 0.6])
    x = torch.randn(1, 256, 56, 56)
    torch.testing.assert_close(pool_stage(x)[0, 5, 2, 4], x[0, 5, 16:32, 32:48].mean())


def test_pooled_sizes_of_small_networks():
    maps = resnet("resnet18", 0.25, 32).stages(torch.randn(1, 3, 32, 32))
    assert [tuple(pool_stage(m).shape[1:]) for m in maps] == [
        (16, 24, 24),
        (16, 24, 24),
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
    ]


def test_features_of_a_resnet():
    torch.manual_seed(0)
    backbone, x = resnet("resnet18", 0.125, 16).eval(), torch.randn(3, 3, 16, 16)
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
    axes = np.array(augment.PCA_AXES)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-3)
    n, view = 6, View(8, flip=0.0, lighting=0.5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    u = uniforms(1, 2, range(n), 0, augment.DRAWS)
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    steps = [(name, torch.from_numpy(rows), torch.from_numpy(a)) for name, rows, a in augment.plan(view, u)]
    ours = augment.augment(images, steps, view.mean, view.std)
    seen = []
    for i in range(n):
        a, b, c, d = u[i, 36:40]
        alpha = [math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b)]
        alpha += [math.sqrt(-2 * math.log(1 - c)) * math.cos(2 * math.pi * d)]
        alpha += [math.sqrt(-2 * math.log(1 - a)) * math.sin(2 * math.pi * b)]
        for channel in range(3):
            scales = (0.2175, 0.0188, 0.0045)
            shift = sum(0.5 * alpha[k] * scales[k] * augment.PCA_AXES[channel][k] for k in range(3))
            expected = (images[i, channel] / 255 + shift - view.mean[channel]) / view.std[channel]
            torch.testing.assert_close(ours[i, channel], expected, atol=1e-5, rtol=0)
            seen.append(abs(shift))
    assert max(seen) > 0.05


def test_lighting_is_normal_and_moves_no_other_draw():
    z = augment.normals(uniforms(0, 0, range(20_000), 0, augment.DRAWS)[:, 36:40])
    assert min(stats.kstest(z[:, k], "norm").pvalue for k in range(4)) > 1e-3
    np.testing.assert_allclose(np.corrcoef(z.T), np.eye(4), atol=0.04)
    np.testing.assert_array_equal(uniforms(0, 1, range(9), 2, augment.DRAWS)[:, :36], uniforms(0, 1, range(9), 2, 36))
    plain, light = View(8, jitter=(0.4,) * 4, jitter_p=0.5), View(8, jitter=(0.4,) * 4, jitter_p=0.5, lighting=0.1)
    u = uniforms(0, 0, range(50), 0, augment.DRAWS)
    steps = augment.plan(light, u)
    assert [s[0] for s in steps[-3:]] == ["red", "green", "blue"]
    for (a, rows_a, amounts_a), (b, rows_b, amounts_b) in zip(augment.plan(plain, u), steps[:-3], strict=True):
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
    params, buffers, first = [weight, bias], [np.zeros_like(weight), np.zeros_like(bias)], True
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
            buffers[k] = g.copy() if first and not lars else 0.9 * buffers[k] + g
            if protocol.optimiser == "nesterov":
                g = g + 0.9 * buffers[k]
            else:
                g = buffers[k]
            params[k] = w - rate(step) * g
        first = False
    return params


@pytest.mark.parametrize("micro", [32, 8])
@pytest.mark.parametrize("optimiser", ["sgd", "nesterov", "lars-all", "lars-weights"])
def test_training_equals_numpy(optimiser, micro):
    """Whole batches in NumPy against micro-batches of 32 (all of it) and 8, bias of norm 0 included."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((96, 7)), rng.integers(0, 4, 96)
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
    ((top1, top5),) = eval_linear.evaluate(source, [probe], 50)[probe.name]
    order = np.argsort(-probe.head([x])[0].detach().numpy(), axis=1)
    hit = order == labels.numpy()[:, None]
    assert top1 == pytest.approx(2 * hit[:, 0].sum()) and top5 == pytest.approx(2 * hit[:, :5].sum())
    assert 0 < top1 < top5 < 100 and probe.head.training
    probe.parameters[0].data.fill_(math.nan)
    assert eval_linear.evaluate(source, [probe], 50)[probe.name] == [[0.0, 0.0]]


# ------------------------------------------------------------------------------------------------- whole runs
def test_heads_do_not_notice_each_other(small, tmp_path):
    """Batches of 8, 16 and 32, five views, in one pass and one at a time: the same bits."""
    result, together = run(tmp_path / "all", "--protocol", ",".join(SMALL), "--lr", "0.5,2")
    assert len(together) == 8 and len(result["heads"]) == 6 + 2 * 5
    for name in SMALL:
        alone_result, alone = run(tmp_path / name, "--protocol", name, "--lr", 2)
        assert list(alone) == [f"{name} lr 2"]
        assert different(alone[f"{name} lr 2"], together[f"{name} lr 2"]) == []
        for label, row in alone_result["heads"].items():
            assert row == result["heads"][label]
    assert different(together["moco lr 2"]["head"], together["moco lr 0.5"]["head"]) != []
    assert [e for e, _ in together["moco lr 2"]["results"]] == [1, 2]  # a shorter protocol just stops
    assert [e for e, _ in together["mae lr 2"]["results"]] == [1, 2, 3]


@pytest.mark.parametrize("stop_at", [5, 16])
def test_interrupted_run_equals_uninterrupted(stop_at, small, tmp_path, monkeypatch, capsys):
    """A signal in the middle of a batch that is still being summed up, and at the end of an epoch."""
    words = ["--protocol", ",".join(SMALL)]
    result, whole = run(tmp_path / "a", *words)
    real, calls = eval_linear.Live.epoch, []

    def epoch(self, *rest):
        for batch in real(self, *rest):
            calls.append(1)
            if len(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(eval_linear.Live, "epoch", epoch)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "b", *words)
    assert stop.value.code == 75 and len(calls) == stop_at
    continued, parts = run(tmp_path / "b", *words)
    assert len(calls) == 3 * 8
    assert different(whole, parts) == [] and continued == result
    capsys.readouterr()
    again, _ = run(tmp_path / "b", *words)  # complete: nothing is trained again
    assert (
        len(calls) == 3 * 8 and again == result and json.loads((tmp_path / "b/eval_linear.json").read_text()) == result
    )


def test_a_rate_that_ends_above_chance_is_named_once(small, tmp_path, capsys):
    run(tmp_path, "--protocol", "moco", "--lr", "0.001,1e5")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "the loss of moco lr 100000 is" in warnings[0]
    assert "that of chance 2.303: lower --lr" in warnings[0]


def test_max_steps_evaluates_and_goes_on(small, tmp_path):
    words = ["--protocol", "moco,mae"]
    result, whole = run(tmp_path / "a", *words)
    for _ in range(2):  # the second time there is nothing left to do but to evaluate
        cut, _ = run(tmp_path / "b", *words, "--max-steps", 11)
        assert not cut["complete"] and cut["heads"]["mae lr 0.1"]["last"]["epoch"] == 1.375
    continued, parts = run(tmp_path / "b", *words)
    assert continued == result and result["complete"] and different(whole, parts) == []


TWICE = {  # two micro-batches per step and synchronised batch norm; 102 test images are one batch: a process has none
    "live": (512, "--protocol simsiam,multihead --batch-size 512 --epochs 1 --precision fp64".split()),
    "cached": (64, "--protocol moco,mae --batch-size 16 --epochs 2 --precision fp64 --cached".split()),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    flags = {k: [*TINY, "--data", f"fake:{n}", "--out", str(folder / k), *words] for k, (n, words) in TWICE.items()}
    command("tests/run_scripts.py", json.dumps([["eval_linear", f] for f in flags.values()]), processes=2, check=0)
    return folder


@pytest.mark.parametrize("kind", TWICE)
def test_two_processes_equal_one(kind, two_processes, tmp_path):
    images, words = TWICE[kind]
    result, one = run(tmp_path, *words, source=f"fake:{images}")
    two = torch.load(two_processes / kind / "linear_last.pt", weights_only=True)["probes"]
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-8, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    assert json.loads((two_processes / kind / "eval_linear.json").read_text()) == result


def test_backbone_stays_as_it_is(small, tmp_path, monkeypatch):
    backbone, real = [], eval_linear.load_backbone
    monkeypatch.setattr(eval_linear, "load_backbone", lambda *a: backbone.append(real(*a)) or backbone[0])
    fresh = {k: v.clone() for k, v in real("random", "resnet18", 0.125, 16, 3)[0].state_dict().items()}
    run(tmp_path, "--protocol", "moco,multihead")
    after = backbone[0][0].state_dict()
    assert [k for k in fresh if not torch.equal(fresh[k], after[k])] == []


@pytest.mark.parametrize("tamper", [lambda b: b.bn1.running_mean.add_(1e-6), lambda b: b.layer1.train()])
def test_a_changed_backbone_is_an_error(tamper, small, tmp_path, monkeypatch, capsys):
    real = eval_linear.features
    monkeypatch.setattr(eval_linear, "features", lambda b, *rest: (real(b, *rest), tamper(b))[0])
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--protocol", "moco", "--lr", 0.1)
    assert stop.value.code == 1 and "backbone has changed" in capsys.readouterr().err
    assert not (tmp_path / "eval_linear.json").exists()


def test_digits_are_learned_and_cached_features_are_named(tmp_path, capsys):
    """Handwritten digits are nearly separable even in the first stage of a random network: chance is 10."""
    words = ["--protocol", "multihead", "--batch-size", 32, "--epochs", 2, "--cached"]
    result, _ = run(tmp_path, *words, source="digits")
    lines = capsys.readouterr().out.splitlines()
    assert result["cached"] and "not the protocol" in result["note"]
    assert any("not the protocol" in line for line in lines) and json.loads(lines[-1]) == result
    assert result["best"]["top1"] > 85 and result["best"]["head"].startswith("multihead lr 0.01 feat")
    best = max(row["best"]["top1"] for row in result["heads"].values())
    assert result["best"]["top1"] == best and any("best" in line and result["best"]["head"] in line for line in lines)


def test_vit_by_itself_takes_the_protocol_of_vits(tmp_path):
    words = ["--arch", "vit_tiny", "--width", 0.25, "--batch-size", 32, "--epochs", 1]
    result, _ = run(tmp_path, *words, source="fake:32")
    assert list(result["heads"]) == ["mocov3 lr 3"] and result["heads"]["mocov3 lr 3"]["total_lr"] == 0.375


# -------------------------------------------------------------------------------------------------- bad input
CASES = {
    "unknown protocol": (["--protocol", "moco,mocov4"], "'mocov4'"),
    "no rate": (["--lr", "0.1,fast"], "--lr"),
    "negative rate": (["--lr", "-1"], "--lr"),
    "empty rate": (["--lr", "0.1,"], "--lr"),
    "infinite rate": (["--lr", "inf"], "--lr"),
    "drops": (["--drops", "3;4"], "--drops"),
    "no epochs": (["--epochs", "0"], "--epochs"),
    "batch larger than data": (["--protocol", "simsiam"], "--batch-size"),
}


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        eval_linear.main(eval_linear.parse_args([*TINY, *map(str, words)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("case", CASES)
def test_bad_flags(case, capsys, tmp_path):
    words, expected = CASES[case]
    assert expected in refused(capsys, "--data", "fake:64", "--out", tmp_path, *words)


def test_bad_data(capsys, tmp_path):
    for path in ("flat/train/1.png", "flat/val/1.png", "odd/train/cat/1.png", "odd/val/dog/1.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / path)
    assert "no labels" in refused(capsys, "--data", tmp_path / "flat", "--out", tmp_path)
    assert "different classes (cat, dog" in refused(capsys, "--data", tmp_path / "odd", "--out", tmp_path)


def test_multihead_needs_a_resnet(capsys):
    with pytest.raises(SystemExit) as stop:
        adapt("multihead", ViT(24, 1, 2, 8, 16))
    assert stop.value.code == 2 and "ResNet" in capsys.readouterr().err


def test_another_recipe_is_not_continued(small, capsys, tmp_path):
    words = ["--protocol", "moco", "--lr", 0.1]
    run(tmp_path, *words, "--max-steps", 3)
    capsys.readouterr()
    error = refused(capsys, "--data", "fake:64", "--out", tmp_path, "--protocol", "moco", "--lr", "0.2")
    assert "--lr was 0.1, is 0.2" in error and "--no-resume" in error
    run(tmp_path, *words)  # complete
    other, _ = run(tmp_path, "--protocol", "mae")  # so that it is in nobody's way
    assert other["complete"] and list(other["heads"]) == ["mae lr 0.1"]


# ------------------------------------------------------------------------------------------------------ lists
def fill(root, paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12)).save(root / path)


def test_places_list(tmp_path):
    """Places205's .csv files have spaces, not commas."""
    fill(tmp_path, ["a/abbey/gsun 1.jpg", "w/yard/gsun_2.jpg"])
    (tmp_path / "train_places205.csv").write_text("a/abbey/gsun 1.jpg 0\nw/yard/gsun_2.jpg 204\n")
    dataset = data.build(str(tmp_path), "train", tmp_path / "train_places205.csv")
    assert dataset.labels.tolist() == [0, 204] and dataset.path(0).endswith("a/abbey/gsun 1.jpg")


NATURE = {  # in another order than the annotations, ids with gaps
    "images": [
        {"id": 7, "file_name": "train_val2018/Aves/1/b.jpg"},
        {"id": 3, "file_name": "train_val2018/Fungi/2/a.jpg"},
    ],
    "annotations": [{"image_id": 3, "category_id": 8141}, {"image_id": 7, "category_id": 0}],
}


@pytest.mark.parametrize("root", [".", "train_val2018"])  # the names begin with the folder that holds the images
def test_inaturalist_json(root, tmp_path):
    fill(tmp_path, [image["file_name"] for image in NATURE["images"]])
    (tmp_path / "train2018.json").write_text(json.dumps(NATURE))
    dataset = data.build(str(tmp_path / root), "train", tmp_path / "train2018.json")
    assert dataset.labels.tolist() == [0, 8141] and dataset.path(1).endswith("train_val2018/Fungi/2/a.jpg")
    assert dataset[1][0].shape == (3, 12, 12)
    (tmp_path / "test2018.json").write_text(json.dumps({"images": NATURE["images"]}))
    assert data.build(str(tmp_path / root), "val", tmp_path / "test2018.json").labels is None


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
    fill(tmp_path, [image["file_name"] for image in NATURE["images"]])
    (tmp_path / "train.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        data.build(str(tmp_path), "train", tmp_path / "train.json")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and "--train-list" in error and error.count("\n") == 1
