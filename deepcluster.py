"""DeepCluster: Deep Clustering for Unsupervised Learning of Visual Features (Caron et al., ECCV 2018, 1807.05520).

Before every epoch k-means divides the features f of all images, whitened and of unit length, into k clusters. During
the epoch the network and a new linear classifier W have to tell from one view of an image in which cluster y it is,
L = -ln softmax(W f)_y,  with images drawn so that every cluster comes up equally often.

    torchrun --nproc_per_node=8 deepcluster.py --data /imagenet
    python deepcluster.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ImageNet, linear top-1: ResNet-50 with Sobel filter, 200 epochs, in MMSelfSup 0.11: 46.92 on pooled features,
57.71 on those of layer3, its best layer; AlexNet, the official weights measured by VISSL: 37.88. Ours: not run.

Cost at N = 1,281,167 and D = 2048 with 8 processes, per epoch: a forward pass over all images, a third of what training
needs; 10.5 GB of features, 1.3 GB on each GPU, and 0.16 GB whitened; 10.7 TFLOP in float64 for the PCA; 21 x 6.6 TFLOP
for k-means with k = 10000, which is 14 s for one GPU that sustains 10 TFLOP/s and 2 s for eight. Labels take 10 MB.

Small images (32 px; our choice): --image-size 32 --arch resnet18 --batch-size 64 --lr 0.4. Without --clusters and
--pca-dim, k is N / 100 and at most 10000, and features are whitened to a quarter of their width and at most 256
dimensions. An epoch of few steps needs a high rate, because its classifier starts from nothing.

Crop and flip, batch 256, learning rate 0.05 and 200 epochs are those of the official code. MMSelfSup trains with batch
512 and rate 0.1 (the same per 256), and adds rotations by up to 2 degrees, which are not in this file, and --jitter.
The Sobel filter is part of the exported backbone, so evaluations apply it by themselves. Deviations from the paper: a
ResNet with one linear layer, clustered by its pooled features, as in MMSelfSup, instead of AlexNet or VGG-16 with two
hidden layers and dropout; batch norm uses the statistics of the global batch; bf16 on CUDA; --reweight scales the loss
by constants of the epoch, not of the batch; images of at most 64 pixels are cropped to at least a fifth of their area
(not 0.08) and get a 3x3 stem.
To hack: copy this file. What is DeepCluster: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import csv
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, toggle, width
from common.augment import View
from common.distributed import gather_uneven, is_main
from common.features import extract, output_std
from common.files import atomic
from common.kmeans import kmeans, pca_whiten
from common.resnet import resnet
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("DeepCluster")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--jitter", action=toggle, default=False, help="colour jitter and grey, as in MMSelfSup")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--sobel", action=toggle, default=True, help="show the network only edges of the grey image")
    group.add_argument("--clusters", type=at_least(2), help="k (default: 10000, or a hundredth of the images)")
    group.add_argument(
        "--pca-dim", type=positive(int), help="whitened dimensions (default: 256, or a quarter of the features)"
    )
    group.add_argument("--reweight", action=toggle, default=False, help="weight clusters by 1 / sqrt(size) in the loss")
    group.add_argument("--epochs", type=positive(int), default=200)
    group.add_argument("--warmup-epochs", type=at_least(0), default=0)
    group.add_argument(
        "--batch-size", type=positive(int), default=256, help="images per step over all processes and --accum"
    )
    group.add_argument(
        "--lr", type=positive(float), default=0.05, help="per 256 images: multiplied by batch-size / 256"
    )
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-5)
    group.add_argument("--momentum", type=below_one, default=0.9)
    group = parser.add_argument_group("output", recipe=False)
    group.add_argument("--dump-clusters", metavar="FILE", help="CSV (path,cluster), written anew before each epoch")
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    if args.dump_clusters and not Path(args.dump_clusters).absolute().parent.is_dir():
        parser.error(f"--dump-clusters {args.dump_clusters}: its folder does not exist")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5, jitter=False):
    """One view per image: crop and flip (paper, section 3.4; official code). jitter: always, grey for every fifth."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
        flip=flip,
        jitter=(0.4, 0.4, 1.0, 0.5),
        jitter_p=1.0 if jitter else 0.0,
        gray_p=0.2 if jitter else 0.0,
    )
    return [view]


# ------------------------------------------------------------------------------------------------------ model
def sobel_filter(channels=3):
    """Grey (the mean of the channels) and its two Sobel derivatives as one convolution (2, C, 3, 3), padded by 1."""
    edges = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    return torch.stack([edges, edges.T])[:, None].repeat(1, channels, 1, 1) / channels


class DeepCluster(nn.Module):
    """Backbone f and a linear classifier of the k clusters; the cluster of each of the N images of the data set.

    images: N. The labels are a buffer, row i belongs to image i: they are the same on every process, and a run that
    was interrupted within an epoch goes on with the clusters of that epoch.
    """

    def __init__(self, backbone, images, clusters):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.dim, clusters)
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))

    def forward(self, x):
        """x: one view (B, 3, S, S). Returns features f (B, D) and logits (B, k)."""
        f = self.backbone(x)
        return f, self.head(f)

    @torch.no_grad()
    def renew_head(self, seed):
        """Clusters of two epochs have nothing to do with each other, so neither have their classifiers."""
        weight = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seed))
        self.head.weight.copy_(0.01 * weight)
        self.head.bias.zero_()


# ------------------------------------------------------------------------------------------------------- loss
def cluster_sizes(clusters, pca_dim, images, dim):
    """k and the dimensions to cluster in; None becomes the paper's 10000 and 256, or less for smaller sets."""
    if clusters is not None and clusters > images:
        remedy = f"use at most {max(2, images // 10)}, ten images per cluster" if images > 1 else "more are needed"
        fail(f"--clusters {clusters} for {images} images: {remedy}")
    if pca_dim is not None and pca_dim > dim:
        fail(f"--pca-dim {pca_dim} for features with {dim} dimensions: use a number from 1 to {dim}")
    return clusters or max(2, min(10000, images // 100)), pca_dim or max(1, min(256, dim // 4))


def cluster(features, clusters, pca_dim, seed):
    """PCA with whitening, unit length, k-means (section 3.4). features: (n, D), the rows of this process, which follow
    each other in rank order. Returns the clusters of the rows of all processes (N,)."""
    x = F.normalize(pca_whiten(features, pca_dim).features, dim=1)
    return gather_uneven(kmeans(x, clusters, seed=seed).assignments)


def uniform_order(labels, seed, epoch):
    """Indices (N,) of the images of an epoch, equally many of each cluster that is not empty (section 3.3), shuffled.

    labels: clusters (N,) as an array. A cluster with more images than its share is drawn from without replacement, a
    smaller one with. A pure function of its arguments.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    counts = np.bincount(labels)
    starts, counts = (np.cumsum(counts) - counts)[counts > 0, None], counts[counts > 0, None]
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # cluster by cluster, each in random order
    each = len(labels) // len(counts) + 1
    again = (generator.random((len(counts), each)) * counts).astype(np.int64)
    drawn = order[starts + np.where(counts > each, np.arange(each), again)]
    return generator.permutation(drawn.ravel())[: len(labels)]


def cluster_weights(labels, clusters):
    """1 / sqrt(size) of each cluster (k,), 0 where it is empty, with mean 1 over the others: as these are equally
    frequent in an epoch, the weights of its images have mean 1 too, and chance stays ln k."""
    counts = np.bincount(labels, minlength=clusters)
    weights = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 0)
    return torch.from_numpy(weights * ((counts > 0).sum() / weights.sum()))


def cluster_loss(logits, labels, weights=None):
    """Cross entropy, mean over the batch. logits: (B, k), labels: (B,), weights: (k,). Equal logits give ln k."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses if weights is None else losses * weights[labels]).mean()


# --------------------------------------------------------------------------------------------------- training
def cluster_report(labels, previous=None, truth=None):
    """What the clusters (N,) are like: number in use, share of the largest, normalised mutual information (1: the same
    division, 0: unrelated) with those of the previous epoch and with true classes, where -1 means unknown."""
    counts = np.bincount(labels)
    report = {"clusters": int((counts > 0).sum()), "largest": round(counts.max() / len(labels), 4)}
    if previous is not None:
        report["nmi_previous"] = round(float(normalized_mutual_info_score(previous, labels)), 4)
    if truth is not None:
        report["nmi_labels"] = round(float(normalized_mutual_info_score(truth[truth >= 0], labels[truth >= 0])), 4)
    return report


def dump_clusters(path, data, labels):
    """Writes path,cluster of all images, from the main process. path None: does nothing."""
    if path and is_main():
        with atomic(path) as temporary, open(temporary, "w", newline="", errors="surrogateescape") as file:
            file.write("path,cluster\r\n")
            csv.writer(file).writerows((data.path(i), label) for i, label in enumerate(labels.tolist()))


def main(args):
    run = Run(args)
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip, args.jitter))
    sobel = sobel_filter(args.channels) if args.sobel else None
    backbone = resnet(args.arch, args.width, args.image_size, input_filter=sobel, channels=args.channels)
    k, pca_dim = cluster_sizes(args.clusters, args.pca_dim, len(data), backbone.dim)
    model = run.place(DeepCluster(backbone, len(data), k))
    peak = args.lr * args.batch_size / 256
    groups = [  # DeepCluster: a classifier that starts anew in each epoch has no momentum (official code)
        {"params": [*model.backbone.parameters()]},
        {"params": [*model.head.parameters()], "momentum": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    lines = {"lr": f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", "baseline": f"loss ln({k}) = {math.log(k):.2f}"}
    lines["clusters"] = f"{k}{'' if args.clusters or k == 10000 else ' (a hundredth of the images)'}, of features"
    lines["clusters"] += f" whitened to {pca_dim} dimensions{', seeing edges (Sobel)' if args.sobel else ''}"
    net = run.start(model, optimizer, chance=math.log(k), **lines)
    if k > len(data) / 10:
        run.warn("clusters", f"--clusters {k}: fewer than ten images per cluster, {len(data) // 10} would be better")

    for epoch in run.epochs():
        if run.epoch_done:  # DeepCluster: else resumed within an epoch, with its labels and classifier
            clock, previous = time.monotonic(), model.labels.cpu().numpy().copy() if epoch else None
            rest = {"workers": args.workers, "amp": run.amp, "everywhere": False}
            features, _ = extract(model.backbone, data, run.view, run.device, **rest)
            for_clusters, for_head = rng.seeds(args.seed, epoch, 2)
            model.labels.copy_(cluster(features.to(run.dtype), k, pca_dim, for_clusters))
            model.renew_head(for_head)
            report = cluster_report(model.labels.cpu().numpy(), previous, data.labels)
            run.note(**report, seconds=round(time.monotonic() - clock, 1))
        labels = model.labels.cpu().numpy()
        weights = cluster_weights(labels, k).to(run.device, run.dtype) if args.reweight else None
        dump_clusters(args.dump_clusters, data, labels)
        for step, batches in run.steps(epoch, order=uniform_order(labels, args.seed, epoch)):
            lr = peak if step >= run.warmup else peak * step / run.warmup
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                (x,) = batch.views()
                f, logits = net(x)
                # looked up here: labels that travel with the images could be those of the epoch before
                run.backward(cluster_loss(logits, model.labels[batch.indices], weights))  # DeepCluster
            run.update(optimizer)
            run.log(lr, std=output_std(f))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
