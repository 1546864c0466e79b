"""k-means on 100,000 x 256 features, 1,000 clusters: this project's beside faiss-cpu's and scikit-learn's.

    python benchmarks/kmeans.py

Each does 5 iterations and one last assignment from the same initial centroids, on all points. Before timing,
the inertias (computed here, in float64, from the centroids and labels that each returned) must agree within
0.5 %. Then the repeats are interleaved, their order turning, so that a drift of the machine hits all alike.
faiss-cpu is needed by nothing else (`pip install faiss-cpu`); without it its row is left out.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.kmeans import kmeans


def mixture(rows, dim, components, seed=0, step=4096):
    """Unit rows around `components` directions of unequal weight, which themselves lie in groups."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(max(components // 20, 1), dim, generator=g)
    centres = 0.7 * torch.randn(components, dim, generator=g)
    centres += coarse[torch.arange(components) % len(coarse)]
    weights = torch.rand(components, generator=g) + 0.1
    x = torch.empty(rows, dim)
    for part in x.split(step):  # in parts, so that the peak of memory before k-means is that of the features
        part.normal_(generator=g).add_(centres[torch.multinomial(weights, len(part), True, generator=g)])
        part /= part.norm(dim=1, keepdim=True)
    return x


def memory(field):
    """VmRSS (now) or VmHWM (peak) of this process in MB, where Linux tells; else None."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), None)


def ours(x, start, iterations):
    result = kmeans(x, len(start), iterations, centroids=start)
    return result.centroids.cpu(), result.assignments.cpu()


def sklearn_kmeans(x, start, iterations):
    model = KMeans(len(start), init=start.numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    model.fit(x.numpy())
    return torch.from_numpy(model.cluster_centers_), torch.from_numpy(model.labels_).long()


def faiss_kmeans(x, start, iterations):
    import faiss

    # By default faiss would draw 256 points per cluster and ignore the rest.
    model = faiss.Kmeans(x.shape[1], len(start), niter=iterations, max_points_per_centroid=len(x))
    model.train(x.numpy(), init_centroids=start.numpy())
    labels = model.index.search(x.numpy(), 1)[1][:, 0]
    return torch.from_numpy(model.centroids), torch.from_numpy(labels)


def inertia(x, centroids, labels):
    parts = zip(x.split(4096), labels.split(4096), strict=True)
    return sum((part.double() - centroids[label].double()).square().sum().item() for part, label in parts)


def machine():
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"machine: {model}, {cores} cores, {torch.get_num_threads()} threads, {platform.system()}"


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    print(machine())
    versions = {"torch": torch.__version__, "scikit-learn": sklearn.__version__, "numpy": np.__version__}
    methods = {"ours": ours}
    try:
        import faiss

        versions["faiss-cpu"] = faiss.__version__
        methods["faiss-cpu"] = faiss_kmeans
    except ImportError:
        print("faiss-cpu cannot be imported (pip install faiss-cpu): its row is left out")
    methods["scikit-learn"] = sklearn_kmeans
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{args.rows:,} x {args.dim}, k = {args.clusters:,}, {args.iterations} iterations + assignment")

    x = mixture(args.rows, args.dim, max(args.clusters * 3 // 2, 1))
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[: args.clusters]]

    before, inertias = memory("VmRSS"), {}
    for name, method in methods.items():  # ours comes first: the peak of memory is its own
        centroids, labels = method(x, start, args.iterations)
        if name == "ours" and before is not None:
            print(f"peak memory of ours above the features: {memory('VmHWM') - before:.0f} MB")
        inertias[name] = inertia(x, centroids, labels)
    for name, value in inertias.items():
        difference = value / inertias["ours"] - 1
        print(f"inertia of {name}: {value:.2f} ({difference:+.4%} from ours)")
        if not abs(difference) <= 0.005:
            sys.exit(f"error: {name} and ours differ by more than 0.5 %: the times would not compare")

    seconds = {name: [] for name in methods}
    order = list(methods)
    for _ in range(args.repeats):
        for name in order:
            began = time.perf_counter()
            methods[name](x, start, args.iterations)
            seconds[name].append(time.perf_counter() - began)
        order = order[1:] + order[:1]

    base = "faiss-cpu" if "faiss-cpu" in methods else "scikit-learn"
    flops = 2 * args.rows * args.dim * args.clusters * (args.iterations + 1)
    print(f"\n{'':14}{'median s':>9}{'min-max s':>15}{'GFLOP/s':>9}  speed relative to {base}")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(seconds[base]) / median
        spread = f"{min(times):.2f}-{max(times):.2f}"
        print(f"{name:14}{median:>9.2f}{spread:>15}{flops / median / 1e9:>9.0f}  {ratio:.2f}x")


if __name__ == "__main__":
    main()
