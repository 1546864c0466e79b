"""Unsupervised Visual Representation Learning by Context Prediction (Doersch et al., ICCV 2015, arXiv 1505.05192).

Nine patches are cut from an image, one at a random place in each cell of a 3 x 3 grid. From the patch in the middle and
one of the others the network has to tell which of the eight positions y that one has:
L = -ln softmax(h(f(patch y), f(middle)))_y,  with f the backbone, which sees one patch at a time, and h two layers.

    torchrun --nproc_per_node=8 relative_loc.py --data /imagenet
    python relative_loc.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --hidden-dim 256

Published, ResNet-50 on ImageNet, 70 epochs, linear top-1 (README of MMSelfSup 0.11): 51.20 on the features of layer3,
39.65 on the last ones. Ours: not run. Last layers specialise in positions: the published best layer is stage 4 of 5,
feat4. eval_linear.py --protocol multihead and eval_svm.py report all five; k-NN judges the last one, and is poor
(MMSelfSup: 15.0).

Geometry: cells are a third of --image-size, patches a quarter of it. They lie anywhere in their cells but for --gap:
neighbours are gap to gap + 2 jitter apart, jitter = cell - patch - gap. 255 px: cells 85, patches 64, jitter 21
(MMSelfSup); 96 px: 32, 24, 8; 28 px: 9, 7, 2. The paper's: --image-size 432 --patch-size 96 --gap 34, cells of 144,
half a patch apart on average. Evaluations show whole images: give them --image-size 224, or 32.

Jitter and gaps keep lines that cross a border from giving the position away, turning whole images grey does so for
chromatic aberration, and nothing is mirrored, which would exchange left and right. Where jitter is small, beware of
other traces of the place: resizing leaves sharp and soft columns in turn, JPEG files have blocks of 8 pixels. On
CIFAR-10, --image-size 28 needs no resizing (the default is 255/292 of a small named set's size); with 32, or with whole
images stored as JPEG, the network finds positions twice as often, but hardly needs the patch in the middle.

Batch norm: all nine patches of an image pass the backbone together, once, and the features of the middle one are used
eight times: 9 patches instead of the 16 of eight pairs. In MMSelfSup middle patches, each eight times, pass apart from
the others, and each kind is normalised by its own statistics; here both have the same, in which a middle one counts
once. Nothing else differs. Statistics are those of the global batch (MMSelfSup: of each GPU), so that the number of
processes does not matter.

Small images (our choice; 32 px): --image-size 28 --arch resnet18 --hidden-dim 512 --weight-decay 5e-4.

Deviations from the paper: a ResNet instead of AlexNet, pooled features joined before h, and grey images with
probability 0.66 instead of two colour channels replaced by noise (all as in MMSelfSup, whose recipe the defaults are);
no patch is shrunk at random; squares are cut out before they are resized; without --milestones the rate falls at 3/7
and 5/7 of --epochs whatever their number; images of at most 64 pixels get a 3x3 stem.
To hack: copy this file. What is its own: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, positive, probability, share, width
from common.augment import LEFT, TOP, View
from common.distributed import is_main, rank, world_size
from common.features import output_std
from common.networks import network
from common.pictures import save_table, shown
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("relative location")
    group.add_argument(
        "--resize", type=positive(int), help="pixels of the shorter side before the crop (default: 292 for 255)"
    )
    group.add_argument("--gray", type=probability, default=0.66, help="probability of a grey image")
    group.add_argument("--patch-size", type=positive(int), help="pixels (default: a quarter of --image-size)")
    group.add_argument("--gap", type=at_least(0), default=0, help="pixels between neighbouring patches, at least")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--hidden-dim", type=positive(int), default=4096, help="hidden layer of h")
    group.add_argument("--dropout", type=below_one, default=0.5, help="probability of dropping a unit of it")
    group.add_argument("--epochs", type=positive(int), default=70)
    group.add_argument("--warmup-epochs", type=at_least(0), default=5, help="from a tenth of the rate on")
    group.add_argument(
        "--milestones", type=positive(int), nargs="+", help="epochs before which the rate falls (default: 3/7, 5/7)"
    )
    group.add_argument("--decay", type=share, default=0.1, help="factor of the rate at each of them")
    group.add_argument(
        "--batch-size", type=positive(int), default=512, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=0.1, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4)
    group.add_argument("--head-weight-decay", type=at_least(0, float), default=5e-4, help="of h")
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    shorter = default_size(args.data)
    args.image_size = size = args.image_size or round((292 if shorter == 224 else max(32, shorter)) * 255 / 292)
    args.resize = args.resize or round(size * 292 / 255)
    args.patch_size = args.patch_size or round(size / 4)
    least = 3 * (args.patch_size + args.gap + 1)
    if least > size:
        if "patch_size" not in args.given and 3 * (round(least / 4) + args.gap + 1) > least:
            least = 12 * (args.gap + 1)  # the patch grows with the image
        cells = f"cells of {size // 3} pixels, a third of --image-size {size}"
        remedy = f"--image-size {least} does, as do smaller patches or gaps"
        parser.error(f"--patch-size {args.patch_size} and --gap {args.gap} leave no jitter in {cells}: {remedy}")
    if args.resize < size:
        parser.error(f"--resize {args.resize} is smaller than --image-size {size}: use {round(size * 292 / 255)}")
    if args.milestones and max(args.milestones) >= args.epochs:
        parser.error(f"--milestones {max(args.milestones)} must be smaller than --epochs {args.epochs}")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
@dataclasses.dataclass(frozen=True)
class Square(View):
    """A random square of the image whose side is size / resize of the image's shorter side."""

    resize: int = 292

    def box(self, u, height, width):
        side = max(1, round(min(height, width) * self.size / self.resize))
        return int(u[TOP] * (height - side + 1)), int(u[LEFT] * (width - side + 1)), side, side


def augmentation(size, resize, gray=0.66):
    """One view per image, from which the patches are cut: a square, grey as a whole or not at all (MMSelfSup 0.11)."""
    return [Square(size=size, resize=resize, flip=0.0, gray_p=gray)]


def places(u, size, patch, gap=0):
    """Where patches begin in an image of size x size pixels, one in each cell, row by row.

    u: uniforms (B, 18), for each cell down and across. Returns top and left, (B, 9) int64.
    """
    cell = size // 3
    offsets = gap // 2 + (u * (cell - patch - gap + 1)).long().unflatten(1, (9, 2))
    cells = torch.arange(9, device=u.device)
    return cells // 3 * cell + offsets[:, :, 0], cells % 3 * cell + offsets[:, :, 1]


def cut(x, top, left, patch):
    """Patches of images (B, C, S, S), nine of the first one, nine of the second one ...: (9B, C, patch, patch)."""
    pixels = torch.arange(patch, device=x.device)
    rows, columns = top[:, :, None, None] + pixels[:, None], left[:, :, None, None] + pixels
    images = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    return x.permute(0, 2, 3, 1)[images, rows, columns].flatten(0, 1).permute(0, 3, 1, 2)


def save_patches(path, x, top, left, patch, spec, count=4):
    """PNG: the first images of a batch, each beside its nine patches, where they are in it, on blue."""
    if not is_main():
        return
    images = shown(x[:count], spec)
    parts = torch.tensor([0.0, 0.4, 1.0]).view(3, 1, 1).expand_as(images).clone()
    for part, image, *starts in zip(parts, images, top[:count].tolist(), left[:count].tolist(), strict=True):
        for i, j in zip(*starts, strict=True):
            part[:, i : i + patch, j : j + patch] = image[:, i : i + patch, j : j + patch]
    save_table(
        path,
        torch.stack([images, parts], 1).flatten(0, 1),
        ["image", "patches"],
        "y, row by row: 0 1 2, 3 (middle) 4, 5 6 7",
    )


# ------------------------------------------------------------------------------------------------------ model
class RelativeLoc(nn.Module):
    """Backbone f and h: a neck of one layer with dropout, and a linear classifier of the eight positions."""

    def __init__(self, backbone, hidden_dim=4096):
        super().__init__()
        self.backbone = backbone
        norm = nn.BatchNorm1d(hidden_dim, momentum=0.003)
        self.neck = nn.Sequential(nn.Linear(2 * backbone.dim, hidden_dim), norm, nn.ReLU(inplace=True))
        self.head = nn.Linear(hidden_dim, 8)
        for layer, std in ((self.neck[0], 0.01), (self.head, 0.005)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x, keep):
        """x: patches (9B, 3, P, P) as from `cut`, keep: factors (B, 8 hidden_dim) from `dropout`. Returns features f
        (9B, D), and logits (8B, 8) of the pairs of each image's middle patch with the others in their order."""
        f = self.backbone(x)
        nine = f.unflatten(0, (-1, 9))
        others, middle = torch.cat([nine[:, :4], nine[:, 5:]], 1), nine[:, 4:5].expand(-1, 8, -1)
        hidden = self.neck(torch.cat([others, middle], 2).flatten(0, 1))
        return f, self.head(hidden * keep.view_as(hidden))


def dropout(seed, step, batch, units, p, accum, device):
    """Factors (b, units) of hidden units, 0 or 1 / (1 - p), for each of the micro-batches of this process.

    Drawn for the global batch, of which each process takes its rows: they depend on (seed, step, place in the batch).
    """
    generator = torch.Generator(device).manual_seed(*rng.seeds(seed, step, 1, rng.DROPOUT))
    keep = (torch.rand(batch, units, generator=generator, device=device) >= p) / (1 - p)
    return keep.split(batch // (world_size() * accum))[rank() :: world_size()]


# ------------------------------------------------------------------------------------------------------- loss
def position_loss(logits, labels):
    """Cross entropy, mean over pairs. logits: (8B, 8), labels: (8B,). Equal logits give ln 8."""
    return F.cross_entropy(logits, labels)


# --------------------------------------------------------------------------------------------------- training
def staircase(step, falls, decay, warmup=0):
    """Factor of the learning rate: 0.1 to 1 over `warmup` steps, later times `decay` from each step of `falls` on."""
    return 0.1 + 0.9 * step / warmup if step < warmup else decay ** sum(step >= fall for fall in falls)


def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.resize, args.gray))
    backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(RelativeLoc(backbone, args.hidden_dim))
    peak = args.lr * args.batch_size / 256
    groups = [  # relative location: h decays more (MMSelfSup 0.11)
        {"params": [*model.backbone.parameters()]},
        {"params": [*model.neck.parameters(), *model.head.parameters()], "weight_decay": args.head_weight_decay},
    ]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    falls = [m * run.epoch_steps for m in args.milestones or ()] or [run.total * n / 7 for n in (3, 5)]
    grid = (args.image_size, args.patch_size, args.gap)
    lines = {"lr": f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", "baseline": f"loss ln(8) = {math.log(8):.2f}"}
    jitter = args.image_size // 3 - args.patch_size - args.gap
    lines["grid"] = f"3 x 3 cells of {args.image_size // 3} px, patches of {args.patch_size} px, jitter {jitter} px"
    net = run.start(model, optimizer, chance=math.log(8), **lines)

    noise = (args.batch_size, 8 * args.hidden_dim, args.dropout, args.accum, run.device)
    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * staircase(step, falls, args.decay, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch, keep in zip(batches, dropout(args.seed, step + 1, *noise), strict=True):
                (x,) = batch.views()
                top, left = places(batch.uniforms(18), *grid)  # relative location
                f, logits = net(cut(x, top, left, args.patch_size), keep.to(run.dtype))  # relative location
                labels = torch.arange(len(logits), device=run.device) % 8
                run.backward(position_loss(logits, labels))  # relative location
            if step == 0:
                save_patches(f"{args.out}/patches.png", x, top, left, args.patch_size, batch.specs[0])
            run.update(optimizer)
            run.log(lr, std=output_std(f), accuracy=(logits.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
