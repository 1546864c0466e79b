"""Pictures that show what a network sees."""

import textwrap
import unicodedata

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from common.crop import crop_resize
from common.distributed import is_main
from common.files import atomic
from common.images import BadImage, to_tensor


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


def view_names(sizes):
    """What the rows of views.png are called, from the sides of the views in pixels."""
    if len(sizes) == 1:
        return ["view"]
    return [f"{'view' if size == max(sizes) else 'small crop'} {i + 1}" for i, size in enumerate(sizes)]


def original(data, index, size, view):
    """Image `index` of a dataset as it is stored, (3, h, w) in [0, 1], its longer side resized to `size` pixels; of one
    that cannot be decoded, the next one, which a loader takes instead."""
    for i in range(len(data)):
        try:
            image, _ = data[(index + i) % len(data)]
            break
        except BadImage:
            pass
    image = image if isinstance(image, torch.Tensor) else to_tensor(image, getattr(data, "channels", 3))
    height, width = image.shape[1:]
    sides = [max(1, round(n * size / max(height, width))) for n in (height, width)]
    if max(height, width) > size:
        image = crop_resize(image, (0, 0, height, width), sides)
    x = rgb(image[None].float() / 255, view.mean, view.std)
    return F.interpolate(x, sides, mode="nearest-exact")[0]  # enlarged without smoothing: the pixels can be seen


def save_views(path, batch, data, count=8):
    """PNG of the first samples of a batch of `data`: a column per sample; the images as they are stored on top, below
    them a row per view, as the network sees it."""
    if not is_main():
        return
    views = [shown(x[:count], spec) for x, spec in zip(batch.views(), batch.specs, strict=True)]
    sizes = [x.shape[-1] for x in views]
    zoom = -(-96 // max(sizes))  # small images are enlarged without smoothing, so that their pixels can be seen
    side = zoom * max(sizes)
    first = batch.indices[: min(count, max(2, 2048 // side))].tolist()
    rows = [("original", [original(data, i, side, batch.specs[0]) for i in first])]
    for name, size, x in zip(view_names(sizes), sizes, views, strict=True):
        x = x[: len(first)].repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        rows.append((f"{name}\n{size} px", list(x)))
    font, gap = ImageFont.load_default(14), 6
    left, heights = 96, [max(x.shape[1] for x in row) + gap for _, row in rows]
    canvas = Image.new("RGB", (left + len(first) * (side + gap), gap + sum(heights)), "white")
    draw, top = ImageDraw.Draw(canvas), gap
    for (name, row), height in zip(rows, heights, strict=True):
        draw.multiline_text((gap, top + (height - gap) / 2), name, "black", font, anchor="lm")
        for column, x in enumerate(row):
            place = (left + column * (side + gap) + (side - x.shape[2]) // 2, top + (height - gap - x.shape[1]) // 2)
            canvas.paste(to_pil_image(x), place)
        top += height
    with atomic(path) as temporary:
        canvas.save(temporary)


def save_table(path, images, headings, caption=""):
    """PNG of images (N, 3, H, W) in [0, 1], row by row, with a heading over each column and a caption below."""
    zoom = -(-160 // images.shape[3])  # small images are enlarged without smoothing; the headings need some room, too
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    save_captioned(
        path, to_pil_image(make_grid(images, nrow=len(headings), padding=4, pad_value=1.0)), headings, caption
    )


def save_captioned(path, picture, headings, caption=""):
    """PNG of a picture with headings above it, over columns of equal width, and a caption below."""
    lines = textwrap.wrap(caption, picture.width // 7)
    canvas = Image.new("RGB", (picture.width, picture.height + 28 + 18 * len(lines)), "white")
    canvas.paste(picture, (0, 20))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, text in enumerate(headings):
        draw.text(((i + 0.5) * picture.width / len(headings), 2), text, "black", font, anchor="ma")
    draw.multiline_text((4, picture.height + 22), "\n".join(lines), "black", font)
    with atomic(path) as temporary:
        canvas.save(temporary)


def shorten(text, font, width, tail=0):
    """Text that fits, in the letters that the font has. tail: how many of the last ones are kept: a file name often
    differs from others only there."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c if " " <= c <= "~" else "?" for c in text if not unicodedata.combining(c))
    if font.getlength(text) <= width:
        return text
    head, end = (text[:-tail], text[-tail:]) if tail else (text, "")
    while head and font.getlength(head + "..." + end) > width:
        head = head[:-1]
    return head.rstrip() + "..." + end
