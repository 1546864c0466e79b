"""The lines of `main` between a tested model and a tested loss: who is compared with whom, and when."""

import importlib
import json
import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common.loader import Batch
from tests.helpers import EXACT, train

LOSSES = {  # model, its loss, and which outputs of the model are the loss's first arguments
    "simsiam": ("SimSiam", "simsiam_loss", (0, 1, 2, 3)),
    "byol": ("BYOL", "byol_loss", (0, 1, 2, 3)),
    "mocov3": ("MoCoV3", "mocov3_loss", (0, 1, 2, 3)),
    "densecl": ("DenseCL", "dense_info_nce", (1, 4, 2, 5)),
}
DISTILLED = {"dino": "DINO", "simdino": "SimDINO", "esvit": "EsViT", "ibot": "iBOT"}
TO_ZERO = "simclr simclrv2 nnclr directclr moco moco_ft interclr densecl lejepa byol mocov3 pixpro".split()


def watch(monkeypatch, owner, name):
    """The list of (arguments, result) of every call of a function from now on."""
    seen, real = [], getattr(owner, name)

    def record(*args, **more):
        seen.append((args, real(*args, **more)))
        return seen[-1][1]

    monkeypatch.setattr(owner, name, record)
    return seen


def cosine_between(first, last, share):
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("script", LOSSES)
def test_outputs_reach_the_loss_in_their_order(script, tmp_path, monkeypatch):
    page, (model, loss, places) = importlib.import_module(script), LOSSES[script]
    outputs, given = watch(monkeypatch, getattr(page, model), "forward"), watch(monkeypatch, page, loss)
    train(script, tmp_path, *EXACT, "--max-steps", 1)
    expected = [outputs[0][1][i] for i in places]
    assert all(map(torch.equal, expected, given[0][0][: len(expected)]))


def test_the_neighbours_of_nnclr_are_those_of_the_views(tmp_path, monkeypatch):
    """The neighbour of the first view stands before that of the second, and is the more like it; then predictions."""
    nnclr = importlib.import_module("nnclr")
    outputs, given = watch(monkeypatch, nnclr.NNCLR, "forward"), watch(monkeypatch, nnclr, "nnclr_loss")
    train("nnclr", tmp_path, *EXACT, "--max-steps", 1)
    p1, p2, z1, z2 = outputs[0][1]
    n1, n2, *predictions = given[0][0][:4]
    for z, own, other in ((z1, n1, n2), (z2, n2, n1)):
        assert ((own * z).sum(1) >= (other * z).sum(1)).all() and not torch.equal(own, other)
    assert all(map(torch.equal, predictions, (p1, p2)))


def test_queues_and_target_of_densecl(tmp_path, monkeypatch):
    densecl = importlib.import_module("densecl")
    outputs, kept = watch(monkeypatch, densecl.DenseCL, "forward"), watch(monkeypatch, densecl.DenseCL, "enqueue")
    moved = watch(monkeypatch, densecl.DenseCL, "update_target")
    train("densecl", tmp_path, *EXACT, "--max-steps", 2, "--key-momentum", 0.6)
    assert [args[1] for args, _ in moved] == [0.6, 0.6]
    assert all(torch.equal(x, y) for x, y in zip(kept[0][0][1:], outputs[0][1][6:], strict=True))


def test_pairs_and_target_of_pixpro(tmp_path, monkeypatch):
    pixpro = importlib.import_module("pixpro")
    boxes, pairs = watch(monkeypatch, Batch, "boxes"), watch(monkeypatch, pixpro, "pairs")
    moved = watch(monkeypatch, pixpro.PixPro, "update_target")
    train("pixpro", tmp_path, "--max-steps", 2)
    views = {args[1]: box for args, box in boxes[:2]}
    assert torch.equal(pairs[0][0][0], views[0]) and torch.equal(pairs[0][0][1], views[1])
    assert [args[1] for args, _ in moved] == pytest.approx([cosine_between(0.99, 1, k / 16) for k in range(2)])


@pytest.mark.parametrize("script", DISTILLED)
def test_schedules_of_a_run(script, tmp_path, monkeypatch):
    """Of 16 steps, 4 of them warm-up: the teacher's momentum, rate, and weight decay, which biases have not."""
    moved, steps = watch(monkeypatch, getattr(importlib.import_module(script), DISTILLED[script]), "update_teacher"), []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: steps.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
    )
    words = "--max-steps 6 --min-lr 0 --lr 0.16 --weight-decay 0.04 --weight-decay-end 0.4 --teacher-momentum 0.9"
    train(script, tmp_path, *words.split())
    handle.remove()
    assert [args[1] for args, _ in moved] == pytest.approx([cosine_between(0.9, 1, k / 16) for k in range(6)])
    assert len(steps) == 6
    for k, (weights, others) in enumerate(steps):
        rate = 0.01 * (k / 4 if k < 4 else cosine_between(1, 0, (k - 4) / 12))
        assert weights == pytest.approx((rate, cosine_between(0.04, 0.4, k / 16))) and others == pytest.approx(
            (rate, 0)
        )


@pytest.mark.parametrize("script", TO_ZERO)
def test_the_rate_falls_along_a_cosine(script, tmp_path):
    """By the log of eight steps of sixteen, without warm-up: as shares of the first."""
    train(script, tmp_path, "--max-steps", 8, "--warmup-epochs", 0, "--log-every", 1)
    rates = [r["lr"] for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "loss" in r]
    assert len(rates) == 8
    assert [r / rates[0] for r in rates] == pytest.approx([cosine_between(1, 0, k / 16) for k in range(8)], abs=1e-2)
