"""OBoW: Online Bag-of-Visual-Words Generation for Unsupervised Representation Learning (Gidaris et al., CVPR 2021,
arXiv 2012.11552).

A teacher, a moving average of the student, sees the central crop of an image without augmentation. Cells x of its maps
are assigned to K visual words v, and the largest assignments over the cells make the image's bag of words y. From small
crops the student has to predict y, by a classifier W = g(v) generated from the words, |W_v| = 1:
q = softmax_v(-|x - v|^2 / delta),  y = max_x q / sum_v max_x q,  L = KL(y || softmax(kappa W f(crop))).
L is the mean over the maps of layer3 and layer4 and over crops of a kind, and the sum over both kinds: random crops and
patches of a 3 x 3 grid. Words are averages of 3 x 3 cells, one of each image at a random place, the latest K of them.
delta = mu / --inv-delta, mu the moving average of the mean squared distance of a cell to the nearest word.

    torchrun --nproc_per_node=8 obow.py --data /imagenet
    python obow.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, 200 epochs, linear top-1: 73.8 (official README). Ours: not run. For a ResNet-18 and
260 images per class (official): --arch resnet18 --epochs 80 --warmup-epochs 0 --batch-size 128 --lr 0.1 --kappa 5
--inv-delta 10 --weight-decay 5e-4; "vanilla": --batch-size 256 --lr 0.05 --levels 1 --crops 1 --patches 0 instead.

In the log, words3 and words4 are the perplexity of the mean bag, by layer: thousands of 8192 words should be in use;
per_image3 and per_image4 that of single bags: tens to hundreds. When bags become alike, both are equal, and the loss
tends to 0: it is no measure of progress, k-NN is.

Crops and patches go with --image-size: 160 and 96 px at 224. Of maps of 5 x 5 cells or more the border does not count.
Small images (our choice; 32 px, maps of 8 x 8 and 4 x 4): --image-size 32 --arch resnet18 --batch-size 128 --lr 0.1
--weight-decay 5e-4 --kappa 5 --inv-delta 10.

Memory: layer3 has 144 cells, whose distances to 8192 words are 4.7 MB per image; above 256 MB they are computed in
parts, twice. Words take 100 MB, and g has 29 M parameters, more than the ResNet-50.

Deviations from the official code: no linear classifier is trained along on the teacher's features (k-NN judges the
student); the learning rate follows its schedule per step; bf16 on CUDA, distances and the loss in fp32; distances that
rounding makes negative are 0; images of at most 64 pixels are not blurred and get a 3x3 stem. With --accum, words are
replaced at the end of the step, and mu moves a part at each micro-batch.
To hack: copy this file. What is OBoW: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, fail, number, positive, probability, share, width
from common.augment import EvalView, View
from common.batchnorm import sync_batch_norm
from common.distributed import gather, process_mean
from common.features import output_std
from common.optim import cosine, upcast
from common.resnet import SMALL, resnet
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("OBoW")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--crops", type=positive(int), default=2, help="random crops per image")
    group.add_argument("--crop-min", type=share, default=0.08, help="smallest share of the image area in a crop")
    group.add_argument("--crop-max", type=share, default=0.6, help="largest share of the image area in a crop")
    group.add_argument("--patches", type=at_least(0, high=9), default=5, help="of a 3 x 3 grid, per image")
    group.add_argument("--grid-min", type=share, default=0.6, help="smallest share of the image area in the grid")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--levels", type=number(int, 1, 2), default=2, help="1: words of layer4 only")
    group.add_argument("--words", type=at_least(2), help="K of each level (default: 8192, less for few images)")
    group.add_argument("--kappa", type=positive(float), default=8.0, help="length of the weights of the predictions")
    group.add_argument("--inv-delta", type=positive(float), default=15.0, help="mu / delta: sharpness of assignments")
    group.add_argument("--alpha", type=number(float, 0, 1), default=0.99, help="teacher's momentum at the start")
    group.add_argument("--epochs", type=positive(int), default=200)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=256, help="images per step over all processes and --accum"
    )
    group.add_argument(
        "--lr", type=positive(float), default=0.03, help="per 256 images: multiplied by batch-size / 256"
    )
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = size = args.image_size or max(32, default_size(args.data))
    if size <= 16:  # stride 8; larger images of stride 32 have more than 64 pixels
        parser.error(f"--image-size {size} leaves less than the 3 x 3 cells in the last map that make a word: try 24")
    if args.crop_min > args.crop_max:
        parser.error(f"--crop-min {args.crop_min} exceeds --crop-max {args.crop_max}")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
@dataclasses.dataclass(frozen=True)
class Central(EvalView, View):
    """The central crop of evaluations, mirrored or not: that of the teacher."""


def augmentation(size, crops=2, area=(0.08, 0.6), patches=True, grid_min=0.6, flip=0.5):
    """The teacher's view, the random crops and, for patches, the image with the grid, not blurred (official code)."""
    crop = View(
        size=sizes(size)[0],
        area=area,
        flip=flip,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5 if size > SMALL else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    grid = dataclasses.replace(crop, size=sizes(size)[1], area=(grid_min, 1.0), blur_p=0.0)
    return [Central(size=size, flip=flip), *[crop] * crops, *[grid] * bool(patches)]


def sizes(size):
    """Pixels of a crop, of the image with the grid, of its patches and of their jitter, by --image-size."""
    return [round(size * part / 224) for part in (160, 256, 96, 24)]


def places(u, size, patch, jitter, count):
    """Where patches begin in an image of size x size pixels: `count` of the cells of a 3 x 3 grid, in random order.

    u: uniforms (B, 27), for each cell down and across, then one that ranks it. Returns top and left, (B, count).
    """
    offsets = (u[:, :18] * (jitter + 1)).long().unflatten(1, (9, 2))
    chosen = u[:, 18:].argsort(1)[:, :count]
    cells, apart = torch.arange(9, device=u.device), (size - patch - jitter) // 2
    top, left = cells // 3 * apart + offsets[:, :, 0], cells % 3 * apart + offsets[:, :, 1]
    return top.gather(1, chosen), left.gather(1, chosen)


def cut(x, top, left, patch):
    """Patches of images (B, C, S, S) at top and left (B, N), the first one of all images first: (N B, C, P, P)."""
    pixels = torch.arange(patch, device=x.device)
    rows, columns = top.T[:, :, None, None] + pixels[:, None], left.T[:, :, None, None] + pixels
    images = torch.arange(len(x), device=x.device).view(1, -1, 1, 1)
    return x.permute(0, 2, 3, 1)[images, rows, columns].flatten(0, 1).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------ model
def inner(x):
    """A map (B, C, h, w) without its border, where 3 x 3 cells remain."""
    return x[:, :, 1:-1, 1:-1] if min(x.shape[2:]) >= 5 else x


class Vocabulary(nn.Module):
    """K visual words of one level, a queue, and the layers g that generate a classifier from them (section 3.4). Their
    batch norm sees all words, the same ones on every process."""

    def __init__(self, channels, dim, words):
        super().__init__()
        hidden = [nn.Linear(channels, 2 * dim, bias=False), nn.BatchNorm1d(2 * dim), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*hidden, nn.Linear(2 * dim, dim))
        self.register_buffer("words", torch.randn(words, channels).relu())
        self.register_buffer("oldest", torch.tensor(0))  # row that the next word replaces
        self.register_buffer("mu", torch.tensor(0.5))

    def forward(self):
        """Weights (K, dim) of length 1."""
        return F.normalize(upcast(self.layers(F.normalize(self.words, dim=1))), dim=1)


class OBoW(nn.Module):
    """Student (the backbone), teacher of the same kind, and a vocabulary for each of the last `levels` maps."""

    def __init__(self, backbone, levels=2, words=8192, kappa=8.0):
        super().__init__()
        self.backbone, self.kappa = backbone, kappa
        stages = [backbone.layer3, backbone.layer4][-levels:]
        convs = [[m for m in stage.modules() if isinstance(m, nn.Conv2d)] for stage in stages]
        self.levels = nn.ModuleList(Vocabulary(c[-1].out_channels, backbone.dim, words) for c in convs)
        self.reset_target()

    def reset_target(self):
        """Makes the teacher a copy of the student as it is now, without gradient."""
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum):
        """teacher <- momentum * teacher + (1 - momentum) * student, for parameters, not batch-norm statistics."""
        torch._foreach_lerp_([*self.target_backbone.parameters()], [*self.backbone.parameters()], 1 - momentum)

    def forward(self, x, *kinds):
        """x: central crops (B, 3, S, S); kinds: crops of one size (V B, 3, s, s), which pass together. Returns features
        of the first kind (V B, D), the teacher's map of each level, and logits (levels, V B, K) of each kind."""
        with torch.no_grad():
            maps = [inner(m) for m in self.target_backbone.stages(x)[-len(self.levels) :]]
        f = [self.backbone(crops) for crops in kinds]
        weights = torch.stack([vocabulary() for vocabulary in self.levels])
        with torch.autocast(x.device.type, enabled=False):
            return f[0].detach(), *maps, *(self.kappa * upcast(each) @ weights.mT for each in f)

    @torch.no_grad()
    def targets(self, maps, inv_delta, momentum=0.99):
        """Bags of words (levels, B, K) of the teacher's maps. Moves mu."""
        found = [bow_targets(x, v.words, v.mu, inv_delta, momentum) for x, v in zip(maps, self.levels, strict=True)]
        for level, (_, mu) in zip(self.levels, found, strict=True):
            level.mu.copy_(mu)
        return torch.stack([bags for bags, _ in found])

    @torch.no_grad()
    def pick(self, maps, u):
        """New words, one of each image of all processes, in their order: (W B, C) per level, the mean of 3 x 3 cells of
        its map, at a place that the uniforms u (B, levels) choose."""
        means, rows = [F.avg_pool2d(x, 3, stride=1).flatten(2) for x in maps], torch.arange(len(u), device=u.device)
        return [gather(x[rows, :, (u[:, i] * x.shape[2]).long()]) for i, x in enumerate(means)]

    @torch.no_grad()
    def enqueue(self, *parts):
        """Replaces the oldest words, in place, by those that `pick` gave for each micro-batch; they divide K."""
        for level, *new in zip(self.levels, *parts, strict=True):
            rows = torch.arange(sum(map(len, new)), device=level.words.device)
            level.words[(level.oldest + rows) % len(level.words)] = torch.cat(new)
            level.oldest.add_(len(rows)).remainder_(len(level.words))  # on the device: reading it would wait


def target_momentum(step, total, start):
    """Momentum of the target at step `step`, counted from 0, of `total`: from `start` up to 1 by half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total) + 1) / 2


# ------------------------------------------------------------------------------------------------------- loss
@torch.no_grad()
def bow_targets(x, words, mu, inv_delta=15.0, momentum=0.99, most=2**26):
    """Bags of words of maps x (B, C, h, w), and mu after them.

    words: (K, C). mu: scalar tensor, the average so far of the mean squared distance of a cell to the nearest word; it
    first moves to that of these maps, on all processes. Then cells are assigned, softmax(-distance inv_delta / mu) over
    words; bags are maxima over cells, scaled to a sum of 1: (B, K). most: distances that exist at a time, unless one
    image has more.
    """
    squares, bags = words.square().sum(1), []

    def distances(cells):
        d = torch.addmm(squares, cells.flatten(0, 1), words.T, alpha=-2)
        return d.add_(cells.square().sum(2).view(-1, 1)).clamp_(min=0)

    cells = x.permute(0, 2, 3, 1).flatten(1, 2)
    parts = cells.split(max(1, most // (cells.shape[1] * len(words))))
    nearest = [(d := distances(part)).amin(1, keepdim=True) for part in parts]
    mu = momentum * mu + (1 - momentum) * process_mean(torch.cat(nearest).mean())
    for part, least in zip(parts, nearest, strict=True):
        d = d if len(parts) == 1 else distances(part)
        codes = d.sub_(least).mul_(-inv_delta / mu.clamp(min=1e-12)).clamp_(min=-69).exp_()  # 1e-30: underflow is slow
        bags.append(codes.div_(codes.sum(1, keepdim=True)).unflatten(0, (len(part), -1)).amax(1))
    return F.normalize(torch.cat(bags), p=1, dim=1), mu


def bow_loss(logits, bags):
    """KL(bag || softmax(logits)): mean over levels, crops of a kind and images, sum over kinds; no gradient into bags.

    logits: of each kind (levels, V B, K), the first crop of all images first; bags: (levels, B, K). Equal logits
    give kinds x (ln K - entropy of the bags).
    """
    bags = bags.detach()
    own = torch.xlogy(bags, bags).sum(2).mean()
    kinds = [F.log_softmax(each, dim=2).unflatten(1, (-1, bags.shape[1])) for each in logits]
    return sum(own - (bags[:, None] * logs).sum(3).mean() for logs in kinds)


def perplexities(bags):
    """exp(entropy), how many words are in use: in the mean bag of all processes, and the mean of that of single bags.
    bags: (levels, B, K). Returns (levels,) twice; equal values mean that all images have the same bag."""
    together, single = ((-torch.xlogy(p, p).sum(-1)).exp() for p in (process_mean(bags.mean(1)), bags))
    return together, single.mean(1)


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    area, size = (args.crop_min, args.crop_max), args.batch_size
    data = run.open(augmentation(args.image_size, args.crops, area, args.patches, args.grid_min, args.flip))
    words = args.words or max(1, min(8192 if args.image_size > SMALL else 1024, len(data) // 8) // size) * size
    if words % size:
        fail(f"--words {words} is not divisible by --batch-size {size}: try {max(1, round(words / size)) * size}")
    backbone = resnet(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(OBoW(backbone, args.levels, words, args.kappa), sync=False)
    for network in (model.backbone, model.target_backbone):  # OBoW: not the batch norm of the vocabularies
        sync_batch_norm(network, run.loader.local)
    if args.init:
        model.reset_target()  # OBoW: the teacher starts as a copy
    peak, (crop, grid, patch, jitter) = args.lr * size / 256, sizes(args.image_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    lines = {"lr": f"{args.lr} x {size}/256 = {peak:.4g}", "teacher": f"alpha {args.alpha} to 1"}
    lines |= {"words": f"{words:,} per level", "crops": f"{args.crops} of {crop} px"}
    lines["crops"] += f", {args.patches} of 9 patches of {patch} px from {grid} px, jitter {jitter} px"
    net = run.start(model, optimizer, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=0.001)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(target_momentum(step, run.total, args.alpha))  # OBoW: before the teacher's pass
            new = []
            for batch in batches:
                (x, *crops), u = batch.views(), batch.uniforms(29)
                kinds = [torch.cat(crops[: args.crops])]
                if args.patches:
                    kinds += [cut(crops[-1], *places(u[:, 2:], grid, patch, jitter, args.patches), patch)]
                f, *outputs = net(x, *kinds)
                maps, logits = outputs[: args.levels], outputs[args.levels :]
                bags = model.targets(maps, args.inv_delta, 0.99 ** (1 / args.accum))  # OBoW
                run.backward(bow_loss(logits, bags))  # OBoW
                new.append(model.pick(maps, u[:, : args.levels]))
            run.update(optimizer)
            model.enqueue(*new)  # OBoW: once bags and predictions of the step have used the old words
            used = {}
            if run.due:
                together, single = perplexities(bags)
                names = [f"{what}{level}" for what in ("words", "per_image") for level in (3, 4)[-args.levels :]]
                used = dict(zip(names, [*together, *single], strict=True))
                if (step + 1) * size > 2 * words and (together / single).min().item() < 1.02:
                    run.warn("words", "all images have the same bag (collapse): lower --lr, or raise --inv-delta")
            run.log(lr, std=output_std(f), **used)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
