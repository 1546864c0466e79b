"""What the pages with a memory of all images share: rows by index, clusters, their loss, report and table."""

import csv
import importlib
import inspect
import math

import numpy as np
import pytest
import torch

import deepcluster
import npid
import odc
from common import rng
from common.datasets import Fake, Files, open_dataset
from common.resnet import resnet
from tests.helpers import SMALL, logged, main, parsed, refused, rows, train, unit, write_images

CLUSTERED = ["deepcluster", "odc"]
MODELS = {  # of 30 images; the memory of their features
    "npid": (lambda: npid.NPID(resnet(*SMALL), 30, 5), "bank"),
    "odc": (lambda: odc.ODC(resnet(*SMALL), 30, 4, hidden_dim=8, dim=5), "features"),
}


def notes(out):
    """The records about clusters, in order."""
    return [r for r in logged(out) if "clusters" in r]


# ---------------------------------------------------------------------------------------------------- memories
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_update_equals_a_slow_loop(name, momentum):
    """Each row is averaged with its own old value and gets unit length again; other rows stay."""
    make, memory = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    bank = getattr(model, memory)
    bank.copy_(unit(30, 5))
    expected, f, indices = bank.numpy().copy(), unit(4, 5, seed=1), torch.tensor([7, 0, 29, 3])
    for row, i in zip(f.numpy(), indices.tolist(), strict=True):
        v = momentum * expected[i] + (1 - momentum) * row
        expected[i] = v / math.sqrt((v * v).sum())
    model.update(indices, f.requires_grad_(), momentum)
    np.testing.assert_allclose(bank.numpy(), expected, atol=1e-12)
    assert not bank.requires_grad


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("name, loss", [("npid", "nce_loss"), ("npid", "full_softmax_loss"), ("odc", "odc_loss")])
def test_a_step_writes_the_rows_of_its_images_after_all_its_losses(name, loss, accum, tmp_path, monkeypatch):
    page, events = importlib.import_module(name), []

    def record(owner, attribute):
        original = getattr(owner, attribute)
        monkeypatch.setattr(owner, attribute, lambda *a: events.append((attribute, a)) or original(*a))

    record(page, loss)
    record({"npid": npid.NPID, "odc": odc.ODC}[name], "update")
    flags = ["--full-softmax"] if loss == "full_softmax_loss" else []
    train(name, tmp_path, "--max-steps", 5, "--accum", accum, *flags)
    assert [event for event, _ in events] == ([loss] * accum + ["update"]) * 5
    updates = [args for event, args in events if event == "update"]
    for step, (_, indices, f, momentum) in enumerate(updates):
        assert indices.tolist() == rng.permutation(3, step // 4, 64)[step % 4 * 16 :][:16].tolist()
        assert f.shape == (16, 16) and not f.requires_grad and momentum == 0.5


# ---------------------------------------------------------------------------------------------------- clusters
@pytest.mark.parametrize("name", CLUSTERED)
def test_clustered_features_are_those_of_an_evaluation_in_order(name, tmp_path, monkeypatch):
    """Initial weights, running statistics, no dropout, no augmentation."""
    owner, method = {"deepcluster": (deepcluster, "cluster"), "odc": (odc.ODC, "start")}[name]
    seen, original = [], getattr(owner, method)
    monkeypatch.setattr(owner, method, lambda *a: seen.append(a) or original(*a))
    flags = ["--data", "fake:16", "--image-size", 64, "--width", 0.25, "--clusters", 3, "--warmup-epochs", 0]
    flags += ["--no-sobel"] if name == "deepcluster" else ["--min-cluster", 2]
    train(name, tmp_path, *flags, "--max-steps", 1)
    torch.manual_seed(3)
    network = resnet("resnet18", 0.25, 64)
    network = (network if name == "deepcluster" else odc.ODC(network, 16, 3, 32, 16)).eval()
    images = torch.stack([Fake(16, 0)[i][0] for i in range(16)]).float() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        expected = network((images - mean) / std)
    torch.testing.assert_close(seen[0][CLUSTERED.index(name)], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("page", [deepcluster])
def test_uniform_order_takes_as_many_of_each_cluster(page):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 6], [700, 250, 49, 1]))  # 2, 4, 5 are empty
    order = page.uniform_order(labels, seed=1, epoch=2)
    share = 1000 // 4 + 1
    assert len(order) == 1000 and order.dtype == np.int64
    counts = np.bincount(labels[order], minlength=7)
    assert counts[[2, 4, 5]].sum() == 0
    assert all(share - 4 <= counts[c] <= share for c in (0, 1, 3, 6))  # 4 x 251 are drawn and cut to 1000
    large = order[labels[order] == 0]
    assert len(set(large)) == len(large), "a large cluster is drawn from without replacement"
    assert 40 <= len(set(order[labels[order] == 3])) <= 49, "a small one with, so nearly all of it comes up"
    assert len(set(order[labels[order] == 1])) < 200, "250 images for 251 places: with replacement"
    runs = np.bincount(np.flatnonzero(labels[order] == 0) // 100)
    assert 0 < runs.min() and runs.max() < 50, "clusters are mixed over the epoch"
    assert len(page.uniform_order(np.zeros(10, np.int64), 0, 0)) == 10
    singles = page.uniform_order(np.arange(10), 0, 0)  # two places each, ten of twenty kept
    assert len(singles) == 10 and np.bincount(singles).max() <= 2


@pytest.mark.parametrize("page", [deepcluster])
def test_uniform_order_depends_on_seed_epoch_and_labels_only(page):
    labels = np.arange(60) % 7
    first = page.uniform_order(labels, 3, 4)
    np.random.default_rng(9).random(5)
    assert np.array_equal(first, page.uniform_order(labels.copy(), 3, 4))
    assert not any(np.array_equal(first, page.uniform_order(labels, *other)) for other in ((3, 5), (4, 4)))


# -------------------------------------------------------------------------------------------------------- loss
SIZES = np.array([16, 4, 0, 100, 1])
EVERYONE = np.repeat(np.arange(5), SIZES)
ONE_EACH = np.array([0, 1, 3, 4])  # as often as uniform_order shows them
WEIGHTED = {  # loss of (logits, labels), and the labels over which its weights, 1 / sqrt(size), have mean 1
    "deepcluster": (
        lambda x, y: deepcluster.cluster_loss(x, y, deepcluster.cluster_weights(EVERYONE, 5)),
        ONE_EACH,
    ),
    "odc": (lambda x, y: odc.odc_loss(x, y, torch.from_numpy(SIZES)), EVERYONE),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_cluster_loss_equals_numpy_and_chance_is_the_logarithm_of_the_clusters(name):
    loss, shown = WEIGHTED[name]
    logits, labels = rows(7, 5, seed=0), torch.tensor([0, 3, 3, 1, 4, 0, 3])
    weights = 1 / np.sqrt(np.maximum(SIZES, 1))
    weights /= weights[shown].mean()
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    terms = [-weights[y] * math.log(p[i, y]) for i, y in enumerate(labels.tolist())]
    assert loss(logits, labels).item() == pytest.approx(np.mean(terms), abs=1e-10)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())
    chance = loss(torch.zeros(len(shown), 5, dtype=torch.float64), torch.from_numpy(shown))
    assert chance.item() == pytest.approx(math.log(5), abs=1e-12)


# ------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", ["cluster_report", "dump_clusters"])
def test_copies_are_equal(name):
    assert inspect.getsource(getattr(deepcluster, name)) == inspect.getsource(getattr(odc, name))


def nmi(a, b):
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    pa, pb = joint.sum(1), joint.sum(0)
    mutual = (joint[joint > 0] * np.log(joint[joint > 0] / np.outer(pa, pb)[joint > 0])).sum()
    return 2 * mutual / -((pa[pa > 0] * np.log(pa[pa > 0])).sum() + (pb[pb > 0] * np.log(pb[pb > 0])).sum())


def test_report_equals_numpy():
    generator = np.random.default_rng(0)
    labels, previous, truth = (generator.integers(low, high, 500) for low, high in ((0, 9), (0, 9), (-1, 4)))
    labels[:300], labels[labels == 7] = previous[:300], 2
    known = truth >= 0
    expected = {"clusters": 8, "largest": np.bincount(labels).max() / 500}
    report = deepcluster.cluster_report
    assert report(labels) == pytest.approx(expected, abs=1e-4)
    expected |= {"nmi_previous": nmi(previous, labels), "nmi_labels": nmi(truth[known], labels[known])}
    assert report(labels, previous, truth) == pytest.approx(expected, abs=1e-4)
    assert report(labels, labels)["nmi_previous"] == 1


@pytest.mark.parametrize("name", CLUSTERED)
def test_unlabelled_images_and_dump(name, tmp_path, capsys):
    """A flat folder without labels: no NMI with labels, and a table of which image is in which cluster."""
    folder = write_images(tmp_path / "images", [f'{i:02}, "odd".png' for i in range(20)], size=(16, 16))
    flags = ["--data", folder, "--batch-size", 10, "--clusters", 3, "--dump-clusters", tmp_path / "clusters.csv"]
    flags += ["--min-cluster", 3] if name == "odc" else []
    saved = train(name, tmp_path / "run", *flags, "--max-steps", 4)
    with open(tmp_path / "clusters.csv", newline="") as file:
        header, *lines = csv.reader(file)
    data = open_dataset(str(folder), "train")
    assert header == ["path", "cluster"]
    assert lines == [[data.path(i), str(y)] for i, y in enumerate(saved["model"]["labels"].tolist())]
    found, measured = notes(tmp_path / "run"), {"odc": {"nmi_previous", "changed"}}.get(name, {"nmi_previous"})
    assert [r.keys() & {"nmi_previous", "changed", "nmi_labels"} for r in found] == [set(), measured, measured][
        : len(found)
    ]
    assert [r["step"] for r in found] == ([0, 2, 4] if name == "odc" else [0, 2])
    assert f"step 2: clusters {found[1]['clusters']}  largest" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp*"))


def test_dump_of_names_that_are_no_utf8(tmp_path):
    data = Files("/x", [b"caf\xe9.jpg", "ä\nb.jpg".encode()])
    deepcluster.dump_clusters(tmp_path / "c.csv", data, np.array([4, 2]))
    assert b"/x/caf\xe9.jpg,4\r\n" in (tmp_path / "c.csv").read_bytes()


# ---------------------------------------------------------------------------------------------------- arguments
def test_numbers_of_clusters():
    sizes = deepcluster.cluster_sizes
    assert sizes(None, None, 1_281_167, 2048) == (10000, 256)
    assert sizes(None, None, 50_000, 512) == (500, 128)
    assert sizes(None, None, 150, 64) == (2, 16)
    assert sizes(30, 7, 150, 64) == (30, 7)
    counts = [odc.cluster_count(*asked, 20) for asked in ((None, 1_281_167), (None, 50_000), (None, 150), (30, 900))]
    assert counts == [10000, 500, 2, 30]


@pytest.mark.parametrize("name", CLUSTERED)
def test_start_says_what_was_chosen(name, tmp_path, capsys):
    words = "--data fake:200 --arch resnet18 --width 0.125 --image-size 16 --batch-size 16 --workers 0 --max-steps 1"
    main(name, *words.split(), "--knn-every", 0, "--out", tmp_path)
    shown = capsys.readouterr()
    more = ", of features whitened to 16 dimensions, seeing edges (Sobel)" if name == "deepcluster" else ""
    assert f"clusters    2 (a hundredth of the images){more}\n" in shown.out
    assert f"baseline    loss ln(2) = {math.log(2):.2f}\n" in shown.out and shown.err == ""


@pytest.mark.parametrize(
    "words, expected",
    [
        ("npid --nce-k 0", "argument --nce-k: must be greater than 0, not 0"),
        ("npid --temperature 0", "argument --temperature: must be greater than 0"),
        ("npid --bank-momentum 1", "argument --bank-momentum: must be less than 1"),
        ("deepcluster --clusters 10000", "--clusters 10000 for 64 images: use at most 6, "),
        ("deepcluster --clusters 1", "argument --clusters: must be at least 2"),
        ("deepcluster --pca-dim 65", "--pca-dim 65 for features with 64 dimensions: use a number from 1 to 64"),
        ("deepcluster --dump-clusters /nowhere/x.csv", "--dump-clusters /nowhere/x.csv: its folder does not exist"),
        ("odc --clusters 10000", "--clusters 10000 for 64 images: use at most 6, "),
        ("odc --clusters 1", "argument --clusters: must be at least 2"),
        ("odc --min-cluster 17", "--min-cluster 17: 64 images in 4 clusters need 4 or less"),
        ("odc --centroid-every 0", "argument --centroid-every: must be greater than 0"),
        ("odc --dropout 1", "argument --dropout: must be less than 1"),
        ("odc --memory-momentum 1", "argument --memory-momentum: must be less than 1"),
        ("odc --dump-clusters /nowhere/x.csv", "--dump-clusters /nowhere/x.csv: its folder does not exist"),
    ],
)
def test_impossible_flags_end_in_one_line(words, expected, tmp_path, capsys):
    name, *words = words.split()
    assert expected in refused(capsys, train, name, tmp_path, *words)


RECIPES = {  # what differs from the other two: arguments, view
    "npid": (
        {"lr": 0.03, "batch_size": 256, "weight_decay": 1e-4, "epochs": 200, "dim": 128, "temperature": 0.07}
        | {"nce_k": 4096, "bank_momentum": 0.5, "full_softmax": False},
        {"area": (0.2, 1.0), "jitter": (0.4,) * 4, "jitter_p": 1.0, "gray_p": 0.2, "gray_first": True},
    ),
    "deepcluster": (
        {"lr": 0.05, "batch_size": 256, "weight_decay": 1e-5, "epochs": 200, "sobel": True, "reweight": False},
        {"area": (0.08, 1.0), "jitter_p": 0.0, "gray_p": 0.0},
    ),
    "deepcluster --jitter": ({}, {"jitter": (0.4, 0.4, 1.0, 0.5), "jitter_p": 1.0, "gray_p": 0.2, "gray_first": False}),
    "odc": (
        {"lr": 0.03, "batch_size": 512, "weight_decay": 1e-5, "epochs": 440, "min_cluster": 20, "centroid_every": 10}
        | {"hidden_dim": 512, "dim": 256, "dropout": 0.5, "memory_momentum": 0.5},
        {"area": (0.08, 1.0), "jitter": (0.4, 0.4, 1.0, 0.5), "jitter_p": 1.0, "gray_p": 0.2, "gray_first": False},
    ),
}


@pytest.mark.parametrize("words", RECIPES)
def test_recipes_are_the_published_ones(words):
    name, *more = words.split()
    args, (expected, numbers) = parsed(name, *more, "--data", "/images"), RECIPES[words]
    expected = {"arch": "resnet50", "momentum": 0.9, "warmup_epochs": 0, "image_size": 224} | expected
    assert {k: getattr(args, k) for k in expected} == expected and getattr(args, "clusters", None) is None
    assert "dump_clusters" not in args.held
    extra = {"jitter": args.jitter} if name == "deepcluster" else {}
    (view,) = importlib.import_module(name).augmentation(224, args.crop_min, args.flip, **extra)
    numbers = {"flip": 0.5, "blur_p": 0.0, "solarize_p": 0.0} | numbers
    assert {k: getattr(view, k) for k in numbers} == numbers
