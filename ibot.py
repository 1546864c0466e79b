"""iBOT: Image BERT Pre-Training with Online Tokenizer (Zhou et al., ICLR 2022, arXiv 2111.07832), for ViTs.

DINO, and masked patches: of half of the large crops the student sees some patches as a mask token, in blocks, and tells
of each of them what the teacher, which sees the whole crop, says of it. Of a crop (by the class token) and of a patch n
a network says a distribution over K outputs, by one head. L = C + M,
C = mean over large crops i = 1, 2 and crops v != i of  -sum_k P_t(x_i)[k] log P_s(x_v)[k]  (DINO's, x_1, x_2 masked),
M = mean over i = 1, 2 of the mean over the masked patches of  -sum_k P_t(x_i)[n, k] log P_s(x_i)[n, k]  (none: 0),
P_s = softmax(s / T_s), P_t = softmax((t - c) / T_t), with one centre c for crops and one for patches.
The teacher is a moving average of the student, w_t <- m w_t + (1 - m) w_s.

    torchrun --nproc_per_node=8 ibot.py --data /imagenet
    torchrun --nproc_per_node=8 ibot.py --data /imagenet --arch vit_base
    torchrun --nproc_per_node=8 ibot.py --data /photos --init ibot_vits16_checkpoint.pth --epochs 20

The default is the official ViT-S/16: 1024 images per step, there on 16 GPUs. Of a masked crop a share of the patches,
uniform in --mask-ratio, is to be masked. A block has (side of the grid / 3)^2 patches or more, if so many are missing;
when none that fits is found, the mask stays a little short. --mask-shape random masks single patches.

Published, ImageNet, k-NN, linear and fine-tuned top-1 (official README): ViT-S/16, these 800 epochs: 75.2, 77.9 and
82.3; ViT-B/16 77.1, 79.5 and 84.0, with random masks 77.3, 79.8 and 84.1; ViT-L/16 78.0, 81.0 and 84.8. Ours: not run.

Small images, small batches (nothing published by the authors): --out-dim 1024 to 4096, --teacher-momentum 0.9995 for
256 images and fewer with long runs. Up to 64 pixels small crops have half the size and cover 0.2 to 0.4 of the image.
A loss that stays at ln K means equal outputs: lower --teacher-temp (0.02), raise --freeze-epochs or lower --lr. A rise
when the last layer thaws is usual.

What is saved, and judged by k-NN, is the teacher. --init FILE goes on from a backbone, and from the head of the teacher
in the same file if it is there and has this shape; a line says which. The mask token starts at zero.

Deviations from the official code: the warm-up of the rate reaches its peak one step later; the centres are updated once
per step, also with --accum, by the mean over its micro-batches; positions are interpolated to the exact grid of a crop
(there: by a factor with 0.1 added); bf16 on CUDA (there: fp16); losses, norms and the last layer's input stay in single
precision; --head-norm sees only the masked ones of the student's patches; images of at most 64 pixels are not blurred,
those of at most 128 have smaller patches. Left out: a head of its own for patches, Swins, masks from some epoch on.
To hack: copy this file. What is iBOT: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import dataclasses
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, positive, probability, share, toggle
from common.args import image_size as pixels
from common.args import width as multiplier
from common.augment import View, to_device
from common.checkpoint import load_file
from common.distributed import all_reduce, print0, process_mean
from common.layouts import containers
from common.masks import block_masks
from common.optim import cosine, param_groups, upcast
from common.run import Run
from common.vit import ARCHS, default_patch, path_factors, vit

# -------------------------------------------------------------------------------------------------- arguments
SCALES = {"global_scale": [0.25, 1.0], "local_scale": [0.05, 0.25]}
SMALL = {"global_scale": [0.4, 1.0], "local_scale": [0.2, 0.4]}  # of images of at most 64 pixels


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    add = parser.add_argument_group("iBOT").add_argument
    add("--global-scale", type=share, nargs=2, help="least and largest share of the image area in the two large crops")
    add("--local-scale", type=share, nargs=2, help="the same of the small crops (default of both: by --image-size)")
    add("--local-crops", type=at_least(0), default=10, help="small crops per image")
    add("--local-size", type=pixels, help="their pixels (default: 3/7 of --image-size; half of it up to 64)")
    add("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    add("--mask-share", type=share, default=0.5, help="probability that a large crop is masked")
    text = "least and largest share of the patches to mask there"
    add("--mask-ratio", type=probability, nargs=2, default=[0.1, 0.5], help=text)
    add("--mask-shape", choices=["block", "random"], default="block", help="blocks, or single patches")
    add("--arch", default="vit_small", help="vit_tiny, small, base, large or huge")
    add("--width", type=multiplier, default=1.0, help="multiplier of the backbone's channels")
    add("--patch-size", type=positive(int), help="pixels (default: 16, less for small images)")
    add("--depth", type=positive(int, 1000), help="blocks (default: by --arch)")
    add("--drop-path", type=below_one, default=0.1, help="stochastic depth of the student")
    add("--out-dim", type=at_least(2), default=8192, help="K, outputs of the head")
    add("--hidden-dim", type=positive(int), default=2048, help="hidden layers of the head")
    add("--bottleneck-dim", type=at_least(2), default=256, help="what its last layer sees")
    add("--head-norm", action=toggle, default=False, help="batch norm in the head")
    text = "train the norms of the last layer's weights, too (default: only of vit_tiny and vit_small)"
    add("--train-last-norm", action=toggle, help=text)
    add("--student-temp", type=positive(float), default=0.1, help="T_s")
    add("--teacher-temp", type=positive(float), default=0.07, help="T_t of crops; above 0.07 nothing is learned")
    add("--teacher-patch-temp", type=positive(float), help="T_t of patches (default: --teacher-temp)")
    add("--teacher-temp-start", type=positive(float), default=0.04, help="both in the first epoch")
    text = "from there to --teacher-temp (default: 30; a tenth of fewer than 60)"
    add("--teacher-temp-epochs", type=at_least(0), help=text)
    add("--patch-weight", type=at_least(0, float), default=1.0, help="of M in the loss")
    add("--teacher-momentum", type=probability, default=0.996, help="m at the start; 1 at the end")
    add("--center-momentum", type=below_one, default=0.9, help="what is kept of the centres c per step")
    add("--freeze-epochs", type=at_least(0), default=1, help="first epochs with a fixed last layer")
    add("--clip", type=at_least(0, float), default=3.0, help="largest norm of the gradient of each tensor (0: any)")
    add("--epochs", type=positive(int), default=800)
    add("--warmup-epochs", type=at_least(0), default=10)
    add("--batch-size", type=positive(int), default=1024, help="images per step over all processes and --accum")
    add("--lr", type=positive(float), default=5e-4, help="per 256 images: multiplied by batch-size / 256")
    add("--min-lr", type=at_least(0, float), default=1e-6, help="at the end, not scaled")
    add("--weight-decay", type=at_least(0, float), default=0.04, help="at the start; not of biases and norms")
    add("--weight-decay-end", type=at_least(0, float), default=0.4)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    if args.arch not in ARCHS:
        parser.error(f"--arch {args.arch}: unknown, expected one of {', '.join(ARCHS)}")
    small = args.image_size <= 64
    for name, value in (SMALL if small else SCALES).items():
        setattr(args, name, getattr(args, name) or value)
    patch = args.patch_size or default_patch(args.arch, args.image_size)
    args.local_size = args.local_size or max(1, round(args.image_size * (1 / 2 if small else 3 / 7) / patch)) * patch
    for name, size in (("image", args.image_size), ("local", args.local_size)):
        if size % patch:
            parser.error(
                f"--{name}-size {size} is not a multiple of the patch size {patch}: try {-(-size // patch) * patch}"
            )
    for name in ("global_scale", "local_scale", "mask_ratio"):
        low, high = getattr(args, name)
        if low > high:
            parser.error(f"--{name.replace('_', '-')} {low} {high}: the least share comes first")
    side, most = args.image_size // patch, args.mask_ratio[1]
    if side < 2 or int(most * side**2) < 1:
        text = f"--mask-ratio up to {most} masks none of the {side} x {side} patches of a large crop"
        parser.error(f"{text}: take more, or a smaller --patch-size")
    if args.train_last_norm is None:
        args.train_last_norm = args.arch in ("vit_tiny", "vit_small")
    if args.teacher_patch_temp is None:
        args.teacher_patch_temp = args.teacher_temp
    if args.teacher_temp_epochs is None:
        args.teacher_temp_epochs = 30 if args.epochs >= 60 else args.epochs // 10
    if args.teacher_temp_epochs > args.epochs:
        parser.error(f"--teacher-temp-epochs {args.teacher_temp_epochs} must not exceed --epochs {args.epochs}")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, global_scale, local_size, local_scale, local_crops=8, flip=0.5):
    """Multi-crop: two large crops, of which only the first is always blurred and only the second may be solarised, and
    small ones, which the teacher does not see (official code)."""
    view = View(
        size=size,
        area=tuple(global_scale),
        interpolation="bicubic",
        flip=flip,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=1.0 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    second = dataclasses.replace(view, blur_p=0.1 * view.blur_p, solarize_p=0.2)
    local = dataclasses.replace(view, size=local_size, area=tuple(local_scale), blur_p=0.5 * view.blur_p)
    return [view, second, *[local] * local_crops]


def masked(u, grid, ratio=(0.1, 0.5), probability=0.5, shape="block"):
    """Which patches of the large crops are masked, bool (2, B, L); their places in that, row by row, (M,); and what
    each counts in the mean over the masked patches of a crop and over all crops, (M,).

    u: uniforms (B, 6) of the images, three for each crop: is it masked, how many patches, and which ones.
    """
    whether, many, which = u.reshape(-1, 2, 3).transpose(2, 1, 0).reshape(3, -1)  # first the first crops
    count = (ratio[0] + (ratio[1] - ratio[0]) * many) * math.prod(grid) * (whether < probability)
    if shape == "block":
        mask = block_masks(which, grid, count, (min(grid) // 3) ** 2, exact=False)
    else:
        order = rng.uniforms(0, 0, which * 2.0**53, rng.SCRIPT, math.prod(grid))
        mask = order.argsort(1).argsort(1) < count.astype(int)[:, None]
    weights = mask / (np.maximum(mask.sum(1, keepdims=True), 1) * len(mask))
    return tuple(map(torch.from_numpy, (mask.reshape(2, len(u), -1), np.flatnonzero(mask), weights[mask])))


# ------------------------------------------------------------------------------------------------------ model
def transformer(arch, image_size, width=1.0, patch_size=None, depth=None, channels=3):
    """A ViT with learned positions, started as the official code does: normal numbers of deviation 0.02."""
    backbone = vit(arch, image_size, width, patch_size, depth, positions="learned", channels=channels)
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    backbone.patch_embed.proj.reset_parameters()
    nn.init.trunc_normal_(backbone.cls_token, std=0.02)
    return backbone


class Head(nn.Module):
    """Three layers with GELU, unit length, and a last layer of unit weight vectors: (N, dim) -> (N, out_dim).
    norm: batch norm before each GELU. train_norm: the lengths of the last layer's weights are trained, too."""

    def __init__(self, dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm=False, train_norm=False):
        super().__init__()
        layers = []
        for inputs in (dim, hidden_dim):
            layers += [nn.Linear(inputs, hidden_dim), *[nn.BatchNorm1d(hidden_dim)] * norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(length)
        length.requires_grad_(train_norm)

    def forward(self, x):
        z = F.normalize(upcast(self.mlp(x)), dim=1)
        with torch.autocast(z.device.type, enabled=False):  # in bf16 the teacher's targets would be off by a percent
            return self.last_layer(z)


class iBOT(nn.Module):
    """Student and teacher, each a ViT with a head of the sizes in `head` (see Head), for class tokens and patches; the
    mask token of the student, and the teacher's centres of the two.

    drop_path: largest probability that the student leaves out a branch of a block.
    """

    def __init__(self, backbone, drop_path=0.0, **head):
        super().__init__()
        self.backbone, self.drop_path = backbone, drop_path
        self.head = Head(backbone.dim, **head)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.dim))
        self.register_buffer("centers", torch.zeros(2, self.head.last_layer.out_features))
        self.reset_teacher()

    def reset_teacher(self):
        """Makes the teacher a copy of the student as it is now, without gradient."""
        self.teacher_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """teacher <- momentum * teacher + (1 - momentum) * student; batch-norm statistics are its own."""
        teacher = [*self.teacher_backbone.parameters(), *self.teacher_head.parameters()]
        student = [*self.backbone.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    @torch.no_grad()
    def update_centers(self, means, momentum):
        """centers <- momentum * centers + (1 - momentum) * means, of the teacher's outputs, over all processes."""
        self.centers.lerp_(process_mean(means), 1 - momentum)

    def forward(self, crops, mask, places, u=None):
        """crops: V tensors (B, 3, S, S), the two large ones first. mask (2, B, L), places (M,): see `masked`. u: (B,
        V, n) uniforms for stochastic depth. Returns outputs for crops, the student's (V, B, K) and the teacher's (2,
        B, K), for masked patches (M, K), (M, K), and the mean of the teacher's for all patches (K,).

        Crops and masked patches pass the head together: so far go batch-norm statistics. Its last layer is linear, so
        the mean of its outputs is its output for the mean, and only masked patches, a seventh of all, need K of them.
        """
        large, paths = torch.cat(crops[:2]), [None, None]
        if u is not None:
            paths = path_factors(u.transpose(0, 1).flatten(0, 1), self.drop_path).tensor_split([len(large)], 1)
        tokens = self.backbone.tokens(large, paths=paths[0], mask=mask.flatten(0, 1), token=self.mask_token)
        small = [self.backbone(torch.cat(crops[2:]), paths[1])] if crops[2:] else []
        rows = torch.cat([tokens[:, 0], *small, tokens[:, 1:].flatten(0, 1)[places]])
        student, patches = self.head(rows).tensor_split([len(crops) * len(crops[0])])
        with torch.no_grad():
            tokens = self.teacher_backbone.tokens(large)
            rows = torch.cat([tokens[:, 0], tokens[:, 1:].flatten(0, 1)])
            classes, every = F.normalize(upcast(self.teacher_head.mlp(rows)), dim=1).tensor_split([len(large)])
            rows = torch.cat([classes, every[places], every.mean(0, keepdim=True)])
            with torch.autocast(rows.device.type, enabled=False):
                teacher, found, mean = self.teacher_head.last_layer(rows).split([len(large), len(places), 1])
        return student.unflatten(0, (len(crops), -1)), teacher.unflatten(0, (2, -1)), patches, found, mean[0]


def init_head(path, model):
    """Gives the student the head of the teacher in a file, ours or an official one, if there is one of this shape."""
    own, found = model.head.state_dict(), {}
    norm = {"last_layer.weight_g": "original0", "last_layer.weight_v": "original1"}  # names of older files
    for place, tensors in containers(load_file(path, "--init")).items():
        prefix = "head." if place.startswith("teacher.") else "teacher_head."
        head = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for k in [k for k in head if k.startswith("last_layer2.")]:  # the last layer once more, unless patches have one
            if torch.equal(head[k], head.get(k.replace("2", "", 1), torch.empty(0))):
                del head[k]
        found |= {f"last_layer.parametrizations.weight.{norm[k]}" if k in norm else k: v for k, v in head.items()}
    fits = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in found.items()}
    if fits:
        model.head.load_state_dict(found)
    why = ": that of the file has another shape" if found else ": the file has none"
    print0(f"head        {'kept, that of the teacher in the file' if fits else 'fresh' + why}")


def teacher_temp(epoch, start, end, epochs):
    """T_t in an epoch, counted from 0: `epochs` values from `start` to `end` in equal steps, then `end`."""
    return end if epoch >= epochs else start + (end - start) * epoch / max(1, epochs - 1)


def half_cosine(step, total, start, end):
    """From `start` at step 0 to `end` at step `total`: the teacher's momentum, the weight decay."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


# ------------------------------------------------------------------------------------------------------- loss
def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Cross entropy of what the teacher says of a large crop and the student of every other one (equation 3), mean
    over pairs and batch; no gradient into the teacher.

    student (V, B, K), teacher (2, B, K) of the crops that come first, center (K,) -> scalar. Equal outputs give ln K.
    """
    first, second = F.softmax((teacher.detach() - center) / teacher_temp, dim=2)
    wanted = [second, first, *[first + second] * (len(student) - 2)]  # of a crop: the targets but its own
    total = 0.0
    for target, logits in zip(wanted, student, strict=True):  # one at a time: twice as fast as all crops at once
        total = total - (target * F.log_softmax(logits / student_temp, dim=1)).sum()
    return total / (2 * (len(student) - 1) * student.shape[1])


def patch_loss(student, teacher, weights, center, student_temp, teacher_temp):
    """Cross entropy of what the teacher says of a masked patch and the student, mean over the masked patches of a crop
    and over all crops, of which those without masked patches count as zero; no gradient into the teacher.

    student (M, K), teacher (M, K), weights (M,): see `masked`; center (K,) -> scalar. Equal outputs give ln K times the
    share of masked crops. A crop counts the same however many of its patches are masked, so that the mean over
    processes with equally many crops is that of all, although the numbers M differ.
    """
    target = F.softmax((teacher.detach() - center) / teacher_temp, dim=1)
    entropy = -(target * F.log_softmax(student / student_temp, dim=1)).sum(1)
    return (weights.to(entropy.dtype) * entropy).sum()


@torch.no_grad()
def entropies(teacher, center, temperature):
    """Entropy of the teacher's outputs (..., K), mean over the samples of all processes, of which each may have another
    number, and that of their mean; as shares of ln K. Both near 1: the teacher says nothing. Both near 0: one output
    for everything, or no sample at all."""
    p = F.softmax((teacher - center) / temperature, dim=-1).flatten(0, -2)
    entropy = torch.special.entr(p).sum()
    sums = all_reduce(torch.cat([p.sum(0), torch.stack([entropy, torch.full_like(entropy, len(p))])]))
    count = sums[-1].clamp(min=1)
    return tuple(x / math.log(p.shape[1]) for x in (sums[-2] / count, torch.special.entr(sums[:-2] / count).sum()))


# --------------------------------------------------------------------------------------------------- training
def collapsed(spread, mean_spread):
    """What to say of entropies that tell of a collapse, with the cure; else None."""
    if spread > 0.995:
        cure = "lower --teacher-temp (0.02), raise --freeze-epochs or lower --lr"
        return f"the teacher's outputs are uniform (entropy {spread:.3f} of ln K), it teaches nothing: {cure}"
    if mean_spread < 0.02:
        cure = "lower --center-momentum or raise --teacher-temp (up to 0.07)"
        return f"the teacher gives all images one output (entropy {mean_spread:.3f} of ln K): {cure}"


@torch.no_grad()
def clip_each(parameters, most):
    """Scales every gradient whose norm exceeds `most` down to it (official code: each tensor by itself)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    factors = [(most / (norm + 1e-6)).clamp(max=1) for norm in torch._foreach_norm(grads)]
    torch._foreach_mul_(grads, factors)


def main(args):
    run = Run(args)
    crops = (args.local_size, args.local_scale, args.local_crops)
    run.open(augmentation(args.image_size, args.global_scale, *crops, args.flip))
    shape = (args.width, args.patch_size, args.depth)
    backbone = transformer(args.arch, args.image_size, *shape, channels=args.channels)  # iBOT
    head = {"out_dim": args.out_dim, "hidden_dim": args.hidden_dim, "bottleneck_dim": args.bottleneck_dim}
    head |= {"norm": args.head_norm, "train_norm": args.train_last_norm}
    model = run.place(iBOT(backbone, args.drop_path, **head))
    if args.init:
        init_head(args.init, model)
        model.reset_teacher()  # iBOT: the teacher starts as a copy
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=peak)
    last = list(model.head.last_layer.parameters())
    chance, part = math.log(args.out_dim), args.patch_weight * args.mask_share
    lines = {"lr": f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"}
    lines["baseline"] = f"loss ln({args.out_dim}) = {chance:.2f} of crops, {part:g} times that of patches"
    lines["schedule"] = f"weight decay {args.weight_decay} to {args.weight_decay_end}"
    lines["crops"] = f"2 of {args.image_size} px, {args.local_crops} of {args.local_size} px"
    net = run.start(model, optimizer, chance=chance * (1 + part), export=model.teacher_backbone, **lines)
    draws = backbone.draws if args.drop_path else 0
    how = (backbone.grid, args.mask_ratio, args.mask_share, args.mask_shape)

    for epoch in run.epochs():
        ends, start = (args.teacher_temp, args.teacher_patch_temp), args.teacher_temp_start
        heat, patch_heat = (teacher_temp(epoch, start, end, args.teacher_temp_epochs) for end in ends)
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=args.min_lr / peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if group["adapt"]:  # iBOT: weights; not biases and norms
                    group["weight_decay"] = half_cosine(step, run.total, args.weight_decay, args.weight_decay_end)
            means = torch.zeros_like(model.centers)
            for batch in batches:
                crops = batch.views()
                u = batch.uniforms(len(crops) * draws, rng.PATHS).view(-1, len(crops), draws) if draws else None
                masks = masked(rng.uniforms(args.seed, epoch, batch.keys, rng.SCRIPT, 6), *how)  # iBOT: of the image
                mask, places, weights = (to_device(x, run.device) for x in masks)
                student, teacher, *patches, mean = net(crops, mask, places, u if u is None else u.to(run.dtype))
                match = patch_loss(*patches, weights, model.centers[1], args.student_temp, patch_heat)
                loss = dino_loss(student, teacher, model.centers[0], args.student_temp, heat)
                run.backward(loss + args.patch_weight * match)  # iBOT
                means += torch.stack([teacher.mean((0, 1)), mean]) / args.accum
            run.unscale(optimizer)
            if args.clip:
                clip_each(model.parameters(), args.clip)
            if step < args.freeze_epochs * run.epoch_steps:
                for p in last:
                    p.grad = None
            run.update(optimizer)
            model.update_teacher(half_cosine(step, run.total, args.teacher_momentum, 1.0))
            monitors = {}
            if run.due:
                names = ("entropy", "entropy_mean", "patches", "patches_mean")
                found = (
                    *entropies(teacher, model.centers[0], heat),
                    *entropies(patches[1], model.centers[1], patch_heat),
                )
                monitors = {"patch_loss": match.detach(), **dict(zip(names, found, strict=True))}
            if monitors and epoch and (text := collapsed(monitors["entropy"], monitors["entropy_mean"])):
                run.warn("collapse", text)
            model.update_centers(means, args.center_momentum)  # iBOT: after the loss
            run.log(lr, **monitors)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
