"""Whole training of SimSiam from JPEG files: images per second of simsiam.py's parts and of lightly's.

    python benchmarks/train.py --data data/cifar10/train
    python benchmarks/train.py --data /imagenet/val --arch resnet50 --width 1 --image-size 224 --device cuda

Both train the same ResNet (3x3 stem for small images) with heads of the same sizes, the same batch, optimiser and
augmentation (crop 0.2 to 1, flip, jitter, grey; blur above 64 pixels), from the same files with as many workers: ours
with threads, lightly's transform in a DataLoader's processes. Ours runs as the script does, channels_last, in fp32 and
in bf16 autocast; lightly's as its tutorial has it, fp32. Before timing, both losses must agree on the same tensors.
Passes are interleaved, their order turns, and one unmeasured pass comes first.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.ema_lars import machine
from common.data import Loader, Subset, build
from common.optim import full, precision
from common.resnet import resnet
from simsiam import SimSiam, augmentation, simsiam_loss

try:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
    from lightly.transforms import SimSiamTransform
except ImportError:
    sys.exit("error: this compares with lightly: pip install lightly")
from PIL import Image


class Theirs(nn.Module):
    def __init__(self, backbone, dim, pred_dim):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimSiamProjectionHead(backbone.dim, backbone.dim, dim)
        self.prediction_head = SimSiamPredictionHead(dim, pred_dim, dim)

    def forward(self, x):
        z = self.projection_head(self.backbone(x))
        return z.detach(), self.prediction_head(z)


class TheirFiles(torch.utils.data.Dataset):
    def __init__(self, dataset, size):
        blur = 0.5 if size > 64 else 0.0
        self.paths = [dataset.path(i) for i in range(len(dataset))]
        self.transform = SimSiamTransform(input_size=size, min_scale=0.2, gaussian_blur=blur)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


def train_ours(dataset, args, name):
    device = args.device
    amp, scaler, dtype = precision(name, device)
    views = augmentation(args.image_size)
    loader = Loader(dataset, views, args.batch_size, device=device, workers=args.workers)
    backbone = resnet(args.arch, args.width, args.image_size, zero_init_residual=True)
    model = SimSiam(backbone, args.dim, args.pred_dim).to(device, dtype, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    epochs = iter(range(10**6))

    def run():
        for batch in loader.epoch(next(epochs)):
            with amp:
                p1, p2, z1, z2 = model(*batch.views())
            loss = simsiam_loss(full(p1), full(p2), full(z1), full(z2))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return loader.steps * args.batch_size

    return run


def train_theirs(dataset, args):
    device = args.device
    backbone = resnet(args.arch, args.width, args.image_size, zero_init_residual=True)
    model = Theirs(backbone, args.dim, args.pred_dim).to(device)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        TheirFiles(dataset, args.image_size),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )

    def run():
        for x1, x2 in loader:
            (z1, p1), (z2, p2) = (model(x.to(device, non_blocking=True)) for x in (x1, x2))
            loss = 0.5 * (criterion(z1, p2) + criterion(z2, p1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return len(loader) * args.batch_size

    return run


def check_losses():
    p1, p2, z1, z2 = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0)).unbind()
    criterion = NegativeCosineSimilarity()
    theirs, ours = 0.5 * (criterion(z1, p2) + criterion(z2, p1)), simsiam_loss(p1, p2, z1, z2)
    if abs(theirs - ours) > 1e-6:
        sys.exit(f"error: the losses differ ({theirs} and {ours}): the times would not compare")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of JPEG files")
    parser.add_argument("--images", type=int, default=1280, help="per pass")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--pred-dim", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    check_losses()
    dataset = build(args.data, "train")
    dataset = Subset(dataset, torch.linspace(0, len(dataset) - 1, min(args.images, len(dataset))).long().numpy())
    print(machine(args.device))
    sizes = f"width {args.width}, {args.image_size} px, batch {args.batch_size}"
    print(f"{args.arch}, {sizes}, {len(dataset)} images per pass, {args.workers} workers")
    jobs = {"ours, bf16": train_ours(dataset, args, "bf16"), "ours, fp32": train_ours(dataset, args, "fp32")}
    jobs["lightly, fp32"] = train_theirs(dataset, args)
    speeds, order = {name: [] for name in jobs}, list(jobs)
    for repeat in range(args.repeats + 1):
        for name in order:
            began = time.perf_counter()
            images = jobs[name]()
            torch.cuda.synchronize() if args.device.type == "cuda" else None
            if repeat:
                speeds[name].append(images / (time.perf_counter() - began))
        order = order[1:] + order[:1]
    base = statistics.median(speeds["lightly, fp32"])
    print(f"\n{'':16}{'images/s':>10}{'min-max':>14}  x lightly")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"{name:16}{median:>10.0f}{f'{min(values):.0f}-{max(values):.0f}':>14}  {median / base:.2f}")


if __name__ == "__main__":
    main()
