"""Every method on all of CIFAR-10 with a whole ResNet-18, for a GPU: pre-training, k-NN (k = 200) and linear accuracy.

    python results/cifar10.py --data cifar10:/data               # all methods, one after the other
    python results/cifar10.py --data cifar10:/data simsiam moco
    python results/cifar10.py --table                            # the table of the logs that are there

200 epochs at 32 pixels, k-NN every 10; MAE a ViT-Ti. Recipes are those published for CIFAR-10 where there are any (the
comments name them), else the method's own at this size. Each run is written to runs/cifar10/<method>; log.jsonl and the
evaluations are copied to results/cifar10/<method>.* . Other flags, behind the names, go to the pre-training scripts.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "results" / "cifar10"
SHARED = "--arch resnet18 --image-size 32 --batch-size 512 --epochs 200 --knn-every 10 --seed 0"
RECIPES = {
    # Chen & He 2021, appendix D
    "simsiam": "--lr 0.03 --weight-decay 5e-4",
    # Chen et al. 2020, appendix B.9
    "simclr": "--lr 1 --temperature 0.5 --color-strength 0.5",
    # solo-learn's scripts for CIFAR-10
    "byol": "--lr 1 --weight-decay 1e-5 --tau 0.99 --crop-min 0.08",
    "barlowtwins": "--lr 0.3 --weight-decay 1e-4 --dim 2048 --lambd 0.005 --scale-loss 0.1 --crop-min 0.08",
    "mocov3": "--lr 0.3 --weight-decay 1e-6 --temperature 0.2 --key-momentum 0.99",
    "swav": "--lr 0.6 --prototypes 3000 --queue 3840 --queue-epoch 10 --batch-size 256",
    # the notebook in MoCo's repository, with the head of v2
    "moco": "--weight-decay 5e-4 --temperature 0.1 --queue 4096 --key-momentum 0.99 --crop-min 0.08 --symmetric",
    # the CIFAR-10 part of the authors' repository
    "npid": "--batch-size 128 --lr 0.06 --weight-decay 5e-4 --temperature 0.1 --full-softmax",
    # Gidaris et al. 2018, the authors' code, there a network in network
    "rotation_pred": "--batch-size 128 --lr 0.2 --warmup-epochs 0 --milestones 60 120 160 --decay 0.2"
    " --weight-decay 5e-4 --nesterov",
    # none published
    "deepcluster": "--batch-size 256 --clusters 200",
    "odc": "--clusters 200 --lr 0.06",
    "relative_loc": "--image-size 28 --weight-decay 5e-4 --hidden-dim 512",
    "mae": "--arch vit_tiny --patch-size 4 --decoder-dim 192 --decoder-depth 4 --decoder-heads 3 --lr 6e-4",
}
# What others publish for a ResNet-18. lightly: k-NN (k = 200), best of all epochs, at 200 epochs with batch 128 and 512
# and at 800 epochs with batch 512. solo-learn: linear, trained along with 1000 epochs of batch 256.
LIGHTLY = {
    "simsiam": (81.9, 76.4, 90.4),
    "simclr": (84.7, 84.8, 87.9),
    "byol": (86.9, 86.8, 91.0),
    "moco": (83.8, 84.7, 89.9),
    "barlowtwins": (84.2, 81.9, 85.9),
    "swav": (81.2, 84.2, 88.4),
}
SOLO = {"simsiam": 90.51, "simclr": 90.74, "byol": 92.58, "moco": 92.94, "barlowtwins": 92.10, "swav": 89.17}
SOLO["mocov3"] = 93.10
PROTOCOL = "swav lr 0.3"  # 100 epochs


def call(*words):
    print(" ".join(words), flush=True)
    if code := subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode:
        sys.exit(code)  # the script has printed the reason


def run(method, data, more):
    out = f"runs/cifar10/{method}"
    call(f"{method}.py", "--data", data, *SHARED.split(), *RECIPES[method].split(), "--out", out, *more)
    LOGS.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / out / "log.jsonl", LOGS / f"{method}.jsonl")
    for name, flags in (("knn", []), ("linear", ["--protocol", "swav"])):
        call(f"eval_{name}.py", "--pretrained", f"{out}/backbone.pt", "--data", data, *flags)
        shutil.copy(ROOT / out / f"eval_{name}.json", LOGS / f"{method}-{name}.json")


def row(method):
    """k-NN and linear top-1, seconds per epoch and commit of a method's logs; "not run" without them."""
    log = LOGS / f"{method}.jsonl"
    if not log.exists():
        return ["not run"] * 2 + [""] * 2
    records = [json.loads(line) for line in log.read_text().splitlines()]
    knn = json.loads((LOGS / f"{method}-knn.json").read_text())["knn"]["200"]["top1"]
    linear = json.loads((LOGS / f"{method}-linear.json").read_text())["heads"][PROTOCOL]["last"]["top1"]
    speed = [r["images_per_s"] for r in records if "images_per_s" in r]
    return [f"{knn:.1f}", f"{linear:.1f}", f"{50000 / sorted(speed)[len(speed) // 2]:.0f}", records[0]["commit"]]


def table():
    print("| method | ours: k-NN | ours: linear | seconds per epoch | commit | lightly: k-NN | solo-learn: linear |")
    print("|---|---|---|---|---|---|---|")
    for method in RECIPES:
        lightly = " / ".join(map(str, LIGHTLY.get(method, ["none known"])))
        print(f"| {method} | {' | '.join(row(method))} | {lightly} | {SOLO.get(method, 'none known')} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=[*RECIPES], help="default: all")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--table", action="store_true", help="only print the table of the logs that are there")
    args, more = parser.parse_known_args()
    if unknown := set(args.methods) - set(RECIPES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(RECIPES)}")
    for method in [] if args.table else args.methods:
        run(method, args.data, more)
    table()
