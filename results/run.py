"""Reproduces our rows of the results table: every method on 10,000 images of CIFAR-10, on a CPU.

    python results/run.py --data data/cifar10                 # all methods, one after the other
    python results/run.py --data data/cifar10 simsiam simclr

--data is CIFAR-10 as a folder of images, train/<class>/*.jpg and test/<class>/*.jpg. The first 1,000 training and the
first 200 test images of each class (by file name) are used. Each run lands in runs/results/<method>; its log.jsonl is
copied to results/cifar10_subset/<method>.jsonl. `--table` prints the table from the logs that are there.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "results" / "cifar10_subset"
SHARED = "--arch resnet18 --width 0.25 --image-size 32 --batch-size 64 --epochs 15 --knn-every 5"
SHARED += " --precision bf16 --workers 2 --log-every 39 --seed 0 --no-resume"
RECIPES = {
    "simsiam": "--lr 0.24 --weight-decay 5e-4 --dim 512 --pred-dim 128",
    "simclr": "--lr 1 --lr-rule sqrt --warmup-epochs 1 --temperature 0.2 --color-strength 0.5",
    "byol": "--optimizer sgd --lr 0.4 --weight-decay 5e-4 --tau 0.99 --hidden-dim 512 --warmup-epochs 1",
    "moco": "--lr 0.12 --weight-decay 5e-4 --crop-min 0.2 --temperature 0.1 --queue 4096 --key-momentum 0.99",
    "barlowtwins": "--dim 512 --lambd 0.005 --warmup-epochs 1 --lr 1 --lr-biases 0.024",
    "swav": "--prototypes 256 --epsilon 0.03 --color-strength 0.5 --crop-min 0.2 --lr 3 --warmup-epochs 1",
    "deepcluster": "--lr 0.4",
    "odc": "--lr 0.24",
    "npid": "--full-softmax --temperature 0.1 --lr 0.12 --weight-decay 5e-4",
}


def lists(data):
    """Writes the two list files of the subset and returns the flags that use them."""
    folder = ROOT / "runs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--data", data]
    for flag, split, most in (("--train-list", "train", 1000), ("--val-list", "test", 200)):
        lines = []
        classes = sorted(os.listdir(Path(data) / split))
        for label, name in enumerate(classes):
            files = sorted(os.listdir(Path(data) / split / name))[:most]
            lines += [f"{split}/{name}/{file} {label}\n" for file in files]
        (folder / f"{split}.txt").write_text("".join(lines))
        flags += [flag, str((folder / f"{split}.txt").relative_to(ROOT))]
    return flags


def run(method, data):
    out = f"runs/results/{method}"
    words = [f"{method}.py", *lists(data), *SHARED.split(), *RECIPES[method].split(), "--out", out]
    print(" ".join(words), flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / out / "log.jsonl", LOGS / f"{method}.jsonl")


def row(path):
    """(method, k-NN at the start, k-NN at the end, seconds per epoch, commit) of a log."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    knn = [(r["step"], r["knn"]) for r in records if "knn" in r]
    steps = [r for r in records if "loss" in r]
    seconds = 156 * 64 / statistics.median(r["images_per_s"] for r in steps)
    return path.stem, knn[0][1], knn[-1][1], seconds, records[0]["commit"]


def table():
    print("| method | k-NN at random | after 15 epochs | seconds per epoch | commit |\n|---|---|---|---|---|")
    for path in sorted(LOGS.glob("*.jsonl")):
        method, start, end, seconds, commit = row(path)
        print(f"| [{method}](cifar10_subset/{path.name}) | {start:.1f} | {end:.1f} | {seconds:.0f} | {commit} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(RECIPES), help="default: all")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--table", action="store_true", help="only print the table of the logs that are there")
    args = parser.parse_args()
    unknown = set(args.methods) - set(RECIPES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(RECIPES)}")
    if not args.table:
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", flush=True)
        for method in args.methods:
            run(method, args.data)
    table()
