"""Where the time goes: in the training step, in the augmentation on the device, and in the input pipeline.

    python benchmarks/where.py                     # all three
    python benchmarks/where.py step --only byol    # flags after the name: see benchmarks/step.py
    python benchmarks/where.py augment --device cuda
    python benchmarks/where.py input

step: shares of the operators' own time, by torch.profiler, of every method of benchmarks/step.py. augment: ms per view
of each operator of common/augment.py on all images of a batch, and of whole recipes. input: ms per image of what a
loading thread does for two 224 px views, and what the loader takes beyond the sum. The last two use one thread and
count its CPU time. Medians of interleaved repeats. What came out of it and what was done: benchmarks/profile.md.
"""

import collections
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else the profiler reports each of its starts
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import byol
import mae
import simsiam
from benchmarks import loader, step
from benchmarks.timing import machine, measure, milliseconds, parser, table
from common import augment, rng
from common.crop import crop_resize
from common.datasets import open_dataset
from common.loader import Loader

KINDS = {  # by the names of an operator and of those that it is part of
    "optimiser": ("Optimizer.step",),
    "averages": ("_foreach",),
    "convolution": ("convolution", "ConvolutionBackward"),
    "batch norm": ("batch_norm", "BatchNormBackward"),
    "matrix": ("mm", "matmul", "linear", "attention"),
}


def kind_of(event):
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    text = " ".join(names)
    return next((kind for kind, parts in KINDS.items() if any(part in text for part in parts)), "rest")


def profile_steps(words):
    """Shares of each kind of operator in the steps of the methods."""
    args = step.parse_args(words)
    args.repeats = 1
    print(f"{'':<12}{'ms/step':>9}" + "".join(f"{kind:>13}" for kind in [*KINDS, "rest"]) + "  most of the rest")
    for name in args.only:
        spent, rest = collections.Counter(), collections.Counter()

        @contextlib.contextmanager
        def watch(number, spent=spent, rest=rest):
            if number < step.WARMUP:
                yield
                return
            with profile(
                activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (args.device.type != "cpu")]
            ) as seen:
                yield
            for event in seen.events():
                own = event.self_cpu_time_total if args.device.type == "cpu" else event.self_device_time_total
                spent[kind_of(event)] += own
                rest[event.name] += own if kind_of(event) == "rest" else 0

        step.Timer.watch = staticmethod(watch)
        timed, _ = step.timed_run(name, args)
        total = sum(spent.values())
        shares = "".join(f"{spent[kind] / total:>13.0%}" for kind in [*KINDS, "rest"])
        most = ", ".join(f"{key.removeprefix('aten::')} {own / total:.0%}" for key, own in rest.most_common(4))
        print(f"{name:<12}{1000 * statistics.median(t for t, *_ in timed):>9.0f}{shares}  {most}", flush=True)


def profile_augment(words):
    flags = parser(None, repeats=7, cpu_time=False)
    args = flags.parse_args(words)
    torch.set_num_threads(1)
    seconds = time.process_time if args.device.type == "cpu" else time.perf_counter
    for size, batch in ((224, 64), (32, 512)):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
        images, rows = images.to(args.device).permute(0, 3, 1, 2), torch.arange(batch, device=args.device)
        amounts = torch.rand(batch, generator=generator).to(args.device) / 2 + 0.1
        plans = {"nothing (to float, normalise)": []}
        plans |= {name: [(name, rows, amounts)] for name in augment.OPERATORS}
        recipes = {"MoCo v2, SimSiam": simsiam.augmentation, "BYOL, view 1": byol.augmentation, "MAE": mae.augmentation}
        for name, recipe in recipes.items():
            plan = recipe(size)[0].plan(rng.uniforms(0, 0, range(batch), 0, augment.DRAWS))
            plans[name] = [(n, *(torch.from_numpy(a).to(args.device) for a in rest)) for n, *rest in plan]

        def job(plan, images=images):
            return lambda: augment.augment(images, plan, augment.IMAGENET_MEAN, augment.IMAGENET_STD)

        print(f"\n{size} px, batch {batch}: ms per view, operators on all images, 'nothing' included", end="")
        jobs = {name: job(plan) for name, plan in plans.items()}
        times = measure(jobs, args.repeats, seconds, args.device, warm_up=True)
        table(times, "ms", lambda s, batch=batch: milliseconds(s) / batch, 4)


def profile_input(words):
    args = parser(None, repeats=5, device=False, cpu_time=False).parse_args(words)
    torch.set_num_threads(1)  # as a loading thread has it
    with tempfile.TemporaryDirectory() as folder:
        loader.make_photos(folder, 64)
        files, views, n = open_dataset(folder, "train"), loader.our_views("two"), 64
        encoded, decoded = [files.read(i) for i in range(n)], [files[i][0] for i in range(n)]
        draws = [rng.uniforms(0, 0, range(n), v, augment.DRAWS) for v in range(2)]
        pairs = list(zip(views, draws, strict=True))
        boxes = [[view.box(u, *image.shape[1:]) for u, image in zip(us, decoded, strict=True)] for view, us in pairs]
        buffer = torch.empty(2 * n, 224, 224, 3, dtype=torch.uint8)
        whole = Loader(files, views, n, workers=0)

        def uniforms():
            for v, view in enumerate(views):
                view.plan(rng.uniforms(0, 0, range(n), v, augment.DRAWS))

        def crop():
            return [crop_resize(image, box, 224) for own in boxes for image, box in zip(decoded, own, strict=True)]

        crops = crop()
        jobs = {
            "read the file": lambda: [files.read(i) for i in range(n)],
            "read and decode": lambda: [files[i] for i in range(n)],
            "numbers and plans, 2 views": uniforms,
            "boxes, 2 views": lambda: [view.box(u, 375, 500) for view, us in pairs for u in us],
            "crop and resize, 2 views": crop,
            "into the batch, 2 views": lambda: [buffer[i].copy_(c.permute(1, 2, 0)) for i, c in enumerate(crops)],
            "the loader, all of these": lambda: list(whole.epoch(0, order=np.arange(n))),
        }
        times = measure(jobs, args.repeats, time.process_time, warm_up=True)  # one thread: as on an idle machine
        middle = [statistics.median(values) for values in times.values()]
        size = np.mean([len(e) for e in encoded]) / 1000
        print(f"\n{n} files of {size:.0f} kB, two 224 px views, one thread: ms per image", end="")
        table(times, "ms", lambda s: milliseconds(s) / n, 4)
        print(f"{'beyond the sum':28}{1000 * (middle[-1] - sum(middle[1:-1])) / n:>16.4f}")


PARTS = {"step": profile_steps, "augment": profile_augment, "input": profile_input}


def main():
    if sys.argv[1:2] in (["-h"], ["--help"]) or (sys.argv[1:] and sys.argv[1] not in PARTS):
        sys.exit(__doc__)
    print(machine())
    for name in sys.argv[1:2] or PARTS:
        print(f"\n{name}")
        PARTS[name](sys.argv[2:])


if __name__ == "__main__":
    main()
