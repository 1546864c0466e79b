"""Augmentation: drawn per sample on the CPU, cropped where the image is, everything else in batch on the device.

A script writes its paper's recipe as numbers, one `View` per view. What happens to sample i in epoch e and view v
is a pure function of (seed, e, i, v): `uniforms` turns those four into numbers, `crop_box` and `plan` turn the
numbers into a box and a list of operations. Nothing depends on the process, the worker or what came before.

`augment` equals torchvision's float operators for equal parameters (tests/test_augment.py).
"""

import concurrent.futures
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


def without_colours(view):
    """A view without the operations that need red, green and blue: for images of other channels."""
    return dataclasses.replace(view, jitter=(*view.jitter[:2], 0.0, 0.0), gray_p=0.0, lighting=0.0)


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


# ---------------------------------------------------------------------------------------------------- cropping
def _resize(image, box, height, width, interpolation):
    """The box (top, left, height, width) of an image (C, H, W) at another size, antialiased.

    Sliced as (1, H, W, C), the crop of a decoded image is recognised as channels-last, which halves the time: torch's
    uint8 kernel then reads and writes whole pixels. That kernel works on the CPU only.
    """
    top, left, rows, columns = box
    crop = image.permute(1, 2, 0)[None, top : top + rows, left : left + columns].permute(0, 3, 1, 2)
    if (rows, columns) == (height, width):
        return crop[0]
    exact = crop.device.type == "cpu" or crop.is_floating_point()
    crop = crop if exact else crop.float()
    crop = F.interpolate(crop, (height, width), mode=interpolation, antialias=True, align_corners=False)[0]
    if interpolation == "bicubic" and crop.is_floating_point():
        crop.clamp_(0, 255)  # it overshoots at edges
    return crop if exact else crop.round_().to(torch.uint8)


def crop_resize(image, box, size, interpolation="bilinear"):
    """(C, H, W) -> (C, size, size) of the same type, uint8 or float32 in [0, 255]: PIL's crop-then-resize within one
    grey level, antialiased (bicubic: but for one value in some thousands, at edges where it overshoots)."""
    return _resize(image, box, size, size, interpolation)


def center_crop(image, view):
    """The EvalView of an image: (C, H, W) -> (C, size, size) of the same type."""
    height, width = _eval_size(view, *image.shape[1:])
    image = _resize(image, (0, 0, *image.shape[1:]), height, width, view.interpolation)
    return _central(image, view.size)


def _eval_size(view, height, width):
    """Height and width that an image gets before its central part is taken, as torchvision's Resize has them."""
    resize = view.resize or (view.size if view.size <= 64 else round(view.size * 256 / 224))
    return tuple(resize * side // min(height, width) for side in (height, width))


def _central(images, size):
    """The central pixels of images (..., H, W)."""
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


# Many images of one size at once, on any device, in the integers that torch's uint8 kernel on the CPU uses: bit for bit
# the pixels of the functions above, which tests/test_own_data.py asserts.
def _bilinear(x):
    return np.maximum(0, 1 - np.abs(x))


def _bicubic(x):  # Keys (1981), a = -1/2, as PIL's
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((x - 5) * x + 8) * x * -0.5 + 2, 0))


FILTERS = {"bilinear": (_bilinear, 1), "bicubic": (_bicubic, 2)}  # and how far they reach, in pixels


@functools.lru_cache(maxsize=16)
def _taps(longest, size, interpolation, device):
    """How 1 to `longest` pixels become `size`: row n is the way of n pixels to it.

    Returns first (longest + 1, size), the first pixel that counts; weights (longest + 1, size, K) of it and those after
    it, in units of 2^-precision; precision (longest + 1,), the largest that keeps weights below 2^15. All int64.
    """
    kernel, reach = FILTERS[interpolation]
    length = np.arange(longest + 1)[:, None]
    scale = length / size
    support = reach * np.maximum(scale, 1)  # longer than the filter when the image shrinks: antialiasing
    centre = scale * (np.arange(size) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), length) - first
    tap = np.arange(count.max())
    weights = kernel((tap + first[..., None] - centre[..., None] + 0.5) / np.maximum(scale, 1)[..., None])
    weights = np.where(tap < count[..., None], weights, 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    largest = weights.max((1, 2))
    precision = np.array([max(p for p in range(22) if p == 0 or int(0.5 + w * 2**p) < 2**15) for w in largest])
    weights *= 2.0 ** precision[:, None, None]
    weights = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int64)
    return [torch.from_numpy(table).to(device) for table in (first, weights, precision)]


def _resize_axis(x, dim, start, length, size, interpolation):
    """Resizes dimension 1 or 2 of int32 images (B, H, W, C): `length` (B,) pixels from `start` (B,) on."""
    first, weights, precision = _taps(max(x.shape[1:3]), size, interpolation, x.device)
    weights, precision = weights[length].to(torch.int32), precision[length].to(torch.int32).view(-1, 1, 1, 1)
    pixel = start[:, None] + first[length]
    shape = (len(x), size, 1, 1) if dim == 1 else (len(x), 1, size, 1)
    to = (-1, -1, x.shape[2], x.shape[3]) if dim == 1 else (-1, x.shape[1], -1, x.shape[3])
    total = (1 << precision) // 2  # rounds to the nearest
    for tap in range(weights.shape[2]):
        at = (pixel + tap).clamp_(max=x.shape[dim] - 1).view(shape).expand(to)  # beyond the end the weights are 0
        total = total + x.gather(dim, at) * weights[:, :, tap].reshape(shape)
    return (total >> precision).clamp_(0, 255)


def crop_resize_batch(images, boxes, size, interpolation="bilinear"):
    """`crop_resize` of uint8 images (B, H, W, C) with boxes (B, 4), int64: uint8 (B, size, size, C). size: pixels, or
    (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    top, left, rows, columns = boxes.unbind(1)
    x = _resize_axis(images.to(torch.int32), 2, left, columns, width, interpolation)
    return _resize_axis(x, 1, top, rows, height, interpolation).to(torch.uint8)


def center_crop_batch(images, view):
    """`center_crop` of uint8 images (B, H, W, C): uint8 (B, size, size, C)."""
    shape = images.shape[1:3]
    if _eval_size(view, *shape) != tuple(shape):
        boxes = torch.tensor([[0, 0, *shape]], device=images.device).expand(len(images), 4)
        images = crop_resize_batch(images, boxes, _eval_size(view, *shape), view.interpolation)
    return _central(images.permute(0, 3, 1, 2), view.size).permute(0, 2, 3, 1)


# --------------------------------------------------------------- batched operators (any device, float in [0, 1])
def _gray(x, _=None):
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x[:, 0] * 0.2989).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)[:, None]


def _blend(x, other, amount):
    return (x * amount).add_(other * (1 - amount)).clamp_(0, 1)


def _brightness(x, amount):
    return (x * amount).clamp_(0, 1)


def _contrast(x, amount):
    return _blend(x, _gray(x).mean((2, 3), keepdim=True), amount)


def _saturation(x, amount):
    return _blend(x, _gray(x), amount)


def _hue(x, amount):
    """Rotates the hue of HSV by `amount` turns. Hue h, in sixths of a turn, is where it lies between the channels; the
    way back is low + c * clip(|h - 3| - 1, 0, 1) for red and low + c * clip(2 - |h - n|, 0, 1), n = 2 and 4, for green
    and blue. Which channel is the largest decides by sign(0) = 0 and sign(> 0) = 1, between which lerp takes either end
    exactly: torch.where is slower on a CPU."""
    r, g, b = x.unbind(1)
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    h = torch.lerp((b - r).add_(chroma, alpha=2), (r - g).sub_(chroma, alpha=2), (value - g).sign_())
    h = torch.lerp(g - b, h, (value - r).sign_())
    h.div_(chroma.clamp(min=torch.finfo(x.dtype).tiny)).add_(6 * amount[:, 0])  # greys: 0 / tiny
    h.sub_((h / 6).floor_(), alpha=6)
    parts = [(h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()]
    return torch.stack([p.clamp_(0, 1).mul_(chroma).add_(low) for p in parts], 1)


def _band(sigma, size, max_sigma):
    """Gaussian kernels (one sigma each) as matrices (B, block, block + 2 radius): `block` neighbouring pixels from all
    that they depend on, each row being the one above moved by one. Returns radius, block and these."""
    radius, block = min(round(5.5 * max_sigma), size - 1), 32 if size % 32 == 0 else size
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (taps / sigma.view(-1, 1)).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    rows = F.pad(kernel[:, None].expand(-1, block, -1), (0, block)).flatten(1)
    return radius, block, rows[:, :-block].unflatten(1, (block, -1))  # rows one shorter: each starts one later


def _blur(x, sigma, max_sigma=2.0):
    """Gaussian blur, one sigma (pixels) per image, mirrored borders: along both axes, each block of 32 pixels is a
    matrix product of the 54 around it, which multiplies a quarter as often as one product per axis would.

    The kernel reaches 5.5 of the largest sigma, as the usual 23 taps at 224 pixels do.
    """
    height, width = x.shape[2:]
    (up, tall, rows), (left, wide, columns) = (_band(sigma, size, max_sigma) for size in (height, width))
    x = F.pad(x, (left, left, up, up), mode="reflect")
    x = x.unfold(3, wide + 2 * left, wide).flatten(1, 3) @ columns.transpose(1, 2)
    x = x.view(len(sigma), -1, height + 2 * up, width).unfold(2, tall + 2 * up, tall)
    return (rows[:, None, None] @ x.transpose(3, 4)).flatten(2, 3)


OPERATORS = {
    "flip": lambda x, _: x.flip(3),
    "gray": lambda x, _: _gray(x).expand_as(x).contiguous(),
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "blur": _blur,
    "solarize": lambda x, threshold: torch.where(x >= threshold, 1 - x, x),
}
CHANNELS = {"red": 0, "green": 1, "blue": 2}  # operations that add their amount to one channel, in place


def _portions(images, steps):
    """Images and steps in portions that a CPU's cache holds from one operation to the next: images above 147 pixels one
    by one, smaller ones, for which the calls would cost more, by about 8 MB. On a GPU everything at once."""
    numbers = images.shape[1:].numel()
    count = len(images) if images.device.type != "cpu" else 2**21 // numbers if numbers < 2**16 else 1
    if count >= len(images):
        return [(images, steps)]
    portions = [(part, []) for part in images.split(count)]
    for name, rows, amounts in steps:
        sizes = (rows // count).bincount(minlength=len(portions)).tolist()
        parts = zip(portions, (rows % count).split(sizes), amounts.split(sizes), strict=True)
        [own.append((name, r, a)) for (_, own), r, a in parts if len(r)]
    return portions


@torch.no_grad()
def augment(images, steps, mean, std, dtype=torch.float32):
    """Applies a `plan` to a batch and normalises it.

    images: uint8 (B, 3, H, W) on any device. steps: as from `plan`, rows (ascending) and amounts as tensors on
    that device. Returns (B, 3, H, W) of `dtype`, channels_last, (x / 255 - mean) / std per channel.
    """
    result = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    mean, std = _channel_vectors(mean, std, images.device)
    portions = _portions(images, steps)
    targets = result.split(len(portions[0][0]))
    threads = torch.get_num_threads() if len(portions) > 1 else 1
    # each thread has portions of its own: none waits within an operator, and sums do not depend on their number
    run = map if threads == 1 else _threads(threads).map
    for _ in run(lambda target, portion: _augment(target, *portion, mean, std), targets, portions):
        pass
    return result


@torch.no_grad()
def _augment(target, images, steps, mean, std):
    x = torch.empty(images.shape, device=images.device).copy_(images).div_(255)
    with torch.autocast(x.device.type, enabled=False):
        for name, rows, amounts in steps:
            if name in CHANNELS:
                x[rows, CHANNELS[name]] += amounts.view(-1, 1, 1)
            elif len(rows) == len(x):
                x = OPERATORS[name](x, amounts.view(-1, 1, 1, 1))
            else:
                x[rows] = OPERATORS[name](x[rows], amounts.view(-1, 1, 1, 1))
    target.copy_(x.sub_(mean).div_(std))


@functools.lru_cache(maxsize=1)
def _threads(count):
    return concurrent.futures.ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


@functools.lru_cache(maxsize=16)
def _channel_vectors(mean, std, device):
    return torch.tensor([mean, std], device=device).view(2, 1, -1, 1, 1).unbind()
