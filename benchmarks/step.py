"""The training step of every method beside its floor: the passes through the networks that its definition asks for.

    python benchmarks/step.py
    python benchmarks/step.py --only moco byol --augment
    python benchmarks/step.py --device cuda --arch resnet50 --width 1 --image-size 224 --batch-size 256 \\
        --vit vit_base --vit-width 1 --depth 12 --patch-size 16 --images 1281167

Runs each script's own `main`, with a loader that gives the same views, made beforehand, again and again. So what is
timed is the loop as it is, with heads, loss, backward pass, optimiser, moving averages, queues, memories and log, but
without images to load, decode, crop and, unless --augment is given, to augment. Whenever the script asks for the next
batch, the loader first times the floor, so that both take turns: forward and backward passes of a copy of the backbone
on the same views, nothing else (MAE: encoder on the visible tokens, and decoder; DINO: student on all crops and teacher
on the large ones, with their heads; its K is 65,536 times the width). The memories of npid, deepcluster
and odc have the size that N images need (--images; the default is CIFAR-10's number) and start from random features
instead of those of a pass over the images. Heads are as narrow as the backbone is. SwAV's queue, which its recipe uses
from epoch 15 on, is empty. ODC's clusters get new centroids once per repeat.

A loss that is not finite ends the script with an error, and so the benchmark.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, parser, settle
from common import loader, rng, run
from common.augment import DRAWS, augment, to_device
from common.features import by_size
from common.optim import precision

WARMUP = 2  # steps before the first that counts
# What a method has by definition: passes with gradient, passes without, on these views; and flags of the script's heads
# that are scaled by --width.
TWO = ([0, 1], [])
METHODS = {
    "simsiam": (TWO, {"dim": 2048, "pred-dim": 512}),
    "simclr": (TWO, {"dim": 128}),
    "barlowtwins": (TWO, {"dim": 8192}),
    "byol": (([0, 1], [0, 1]), {"dim": 256, "hidden-dim": 4096}),
    "moco": (([0], [1]), {"dim": 128}),
    "mocov3": (([0, 1], [0, 1]), {"dim": 256, "hidden-dim": 4096}),
    "mocov3 vit": (([0, 1], [0, 1]), {"dim": 256, "hidden-dim": 4096}),
    "swav": ("every", {"dim": 128, "hidden-dim": 2048}),
    "npid": (([0], []), {"dim": 128}),
    "deepcluster": (([0], []), {}),
    "odc": (([0], []), {"dim": 256, "hidden-dim": 512}),
    "mae": ("whole", {"decoder-dim": 512}),
    "dino": ("crops", {"out-dim": 65536, "hidden-dim": 2048, "bottleneck-dim": 256}),
    "dino vit": ("crops", {"out-dim": 65536, "hidden-dim": 2048, "bottleneck-dim": 256}),
}
TOGETHER = ("simclr", "swav")  # views of one size pass the backbone as one batch


class Nothing:
    """A data set of n images that nobody reads."""

    def __init__(self, n):
        self.n, self.labels, self.classes = n, None, None

    def __len__(self):
        return self.n


@dataclasses.dataclass
class Ready(loader.Batch):
    """A batch whose views exist already, unless `made` is None."""

    made: list | None = None

    def views(self):
        return super().views() if self.made is None else self.made


class Timer(loader.Loader):
    """The loader of a script: takes the time between two batches, which is that of a step, and that of the floor."""

    options, floor, timed = None, None, None  # set by `timed_run`
    watch = staticmethod(lambda step: contextlib.nullcontext())  # around each step, for a profiler

    def epoch(self, epoch, start=0, order=None):
        device, generator, seconds = self.pool.device, torch.Generator().manual_seed(0), clock(self.options)
        images = [
            torch.randint(0, 256, (self.local, v.size, v.size, 3), dtype=torch.uint8, generator=generator)
            for v in self.specs
        ]
        images = [to_device(x, device).permute(0, 3, 1, 2) for x in images]
        shuffled = rng.permutation(self.seed, epoch, len(self.dataset)) if order is None else order
        plain = [augment(x, [], v.mean, v.std, self.dtype) for x, v in zip(images, self.specs, strict=True)]
        sizes = np.array([images[0].shape[2:]] * self.local)
        for step in range(start, self.epoch_steps):
            keys = shuffled[step * self.local : (step + 1) * self.local]
            indices = to_device(torch.from_numpy(keys), device)
            draws = np.stack([rng.uniforms(self.seed, epoch, keys, stream, DRAWS) for stream in self.streams])
            rest = (torch.zeros_like(indices), indices, keys, draws, sizes, self.seed, epoch, self.dtype)
            batch = Ready(images, self.specs, *rest, None if self.options.augment else plain)
            settle(device)
            began = seconds()
            with self.watch(step):
                yield batch
                settle(device)
            middle = seconds()
            self.floor(plain)
            settle(device)
            self.timed.append((middle - began, seconds() - middle))


def floor_of(name, model, amp):
    """A function of the views that makes the passes a method cannot do without."""
    passes = METHODS[name][0]
    if passes == "whole":
        model = copy.deepcopy(model)

        def mae(views):
            noise = torch.rand(len(views[0]), model.backbone.grid[0] * model.backbone.grid[1], device=views[0].device)
            with amp:
                prediction, _ = model(views[0], noise)
            backward(model, prediction)

        return mae
    if passes == "crops":
        model = copy.deepcopy(model)

        def dino(views):
            with amp:
                student, _ = model(views)
            backward(model, student)

        return dino
    network = copy.deepcopy(model.backbone)
    for module in network.modules():
        if hasattr(module, "splits"):  # MoCo's groups of a batch: bare batch norm instead
            module.splits = 1

    def passing(views):
        trained, frozen = passes if passes != "every" else (range(len(views)), [])
        views, trained = [views[v] for v in frozen], [views[v] for v in trained]
        with amp:
            features = by_size(network, trained) if name in TOGETHER else [network(x) for x in trained]
            with torch.no_grad():
                [network(x) for x in views]
        backward(network, *features)

    return passing


@functools.lru_cache(maxsize=4)
def gradient(shape, dtype, device):
    """Random numbers, drawn once: for many outputs drawing them is some percent of the passes."""
    return torch.randn(shape, dtype=dtype, device=device)


def backward(model, *outputs):
    """Sends random gradients through outputs, as no loss is to be computed."""
    torch.autograd.backward(outputs, [gradient(x.shape, x.dtype, x.device) for x in outputs])
    model.zero_grad()


def flags(name, args, folder):
    script, _, vit = name.partition(" ")
    words = f"--data none --knn-every 0 --save-every 1e6 --workers 0 --device {args.device}"
    words += (
        f" --precision {args.precision} --image-size {args.image_size} --batch-size {args.batch_size} --out {folder}"
    )
    words += f" --max-steps {WARMUP + args.steps * args.repeats + 1}"  # the last one is not timed
    width = args.width
    if vit or script == "mae":
        width = args.vit_width
        words += f" --arch {args.vit} --patch-size {args.patch_size} --depth {args.depth}"
        heads = max(1, round(16 * width))
        words += f" --pictures-every 0 --decoder-heads {heads}" if script == "mae" else ""
    else:
        words += f" --arch {args.arch}" + (f" --centroid-every {args.steps}" if script == "odc" else "")
    heads = " ".join(f"--{flag} {max(8, round(value * width))}" for flag, value in METHODS[name][1].items())
    return f"{words} --width {width} {heads}".split()


def timed_run(name, args):
    """Returns the seconds of each step and of its floor, [(step, floor), ...], and the losses that were logged."""
    script = importlib.import_module(name.split()[0])
    amp, _, _ = precision(args.precision, args.device)
    Timer.options, Timer.timed = args, []

    def parallel(model):
        Timer.floor = staticmethod(floor_of(name, model, amp))
        return model

    def random_features(model, data, view, device, *rest, **more):
        return torch.randn(len(data), model.dim, device=device), None

    def no_images(data, split, *rest, **more):
        return Nothing(args.images) if split == "train" else None

    made = {"Loader": Timer, "parallel": parallel, "open_dataset": no_images, "save_views": lambda *rest: None}
    changed = mock.patch.multiple(run, **made)
    if hasattr(script, "extract"):  # what deepcluster and odc cluster before the first step
        clustered = mock.patch.object(script, "extract", random_features)
    else:
        clustered = contextlib.nullcontext()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryDirectory() as folder, changed, clustered:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                script.main(script.parse_args(flags(name, args, folder)))
        except SystemExit as end:  # warnings of views that never change are no news, errors are
            sys.exit(f"{name} ended with code {end.code}\n{errors.getvalue()}")
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for number, handler in handlers.items():  # the script's own would only ask for the end of a step
        signal.signal(number, handler)
    return Timer.timed[WARMUP:], [line["loss"] for line in lines if "loss" in line]


def parse_args(argv=None):
    words = parser(__doc__, repeats=5)
    words.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    words.add_argument("--arch", default="resnet18")
    words.add_argument("--width", type=float, default=0.25, help="multiplier of the channels, and of the heads")
    words.add_argument("--image-size", type=int, default=32)
    words.add_argument("--batch-size", type=int, default=64)
    words.add_argument("--images", type=int, default=50000, help="N, of the memories")
    words.add_argument("--vit", default="vit_tiny", help="of mae and mocov3 vit")
    words.add_argument("--vit-width", type=float, default=0.25)
    words.add_argument("--depth", type=int, default=6)
    words.add_argument("--patch-size", type=int, default=4)
    words.add_argument("--augment", action="store_true", help="with the augmentation on the device")
    words.add_argument("--precision", default="auto")
    words.add_argument("--steps", type=int, default=5, help="per repeat")
    args = words.parse_args(argv)
    if WARMUP + args.steps * args.repeats >= args.images // args.batch_size:
        words.error("--images: all steps have to fit into one epoch")
    return args


def main():
    args = parse_args()
    print(machine(args.device))
    print(f"{args.arch}, width {args.width}, {args.vit}, width {args.vit_width}, {args.depth} blocks,", end=" ")
    print(f"{args.patch_size} px patches; {args.image_size} px, batch {args.batch_size}, {args.precision} precision")
    print(f"medians of {args.repeats} repeats of {args.steps} steps, N = {args.images:,}", end="")
    print(", augmentation included" if args.augment else ", views made beforehand", end="")
    print(", CPU time of all threads" if args.cpu_time else "")
    print(f"\n{'':<12}{'images/s':>10}{'min - max':>16}{'floor':>8}{'share of it':>13}{'ms beyond it':>14}{'loss':>10}")
    for name in args.only:
        timed, losses = timed_run(name, args)
        parts = [timed[i * args.steps : (i + 1) * args.steps] for i in range(args.repeats)]
        step, floor = ([sum(pair[k] for pair in part) / args.steps for part in parts] for k in (0, 1))
        speed = sorted(args.batch_size / s for s in step)
        share = statistics.median(f / s for f, s in zip(floor, step, strict=True))
        beyond = 1000 * statistics.median(s - f for f, s in zip(floor, step, strict=True))
        print(
            f"{name:<12}{statistics.median(speed):>10.0f}{f'{speed[0]:.0f} - {speed[-1]:.0f}':>16}"
            f"{args.batch_size / statistics.median(floor):>8.0f}{share:>13.0%}{beyond:>14.1f}{losses[-1]:>10.3f}",
            flush=True,
        )
    print(f"\nafter: {machine(args.device)}")


if __name__ == "__main__":
    main()
