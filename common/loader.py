"""A loader whose batches depend on (seed, epoch, step) and nothing else.

It decodes and crops in threads (decoding and resizing release the interpreter lock) into uint8 batches a few steps
ahead; the rest of the augmentation runs in batch on the device when a script asks for `batch.views()`.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import sys
import threading
import time
import types

import numpy as np
import torch

from common import rng
from common.args import fail
from common.augment import DRAWS, EvalView, augment, to_device
from common.datasets import evenly_spaced, in_memory
from common.distributed import print0, rank, world_size
from common.images import BadImage, to_tensor

REPORTED = set()  # files whose names have been reported, by whichever loader
AHEAD = 2  # batches prepared in advance; with the one in use, three exist at a time


@dataclasses.dataclass
class Batch:
    """One micro-batch of one process. images[v]: uint8 (B, C, S, S) on the device, cropped as specs[v] says, a view of
    common/augment.py; on the CPU they lie in the loader's buffers and change when the next batch is asked for."""

    images: list
    specs: tuple
    labels: torch.Tensor  # (B,) int64 on the device, as are the indices
    indices: torch.Tensor
    keys: np.ndarray  # (B,) what the sample's numbers are drawn for: its index, another one when it comes up again
    draws: np.ndarray  # (V, B, DRAWS) uniforms of the views
    sizes: np.ndarray  # (B, 2) height and width of the decoded images
    seed: int
    epoch: int
    dtype: torch.dtype

    def views(self):
        """The augmented, normalised views: a list of (B, C, S, S) floats, channels_last."""
        views = zip(self.images, self.specs, self.draws, strict=True)
        return [augment(x, self._to_device(spec.plan(u)), spec.mean, spec.std, self.dtype) for x, spec, u in views]

    def uniforms(self, n, stream=rng.SCRIPT):
        """n numbers in [0, 1) per sample, a function of seed, epoch and sample: (B, n) float64 on the device."""
        return self._put(rng.uniforms(self.seed, self.epoch, self.keys, stream, n))

    def boxes(self, v):
        """Where view v was taken, (B, 7) float64 on the device: top, left, height, width of the crop and height, width
        of the image in pixels, and whether the crop was mirrored afterwards."""
        spec, u = self.specs[v], self.draws[v]
        boxes = [spec.box(row, *size) for row, size in zip(u, self.sizes.tolist(), strict=True)]
        return self._put(np.concatenate([np.array(boxes, float), self.sizes, spec.mirrored(u)[:, None]], 1))

    def _put(self, array):
        return to_device(torch.from_numpy(array), self.indices.device)

    def _to_device(self, plan):
        """The rows and amounts of a plan on the device, in two transfers."""
        if not plan:
            return []
        names, *parts = zip(*plan, strict=True)
        rows, amounts = (self._put(np.concatenate(part)).split([len(r) for r in part]) for part in parts)
        return list(zip(names, rows, amounts, strict=True))


class Loader:
    """Random views of a dataset in batches, each a pure function of (seed, epoch, step) whatever processes there are.

    specs: views of common/augment.py. batch_size: images per optimiser step over all processes and `accum` micro-
    batches. `epoch(e)` yields `epoch_steps * accum` micro-batches of `local` images; the last, incomplete step is
    dropped. streams: which random numbers each view takes (0, 1, 2 ...); views of one stream and one kind of crop see
    the same part of an image. waited: seconds that the caller has spent waiting for images so far.
    """

    def __init__(
        self, dataset, specs, batch_size, seed=0, device="cpu", workers=4, accum=1, max_bad=100, dtype=None, streams=()
    ):
        if batch_size > len(dataset):
            smaller = 2 ** max(0, (len(dataset) // 8).bit_length() - 1)
            fail(f"--batch-size {batch_size} is larger than the data set ({len(dataset)} images): try {smaller}")
        self.dataset, self.specs, self.seed, self.accum = dataset, tuple(specs), seed, accum
        self.batch_size, self.local = batch_size, batch_size // (world_size() * accum)
        self.epoch_steps, self.streams = len(dataset) // batch_size, streams or range(len(self.specs))
        self.dtype = dtype or torch.float32
        self.pool = Pool(dataset, self.specs, device, workers, max_bad)

    @property
    def waited(self):
        return self.pool.waited

    def epoch(self, epoch, start=0, order=None):
        """Micro-batches of an epoch from optimiser step `start` on. order: sample indices instead of a permutation;
        a sample that comes up twice is augmented differently each time."""
        n = len(self.dataset)
        order = rng.permutation(self.seed, epoch, n) if order is None else np.asarray(order)
        by_index = np.argsort(order, kind="stable")
        keys = np.empty_like(order)  # order + n for what comes up the second time, + 2 n the third ...
        keys[by_index] = np.arange(len(order)) - np.searchsorted(order[by_index], order[by_index])
        keys = order + n * keys
        own = [(micro * world_size() + rank()) * self.local for micro in range(self.accum)]
        firsts = [step * self.batch_size + i for step in range(start, len(order) // self.batch_size) for i in own]
        parts = [slice(first, first + self.local) for first in firsts]

        def job(part):
            draws = [rng.uniforms(self.seed, epoch, keys[part], stream, DRAWS) for stream in self.streams]
            return order[part], np.stack(draws)

        for part, (crops, sizes, labels, indices, draws) in zip(parts, self.pool.run(map(job, parts)), strict=True):
            on_device = to_device(torch.from_numpy(indices), self.pool.device)
            yield Batch(crops, self.specs, labels, on_device, keys[part], draws, sizes, self.seed, epoch, self.dtype)


def eval_share(n, batch_size):
    """(first, last): this process's part [first, last) of n samples, consecutive in rank order and of whole batches:
    the same ones whatever the number of processes, so that their features are the same to the last bit."""
    batches = -(-n // batch_size)
    first, last = (batches * r // world_size() * batch_size for r in (rank(), rank() + 1))
    return min(first, n), min(last, n)


def eval_batches(dataset, view, batch_size, device, workers=4, dtype=torch.float32):
    """This process's share (`eval_share`) of a dataset: yields (images (B, C, S, S), labels (B,), indices (B,))."""
    indices = np.arange(*eval_share(len(dataset), batch_size))
    for (crops,), _, labels, part in crop_batches(dataset, view, indices, batch_size, device, workers):
        yield augment(crops, [], view.mean, view.std, dtype), labels, torch.from_numpy(part)


def crop_batches(dataset, view, indices, batch_size, device="cpu", workers=4, max_bad=100):
    """The crops of a view without random numbers: yields ([uint8 (B, C, S, S)], sizes, labels, indices)."""
    parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    jobs = ((part, np.zeros((1, len(part), 0))) for part in parts)
    for crops, sizes, labels, part, _ in Pool(dataset, (view,), device, workers, max_bad).run(jobs):
        yield crops, sizes, labels, part


def image_statistics(dataset, size, workers=4, most=1000):
    """(mean, std) per channel, in [0, 1], over the central `size` x `size` pixels of `most` evenly spaced images."""
    images = evenly_spaced(dataset, most)
    total, square, count = 0, 0, 0
    for (x,), *_ in crop_batches(images, EvalView(size), np.arange(len(images)), 64, workers=workers):
        x = x.double() / 255
        total, square = total + x.sum((0, 2, 3)), square + x.square().sum((0, 2, 3))
        count += x.numel() // x.shape[1]
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.clamp(min=1 / 255).tolist())  # a channel without contrast stays finite


def adapt_views(specs, dataset, stats=None, workers=4):
    """Views for the images of a dataset: colour operators only where there are colours, normalised as `--stats` says,
    by numbers of ImageNet ("imagenet") or of the images ("auto", the default unless they have 3 channels)."""
    channels, deep = getattr(dataset, "channels", 3), getattr(dataset, "dtype", torch.uint8) != torch.uint8
    if channels != 3:
        if stats == "imagenet":
            fail(f"--stats imagenet is for 3 channels, --channels says {channels}: leave it out")
        plain, stats = [spec.without_colours() for spec in specs], "auto"
        if plain != list(specs):
            print0(f"colours     {channels} channels: saturation, hue, greyscale and lighting are switched off")
        specs = plain
    if stats != "auto" and not deep:
        return list(specs)
    mean, std = image_statistics(dataset, specs[0].size, workers, 1000 if stats == "auto" else 64)
    remedy = "scale them up, or try --stats auto"
    if stats == "auto":
        specs, remedy = [dataclasses.replace(spec, mean=mean, std=std) for spec in specs], "scale them up"
        shown = (" ".join(f"{x:.3f}" for x in values[:8]) + (" ..." if channels > 8 else "") for values in (mean, std))
        print0("statistics  mean {}, std {}".format(*shown))
    if (white := max(m + 3 * s for m, s in zip(mean, std, strict=True))) < 0.25:
        print0(f"note        images are dark: nearly all values are below {white:.0%} of the range; {remedy}")
    return list(specs)


class Pool:
    """Threads that fill batches in host memory; workers = 0 does the same in the calling thread. A small set that is
    held in memory is kept on a CUDA device as a whole instead, and its batches are cropped there."""

    def __init__(self, dataset, specs, device, workers, max_bad):
        self.dataset, self.specs, self.device, self.max_bad = dataset, specs, torch.device(device), max_bad
        self.channels, self.dtype = getattr(dataset, "channels", 3), getattr(dataset, "dtype", torch.uint8)
        self.pinned = self.device.type == "cuda"
        self.workers, self.bad, self.lock, self.waited = workers, set(), threading.Lock(), 0.0
        torch.get_num_threads()  # fixes this thread's number before the loading threads set theirs to one
        alone = {"initializer": torch.set_num_threads, "initargs": (1,)}  # more threads in an operator are in the way
        self.threads = concurrent.futures.ThreadPoolExecutor(workers, **alone) if workers else None
        self.resident = resident(dataset, self.device) if all(spec.batched for spec in specs) else None
        if self.resident is not None:
            labels = np.full(len(dataset), -1) if dataset.labels is None else dataset.labels
            self.labels = torch.from_numpy(labels).to(self.device)

    def run(self, jobs):
        """jobs: (indices (B,), draws (V, B, n)) each, the first B the largest. Yields (crops per view on the device,
        sizes (B, 2) of the images, labels, indices, draws). Buffers are used again, on CUDA after they were copied."""
        return self._loaded(jobs) if self.resident is None else self._resident(jobs)

    def _resident(self, jobs):
        for indices, draws in jobs:
            rows = to_device(torch.from_numpy(np.asarray(indices)), self.device)
            images = self.resident[rows]
            crops = [spec.crop_batch(images, u).permute(0, 3, 1, 2) for spec, u in zip(self.specs, draws, strict=True)]
            yield crops, np.tile(images.shape[1:3], (len(indices), 1)), self.labels[rows], indices, draws

    def _loaded(self, jobs):
        free, queue, ahead = [], collections.deque(), AHEAD if self.threads else 0
        try:
            for job in itertools.chain(jobs, [None] * ahead):
                if job:
                    slot = free.pop() if free else self._slot(len(job[0]))
                    queue.append((*job, slot, self._start(slot, *job)))
                if len(queue) <= (ahead if job else 0):
                    continue
                indices, draws, slot, futures = queue[0]
                clock = time.perf_counter()
                for future in futures:
                    future.result() if self.threads else future()
                self.waited += time.perf_counter() - clock
                queue.popleft()
                crops = [b[: len(indices)].to(self.device, non_blocking=True).permute(0, 3, 1, 2) for b in slot.images]
                labels = slot.labels[: len(indices)].to(self.device, non_blocking=True, copy=True)
                if self.pinned:
                    slot.copied = torch.cuda.Event()
                    slot.copied.record()
                yield crops, slot.sizes[: len(indices)].copy(), labels, indices, draws
                free.append(slot)
        except TooManyBad as error:
            print(f"error: {error}", file=sys.stderr, flush=True)  # from whichever process met it
            raise SystemExit(2) from None
        finally:  # after an error, or when the caller has seen enough
            for *_, futures in queue:
                [future.cancel() for future in futures if self.threads]

    def _slot(self, n):
        """The buffers of one batch of at most n samples."""
        shapes = [(n, spec.size, spec.size, self.channels) for spec in self.specs]
        images = [torch.empty(shape, dtype=self.dtype, pin_memory=self.pinned) for shape in shapes]
        labels = torch.empty(n, dtype=torch.int64, pin_memory=self.pinned)
        return types.SimpleNamespace(images=images, labels=labels, sizes=np.empty((n, 2), np.int64), copied=None)

    def _start(self, slot, indices, draws):
        """Begins to fill a slot: a list of futures, or of what the calling thread has to do."""
        if slot.copied is not None:
            slot.copied.synchronize()
        chunk = max(1, min(8, len(indices) // max(1, self.workers)))
        parts = [range(i, min(i + chunk, len(indices))) for i in range(0, len(indices), chunk)]
        start = self.threads.submit if self.threads else functools.partial
        return [start(self._fill, slot, indices, draws, part) for part in parts]

    def _fill(self, slot, indices, draws, rows):
        for row in rows:
            image, label = self._load(int(indices[row]))
            slot.labels[row], slot.sizes[row] = label, image.shape[1:]
            for crops, spec, u in zip(slot.images, self.specs, draws, strict=True):
                crops[row].copy_(spec.crop(image, u[row]).permute(1, 2, 0))

    def _load(self, index):
        """Sample `index`, or the next one that can be decoded; stops the run after max_bad bad images."""
        for offset in range(len(self.dataset)):
            try:
                image, label = self.dataset[(index + offset) % len(self.dataset)]
                return (image if isinstance(image, torch.Tensor) else to_tensor(image, self.channels)), label
            except BadImage as error:
                self._report((index + offset) % len(self.dataset), error)
        raise TooManyBad("no image can be decoded")

    def _report(self, index, error):
        with self.lock:
            if index in self.bad:
                return
            self.bad.add(index)
            if len(self.bad) > self.max_bad:
                raise TooManyBad(f"more than --max-bad {self.max_bad} images cannot be decoded, the last: {error}")
            if str(error) not in REPORTED:
                REPORTED.add(str(error))
                sys.stderr.write(f"warning: cannot decode {error}; its neighbour is used instead\n")


class TooManyBad(Exception):
    """More undecodable images than allowed."""


def resident(dataset, device):
    """The images (N, H, W, C) of a set held in memory, on a CUDA device of which they take less than a quarter."""
    images = in_memory(dataset) if device.type == "cuda" else None
    if images is None or 4 * images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return None
    return torch.from_numpy(images).to(device)
