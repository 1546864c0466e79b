"""RankMe against k-NN accuracy over the runs of the results table, as a picture and a rank correlation.

    python results/rankme.py results/cifar10_subset/*.jsonl results/cifar10_subset/knn-*.json --out rankme.png

Of a log.jsonl the last record of --knn-every is taken, and the first one, the network before the first step, as a
cross; of a file of eval_knn.py its spectrum and k = 20. A run in both is drawn once, from its log. Logs without RankMe
are named and left out. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import numpy as np


def measured(path):
    """Architecture, [(RankMe, k-NN accuracy)] of a file: before the first step and at the end of a log, one of
    eval_knn's JSON."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        found = [(record["spectrum"]["rankme"], record["knn"]["20"]["top1"])] if "spectrum" in record else []
        return record["arch"], found
    first, *records = (json.loads(line) for line in path.read_text().splitlines())
    found = [(r["rankme"], r["knn"]) for r in records if "rankme" in r and "knn" in r]
    return first["args"]["arch"], [found[0], found[-1]] if len(found) > 1 else []


def spearman(x, y):
    """Correlation of the ranks; ties get the mean of their ranks."""
    ranks = [np.unique(v, return_inverse=True, return_counts=True)[1:] for v in (x, y)]
    x, y = ((np.cumsum(count) - (count - 1) / 2)[inverse] for inverse, count in ranks)
    return float(np.corrcoef(x, y)[0, 1])


def draw(path, runs):
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure((9, 6), layout="constrained")
    axis = figure.subplots()
    start = [points[0] for _, points in runs.values() if len(points) > 1]
    axis.plot(*zip(*start, strict=True), "x", color="grey", label="before the first step") if start else None
    for marker, label in (("o", "ResNet"), ("s", "ViT, Swin")):
        axis.plot([], [], marker, color="grey", label=label)
    last = 0.0
    for i, (name, (arch, points)) in enumerate(sorted(runs.items(), key=lambda item: item[1][1][-1][1])):
        rank, knn = points[-1]
        axis.plot(rank, knn, "o" if "resnet" in arch else "s", color=colormaps["tab20"].colors[i % 20], ms=6)
        last = max(knn, last + 0.45)  # names stand one above the other
        axis.annotate(name, (rank, last), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axis.set(xlabel="RankMe of the backbone's features", ylabel="k-NN top-1, %", xscale="log")
    axis.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    axis.xaxis.set_minor_formatter("")
    axis.margins(x=0.12)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", default="results/cifar10_subset/rankme.png")
    args = parser.parse_args()
    runs, without = {}, []
    for path in sorted(args.files, key=lambda p: p.suffix != ".json"):  # logs last: they replace the evaluations
        name = path.stem.removeprefix("knn-")
        arch, points = measured(path)
        if points:
            runs[name] = arch, points
        elif name not in runs:
            without.append(name)
    without = [name for name in without if name not in runs]
    if without:
        print(f"without RankMe, left out: {', '.join(without)}")
    for name, (_, points) in sorted(runs.items()):
        print(f"{name:<15} " + " -> ".join(f"RankMe {rank:6.1f}  k-NN {knn:5.1f}" for rank, knn in points))
    groups = {"all": list(runs.values()), "ResNets": [run for run in runs.values() if "resnet" in run[0]]}
    for what, group in groups.items():
        rank, knn = np.array([points[-1] for _, points in group]).T
        print(f"{what}: {len(group)} runs, rank correlation {spearman(rank, knn):.2f}")
    draw(args.out, runs)
