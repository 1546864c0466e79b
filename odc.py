"""ODC: Online Deep Clustering for Unsupervised Representation Learning (Zhan et al., CVPR 2020, 2006.10645).

A memory holds a unit vector m_i and a cluster y_i of every image i, and the centroid c_j of each of the k clusters. The
network has to tell from one view of an image in which cluster y it is; large clusters count less. In the same step its
feature f renews the memory, so clusters change a little all the time instead of all at once:
L = -w ln softmax(W f)_y,  w ~ size(y)^-1/2;   m <- unit(m / 2 + unit(f) / 2);   y <- argmax over j of c_j . m.
Every few steps centroids become the means of their clusters, and small clusters are emptied to split the largest ones.

    torchrun --nproc_per_node=8 odc.py --data /imagenet
    python odc.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, 440 epochs, in MMSelfSup 0.11: linear top-1 53.42 on pooled features, 57.70 on those
of layer4, its best layer; k-NN top-1 39.1; linear SVM on VOC07 78.42 mAP. Ours: not run.

Memory at N = 1,281,167, D = 256 and k = 10000, on every GPU and in last.pt: vectors 1.31 GB, labels twice 10 MB,
centroids 10 MB. k-means at the start takes 21 x 6.6 TFLOP, 14 s for one GPU that sustains 10 TFLOP/s, 2 s for eight.

Small images (32 px; our choice): --image-size 32 --arch resnet18 --batch-size 256 --epochs 200 --warmup-epochs 5.
Without --clusters, k is a hundredth of the images. Where the clusters of most images change from epoch to epoch
("changed" in the log), --memory-momentum 0.9 slows them down.

Deviations, where the paper leaves it open from MMSelfSup 0.11: an epoch is a permutation of the images, not draws with
replacement; no rotations by up to 2 degrees; small clusters are handled when centroids are renewed, not in each step,
and then all centroids are taken anew; clusters that 2-means cannot part are halved by position, not at random; loss
weights have mean 1 over all images, not over the batch of a GPU; batch norm uses the statistics of the global batch;
bf16 on CUDA; the learning rate falls after 10/11 of --epochs whatever their number; images of at most 64 pixels are
cropped to at least a fifth of their area (not 0.08) and get a 3x3 stem.
To hack: copy this file. What is ODC: the sections augmentation, model and loss, and the lines marked in main.
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
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, width
from common.augment import View
from common.distributed import gather, gather_uneven, is_main, process_mean, rank, world_size
from common.features import extract, output_std
from common.files import atomic
from common.kmeans import kmeans
from common.networks import network
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("ODC")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--hidden-dim", type=positive(int), default=512, help="hidden width of the neck")
    group.add_argument("--dim", type=positive(int), default=256, help="D, outputs of the neck, kept in the memory")
    group.add_argument("--dropout", type=below_one, default=0.5, help="share of the neck's hidden units switched off")
    group.add_argument("--clusters", type=at_least(2), help="k (default: 10000, or a hundredth of the images)")
    group.add_argument("--min-cluster", type=at_least(0), default=20, help="smaller clusters are dissolved (0: never)")
    group.add_argument("--centroid-every", type=positive(int), default=10, help="steps between new centroids")
    group.add_argument("--memory-momentum", type=below_one, default=0.5, help="share of the old value in an update")
    group.add_argument("--epochs", type=positive(int), default=440)
    group.add_argument("--warmup-epochs", type=at_least(0), default=0)
    group.add_argument(
        "--batch-size", type=positive(int), default=512, help="images per step over all processes and --accum"
    )
    group.add_argument(
        "--lr", type=positive(float), default=0.03, help="per 256 images: multiplied by batch-size / 256"
    )
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-5)
    group.add_argument("--momentum", type=below_one, default=0.9)
    group = parser.add_argument_group("output", recipe=False)
    group.add_argument("--dump-clusters", metavar="FILE", help="CSV (path,cluster), written anew after each epoch")
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    if args.dump_clusters and not Path(args.dump_clusters).absolute().parent.is_dir():
        parser.error(f"--dump-clusters {args.dump_clusters}: its folder does not exist")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """One view per image, in colour: crop, flip, a jitter that is always applied, grey (MMSelfSup 0.11)."""
    jitter = (0.4, 0.4, 1.0, 0.5)
    return [View(size=size, area=(crop_min, 1.0), flip=flip, jitter=jitter, jitter_p=1.0, gray_p=0.2)]


# ------------------------------------------------------------------------------------------------------ model
class ODC(nn.Module):
    """Backbone, a neck of two layers with features that are never negative, and a linear classifier of the k clusters.

    images: N. The memories of samples and centroids are buffers, row i of features and labels belongs to image i: they
    are the same on every process, and an interrupted run goes on with them. previous: labels at the epoch's beginning.
    """

    def __init__(self, backbone, images, clusters, hidden_dim=512, dim=256):
        super().__init__()
        self.backbone, self.dim = backbone, dim
        norm = nn.BatchNorm1d(hidden_dim, momentum=0.001, affine=False)
        self.neck = nn.Sequential(nn.Linear(backbone.dim, hidden_dim), norm, nn.ReLU(inplace=True))
        self.output = nn.Linear(hidden_dim, dim)
        self.head = nn.Linear(dim, clusters)
        self.register_buffer("features", torch.zeros(images, dim))
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))
        self.register_buffer("previous", torch.zeros(images, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(clusters, dim))

    def forward(self, x, keep=None):
        """x: one view (B, 3, S, S), keep: factors (B, hidden_dim) from `dropout`. Returns features f (B, D) and logits
        (B, k); without keep the features alone, nothing being dropped."""
        hidden = self.neck(self.backbone(x))
        f = F.relu(self.output(hidden if keep is None else hidden * keep))
        return f if keep is None else (f, self.head(f))

    @torch.no_grad()
    def start(self, features, seeds):
        """k-means of features (n, D), the rows of this process, fills the memories; the classifier is drawn anew, as it
        may have learned other clusters (--init). seeds: two integers."""
        x = F.normalize(features, dim=1)
        found = kmeans(x, len(self.centroids), seed=seeds[0])
        self.features.copy_(gather_uneven(x))
        self.labels.copy_(gather_uneven(found.assignments))
        self.centroids.copy_(found.centroids)
        weight = torch.randn(self.head.weight.shape, generator=torch.Generator().manual_seed(seeds[1]))
        self.head.weight.copy_(0.01 * weight)
        self.head.bias.zero_()

    def sizes(self):
        """Images in each cluster (k,). Unlike bincount, this does not wait for the device."""
        return self.labels.new_zeros(len(self.centroids)).scatter_add_(0, self.labels, torch.ones_like(self.labels))

    @torch.no_grad()
    def update(self, indices, f, momentum):
        """m <- unit(momentum m + (1 - momentum) unit(f)) and its best cluster, for the images of all processes.

        indices: (B,), f: (B, D) of this process. All write what one has computed, so that they cannot drift apart.
        """
        rows = F.normalize(momentum * self.features[indices] + (1 - momentum) * F.normalize(f, dim=1), dim=1)
        # centroids are means, not unit vectors: a dense cluster attracts more than a loose one
        labels = gather((rows @ self.centroids.T).argmax(1))
        indices, rows = gather(indices), gather(rows)
        # an image that comes up twice gets its last row at each of its places, whichever is written last
        places = torch.arange(len(indices), device=indices.device)
        last = torch.where(indices[:, None] == indices, places, -1).amax(1)
        self.features[indices] = rows[last]
        self.labels[indices] = labels[last]

    @torch.no_grad()
    def recentre(self):
        """Centroids become the means of their clusters; empty clusters keep theirs."""
        labels, features = own_share(self.labels), own_share(self.features)
        sums = torch.zeros_like(self.centroids).index_add_(0, labels, features)
        counts = sums.new_zeros(len(sums)).index_add_(0, labels, torch.ones_like(features[:, 0]))
        sums, counts = process_mean(torch.cat([sums, counts[:, None]], 1)).split([self.dim, 1], dim=1)
        self.centroids.copy_(torch.where(counts > 0, sums / counts, self.centroids))

    @torch.no_grad()
    def refill(self, min_cluster):
        """Members of clusters with fewer than min_cluster images go to the nearest (by dot product) of the others;
        then each emptied cluster takes half of the largest one, parted by 2-means. Returns the number of refills."""
        small = self.sizes() < min_cluster
        moved = small[self.labels].nonzero().flatten()
        if len(moved):
            parts = (self.features[rows] @ self.centroids.T for rows in own_share(moved).split(4096))
            targets = [scores.masked_fill_(small, -torch.inf).argmax(1) for scores in parts]
            self.labels[moved] = gather_uneven(torch.cat(targets))
        for empty in small.nonzero().flatten().tolist():
            largest = int(self.sizes().cpu().numpy().argmax())  # NumPy takes the first one of equally large ones
            members = (self.labels == largest).nonzero().flatten()
            second = gather_uneven(kmeans(self.features[own_share(members)], 2).assignments) == 1
            if second.all() or not second.any():  # equal features
                second = torch.arange(len(members), device=members.device) % 2 == 1
            self.labels[members[second]] = empty
        return int(small.sum())


def own_share(rows):
    """The part of rows (N, ...), which all processes hold, that this one works on; the parts follow in rank order."""
    return rows[len(rows) * rank() // world_size() : len(rows) * (rank() + 1) // world_size()]


def dropout(seed, step, batch, units, p, accum, device):
    """Factors (b, units) of hidden units, 0 or 1 / (1 - p), for each of the micro-batches of this process.

    Drawn for the global batch, of which each process takes its rows: they depend on (seed, step, place in the batch).
    """
    generator = torch.Generator(device).manual_seed(*rng.seeds(seed, step, 1, rng.DROPOUT))
    keep = (torch.rand(batch, units, generator=generator, device=device) >= p) / (1 - p)
    return keep.split(batch // (world_size() * accum))[rank() :: world_size()]


# ------------------------------------------------------------------------------------------------------- loss
def cluster_count(clusters, images, min_cluster):
    """k; None becomes 10000 (MMSelfSup 0.11), 128 images per cluster of ImageNet, or a hundredth of a smaller set."""
    if clusters is not None and clusters > images:
        remedy = f"use at most {max(2, images // 10)}, ten images per cluster" if images > 1 else "more are needed"
        fail(f"--clusters {clusters} for {images} images: {remedy}")
    k = clusters or max(2, min(10000, images // 100))
    if min_cluster * k > images:  # else the largest cluster is never a small one
        fail(f"--min-cluster {min_cluster}: {images} images in {k} clusters need {images // k // 4} or less")
    return k


def odc_loss(logits, labels, sizes):
    """Cross entropy, weighted by 1 / sqrt(size) of the image's cluster, mean over the batch.

    logits: (B, k), labels: (B,), sizes: images per cluster (k,). Weights have mean 1 over all images: chance is ln k.
    """
    sizes = sizes.to(logits.dtype)
    weights = sizes.clamp(min=1).rsqrt() * (sizes.sum() / sizes.sqrt().sum())
    return (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()


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
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip))
    backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    k = cluster_count(args.clusters, len(data), args.min_cluster)
    model = run.place(ODC(backbone, len(data), k, args.hidden_dim, args.dim))
    peak = args.lr * args.batch_size / 256
    groups = [  # ODC: the classifier, whose targets keep changing, has no momentum (MMSelfSup 0.11)
        {"params": [p for name, p in model.named_parameters() if not name.startswith("head.")]},
        {"params": [*model.head.parameters()], "momentum": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    lines = {"lr": f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", "baseline": f"loss ln({k}) = {math.log(k):.2f}"}
    lines["clusters"] = f"{k}{'' if args.clusters or k == 10000 else ' (a hundredth of the images)'}"
    net = run.start(model, optimizer, chance=math.log(k), **lines)

    def report(previous=None, **more):
        labels = model.labels.cpu().numpy()
        more |= {} if previous is None else {"changed": round(float((labels != previous).mean()), 4)}
        run.note(**cluster_report(labels, previous, data.labels), **more)
        dump_clusters(args.dump_clusters, data, labels)

    if not run.resumed:  # ODC: memories and classifier start from k-means
        clock, rest = time.monotonic(), {"workers": args.workers, "amp": run.amp, "everywhere": False}
        features, _ = extract(model, data, run.view, run.device, **rest)
        model.start(features.to(run.dtype), rng.seeds(args.seed, 0, 2))
        report(seconds=round(time.monotonic() - clock, 1))

    noise = (args.batch_size, args.hidden_dim, args.dropout, args.accum, run.device)
    for epoch in run.epochs():
        if run.epoch_done:  # ODC: else resumed within an epoch, with the labels at its beginning
            model.previous.copy_(model.labels)
        for step, batches in run.steps(epoch):
            lr = peak * (0.4 if 11 * step >= 10 * run.total else 1.0)  # ODC: for the last 40 of 440 epochs
            lr = lr if step >= run.warmup else peak * step / run.warmup
            for group in optimizer.param_groups:
                group["lr"] = lr
            seen, sizes = [], model.sizes()
            for batch, keep in zip(batches, dropout(args.seed, step + 1, *noise), strict=True):  # ODC
                (x,) = batch.views()
                f, logits = net(x, keep.to(run.dtype))
                run.backward(odc_loss(logits, model.labels[batch.indices], sizes))  # ODC
                seen.append((batch.indices, f.detach()))
            run.update(optimizer)
            model.update(*map(torch.cat, zip(*seen, strict=True)), args.memory_momentum)  # ODC
            if (step + 1) % args.centroid_every == 0:  # ODC
                model.recentre()
                if model.refill(args.min_cluster):
                    model.recentre()
            run.log(lr, std=output_std(f))
        if run.epoch_done:
            report(model.previous.cpu().numpy())


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
