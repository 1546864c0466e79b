"""Linear evaluation by three protocols in one pass beside one protocol alone: what do the other two cost?

    python benchmarks/linear.py
    python benchmarks/linear.py --device cuda --arch resnet50 --workers 16 --batches 40

Times eval_linear.py's own training loop on 500 x 375 JPEG files: decoding, augmentation, the frozen forward pass, and
the classifiers' forward, backward and optimiser steps for 1,000 classes. one: moco. three: moco, simsiam and swav,
which share view and features. all (if asked for): mae, with another view, and multihead, with a third one and five
classifiers, as well. Before timing, moco's weights after one step must be the same bits in all forms.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_linear
from benchmarks.loader import make_photos
from benchmarks.timing import clock, duration, machine, measure, milliseconds, parser, table
from common.checkpoint import default_statistics
from common.datasets import open_dataset
from common.optim import precision
from common.resnet import resnet

FORMS = {"one": ["moco"], "three": ["moco", "simsiam", "swav"], "all": ["moco", "simsiam", "swav", "mae", "multihead"]}
CLASSES = 1000


class Repeated:
    """A few files as a data set of n images, in the page cache from the second time on."""

    def __init__(self, files, n):
        self.files, self.n = files, n
        self.labels, self.classes = np.arange(n) % CLASSES, None

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.files[i % len(self.files)][0], int(self.labels[i])


def main():
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--arch", default="resnet18")
    flags.add_argument("--image-size", type=int, default=224)
    flags.add_argument("--micro", type=int, default=64, help="images per batch of the loader (256 in the script)")
    flags.add_argument("--batches", type=int, default=2, help="batches per repeat")
    flags.add_argument("--workers", type=int, default=2)
    flags.add_argument("--forms", nargs="+", choices=FORMS, default=["one", "three"])
    args = flags.parse_args()

    device, eval_linear.MICRO = args.device, args.micro
    print(machine(device))
    print(f"{args.arch}, {args.image_size} px, {CLASSES} classes, {args.batches} batches of {args.micro} per repeat")
    torch.manual_seed(0)
    amp, _, dtype = precision("auto", device)
    backbone = resnet(args.arch, 1.0, args.image_size).to(device, memory_format=torch.channels_last)
    backbone.eval().requires_grad_(False)
    meta = {"image_size": args.image_size} | default_statistics(3)
    words = ["--pretrained", "random", "--data", "photos"]
    with tempfile.TemporaryDirectory() as folder:
        make_photos(folder, 64)
        data = Repeated(open_dataset(folder, "train"), 32768)

        def prepare(form):
            given = eval_linear.parse_args([*words, "--protocol", ",".join(FORMS[form])])
            probes, micro = eval_linear.make_probes(FORMS[form], given, backbone, meta, CLASSES, len(data), amp)
            return eval_linear.Source(backbone, data, data, micro, amp, dtype, 0, device, args.workers), probes

        def train(source, probes, epoch, batches):
            """On the first batches of an epoch, as the script trains."""
            for index, (found, labels) in enumerate(source.epoch(epoch, 0, probes)):
                for probe in probes:
                    probe.learn(found, labels, epoch, index)
                if index + 1 == batches:
                    break

        def job(form):
            epochs = itertools.count(1)
            return lambda: train(*forms[form], next(epochs), args.batches)

        forms, weights = {form: prepare(form) for form in args.forms}, []
        for source, probes in forms.values():  # also warms up
            train(source, probes, 0, max(2, 256 // args.micro))
            weights.append(probes[0].parameters[0].detach().clone())
        if not all(torch.equal(w, weights[0]) for w in weights):
            sys.exit("error: moco's classifier differs between the forms: their times would not compare")
        print("moco's classifier has the same bits in all forms")
        times = measure({form: job(form) for form in forms}, args.repeats, clock(args), device)
    per = args.batches * args.micro
    table(times, "ms/image", lambda s: milliseconds(s) / per, columns=duration(times, args.forms[0]))


if __name__ == "__main__":
    main()
