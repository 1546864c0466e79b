"""BYOL: Bootstrap Your Own Latent (Grill et al., NeurIPS 2020, arXiv 2006.07733).

One view of an image passes the online network (backbone, projector, predictor), which has to predict how a target
network projects the other view. The target is a moving average of the online network and receives no gradient:
L = |norm(p1) - norm(z2)|^2 + |norm(p2) - norm(z1)|^2,  target <- tau * target + (1 - tau) * online after every step.

    torchrun --nproc_per_node=8 byol.py --data /imagenet

Published schedules; --epochs picks the row (the nearest by ratio) for those of --lr, --tau, --weight-decay not given:

    epochs  --lr  --tau  --weight-decay
        40  0.45   0.97          1e-6
       100  0.45   0.99          1e-6
       300  0.3    0.99          1e-6
      1000  0.2    0.996       1.5e-6

Published, ResNet-50 on ImageNet, linear top-1: 74.4 (released weights, 1000 epochs, batch 4096; official README);
72.93 after 300 epochs, 71.88 after 200 in MMSelfSup 0.11 (batch 4096). Ours: not run.

Small images, small batches: --optimizer sgd after lightly's CIFAR-10 benchmark, whose target has a constant momentum
(here it rises to 1). The gradient of its loss is a quarter of ours, so here the learning rate is a quarter of theirs
and the weight decay 4 times theirs:
    python byol.py --data cifar10 --arch resnet18 --hidden-dim 1024 --batch-size 128 --epochs 200 --warmup-epochs 0 \
        --optimizer sgd --lr 0.03 --weight-decay 2e-3 --tau 0.99

Deviations from the paper: the target starts as a copy of the online network, not from another seed, also after --init;
crops (the official one is a single attempt, clipped to the image), bicubic interpolation, saturation, contrast and the
blur's borders are torchvision's; the brightness jitter multiplies; bf16 on CUDA, the loss in fp32; weights start as in
torchvision and torch, with the last scale of each residual block at 0; images of at most 64 pixels are not blurred, are
cropped to a fifth of their area at least (0.08 in the paper), and get a 3x3 stem.
To hack: copy this file. What is BYOL: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, number, positive, probability, share, width
from common.augment import View
from common.features import output_std
from common.networks import network
from common.optim import LARS, cosine, param_groups
from common.run import Run

# -------------------------------------------------------------------------------------------------- arguments
SCHEDULES = {
    40: {"lr": 0.45, "tau": 0.97, "weight_decay": 1e-6},
    100: {"lr": 0.45, "tau": 0.99, "weight_decay": 1e-6},
    300: {"lr": 0.3, "tau": 0.99, "weight_decay": 1e-6},
    1000: {"lr": 0.2, "tau": 0.996, "weight_decay": 1.5e-6},
}


def published(epochs):
    """The number of epochs in SCHEDULES whose ratio to `epochs` is nearest to 1."""
    return min(SCHEDULES, key=lambda row: abs(math.log(row / epochs)))


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("BYOL")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=256, help="outputs of projector g and predictor q")
    group.add_argument("--hidden-dim", type=positive(int), default=4096, help="hidden width of projector and predictor")
    group.add_argument("--tau", type=number(float, 0, 1), help="target's momentum at the start (default: by --epochs)")
    group.add_argument("--epochs", type=positive(int), default=1000)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=4096, help="images per step over all processes and --accum"
    )
    group.add_argument("--optimizer", choices=["lars", "sgd"], default="lars", help="sgd: for small batches")
    group.add_argument(
        "--lr", type=positive(float), help="per 256 images: multiplied by batch-size / 256 (default: by --epochs)"
    )
    group.add_argument("--weight-decay", type=at_least(0, float), help="not of biases and norms (default: by --epochs)")
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    if args.optimizer == "sgd" and (args.lr is None or args.weight_decay is None):
        parser.error("--optimizer sgd needs --lr and --weight-decay: those of the table are for lars")
    for name, value in SCHEDULES[published(args.epochs)].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """The views differ: only the first is always blurred, only the second may be solarised (paper, appendix B)."""
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
def mlp(inputs, hidden, outputs):
    """Projector and predictor are built alike; the outputs are not normalised (section 3.3)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
    )


class BYOL(nn.Module):
    """Online network of backbone f, projector g and predictor q, and target network of f and g (section 3.1).

    dim: outputs of projector and predictor, hidden_dim: their hidden width.
    """

    def __init__(self, backbone, dim=256, hidden_dim=4096):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.dim, hidden_dim, dim)
        self.predictor = mlp(dim, hidden_dim, dim)
        self.reset_target()

    def reset_target(self):
        """Makes the target a copy of the online network as it is now, without gradient."""
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum):
        """target <- momentum * target + (1 - momentum) * online, for parameters; batch-norm statistics are its own."""
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - momentum)

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns online predictions p1, p2 and target projections z1, z2, (B, D) each.

        The views pass separately: batch-norm statistics are those of one view, in the target too (train mode).
        """
        p1 = self.predictor(self.projector(self.backbone(x1)))
        p2 = self.predictor(self.projector(self.backbone(x2)))
        with torch.no_grad():
            z1 = self.target_projector(self.target_backbone(x1))
            z2 = self.target_projector(self.target_backbone(x2))
        return p1, p2, z1, z2


def target_momentum(step, total, start):
    """Momentum of the target at step `step`, counted from 0, of `total`: from `start` up to 1 by half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total) + 1) / 2


# ------------------------------------------------------------------------------------------------------- loss
def byol_loss(p1, p2, z1, z2):
    """Squared distance of unit vectors, 2 - 2 cos, summed over both directions (equation 2), mean over the batch; no
    gradient into z. (B, D) each -> scalar in [0, 8], 4 for orthogonal vectors."""
    p1, p2, z1, z2 = (F.normalize(x, dim=1) for x in (p1, p2, z1.detach(), z2.detach()))
    return (p1 - z2).square().sum(1).mean() + (p2 - z1).square().sum(1).mean()


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip))
    backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = run.place(BYOL(backbone, args.dim, args.hidden_dim))
    if args.init:
        model.reset_target()  # BYOL: the target starts as a copy
    peak = args.lr * args.batch_size / 256
    optimizer = {"lars": LARS, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = optimizer(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    row = published(args.epochs)
    schedule = f"tau {args.tau} to 1, weight decay {args.weight_decay}; nearest published ({row} epochs): "
    schedule += ", ".join(f"{name} {value}" for name, value in SCHEDULES[row].items())
    net = run.start(model, optimizer, chance=4.0, lr=rule, schedule=schedule, baseline="loss 4, best 0")

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                x1, x2 = batch.views()
                p1, p2, z1, z2 = net(x1, x2)
                run.backward(byol_loss(p1, p2, z1, z2))  # BYOL
            run.update(optimizer)
            model.update_target(target_momentum(step, run.total, args.tau))  # BYOL: after the step (section 3.3)
            run.log(lr, std=output_std(z1))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
