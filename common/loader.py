"""A loader whose batches depend on (seed, epoch, step) and nothing else.

A process of its own decodes and crops, in threads (decoding and resizing release Python's lock), into uint8 batches a
few steps ahead; the rest of the augmentation runs in batch on the device when a script asks for `batch.views()`.
"""

import collections
import dataclasses
import functools
import math
import sys
import time
import weakref

import numpy as np
import torch

from common import process, rng
from common.args import fail, fitting_batch
from common.augment import DRAWS, EvalView, augment, to_device
from common.datasets import evenly_spaced, in_memory
from common.distributed import gather_uneven, print0, rank, world_size
from common.images import BadImage, to_tensor

REPORTED = set()  # files that have been reported, by whichever loader; None: one of several pictures
AHEAD = 2  # batches prepared in advance; with the one in use, three exist at a time
FEW = 8  # batches for which no process is started


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
            parts = world_size() * accum
            few = max(len(dataset) // 8, min(len(dataset) // 2, 16))  # some steps per epoch
            smaller = fitting_batch(2 ** max(1, few.bit_length() - 1), parts, len(dataset))
            remedy = (
                f"try {smaller}" if smaller else f"{world_size()} processes x --accum {accum} need {2 * parts} or more"
            )
            fail(f"--batch-size {batch_size} is larger than the data set ({len(dataset)} images): {remedy}")
        self.dataset, self.specs, self.seed, self.accum = dataset, tuple(specs), seed, accum
        self.batch_size, self.local = batch_size, batch_size // (world_size() * accum)
        self.epoch_steps, self.streams = len(dataset) // batch_size, streams or range(len(self.specs))
        self.dtype = dtype or torch.float32
        self.pool = Pool(dataset, self.specs, self.local, device, workers, max_bad)

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


def eval_batches(dataset, view, batch_size, device, workers=4, dtype=torch.float32, replace=False):
    """This process's share (`eval_share`) of a dataset: yields (images (B, C, S, S), labels (B,), indices (B,)).

    Samples that cannot be decoded are left out, and their indices are added to the set `dataset.undecodable`, unless
    neighbours are to take their place (replace). After the last batch call `agree_on_undecodable`.
    """
    indices = np.arange(*eval_share(len(dataset), batch_size))
    bad = len(dataset) if replace else None  # it is training that counts them
    for (crops,), _, labels, part in crop_batches(dataset, view, indices, batch_size, device, workers, bad):
        yield augment(crops, [], view.mean, view.std, dtype), labels, torch.from_numpy(part)


def agree_on_undecodable(dataset, device, bad=()):
    """Tells every process which samples any process could not decode: the set `dataset.undecodable`, to which those of
    `bad` are added. Ends the program if these are all. A collective."""
    own = sorted({*getattr(dataset, "undecodable", ()), *bad})
    dataset.undecodable = set(gather_uneven(torch.tensor(own, dtype=torch.int64, device=device)).tolist())
    if len(dataset.undecodable) == len(dataset):
        fail(f"none of the {len(dataset):,} images can be decoded, the first is {dataset.path(0)}")


def crop_batches(dataset, view, indices, batch_size, device="cpu", workers=4, max_bad=100):
    """The crops of a view without random numbers: yields ([uint8 (B, C, S, S)], sizes, labels, indices). max_bad None:
    as in `eval_batches`, samples that cannot be decoded are left out."""
    parts = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    jobs = ((part, np.zeros((1, len(part), 0))) for part in parts)
    pool = Pool(dataset, (view,), batch_size, device, workers, max_bad, len(parts))
    for crops, sizes, labels, part, _ in pool.run(jobs):
        if max_bad is None and pool.bad:
            kept = [row for row, i in enumerate(part.tolist()) if i not in pool.bad]
            dataset.undecodable = getattr(dataset, "undecodable", set()) | pool.bad
            crops, sizes, labels, part = [x[kept] for x in crops], sizes[kept], labels[kept], part[kept]
        if len(part):
            yield crops, sizes, labels, part


def image_statistics(dataset, size, workers=4, most=1000):
    """(mean, std) per channel, in [0, 1], over the central `size` x `size` pixels of `most` evenly spaced images."""
    images = evenly_spaced(dataset, most)
    total, square, count = 0, 0, 0
    for (x,), *_ in crop_batches(
        images, EvalView(size), np.arange(len(images)), 64, workers=workers, max_bad=len(images)
    ):
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
    """Fills batches in host memory ahead of their use, in a process of its own (common/process.py). A few batches are
    not worth one: threads fill them. workers = 0 does it in the calling thread.

    A small set that is held in memory is kept on a CUDA device as a whole instead, and its batches are cropped there.
    """

    def __init__(self, dataset, specs, batch, device, workers, max_bad, batches=math.inf):
        self.dataset, self.specs, self.device, self.max_bad = dataset, specs, torch.device(device), max_bad
        self.bad, self.waited = set(), 0.0
        torch.get_num_threads()  # fixes this thread's number before loading threads set theirs to one
        self.resident = resident(dataset, self.device) if all(spec.batched for spec in specs) else None
        if self.resident is not None:
            labels = np.full(len(dataset), -1) if dataset.labels is None else dataset.labels
            self.labels = torch.from_numpy(labels).to(self.device)
            return
        self.slots = [_Slot(min(batch, len(dataset)), specs, dataset, self.device) for _ in range(AHEAD + 1)]
        fill = functools.partial(_fill, self.slots, dataset, specs, max_bad)
        own = workers and batches > FEW and process.POSSIBLE
        if workers and batches == math.inf and not own:
            print0("note        this platform starts no loading process: threads load beside the training loop")
        self.filler = (process.Process if own else process.Threads)(fill, workers)

    def run(self, jobs):
        """jobs: (indices (B,), draws (V, B, n)) each. Yields (crops per view on the device, sizes (B, 2) of the images,
        labels, indices, draws). Buffers are used again; on CUDA only after the copy to the device has been made."""
        return self._resident(jobs) if self.resident is not None else self._loaded(iter(jobs))

    def _resident(self, jobs):
        for indices, draws in jobs:
            rows = to_device(torch.from_numpy(np.asarray(indices)), self.device)
            images = self.resident[rows]
            crops = [spec.crop_batch(images, u).permute(0, 3, 1, 2) for spec, u in zip(self.specs, draws, strict=True)]
            yield crops, np.tile(images.shape[1:3], (len(indices), 1)), self.labels[rows], indices, draws

    def _loaded(self, jobs):
        free, queue = collections.deque(range(len(self.slots))), collections.deque()

        def submit():
            for indices, draws in jobs:
                number = free.popleft()
                self.slots[number].wait()
                queue.append((number, indices, draws))
                self.filler.submit(*queue[-1])
                return

        try:
            for _ in range(AHEAD):
                submit()
            while queue:
                clock = time.perf_counter()
                for index, error in self.filler.result():
                    self._report(index, error)
                self.waited += time.perf_counter() - clock
                number, indices, draws = queue.popleft()
                submit()
                slot, n = self.slots[number], len(indices)
                crops = [b[:n].to(self.device, non_blocking=True).permute(0, 3, 1, 2) for b in slot.images]
                labels = slot.labels[:n].to(self.device, non_blocking=True, copy=True)
                slot.mark()
                yield crops, slot.sizes[:n].numpy().copy(), labels, indices, draws
                free.append(number)
        except (TooManyBad, process.Died) as error:  # from whichever training process met it
            code, text = 2, error
            if isinstance(error, process.Died):
                cause = "memory ran out (lower --workers or --batch-size), or a decoder crashed"
                code, text = 1, f"the loading process {error}: {cause}. The same command continues from the last save"
            print(f"error: {text}", file=sys.stderr, flush=True)
            raise SystemExit(code) from None
        finally:  # after an error, or when the caller has seen enough
            self.filler.drop()

    def _report(self, index, error):
        """Names a file that cannot be decoded, once; stops the run after max_bad of them. index None: the first file
        of several pictures is named."""
        if index is None:
            if index not in REPORTED:
                REPORTED.add(index)
                print(f"note: {error} holds several pictures; the first is used, as of all such files", flush=True)
            return
        if index in self.bad:
            return
        self.bad.add(index)
        if self.max_bad is not None and len(self.bad) > self.max_bad:
            raise TooManyBad(f"more than --max-bad {self.max_bad} images cannot be decoded, the last: {error}")
        instead = "it is left out" if self.max_bad is None else "its neighbour is used instead"
        if (error, instead) not in REPORTED:
            REPORTED.add((error, instead))
            sys.stderr.write(f"warning: cannot decode {error}; {instead}\n")
        if self.max_bad is not None and len(self.bad) == len(self.dataset):
            raise TooManyBad("no image can be decoded")


class TooManyBad(Exception):
    """More undecodable images than allowed."""


def _fill(slots, dataset, specs, max_bad, number, indices, draws, rows):
    """Decodes and crops the samples of some rows of a batch into a slot; in the place of one that cannot be decoded
    comes the next one that can or, without max_bad, nothing. Returns (index, error) of each of the former, and (None,
    path) of files with several pictures."""
    slot, bad = slots[number], []
    for row in rows:
        for offset in range(min(max_bad + 1, len(dataset)) if max_bad is not None else 1):
            index = (int(indices[row]) + offset) % len(dataset)
            try:
                image, label = dataset[index]
                break
            except BadImage as error:
                bad.append((index, str(error)))
        else:
            if max_bad is None:
                continue
            return bad  # too many
        if getattr(image, "several", False):
            bad.append((None, dataset.path(index)))
        image = image if isinstance(image, torch.Tensor) else to_tensor(image, getattr(dataset, "channels", 3))
        slot.labels[row] = label
        slot.sizes[row, 0], slot.sizes[row, 1] = image.shape[1:]
        for crops, spec, u in zip(slot.images, specs, draws, strict=True):
            crops[row].copy_(spec.crop(image, u[row]).permute(1, 2, 0))
    return bad


def resident(dataset, device):
    """The images (N, H, W, C) of a set held in memory, on a CUDA device of which they take less than a quarter."""
    images = in_memory(dataset) if device.type == "cuda" else None
    if images is None or 4 * images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return None
    return torch.from_numpy(images).to(device)


class _Slot:
    """The buffers of one batch of n samples, which a loading process shares."""

    def __init__(self, n, specs, dataset, device):
        channels, dtype = getattr(dataset, "channels", 3), getattr(dataset, "dtype", torch.uint8)
        self.images = [process.shared((n, spec.size, spec.size, channels), dtype) for spec in specs]
        self.labels, self.sizes = (process.shared(shape, torch.int64) for shape in ((n,), (n, 2)))
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        if self.copied:
            _pin(self, [*self.images, self.labels])

    def mark(self):
        if self.copied:
            self.copied.record()

    def wait(self):
        """For the copy to the device that was last begun."""
        if self.copied:
            self.copied.synchronize()


def _pin(owner, buffers):
    """Pins host memory for as long as its owner lives: else a copy to the device would wait."""
    cuda = torch.cuda.cudart()
    for buffer in buffers:
        cuda.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        weakref.finalize(owner, cuda.cudaHostUnregister, buffer.data_ptr()).atexit = False
