"""MaskFeat: Masked Feature Prediction for Self-Supervised Visual Pre-Training (Wei et al., CVPR 2022, 2112.09133).

Two fifths of an image's patches, in blocks, are replaced by one learned token. A ViT sees all patches and predicts, by
one linear layer, what the masked ones looked like as histograms of oriented gradients (HOG): how strong the edges of
each direction are in each cell of 8 x 8 pixels of each colour. L = |prediction - HOG|^2 / values per patch, mean over
the masked patches.

    torchrun --nproc_per_node=8 maskfeat.py --data /imagenet
    python maskfeat.py --data cifar10 --arch vit_tiny --batch-size 512
    python maskfeat.py --visualize photo.jpg --pretrained runs/maskfeat/last.pt --out pictures

Published, ImageNet, fine-tuned top-1: 84.0 with ViT-B, 85.7 with ViT-L after 1600 epochs (official code); 83.5 with
ViT-B after 300 (MMSelfSup 0.11). Ours: not run. The default is the official configuration's 300 epochs. Judge MaskFeat
by eval_finetune.py: nothing trains the class token to tell images apart.

Small images (a start, not from the paper): 64 patches or more, so --patch-size 4 at 32 px, 8 at 64 or 96 px (by default
an eighth of at most 128 px); cells of half a patch, below 8 px of a whole one (by default).

Deviations from the official code: one norm is the network's last and the head's; bf16, not fp32, on GPUs; micro-batches
of --accum count alike, however many patches their masks have. --gaussian is MMSelfSup's HOG.
To hack: copy this file. What is MaskFeat: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, toggle, width
from common.augment import EvalView, View, augment, to_device
from common.checkpoint import compare_tensors, load_backbone, load_file, refuse_tensors
from common.datasets import Files, evenly_spaced
from common.distributed import end_processes, is_main, print0, process_mean
from common.images import BadImage
from common.loader import crop_batches
from common.masks import block_masks
from common.optim import cosine, param_groups, upcast
from common.pictures import save_table, shown
from common.run import Run
from common.vit import vit


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__, data=False)  # --data, --out, --resume, --seed ...: what is the same in every script
    add = parser.add_argument_group("MaskFeat").add_argument
    add("--crop-min", type=share, default=0.5, help="smallest share of the image area in a crop")
    add("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    add("--arch", default="vit_base", help="vit_tiny, small, base, large or huge")
    add("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    add("--patch-size", type=positive(int), help="pixels (default: 16, 14 for vit_huge, less for small images)")
    add("--depth", type=positive(int), help="blocks (default: by --arch)")
    add("--heads", type=positive(int), help="attention heads (default: by --arch)")
    add("--mask-ratio", type=below_one, default=0.4, help="share of the patches that is masked")
    add("--exact-masks", action=toggle, default=False, help="exactly this share: else a third has a few patches less")
    add("--cell", type=positive(int), help="pixels (default: 8, or half a patch, or a patch below 8)")
    add("--bins", type=positive(int, 1000), default=9, help="orientations of a histogram")
    add("--gaussian", action=toggle, default=False, help="less weight far from the centre of a patch (MMSelfSup)")
    add("--epochs", type=positive(int), default=300)
    add("--warmup-epochs", type=at_least(0), default=30)
    add("--batch-size", type=positive(int), default=2048, help="images per step over all processes and --accum")
    add("--lr", type=positive(float), default=2e-4, help="per 256 images: multiplied by batch-size / 256")
    add("--min-lr", type=at_least(0, float), default=1e-6, help="at the start and at the end, also per 256 images")
    add("--weight-decay", type=at_least(0, float), default=0.05, help="not of biases and norms")
    add("--momentum", type=below_one, default=0.9)
    add("--clip", type=at_least(0, float), default=0.02, help="largest norm of the gradient (0: any)")
    add = parser.add_argument_group("memory and pictures", recipe=False).add_argument
    add("--grad-checkpointing", action=toggle, default=False, help="less memory, a third more computing")
    add("--pictures-every", type=at_least(0), default=10, help="epochs between reconstructions.png (0: never)")
    add = parser.add_argument_group("instead of training", recipe=False).add_argument
    add("--visualize", nargs="+", metavar="IMAGE", help="predict parts of image files: <out>/visualize.png")
    add("--pretrained", help="for --visualize: last.pt, or an official file of pre-training")
    add("--trust-pickle", action=toggle, default=False, help="allow --pretrained to run code")
    args = parser.parse_args(argv)
    if bool(args.visualize) != bool(args.pretrained):
        parser.error("--visualize and --pretrained go together (training: --data, and --init for weights)")
    if not args.data and not args.visualize:
        parser.error("the following arguments are required: --data")
    if args.min_lr >= args.lr:
        parser.error(f"--min-lr {args.min_lr} must be smaller than --lr {args.lr}")
    args.image_size = args.image_size or default_size(args.data)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.5, flip=0.5):
    """One view, cropped and mirrored: no colours are changed."""
    return [View(size=size, area=(crop_min, 1.0), flip=flip, interpolation="bicubic")]


# ------------------------------------------------------------------------------------------------------ model
@torch.no_grad()
def hog(images, patch_size=16, cell=8, bins=9, gaussian=False):
    """Histograms of oriented gradients by patch: (B, C, H, W) -> (B, L, C * bins * cells per patch), in this order.

    A histogram, of one channel and one cell of cell x cell pixels, adds up the magnitudes of the Sobel gradients by
    orientation, in equal bins from 0 to 180 degrees without interpolation, and is scaled to length 1; that of a flat
    cell is zero. Scaling a channel or adding to it changes nothing. Edges of the image are mirrored. gaussian: pixels
    count by a Gaussian over their patch, whose standard deviation is half of its side.
    """
    images, (height, width) = upcast(images), images.shape[2:]
    n, parts = patch_size // cell, 2 * bins + 1
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    if gaussian:
        away = [((2 * (i % patch_size) + 1).to(images) / patch_size - 1).square() for i in (y, x)]
        bell = torch.exp((away[0][:, None] + away[1]) / -2)
    y = y // patch_size * (width // patch_size) * parts * n * n + y % patch_size // cell * n
    place = (y[:, None] + x // patch_size * parts * n * n + x % patch_size // cell).int()  # int32 is faster
    found = []
    size = max(1, 2**18 // images[0].numel()) if images.device.type == "cpu" else len(images)  # what its cache holds
    for x in images.split(size):
        x = F.pad(x.contiguous(), (1, 1, 1, 1), mode="reflect")
        dx, dy = x[..., :-2] - x[..., 2:], x[..., :-2, :] - x[..., 2:, :]
        gx = dx[..., 2:, :].add(dx[..., 1:-1, :], alpha=2).add_(dx[..., :-2, :])
        gy = dy[..., 2:].add(dy[..., 1:-1], alpha=2).add_(dy[..., :-2])
        strength = (gx * gx).addcmul_(gy, gy).sqrt_()
        if gaussian:
            strength *= bell
        # -180 to 180 degrees are 2 bins + 1 parts, of which the last is 180 alone
        part = torch.atan2(gx, gy).mul_(bins / math.pi).add_(bins).int().mul_(n * n).add_(place).long()
        empty = strength.new_zeros(*x.shape[:2], height * width // patch_size**2 * parts * n * n)
        found.append(empty.scatter_add_(2, part.flatten(2), strength.flatten(2)))
    found = torch.cat(found).unflatten(2, (-1, parts, n * n))
    cells = found[..., :bins, :] + found[..., bins:-1, :]
    cells[..., 0, :] += found[..., -1, :]
    return F.normalize(cells, dim=3).transpose(1, 2).flatten(2)


def default_cell(patch_size):
    """Pixels of a cell: the largest divisor of a patch from 4 to 8 that is at most half of it; else the patch."""
    return max((n for n in range(4, min(8, patch_size // 2) + 1) if patch_size % n == 0), default=patch_size)


def masked(seeds, grid, ratio=0.4, exact=False):
    """Which patches are masked, in blocks (BEiT's) of at least a fifth of their number: float (B, L), 1 where masked.

    seeds: uniforms of the images (B, 1). exact: not as the official code, which stops early, see `block_masks`.
    """
    count = round(ratio * grid[0] * grid[1])
    return torch.from_numpy(block_masks(seeds, grid, count, max(1, count // 5), exact=exact)).float()


def transformer(arch, image_size, width=1.0, patch_size=None, depth=None, heads=None, channels=3):
    """A ViT with learned positions, started as the official code does: weights are normal numbers of deviation 0.02,
    and biases 0.02, but zero in the last norm."""
    backbone = vit(arch, image_size, width, patch_size, depth, heads, positions="learned", channels=channels)
    backbone.patch_embed.proj.reset_parameters()
    nn.init.trunc_normal_(backbone.patch_embed.proj.weight, std=0.02)
    for module in backbone.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            nn.init.constant_(module.bias, 0.02)
    return backbone


class MaskFeat(nn.Module):
    """A ViT in which one learned token takes the places of masked patches, and a linear head.

    cell, bins, gaussian: of its target, see `hog`.
    """

    def __init__(self, backbone, cell=8, bins=9, gaussian=False):
        super().__init__()
        self.backbone, self.cell, self.bins, self.gaussian = backbone, cell, bins, gaussian
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.dim))
        channels = backbone.patch_embed.proj.in_channels
        self.head = nn.Linear(backbone.dim, channels * bins * (backbone.patch_size // cell) ** 2)
        for weight in (self.mask_token, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def target(self, x):
        return hog(x, self.backbone.patch_size, self.cell, self.bins, self.gaussian)

    def forward(self, x, mask):
        """x: images (B, C, S, S), mask: (B, L), 1 where a patch is masked. Returns predictions (B, L, D) of `hog`."""
        return self.head(self.backbone.tokens(x, mask=mask, token=self.mask_token)[:, 1:])


# ------------------------------------------------------------------------------------------------------- loss
def maskfeat_loss(prediction, target, mask):
    """Mean squared error over all values of the masked patches of all processes; the other patches do not count.

    prediction, target: (B, L, D), mask: (B, L) -> scalar.
    """
    error = F.mse_loss(prediction, target, reduction="none").mean(2)
    return (error * mask).sum() / process_mean(mask.sum()).clamp(min=1e-6)  # masks differ in size, a few are empty


# --------------------------------------------------------------------------------------------------- training
def glyphs(values, grid, bins, cells, side):
    """HOG (B, L, D), its mean over channels, as a picture: (B, height, width) in [0, 1].

    grid: (rows, columns) of patches, cells: in a row of a patch, side: pixels of a cell in the picture. A line for each
    bin runs along the edges, which is across the gradient, through the middle of a cell, as bright as they are strong.
    """
    n = (torch.arange(side, device=values.device) - (side - 1) / 2).float()
    angle = (torch.arange(bins, device=n.device) + 0.5)[:, None, None] * (math.pi / bins)
    lines = (1.5 - (n * angle.sin() + n[:, None] * angle.cos()).abs()).clamp(0, 1) * (n.hypot(n[:, None]) < side / 2)
    values = values.float().unflatten(2, (-1, bins, cells, cells)).mean(2).clamp(min=0).unflatten(1, grid)
    picture = (values[..., None, None] * lines[:, None, None]).amax(3).clamp(max=1)
    return picture.permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3).flatten(2)


@torch.no_grad()
def compare(model, x, mask):
    """Images with and without what is masked: (2, B, C, S, S), 0 where it is. HOG, true, and predicted where masked
    beside a darker true one elsewhere, as pictures: (2, B, 1, S', S')."""
    backbone, hidden = model.backbone, mask[:, :, None] > 0
    patch, target = backbone.patch_size, model.target(x)
    shape = (backbone.grid, model.bins, patch // model.cell, model.cell * -(-16 // model.cell))
    lines = [glyphs(v, *shape) for v in (target, torch.where(hidden, upcast(model(x, mask)), target / 4))]
    hidden = hidden.view(-1, 1, *backbone.grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return torch.stack([x, x.masked_fill(hidden, 0)]), torch.stack(lines)[:, :, None]


def save_pictures(path, model, images, view, how, seed, amp):
    """PNG of what `compare` gives for a small data set, from the main process: a row per image. view: whose size, mean
    and std the images get. how: ratio and exactness of `masked`."""
    if not is_main():
        return
    view = EvalView(view.size, resize=view.size, interpolation="bicubic", mean=view.mean, std=view.std)
    token = model.mask_token
    (crops,), _, _, indices = next(crop_batches(images, view, np.arange(len(images)), len(images), token.device, 0))
    x = augment(crops, [], view.mean, view.std, token.dtype)
    mask = masked(rng.uniforms(seed, 0, indices, rng.PICTURES, 1), model.backbone.grid, *how)
    with amp:
        panels, lines = compare(model, x, to_device(mask, token.device))
    zoom, hidden = lines.shape[4] // x.shape[3], (panels == 0).all(2, keepdim=True).cpu()
    panels = shown(panels.flatten(0, 1), view).unflatten(0, (2, -1)).masked_fill(hidden, 0.8)
    panels = panels.repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
    panels = torch.cat([panels, lines.cpu().expand_as(panels)]).transpose(0, 1).flatten(0, 1)
    caption = f"{round(how[0] * mask.shape[1])} of {mask.shape[1]} patches are masked. HOG (mean of channels): edges."
    caption += " Prediction: in masked patches; those that are visible have their true HOG, darker."
    save_table(path, panels, ("original", "visible", "HOG", "prediction"), caption)


def visualize(args, run):
    """Instead of training: the picture for any image files, from a file that holds the head."""
    state = load_file(args.pretrained, "--pretrained", args.trust_pickle)
    found = state.get("model", state.get("model_state", {}))  # our files, official ones
    found = {k.replace("pred_head.projections.0.", "head."): v for k, v in found.items()}
    weights = {k: found[k] for k in ("mask_token", "head.weight", "head.bias") if k in found}
    if len(weights) < 3:
        fail(f"--pretrained {args.pretrained} holds no head (a backbone.pt never does): give the last.pt of a run")
    backbone, meta = load_backbone(args.pretrained, trust_pickle=args.trust_pickle)
    told = state["args"] if "backbone_prefix" in state else {}  # official files do not tell
    told = vars(args) | {k: v for k, v in told.items() if k not in args.given}
    model = MaskFeat(backbone, told["cell"] or default_cell(backbone.patch_size), told["bins"], told["gaussian"])
    weights |= {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    if compare_tensors(model, weights)[0]:
        refuse_tensors(f"--pretrained {args.pretrained}", "network and head", model, weights)
    model.load_state_dict(weights)
    images = Files(".", args.visualize, channels=meta["channels"])
    try:
        [images[i] for i in range(len(images))]
    except BadImage as error:  # which a loader would replace by its neighbour
        fail(f"--visualize {error}")
    view = EvalView(backbone.grid[0] * backbone.patch_size, mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path, how = f"{args.out}/visualize.png", (told["mask_ratio"], told["exact_masks"])
    save_pictures(path, model.to(run.device, run.dtype), images, view, how, args.seed, run.amp)
    print0(f"written     {path}")


def main(args):
    run = Run(args)
    if args.visualize:
        visualize(args, run)
        return end_processes()
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip))
    shape = {k: getattr(args, k) for k in ("arch", "image_size", "width", "patch_size", "depth", "heads", "channels")}
    backbone = transformer(**shape)
    backbone.checkpointing = args.grad_checkpointing
    patches, patch, how = backbone.grid[0] * backbone.grid[1], backbone.patch_size, (args.mask_ratio, args.exact_masks)
    cell, count = args.cell or default_cell(patch), round(args.mask_ratio * patches)
    if patch % cell:
        near = " or ".join(str(n) for n in range(2, patch + 1) if patch % n == 0)
        fail(f"--cell {cell} does not divide the patch size {patch}: choose {near}")
    if not 0 < count < patches:
        fail(f"--mask-ratio {args.mask_ratio} masks {count} of {patches} patches: between 0 and all must be")
    model = run.place(MaskFeat(backbone, cell, args.bins, args.gaussian))
    peak, floor = args.lr * args.batch_size / 256, args.min_lr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay)  # MaskFeat: tokens and positions decay, as in the official code
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(args.momentum, 0.999))
    lines = {"baseline": f"loss 1/{args.bins} = {1 / args.bins:.3f}, predicting zeros"}
    lines["tokens"] = f"{count} of {patches} patches of {patch} px are masked"
    lines["target"] = f"{model.head.out_features} values per patch: {args.bins} bins, cells of {cell} px"
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    net = run.start(model, optimizer, chance=1 / args.bins, lr=rule, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = floor + (peak - floor) * cosine(step, run.total, run.warmup)  # MaskFeat: the warm-up starts there, too
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                (x,) = batch.views()
                seeds = rng.uniforms(batch.seed, batch.epoch, batch.keys, rng.SCRIPT, 1)
                mask = to_device(masked(seeds, backbone.grid, *how), run.device)  # MaskFeat: it belongs to its image
                run.backward(maskfeat_loss(net(x, mask), model.target(x), mask))  # MaskFeat
            run.update(optimizer, args.clip)  # MaskFeat: the norm is far above this all the time
            run.log(lr)
        if args.pictures_every and (run.step == run.last or (epoch + 1) % args.pictures_every == 0):
            images = evenly_spaced(data if run.val is None else run.val, 8)
            save_pictures(f"{args.out}/reconstructions.png", model, images, run.view, how, args.seed, run.amp)
            run.note()  # its time does not count as training


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
