"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., ICML 2020, 2002.05709).

Two views of each of B images pass one network; every one of the 2B projections has to pick its partner among the other
2B - 1:  L = mean over anchors i of  -log [ exp(cos(z_i, z_j) / T) / sum_{k != i} exp(cos(z_i, z_k) / T) ].

    torchrun --nproc_per_node=8 simclr.py --data /imagenet
    python simclr.py --data digits --arch resnet18 --width 0.25 --batch-size 128 --lr-rule sqrt --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, linear top-1: 69.1 (released weights, 1000 epochs, batch 4096), about 64.5 after 100
epochs with weight decay 1e-4 and a projector of 3 layers, which is not in this file (official README); 66.66 in
MMSelfSup 0.11 (200 epochs, batch 4096). Ours: not run.

Small images (paper, appendix B.9; 32 px): --image-size 32 --arch resnet18 --batch-size 512 --lr 1 --temperature 0.5
--color-strength 0.5. With batches below about 1024 use --lr-rule sqrt (appendix B.1).

--decoupled leaves exp(cos(z_i, z_j) / T) out of the sum (DCL, Yeh et al. 2022, arXiv 2110.06848), so that a batch may
be small; --decoupled dclw also gives less weight to pairs that agree. Linear after 100 epochs of batch 256 in lightly:
63.2 by default, 65.1, 64.5. L starts near ln(2B - 2) and may become negative.

--scale-loss: L is the paper's mean over 2B anchors; the official code adds the means of both directions, 2 L. LARS
removes this factor from the steps of the weights, not from those of biases and norms, which --scale-loss 2 makes as
large as the official ones. The loss shown is L itself.

Deviations from the paper: crops, bicubic interpolation, saturation, contrast and the blur's borders are torchvision's,
not TensorFlow's; the brightness jitter multiplies (as in the SimCLR v2 code); convolutions start from He's
initialisation; the blur's sigma is drawn per image, not per batch; LARS multiplies by the rate outside its momentum
buffer, not inside, which differs while the rate changes; bf16 on CUDA, the loss in fp32; images of at most 64 pixels
are not blurred, are cropped to a fifth of their area at least (0.08 in the paper), and get a 3x3 stem.
To hack: copy this file. What is SimCLR: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, positive, probability, share, width
from common.augment import View
from common.distributed import gather, rank
from common.features import output_std
from common.networks import network
from common.optim import LARS, cosine, param_groups
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("SimCLR")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=128, help="outputs of the projector g")
    group.add_argument("--temperature", type=positive(float), default=0.1, help="T; 0.5 is better on CIFAR-10")
    group.add_argument(
        "--color-strength", type=at_least(0, float), default=1.0, help="s of the colour distortion; 0.5 on CIFAR-10"
    )
    text = "DCL's loss, or DCLW's, which weighs pairs"
    group.add_argument("--decoupled", nargs="?", const="dcl", choices=["dcl", "dclw"], help=text)
    group.add_argument("--scale-loss", type=positive(float), default=1.0, help="2 as in the official code")
    group.add_argument("--epochs", type=positive(int), default=1000)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=4096, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=0.3, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--lr-rule", choices=["linear", "sqrt"], default="linear", help="sqrt: lr/4 * sqrt(batch-size)")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-6)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5, strength=1.0):
    """Both views alike: crop, flip, colour distortion of strength s, blur (appendix A). Pixels stay in [0, 1]."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
        interpolation="bicubic",
        flip=flip,
        jitter=(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    return [view, view]


# ------------------------------------------------------------------------------------------------------ model
class SimCLR(nn.Module):
    """Backbone f and projector g of two layers with batch norm after each (section 3; official code).

    dim: outputs of the projector; its hidden layer is as wide as the features.
    """

    def __init__(self, backbone, dim=128):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, backbone.dim, bias=False),
            nn.BatchNorm1d(backbone.dim),
            nn.ReLU(inplace=True),
            nn.Linear(backbone.dim, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
        self.projector[-1].bias.requires_grad_(False)  # a scale but no shift, as in the official code
        for layer in (self.projector[0], self.projector[3]):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns projections z1, z2, (B, D) each.

        The views pass together: batch-norm statistics are those of both.
        """
        z1, z2 = self.projector(self.backbone(torch.cat([x1, x2]))).chunk(2)
        return z1, z2


# ------------------------------------------------------------------------------------------------------- loss
def nt_xent(z1, z2, temperature):
    """Normalised temperature-scaled cross entropy (equation 1), mean over the 2B anchors of this process.

    z1, z2: (B, D), row i of one is the partner of row i of the other; candidates are those of all processes.
    Equal embeddings give ln(2B - 1), B being the global batch.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    anchors, candidates = torch.cat([z1, z2]), torch.cat([gather(z1), gather(z2)])
    batch = len(candidates) // 2
    own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    logits = anchors @ candidates.T / temperature  # (2 B_local, 2B)
    logits = logits.scatter(1, torch.cat([own, own + batch])[:, None], -math.inf)  # never its own candidate
    return F.cross_entropy(logits, torch.cat([own + batch, own]))


def dcl_loss(z1, z2, temperature, weighted=False, sigma=0.5):
    """Decoupled contrastive loss: NT-Xent without the partner among the candidates, mean over the 2B anchors here.

    z1, z2: as of nt_xent. weighted: DCLW, each pair counts 2 - B softmax(cos / sigma) over the pairs of all processes,
    without gradient, which is 1 on average. Equal embeddings give ln(2B - 2). It is not bounded from below.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    anchors, candidates = torch.cat([z1, z2]), torch.cat([gather(z1), gather(z2)])
    batch = len(candidates) // 2
    own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    neither = torch.stack([own, own + batch], 1).repeat(2, 1)  # itself, its partner
    logits = (anchors @ candidates.T / temperature).scatter(1, neither, -math.inf)
    cosines = (z1 * z2).sum(1)
    weight = (2 - batch * F.softmax(gather(cosines.detach()) / sigma, 0)[own]) if weighted else 1.0
    return logits.logsumexp(1).mean() - (weight * cosines).mean() / temperature


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip, args.color_strength))
    backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = run.place(SimCLR(backbone, args.dim))
    linear = args.lr_rule == "linear"
    peak = args.lr * args.batch_size / 256 if linear else args.lr / 4 * math.sqrt(args.batch_size)
    optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    rule = f"{args.lr} x {args.batch_size}/256" if linear else f"{args.lr}/4 x sqrt({args.batch_size})"
    candidates = 2 * args.batch_size // args.accum - (2 if args.decoupled else 1)
    chance = math.log(candidates)
    baseline = f"loss ln({candidates}) = {chance:.2f}"
    lines = {"small batch": "our short runs took --lr 1 --lr-rule sqrt"} if linear and args.batch_size <= 256 else {}
    net = run.start(model, optimizer, chance=chance, lr=f"{rule} = {peak:.4g}", baseline=baseline, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                x1, x2 = batch.views()
                z1, z2 = net(x1, x2)
                if args.decoupled:
                    loss = dcl_loss(z1, z2, args.temperature, args.decoupled == "dclw")
                else:
                    loss = nt_xent(z1, z2, args.temperature)  # SimCLR
                run.backward(loss, args.scale_loss)
            run.update(optimizer)
            run.log(lr, std=output_std(z1))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
