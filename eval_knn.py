"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4; Caron et al. 2021).

The k training images most similar to a test image vote for their class with weight exp(cosine / T). Nothing is
trained. Features are the backbone's pooled output, without augmentation: shorter side to 256, central 224 x 224 pixels
(images of at most 64 pixels: no margin). --features takes others, any number from one pass over the images: feat1 to
feat5, the averages over the maps of a ResNet's stages, or a ViT's class token (cls) and mean of patch tokens (mean).

    python eval_knn.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    torchrun --nproc_per_node=8 eval_knn.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    python eval_knn.py --pretrained runs/simsiam/backbone.pt --data /imagenet --features feat3 feat4 feat5 --k 20
    python eval_knn.py --pretrained random --arch resnet18 --width 0.25 --data digits

Prints top-1 and top-5 for every feature and k, the figure of raw pixels for images of at most 64 pixels, and as its
last line one JSON object, which is also written to eval_knn.json beside the checkpoint (or in --out). Its "knn" holds
the figures by k; with --features, by feature and k.
"""

import sys

import torch
from torch import nn

from common.augment import EvalView
from common.checkpoint import load_backbone
from common.data import default_size, labelled
from common.distributed import finish, init, print0
from common.knn import Features, extract, knn
from common.log import Parser, check_args, report
from common.optim import precision


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--pretrained", required=True, help="backbone.pt, last.pt, a published file, or random")
    parser.add_argument("--data", required=True, help="folder with train/ and val/, or digits, cifar10[:DIR] ...")
    parser.add_argument("--train-list", help="list file of training images, 'relative/path label' per line")
    parser.add_argument("--val-list", help="list file of test images")
    parser.add_argument("--trust-pickle", action="store_true", help="allow --pretrained to run code while it is read")
    parser.add_argument("--arch", help="of a random initialisation (default: resnet50); a file tells it")
    parser.add_argument("--width", type=float, help="of a random initialisation (default: 1); a file tells it")
    parser.add_argument("--channels", type=int, help="of a random initialisation (default: 3); a file tells it")
    parser.add_argument("--image-size", type=int, help="default: that of the file, else what fits the data")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--features", nargs="+", help="feat1 ... feat5, or cls and mean (default: the pooled output)")
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
    """The identity as a backbone: (B, C, S, S) -> (B, C S S). What a representation has to beat."""

    def __init__(self, size, channels=3):
        super().__init__()
        self.dim = channels * size * size

    def forward(self, x):
        return x.flatten(1)


def main(args):
    device = init(args.device)
    check_args(args)
    size = args.image_size or (default_size(args.data) if args.pretrained == "random" else None)
    rest = (size, args.seed, args.trust_pickle, args.channels)
    backbone, meta = load_backbone(args.pretrained, args.arch, args.width, *rest)
    amp, _, dtype = precision(args.precision, device)
    model = Features(backbone, args.features).to(device, dtype, memory_format=torch.channels_last)
    size = meta["image_size"]
    view = EvalView(size, mean=tuple(meta["mean"]), std=tuple(meta["std"]))

    train, test = labelled(args.data, args.train_list, args.val_list, meta["channels"])
    print0(
        f"data        {args.data}: {len(train):,} training, {len(test):,} test images, {size} px, T {args.temperature}"
    )

    if max(args.k) > len(train):
        print0(f"note        --k {max(args.k)}: there are {len(train)} training images, all of which vote")

    def evaluate(model, names, dims):
        bank, labels = extract(model, train, view, device, args.workers, args.batch_size, amp)
        queries, targets = extract(model, test, view, device, args.workers, args.batch_size, amp)
        table = {}
        for name, x, q in zip(names, bank.split(dims, 1), queries.split(dims, 1), strict=True):
            rows = knn(x, labels, q, targets, args.k, args.temperature)
            for k, (top1, top5) in rows.items():
                print0(f"{name:<11} k {k:<5} top-1 {top1:6.2f}   top-5 {top5:6.2f}")
            table[name] = {str(k): {"top1": round(t1, 3), "top5": round(t5, 3)} for k, (t1, t5) in rows.items()}
        return table

    result = {
        "pretrained": str(args.pretrained),
        "data": args.data,
        **{k: meta[k] for k in ("method", "arch", "width")},
    }
    result |= {"image_size": size, "train": len(train), "test": len(test), "temperature": args.temperature}
    result["knn"] = evaluate(model, model.names if args.features else ["features"], model.dims)
    result["knn"] = result["knn"] if args.features else result["knn"]["features"]
    if size <= 64:
        pixels = Pixels(size, meta["channels"])
        result["pixels"] = evaluate(pixels, ["raw pixels"], pixels.dim)["raw pixels"]
    report(args, "knn", result)
    finish()
    return result


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
