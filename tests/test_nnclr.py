"""NNCLR: the loss against NumPy and over processes, the search for neighbours, the queue with its labels, monitors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnclr
from common.resnet import resnet
from nnclr import NNCLR, nnclr_loss
from tests.helpers import EXACT, SMALL, as_processes, main, records, refused, rows, state, train, unit


def small_model(queue=10):
    torch.manual_seed(0)
    return NNCLR(resnet(*SMALL), dim=8, hidden_dim=12, pred_dim=6, queue=queue).double()


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_equals_numpy(temperature):
    n1, n2, p1, p2 = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows(4, 6, 5).numpy())
    total = 0.0
    for n, p in ((n1, p2), (n2, p1)):
        for i in range(6):
            others = [math.exp(n[i] @ p[k] / temperature) for k in range(6)]
            total -= math.log(others[i] / sum(others))
    assert nnclr_loss(*rows(4, 6, 5), temperature).item() == pytest.approx(total / 12, abs=1e-10)


@pytest.mark.parametrize("b", [1, 2, 17])
def test_equal_rows_give_chance(b):
    z = torch.ones(b, 4, dtype=torch.float64)
    assert nnclr_loss(z, z, z, z, 0.1).item() == pytest.approx(math.log(b), abs=1e-12)


def test_two_processes_have_the_loss_and_gradient_of_one(monkeypatch):
    weight = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5).cos().requires_grad_()
    outputs = rows(2, 12, 5, seed=1).unbind() + rows(2, 12, 7).unbind()

    def loss(n1, n2, p1, p2):
        return nnclr_loss(n1, n2, p1 @ weight, p2 @ weight, 0.5)

    (gradient,) = torch.autograd.grad(loss(*outputs), weight)
    losses = as_processes(monkeypatch, nnclr, loss, *zip(*(x.chunk(2) for x in outputs), strict=True))
    assert sum(losses).item() / 2 == pytest.approx(loss(*outputs).item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sum(losses) / 2, weight)[0], gradient, atol=1e-10, rtol=1e-12)
    assert gradient.abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- neighbours, queue
@pytest.mark.parametrize("most", [2**24, 30, 1])
def test_nearest_is_that_of_a_loop(most, monkeypatch):
    monkeypatch.setattr(nnclr, "MOST", most)
    model, z = small_model(), 3 * rows(7, 8)
    slow = [max(range(10), key=lambda k: float(F.normalize(x, dim=0) @ model.queue[k])) for x in z]
    assert model.nearest(z).tolist() == slow and len(set(slow)) > 2


@pytest.mark.parametrize("sizes", [[3] * 9, [5, 7, 2, 10], [23, 1, 10], [40, 3]])
def test_queue_and_labels_equal_lists(sizes):
    model = small_model()
    slow, kinds, place = model.queue.tolist(), [-1] * 10, 0
    assert model.labels.tolist() == kinds
    torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(10, dtype=torch.float64), atol=1e-6, rtol=0)
    for seed, n in enumerate(sizes):
        keys, labels = unit(n, 8, seed=seed), torch.arange(n) + 100 * seed
        model.enqueue(keys, labels)
        for row, label in zip(keys.tolist(), labels.tolist(), strict=True):
            slow[place], kinds[place] = row, label
            place = (place + 1) % 10
        assert (model.queue.tolist(), model.labels.tolist(), model.oldest.item()) == (slow, kinds, place)


def test_monitors_of_neighbours(monkeypatch):
    """Distinct neighbours are counted over all processes: 1 2 2 on one, 2 4 4 on the other, are three of six."""
    model, z = small_model(), rows(6, 8)
    model.labels = torch.arange(10)
    nearest, labels = torch.tensor([1, 2, 2, 2, 4, 4]), torch.tensor([1, 2, 3, 0, 0, 4])
    found = nnclr.neighbourhood(model, z, nearest, labels)
    cosines = [float(F.normalize(a, dim=0) @ model.queue[k]) for a, k in zip(z, nearest, strict=True)]
    assert found["distinct"].item() == 0.5 and found["same"].item() == 0.5
    assert found["agree"].item() == pytest.approx(np.mean(cosines), rel=1e-6)
    assert found.keys() - nnclr.neighbourhood(model, z, nearest, None).keys() == {"same"}
    parts = [(model, z[half], nearest[half], None) for half in (slice(0, 3), slice(3, 6))]
    both = as_processes(monkeypatch, nnclr, nnclr.neighbourhood, *parts)
    assert [part["distinct"].item() for part in both] == [0.5, 0.5]


# ----------------------------------------------------------------------------------------------- model, training
def test_model_follows_the_paper():
    model = small_model()
    layers = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(m) for m in model.projector] == [*layers, *layers, *layers[:2]]
    assert [type(m) for m in model.predictor] == [*layers, nn.Linear]
    shapes = [tuple(m.weight.shape) for m in (*model.projector[::3], *model.predictor[::3])]
    assert shapes == [(12, 64), (12, 12), (8, 12), (6, 8), (8, 6)] and model.predictor[3].bias is not None


def test_a_step_searches_in_the_queue_before_it_takes_the_first_view(tmp_path, monkeypatch):
    """Micro-batches see the same queue; all projections of the first view, of length 1, enter it with their labels."""
    seen, taken, loss, enqueue = [], [], nnclr.nnclr_loss, NNCLR.enqueue
    monkeypatch.setattr(nnclr, "nnclr_loss", lambda *x: seen.append(x[:2]) or loss(*x))
    monkeypatch.setattr(NNCLR, "enqueue", lambda m, *x: taken.append((m.queue.clone(), *x)) or enqueue(m, *x))
    saved = train("nnclr", tmp_path, *EXACT, "--max-steps", 3, "--accum", 2)["model"]
    assert len(taken) == 3 and len(seen) == 6 and saved["oldest"] == 8  # 40 places, 48 projections
    for step, (queue, keys, labels) in enumerate(taken):
        assert keys.shape == (16, 16) and labels.shape == (16,) and labels.min() >= 0
        torch.testing.assert_close(keys.norm(dim=1), torch.ones(16, dtype=torch.float64))
        for neighbours in (*seen[2 * step], *seen[2 * step + 1]):
            assert ((neighbours[:, None] == queue).all(2).sum(1) == 1).all()
    assert torch.equal(taken[1][0][:16], taken[0][1]) and torch.equal(saved["queue"][:8], taken[2][1][8:])
    assert torch.equal(saved["labels"][8:16], taken[0][2][8:]) and torch.equal(saved["labels"][32:], taken[2][2][:8])
    record = records(tmp_path)[3]
    assert 0 < record["distinct"] <= 1 and 0 <= record["same"] <= 1 and -1 <= record["agree"] <= 1


def test_small_data_gets_a_shorter_queue(tmp_path, capsys):
    words = "--arch resnet18 --width 0.125 --image-size 16 --knn-every 0 --max-steps 1 --workers 0 --dim 4".split()
    words += ["--hidden-dim", 4, "--pred-dim", 4, "--out", tmp_path, "--data", "fake:400", "--batch-size", 16]
    main("nnclr", *words)
    assert state(tmp_path)["model"]["queue"].shape == (32, 4)
    printed = capsys.readouterr().out
    assert "the usual 98,304 are more than 400 images" in printed and "ln(16) = 2.77" in printed


@pytest.mark.parametrize(
    "words, message",
    [
        ("--queue 0", "--queue: must be greater than 0"),
        ("--queue 8", "--queue 8 is smaller than --batch-size 16"),
        ("--temperature 0", "--temperature: must be greater than 0"),
        ("--pred-dim 0", "--pred-dim: must be greater than 0"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    start = ["--data", "fake:64", "--image-size", 16, "--batch-size", 16, "--out", tmp_path]
    assert message in refused(capsys, main, "nnclr", *start, *words.split())
