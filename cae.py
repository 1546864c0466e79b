"""CAE: Context Autoencoder for Self-Supervised Representation Learning (Chen et al., IJCV 2024, arXiv 2202.03026).

Half of an image's patches are hidden, in blocks. The encoder, a ViT, sees only the others. A regressor reads what it
says of them and predicts what it would say of the hidden patches, z. From z alone a decoder tells the hidden patches'
tokens t, those of DALL-E's image tokenizer (Ramesh et al. 2021); the encoder, without gradient, tells the true z':
L = -log p(t) + 2 |z - z'|^2 / D, mean over the hidden patches.

    torchrun --nproc_per_node=8 cae.py --data /imagenet --tokenizer dalle_encoder.pth
    python cae.py --data cifar10 --target kmeans --arch vit_tiny --batch-size 512

--tokenizer: the encoder of DALL-E's discrete VAE as a plain state dict with its own names, blocks.input.w and so on, as
MMSelfSup's dalle_encoder.pth. OpenAI's encoder.pkl is a program, which is not run here; where the package dall_e is,
torch.save(torch.load("encoder.pkl", weights_only=False).state_dict(), "dalle_encoder.pth") makes one of it.

Other targets need no file. They are not CAE, nothing is published for them, and no figure of theirs is one of CAE's:
--target kmeans, the nearest of --codebook centroids of patches, which k-means finds before the first step; pixel, the
patches (MAE); hog, their gradient histograms (MaskFeat), times 3, so that their mean square is 1, too: otherwise the
second term of L outweighs them. The last two have a squared error, mean over values, in place of -log p(t).

Published, ImageNet, ViT-B, top-1 fine-tuned and linear (official code): 83.6 and 64.5 after 300 epochs, 83.8 and 68.9
after 800 (--warmup-epochs 20), 83.9 and 70.3 after 1600 (40); ViT-L, 1600 epochs (40, --layer-scale 1e-5): 86.2 and
77.8. ViT-B, 300 epochs, fine-tuned, in MMSelfSup 0.11 (--masked 75 --drop-path 0): 83.2. Ours: not run.

Small images (a start, not from the paper): --target kmeans or hog, and 64 to 256 patches of 4 x 4 pixels or more, so
--patch-size 4 at 32 px, 8 at 64 or 96 px (by default an eighth of at most 128 px, which is 64 patches).

Deviations from the official code: the tokenizer's view is resized bicubically (there: Lanczos) and tokenized in single
precision; regressor and decoder have the encoder's width and heads (there: 768 and 12 unless told otherwise, the same
for ViT-B); keys have a bias, which changes nothing; the rate's warm-up ends one step later; bf16, not fp16, on GPUs.
To hack: copy this file. What is CAE: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import itertools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, toggle, width
from common.augment import View, augment, to_device
from common.checkpoint import load_file
from common.datasets import evenly_spaced
from common.distributed import is_main
from common.features import output_std
from common.kmeans import kmeans
from common.layouts import containers
from common.loader import crop_batches, eval_batches
from common.masks import block_masks
from common.namings import shaped
from common.optim import cosine, param_groups, upcast
from common.pictures import save_table, shown
from common.run import Run
from common.vit import Block, initialise, path_factors, vit

TARGETS = {"dalle": "tokens of DALL-E", "kmeans": "centroids", "pixel": "pixels", "hog": "gradient histograms"}
PIXELS, LOGITS = "blocks.input.w", "blocks.output.conv.w"  # first and last tensor of DALL-E's encoder
OWN = {"tokenizer": ("dalle",), "codebook": ("kmeans",), "norm_pix": ("kmeans", "pixel")}  # flags of some targets only


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("CAE")
    group.add_argument("--crop-min", type=share, default=0.08, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="vit_base", help="vit_tiny, small, base, large or huge")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument(
        "--patch-size", type=positive(int), help="pixels (default: 16, 14 for vit_huge, less for small images)"
    )
    group.add_argument("--depth", type=positive(int, 1000), help="blocks of the encoder (default: by --arch)")
    group.add_argument("--heads", type=positive(int), help="attention heads (default: by --arch)")
    group.add_argument("--masked", type=positive(int), help="patches to hide (default: half, 98 of 196)")
    group.add_argument("--target", choices=TARGETS, default="dalle", help="dalle is CAE's")
    group.add_argument("--tokenizer", metavar="FILE", help="dalle: state dict of DALL-E's encoder")
    group.add_argument("--codebook", type=at_least(2), default=512, help="kmeans: number of tokens")
    group.add_argument("--norm-pix", action=toggle, default=True, help="kmeans, pixel: patches are normalised each")
    group.add_argument("--regressor-depth", type=positive(int, 1000), default=4, help="blocks of the regressor")
    group.add_argument("--decoder-depth", type=positive(int, 1000), default=4, help="blocks of the decoder")
    group.add_argument("--align-weight", type=at_least(0, float), default=2.0, help="of the second term of the loss")
    group.add_argument("--layer-scale", type=at_least(0, float), default=0.1, help="its first value (0: none)")
    group.add_argument("--drop-path", type=below_one, default=0.1, help="probability in the last of the blocks")
    group.add_argument("--epochs", type=positive(int), default=300)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=2048, help="images per step over all processes and --accum"
    )
    group.add_argument(
        "--lr", type=positive(float), default=1.875e-4, help="per 256 images: multiplied by batch-size / 256"
    )
    group.add_argument("--min-lr", type=at_least(0, float), default=1.25e-6, help="at the end, also per 256 images")
    group.add_argument("--weight-decay", type=at_least(0, float), default=0.05, help="not of biases and norms")
    group.add_argument("--momentum", type=below_one, default=0.9)
    group.add_argument("--clip", type=at_least(0, float), default=3.0, help="largest norm of the gradient (0: any)")
    group = parser.add_argument_group("memory and pictures", recipe=False)
    group.add_argument(
        "--grad-checkpointing", action=toggle, default=False, help="of the encoder: less memory, more computing"
    )
    text = "kmeans, pixel: epochs between reconstructions.png (0: never)"
    group.add_argument("--pictures-every", type=at_least(0), default=10, help=text)
    args = parser.parse_args(argv)
    for name in OWN.keys() & args.given:
        if args.target not in OWN[name]:
            parser.error(f"--{name.replace('_', '-')} is for --target {' or '.join(OWN[name])}, not for {args.target}")
    if args.min_lr >= args.lr:
        parser.error(f"--min-lr {args.min_lr} must be smaller than --lr {args.lr}")
    args.image_size = args.image_size or default_size(args.data)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5, tokens=0):
    """One view, cropped and mirrored: no colours are changed. tokens: the same crop once more, in this size."""
    view = View(size=size, area=(crop_min, 1.0), flip=flip, interpolation="bicubic")
    return [view, dataclasses.replace(view, size=tokens)] if tokens else [view]


def hide(seeds, grid, count, device):
    """Which patches of a grid are visible, (B, L - count), and which are hidden, (B, count): ascending indices.

    seeds: uniforms (B, 1). Blocks have 16 of 196 patches or more (official code), or the same share of other numbers.
    """
    mask = block_masks(seeds, grid, count, max(1, round(16 * grid[0] * grid[1] / 196)))
    order = to_device(torch.from_numpy(np.argsort(mask, 1, kind="stable")), device)
    return order[:, :-count], order[:, -count:]


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


def statistics(patches):
    """Mean and standard deviation of each patch (B, L, P * P * C) -> (B, L, 1); that of a flat patch is 0.001."""
    return patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + 1e-6).sqrt()


class CrossAttention(nn.Module):
    """Queries (B, M, D) read values (B, N, D) by keys (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, q, k, v):
        parts = (layer(x).unflatten(2, (self.heads, -1)) for layer, x in ((self.q, q), (self.k, k), (self.v, v)))
        x = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        return self.proj(x.transpose(1, 2).flatten(2))


class RegressorBlock(Block):
    """Queries x (B, M, D) at positions p read the visible tokens and themselves, y at positions r:
    x <- norm2(x + attention(norm1(x + p), norm_k(y + r), norm_v(y))), then x + MLP(x). paths: see Block."""

    def __init__(self, dim, heads, layer_scale=0.0):
        super().__init__(dim, heads, layer_scale=layer_scale)
        self.attn = CrossAttention(dim, heads)
        self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))

    def forward(self, x, visible, p, p_visible, paths):
        first, second = paths.to(x.dtype)[:, :, None, None]
        y, r = torch.cat([visible, x], 1), torch.cat([p_visible, p], 1)
        x = self.norm2(x + first * self.ls1(self.attn(self.norm1(x + p), self.norm_k(y + r), self.norm_v(y))))
        return x + second * self.ls2(self.mlp(x))


class CAE(nn.Module):
    """Encoder, regressor and decoder, all of one width. outputs: of the decoder, per patch.

    codebook: number of centroids of patches, a buffer (0: none). drop_path: probability that the last block of each
    of the three leaves a branch out; it is smaller in those before.
    """

    def __init__(
        self, backbone, outputs, codebook=0, regressor_depth=4, decoder_depth=4, layer_scale=0.1, drop_path=0.1
    ):
        super().__init__()
        self.backbone, self.drop_path, dim, heads = backbone, drop_path, backbone.dim, backbone.heads
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.regressor = nn.ModuleList([RegressorBlock(dim, heads, layer_scale) for _ in range(regressor_depth)])
        self.regressor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder = nn.ModuleList([Block(dim, heads, layer_scale=layer_scale) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)
        if codebook:
            self.register_buffer("codebook", torch.zeros(codebook, backbone.patch_embed.proj.weight[0].numel()))
        initialise(nn.ModuleList([self.regressor, self.decoder, self.head]))
        for weight in (self.mask_token, backbone.cls_token, backbone.patch_embed.proj.weight):  # as the official code
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)

    @property
    def draws(self):
        """Uniforms per sample for stochastic depth."""
        return 2 * (2 * len(self.backbone.blocks) + len(self.regressor) + len(self.decoder))

    def forward(self, x, visible, hidden, u=None):
        """x: images (B, C, S, S). visible (B, L - M), hidden (B, M): see `hide`. u: None, or uniforms (B, draws).
        Returns predictions (B, M, outputs), what the regressor says z (B, M, D) and what the encoder says (B, M, D)."""
        u, rate = (x.new_zeros(len(x), self.draws), 0.0) if u is None else (u, self.drop_path)
        depths = [len(blocks) for blocks in (self.backbone.blocks, self.backbone.blocks, self.regressor, self.decoder)]
        paths = [path_factors(part, rate) for part in u.split([2 * depth for depth in depths], 1)]
        seen = self.backbone.tokens(x, visible, paths[0])[:, 1:]  # first: autocast keeps weights cast without gradient
        with torch.no_grad():
            target = self.backbone.tokens(x, hidden, paths[1])[:, 1:]
        table = self.backbone.pos_embed[0, 1:]
        z, p = self.mask_token.expand(len(x), hidden.shape[1], -1), table[hidden]
        for block, part in zip(self.regressor, paths[2].unflatten(0, (-1, 2)), strict=True):
            z = block(z, seen, p, table[visible], part)
        z = self.regressor_norm(z)
        y = z + p
        for block, part in zip(self.decoder, paths[3].unflatten(0, (-1, 2)), strict=True):
            y = block(y, part)
        return self.head(self.decoder_norm(y)), z, target


@torch.no_grad()
def token_logits(weights, x):
    """What DALL-E's encoder gives for images (B, 3, 8 h, 8 w) in [0, 1]: (B, K, h, w). The largest is the token."""

    def conv(name, x):
        w, b = weights[f"{name}.w"], weights[f"{name}.b"]
        return F.conv2d(x, w, b, padding=w.shape[-1] // 2)

    x = conv("blocks.input", 0.8 * x.float() + 0.1)
    for name in (f"blocks.group_{group}.block_{block}" for group in range(1, 5) for block in (1, 2)):
        y = x
        for i in range(1, 5):
            y = conv(f"{name}.res_path.conv_{i}", F.relu(y))
        x = (conv(f"{name}.id_path", x) if f"{name}.id_path.w" in weights else x) + y / 64
        x = F.max_pool2d(x, 2) if name[-1] == "2" and "group_4" not in name else x
    return conv("blocks.output.conv", F.relu(x))


def tokenizer_shapes(width=256, tokens=8192):
    """{name: shape} of the tensors of DALL-E's encoder."""
    layers = {"blocks.input": (width, 3, 7), "blocks.output.conv": (tokens, 8 * width, 1)}
    for group, block in itertools.product(range(4), range(2)):
        name, last = f"blocks.group_{group + 1}.block_{block + 1}", width * 2**group
        first, hidden = last if block or not group else last // 2, last // 4
        sizes = {1: (hidden, first, 3), 2: (hidden, hidden, 3), 3: (hidden, hidden, 3), 4: (last, hidden, 1)}
        layers |= {f"{name}.res_path.conv_{i}": size for i, size in sizes.items()}
        layers |= {f"{name}.id_path": (last, first, 1)} if first != last else {}
    return {f"{k}.w": (*size, size[2]) for k, size in layers.items()} | {f"{k}.b": s[:1] for k, s in layers.items()}


def load_tokenizer(path, channels, device):
    """The weights that `token_logits` takes, from a file that has them under any prefix; also of another width."""
    if not path:
        fail("--target dalle needs --tokenizer FILE, DALL-E's encoder; --target kmeans, pixel and hog need no file")
    if str(path).endswith(".pkl"):
        fail(f"--tokenizer {path}: OpenAI's file is a program; cae.py --help tells how to make a state dict of it")
    if channels != 3:
        fail(f"--channels {channels}: DALL-E's tokenizer is for 3; --target kmeans, pixel and hog take any")
    for tensors in containers(load_file(path, "--tokenizer")).values():
        for prefix in (name.removesuffix(PIXELS) for name in tensors if f".{name}".endswith(f".{PIXELS}")):
            found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(f"{prefix}blocks.")}
            there = {k: tuple(v.shape) for k, v in found.items()}
            width, tokens = len(shaped(found, PIXELS, 256, 3, 7, 7)), len(shaped(found, LOGITS, 8192, 2048, 1, 1))
            shapes = tokenizer_shapes(width, tokens)
            for name in (name for name in shapes | there if shapes.get(name) != there.get(name)):
                was, expected = there.get(name, "missing"), shapes.get(name, "no such tensor")
                fail(f"--tokenizer {path}: {name} is {was}, DALL-E's encoder has {expected}")
            return {k: v.to(device, torch.float32) for k, v in found.items()}
    fail(f"--tokenizer {path} is not DALL-E's encoder: there is no {PIXELS} in it")


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


def normalised(x, patch_size, norm_pix=True):
    """Patches (B, L, V) of images, each with mean 0 and unbiased variance 1 (norm_pix), or as they are."""
    patches = patchify(x, patch_size)
    centre, scale = statistics(patches) if norm_pix else (0, 1)
    return (patches - centre) / scale


def nearest(patches, codebook):
    """The centroid (K, V) that is nearest to each patch (B, L, V), by its number: (B, L)."""
    return (patches @ codebook.T - codebook.square().sum(1) / 2).argmax(2)


def find_codebook(data, view, k, patch_size, norm_pix, seed, device, workers, dtype):
    """Centroids (k, V) of the patches of evenly spaced images, by k-means: the same on all processes and, but for the
    last digits, for any number of them. view: how images are seen."""
    patches = (view.size // patch_size) ** 2
    images = evenly_spaced(data, -(-max(2**17, 64 * k) // patches))  # 64 patches per centroid or more
    if k > len(images) * patches:
        fail(f"--codebook {k} is larger than the {len(images) * patches} patches of the images: use far fewer")
    rows = [torch.zeros(0, patch_size**2 * len(view.mean), dtype=dtype, device=device)]  # of a process without images
    for x, _, _ in eval_batches(images, view, 256, device, workers, dtype, replace=True):
        rows.append(normalised(x, patch_size, norm_pix).flatten(0, 1))
    return kmeans(torch.cat(rows), k, seed=seed).centroids


# ------------------------------------------------------------------------------------------------------- loss
def cae_loss(prediction, target, z, target_z, align_weight=2.0):
    """Cross entropy of tokens, or mean squared error of vectors, plus align_weight times that of z: means over batch,
    hidden patches and dimensions. No gradient passes into targets.

    prediction: (B, M, K), target: tokens (B, M) or vectors (B, M, K), z, target_z: (B, M, D) -> scalar.
    """
    if target.is_floating_point():
        loss = F.mse_loss(prediction, target.detach())
    else:
        loss = F.cross_entropy(prediction.flatten(0, 1), target.flatten())
    return loss + align_weight * F.mse_loss(z, target_z.detach())


# --------------------------------------------------------------------------------------------------- training
@torch.no_grad()
def reconstruct(model, x, visible, hidden, norm_pix=True):
    """Original, visible patches, these and the predictions, these and the targets: (4, B, C, S, S), normalised as x.
    Where a panel has no patch it is 0, the mean colour.

    norm_pix: predictions are given back the true mean and standard deviation of each patch, which they do not know.
    """
    patches, size = patchify(x, model.backbone.patch_size), model.backbone.patch_size
    place = hidden[:, :, None].expand(-1, -1, patches.shape[2])
    prediction, truth = upcast(model(x, visible, hidden)[0]), normalised(x, size, norm_pix).gather(1, place)
    if hasattr(model, "codebook"):
        prediction, truth = (model.codebook[i] for i in (prediction.argmax(2), nearest(truth, model.codebook)))
    if norm_pix:
        centre, scale = statistics(patches.gather(1, place))
        prediction, truth = prediction * scale + centre, truth * scale + centre
    panels = (patches.scatter(1, place, part.to(x.dtype)) for part in (torch.zeros_like(truth), prediction, truth))
    return torch.stack([unpatchify(p, model.backbone.grid, x.shape[1]) for p in (patches, *panels)])


def save_pictures(path, model, images, view, masked, norm_pix, seed, amp):
    """PNG of what `reconstruct` gives for a small data set, from the main process: a row per image.

    view: whose size, mean and std the images get.
    """
    if not is_main():
        return
    token, grid = model.mask_token, model.backbone.grid
    (crops,), _, _, indices = next(crop_batches(images, view, np.arange(len(images)), len(images), token.device, 0))
    x = augment(crops, [], view.mean, view.std, token.dtype)
    places = hide(rng.uniforms(seed, 0, indices, rng.PICTURES, 1), grid, masked, token.device)
    with amp:
        panels = reconstruct(model, x, *places, norm_pix)
    caption = f"{masked} of {grid[0] * grid[1]} patches are hidden; grey: no patch here."
    if norm_pix:
        caption += " Predictions and targets have the true mean and standard deviation of each patch (norm_pix)."
    panels = panels.transpose(0, 1).flatten(0, 1)
    images = shown(panels, view).masked_fill((panels == 0).all(1, keepdim=True).cpu(), 0.8)
    save_table(path, images, ("original", "visible", "with predictions", "with targets"), caption)


def main(args):
    run = Run(args)
    tokenizer = load_tokenizer(args.tokenizer, args.channels, run.device) if args.target == "dalle" else None
    shape = {k: getattr(args, k) for k in ("arch", "image_size", "width", "patch_size", "depth", "heads", "channels")}
    backbone = vit(**shape, positions="sincos-yx", layer_scale=args.layer_scale)
    backbone.checkpointing, size, grid = args.grad_checkpointing, backbone.patch_size, backbone.grid
    patches, values, cell = grid[0] * grid[1], args.channels * size**2, default_cell(size)
    masked = args.masked or patches // 2
    if not 0 < masked < patches:
        fail(f"--masked {masked} of {patches} patches: at least one must be hidden, and one visible")
    views = augmentation(args.image_size, args.crop_min, args.flip, 8 * grid[0] if tokenizer else 0)
    data = run.open(views, streams=[0] * len(views))
    target_of, outputs = {  # CAE
        "dalle": (
            lambda x, small: token_logits(tokenizer, small * std + mean).argmax(1).flatten(1),
            tokenizer and len(tokenizer[LOGITS]),
        ),
        "kmeans": (lambda x: nearest(normalised(x, size, args.norm_pix), model.codebook), args.codebook),
        "pixel": (lambda x: normalised(x, size, args.norm_pix), values),
        "hog": (lambda x: 3 * hog(x, size, cell), 9 * args.channels * (size // cell) ** 2),
    }[args.target]
    what = f"{outputs} {TARGETS[args.target]}"
    if args.target != "dalle":
        what += ", which are not CAE's target: the results are not CAE's"
        backbone.config["method"] = f"cae, target {args.target}"  # in the files
    codebook = args.codebook if args.target == "kmeans" else 0
    depths = (args.regressor_depth, args.decoder_depth)
    model = run.place(CAE(backbone, outputs, codebook, *depths, args.layer_scale, args.drop_path))
    std, mean = (torch.tensor(v, device=run.device).view(-1, 1, 1) for v in (run.view.std, run.view.mean))
    peak = args.lr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay)  # CAE: class and mask token decay, as in the official code
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(args.momentum, 0.999))
    chance = math.log(outputs) if args.target in ("dalle", "kmeans") else None
    lines = {"baseline": f"loss ln({outputs}) = {chance:.2f} without that of z"} if chance else {}
    lines |= {"target": what, "masked": f"{masked} of {patches} patches of {size} px"}
    net = run.start(model, optimizer, chance=chance, lr=f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", **lines)
    view = dataclasses.replace(run.view, resize=args.image_size, interpolation="bicubic")
    if codebook and not model.codebook.any():  # else it came with its head, from last.pt or --init
        rest = (size, args.norm_pix, args.seed, run.device, args.workers, run.dtype)
        model.codebook.copy_(find_codebook(data, view, codebook, *rest))
        run.note()  # its time does not count as training

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=args.min_lr / args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                views, seeds = batch.views(), rng.uniforms(args.seed, epoch, batch.keys, rng.SCRIPT, 1)
                visible, hidden = hide(seeds, grid, masked, run.device)  # CAE: a mask belongs to its image
                u = batch.uniforms(model.draws, rng.PATHS).to(run.dtype) if args.drop_path else None
                prediction, z, target_z = net(views[0], visible, hidden, u)
                target = target_of(*views)[torch.arange(len(hidden), device=run.device)[:, None], hidden]
                run.backward(cae_loss(prediction, target, z, target_z, args.align_weight))  # CAE
            run.update(optimizer, args.clip)
            monitors = {}
            if run.due:
                monitors = {"std": output_std(target_z.flatten(0, 1)), "align": F.mse_loss(z, target_z)}
                monitors |= {"accuracy": (prediction.argmax(2) == target).to(z.dtype).mean()} if chance else {}
            run.log(lr, **monitors)
        due = args.pictures_every and (run.step == run.last or (epoch + 1) % args.pictures_every == 0)
        if due and args.target in OWN["norm_pix"]:
            images = evenly_spaced(data if run.val is None else run.val, 8)
            rest = (masked, args.norm_pix, args.seed, run.amp)
            save_pictures(f"{args.out}/reconstructions.png", model, images, view, *rest)
            run.note()  # its time does not count as training


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
