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
from torch import nn

import eval_linear
from common import augment, rng
from common.augment import View
from common.datasets import open_dataset
from common.features import pool_stage
from common.optim import precision
from common.resnet import resnet
from common.vit import ViT
from eval_linear import PROTOCOLS, Head, Probe, Protocol, adapt, features, schedule
from tests.helpers import SCRIPTS, SMALL, assert_close, different, launch, main, refused, state, write_images

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
    assert totals == pytest.approx(expected | {"multihead": 0.01})
    assert {n for n, p in PROTOCOLS.items() if p.batch % eval_linear.MICRO} == set()
    assert adapt("mocov3", resnet(*SMALL)).lr * 4 == pytest.approx(0.4)  # its ResNet-50
    large = type("Large", (nn.Module,), {"dim": 1024})()
    assert adapt("mae", large).epochs == 50 and adapt("mae", ViT(24, 1, 2, 8, 16)).epochs == 90


def test_protocol_of_a_method():
    assert {name.replace("_", "") for name in SCRIPTS} <= eval_linear.AUTO.keys()
    assert set(eval_linear.AUTO.values()) <= PROTOCOLS.keys()
    spelt = {"MoCo": "moco", "MMSelfSup, MoCo v3": "mocov3", "Barlow Twins": "barlow", "DINO": "dino", "random": "moco"}
    assert {name: eval_linear.auto(name, resnet(*SMALL)) for name in spelt} == spelt
    assert eval_linear.auto("", ViT(24, 1, 2, 8, 16)) == "mocov3"


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
    ((top1, top5),) = eval_linear.evaluate(source, [probe], 50)[probe]
    order = np.argsort(-probe.head([x])[0].detach().numpy(), axis=1)
    hit = order == labels.numpy()[:, None]
    assert top1 == pytest.approx(2 * hit[:, 0].sum()) and top5 == pytest.approx(2 * hit[:, :5].sum())
    assert 0 < top1 < top5 < 100 and probe.head.training
    probe.parameters[0].data.fill_(math.nan)
    assert eval_linear.evaluate(source, [probe], 50)[probe] == [[0.0, 0.0]]


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
    again, _ = run(tmp_path / "b", *words)  # complete: nothing is trained again
    assert len(calls) == 3 * 8 and again == result
    assert json.loads((tmp_path / "b/eval_linear.json").read_text()) == result


def test_a_rate_that_ends_above_chance_is_named_once(short, tmp_path, capsys):
    run(tmp_path, "--protocol", "moco,multihead", "--lr", "0.001,1e5")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    for name, line in zip(("moco", "multihead"), warnings, strict=True):
        assert f"the loss of {name} lr 100000 is" in line and "that of chance 2.303: lower --lr" in line


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
    "live": (512, "--protocol simsiam,multihead --batch-size 512 --epochs 1 --precision fp64".split()),
    "cached": (64, "--protocol moco,mae --batch-size 16 --epochs 2 --precision fp64 --cached".split()),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    jobs = {k: [*TINY, "--data", f"fake:{n}", "--out", folder / k, *words] for k, (n, words) in TWICE.items()}
    launch(*(("eval_linear", words) for words in jobs.values()))
    return folder


@pytest.mark.parametrize("kind", TWICE)
def test_two_processes_equal_one(kind, two_processes, tmp_path):
    images, words = TWICE[kind]
    result, one = run(tmp_path, *words, source=f"fake:{images}")
    assert_close(one, state(two_processes / kind, "linear_last.pt")["probes"], atol=1e-8, rtol=1e-7)
    assert json.loads((two_processes / kind / "eval_linear.json").read_text()) == result


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
    "unknown protocol": ("--protocol moco,mocov4", "'mocov4'"),
    "no rate": ("--lr 0.1,fast", "--lr"),
    "negative rate": ("--lr -1", "--lr"),
    "empty rate": ("--lr 0.1,", "--lr"),
    "infinite rate": ("--lr inf", "--lr"),
    "drops": ("--drops 3;4", "--drops"),
    "no epochs": ("--epochs 0", "--epochs"),
    "batch larger than data": ("--protocol simsiam", "--batch-size"),
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
    assert "--lr was 0.1, is 0.2" in error and "--no-resume" in error
    run(tmp_path, *words)  # complete
    other, _ = run(tmp_path, "--protocol", "mae")  # so that it is in nobody's way
    assert other["complete"] and list(other["heads"]) == ["mae lr 0.1"]


# ------------------------------------------------------------------------------------------------------ lists
def test_places_list(tmp_path):
    """Places205's .csv files have spaces, not commas."""
    write_images(tmp_path, ["a/abbey/gsun 1.jpg", "w/yard/gsun_2.jpg"])
    (tmp_path / "train_places205.csv").write_text("a/abbey/gsun 1.jpg 0\nw/yard/gsun_2.jpg 204\n")
    dataset = open_dataset(str(tmp_path), "train", tmp_path / "train_places205.csv")
    assert dataset.labels.tolist() == [0, 204] and dataset.path(0).endswith("a/abbey/gsun 1.jpg")


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
    assert dataset.labels.tolist() == [0, 8141] and dataset.path(1).endswith(NAMES[1])
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
