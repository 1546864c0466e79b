"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4; Caron et al. 2021).

The k training images most similar to a test image vote for their class with weight exp(cosine / T). Nothing is
trained. Features are the backbone's pooled output, without augmentation: shorter side to 256, central 224 x 224 pixels
(images of at most 64 pixels: no margin).

    python eval_knn.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    torchrun --nproc_per_node=8 eval_knn.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    python eval_knn.py --pretrained random --arch resnet18 --width 0.25 --data digits

Prints top-1 and top-5 for every k, the figure of raw pixels for images of at most 64 pixels, and as its last line one
JSON object, which is also written to eval_knn.json beside the checkpoint (or in --out).
"""

import sys

import torch
from torch import nn

from common.augment import EvalView
from common.checkpoint import load_backbone
from common.data import default_size, labelled
from common.distributed import finish, init, print0
from common.knn import extract, knn
from common.log import Parser, check_args, report
from common.optim import precision


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--pretrained", required=True, help="backbone.pt, last.pt, torchvision weights, or random")
    parser.add_argument("--data", required=True, help="folder with train/ and val/, or digits, cifar10[:DIR] ...")
    parser.add_argument("--train-list", help="list file of training images, 'relative/path label' per line")
    parser.add_argument("--val-list", help="list file of test images")
    parser.add_argument("--arch", help="where the file does not say (default: resnet50)")
    parser.add_argument("--width", type=float, help="where the file does not say (default: 1)")
    parser.add_argument("--image-size", type=int, help="default: that of the file, else what fits the data")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--batch-size", type=int, default=256, help="images per process and forward pass")
    parser.add_argument("--workers", type=int, default=8, help="loading threads per process")
    parser.add_argument("--seed", type=int, default=0, help="of the random initialisation")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16", "fp64"], default="auto")
    parser.add_argument("--out", help="folder of eval_knn.json (default: beside the checkpoint, or runs/random)")
    args = parser.parse_args(argv)
    if min(args.k) < 1 or args.temperature <= 0:
        parser.error("--k and --temperature must be greater than 0")
    return args


class Pixels(nn.Module):
    """The identity as a backbone: (B, 3, S, S) -> (B, 3 S S). What a representation has to beat."""

    def __init__(self, size):
        super().__init__()
        self.dim = 3 * size * size

    def forward(self, x):
        return x.flatten(1)


def main(args):
    device = init(args.device)
    check_args(args)
    size = args.image_size or (default_size(args.data) if args.pretrained == "random" else None)
    backbone, meta = load_backbone(args.pretrained, args.arch, args.width, size, args.seed)
    amp, _, dtype = precision(args.precision, device)
    backbone = backbone.to(device, dtype, memory_format=torch.channels_last)
    size = meta["image_size"]
    view = EvalView(size, mean=tuple(meta["mean"]), std=tuple(meta["std"]))

    train, test = labelled(args.data, args.train_list, args.val_list)
    print0(
        f"data        {args.data}: {len(train):,} training, {len(test):,} test images, {size} px, T {args.temperature}"
    )

    def evaluate(model, name):
        bank, labels = extract(model, train, view, device, args.workers, args.batch_size, amp)
        queries, targets = extract(model, test, view, device, args.workers, args.batch_size, amp)
        rows = knn(bank, labels, queries, targets, args.k, args.temperature)
        for k, (top1, top5) in rows.items():
            print0(f"{name:<11} k {k:<5} top-1 {top1:6.2f}   top-5 {top5:6.2f}")
        return {str(k): {"top1": round(top1, 3), "top5": round(top5, 3)} for k, (top1, top5) in rows.items()}

    result = {
        "pretrained": str(args.pretrained),
        "data": args.data,
        **{k: meta[k] for k in ("method", "arch", "width")},
    }
    result |= {"image_size": size, "train": len(train), "test": len(test), "temperature": args.temperature}
    result["knn"] = evaluate(backbone, "features")
    if size <= 64:
        result["pixels"] = evaluate(Pixels(size), "raw pixels")
    report(args, "knn", result)
    finish()
    return result


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
