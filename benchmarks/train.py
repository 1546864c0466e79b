"""Whole training of SimSiam from JPEG files: images per second of simsiam.py's parts and of lightly's.

    python benchmarks/train.py --data data/cifar10/train
    python benchmarks/train.py --data /imagenet/val --arch resnet50 --width 1 --image-size 224 --device cuda

Both train the same ResNet (3x3 stem for small images) with heads of the same sizes, the same batch, optimiser and
augmentation (crop 0.2 to 1, flip, jitter, grey; blur above 64 pixels), from the same files with as many workers: ours
with threads, lightly's transform in a DataLoader's processes. Ours runs as the script does, channels_last, in fp32 and
in bf16 autocast; lightly's as its tutorial has it, fp32. Before timing, both losses must agree on the same tensors.
One unmeasured pass comes first.
"""

import itertools
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import machine, measure, parser, speed, table
from common.datasets import evenly_spaced, open_dataset
from common.loader import Loader
from common.optim import precision, upcast
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
    epochs = itertools.count()

    def run():
        for batch in loader.epoch(next(epochs)):
            with amp:
                p1, p2, z1, z2 = model(*batch.views())
            loss = simsiam_loss(*map(upcast, (p1, p2, z1, z2)))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

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

    return run


def check_losses():
    p1, p2, z1, z2 = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0)).unbind()
    criterion = NegativeCosineSimilarity()
    theirs, ours = 0.5 * (criterion(z1, p2) + criterion(z2, p1)), simsiam_loss(p1, p2, z1, z2)
    if abs(theirs - ours) > 1e-6:
        sys.exit(f"error: the losses differ ({theirs} and {ours}): the times would not compare")


def main():
    flags = parser(__doc__, repeats=5, cpu_time=False)
    flags.add_argument("--data", required=True, help="folder of JPEG files")
    flags.add_argument("--images", type=int, default=1280, help="per pass")
    flags.add_argument("--arch", default="resnet18")
    flags.add_argument("--width", type=float, default=0.25)
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--dim", type=int, default=512)
    flags.add_argument("--pred-dim", type=int, default=128)
    flags.add_argument("--workers", type=int, default=2)
    args = flags.parse_args()
    check_losses()
    dataset = evenly_spaced(open_dataset(args.data, "train"), args.images)
    print(machine(args.device))
    sizes = f"width {args.width}, {args.image_size} px, batch {args.batch_size}"
    print(f"{args.arch}, {sizes}, {len(dataset)} images per pass, {args.workers} workers")
    jobs = {"ours, bf16": train_ours(dataset, args, "bf16"), "ours, fp32": train_ours(dataset, args, "fp32")}
    jobs["lightly, fp32"] = train_theirs(dataset, args)
    times = measure(jobs, args.repeats, device=args.device, warm_up=True)
    images = len(dataset) // args.batch_size * args.batch_size
    table(times, "images/s", lambda seconds: images / seconds, 0, speed(times, "lightly, fp32"))


if __name__ == "__main__":
    main()
