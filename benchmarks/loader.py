"""The input pipeline: images per second from JPEG files to augmented views, beside the usual way.

    python benchmarks/loader.py
    python benchmarks/loader.py --data /imagenet/val --views two multicrop one --workers 8
    python benchmarks/loader.py --device cuda --workers 16 --images 4096

Rows, all from the same files with equally many workers:
  torchvision      PIL and torchvision's v1 transforms in DataLoader worker processes: what the papers' code does.
  lightly          its transform of the same paper, with its own defaults, in the same DataLoader (if installed).
  ours, CPU stage  common/loader.py: threads decode, cut and resize into uint8 batches, and the parameters of the rest
                   are drawn. With a GPU this is all that the CPU has to do.
  ours, all        the same, then jitter, grey, blur, solarisation and normalisation in batch on --device.
  decode only      reading and decoding by as many threads: the floor of anything that starts from JPEG files.

Views: two (MoCo v2: 2 x 224), multicrop (SwAV: 2 x 224 and 6 x 96), one (MAE: 1 x 224, no colours, bicubic).
Without --data it makes 200 photo-like JPEGs of 500 x 375 pixels and about 100 kB. Files are read from the page cache.
Before timing, our crops must equal PIL's crop-then-resize for equal boxes. One unmeasured pass comes first; worker
processes stay alive between passes. CPU ms/image counts all processes and threads, and so says more than the clock on a
machine that is busy with other things.
"""

import concurrent.futures
import contextlib
import importlib.util
import itertools
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg, read_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import machine, measure, parser, speed, table
from common import rng
from common.augment import DRAWS, IMAGENET_MEAN, IMAGENET_STD, View
from common.datasets import open_dataset
from common.loader import Loader


# ------------------------------------------------------------------------------------------------ the recipes
def our_views(kind):
    if kind == "one":
        return [View(224, area=(0.2, 1.0), interpolation="bicubic")]
    if kind == "two":
        colours = {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_p": 0.8, "gray_p": 0.2, "blur_p": 0.5}
        return [View(224, area=(0.2, 1.0), **colours)] * 2
    colours = {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "gray_p": 0.2, "blur_p": 0.5}
    return [View(224, area=(0.14, 1.0), **colours)] * 2 + [View(96, area=(0.05, 0.14), **colours)] * 6


def pil_blur(image):
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def pil_transforms(views):
    """The same views by torchvision's v1 transforms on PIL images, one per view."""
    transforms = []
    for view in views:
        mode = v1.InterpolationMode(view.interpolation)
        steps = [v1.RandomResizedCrop(view.size, view.area, view.ratio, interpolation=mode)]
        if view.jitter_p:
            steps.append(v1.RandomApply([v1.ColorJitter(*view.jitter)], p=view.jitter_p))
            steps.append(v1.RandomGrayscale(p=view.gray_p))
            steps.append(v1.RandomApply([pil_blur], p=view.blur_p))
        steps += [v1.RandomHorizontalFlip(view.flip), v1.ToTensor(), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        transforms.append(v1.Compose(steps))
    return lambda image: [transform(image) for transform in transforms]


def lightly_transform(kind):
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # else it asks the network
    from lightly import transforms

    return {"two": transforms.MoCoV2Transform, "multicrop": transforms.SwaVTransform, "one": transforms.MAETransform}[
        kind
    ]()


class PilFiles(torch.utils.data.Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with open(self.paths[i], "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


# -------------------------------------------------------------------------------------------------- the images
def make_photos(folder, count=200, width=500, height=375):
    generator = np.random.default_rng(0)
    for i in range(count):
        image = 128 + 9 * generator.standard_normal((height, width, 1), dtype=np.float32)
        for cells, strength in ((4, 120), (12, 60), (40, 30)):
            for channel in range(3):
                layer = Image.fromarray(generator.uniform(-1, 1, (cells * 3 // 4, cells)).astype(np.float32))
                smooth = strength * np.asarray(layer.resize((width, height), Image.BICUBIC))
                image = image + smooth[..., None] * (np.arange(3) == channel)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(Path(folder) / f"{i:04}.jpg", quality=95)


def check_equality(dataset, views, count=16):
    """Our crops against PIL's, from the same files with the same boxes. Returns the line that says so."""
    worst, apart, total = 0, 0, 0
    for i in range(min(count, len(dataset))):
        ours = dataset[i][0]
        with Image.open(dataset.path(i)) as image:
            theirs = image.convert("RGB")
        for v, view in enumerate(views):
            u = rng.uniforms(0, 0, [i], v, DRAWS)[0]
            top, left, height, width = view.box(u, *ours.shape[1:])
            filters = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
            crop = theirs.crop((left, top, left + width, top + height))
            crop = np.asarray(crop.resize((view.size, view.size), filters[view.interpolation])).astype(int)
            mine = view.crop(ours, u).permute(1, 2, 0).numpy()
            off = np.abs(crop - mine)
            worst, apart, total = max(worst, off.max()), apart + (off > 1).sum(), total + off.size
    bicubic = any(view.interpolation == "bicubic" for view in views)
    if worst > (8 if bicubic else 1) or apart > 1e-3 * total:
        raise SystemExit(f"our crops differ from PIL's by up to {worst} grey levels, by more than 1 in {apart}/{total}")
    return f"crops equal PIL's: at most {worst} of 255 levels apart, more than 1 in {apart / total:.3%} of the values"


# ------------------------------------------------------------------------------------------------- the timings
def clocks():
    """The time and the CPU time of all processes."""
    return np.array([time.perf_counter(), cpu_seconds()])


def cpu_seconds():
    """CPU time of this process and of those it has started, ended ones too, so far; nan where there is no /proc."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # of a process that has just ended
            fields = file.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total if Path("/proc/self/stat").exists() else float("nan")


def data_loader_pass(paths, transform, args):
    dataset = PilFiles(paths, transform)
    loader = torch.utils.data.DataLoader(
        dataset,
        args.batch_size,
        num_workers=args.workers,
        drop_last=True,
        persistent_workers=args.workers > 0,
        pin_memory=args.device.type == "cuda",
    )

    def run():
        for views in loader:
            views = views[0] if isinstance(views[0], (list, tuple)) else views  # some give targets too
            [view.to(args.device, non_blocking=True) for view in views]

    return run


def our_pass(dataset, views, order, args, whole):
    loader = Loader(dataset, views, args.batch_size, workers=args.workers, device=args.device)
    epochs = itertools.count()

    def run():
        for batch in loader.epoch(next(epochs), order=order):
            if whole:
                batch.views()

    return run


def decode_pass(paths, args):
    pool = concurrent.futures.ThreadPoolExecutor(max(1, args.workers))

    def some(part):
        for path in part:
            decode_jpeg(read_file(path), mode=ImageReadMode.UNCHANGED)

    return lambda: list(pool.map(some, [paths[i : i + 8] for i in range(0, len(paths), 8)]))


def compare(kind, dataset, args):
    views = our_views(kind)
    print(f"\n{kind}: {', '.join(str(v.size) for v in views)} px; {check_equality(dataset, views)}")
    order = np.arange(args.images) % len(dataset)
    paths = [dataset.path(i) for i in order]
    runs = {"torchvision": data_loader_pass(paths, pil_transforms(views), args)}
    if importlib.util.find_spec("lightly"):
        runs["lightly"] = data_loader_pass(paths, lightly_transform(kind), args)
    else:
        print("lightly is not installed (pip install lightly): no row for it")
    runs["ours, CPU stage"] = our_pass(dataset, views, order, args, whole=False)
    runs["ours, all"] = our_pass(dataset, views, order, args, whole=True)
    runs["decode only"] = decode_pass(paths, args)

    found = measure(runs, args.repeats, clocks, args.device, warm_up=True)  # which starts processes and fills caches
    times = {name: [seconds for seconds, _ in both] for name, both in found.items()}
    cpu = {name: f"{1000 * statistics.median(c for _, c in both) / args.images:.2f}" for name, both in found.items()}
    columns = speed(times, "torchvision") | speed(times, "decode only") | {"CPU ms/image": cpu}
    table(times, "images/s", lambda seconds: args.images / seconds, 0, columns)


def main():
    flags = parser(__doc__, repeats=5, cpu_time=False)
    flags.add_argument("--data", help="folder of JPEG files (default: makes its own)")
    flags.add_argument("--views", nargs="+", choices=["two", "multicrop", "one"], default=["two"])
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--workers", type=int, default=2, help="threads, or processes of the DataLoaders")
    flags.add_argument("--images", type=int, default=512, help="images per pass (files are used again as needed)")
    args = flags.parse_args()
    args.images -= args.images % args.batch_size
    if args.images < 1 or args.repeats < 1:
        flags.error("--images must be at least --batch-size, and --repeats at least 1")

    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            make_photos(folder)
        dataset = open_dataset(args.data or folder, "train")
        sizes = [os.path.getsize(dataset.path(i)) for i in range(min(len(dataset), 1000))]
        print(machine(args.device))
        print(
            f"{len(dataset)} files of {statistics.mean(sizes) / 1000:.0f} kB, {args.images} images per pass, batches of"
            f" {args.batch_size}, {args.workers} workers, medians of {args.repeats} interleaved passes"
        )
        for kind in args.views:
            compare(kind, dataset, args)
        print(f"\nafter: {machine(args.device)}")


if __name__ == "__main__":
    main()
