"""DeepCluster: Deep Clustering for Unsupervised Learning of Visual Features (Caron et al., ECCV 2018, 1807.05520).

Before every epoch k-means divides the features f of all images, whitened and of unit length, into k clusters. During
the epoch the network and a new linear classifier W have to tell from one view of an image which cluster y it is in,
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
dimensions. An epoch of few steps needs a high rate, as its classifier starts from nothing.

The Sobel filter is part of the exported backbone, so evaluations apply it by themselves.

Crop and flip, batch 256, learning rate 0.05 and 200 epochs are those of the official code. MMSelfSup trains with batch
512 and rate 0.1 (the same per 256), and adds rotations by up to 2 degrees, not in this file, and --jitter.
Deviations from the paper: a ResNet with one linear layer, clustered by its pooled features, as in MMSelfSup, instead of
AlexNet or VGG-16 with two hidden layers and dropout; batch norm uses the statistics of the global batch; --reweight
scales the loss by constants of the epoch, not of the batch; images of at most 64 pixels are cropped to a fifth of their
area at least (not 0.08) and get a 3x3 stem.
To hack: copy this file. What is DeepCluster: the sections augmentation, model and loss, and the lines marked in main.
"""

import argparse
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
from common.distributed import finish, gather_uneven, init, is_main, mean, parallel, sync_batch_norm
from common.kmeans import kmeans, pca_whiten
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
    group.add_argument("--jitter", action="store_true", help="colour jitter and grey, as in MMSelfSup")
    group.add_argument("--channels", type=int, default=3, help="of the images; all can be made 1 or 3")
    group.add_argument("--stats", choices=["imagenet", "auto"], help="normalisation (default: auto unless 3 channels)")
    group.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="gpu: JPEGs by nvJPEG, other rounding")
    group.add_argument("--max-bad", type=int, default=100, help="stop after this many undecodable images")
    group = parser.add_argument_group("DeepCluster")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    toggle = argparse.BooleanOptionalAction
    group.add_argument("--sobel", action=toggle, default=True, help="show the network edges of the grey image only")
    group.add_argument("--clusters", type=int, help="k (default: 10000, or a hundredth of the images)")
    group.add_argument("--pca-dim", type=int, help="whitened dimensions (default: 256, or a quarter of the features)")
    group.add_argument("--reweight", action="store_true", help="weight clusters by 1 / sqrt(size) in the loss")
    group.add_argument("--dump-clusters", metavar="FILE", help="CSV (path,cluster), written anew before each epoch")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=200)
    group.add_argument("--warmup-epochs", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=256, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--lr", type=float, default=0.05, help="per 256 images: multiplied by batch-size / 256")
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
    for name, low in {"clusters": 2, "pca_dim": 1}.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")
    if args.dump_clusters and not Path(args.dump_clusters).absolute().parent.is_dir():
        parser.error(f"--dump-clusters {args.dump_clusters}: its folder does not exist")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5, jitter=False):
    """One view per image: crop and flip (paper, section 3.4; official code). jitter: always, grey for every fifth."""
    view = View(
        size=size,
        crop=(crop_min, 1.0),
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
    """k and the dimensions to cluster in; None becomes the paper's 10000 and 256, or what smaller sets can bear."""
    if clusters is not None and clusters > images:
        fail(f"--clusters {clusters} for {images} images: use at most {max(2, images // 10)}, ten images per cluster")
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
    share = len(labels) // len(counts) + 1
    again = (generator.random((len(counts), share)) * counts).astype(np.int64)
    drawn = order[starts + np.where(counts > share, np.arange(share), again)]
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
    """How the clusters (N,) are: number in use, share of the largest, normalised mutual information (1: the same
    division, 0: unrelated) with those of the previous epoch and with true classes, -1 standing for unknown."""
    counts = np.bincount(labels)
    report = {"clusters": int((counts > 0).sum()), "largest": round(counts.max() / len(labels), 4)}
    if previous is not None:
        report["nmi_previous"] = round(float(normalized_mutual_info_score(previous, labels)), 4)
    if truth is not None:
        report["nmi_labels"] = round(float(normalized_mutual_info_score(truth[truth >= 0], labels[truth >= 0])), 4)
    return report


def dump_clusters(path, data, labels):
    """Writes path,cluster of all images, from the main process."""
    if is_main():
        temporary = Path(f"{path}.tmp")
        with open(temporary, "w", newline="", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "cluster"])
            writer.writerows((data.path(i), label) for i, label in enumerate(labels.tolist()))
        temporary.replace(path)


def main(args):
    device = init(args.device)
    check_args(args)
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = fit(augmentation(args.image_size, args.crop_min, args.flip, args.jitter), data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    sobel = sobel_filter(args.channels) if args.sobel else None
    backbone = resnet(args.arch, args.width, args.image_size, input_filter=sobel, channels=args.channels)
    k, pca_dim = cluster_sizes(args.clusters, args.pca_dim, len(data), backbone.dim)
    model = DeepCluster(backbone, len(data), k)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
    peak = args.lr * args.batch_size / 256
    groups = [  # DeepCluster: a classifier that starts anew in each epoch has no momentum to remember (official code)
        {"params": [*model.backbone.parameters()]},
        {"params": [*model.head.parameters()], "momentum": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    lines = {"chance": f"loss ln({k}) = {math.log(k):.2f}"}
    lines["clusters"] = f"{k}{'' if args.clusters or k == 10000 else ' (a hundredth of the images)'}, of features"
    lines["clusters"] += f" whitened to {pca_dim} dimensions{', seeing edges (Sobel)' if args.sobel else ''}"
    describe(args, data, loader, model, lr=f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", **lines)
    log = Logger(args, loader, total, step, chance=math.log(k))
    if k > len(data) / 10:
        log.warn("clusters", f"--clusters {k}: fewer than ten images per cluster, {len(data) // 10} would be better")

    def save():
        save_run(args, step, len(data), model, optimizer, scaler, model.backbone, views[0])

    view = EvalView(args.image_size, mean=views[0].mean, std=views[0].std)

    def knn():
        return knn_monitor(model.backbone, data, val, view, device, args.workers, amp)

    def recluster(epoch):  # DeepCluster
        clock, previous = time.monotonic(), model.labels.clone().cpu().numpy() if epoch else None
        features, _ = extract(model.backbone, data, view, device, args.workers, amp=amp, everywhere=False)
        seeds = (uniforms(args.seed, epoch, [0], 100, 2)[0] * 2**53).astype(np.int64).tolist()
        model.labels.copy_(cluster(features.to(dtype), k, pca_dim, seeds[0]))
        model.renew_head(seeds[1])
        report = cluster_report(model.labels.cpu().numpy(), previous, data.labels)
        log.note(step, **report, seconds=round(time.monotonic() - clock, 1))

    if args.knn_every and not state:
        log.note(0, **knn())
    saved = time.monotonic()
    for epoch in range(step // loader.steps, args.epochs):
        if step == epoch * loader.steps:  # DeepCluster: else resumed within an epoch, with its labels and classifier
            recluster(epoch)
        labels = model.labels.cpu().numpy()
        weights = cluster_weights(labels, k).to(device, dtype) if args.reweight else None
        if args.dump_clusters:
            dump_clusters(args.dump_clusters, data, labels)
        batches = loader.epoch(epoch, start=step % loader.steps, order=uniform_order(labels, args.seed, epoch))
        for step in range(step + 1, min((epoch + 1) * loader.steps, log.last) + 1):
            lr = peak if step > warmup else peak * (step - 1) / warmup
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = 0.0
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                (x,) = batch.views()
                with amp:
                    f, logits = net(x)
                # by index, here: labels that travel with the images would be those of an earlier epoch in a live worker
                part = cluster_loss(full(logits), model.labels[batch.indices], weights) / args.accum  # DeepCluster
                scaler.scale(part).backward()
                loss = loss + part.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            if log.due(step):
                log.log(step, step / loader.steps, mean(loss).item(), lr, std=mean(output_std(f)).item())
                stop = log.stop.requested(device)
                if stop or step == log.last or time.monotonic() - saved > 60 * args.save_every:
                    save()
                    saved = time.monotonic()
                if stop:
                    log.end(step)
        whole = step == (epoch + 1) * loader.steps  # not cut short by --max-steps
        if args.knn_every and whole and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            log.note(step, **knn())
        if step >= log.last:
            break
    log.close()
    finish()


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
