"""Augmentation: drawn per sample on the CPU, cropped where the image is, everything else in batch on the device.

A script writes its paper's recipe as numbers, one view each: `View` draws a random one, `EvalView` is that of
evaluations, `WholeView` the whole image; it may mix them, and write its own. What happens to sample i in epoch e and
view v is a pure function of (seed, e, i, v): `rng.uniforms` turns those four into numbers, a view turns these into a
box and a list of operations.

`augment` equals torchvision's float operators for equal parameters (tests/test_augment.py).
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from common.crop import central, crop_resize, crop_resize_batch
from common.rng import normals

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ATTEMPTS = 10  # of a random resized crop to fit into the image before the central crop is taken, as in torchvision
# Which uniform decides what. Columns never move, so that two recipes with equal numbers see equal crops.
TOP, LEFT, FLIP, JITTER, FACTORS, ORDER, GRAY, BLUR, SIGMA, SOLARIZE = 20, 21, 22, 23, 24, 28, 32, 33, 34, 35
LIGHTING, DRAWS = 36, 40
JITTERS = ("brightness", "contrast", "saturation", "hue")
# Principal components of ImageNet's colours in [0, 1] (Krizhevsky et al. 2012, section 4.1): their scales,
# largest first, and rows red, green, blue of their directions.
PCA_SCALES = (0.2175, 0.0188, 0.0045)
PCA_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclasses.dataclass(frozen=True)
class WholeView:
    """The whole image, both sides resized to `size` pixels, whatever its aspect. Other views change what differs.

    u: DRAWS uniforms, or (B, DRAWS). batched: `crop_batch` gives the pixels of `crop`, so that images which lie on a
    device can be cropped there.
    """

    size: int
    _: dataclasses.KW_ONLY
    interpolation: str = "bilinear"
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    batched = True

    def box(self, u, height, width):
        """Where the view lies in an image: top, left, height, width."""
        return 0, 0, height, width

    def crop(self, image, u=None):
        """(C, H, W) of uint8 or float32 in [0, 255] -> (C, size, size) of the same type."""
        return crop_resize(image, self.box(u, *image.shape[1:]), self.size, self.interpolation)

    def crop_batch(self, images, u):
        """The same for uint8 images (B, H, W, C): (B, size, size, C)."""
        boxes = torch.tensor([self.box(row, *images.shape[1:3]) for row in u])
        return crop_resize_batch(images, to_device(boxes, images.device), self.size, self.interpolation)

    def mirrored(self, u):
        """Which samples are mirrored after the crop: (B,) bool."""
        return np.zeros(len(u), bool)

    def plan(self, u):
        """What to do after the crop with the samples of a batch: a list of (operation, rows (int64), one float32 amount
        per row), in this order. Sample-wise random orders of the jitter become groups of equal operation."""
        return []

    def without_colours(self):
        """The view without the operations that need red, green and blue: for images of other channels."""
        return self


@dataclasses.dataclass(frozen=True)
class EvalView(WholeView):
    """That of evaluations: shorter side to `resize`, then the central `size` x `size` pixels; its box has fractions."""

    resize: int = 0  # 0: size * 256 / 224, and no margin for images of at most 64 pixels

    def resized(self, height, width):
        """Height and width before the central part is taken, as torchvision's Resize has them."""
        resize = self.resize or (self.size if self.size <= 64 else round(self.size * 256 / 224))
        return tuple(resize * side // min(height, width) for side in (height, width))

    def box(self, u, height, width):
        sides = self.resized(height, width)
        scales = height / sides[0], width / sides[1]
        top, left = (scale * round((side - self.size) / 2) for scale, side in zip(scales, sides, strict=True))
        return top, left, scales[0] * self.size, scales[1] * self.size

    def crop(self, image, u=None):
        shape = image.shape[1:]
        return central(crop_resize(image, (0, 0, *shape), self.resized(*shape), self.interpolation), self.size)

    def crop_batch(self, images, u=None):
        shape = tuple(images.shape[1:3])
        if self.resized(*shape) != shape:
            boxes = torch.tensor([[0, 0, *shape]], device=images.device).expand(len(images), 4)
            images = crop_resize_batch(images, boxes, self.resized(*shape), self.interpolation)
        return central(images.permute(0, 3, 1, 2), self.size).permute(0, 2, 3, 1)


@dataclasses.dataclass(frozen=True)
class View(WholeView):
    """One random view of an image, as numbers. Probabilities of 0 switch an operation off.

    area, ratio: range of the crop's share of the image area and of its width / height. jitter: strengths of brightness,
    contrast, saturation and hue, as in torchvision's ColorJitter (drawn factors multiply; the four are applied in a
    random order). blur_sigma: range in pixels. gray_first: turn to grey before the jitter instead of after it.
    lighting: AlexNet's change of colour, a normal number of this standard deviation per principal component, added last
    and not clipped.
    """

    area: tuple = (0.08, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0
    gray_p: float = 0.0
    gray_first: bool = False
    blur_p: float = 0.0
    blur_sigma: tuple = (0.1, 2.0)
    solarize_p: float = 0.0
    lighting: float = 0.0

    def box(self, u, height, width):
        """Random resized crop (Szegedy et al. 2015, as torchvision draws it)."""
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        u = u.tolist()
        for attempt in range(ATTEMPTS):
            area = height * width * (self.area[0] + u[2 * attempt] * (self.area[1] - self.area[0]))
            aspect = math.exp(log_low + u[2 * attempt + 1] * (log_high - log_low))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(u[TOP] * (height - h + 1)), int(u[LEFT] * (width - w + 1)), h, w
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
        return (height - h) // 2, (width - w) // 2, h, w

    def mirrored(self, u):
        return u[:, FLIP] < self.flip

    def plan(self, u):
        gray, jitter = [("gray", u[:, GRAY] < self.gray_p, 0)], []
        jittered, order = u[:, JITTER] < self.jitter_p, np.argsort(u[:, ORDER : ORDER + 4], axis=1)
        for position, (k, strength) in itertools.product(range(4), enumerate(self.jitter)):
            low, high = (-strength, strength) if k == 3 else (max(0.0, 1 - strength), 1 + strength)
            amount = low + u[:, FACTORS + k] * (high - low)
            jitter.append((JITTERS[k], jittered & (order[:, position] == k) & (strength > 0), amount))
        low, high = self.blur_sigma
        operations = [
            ("flip", self.mirrored(u), 0),
            *(gray + jitter if self.gray_first else jitter + gray),
            ("blur", u[:, BLUR] < self.blur_p, low + u[:, SIGMA] * (high - low)),
            ("solarize", u[:, SOLARIZE] < self.solarize_p, 0.5),
        ]
        if self.lighting:
            shift = normals(u[:, LIGHTING : LIGHTING + 4])[:, :3] * self.lighting * PCA_SCALES @ np.transpose(PCA_AXES)
            operations += [(name, np.ones(len(u), bool), shift[:, k]) for name, k in CHANNELS.items()]
        found = [(name, np.flatnonzero(mask), np.broadcast_to(x, len(u))) for name, mask, x in operations]
        return [(name, rows, x[rows].astype(np.float32)) for name, rows, x in found if len(rows)]

    def without_colours(self):
        return dataclasses.replace(self, jitter=(*self.jitter[:2], 0.0, 0.0), gray_p=0.0, lighting=0.0)


def to_device(tensor, device):
    """A tensor of host memory on a device, without waiting for what the device is doing."""
    device = torch.device(device)
    if device.type == "mps" and tensor.dtype == torch.float64:  # which it does not have
        tensor = tensor.float()
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# --------------------------------------------------------------- batched operators (any device, float in [0, 1])
def _gray(x):
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x[:, 0] * 0.2989).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)[:, None]


def _blend(x, other, amount):
    return (x * amount).add_(other * (1 - amount)).clamp_(0, 1)


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


def _band(sigma, size):
    """Gaussian kernels (one sigma each) as matrices (B, block, block + 2 radius): `block` neighbouring pixels from all
    that they depend on, each row being the one above moved by one. Returns radius, block and these."""
    radius, block = min(11, size - 1), 32 if size % 32 == 0 else size
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (taps / sigma.view(-1, 1)).square())
    kernel = kernel.masked_fill(kernel < 1e-12, 0)  # of no weight, but slow where they are subnormal numbers
    kernel = kernel / kernel.sum(1, keepdim=True)
    rows = F.pad(kernel[:, None].expand(-1, block, -1), (0, block)).flatten(1)
    return radius, block, rows[:, :-block].unflatten(1, (block, -1))  # rows one shorter: each starts one later


def _blur(x, sigma):
    """Gaussian blur of 23 taps, one sigma (pixels) per image, mirrored borders: along both axes, each block of 32
    pixels is a matrix product of the 54 around it, a quarter of the multiplications of one product per axis."""
    height, width = x.shape[2:]
    (up, tall, rows), (left, wide, columns) = _band(sigma, height), _band(sigma, width)
    x = F.pad(x, (left, left, up, up), mode="reflect")
    x = x.unfold(3, wide + 2 * left, wide).flatten(1, 3) @ columns.transpose(1, 2)
    x = x.view(len(sigma), -1, height + 2 * up, width).unfold(2, tall + 2 * up, tall)
    return (rows[:, None, None] @ x.transpose(3, 4)).flatten(2, 3)


OPERATORS = {
    "flip": lambda x, _: x.flip(3),
    "gray": lambda x, _: _gray(x).expand_as(x).contiguous(),
    "brightness": lambda x, amount: (x * amount).clamp_(0, 1),
    "contrast": lambda x, amount: _blend(x, _gray(x).mean((2, 3), keepdim=True), amount),
    "saturation": lambda x, amount: _blend(x, _gray(x), amount),
    "hue": _hue,
    "blur": _blur,
    "solarize": lambda x, threshold: torch.where(x >= threshold, 1 - x, x),
}
CHANNELS = {"red": 0, "green": 1, "blue": 2}  # operations that add their amount to one channel, in place


def _portions(images, operations):
    """Images and operations in portions that a CPU's cache holds from one operation to the next: images above 147
    pixels one by one, smaller ones, for which the calls would cost more, by about 8 MB. On a GPU everything at once."""
    numbers = images.shape[1:].numel()
    count = len(images) if images.device.type != "cpu" else 2**21 // numbers if numbers < 2**16 else 1
    if count >= len(images):
        return [(images, operations)]
    portions = [(part, []) for part in images.split(count)]
    for name, rows, amounts in operations:
        sizes = (rows // count).bincount(minlength=len(portions)).tolist()
        parts = zip(portions, (rows % count).split(sizes), amounts.split(sizes), strict=True)
        [own.append((name, r, a)) for (_, own), r, a in parts if len(r)]
    return portions


@torch.no_grad()
def augment(images, operations, mean, std, dtype=torch.float32):
    """Applies a plan to images (B, C, H, W), uint8 or floats in [0, 255]: (x / 255 - mean) / std, channels_last.

    operations: as from `View.plan`, rows (ascending) and amounts as tensors on the device of the images.
    """
    result = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    mean, std = _channel_vectors(mean, std, images.device)
    portions = _portions(images, operations)
    targets = result.split(len(portions[0][0]))
    threads = torch.get_num_threads() if len(portions) > 1 else 1
    # each thread has portions of its own: none waits within an operator, and sums do not depend on their number
    run = map if threads == 1 else _threads(threads).map
    for _ in run(lambda target, portion: _augment(target, *portion, mean, std), targets, portions):
        pass
    return result


@torch.no_grad()
def _augment(target, images, operations, mean, std):
    x = torch.empty(images.shape, device=images.device).copy_(images).div_(255)
    with torch.autocast(x.device.type, enabled=False):
        for name, rows, amounts in operations:
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
