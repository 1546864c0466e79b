"""RotNet: Unsupervised Representation Learning by Predicting Image Rotations (Gidaris et al., ICLR 2018, 1803.07728).

Each image is shown four times, turned counter-clockwise by y = 0, 1, 2 and 3 quarter turns. From one of the four alone
the network has to tell y, for which it helps to recognise what the image shows:  L = -ln softmax(W f + b)_y.

    torchrun --nproc_per_node=8 rotation_pred.py --data /imagenet
    python rotation_pred.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, linear top-1: 54.20 on the features of layer3 and 48.12 on the last ones, after 70
epochs (MMSelfSup 0.11); 48.20 on the last ones after 105 (VISSL). Ours: not run. Last layers specialise in rotations:
the published best layer is stage 4 of 5, feat4. eval_linear.py --protocol multihead and eval_svm.py report all five;
k-NN judges the last one, and is poor (MMSelfSup: 11.9).

--batch-size counts images, of each of which four pass the network: 128 are the 512 of MMSelfSup, whose recipe the
defaults are. The paper's, for AlexNet (official code): --batch-size 192 --epochs 50 --warmup-epochs 0 --lr 0.0133
--milestones 15 30 45 --weight-decay 5e-4 --nesterov.
Small images (official code, CIFAR-10, a network in network; 32 px): --image-size 32 --arch resnet18 --epochs 200
--warmup-epochs 0 --lr 0.2 --milestones 60 120 160 --decay 0.2 --weight-decay 5e-4 --nesterov, 0.1 at this batch.

Deviations from the paper: a ResNet with one linear layer instead of AlexNet (as in MMSelfSup); batch norm uses the
statistics of the global batch; without --milestones the rate falls at 3/7 and 5/7 of --epochs whatever their number;
images of at most 64 pixels are cropped to at least a fifth of their area (official code: padded by 4 pixels and cropped
to their size) and get a 3x3 stem.
To hack: copy this file. What is RotNet: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, positive, probability, share, toggle, width
from common.augment import View
from common.distributed import is_main
from common.features import output_std
from common.networks import network
from common.pictures import save_table, shown
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("RotNet")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--epochs", type=positive(int), default=70)
    group.add_argument("--warmup-epochs", type=at_least(0), default=5, help="from a tenth of the rate on")
    group.add_argument(
        "--milestones", type=positive(int), nargs="+", help="epochs before which the rate falls (default: 3/7, 5/7)"
    )
    group.add_argument("--decay", type=share, default=0.1, help="factor of the rate at each of them")
    group.add_argument(
        "--batch-size", type=positive(int), default=128, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=0.4, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4)
    group.add_argument("--momentum", type=below_one, default=0.9)
    group.add_argument("--nesterov", action=toggle, default=False, help="Nesterov's form of the momentum")
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    if args.milestones and max(args.milestones) >= args.epochs:
        parser.error(f"--milestones {max(args.milestones)} must be smaller than --epochs {args.epochs}")
    if args.nesterov and not args.momentum:
        parser.error("--nesterov needs a --momentum above 0")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """One view per image: crop and flip, no colours (MMSelfSup 0.11). It is turned afterwards, on the device."""
    return [View(size=size, area=(crop_min, 1.0), flip=flip)]


def rotate4(x):
    """(B, C, S, S) -> (4B, C, S, S): all images as they are, then all by one, two and three quarter turns
    counter-clockwise. Pixels only change places: neither interpolation nor borders could give the turn away."""
    turned = torch.cat([torch.rot90(x, k, (2, 3)) for k in range(4)])
    return turned.contiguous(memory_format=torch.channels_last)


def quarter_turns(images, device=None):
    """Labels y (4B,) of what `rotate4` makes of B images."""
    return torch.arange(4 * images, device=device) // images


def save_rotations(path, x, spec, count=4):
    """PNG: the first images of a batch, one in a row, turned by y quarter turns."""
    if is_main():
        images = rotate4(shown(x[:count], spec)).unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)
        save_table(path, images, [f"y = {k}" for k in range(4)], "y quarter turns counter-clockwise: which y is it?")


# ------------------------------------------------------------------------------------------------------ model
class RotationPred(nn.Module):
    """Backbone f and a linear classifier of the four rotations."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.dim, 4)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        """x: rotated images (4B, 3, S, S), which pass together. Returns features f (4B, D) and logits (4B, 4)."""
        f = self.backbone(x)
        return f, self.head(f)


# ------------------------------------------------------------------------------------------------------- loss
def rotation_loss(logits, labels):
    """Cross entropy (equations 2 and 3), mean over images and rotations. logits: (4B, 4), labels: (4B,). Equal logits
    give ln 4."""
    return F.cross_entropy(logits, labels)


# --------------------------------------------------------------------------------------------------- training
def staircase(step, falls, decay, warmup=0):
    """Factor of the learning rate: 0.1 to 1 over `warmup` steps, later times `decay` from each step of `falls` on."""
    return 0.1 + 0.9 * step / warmup if step < warmup else decay ** sum(step >= fall for fall in falls)


def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip))
    backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(RotationPred(backbone))
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(
        model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=args.nesterov
    )
    falls = [m * run.epoch_steps for m in args.milestones or ()] or [run.total * n / 7 for n in (3, 5)]
    lines = {"lr": f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", "baseline": f"loss ln(4) = {math.log(4):.2f}"}
    net = run.start(model, optimizer, chance=math.log(4), **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * staircase(step, falls, args.decay, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                (x,) = batch.views()
                f, logits = net(rotate4(x))  # RotNet
                labels = quarter_turns(len(x), run.device)
                run.backward(rotation_loss(logits, labels))  # RotNet
            if step == 0:
                save_rotations(f"{args.out}/rotations.png", x, batch.specs[0])
            run.update(optimizer)
            run.log(lr, std=output_std(f), accuracy=(logits.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
