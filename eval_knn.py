"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4; Caron et al. 2021).

The k training images most similar to a test image vote for their class with weight exp(cosine / T). Nothing is
trained. Features are the backbone's pooled output, without augmentation: shorter side to 256, central 224 x 224 pixels,
or sizes in this ratio (at most 64 pixels: no margin). Images are resized bicubically for ViTs, as DINO's code does, and
bilinearly for ResNets, as MMSelfSup's (DINO's figure of a ResNet-50: --interpolation bicubic). --features takes other
features, any number from one pass over the images: feat1 to feat5, the averages over the maps of a ResNet's stages, or
a ViT's class token (cls) and mean of patch tokens (mean). --embedding takes the outputs of a projector of one linear
layer, which the last.pt of npid.py holds: its published figure is theirs, with --k 200.

    python eval_knn.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    torchrun --nproc_per_node=8 eval_knn.py --pretrained runs/simsiam/backbone.pt --data /imagenet
    python eval_knn.py --pretrained runs/simsiam/backbone.pt --data /imagenet --features feat3 feat4 feat5 --k 20
    python eval_knn.py --pretrained runs/npid/last.pt --data /imagenet --embedding --k 200
    python eval_knn.py --pretrained random --arch resnet18 --width 0.25 --data digits

Prints top-1 and top-5 for every feature and k, those of raw pixels for images of at most 64 pixels, and as its last
line one JSON object, which is also written to eval_knn.json beside the checkpoint (or in --out). Its "knn" holds the
figures by k; with --features, by feature and k. Of the best of them, per_class_knn.csv and confusion_knn.png beside it
show single classes, and which are taken for which. "spectrum" holds measures that need no labels, of the training
images' features: RankMe (effective rank) and alpha-ReQ; compare only networks of one width by them. Raw pixels are the
same for every network of an image size: resized bilinearly, minus ImageNet's mean and divided by its deviation (0.5 and
0.25 unless there are three channels).
"""

import common.interrupt  # noqa: F401 (before torch)
import sys

import numpy as np
import torch
from torch import nn

from common.args import Parser, fail, positive, toggle
from common.augment import EvalView
from common.checkpoint import default_statistics, load_file, load_pretrained
from common.classes import by_class
from common.datasets import open_labelled
from common.distributed import print0
from common.features import Features, broken_rows, extract, spectrum, usual_interpolation
from common.knn import knn
from common.log import facts, report
from common.optim import precision
from common.run import start_device


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_pretrained()
    group = parser.add_argument_group("k-NN")
    group.add_argument("--features", nargs="+", help="feat1 ... feat5, or cls and mean (default: the pooled output)")
    text = "the outputs of the linear projector in last.pt, not the backbone's"
    group.add_argument("--embedding", action=toggle, default=False, help=text)
    group.add_argument("--k", type=positive(int), nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    group.add_argument("--temperature", type=positive(float), default=0.07)
    text = "how images are resized (default: bicubic for a ViT, bilinear for a ResNet)"
    group.add_argument("--interpolation", choices=["bilinear", "bicubic"], help=text)
    group.add_argument("--batch-size", type=positive(int), default=256, help="images per process and forward pass")
    args = parser.parse_args(argv)
    if args.embedding and args.features:
        parser.error("--embedding and --features: choose one")
    args.k = list(dict.fromkeys(args.k))
    return args


class Embedding(nn.Module):
    """A backbone and the projector of one linear layer that its file holds: (B, C, S, S) -> (B, D)."""

    def __init__(self, backbone, args):
        super().__init__()
        known = {} if args.pretrained == "random" else load_file(args.pretrained, "--pretrained", args.trust_pickle)
        layer = {k: known.get("model", {}).get(f"projector.{k}") for k in ("weight", "bias")}
        if any(value is None for value in layer.values()) or layer["weight"].shape[1] != backbone.dim:
            fail(f"--embedding: {args.pretrained} holds no projector of one linear layer; the last.pt of npid.py does")
        self.backbone, self.projector = backbone, nn.Linear(backbone.dim, len(layer["weight"]))
        self.projector.load_state_dict(layer)
        self.dim = len(layer["weight"])
        self.names, self.dims = ["embedding"], [self.dim]

    def forward(self, x):
        return self.projector(self.backbone(x))


class Pixels(nn.Module):
    """The identity as a backbone: (B, C, S, S) -> (B, C S S). What a representation has to beat."""

    def __init__(self, size, channels=3):
        super().__init__()
        self.dim = channels * size * size

    def forward(self, x):
        return x.flatten(1)


def pixel_view(size, channels=3):
    """How the pixels of the baseline are seen, whatever network they stand beside."""
    usual = default_statistics(channels)
    return EvalView(size, mean=tuple(usual["mean"]), std=tuple(usual["std"]))


def main(args):
    device = start_device(args)
    backbone, meta = load_pretrained(args)
    amp, _, dtype = precision(args.precision, device)
    model = Embedding(backbone, args) if args.embedding else Features(backbone, args.features)
    model = model.to(device, dtype, memory_format=torch.channels_last)
    size = meta["image_size"]
    interpolation = args.interpolation or usual_interpolation(backbone)
    view = EvalView(size, interpolation=interpolation, mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    train, test = open_labelled(args.data, args.train_list, args.val_list, meta["channels"])
    how = f"{len(np.unique(train.labels)):,} classes, {size} px, {interpolation}, T {args.temperature}"
    print0(f"data        {args.data}: {len(train):,} training, {len(test):,} test images, {how}")
    if max(args.k) > len(train):
        print0(f"note        --k {max(args.k)}: there are {len(train)} training images, all of which vote")

    def evaluate(model, view, names, dims):
        """The table of all features, (top-1, top-5, feature, k, targets, predictions) of the best one, and spectra."""
        how = (view, device, args.workers, args.batch_size, amp)
        bank, labels = extract(model, train, *how, replace=False)
        queries, targets = extract(model, test, *how, replace=False)
        if broken := broken_rows(bank, train, "training", amp) or broken_rows(queries, test, "test", amp):
            fail(f"--pretrained {args.pretrained}: {broken}")
        table, best, ranks = {}, (-1,), {}
        for name, x, q in zip(names, bank.split(dims, 1), queries.split(dims, 1), strict=True):
            voted = {}
            rows = knn(x, labels, q, targets, args.k, args.temperature, predictions=voted)
            for k, (top1, top5) in rows.items():
                print0(f"{name:<11} k {k:<5} top-1 {top1:6.2f}   top-5 {top5:6.2f}")
                best = max(best, (top1, top5, name, k, targets, voted[k]), key=lambda row: row[0])
            table[name] = {str(k): {"top1": round(t1, 3), "top5": round(t5, 3)} for k, (t1, t5) in rows.items()}
            if model is not pixels:
                ranks[name] = spectrum(x)
                print0(f"{name:<11} " + "   ".join(f"{what} {value:.4g}" for what, value in ranks[name].items()))
        return table, best, ranks

    pixels = Pixels(size, meta["channels"])
    table, best, ranks = evaluate(model, view, model.names if args.features else ["features"], model.dims)
    result = facts(args, meta, train, test) | {"temperature": args.temperature, "interpolation": interpolation}
    result["knn"] = table if args.features else table["features"]
    result["spectrum"] = ranks if args.features else ranks["features"]
    result["embedding"] = args.embedding
    if size <= 64:
        seen = pixel_view(size, meta["channels"])
        result["pixels"] = evaluate(pixels, seen, ["raw pixels"], pixels.dim)[0]["raw pixels"]
    top1, top5, name, k, targets, voted = best
    result["best"] = {"features": name, "k": k, "top1": round(top1, 3), "top5": round(top5, 3)}
    what = f"k-NN, {f'{name}, ' if args.features else ''}k {k}, top-1 {top1:.2f} %"
    result |= by_class(args, "knn", what, targets.cpu(), voted.cpu(), test, train)
    return report(args, "knn", result)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
