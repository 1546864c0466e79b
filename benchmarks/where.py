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

import argparse
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
from benchmarks.ema_lars import machine
from common import augment
from common.data import Loader, build

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


def rounds(jobs, repeats, clock=time.process_time):
    """{name: function} -> {name: seconds of each repeat}, in turns; the first round warms up. With one thread, CPU time
    is what the clock would show on a machine without other work."""
    times, order = {name: [] for name in jobs}, list(jobs)
    for repeat in range(repeats + 1):
        for name in order:
            began = clock()
            jobs[name]()
            if repeat:
                times[name].append(clock() - began)
        order = order[1:] + order[:1]
    return times


def table(times, per):
    for name, values in times.items():
        low, middle, high = (1000 * f(values) / per for f in (min, statistics.median, max))
        print(f"{name:<28}{middle:>10.4f}{f'{low:.4f} - {high:.4f}':>22}")


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
                activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (args.device != "cpu")]
            ) as seen:
                yield
            for event in seen.events():
                own = event.self_cpu_time_total if args.device == "cpu" else event.self_device_time_total
                spent[kind_of(event)] += own
                rest[event.name] += own if kind_of(event) == "rest" else 0

        step.Timer.watch = staticmethod(watch)
        timed, _ = step.measure(name, args)
        total = sum(spent.values())
        shares = "".join(f"{spent[kind] / total:>13.0%}" for kind in [*KINDS, "rest"])
        most = ", ".join(f"{key.removeprefix('aten::')} {own / total:.0%}" for key, own in rest.most_common(4))
        print(f"{name:<12}{1000 * statistics.median(t for t, _ in timed):>9.0f}{shares}  {most}", flush=True)


def profile_augment(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    for size, batch in ((224, 64), (32, 512)):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
        images, rows = images.to(args.device).permute(0, 3, 1, 2), torch.arange(batch, device=args.device)
        amounts = torch.rand(batch, generator=generator).to(args.device) / 2 + 0.1
        plans = {"nothing (to float, normalise)": []}
        plans |= {name: [(name, rows, amounts)] for name in augment.OPERATORS}
        recipes = {"MoCo v2, SimSiam": simsiam.augmentation, "BYOL, view 1": byol.augmentation, "MAE": mae.augmentation}
        for name, recipe in recipes.items():
            view = recipe(size)[0]
            plan = augment.plan(view, augment.uniforms(0, 0, range(batch), 0, augment.DRAWS))
            plans[name] = [(n, *(torch.from_numpy(a).to(args.device) for a in rest)) for n, *rest in plan]

        def job(plan, images=images):
            augment.augment(images, plan, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
            step.settle(args.device)

        print(f"\n{size} px, batch {batch}: ms per view, each operator on all images, with what 'nothing' takes")
        jobs = {name: lambda plan=plan, job=job: job(plan) for name, plan in plans.items()}
        table(rounds(jobs, args.repeats, time.process_time if args.device.type == "cpu" else time.perf_counter), batch)


def profile_input(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(words)
    torch.set_num_threads(1)  # as a loading thread has it
    with tempfile.TemporaryDirectory() as folder:
        loader.make_photos(folder, 64)
        files, views, n = build(folder, "train"), loader.our_views("two"), 64
        encoded, decoded = [files.read(i) for i in range(n)], [files[i][0] for i in range(n)]
        draws = [augment.uniforms(0, 0, range(n), v, augment.DRAWS) for v in range(2)]
        boxes = [
            [augment.crop_box(u, *decoded[i].shape[1:], views[v]) for i, u in enumerate(draws[v].tolist())]
            for v in range(2)
        ]
        crops = [augment.crop_resize(decoded[i], boxes[v][i], 224) for v in range(2) for i in range(n)]
        buffer = torch.empty(2 * n, 224, 224, 3, dtype=torch.uint8)
        whole = Loader(files, views, n, workers=0)

        def uniforms():
            for v in range(2):
                augment.plan(views[v], augment.uniforms(0, 0, range(n), v, augment.DRAWS))

        def crop():
            for v in range(2):
                [augment.crop_resize(decoded[i], boxes[v][i], 224) for i in range(n)]

        jobs = {
            "read the file": lambda: [files.read(i) for i in range(n)],
            "read and decode": lambda: [files[i] for i in range(n)],
            "numbers and plans, 2 views": uniforms,
            "boxes, 2 views": lambda: [
                augment.crop_box(u.tolist(), 375, 500, v) for v, d in zip(views, draws, strict=True) for u in d
            ],
            "crop and resize, 2 views": crop,
            "into the batch, 2 views": lambda: [buffer[i].copy_(c.permute(1, 2, 0)) for i, c in enumerate(crops)],
            "the loader, all of these": lambda: list(whole.epoch(0, order=np.arange(n))),
        }
        times = rounds(jobs, args.repeats)
        middle = [statistics.median(values) for values in times.values()]
        size = np.mean([len(e) for e in encoded]) / 1000
        print(f"\n{n} files of {size:.0f} kB, two 224 px views, one thread: ms per image")
        table(times, n)
        print(f"{'beyond the sum':<28}{1000 * (middle[-1] - sum(middle[1:-1])) / n:>10.4f}")


PARTS = {"step": profile_steps, "augment": profile_augment, "input": profile_input}


def main():
    if sys.argv[1:2] in (["-h"], ["--help"]) or (sys.argv[1:] and sys.argv[1] not in PARTS):
        sys.exit(__doc__)
    print(machine(torch.device("cpu")))
    for name in sys.argv[1:2] or PARTS:
        print(f"\n{name}")
        PARTS[name](sys.argv[2:])


if __name__ == "__main__":
    main()
