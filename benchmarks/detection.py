"""Detection: images per second of a training step and of the evaluation, and what the input costs.

    python benchmarks/detection.py --data bccd --cpu-time -- --arch resnet18 --width 0.25 --sizes 64 72 80
    python benchmarks/detection.py --data coco --device cuda -- --recipe coco-fpn --arch resnet50

What stands behind -- is handed to eval_detection.py, whose recipes, network and loader these are, on an untrained
network. Reading, resizing and drawing masks are done in the training thread here (--workers 0), so that CPU time counts
them; threads do them otherwise.
"""

import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.timing import clock, machine, measure, parser, table
from common.boxes import Annotated, Loader, open_boxes
from common.checkpoint import load_pretrained
from common.datasets import Subset
from common.optim import precision
from eval_detection import Detector, complete, detect, parse_args


def main():
    flags = parser(__doc__, repeats=5)
    flags.add_argument("--data", required=True, help="a set that eval_detection.py reads")
    flags.add_argument("--images", type=int, default=8, help="of an evaluation")
    flags.add_argument("rest", nargs="*", help="flags of eval_detection.py")
    own = flags.parse_args()
    args = parse_args(["--pretrained", "random", "--data", own.data, "--workers", "0", *own.rest])
    backbone, meta = load_pretrained(args)
    train, test = open_boxes(own.data, meta["channels"])
    train = train.not_empty()
    args = complete(args, meta, train)
    amp, _, dtype = precision("fp32", own.device)
    view = SimpleNamespace(mean=meta["mean"], std=meta["std"])
    loader = Loader(train, args, view, own.device, dtype)
    fpn = args.recipe == "coco-fpn"
    model = Detector(
        backbone, len(train.classes), fpn, args.masks, args.anchors, args.rois, args.width, args.proposals
    ).to(own.device)
    run = SimpleNamespace(model=model, loader=loader, device=own.device, dtype=dtype, amp=amp, args=args)
    batches = (batch for epoch in range(10**6) for batch in loader.epoch(epoch))

    def read():
        batch = next(batches)
        return *batch.tensors(), batch.seeds

    def step(*batch):
        model.train()(*batch).sum().backward()
        model.zero_grad()

    fixed = read()
    few = Annotated(Subset(test.images, range(own.images)), test.objects[: own.images], test.classes)
    jobs = {"input": read, "passes of one step": lambda: step(*fixed), "training": lambda: step(*read())}
    jobs["evaluation"] = lambda: detect(run, few, view, args)
    print(machine(own.device))
    what = f"{args.recipe}{', with masks' if args.masks else ''}, {args.arch}, width {args.width:g}"
    print(f"{what}, shorter sides {min(args.sizes)} to {max(args.sizes)} px, batch {args.batch_size}")
    times = measure(jobs, own.repeats, clock(own), own.device, warm_up=True)
    counts = dict.fromkeys(jobs, args.batch_size) | {"evaluation": own.images}
    times = {name: [counts[name] / seconds for seconds in values] for name, values in times.items()}
    table(times, "images/s")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\ninput: {medians['training'] / medians['input']:.0%} of training")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
