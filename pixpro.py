"""PixPro: Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning (Xie et
al., CVPR 2021, arXiv 2011.10043).

Where two views of an image show the same place, their features there are to agree. Of a view, x_i are the outputs of
the projector for the cells of the backbone's last map. Propagation makes y_i = sum_j max(cos(x_i, x_j), 0)^p g(x_j) of
them, brought to length 1, g being one layer whose outputs have length 1; the target network, a moving average of
backbone and projector, gives x'_j of length 1 for the other view. Cells are a pair, A_ij = 1, if their centres lie
closer in the image than `threshold` diagonals of the larger cell:
L = - 2 mean over images of  sum_ij A_ij y_i.x'_j / sum_ij A_ij, in both directions: from 4 down to -4.

    torchrun --nproc_per_node=8 pixpro.py --data /imagenet
    python pixpro.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --instance-weight 1 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet (official code): VOC detection AP 58.8 after 100 epochs, 60.2 after 400; COCO FPN, box
and mask AP, 40.8 and 36.8, with the instance branch 41.3 and 37.1 (100 epochs). It is made for such tasks: judge it by
them. Ours: not run.

--instance-weight: weight of the same between whole images, with a projector and a predictor of their own (the figures
with it name no weight). The line of each step shows `positives`, the mean number of pairs of an image: at 0 nothing is
learned; 32-px images have 4 x 4 cells.

Deviations from the official code: corners of a crop lie on the edges of pixels, there in their middles (half a pixel);
propagation and loss in fp32; the momentum follows the step, and so goes on where a run is resumed; bf16, not fp16;
images of at most 64 pixels are not blurred, are cropped to a fifth of their area at least (0.08 there), and get a 3x3
stem.
To hack: copy this file. What is PixPro: the sections augmentation, model and loss, and the lines marked in main.
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
from common.optim import LARS, cosine, param_groups
from common.resnet import resnet
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("PixPro")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=256, help="outputs of the projector")
    group.add_argument("--hidden-dim", type=positive(int), default=4096, help="hidden width of the projector")
    group.add_argument("--power", type=positive(float), default=2.0, help="p: sharpness of the propagation")
    text = "layers of g: 0 (the identity), 1 or 2"
    group.add_argument("--transform-layers", type=at_least(0, high=2), default=1, help=text)
    group.add_argument("--threshold", type=share, default=0.7, help="of the distance of a pair, in diagonals of a cell")
    group.add_argument("--instance-weight", type=at_least(0, float), default=0.0, help="of the loss of whole images")
    group.add_argument("--tau", type=number(float, 0, 1), default=0.99, help="target's momentum at the start")
    group.add_argument("--epochs", type=positive(int), default=100)
    group.add_argument("--warmup-epochs", type=at_least(0), default=5)
    group.add_argument(
        "--batch-size", type=positive(int), default=1024, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=1.0, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-5, help="not of biases and norms")
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """The views differ: only the first is always blurred, only the second may be solarised (BYOL)."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
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
    """Two layers for every cell of a map (section 3.1)."""
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1),
        nn.BatchNorm2d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, 1),
    )


class PixPro(nn.Module):
    """Online network of backbone, projector and transform g, and target network of the first two (section 3.2); with
    `instance` also those of whole images: a second projector, and a predictor for the online network.

    dim, hidden_dim: outputs and hidden width of projectors and predictor, transform_layers: of g.
    """

    def __init__(self, backbone, dim=256, hidden_dim=4096, transform_layers=1, instance=False):
        super().__init__()
        self.backbone = backbone
        projectors = {"pixel": mlp(backbone.dim, hidden_dim, dim)}
        if instance:
            projectors["instance"] = mlp(backbone.dim, hidden_dim, dim)
            self.predictor = mlp(dim, hidden_dim, dim)
        self.projector = nn.ModuleDict(projectors)
        self.transform = [nn.Identity(), nn.Conv2d(dim, dim, 1), mlp(dim, dim, dim)][transform_layers]
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
        """x1, x2: views (B, 3, S, S). Returns for both, one view after the other, projections x and transforms g, then
        targets x', (B, L, D) each; with the instance branch also predictions and targets of the images, (B, D).

        The views pass separately: batch-norm statistics are those of one view, in the target too (train mode).
        """
        online, images = [], []
        for x in (x1, x2):
            maps = self.backbone.stages(x)[-1]
            z = self.projector["pixel"](maps)
            online += [cells(z), cells(self.transform(z))]
            if "instance" in self.projector:
                images.append(self.predictor(self.projector["instance"](maps)).mean((2, 3)))
        with torch.no_grad():
            for x in (x1, x2):
                maps = self.target_backbone.stages(x)[-1]
                online.append(cells(self.target_projector["pixel"](maps)))
                if "instance" in self.projector:
                    images.append(self.target_projector["instance"](maps).mean((2, 3)))
        return (*online, *images)


def cells(maps):
    """(B, D, H, W) -> (B, H W, D), row by row."""
    return maps.flatten(2).transpose(1, 2)


def target_momentum(step, total, start):
    """Momentum of the target at step `step`, counted from 0, of `total`: from `start` up to 1 by half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total) + 1) / 2


# ------------------------------------------------------------------------------------------------------- loss
def propagate(x, g, power=2.0):
    """Pixel propagation (equation 3): x, g: (B, L, D) -> y (B, L, D) of length 1."""
    x, g = F.normalize(x, dim=2), F.normalize(g, dim=2)
    similarity = (x @ x.transpose(1, 2)).clamp(min=0)
    similarity = similarity + 1e-6 if power < 1 else similarity  # the slope of a root is infinite at 0
    return F.normalize(similarity**power @ g, dim=2)


def pairs(boxes1, boxes2, side, threshold):
    """A (B, L, L): which of the side x side cells of two crops lie at the same place of the image (equation 1).

    boxes: (B, 7) of each crop: top, left, height, width, height and width of the image, mirrored. Positions are shares
    of the image's sides; columns of a mirrored crop run from right to left.
    """
    centres, diagonals = [], []
    for top, left, high, wide, rows, columns, mirrored in (boxes1.T, boxes2.T):
        place = (torch.arange(side, device=top.device) + 0.5) / side
        across = torch.where(mirrored[:, None] > 0, 1 - place, place)
        y = (top[:, None] + high[:, None] * place) / rows[:, None]
        x = (left[:, None] + wide[:, None] * across) / columns[:, None]
        grid = (y[:, :, None].expand(-1, -1, side), x[:, None].expand(-1, side, -1))
        centres.append(torch.stack(grid, 3).flatten(1, 2))
        diagonals.append((high / rows).hypot(wide / columns) / side)
    distance = torch.cdist(*centres, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance < threshold * torch.maximum(*diagonals)[:, None, None]).to(distance.dtype)


def pixpro_loss(y1, y2, x1, x2, a):
    """Minus twice the mean cosine of pairs, summed over both directions (equation 2), mean over the batch.

    y1, y2: propagated features of the views (B, L, D) of length 1, x1, x2: targets (B, L, D), without gradient; a:
    pairs (B, L, L) of cells of view 1 and of view 2. An image without pairs counts 0. From -4 to 4.
    """
    x1, x2 = (F.normalize(x.detach(), dim=2) for x in (x1, x2))
    count = a.sum((1, 2)) + 1e-6
    forth = ((y1 @ x2.transpose(1, 2)) * a).sum((1, 2)) / count
    back = ((y2 @ x1.transpose(1, 2)) * a.transpose(1, 2)).sum((1, 2)) / count
    return -2 * (forth + back).mean()


def instance_loss(p1, p2, z1, z2):
    """Minus twice the cosine of predictions (B, D) with the targets (B, D) of the other view, summed over both
    directions, mean over the batch; no gradient into the targets. From -4 to 4."""
    p1, p2, z1, z2 = (F.normalize(x, dim=1) for x in (p1, p2, z1.detach(), z2.detach()))
    return -2 * ((p1 * z2).sum(1) + (p2 * z1).sum(1)).mean()


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip))
    backbone = resnet(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    instance = args.instance_weight > 0
    model = run.place(PixPro(backbone, args.dim, args.hidden_dim, args.transform_layers, instance))
    if args.init:
        model.reset_target()  # PixPro: the target starts as a copy
    peak = args.lr * args.batch_size / 256
    optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    best = 4 + 4 * args.instance_weight
    net = run.start(model, optimizer, lr=rule, baseline=f"loss 0 for unrelated views, best -{best:g}")

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = cosine(step, run.total, run.warmup, 1e-6 / peak)
            lr = peak * (0.01 + 0.99 * lr if step < run.warmup else lr)  # PixPro: the warm-up starts at 0.01
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(target_momentum(step, run.total, args.tau))  # PixPro: before the targets of the step
            for batch in batches:
                v1, v2 = batch.views()
                x1, g1, x2, g2, t1, t2, *images = net(v1, v2)
                a = pairs(batch.boxes(0), batch.boxes(1), math.isqrt(x1.shape[1]), args.threshold).to(
                    x1.dtype
                )  # PixPro
                y1, y2 = propagate(x1, g1, args.power), propagate(x2, g2, args.power)
                loss = pixpro_loss(y1, y2, t1, t2, a)
                if instance:
                    loss = loss + args.instance_weight * instance_loss(*images)
                run.backward(loss)
            run.update(optimizer)
            run.log(lr, std=output_std(t1.mean(1)), positives=a.sum((1, 2)).mean())


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
