"""DirectCLR: Understanding Dimensional Collapse in Contrastive Self-supervised Learning (Jing et al., ICLR 2022,
arXiv 2110.09348).

The projector of contrastive methods keeps the features of the backbone from collapsing into few dimensions. DirectCLR
has none: only the first d0 channels of the features r enter the loss, and residual connections pass the gradient to the
others. For z = the first d0 channels of r, each view's image has to be found among those of the other view:
L = mean over both directions and images i of  -log [ exp(cos(z_i, z'_i) / T) / sum_k exp(cos(z_i, z'_k) / T) ].

    torchrun --nproc_per_node=8 directclr.py --data /imagenet
    python directclr.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --lr 1 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, linear top-1, 100 epochs: 62.7 (official README). Ours: not run. Needs a network with
residual connections from its last layers to its output, as ResNets have.

--projector are the paper's comparisons: none (all channels of r), linear (one layer to 128), mlp (two, as SimCLR's) and
group (the sum of the losses of 8 groups of channels, drawn anew in each step). The line of each step shows `rank`, the
effective rank of the features of the batch (exp of the entropy of the singular values of the centred r, as shares of
their sum); `visualize.py --spectrum` draws the singular values over a data set, the picture of the paper.

Deviations from the official code: no linear classifier is trained along with the labels (k-NN and eval_linear.py
measure instead); the groups of --projector group are the same on all processes; the rate, there absolute, is given per
256 images; d0 of a narrower network is the same share of its channels; bf16, not fp16, on GPUs; images of at most 64
pixels are not blurred, are cropped to a fifth of their area at least (0.08 there), and get a 3x3 stem.
To hack: copy this file. What is DirectCLR: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, width
from common.augment import View
from common.distributed import gather, rank
from common.features import effective_rank, output_std
from common.networks import network
from common.optim import LARS, cosine, param_groups
from common.run import Run

GROUPS = 8  # of --projector group


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("DirectCLR")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--d0", type=positive(int), help="channels in the loss (default: 360 of 2048, or that share)")
    text = "direct is DirectCLR, the others are the paper's comparisons"
    group.add_argument("--projector", choices=["direct", "none", "linear", "mlp", "group"], default="direct", help=text)
    group.add_argument("--dim", type=positive(int), default=128, help="outputs of --projector linear or mlp")
    group.add_argument("--temperature", type=positive(float), default=0.1, help="T")
    group.add_argument("--epochs", type=positive(int), default=100)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=4096, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=0.3, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-6, help="not of biases and norms")
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """The views differ, as in BYOL: only the first is always blurred, only the second may be solarised."""
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
class DirectCLR(nn.Module):
    """Backbone f, and of the comparisons a projector of one or two layers (section 5; official code).

    projector: see --projector, dim: outputs of one that is trained.
    """

    def __init__(self, backbone, projector="direct", dim=128):
        super().__init__()
        self.backbone, self.projector = backbone, nn.Identity()
        if projector == "linear":
            self.projector = nn.Linear(backbone.dim, dim, bias=False)
        elif projector == "mlp":
            self.projector = nn.Sequential(
                nn.Linear(backbone.dim, backbone.dim, bias=False),
                nn.BatchNorm1d(backbone.dim),
                nn.ReLU(inplace=True),
                nn.Linear(backbone.dim, dim, bias=False),
                nn.BatchNorm1d(dim),
            )

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns features r1, r2 and, of a projector, its outputs, else r1, r2 again.

        The views pass separately: batch-norm statistics are those of one view.
        """
        r1, r2 = self.backbone(x1), self.backbone(x2)
        return r1, r2, self.projector(r1), self.projector(r2)


def channel_groups(seed, step, dim, groups=GROUPS):
    """The channels 0 ... dim - 1 in groups of equal size and random members, the same on every process: (groups, n)."""
    order = rng.uniforms(seed, step, range(dim), rng.SCRIPT, 1)[:, 0].argsort()
    return torch.from_numpy(order[: dim - dim % groups].reshape(groups, -1))


# ------------------------------------------------------------------------------------------------------- loss
def directclr_loss(z1, z2, temperature):
    """Cross entropy of finding an image among those of the other view, mean over both directions and the images of this
    process; candidates are those of all processes. z1, z2: (B, D), row i of both from one image. Equal rows give ln B,
    B being the global batch."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    forth = F.cross_entropy(z1 @ gather(z2).T / temperature, own)
    return (forth + F.cross_entropy(z2 @ gather(z1).T / temperature, own)) / 2


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip))
    backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    d0 = args.d0 or max(1, round(backbone.dim * 360 / 2048))
    if d0 > backbone.dim:
        fail(f"--d0 {d0}: the features have {backbone.dim} channels")
    model = run.place(DirectCLR(backbone, args.projector, args.dim))
    peak = args.lr * args.batch_size / 256
    optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    candidates, terms = args.batch_size // args.accum, GROUPS if args.projector == "group" else 1
    chance = terms * math.log(candidates)
    lines = {"baseline": f"loss {f'{terms} ' if terms > 1 else ''}ln({candidates}) = {chance:.2f}"}
    what = {"direct": f"first {d0} of {backbone.dim} channels of the features", "none": "the features"}
    lines["loss of"] = what.get(args.projector, f"--projector {args.projector}, a comparison")
    net = run.start(model, optimizer, chance=chance, lr=f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=0.001)  # DirectCLR: ends at 0.001 of the peak
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                x1, x2 = batch.views()
                r1, r2, z1, z2 = net(x1, x2)
                if args.projector == "direct":
                    loss = directclr_loss(r1[:, :d0], r2[:, :d0], args.temperature)  # DirectCLR
                elif args.projector == "group":
                    parts = channel_groups(args.seed, step + 1, backbone.dim).to(run.device)
                    loss = sum(directclr_loss(r1[:, part], r2[:, part], args.temperature) for part in parts)
                else:
                    loss = directclr_loss(z1, z2, args.temperature)
                run.backward(loss)
            run.update(optimizer)
            rank_of_batch = {"rank": effective_rank(gather(r1.detach()), center=True)} if run.due else {}  # DirectCLR
            run.log(lr, std=output_std(r1), **rank_of_batch)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
