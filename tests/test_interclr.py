"""InterCLR: the margin, the pool of negatives, members of clusters, the bank and its clusters, one page with MoCo."""

import inspect
import math

import numpy as np
import pytest
import torch

import interclr
import moco
import odc
from common.kmeans import kmeans
from common.resnet import resnet
from tests.helpers import EXACT, SMALL, main, parsed, records, refused, rows, state, train, unit


def small_model(images=30, clusters=4, dim=5, labels=None):
    """A model in double precision whose bank holds random unit rows, random labels and their means."""
    torch.manual_seed(0)
    model = interclr.InterCLR(resnet(*SMALL), images, clusters, dim=dim, queue=24).double()
    model.features.copy_(unit(images, dim))
    model.labels.copy_(torch.randint(clusters, (images,)) if labels is None else torch.as_tensor(labels))
    model.recentre()
    return model


def slow(q, k, negatives, temperature, margin, same, pool, count, order):
    """The loss one query at a time, in NumPy."""
    terms = []
    for i, (a, b) in enumerate(zip(q.numpy(), k.numpy(), strict=True)):
        others = [(a @ negatives[j].numpy(), o) for j, o in enumerate(order.tolist()) if not same[i, j]]
        taken = sorted(sorted(others)[-pool:], key=lambda pair: pair[1])[-count:]
        right = math.exp((a @ b - margin) / temperature)
        terms.append(-math.log(right / (right + sum(math.exp(c / temperature) for c, _ in taken))))
    return np.mean(terms)


def wanted(pool, count, size, seed=5):
    """The last arguments of the loss: which negatives of `size` ones are taken."""
    return pool, count, torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def some(queries=6, negatives=40, dim=5):
    same = torch.rand(queries, negatives, generator=torch.Generator().manual_seed(3)) < 0.3
    return unit(queries, dim, seed=1), unit(queries, dim, seed=2), unit(negatives, dim, seed=3), same


# ------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(
    "margin, pool, count", [(-0.5, 7, 7), (-0.5, 20, 7), (0.0, 9, 1), (0.3, 20, 19), (-0.5, 40, 30), (-0.5, 40, 40)]
)
def test_loss_equals_numpy(temperature, margin, pool, count):
    """With fewer than `pool` and fewer than `count` negatives of other clusters, too."""
    q, k, negatives, same = some()
    assert (~same).sum(1).min() < 30
    how = (temperature, margin, same, *wanted(pool, count, 40))
    loss = interclr.info_nce(q, k, negatives, *how)
    assert loss.item() == pytest.approx(slow(q, k, negatives, *how), abs=1e-10)


def test_without_clusters_it_is_mocos_loss_to_the_bit():
    q, k, negatives, _ = some()
    for temperature in (0.07, 0.2, 0.001):
        assert torch.equal(*(page.info_nce(q, k, negatives, temperature) for page in (interclr, moco)))


def test_gradient_goes_into_queries_only():
    q, k, negatives, same = some()
    inputs = [x.requires_grad_() for x in (q, k, negatives)]
    interclr.info_nce(*inputs, 0.2, -0.5, same, *wanted(12, 7, 40)).backward()
    assert q.grad.abs().max() > 0 and k.grad is None and negatives.grad is None
    rest = [k.detach(), negatives.detach(), 0.2, -0.5, same, *wanted(12, 7, 40)]
    assert torch.autograd.gradcheck(lambda q: interclr.info_nce(q, *rest), q)


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("margin", [-0.5, 0.0, 0.25])
def test_equal_vectors_give_chance(margin, count):
    q = unit(1, 5).expand(3, -1)
    same = torch.zeros(3, 9, dtype=torch.bool)
    loss = interclr.info_nce(q, q, q[:1].expand(9, -1), 0.2, margin, same, *wanted(9, count, 9))
    assert loss.item() == pytest.approx(math.log(1 + count * math.exp(margin / 0.2)), abs=1e-12)


def test_a_negative_margin_asks_for_less():
    """By hand: the member at a right angle, one negative at 60 degrees, T = 1/2; margin -1/2 makes both logits 1."""
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    member = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    negative = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64)
    same = torch.zeros(1, 1, dtype=torch.bool)
    how = (same, *wanted(1, 1, 1))
    loss = {m: interclr.info_nce(q, member, negative, 0.5, m, *how).item() for m in (-0.5, 0.0, 0.5)}
    assert loss[-0.5] == pytest.approx(math.log(2), abs=1e-12)
    assert loss[0.0] == pytest.approx(math.log(1 + math.e), abs=1e-12)
    assert loss[0.5] == pytest.approx(math.log(1 + math.e**2), abs=1e-12)


def test_negatives_are_the_most_similar_of_other_clusters():
    """By hand, on a circle: five candidates at growing angles from q; the first and the third are of its cluster."""
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4, 3.0], dtype=torch.float64)
    candidates = torch.stack([angles.cos(), angles.sin()], 1)
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    same = torch.tensor([[True, False, True, False, False]])
    taken = {1: [0.2], 2: [0.2, 0.4], 3: [0.2, 0.4, 3.0], 4: [0.2, 0.4, 3.0], 5: [0.2, 0.4, 3.0]}
    for count, expected in taken.items():
        total = sum(math.exp(math.cos(a) / 0.2) for a in expected)
        loss = interclr.info_nce(q, q, candidates, 0.2, -0.5, same, *wanted(count, count, 5)).item()
        assert loss == pytest.approx(-math.log(math.exp(7.5) / (math.exp(7.5) + total)), abs=1e-12)


def test_a_cluster_that_holds_every_candidate_costs_nothing():
    """No negatives: loss and gradient of this query are 0, those of the others are what they were."""
    q, k, negatives, same = some()
    same[2] = True
    q.requires_grad_()
    how = wanted(12, 7, 40)
    interclr.info_nce(q, k, negatives, 0.2, -0.5, same, *how).backward()
    assert q.grad.isfinite().all() and q.grad[2].abs().max() == 0 and (q.grad.abs().amax(1) > 0).sum() == 5
    keep = torch.arange(6) != 2
    rest = interclr.info_nce(q[keep], k[keep], negatives, 0.2, -0.5, same[keep], *how)
    assert interclr.info_nce(q, k, negatives, 0.2, -0.5, same, *how).item() == pytest.approx(
        rest.item() * 5 / 6, abs=1e-12
    )


# ------------------------------------------------------------------------------------------------------- pool
def test_pool_is_exact():
    """Of the 12 most similar images of other clusters 5 are taken, any of them as often as the others. The bank holds
    unit vectors: the gradient is 0 but along those taken."""
    q, bank, counts = unit(2, 40, seed=1).requires_grad_(), torch.eye(40).double(), torch.zeros(2, 40)
    *_, same = some(queries=2)
    pools = q.detach().masked_fill(same, -torch.inf).topk(12).indices.tolist()
    for seed in range(100):
        how = wanted(12, 5, 40, seed)
        q.grad = None
        interclr.info_nce(q, torch.zeros_like(q), bank, 0.2, -0.5, same, *how).backward()
        for i, pool in enumerate(pools):
            last = sorted(pool, key=how[2].tolist().__getitem__)[-5:]
            assert q.grad[i].nonzero().flatten().tolist() == sorted(last)
        counts += q.grad != 0
    assert (counts > 0).sum() == 24 and counts[counts > 0].min() > 25 and counts.max() < 60  # 42 each on average


@pytest.mark.parametrize("most", [1, 64, 200, 10**6])
def test_parts_change_nothing(most):
    """1, 2 and 6 of 6 queries at a time."""
    model, how = small_model(), wanted(9, 6, 30)
    q, indices, members = unit(6, 5, seed=4), torch.tensor([3, 0, 8, 29, 11, 5]), torch.tensor([1, 2, 3, 4, 5, 6])
    same = model.labels[indices, None] == model.labels
    expected = interclr.info_nce(q, model.features[members], model.features, 0.2, -0.5, same, *how)
    found = interclr.inter_nce(q, indices, members, model, 0.2, -0.5, *how, most=most)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


def seen_by_loss(monkeypatch):
    """The arguments of the inter-image losses of a run, in order."""
    seen, original = [], interclr.info_nce

    def record(*args):
        seen.append([x.clone() if isinstance(x, torch.Tensor) else x for x in args])
        return original(*args)

    monkeypatch.setattr(interclr, "info_nce", record)
    return seen


def test_negatives_of_a_step(tmp_path, monkeypatch):
    """Out of all 64 images; micro-batches of a step prefer the same ones, steps others."""
    seen = seen_by_loss(monkeypatch)
    train("interclr", tmp_path, "--negatives", 6, "--pool", 20, "--max-steps", 2, "--accum", 2)
    inter = [args for args in seen if len(args) > 4]
    assert [len(args[2]) for args in inter] == [64] * 4 and {args[6:8] == [20, 6] for args in inter} == {True}
    orders = [args[8] for args in inter]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert all(torch.equal(order.sort().values, torch.arange(64)) for order in orders)


# ---------------------------------------------------------------------------------------------------- members
def test_members_are_of_the_cluster_and_any_of_it():
    model = small_model(images=12, labels=[2, 0, 1, 2, 2, 0, 1, 1, 1, 0, 2, 1])
    for image, label in enumerate(model.labels.tolist()):
        u = torch.arange(40, dtype=torch.float64) / 40
        found = model.members(torch.full((40,), image), u).tolist()
        assert set(found) == {i for i in range(12) if model.labels[i] == label}, "the image itself is one of them"
        counts = np.bincount(found)
        assert counts[counts > 0].min() >= 40 // len(set(found))
    assert model.members(torch.tensor([2]), torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 11


def test_members_of_clusters_of_one_image_and_next_to_empty_ones():
    model = small_model(images=4, clusters=6, labels=[5, 1, 3, 1])
    u = torch.tensor([0.0, 0.9, 0.5, 0.4], dtype=torch.float64)
    assert model.members(torch.tensor([0, 1, 2, 3]), u).tolist() == [0, 3, 2, 1]


# ------------------------------------------------------------------------------------------------------- bank
def test_start_is_kmeans_of_the_queries():
    model, x = small_model(), unit(30, 5, seed=7)
    model.start(x, 3)
    expected = kmeans(x, 4, seed=3)
    assert torch.equal(model.features, x) and torch.equal(model.labels, expected.assignments)
    assert torch.equal(model.centroids, expected.centroids)


def test_update_equals_a_slow_loop():
    model = small_model()
    indices, keys = torch.tensor([7, 3, 0, 29]), unit(4, 5, seed=9)
    features, labels, centroids = model.features.tolist(), model.labels.tolist(), model.centroids.numpy()
    for i, key in zip(indices.tolist(), keys.tolist(), strict=True):
        features[i] = key
        labels[i] = max(range(4), key=lambda c: sum(centroids[c] * np.array(key)))
    changed = np.mean([labels[i] != model.labels[i].item() for i in indices])
    assert model.update(indices, keys).item() == changed and 0 < changed
    assert model.features.tolist() == features and model.labels.tolist() == labels


def test_queries_of_one_view_have_length_one_and_are_those_of_two():
    model, (x1, x2) = small_model(), rows(2, 8, 3, 16, 16)
    alone = model(x1)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones_like(alone[:, 0]))
    assert torch.equal(alone, model(x1, x2, torch.arange(8))[0])


def test_order_of_a_step(tmp_path, monkeypatch):
    """Losses read bank and clusters as the step before has left them; then come the queue, the bank and, every second
    step, the centroids."""
    events = []
    for name in ("update_target", "members", "enqueue", "update", "recentre", "refill"):
        original = getattr(interclr.InterCLR, name)

        def record(self, *args, original=original, name=name):
            events.append((name, self.features.clone(), self.labels.clone(), args))
            return original(self, *args)

        monkeypatch.setattr(interclr.InterCLR, name, record)
    seen = seen_by_loss(monkeypatch)
    saved = train("interclr", tmp_path, "--accum", 2, "--max-steps", 4, *EXACT)["model"]
    names = [e[0] for e in events if e[0] != "recentre"]
    step = ["update_target", "members", "members", "enqueue", "update"]
    assert names == [*step, *step, "refill"] * 2
    members = [e for e in events if e[0] == "members"]
    updates = [e for e in events if e[0] == "update"]
    for i, (_, features, labels, (indices, u)) in enumerate(members):
        before = updates[i // 2 - 1][3] if i > 1 else None  # what the step before has written
        if before:
            assert torch.equal(features[before[0]], before[1])
        q, k, bank, _, margin, same, _, count, _ = seen[2 * i]
        assert torch.equal(bank, features) and torch.equal(same, labels[indices][:, None] == labels)
        member = (k[:, None] == features).all(2).long().argmax(1)
        assert torch.equal(labels[member], labels[indices]) and (margin, count) == (-0.5, 6)
        assert u.shape == (8,) and q.shape == (8, 16)
    assert torch.equal(saved["features"][updates[-1][3][0]], updates[-1][3][1])
    assert torch.equal(torch.cat([updates[i][3][0] for i in range(4)]).sort().values, torch.arange(64)), "an epoch"


def test_small_clusters_are_refilled_in_the_runs_of_all_scripts(tmp_path, monkeypatch):
    counts, original = [], interclr.InterCLR.refill
    monkeypatch.setattr(interclr.InterCLR, "refill", lambda *a: counts.append(original(*a)) or counts[-1])
    train("interclr", tmp_path, "--max-steps", 8)
    assert any(counts)


@pytest.mark.parametrize("name", ["sizes", "recentre", "refill"])
def test_clusters_are_those_of_odc(name):
    assert inspect.getsource(getattr(interclr.InterCLR, name)) == inspect.getsource(getattr(odc.ODC, name))


@pytest.mark.parametrize("name", ["reset_target", "update_target", "enqueue"])
def test_queue_and_target_are_those_of_moco(name):
    assert inspect.getsource(getattr(interclr.InterCLR, name)) == inspect.getsource(getattr(moco.MoCo, name))
    assert inspect.getsource(interclr.key_order) == inspect.getsource(moco.key_order)
    assert inspect.getsource(interclr.own_share) == inspect.getsource(odc.own_share)


# ----------------------------------------------------------------------------------------------------- script
@pytest.mark.parametrize("inter", [0.0, 0.25, 1.0])
def test_loss_of_a_run_is_the_weighted_sum(inter, tmp_path, monkeypatch):
    values, original = [], interclr.info_nce
    monkeypatch.setattr(interclr, "info_nce", lambda *a: values.append(original(*a)) or values[-1])
    train("interclr", tmp_path, "--max-steps", 3, "--inter", inter, *EXACT)
    expected = [(1 - inter) * values[2 * i + 1].item() + inter * values[2 * i].item() for i in range(3)]
    logged = records(tmp_path).values()
    assert [r["loss"] for r in logged] == pytest.approx(expected, abs=1e-12)
    assert [r["inter"] for r in logged] == pytest.approx([v.item() for v in values[::2]], abs=1e-12)


def test_without_the_inter_image_loss_it_trains_as_moco(tmp_path):
    """Also in the epochs that leave it out: the same network after the same steps."""
    words = ["--queue", 40, "--dim", 16, "--max-steps", 4, *EXACT]
    one = train("moco", tmp_path / "moco", *words)["model"]
    for name, more in (("none", ["--inter", 0]), ("later", ["--intra-epochs", 1])):
        other = train("interclr", tmp_path / name, *words, *more)["model"]
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, atol=1e-12, rtol=1e-12, msg=key)
    assert train("interclr", tmp_path / "more", *words, "--max-steps", 6, "--intra-epochs", 1)["model"]["oldest"] == 16


def test_chance_is_printed(tmp_path, capsys):
    train("interclr", tmp_path, "--max-steps", 1)
    inter = math.log(1 + 6 * math.exp(-2.5))
    shown = capsys.readouterr().out
    assert f"loss 0.75 ln(41) + 0.25 x {inter:.2f} = {0.75 * math.log(41) + 0.25 * inter:.2f}" in shown
    assert "negatives   6 of the 20 most similar of 64 images" in shown


def test_defaults_of_large_and_small_sets(tmp_path):
    """A tenth of the images as the pool, four fifths of it as negatives, a hundredth as clusters."""
    words = ["--data", "fake:500", "--arch", "resnet18", "--width", 0.125, "--image-size", 8, "--batch-size", 50]
    main("interclr", *words, "--knn-every", 0, "--max-steps", 1, "--workers", 0, "--out", tmp_path)
    saved = state(tmp_path)["model"]
    assert saved["centroids"].shape == (5, 128) and saved["features"].shape == (500, 128)


def test_recipe_is_the_published_one():
    args = parsed("interclr", "--data", "/imagenet")
    assert (args.inter, args.margin, args.temperature, args.key_momentum, args.dim) == (0.25, -0.5, 0.2, 0.999, 128)
    assert (args.lr, args.batch_size, args.weight_decay, args.momentum, args.epochs) == (0.03, 256, 1e-4, 0.9, 200)
    assert (args.min_cluster, args.centroid_every, args.intra_epochs) == (20, 10, 0)
    assert interclr.augmentation(224) == moco.augmentation(224) and interclr.augmentation(32) == moco.augmentation(32)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--clusters 65 --min-cluster 0", "--clusters 65 of --min-cluster 0 are too many for 64 images"),
        ("--clusters 6 --min-cluster 11", "--clusters 6 of --min-cluster 11 are too many for 64 images"),
        ("--clusters 1", "--clusters: must be at least 2"),
        ("--min-cluster 2 --negatives 7", "--negatives 7 of a --pool of 6 of 64 images"),
        ("--min-cluster 2 --pool 65", "--negatives 52 of a --pool of 65 of 64 images"),
        ("--inter 1.5", "--inter: must be at most 1"),
        ("--margin nan", "--margin: expected a finite number"),
        ("--queue 8", "--queue 8 cannot hold the keys of a step: use at least --batch-size, 16"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys, tmp_path):
    start = ["--data", "fake:64", "--batch-size", 16, "--out", tmp_path, *words.split()]
    assert message in refused(capsys, main, "interclr", *start)
