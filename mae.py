"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv 2111.06377).

Three quarters of an image's patches are removed at random. The encoder, a ViT, sees only the rest. A small decoder gets
its output, with one learned token in place of every missing patch, and predicts the pixels x of these patches:
L = |prediction - (x - mean(x)) / sqrt(var(x) + 1e-6)|^2 / values per patch, mean over the missing patches.

    torchrun --nproc_per_node=8 mae.py --data /imagenet
    python mae.py --data cifar10 --arch vit_tiny --batch-size 512
    python mae.py --visualize photo.jpg --pretrained runs/mae/last.pt --out pictures

Published, ImageNet, 1600 epochs, top-1 (official code): fine-tuned ViT-B 83.6, ViT-L 85.9, ViT-H 86.9; linear 67.8,
76.0, 77.2. ViT-B, 400 epochs, fine-tuned, in MMSelfSup 0.11: 83.1. Ours: not run. The default is the official
command's 800 epochs. Judge MAE by eval_finetune.py: nothing trains the class token to tell images apart, and its k-NN
accuracy stays low where fine-tuning works (lightly's benchmark, ViT-B, 100 epochs: 11.2, fine-tuned 81.3).

Small images (a start, not from the paper): 64 to 256 patches of 4 x 4 pixels or more, so --patch-size 4 at 32 px, 8 at
64 or 96 px (by default an eighth of at most 128 px, which is 64 patches); 400 epochs or more. The decoder of an encoder
below ViT-B has, unless told otherwise, the encoder's dimension and heads and a third of its blocks.

Deviations from the official code: the bias of the patch embedding starts at zero; bf16, not fp16, on GPUs.
To hack: copy this file. What is MAE: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, toggle, width
from common.augment import EvalView, View, augment, to_device
from common.checkpoint import compare_tensors, load_backbone, load_file, refuse_tensors
from common.datasets import Files, evenly_spaced
from common.distributed import end_processes, is_main, print0
from common.images import BadImage
from common.loader import crop_batches
from common.optim import cosine, param_groups, upcast
from common.pictures import save_table, shown
from common.run import Run
from common.vit import ARCHS, Block, initialise, sincos, vit


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__, data=False)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("MAE")
    group.add_argument("--crop-min", type=share, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="vit_base", help="vit_tiny, small, base, large or huge")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--patch-size", type=positive(int), help="pixels (default: 16; ViT-H: 14; small images: less)")
    group.add_argument("--depth", type=positive(int), help="blocks of the encoder (default: by --arch)")
    group.add_argument("--heads", type=positive(int), help="attention heads of the encoder (default: by --arch)")
    group.add_argument("--decoder-dim", type=positive(int), help="default: 512, or that of an encoder below ViT-B")
    group.add_argument("--decoder-depth", type=positive(int), help="blocks (default: 8, or a third of the encoder's)")
    group.add_argument("--decoder-heads", type=positive(int), help="default: 16, or the encoder's")
    group.add_argument("--mask-ratio", type=below_one, default=0.75, help="share of the patches that is removed")
    group.add_argument("--norm-pix", action=toggle, default=True, help="predict pixels normalised within each patch")
    group.add_argument("--epochs", type=positive(int), default=800)
    group.add_argument("--warmup-epochs", type=at_least(0), default=40)
    group.add_argument(
        "--batch-size", type=positive(int), default=4096, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=1.5e-4, help="per 256 images: times batch-size / 256")
    group.add_argument("--weight-decay", type=at_least(0, float), default=0.05, help="not of biases and norms")
    group.add_argument("--momentum", type=below_one, default=0.9)
    group = parser.add_argument_group("memory and pictures", recipe=False)
    group.add_argument("--grad-checkpointing", action=toggle, default=False, help="less memory, a third more computing")
    group.add_argument(
        "--pictures-every", type=at_least(0), default=10, help="epochs between reconstructions.png (0: never)"
    )
    group = parser.add_argument_group("instead of training", recipe=False)
    group.add_argument("--visualize", nargs="+", metavar="IMAGE", help="reconstruct image files: <out>/visualize.png")
    text = "for --visualize: last.pt, or an official file with the decoder (mae_visualize_*.pth: with --no-norm-pix)"
    group.add_argument("--pretrained", help=text)
    group.add_argument("--trust-pickle", action=toggle, default=False, help="allow --pretrained to run code")
    args = parser.parse_args(argv)
    if bool(args.visualize) != bool(args.pretrained):
        parser.error("--visualize and --pretrained go together (training: --data, and --init for weights)")
    if not args.data and not args.visualize:
        parser.error("the following arguments are required: --data")
    shape, given = decoder_shape(args), {"decoder_dim", "decoder_heads"} & args.given
    for name, value in shape.items():
        setattr(args, name, value)
    unit = math.lcm(4, args.decoder_heads)
    if given and args.decoder_dim % unit:
        near = max(1, round(args.decoder_dim / unit)) * unit
        parser.error(
            f"--decoder-dim {args.decoder_dim} must be a multiple of 4 and of {args.decoder_heads} heads: try {near}"
        )
    args.image_size = args.image_size or default_size(args.data)
    return args


def decoder_shape(args):
    """The paper's decoder for ViT-B and larger. Smaller encoders (not in the paper) get one of their own dimension and
    heads, with a third of their blocks. Flags that are given win; heads then divide the dimension."""
    dim, depth, heads, _ = ARCHS.get(args.arch, ARCHS["vit_base"])
    dim, depth, heads = round(dim * args.width), args.depth or depth, args.heads or heads
    small = dim < ARCHS["vit_base"][0]
    dim = args.decoder_dim or (dim if small else 512)
    heads = max(n for n in range(1, (heads if small else 16) + 1) if dim % n == 0)
    depth = args.decoder_depth or (max(1, round(depth / 3)) if small else 8)
    return {"decoder_dim": dim, "decoder_depth": depth, "decoder_heads": args.decoder_heads or heads}


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """One view, cropped and mirrored: no colours are changed."""
    return [View(size=size, area=(crop_min, 1.0), flip=flip, interpolation="bicubic")]


# ------------------------------------------------------------------------------------------------------ model
def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, P * P * C): patches row by row, in each its rows, its columns, its channels."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches, grid, channels=3):
    """The inverse of patchify for a grid of (rows, columns): (B, L, P * P * C) -> (B, C, H, W)."""
    size = round((patches.shape[2] / channels) ** 0.5)
    x = patches.reshape(len(patches), *grid, size, size, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(patches), channels, grid[0] * size, grid[1] * size)


def random_masking(noise, ratio):
    """Which patches are removed: all but those of the int(L (1 - ratio)) smallest numbers.

    noise: (B, L). Returns keep (B, K), the visible patches; restore (B, L), the place of each patch in the order
    "visible ones as in keep, then removed ones"; mask (B, L), 1 where a patch is removed.
    """
    visible = int(noise.shape[1] * (1 - ratio))
    order = noise.argsort(1)
    restore = order.argsort(1)
    return order[:, :visible], restore, (restore >= visible).float()


class MAE(nn.Module):
    """Encoder and decoder. The decoder has a width and positions of its own, and sees all places.

    decoder_dim, decoder_depth, decoder_heads: its dimension, blocks and attention heads.
    """

    def __init__(self, backbone, decoder_dim=512, decoder_depth=8, decoder_heads=16):
        super().__init__()
        self.backbone = backbone
        self.decoder_embed = nn.Linear(backbone.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        table = torch.zeros(1, 1 + backbone.grid[0] * backbone.grid[1], decoder_dim)
        table[0, 1:] = sincos(decoder_dim, backbone.grid)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, backbone.patch_embed.proj.weight[0].numel())
        initialise(nn.ModuleList([self.decoder_embed, self.decoder_blocks, self.decoder_pred]))
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, tokens, restore):
        """Tokens of class and visible patches (B, 1 + K, dim) -> predictions of all patches (B, L, P * P * C)."""
        x = self.decoder_embed(tokens)
        masked = self.mask_token.expand(len(x), 1 + restore.shape[1] - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], masked], 1)
        patches = patches.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.backbone.checkpointing else block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, x, noise, mask_ratio=0.75):
        """x: images (B, C, S, S), noise: uniforms (B, L). Returns predictions (B, L, P * P * C) and mask (B, L)."""
        keep, restore, mask = random_masking(noise, mask_ratio)
        return self.decode(self.backbone.tokens(x, keep), restore), mask


# ------------------------------------------------------------------------------------------------------- loss
def statistics(patches):
    """Mean and standard deviation of each patch (B, L, P * P * C) -> (B, L, 1); that of a flat patch is 0.001."""
    return patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + 1e-6).sqrt()


def mae_loss(images, prediction, mask, patch_size, norm_pix=True):
    """Mean squared error over the removed patches; the visible ones do not count.

    images: (B, C, H, W), prediction: (B, L, P * P * C), mask: (B, L) -> scalar. norm_pix: patches are scaled to mean 0
    and unbiased variance 1; so predicting 0, the mean, gives (n - 1) / n for n = C P^2 values.
    """
    target = patchify(images, patch_size)
    if norm_pix:
        centre, scale = statistics(target)
        target = (target - centre) / scale
    return (F.mse_loss(prediction, target, reduction="none").mean(2) * mask).sum() / mask.sum()


# --------------------------------------------------------------------------------------------------- training
@torch.no_grad()
def reconstruct(model, x, noise, mask_ratio=0.75, norm_pix=True):
    """Original, visible patches, predicted patches, both of these: (4, B, C, S, S), normalised as x. Where a panel has
    no patch it is 0, the mean colour.

    norm_pix: the prediction is given back the true mean and standard deviation of each patch, which it does not know.
    """
    prediction, mask = model(x, noise, mask_ratio)
    patches, prediction, mask = patchify(x, model.backbone.patch_size), upcast(prediction), mask[:, :, None]
    if norm_pix:
        centre, scale = statistics(patches)
        prediction = prediction * scale + centre
    visible, predicted = patches * (1 - mask), prediction * mask
    panels = (patches, visible, predicted, visible + predicted)
    return torch.stack([unpatchify(p.to(x.dtype), model.backbone.grid, x.shape[1]) for p in panels])


def save_pictures(path, model, images, view, mask_ratio, norm_pix, seed, amp):
    """PNG of what `reconstruct` gives for a small data set, from the main process: a row per image.

    view: whose size, mean and std the images get.
    """
    if not is_main():
        return
    view = EvalView(view.size, resize=view.size, interpolation="bicubic", mean=view.mean, std=view.std)
    token, patches = model.mask_token, model.backbone.grid[0] * model.backbone.grid[1]
    (crops,), _, _, indices = next(crop_batches(images, view, np.arange(len(images)), len(images), token.device, 0))
    x = augment(crops, [], view.mean, view.std, token.dtype)
    noise = torch.from_numpy(rng.uniforms(seed, 0, indices, rng.PICTURES, patches))
    with amp:
        panels = reconstruct(model, x, to_device(noise, token.device), mask_ratio, norm_pix)
    headings = ("original", "visible", "reconstruction", "with visible patches")
    visible = int(patches * (1 - mask_ratio))
    caption = f"{visible} of {patches} patches are visible, the others are predicted; grey: no patch here."
    if norm_pix:
        caption += " Predictions are shown with the true mean and standard deviation of each patch (norm_pix)."
    panels = panels.transpose(0, 1).flatten(0, 1)
    images = shown(panels, view).masked_fill((panels == 0).all(1, keepdim=True).cpu(), 0.8)
    save_table(path, images, headings, caption)


def visualize(args, run):
    """Instead of training: the picture for any image files, from a file that holds encoder and decoder."""
    state = load_file(args.pretrained, "--pretrained", args.trust_pickle)
    weights = {k: v for k, v in state.get("model", state).items() if k.startswith(("decoder_", "mask_token"))}
    if "decoder_embed.weight" not in weights:
        fail(f"--pretrained {args.pretrained} holds no decoder (a backbone.pt never does): give the last.pt of a run")
    backbone, meta = load_backbone(args.pretrained, trust_pickle=args.trust_pickle)
    told = state["args"] if "backbone_prefix" in state else {}  # official files do not tell
    told = vars(args) | {k: v for k, v in told.items() if k not in args.given}
    depth = len({k.split(".")[1] for k in weights if k.startswith("decoder_blocks.")})
    model = MAE(backbone, len(weights["decoder_embed.weight"]), depth, told["decoder_heads"])
    weights |= {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    if compare_tensors(model, weights)[0]:
        refuse_tensors(f"--pretrained {args.pretrained}", "encoder and decoder", model, weights)
    model.load_state_dict(weights)
    images = Files(".", args.visualize, channels=meta["channels"])
    try:
        [images[i] for i in range(len(images))]
    except BadImage as error:  # which a loader would replace by its neighbour
        fail(f"--visualize {error}")
    view = EvalView(backbone.grid[0] * backbone.patch_size, mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path, rest = f"{args.out}/visualize.png", (told["mask_ratio"], told["norm_pix"], args.seed, run.amp)
    save_pictures(path, model.to(run.device, run.dtype), images, view, *rest)
    print0(f"written     {path}")


def main(args):
    run = Run(args)
    if args.visualize:
        visualize(args, run)
        return end_processes()
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip))
    shape = {k: getattr(args, k) for k in ("arch", "image_size", "width", "patch_size", "depth", "heads", "channels")}
    backbone = vit(**shape)
    backbone.checkpointing = args.grad_checkpointing
    patches, values = backbone.grid[0] * backbone.grid[1], args.channels * backbone.patch_size**2
    visible = int(patches * (1 - args.mask_ratio))
    if not 0 < visible < patches:
        fail(f"--mask-ratio {args.mask_ratio} leaves {visible} of {patches} patches visible: between 0 and all must be")
    if args.norm_pix and values == 1:
        fail("--norm-pix divides by the deviation of a patch, which needs two values: --no-norm-pix, or --patch-size 2")
    model = run.place(MAE(backbone, args.decoder_dim, args.decoder_depth, args.decoder_heads))
    peak = args.lr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay)  # MAE: class and mask token decay, as in the official code
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(args.momentum, 0.95))
    chance = (values - 1) / values if args.norm_pix else None
    lines = {"baseline": f"loss {values - 1}/{values} = {chance:.3f}, predicting means"} if chance else {}
    lines["decoder"] = f"{args.decoder_dim} dimensions, {args.decoder_depth} blocks, {args.decoder_heads} heads"
    if backbone.dim < 768 and not {"decoder_dim", "decoder_depth", "decoder_heads"} <= args.given:
        lines["decoder"] += ", scaled with the encoder (the paper's, for ViT-B and larger: 512, 8, 16)"
    lines["tokens"] = f"{visible} of {patches} patches of {backbone.patch_size} px are visible to the encoder"
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    net = run.start(model, optimizer, chance=chance, lr=rule, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                (x,) = batch.views()
                prediction, mask = net(x, batch.uniforms(patches), args.mask_ratio)  # MAE: a mask belongs to its image
                run.backward(mae_loss(x, prediction, mask, backbone.patch_size, args.norm_pix))  # MAE
            run.update(optimizer)
            run.log(lr)
        if args.pictures_every and (run.step == run.last or (epoch + 1) % args.pictures_every == 0):
            images, rest = evenly_spaced(data if run.val is None else run.val, 8), (args.mask_ratio, args.norm_pix)
            save_pictures(f"{args.out}/reconstructions.png", model, images, run.view, *rest, args.seed, run.amp)
            run.note()  # its time does not count as training


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
