"""ODC: Online Deep Clustering for Unsupervised Representation Learning (Zhan et al., CVPR 2020, 2006.10645).

A memory holds a unit vector m_i and a cluster y_i of every image i, and the centroid c_j of each of the k clusters. The
network has to tell the cluster of an image from one view of it, weighted as if large clusters were smaller. In the same
step its feature f renews the memory, so clusters change a little all the time instead of all at once:
L = -w ln softmax(W f)_y,  w ~ size(y)^-1/2;   m <- unit(m / 2 + unit(f) / 2);   y <- argmax over j of c_j . m.
Every few steps centroids become the means of their clusters, and tiny clusters are emptied to split the largest ones.

    torchrun --nproc_per_node=8 odc.py --data /imagenet
    python odc.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, 440 epochs, in MMSelfSup 0.11: linear top-1 53.42 on pooled features, 57.70 on those
of layer4, its best layer; k-NN top-1 39.1; linear SVM on VOC07 78.42 mAP. Ours: not run.

Memory at N = 1,281,167, D = 256 and k = 10000, on every GPU and in last.pt: vectors 1.31 GB, labels twice 10 MB,
centroids 10 MB. k-means at the start takes 21 x 6.6 TFLOP, 14 s for one GPU that sustains 10 TFLOP/s, 2 s for eight.

Small images (32 px; our choice); without --clusters, k is a hundredth of the images:
    python odc.py --data cifar10 --arch resnet18 --batch-size 256 --epochs 200 --warmup-epochs 5
Where clusters change for most images from epoch to epoch ("changed"), --memory-momentum 0.9 calms them.

Deviations, where the paper leaves it open from MMSelfSup 0.11: an epoch is a permutation of the images, not draws with
replacement; no rotations by up to 2 degrees; small clusters are handled when centroids are renewed, not in each step,
and then all centroids are taken anew; clusters that 2-means cannot part are halved by position, not at random; loss
weights have mean 1 over all images, not over the batch of a GPU; batch norm uses the statistics of the global batch;
the learning rate falls after 10/11 of --epochs whatever their number; images of at most 64 pixels are cropped to a
fifth of their area at least (not 0.08) and get a 3x3 stem.
To hack: copy this file. What is ODC: the sections augmentation, model and loss, and the lines marked in main.
"""

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

from common.augment import EvalView, View, uniforms
from common.checkpoint import init_from, resume, save_run
from common.data import Loader, build, default_size, fit
from common.distributed import finish, gather, gather_uneven, init, mean, parallel, rank, sync_batch_norm, world_size
from common.kmeans import kmeans
from common.knn import extract, knn_monitor
from common.log import Logger, Parser, check_args, describe, fail, output_std, save_views
from common.optim import full, precision
from common.resnet import resnet


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", required=True, help="folder or .tar of images, or digits, cifar10[:DIR], cifar100, stl10, fake[:N]"
    )
    group.add_argument("--train-list", help="list file of training images, 'relative/path[ label]' per line")
    group.add_argument("--val-list", help="list file of validation images")
    group.add_argument("--image-size", type=int, help="pixels of a view (default: 224, or what fits a small named set)")
    group.add_argument("--crop-min", type=float, help="smallest share of the area in a crop (unset: 0.08, small: 0.2)")
    group.add_argument("--flip", type=float, default=0.5, help="probability of a mirrored view")
    group.add_argument("--channels", type=int, default=3, help="of the images; all can be made 1 or 3")
    group.add_argument("--stats", choices=["imagenet", "auto"], help="normalisation (default: auto unless 3 channels)")
    group.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="gpu: JPEGs by nvJPEG, other rounding")
    group.add_argument("--max-bad", type=int, default=100, help="stop after this many undecodable images")
    group = parser.add_argument_group("ODC")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--hidden-dim", type=int, default=512, help="hidden width of the neck")
    group.add_argument("--dim", type=int, default=256, help="features D, as kept in the memory")
    group.add_argument("--dropout", type=float, default=0.5, help="share of the neck's hidden units switched off")
    group.add_argument("--clusters", type=int, help="k (default: 10000, or a hundredth of the images)")
    group.add_argument("--min-cluster", type=int, default=20, help="smaller clusters are dissolved (0: never)")
    group.add_argument("--centroid-every", type=int, default=10, help="steps between new centroids")
    group.add_argument("--memory-momentum", type=float, default=0.5, help="share of its old value in a row's update")
    group.add_argument("--dump-clusters", metavar="FILE", help="CSV (path,cluster), written anew after each epoch")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=440)
    group.add_argument("--warmup-epochs", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=512, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--lr", type=float, default=0.03, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=float, default=1e-5)
    group.add_argument("--momentum", type=float, default=0.9)
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=f"runs/{Path(__file__).stem}", help="run folder")
    group.add_argument("--resume", action="store_true", default=True, help="continue from last.pt in --out")
    group.add_argument("--no-resume", dest="resume", action="store_false", help="start again, overwriting --out")
    group.add_argument("--init", help="weights to start from, with a fresh schedule")
    group.add_argument("--max-steps", type=int, default=0, help="stop after this many steps, keeping the schedule")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, default=8, help="loading threads per process")
    group.add_argument("--device", default="auto")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16", "fp64"], default="auto")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--log-every", type=int, default=20, help="steps")
    group.add_argument("--save-every", type=float, default=10, help="minutes")
    group.add_argument("--knn-every", type=int, default=10, help="epochs between k-NN accuracies (0: never)")
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    for name, low in {"clusters": 2, "min_cluster": 0, "centroid_every": 1}.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")
    if not (0 <= args.dropout < 1 and 0 <= args.memory_momentum < 1 and min(args.dim, args.hidden_dim) > 0):
        parser.error("--dropout and --memory-momentum must be in [0, 1), --dim and --hidden-dim at least 1")
    if args.dump_clusters and not Path(args.dump_clusters).absolute().parent.is_dir():
        parser.error(f"--dump-clusters {args.dump_clusters}: its folder does not exist")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """One view per image, in colour: crop, flip, a jitter that is always applied, grey (MMSelfSup 0.11)."""
    jitter = (0.4, 0.4, 1.0, 0.5)
    return [View(size=size, crop=(crop_min, 1.0), flip=flip, jitter=jitter, jitter_p=1.0, gray_p=0.2)]


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
        labels, features = share(self.labels), share(self.features)
        sums = torch.zeros_like(self.centroids).index_add_(0, labels, features)
        counts = sums.new_zeros(len(sums)).index_add_(0, labels, torch.ones_like(features[:, 0]))
        sums, counts = mean(torch.cat([sums, counts[:, None]], 1)).split([self.dim, 1], dim=1)
        self.centroids.copy_(torch.where(counts > 0, sums / counts, self.centroids))

    @torch.no_grad()
    def refill(self, min_cluster):
        """Members of clusters with fewer than min_cluster images go to the nearest (by dot product) of the others;
        then each emptied cluster takes half of the largest one, parted by 2-means. Returns the number of refills."""
        small = self.sizes() < min_cluster
        moved = small[self.labels].nonzero().flatten()
        if len(moved):
            parts = (self.features[rows] @ self.centroids.T for rows in share(moved).split(4096))
            targets = [scores.masked_fill_(small, -torch.inf).argmax(1) for scores in parts]
            self.labels[moved] = gather_uneven(torch.cat(targets))
        for empty in small.nonzero().flatten().tolist():
            largest = int(self.sizes().cpu().numpy().argmax())  # NumPy takes the first one of equally large ones
            members = (self.labels == largest).nonzero().flatten()
            second = gather_uneven(kmeans(self.features[share(members)], 2).assignments) == 1
            if second.all() or not second.any():  # equal features
                second = torch.arange(len(members), device=members.device) % 2 == 1
            self.labels[members[second]] = empty
        return int(small.sum())


def share(rows):
    """The part of rows (N, ...), which all processes hold, that this one works on; the parts follow in rank order."""
    return rows[len(rows) * rank() // world_size() : len(rows) * (rank() + 1) // world_size()]


def dropout(seed, step, batch, units, p, accum, device):
    """Factors (b, units) of hidden units, 0 or 1 / (1 - p), for each of the micro-batches of this process.

    Drawn for the global batch, of which each process takes its rows: they depend on (seed, step, place in the batch).
    """
    number = int(uniforms(seed, step, [0], 101, 1).item() * 2**53)
    generator = torch.Generator(device).manual_seed(number)
    keep = (torch.rand(batch, units, generator=generator, device=device) >= p) / (1 - p)
    return keep.split(batch // (world_size() * accum))[rank() :: world_size()]


# ------------------------------------------------------------------------------------------------------- loss
def cluster_count(clusters, images, min_cluster):
    """k; None becomes 10000 (MMSelfSup 0.11), 128 images per cluster of ImageNet, or what smaller sets can bear."""
    if clusters is not None and clusters > images:
        fail(f"--clusters {clusters} for {images} images: use at most {max(2, images // 10)}, ten images per cluster")
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
    """How the clusters (N,) are: number in use, share of the largest, share of images that have changed theirs since
    the previous epoch, normalised mutual information (1: the same division, 0: unrelated) with that epoch's clusters
    and with true classes, -1 standing for unknown."""
    counts = np.bincount(labels)
    report = {"clusters": int((counts > 0).sum()), "largest": round(counts.max() / len(labels), 4)}
    if previous is not None:
        report["changed"] = round(float((labels != previous).mean()), 4)
        report["nmi_previous"] = round(float(normalized_mutual_info_score(previous, labels)), 4)
    if truth is not None:
        report["nmi_labels"] = round(float(normalized_mutual_info_score(truth[truth >= 0], labels[truth >= 0])), 4)
    return report


def main(args):
    device = init(args.device)
    check_args(args)
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = fit(augmentation(args.image_size, args.crop_min, args.flip), data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    noise = (args.batch_size, args.hidden_dim, args.dropout, args.accum, device)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    backbone = resnet(args.arch, args.width, args.image_size, channels=args.channels)
    k = cluster_count(args.clusters, len(data), args.min_cluster)
    model = ODC(backbone, len(data), k, args.hidden_dim, args.dim)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
    peak = args.lr * args.batch_size / 256
    groups = [  # ODC: the classifier, whose targets keep changing, has no momentum (MMSelfSup 0.11)
        {"params": [p for name, p in model.named_parameters() if not name.startswith("head.")]},
        {"params": [*model.head.parameters()], "momentum": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    lines = {"chance": f"loss ln({k}) = {math.log(k):.2f}"}
    lines["clusters"] = f"{k}{'' if args.clusters or k == 10000 else ' (a hundredth of the images)'}"
    describe(args, data, loader, model, lr=f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", **lines)
    log = Logger(args, loader, total, step, chance=math.log(k))

    def save():
        save_run(args, step, len(data), model, optimizer, scaler, model.backbone, views[0])

    view = EvalView(args.image_size, mean=views[0].mean, std=views[0].std)

    def knn():
        return knn_monitor(model.backbone, data, val, view, device, args.workers, amp)

    def report(previous=None, **more):
        labels, previous = model.labels.cpu().numpy(), None if previous is None else previous.cpu().numpy()
        log.note(step, **cluster_report(labels, previous, data.labels), **more)
        if args.dump_clusters and rank() == 0:
            with open(f"{args.dump_clusters}.tmp", "w", newline="", errors="surrogateescape") as file:
                rows = ((data.path(i), label) for i, label in enumerate(labels.tolist()))
                csv.writer(file).writerows([("path", "cluster"), *rows])
            Path(f"{args.dump_clusters}.tmp").replace(args.dump_clusters)

    if not state:  # ODC
        clock, seeds = time.monotonic(), uniforms(args.seed, 0, [0], 100, 2)[0] * 2**53
        features, _ = extract(model, data, view, device, args.workers, amp=amp, everywhere=False)
        model.start(features.to(dtype), seeds.astype(np.int64).tolist())
        report(seconds=round(time.monotonic() - clock, 1))
    if args.knn_every and not state:
        log.note(0, **knn())
    saved = time.monotonic()
    for epoch in range(step // loader.steps, args.epochs):
        if step == epoch * loader.steps:  # ODC: else resumed within an epoch, which knows how it began
            model.previous.copy_(model.labels)
        batches = loader.epoch(epoch, start=step % loader.steps)
        for step in range(step + 1, min((epoch + 1) * loader.steps, log.last) + 1):
            lr = peak * (0.4 if 11 * (step - 1) >= 10 * total else 1.0)  # ODC: for the last 40 of 440 epochs
            lr = lr if step > warmup else peak * (step - 1) / warmup
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = 0.0
            seen, sizes, masks = [], model.sizes(), iter(dropout(args.seed, step, *noise))  # ODC
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                (x,) = batch.views()
                with amp:
                    f, logits = net(x, next(masks).to(dtype))
                part = odc_loss(full(logits), model.labels[batch.indices], sizes) / args.accum  # ODC
                scaler.scale(part).backward()
                loss = loss + part.detach()
                seen.append((batch.indices, full(f.detach())))
            model.update(*map(torch.cat, zip(*seen, strict=True)), args.memory_momentum)  # ODC
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step % args.centroid_every == 0:  # ODC
                model.recentre()
                if model.refill(args.min_cluster):
                    model.recentre()

            if log.due(step):
                log.log(step, step / loader.steps, mean(loss).item(), lr, std=mean(output_std(f)).item())
                stop = log.stop.requested(device)
                if stop or step == log.last or time.monotonic() - saved > 60 * args.save_every:
                    save()
                    saved = time.monotonic()
                if stop:
                    log.end(step)
        whole = step == (epoch + 1) * loader.steps  # not cut short by --max-steps
        if whole:
            report(model.previous)
        if args.knn_every and whole and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            log.note(step, **knn())
        if step >= log.last:
            break
    log.close()
    finish()


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
