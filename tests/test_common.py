"""ResNet, LARS, schedules, k-NN, synchronised batch norm: the plumbing, piece by piece."""

import copy
import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common import batchnorm, distributed, files, knn, optim
from common.augment import EvalView
from common.datasets import Fake
from common.features import by_size, extract, output_std
from common.resnet import resnet
from tests.helpers import SMALL, as_processes, different, rows, unit


# --------------------------------------------------------------------------------------------------- backbones
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_equals_torchvision(arch):
    theirs = getattr(torchvision.models, arch)(weights=None).eval()
    theirs.fc = nn.Identity()
    ours = resnet(arch, image_size=224).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == [] and unexpected == []
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_stages_and_small_stem():
    small = resnet("resnet18", 0.25, image_size=32)
    shapes = [tuple(m.shape[1:]) for m in small.stages(torch.randn(2, 3, 32, 32))]
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4)]
    assert small.dim == 128 and isinstance(small.maxpool, nn.Identity)
    with torch.device("meta"):
        shapes = [tuple(m.shape[1:]) for m in resnet("resnet50", image_size=224).stages(torch.randn(1, 3, 224, 224))]
        assert shapes == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
        assert [resnet("resnet18", image_size=size).conv1.stride[0] for size in (64, 65)] == [1, 2]


def test_views_of_several_sizes_pass_by_size():
    """Sizes 8, 6, 8: a network that subtracts the mean of what passes together tells who passed together."""
    views = [rows(2, 3, size, size, seed=size + v) for v, size in enumerate((8, 6, 8))]

    def network(x):
        return x.mean((1, 2, 3)) - x.mean()

    together = torch.cat([views[0], views[2]]).mean()
    found = by_size(network, views)
    for v, mean in enumerate((together, views[1].mean(), together)):
        torch.testing.assert_close(found[v], views[v].mean((1, 2, 3)) - mean)


def test_monitor_of_collapse():
    assert output_std(rows(4000, 32)).item() == pytest.approx(1, abs=0.02)
    assert output_std(torch.ones(5, 32)).item() == 0
    assert output_std(3 * rows(50, 8)).item() == pytest.approx(output_std(rows(50, 8)).item())
    assert output_std(unit(7, 5)).item() == pytest.approx(unit(7, 5).numpy().std(0, ddof=1).mean() * 5**0.5)


# ------------------------------------------------------------------------------------------------ optimisation
def slow_lars(params, grads, buffers, lr, momentum, weight_decay, trust, adapt):
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        g = g + weight_decay * w
        if adapt and np.linalg.norm(w) > 0 and np.linalg.norm(g) > 0:
            g = g * trust * np.linalg.norm(w) / np.linalg.norm(g)
        buffers[i] = momentum * buffers[i] + g
        params[i] = w - lr * buffers[i]


def test_lars_equals_the_slow_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    nn.init.zeros_(model[2].weight)  # a norm of zero: the plain gradient
    groups = optim.param_groups(model, 1e-2)
    assert [p.ndim for p in groups[0]["params"]] == [2, 2] and {p.ndim for p in groups[1]["params"]} == {1}
    optimizer = optim.LARS(groups, lr=0.3)
    slow = [[p.detach().numpy().copy() for p in g["params"]] for g in groups]
    buffers = [[np.zeros_like(p) for p in ps] for ps in slow]
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(6, 5, dtype=torch.float64)).square().sum().backward()
        for g, ps, bs in zip(groups, slow, buffers, strict=True):
            grads = [p.grad.numpy() for p in g["params"]]
            slow_lars(ps, grads, bs, 0.3 / (step + 1), 0.9, g["weight_decay"], 0.001, g["adapt"])
        for group in optimizer.param_groups:
            group["lr"] = 0.3 / (step + 1)
        optimizer.step()
        for g, ps in zip(groups, slow, strict=True):
            for p, expected in zip(g["params"], ps, strict=True):
                np.testing.assert_allclose(p.detach().numpy(), expected, atol=1e-12)


def test_cosine_schedule():
    assert [optim.cosine(s, 100, 10) for s in (0, 5, 10)] == [0, 0.5, 1] and optim.cosine(0, 100) == 1
    assert [optim.cosine(s, 100, 10) for s in (55, 100)] == pytest.approx([0.5, 0])
    assert optim.cosine(100, 100, 10, final=0.001) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("processor", "name", "told"),
    [("AVX2", "bf16", True), ("AVX2", "fp16", True), ("AVX2", "auto", False), ("AVX512", "bf16", False)],
)
def test_slow_precisions_of_a_processor(monkeypatch, capsys, processor, name, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    optim.precision(name, torch.device("cpu"))
    assert ("--precision fp32" in capsys.readouterr().out) == told


# ---------------------------------------------------------------------------------------------------- nearest
def slow_knn(train, labels, test, k, temperature):
    predictions = []
    for x in test:
        similarity = (train @ x) / np.linalg.norm(train, axis=1) / np.linalg.norm(x)
        votes = np.zeros(labels.max() + 1)
        for i in np.argsort(-similarity, kind="stable")[:k]:
            votes[labels[i]] += math.exp(similarity[i] / temperature)
        order = np.argsort(-votes, kind="stable")[:5]
        predictions.append(np.where(votes[order] > 0, order, -1))
    return np.array(predictions)


@pytest.mark.parametrize("n_test", [1, 7, 230])
def test_knn_equals_brute_force(n_test):
    rng = np.random.default_rng(n_test)
    train, test = rng.normal(size=(300, 8)), rng.normal(size=(n_test, 8))
    labels, targets = rng.integers(0, 7, 300), rng.integers(0, 7, n_test)
    tensors = [torch.from_numpy(a) for a in (train, labels, test, targets)]
    for chunk in (2**28, 4 * 300 * 3):  # all at once, and three rows at a time
        result = knn.knn(*tensors, ks=(1, 20, 200), chunk_bytes=chunk)
        for k in (1, 20, 200):
            prediction = slow_knn(train, labels, test, k, 0.07)
            top1 = (prediction[:, 0] == targets).mean() * 100
            top5 = (prediction == targets[:, None]).any(1).mean() * 100
            assert result[k] == pytest.approx((top1, top5))


def test_knn_with_fewer_training_samples_than_k():
    x, y = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn.knn(x, y, x, y, ks=(200,)) == {200: (100.0, 100.0)}


def test_extraction_leaves_the_backbone_as_it_was():
    backbone = resnet(*SMALL).train()
    before = copy.deepcopy(backbone.state_dict())
    features, labels = extract(backbone, Fake(21, 0, 16), EvalView(16), "cpu", workers=2, batch_size=8)
    assert features.shape == (21, 64) and labels.tolist() == [i % 10 for i in range(21)]
    assert backbone.training and different(before, backbone.state_dict()) == []


# ------------------------------------------------------------------------------------------------- distributed
def test_everything_is_the_identity_in_one_process():
    x = torch.randn(3, 2)
    assert distributed.gather(x) is x and distributed.all_reduce(x) is x and distributed.gather_uneven(x) is x
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert batchnorm.sync_batch_norm(model) is model and distributed.parallel(model) is model
    assert distributed.any_process(True, "cpu") is True


@pytest.mark.parametrize("affine", [True, False])
def test_own_batch_norm_equals_torch(affine):
    theirs = nn.BatchNorm2d(3, affine=affine).double()
    ours = batchnorm.SyncBatchNorm(3, affine=affine).double()
    for seed in range(2):
        a, b = (rows(4, 3, 5, 5, seed=seed).requires_grad_() for _ in range(2))
        weight = rows(4, 3, 5, 5, seed=9)
        (theirs(a) * weight).sum().backward()
        (ours(b) * weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.eval()(a), theirs.eval()(a), atol=1e-12, rtol=0)


def test_own_batch_norm_of_uneven_parts_equals_torch_over_all(monkeypatch):
    """Two processes with 4 rows and 1 row, one with none."""
    x, weight = rows(5, 3) + 100, rows(5, 3, seed=9)
    whole, theirs = x.clone().requires_grad_(), nn.BatchNorm1d(3).double()
    (theirs(whole) * weight).sum().backward()
    parts = [(part.clone().requires_grad_(), batchnorm.SyncBatchNorm(3).double()) for part in x.split([4, 1, 0])]
    outs = as_processes(monkeypatch, batchnorm, lambda part, norm: norm(part), *parts)
    torch.testing.assert_close(torch.cat(outs), theirs(x), atol=1e-12, rtol=0)
    (torch.cat(outs) * weight).sum().backward()
    torch.testing.assert_close(torch.cat([part.grad for part, _ in parts]), whole.grad, atol=1e-12, rtol=0)
    for _, norm in parts:
        torch.testing.assert_close(norm.running_var, nn.BatchNorm1d(3).double().running_var * 0.9 + 0.1 * x.var(0))


# ------------------------------------------------------------------------------------------------------- files
def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    with files.atomic(path) as temporary:
        temporary.write_text("one")
        assert not path.exists() and temporary.suffix == ".txt" and temporary.parent == tmp_path
    with pytest.raises(KeyboardInterrupt), files.atomic(path, shared=True) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
