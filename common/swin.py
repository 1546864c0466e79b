"""Swin transformers (Liu et al. 2021): attention within windows, which every second block shifts by half a window, and
half the side and twice the channels from stage to stage. Key names are those of the official code."""

import collections
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.swin_transformer import PatchMerging

from common.args import fail
from common.vit import TABLE, kept, offsets, path_factors, resize_table

__all__ = ["ARCHS", "Swin", "default_patch", "default_window", "path_factors", "swin"]

# Dimension of the first stage, blocks of the stages, heads of the first stage; both double from stage to stage.
ARCHS = {
    "swin_tiny": (96, (2, 2, 6, 2), 3),
    "swin_small": (96, (2, 2, 18, 2), 3),
    "swin_base": (128, (2, 2, 18, 2), 4),
    "swin_large": (192, (2, 2, 18, 2), 6),
}


def pairs(window, device):
    """Row of the bias table for each pair of places in a window: (window^4,), query before key, row by row."""
    return offsets(window, window, device).flatten()


@kept
def strangers(rows, columns, window, shift, device):
    """Which pairs of places in a window were not neighbours before the map was rolled: (windows, window^2, window^2).
    rows, columns: of the map, multiples of the window."""

    def parts(side):  # what the roll has put together: all before the last window, and the two parts of that
        place = torch.arange(side, device=device)
        return (place >= side - window).int() + (place >= side - shift).int()

    part = 3 * parts(rows)[:, None] + parts(columns)
    part = part.unflatten(0, (-1, window)).unflatten(2, (-1, window)).transpose(1, 2).reshape(-1, window**2)
    return part[:, :, None] != part[:, None]


class WindowAttention(nn.Module):
    """Self-attention of each window of a map (B, H, W, dim), which is shifted before and back afterwards. The map is
    padded to whole windows with zeros, which take part as the official code for images of several sizes has it."""

    def __init__(self, dim, heads, window, shift=0):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, rows, columns, device):
        """What is added to the logits in each window of a map: (windows * heads, window^2, window^2)."""
        side = self.window**2  # F.embedding: its gradient is the same in every run, that of an index is not
        bias = F.embedding(pairs(self.window, device), self.relative_position_bias_table)
        bias = bias.view(side, side, self.heads).permute(2, 0, 1)
        if not self.shift:
            windows = rows * columns // side
            return bias.expand(windows, -1, -1, -1).flatten(0, 1)
        mask = strangers(rows, columns, self.window, self.shift, device)[:, None]
        return bias.masked_fill(mask, float("-inf")).flatten(0, 1)

    def forward(self, x):
        (_, height, width, dim), window, shift = x.shape, self.window, self.shift
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = x.shape[1:3]
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        # (B, rows, window, columns, window, 3, heads, -1); windows and heads become one dimension, as the bias has it
        x = self.qkv(x).view(-1, rows // window, window, columns // window, window, 3, self.heads, dim // self.heads)
        q, k, v = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 4)
        x = F.scaled_dot_product_attention(q, k, v, self.bias(rows, columns, x.device).to(q.dtype))
        x = x.view(-1, rows // window, columns // window, self.heads, window, window, dim // self.heads)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, rows, columns, dim)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return self.proj(x[:, :height, :width])


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), of maps (B, H, W, dim). paths: None, or factors of the two
    branches (2, B)."""

    def __init__(self, dim, heads, window, shift, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = WindowAttention(dim, heads, window, shift)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(collections.OrderedDict(layers))

    def forward(self, x, paths=None):
        first, second = (1, 1) if paths is None else paths.to(x.dtype)[:, :, None, None, None]
        x = x + first * self.attn(self.norm1(x))
        return x + second * self.mlp(self.norm2(x))


class Stage(nn.Module):
    """Blocks on maps of one size; what makes the maps of the next one comes after them."""

    def __init__(self, dim, depth, heads, window, shift, eps, downsample):
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, heads, window, shift * (i % 2), eps) for i in range(depth)])
        norm = functools.partial(nn.LayerNorm, eps=eps)
        self.downsample = PatchMerging(dim, norm) if downsample else nn.Identity()


class Swin(nn.Module):
    """Images (B, channels, H, W) -> features (B, dim): the mean over the tokens after the final norm.

    depths, heads, window: of the stages. image_size: pixels that the network is made for. A stage whose map is not
    larger than its window then does not shift it, and still does if images of another size make the map smaller, as in
    the official code. Pixels on the right and at the bottom that do not fill a patch are not seen. A page composes its
    variant of three steps: `embed`, `encode`, and what it does with the maps. checkpointing (an attribute): the
    backward pass recomputes the blocks instead of storing their insides.
    """

    def __init__(self, dim, depths, heads, window, patch_size=4, image_size=224, eps=1e-5, channels=3):
        super().__init__()
        self.patch_size, self.embed_dim, self.pool, self.checkpointing = patch_size, dim, "mean", False
        proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": proj, "norm": nn.LayerNorm(dim, eps=eps)})
        self.layers, sides = nn.ModuleList(), map_sides(image_size, patch_size, len(depths))
        for i, side in enumerate(sides):
            shift = window[i] // 2 if side > window[i] else 0
            more = i < len(depths) - 1
            self.layers.append(Stage(dim * 2**i, depths[i], heads[i], window[i], shift, eps, more))
        self.dim = dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(self.dim, eps=eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def blocks(self):
        """All blocks, in order."""
        return [block for layer in self.layers for block in layer.blocks]

    @property
    def draws(self):
        """Uniforms per sample that `path_factors` takes: two per block."""
        return 2 * len(self.blocks)

    @property
    def stride(self):
        """Pixels of the image per token of the last map."""
        return self.patch_size * 2 ** (len(self.layers) - 1)

    def embed(self, x, mask=None, token=None):
        """Patches (B, H/P, W/P, D), D the dimension of the first stage. mask: (B, L), 1 where the vector `token`
        (1, 1, D) stands in place of an embedded patch."""
        x = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1))
        return x if mask is None else torch.where(mask.view(*x.shape[:3], 1) > 0, token[:, None], x)

    def encode(self, x, n=1, paths=None):
        """Maps (B, h, w, D) after each of the last n blocks, of the embedded patches; those of the last stage after
        the final norm, those of other stages as they are. paths: path_factors."""
        outputs, i = [], 0
        for layer in self.layers:
            for block in layer.blocks:
                part = None if paths is None else paths[2 * i : 2 * i + 2]
                again = self.checkpointing and torch.is_grad_enabled()
                x = checkpoint(block, x, part, use_reentrant=False) if again else block(x, part)
                outputs, i = [*outputs, self.norm(x) if layer is self.layers[-1] else x][-n:], i + 1
            x = layer.downsample(x)
        return outputs

    def last(self, x, n=1, paths=None):
        """Tokens of each of the last n blocks, see `encode`: a list of (B, L, D), whose L and D may differ."""
        return [x.flatten(1, 2) for x in self.encode(self.embed(x), n, paths)]

    def tokens(self, x, paths=None):
        """All tokens after the final norm (B, L, dim), row by row."""
        return self.last(x, 1, paths)[0]

    def maps(self, x, paths=None, mask=None, token=None):
        """The last map after the final norm: (B, dim, h, w). mask, token: see `embed`."""
        return self.encode(self.embed(x, mask, token), 1, paths)[0].permute(0, 3, 1, 2)

    def forward(self, x, paths=None):
        return self.tokens(x, paths).mean(1)


def map_sides(image_size, patch_size, stages):
    """The shorter side of the map in each stage; one that is odd is padded before it is halved."""
    sides = [max(1, (image_size if isinstance(image_size, int) else min(image_size)) // patch_size)]
    for _ in range(stages - 1):
        sides.append(-(-sides[-1] // 2))
    return sides


def default_patch(image_size):
    """4 pixels; for images of less than 64 fewer, so that about 16 x 16 patches are left."""
    side = image_size if isinstance(image_size, int) else min(image_size)
    return min(4, max(1, side // 16))


def default_window(image_size, patch_size):
    """The largest of 7, 6, 5 and 4 that divides the side of the first map: 7 at 224 pixels, 6 at 192, 4 at 32."""
    side = map_sides(image_size, patch_size, 1)[0]
    return next((w for w in (7, 6, 5, 4) if side % w == 0), 7)


def swin(arch, image_size=224, width=1.0, patch_size=None, window=None, depths=None, heads=None, channels=3, eps=1e-5):
    """A Swin by name. width multiplies its dimensions; depths (of the stages, of which there may be fewer) and heads
    (of the first stage, or of each) replace what the name stands for. window: of all stages, where it shrinks to a
    smaller map, as in the official code; or one number per stage, which does not. eps: of the norms; some published
    networks have 1e-6. `config` of it is what a checkpoint says beside name, width and image size to build it again."""
    if arch not in ARCHS:
        fail(f"--arch {arch}: unknown, expected one of {', '.join(ARCHS)}")
    dim, usual_depths, usual_heads = ARCHS[arch]
    dim, depths, heads = round(dim * width), list(depths or usual_depths), heads or usual_heads
    heads = [heads * 2**i for i in range(len(depths))] if isinstance(heads, int) else list(heads)
    if dim < 1 or any(dim * 2**i % n for i, n in enumerate(heads)):
        fail(f"--arch {arch} --width {width:g}: dimension {dim} must be a multiple of {heads[0]} heads")
    patch_size = patch_size or default_patch(image_size)
    if (side := image_size if isinstance(image_size, int) else min(image_size)) < patch_size:
        fail(f"--image-size {side} is less than the patch size {patch_size}: choose a larger one, or --patch-size")
    window = window or default_window(image_size, patch_size)
    if isinstance(window, int):
        window = [min(window, side) for side in map_sides(image_size, patch_size, len(depths))]
    window = list(window)
    model = Swin(dim, depths, heads, window, patch_size, image_size, eps, channels)
    model.config = {"patch_size": patch_size, "depths": depths, "heads": heads, "window": window, "eps": eps}
    return model


def with_window(model, window, image_size):
    """The same network with other windows, made for images of this size: its tables of relative positions are
    interpolated (common.vit.resize_table). window: as in `swin`."""
    old, sides = model.config["window"], map_sides(image_size, model.patch_size, len(model.layers))
    config = model.config | {"window": [min(window, side) for side in sides]}
    proj, (patch, depths, heads, windows, eps) = model.patch_embed["proj"], config.values()
    other = Swin(model.embed_dim, depths, heads, windows, patch, image_size, eps, proj.in_channels).to(proj.weight)
    weights = model.state_dict()
    for i, (was, now) in enumerate(zip(old, windows, strict=True)):
        for name in [n for n in weights if n.startswith(f"layers.{i}.") and n.endswith(TABLE)]:
            weights[name] = resize_table(weights[name], (was, was), (now, now))
    other.load_state_dict(weights)
    other.config = config
    return other


def padding(model, image_size):
    """What to say of a Swin's maps that its windows do not divide, for images of this size; "" if there are none."""
    windows = model.config["window"] if isinstance(model, Swin) else []
    sides = map_sides(image_size, model.patch_size, len(windows)) if windows else []
    found = [f"{side} x {side} by {window}" for side, window in zip(sides, windows, strict=True) if side % window]
    return f"windows do not divide the maps, which are padded: {', '.join(found)}" if found else ""
