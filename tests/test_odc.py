"""ODC: the memories against slow loops, small clusters, the loss, dropout that knows no processes, the files."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import odc
from common.data import Fake, build
from common.kmeans import kmeans
from common.resnet import resnet
from tests.helpers import records, train

FLAGS = ["--warmup-epochs", "0"]  # 4 steps per epoch


def unit(x):
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length == 0, 1, length)


def small_model(images=30, clusters=4, dim=5, seed=0, labels=None):
    """A model in double precision whose memories hold random unit rows, random labels and their means."""
    torch.manual_seed(seed)
    model = odc.ODC(resnet("resnet18", 0.125, 16), images, clusters, hidden_dim=8, dim=dim).double()
    model.features.copy_(torch.nn.functional.normalize(torch.rand(images, dim), dim=1))
    model.labels.copy_(torch.randint(clusters, (images,)) if labels is None else torch.as_tensor(labels))
    model.recentre()
    return model


def notes(out):
    """The records about clusters, in order."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [r for r in lines if "clusters" in r]


# ------------------------------------------------------------------------------------------------------- model
def test_network_is_the_published_one():
    model = odc.ODC(resnet("resnet18", 0.125, 16), 9, 7)
    linear, norm, _ = model.neck
    assert (linear.in_features, linear.out_features) == (model.backbone.dim, 512)
    assert (norm.affine, norm.momentum) == (False, 0.001)
    assert (model.output.out_features, model.head.in_features, model.head.out_features) == (256, 256, 7)
    x, keep = torch.randn(6, 3, 16, 16), torch.ones(6, 512)
    f, logits = model(x, keep)
    assert f.shape == (6, 256) and f.min() == 0 < f.max() and torch.equal(logits, model.head(f))
    torch.testing.assert_close(model(x), f)
    keep[2] = 0  # nothing is left of this image but the bias of the last layer
    torch.testing.assert_close(model(x, keep)[0][2], model.output.bias.relu())


def test_every_parameter_is_trained_and_the_classifier_has_no_momentum(tmp_path):
    saved = train("odc", tmp_path, *FLAGS, "--max-steps", 2, "--weight-decay", 0.1)
    body, head = saved["optimizer"]["param_groups"]
    assert (body["momentum"], head["momentum"], len(head["params"])) == (0.9, 0, 2)
    names = dict(odc.ODC(resnet("resnet18", 0.125, 16), 64, 6).named_parameters())
    assert len(body["params"]) + 2 == len(names)
    assert {"features", "labels", "centroids", "previous"} <= saved["model"].keys()


# ------------------------------------------------------------------------------------------------------- start
def test_start_is_kmeans_of_unit_features():
    model, generator = small_model(), torch.Generator().manual_seed(1)
    features = torch.rand(30, 5, generator=generator, dtype=torch.float64) * 9
    torch.nn.init.ones_(model.head.bias)
    model.start(features, [3, 4])
    expected = kmeans(torch.from_numpy(unit(features.numpy())), 4, seed=3)
    np.testing.assert_allclose(model.features.numpy(), unit(features.numpy()), atol=1e-12)
    assert torch.equal(model.labels, expected.assignments)
    torch.testing.assert_close(model.centroids, expected.centroids)
    weight = model.head.weight.detach().clone()
    assert model.head.bias.abs().max() == 0 and 0.005 < weight.std() < 0.02
    model.start(features, [3, 5])
    assert not torch.equal(weight, model.head.weight)


def test_memory_starts_with_evaluation_features_in_order(tmp_path, monkeypatch):
    """Initial weights, running statistics, no dropout, no augmentation."""
    seen, start = [], odc.ODC.start
    monkeypatch.setattr(odc.ODC, "start", lambda model, f, seeds: seen.append(f) or start(model, f, seeds))
    flags = ["--data", "fake:16", "--image-size", 64, "--width", 0.25, "--clusters", 3, "--min-cluster", 2]
    train("odc", tmp_path, *FLAGS, *flags, "--max-steps", 1)
    torch.manual_seed(3)
    model = odc.ODC(resnet("resnet18", 0.25, 64), 16, 3, 32, 16).eval()
    images = torch.stack([Fake(16, 0)[i][0] for i in range(16)]).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- memories
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_update_equals_a_slow_loop(momentum):
    """Image 7 comes up three times: the last of its rows counts, and every one is averaged with the old value."""
    model, rng = small_model(), np.random.default_rng(0)
    indices, f = np.array([7, 3, 7, 0, 7, 29]), rng.random((6, 5)) * 4
    f[1] = 0  # an output that is dead everywhere moves nothing
    old, centroids = model.features.numpy().copy(), model.centroids.numpy().copy()
    features, labels = old.copy(), model.labels.numpy().copy()
    for row, i in zip(f, indices, strict=True):
        features[i] = unit(momentum * old[i] + (1 - momentum) * unit(row))
        labels[i] = max(range(4), key=lambda c: sum(centroids[c] * features[i]))
    model.update(torch.from_numpy(indices), torch.from_numpy(f), momentum)
    np.testing.assert_allclose(model.features.numpy(), features, atol=1e-12)
    assert np.array_equal(model.labels.numpy(), labels)
    np.testing.assert_allclose(model.features[3].numpy(), old[3], atol=1e-12)
    assert np.array_equal(model.centroids.numpy(), centroids)


def test_labels_follow_the_dot_product_with_centroids_of_any_length():
    model = small_model(images=4, clusters=2, dim=2)
    model.centroids.copy_(torch.tensor([[1.0, 0.0], [0.3, 0.4]]))
    f = torch.tensor([[0.5, 0.85], [0.0, 1.0]], dtype=torch.float64)
    model.update(torch.tensor([0, 1]), f, 0.0)
    # the first row points rather along the second centroid, which is half as long
    assert model.labels[:2].tolist() == [int(0.3 * 0.5 + 0.4 * 0.85 > 0.5), 1] == [0, 1]


def test_centroids_equal_a_slow_loop():
    labels = np.random.default_rng(0).choice([0, 1, 3], 30)
    model = small_model(labels=labels)
    kept = torch.full((5,), 7.0, dtype=torch.float64)
    model.centroids[2] = kept
    features = torch.rand(30, 5, dtype=torch.float64)
    model.features.copy_(features)
    model.recentre()
    for c in (0, 1, 3):
        np.testing.assert_allclose(model.centroids[c].numpy(), features.numpy()[labels == c].mean(0), atol=1e-12)
    assert torch.equal(model.centroids[2], kept), "an empty cluster stays where it was"
    assert model.sizes().tolist() == np.bincount(labels, minlength=4).tolist()


# ---------------------------------------------------------------------------------------------- small clusters
def blobs(sizes, dim=8):
    """A model with one dense blob of unit rows per cluster; a blob lies along its own axis."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(0)
    model = small_model(images=len(labels), clusters=len(sizes), dim=dim, labels=labels)
    model.features.copy_(torch.from_numpy(unit(np.eye(dim)[labels] + 0.05 * rng.random((len(labels), dim)))))
    model.recentre()
    return model


def test_small_cluster_goes_to_the_nearest_large_one_and_takes_half_of_the_largest():
    model = blobs([10, 3, 40, 20])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the largest consists of two groups: rows 13 to 37 and 38 to 52
        model.features[38:53, 7] += 1
        model.features[10:13, 3] += 0.5  # the three of the small one lie towards cluster 3 ...
        model.features[10:13, 1] += 0.1 * torch.rand(3, generator=generator)
    model.recentre()
    assert model.refill(5) == 1
    labels = model.labels.numpy()
    assert set(labels[10:13]) == {3}  # ... where they end
    assert set(labels[:10]) == {0} and set(labels[53:]) == {3}
    first, second = set(labels[13:38]), set(labels[38:53])
    assert first | second == {1, 2} and len(first) == len(second) == 1
    assert sorted(model.sizes().tolist()) == [10, 15, 23, 25]


def test_several_small_and_empty_clusters():
    """Sizes afterwards: none is empty, nobody is lost; every time the one that is then largest is split."""
    models = [blobs([60, 2, 0, 30, 1, 0, 7]) for _ in range(2)]
    assert models[0].refill(5) == 4
    sizes = models[0].sizes()
    assert sizes.sum() == 100 and sizes.min() >= 1 and sizes.max() < 30
    assert models[0].labels[93:].tolist() == [6] * 7, "a cluster that is neither small nor ever the largest"
    models[1].refill(5)
    assert torch.equal(models[0].labels, models[1].labels), "deterministic"


def test_equal_features_are_halved():
    model = blobs([20, 1])
    model.features.copy_(model.features[:1].expand(21, -1))
    model.recentre()
    assert model.refill(5) == 1
    assert sorted(model.sizes().tolist()) == [10, 11]


def test_large_clusters_are_left_alone():
    model = blobs([10, 12, 8])
    before = model.labels.clone()
    assert model.refill(8) == 0 and model.refill(0) == 0
    assert torch.equal(model.labels, before)


# -------------------------------------------------------------------------------------------------------- loss
def test_loss_equals_numpy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    labels, sizes = torch.tensor([0, 3, 3, 1, 4, 0, 3]), torch.tensor([16, 4, 0, 100, 1])
    everyone = np.repeat(np.arange(5), sizes)
    weights = 1 / np.sqrt(np.maximum(sizes.numpy(), 1))
    weights /= weights[everyone].mean()
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    terms = [-weights[y] * math.log(p[i, y]) for i, y in enumerate(labels.tolist())]
    assert odc.odc_loss(logits, labels, sizes).item() == pytest.approx(np.mean(terms), abs=1e-10)
    assert torch.autograd.gradcheck(lambda x: odc.odc_loss(x, labels, sizes), logits.requires_grad_())


def test_chance_is_the_logarithm_of_the_clusters():
    sizes = torch.tensor([50, 3, 0, 20])
    everyone = torch.repeat_interleave(torch.arange(4), sizes)
    loss = odc.odc_loss(torch.zeros(73, 4, dtype=torch.float64), everyone, sizes)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-12)


# ----------------------------------------------------------------------------------------------------- dropout
def test_dropout_does_not_depend_on_processes_and_accumulation(monkeypatch):
    (whole,) = odc.dropout(3, 5, 16, 32, 0.5, 1, "cpu")
    for world, accum in ((1, 4), (2, 1), (4, 2)):
        parts = {}
        for rank in range(world):
            monkeypatch.setattr(odc, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(odc, "world_size", lambda world=world: world)
            for micro, keep in enumerate(odc.dropout(3, 5, 16, 32, 0.5, accum, "cpu")):
                parts[micro, rank] = keep  # the loader's order: micro-batches first
        assert len(parts) == world * accum
        assert torch.equal(torch.cat([parts[key] for key in sorted(parts)]), whole)


def test_dropout_is_a_function_of_seed_and_step():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    masks = [odc.dropout(seed, step, 64, 512, 0.25, 1, "cpu")[0] for seed, step in ((3, 4), (3, 4), (4, 3), (3, 5))]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[3])
    assert masks[0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert (masks[0] > 0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert odc.dropout(3, 4, 8, 16, 0.0, 1, "cpu")[0].min() == 1


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("accum", [1, 2])
def test_labels_are_read_before_the_update(accum, tmp_path, monkeypatch):
    """Each step trains on the labels that the step before has left; then its images get new ones; then, every second
    step, come centroids and small clusters."""
    events, holder = [], []
    loss, update, batches = odc.odc_loss, odc.ODC.update, odc.Loader.epoch
    recentre, refill = odc.ODC.recentre, odc.ODC.refill

    def record_loss(logits, labels, sizes):
        events.append(("loss", labels.clone(), sizes))
        return loss(logits, labels, sizes)

    def record_update(model, indices, f, momentum):
        holder.append((model.labels.clone(), indices))
        events.append(("update",))
        assert f.shape == (16, 16) and not f.requires_grad and momentum == 0.5
        update(model, indices, f, momentum)

    def record_refill(model, smallest):
        events.append(("refill",))
        count.append(refill(model, smallest))
        return count[-1]

    def order(loader, epoch, start):
        for batch in batches(loader, epoch, start):
            events.append(("batch",))
            yield batch

    count = []
    monkeypatch.setattr(odc, "odc_loss", record_loss)
    monkeypatch.setattr(odc.ODC, "update", record_update)
    monkeypatch.setattr(odc.ODC, "refill", record_refill)
    monkeypatch.setattr(odc.ODC, "recentre", lambda model: events.append(("recentre",)) or recentre(model))
    monkeypatch.setattr(odc.Loader, "epoch", order)
    train("odc", tmp_path, *FLAGS, "--accum", accum, "--max-steps", 5)
    assert any(count), "the flags used by all tests of scripts do refill small clusters"
    steps = " ".join(e[0] for e in events).split("update")
    for number, (before, (labels, indices)) in enumerate(zip(steps, holder, strict=False), 1):
        assert before.endswith(" ".join(["batch loss"] * accum) + " ")
        assert ("recentre" in before and "refill" in before) == (number > 1 and number % 2 == 1)
        shown = [e for e in events if e[0] == "loss"][(number - 1) * accum : number * accum]
        assert torch.equal(torch.cat([e[1] for e in shown]), labels[indices])
        assert torch.equal(shown[0][2], torch.bincount(labels, minlength=6)), "weights are those of the same moment"


def test_learning_rate(tmp_path):
    """x 0.4 for the last eleventh: of 22 steps the last two."""
    flags = ["--data", "fake:8", "--batch-size", 4, "--image-size", 8, "--clusters", 2, "--min-cluster", 1]
    train("odc", tmp_path, *flags, "--epochs", 11, "--warmup-epochs", 1)
    peak, rates = 0.03 * 4 / 256, [r["lr"] for r in records(tmp_path).values()]
    assert rates == pytest.approx([0, peak / 2, *[peak] * 18, *[0.4 * peak] * 2])


def test_resuming_at_an_epoch_and_within_one(tmp_path):
    """The report compares with the labels at the epoch's beginning, wherever the run was interrupted."""
    train("odc", tmp_path / "a", *FLAGS, "--max-steps", 8)
    for step in (3, 4, 8):
        train("odc", tmp_path / "b", *FLAGS, "--max-steps", step)
    drop = {"seconds"}
    a, b = ([{k: v for k, v in r.items() if k not in drop} for r in notes(tmp_path / x)] for x in "ab")
    assert a == b and [r["step"] for r in a] == [0, 4, 8]


# ------------------------------------------------------------------------------------------------------- files
def test_report_equals_numpy():
    rng = np.random.default_rng(0)
    labels, previous, truth = rng.integers(0, 9, 500), rng.integers(0, 9, 500), rng.integers(-1, 4, 500)
    labels[:300], labels[labels == 7] = previous[:300], 2
    report = odc.cluster_report(labels, previous, truth)
    assert report["clusters"] == 8
    assert report["largest"] == pytest.approx(np.bincount(labels).max() / 500, abs=1e-4)
    assert report["changed"] == pytest.approx(np.mean(labels != previous), abs=1e-4)
    assert 0.2 < report["nmi_previous"] < 0.9 and report["nmi_labels"] < 0.1
    same = odc.cluster_report(labels, labels)
    assert (same["changed"], same["nmi_previous"]) == (0, 1)
    assert odc.cluster_report(labels).keys() == {"clusters", "largest"}


def test_unlabelled_images_and_dump(tmp_path, capsys):
    """A flat folder without labels: no NMI with labels, and a table of which image is in which cluster."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f'{i:02}, "odd".png')
    flags = ["--data", folder, "--batch-size", 10, "--clusters", 3, "--min-cluster", 3]
    flags += ["--dump-clusters", tmp_path / "clusters.csv"]
    saved = train("odc", tmp_path / "run", *flags, "--max-steps", 4)
    with open(tmp_path / "clusters.csv", newline="") as file:
        header, *rows = csv.reader(file)
    data = build(str(folder), "train")
    assert header == ["path", "cluster"]
    assert [row[0] for row in rows] == [data.path(i) for i in range(20)]
    assert [int(row[1]) for row in rows] == saved["model"]["labels"].tolist()
    logged, measured = notes(tmp_path / "run"), {"nmi_previous", "changed", "nmi_labels"}
    assert [r.keys() & measured for r in logged] == [set(), *[{"nmi_previous", "changed"}] * 2]
    assert not list(tmp_path.glob("*.tmp"))
    assert f"step 4: clusters {logged[2]['clusters']}  largest" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- arguments
def test_numbers_of_clusters():
    assert odc.cluster_count(None, 1_281_167, 20) == 10000
    assert odc.cluster_count(None, 50_000, 20) == 500
    assert odc.cluster_count(None, 150, 20) == 2
    assert odc.cluster_count(30, 900, 20) == 30


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--clusters", 10000], "--clusters 10000 for 64 images: use at most 6, "),
        (["--clusters", 1], "--clusters must be at least 2"),
        (["--min-cluster", 11], "--min-cluster 11: 64 images in 6 clusters need 2 or less"),
        (["--centroid-every", 0], "--centroid-every must be at least 1"),
        (["--dropout", 1], "--dropout and --memory-momentum must be in [0, 1)"),
        (["--dump-clusters", "/nowhere/x.csv"], "--dump-clusters /nowhere/x.csv: its folder does not exist"),
    ],
)
def test_impossible_flags_end_in_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("odc", tmp_path, *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1


def test_start_says_what_was_chosen(tmp_path, capsys):
    words = "--data fake:200 --arch resnet18 --width 0.125 --image-size 16 --batch-size 16 --workers 0 --max-steps 1"
    odc.main(odc.parse_args([*words.split(), "--knn-every", "0", "--out", str(tmp_path)]))
    shown = capsys.readouterr().out
    assert "clusters    2 (a hundredth of the images)" in shown and f"loss ln(2) = {math.log(2):.2f}" in shown


def test_recipe_is_the_published_one():
    args = odc.parse_args(["--data", "/images"])
    assert (args.lr * args.batch_size / 256, args.batch_size, args.epochs) == (0.06, 512, 440)
    assert (args.weight_decay, args.momentum, args.min_cluster, args.centroid_every) == (1e-5, 0.9, 20, 10)
    assert (args.hidden_dim, args.dim, args.dropout, args.memory_momentum) == (512, 256, 0.5, 0.5)
    (view,) = odc.augmentation(224)
    assert (view.crop, view.flip, view.jitter_p, view.gray_p, view.blur_p) == ((0.08, 1.0), 0.5, 1, 0.2, 0)
    assert view.jitter == (0.4, 0.4, 1.0, 0.5)
