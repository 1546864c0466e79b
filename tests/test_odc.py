"""ODC: the memories against slow loops, small clusters, dropout that knows no processes, the order of a step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import odc
from common.kmeans import kmeans
from common.resnet import resnet
from tests.helpers import SMALL, logged, records, rows, train

FLAGS = ["--warmup-epochs", "0"]  # 4 steps per epoch


def unit(x):
    return F.normalize(torch.as_tensor(x), dim=-1).numpy()


def small_model(images=30, clusters=4, dim=5, labels=None):
    """A model in double precision whose memories hold random unit rows, random labels and their means."""
    torch.manual_seed(0)
    model = odc.ODC(resnet(*SMALL), images, clusters, hidden_dim=8, dim=dim).double()
    model.features.copy_(torch.from_numpy(unit(rows(images, dim).abs())))
    model.labels.copy_(torch.randint(clusters, (images,)) if labels is None else torch.as_tensor(labels))
    model.recentre()
    return model


# ------------------------------------------------------------------------------------------------------- model
def test_network_is_the_published_one():
    model = odc.ODC(resnet(*SMALL), 9, 7)
    linear, norm, _ = model.neck
    assert (linear.in_features, linear.out_features) == (model.backbone.dim, 512)
    assert (norm.affine, norm.momentum) == (False, 0.001)
    assert (model.output.out_features, model.head.in_features, model.head.out_features) == (256, 256, 7)
    x, keep = rows(6, 3, 16, 16).float(), torch.ones(6, 512)
    f, logits = model(x, keep)
    assert f.shape == (6, 256) and f.min() == 0 < f.max() and torch.equal(logits, model.head(f))
    torch.testing.assert_close(model(x), f)
    keep[2] = 0  # nothing is left of this image but the bias of the last layer
    torch.testing.assert_close(model(x, keep)[0][2], model.output.bias.relu())


def test_every_parameter_is_trained_and_the_classifier_has_no_momentum(tmp_path):
    saved = train("odc", tmp_path, *FLAGS, "--max-steps", 2, "--weight-decay", 0.1)
    body, head = saved["optimizer"]["param_groups"]
    assert (body["momentum"], head["momentum"], len(head["params"])) == (0.9, 0, 2)
    assert len(body["params"]) + 2 == len(list(odc.ODC(resnet(*SMALL), 64, 6).parameters()))
    assert {"features", "labels", "centroids", "previous"} <= saved["model"].keys()


# ---------------------------------------------------------------------------------------------------- memories
def test_start_is_kmeans_of_unit_features():
    model, features = small_model(), rows(30, 5).abs() * 9
    torch.nn.init.ones_(model.head.bias)
    model.start(features, [3, 4])
    expected = kmeans(torch.from_numpy(unit(features)), 4, seed=3)
    np.testing.assert_allclose(model.features.numpy(), unit(features), atol=1e-12)
    assert torch.equal(model.labels, expected.assignments)
    torch.testing.assert_close(model.centroids, expected.centroids)
    weight = model.head.weight.detach().clone()
    assert model.head.bias.abs().max() == 0 and 0.005 < weight.std() < 0.02
    model.start(features, [3, 5])
    assert not torch.equal(weight, model.head.weight)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_update_of_repeated_images_and_of_any_lengths(momentum):
    """Image 7 comes up three times: the last of its rows counts, and every one is averaged with the old value. Labels
    follow the dot product with centroids of any length."""
    model, rng = small_model(), np.random.default_rng(0)
    model.centroids.mul_(torch.tensor([[3.0], [1.0], [0.5], [1.1]]))
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


def test_the_longer_centroid_wins_against_the_better_direction():
    model = small_model(images=4, clusters=2, dim=2)
    model.centroids.copy_(torch.tensor([[1.0, 0.0], [0.3, 0.4]]))
    f = torch.tensor([[0.5, 0.85], [0.0, 1.0]], dtype=torch.float64)  # the first points rather along the second
    model.update(torch.tensor([0, 1]), f, 0.0)
    assert model.labels[:2].tolist() == [0, 1]


def test_centroids_equal_a_slow_loop():
    labels = np.random.default_rng(0).choice([0, 1, 3], 30)
    model, features = small_model(labels=labels), rows(30, 5)
    model.centroids[2] = 7.0
    model.features.copy_(features)
    model.recentre()
    for c in (0, 1, 3):
        np.testing.assert_allclose(model.centroids[c].numpy(), features.numpy()[labels == c].mean(0), atol=1e-12)
    assert (model.centroids[2] == 7).all(), "an empty cluster stays where it was"
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
    model.features[38:53, 7] += 1  # the largest consists of two groups: rows 13 to 37 and 38 to 52
    model.features[10:13, 3] += 0.5  # the three of the small one lie towards cluster 3 ...
    model.features[10:13, 1] += 0.1 * rows(3).abs()
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
    assert [model.refill(5) for model in models] == [4, 4]
    sizes = models[0].sizes()
    assert sizes.sum() == 100 and sizes.min() >= 1 and sizes.max() < 30
    assert models[0].labels[93:].tolist() == [6] * 7, "a cluster that is neither small nor ever the largest"
    assert torch.equal(models[0].labels, models[1].labels), "deterministic"


def test_equal_features_are_halved_and_large_clusters_left_alone():
    model = blobs([20, 1])
    model.features.copy_(model.features[:1].expand(21, -1))
    model.recentre()
    assert model.refill(5) == 1 and sorted(model.sizes().tolist()) == [10, 11]
    model = blobs([10, 12, 8])
    before = model.labels.clone()
    assert model.refill(8) == model.refill(0) == 0 and torch.equal(model.labels, before)


# ----------------------------------------------------------------------------------------------------- dropout
@pytest.mark.parametrize("world, accum", [(1, 4), (2, 1), (4, 2)])
def test_dropout_does_not_depend_on_processes_and_accumulation(world, accum, monkeypatch):
    (whole,), parts = odc.dropout(3, 5, 16, 32, 0.5, 1, "cpu"), {}
    monkeypatch.setattr(odc, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(odc, "rank", lambda rank=rank: rank)
        for micro, keep in enumerate(odc.dropout(3, 5, 16, 32, 0.5, accum, "cpu")):
            parts[micro, rank] = keep  # the loader's order: micro-batches first
    assert len(parts) == world * accum and torch.equal(torch.cat([parts[key] for key in sorted(parts)]), whole)


def test_dropout_is_a_function_of_seed_and_step():
    before = torch.get_rng_state()
    masks = [odc.dropout(seed, step, 64, 512, 0.25, 1, "cpu")[0] for seed, step in ((3, 4), (3, 4), (4, 3), (3, 5))]
    assert torch.equal(torch.get_rng_state(), before)
    assert [torch.equal(masks[0], other) for other in masks] == [True, True, False, False]
    assert masks[0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert (masks[0] > 0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert odc.dropout(3, 4, 8, 16, 0.0, 1, "cpu")[0].min() == 1


# ---------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("accum", [1, 2])
def test_labels_are_read_before_the_update(accum, tmp_path, monkeypatch):
    """Each step trains on the labels that the step before has left; then its images get new ones; then, every second
    step, come centroids and small clusters."""
    events, shown, refilled = [], [], []
    loss, update, recentre, refill = odc.odc_loss, odc.ODC.update, odc.ODC.recentre, odc.ODC.refill

    def record_loss(logits, labels, sizes):
        events.append("loss")
        shown.append((labels.clone(), sizes))
        return loss(logits, labels, sizes)

    def record_update(model, indices, f, momentum):
        events.append("update")
        labels, sizes = zip(*shown, strict=True)
        assert torch.equal(torch.cat(labels), model.labels[indices])
        assert torch.equal(sizes[0], torch.bincount(model.labels, minlength=len(sizes[0]))), (
            "weights are those of the same moment"
        )
        shown.clear()
        update(model, indices, f, momentum)

    def record_refill(model, smallest):
        events.append("refill")
        refilled.append(refill(model, smallest))
        return refilled[-1]

    monkeypatch.setattr(odc, "odc_loss", record_loss)
    monkeypatch.setattr(odc.ODC, "update", record_update)
    monkeypatch.setattr(odc.ODC, "refill", record_refill)
    monkeypatch.setattr(odc.ODC, "recentre", lambda model: events.append("recentre") or recentre(model))
    train("odc", tmp_path, *FLAGS, "--data", "fake:32", "--accum", accum, "--max-steps", 5)
    assert any(refilled), "the flags used by all tests of scripts do refill small clusters"
    step, expected = ["loss"] * accum + ["update"], []
    for number in refilled:
        expected += [*step, *step, "recentre", "refill", *["recentre"] * bool(number)]
    assert len(refilled) == 2 and events == expected + step


def test_learning_rate(tmp_path):
    """x 0.4 for the last eleventh: of 22 steps the last two."""
    flags = ["--data", "fake:8", "--batch-size", 4, "--image-size", 8, "--clusters", 2, "--min-cluster", 1]
    train("odc", tmp_path, *flags, "--epochs", 11, "--warmup-epochs", 1)
    peak, rates = 0.03 * 4 / 256, [r["lr"] for r in records(tmp_path).values()]
    assert rates == pytest.approx([0, peak / 2, *[peak] * 18, *[0.4 * peak] * 2])


def test_report_of_changes_and_resuming_at_an_epoch_and_within_one(tmp_path):
    """The report compares with the labels at the epoch's beginning, wherever the run was interrupted."""
    labels = {step: train("odc", tmp_path / "b", *FLAGS, "--max-steps", step)["model"] for step in (3, 4, 8)}
    train("odc", tmp_path / "a", *FLAGS, "--max-steps", 8)
    a, b = ([{**r, "seconds": 0} for r in logged(tmp_path / x) if "clusters" in r] for x in "ab")
    assert a == b and [r["step"] for r in a] == [0, 4, 8]
    changed = (labels[4]["labels"] != labels[8]["labels"]).double().mean().item()
    assert "changed" not in a[0] and a[2]["changed"] == pytest.approx(changed, abs=1e-4) and 0 < changed < 1
    report = odc.cluster_report(labels[8]["labels"].numpy(), labels[4]["labels"].numpy(), np.arange(64) % 10)
    assert report.items() <= a[2].items()
