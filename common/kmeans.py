"""k-means and PCA whitening on the device where the features are, over rows spread across processes.

Each process passes its own rows, however many (even none); together, in rank order, they are the data set. Results
agree on all processes and, up to rounding, for any number of them. Memory is bounded by chunks: the rows x clusters
matrix never exists. Arithmetic is in the dtype of the features (half types become float32), also under autocast. On
CUDA sums have no fixed order, so last digits vary between runs.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common.args import fail
from common.distributed import all_reduce, any_process, gather, is_main, rank

# Scores of one chunk: a CPU should still have them in cache for the maximum, a GPU wants large products.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


class Clusters(NamedTuple):
    centroids: torch.Tensor  # (k, D), equal on all processes
    assignments: torch.Tensor  # (N,) int64, cluster of each row of this process
    inertia: float  # sum over the rows of all processes of the squared distance to their centroid


class Whitened(NamedTuple):
    features: torch.Tensor  # (N, dim), rows of this process
    mean: torch.Tensor  # (D,), equal on all processes
    projection: torch.Tensor  # (D, dim), equal on all processes: features = (input - mean) @ projection


@torch.no_grad()
def kmeans(features, k, iterations=20, seed=0, spherical=False, centroids=None, split=True):
    """Lloyd's algorithm (1982): `iterations` times assign and average, then one last assignment.

    features: (N, D) floats, this process's rows. k: at most the rows of all processes. seed: for start and splits.
    centroids: (k, D) to start from; by default k distinct rows of the whole set. All processes must pass the same k,
    seed and centroids. spherical: centroids get unit length after each iteration and rows (unit length too, not
    checked) go to the largest dot product, not the nearest centroid. split: otherwise empty clusters keep their
    centroids.

    A cluster left empty by an iteration takes half of another, drawn with probability proportional to its size - 1:
    both get its centroid, alternate dimensions times 1 +- 1/1024, in opposite directions. Nothing follows the last
    assignment, so it may leave clusters empty (it must, with fewer than k distinct rows). Start and splits are as in
    faiss's `Clustering.cpp` (Johnson et al., arXiv:1702.08734).
    """
    sizes, dtype, wide = _inspect(features)
    if not 1 <= k <= sum(sizes):
        fail(f"--clusters {k} for {sum(sizes)} rows of features: use a number from 1 to {sum(sizes)}")
    if centroids is not None and centroids.shape != (k, features.shape[1]):
        raise ValueError(f"centroids are {tuple(centroids.shape)}, expected {(k, features.shape[1])}")
    generator = torch.Generator().manual_seed(seed)  # draws depend on global counts only: all processes agree
    if centroids is None:
        centroids = _random_rows(features, sizes, k, dtype, generator)
    centroids = centroids.to(features.device, dtype)
    if spherical:
        centroids = F.normalize(centroids, dim=1)
    assignments = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for _ in range(iterations):
        sums = torch.zeros_like(centroids)
        for rows, x in _assign(features, centroids, spherical, assignments):
            sums.index_add_(0, assignments[rows], x)
        counts = torch.bincount(assignments, minlength=k)[:, None].to(dtype)
        packed = all_reduce(torch.cat([sums, counts], dim=1))  # float32 counts are exact up to 2^24
        sums, counts = packed[:, :-1], packed[:, -1:]
        centroids = torch.where(counts > 0, sums / counts, centroids)
        if split:
            _split_into_empty(centroids, counts, generator)
        if spherical:
            centroids = F.normalize(centroids, dim=1)
    inertia = features.new_zeros(1, dtype=wide)  # of differences: |x|^2 - 2xc + |c|^2 loses the digits
    for rows, x in _assign(features, centroids, spherical, assignments):
        inertia += centroids.index_select(0, assignments[rows]).sub_(x).square_().sum()
    return Clusters(centroids, assignments, all_reduce(inertia).item())


@torch.no_grad()
def pca_whiten(features, dim):
    """Projects on the `dim` leading principal axes and scales each to unit variance, as scikit-learn's PCA does it.

    features: (N, D) floats, this process's rows. Variances are over the rows of all processes, divided by their number
    - 1. Each axis is turned so that its largest component is positive. Axes without variance (fewer rows than `dim`,
    constant or repeated columns) project to 0.
    """
    sizes, dtype, wide = _inspect(features)
    n, d = sum(sizes), features.shape[1]
    if not 1 <= dim <= d:
        fail(f"--pca-dim {dim} for features with {d} dimensions: use a number from 1 to {d}")
    # In float64: whitening divides by roots of small eigenvalues, noise in a float32 covariance.
    mean = features.new_zeros(d, dtype=wide)
    for rows in _chunks(features, d, wide):
        mean += features[rows].sum(0, dtype=wide)
    mean = all_reduce(mean) / max(n, 1)
    covariance = mean.new_zeros(d, d)
    for rows in _chunks(features, d, wide):
        x = features[rows].to(wide) - mean
        covariance.addmm_(x.t(), x)
    values, vectors = torch.linalg.eigh(all_reduce(covariance) / max(n - 1, 1))  # ascending
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    floor = values[0] * d * torch.finfo(wide).eps
    projection = vectors * signs * torch.where(values > floor, values.rsqrt(), 0)
    # Axes of equal variance are arbitrary and may differ between machines: all use the first process's.
    projection = all_reduce(projection * is_main())
    whitened = features.new_empty(len(features), dim, dtype=dtype)
    for rows in _chunks(features, d, wide):
        whitened[rows] = ((features[rows].to(wide) - mean) @ projection).to(dtype)
    return Whitened(whitened, mean.to(dtype), projection.to(dtype))


def _inspect(features):
    """Rows of each process, dtype to compute in, dtype for long sums; exits if a value is not finite."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    wide = torch.float32 if features.device.type == "mps" else torch.float64  # mps has no float64
    sizes = gather(torch.tensor([len(features)], device=features.device)).tolist()
    # A sum is NaN or infinite as soon as one of its terms is, and reads the features only once.
    total = sum(features[rows].sum(dtype=dtype) for rows in _chunks(features, features.shape[1], dtype))
    if any_process(not torch.as_tensor(total).isfinite(), features.device):
        cause = "the images or the weights of --init hold such values, or the run has diverged (lower --lr)"
        fail(f"features contain NaN or infinite values, so they cannot be clustered: {cause}")
    return sizes, dtype, wide


def _chunks(features, width, dtype):
    """Slices of rows such that (rows, width) numbers of `dtype` fit the chunk size."""
    step = max(CHUNK_BYTES.get(features.device.type, 64 << 20) // (width * dtype.itemsize), 1)
    return [slice(i, min(i + step, len(features))) for i in range(0, len(features), step)]


def _random_rows(features, sizes, k, dtype, generator):
    chosen = torch.randperm(sum(sizes), generator=generator)[:k] - sum(sizes[: rank()])
    mine = ((chosen >= 0) & (chosen < len(features))).to(features.device)
    start = features.new_zeros(k, features.shape[1], dtype=dtype)
    start[mine] = features[chosen.to(features.device)[mine]].to(dtype)
    return all_reduce(start)  # each row comes from one process, the others add zero


def _assign(features, centroids, spherical, assignments):
    """Writes each row's best centroid into `assignments`; yields (slice of rows, these rows) per chunk."""
    # argmin |x-c|^2 = argmax x.c - |c|^2/2. With c-m in the product all scores of a row change alike and stay
    # small when the data are far from the origin, where float32 would confuse neighbouring centroids.
    m = centroids.mean(0)
    weight = (centroids - m).t()
    bias = centroids.new_zeros(1) if spherical else -(weight.t() * (centroids + m)).sum(1) / 2
    chunks = _chunks(features, max(centroids.shape), centroids.dtype)
    scores = centroids.new_empty(chunks[0].stop if chunks else 0, len(centroids))  # for all chunks
    for rows in chunks:
        x = features[rows].to(centroids.dtype)
        best = torch.addmm(bias, x, weight, out=scores[: len(x)])  # with out=, autocast keeps away
        if x.device.type == "cpu" and torch.get_num_threads() < 12:  # one NumPy thread is as fast as ten here
            np.argmax(best.numpy(), axis=1, out=assignments[rows].numpy())
        else:
            torch.argmax(best, dim=1, out=assignments[rows])
        yield rows, x


def _split_into_empty(centroids, counts, generator):
    """In place: each empty cluster takes half of one with at least two rows (there is one, as rows >= k)."""
    counts = counts.flatten().cpu()
    tilt = torch.full_like(centroids[0], 1 / 1024)
    tilt[1::2].neg_()
    for empty in (counts == 0).nonzero().flatten().tolist():
        donor = torch.multinomial((counts - 1).clamp(min=0), 1, generator=generator).item()
        centroids[empty] = centroids[donor] * (1 + tilt)
        centroids[donor] *= 1 - tilt
        counts[empty] = counts[donor] // 2
        counts[donor] -= counts[empty]
