"""Cropping and resizing, antialiased: one image on any device, or many of one size at once."""

import functools

import numpy as np
import torch
import torch.nn.functional as F


def fitted(height, width, short, longest):
    """(height, width) with the shorter side `short`, or the longer one `longest` if it would be longer."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def crop_resize(image, box, size, interpolation="bilinear"):
    """The box (top, left, height, width) of an image (C, H, W), uint8 or float32 in [0, 255], at another size: pixels,
    or (height, width). PIL's crop-then-resize within one grey level, antialiased (bicubic: but for one value in some
    thousands, at edges where it overshoots)."""
    (top, left, rows, columns), size = box, _pair(size)
    # sliced as (1, H, W, C), the crop of a decoded image counts as channels-last, for which torch's uint8 kernel takes
    # half the time; it works on the CPU only
    crop = image.permute(1, 2, 0)[None, top : top + rows, left : left + columns].permute(0, 3, 1, 2)
    if (rows, columns) == size:
        return crop[0]
    exact = crop.device.type == "cpu" or crop.is_floating_point()
    crop = crop if exact else crop.float()
    crop = F.interpolate(crop, size, mode=interpolation, antialias=True, align_corners=False)[0]
    if interpolation == "bicubic" and crop.is_floating_point():
        crop.clamp_(0, 255)  # it overshoots at edges
    return crop if exact else crop.round_().to(torch.uint8)


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)


def central(images, size):
    """The central pixels of images (..., H, W)."""
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


# Many images of one size at once, on any device, in the integers that torch's uint8 kernel on the CPU uses: bit for bit
# the pixels of the functions above, which tests/test_crop.py asserts.
def _bicubic(x):  # Keys (1981), a = -1/2, as PIL's
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((x - 5) * x + 8) * x * -0.5 + 2, 0))


# and how far they reach, in pixels
FILTERS = {"bilinear": (lambda x: np.maximum(0, 1 - np.abs(x)), 1), "bicubic": (_bicubic, 2)}


@functools.lru_cache(maxsize=16)
def _taps(longest, size, interpolation, device):
    """How n = 0 to `longest` pixels become `size`: first (n, size), the first pixel that counts; weights (n, size, K)
    of it and those after it, in units of 2^-precision; precision (n,), the largest that keeps weights below 2^15."""
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
    """`crop_resize` of uint8 images (B, H, W, C) with boxes (B, 4), int64: uint8 (B, size, size, C)."""
    height, width = _pair(size)
    top, left, rows, columns = boxes.unbind(1)
    x = _resize_axis(images.to(torch.int32), 2, left, columns, width, interpolation)
    return _resize_axis(x, 1, top, rows, height, interpolation).to(torch.uint8)
