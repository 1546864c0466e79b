"""Runs the comparisons one after the other; their output goes to results/benchmarks/ and benchmarks/README.md.

    python benchmarks/run.py                                # all but those that need a data set
    python benchmarks/run.py train --data data/cifar10/train          # a folder of JPEG files
    python benchmarks/run.py detection --data data/bccd               # a set that eval_detection.py reads
    python benchmarks/run.py segmentation --data data/camvid          # a set that eval_segmentation.py reads
    python benchmarks/run.py ema_lars knn

Nothing else should run on the machine meanwhile. kill.py and soak.py are tests and not run here.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "results" / "benchmarks"
JOBS = {  # name of the log: (flags, after the script where it has another name; the aim on two cores)
    "loader": ("--images 128 --repeats 5", "CPU stage of two views at least 6x torchvision and 60 % of decoding"),
    "multicrop": ("loader.py --images 64 --repeats 5 --views multicrop", "CPU stage of 2+6 crops: 4x torchvision"),
    "train": ("", "whole SimSiam training at least 1.3x lightly"),
    "ema_lars": ("", "EMA at least 3x mul_/add_, LARS at least 1.2x a loop"),
    "infonce": ("", "at least 1.4x concatenating and cloning"),
    "kmeans": ("", "at least 0.95x faiss-cpu"),
    "knn": ("", "at least 1.2x a one-hot vote, within 10 % of the matrix product"),
    "svm": ("", "at least 1.6x scikit-learn one after the other"),
    "linear": ("--image-size 128", "three protocols at most 1.3x one"),
    "mae": ("--arch vit_small", "fewer seconds per step than encoding all tokens; one view at least 3x torchvision"),
    "sinkhorn": ("", "compared with the usual forms"),
    "launch": ("", "the loop launches at least 60 % as fast beside the loading process as alone"),
    "relative_loc": ("", "nine patches at least 1.6x eight pairs"),
    "densecl": ("", "a step at most 1.5x moco.py's"),
    "hog": ("--cpu-time", "HOG at least 20x scikit-image; masks at most 50 us per image"),
    "interclr": (
        "",
        "sampling at most 20 % of a step with N = 50,000; compared with the usual form, also at ImageNet's N",
    ),
    "clusters": ("", "k-means and labels at least 0.9x faiss-cpu, at most 100 MB above the bank"),
    "step": (
        "--cpu-time --repeats 3 --steps 1",
        "every script's step at least 85 % as fast as the network calls that it makes, or a reason why not",
    ),
    "step_dino": (
        "step.py --only dino --vit-width 1 --depth 12 --patch-size 16 --image-size 224 --batch-size 8 --cpu-time"
        " --repeats 3 --steps 1",
        "DINO's step, 2 + 8 crops and a ViT-Ti, at least 95 % of its network calls",
    ),
    "startup": ("", "a million files listed within seconds from the second start on"),
    "memory": ("", "none: GB per GPU of every script's step, traced, not measured"),
    "memory_accum": ("memory.py simsiam --default --words '--accum 4'", "activations of one micro-batch"),
    "memory_check": ("memory.py --check", "a trace within 10 % of what the allocator gave"),
    "accum": ("", "gradients are sent once per step, whatever --accum is"),
    "detection": (
        "--cpu-time --repeats 3 -- --arch resnet18 --width 0.25 --batch-size 4 --sizes 320 --test-size 320"
        " --anchors 32 64 96 128 192 --proposals 500 --rois 64",
        "the input at most 20 % of training",
    ),
    "segmentation": (
        "--cpu-time --repeats 3",
        "the input at most 20 % of training, memory does not grow with the images",
    ),
}
NEED_DATA = ("train", "detection", "segmentation")


MISSED = """Aims that these runs missed. EMA 2.0x instead of 3x: both forms are bound by memory, and 7 passes over it
against 3 allow 7/3. LARS 1.1x instead of 1.2x: 15 passes against 13. k-NN 1.11x the time of the matrix product instead
of 1.10x (1.25x in another run). One view 2.3x instead of 3x torchvision: decoding alone is 3.0x. k-means 0.90x of
faiss-cpu instead of 0.95x (0.99x in another run). SeLa-v2's labels 0.87x faiss-cpu instead of 0.9x: a softmax in every
pass. Steps of LeJEPA 81 % and InterCLR 82 % of their network calls instead of 85 %: the test of normality, the choice
of negatives. DINO's with 27 million parameters for 8 images 90 % instead of 95 %, beside two other programs (97 %
alone, in an earlier run): probably AdamW, average and 65,536 outputs, which are bound by memory; not profiled.
"""
R50 = "--arch resnet50 --width 1 --image-size 224 --batch-size 256"
GPU = (
    (
        "SimSiam, ResNet-50, from JPEG files; lightly in the same run",
        f"benchmarks/train.py --data /imagenet/train {R50} --dim 2048 --pred-dim 512 --images 25600 --workers 16"
        " --device cuda",
        "at least 2,000 images/s",
    ),
    (
        "step of every script, ResNet-50, ViT-B or Swin-T",
        f"benchmarks/step.py --device cuda {R50} --vit vit_base --vit-width 1 --depth 12 --patch-size 16",
        "training from files reaches 60 % of SimSiam's",
    ),
    ("an epoch of SimCLR on CIFAR-10, ResNet-18", "results/cifar10.py --data cifar10 simclr", "its images/s"),
    ("augmentation on the device", "benchmarks/where.py augment --device cuda", "ms per view"),
)


def write_readme():
    parts = ["# Benchmarks\n\nThe last recorded output of each script (`python benchmarks/run.py`).\n"]
    parts.append(MISSED)
    for name, (_, aim) in JOBS.items():
        log = LOGS / f"{name}.txt"
        text = log.read_text() if log.exists() else "not run\n"
        parts.append(f"## {name}\n\nAim: {aim}.\n\n```\n{text}```\n")
    parts.append("Where the time goes, and which parts were made faster: [profile.md](profile.md).\n")
    rows = "".join(f"| {job} | `python {command}` | {aim} | not run |\n" for job, command, aim in GPU)
    parts.append(f"## On a GPU\n\n| job | command | aim, one H200 with 16 cores | |\n|---|---|---|---|\n{rows}")
    (ROOT / "benchmarks" / "README.md").write_text("\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(JOBS), help=", ".join(JOBS))
    parser.add_argument("--data", help="for the one of train, detection and segmentation that is named")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each")
    args = parser.parse_args()
    if unknown := set(args.names) - set(JOBS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(JOBS)}")
    if args.data and len({*args.names} & {*NEED_DATA}) != 1:
        parser.error(f"--data: name one of {', '.join(NEED_DATA)}, whose data these are")
    failed = []
    for name in args.names:
        flags, script = shlex.split(JOBS[name][0]), f"{name}.py"
        if flags and flags[0].endswith(".py"):
            script = flags.pop(0)
        data = ["--data", args.data] * (name in NEED_DATA and bool(args.data))
        if name in NEED_DATA and not data:
            print(f"{name}: left out, as it needs --data")
            continue
        words = [f"benchmarks/{script}", *data, *flags]
        print(f"$ python {shlex.join(words)}", flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=args.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"stopped after {args.timeout:g} s")
            failed.append(name)
            continue
        print(done.stdout, done.stderr if done.returncode else "", flush=True)
        if done.returncode:
            failed.append(name)
        else:
            LOGS.mkdir(parents=True, exist_ok=True)
            (LOGS / f"{name}.txt").write_text(f"$ python {shlex.join(words)}\n{done.stdout}")
    write_readme()
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed")


if __name__ == "__main__":
    main()
