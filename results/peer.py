"""lightly on all of CIFAR-10 on a CPU: network, images, batch and epochs of `results/run.py --whole`, the rest its own.

    pip install lightly
    python results/peer.py --data data/cifar10 simclr moco swav

Transforms, heads and losses are lightly's (two views, no blur; MoCo's queue and SwAV's prototypes as many as in our
run), with the optimisers of its CIFAR-10 benchmark: SGD, rate 0.06 x batch / 128, momentum 0.9, weight decay 5e-4, for
SwAV Adam, 1e-3 x batch / 128, weight decay 1e-6; a cosine per epoch. The network, bf16 autocast, channels_last and k-NN
are ours, so that the rest can be compared. Writes to results/cifar10_whole/lightly-<method>.json: k-NN (k = 20) of all
images before and after, seconds per epoch without it. A run saves to runs/whole/ after each epoch, and goes on from
there with other random numbers than without the break.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import machine
from common.augment import EvalView
from common.datasets import open_labelled
from common.features import extract
from common.knn import knn
from common.resnet import resnet
from results.run import ROOT, lists, places

try:
    from lightly import loss, transforms
    from lightly.models import modules
    from lightly.models.utils import deactivate_requires_grad, update_momentum
except ImportError:
    sys.exit("error: this runs lightly: pip install lightly")

EPOCHS, BATCH, DIM = 20, 64, 128
SMALL, HALF = {"input_size": 32, "gaussian_blur": 0.0}, {"cj_strength": 0.5}
TWO = {
    "crop_sizes": (32,),
    "crop_counts": (2,),
    "crop_min_scales": (0.14,),
    "crop_max_scales": (1.0,),
    "gaussian_blur": 0.0,
}
METHODS = {  # transform of an image, head, loss
    "simclr": (transforms.SimCLRTransform(**SMALL, **HALF), modules.SimCLRProjectionHead, lambda: loss.NTXentLoss(0.5)),
    "moco": (
        transforms.MoCoV2Transform(**SMALL),
        modules.MoCoProjectionHead,
        lambda: loss.NTXentLoss(0.1, (4096, 128)),
    ),
    "swav": (transforms.SwaVTransform(**TWO, **HALF), modules.SwaVProjectionHead, loss.SwaVLoss),
}
HIDDEN = {"swav": 512}


class Files(torch.utils.data.Dataset):
    def __init__(self, dataset, transform):
        self.paths, self.transform = [dataset.path(i) for i in range(len(dataset))], transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


class Model(nn.Module):
    """Outputs of both views (B, 3, 32, 32), which lightly's loss takes."""

    def __init__(self, method):
        super().__init__()
        self.backbone = resnet("resnet18", 0.25, 32)
        self.online = nn.Sequential(self.backbone, METHODS[method][1](DIM, HIDDEN.get(method, DIM), 128))
        if method == "moco":
            self.slow = copy.deepcopy(self.online)
            deactivate_requires_grad(self.slow)
        if method == "swav":
            self.prototypes = modules.SwaVPrototypes(128, 256)

    def forward(self, x1, x2):
        if hasattr(self, "slow"):
            update_momentum(self.online, self.slow, 0.99)
            with torch.no_grad():
                keys = self.slow(x2)
            return self.online(x1), keys
        if hasattr(self, "prototypes"):
            self.prototypes.normalize()
            return [self.prototypes(F.normalize(self.online(x), dim=1)) for x in (x1, x2)]
        return self.online(x1), self.online(x2)


def train(method, data, test, out):
    """(k-NN before, k-NN after, seconds of each epoch)"""
    torch.manual_seed(0)
    transform, _, criterion = METHODS[method]
    model, criterion = Model(method).to(memory_format=torch.channels_last), criterion()
    amp = torch.autocast("cpu", torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.06 * BATCH / 128, momentum=0.9, weight_decay=5e-4)
    if method == "swav":
        optimizer = torch.optim.Adam(model.parameters(), 1e-3 * BATCH / 128, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    files = Files(data, transform)
    loader = torch.utils.data.DataLoader(
        files, BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )

    def accuracy():
        model.backbone.eval()
        found = [x for d in (data, test) for x in extract(model.backbone, d, EvalView(32), "cpu", 2, amp=amp)]
        model.backbone.train()
        return round(knn(*found)[20][0], 2)

    parts = {"model": model, "criterion": criterion, "optimizer": optimizer, "schedule": schedule}
    if out.exists():
        state = torch.load(out)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    else:
        state = {"before": accuracy(), "seconds": []}
    for epoch in range(len(state["seconds"]), EPOCHS):
        began = time.perf_counter()
        progress = tqdm(loader, f"lightly {method}, epoch {epoch + 1}/{EPOCHS}", mininterval=10)
        for views in progress:
            with amp:
                outputs = model(*(x.to(memory_format=torch.channels_last) for x in views))
            outputs = [x.float() for x in outputs]
            value = criterion(outputs, []) if method == "swav" else criterion(*outputs)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=value.item(), refresh=False)
        if not math.isfinite(value.item()):
            sys.exit(f"error: the loss of {method} is {value.item()}")
        schedule.step()
        state["seconds"].append(time.perf_counter() - began)
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state | {name: part.state_dict() for name, part in parts.items()}, out)
    return state["before"], accuracy(), state["seconds"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=METHODS)
    parser.add_argument("--data", default="data/cifar10")
    args = parser.parse_args()
    runs, logs = places(whole=True)
    words = dict(zip(*[iter(lists(args.data, whole=True))] * 2, strict=True))
    data, test = open_labelled(args.data, ROOT / words["--train-list"], ROOT / words["--val-list"], 3)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    for method in args.methods:
        before, after, seconds = train(method, data, test, ROOT / runs / f"lightly-{method}" / "last.pt")
        row = {"command": " ".join(["results/peer.py", "--data", args.data, method]), "commit": commit.stdout.strip()}
        row |= {"machine": machine(), "knn_random": before, "knn": after, "epochs": EPOCHS, "batch": BATCH}
        row |= {"seconds": [round(s, 1) for s in seconds]}
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"lightly-{method}.json").write_text(json.dumps(row, indent=1) + "\n")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
