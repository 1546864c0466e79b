"""Linear evaluation by three protocols in one pass beside one protocol alone: what do the other two cost?

    python benchmarks/linear.py
    python benchmarks/linear.py --device cuda --arch resnet50 --workers 16 --batches 40

Times eval_linear.py's own training loop on 500 x 375 JPEG files: decoding, augmentation, the frozen forward pass, and
the classifiers' forward, backward and optimiser steps for 1,000 classes. one: moco. three: moco, simsiam and swav,
which share view and features. all (if asked for): mae, with another view, and multihead, with a third one and five
classifiers, as well. Before timing, moco's weights after one step must be the same bits in all forms. Repeats are
interleaved and their order turns, so that a drift of the machine hits all.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_linear
from benchmarks.ema_lars import machine
from common.augment import IMAGENET_MEAN, IMAGENET_STD
from common.data import Files
from common.optim import precision
from common.resnet import resnet

FORMS = {"one": ["moco"], "three": ["moco", "simsiam", "swav"], "all": ["moco", "simsiam", "swav", "mae", "multihead"]}
CLASSES = 1000


def photos(folder, count=64, width=500, height=375):
    """Smooth colours and grain, about 100 kB each. Returns their names."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((width, height), Image.BICUBIC)) + 9 * rng.standard_normal((height, width, 1))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(Path(folder) / f"{i}.jpg", quality=95)
    return [f"{i}.jpg" for i in range(count)]


class Repeated:
    """A few files as a data set of n images, in the page cache from the second time on."""

    def __init__(self, files, n):
        self.files, self.n = files, n
        self.labels, self.classes = np.arange(n) % CLASSES, None

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.files[i % len(self.files)][0], int(self.labels[i])


def seconds(clock, source, probes, epoch, batches, device):
    """Of the first batches of an epoch, as the script trains on them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    for index, (found, labels) in enumerate(source.epoch(epoch, 0, probes)):
        for probe in probes:
            probe.learn(found, labels, epoch, index)
        if index + 1 == batches:
            break
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--micro", type=int, default=64, help="images per batch of the loader (256 in the script)")
    parser.add_argument("--batches", type=int, default=2, help="batches per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["one", "three"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="time spent computing, for a machine with other work")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter

    device, eval_linear.MICRO = torch.device(args.device), args.micro
    print(machine(device))
    print(f"{args.arch}, {args.image_size} px, {CLASSES} classes, {args.batches} batches of {args.micro} per repeat")
    torch.manual_seed(0)
    amp, _, dtype = precision("auto", device)
    backbone = resnet(args.arch, 1.0, args.image_size).to(device, memory_format=torch.channels_last)
    backbone.eval().requires_grad_(False)
    meta = {"image_size": args.image_size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    words = ["--pretrained", "random", "--data", "photos"]
    with tempfile.TemporaryDirectory() as folder:
        data = Repeated(Files(folder, photos(folder)), 32768)

        def prepare(form):
            flags = eval_linear.parse_args([*words, "--protocol", ",".join(FORMS[form])])
            probes, micro = eval_linear.make_probes(FORMS[form], flags, backbone, meta, CLASSES, len(data), amp)
            return eval_linear.Live(backbone, data, data, micro, amp, dtype, 0, device, args.workers), probes

        forms, weights = {form: prepare(form) for form in args.forms}, {}
        for form, (source, probes) in forms.items():  # also warms up
            seconds(clock, source, probes, 0, max(2, 256 // args.micro), device)
            weights[form] = probes[0].parameters[0].detach().clone()
        first = next(iter(weights.values()))
        if not all(torch.equal(w, first) for w in weights.values()):
            sys.exit("error: moco's classifier differs between the forms: their times would not compare")
        print("moco's classifier has the same bits in all forms")

        times, order = {form: [] for form in forms}, list(forms)
        for repeat in range(args.repeats):
            for form in order:
                times[form].append(seconds(clock, *forms[form], repeat + 1, args.batches, device))
            order.reverse()

    print(f"\n{'':8}{'median ms/image':>16}{'min-max':>16}  time relative to {args.forms[0]}")
    per = 1000 / (args.batches * args.micro)
    for form, values in times.items():
        median = statistics.median(values)
        spread = f"{per * min(values):.2f}-{per * max(values):.2f}"
        ratio = median / statistics.median(times[args.forms[0]])
        print(f"{form:8}{per * median:>16.2f}{spread:>16}  {ratio:.2f}x")


if __name__ == "__main__":
    main()
