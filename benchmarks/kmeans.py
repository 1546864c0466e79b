"""k-means on 100,000 x 256 features, 1,000 clusters: this project's beside faiss-cpu's and scikit-learn's.

    python benchmarks/kmeans.py

Each does 5 iterations and one last assignment from the same initial centroids, on all points. Before timing,
the inertias (computed here, in float64, from the centroids and labels that each returned) must agree within
0.5 %. faiss-cpu is needed by nothing else (`pip install faiss-cpu`); without it its row is left out.
"""

import statistics
import sys
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, parser, speed, table
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
    """VmRSS (now) or VmHWM (peak) of this process in MB; None where there is no /proc."""
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


def main():
    flags = parser(__doc__, repeats=7, device=False)
    flags.add_argument("--rows", type=int, default=100_000)
    flags.add_argument("--dim", type=int, default=256)
    flags.add_argument("--clusters", type=int, default=1000)
    flags.add_argument("--iterations", type=int, default=5)
    args = flags.parse_args()

    print(machine())
    versions = {"scikit-learn": sklearn.__version__, "numpy": np.__version__}
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

    jobs = {name: lambda method=method: method(x, start, args.iterations) for name, method in methods.items()}
    times = measure(jobs, args.repeats, clock(args))
    flops = 2 * args.rows * args.dim * args.clusters * (args.iterations + 1)
    rates = {name: f"{flops / statistics.median(values) / 1e9:.0f}" for name, values in times.items()}
    base = "faiss-cpu" if "faiss-cpu" in methods else "scikit-learn"
    table(times, "s", columns={"GFLOP/s": rates} | speed(times, base))


if __name__ == "__main__":
    main()
