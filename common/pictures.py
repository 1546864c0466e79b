"""Pictures that show what a network sees."""

import textwrap

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from common.distributed import is_main
from common.files import atomic


def rgb(x, mean, std):
    """Images (B, C, H, W) in [0, 1] as a picture can show them, (B, 3, H, W): the first three channels, or the first in
    grey. Where these use less than half of the range (12 bits stored in 16), the largest mean + 3 std becomes white."""
    count = 3 if x.shape[1] >= 3 else 1
    white = max(m + 3 * s for m, s in zip(mean[:count], std[:count], strict=True))
    x = x[:, :count] / (white if white < 0.5 else 1)
    return x.expand(-1, 3, -1, -1).clamp(0, 1)


def shown(x, view):
    """Images (B, C, H, W) that a view has normalised, as a picture can show them: (B, 3, H, W) on the CPU."""
    std, mean = (torch.tensor(values).view(1, -1, 1, 1) for values in (view.std, view.mean))
    return rgb(x.float().cpu() * std + mean, view.mean, view.std)


def save_views(path, batch, count=8):
    """PNG of the first samples of a batch: a column per sample, a row per view, as the network sees them."""
    if not is_main():
        return
    rows = []
    for x, view in zip(batch.views(), batch.specs, strict=True):
        size = max(96, x.shape[-1])  # small images are enlarged without smoothing, so that their pixels can be seen
        rows.append(F.interpolate(shown(x[:count], view), (size, size), mode="nearest"))
    size = max(c.shape[-1] for c in rows)
    rows = [F.pad(c, (0, size - c.shape[-1], 0, size - c.shape[-1]), value=1.0) for c in rows]
    grid = make_grid(torch.cat(rows), nrow=len(rows[0]), padding=4, pad_value=1.0)
    with atomic(path) as temporary:
        save_image(grid, temporary)


def save_table(path, images, headings, caption=""):
    """PNG of images (N, 3, H, W) in [0, 1], row by row, with a heading over each column and a caption below."""
    zoom = -(-160 // images.shape[3])  # small images are enlarged without smoothing; the headings need some room, too
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = to_pil_image(make_grid(images, nrow=len(headings), padding=4, pad_value=1.0))
    lines = textwrap.wrap(caption, grid.width // 7)
    canvas = Image.new("RGB", (grid.width, grid.height + 28 + 18 * len(lines)), "white")
    canvas.paste(grid, (0, 20))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, text in enumerate(headings):
        draw.text((4 + (i + 0.5) * (images.shape[3] + 4), 2), text, "black", font, anchor="ma")
    draw.multiline_text((4, grid.height + 22), "\n".join(lines), "black", font)
    with atomic(path) as temporary:
        canvas.save(temporary)
