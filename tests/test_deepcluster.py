"""DeepCluster: the Sobel filter, who sees which clusters, the classifier of an epoch, what the log tells."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import deepcluster
from common.checkpoint import load_backbone
from common.kmeans import kmeans
from common.loader import Loader
from common.resnet import resnet
from tests.helpers import SMALL, logged, main, records, refused, rows, train

FLAGS = ["--no-sobel", "--epochs", "3", "--warmup-epochs", "0"]  # 4 steps per epoch


def small_model(clusters=6):
    torch.manual_seed(0)
    return deepcluster.DeepCluster(resnet(*SMALL, input_filter=deepcluster.sobel_filter()), 64, clusters)


# ------------------------------------------------------------------------------------------------------ Sobel
def test_sobel_equals_a_convolution_by_hand():
    images = rows(2, 3, 5, 7)
    grey = np.pad(images.numpy().mean(1), ((0, 0), (1, 1), (1, 1)))
    kernels = [[[1, 0, -1], [2, 0, -2], [1, 0, -1]], [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]]
    expected = np.zeros((2, 2, 5, 7))
    for n, c, i, j in np.ndindex(expected.shape):
        expected[n, c, i, j] = (grey[n, i : i + 3, j : j + 3] * kernels[c]).sum()
    seen, backbone = [], small_model().backbone.double()
    backbone.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    backbone(images)
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-6)  # the filter's thirds are single precision
    assert backbone.conv1.weight.shape == (8, 2, 3, 3)


def test_sobel_ignores_colour_and_brightness():
    backbone = small_model().backbone.eval()
    grey = rows(4, 1, 16, 16).float().repeat(1, 3, 1, 1)
    tint = torch.tensor([0.6, -0.4, -0.2]).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(backbone(grey), backbone(grey + tint), atol=1e-5)
        assert not torch.allclose(backbone(grey), backbone(grey.transpose(2, 3)), atol=1e-2)


def test_sobel_is_saved_never_trained_and_applied_by_evaluations(tmp_path, capsys):
    words = ["--max-steps", 4, "--lr", 5, "--weight-decay", 0.1]
    saved, model = train("deepcluster", tmp_path / "a", *words), small_model()
    parameters = dict(model.named_parameters())
    assert not any("filter" in name for name in parameters)
    assert sum(len(g["params"]) for g in saved["optimizer"]["param_groups"]) == len(parameters)
    assert torch.equal(saved["model"]["backbone.input_filter"], deepcluster.sobel_filter())
    plain = train("deepcluster", tmp_path / "b", *words, "--no-sobel")["model"]
    assert "backbone.input_filter" not in plain and plain["backbone.conv1.weight"].shape[1] == 3

    model.load_state_dict(saved["model"])
    x = rows(2, 3, 16, 16).float()
    for name in ("backbone.pt", "last.pt"):
        loaded, meta = load_backbone(tmp_path / "a" / name)
        torch.testing.assert_close(loaded.eval()(x), model.eval().backbone(x), atol=1e-5, rtol=1e-5)
        assert meta["method"] == "deepcluster"
    words = ["--pretrained", tmp_path / "a" / "backbone.pt", "--data", "fake:64", "--k", 5, "--workers", 0]
    result = main("eval_knn", *words)
    assert result["method"] == "deepcluster" and 0 <= result["knn"]["5"]["top1"] <= 100
    assert "tensors matched 121/121" in capsys.readouterr().out  # torchvision's 120 and the filter


def test_weights_of_an_image_network_are_refused_for_edges(tmp_path, capsys):
    torch.save(resnet(*SMALL).state_dict(), tmp_path / "plain.pt")
    words = ["--init", tmp_path / "plain.pt"]
    assert "input_filter missing" in refused(capsys, train, "deepcluster", tmp_path / "run", *words)
    train("deepcluster", tmp_path / "run", *words, "--no-sobel", "--max-steps", 1)


# ---------------------------------------------------------------------------------------------------- clusters
def test_clusters_count_as_their_weights_say():
    """See test_banks.py for the weighted loss: here are the weights, and the loss without."""
    labels = np.repeat([0, 2, 3], [16, 1, 4])  # cluster 1 and 4 are empty
    weights, expected = deepcluster.cluster_weights(labels, 5).numpy(), np.array([16, 1, 4]) ** -0.5
    np.testing.assert_allclose(weights[[0, 2, 3]], expected / expected.mean(), atol=1e-10)
    assert weights[1] == weights[4] == 0
    sampled = np.concatenate([labels[deepcluster.uniform_order(labels, 0, e)] for e in range(300)])
    assert weights[sampled].mean() == pytest.approx(1, abs=0.03)
    logits, targets = rows(21, 5), torch.from_numpy(labels)
    torch.testing.assert_close(deepcluster.cluster_loss(logits, targets), F.cross_entropy(logits, targets))


def test_clusters_are_those_of_whitened_unit_features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)) * [30, 10, 3, 1, 1, 0.1] + rng.normal(size=6)
    centred = x - x.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / 199)
    white = (centred @ vectors / np.sqrt(values))[:, 2:]  # ascending: the leading four
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    labels = deepcluster.cluster(torch.from_numpy(x), 5, 4, seed=7)
    # k-means does not care which way the axes point
    assert torch.equal(labels, kmeans(torch.from_numpy(white), 5, seed=7).assignments)
    assert not torch.equal(labels, kmeans(torch.from_numpy(x), 5, seed=7).assignments)


def test_training_uses_and_reports_the_clusters_of_its_epoch(tmp_path, monkeypatch, capsys):
    """Every epoch gets clusters of its own; each step's labels must be the new ones of the images it shows."""
    rng = np.random.default_rng(0)
    tables, seeds, indices, labels = [rng.integers(0, 6, 64) for _ in range(3)], [], [], []
    tables[2] = np.where(np.arange(64) < 50, tables[1], tables[2])
    original, batches = deepcluster.cluster_loss, Loader.epoch

    def cluster(features, clusters, pca_dim, seed):
        assert features.shape == (64, 64) and (clusters, pca_dim) == (6, 8)
        seeds.append(seed)
        return torch.from_numpy(tables[len(seeds) - 1])

    def epoch(loader, e, start, order):
        assert np.array_equal(order, deepcluster.uniform_order(tables[e], 3, e))
        for batch in batches(loader, e, start, order):
            indices.append(batch.indices)
            yield batch

    monkeypatch.setattr(deepcluster, "cluster", cluster)
    monkeypatch.setattr(deepcluster, "cluster_loss", lambda x, y, w: labels.append(y.clone()) or original(x, y, w))
    monkeypatch.setattr(Loader, "epoch", epoch)
    saved = train("deepcluster", tmp_path, *FLAGS)
    assert len(set(seeds)) == 3 and len(labels) == len(indices) == 12
    for step, (i, y) in enumerate(zip(indices, labels, strict=True)):
        assert np.array_equal(y.numpy(), tables[step // 4][i.numpy()]), f"step {step}"
    assert np.array_equal(saved["model"]["labels"].numpy(), tables[2])

    notes = [r for r in logged(tmp_path) if "clusters" in r]
    assert [r["step"] for r in notes] == [0, 4, 8]
    for e, record in enumerate(notes):
        report = deepcluster.cluster_report(tables[e], tables[e - 1] if e else None, np.arange(64) % 10)
        assert {k: v for k, v in record.items() if k not in ("step", "seconds")} == report
    assert notes[1]["nmi_previous"] < 0.3 < 0.5 < notes[2]["nmi_previous"] < 1
    assert f"step 8: clusters 6  largest {notes[2]['largest']}  nmi_previous" in capsys.readouterr().out


def test_resuming_clusters_at_the_start_of_an_epoch_only(tmp_path, monkeypatch):
    calls, cluster = [], deepcluster.cluster
    monkeypatch.setattr(deepcluster, "cluster", lambda *a: calls.append(cluster(*a)) or calls[-1].clone())
    for steps, expected in ((6, 2), (8, 2), (9, 3)):
        labels = train("deepcluster", tmp_path, *FLAGS, "--max-steps", steps)["model"]["labels"]
        assert len(calls) == expected and torch.equal(labels, calls[-1])


# -------------------------------------------------------------------------------------------------- classifier
def test_new_classifier_is_random_and_reproducible():
    model, heads = small_model(clusters=500), []
    for seed in (5, 6, 5):
        torch.nn.init.ones_(model.head.bias)
        model.renew_head(seed)
        assert model.head.bias.abs().max() == 0
        assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert abs(model.head.weight.mean().item()) < 3e-4
        heads.append(model.head.weight.detach().clone())
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])


def test_classifier_starts_anew_in_each_epoch_without_momentum(tmp_path, monkeypatch):
    started, renew = [], deepcluster.DeepCluster.renew_head

    def record(model, seed):
        renew(model, seed)
        started.append(model.head.weight.detach().clone())

    monkeypatch.setattr(deepcluster.DeepCluster, "renew_head", record)
    # weight decay alone moves the classifier: at lr 1 and decay 0.5 every step halves it, if nothing is left over
    monkeypatch.setattr(deepcluster, "cluster_loss", lambda logits, *_: 0 * logits.sum())
    flags = [*FLAGS, "--lr", 16, "--weight-decay", 0.5, "--momentum", 0.5, "--max-steps", 10]
    saved = train("deepcluster", tmp_path, *flags)
    assert len(started) == 3
    assert not torch.allclose(started[0], started[1]) and not torch.allclose(started[1], started[2])
    torch.testing.assert_close(saved["model"]["head.weight"], started[2] / 4)
    backbone, head = saved["optimizer"]["param_groups"]
    assert (backbone["momentum"], head["momentum"], len(head["params"])) == (0.5, 0, 2)
    buffers = saved["optimizer"]["state"]
    assert all(buffers[p]["momentum_buffer"] is not None for p in backbone["params"])
    assert all(buffers.get(p, {}).get("momentum_buffer") is None for p in head["params"])


def test_too_many_clusters_are_warned_of_and_the_learning_rate_is_constant(tmp_path, capsys):
    train("deepcluster", tmp_path, "--max-steps", 9, "--clusters", 32)
    assert "fewer than ten images per cluster, 6 would be better" in capsys.readouterr().err
    rates, peak = [r["lr"] for r in records(tmp_path).values()], 0.05 * 16 / 256
    assert rates == pytest.approx([0, peak / 4, peak / 2, 3 * peak / 4, *[peak] * 5])
