"""InterCLR: Delving into Inter-Image Invariance for Unsupervised Visual Representations (Xie et al., 2022, 2008.11702).

MoCo v2 (moco.py) takes only views of one image for alike. Here a bank holds the last key of each of the N images, in k
clusters that change with it as in odc.py, and the query q also has to pick a member p of its image's cluster among M
negatives n: any of the P images of other clusters that are most similar to q, out of all N (semi-hard negatives). A
margin m below 0 asks for less than that, as clusters are not always right:
L = (1 - w) L_MoCo + w L_inter,  L_inter = -log [ exp((q.p - m) / T) / (exp((q.p - m) / T) + sum_n exp(q.n / T)) ].

    torchrun --nproc_per_node=8 interclr.py --data /imagenet
    python interclr.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, 200 epochs, in MMSelfSup 0.11 (by the authors): linear top-1 68.04, MoCo v2 67.58;
linear SVM on VOC07 85.24 mAP, MoCo v2 84.04. Ours: not run.

Small images (our choice): --image-size 32 --arch resnet18 --weight-decay 5e-4 --queue 4096. With --key-momentum 0.99
clusters held images of the same time, not kind, as keys drifted: of a step's images, all "changed" theirs (in the log).

Deviations, where the paper leaves it open from MMSelfSup 0.11: those of moco.py, and of odc.py in epochs and clusters;
the own cluster is no part of the pool, and may be larger than it; all M negatives of a query differ, and one random
order per step picks them for all queries.
To hack: copy this file. What is InterCLR: the sections model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, number, positive, probability, share, width
from common.augment import View, to_device
from common.batchnorm import average_statistics, batch_norm_groups, split_batch_norm
from common.distributed import gather, gather_uneven, process_mean, rank, world_size
from common.features import extract, output_std
from common.kmeans import kmeans
from common.networks import network
from common.optim import cosine, upcast
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("InterCLR")
    group.add_argument("--crop-min", type=share, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=128, help="outputs of the head")
    group.add_argument("--temperature", type=positive(float), default=0.2, help="T")
    group.add_argument("--inter", type=probability, default=0.25, help="w, weight of the inter-image loss")
    group.add_argument("--intra-epochs", type=at_least(0), default=0, help="epochs with w = 0 at the start")
    group.add_argument("--margin", type=number(float, above=-1, high=1), default=-0.5, help="m, of L_inter")
    group.add_argument("--negatives", type=positive(int), help="M (default: 16384, or four fifths of a small pool)")
    group.add_argument("--pool", type=positive(int), help="P (default: a tenth of the images)")
    group.add_argument("--clusters", type=at_least(2), help="k (default: 10000, or a hundredth of the images)")
    group.add_argument("--min-cluster", type=at_least(0), default=20, help="smaller clusters are dissolved (0: never)")
    group.add_argument("--centroid-every", type=positive(int), default=10, help="steps between new centroids")
    group.add_argument("--queue", type=positive(int), help="number of keys, K (default: 65536, less for fewer images)")
    group.add_argument("--key-momentum", type=number(float, 0, 1), default=0.999, help="m of the key network")
    group.add_argument("--bn-splits", type=positive(int), help="batch-norm groups of a batch (default: 8 or near it)")
    group.add_argument("--epochs", type=positive(int), default=200)
    group.add_argument("--warmup-epochs", type=at_least(0), default=0)
    group.add_argument("--batch-size", type=positive(int), default=256, help="per step over all processes and --accum")
    group.add_argument("--lr", type=positive(float), default=0.03, help="per 256 images: times batch-size / 256")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """Both views alike: that of MoCo v2."""
    jitter, blur = (0.4, 0.4, 0.4, 0.1), 0.5 if size > 64 else 0.0
    return 2 * [View(size=size, area=(crop_min, 1.0), flip=flip, jitter=jitter, jitter_p=0.8, gray_p=0.2, blur_p=blur)]


# ------------------------------------------------------------------------------------------------------ model
def key_order(seed, step, part, batch):
    """Order of the keys of the batch of all processes, (batch,): a permutation that is the same on each of them."""
    rows = range(part * batch, (part + 1) * batch)
    return torch.from_numpy(rng.uniforms(seed, step, rows, rng.SCRIPT, 1)[:, 0]).argsort()


class InterCLR(nn.Module):
    """Query network, key network of the same kind (the target), the queue, and the bank with its clusters.

    dim: outputs of the head, queue: K; splits: batch-norm groups of this process. Row i of features, labels: image i.
    """

    def __init__(self, backbone, images, clusters, dim=128, queue=65536, splits=1):
        super().__init__()
        self.backbone, self.dim, width = backbone, dim, backbone.dim
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
        split_batch_norm(self, splits)
        self.reset_target()
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("oldest", torch.tensor(0))  # row of the queue that the next key replaces
        self.register_buffer("features", torch.zeros(images, dim))
        self.register_buffer("labels", torch.zeros(images, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(clusters, dim))

    def reset_target(self):
        """Makes the target a copy of the online network as it is now, without gradient."""
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum):
        """target <- momentum * target + (1 - momentum) * online, for parameters; batch-norm statistics are its own."""
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys):
        """Replaces the oldest keys by `keys` (N, D), in place. Neither N nor K has to divide the other."""
        size, n = len(self.queue), len(keys)
        rows = torch.arange(max(0, n - size), n, device=keys.device)  # of more than K, the last K stay
        self.queue[(self.oldest + rows) % size] = keys[-size:]
        self.oldest.add_(n).remainder_(size)  # stays on the device: reading it would wait for the step

    def forward(self, x1, x2=None, order=None):
        """x1, x2: views (B, 3, S, S), order: key_order of the W B images of all processes. Returns queries of x1 and
        keys of x2, (B, D) each, and the keys of all processes (W B, D), of length 1; of x1 alone its queries."""
        q = F.normalize(upcast(self.projector(self.backbone(x1))), dim=1)
        if x2 is None:
            return q
        with torch.no_grad():
            x2 = gather(x2)[order.chunk(world_size())[rank()]].contiguous(memory_format=torch.channels_last)
            keys = gather(self.target_projector(self.target_backbone(x2)))[order.argsort()]
            keys = F.normalize(upcast(keys), dim=1)
        return q, keys.chunk(world_size())[rank()], keys

    @torch.no_grad()
    def start(self, queries, seed):
        """k-means of queries (n, D), the rows of this process, fills the bank, its clusters and centroids."""
        found = kmeans(queries, len(self.centroids), seed=seed)
        self.features.copy_(gather_uneven(queries))
        self.labels.copy_(gather_uneven(found.assignments))
        self.centroids.copy_(found.centroids)

    def members(self, indices, u):
        """A random member of the cluster of each of these images, which it may be itself. u: uniforms (B,)."""
        by_cluster, sizes, cluster = self.labels.argsort(stable=True), self.sizes(), self.labels[indices]
        return by_cluster[(sizes.cumsum(0) - sizes)[cluster] + (u * sizes[cluster]).long()]

    @torch.no_grad()
    def update(self, indices, keys):
        """Keys (B, D) of all processes replace those of these images (B,), whose clusters become those of the closest
        centroids by dot product; all write what one has computed. Returns the share of images that change theirs."""
        labels, before = gather((own_share(keys) @ self.centroids.T).argmax(1)), self.labels[indices]
        self.features[indices], self.labels[indices] = keys, labels
        return (labels != before).double().mean()

    def sizes(self):
        """Images in each cluster (k,). Unlike bincount, this does not wait for the device."""
        return self.labels.new_zeros(len(self.centroids)).scatter_add_(0, self.labels, torch.ones_like(self.labels))

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


# ------------------------------------------------------------------------------------------------------- loss
def info_nce(q, k, negatives, temperature, margin=0.0, same=None, pool=None, count=None, order=None):
    """Cross entropy of picking k among itself and the negatives, its cosine less the margin; mean over the batch; no
    gradient into keys. Without the arguments after the margin it is MoCo's loss.

    q, k: (B, D), negatives: (S, D), of length 1. same: (B, S), which of them are none; of the others the `pool` most
    similar to q, and of these the `count` with the largest `order` (S,), or all there are. All equal gives
    ln(1 + count e^(margin / T)). The gradient of log sum exp(q.k / T) is computed right here: it frees the logits.
    """
    with torch.no_grad():
        logits = (q @ negatives.T).div_(temperature)
        if same is not None:
            found, where = logits.masked_fill_(same, -torch.inf).topk(pool, sorted=False)
            chosen = order[where].masked_fill_(found.isinf(), -1).topk(count, sorted=False).indices
            logits.fill_(-torch.inf).scatter_(1, where.gather(1, chosen), found.gather(1, chosen))
        top = logits.amax(1, keepdim=True).clamp(min=-1 / temperature)  # finite also without any: the loss is 0 then
        weights = logits.sub_(top).exp_()
        total = weights.sum(1, keepdim=True)
        slope = weights @ negatives / (total.clamp(min=1) * temperature)
    negative = (top + total.log())[:, 0] + ((q - q.detach()) * slope).sum(1)  # adds 0, whose gradient is the slope
    positive = ((q * k.detach()).sum(1) - margin) / temperature
    return -F.logsigmoid(positive - negative).mean()


def inter_nce(q, indices, members, model, temperature, margin, *wanted, most=2**26):
    """L_inter of queries (B, D) of these images, at most `most` logits at a time. wanted: pool, count and order."""
    total, bank, labels = 0.0, model.features, model.labels
    for a, i, p in zip(*(x.split(max(1, most // len(bank))) for x in (q, indices, members)), strict=True):
        total += len(a) / len(q) * info_nce(a, bank[p], bank, temperature, margin, labels[i, None] == labels, *wanted)
    return total


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    size = args.batch_size // args.accum  # images of a micro-batch, over all processes
    groups = batch_norm_groups(args.bn_splits, size)
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip))
    queue, reason = args.queue or 65536, ""
    if not args.queue and len(data) < queue:  # MoCo: it would hold old keys of the query's own image; 1/8 epoch is safe
        queue = max(args.batch_size, 2 ** int(math.log2(1 + len(data) / 8)))
        reason = f": the usual 65,536 are more than {len(data):,} images"
    if queue < args.batch_size:
        fail(f"--queue {queue} cannot hold the keys of a step: use at least --batch-size, {args.batch_size}")
    n, pool = len(data), args.pool or max(1, len(data) // 10)
    clusters = args.clusters or max(2, min(10000, n // 100))
    if clusters * max(1, args.min_cluster) > n:  # else the largest cluster is never a small one
        fail(f"--clusters {clusters} of --min-cluster {args.min_cluster} are too many for {n} images: lower one")
    negatives = args.negatives or min(16384, max(1, pool * 4 // 5))
    if not negatives <= pool <= n:
        fail(f"--negatives {negatives} of a --pool of {pool} of {n} images: each must be at most the next")
    backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(InterCLR(backbone, n, clusters, args.dim, queue, groups // world_size()), sync=False)  # groups
    if args.init:
        model.reset_target()  # MoCo
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    inter = math.log(1 + negatives * math.exp(args.margin / args.temperature))
    chance = (1 - args.inter) * math.log(queue + 1) + args.inter * inter
    lines = {"baseline": f"loss {1 - args.inter:g} ln({queue + 1}) + {args.inter:g} x {inter:.2f} = {chance:.2f}"}
    lines |= {"queue": f"{queue:,} keys{reason}", "batch norm": f"{groups} groups of {size // groups} images"}
    lines |= {"clusters": clusters, "negatives": f"{negatives:,} of the {pool:,} most similar of {n:,} images"}
    net = run.start(model, optimizer, chance=chance, lr=f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", **lines)

    if not run.resumed:  # InterCLR
        queries, _ = extract(model, data, run.view, run.device, args.workers, amp=run.amp, everywhere=False)
        model.start(queries.to(run.dtype), *rng.seeds(args.seed, 0, 1))

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(args.key_momentum)  # MoCo: once per step, before its keys
            weight = args.inter if epoch >= args.intra_epochs else 0.0  # InterCLR
            generator = torch.Generator(run.device).manual_seed(*rng.seeds(args.seed, step + 1, 1, rng.SCRIPT + 2))
            wanted = (pool, negatives, torch.randperm(n, generator=generator, device=run.device))
            keys, indices = [], []
            for batch in batches:
                x1, x2 = batch.views()
                order = to_device(key_order(args.seed, step + 1, len(keys), size), run.device)
                q, k, new = net(x1, x2, order)
                member = model.members(batch.indices, batch.uniforms(1, rng.SCRIPT + 1)[:, 0])  # InterCLR
                inter = inter_nce(q, batch.indices, member, model, args.temperature, args.margin, *wanted)
                run.backward((1 - weight) * info_nce(q, k, model.queue, args.temperature) + weight * inter)
                keys.append(new)
                indices.append(gather(batch.indices))
            run.update(optimizer)
            model.enqueue(torch.cat(keys))  # MoCo: once the losses of the step have used the queue
            changed = model.update(torch.cat(indices), torch.cat(keys))  # InterCLR
            if (step + 1) % args.centroid_every == 0:
                model.recentre()
                if model.refill(args.min_cluster):
                    model.recentre()
            if run.due:
                average_statistics(model)  # MoCo
            run.log(lr, std=output_std(q), inter=inter.detach(), changed=changed, largest=model.sizes().max() / n)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
