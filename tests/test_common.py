"""ResNet, LARS, schedules, checkpoints, k-NN, synchronised batch norm: the plumbing, piece by piece."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common import checkpoint, distributed, knn, optim
from common.resnet import resnet


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
    x = torch.randn(2, 3, 32, 32)
    small = resnet("resnet18", 0.25, image_size=32)
    assert [tuple(m.shape[1:]) for m in small.stages(x)] == [
        (16, 32, 32),
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
    ]
    assert small.dim == 128 and isinstance(small.maxpool, nn.Identity)
    large = resnet("resnet50", image_size=224)
    shapes = [tuple(m.shape[1:]) for m in large.stages(torch.randn(1, 3, 224, 224))]
    assert shapes == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert resnet("resnet18", image_size=64).conv1.stride == (1, 1)
    assert resnet("resnet18", image_size=65).conv1.stride == (2, 2)


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
    assert [optim.cosine(s, 100, 10) for s in (0, 5, 10)] == [0, 0.5, 1]
    assert optim.cosine(55, 100, 10) == pytest.approx(0.5)
    assert optim.cosine(100, 100, 10) == pytest.approx(0)
    assert optim.cosine(100, 100, 10, final=0.001) == pytest.approx(0.001)
    assert optim.cosine(0, 100) == 1


# ---------------------------------------------------------------------------------------------------- nearest
def slow_knn(train, labels, test, k, temperature):
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    predictions = []
    for x in test:
        similarity = train @ x
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
    from common.augment import EvalView
    from common.data import Fake

    backbone = resnet("resnet18", 0.125, 16).train()
    before = copy.deepcopy(backbone.state_dict())
    features, labels = knn.extract(backbone, Fake(21, 0, 16), EvalView(16), "cpu", workers=2, batch_size=8)
    assert features.shape == (21, 64) and labels.tolist() == [i % 10 for i in range(21)]
    assert backbone.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


# ------------------------------------------------------------------------------------------------- checkpoints
def test_backbone_round_trip_and_torchvision_file(tmp_path):
    network = resnet("resnet18", 0.25, 32)
    meta = {"arch": "resnet18", "width": 0.25, "image_size": 32, "method": "x", "mean": [0.5] * 3, "std": [0.5] * 3}
    meta["channels"] = 3
    checkpoint.save(tmp_path / "b.pt", {"backbone": network.state_dict(), "meta": meta})
    loaded, found = checkpoint.load_backbone(tmp_path / "b.pt")
    assert found == meta
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.state_dict().items())
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "tv.pt")
    loaded, found = checkpoint.load_backbone(tmp_path / "tv.pt", arch="resnet18")
    assert found["arch"] == "resnet18" and loaded.dim == 512


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle was executed",))


def test_bad_checkpoints_end_with_one_line(tmp_path, capsys):
    half = {k: v for k, v in resnet("resnet18").state_dict().items() if not k.startswith("layer4")}
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(half, tmp_path / "half.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "bomb2.pt").write_bytes(pickle.dumps(Bomb()))
    cases = {"missing.pt": "no such file", "text.pt": "not a checkpoint", "empty.pt": "not a checkpoint"}
    cases |= {"half.pt": "only 90/120 tensors", "other.pt": "no backbone found", "list.pt": "not a dictionary"}
    cases |= {"bomb.pt": "safely", "bomb2.pt": "safely"}
    for name, words in cases.items():
        with pytest.raises(SystemExit) as stop:
            checkpoint.load_backbone(tmp_path / name, arch="resnet18")
        out = capsys.readouterr()
        assert stop.value.code == 2 and out.err.count("\n") == 1 and words in out.err, (name, out.err)
        assert "executed" not in out.out + out.err


# ------------------------------------------------------------------------------------------------- distributed
def test_everything_is_the_identity_in_one_process():
    x = torch.randn(3, 2)
    assert distributed.gather(x) is x and distributed.all_reduce(x) is x and distributed.gather_uneven(x) is x
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert distributed.sync_batch_norm(model) is model and distributed.parallel(model) is model
    assert distributed.any_process(True, "cpu") is True


@pytest.mark.parametrize("affine", [True, False])
def test_own_batch_norm_equals_torch(affine):
    torch.manual_seed(1)
    theirs = nn.BatchNorm2d(3, affine=affine).double()
    ours = distributed.SyncBatchNorm(3, affine=affine).double()
    for _ in range(2):
        a = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        weight = torch.randn_like(a)
        (theirs(a) * weight).sum().backward()
        (ours(b) * weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=0)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.eval()(a), theirs.eval()(a), atol=1e-12, rtol=0)
