"""DeepCluster: the Sobel filter, the clusters and who sees them, uniform sampling, the new classifier, the files."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import deepcluster
import eval_knn
from common.checkpoint import load_backbone
from common.data import Fake, Files, build
from common.kmeans import kmeans
from common.resnet import resnet
from tests.helpers import records, train

FLAGS = ["--no-sobel", "--epochs", "3", "--warmup-epochs", "0"]  # 4 steps per epoch


def notes(out):
    """The records of the clusterings, in order."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [r for r in lines if "clusters" in r]


def small_model(clusters=6):
    torch.manual_seed(0)
    return deepcluster.DeepCluster(resnet("resnet18", 0.125, 16, input_filter=deepcluster.sobel_filter()), 9, clusters)


def size(run):
    """Images of each class that occurs."""
    return np.unique(run, return_counts=True)[1]


# ------------------------------------------------------------------------------------------------------ Sobel
def test_sobel_equals_a_convolution_by_hand():
    images = np.random.default_rng(0).normal(size=(2, 3, 5, 7))
    grey = np.pad(images.mean(1), ((0, 0), (1, 1), (1, 1)))
    x_kernel = [[1, 0, -1], [2, 0, -2], [1, 0, -1]]
    y_kernel = [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]
    expected = np.zeros((2, 2, 5, 7))
    for n, c, i, j in np.ndindex(expected.shape):
        expected[n, c, i, j] = (grey[n, i : i + 3, j : j + 3] * (x_kernel, y_kernel)[c]).sum()
    seen = []
    backbone = small_model().backbone.double()
    backbone.conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    backbone(torch.from_numpy(images))
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-6)  # the filter's thirds are single precision
    assert backbone.conv1.weight.shape == (8, 2, 3, 3)


def test_sobel_ignores_colour_and_brightness():
    backbone = small_model().backbone.eval()
    grey = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)).repeat(1, 3, 1, 1)
    tint = torch.tensor([0.6, -0.4, -0.2]).view(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(backbone(grey), backbone(grey + tint), atol=1e-5)
        assert not torch.allclose(backbone(grey), backbone(grey.transpose(2, 3)), atol=1e-2)


def test_sobel_is_saved_and_never_trained(tmp_path):
    flags = ["--max-steps", 6, "--lr", 5, "--weight-decay", 0.1]
    saved = train("deepcluster", tmp_path / "a", *flags)
    assert torch.equal(saved["model"]["backbone.input_filter"], deepcluster.sobel_filter())
    parameters = dict(small_model().named_parameters())
    assert not any("filter" in name for name in parameters)
    assert sum(len(g["params"]) for g in saved["optimizer"]["param_groups"]) == len(parameters)
    plain = train("deepcluster", tmp_path / "b", *flags, "--no-sobel")["model"]
    assert "backbone.input_filter" not in plain and plain["backbone.conv1.weight"].shape[1] == 3


def test_evaluation_applies_the_sobel_filter_by_itself(tmp_path, capsys):
    flags = ["--max-steps", 4, "--lr", 1]
    model = small_model()
    model.labels = torch.zeros(64, dtype=torch.int64)
    model.load_state_dict(train("deepcluster", tmp_path, *flags)["model"])
    x = torch.randn(2, 3, 16, 16)
    for name in ("backbone.pt", "last.pt"):
        loaded, meta = load_backbone(tmp_path / name)
        torch.testing.assert_close(loaded.eval()(x), model.eval().backbone(x), atol=1e-5, rtol=1e-5)
        assert meta["method"] == "deepcluster"
    words = ["--pretrained", tmp_path / "backbone.pt", "--data", "fake:64", "--k", 5, "--workers", 0]
    result = eval_knn.main(eval_knn.parse_args([str(w) for w in words]))
    assert result["method"] == "deepcluster" and 0 <= result["knn"]["5"]["top1"] <= 100
    assert "tensors matched 121/121" in capsys.readouterr().out  # torchvision's 120 and the filter


def test_weights_of_an_image_network_are_refused_for_edges(tmp_path, capsys):
    torch.save(resnet("resnet18", 0.125, 16).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(SystemExit) as stopped:
        train("deepcluster", tmp_path / "run", "--init", tmp_path / "plain.pt")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "input_filter missing" in error and error.count("\n") == 1
    train("deepcluster", tmp_path / "run", "--init", tmp_path / "plain.pt", "--no-sobel", "--max-steps", 1)


# ------------------------------------------------------------------------------------------------------- loss
def test_loss_and_weights_equal_numpy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 3, 3, 1, 4, 0, 3])
    weights = torch.rand(5, dtype=torch.float64, generator=generator)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    terms = [-math.log(p[i, y]) for i, y in enumerate(labels.tolist())]
    assert deepcluster.cluster_loss(logits, labels).item() == pytest.approx(np.mean(terms), abs=1e-10)
    terms = [weights[y].item() * t for t, y in zip(terms, labels.tolist(), strict=True)]
    assert deepcluster.cluster_loss(logits, labels, weights).item() == pytest.approx(np.mean(terms), abs=1e-10)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: deepcluster.cluster_loss(x, labels, weights), logits)


def test_cluster_weights_equal_numpy():
    labels = np.repeat([0, 2, 3], [16, 1, 4])  # cluster 1 and 4 are empty
    weights = deepcluster.cluster_weights(labels, 5).numpy()
    expected = np.array([16, 1, 4]) ** -0.5
    np.testing.assert_allclose(weights[[0, 2, 3]], expected / expected.mean(), atol=1e-10)
    assert weights[1] == weights[4] == 0
    sampled = np.concatenate([labels[deepcluster.uniform_order(labels, 0, e)] for e in range(300)])
    assert weights[sampled].mean() == pytest.approx(1, abs=0.03)


def test_chance_is_the_logarithm_of_the_clusters():
    labels = np.repeat(np.arange(4), [8, 8, 2, 2])
    weights = deepcluster.cluster_weights(labels, 4)
    each = torch.arange(4)
    for w in (None, weights):
        loss = deepcluster.cluster_loss(torch.zeros(4, 4, dtype=torch.float64), each, w)
        assert loss.item() == pytest.approx(math.log(4), abs=1e-12)


# --------------------------------------------------------------------------------------------------- sampling
def test_uniform_order_takes_as_many_of_each_cluster():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 6], [700, 250, 49, 1]))  # 2, 4, 5 are empty
    order = deepcluster.uniform_order(labels, seed=1, epoch=2)
    share = 1000 // 4 + 1
    assert len(order) == 1000 and order.dtype == np.int64
    counts = np.bincount(labels[order], minlength=7)
    assert counts[[2, 4, 5]].sum() == 0
    assert all(share - 4 <= counts[c] <= share for c in (0, 1, 3, 6))  # 4 x 251 are drawn and cut to 1000
    large = order[labels[order] == 0]
    assert len(set(large)) == len(large), "a large cluster is drawn from without replacement"
    assert 40 <= len(set(order[labels[order] == 3])) <= 49, "a small one with, so nearly all of it comes up"
    assert len(set(order[labels[order] == 1])) < 200, "250 images for 251 places: with replacement"
    runs = size(np.flatnonzero(labels[order] == 0) // 100)
    assert len(runs) == 10 and runs.max() < 50, "clusters are mixed over the epoch"


def test_uniform_order_depends_on_seed_epoch_and_labels_only():
    labels = np.arange(60) % 7
    first = deepcluster.uniform_order(labels, 3, 4)
    np.random.default_rng(9).random(5)
    assert np.array_equal(first, deepcluster.uniform_order(labels.copy(), 3, 4))
    for seed, epoch in ((3, 5), (4, 4)):
        assert not np.array_equal(first, deepcluster.uniform_order(labels, seed, epoch))


def test_uniform_order_of_one_cluster_and_of_single_images():
    assert len(deepcluster.uniform_order(np.zeros(10, np.int64), 0, 0)) == 10
    singles = deepcluster.uniform_order(np.arange(10), 0, 0)  # two places each, ten of twenty kept
    assert len(singles) == 10 and size(singles).max() <= 2


# ---------------------------------------------------------------------------------------------------- clusters
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


def test_training_uses_the_clusters_of_its_epoch(tmp_path, monkeypatch):
    """Every epoch gets clusters of its own; each step's labels must be the new ones of the images it shows."""
    rng = np.random.default_rng(0)
    tables, calls, indices, labels = [rng.integers(0, 6, 64) for _ in range(3)], [], [], []

    def cluster(features, clusters, pca_dim, seed):
        assert features.shape == (64, 64) and (clusters, pca_dim) == (6, 8)
        calls.append(seed)
        return torch.from_numpy(tables[len(calls) - 1])

    def loss(logits, y, weights):
        labels.append(y.clone())
        return original(logits, y, weights)

    def epoch(loader, e, start, order):
        assert np.array_equal(order, deepcluster.uniform_order(tables[e], 3, e))
        for batch in batches(loader, e, start, order):
            indices.append(batch.indices)
            yield batch

    original, batches = deepcluster.cluster_loss, deepcluster.Loader.epoch
    monkeypatch.setattr(deepcluster, "cluster", cluster)
    monkeypatch.setattr(deepcluster, "cluster_loss", loss)
    monkeypatch.setattr(deepcluster.Loader, "epoch", epoch)
    saved = train("deepcluster", tmp_path, *FLAGS)
    assert len(set(calls)) == 3 and len(labels) == len(indices) == 12
    for step, (i, y) in enumerate(zip(indices, labels, strict=True)):
        assert np.array_equal(y.numpy(), tables[step // 4][i.numpy()]), f"step {step}"
    assert np.array_equal(saved["model"]["labels"].numpy(), tables[2])


def test_resuming_clusters_at_the_start_of_an_epoch_only(tmp_path, monkeypatch):
    calls, cluster = [], deepcluster.cluster
    monkeypatch.setattr(deepcluster, "cluster", lambda *a: calls.append(cluster(*a)) or calls[-1].clone())
    first = train("deepcluster", tmp_path, *FLAGS, "--max-steps", 6)["model"]["labels"]
    assert len(calls) == 2 and torch.equal(first, calls[1])
    second = train("deepcluster", tmp_path, *FLAGS, "--max-steps", 8)["model"]["labels"]
    assert len(calls) == 2 and torch.equal(first, second)
    third = train("deepcluster", tmp_path, *FLAGS, "--max-steps", 9)["model"]["labels"]
    assert len(calls) == 3 and torch.equal(third, calls[2])


def test_features_are_clustered_in_eval_mode_without_augmentation(tmp_path, monkeypatch):
    """What `cluster` gets are the features of the initial weights with running statistics, image by image, in order."""
    seen, cluster = [], deepcluster.cluster
    monkeypatch.setattr(deepcluster, "cluster", lambda f, *a: seen.append(f) or cluster(f, *a))
    flags = ["--data", "fake:16", "--image-size", 64, "--width", 0.25, "--clusters", 3]
    train("deepcluster", tmp_path, *FLAGS, *flags, "--max-steps", 1)
    torch.manual_seed(3)
    backbone = resnet("resnet18", 0.25, 64).eval()
    images = torch.stack([Fake(16, 0)[i][0] for i in range(16)]).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = backbone((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- classifier
def test_new_classifier_is_random_and_reproducible():
    model = small_model(clusters=500)
    heads = []
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


# ------------------------------------------------------------------------------------------------------- files
def nmi(a, b):
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    pa, pb = joint.sum(1), joint.sum(0)
    outer = np.outer(pa, pb)
    mutual = (joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum()
    return 2 * mutual / -((pa[pa > 0] * np.log(pa[pa > 0])).sum() + (pb[pb > 0] * np.log(pb[pb > 0])).sum())


def test_report_equals_numpy():
    rng = np.random.default_rng(0)
    labels, previous, truth = rng.integers(0, 9, 500), rng.integers(0, 9, 500), rng.integers(-1, 4, 500)
    labels[:300], labels[labels == 7] = previous[:300], 2
    report = deepcluster.cluster_report(labels, previous, truth)
    assert report["clusters"] == 8
    assert report["largest"] == pytest.approx(np.bincount(labels).max() / 500, abs=1e-4)
    assert report["nmi_previous"] == pytest.approx(nmi(previous, labels), abs=1e-4)
    assert report["nmi_labels"] == pytest.approx(nmi(truth[truth >= 0], labels[truth >= 0]), abs=1e-4)
    assert deepcluster.cluster_report(labels, labels)["nmi_previous"] == 1
    assert deepcluster.cluster_report(labels).keys() == {"clusters", "largest"}


def test_log_tells_the_clusters_of_each_epoch(tmp_path, monkeypatch, capsys):
    rng, given = np.random.default_rng(0), []
    table = [rng.integers(0, 4, 64) for _ in range(3)]
    table[2] = np.where(np.arange(64) < 50, table[1], table[2])
    monkeypatch.setattr(deepcluster, "cluster", lambda *_: torch.from_numpy(table[len(given)]))
    report = deepcluster.cluster_report
    monkeypatch.setattr(deepcluster, "cluster_report", lambda *a: given.append(a) or report(*a))
    train("deepcluster", tmp_path, *FLAGS)
    logged, truth = notes(tmp_path), np.arange(64) % 10
    assert [r["step"] for r in logged] == [0, 4, 8] and "nmi_previous" not in logged[0]
    for epoch, record in enumerate(logged):
        assert record["clusters"] == 4
        assert record["largest"] == pytest.approx(np.bincount(table[epoch]).max() / 64, abs=1e-4)
        assert record["nmi_labels"] == pytest.approx(nmi(truth, table[epoch]), abs=1e-4)
        if epoch:
            assert record["nmi_previous"] == pytest.approx(nmi(table[epoch - 1], table[epoch]), abs=1e-4)
    assert logged[1]["nmi_previous"] < 0.3 < 0.5 < logged[2]["nmi_previous"] < 1
    assert f"step 8: clusters 4  largest {logged[2]['largest']}  nmi_previous" in capsys.readouterr().out


def test_unlabelled_images_and_dump(tmp_path):
    """A flat folder without labels: no NMI with labels, and a table of which image is in which cluster."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f'{i:02}, "odd".png')
    flags = ["--data", folder, "--batch-size", 10, "--clusters", 3, "--dump-clusters", tmp_path / "clusters.csv"]
    saved = train("deepcluster", tmp_path / "run", *flags, "--max-steps", 3)
    with open(tmp_path / "clusters.csv", newline="") as file:
        header, *rows = csv.reader(file)
    data = build(str(folder), "train")
    assert header == ["path", "cluster"]
    assert [row[0] for row in rows] == [data.path(i) for i in range(20)]
    assert [int(row[1]) for row in rows] == saved["model"]["labels"].tolist()
    assert [r.keys() & {"nmi_previous", "nmi_labels"} for r in notes(tmp_path / "run")] == [set(), {"nmi_previous"}]
    assert not list(tmp_path.glob("*.tmp"))


def test_dump_of_names_that_are_no_utf8(tmp_path):
    names = [b"caf\xe9.jpg", "ä\nb.jpg".encode()]
    data = Files("/x", names)
    deepcluster.dump_clusters(tmp_path / "c.csv", data, np.array([4, 2]))
    assert b"/x/caf\xe9.jpg,4\r\n" in (tmp_path / "c.csv").read_bytes()


# ---------------------------------------------------------------------------------------------------- arguments
def test_numbers_of_clusters():
    sizes = deepcluster.cluster_sizes
    assert sizes(None, None, 1_281_167, 2048) == (10000, 256)
    assert sizes(None, None, 50_000, 512) == (500, 128)
    assert sizes(None, None, 150, 64) == (2, 16)
    assert sizes(30, 7, 150, 64) == (30, 7)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--clusters", 10000], "--clusters 10000 for 64 images: use at most 6, "),
        (["--pca-dim", 65], "--pca-dim 65 for features with 64 dimensions: use a number from 1 to 64"),
        (["--clusters", 1], "--clusters must be at least 2"),
        (["--dump-clusters", "/nowhere/x.csv"], "--dump-clusters /nowhere/x.csv: its folder does not exist"),
    ],
)
def test_impossible_flags_end_in_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("deepcluster", tmp_path, *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1


def test_start_says_what_was_chosen(tmp_path, capsys):
    words = "--data fake:200 --arch resnet18 --width 0.125 --image-size 16 --batch-size 16 --workers 0 --max-steps 1"
    deepcluster.main(deepcluster.parse_args([*words.split(), "--knn-every", "0", "--out", str(tmp_path)]))
    shown = capsys.readouterr()
    assert "2 (a hundredth of the images), of features whitened to 16 dimensions, seeing edges (Sobel)" in shown.out
    assert f"loss ln(2) = {math.log(2):.2f}" in shown.out and "fewer than ten" not in shown.err
    train("deepcluster", tmp_path / "many", "--max-steps", 1, "--clusters", 32)
    assert "fewer than ten images per cluster, 6 would be better" in capsys.readouterr().err


def test_recipe_is_the_official_one():
    args = deepcluster.parse_args(["--data", "/images"])
    assert (args.lr, args.batch_size, args.weight_decay, args.momentum, args.epochs) == (0.05, 256, 1e-5, 0.9, 200)
    assert args.sobel and not args.reweight and args.clusters is None and args.arch == "resnet50"
    (view,) = deepcluster.augmentation(224)
    assert (view.crop, view.flip, view.jitter_p, view.gray_p, view.blur_p) == ((0.08, 1.0), 0.5, 0, 0, 0)
    (view,) = deepcluster.augmentation(224, jitter=True)
    assert (view.jitter, view.jitter_p, view.gray_p) == ((0.4, 0.4, 1.0, 0.5), 1, 0.2)


def test_learning_rate_is_constant(tmp_path):
    train("deepcluster", tmp_path, "--max-steps", 9)
    rates = [r["lr"] for r in records(tmp_path).values()]
    peak = 0.05 * 16 / 256
    assert rates == pytest.approx([0, peak / 4, peak / 2, 3 * peak / 4, *[peak] * 5])
