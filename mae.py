"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv 2111.06377).

Three quarters of an image's patches are removed at random. The encoder, a ViT, sees only the rest; a small decoder gets
its output, with one learned token in place of every missing patch, and predicts the pixels x of these:
L = |prediction - (x - mean(x)) / sqrt(var(x) + 1e-6)|^2 / values per patch, mean over the missing patches.

    torchrun --nproc_per_node=8 mae.py --data /imagenet
    python mae.py --data cifar10 --arch vit_tiny --batch-size 512 --decoder-dim 192 --decoder-depth 4 --decoder-heads 3
    python mae.py --visualize photo.jpg --pretrained runs/mae/last.pt --out pictures

Published, ImageNet, 1600 epochs, top-1 (official code): fine-tuned ViT-B 83.6, ViT-L 85.9, ViT-H 86.9; linear 67.8,
76.0, 77.2. ViT-B, 400 epochs, fine-tuned, in MMSelfSup 0.11: 83.1. Ours: not run. The default is the official
command's 800 epochs. Judge MAE by eval_finetune.py: nothing trains the class token to tell images apart, and its k-NN
accuracy stays low where fine-tuning works (lightly's benchmark, ViT-B, 100 epochs: 11.2, fine-tuned 81.3).

Small images (a start, not from the paper): 64 to 256 patches of 4 x 4 pixels or more, so --patch-size 4 at 32 px, 8 at
64 or 96 px (unset: an eighth of at most 128 px, which is 64 patches); the decoder as above; 400 epochs or more.

Deviations from the official code: the bias of the patch embedding starts at zero; bf16, not fp16, on GPUs.
To hack: copy this file. What is MAE: the sections augmentation, model and loss, and the lines marked in main.
"""

import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from common.augment import EvalView, View, augment, uniforms
from common.checkpoint import compare, init_from, load, load_backbone, refuse, resume, save_run
from common.data import Files, Loader, Pool, build, center_crop, default_size, fit, spread
from common.distributed import finish, init, is_main, mean, parallel, print0
from common.knn import knn_monitor
from common.log import Logger, Parser, check_args, describe, fail, rgb, save_views
from common.optim import cosine, full, param_groups, precision
from common.vit import Block, initialise, sincos, vit


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", help="folder of images, or digits, cifar10[:DIR], stl10[:DIR], fake[:N]; required but for --visualize"
    )
    group.add_argument("--train-list", help="list file of training images, 'relative/path[ label]' per line")
    group.add_argument("--val-list", help="list file of validation images")
    group.add_argument("--image-size", type=int, help="pixels of a view (default: 224, or what fits a small named set)")
    group.add_argument("--crop-min", type=float, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=float, default=0.5, help="probability of a mirrored view")
    group.add_argument("--channels", type=int, default=3, help="of the images; all can be made 1 or 3")
    group.add_argument("--stats", choices=["imagenet", "auto"], help="normalisation (default: auto unless 3 channels)")
    group.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="gpu: JPEGs by nvJPEG, other rounding")
    group.add_argument("--max-bad", type=int, default=100, help="stop after this many undecodable images")
    group = parser.add_argument_group("MAE")
    group.add_argument("--arch", default="vit_base", help="vit_tiny, small, base, large or huge")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--patch-size", type=int, help="pixels (unset: 16, 14 for vit_huge, less for small images)")
    group.add_argument("--depth", type=int, help="blocks of the encoder (unset: by --arch)")
    group.add_argument("--heads", type=int, help="attention heads of the encoder (unset: by --arch)")
    group.add_argument("--decoder-dim", type=int, default=512)
    group.add_argument("--decoder-depth", type=int, default=8, help="blocks of the decoder")
    group.add_argument("--decoder-heads", type=int, default=16)
    group.add_argument("--mask-ratio", type=float, default=0.75, help="share of the patches that is removed")
    group.add_argument("--no-norm-pix", dest="norm_pix", action="store_false", help="predict pixels as they are")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=800)
    group.add_argument("--warmup-epochs", type=int, default=40)
    group.add_argument("--batch-size", type=int, default=4096, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--lr", type=float, default=1.5e-4, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=float, default=0.05, help="not of biases and norms")
    group.add_argument("--momentum", type=float, default=0.9)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=f"runs/{Path(__file__).stem}", help="run folder")
    group.add_argument("--resume", action="store_true", default=True, help="continue from last.pt in --out")
    group.add_argument("--no-resume", dest="resume", action="store_false", help="start again, overwriting --out")
    group.add_argument("--init", help="weights to start from, with a fresh schedule")
    group.add_argument("--max-steps", type=int, default=0, help="stop after this many steps, keeping the schedule")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, default=8, help="loading threads per process")
    group.add_argument("--device", default="auto")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16", "fp64"], default="auto")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, a third more computing")
    group.add_argument("--log-every", type=int, default=20, help="steps")
    group.add_argument("--save-every", type=float, default=10, help="minutes")
    group.add_argument("--knn-every", type=int, default=10, help="epochs between k-NN accuracies (0: never)")
    group.add_argument("--pictures-every", type=int, default=10, help="epochs between reconstructions.png (0: never)")
    group = parser.add_argument_group("instead of training")
    group.add_argument("--visualize", nargs="+", metavar="IMAGE", help="reconstruct image files: <out>/visualize.png")
    group.add_argument("--pretrained", help="for --visualize: last.pt, or an official file that has the decoder")
    group.add_argument("--trust-pickle", action="store_true", help="read that file even if it could run programs")
    args = parser.parse_args(argv)
    if bool(args.visualize) != bool(args.pretrained):
        parser.error("--visualize and --pretrained go together (training: --data, and --init for weights)")
    if not args.data and not args.visualize:
        parser.error("the following arguments are required: --data")
    if min(args.decoder_dim, args.decoder_depth, args.decoder_heads) < 1 or not 0 < args.mask_ratio < 1:
        parser.error("--decoder-dim, --decoder-depth, --decoder-heads must be 1 or more, --mask-ratio in (0, 1)")
    if args.decoder_dim % args.decoder_heads or args.decoder_dim % 4:
        parser.error(f"--decoder-dim {args.decoder_dim} must be a multiple of 4 and of {args.decoder_heads} heads")
    args.image_size = args.image_size or default_size(args.data)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """One view, cropped and mirrored: no colours are changed."""
    view = View(
        size=size,
        crop=(crop_min, 1.0),
        flip=flip,
        interpolation="bicubic",
    )
    return [view]


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
    """Original, visible patches, prediction, prediction around the visible patches: (4, B, C, S, S), normalised as x.

    norm_pix: the prediction is given back the true mean and standard deviation of each patch, which it does not know.
    """
    prediction, mask = model(x, noise, mask_ratio)
    patches, prediction, mask = patchify(x, model.backbone.patch_size), full(prediction), mask[:, :, None]
    if norm_pix:
        centre, scale = statistics(patches)
        prediction = prediction * scale + centre
    visible = patches * (1 - mask)
    panels = (patches, visible, prediction, visible + prediction * mask)
    return torch.stack([unpatchify(p.to(x.dtype), model.backbone.grid, x.shape[1]) for p in panels])


def save_pictures(path, model, images, mean, std, mask_ratio, norm_pix, seed, amp, max_bad):
    """PNG of what `reconstruct` gives for a small dataset: a row per image, with headings and a caption."""
    if not is_main():
        return
    table, side = model.decoder_pos_embed, model.backbone.grid[0]
    size, count = side * model.backbone.patch_size, side**2
    view = EvalView(size, resize=size, interpolation="bicubic", mean=tuple(mean), std=tuple(std))
    jobs = [(np.arange(len(images)), np.zeros((1, len(images), 0)))]
    pool = Pool(images, table.device, 0, max_bad)
    indices, _, (crops,), _ = next(pool.run(jobs, (view,), center_crop))
    x = augment(crops, [], view.mean, view.std, table.dtype)
    noise = torch.from_numpy(uniforms(seed, 0, indices, 101, count)).to(table.device)
    with amp:
        panels = reconstruct(model, x, noise, mask_ratio, norm_pix).transpose(0, 1).flatten(0, 1).float().cpu()
    panels = panels * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
    zoom = -(-160 // size)  # small images are enlarged without smoothing; the headings need some room, too
    panels = rgb(panels, mean, std).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = to_pil_image(make_grid(panels, nrow=4, padding=4, pad_value=1.0))
    caption = f"{int(count * (1 - mask_ratio))} of {count} patches visible; predictions in their place are untrained."
    if norm_pix:
        caption += " Predictions are shown with the true mean and standard deviation of each patch (norm_pix)."
    lines = textwrap.wrap(caption, grid.width // 7)
    canvas = Image.new("RGB", (grid.width, grid.height + 28 + 18 * len(lines)), "white")
    canvas.paste(grid, (0, 20))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, text in enumerate(("original", "visible", "reconstruction", "with visible patches")):
        draw.text((4 + (i + 0.5) * (panels.shape[3] + 4), 2), text, "black", font, anchor="ma")
    draw.multiline_text((4, grid.height + 22), "\n".join(lines), "black", font)
    temporary = Path(path).with_suffix(".tmp.png")
    canvas.save(temporary)
    temporary.replace(path)


def visualize(args, device):
    """Instead of training: the picture for any image files, from a file that holds encoder and decoder."""
    if missing := [name for name in args.visualize if not Path(name).is_file()]:
        fail(f"--visualize {missing[0]}: no such file")
    amp, _, dtype = precision(args.precision, device)
    state = load(args.pretrained, "--pretrained", args.trust_pickle)
    weights = {k: v for k, v in state.get("model", state).items() if k.startswith(("decoder_", "mask_token"))}
    if "decoder_embed.weight" not in weights:
        fail(f"--pretrained {args.pretrained} holds no decoder (a backbone.pt never does): give the last.pt of a run")
    backbone, meta = load_backbone(args.pretrained, trust_pickle=args.trust_pickle)
    told = state["args"] if "backbone_prefix" in state else vars(args)  # official files do not tell
    depth = len({k.split(".")[1] for k in weights if k.startswith("decoder_blocks.")})
    model = MAE(backbone, len(weights["decoder_embed.weight"]), depth, told["decoder_heads"])
    weights |= {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    if compare(model, weights)[0]:
        refuse(f"--pretrained {args.pretrained}", "encoder and decoder", model, weights)
    model.load_state_dict(weights)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    images = Files(".", args.visualize, channels=meta["channels"])
    rest = (args.mask_ratio, told["norm_pix"], args.seed, amp)
    save_pictures(f"{args.out}/visualize.png", model.to(device, dtype), images, meta["mean"], meta["std"], *rest, 0)
    print0(f"written     {args.out}/visualize.png")


def main(args):
    device = init(args.device)
    check_args(args)
    if args.visualize:
        visualize(args, device)
        return finish()
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = fit(augmentation(args.image_size, args.crop_min, args.flip), data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    shape = {k: getattr(args, k) for k in ("arch", "image_size", "width", "patch_size", "depth", "heads", "channels")}
    backbone = vit(**shape)
    backbone.checkpointing = args.grad_checkpointing
    model = MAE(backbone, args.decoder_dim, args.decoder_depth, args.decoder_heads)
    model = model.to(device, dtype, memory_format=torch.channels_last)
    patches, values = backbone.grid[0] * backbone.grid[1], args.channels * backbone.patch_size**2
    visible = int(patches * (1 - args.mask_ratio))
    if not 0 < visible < patches:
        fail(f"--mask-ratio {args.mask_ratio} leaves {visible} of {patches} patches visible: between 0 and all must be")
    if args.init:
        init_from(args.init, model)
    peak = args.lr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay)  # MAE: class and mask token decay, as in the official code
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(args.momentum, 0.95))
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    chance = (values - 1) / values if args.norm_pix else None
    lines = {"chance": f"loss {values - 1}/{values} = {chance:.3f}, predicting means"} if chance else {}
    lines |= {"tokens": f"{visible} of {patches} patches of {backbone.patch_size} px are visible to the encoder"}
    describe(args, data, loader, model, lr=f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", **lines)
    log = Logger(args, loader, total, step, chance=chance)

    def save():
        save_run(args, step, len(data), model, optimizer, scaler, model.backbone, views[0])

    def knn():
        view = EvalView(args.image_size, mean=views[0].mean, std=views[0].std)
        return knn_monitor(model.backbone, data, val, view, device, args.workers, amp)

    def pictures():
        images, rest = spread(data if val is None else val, 8), (args.mask_ratio, args.norm_pix, args.seed, amp)
        path = Path(args.out) / "reconstructions.png"
        save_pictures(path, model, images, views[0].mean, views[0].std, *rest, args.max_bad)

    if args.knn_every and not state:
        log.note(0, **knn())
    saved = time.monotonic()
    for epoch in range(step // loader.steps, args.epochs):
        batches = loader.epoch(epoch, start=step % loader.steps)
        for step in range(step + 1, min((epoch + 1) * loader.steps, log.last) + 1):
            lr = peak * cosine(step - 1, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = 0.0
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                (x,) = batch.views()
                noise = uniforms(args.seed, epoch, batch.host_indices, 100, patches)  # MAE: a mask belongs to its image
                noise = loader.pool.to_device(torch.from_numpy(noise))
                with amp:
                    prediction, mask = net(x, noise, args.mask_ratio)
                part = mae_loss(x, full(prediction), mask, backbone.patch_size, args.norm_pix) / args.accum  # MAE
                scaler.scale(part).backward()
                loss = loss + part.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            if log.due(step):
                log.log(step, step / loader.steps, mean(loss).item(), lr)
                stop = log.stop.requested(device)
                if stop or step == log.last or time.monotonic() - saved > 60 * args.save_every:
                    save()
                    saved = time.monotonic()
                if stop:
                    log.end(step)
        whole = step == (epoch + 1) * loader.steps  # not cut short by --max-steps
        if args.knn_every and whole and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            log.note(step, **knn())
        if args.pictures_every and (step == log.last or (epoch + 1) % args.pictures_every == 0):
            pictures()
            log.note(step)
        if step >= log.last:
            break
    log.close()
    finish()


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
