"""I-JEPA: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture (Assran et al., CVPR
2023, arXiv 2301.08243).

The encoder, a ViT, sees a large block of an image's patches. A predictor gets its output and the places of four smaller
blocks, of which the encoder saw nothing, and predicts what a target encoder says of them: the layer-normalised output
z of a moving average of the encoder, which sees the whole image and receives no gradient. With the smooth L1 distance,
L = mean over patches and dimensions of smooth_l1(prediction, layer_norm(z)),  target <- tau target + (1 - tau) encoder.

    torchrun --nproc_per_node=8 ijepa.py --data /imagenet
    python ijepa.py --data cifar10 --arch vit_tiny --batch-size 512 --flip 0.5 --epochs 400

A falling loss is no success: targets that are alike are easy to predict, and a target that is constant has a loss of 0.
Beside it stand, of the layer-normalised targets, std_images, the deviation of an image's mean over images (0: images
give the same), std_positions, that over the positions of an image, and trivial, the loss of a prediction that sees no
image, the mean at each position of the images of a micro-batch (of one image: none of the three). Learning shows in a
loss below trivial while std_images holds or rises, in RankMe, in a linear probe on the mean of the patches; in k-NN
accuracy late. The prediction 0 has a loss of 0.425.

Published, ImageNet, linear top-1: ViT-H/14 79.3 after 300 epochs, the default here (16 A100, less than 72 hours). Ours:
not run. backbone.pt is the target encoder. Runs from scratch on small sets are reported to end where a random network
is.

Masks: the sizes of the blocks are drawn for --group images, consecutive ones of the global batch, and the contexts of a
group are cut to the shortest of them. Published: for the 128 images of a GPU; larger groups see less context. Here they
are the same on any number of processes.

Small images (a start, not from the paper): 64 patches or more, so --patch-size 4 at 32 px, 8 at 64 or 96 px (by default
an eighth of at most 128 px); --flip 0.5; 400 epochs or more; at most 100 patches get a --min-keep of 4. The predictor
of an encoder below ViT-B has, unless told otherwise, at most the encoder's dimension and half of its blocks.

Deviations from the published recipe: tries for a context that is too small take the same 20 places when a target is
left out of it; images weigh the same when groups differ in size of blocks. --whole-grid and --cut random, off by
default, mend what is odd in the published masks: no block reaches the last row or column, and what a context loses is
its bottom. The learning rate is scaled with the batch; with a batch other than 2048 --tau should change, too.
To hack: copy this file. What is I-JEPA: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, toggle, width
from common.augment import View, augment, to_device
from common.datasets import evenly_spaced
from common.distributed import is_main
from common.loader import crop_batches
from common.optim import cosine, param_groups
from common.pictures import save_table, shown
from common.run import Run
from common.vit import ARCHS, Block, initialise, sincos, vit

SIZES = rng.SCRIPT + 2  # the stream of the sizes of blocks, by step and group
TRIES = 20  # places for a context, of which the first that leaves enough of it is taken


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("I-JEPA")
    group.add_argument("--crop-min", type=share, default=0.3, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.0, help="probability of a mirrored view")
    group.add_argument("--arch", default="vit_huge", help="vit_tiny, small, base, large or huge")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument(
        "--patch-size", type=positive(int), help="pixels (default: 16, 14 for vit_huge, less for small images)"
    )
    group.add_argument("--depth", type=positive(int, 1000), help="blocks of the encoder (default: by --arch)")
    group.add_argument("--heads", type=positive(int), help="of encoder and predictor (default: by --arch)")
    group.add_argument("--predictor-dim", type=positive(int), help="default: 384, or that of a smaller encoder")
    text = "blocks (default: 12, 6 for ViT-B, or half of a smaller encoder's)"
    group.add_argument("--predictor-depth", type=positive(int, 1000), help=text)
    group.add_argument("--targets", type=positive(int, 64), default=4, help="blocks to predict")
    add, pair = group.add_argument, {"nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--target-scale", type=share, default=[0.15, 0.2], **pair, help="share of the patches in a target")
    add("--target-aspect", type=positive(float), default=[0.75, 1.5], **pair, help="its height by its width")
    add("--context-scale", type=share, default=[0.85, 1.0], **pair, help="share of the patches in a context block")
    add("--min-keep", type=at_least(0), help="a context has more patches than this (default: 10; 4 of at most 100)")
    add("--group", type=at_least(0), help="images of one block size (default: 128, or what divides the batch; 0: all)")
    add("--whole-grid", action=toggle, default=False, help="blocks may reach the last row and column")
    text = "patches that stay when contexts are cut: the first, row by row, or random ones"
    add("--cut", choices=["first", "random"], default="first", help=text)
    add("--tau", type=probability, default=0.996, help="target's momentum at the start; 1 at the end")
    group.add_argument("--epochs", type=positive(int), default=300)
    group.add_argument("--warmup-epochs", type=at_least(0), default=40)
    group.add_argument(
        "--batch-size", type=positive(int), default=2048, help="images per step over all processes and --accum"
    )
    group.add_argument(
        "--lr", type=positive(float), default=1.25e-4, help="per 256 images: multiplied by batch-size / 256"
    )
    add("--warmup-lr", type=at_least(0, float), default=2.5e-5, help="at the start, also per 256 images")
    add("--min-lr", type=at_least(0, float), default=1.25e-7, help="at the end, also per 256 images")
    add("--weight-decay", type=at_least(0, float), default=0.04, help="at the start; not of biases and norms")
    add("--weight-decay-end", type=at_least(0, float), default=0.4)
    group.add_argument("--momentum", type=below_one, default=0.9)
    group = parser.add_argument_group("memory", recipe=False)
    group.add_argument("--grad-checkpointing", action=toggle, default=False, help="less memory, a third more computing")
    args = parser.parse_args(argv)
    for name in ("target_scale", "target_aspect", "context_scale"):
        low, high = getattr(args, name)
        if low > high:
            parser.error(f"--{name.replace('_', '-')} {low} {high}: the smaller number comes first")
    for name in ("warmup_lr", "min_lr"):
        if getattr(args, name) > args.lr:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must not exceed --lr {args.lr}")
    dim, depth, heads, _ = ARCHS.get(args.arch, ARCHS["vit_base"])
    dim, depth, unit = round(dim * args.width), args.depth or depth, math.lcm(4, args.heads or heads)
    args.predictor_dim = args.predictor_dim or max(unit, min(dim, 384) // unit * unit)
    args.predictor_depth = args.predictor_depth or (12 if dim >= 1024 else 6 if dim >= 768 else max(1, depth // 2))
    if args.predictor_dim % unit:
        near = max(1, round(args.predictor_dim / unit)) * unit
        parser.error(f"--predictor-dim {args.predictor_dim} must be a multiple of {unit}, for 4 and heads: try {near}")
    size = args.batch_size
    args.group = max(n for n in range(1, 129) if size % n == 0) if args.group is None else args.group or size
    args.image_size = args.image_size or default_size(args.data)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.3, flip=0.0):
    """One view, cropped: no colours are changed."""
    return [View(size=size, area=(crop_min, 1.0), flip=flip, interpolation="bilinear")]


def block_size(u, grid, scale, aspect=(1.0, 1.0)):
    """Rows and columns of a block in a grid (rows, columns), of which it leaves out one at least. One number u in
    [0, 1) gives share of the area and aspect, as published: small blocks are wide, large ones tall."""
    area, ratio = (low + u * (high - low) for low, high in (scale, aspect))
    area = int(grid[0] * grid[1] * area)
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return [max(1, min(side, most - 1)) for side, most in zip(sides, grid, strict=True)]


def block_masks(
    sizes,
    u,
    grid,
    targets=4,
    target_scale=(0.15, 0.2),
    target_aspect=(0.75, 1.5),
    context_scale=(0.85, 1.0),
    min_keep=10,
    whole_grid=False,
    cut="first",
):
    """Contexts and targets of a group of images: ascending patches, row by row, (G, K) and (G, targets, T).

    sizes: two uniforms of the group, for targets and contexts; u: uniforms (G, 2 (targets + TRIES) + L) of the images.
    A context is a block without the patches of the targets and has more than `min_keep`: where all TRIES places leave
    too few, it keeps those of the last target, then of the last two ... K is that of the group's smallest.
    """
    size = block_size(sizes[0], grid, target_scale, target_aspect), block_size(sizes[1], grid, context_scale)
    if math.prod(size[1]) <= min_keep:
        raise ValueError(f"a context block of {size[1][0]} x {size[1][1]} patches has not more than {min_keep}")
    places, order = np.split(u, [2 * (targets + TRIES)], 1)
    places, blocks = places.reshape(len(u), -1, 2), []
    for part, sides in zip(np.split(places, [targets], 1), size, strict=True):
        corner = (part * (np.array(grid) - sides + whole_grid)).astype(np.int64)  # published: never the last one
        away = [np.arange(grid[i]) - corner[:, :, i, None] for i in (0, 1)]
        y, x = ((away[i] >= 0) & (away[i] < sides[i]) for i in (0, 1))
        blocks.append((y[:, :, :, None] & x[:, :, None]).reshape(*part.shape[:2], -1))
    mask = np.zeros_like(blocks[0][:, 0])
    for count in range(targets, -1, -1):  # of the targets that a context must not touch
        free = blocks[1] & ~blocks[0][:, :count].any(1, keepdims=True)
        good = free.sum(2) > min_keep
        found = good.any(1) & ~mask.any(1)
        mask[found] = free[found, good.argmax(1)[found]]
        if mask.any(1).all():
            break
    kept = np.argsort((order if cut == "random" else 0) + ~mask, 1, kind="stable")[:, : mask.sum(1).min()]
    return np.sort(kept, 1), blocks[0].nonzero()[2].reshape(len(u), targets, -1)


def step_masks(seed, epoch, step, order, keys, group, grid, targets=4, stream=rng.SCRIPT, **rules):
    """`block_masks` of consecutive images `keys` of the batch `order` (B,) of a step: a list of (contexts, targets),
    one for every group that they are part of. They depend on the whole group, whoever has the rest of it."""
    first, found = int(np.flatnonzero(order == keys[0])[0]), []
    for number in range(first // group, (first + len(keys) - 1) // group + 1):
        start = number * group
        u = rng.uniforms(seed, epoch, order[start : start + group], stream, 2 * (targets + TRIES) + math.prod(grid))
        masks = block_masks(rng.uniforms(seed, step, [number], SIZES, 2)[0], u, grid, targets, **rules)
        own = slice(max(0, first - start), first + len(keys) - start)
        found.append([part[own] for part in masks])
    return found


def check_masks(seed, group, min_keep, **rules):
    """What there is to say of the masks of some groups. Ends the program where contexts are too small for --min-keep,
    or often hold patches of targets."""
    group, grid = min(group, 128), rules["grid"]
    images = np.arange(min(1024, 32 * group))
    least = block_size(0.0, grid, rules["context_scale"])
    if math.prod(least) <= min_keep:
        why = f"a context block of {least[0]} x {least[1]} patches has not more"
        fail(f"--min-keep {min_keep}: {why}: lower it, raise --context-scale, or take smaller patches")
    masks = step_masks(seed, 0, 0, images, images, group, min_keep=min_keep, **rules)
    pairs = [pair for part in masks for pair in zip(*part, strict=True)]
    if (shared := np.mean([np.isin(a, b).any() for a, b in pairs])) > 0.1:
        why = f"targets leave no context of more patches in {shared:.0%} of the images"
        fail(f"--min-keep {min_keep}: {why}: lower it, --targets or --target-scale, or take smaller patches")
    context, target = (np.mean([pair[i].shape[-1] for pair in pairs]) for i in (0, 1))
    text = f"of {math.prod(grid)} patches a context has {context:.1f}, a target {target:.1f}, on average"
    return text + (f"; in {shared:.1%} of the images they share some" if shared else "")


# ------------------------------------------------------------------------------------------------------ model
class IJEPA(nn.Module):
    """Encoder, its moving average, and predictor, which has a width and positions of its own and the encoder's heads.

    predictor_dim, predictor_depth: its dimension and blocks.
    """

    def __init__(self, backbone, predictor_dim=384, predictor_depth=12):
        super().__init__()
        self.backbone = backbone
        self.predictor_embed = nn.Linear(backbone.dim, predictor_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, predictor_dim))
        table = sincos(predictor_dim, backbone.grid)[None].float()
        self.predictor_pos_embed = nn.Parameter(table, requires_grad=False)
        blocks = [Block(predictor_dim, backbone.heads) for _ in range(predictor_depth)]
        self.predictor_blocks = nn.ModuleList(blocks)
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_dim, backbone.dim)
        initialise(self, std=0.02)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.reset_target()

    def reset_target(self):
        """Makes the target encoder a copy of the encoder as it is now, without gradient."""
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum):
        """target <- momentum * target + (1 - momentum) * encoder."""
        target, online = (list(part.parameters()) for part in (self.target_backbone, self.backbone))
        torch._foreach_lerp_(target, online, 1 - momentum)

    def predict(self, tokens, context, targets):
        """Tokens (G, K, dim) of the patches context (G, K) -> predictions at targets (G, M, T): (G, M, T, dim). Each
        block is predicted by itself."""
        table, (count, places) = self.predictor_pos_embed[0], targets.shape[1:]
        x = (self.predictor_embed(tokens) + table[context]).repeat_interleave(count, 0)
        x = torch.cat([x, self.mask_token + table[targets.flatten(0, 1)]], 1)
        for block in self.predictor_blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.backbone.checkpointing else block(x)
        return self.predictor_proj(self.predictor_norm(x[:, -places:])).unflatten(0, (-1, count))

    def forward(self, x, masks):
        """x: images (B, C, S, S); masks: contexts (G, K) and targets (G, M, T) of each group of them, in their order.
        Returns predictions (R, dim), image after image and block after block, and target tokens (B, L, dim)."""
        with torch.no_grad():
            target = self.target_backbone.tokens(x)
        parts = zip(x.split([len(context) for context, _ in masks]), masks, strict=True)
        found = [self.predict(self.backbone.tokens(part, c), c, t).flatten(0, 2) for part, (c, t) in parts]
        return torch.cat(found), target


def target_momentum(step, total, start):
    """Momentum of the target at step `step`, counted from 0, of `total`: from `start` up to 1 in equal steps."""
    return start + (1 - start) * step / total


def half_cosine(step, total, start, end):
    """From `start` at step 0 to `end` at step `total`: the teacher's momentum, the weight decay."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


# ------------------------------------------------------------------------------------------------------- loss
def normalised(target):
    """Target tokens (..., D) with mean 0 and variance 1 each."""
    return F.layer_norm(target.detach(), target.shape[-1:])


def ijepa_loss(prediction, target, weight):
    """Smooth L1 distance (beta 1) to the layer-normalised targets, mean over dimensions, weighted sum over rows; no
    gradient passes into targets. prediction, target: (R, D), weight: (R,) with sum 1 -> scalar."""
    return F.smooth_l1_loss(prediction, normalised(target), reduction="none").mean(1) @ weight


@torch.no_grad()
def target_statistics(target, rows, weight):
    """Of target tokens (B, L, D): see the docstring. rows: image and position of each target (R,), (R,), with these
    weights. Both deviations are root mean squares over dimensions, and at most 1.
    """
    z, (_, place) = normalised(target), rows
    mean, at = z.mean(1), z.mean(0)
    spread = mean.var(0, correction=0).mean().sqrt(), (z - mean[:, None]).square().mean().sqrt()
    return dict(zip(("std_images", "std_positions"), spread, strict=True)) | {
        "trivial": ijepa_loss(at[place], target[rows], weight)
    }


# --------------------------------------------------------------------------------------------------- training
def target_rows(targets, device, dtype):
    """Of the targets [(G, M, T)] of all groups: image and position of each, as they index target tokens, and its weight
    in the loss, a mean over images: ((R,), (R,)), (R,)."""
    counts = np.concatenate([np.full(len(part), part[0].size) for part in targets])
    image, weight = np.repeat(np.arange(len(counts)), counts), np.repeat(1 / counts / len(counts), counts)
    place = np.concatenate([part.reshape(-1) for part in targets])
    image, place, weight = (to_device(torch.from_numpy(part), device) for part in (image, place, weight))
    return (image, place), weight.to(dtype)


def save_masks(path, images, view, device, patch_size, seed, **rules):
    """PNG of a small data set, from the main process: a row per image, with what the encoder sees and the targets."""
    if not is_main():
        return
    (crops,), _, _, indices = next(crop_batches(images, view, np.arange(len(images)), len(images), device, 0))
    x, grid = shown(augment(crops, [], view.mean, view.std, torch.float32), view), rules["grid"]
    ((context, targets),) = step_masks(seed, 0, 0, indices, indices, len(x), stream=rng.PICTURES, **rules)
    parts = [np.tile(np.arange(math.prod(grid)), (len(x), 1)), context, *targets.transpose(1, 0, 2)[:4]]
    panels = []
    for part in parts:
        mask = torch.zeros(len(x), math.prod(grid)).scatter_(1, torch.from_numpy(part), 1.0).view(-1, 1, *grid)
        mask = mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        panels.append(torch.where(mask > 0, x, 0.8))
    headings = ["original", "context", *(f"target {i + 1}" for i in range(len(parts) - 2))]
    caption = (
        f"The encoder sees {context.shape[1]} of {math.prod(grid)} patches; the targets have {targets.shape[2]} each."
    )
    save_table(path, torch.stack(panels, 1).flatten(0, 1), headings, f"{caption} Grey: no patch here.")


def main(args):
    run = Run(args)
    if (size := args.batch_size) % args.group:
        near = max(n for n in range(1, min(args.group, 1024, size) + 1) if size % n == 0)
        fail(f"--group {args.group} does not divide --batch-size {size}: try {near}")
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip))
    shape = {k: getattr(args, k) for k in ("arch", "image_size", "width", "patch_size", "depth", "heads", "channels")}
    backbone = vit(**shape, pool="norm-mean", class_token=False)
    backbone.checkpointing, grid = args.grad_checkpointing, backbone.grid
    names = ("targets", "target_scale", "target_aspect", "context_scale", "whole_grid", "cut")
    rules = {k: getattr(args, k) for k in names} | {"grid": grid}
    rules["min_keep"] = (4 if grid[0] * grid[1] <= 100 else 10) if args.min_keep is None else args.min_keep
    lines = {"masks": check_masks(args.seed, args.group, **rules)}
    model = run.place(IJEPA(backbone, args.predictor_dim, args.predictor_depth))
    if args.init:
        model.reset_target()  # I-JEPA: the target starts as a copy
    peak = args.lr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(args.momentum, 0.999))
    lines["lr"] = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    lines["baseline"] = "a prediction of 0 has loss 0.425; constant targets have 0 (see trivial, std_images)"
    lines["predictor"] = f"{args.predictor_dim} dimensions, {args.predictor_depth} blocks, {backbone.heads} heads"
    net = run.start(model, optimizer, export=model.target_backbone, **lines)
    if not run.resumed:
        images = evenly_spaced(data if run.val is None else run.val, 6)
        rest = (run.view, run.device, backbone.patch_size, args.seed)
        save_masks(f"{args.out}/masks.png", images, *rest, **rules)

    for epoch in run.epochs():
        order = rng.permutation(args.seed, epoch, len(data)).astype(np.int64)
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step + 1, run.total, run.warmup, final=args.min_lr / args.lr)
            if step + 1 < run.warmup:
                lr += (peak - lr) * args.warmup_lr / args.lr
            for group in optimizer.param_groups:
                group["lr"] = lr
                if group["adapt"]:  # I-JEPA: weights; not biases and norms
                    decay = half_cosine(step + 1, run.total, args.weight_decay, args.weight_decay_end)
                    group["weight_decay"] = decay
            first = step % run.epoch_steps * args.batch_size
            for batch in batches:
                (x,) = batch.views()
                whole = order[first : first + args.batch_size]
                masks = step_masks(args.seed, epoch, step, whole, batch.keys, args.group, **rules)  # I-JEPA: by group
                rows, weight = target_rows([targets for _, targets in masks], run.device, run.dtype)
                masks = [[to_device(torch.from_numpy(part), run.device) for part in pair] for pair in masks]
                prediction, target = net(x, masks)
                run.backward(ijepa_loss(prediction, target[rows], weight))  # I-JEPA
            run.update(optimizer)
            model.update_target(target_momentum(step, run.total, args.tau))  # I-JEPA: after the step
            monitors = target_statistics(target, rows, weight) if run.due and len(target) > 1 else {}
            if monitors and step > run.warmup and (spread := monitors["std_images"]) < 0.02:
                text = (
                    f"the targets of all images are nearly equal (std_images {spread:.3f}): a small loss means nothing"
                )
                run.warn("collapse", f"{text}. Raise --tau, or lower --lr")
            run.log(lr, **monitors)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
