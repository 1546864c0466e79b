"""Segmentation: images per second of a training step and of the evaluation, what the input costs, and memory.

    python benchmarks/segmentation.py --data CamVid --arch resnet18 --width 0.25 --crop 128 --scale 240 180 --cpu-time
    python benchmarks/segmentation.py --data VOCdevkit --arch resnet50 --width 1 --crop 512 --scale 2048 512

Reading, cropping and resizing are done in the training thread here (--workers 0), so that CPU time counts them; threads
of a loading process do them otherwise. The peak of memory is taken after an evaluation of --images images, then after
one of eight times as many, which may add nothing but noise: no prediction is kept.
"""

import resource
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, parser, table
from common.augment import IMAGENET_MEAN, IMAGENET_STD
from common.loader import Loader
from common.optim import precision
from common.resnet import resnet
from common.segmentation import open_pairs
from eval_segmentation import Crop, Segmenter, evaluate, inputs, segmentation_loss


class Repeated:
    """The images of a set, one after the other, again and again."""

    def __init__(self, data, count):
        self.data, self.count, self.classes = data, count, data.classes

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.data[i % len(self.data)]


def peak():
    """MB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main():
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--data", required=True, help="a set that eval_segmentation.py reads")
    flags.add_argument("--arch", default="resnet18")
    flags.add_argument("--width", type=float, default=0.25)
    flags.add_argument("--crop", type=int, default=128)
    flags.add_argument("--scale", type=int, nargs=2, default=[240, 180])
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--images", type=int, default=16, help="of an evaluation")
    args = flags.parse_args()
    args.__dict__ |= {"recipe": "voc12aug", "align_corners": False, "dropout": 0.1, "distort": True, "slide": 0}
    args.workers = 0
    amp, _, dtype = precision("fp32", args.device)
    train, test = open_pairs(args.data)
    view = Crop(args.crop, scale=tuple(args.scale), mean=(*IMAGENET_MEAN, 0.0), std=(*IMAGENET_STD, 1 / 255))
    loader = Loader(train, [view], args.batch_size, device=args.device, workers=0)
    model = Segmenter(resnet(args.arch, args.width), len(train.classes), args).to(args.device)
    run = SimpleNamespace(model=model, loader=loader, device=args.device, dtype=dtype, amp=amp)
    batches = (batch for epoch in range(10**6) for batch in loader.epoch(epoch))

    def read():
        batch = next(batches)
        return *inputs(batch, args), batch.uniforms(model.draws)

    def step(x, labels, u):
        losses = [segmentation_loss(model.resize(z, labels.shape[1:]), labels) for z in model(x, u)]
        (losses[0] + 0.4 * losses[1]).backward()
        model.zero_grad()

    fixed = read()
    jobs = {"input": read, "passes of one step": lambda: step(*fixed), "training": lambda: step(*read())}
    jobs["evaluation"] = lambda: evaluate(run, Repeated(test, args.images), args)
    print(machine(args.device))
    print(
        f"{args.arch}, width {args.width:g}, crops of {args.crop} px of images in {args.scale}, batch {args.batch_size}"
    )
    times = measure(jobs, args.repeats, clock(args), args.device, warm_up=True)
    counts = dict.fromkeys(jobs, args.batch_size) | {"evaluation": args.images}
    times = {name: [counts[name] / seconds for seconds in values] for name, values in times.items()}
    table(times, "images/s")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\ninput: {medians['training'] / medians['input']:.0%} of training")
    few = peak()
    evaluate(run, Repeated(test, 8 * args.images), args)
    print(f"peak of memory: {few:.0f} MB after {args.images} images, {peak():.0f} MB after {8 * args.images}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
