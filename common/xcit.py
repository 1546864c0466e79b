"""Cross-covariance image transformers (El-Nouby et al. 2021): attention among channels instead of places, whose cost is
linear in their number, 3x3 convolutions among places, and a class token that reads them at the end. Key names are those
of the official code."""

import collections
import math

import torch
import torch.nn.functional as F
from torch import nn

from common.args import fail
from common.optim import upcast

# Dimension, blocks, heads, start of the layer scale.
ARCHS = {
    "xcit_nano_12": (128, 12, 4, 1.0),
    "xcit_tiny_12": (192, 12, 4, 1.0),
    "xcit_tiny_24": (192, 24, 4, 1e-5),
    "xcit_small_12": (384, 12, 8, 1.0),
    "xcit_small_24": (384, 24, 8, 1e-5),
    "xcit_medium_24": (512, 24, 8, 1e-5),
    "xcit_large_24": (768, 24, 16, 1e-5),
}
PATCHES = (2, 4, 8, 16, 32)  # a stem halves the side one to five times; published: three or four


def path_factors(u, rate):
    """Stochastic depth: factors (3 depth, B) of the three branches of each block, for every sample: 0 with probability
    `rate`, the same in all blocks, and 1 / (1 - rate) otherwise. u: uniforms (B, 3 depth)."""
    return ((u >= rate).to(u.dtype) / (1 - rate)).T


def stem(patch_size, dim, channels=3):
    """3x3 convolutions of stride 2 with batch norm, GELU between them, twice as many channels each: to `dim`."""
    count = PATCHES.index(patch_size) + 1
    widths, layers = [channels, *(dim // 2 ** (count - 1 - i) for i in range(count))], []
    for i in range(count):
        conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False)
        layers += [nn.Sequential(conv, nn.BatchNorm2d(widths[i + 1])), nn.GELU()]
    return nn.ModuleDict({"proj": nn.Sequential(*layers[:-1])})


class Positions(nn.Module):
    """A linear layer of sines and cosines of row and column, as shares of the height and width: any grid."""

    def __init__(self, dim, hidden=32):
        super().__init__()
        self.hidden = hidden
        self.token_projection = nn.Conv2d(2 * hidden, dim, 1)

    def forward(self, rows, columns):
        """(1, dim, rows, columns)"""
        weight = self.token_projection.weight
        like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        rates = 10000 ** -(torch.arange(0, self.hidden, 2, **like) / self.hidden)

        def waves(count):  # (count, hidden): sine and cosine take turns
            share = torch.arange(1, count + 1, **like) / (count + 1e-6) * 2 * math.pi
            angles = share[:, None] * rates
            return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)

        y, x = waves(rows)[:, None].expand(-1, columns, -1), waves(columns)[None].expand(rows, -1, -1)
        return self.token_projection(torch.cat([y, x], 2).permute(2, 0, 1)[None].to(weight.dtype))


class CrossCovariance(nn.Module):
    """Attention of the channels of each head to each other (B, N, dim): queries and keys have unit length over the N
    places, softmax(temperature * q k^T), dim / heads squared, weighs the values."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1)  # (B, heads, d, N)
        q, k = F.normalize(upcast(q), dim=3), F.normalize(upcast(k), dim=3)
        weights = (upcast(q @ k.mT) * self.temperature).softmax(3).to(v.dtype)
        return self.proj((weights @ v).flatten(1, 2).mT)


class LocalInteraction(nn.Module):
    """3x3 convolutions of each channel by itself, of tokens (B, rows * columns, dim)."""

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, grid):
        x = x.mT.unflatten(2, grid)
        return self.conv2(self.bn(F.gelu(self.conv1(x)))).flatten(2).mT


def mlp(dim):
    layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
    return nn.Sequential(collections.OrderedDict(layers))


class Block(nn.Module):
    """Attention, convolutions, MLP: x + gamma * branch(norm(x)) each. paths: None, or factors of the three (3, B)."""

    def __init__(self, dim, heads, scale):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn, self.mlp, self.local_mp = CrossCovariance(dim, heads), mlp(dim), LocalInteraction(dim)
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.full((dim,), scale)) for _ in range(3))

    def forward(self, x, grid, paths=None):
        first, second, third = (1, 1, 1) if paths is None else paths.to(x.dtype)[:, :, None, None]
        x = x + first * (self.gamma1 * self.attn(self.norm1(x)))
        x = x + second * (self.gamma3 * self.local_mp(self.norm3(x), grid))
        return x + third * (self.gamma2 * self.mlp(self.norm2(x)))


class ClassAttention(nn.Module):
    """What the first token asks of all (B, 1 + N, dim) -> (B, 1, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q[:, :, :1], k, v).transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    """The class token, which comes first, reads the patches. As published, these change, too: each gets its norm added,
    and is doubled after a second norm (norm_all; else only the class token has one)."""

    def __init__(self, dim, heads, scale, norm_all=True):
        super().__init__()
        self.norm_all = norm_all
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = ClassAttention(dim, heads), mlp(dim)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), scale)) for _ in range(2))

    def forward(self, x):
        normed = self.norm1(x)
        x = x + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], 1)
        x = self.norm2(x) if self.norm_all else torch.cat([self.norm2(x[:, :1]), x[:, 1:]], 1)
        return x + torch.cat([self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]], 1)


class XCiT(nn.Module):
    """Images (B, channels, H, W) of any size -> the class token after the final norm (B, dim).

    scale: start of the layer scale. norm_all: see ClassBlock; all published networks but the nano ones.
    """

    def __init__(self, dim, depth, heads, patch_size=16, scale=1.0, norm_all=True, channels=3):
        super().__init__()
        self.dim, self.heads, self.patch_size, self.pool = dim, heads, patch_size, "cls"
        self.patch_embed = stem(patch_size, dim, channels)
        self.pos_embeder = Positions(dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList([Block(dim, heads, scale) for _ in range(depth)])
        self.cls_attn_blocks = nn.ModuleList([ClassBlock(dim, heads, scale, norm_all) for _ in range(2)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def draws(self):
        """Uniforms per sample that `path_factors` takes: three per block."""
        return 3 * len(self.blocks)

    def forward(self, x, paths=None):
        """paths: path_factors; the two blocks of the class token have none."""
        x = self.patch_embed["proj"](x)
        grid = x.shape[2:]
        x = (x + self.pos_embeder(*grid)).flatten(2).mT
        for i, block in enumerate(self.blocks):
            x = block(x, grid, None if paths is None else paths[3 * i : 3 * i + 3])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x[:, 0])


def default_patch(image_size):
    """16 pixels; 8 up to 128, 4 from 28 to 55: at least 7 x 7 patches."""
    side = image_size if isinstance(image_size, int) else min(image_size)
    return 16 if side > 128 else max(p for p in (2, 4, 8) if p == 2 or p * 7 <= side)


def xcit(arch, image_size=224, width=1.0, patch_size=None, depth=None, heads=None, channels=3, norm_all=None):
    """An XCiT by name. width multiplies its dimension; patch_size, depth and heads replace what the name stands for.
    norm_all: see ClassBlock (default: by name). image_size only decides the usual patch size. `config` of it is what a
    checkpoint says beside name, width and image size to build it again."""
    if arch not in ARCHS:
        fail(f"--arch {arch}: unknown, expected one of {', '.join(ARCHS)}")
    dim, usual_depth, usual_heads, scale = ARCHS[arch]
    dim, depth, heads = round(dim * width), depth or usual_depth, heads or usual_heads
    patch_size = patch_size or default_patch(image_size)
    if patch_size not in PATCHES:
        fail(f"--patch-size {patch_size}: the stem of {arch} makes patches of {', '.join(map(str, PATCHES))} pixels")
    if dim < 1 or dim % heads or dim % (patch_size // 2):
        multiple = math.lcm(heads, patch_size // 2)
        fail(f"--arch {arch} --width {width:g}: dimension {dim} must be a multiple of {multiple} (heads, stem)")
    norm_all = arch != "xcit_nano_12" if norm_all is None else norm_all
    model = XCiT(dim, depth, heads, patch_size, scale, norm_all, channels)
    model.config = {"patch_size": patch_size, "depth": depth, "heads": heads, "norm_all": norm_all}
    return model
