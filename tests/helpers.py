"""What the tests of all scripts share: the scripts, tiny flags for each, and ways to run them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Pre-training scripts and what they need beside TINY to run in seconds.
SCRIPTS = {
    "simsiam": ["--dim", "32", "--pred-dim", "8"],
    "simclr": ["--dim", "16"],
    "barlowtwins": ["--hidden-dim", "32", "--dim", "16"],
    "byol": ["--dim", "16", "--hidden-dim", "32"],
    "moco": ["--dim", "16", "--queue", "40"],
    "mocov3": ["--dim", "16", "--hidden-dim", "32"],
    "deepcluster": ["--clusters", "6", "--pca-dim", "8", "--reweight"],
    "npid": ["--dim", "16", "--temperature", "0.25"],
    "swav": "--dim 16 --crops 2 1 --sizes 16 12 --prototypes 8 --freeze-steps 2 --queue 24 --queue-epoch 0".split(),
    "odc": "--dim 16 --hidden-dim 32 --clusters 6 --min-cluster 8 --centroid-every 2".split(),
    "mae": "--arch vit_tiny --width 0.25 --depth 2 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2".split(),
}
TINY = "--data fake:64 --arch resnet18 --width 0.125 --image-size 16 --batch-size 16 --epochs 4 --warmup-epochs 1"
TINY += " --workers 2 --log-every 1 --knn-every 0 --seed 3"


def flags(script, out, *more):
    return [*TINY.split(), *SCRIPTS[script], "--out", str(out), *map(str, more)]


def train(script, out, *more):
    """Runs a script's main in this process and returns the state it saved."""
    module = importlib.import_module(script)
    module.main(module.parse_args(flags(script, out, *more)))
    return state(out)


def state(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def records(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in lines if "loss" in r}


def tensors(value, name=""):
    """All tensors and numbers of a nested state, by path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in tensors(item, f"{name}/{i}").items()}
    if isinstance(value, (torch.Tensor, int, float)):
        return {name: torch.as_tensor(value)}
    return {}


def command(*words, processes=1, check=None, env=None, timeout=300):
    """Runs a script as a user does. Returns the finished process with stdout and stderr as text."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
        start[-1:] = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [*start, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=env, timeout=timeout, check=False
    )
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
