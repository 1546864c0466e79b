"""VICReg: Variance-Invariance-Covariance Regularization (Bardes, Ponce & LeCun, ICLR 2022, arXiv 2105.04906).

Two views of B images pass one network. Every output should agree across the views, vary over the images with a standard
deviation of at least 1, and not follow the other outputs. With C(z) the covariance (D, D) of z over the batch,
L = 25 |z1 - z2|^2 / (B D) + sum over z = z1, z2 of
        25/2 mean_i max(0, 1 - sqrt(C_ii + 1e-4)) + 1/D sum_{i != j} C_ij^2.

    torchrun --nproc_per_node=8 vicreg.py --data /imagenet
    torchrun --nproc_per_node=8 vicreg.py --data /imagenet --batch-size 512 --epochs 100 --lr 0.3
    python vicreg.py --data digits --arch resnet18 --width 0.25 --dim 512 --batch-size 64 --epochs 40 --lr 1 --flip 0

Published, ResNet-50 on ImageNet, linear top-1 (official README): 73.2 (1000 epochs, batch 2048); twice as wide 75.5;
ResNet-200, twice as wide, 77.3. lightly: 63.0 (100 epochs, batch 256). Ours: not run.

The variance term has two dialects. Here and in the official code it is the mean over both views (the 1/2 above), in the
equation of the paper and in solo-learn their sum: --std-coeff 25 there is --std-coeff 50 here. In others the covariance
term is a mean over the D (D - 1) entries; it is D - 1 times smaller.

Small images (solo-learn; 92.07 on CIFAR-10): --image-size 32 --arch resnet18 --dim 2048 --batch-size 256 --epochs 1000
--weight-decay 1e-4. Small batches want a larger rate per image: the authors' is --lr 0.3 at 512 images, 0.5 at 256.

The log has the three terms, without their coefficients, of the last micro-batch of this step. Equal outputs give a loss
of 24.75, all of it variance: `covariance` near 0 in the first epochs is a collapse; it is healthy if it rises slowly.
--accum is not the same as the whole batch at once: variances and covariances are those of a micro-batch.

Deviations from the official code: bf16 on CUDA (fp16 there), the loss in fp32; the last, incomplete batch is dropped;
the squares of C are summed from whichever of z^T z and z z^T is smaller, which have the same sum; images of at most 64
pixels are not blurred, are cropped to a fifth of their area at least (0.08 in the code), and get a 3x3 stem.
To hack: copy this file. What is VICReg: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, positive, probability, share, width
from common.augment import View
from common.distributed import gather
from common.features import output_std
from common.networks import network
from common.optim import LARS, cosine, param_groups
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("VICReg")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument(
        "--hidden-dim", type=positive(int), help="width of the projector's hidden layers (default: --dim)"
    )
    group.add_argument("--dim", type=at_least(2), default=8192, help="outputs of the projector, D")
    group.add_argument("--sim-coeff", type=at_least(0, float), default=25.0, help="lambda: weight of the invariance")
    group.add_argument("--std-coeff", type=at_least(0, float), default=25.0, help="mu: of the variance, mean of views")
    group.add_argument("--cov-coeff", type=at_least(0, float), default=1.0, help="nu: of the covariance, sum of views")
    group.add_argument("--epochs", type=positive(int), default=1000)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=2048, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=0.2, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-6)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    args.hidden_dim = args.hidden_dim or args.dim
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
class VICReg(nn.Module):
    """Backbone f and projector of 3 layers, which the paper calls the expander.

    hidden_dim: width of the projector's hidden layers, dim: its outputs, D.
    """

    def __init__(self, backbone, hidden_dim=8192, dim=8192):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim, bias=False),  # no batch norm after it: the loss looks at the variance
        )

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns projections z1, z2, (B, D) each.

        The views pass separately: batch-norm statistics are those of one view.
        """
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        return z1, z2


# ------------------------------------------------------------------------------------------------------- loss
def spread(z):
    """Variance term and covariance term of z (B, D) over the batch of all processes, the same on each: scalars.

    The mean over dimensions of max(0, 1 - sqrt(variance + 1e-4)), and the squares of all covariances of two different
    dimensions, summed and divided by D (equations 1 to 4).
    """
    z = gather(z)
    z, last = z - z.mean(0), len(z) - 1
    variances = z.square().sum(0) / last
    product = z @ z.T if len(z) < z.shape[1] else z.T @ z  # the sum of squares of both is the same
    zeros = product.new_zeros(()).expand_as(product)
    total = F.mse_loss(product, zeros, reduction="sum") / last**2  # one temporary; product.square().sum() makes three
    return F.relu(1 - torch.sqrt(variances + 1e-4)).mean(), (total - variances.square().sum()) / z.shape[1]


def vicreg_terms(z1, z2):
    """Invariance (over the rows of this process), variance and covariance term: scalars. z1, z2: (B, D)."""
    (variance1, covariance1), (variance2, covariance2) = spread(z1), spread(z2)
    return F.mse_loss(z1, z2), (variance1 + variance2) / 2, covariance1 + covariance2


def vicreg_loss(z1, z2, sim, std, cov):
    """sim * invariance + std * variance + cov * covariance (equation 6, with a mean over views in the second).

    z1, z2: (B, D), row i of both from one image. Returns a scalar >= 0. Equal rows give 0.99 std; unrelated views with
    independent standard normal entries about 2 sim + 2 cov (D - 1) / (B - 1).
    """
    invariance, variance, covariance = vicreg_terms(z1, z2)
    return sim * invariance + std * variance + cov * covariance


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip))
    backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = run.place(VICReg(backbone, args.hidden_dim, args.dim))
    peak = args.lr * args.batch_size / 256
    optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)  # VICReg: one rate
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    baseline = f"loss 0.99 x {args.std_coeff:g} = {0.99 * args.std_coeff:.4g} for equal outputs, best 0"
    net = run.start(model, optimizer, lr=rule, baseline=baseline)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=0.001)  # VICReg: ends at 0.001 of the peak
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                x1, x2 = batch.views()
                z1, z2 = net(x1, x2)
                run.backward(vicreg_loss(z1, z2, args.sim_coeff, args.std_coeff, args.cov_coeff))  # VICReg
            run.update(optimizer)
            monitors = {}
            if run.due:  # VICReg
                terms = vicreg_terms(z1.detach(), z2.detach())
                monitors = dict(zip(("invariance", "variance", "covariance"), terms, strict=True))
            run.log(lr, std=output_std(z1), **monitors)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
