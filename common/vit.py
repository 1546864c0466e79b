"""Vision transformers (Dosovitskiy et al. 2021) with timm's key names, for masked and for interpolated tokens: pre-norm
blocks, biases everywhere, exact GELU, LayerNorm of eps 1e-6, no dropout. Where a place has relative positions, every
query adds a learned number per head and offset to its logits (Bao et al. 2022)."""

import collections
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.args import fail

# dim, depth, heads, patch size. Heads do not show in the shapes of a checkpoint: the small one has 6 here (timm, DeiT),
# while some published weights of the same shapes were trained with 12 heads and mean something else with 6.
ARCHS = {
    "vit_tiny": (192, 12, 3, 16),
    "vit_small": (384, 12, 6, 16),
    "vit_base": (768, 12, 12, 16),
    "vit_large": (1024, 24, 16, 16),
    "vit_huge": (1280, 32, 16, 14),
}
TABLE = "relative_position_bias_table"


def sincos(dim, grid, order="xy"):
    """Fixed positions of patches in a grid (rows, columns): float64 (rows * columns, dim), row by row.

    Half of the dimensions encode the column x and half the row y, in this order for "xy", the other way round for "yx":
    published weights come in both. Each half: sin(p w_i), then cos(p w_i), w_i = 10000^(-i / (dim/4)), i < dim/4.
    """
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    first, second = (x, y) if order == "xy" else (y, x)
    parts = [f(p[:, None] * omega) for p in (first, second) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, 1))


def resize_positions(table, old, new):
    """Positions (1, 1 + rows * columns, dim) of a grid `old`, any class token's first, for a grid `new`: bicubic.

    Some projects scale by (new + 0.1) / old, which shifts what is read a little: with their weights, features of images
    of another size differ from theirs by some thousandths.
    """
    if tuple(old) == tuple(new):
        return table
    first = table.shape[1] - old[0] * old[1]
    maps = table[:, first:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :first], maps.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def kept(function):
    """Computes for each of the last arguments once; a compiled network holds the results by itself."""
    known = functools.lru_cache(maxsize=64)(function)
    return lambda *key: function(*key) if torch.compiler.is_compiling() else known(*key)


@kept
def offsets(rows, columns, device):
    """Row of a table of relative positions for each pair of places in a grid: (L, L), query before key, row by row. The
    table has (2 rows - 1) (2 columns - 1) rows, for row and column of the query minus those of the key."""
    place = torch.arange(rows * columns, device=device)
    row, column = place.div(columns, rounding_mode="floor"), place % columns
    down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
    return down * (2 * columns - 1) + right


@kept
def offsets_with_class(rows, columns, device):
    """`offsets` with the class token before the places, (1 + L, 1 + L), and three more rows at the end of the table:
    class token to any place, any place to class token, class token to itself."""
    most = (2 * rows - 1) * (2 * columns - 1)
    index = F.pad(offsets(rows, columns, device), (1, 0, 1, 0))
    index[0], index[1:, 0], index[0, 0] = most, most + 1, most + 2
    return index


@functools.lru_cache(maxsize=64)
def _stretch(old, new):
    """(2 new - 1, 2 old - 1) weights: numbers at the offsets 1 - old ... old - 1 become those at 1 - new ... new - 1.

    As in the code of Bao et al. (2022): the old offsets are spread over the new range in steps that grow geometrically,
    so that near ones stay nearly where they are; a cubic spline through all of them is then read at the new ones.
    """
    from scipy.interpolate import CubicSpline  # part of what scikit-learn needs

    low, high = 1.01, max(1.5, new)  # the factor between two steps
    while high - low > 1e-9:
        factor = (low + high) / 2
        low, high = (low, factor) if (1 - factor ** (old - 1)) / (1 - factor) > new - 1 else (factor, high)
    places = np.cumsum(np.append(0, factor ** np.arange(old - 1)))
    places = np.append(-places[:0:-1], places)
    at = np.arange(1 - new, new).clip(places[0], places[-1])
    return CubicSpline(places, np.eye(2 * old - 1))(at) if old > 1 else np.ones((2 * new - 1, 1))


def resize_table(table, old, new):
    """A table of relative positions (offsets of a grid `old`, and any rows after them; heads) for a grid `new`."""
    if tuple(old) == tuple(new):
        return table
    heights, widths = (2 * side - 1 for side in old)
    down, right = (torch.from_numpy(_stretch(*sides)).to(table) for sides in zip(old, new, strict=True))
    maps = torch.einsum("ij,jkh,lk->ilh", down, table[: heights * widths].view(heights, widths, -1), right)
    return torch.cat([maps.flatten(0, 1), table[heights * widths :]])


def table_side(table):
    """Side of the square grid that a table of relative positions with three rows for the class token is for."""
    return (round(max(0, len(table) - 3) ** 0.5) + 1) // 2


def fit_positions(weights, grid):
    """The weights of a ViT whose positions are for a square grid with all of them interpolated to another grid, and the
    side of the former; None if it is the same, or no positions fit a square."""
    fitted, was = dict(weights), None
    for name, table in weights.items():
        if name == "pos_embed" and table.ndim == 3:
            side = math.isqrt(table.shape[1])
            fits = table.shape[1] - side * side in (0, 1)  # without class token, with it
            resize = resize_positions if fits else None
        elif name.endswith(TABLE) and table.ndim == 2:
            side = table_side(table)
            resize = resize_table if len(table) == (2 * side - 1) ** 2 + 3 else None
        else:
            continue
        if resize and (side, side) != tuple(grid):
            fitted[name], was = resize(table.float(), (side, side), grid), side
    return fitted, was


def relative_bias(table, old, new):
    """What a table of a grid `old` adds to the logits of the tokens of a grid `new`: (heads, 1 + L, 1 + L)."""
    index = offsets_with_class(*new, table.device)  # F.embedding: its gradient is the same in every run
    return F.embedding(index, resize_table(table, old, new)).permute(2, 0, 1)


def path_factors(u, rate):
    """Stochastic depth (Huang et al. 2016): factors (2 depth, B) of the two branches of each block, for every sample.

    u: uniforms (B, 2 depth). A branch is dropped (factor 0) with a probability p that rises linearly from 0 at the
    first block to `rate` at the last, and counts 1 / (1 - p) otherwise.
    """
    depth = u.shape[1] // 2
    p = torch.arange(depth, dtype=u.dtype, device=u.device).mul_(rate / max(1, depth - 1)).repeat_interleave(2)
    return ((u >= p).to(u.dtype) / (1 - p)).T


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> patch tokens (B, H/P * W/P, dim), row by row."""

    def __init__(self, patch_size, dim, channels=3):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of tokens (B, N, dim). bias: None, or what is added to the logits: (heads, N, N)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if bias is None else bias.to(q.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim, value):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). paths: None, or factors of the two branches (2, B). bias: see
    Attention."""

    def __init__(self, dim, heads, mlp_ratio=4, layer_scale=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        fc1, fc2 = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        self.mlp = nn.Sequential(collections.OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x, paths=None, bias=None):
        first, second = (1, 1) if paths is None else paths.to(x.dtype)[:, :, None, None]
        x = x + first * self.ls1(self.attn(self.norm1(x), bias))
        return x + second * self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Images (B, channels, H, W) -> features (B, dim).

    image_size: pixels, or (height, width), of the positions; other sizes interpolate them. positions: "sincos-xy" or
    "sincos-yx" (fixed, see `sincos`), "learned" or "none". relative: relative positions "none", of each "block", or
    "shared" by all blocks, which start at zero. pool: "cls" takes the class token after the final norm, "mean" the mean
    of the patch tokens, which then passes a norm of its own instead (as timm does), "norm-mean" the mean of the patch
    tokens after the final norm. class_token: False leaves it out, and its position. block: see `Block`.
    checkpointing (an attribute): the backward pass recomputes the blocks instead of storing their insides.
    """

    def __init__(
        self,
        dim,
        depth,
        heads,
        patch_size=16,
        image_size=224,
        positions="sincos-xy",
        pool="cls",
        channels=3,
        relative="none",
        class_token=True,
        **block,
    ):
        super().__init__()
        if pool == "cls" and not class_token:
            raise ValueError("pool cls takes the class token, and there is none: mean or norm-mean")
        self.dim, self.heads, self.patch_size, self.checkpointing = dim, heads, patch_size, False
        self.pool = pool.removeprefix("norm-")  # of which tokens features are made
        self.prefix = int(class_token)  # tokens before those of the patches
        self.embed_dim, self.stride = dim, patch_size
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, dim, channels)
        self.register_parameter("cls_token", nn.Parameter(torch.empty(1, 1, dim)) if class_token else None)
        table = torch.zeros(1, self.prefix + self.grid[0] * self.grid[1], dim)
        if positions == "learned":
            nn.init.trunc_normal_(table, std=0.02)
        elif positions != "none":  # the class token's position is zero
            table[0, self.prefix :] = sincos(dim, self.grid, positions.removeprefix("sincos-"))
        # a parameter in either case: it is part of the checkpoint, and fine-tuning may set it free
        table = None if positions == "none" else nn.Parameter(table, requires_grad=positions == "learned")
        self.register_parameter("pos_embed", table)
        self.blocks = nn.ModuleList([Block(dim, heads, **block) for _ in range(depth)])
        self.relative, offsets = relative, (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + 3
        if relative == "shared":
            self.rel_pos_bias = nn.ParameterDict({TABLE: torch.zeros(offsets, heads)})
        for block in self.blocks if relative == "block" else ():
            block.attn.register_parameter(TABLE, nn.Parameter(torch.zeros(offsets, heads)))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if pool != "mean" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        initialise(self)
        if class_token:
            nn.init.normal_(self.cls_token, std=0.02)

    @property
    def draws(self):
        """Uniforms per sample that `path_factors` takes: two per block."""
        return 2 * len(self.blocks)

    def unshare(self):
        """Gives every block relative positions of its own: a copy of the shared ones; zeros if there were none."""
        offsets = (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + 3
        zeros = self.patch_embed.proj.weight.new_zeros(offsets, self.heads)
        table = self.rel_pos_bias[TABLE].detach() if self.relative == "shared" else zeros
        for block in self.blocks if self.relative != "block" else ():
            block.attn.register_parameter(TABLE, nn.Parameter(table.clone()))
        self.rel_pos_bias, self.relative = None, "block"

    def grid_of(self, x):
        """Rows and columns of the patches of images (B, C, H, W)."""
        if x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} do not divide into patches of {self.patch_size}")
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    def embed(self, x, mask=None, token=None):
        """Patch tokens with their positions (B, L, dim), and the position of the class token (1, 1, dim), (1, 0, dim)
        if there is none. mask: (B, L), 1 where the vector `token` (1, 1, dim) stands in place of an embedded patch."""
        grid, x = self.grid_of(x), self.patch_embed(x)
        if mask is not None:
            x = torch.where(mask[:, :, None] > 0, token, x)
        if self.pos_embed is None:
            return x, x.new_zeros(1, self.prefix, self.dim)
        positions = resize_positions(self.pos_embed, self.grid, grid)
        return x + positions[:, self.prefix :], positions[:, : self.prefix]

    def biases(self, grid):
        """What each block adds to the logits of its attention (see `relative_bias`), or None: a list."""
        own = slice(1 - self.prefix, None)  # without class token its row and column drop out
        if self.relative == "block":
            tables = (getattr(block.attn, TABLE) for block in self.blocks)
            return [relative_bias(table, self.grid, grid)[:, own, own] for table in tables]
        if self.relative == "none":
            return [None] * len(self.blocks)
        return [relative_bias(self.rel_pos_bias[TABLE], self.grid, grid)[:, own, own]] * len(self.blocks)

    def _enter(self, x, keep=None, mask=None, token=None):
        """What the first block gets: the class token and the patches (those of `keep`), with their positions."""
        x, position = self.embed(x, mask, token)
        if keep is not None:
            if self.relative != "none":
                raise ValueError("relative positions are for whole grids: patches cannot be left out")
            x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
        if self.cls_token is None:
            return x
        return torch.cat([(self.cls_token + position).expand(x.shape[0], -1, -1), x], 1)

    def last(self, x, n=1, keep=None, paths=None, mask=None, token=None):
        """Tokens after each of the last n blocks and the final norm: a list of (B, 1 + L, dim), any class token first.
        keep: (B, K) indices of the patches that enter the blocks, in this order (default: all). paths: path_factors.
        mask, token: see `embed`."""
        biases, outputs = self.biases(self.grid_of(x)), []
        x = self._enter(x, keep, mask, token)
        for i, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            part = None if paths is None else paths[2 * i : 2 * i + 2]
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, part, bias, use_reentrant=False) if again else block(x, part, bias)
            outputs = [*outputs, x][-n:]
        return [self.norm(x) for x in outputs]

    def attention(self, x):
        """What each token of the last block attends to, by head: (B, heads, 1 + L, 1 + L), rows sum to 1."""
        *biases, bias = self.biases(self.grid_of(x))
        *blocks, block = self.blocks
        x = self._enter(x)
        for earlier, added in zip(blocks, biases, strict=True):
            x = earlier(x, bias=added)
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + (0 if bias is None else bias)).softmax(3)

    def tokens(self, x, keep=None, paths=None, mask=None, token=None):
        """All tokens after the final norm (B, 1 + L, dim), the class token first. See `last`."""
        return self.last(x, 1, keep, paths, mask, token)[0]

    def maps(self, x, paths=None, mask=None, token=None):
        """The patch tokens of `tokens` in their places: (B, dim, H/P, W/P)."""
        return self.tokens(x, None, paths, mask, token)[:, self.prefix :].mT.unflatten(2, self.grid_of(x))

    def forward(self, x, paths=None):
        x = self.tokens(x, paths=paths)
        return x[:, 0] if self.pool == "cls" else self.fc_norm(x[:, self.prefix :].mean(1))


def initialise(module, std=None):
    """Glorot-uniform weights, or normal ones of this deviation, and zero biases of linear layers and of the patch
    embedding, taken as one of them."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, PatchEmbed)):
            layer = part.proj if isinstance(part, PatchEmbed) else part
            if std is None:
                nn.init.xavier_uniform_(layer.weight.flatten(1))
            else:
                nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


def _shape(arch):
    return ARCHS.get(arch) or fail(f"--arch {arch}: unknown, expected one of {', '.join(ARCHS)}")


def default_patch(arch, image_size):
    """Its own patch size; up to 128 pixels about an eighth of them, so that 64 patches are left, which fit."""
    size = image_size if isinstance(image_size, int) else min(image_size)
    if size > 128:
        return _shape(arch)[3]
    near = [patch for patch in range(max(1, size // 16), size // 4 + 1) if size % patch == 0]
    return min(near, key=lambda patch: abs(patch - size / 8), default=max(1, math.ceil(size / 8)))


def vit(
    arch,
    image_size=224,
    width=1.0,
    patch_size=None,
    depth=None,
    heads=None,
    positions="sincos-xy",
    pool="cls",
    relative="none",
    class_token=True,
    **more,
):
    """A ViT by name. width multiplies its dimension; patch_size, depth and heads replace what the name stands for;
    more: see ViT. `config` of it is what a checkpoint says beside name, width and image size to build it again."""
    dim, usual_depth, usual_heads, _ = _shape(arch)
    dim, depth, heads = round(dim * width), depth or usual_depth, heads or usual_heads
    patch_size = patch_size or default_patch(arch, image_size)
    if dim < 4 or dim % heads or dim % 4:
        fail(f"--arch {arch} --width {width}: dimension {dim} must be a multiple of 4 and of {heads} heads")
    sizes = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size := next((size for size in sizes if size % patch_size or size < patch_size), None):
        near = " or ".join(str(n * patch_size) for n in (size // patch_size, size // patch_size + 1) if n)
        fail(f"--image-size {size} is not a multiple of the patch size {patch_size}: choose {near}, or --patch-size")
    more |= {"relative": relative, "class_token": class_token}
    model = ViT(dim, depth, heads, patch_size, image_size, positions, pool, **more)
    model.config = {"patch_size": patch_size, "depth": depth, "heads": heads, "positions": positions, "pool": pool}
    model.config["relative"] = relative
    model.config |= {} if class_token else {"class_token": False}
    return model
