"""BYOL: the loss, the moving average of the target, the published schedules and the recipe of the views."""

import copy
import math

import numpy as np
import pytest
import torch

import byol
from common.resnet import resnet
from tests.helpers import records, state, tensors, train

TARGETS = {"backbone.": "target_backbone.", "projector.": "target_projector."}


def small_model():
    torch.manual_seed(0)
    return byol.BYOL(resnet("resnet18", 0.125, 16), dim=8, hidden_dim=12).double()


def vectors(count=4, rows=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(count)]


def pairs(names):
    """(online name, target name) of everything that both networks have."""
    return [(n, new + n.removeprefix(old)) for n in names for old, new in TARGETS.items() if n.startswith(old)]


def parsed(*flags):
    return byol.parse_args(["--data", "fake:64", *map(str, flags)])


# ------------------------------------------------------------------------------------------------------- loss
def test_loss_equals_the_formula_in_numpy():
    p1, p2, z1, z2 = vectors()
    total = 0.0
    for prediction, target in ((p1, z2), (p2, z1)):
        for p, z in zip(prediction.numpy(), target.numpy(), strict=True):
            total += 2 - 2 * np.dot(p, z) / math.sqrt(np.dot(p, p) * np.dot(z, z))
    assert byol.byol_loss(p1, p2, z1, z2).item() == pytest.approx(total / 6, abs=1e-10)


def test_loss_of_identical_orthogonal_and_opposite_outputs():
    e = torch.eye(6, dtype=torch.float64)
    a, b = e[:3] * 2, e[3:] * 5
    assert byol.byol_loss(a, b, b, a).item() == pytest.approx(0, abs=1e-12)  # each predicts the other view's target
    assert byol.byol_loss(a, b, a, b).item() == pytest.approx(4, abs=1e-12)  # its own view's target does not count
    assert byol.byol_loss(a, b, -b, -a).item() == pytest.approx(8, abs=1e-12)


def test_loss_gradient():
    p1, p2, z1, z2 = (x.requires_grad_() for x in vectors())
    assert torch.autograd.gradcheck(lambda p1, p2: byol.byol_loss(p1, p2, z1.detach(), z2.detach()), (p1, p2))
    byol.byol_loss(p1, p2, z1, z2).backward()
    assert z1.grad is None and z2.grad is None
    assert p1.grad.abs().max() > 0 and p2.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------------ model
def test_heads_have_the_layers_of_the_paper():
    model = byol.BYOL(resnet("resnet18", 0.125, 16), **{k: vars(parsed())[k] for k in ("dim", "hidden_dim")})
    for head, inputs in ((model.projector, 64), (model.predictor, 256), (model.target_projector, 64)):
        shapes = [(name, tuple(p.shape)) for name, p in head.named_parameters()]
        first, norm = [("0.weight", (4096, inputs)), ("0.bias", (4096,))], [("1.weight", (4096,)), ("1.bias", (4096,))]
        assert shapes == [*first, *norm, ("3.weight", (256, 4096))]


def test_target_starts_as_a_copy_of_the_online_network():
    model = small_model()
    values = model.state_dict()
    both = pairs(values)
    assert len(both) == sum(name.startswith("target_") for name in values) > 100
    for online, target in both:
        assert torch.equal(values[online], values[target]), online
        assert values[online].data_ptr() != values[target].data_ptr(), online


def test_no_gradient_reaches_the_target():
    model = small_model()
    x1, x2 = vectors(2, 4, 3 * 16 * 16)
    byol.byol_loss(*model(x1.view(4, 3, 16, 16), x2.view(4, 3, 16, 16))).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad is not name.startswith("target_"), name
        assert (p.grad is None) is name.startswith("target_"), name


def test_target_sees_the_views_apart_and_normalises_by_the_batch():
    model = small_model()
    x1, x2 = (x.view(4, 3, 16, 16) for x in vectors(2, 4, 3 * 16 * 16))
    _, _, z1, z2 = model(x1, x2)
    for i, (name, buffer) in enumerate(model.named_buffers()):
        if name.startswith("target_") and buffer.is_floating_point():
            buffer.fill_(1 + i)  # what running averages hold must not matter in training
    p2, p1, again2, again1 = model(x2, x1)
    torch.testing.assert_close((again1, again2), (z1, z2), rtol=0, atol=1e-12)
    h = model.backbone(x1)
    for head, out in ((model.projector, z1), (model.predictor, p1)):  # the target is still a copy
        h = h @ head[0].weight.T + head[0].bias
        h = ((h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()).clamp(min=0) @ head[3].weight.T
        torch.testing.assert_close(h, out, rtol=0, atol=1e-10)
    assert not torch.allclose(p1, p2)


def test_moving_average_moves_parameters_but_no_buffers():
    model = small_model()
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():  # everything differs between the networks, statistics too
        value.copy_(torch.rand(value.shape, generator=generator) * 100)
    before = copy.deepcopy(model.state_dict())
    model.update_target(0.75)
    after, parameters = model.state_dict(), dict(model.named_parameters())
    for online, target in pairs(before):
        expected = 0.75 * before[target] + 0.25 * before[online] if target in parameters else before[target]
        torch.testing.assert_close(after[target], expected, rtol=1e-12, atol=0, msg=target)
    for name in before:
        if not name.startswith("target_"):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("accum", [1, 2])
def test_training_averages_once_per_step_after_the_optimiser(accum, tmp_path, monkeypatch):
    """What the script saves against a slow loop over the online parameters that it had after each step."""
    history, update, reset = [], byol.BYOL.update_target, byol.BYOL.reset_target

    def record(model):
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})

    monkeypatch.setattr(byol.BYOL, "reset_target", lambda model: (reset(model), record(model)))
    monkeypatch.setattr(byol.BYOL, "update_target", lambda model, tau: (record(model), update(model, tau)))
    flags = ["--precision", "fp64", "--max-steps", "5", "--accum", accum, "--tau", "0.6", "--lr", "5"]
    saved = train("byol", tmp_path, *flags)["model"]
    assert len(history) == 1 + 5  # the start, then every step
    start = history[0]
    for online, target in pairs(start):
        value = start[online].double()
        for k, after_step in enumerate(history[1:]):
            tau = 1 - 0.4 * (math.cos(math.pi * k / 16) + 1) / 2  # 4 epochs of 4 steps
            value = tau * value + (1 - tau) * after_step[online]
        torch.testing.assert_close(saved[target], value, rtol=0, atol=1e-12, msg=target)
        assert torch.equal(saved[online], history[-1][online]), online
    moved = [not torch.equal(saved[t], start[o].double()) for o, t in pairs(start)]
    assert sum(moved) > len(moved) / 2  # the first step's learning rate is 0, the later ones' is not
    passes = [v.item() for name, v in saved.items() if name.endswith("num_batches_tracked")]
    assert set(passes) == {2 * 5 * accum}  # the target normalises two views per micro-batch, as the online network


def test_optimiser_leaves_the_target_alone(tmp_path):
    """With tau 1 the target stays what --init made it: the weights of the file, to the bit, heads included."""
    first = train("byol", tmp_path / "a", "--max-steps", 3)["model"]
    flags = ["--max-steps", 3, "--tau", 1, "--lr", 5, "--init", tmp_path / "a" / "last.pt"]
    second = train("byol", tmp_path / "b", *flags)["model"]
    parameters = dict(small_model().named_parameters())
    names = [(o, t) for o, t in pairs(first) if o in parameters]
    assert [t for o, t in names if not torch.equal(second[t], first[o])] == []
    assert sum(not torch.equal(second[o], first[o]) for o, t in names) > len(names) / 2


def test_exported_backbone_is_the_online_one(tmp_path):
    model = train("byol", tmp_path, "--max-steps", 3)["model"]
    exported = torch.load(tmp_path / "backbone.pt", weights_only=True)["backbone"]
    assert [n for n, v in exported.items() if not torch.equal(v, model["backbone." + n])] == []
    assert any(not torch.equal(v, model["target_backbone." + n]) for n, v in exported.items())


# -------------------------------------------------------------------------------------------------- schedules
def test_target_decay_rises_from_tau_to_one():
    assert byol.target_decay(0, 100, 0.99) == pytest.approx(0.99, abs=1e-15)
    assert byol.target_decay(50, 100, 0.99) == pytest.approx(0.995, abs=1e-15)
    assert byol.target_decay(99, 100, 0.99) == pytest.approx(1 - 0.01 * (1 - math.cos(math.pi / 100)) / 2, abs=1e-15)
    assert byol.target_decay(100, 100, 0.99) == 1
    values = [byol.target_decay(k, 100, 0.99) for k in range(101)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("epochs", "lr", "tau", "weight_decay"),
    [
        (1, 0.45, 0.97, 1e-6),
        (40, 0.45, 0.97, 1e-6),
        (70, 0.45, 0.99, 1e-6),
        (100, 0.45, 0.99, 1e-6),
        (200, 0.3, 0.99, 1e-6),
        (300, 0.3, 0.99, 1e-6),
        (600, 0.2, 0.996, 1.5e-6),
        (1000, 0.2, 0.996, 1.5e-6),
        (3000, 0.2, 0.996, 1.5e-6),
    ],
)
def test_epochs_pick_the_published_schedule(epochs, lr, tau, weight_decay):
    args = parsed("--epochs", epochs)
    assert (args.lr, args.tau, args.weight_decay) == (lr, tau, weight_decay)


def test_defaults_are_the_thousand_epochs_and_flags_come_first():
    args = parsed()
    assert (args.epochs, args.warmup_epochs, args.batch_size, args.momentum) == (1000, 10, 4096, 0.9)
    assert (args.lr, args.tau, args.weight_decay, args.optimizer) == (0.2, 0.996, 1.5e-6, "lars")
    args = parsed("--epochs", 300, "--tau", 0, "--weight-decay", 0)
    assert (args.lr, args.tau, args.weight_decay) == (0.3, 0, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optimizer", "sgd", "--lr", "0.1"], "--optimizer sgd needs --lr and --weight-decay"),
        (["--tau", "1.5"], "--tau must lie between 0 and 1"),
        (["--tau", "nan"], "--tau must lie between 0 and 1"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1


def test_start_names_the_row_and_resuming_compares_its_values(tmp_path, capsys):
    train("byol", tmp_path, "--max-steps", 2)
    shown = capsys.readouterr().out
    assert "tau 0.97 to 1, weight decay 1e-06" in shown and "nearest published (40 epochs)" in shown
    train("byol", tmp_path, "--max-steps", 3, "--lr", 0.45, "--tau", 0.97, "--weight-decay", 1e-6)
    assert list(records(tmp_path)) == [1, 2, 3]  # the same recipe, spelt out
    with pytest.raises(SystemExit) as stopped:
        train("byol", tmp_path, "--epochs", 90)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "--epochs was 4, is 90" in error and "--tau was 0.97, is 0.99" in error


def test_optimisers_decay_weights_only(tmp_path):
    flags = ["--max-steps", 2, "--lr", 0.4, "--weight-decay", 0.003]
    for name, trust in (("lars", 0.001), ("sgd", None)):
        saved = train("byol", tmp_path / name, *flags, "--optimizer", name)
        weights, others = saved["optimizer"]["param_groups"]
        assert (weights["weight_decay"], others["weight_decay"]) == (0.003, 0)
        assert (weights.get("trust"), weights["momentum"], others["momentum"]) == (trust, 0.9, 0.9)
        count = sum(p.requires_grad for p in small_model().parameters())
        assert len(weights["params"]) + len(others["params"]) == count
    a, b = (tensors(state(tmp_path / name)["model"]) for name in ("lars", "sgd"))
    assert any(not torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------ views
def test_views_follow_the_recipe():
    first, second = byol.augmentation(224)
    for view in (first, second):
        assert (view.size, view.crop, view.ratio, view.interpolation) == (224, (0.08, 1.0), (3 / 4, 4 / 3), "bicubic")
        assert (view.flip, view.jitter, view.jitter_p, view.gray_p) == (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (view.blur_sigma, view.gray_first) == ((0.1, 2.0), False)
        assert (view.mean, view.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (first.blur_p, first.solarize_p) == (1.0, 0.0)
    assert (second.blur_p, second.solarize_p) == (0.1, 0.2)


def test_small_images_are_not_blurred_and_flags_reach_the_views():
    first, second = byol.augmentation(32, crop_min=0.3, flip=0)
    assert (first.blur_p, second.blur_p, first.solarize_p, second.solarize_p) == (0, 0, 0, 0.2)
    assert [(v.crop, v.flip) for v in (first, second)] == [((0.3, 1.0), 0)] * 2
