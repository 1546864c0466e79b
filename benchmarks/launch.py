"""How fast the training loop launches small operators while images are loaded beside it: in threads of its own process,
or in a process of their own, as common/process.py has it.

    python benchmarks/launch.py

Decoding is replaced by sleeping for 4 ms, as if other cores did it, so that what is left is the work around it: two
views of 16 pixels, batches of 512, 16 threads. The loop takes a batch, launches x.add_(1) on 8 numbers for a while, and
takes the next one. On a GPU it would launch kernels, for each of which it needs Python's lock, too.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import machine, parser
from common import process
from common.augment import View
from common.loader import Loader


class Sleeping:
    """Images that take 4 ms and no work."""

    labels = classes = None

    def __len__(self):
        return 10**6

    def __getitem__(self, i):
        time.sleep(0.004)
        return torch.zeros(3, 16, 16, dtype=torch.uint8), -1


def launches(seconds):
    """(operators launched, seconds)"""
    x, count, clock = torch.zeros(8), 0, time.perf_counter()
    while (passed := time.perf_counter() - clock) < seconds:
        for _ in range(100):
            x.add_(1)
        count += 100
    return count, passed


def beside(own, args):
    """(operators per second, images per second) beside a loader in a process of its own, or in threads."""
    process.POSSIBLE = own
    batches = Loader(Sleeping(), [View(16)] * 2, args.batch, workers=args.workers).epoch(0)
    next(batches)
    count, launching, images, clock = 0, 0.0, 0, time.perf_counter()
    while time.perf_counter() - clock < args.seconds:
        next(batches)
        images += args.batch
        new, passed = launches(0.8 * args.batch / 3000)
        count, launching = count + new, launching + passed
    return count / launching, images / (time.perf_counter() - clock)


def main():
    flags = parser(__doc__, repeats=5, device=False, cpu_time=False)
    flags.add_argument("--batch", type=int, default=512)
    flags.add_argument("--workers", type=int, default=16)
    flags.add_argument("--seconds", type=float, default=5)
    args = flags.parse_args()
    torch.set_num_threads(1)
    print(machine())
    rows = {"alone": [], "threads": [], "process": []}
    for _ in range(args.repeats):
        count, passed = launches(2)
        rows["alone"].append((count / passed, 0.0))
        rows["threads"].append(beside(False, args))
        rows["process"].append(beside(True, args))
    middle = {
        name: [sorted(column)[len(column) // 2] for column in zip(*row, strict=True)] for name, row in rows.items()
    }
    for name, (rate, images) in middle.items():
        share = [rate / alone for (rate, _), (alone, _) in zip(rows[name], rows["alone"], strict=True)]
        text = f"{rate:9,.0f} operators/s, {sorted(share)[len(share) // 2]:4.0%} of alone"
        print(
            f"{name:<8} {text} ({min(share):.0%} to {max(share):.0%})"
            + (f", {images:7,.0f} images/s" if images else "")
        )


if __name__ == "__main__":
    main()
