"""Semantic segmentation: an FCN is trained end to end on a pre-trained ResNet, or a linear head on frozen maps.

    torchrun --nproc_per_node=4 eval_segmentation.py --pretrained runs/densecl/backbone.pt --data /VOCdevkit
    torchrun --nproc_per_node=4 eval_segmentation.py --pretrained runs/densecl/backbone.pt --data /cityscapes
    python eval_segmentation.py --pretrained runs/mae/backbone.pt --data /CamVid --recipe linear --scale 240 180

recipe      head                    crop, images to   batch  steps   optimiser         evaluation
voc12aug    FCN                     512, 2048 x 512   16     20,000  SGD 0.01, 5e-4    whole images
cityscapes  FCN, aligned corners    769, 2049 x 1025  8      40,000  SGD 0.01, 5e-4    windows of 769, 513 apart
linear      batch norm, linear      of the data's     16     20,000  AdamW 1e-3, 1e-4  of the data's

voc12aug, cityscapes: as MMSelfSup 0.11 with MMSegmentation has them (He et al. 2020, MoCo, judge by such networks): the
ResNet keeps a stride of 8 by dilation; the head is two 3x3 convolutions of 512 channels, whose output and input meet in
a third, dropout of 0.1 and a linear layer; a head of one convolution of 256 on layer3 is trained beside it, weight 0.4.
The rate falls by (1 - step / steps)^0.9 to a hundredth, step by step. Batch norm, over all processes, is trained, too.
linear: in minutes. Nothing but a 1x1 convolution is trained, on normalised maps: the last ones of a ResNet (to stride 8
by dilation, which needs no training) or a Swin, or the patch tokens of a ViT, images of any size. Ours, not published.

A training image: both sides by one factor, so that they fit into the rectangle of --scale times a number from 0.5 to 2;
a crop, drawn again up to ten times while one class has 0.75 of its counted pixels or more; mirrored; brightness,
contrast, saturation and hue, each with probability 1/2, contrast before or after the others; padded by 0 and 255.
Evaluation: one scale, logits at the size of the original; IoU per class and their mean from one confusion matrix of
all images, each once, whatever the number of processes.

Data: VOC2012 with SBD (ImageSets/Segmentation/{train,aug}.txt or trainaug.txt, masks of SBD in SegmentationClassAug);
Cityscapes (leftImg8bit/, gtFine/ with labelIds); any set in VOC's layout with its classes in classes.txt, a name per
line. Masks hold numbers of classes, 255 where nothing counts; any other number ends the program.

Published, mIoU of VOC12Aug (MMSelfSup 0.11, ResNet-50): DenseCL 69.47, MoCo v2 67.55, BYOL 67.16, NPID 65.45, Rotation
64.31, SimCLR 64.03, SwAV 63.73, Relative-Loc 63.49, SimSiam 48.35. Ours: not run; CamVid on a CPU in results/.

Deviations: draws belong to the image, not to a process. Widths of the head are multiplied by --width, rates by batch /
batch of the recipe. Colours change in floats instead of integers of 8 bits. Networks with the stem for small images
have a stride of 8 without dilation. The cross-entropy is, as there, divided by all pixels, ignored ones included.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import math
import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import resnet, rng
from common.args import Parser, at_least, below_one, fail, number, positive, probability, toggle
from common.augment import OPERATORS, WholeView, to_device
from common.checkpoint import load_pretrained
from common.crop import fitted
from common.distributed import all_reduce, is_main, print0
from common.files import result_folder
from common.images import BadImage
from common.loader import agree_on_undecodable, eval_share
from common.log import bar, facts, identity, report
from common.optim import upcast
from common.pictures import save_views
from common.run import Run
from common.segmentation import (
    IGNORED,
    PADDING,
    BadMask,
    is_cityscapes,
    nearest,
    open_pairs,
    palette,
    read_ahead,
    sample,
    save_masks,
)

SGD = {"lr": 0.01, "weight_decay": 5e-4}
VOC = {"crop": 512, "scale": [2048, 512], "batch_size": 16, "steps": 20_000, "slide": 0, "align_corners": False} | SGD
CITY = {"crop": 769, "scale": [2049, 1025], "batch_size": 8, "steps": 40_000, "slide": 513, "align_corners": True} | SGD
LINEAR = {"batch_size": 16, "steps": 20_000, "lr": 1e-3, "weight_decay": 1e-4, "align_corners": False}
RECIPES = {"voc12aug": VOC, "cityscapes": CITY, "linear": LINEAR}
RATIO, PLACES, FLIP, COLOURS = 0, 1, 23, 24  # which uniform of an image decides what; there are 11 places, 9 colours


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    run = parser.add_pretrained(lists=False)
    group = parser.add_argument_group("recipe (defaults: the table above)")
    text = "default: that of the data; linear where the network is no ResNet of ours"
    group.add_argument("--recipe", choices=[*RECIPES], help=text)
    group.add_argument("--train-split", help="list of ImageSets/Segmentation (default: trainaug, train and aug, train)")
    group.add_argument("--val-split", default="val", help="list or, of Cityscapes, folder")
    group.add_argument("--classes", help="file with a name per line (default: classes.txt of the set, or VOC's)")
    group.add_argument("--crop", type=at_least(8, high=10_000), help="pixels of a training crop, and of a window")
    text = "longer and shorter side of what images are resized into"
    group.add_argument("--scale", type=at_least(8, high=100_000), nargs=2, metavar=("LONG", "SHORT"), help=text)
    text = "pixels between windows of an evaluation (0: whole images)"
    group.add_argument("--slide", type=at_least(0, high=10_000), help=text)
    text = "share of a crop at which its most frequent class makes it drawn again (1: never)"
    group.add_argument("--class-limit", type=number(float, above=0, high=1), default=0.75, help=text)
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored image")
    group.add_argument("--distort", action=toggle, default=True, help="change colours of training images")
    group.add_argument("--align-corners", action=toggle, help="of maps, when they are resized")
    group.add_argument("--dropout", type=below_one, default=0.1, help="of channels before the last layer of an FCN")
    group.add_argument("--steps", type=positive(int), help="of the schedule")
    group.add_argument("--batch-size", type=positive(int), help="images per step over all processes and --accum")
    group.add_argument("--lr", type=positive(float), help="multiplied by --batch-size / that of the recipe")
    group.add_argument("--min-lr", type=at_least(0, float), help="at the end (default: a hundredth; linear: 0)")
    group.add_argument("--weight-decay", type=at_least(0, float))
    run.add_argument("--val-every", type=at_least(0), default=0, help="steps between evaluations (0: at the end)")
    parser.add_max_bad(run.add_argument)
    parser.add_loop(run)
    data = next(action for action in parser._actions if action.dest == "data")
    data.help = "folder of VOC2012, Cityscapes, or a set in VOC's layout"
    return parser.parse_args(argv)


def complete(args, backbone, meta):
    """The arguments with everything that was left out filled in."""
    ours, city = isinstance(backbone, resnet.ResNet), is_cityscapes(args.data)
    if not ours and not hasattr(backbone, "maps"):
        fail(f"{meta['arch']} has no maps that are read here: choose a ResNet of ours, a ViT or a Swin")
    if not ours and args.recipe not in (None, "linear"):
        fail(f"--recipe {args.recipe} is for ResNets of ours: choose linear for {meta['arch']}")
    recipe = args.recipe or (("cityscapes" if city else "voc12aug") if ours else "linear")
    usual = (CITY if city else VOC) | LINEAR if recipe == "linear" else RECIPES[recipe]
    known = {k: meta[k] for k in ("arch", "width", "image_size", "channels")} | {"epochs": 1, "warmup_epochs": 0}
    known |= {"recipe": recipe, "out": str(result_folder(args.pretrained, args.out))}
    args = args.replace(**usual | {k: v for k, v in vars(args).items() if v is not None} | known)
    args.factor = args.batch_size / usual["batch_size"]
    args.min_lr = (0 if recipe == "linear" else args.lr / 100) if args.min_lr is None else args.min_lr
    if args.min_lr > args.lr:
        fail(f"--min-lr {args.min_lr:g} is larger than --lr {args.lr:g}")
    if args.slide > args.crop:
        fail(f"--slide {args.slide} would leave gaps between windows of --crop {args.crop}: choose at most that")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def varied(mask, limit):
    """Has the mask two classes or more, none of them with the share `limit` of the pixels that count, or more?"""
    counts = np.bincount(mask.numpy().ravel(), minlength=256)[:IGNORED]
    return limit == 1 or ((counts > 0).sum() > 1 and counts.max() < limit * counts.sum())


@dataclasses.dataclass(frozen=True)
class Crop(WholeView):
    """A random crop of an image and its mask, resized, mirrored and padded: uint8 (channels + 1, size, size)."""

    scale: tuple = (2048, 512)
    limit: float = 0.75
    flip: float = 0.5
    batched = False

    def crop(self, image, u):
        ratio = 0.5 + 1.5 * u[RATIO]
        size = fitted(*image.shape[1:], *sorted(int(side * ratio) for side in self.scale))
        rows, columns = (min(self.size, side) for side in size)
        for place in u[PLACES:FLIP].reshape(11, 2):  # the eleventh is taken whatever is there
            box = [int(x * (side - n + 1)) for x, side, n in zip(place, size, (rows, columns), strict=True)]
            mask = nearest(image[-1], size, *box, rows, columns)
            if varied(mask, self.limit):
                break
        part = torch.cat([sample(image[:-1], size, *box, rows, columns), mask[None]])
        part = part.flip(2) if u[FLIP] < self.flip else part
        whole = torch.zeros(len(image), self.size, self.size, dtype=torch.uint8)
        whole[-1] = PADDING
        whole[:, :rows, :columns] = part
        return whole


def saturate(x, amount):
    """The saturation of HSV, at most 1, times a factor; x: RGB (B, 3, H, W)."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    most = value / (value - low).clamp(min=torch.finfo(x.dtype).tiny)
    return value - (value - x) * torch.minimum(amount.expand_as(most), most)


CHANGES = {"brightness": lambda x, a: (x + a).clamp_(0, 1), "contrast": lambda x, a: (x * a).clamp_(0, 1)}
CHANGES |= {"saturation": saturate, "hue": OPERATORS["hue"]}


def distort(x, u):
    """Changes colours of images (B, C, H, W) in [0, 1], in place. u: (B, 9) uniforms, whether and how much for
    brightness, contrast, saturation and hue in turn, and whether contrast comes second instead of last."""
    chosen, first = u[:, :8:2] < 0.5, u[:, 8] < 0.5
    shift = (np.floor(36 * u[:, 7]) - 18) / 180  # in steps of 2 degrees, from -36 to 34
    contrast, saturation = 0.5 + u[:, 3], 0.5 + u[:, 5]
    plan = [("brightness", chosen[:, 0], (2 * u[:, 1] - 1) * 32 / 255), ("contrast", chosen[:, 1] & first, contrast)]
    if x.shape[1] == 3:
        plan += [("saturation", chosen[:, 2], saturation), ("hue", chosen[:, 3], shift)]
    for name, mask, amount in [*plan, ("contrast", chosen[:, 1] & ~first, contrast)]:
        rows = np.flatnonzero(mask)
        if len(rows):
            at, amount = (to_device(torch.from_numpy(v), x.device) for v in (rows, amount[rows]))
            x[at] = CHANGES[name](x[at], amount.to(x.dtype).view(-1, 1, 1, 1))
    return x


def normalise(x, view):
    """Images (B, C, H, W) in [0, 1] as a network takes them."""
    mean, std = (torch.tensor(v[: x.shape[1]], dtype=x.dtype, device=x.device) for v in (view.mean, view.std))
    return ((x - mean[:, None, None]) / std[:, None, None]).contiguous(memory_format=torch.channels_last)


def inputs(batch, args):
    """What a step takes: images (B, C, S, S), zeros where they are padded, and labels (B, S, S) int64."""
    (crops,), (view,), (u,) = batch.images, batch.specs, batch.draws
    labels = crops[:, -1].long()
    x = crops[:, :-1].to(batch.dtype) / 255
    x = distort(x, u[:, COLOURS : COLOURS + 9]) if args.distort else x
    x = normalise(x, view) * (labels != PADDING)[:, None]
    return x, labels.masked_fill_(labels == PADDING, IGNORED)


# ------------------------------------------------------------------------------------------------------ model
class Mean(nn.Module):
    """The mean of 2x2 pixels of a dilated map, `gap` apart; beyond its last row and column lie zeros."""

    def __init__(self, gap):
        super().__init__()
        self.gap = gap

    def forward(self, x):
        g, x = self.gap, F.pad(x, (0, self.gap, 0, self.gap))
        return (x[..., :-g, :-g] + x[..., g:, :-g] + x[..., :-g, g:] + x[..., g:, g:]) / 4


def dilate(backbone):
    """Takes the strides of layer3 and layer4 away; the convolutions after a stride that has gone look as far apart as
    before. At every fourth row and column layer4 gives what it gave, and the same for shifted images between."""
    gap = 1
    for layer in () if backbone.small else (backbone.layer3, backbone.layer4):
        for name, module in [*layer.named_modules()]:
            if isinstance(module, nn.Conv2d):
                apart = gap if module.stride[0] == 2 else 2 * gap
                module.stride = (1, 1)
                if module.kernel_size[0] > 1:
                    module.dilation = module.padding = (apart, apart)
            elif isinstance(module, resnet.Pool):
                layer.set_submodule(name, Mean(gap))
        gap *= 2
    return backbone


class FCN(nn.Module):
    """Maps (B, inputs, h, w) -> logits (B, classes, h, w). convs: 3x3 convolutions before; joined: their output and the
    maps meet in one more."""

    def __init__(self, inputs, dim, classes, convs=2, joined=True):
        super().__init__()
        self.convs = nn.Sequential(*(self._conv(inputs if i == 0 else dim, dim) for i in range(convs)))
        self.join = self._conv(inputs + dim, dim) if joined else None
        self.classify, self.dim = nn.Conv2d(dim, classes, 1), dim
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    @staticmethod
    def _conv(inputs, outputs):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x, keep=None):
        """keep: None, or factors of the channels (B, dim)."""
        y = self.convs(x)
        y = y if self.join is None else self.join(torch.cat([x, y], 1))
        return self.classify(y if keep is None else y * keep[:, :, None, None])


class Segmenter(nn.Module):
    """Images (B, C, H, W) -> logits of their maps, (B, classes, h, w): a tuple of one or, of an FCN in training, two.
    draws: uniforms per sample for dropout."""

    def __init__(self, backbone, classes, args):
        super().__init__()
        self.is_resnet, self.linear = isinstance(backbone, resnet.ResNet), args.recipe == "linear"
        self.backbone, self.align, self.dropout = backbone, args.align_corners, args.dropout
        self.multiple = 1 if self.is_resnet else backbone.patch_size
        if self.is_resnet:
            dilate(backbone)
        if self.linear:
            backbone.requires_grad_(False)
            norm, classify = nn.BatchNorm2d(backbone.dim, affine=False), nn.Conv2d(backbone.dim, classes, 1)
            self.head, self.draws = nn.Sequential(norm, classify), 0
            nn.init.normal_(classify.weight, std=0.01)
            nn.init.zeros_(classify.bias)
        else:
            dims = [max(1, round(dim * args.width)) for dim in (512, 256)]
            self.head = FCN(backbone.dim, dims[0], classes)
            self.auxiliary = FCN(backbone.layer4[0].conv1.in_channels, dims[1], classes, 1, False)
            self.draws = sum(dims)

    def train(self, mode=True):
        """A frozen backbone keeps the statistics of its batch norm."""
        super().train(mode)
        if self.linear:
            self.backbone.eval()
        return self

    def maps(self, x):
        """Those of the last two stages of a ResNet; else the last one, of images padded to whole patches."""
        if self.is_resnet:
            return self.backbone.stages(x)[-2:]
        right, below = (-side % self.multiple for side in (x.shape[3], x.shape[2]))
        return [self.backbone.maps(F.pad(x, (0, right, 0, below)))]

    def forward(self, x, u=None):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.linear):
            maps = self.maps(x)
        if self.linear:
            return (self.head(maps[-1]),)
        if u is None:
            return (self.head(maps[1]),)
        keep = ((u >= self.dropout).to(x.dtype) / (1 - self.dropout)).split([self.head.dim, self.auxiliary.dim], 1)
        return self.head(maps[1], keep[0]), self.auxiliary(maps[0], keep[1])

    def resize(self, logits, shape):
        """Logits of maps at the size (H, W) of their images."""
        whole = [side + -side % self.multiple for side in shape]
        logits = F.interpolate(upcast(logits), whole, mode="bilinear", align_corners=self.align)
        return logits[..., : shape[0], : shape[1]]


# ------------------------------------------------------------------------------------------------------- loss
def segmentation_loss(logits, labels):
    """Cross-entropy of logits (B, classes, H, W) and labels (B, H, W), divided by all pixels, ignored ones included."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


# ------------------------------------------------------------------------------------------------- evaluation
def windows(height, width, size, stride):
    """Top, left, bottom, right of windows that cover an image; the last ones reach back where they would leave it."""
    tops, lefts = (range(0, max(1, side - size + stride), stride) for side in (height, width))
    ends = [
        [(max(0, min(at + size, side) - size), min(at + size, side)) for at in starts]
        for starts, side in ((tops, height), (lefts, width))
    ]
    return [(top, left, bottom, right) for top, bottom in ends[0] for left, right in ends[1]]


@torch.no_grad()
def predict(run, image, args):
    """The class of each pixel of an image, uint8 (C, H, W) -> int64 (H, W) on the device."""
    model, view = run.model, run.loader.specs[0]
    x = sample(image, fitted(*image.shape[1:], *sorted(args.scale))).to(run.device, run.dtype)
    x = normalise(x[None] / 255, view)
    boxes = [(0, 0, *x.shape[2:])]
    if args.slide:
        boxes = windows(*x.shape[2:], args.crop, args.slide)
    total, count = 0, x.new_zeros(x.shape[2:])
    for top, left, bottom, right in boxes:
        with run.amp:
            (logits,) = model(x[:, :, top:bottom, left:right])
        logits = model.resize(logits, (bottom - top, right - left))
        total = logits.new_zeros(*logits.shape[:2], *x.shape[2:]) if isinstance(total, int) else total
        total[:, :, top:bottom, left:right] += logits
        count[top:bottom, left:right] += 1
    total = F.interpolate(total / count, image.shape[1:], mode="bilinear", align_corners=args.align_corners)
    return total[0].argmax(0)


def confusion(labels, predicted, classes):
    """How many pixels that count have class i and are taken for class j: int64 (classes, classes)."""
    kept = labels < classes
    return torch.bincount(labels[kept] * classes + predicted[kept], minlength=classes**2).view(classes, classes)


def scores(matrix):
    """Means in percent, and the IoU of each class, None for one that neither is there nor is predicted."""
    matrix = matrix.double().cpu().numpy()
    right, there = matrix.diagonal(), matrix.sum(1)
    union = there + matrix.sum(0) - right
    ious = [100 * r / n if n else None for r, n in zip(right, union, strict=True)]
    recalls = [100 * r / n for r, n in zip(right, there, strict=True) if n]
    means = {"miou": np.mean([iou for iou in ious if iou is not None] or [0.0])}
    means |= {"pixel_accuracy": 100 * right.sum() / max(1, there.sum()), "mean_accuracy": np.mean(recalls or [0.0])}
    ious = [iou if iou is None else round(float(iou), 2) for iou in ious]
    return {k: round(float(v), 3) for k, v in means.items()}, ious


def evaluate(run, test, args):
    """The confusion matrix of a set. Each process takes its share of the images; none is kept."""
    classes, (first, last) = len(test.classes), eval_share(len(test), 1)
    total = torch.zeros(classes, classes, dtype=torch.int64, device=run.device)
    run.model.eval()
    for pair in bar(read_ahead(test, range(first, last), args.workers), "evaluation", last - first):
        predicted = predict(run, pair[:-1], args)
        total += confusion(to_device(pair[-1].long(), run.device), predicted, classes)
    run.model.train()
    return all_reduce(total)


def validate(run, test, args):
    """IoUs every --val-every steps and at the end, to which a run that continues adds its own."""

    def due(step):
        return step and (step >= run.last or (args.val_every and step % args.val_every == 0))

    history = run.more["history"] = [h for h in run.more["history"] if due(h["step"])]
    if due(run.step) and run.step not in [h["step"] for h in history]:
        means, ious = scores(evaluate(run, test, args))
        history.append({"step": run.step, **means, "iou": ious})
        run.note(**means)
        run.save()


def save_overlays(run, test, args, count=8):
    """segmentation.png: some test images, their truth and what is predicted."""
    rows = []
    run.model.eval()
    for i in sorted({len(test) * k // count for k in range(count)}):
        pair = test[i][0]
        rows.append((pair[:-1].numpy(), pair[-1].numpy(), predict(run, pair[:-1], args).cpu().numpy()))
    run.model.train()
    save_masks(f"{args.out}/segmentation.png", rows, test.classes)


# --------------------------------------------------------------------------------------------------- training
def poly(step, total, peak, final, power=0.9):
    """The learning rate at a step, counted from 0."""
    return (peak - final) * (1 - step / total) ** power + final


def train(args):
    backbone, meta = load_pretrained(args)
    args = complete(args, backbone, meta)
    run = Run(args, "segmentation")
    data, test = open_pairs(args.data, args.train_split, args.val_split, meta["channels"], args.classes)
    classes, same = len(data.classes), identity(args, backbone, data, test)
    print0(f"recipe      {args.recipe}; {len(test):,} test images, {classes} classes: {', '.join(data.classes)}")
    statistics = {"mean": (*meta["mean"], 0.0), "std": (*meta["std"], 1 / 255)}  # those of the masks leave them alone
    how = {"scale": tuple(args.scale), "limit": args.class_limit, "flip": args.flip}
    run.open([Crop(args.crop, **how, **statistics)], data=data)
    run.total, args.epochs = args.steps, math.ceil(args.steps / run.epoch_steps)

    model = run.place(Segmenter(backbone, classes, args)).train()
    peak, final = args.lr * args.factor, args.min_lr * args.factor
    trained, decay = [p for p in model.parameters() if p.requires_grad], args.weight_decay
    sgd = {"momentum": 0.9, "weight_decay": decay}
    optimizer = torch.optim.AdamW(trained, peak, weight_decay=decay) if model.linear else None
    optimizer = optimizer or torch.optim.SGD(trained, peak, **sgd)
    rates = f"{args.lr:g} x {args.factor:g} (batch {args.batch_size} / {args.batch_size / args.factor:g}) = {peak:.4g},"
    lines = {"lr": f"{rates} to {final:.4g} at step {args.steps:,}"}
    lines["crops"] = f"{args.crop} px of images in {' x '.join(map(str, args.scale))} times 0.5 to 2"
    run.more = {"history": [], "meta": meta, "backbone_prefix": "backbone.", "same": same}
    net = run.start(model, optimizer, **lines)

    validate(run, test, args)  # of a run that was stopped just before it
    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            validate(run, test, args)
            lr = poly(step, run.total, peak, final)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for micro, batch in enumerate(batches):
                x, labels = inputs(batch, args)
                if step == 0 and micro == 0 and is_main():  # instead of the picture without colours
                    plain = SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3)
                    masks = torch.from_numpy(palette())[labels.cpu()].permute(0, 3, 1, 2) / 255
                    seen = SimpleNamespace(views=lambda x=x, m=masks: [x, m], indices=batch.indices)
                    seen.specs = [SimpleNamespace(mean=meta["mean"], std=meta["std"]), plain]
                    save_views(f"{args.out}/segmentation_views.png", seen, data)
                u = batch.uniforms(model.draws, rng.DROPOUT) if model.draws else None
                losses = [segmentation_loss(model.resize(z, labels.shape[1:]), labels) for z in net(x, u)]
                run.backward(sum(weight * loss for weight, loss in zip((1, 0.4), losses, strict=False)))
            run.update(optimizer)
            run.log(lr)
        validate(run, test, args)

    if is_main():
        save_overlays(run, test, args)
    agree_on_undecodable(data, run.device, run.loader.pool.bad)
    last = run.more["history"][-1]
    result = facts(args, meta, data, test) | {k: getattr(args, k) for k in ("recipe", "steps", "batch_size", "crop")}
    result |= {k: getattr(args, k) for k in ("scale", "slide", "lr", "min_lr", "weight_decay", "seed")}
    ious = dict(zip(data.classes, last["iou"], strict=True))
    return report(args, "segmentation", result | {**last, "iou": ious})


def main(args):
    try:
        return train(args)
    except (BadMask, BadImage) as error:  # from whichever process met it
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
