"""What deepclusterv2.py and selav2.py do before every epoch, per head, beside spherical k-means of faiss-cpu.

    python benchmarks/clusters.py

A bank of 100,000 x 128 unit embeddings, 1,000 prototypes. k-means, ours and faiss's: 10 iterations and a last
assignment from the same centroids, on all rows; the sums of cosines must agree within 0.5 %. Labels of selav2.py: its
default iterations with random prototypes, on all rows; how even they are is printed. The memory is that above the bank.
Aims: at least 0.9x the speed of faiss-cpu, at most 100 MB. faiss-cpu is needed by nothing else (`pip install
faiss-cpu`).
"""

import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import selav2
from benchmarks.kmeans import memory, mixture
from benchmarks.timing import clock, machine, measure, parser, speed, table
from common.kmeans import kmeans


def faiss_kmeans(x, start, iterations):
    import faiss

    # By default faiss would draw 256 points per cluster and ignore the rest.
    model = faiss.Kmeans(x.shape[1], len(start), niter=iterations, spherical=True, max_points_per_centroid=len(x))
    model.train(x.numpy(), init_centroids=start.numpy())
    labels = model.index.search(x.numpy(), 1)[1][:, 0]
    return torch.from_numpy(model.centroids), torch.from_numpy(labels)


def ours(x, start, iterations):
    found = kmeans(x, len(start), iterations, spherical=True, centroids=start, split=False)
    return found.centroids, found.assignments


def cosines(x, centroids, labels):
    """Their mean over the rows, in float64."""
    parts = zip(x.split(4096), labels.split(4096), strict=True)
    return sum((part.double() * centroids[label].double()).sum().item() for part, label in parts) / len(x)


def extra(job):
    """MB of memory that a job needs while it runs, and what it returns."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    except OSError:
        return None, job()
    before = memory("VmRSS")
    result = job()
    return memory("VmHWM") - before, result


def main():
    flags = parser(__doc__, repeats=5, device=False)
    flags.add_argument("--rows", type=int, default=100_000)
    flags.add_argument("--dim", type=int, default=128)
    flags.add_argument("--prototypes", type=int, default=1000)
    flags.add_argument("--iterations", type=int, default=10)
    args = flags.parse_args()

    print(machine())
    x = mixture(args.rows, args.dim, max(args.prototypes * 3 // 2, 1))
    generator = torch.Generator().manual_seed(1)
    start = x[torch.randperm(len(x), generator=generator)[: args.prototypes]]
    prototypes = F.normalize(torch.randn(args.prototypes, args.dim, generator=generator), dim=1)
    default = selav2.parse_args(["--data", "fake"])
    settings = (default.temperature, default.lambd, default.iterations)
    print(f"{args.rows:,} x {args.dim}, K = {args.prototypes:,}, {args.iterations} iterations of k-means + assignment,")
    print(f"{default.iterations} iterations of Sinkhorn-Knopp + assignment; memory of k-means and labels:")

    methods = {
        "ours, k-means": lambda: ours(x, start, args.iterations),
        "ours, labels": lambda: selav2.sinkhorn_labels(x, prototypes, *settings),
    }
    found = {}
    for name, method in methods.items():
        used, found[name] = extra(method)
        print(f"{name}: {'unknown' if used is None else f'{used:.0f} MB'} above the bank")
    counts = torch.bincount(found["ours, labels"], minlength=args.prototypes)
    nearest = torch.bincount((x @ prototypes.T).argmax(1), minlength=args.prototypes)
    print(f"rows per prototype: labels {counts.min()} to {counts.max()}, nearest {nearest.min()} to {nearest.max()}")
    try:
        import faiss
    except ImportError:
        print("faiss-cpu cannot be imported (pip install faiss-cpu): its row is left out")
    else:
        methods["faiss-cpu, k-means"] = lambda: faiss_kmeans(x, start, args.iterations)
        mean, theirs = cosines(x, *found["ours, k-means"]), cosines(x, *methods["faiss-cpu, k-means"]())
        print(f"mean cosine: ours {mean:.5f}, faiss-cpu {faiss.__version__} {theirs:.5f}")
        if not abs(theirs / mean - 1) <= 0.005:
            sys.exit("error: faiss-cpu and ours differ by more than 0.5 %: the times would not compare")

    times = measure(methods, args.repeats, clock(args))
    passes = {name: (default.iterations if "labels" in name else args.iterations) + 1 for name in methods}
    each = {name: f"{1000 * statistics.median(values) / passes[name]:.0f}" for name, values in times.items()}
    base = "faiss-cpu, k-means" if "faiss-cpu, k-means" in methods else "ours, k-means"
    table(times, "s", columns={"ms per pass": each} | speed(times, base))


if __name__ == "__main__":
    main()
