"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al., ICML 2021, arXiv 2103.03230).

Two views of B images pass one network. Every one of the D outputs should agree with itself across the views and be
unrelated to the others: with z1, z2 standardised over the batch and C = z1^T z2 / B, the (D, D) cross-correlation,
L = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2.

    torchrun --nproc_per_node=8 barlowtwins.py --data /imagenet
    python barlowtwins.py --data digits --arch resnet18 --width 0.25 --dim 512 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, linear top-1: 73.5 (official code, 1000 epochs, batch 2048); 71.66 in MMSelfSup 0.11
(300 epochs, batch 2048); 67.2 in solo-learn (100 epochs). Ours: not run.

Small images (after lightly's CIFAR-10 benchmark, whose projector has 2 layers, not 3; 32 px): --image-size 32 --arch
resnet18 --dim 2048 --lambd 0.005 --optimizer sgd --lr 0.12 --lr-biases 0.12 --scale-loss 1 --weight-decay 5e-4
--batch-size 128 --epochs 200 --warmup-epochs 0. solo-learn scales this loss by 0.1.

--scale-loss and --lr-biases: the official code sums C over its W processes outside autograd, so its steps are those of
L / W; its README trains on 16 V100, so W = 16. Here the gradient is exact for any number of processes, and L / 16 takes
the place of L / W. LARS removes this factor from the steps of the weights (not from the weight decay in them); the
steps of biases and norms are proportional to it, and --lr-biases 0.0048 was tuned with it. The same steps without the
factor: --scale-loss 1 --lr-biases 0.0003. The loss shown is L itself.
--accum is not the same as the whole batch at once: C is that of a micro-batch, whose entries are noisier.

Deviations from the official code: the exact gradient; bf16 on CUDA (fp16 there), the loss in fp32; the last, incomplete
batch is dropped; images of at most 64 pixels are not blurred, are cropped to a fifth of their area at least (0.08 in
the code), and get a 3x3 stem.
To hack: copy this file. What is Barlow Twins: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import sys

import torch
from torch import nn

from common.args import Parser, at_least, below_one, default_size, positive, probability, share, width
from common.augment import View
from common.distributed import all_reduce, gather, world_size
from common.features import output_std
from common.networks import network
from common.optim import LARS, cosine, param_groups
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("Barlow Twins")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument(
        "--hidden-dim", type=positive(int), help="width of the projector's hidden layers (default: --dim)"
    )
    group.add_argument("--dim", type=positive(int), default=8192, help="outputs of the projector, D")
    group.add_argument("--lambd", type=at_least(0, float), default=0.0051, help="lambda: weight of the redundancy term")
    group.add_argument("--scale-loss", type=positive(float), default=1 / 16, help="1 / processes of the official run")
    group.add_argument("--epochs", type=positive(int), default=1000)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=2048, help="images per step over all processes and --accum"
    )
    group.add_argument("--optimizer", choices=["lars", "sgd"], default="lars")
    group.add_argument("--lr", type=positive(float), default=0.2, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--lr-biases", type=at_least(0, float), default=0.0048, help="the same for biases and norms")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-6)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    args.hidden_dim = args.hidden_dim or args.dim
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """The views differ, as in BYOL: only the first is always blurred, only the second may be solarised (paper, 2.2)."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
        interpolation="bicubic",
        flip=flip,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=1.0 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    return [view, dataclasses.replace(view, blur_p=0.1 * view.blur_p, solarize_p=0.2)]


# ------------------------------------------------------------------------------------------------------ model
class BarlowTwins(nn.Module):
    """Backbone f and projector of 3 layers (section 2.2, "Architecture").

    hidden_dim: width of the projector's hidden layers, dim: its outputs, D.
    """

    def __init__(self, backbone, hidden_dim=8192, dim=8192):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim, bias=False),  # no batch norm after it: the loss standardises
        )

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns projections z1, z2, (B, D) each.

        The views pass separately: batch-norm statistics are those of one view.
        """
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        return z1, z2


# ------------------------------------------------------------------------------------------------------- loss
def standardize(z):
    """Mean 0 and variance 1 of every dimension over the batch of all processes: batch norm without scale and shift."""
    batch = len(z) * world_size()
    z = z - all_reduce(z.sum(0)) / batch
    return z * torch.rsqrt(all_reduce(z.square().sum(0)) / batch + 1e-5)


def barlow_twins_loss(z1, z2, lambd):
    """Squared distance of the cross-correlation from the identity, off-diagonal part times lambd (equations 1, 2).

    z1, z2: (B, D), row i of both from one image; C is that of the batch of all processes, and so the same on each.
    Returns a scalar >= 0, a sum over (D, D): about D + lambd * D^2 / B if the views have nothing in common.
    """
    batch = len(z1) * world_size()
    z1, z2 = standardize(z1), standardize(z2)
    diagonal = all_reduce((z1 * z2).sum(0)) / batch
    # sum_ij C_ij^2 = sum_kl (z1_k . z1_l) (z2_k . z2_l) / B^2: (B, B) products of rows instead of (D, D) entries of C
    total = all_reduce(((z1 @ gather(z1).T) * (z2 @ gather(z2).T)).sum()) / batch**2
    off_diagonal = total - diagonal.square().sum()
    return (1 - diagonal).square().sum() + lambd * off_diagonal


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip))
    backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = run.place(BarlowTwins(backbone, args.hidden_dim, args.dim))
    peak, biases = (rate * args.batch_size / 256 for rate in (args.lr, args.lr_biases))
    groups = param_groups(model, args.weight_decay)  # Barlow Twins: weights; biases and norms, each with its own rate
    optimizer = {"lars": LARS, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = optimizer(groups, lr=peak, momentum=args.momentum)
    rule = f"{args.lr} and {args.lr_biases} x {args.batch_size}/256 = {peak:.4g} and {biases:.4g} (biases and norms)"
    unrelated = args.dim + args.lambd * args.dim**2 * args.accum / args.batch_size
    baseline = f"loss about D + lambda D^2/B = {unrelated:.4g} for unrelated views, best 0"
    net = run.start(model, optimizer, lr=rule, baseline=baseline)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=0.001)  # Barlow Twins: ends at 0.001 of the peak
            for group in optimizer.param_groups:
                group["lr"] = lr if group["adapt"] else lr * args.lr_biases / args.lr  # Barlow Twins
            for batch in batches:
                x1, x2 = batch.views()
                z1, z2 = net(x1, x2)
                run.backward(barlow_twins_loss(z1, z2, args.lambd), args.scale_loss)  # Barlow Twins
            run.update(optimizer)
            run.log(lr, std=output_std(z1))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
