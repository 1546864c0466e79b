"""Draws loss and k-NN accuracy of every run in results/cifar10_subset: python results/curves.py (needs matplotlib)."""

import argparse
import json
import sys
from pathlib import Path

try:
    import matplotlib
except ImportError:
    sys.exit("error: curves need matplotlib: pip install matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot as plt

LOGS = Path(__file__).resolve().parent / "cifar10_subset"


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    paths = sorted(LOGS.glob("*.jsonl"))
    columns = 4
    rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.8 * rows), squeeze=False)
    for axis, path in zip(axes.flat, paths, strict=False):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        epochs = next(r["args"]["epochs"] for r in records if "args" in r)
        losses = [(r["epoch"], r["loss"]) for r in records if "loss" in r]
        steps = max(r["step"] / r["epoch"] for r in records if r.get("epoch"))
        accuracies = [(r["step"] / steps, r["knn"]) for r in records if "knn" in r]
        axis.plot(*zip(*losses, strict=True), color="tab:gray", linewidth=1)
        axis.set_title(f"{path.stem}: k-NN {accuracies[0][1]:.1f} to {accuracies[-1][1]:.1f} %", fontsize=10)
        axis.set_xlim(0, epochs)
        axis.set_xlabel("epoch", fontsize=8)
        axis.set_ylabel("loss", color="tab:gray", fontsize=8)
        right = axis.twinx()
        right.plot(*zip(*accuracies, strict=True), "o-", color="tab:blue", markersize=4)
        right.set_ylim(20, 55)
        right.set_ylabel("k-NN top-1, %", color="tab:blue", fontsize=8)
        for each in (axis, right):
            each.tick_params(labelsize=8)
    for axis in axes.flat[len(paths) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(LOGS / "curves.png", dpi=80)
    print(f"written: {LOGS / 'curves.png'}")


if __name__ == "__main__":
    main()
