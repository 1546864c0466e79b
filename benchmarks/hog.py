"""MaskFeat's target in batch, beside scikit-image's `hog` and nine maps in PyTorch; and its masks.

    python benchmarks/hog.py
    python benchmarks/hog.py --device cuda --batch-size 256 --no-skimage

HOG: of 224 and of 32 pixels, with 9 bins and each cell's histogram scaled alone. scikit-image's takes one channel of
one image per call and central differences instead of Sobel's. On sums of a function of x and one of y both gradients
are the same but for a factor, and there the histograms must agree before anything is timed. Nine maps: gradients are
convolutions, and for each bin a map as large as the image holds the magnitudes of its orientations, to be pooled.
Masks: those of maskfeat.py for a batch, and by a loop over images and places.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, parser, speed, table
from common.rng import uniforms
from maskfeat import hog, masked
from tests.helpers import photo
from tests.test_masks import slow_mask

try:
    from skimage.feature import hog as skimage_hog
except ImportError:
    skimage_hog = None


def library(images, cell):
    """(B, C, H, W) -> (B, C, rows, columns, bins) by scikit-image, a call per image and channel. Orientations count
    from the other axis there, so that channels are transposed."""
    settings = {"orientations": 9, "pixels_per_cell": (cell, cell), "cells_per_block": (1, 1), "block_norm": "L2"}
    found = [skimage_hog(c.T, feature_vector=False, **settings) for image in images for c in image]
    found = np.stack(found).squeeze((3, 4)).transpose(0, 2, 1, 3)
    return found.reshape(*images.shape[:2], *found.shape[1:])


@torch.no_grad()
def nine_maps(images, cell):
    """The same as `library`, from maps of the magnitudes of each bin."""
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=images.device)
    x = F.pad(images.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    gx, gy = F.conv2d(x, torch.stack([sobel, sobel.T])[:, None]).unbind(1)
    orientation, strength = torch.rad2deg(torch.atan2(gx, gy)) % 180 // 20 % 9, gx.hypot(gy)
    maps = torch.stack([torch.where(orientation == k, strength, 0) for k in range(9)], 1)
    cells = F.normalize(F.avg_pool2d(maps, cell), dim=1).movedim(1, 3)
    return cells.unflatten(0, images.shape[:2])


def ours(images, patch, cell):
    """The same from `hog`."""
    n, rows, columns = patch // cell, images.shape[2] // patch, images.shape[3] // patch
    found = hog(images, patch, cell).view(len(images), rows, columns, images.shape[1], 9, n, n)
    return found.permute(0, 3, 1, 5, 2, 6, 4).flatten(4, 5).flatten(2, 3)


def sums(count, size):
    """Images (count, 3, S, S) that are a function of x plus one of y, different in each channel."""
    generator = np.random.default_rng(0)
    x, y = generator.random((2, count, 3, size))
    return torch.from_numpy(x[:, :, None] + y[..., None])


def compare(size, patch, cell, args):
    batch = args.batch_size * (1 if size > 100 else 8)
    images = torch.stack([torch.from_numpy(photo(size, size, seed)) for seed in range(batch)])
    images = (images.permute(0, 3, 1, 2).float() / 255).contiguous().to(args.device)
    known = sums(2, size)
    found = ours(known, patch, cell)
    off = {"nine maps": (nine_maps(known.float(), cell) - found.float()).abs().max().item()}
    if not args.no_skimage:
        off["scikit-image"] = np.abs(library(known.numpy(), cell) - found.numpy()).max()
    told = ", ".join(f"{name} {value:.0e}" for name, value in off.items())
    print(f"\n{size} px, cells of {cell}, {batch} images; largest difference from ours: {told}")
    if max(off.values()) > 1e-3:
        sys.exit("error: they disagree: their times would not compare")
    few = images[: max(1, batch // 8)].cpu().numpy()
    jobs = {"ours": lambda: hog(images, patch, cell), "nine maps": lambda: nine_maps(images, cell)}
    counts = dict.fromkeys(jobs, len(images))
    if not args.no_skimage:
        jobs["scikit-image"], counts["scikit-image"] = lambda: library(few, cell), len(few)
    times = measure(jobs, args.repeats, clock(args), args.device, warm_up=True)
    times = {name: [t / counts[name] for t in values] for name, values in times.items()}
    table(times, "us/image", lambda seconds: 1e6 * seconds, 1, speed(times, list(times)[-1]))


def masks(args):
    for side, count in ((14, 78), (8, 26)):
        seeds = uniforms(0, 0, range(256), 100, 1)
        rest = ((side, side), count, count // 5, 0.3, False)
        equal = all(
            np.array_equal(slow_mask(s, *rest), m)
            for s, m in zip(seeds[:32, 0], masked(seeds, (side, side)), strict=False)
        )
        if not equal:
            sys.exit("error: the masks differ: their times would not compare")
        jobs = {
            "ours": lambda: masked(seeds, (side, side)),
            "loop": lambda: [slow_mask(s, *rest) for s in seeds[:32, 0]],
        }
        times = measure(jobs, args.repeats, clock(args), warm_up=True)
        times = {name: [t / (256 if name == "ours" else 32) for t in values] for name, values in times.items()}
        print(f"\nmasks: {count} of {side} x {side} patches, ours for 256 images at once")
        table(times, "us/image", lambda seconds: 1e6 * seconds, 1, speed(times, "loop"))


def main():
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--batch-size", type=int, default=32, help="images of 224 pixels, eight times as many of 32")
    flags.add_argument("--no-skimage", action="store_true", help="without scikit-image")
    args = flags.parse_args()
    if args.repeats < 1 or args.batch_size < 1:
        flags.error("--repeats and --batch-size must be at least 1")
    if not args.no_skimage and skimage_hog is None:
        sys.exit("error: scikit-image is not installed: pip install scikit-image, or --no-skimage")
    print(machine(args.device))
    compare(224, 16, 8, args)
    compare(32, 4, 4, args)
    masks(args)
    print(f"\nafter: {machine(args.device)}")


if __name__ == "__main__":
    main()
