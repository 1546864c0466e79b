"""k-means and PCA whitening against scikit-learn, slow loops, and themselves on two processes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common import kmeans as module
from common.kmeans import kmeans, pca_whiten
from tests.helpers import refused, rows


def blobs(n, d, centres, dtype=torch.float64, spread=0.5):
    return (2 * rows(centres, d)[torch.arange(n) % centres] + spread * rows(n, d)).to(dtype)


def slow_kmeans(x, centroids, iterations):
    """Spherical k-means as in a textbook, one row and one cluster at a time; no cluster may become empty."""
    x, c = x.numpy(), centroids.numpy().copy()
    for _ in range(iterations):
        labels = [np.argmax(c @ row) for row in x]
        for j in range(len(c)):
            c[j] = np.mean([row for row, label in zip(x, labels, strict=True) if label == j], axis=0)
            c[j] /= np.sqrt((c[j] ** 2).sum())
    labels = [np.argmax(c @ row) for row in x]
    return c, labels, sum(((row - c[j]) ** 2).sum() for row, j in zip(x, labels, strict=True))


@pytest.mark.parametrize("iterations", [1, 7])
def test_equals_sklearn_from_the_same_start(iterations):
    from sklearn.cluster import KMeans  # here, since the processes started below import this file too

    x = blobs(600, 9, 12, spread=1.5)
    start = x[:17]
    ours = kmeans(x, 17, iterations, centroids=start)
    # scikit-learn repeats the assignment after the last update (with tol=0 and no convergence), as ours does.
    ref = KMeans(17, init=start.numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(x.numpy())
    np.testing.assert_allclose(ours.centroids, ref.cluster_centers_, rtol=1e-9, atol=1e-12)
    assert ours.assignments.dtype == torch.int64 and ours.assignments.tolist() == ref.labels_.tolist()
    assert ours.inertia == pytest.approx(ref.inertia_, rel=1e-9)


def test_spherical_equals_slow_loop():
    x = F.normalize(blobs(150, 5, 6, spread=1.0), dim=1)
    ours = kmeans(x, 6, 4, spherical=True, centroids=x[:6])
    centroids, labels, inertia = slow_kmeans(x, x[:6], 4)
    np.testing.assert_allclose(ours.centroids, centroids, rtol=1e-10, atol=1e-12)
    assert ours.assignments.tolist() == labels
    assert ours.inertia == pytest.approx(inertia, rel=1e-10)


def test_zero_iterations_only_assign():
    x = blobs(40, 3, 4)
    ours = kmeans(x, 4, 0, centroids=x[:4])
    assert torch.equal(ours.centroids, x[:4])
    assert ours.assignments.tolist() == torch.cdist(x, x[:4]).argmin(1).tolist()


def test_start_is_k_distinct_rows():
    x = torch.randperm(50).double()[:, None]
    for k in (50, 20):
        start = kmeans(x, k, 0, seed=3).centroids.flatten().tolist()
        assert len(set(start)) == k and set(start) <= set(range(50))


def test_seed_decides_everything():
    x = blobs(500, 6, 5, torch.float32, spread=2.0)
    first, again, other = kmeans(x, 30, 5, seed=1), kmeans(x, 30, 5, seed=1), kmeans(x, 30, 5, seed=2)
    assert torch.equal(first.centroids, again.centroids) and first.inertia == again.inertia
    assert torch.equal(first.assignments, again.assignments)
    assert not torch.equal(first.centroids, other.centroids)
    one = torch.cat([x[:1], x.new_full((29, 6), 1e4)])  # 29 empty clusters to find donors for
    splits = [kmeans(x, 30, 3, seed=seed, centroids=one).centroids for seed in (1, 2)]
    assert not torch.equal(*splits)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first.centroids, kmeans(x, 30, 5, seed=1).centroids)
    assert torch.equal(splits[0], kmeans(x, 30, 3, seed=1, centroids=one).centroids)
    assert torch.equal(state, torch.get_rng_state())  # the program's own random numbers are left alone


def test_inputs_stay_as_they_are():
    x = blobs(60, 4, 3)
    start = torch.cat([x[:3], x[:1] + 1e6])  # the last one is empty, so it is split
    before = x.clone(), start.clone()
    kmeans(x, 4, 2, spherical=True, centroids=start)
    kmeans(x, 4, 2, centroids=start)
    pca_whiten(x, 2)
    assert torch.equal(x, before[0]) and torch.equal(start, before[1])


def test_far_from_the_origin_float32_still_separates():
    # Two clusters 0.02 apart at distance 1000: x.c is near 1e6, where float32 steps by 0.06.
    offset = torch.tensor([[-0.01], [0.01]]).repeat(50, 1)
    x = torch.cat([offset, torch.zeros(100, 3)], 1) + 1000
    ours = kmeans(x, 2, 3, centroids=x[:2])
    assert ours.assignments.tolist() == [0, 1] * 50
    assert ours.inertia < 1e-4


def test_half_precision_features_are_widened():
    x = blobs(3000, 4, 3).half()
    x[:, 0] += 100  # sums of 1000 rows pass 65504, the largest half
    ours, exact = kmeans(x, 3, 3), kmeans(x.double(), 3, 3)
    assert ours.centroids.dtype == torch.float32
    torch.testing.assert_close(ours.centroids.double(), exact.centroids, rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing():
    x = blobs(500, 8, 10, torch.float32, spread=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, white = kmeans(x, 30, 4), pca_whiten(x, 5)
    outside = kmeans(x, 30, 4)
    assert torch.equal(inside.centroids, outside.centroids) and inside.inertia == outside.inertia
    assert torch.equal(white.features, pca_whiten(x, 5).features)


# ---------------------------------------------------------------------------------------------- empty clusters
def test_empty_cluster_takes_half_of_a_donor():
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 5.0], [2.0, 1.0, 1.0], [500.0, 500.0, 500.0]])
    # Cluster 0 gets three rows, 1 a single row, 2 none: only cluster 0 can give.
    start = torch.tensor([[2.0, 2.0, 2.0], [400.0, 400.0, 400.0], [9e4, 9e4, 9e4]])
    ours = kmeans(x, 3, 1, centroids=start)
    mean, tilt = x[:3].mean(0), torch.tensor([1.0, -1.0, 1.0]) / 1024
    torch.testing.assert_close(ours.centroids[2], mean * (1 + tilt), rtol=1e-7, atol=0)
    torch.testing.assert_close(ours.centroids[0], mean * (1 - tilt), rtol=1e-7, atol=0)
    assert torch.equal(ours.centroids[1], x[3])
    assert ours.assignments.unique().tolist() == [0, 1, 2]


def test_donors_are_drawn_in_proportion_to_size_minus_one_and_halve():
    draws = []
    for seed in range(400):
        centroids = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [9.0, 9.0]])
        counts = torch.tensor([31.0, 11.0, 1.0, 0.0])
        module._split_into_empty(centroids, counts[:, None], torch.Generator().manual_seed(seed))
        draws.append(round(centroids[3, 0].item()))
    share = draws.count(1) / len(draws)
    assert abs(share - 30 / 40) < 4 * math.sqrt(0.75 * 0.25 / 400)
    assert 3 not in draws and 9 not in draws
    # Eight rows for eight clusters can only be shared by halving three times over. Of the products of three
    # factors 1 +- 1/1024, one has no minus, three have one, three have two, and one has three.
    centroids = torch.cat([torch.ones(1, 2), torch.zeros(7, 2)])
    counts = torch.tensor([8.0] + [0.0] * 7)
    module._split_into_empty(centroids, counts[:, None], torch.Generator().manual_seed(0))
    powers = (centroids[:, 0].log() * 1024).round().int()
    assert sorted(powers.tolist()) == [-3, -1, -1, -1, 1, 1, 1, 3]


@pytest.mark.parametrize("spherical", [False, True])
def test_no_cluster_stays_empty_when_there_are_points_enough(spherical):
    x = blobs(2000, 8, 4, torch.float32)
    x = F.normalize(x, dim=1) if spherical else x
    start = -100 * x[:1].repeat(20, 1)  # all rows prefer one and the same centroid at first
    start[0] = x[0]
    assert len(kmeans(x, 20, 0, centroids=start, spherical=spherical).assignments.unique()) < 20
    ours = kmeans(x, 20, 15, centroids=start, spherical=spherical)
    assert torch.bincount(ours.assignments, minlength=20).min() > 0


@pytest.mark.parametrize("spherical", [False, True])
def test_empty_clusters_keep_their_centroid_without_splits(spherical):
    x = F.normalize(blobs(60, 3, 4).abs(), dim=1)
    start = F.normalize(torch.cat([x[:3], -x[:2] + 0.1]), dim=1)  # the last two point away from all rows
    ours = kmeans(x, 5, 4, centroids=start, spherical=spherical, split=False)
    assert torch.bincount(ours.assignments, minlength=5)[3:].tolist() == [0, 0]
    torch.testing.assert_close(ours.centroids[3:], start[3:], rtol=0, atol=1e-15)
    three = kmeans(x, 3, 4, centroids=start[:3], spherical=spherical)
    torch.testing.assert_close(ours.centroids[:3], three.centroids, rtol=0, atol=1e-15)
    one = start[:1] * torch.tensor([[1.0], [-1.0]], dtype=x.dtype)  # with splits, none stays empty
    assert len(kmeans(x, 2, 4, centroids=one, spherical=spherical).assignments.unique()) == 2


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_duplicates_only(value):
    x = torch.full((30, 4), value)
    ours = kmeans(x, 10, 5)
    assert ours.centroids.isfinite().all() and ours.inertia < 1e-3
    assert ours.assignments.min() >= 0 and ours.assignments.max() < 10
    assert kmeans(x, 10, 5, spherical=True).centroids.isfinite().all()
    few = torch.eye(3)[torch.arange(30) % 3]  # three distinct rows for ten clusters
    assert kmeans(few, 10, 5).centroids.isfinite().all()


def test_spherical_centroids_are_unit():
    x = F.normalize(blobs(800, 16, 7, torch.float32, spread=2.0), dim=1)
    ours = kmeans(x, 25, 6, spherical=True)
    torch.testing.assert_close(ours.centroids.norm(dim=1), torch.ones(25), rtol=0, atol=1e-6)
    assert ours.assignments.tolist() == (x @ ours.centroids.t()).argmax(1).tolist()
    scaled = kmeans(x, 4, 0, spherical=True, centroids=x[:4] * torch.tensor([[1.0], [2.0], [5.0], [9.0]]))
    assert scaled.assignments.tolist() == (x @ x[:4].t()).argmax(1).tolist()  # also from the start
    cosines = (x @ ours.centroids.t()).max(1)[0]
    assert ours.inertia == pytest.approx((2 - 2 * cosines).sum().item(), rel=1e-4)


# ---------------------------------------------------------------------------------------- chunks and processes
def test_chunk_size_changes_nothing(monkeypatch):
    x = blobs(997, 6, 9, spread=1.5)
    whole, white = kmeans(x, 20, 6), pca_whiten(x, 4)
    seen = []
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 7 * 20 * 8 + 5})
    original = module._chunks
    monkeypatch.setattr(module, "_chunks", lambda *args: seen.append(original(*args)) or seen[-1])
    parts, white_parts = kmeans(x, 20, 6), pca_whiten(x, 4)
    assert {rows.stop - rows.start for rows in seen[1]} == {7, 3}  # 997 = 142 x 7 + 3
    torch.testing.assert_close(tuple(parts), tuple(whole), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tuple(white_parts), tuple(white), rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 1})  # less than one row: one row at a time
    assert torch.equal(kmeans(x, 20, 6).assignments, whole.assignments)


def test_number_of_threads_changes_nothing(monkeypatch):
    x = blobs(300, 6, 9, torch.float32, spread=1.5).repeat(2, 1)  # every row twice: centroids that tie
    start = torch.cat([x[:10], x[:10]])
    few = kmeans(x, 20, 0, centroids=start)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)  # PyTorch's argmax instead of NumPy's
    assert torch.equal(kmeans(x, 20, 0, centroids=start).assignments, few.assignments)


JOBS = {
    "plain": lambda x: kmeans(x, 12, 6, seed=5),
    "spherical": lambda x: kmeans(F.normalize(x, dim=1), 12, 6, seed=5, spherical=True),
    "splits": lambda x: kmeans(x, 12, 6, seed=5, centroids=torch.eye(12, 7).double() * 1e5),
    "keeps": lambda x: kmeans(F.normalize(x, dim=1), 9, 6, spherical=True, centroids=opposed(x), split=False),
    "whitened": lambda x: pca_whiten(x, 3),
}


def opposed(x):
    """A start of which most centroids get no row, the same for any part of the rows."""
    return torch.cat([torch.eye(4, x.shape[1], dtype=x.dtype), -100 * torch.ones(5, x.shape[1], dtype=x.dtype)])


def _one_of_two(rank, folder, sizes):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=len(sizes))
    x = blobs(sum(sizes), 7, 6, spread=1.5).split(sizes)[rank]
    if rank == 1:  # as on a machine that finds other axes: those of the first process must win
        eigh = torch.linalg.eigh
        torch.linalg.eigh = lambda matrix: (eigh(matrix)[0], eigh(matrix)[1].flip(0))
    results = {name: tuple(job(x)) for name, job in JOBS.items()}
    results["empty process"] = tuple(kmeans(x if rank == 0 else x[:0], 12, 3))
    for name, bad, k in (("too many", x, 202), ("not finite", x.log() if rank == 1 else x, 3)):
        try:  # only one process sees the value that is not finite, both must stop
            kmeans(bad, k)
        except SystemExit as stop:
            results[name] = stop.code
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    sizes = [130, 71]
    torch.multiprocessing.spawn(_one_of_two, (tmp_path, sizes), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    x = blobs(sum(sizes), 7, 6, spread=1.5)
    for name, job in JOBS.items():
        for i, (field, expected) in enumerate(job(x)._asdict().items()):
            first, second = (r[name][i] for r in ranks)
            if field in ("assignments", "features"):
                first = torch.cat([first, second])
            else:
                torch.testing.assert_close(first, second, rtol=0, atol=0)  # the processes agree bit for bit
            torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-10)
    alone = kmeans(x[:130], 12, 3)
    torch.testing.assert_close(ranks[1]["empty process"][0], alone.centroids, rtol=1e-10, atol=1e-10)
    assert ranks[1]["empty process"][1].shape == (0,)
    assert all(r["too many"] == 2 and r["not finite"] == 2 for r in ranks)


# --------------------------------------------------------------------------------------------------------- PCA
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_whitening_equals_sklearn_up_to_sign(dtype, tolerance):
    from sklearn.decomposition import PCA

    x = (blobs(900, 10, 30) @ rows(10, 10) + 5).to(dtype)
    ours = pca_whiten(x, 6)
    assert [tuple(t.shape) for t in ours] == [(900, 6), (10,), (10, 6)] and ours.features.dtype == dtype
    ref = PCA(6, whiten=True, svd_solver="full").fit(x.double().numpy())
    expected = torch.from_numpy(ref.transform(x.double().numpy()))
    signs = (ours.features.double() * expected).sum(0).sign()
    torch.testing.assert_close(ours.features.double() * signs, expected, rtol=0, atol=tolerance)
    covariance = torch.cov(ours.features.double().t())
    torch.testing.assert_close(covariance, torch.eye(6).double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.features.mean(0), torch.zeros(6, dtype=dtype), rtol=0, atol=tolerance)
    torch.testing.assert_close((x - ours.mean) @ ours.projection, ours.features, rtol=0, atol=tolerance)
    largest = ours.projection.gather(0, ours.projection.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_whitening_gives_unit_variance_to_faint_axes():
    # Standard deviations from 1 to 1e-4 on a mean of 1, as deep features have: variances span eight decades.
    scale = torch.logspace(0, -4, 5)
    x = rows(4000, 5).float() * scale + 1
    white = pca_whiten(x, 5).features
    torch.testing.assert_close(torch.cov(white.t()), torch.eye(5), rtol=0, atol=2e-3)


def test_whitening_without_variance_gives_zeros():
    few = blobs(4, 6, 4)  # 4 rows span 3 axes
    white = pca_whiten(few, 5).features
    assert (white[:, :3].var(0) - 1).abs().max() < 1e-9 and (white[:, 3:] == 0).all()
    assert (pca_whiten(torch.ones(5, 3), 2).features == 0).all()


# ---------------------------------------------------------------------------------------------------- mistakes
def test_mistakes_exit_2_and_name_the_remedy(capsys):
    x = blobs(20, 3, 2)
    line = refused(capsys, kmeans, x, 21)
    assert "--clusters" in line and "20" in line and "21" in line
    assert "--clusters" in refused(capsys, kmeans, x, 0)
    for dim in (0, 4):
        assert "from 1 to 3" in refused(capsys, pca_whiten, x, dim)
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[7, 1] = bad
        assert "NaN" in refused(capsys, kmeans, broken, 2)
        assert "NaN" in refused(capsys, pca_whiten, broken, 2)
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(4, 3\)"):
        kmeans(x, 4, centroids=x[:3])
