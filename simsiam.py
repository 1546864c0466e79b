"""SimSiam: Exploring Simple Siamese Representation Learning (Chen & He, CVPR 2021, arXiv 2011.10566).

Two views of an image pass one network; a predictor on one side has to predict the projection of the other side,
which receives no gradient:  L = -1/2 [cos(p1, stopgrad(z2)) + cos(p2, stopgrad(z1))].

    torchrun --nproc_per_node=8 simsiam.py --data /imagenet
    python simsiam.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40

Published, ResNet-50 on ImageNet, 100 epochs, linear top-1: 68.1 with batch 512, 68.3 with 256 (official code);
68.3 in MMSelfSup 0.11. Ours: not run.

Small images (paper, appendix D; 32 px): --image-size 32 --arch resnet18 --proj-layers 2 --lr 0.03 --weight-decay 5e-4
--epochs 800.

Deviations from the paper: the learning rate follows the cosine per step, not per epoch; bf16 on CUDA (--precision fp32
is the paper's); images of at most 64 pixels are not blurred (as in the paper's CIFAR-10 appendix) and get a 3x3 stem.
To hack: copy this file. What is SimSiam: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, positive, probability, share, width
from common.augment import View
from common.features import output_std
from common.networks import network
from common.optim import cosine
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("SimSiam")
    group.add_argument("--crop-min", type=share, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=2048, help="width of projector and output d")
    group.add_argument("--proj-layers", type=at_least(1, high=100), default=3, help="layers of the projector")
    group.add_argument("--pred-dim", type=positive(int), default=512, help="bottleneck of the predictor h")
    group.add_argument("--epochs", type=positive(int), default=100)
    group.add_argument("--warmup-epochs", type=at_least(0), default=0)
    group.add_argument(
        "--batch-size", type=positive(int), default=512, help="images per step over all processes and --accum"
    )
    group.add_argument(
        "--lr", type=positive(float), default=0.05, help="per 256 images: multiplied by batch-size / 256"
    )
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """Both views alike: that of MoCo v2 (paper, section 3)."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
        flip=flip,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    return [view, view]


# ------------------------------------------------------------------------------------------------------ model
class SimSiam(nn.Module):
    """Backbone f, projector of 3 layers and predictor h of 2 (section 3, "Baseline settings").

    dim: width of the projector's layers, pred_dim: bottleneck of the predictor, layers: of the projector.
    """

    def __init__(self, backbone, dim=2048, pred_dim=512, layers=3):
        super().__init__()
        self.backbone = backbone
        widths, hidden = [backbone.dim] + [dim] * (layers - 1), []
        for inputs in widths[:-1]:
            hidden += [nn.Linear(inputs, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(
            *hidden,
            nn.Linear(widths[-1], dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),  # without scale and shift, as in the official code
        )
        self.predictor = nn.Sequential(
            nn.Linear(dim, pred_dim, bias=False),
            nn.BatchNorm1d(pred_dim),
            nn.ReLU(inplace=True),
            nn.Linear(pred_dim, dim),
        )

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns predictions p1, p2 and projections z1, z2, (B, D) each.

        The views pass separately: batch-norm statistics are those of one view.
        """
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()


# ------------------------------------------------------------------------------------------------------- loss
def simsiam_loss(p1, p2, z1, z2):
    """Negative cosine similarity, symmetric (algorithm 1); no gradient into z. (B, D) each -> scalar in [-1, 1]."""
    return -(F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()) / 2


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip))
    backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = run.place(SimSiam(backbone, args.dim, args.pred_dim, args.proj_layers))
    peak = args.lr * args.batch_size / 256
    groups = [  # SimSiam: weight decay on everything, and a predictor whose learning rate does not decay (section 4.2)
        {"params": [*model.backbone.parameters(), *model.projector.parameters()], "fixed": False},
        {"params": [*model.predictor.parameters()], "fixed": True},
    ]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    net = run.start(model, optimizer, lr=rule, baseline="loss 0, best -1")

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = peak if group["fixed"] else lr  # SimSiam
            for batch in batches:
                x1, x2 = batch.views()
                p1, p2, z1, z2 = net(x1, x2)
                run.backward(simsiam_loss(p1, p2, z1, z2))  # SimSiam
            run.update(optimizer)
            run.log(lr, std=output_std(z1))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
