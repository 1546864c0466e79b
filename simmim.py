"""SimMIM: A Simple Framework for Masked Image Modeling (Xie et al., CVPR 2022, arXiv 2111.09886).

Squares of 32 x 32 pixels that cover 60 % of an image are masked: one learned token stands in place of their embedded
patches. The encoder, a Swin or a ViT, sees all places, and from each of its last tokens one linear layer predicts the
pixels x that this token stands for:  L = |prediction - x|, mean over the masked pixels and their channels.

    torchrun --nproc_per_node=8 simmim.py --data /imagenet
    torchrun --nproc_per_node=8 simmim.py --data /imagenet --arch vit_base
    python simmim.py --data cifar10 --arch vit_tiny --schedule cosine --epochs 400 --batch-size 512
    python simmim.py --visualize photo.jpg --pretrained runs/simmim/last.pt --out pictures

schedule    epochs  lr per 512  warm-up              afterwards                             default of
cosine      100     2e-4        10 epochs from 1e-6  half a cosine to 1e-5                  Swins, at 192 px
multistep   800     1e-4        10 epochs from 5e-7  a tenth from 7/8 of the epochs on      ViTs, at 224 px

Published, ImageNet, fine-tuned top-1 (official code): Swin-B 100 epochs 82.8 at 192 px, 83.5 at 224; 800 epochs 84.0 at
224; Swin-L (--window 12) 800 epochs 85.4; ViT-B 800 epochs 83.8. Swin-B, 100 epochs, in MMSelfSup 0.11: 82.9 and 83.5.
Ours: not run. Judge SimMIM by eval_finetune.py --recipe simmim: nothing trains features that tell images apart.

Small images (a start, not from the paper): squares of a quarter of the side, 8 px at 32 px; a Swin gets smaller patches
and windows and may have fewer stages (--depth 2 6 2), since its last tokens stand for many pixels; 400 epochs or more.

As the official code does, not as it means to: tables of relative positions decay (the name that is to leave them out
fits none); --no-decay-tables leaves them out, as MMSelfSup does. A ViT's mask token decays, too. Deviations from it:
the sum is divided by the number of masked pixels, not by 1e-5 more; a step has the rate that there the next one has; a
ViT's keys have a bias, which changes no attention; bf16, not fp16, on GPUs.
To hack: copy this file. What is SimMIM: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import rng, swin, vit
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, toggle, width
from common.augment import EvalView, View, augment, to_device
from common.checkpoint import compare_tensors, load_backbone, load_file, refuse_tensors
from common.datasets import Files, evenly_spaced
from common.distributed import end_processes, is_main, print0
from common.images import BadImage
from common.loader import crop_batches
from common.optim import upcast
from common.pictures import save_table, shown
from common.run import Run

SCHEDULES = {
    "cosine": {"epochs": 100, "lr": 2e-4, "warmup_lr": 1e-6},
    "multistep": {"epochs": 800, "lr": 1e-4, "warmup_lr": 5e-7},
}


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__, data=False)  # --data, --out, --resume, --seed ...: what is the same in every script
    add = parser.add_argument_group("SimMIM").add_argument
    add("--crop-min", type=share, default=0.67, help="smallest share of the image area in a crop")
    add("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    add("--arch", default="swin_base", help="swin_tiny, small, base, large, or vit_tiny, small, base, large, huge")
    add("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    add("--patch-size", type=positive(int), help="pixels (default: Swin 4, ViT 16, less for small images)")
    add("--depth", type=positive(int), nargs="+", help="blocks of a ViT, or of each stage (default: by --arch)")
    add("--heads", type=positive(int), help="attention heads of a ViT, or of the first stage (default: by --arch)")
    add("--window", type=positive(int), help="Swin: patches along a window's side (default: 6 at 192 px, 7 at 224 px)")
    add(
        "--mask-patch-size", type=positive(int), help="side of a square in pixels (default: 32, or a quarter of it all)"
    )
    add("--mask-ratio", type=below_one, default=0.6, help="share of the squares that is masked")
    add("--drop-path", type=below_one, help="stochastic depth (default: 0 of a Swin, 0.1 of a ViT)")
    add("--schedule", choices=[*SCHEDULES], help="see above (default: cosine of a Swin, multistep of a ViT)")
    add("--epochs", type=positive(int), help="default: by --schedule")
    add("--warmup-epochs", type=at_least(0), default=10)
    add("--batch-size", type=positive(int), default=2048, help="images per step over all processes and --accum")
    add("--lr", type=positive(float), help="per 512 images: multiplied by batch-size / 512 (default: by --schedule)")
    add("--warmup-lr", type=at_least(0, float), help="at the first step, per 512 images (default: by --schedule)")
    add("--min-lr", type=at_least(0, float), default=1e-5, help="cosine: at the end, per 512 images")
    add("--milestones", type=positive(int), nargs="+", help="multistep: epochs (default: 7/8 of --epochs)")
    add("--weight-decay", type=at_least(0, float), default=0.05, help="not of biases, norms and tokens")
    add("--decay-tables", action=toggle, default=True, help="weight decay on relative positions")
    add("--momentum", type=below_one, default=0.9)
    add("--clip", type=at_least(0, float), default=5.0, help="largest norm of the gradient (0: any)")
    group = parser.add_argument_group("memory and pictures", recipe=False)
    group.add_argument("--grad-checkpointing", action=toggle, default=False, help="less memory, a third more computing")
    text = "epochs between reconstructions.png (0: never)"
    group.add_argument("--pictures-every", type=at_least(0), default=10, help=text)
    group = parser.add_argument_group("instead of training", recipe=False)
    group.add_argument("--visualize", nargs="+", metavar="IMAGE", help="reconstruct image files: <out>/visualize.png")
    group.add_argument("--pretrained", help="for --visualize: last.pt, or an official file that has the decoder")
    group.add_argument("--trust-pickle", action=toggle, default=False, help="allow --pretrained to run code")
    args = parser.parse_args(argv)
    if bool(args.visualize) != bool(args.pretrained):
        parser.error("--visualize and --pretrained go together (training: --data, and --init for weights)")
    if not args.data and not args.visualize:
        parser.error("the following arguments are required: --data")
    if args.arch not in (known := [*swin.ARCHS, *vit.ARCHS]):
        parser.error(f"--arch {args.arch}: unknown, expected one of {', '.join(known)}")
    is_swin, size = args.arch in swin.ARCHS, default_size(args.data)
    size = args.image_size = args.image_size or (192 if is_swin and size == 224 else size)
    patch = args.patch_size or (swin.default_patch(size) if is_swin else vit.default_patch(args.arch, size))
    if not args.mask_patch_size:  # of small images the nearest to a quarter
        fitting = [n for n in range(patch, size + 1, patch) if size % n == 0]
        args.mask_patch_size = min(fitting, key=lambda n: abs(n - min(32, size / 4)), default=patch)
    args.schedule = args.schedule or ("cosine" if is_swin else "multistep")
    for name, value in (SCHEDULES[args.schedule] | {"drop_path": 0.0 if is_swin else 0.1}).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if (other := {"cosine": "milestones", "multistep": "min_lr"}[args.schedule]) in args.given:
        parser.error(f"--{other.replace('_', '-')} does nothing with --schedule {args.schedule}: leave it out")
    for name in ("warmup_lr", *["min_lr"] * (args.schedule == "cosine")):
        if getattr(args, name) > args.lr:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must not exceed --lr {args.lr}")
    if args.milestones and max(args.milestones) >= args.epochs:
        parser.error(f"--milestones {max(args.milestones)} must be smaller than --epochs {args.epochs}")
    if not is_swin and (args.window or len(args.depth or [1]) > 1):
        parser.error(f"--window and several numbers of --depth are for Swins: leave them out with --arch {args.arch}")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.67, flip=0.5):
    """One view, cropped and mirrored: no colours are changed."""
    return [View(size=size, area=(crop_min, 1.0), flip=flip)]


# ------------------------------------------------------------------------------------------------------ model
def transformer(arch, image_size, **shape):
    """A ViT like BEiT's: relative positions that all blocks share and no others, layer scale, weights of deviation 0.02
    that are cut there and shrink with depth where a branch ends."""
    backbone = vit.vit(arch, image_size, positions="none", relative="shared", layer_scale=0.1, **shape)
    layers = [m for m in backbone.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for weight in (backbone.cls_token, *(layer.weight for layer in layers)):
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
    for i, block in enumerate(backbone.blocks):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data /= math.sqrt(2 * (i + 1))
    return backbone


def random_mask(noise, ratio):
    """Which squares are masked: those of the ceil(L ratio) smallest numbers. noise: (B, L), L squares of an image.
    Returns mask (B, rows, columns), 1 where a square is masked."""
    masked = noise.argsort(1).argsort(1) < math.ceil(noise.shape[1] * ratio)
    return masked.float().unflatten(1, (math.isqrt(noise.shape[1]), -1))


def enlarge(mask, side):
    """A mask (B, rows, columns) on a finer grid, (B, side, side)."""
    return mask.repeat_interleave(side // mask.shape[1], 1).repeat_interleave(side // mask.shape[2], 2)


class SimMIM(nn.Module):
    """Encoder, and one linear layer from each token of its last map to the pixels that this stands for."""

    def __init__(self, backbone, channels=3):
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.embed_dim))
        bound = 2.0 if isinstance(backbone, swin.Swin) else 0.02
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-bound, b=bound)
        layer = nn.Conv2d(backbone.dim, channels * backbone.stride**2, 1)
        self.decoder = nn.Sequential(layer, nn.PixelShuffle(backbone.stride))

    def forward(self, x, noise, mask_ratio=0.6, paths=None):
        """x: images (B, C, S, S), noise: uniforms (B, L) for L squares. paths: None or factors of drop path (draws, B).
        Returns predictions (B, C, S, S), of all pixels, and mask (B, rows, columns)."""
        mask = random_mask(noise, mask_ratio)
        patches = enlarge(mask, x.shape[2] // self.backbone.patch_size)
        return self.decoder(self.backbone.maps(x, paths, patches.flatten(1), self.mask_token)), mask


# ------------------------------------------------------------------------------------------------------- loss
def simmim_loss(images, prediction, mask):
    """Mean absolute error over the masked pixels and their channels; the visible ones do not count.
    images, prediction: (B, C, S, S), mask: (B, rows, columns) -> scalar."""
    mask = enlarge(mask, images.shape[2])[:, None]
    return ((prediction - images).abs() * mask).sum() / (mask.sum() * images.shape[1])


# --------------------------------------------------------------------------------------------------- training
def learning_rate(step, total, warmup, peak, start, final=0.0, falls=()):
    """Linear from `start` to `peak` over `warmup` steps; then a tenth of it from each step of `falls` on, or without
    these half a cosine to `final` at step `total`, which began at step 0, so that the peak is not reached."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    if falls:
        return peak * 0.1 ** sum(step >= fall for fall in falls)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * step / total))


@torch.no_grad()
def reconstruct(model, x, noise, mask_ratio=0.6):
    """Original, visible squares, predicted squares, both of these: (4, B, C, S, S), normalised as x. Where a panel has
    no square it is 0, the mean colour."""
    prediction, mask = model(x, noise, mask_ratio)
    mask = enlarge(mask, x.shape[2])[:, None].to(x.dtype)
    visible, predicted = x * (1 - mask), upcast(prediction).to(x.dtype) * mask
    return torch.stack([x, visible, predicted, visible + predicted])


def save_pictures(path, model, images, view, mask_ratio, squares, seed, amp):
    """PNG of what `reconstruct` gives for a small data set, from the main process: a row per image. view: whose size,
    mean and std the images get. squares: in an image."""
    if not is_main():
        return
    view, token = EvalView(view.size, resize=view.size, mean=view.mean, std=view.std), model.mask_token
    (crops,), _, _, indices = next(crop_batches(images, view, np.arange(len(images)), len(images), token.device, 0))
    x = augment(crops, [], view.mean, view.std, token.dtype)
    noise = torch.from_numpy(rng.uniforms(seed, 0, indices, rng.PICTURES, squares))
    with amp:
        panels = reconstruct(model, x, to_device(noise, token.device), mask_ratio)
    headings = ("original", "visible", "reconstruction", "with visible squares")
    masked = math.ceil(squares * mask_ratio)
    caption = f"{masked} of {squares} squares are masked and predicted, the others are visible; grey: no square here."
    panels = panels.transpose(0, 1).flatten(0, 1)
    images = shown(panels, view).masked_fill((panels == 0).all(1, keepdim=True).cpu(), 0.8)
    save_table(path, images, headings, caption)


def visualize(args, run):
    """Instead of training: the picture for any image files, from a file that holds encoder and decoder."""
    state = load_file(args.pretrained, "--pretrained", args.trust_pickle)
    weights = {k.removeprefix("encoder."): v for k, v in state.get("model", state).items()}
    weights = {k: v for k, v in weights.items() if k.startswith(("decoder.", "mask_token"))}
    if "decoder.0.weight" not in weights:
        fail(f"--pretrained {args.pretrained} holds no decoder (a backbone.pt never does): give the last.pt of a run")
    backbone, meta = load_backbone(args.pretrained, trust_pickle=args.trust_pickle)
    model = SimMIM(backbone, meta["channels"])
    weights |= {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    if compare_tensors(model, weights)[0]:
        refuse_tensors(f"--pretrained {args.pretrained}", "encoder and decoder", model, weights)
    model.load_state_dict(weights)
    images = Files(".", args.visualize, channels=meta["channels"])
    try:
        [images[i] for i in range(len(images))]
    except BadImage as error:  # which a loader would replace by its neighbour
        fail(f"--visualize {error}")
    view = EvalView(meta["image_size"], mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    told = state["args"] if "backbone_prefix" in state else {}  # official files do not tell
    told = vars(args) | {k: v for k, v in told.items() if k not in args.given}
    squares = fit(view.size, backbone, told["mask_patch_size"], told["mask_ratio"])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path, rest = f"{args.out}/visualize.png", (told["mask_ratio"], squares, args.seed, run.amp)
    save_pictures(path, model.to(run.device, run.dtype), images, view, *rest)
    print0(f"written     {path}")


def fit(size, backbone, square, ratio):
    """Number of squares in an image; ends the program if image, patches, windows and squares do not fit together."""
    patch, stride, windows = backbone.patch_size, backbone.stride, backbone.config.get("window", [])
    if size % stride:
        near = " or ".join(str(n * stride) for n in (size // stride, size // stride + 1) if n)
        fail(f"--image-size {size} is not a multiple of {stride}, the pixels of a token of the last map: choose {near}")
    sides = swin.map_sides(size, patch, len(windows) or 1)
    if side := next((s for s, window in zip(sides, windows, strict=False) if s % window), 0):
        fitting = ", ".join(str(n) for n in range(2, side + 1) if all(s % min(n, s) == 0 for s in sides))
        fail(f"--window {windows[0]} does not divide a map of {side} x {side} tokens: choose one of {fitting}")
    if square % patch or size % square:
        fitting = ", ".join(str(n) for n in range(patch, size, patch) if size % n == 0)
        why = f"--image-size {size}" if size % square else f"multiples of the patch size {patch}"
        fail(f"--mask-patch-size {square} does not fit {why}: choose one of {fitting}")
    squares = (size // square) ** 2
    if not 0 < (masked := math.ceil(squares * ratio)) < squares:
        fail(f"--mask-ratio {ratio} masks {masked} of {squares} squares: between 0 and all must be")
    return squares


def main(args):
    run = Run(args)
    if args.visualize:
        visualize(args, run)
        return end_processes()
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip))
    shape = {k: getattr(args, k) for k in ("arch", "image_size", "width", "patch_size", "heads", "channels")}
    if args.arch in swin.ARCHS:
        backbone = swin.swin(**shape, window=args.window, depths=args.depth)
    else:
        backbone = transformer(**shape, depth=(args.depth or [None])[0])
    backbone.checkpointing = args.grad_checkpointing
    squares = fit(args.image_size, backbone, args.mask_patch_size, args.mask_ratio)
    model = run.place(SimMIM(backbone, args.channels))
    free = ["cls_token", "mask_token"] if args.arch in swin.ARCHS else ["cls_token"]  # SimMIM: as the official code
    free = tuple(free if args.decay_tables else [*free, vit.TABLE])
    groups = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        groups[p.ndim <= 1 or name.endswith(free)]["params"].append(p)
    peak, start, final = (rate * args.batch_size / 512 for rate in (args.lr, args.warmup_lr, args.min_lr))
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(args.momentum, 0.999))
    falls = [m * run.epoch_steps for m in args.milestones or [args.epochs * 7 / 8] if args.schedule == "multistep"]
    rule = f"{args.lr} x {args.batch_size}/512 = {peak:.4g}, {args.schedule}"
    mask = f"{math.ceil(squares * args.mask_ratio)} of {squares} squares of {args.mask_patch_size} px"
    net = run.start(model, optimizer, lr=rule, baseline="loss near 0.8, predicting the mean colour", mask=mask)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = learning_rate(step, run.total, run.warmup, peak, start, final, falls)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                (x,), paths = batch.views(), None
                if args.drop_path:
                    paths = vit.path_factors(batch.uniforms(backbone.draws, rng.PATHS), args.drop_path).to(run.dtype)
                noise = batch.uniforms(squares)  # SimMIM: a mask belongs to its image
                prediction, mask = net(x, noise, args.mask_ratio, paths)
                run.backward(simmim_loss(x, prediction, mask))  # SimMIM
            run.update(optimizer, args.clip)
            run.log(lr)
        if args.pictures_every and (run.step == run.last or (epoch + 1) % args.pictures_every == 0):
            images, rest = evenly_spaced(data if run.val is None else run.val, 8), (args.mask_ratio, squares, args.seed)
            save_pictures(f"{args.out}/reconstructions.png", model, images, run.view, *rest, run.amp)
            run.note()  # its time does not count as training


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
