"""Augmentation: drawn per sample on the CPU, cropped there, everything else applied in batch on the device.

A script writes its paper's recipe as numbers, one `View` per view. What happens to sample i in epoch e and view v
is a pure function of (seed, e, i, v): `uniforms` turns those four into numbers, `crop_box` and `plan` turn the
numbers into a box and a list of operations. Nothing depends on the process, the worker or what came before.

`augment` equals torchvision's float operators for equal parameters (tests/test_augment.py).
"""

import dataclasses
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ATTEMPTS = 10  # of a random resized crop to fit into the image before the central crop is taken, as in torchvision
# Which uniform decides what. Columns never move, so that two recipes with equal numbers see equal crops.
TOP, LEFT, FLIP, JITTER, FACTORS, ORDER, GRAY, BLUR, SIGMA, SOLARIZE = 20, 21, 22, 23, 24, 28, 32, 33, 34, 35
LIGHTING = 36
DRAWS = 40
# Principal components of ImageNet's colours in [0, 1] (Krizhevsky et al. 2012, section 4.1): their scales,
# largest first, and rows red, green, blue of their directions.
PCA_SCALES = (0.2175, 0.0188, 0.0045)
PCA_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclasses.dataclass(frozen=True)
class View:
    """One random view of an image, as numbers. Probabilities of 0 switch an operation off.

    size: pixels of the square view. crop, ratio: range of the crop's share of the image area and of its
    width / height. jitter: strengths of brightness, contrast, saturation and hue, as in torchvision's ColorJitter
    (drawn factors multiply; the four are applied in a random order). blur_sigma: range in pixels.
    gray_first: turn to grey before the jitter instead of after it. lighting: AlexNet's change of colour, a normal
    number of this standard deviation per principal component, added last and not clipped.
    """

    size: int
    crop: tuple = (0.08, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.5
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    gray_p: float = 0.0
    gray_first: bool = False
    blur_p: float = 0.0
    blur_sigma: tuple = (0.1, 2.0)
    solarize_p: float = 0.0
    lighting: float = 0.0
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class EvalView:
    """The deterministic view of evaluations: shorter side to `resize`, then the central `size` x `size` pixels."""

    size: int
    resize: int = 0  # 0: size * 256 / 224, and no margin for images of at most 64 pixels
    interpolation: str = "bilinear"
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD


# ---------------------------------------------------------------------------------------------------- numbers
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x):
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit flips half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed, epoch, index, stream, n):
    """(len(index), n) float64 numbers in [0, 1), a pure function of its arguments: row i belongs to index[i].

    stream separates uses: 0, 1, 2 ... are the views; a script takes 100 and up for its own (masks, negatives).
    """
    state = np.zeros(1, np.uint64)
    for part in (seed, epoch, stream):
        state = _mix(state + _GOLDEN + np.array([part]).astype(np.uint64))
    state = _mix(_mix(state + np.asarray(index).astype(np.uint64)) + _GOLDEN)
    bits = _mix(state[:, None] + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def crop_box(u, height, width, view):
    """Random resized crop (Szegedy et al. 2015, as torchvision draws it). Returns top, left, height, width.

    u: DRAWS uniforms as a list.
    """
    log_low, log_high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for attempt in range(ATTEMPTS):
        area = height * width * (view.crop[0] + u[2 * attempt] * (view.crop[1] - view.crop[0]))
        aspect = math.exp(log_low + u[2 * attempt + 1] * (log_high - log_low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[TOP] * (height - h + 1)), int(u[LEFT] * (width - w + 1)), h, w
    aspect = min(max(width / height, view.ratio[0]), view.ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def plan(view, u):
    """What to do with each sample of a batch, from its uniforms (B, DRAWS).

    Returns a list of (operation, rows, amounts): apply `operation` to samples `rows` (int64) with one float32 amount
    per row, in this order. Sample-wise random orders of the jitter become groups of equal operation.
    """
    steps = []

    def step(name, mask, amount):
        rows = np.flatnonzero(mask)
        if len(rows):
            steps.append((name, rows, np.broadcast_to(amount, mask.shape)[rows].astype(np.float32)))

    step("flip", u[:, FLIP] < view.flip, 0)
    gray = u[:, GRAY] < view.gray_p
    if view.gray_first:
        step("gray", gray, 0)
    jittered = u[:, JITTER] < view.jitter_p
    order = np.argsort(u[:, ORDER : ORDER + 4], axis=1)
    for position in range(4):
        for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            strength = view.jitter[k]
            low, high = (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)
            if strength > 0:
                amount = low + u[:, FACTORS + k] * (high - low)
                step(name, jittered & (order[:, position] == k), amount)
    if not view.gray_first:
        step("gray", gray, 0)
    low, high = view.blur_sigma
    step("blur", u[:, BLUR] < view.blur_p, low + u[:, SIGMA] * (high - low))
    step("solarize", u[:, SOLARIZE] < view.solarize_p, 0.5)
    if view.lighting:
        shift = normals(u[:, LIGHTING : LIGHTING + 4])[:, :3] * view.lighting * PCA_SCALES @ np.transpose(PCA_AXES)
        for k, name in enumerate(CHANNELS):
            step(name, np.ones(len(u), bool), shift[:, k])
    return steps


def normals(u):
    """Uniforms (B, 2 n) -> (B, 2 n) independent standard normal numbers (Box & Muller 1958)."""
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, 0::2])), 2 * np.pi * u[:, 1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


# ------------------------------------------------------------------------------------------- cropping (CPU, uint8)
def crop_resize(image, box, size, interpolation="bilinear"):
    """uint8 (3, H, W) -> uint8 (3, size, size): PIL's crop-then-resize within one grey level, antialiased (bicubic:
    but for one value in some thousands, at edges where it overshoots).

    Sliced as (1, H, W, 3), the crop of a decoded image is recognised as channels-last, which halves the time: torch's
    uint8 kernel then reads and writes whole pixels.
    """
    top, left, height, width = box
    crop = image.permute(1, 2, 0)[None, top : top + height, left : left + width].permute(0, 3, 1, 2)
    if (height, width) == (size, size):
        return crop[0]
    return F.interpolate(crop, (size, size), mode=interpolation, antialias=True, align_corners=False)[0]


def center_crop(image, view):
    """The EvalView of an image: uint8 (3, H, W) -> uint8 (3, size, size)."""
    size, (height, width) = view.size, image.shape[1:]
    resize = view.resize or (size if size <= 64 else round(size * 256 / 224))
    height, width = (resize * side // min(height, width) for side in (height, width))  # as torchvision's Resize
    if (height, width) != tuple(image.shape[1:]):
        mode = view.interpolation
        image = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # channels-last, as in crop_resize
        image = F.interpolate(image, (height, width), mode=mode, antialias=True, align_corners=False)[0]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[:, top : top + size, left : left + size]


# --------------------------------------------------------------- batched operators (any device, float in [0, 1])
def _gray(x, _=None):
    return (x[:, 0] * 0.2989 + x[:, 1] * 0.587 + x[:, 2] * 0.114)[:, None]


def _blend(x, other, amount):
    return torch.lerp(other, x, amount).clamp_(0, 1)


def _brightness(x, amount):
    return (x * amount).clamp_(0, 1)


def _contrast(x, amount):
    return _blend(x, _gray(x).mean((2, 3), keepdim=True).expand_as(x), amount)


def _saturation(x, amount):
    return _blend(x, _gray(x).expand_as(x), amount)


def _hue(x, amount):
    """Rotates the hue of HSV by `amount` turns. The way back uses f(n) = v - c * clip(min(k, 4 - k), 0, 1) with
    k = (n + 6 h) mod 6, which needs no case distinction."""
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    scale = 1 / torch.where(chroma == 0, 1, chroma)
    sextant = torch.where(
        value == r, (g - b) * scale, torch.where(value == g, 2 + (b - r) * scale, 4 + (r - g) * scale)
    )
    sextant = sextant + 6 * amount[:, 0]
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(sextant + n, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


@functools.lru_cache(maxsize=16)
def _shifts(size, radius, device):
    """(2 radius + 1, size * size): row k is the matrix that moves by k - radius pixels, mirrored at the borders."""
    position = torch.arange(size)[None] + torch.arange(-radius, radius + 1)[:, None]
    position = position.abs()
    position = torch.where(position >= size, 2 * (size - 1) - position, position)
    return F.one_hot(position, size).float().reshape(2 * radius + 1, size * size).to(device)


def _blur(x, sigma, max_sigma=2.0):
    """Gaussian blur, one sigma (pixels) per image: both axes as one banded matrix product each, mirrored borders.

    The kernel reaches 5.5 of the largest sigma, as the usual 23 taps at 224 pixels do.
    """
    height, width = x.shape[2:]
    matrices = []
    for size in (height, width):
        radius = min(round(5.5 * max_sigma), size - 1)
        taps = torch.arange(-radius, radius + 1, device=x.device)
        kernel = torch.exp(-0.5 * (taps / sigma.view(-1, 1)).square())
        kernel = kernel / kernel.sum(1, keepdim=True)
        matrices.append((kernel @ _shifts(size, radius, x.device)).view(-1, 1, size, size))
    rows, columns = matrices
    return rows @ x @ columns.transpose(2, 3)


OPERATORS = {
    "flip": lambda x, _: x.flip(3),
    "gray": lambda x, _: _gray(x).expand_as(x),
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "blur": _blur,
    "solarize": lambda x, threshold: torch.where(x >= threshold, 1 - x, x),
}
CHANNELS = {"red": 0, "green": 1, "blue": 2}  # operations that add their amount to one channel, in place


@torch.no_grad()
def augment(images, steps, mean, std, dtype=torch.float32):
    """Applies a `plan` to a batch and normalises it.

    images: uint8 (B, 3, H, W) on any device. steps: as from `plan`, rows and amounts as tensors on that device.
    Returns (B, 3, H, W) of `dtype`, channels_last, (x / 255 - mean) / std per channel.
    """
    x = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    with torch.autocast(x.device.type, enabled=False):
        for name, rows, amounts in steps:
            if name in CHANNELS:
                x[rows, CHANNELS[name]] += amounts.view(-1, 1, 1)
            else:
                x[rows] = OPERATORS[name](x[rows], amounts.view(-1, 1, 1, 1))
    mean, std = _channel_vectors(mean, std, x.device)
    return x.sub_(mean).div_(std).to(dtype, memory_format=torch.channels_last)


@functools.lru_cache(maxsize=16)
def _channel_vectors(mean, std, device):
    return torch.tensor([mean, std], device=device).view(2, 1, -1, 1, 1).unbind()
