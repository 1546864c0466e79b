"""SCAN: Learning to Classify Images without Labels (Van Gansbeke et al., ECCV 2020, arXiv 2005.12320).

Clustering: the k nearest neighbours of every image are found in the features of a pre-trained network. A new head gives
probabilities p of C clusters, which should agree with those q of a neighbour, while all clusters are used:
L = -mean ln(p.q) - lambda H(mean p). Self-labelling: a view without augmentation that is put into a cluster with more
than 99 % is a label for a strongly augmented view of the same image, L = cross entropy, every cluster counting alike.

    python scan.py --data cifar10 --pretrained runs/simclr/backbone.pt --clusters 10
    python scan.py --data cifar10 --pretrained runs/scan/last.pt --self-label        # writes to runs/scan_selflabel
    python eval_cluster.py --pretrained runs/scan_selflabel/clusters.pt --data cifar10
    torchrun --nproc_per_node=8 scan.py --data /imagenet --pretrained runs/moco/backbone.pt --recipe imagenet

stage          --recipe  epochs  batch  optimiser, rate      weight decay  k   heads  views   trained
clustering     small     50      128    Adam 1e-4            1e-4          20  1      strong  all
               imagenet  100     512    SGD 5, momentum 0.9  0             50  10     simclr  the heads
self-labelling small     200     1000   Adam 1e-4            1e-4                     strong  all
               imagenet  25      512    SGD 0.03, m. 0.9     0                        strong  all, --ema, --no-balance

The paper's other sets: CIFAR-100 as folders of its 20 superclasses, --clusters 20 and, for clustering, --batch-size 512
--epochs 100; STL-10 --epochs 100 for both stages.

Published, accuracy / NMI / ARI of the best run after clustering and after self-labelling, in percent: CIFAR-10 81.6 /
71.5 / 66.5, then 88.3 / 79.7 / 77.2; CIFAR-20 44.0 / 44.9 / 28.3, then 50.7 / 48.6 / 33.3; STL-10 79.2 / 67.3 / 61.8,
then 80.9 / 69.8 / 64.6; 50, 100, 200 and 1000 classes of ImageNet 75.1, 66.2, 56.3 and 39.9, then 76.8, 68.9, 58.1.
After 500 epochs of SimCLR, or 800 of MoCo v2. Ours: results/README.md.

Labels, where there are any, are only reported. Judged are the validation images, or without them the training images,
at most 10,000, without augmentation: of several heads that with the lowest loss at lambda = 1 is taken. clusters.pt,
for eval_cluster.py and predict.py, holds it with its network. neighbours.npz holds the neighbours.

Cost at N = 1,281,167, D = 2048: 10.5 GB of features on each GPU and 6.7 PFLOP over all of them while neighbours are
found, once; the table takes 0.26 GB on the host. Neighbours have a loading process of their own, for which "data wait"
does not count.

Deviations from the official code: neighbours by the backbone's pooled features, not the projector's output, which
backbone.pt lacks; the network is that of the last epoch, not of the one with the lowest loss; H is that of the global
batch, or of a micro-batch; ln(p.q) without a floor at -100. Copying an average of the weights, of factor m, back into
them after each step, as it does on ImageNet, is the same for parameters as a rate of (1 - m) lr: so --ema does that;
batch norm's running statistics, which it copies back as they were at the start, move on here. Above 64 px, labels come
from the central 7/8 of the image and strong views are random squares of this size, also of images of the view's size
(STL-10), there whole. Holes have any side, there an even one. A step for which no image is sure is left out.
To hack: copy this file. What is SCAN: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy.optimize import linear_sum_assignment  # scikit-learn brings it
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, toggle, width
from common.augment import FLIP, JITTER, LEFT, TOP, EvalView, View
from common.checkpoint import load_backbone, load_file
from common.classifier import Classifier, save_classifier
from common.datasets import evenly_spaced
from common.distributed import all_reduce, gather_uneven, is_main, print0, rank, world_size
from common.features import broken_rows, extract
from common.files import atomic
from common.knn import nearest
from common.loader import Loader
from common.run import Run

JUDGED = 10_000  # images at most
CLUSTERING = {"epochs": 50, "batch_size": 128, "optimizer": "adam", "lr": 1e-4, "weight_decay": 1e-4, "neighbours": 20}
CLUSTERING |= {"heads": 1, "views": "strong", "freeze": False, "balance": True, "ema": 0.0}
LARGE = CLUSTERING | {"batch_size": 512, "optimizer": "sgd", "weight_decay": 0.0}
FROZEN = {"epochs": 100, "lr": 5.0, "neighbours": 50, "heads": 10, "views": "simclr", "freeze": True}
RECIPES = {  # by whether it is the second stage
    ("small", False): CLUSTERING,
    ("imagenet", False): LARGE | FROZEN,
    ("small", True): CLUSTERING | {"epochs": 200, "batch_size": 1000},
    ("imagenet", True): LARGE | {"epochs": 25, "lr": 0.03, "balance": False, "ema": 0.999},
}
STAGE = {False: {"neighbours", "heads", "entropy_weight", "views", "crop_min"}, True: {"threshold", "balance", "ema"}}


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    add = parser.add_argument_group("SCAN (defaults: the table above)").add_argument
    text = "backbone.pt or any file of a network, or random; with --self-label the last.pt of a run without it"
    add("--pretrained", help=text)
    add("--self-label", action=toggle, default=False, help="the second stage")
    add("--recipe", choices=["small", "imagenet"], default="small", help="row of the table")
    add("--arch", help="only with --pretrained random (default: resnet50); else read from the file")
    add("--width", type=width, help="only with --pretrained random (default: 1); else read from the file")
    add("--clusters", type=at_least(2), help="C (default: as many as classes; without labels it has to be given)")
    add("--neighbours", type=positive(int), help="k")
    add("--heads", type=positive(int, 1000), help="how many are trained, of which the best one is taken")
    add("--entropy-weight", type=at_least(0, float), default=5.0, help="lambda: too little leaves clusters empty")
    add("--views", choices=["strong", "simclr"], help="four operations and a hole, or crops and colours")
    add("--crop-min", type=share, help="of --views simclr: smallest share of the image area (default: 0.2)")
    add("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    add("--cutout", type=at_least(0), help="largest side of the hole (default: half of the view, a third above 32 px)")
    add("--threshold", type=below_one, default=0.99, help="probability above which a label is taken")
    add("--balance", action=toggle, help="labels of a rare cluster count more, so that all clusters count alike")
    add("--ema", type=below_one, help="m: see the deviations above")
    add("--freeze", action=toggle, help="train nothing but the heads")
    add("--epochs", type=positive(int))
    add("--warmup-epochs", type=at_least(0), default=0)
    add("--batch-size", type=positive(int), help="images per step over all processes and --accum")
    add("--optimizer", choices=["adam", "sgd"])
    add("--lr", type=positive(float), help="of any batch size, constant")
    add("--weight-decay", type=at_least(0, float))
    add("--momentum", type=below_one, default=0.9, help="of SGD")
    add = parser.add_argument_group("file", recipe=False).add_argument
    add("--pretrained-key", metavar="NAME", help="take the network under this name, where the file holds several")
    add("--trust-pickle", action=toggle, default=False, help="allow --pretrained to run code while it is read")
    args = parser.parse_args(argv)
    for name in sorted(STAGE[not args.self_label] & args.given):
        where = "is of the first stage: leave it out" if args.self_label else "is of the second stage: add --self-label"
        parser.error(f"--{name.replace('_', '-')} {where}")
    for name, value in RECIPES[args.recipe, args.self_label].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.views == "simclr" and args.crop_min is None:
        args.crop_min = 0.2
    if args.self_label and "out" not in args.given:
        args.out += "_selflabel"
    return args


def begin(args):
    """The network that --pretrained names, what is known of it, and for the second stage weight (C, D) and bias (C,) of
    the best head in the file. Completes the arguments by what the file says."""
    if not args.pretrained:
        fail("--pretrained: name a network to start from: the backbone.pt of a run of simclr.py or moco.py, or random")
    known, head = {}, None
    if args.self_label:
        state = {} if args.pretrained == "random" else load_file(args.pretrained, "--pretrained", args.trust_pickle)
        known = model if isinstance(model := state.get("model"), dict) else {}
        if "heads.0.weight" not in known or "best" not in known:
            remedy = "give the last.pt of a run without --self-label"
            fail(f"--pretrained {args.pretrained} has no heads, which --self-label starts from: {remedy}")
        head = {name: known[f"heads.{int(known['best'])}.{name}"] for name in ("weight", "bias")}
        if args.clusters not in (None, len(head["bias"])):
            fail(f"--clusters {args.clusters}: {args.pretrained} has {len(head['bias'])}; leave the flag out")
        args.clusters = len(head["bias"])
    size = args.image_size or (default_size(args.data) if args.pretrained == "random" else None)
    channels = args.channels if "channels" in args.given or args.pretrained == "random" else None
    rest = (size, args.seed, args.trust_pickle, channels, args.pretrained_key)
    backbone, meta = load_backbone(args.pretrained, args.arch, args.width, *rest)
    vars(args).update({name: meta[name] for name in ("arch", "width", "image_size", "channels")})
    return backbone, meta, head


# ----------------------------------------------------------------------------------------------- augmentation
def _moved(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)  # the nearest pixel, and black outside


OPERATIONS = (  # smallest and largest amount v, drawn uniformly; function of a PIL image i
    (0, 0, lambda i, v: i),
    (0, 0, lambda i, v: ImageOps.autocontrast(i)),
    (0, 0, lambda i, v: ImageOps.equalize(i)),
    (-30, 30, lambda i, v: i.rotate(v)),
    (0, 256, lambda i, v: ImageOps.solarize(i, int(v))),
    (0.05, 0.95, lambda i, v: ImageEnhance.Color(i).enhance(v)),
    (0.05, 0.95, lambda i, v: ImageEnhance.Contrast(i).enhance(v)),
    (0.05, 0.95, lambda i, v: ImageEnhance.Brightness(i).enhance(v)),
    (0.05, 0.95, lambda i, v: ImageEnhance.Sharpness(i).enhance(v)),
    (-0.1, 0.1, lambda i, v: _moved(i, 1, v, 0, 0, 1, 0)),
    (-0.1, 0.1, lambda i, v: _moved(i, 1, 0, 0, v, 1, 0)),
    (-0.1, 0.1, lambda i, v: _moved(i, 1, 0, v * i.width, 0, 1, 0)),
    (-0.1, 0.1, lambda i, v: _moved(i, 1, 0, 0, 0, 1, v * i.height)),
    (4, 8, lambda i, v: ImageOps.posterize(i, int(v))),
)


@dataclasses.dataclass(frozen=True)
class Strong(View):
    """A square of the image as EvalView resizes it, mirrored or not, changed by `operations` of the 14 above, drawn
    with replacement, and with a hole (Cutout, DeVries & Taylor 2017) of 1 to `cutout` pixels a side, cut at the borders
    and filled with the mean colour, which is normalised to 0."""

    operations: int = 4
    cutout: int = 0
    batched = False

    def box(self, u, height, width):
        side = max(1, round(self.size * min(height, width) / EvalView(self.size).resized(1, 1)[0]))
        side = min(side, height, width)
        return int(u[TOP] * (height - side + 1)), int(u[LEFT] * (width - side + 1)), side, side

    def crop(self, image, u):
        crop, u, mirrored = super().crop(image, u), u[JITTER:], u[FLIP] < self.flip  # columns free in this view
        crop = crop.flip(2) if mirrored else crop.clone()
        if self.operations and crop.dtype == torch.uint8 and len(crop) == 3:
            image = Image.fromarray(crop.permute(1, 2, 0).numpy())
            for which, amount in u[: 2 * self.operations].reshape(-1, 2):
                low, high, function = OPERATIONS[int(which * len(OPERATIONS))]
                image = function(image, low + amount * (high - low))
            crop = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.cutout:
            side, row, column = (u[-3:] * (self.cutout, self.size, self.size)).astype(int)  # one less than its pixels
            rows, columns = (slice(max(0, c - side // 2), c + side - side // 2 + 1) for c in (row, column))
            crop[:, rows, columns] = torch.tensor([round(255 * m) for m in self.mean], dtype=crop.dtype)[:, None, None]
        return crop

    def plan(self, u):
        return []  # the crop has been mirrored


def augmentation(size, kind="strong", cutout=None, crop_min=0.2, flip=0.5, mean=None, std=None):
    """One view (section 3.2; official code): "strong", or "simclr", that of the pretext task."""
    how = {"flip": flip} | ({} if mean is None else {"mean": tuple(mean), "std": tuple(std)})
    if kind == "strong":
        return Strong(size, cutout=(size // 2 if size <= 32 else round(size / 3)) if cutout is None else cutout, **how)
    return View(size, area=(crop_min, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2, **how)


# ------------------------------------------------------------------------------------------------------ model
class SCAN(nn.Module):
    """A pre-trained backbone and linear heads of C clusters each. best: number of the head that is taken. skipped: how
    many steps of self-labelling had no label. frozen: the backbone stays as it is, batch norm's statistics included.
    labelling: the first view of `forward` gets no gradient."""

    def __init__(self, backbone, clusters, heads=1, frozen=False, labelling=False):
        super().__init__()
        self.backbone, self.frozen, self.labelling = backbone.requires_grad_(not frozen), frozen, labelling
        self.heads = nn.ModuleList(nn.Linear(backbone.dim, clusters) for _ in range(heads))
        self.register_buffer("best", torch.tensor(0))
        self.register_buffer("skipped", torch.tensor(0))

    def logits(self, x):
        f = self.backbone(x)
        return torch.stack([head(f) for head in self.heads])

    def forward(self, x1, x2):
        """Views (B, C, S, S) of images and their neighbours, or weak and strong views. Returns logits (heads, B, C) of
        both. They pass separately: batch-norm statistics are those of one view."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.labelling):
            first = self.logits(x1)
        return first, self.logits(x2)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self


def own_share(rows):
    """The part of rows (N, ...), which all processes hold, that this one works on; the parts follow in rank order."""
    return rows[len(rows) * rank() // world_size() : len(rows) * (rank() + 1) // world_size()]


def neighbour_table(x, k):
    """(N, min(k, N - 1) + 1) numbers of rows of x (N, D): the row itself, then the k most similar of the others by
    their cosine. Every process searches for a share of the rows."""
    own = own_share(torch.arange(len(x), device=x.device))[:, None]
    found = nearest(own_share(x), x, k + 1)[1]
    last = (found == own).byte().argsort(dim=1, stable=True)  # itself, which need not be the first of equal rows
    return gather_uneven(torch.cat([own, found.gather(1, last)[:, : min(k, len(x) - 1)]], 1))


def partners(table, order, seed, epoch):
    """For each image of an order (N,) one of its row of the table (N, k + 1), drawn uniformly by its own number."""
    u = rng.uniforms(seed, epoch, order, rng.SCRIPT, 1)[:, 0]
    return table[order, (u * table.shape[1]).astype(np.int64)].astype(np.int64)


# ------------------------------------------------------------------------------------------------------- loss
def entropy(p):
    """-sum p ln p of probabilities (..., C); below 1e-8 the logarithm is that of 1e-8."""
    return -(p * p.clamp(min=1e-8).log()).sum(-1)


def scan_loss(anchors, neighbours, weight=5.0):
    """-mean ln(p.q) - weight * H(mean p) (equation 2), and its two parts, which are -mean ln(p.q) and H.

    anchors, neighbours: logits (..., B, C), of which p and q are the softmax -> (...) each. H is of the mean over all
    processes. Equal logits give (1 - weight) ln C; the least is -weight ln C.
    """
    p, q = anchors.log_softmax(-1), neighbours.log_softmax(-1)
    consistency = -(p + q).logsumexp(-1).mean(-1)
    spread = entropy(all_reduce(p.exp().mean(-2)) / world_size())
    return consistency - weight * spread, consistency, spread


def self_label_loss(weak, strong, threshold=0.99, balance=True):
    """Cross entropy of the strong view with the cluster of the weak one, mean over the images for which its probability
    is above the threshold, and their number, both of all processes. balance: mean over clusters of the means over their
    images. weak, strong: logits (B, C), no gradient into weak. No such image: 0, with a gradient of 0.

    As the labels are not shared out evenly, a process returns what, averaged over processes, is this mean.
    """
    sure, labels = weak.detach().softmax(1).max(1)
    mask = (sure > threshold).to(strong.dtype)
    counts = all_reduce((F.one_hot(labels, weak.shape[1]) * mask[:, None]).sum(0))
    weights = counts.sum() / counts.clamp(min=1) if balance else torch.ones_like(counts)
    losses = F.cross_entropy(strong, labels, reduction="none") * mask * weights[labels]
    return world_size() * losses.sum() / (weights * counts).sum().clamp(min=1), counts.sum()


# --------------------------------------------------------------------------------------------------- training
def mine(run, parts, k):
    """{name: table} of neighbours in each part {name: data set}: found by the network with which the run starts, and
    read again when it goes on."""
    path, tables = Path(run.args.out) / "neighbours.npz", {}
    if run.resumed:
        try:
            tables = dict(np.load(path))
        except (OSError, ValueError, zipfile.BadZipFile):
            fail(f"{path} cannot be read, and the network that found the neighbours has changed: choose another --out")
        was, now = ([len(part) for part in sets.values()] for sets in (tables, parts))
        if was != now:
            fail(f"{path} is of {was} images ({' and '.join(parts)}), --data has {now}: choose another --out")
        return tables
    for name, part in parts.items():
        x, _ = extract(run.model.backbone, part, run.view, run.device, run.args.workers, amp=run.amp)
        if not x.isfinite().all():
            fail(f"--pretrained {run.args.pretrained}: {broken_rows(x, part, name, run.amp)}")
        tables[name] = neighbour_table(x.to(run.dtype), k[name]).cpu().numpy().astype(np.int32)
        if name == "training" and part.labels is not None:
            near, own = part.labels[tables[name][:, 1:]], part.labels[:, None]
            run.note(neighbours_of_same_class=round((near == own)[(near >= 0) & (own >= 0)].mean(), 4))
    if is_main():
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **tables)
    return tables


def cluster_count(args, data):
    """C of a data set. Ends the program where it or k is not possible."""
    if args.clusters is None and data.labels is None:
        fail("--clusters: say how many; there are no labels whose classes could be counted")
    n, count = len(data), args.clusters or len(np.unique(data.labels[data.labels >= 0]))
    if count > n:
        remedy = f"use at most {max(2, n // 10)}, ten images per cluster" if n > 1 else "more are needed"
        fail(f"--clusters {count} for {n} images: {remedy}")
    if args.neighbours >= n and not args.self_label:
        fail(f"--neighbours {args.neighbours} for {n} images: use at most {n - 1}")
    return count


def agreement(labels, clusters, k):
    """Accuracy under the best matching of clusters and classes (Kuhn 1955) and NMI, in percent, where labels (N,) are
    known (>= 0); {} where none is. clusters: (N,) of 0 ... k - 1."""
    labels, clusters = labels[labels >= 0], clusters[labels >= 0]
    if not len(labels):
        return {}
    counts = np.bincount(labels * k + clusters, minlength=(labels.max() + 1) * k).reshape(-1, k)
    right = counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels)
    return {"acc": round(100 * right, 2), "nmi": round(100 * normalized_mutual_info_score(labels, clusters), 2)}


def judge(run, images, table, meta):
    """Says what the clusters of these images, without augmentation, are like, and writes clusters.pt. Before this the
    first stage chooses the head by its loss (lambda = 1) over pairs of images and neighbours."""
    model, args = run.model, run.args
    x, labels = extract(model.backbone, images, run.view, run.device, args.workers, amp=run.amp)
    with torch.no_grad():
        logits, found = [head(x.to(run.dtype)) for head in model.heads], {"skipped": int(model.skipped)}
        if not args.self_label:
            rows = torch.from_numpy(table).to(run.device).long().T
            losses = torch.stack([torch.stack([scan_loss(z, z[row], 1.0)[0] for row in rows]).mean() for z in logits])
            model.best.copy_(losses.argmin())
            found = {"head": int(model.best), "judged": round(losses.min().item(), 4)}
        head, k = int(model.best), args.clusters
        sure, clusters = logits[head].softmax(1).max(1)
    sure, clusters, labels = (tensor.cpu().numpy() for tensor in (sure > args.threshold, clusters, labels))
    sizes = np.bincount(clusters, minlength=k)
    found |= {"used": int((sizes > 0).sum()), "largest": round(sizes.max() / len(x), 4), "sure": round(sure.mean(), 4)}
    run.note(**found, **agreement(labels, clusters, k))
    if found["used"] < k:
        cure = "raise --entropy-weight in the first stage, or ask for fewer --clusters"
        run.warn("empty", f"{k - found['used']} of {k} clusters have no image: {cure}")
    if found.get("skipped") == run.step > 0:
        cure = "give the first stage more epochs, or lower --threshold"
        run.warn("sure", f"no image had a cluster with a probability above {args.threshold:g} so far: {cure}")
    whole, names = Classifier(model.backbone, *model.heads[head].parameters()), [f"cluster {i}" for i in range(k)]
    own = {"method": "scan", "mean": [*run.view.mean], "std": [*run.view.std]}
    what = f"{k} clusters, {'self-labelled' if args.self_label else f'head {head}'}, step {run.step}"
    save_classifier(f"{args.out}/clusters.pt", whole, meta | own, run.view, names, what)


def main(args):
    backbone, meta, head = begin(args)
    run = Run(args)
    how = (args.cutout, args.crop_min, args.flip, meta["mean"], meta["std"])
    views = [augmentation(args.image_size, args.views, *how)]
    if args.self_label:  # SCAN: labels come from the image as evaluations see it
        views.insert(0, EvalView(args.image_size, mean=views[0].mean, std=views[0].std))
    data = run.open(views)
    if args.views == "strong" and (data.channels != 3 or getattr(data, "dtype", torch.uint8) != torch.uint8):
        print0("colours     the operations of strong views, which are for RGB images of 8 bits, are switched off")
    args.clusters, k = cluster_count(args, data), args.neighbours
    model = run.place(SCAN(backbone, args.clusters, args.heads, args.freeze, args.self_label)).train()
    if head:
        model.heads[0].load_state_dict(head)
    parameters, rate = [p for p in model.parameters() if p.requires_grad], args.lr * (1 - args.ema)
    kind, more = (torch.optim.Adam, {}) if args.optimizer == "adam" else (torch.optim.SGD, {"momentum": args.momentum})
    optimizer = kind(parameters, rate, weight_decay=args.weight_decay, **more)
    lines = {"lr": f"{args.lr:g} x (1 - {args.ema}) = {rate:.4g}" if args.ema else f"{rate:g} for any batch size"}
    if not args.self_label:
        ends = (f"{(c - args.entropy_weight) * math.log(args.clusters):.2f}" for c in (1, 0))
        lines["baseline"] = "loss {} where all is alike, at best {}".format(*ends)
    net = run.start(model, optimizer, clusters=args.clusters, **lines)

    judged, tables, second = evenly_spaced(data if run.val is None else run.val, JUDGED), {}, None
    if not args.self_label:  # SCAN
        tables = mine(run, {"training": data, "judged": judged}, {"training": k, "judged": 5})
        rest = (args.workers, args.accum, args.max_bad, run.dtype, (1,))  # a view of its own, also of the same image
        second = Loader(data, run.loader.specs, args.batch_size, args.seed, run.device, *rest)
    if run.step >= run.last:  # of a run that was stopped just before it
        judge(run, judged, tables.get("judged"), meta)
    for epoch in run.epochs():
        order = rng.permutation(args.seed, epoch, len(data))
        if second:  # SCAN: the neighbours, in the order of their images
            near = partners(tables["training"], order, args.seed, epoch)
            near = second.epoch(epoch, run.step % run.epoch_steps, near)
        for step, batches in run.steps(epoch, order):
            for group in optimizer.param_groups:
                group["lr"] = rate if step >= run.warmup else rate * step / run.warmup
            sure = 0
            for batch in batches:
                x1, x2 = batch.views() if args.self_label else (*batch.views(), *next(near).views())
                first, other = net(x1, x2)
                if args.self_label:
                    loss, count = self_label_loss(first[0], other[0], args.threshold, args.balance)
                    sure, monitors = sure + count, {"sure": (sure + count) / args.batch_size}
                else:
                    loss, agreed, spread = scan_loss(first, other, args.entropy_weight)
                    monitors = {"consistency": agreed.mean(), "entropy": spread.mean() / math.log(args.clusters)}
                run.backward(loss.mean(), len(model.heads))  # SCAN: the sum over heads; the mean is shown
            if args.self_label and not sure:  # SCAN: Adam would move on by what it remembers
                optimizer.zero_grad()
                model.skipped += 1
            else:
                run.update(optimizer)
            run.log(optimizer.param_groups[0]["lr"], **monitors)
        if run.step >= run.last or (args.knn_every and run.epoch_done and (epoch + 1) % args.knn_every == 0):
            judge(run, judged, tables.get("judged"), meta)
        if run.step >= run.last:  # with the number of the head
            run.save()


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
