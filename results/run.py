"""Reproduces our rows of the results tables: every method on 10,000 images of CIFAR-10, on a CPU; some on all 50,000.

    python results/run.py --data data/cifar10                 # all methods, then all evaluations, one after the other
    python results/run.py --data data/cifar10 simsiam linear-simsiam
    python results/run.py --data data/cifar10 --whole simclr small-simclr       # 50,000 images, 20 epochs

--data is CIFAR-10 as a folder of images, train/<class>/*.jpg and test/<class>/*.jpg. The first 1,000 training and the
first 200 test images of each class (by file name) are used. Each run is written to runs/results/<method>; its log.jsonl
is copied to results/cifar10_subset/<method>.jsonl. Evaluations need the run of their method; their JSON is copied to
results/cifar10_subset/<name>.json. With --whole: all images, 20 epochs instead of 15 (and of 8), runs/whole/<method>,
results/cifar10_whole/; runs that were interrupted go on. `--table` prints the table of the logs that are there.
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
SHARED = "--arch resnet18 --width 0.25 --image-size 32 --batch-size 64 --epochs 15 --knn-every 5"
SHARED += " --precision bf16 --workers 2 --log-every 39 --seed 0 --no-resume"
WHOLE = " --epochs 20 --knn-every 10 --log-every 195 --resume"  # after a method's flags
CAE = "--arch vit_tiny --width 0.5 --depth 4 --patch-size 4 --regressor-depth 1 --decoder-depth 1 --crop-min 0.2"
CAE += " --drop-path 0 --lr 4e-3 --warmup-epochs 2"
RUNS = "runs/results"
RECIPES = {  # by name of the script, with more behind a hyphen where it has several
    "simsiam": "--lr 0.24 --weight-decay 5e-4 --dim 512 --pred-dim 128",
    "simclr": "--lr 1 --lr-rule sqrt --warmup-epochs 1 --temperature 0.2 --color-strength 0.5 --crop-min 0.08",
    "simclrv2": "--lr 0.25 --warmup-epochs 1 --temperature 0.2 --color-strength 0.5 --crop-min 0.08 --memory 0",
    "nnclr": "--dim 128 --hidden-dim 512 --pred-dim 512 --queue 4096 --lr 2 --warmup-epochs 1 --crop-min 0.2",
    "byol": "--optimizer sgd --lr 0.4 --weight-decay 5e-4 --tau 0.99 --hidden-dim 512 --warmup-epochs 1"
    " --crop-min 0.08",
    "moco": "--lr 0.12 --weight-decay 5e-4 --crop-min 0.2 --temperature 0.1 --queue 4096 --key-momentum 0.99",
    "moco_ft": "--lr 0.12 --weight-decay 5e-4 --crop-min 0.2 --temperature 0.1 --queue 4096 --key-momentum 0.99"
    " --ft-epoch 3",
    "directclr": "--lr 8 --warmup-epochs 1 --temperature 0.2 --crop-min 0.08 --d0 45",
    "pixpro": "--dim 128 --hidden-dim 512 --instance-weight 1 --lr 8 --warmup-epochs 1 --crop-min 0.2",
    "densecl": "--lr 0.12 --weight-decay 5e-4 --crop-min 0.2 --queue 4096 --key-momentum 0.99",
    "interclr": "--lr 0.12 --weight-decay 5e-4 --crop-min 0.2 --queue 4096 --clusters 50",
    "barlowtwins": "--dim 512 --lambd 0.005 --warmup-epochs 1 --lr 1 --lr-biases 0.024 --crop-min 0.08",
    "vicreg": "--dim 512 --warmup-epochs 1 --lr 1 --crop-min 0.08",
    "lejepa": "--hidden-dim 512 --dim 128 --slices 256 --warmup-epochs 1 --lr 4e-3 --global-scale 0.08 1",
    "swav": "--prototypes 256 --epsilon 0.03 --color-strength 0.5 --crop-min 0.2 --lr 3 --warmup-epochs 1",
    "deepclusterv2": "--prototypes 256 256 256 --color-strength 0.5 --crop-min 0.2 --lr 3 --warmup-epochs 1",
    "selav2": "--prototypes 256 256 256 --color-strength 0.5 --crop-min 0.2 --lr 3 --warmup-epochs 1",
    "obow": "--words 1024 --kappa 5 --inv-delta 10 --lr 0.1 --weight-decay 5e-4 --warmup-epochs 1",
    "deepcluster": "--lr 0.4 --crop-min 0.08",
    "scan": "--pretrained runs/results/simclr/backbone.pt --heads 3 --lr 5e-4 --epochs 6 --knn-every 2",
    "scan-selflabel": "--self-label --pretrained runs/results/scan/last.pt --batch-size 128 --epochs 4 --knn-every 2",
    "odc": "--clusters 50 --min-cluster 20 --centroid-every 10 --lr 0.1 --memory-momentum 0.9 --crop-min 0.08",
    "npid": "--full-softmax --temperature 0.1 --lr 0.06 --weight-decay 5e-4 --bank-momentum 0.9 --crop-min 0.3",
    "mocov3": "--lr 16 --warmup-epochs 1 --temperature 0.2 --hidden-dim 512",
    "rotation_pred": "--lr 0.4 --weight-decay 5e-4 --nesterov --warmup-epochs 1 --milestones 5 9 12 --decay 0.2",
    "relative_loc": "--image-size 28 --lr 0.4 --weight-decay 5e-4 --hidden-dim 512 --warmup-epochs 1",
    "dino": "--local-crops 4 --out-dim 1024 --hidden-dim 512 --bottleneck-dim 128 --warmup-epochs 1"
    " --teacher-momentum 0.99 --head-norm --lr 0.2 --weight-decay 5e-4",
    "dino-vit": "--arch vit_tiny --width 0.5 --depth 4 --patch-size 4 --drop-path 0 --local-crops 2 --out-dim 1024"
    " --hidden-dim 512 --bottleneck-dim 128 --warmup-epochs 1 --teacher-momentum 0.99 --head-norm --lr 4e-3 --epochs 8",
    "ibot": "--arch vit_tiny --width 0.5 --depth 4 --patch-size 4 --drop-path 0 --local-crops 2 --out-dim 1024"
    " --hidden-dim 512 --bottleneck-dim 128 --warmup-epochs 1 --teacher-momentum 0.99 --head-norm"
    " --no-train-last-norm --teacher-temp 0.04 --lr 4e-3 --epochs 8",
    "simdino": "--local-crops 4 --out-dim 128 --hidden-dim 512 --warmup-epochs 1 --teacher-momentum 0.99 --head-norm"
    " --group 0 --lr 3 --weight-decay 5e-4",
    "esvit": "--local-crops 2 --out-dim 1024 --hidden-dim 512 --bottleneck-dim 128 --warmup-epochs 1 --head-norm"
    " --no-train-last-norm --teacher-momentum 0.99 --teacher-temp 0.04 --lr 4e-3 --epochs 8",
    "esvit-swin": "--arch swin_tiny --patch-size 2 --window 4 --drop-path 0 --local-crops 2 --out-dim 1024"
    " --hidden-dim 512 --bottleneck-dim 128 --warmup-epochs 1 --head-norm --no-train-last-norm"
    " --teacher-momentum 0.99 --teacher-temp 0.04 --lr 4e-3 --epochs 8",
    "mae": "--arch vit_tiny --width 0.5 --depth 6 --patch-size 4 --decoder-dim 64 --decoder-depth 2 --decoder-heads 4"
    " --lr 4e-3 --warmup-epochs 2 --pictures-every 5",
    "ijepa": "--arch vit_tiny --width 0.5 --depth 6 --patch-size 4 --predictor-depth 3 --flip 0.5 --lr 4e-3"
    " --warmup-lr 4e-4 --min-lr 4e-6 --warmup-epochs 2 --weight-decay-end 0.1",
    "simmim": "--arch vit_tiny --width 0.5 --depth 6 --patch-size 4 --drop-path 0 --schedule cosine --lr 2.4e-2"
    " --warmup-lr 0 --warmup-epochs 2 --mask-patch-size 4 --pictures-every 5",
    "maskfeat": "--arch vit_tiny --width 0.5 --depth 6 --patch-size 4 --lr 4e-3 --warmup-epochs 2 --pictures-every 5",
    "cae-kmeans": CAE + " --target kmeans --pictures-every 5",
    "cae-hog": CAE + " --target hog",
}
LINEAR = "--protocol moco,simsiam,swav,multihead --epochs 10 --batch-size 256"
SMALL = "--protocol small"
FINETUNE = "--recipe plain --epochs 5 --warmup-epochs 1 --batch-size 64 --lr 4e-3 --layer-decay 0.75"
EVALUATIONS = {  # name: (script, pre-trained network, flags)
    **{f"knn-{method}": ("eval_knn", f"runs/results/{method}/backbone.pt", "") for method in RECIPES},
    "knn-random": ("eval_knn", "random", "--arch resnet18 --width 0.25 --image-size 32"),
    **{f"small-{method}": ("eval_linear", f"runs/results/{method}/backbone.pt", SMALL) for method in RECIPES},
    **{  # with --whole, of results/peer.py
        f"small-lightly-{method}": ("eval_linear", f"runs/results/lightly-{method}/last.pt", SMALL + " --image-size 32")
        for method in ("simclr", "moco", "swav")
    },
    "small-random": ("eval_linear", "random", "--arch resnet18 --width 0.25 --image-size 32 " + SMALL),
    "linear-simsiam": ("eval_linear", "runs/results/simsiam/backbone.pt", LINEAR),
    "linear-random": ("eval_linear", "random", "--arch resnet18 --width 0.25 --image-size 32 " + LINEAR),
    "cluster-simclr": ("eval_cluster", "runs/results/simclr/backbone.pt", ""),
    "cluster-scan": ("eval_cluster", "runs/results/scan/clusters.pt", ""),
    "cluster-selflabel": ("eval_cluster", "runs/results/scan-selflabel/clusters.pt", ""),
    "finetune-mae": ("eval_finetune", "runs/results/mae/backbone.pt", FINETUNE),
    "finetune-scratch": ("eval_finetune", "runs/results/mae-untrained/backbone.pt", FINETUNE),
    "finetune-simmim": ("eval_finetune", "runs/results/simmim/backbone.pt", FINETUNE),
    "finetune-simmim-scratch": ("eval_finetune", "runs/results/simmim-untrained/backbone.pt", FINETUNE),
    "finetune-maskfeat": ("eval_finetune", "runs/results/maskfeat/backbone.pt", FINETUNE),
    "finetune-maskfeat-scratch": ("eval_finetune", "runs/results/maskfeat-untrained/backbone.pt", FINETUNE),
    "finetune-cae-kmeans": ("eval_finetune", "runs/results/cae-kmeans/backbone.pt", FINETUNE),
    "finetune-cae-hog": ("eval_finetune", "runs/results/cae-hog/backbone.pt", FINETUNE),
    "finetune-cae-scratch": ("eval_finetune", "runs/results/cae-hog-untrained/backbone.pt", FINETUNE),
}


def places(whole):
    """Folder of the runs and folder of what is kept of them."""
    return ("runs/whole", ROOT / "results" / "cifar10_whole") if whole else (RUNS, ROOT / "results" / "cifar10_subset")


def lists(data, whole):
    """Writes the two list files of the images and returns the flags that use them."""
    folder = ROOT / places(whole)[0]
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--data", data]
    for flag, split, most in (("--train-list", "train", 1000), ("--val-list", "test", 200)):
        lines, most = [], None if whole else most
        classes = sorted(os.listdir(Path(data) / split))
        for label, name in enumerate(classes):
            files = sorted(os.listdir(Path(data) / split / name))[:most]
            lines += [f"{split}/{name}/{file} {label}\n" for file in files]
        (folder / f"{split}.txt").write_text("".join(lines))
        flags += [flag, str((folder / f"{split}.txt").relative_to(ROOT))]
    return flags


def run_script(method, data, out, flags, whole, precision):
    flags = SHARED.replace("bf16", precision) + " " + flags.replace(RUNS, places(whole)[0]) + WHOLE * whole
    words = [f"{method.partition('-')[0]}.py", *lists(data, whole), *flags.split(), "--out", out]
    print(" ".join(words), flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def run(method, data, whole, precision):
    runs, logs = places(whole)
    run_script(method, data, f"{runs}/{method}", RECIPES[method], whole, precision)
    logs.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / runs / method / "log.jsonl", logs / f"{method}.jsonl")


def evaluate(name, data, whole, precision):
    script, pretrained, flags = EVALUATIONS[name]
    runs, logs = places(whole)
    method, untrained, _ = Path(pretrained).parent.name.partition("-untrained")
    if untrained:  # the same network after one step of the warm-up, whose learning rate is next to 0
        few = f"{RECIPES[method]} --max-steps 1 --knn-every 0"
        run_script(method, data, f"{runs}/{method}-untrained", few, whole, precision)
    out = f"{runs}/{name}"
    words = [f"{script}.py", "--pretrained", pretrained.replace(RUNS, runs), *lists(data, whole), *flags.split()]
    words += ["--out", out]
    words += ["--precision", precision, "--workers", "2"]
    print(" ".join(words), flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    result = json.loads((ROOT / out / f"{script}.json").read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    result = {"command": " ".join(words), "commit": commit.stdout.strip(), **result}
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def row(path):
    """(method, k-NN at the start, k-NN at the end, seconds per epoch, commit) of a log."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    knn = [(r["step"], r["knn"]) for r in records if "knn" in r]
    steps = [r for r in records if "loss" in r]
    images = records[0]["args"]["batch_size"] * steps[-1]["step"] / steps[-1]["epoch"]
    seconds = images / statistics.median(r["images_per_s"] for r in steps)
    return path.stem, knn[0][1], knn[-1][1], seconds, records[0]["commit"]


def table(whole):
    logs = places(whole)[1]
    print("| method | k-NN at random | at the end | seconds per epoch | commit |\n|---|---|---|---|---|")
    for path in sorted(path for path in logs.glob("*.jsonl") if not path.stem.startswith("scan")):  # starts trained
        method, start, end, seconds, commit = row(path)
        print(f"| [{method}]({logs.name}/{path.name}) | {start:.1f} | {end:.1f} | {seconds:.0f} | {commit} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [*RECIPES, *(name for name in EVALUATIONS if "lightly" not in name)]
    parser.add_argument("methods", nargs="*", default=usual, help="default: all but those of lightly")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--whole", action="store_true", help="all 50,000 images, 20 epochs")
    text = "fp32 where the processor has no bf16 (other roundings, but several times faster there)"
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help=text)
    parser.add_argument("--table", action="store_true", help="only print the table of the logs that are there")
    args = parser.parse_args()
    known = [*RECIPES, *EVALUATIONS]
    if unknown := set(args.methods) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(known)}")
    if not args.table:
        if not all((Path(args.data) / split).is_dir() for split in ("train", "test")):
            parser.error(f"--data {args.data} has no train/ and test/ folders: CIFAR-10 as image files is needed")
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", flush=True)
        data = args.data if Path.cwd() == ROOT else str(Path(args.data).resolve())  # scripts run in ROOT
        for method in args.methods:
            (run if method in RECIPES else evaluate)(method, data, args.whole, args.precision)
    table(args.whole)
