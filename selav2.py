"""SeLa-v2: Self-labelling (Asano et al. 2020, 1911.05371) with the recipe of SwAV (Caron et al. 2020, 2006.09882).

Banks hold the embeddings z of the first two crops of every image as the last epoch saw them. Before every epoch their
N rows get labels y, for each of H heads anew, such that all K prototypes c are used equally often: those of the plan
diag(a) P^lambda diag(b), P = softmax(z . c / T), with rows that sum to 1 and columns to N / K (Sinkhorn-Knopp), of
which only b is kept:  y = argmax_k  z . c_k / T + ln(b_k) / lambda.  During the epoch all crops v of an image, large
and small, have to predict its label, and prototypes learn too:  L = mean over h and v of  -log softmax(z_v . c / T)[y].

    torchrun --nproc_per_node=8 selav2.py --data /imagenet
    torchrun --nproc_per_node=8 selav2.py --data /imagenet --image-size 224 --crops 2
    python selav2.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0 --lr 3 \
        --color-strength 0 --crop-min 0.3

Published, ResNet-50 on ImageNet, 400 epochs at batch 4096, linear top-1 (official README): 71.8 with 2x160 + 4x96
crops, 67.2 with 2x224. Ours: not run. Views and backbone.pt are of 160 pixels; evaluate with --image-size 224.

No code has been published. Known are these crops, epochs, batch and results, and what the authors say (issue 59 of
facebookresearch/swav): DeepCluster-v2's code with labels by Sinkhorn-Knopp in place of k-means, and with prototypes
that gradients train, as SwAV's. So projector, banks, 3 heads of 3000, new labels before every epoch, T, loss and LARS
are that code's. Ours are: one label per image and lambda 25, as in SeLa; 9 iterations, which begin with smaller powers
than lambda and extrapolate, so that a few are enough; prototypes frozen for one epoch, about as long as SwAV's.

Crops come in groups: --crops 2 4 --sizes 160 96 --crop-min 0.08 0.05 --crop-max 1 0.14 is the default. --prototypes has
one number per head. Small images (32 px; our choice): --image-size 32 --arch resnet18 --batch-size 256. Short runs want
--color-strength 0.5 --crop-min 0.2 --lr 3 and 100 to 500 prototypes.
Cost at N = 1,281,167: banks of 2 x N x 128 numbers, 1.31 GB, on every GPU and in last.pt, and 31 MB of labels; before
the first epoch a forward pass of two crops; labels 3 x 10 x 0.98 TFLOP per epoch, shared by the processes and computed
in chunks: the N x K matrix never exists.

Deviations from DeepCluster-v2's code, beside the labels: banks are the same on all processes, whose number may change;
the mean of the loss is over the labelled images of the global batch (there: of each GPU), and 0 without any; batch-norm
statistics span all processes (there: 8); bf16 on CUDA (there: fp32), cosines in single precision; images of at most 64
pixels are not blurred and get a 3x3 stem. Images that the last epoch left out have no label and do not count.
To hack: copy this file. What is SeLa-v2: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from common.args import Parser, at_least, below_one, default_size, fail, image_size, positive, probability, share, width
from common.augment import View
from common.distributed import all_reduce, gather, gather_uneven, rank, world_size
from common.features import by_size, output_std
from common.log import bar
from common.networks import network
from common.optim import LARS, cosine, upcast
from common.run import Run

CHUNK = {"cpu": 2**19, "cuda": 2**26}  # scores of rows and prototypes that exist at a time while labels are found


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("SeLa-v2")
    group.add_argument(
        "--crops", type=positive(int), nargs="+", help="crops per group (default: 2 4; 2 for at most 64 pixels)"
    )
    group.add_argument(
        "--sizes", type=image_size, nargs="+", help="pixels per group (default: --image-size or 160, 3/5 of it)"
    )
    group.add_argument("--crop-min", type=share, nargs="+", help="smallest share of the image area, per group")
    group.add_argument("--crop-max", type=share, nargs="+", help="largest share of the image area, per group")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument(
        "--color-strength", type=at_least(0, float), default=1.0, help="s of the colour jitter; 0.5 on small images"
    )
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=128, help="outputs of the projector")
    group.add_argument("--hidden-dim", type=positive(int), default=2048, help="hidden layer of the projector")
    group.add_argument(
        "--prototypes", type=at_least(2), nargs="+", help="K of each head (default: 3 x 3000, or a tenth of the images)"
    )
    group.add_argument("--temperature", type=positive(float), default=0.1, help="T of the predictions")
    group.add_argument(
        "--lambd", type=positive(float, high=1e4), default=25.0, help="lambda: the larger, the more even the labels"
    )
    group.add_argument("--iterations", type=positive(int), default=9, help="of Sinkhorn-Knopp")
    group.add_argument("--freeze-steps", type=at_least(0), help="steps with fixed prototypes (default: one epoch)")
    group.add_argument("--epochs", type=positive(int), default=400)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=4096, help="images per step over all processes and --accum"
    )
    group.add_argument(
        "--lr", type=positive(float), default=0.6, help="per 256: times (batch-size/256)^0.75, 4.8 at 4096"
    )
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-6)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or (args.sizes[0] if args.sizes else min(160, default_size(args.data)))
    args.crops = args.crops or ([2, 4] if args.image_size > 64 else [2])
    groups = len(args.crops)
    args.sizes = args.sizes or [args.image_size, round(args.image_size * 3 / 5)][:groups]
    args.crop_min = args.crop_min or [0.08, 0.05][:groups]
    args.crop_max = args.crop_max or [1.0, 0.14][:groups]
    if not groups == len(args.sizes) == len(args.crop_min) == len(args.crop_max):
        parser.error(f"--sizes, --crop-min and --crop-max need {groups} values, one per group of --crops")
    if args.crops[0] < 2 or args.sizes[0] != args.image_size or min(args.sizes) < 8:
        parser.error("--crops must begin with at least 2, --sizes with --image-size; no size may be below 8")
    if any(low > high for low, high in zip(args.crop_min, args.crop_max, strict=True)):
        parser.error("no --crop-min may exceed its --crop-max")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(crops, sizes, crop_min, crop_max, flip=0.5, strength=1.0):
    """Multi-crop: groups of random crops, alike but for size and scale, with SimCLR's distortions (official code)."""
    groups = [
        View(
            size=size,
            area=(low, high),
            flip=flip,
            jitter=(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength),
            jitter_p=0.8,
            gray_p=0.2,
            blur_p=0.5 if sizes[0] > 64 else 0.0,
            blur_sigma=(0.1, 2.0),
        )
        for size, low, high in zip(sizes, crop_min, crop_max, strict=True)
    ]
    return [view for view, count in zip(groups, crops, strict=True) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------ model
class SeLaV2(nn.Module):
    """Backbone f, projector of two layers, and the prototypes c of H heads, unit vectors that are trained.

    dim, hidden_dim: outputs and hidden layer of the projector. prototypes: K of each head. images: N. rows: M <= N,
    images of whole batches. Row i of both banks is the i-th image of the last epoch, whose place in the data set is
    index[i]; labels of the H heads are those of all N images, -100 without one. Banks are the same on every process.
    """

    def __init__(self, backbone, dim=128, hidden_dim=2048, prototypes=(3000, 3000, 3000), images=0, rows=0):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim),
        )
        self.prototypes = nn.ModuleList(nn.Linear(dim, k, bias=False) for k in prototypes)
        self.register_buffer("bank", torch.zeros(2, rows, dim))
        self.register_buffer("index", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("labels", torch.full((len(prototypes), images), -100))
        self.normalize_prototypes()

    @torch.no_grad()
    def normalize_prototypes(self):
        """Back to the unit sphere; to be called after every update, which is before every forward pass."""
        for head in self.prototypes:
            head.weight.copy_(F.normalize(head.weight, dim=1))

    def forward(self, views):
        """views: V tensors (B, 3, S, S), S may differ. Returns unit embeddings z (V, B, D) and, for each head, scores
        z . c (V, B, K).

        Views of equal size pass the backbone together, all of them the projector: so far go batch-norm statistics.
        """
        z = self.projector(torch.cat(by_size(self.backbone, views)))
        with torch.autocast(z.device.type, enabled=False):  # bf16 rounds cosines by 0.002
            z = F.normalize(upcast(z), dim=1).unflatten(0, (len(views), -1))
            return z, *(head(z) for head in self.prototypes)

    @torch.no_grad()
    def store(self, place, indices, z):
        """z (2, B, D) of the first two crops and indices (B,) of the images enter the banks: those of all processes,
        which are the place-th batch of such a size in the epoch."""
        indices, z = gather(indices), gather(z.detach().transpose(0, 1)).transpose(0, 1)
        rows = slice(place * len(indices), (place + 1) * len(indices))
        self.index[rows] = indices
        self.bank[:, rows] = z

    @torch.no_grad()
    def relabel(self, temperature, lambd, iterations):
        """Labels of the banks by the present prototypes; heads take turns with the two banks."""
        for i, head in enumerate(self.prototypes):
            found = sinkhorn_labels(own_share(self.bank[i % 2]), head.weight, temperature, lambd, iterations)
            self.labels[i] = -100
            self.labels[i, self.index] = gather_uneven(found)


def own_share(rows):
    """The part of rows (N, ...), which all processes hold, that this one works on; the parts follow in rank order."""
    return rows[len(rows) * rank() // world_size() : len(rows) * (rank() + 1) // world_size()]


# ------------------------------------------------------------------------------------------------------- loss
@torch.no_grad()
def sinkhorn_labels(z, prototypes, temperature, lambd, iterations):
    """Labels (n,) of this process's rows z (n, D) under equal use of all prototypes (K, D) over all processes.

    One pass over the rows per iteration, in chunks: rows of P^p, scaled by b, are a softmax, and what its columns lack
    corrects beta = ln(b) / p. Two means to need few passes: p rises from lambda^(2 / iterations) to lambda in the first
    half, as the plan of a smaller power is soon found, and near that of the next (epsilon scaling: Schmitzer 2019);
    then corrections are extrapolated from the last two (Anderson 1965).
    """
    weight, beta, last = prototypes.T / temperature, z.new_zeros(len(prototypes)), None
    parts = z.split(max(1, CHUNK.get(z.device.type, 2**24) // len(prototypes)))
    scores, shares = z.new_empty(2, len(parts[0]), len(prototypes))  # for all chunks
    for i in range(iterations):
        p = lambd ** min(1.0, 2 * (i + 1) / iterations)
        used, bias, scaled = torch.zeros_like(beta), p * beta, p * weight
        for part in parts:
            logits = torch.addmm(bias, part, scaled, out=scores[: len(part)])
            used += torch.softmax(logits, 1, out=shares[: len(part)]).sum(0)
        used = all_reduce(used).clamp(min=1e-30)  # images per prototype
        move = step = (used.mean() / used).log() / p
        if last is not None:
            there, change = beta - last[0], move - last[1]
            step = move - (change @ move) / (change @ change).clamp(min=1e-30) * (there + change)
        last = (beta, move) if p == lambd else None
        beta = beta + step
    return torch.cat([torch.addmm(beta, part, weight).argmax(1) for part in parts])


def selav2_loss(scores, labels, temperature):
    """Cross entropy of every crop and the cluster of its image: mean over heads, crops and the labelled images.

    scores: (V, B, K) of each of H heads. labels: (H, B), -100 for an image without one, which counts for nothing; 0
    where none has one. Uniform predictions give the mean of ln K over heads.
    """
    labelled = all_reduce((labels[0] >= 0).sum().to(scores[0].dtype)).clamp(min=1) / world_size()
    total = 0
    for s, y in zip(scores, labels, strict=True):
        total = total + F.cross_entropy(s.flatten(0, 1) / temperature, y.repeat(len(s)), reduction="sum") / len(s)
    return total / (len(scores) * labelled)


# --------------------------------------------------------------------------------------------------- training
def head_sizes(prototypes, images):
    """K of each head; None becomes three times 3000, or a tenth of the images (of whole batches) of a smaller set."""
    sizes = prototypes or [max(2, min(3000, images // 10))] * 3
    if max(sizes) > images:
        remedy = f"use at most {max(2, images // 10)}, ten images per prototype" if images > 1 else "more are needed"
        fail(f"--prototypes {max(sizes)} for {images} images: {remedy}")
    return sizes


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


def first_report(model, previous=None, truth=None):
    """The report on the first head, over the images that have a label now and, with previous (N,), had one before."""
    labels = model.labels[0].cpu().numpy()
    known = labels >= 0 if previous is None else (labels >= 0) & (previous >= 0)
    rest = [None if x is None else np.asarray(x)[known] for x in (previous, truth)]
    return cluster_report(labels[known], *rest)


def main(args):
    run = Run(args)
    views = augmentation(args.crops, args.sizes, args.crop_min, args.crop_max, args.flip, args.color_strength)
    data = run.open(views)
    rows = run.epoch_steps * args.batch_size
    prototypes = head_sizes(args.prototypes, rows)
    backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(SeLaV2(backbone, args.dim, args.hidden_dim, prototypes, len(data), rows))
    peak = args.lr * (args.batch_size / 256) ** 0.75
    optimizer = LARS(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)  # all of them
    freeze = min(run.epoch_steps, run.total // 2) if args.freeze_steps is None else args.freeze_steps
    chance, shown = sum(map(math.log, prototypes)) / len(prototypes), " + ".join(map(str, prototypes))
    rule, baseline = f"{args.lr} x ({args.batch_size}/256)^0.75 = {peak:.4g}", f"loss {chance:.2f}, the mean of ln K"
    held = f"{shown}{'' if args.prototypes or prototypes[0] == 3000 else ' (a tenth of the images)'}, frozen for"
    held += f" {freeze} steps; banks of 2 x {rows:,} x {args.dim}"
    net = run.start(model, optimizer, chance=chance, lr=rule, baseline=baseline, prototypes=held)
    if max(prototypes) > rows / 10:
        run.warn("prototypes", f"fewer than ten images per prototype, --prototypes {rows // 10} would be better")

    for epoch in run.epochs():
        if run.epoch_done:  # SeLa-v2: else resumed within an epoch, with its labels
            clock, previous = time.monotonic(), model.labels[0].cpu().numpy().copy() if epoch else None
            if not run.step:  # SeLa-v2: views of an epoch that never comes, in training mode
                with torch.no_grad():
                    fill = bar(run.loader.epoch(args.epochs), "banks", run.epoch_steps * args.accum)
                    for place, batch in enumerate(fill):
                        model.store(place, batch.indices, torch.cat([net([x])[0] for x in batch.views()[:2]]))
            model.relabel(args.temperature, args.lambd, args.iterations)
            run.note(**first_report(model, previous, data.labels), seconds=round(time.monotonic() - clock, 1))
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=0.001)
            lr = peak / 16 + lr * 15 / 16 if step < run.warmup else lr  # SeLa-v2: 0.3 -> 4.8 -> 0.0048
            for group in optimizer.param_groups:
                group["lr"] = lr
            for place, batch in enumerate(batches, step % run.epoch_steps * args.accum):
                z, *scores = net(batch.views())
                labels = model.labels[:, batch.indices]
                run.backward(selav2_loss(scores, labels, args.temperature))  # SeLa-v2
                model.store(place, batch.indices, z[:2])  # SeLa-v2
            if step < freeze:  # SeLa-v2
                for head in model.prototypes:
                    head.weight.grad = None
            run.update(optimizer)
            if step >= freeze:  # SeLa-v2
                model.normalize_prototypes()
            run.log(lr, std=output_std(z[0]))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
