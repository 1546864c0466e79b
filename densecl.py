"""DenseCL: Dense Contrastive Learning for Self-Supervised Visual Pre-Training (Wang et al., CVPR 2021, 2011.09157).

MoCo v2 (moco.py), and the same once more for each cell of the backbone's last map, so that features tell places apart,
not only images. A second head keeps the map. Each cell r_s of the query's map has to pick, among K keys of earlier
batches, the cell t_c(s) of the other view's map that the backbone finds most similar: c(s) = argmax_j cos(f_s, f'_j).
L = (1 - lambda) L_MoCo + lambda mean_s -log [ exp(r_s.t_c(s) / T) / (exp(r_s.t_c(s) / T) + sum_t exp(r_s.t / T)) ],
f, f' being the backbone's maps of the two views, r and t of length 1; a key t of the second queue is a mean over a map.

    torchrun --nproc_per_node=8 densecl.py --data /imagenet
    python densecl.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50, 200 epochs on ImageNet: VOC detection AP 58.7, MoCo v2 57.0; VOC segmentation mIoU 69.4 and 67.5
(official README). Such tasks are its aim: linear top-1 is 63.34, MoCo v2's 67.58 (MMSelfSup 0.11). Ours: not run.

Small images (our choice): --image-size 32 --arch resnet18 --weight-decay 5e-4 --queue 4096 --key-momentum 0.99. Most
of the 4 x 4 cells come to match the same place of the other view there, which padding gives away (results/README.md).

In the log, "agree" is the share of matches that are right: c(s) holds the point of the image in which cell s has its
centre, where the other view shows that point. "chance" is the same with the matches of another image, which can only
know that views overlap rather in equal places. matches_start.png and matches_end.png show matches.

Deviations from the paper: those of moco.py (schedules by steps, mean running statistics, groups per micro-batch, small
images); lambda is 0.5 from the first step, as in the official configurations, not 0 at first (--lambd-warmup); heads
start as PyTorch's layers do (MMSelfSup 0.11), not by Kaiming's rule.
To hack: copy this file. What is DenseCL: the sections model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import math
import sys

import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torch import nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from common import rng
from common.args import Parser, at_least, below_one, default_size, fail, number, positive, probability, share, width
from common.augment import View, to_device
from common.batchnorm import average_statistics, batch_norm_groups, split_batch_norm
from common.distributed import gather, is_main, rank, world_size
from common.features import output_std
from common.optim import cosine, upcast
from common.pictures import save_captioned, shown
from common.resnet import resnet
from common.run import Run

CHUNK = 2**24  # logits that exist at a time


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("DenseCL")
    group.add_argument("--crop-min", type=share, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=128, help="outputs of the heads")
    group.add_argument("--temperature", type=positive(float), default=0.2, help="T")
    group.add_argument("--lambd", type=probability, default=0.5, help="lambda, weight of the dense loss")
    group.add_argument("--lambd-warmup", type=at_least(0), default=0, help="steps with lambda = 0 at the start")
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
    view = View(
        size=size,
        area=(crop_min, 1.0),
        flip=flip,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    return [view, view]


# ------------------------------------------------------------------------------------------------------ model
def key_order(seed, step, part, batch):
    """Order of the keys of the batch of all processes, (batch,): a permutation that is the same on each of them."""
    rows = range(part * batch, (part + 1) * batch)
    return torch.from_numpy(rng.uniforms(seed, step, rows, rng.SCRIPT, 1)[:, 0]).argsort()


class Heads(nn.Module):
    """Two outputs of the last map (B, C, H, W): that of MoCo v2 (B, D), and one for each cell, (B, D, H W)."""

    def __init__(self, width, dim):
        super().__init__()
        self.pooled = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
        self.dense = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, dim, 1))

    def forward(self, x):
        return self.pooled(x.mean((2, 3))), self.dense(x).flatten(2)


class DenseCL(nn.Module):
    """Query network with two heads, key network of the same kind (the target), and two queues (section 3.2).

    dim: outputs of the heads, queue: K; splits: batch-norm groups of this process.
    """

    def __init__(self, backbone, dim=128, queue=65536, splits=1):
        super().__init__()
        self.backbone = backbone
        self.projector = Heads(backbone.dim, dim)
        split_batch_norm(self, splits)
        self.reset_target()
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("dense_queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("oldest", torch.tensor(0))  # row of both queues that the next keys replace

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
    def enqueue(self, keys, dense_keys):
        """Replaces the oldest keys by these, (N, D) each, in place. Neither N nor K has to divide the other."""
        size, n = len(self.queue), len(keys)
        rows = torch.arange(max(0, n - size), n, device=keys.device)  # of more than K, the last K stay
        self.queue[(self.oldest + rows) % size] = keys[-size:]
        self.dense_queue[(self.oldest + rows) % size] = dense_keys[-size:]
        self.oldest.add_(n).remainder_(size)  # stays on the device: reading it would wait for the step

    def forward(self, x1, x2, order):
        """x1, x2: views (B, 3, S, S), order: key_order of the W B images of all processes. Returns of x1 the queries
        (B, D) and (B, D, cells) and the backbone's map (B, C, cells); the same of x2; and the keys of all processes for
        both queues, (W B, D) each. All but the maps have length 1."""
        map_q = self.backbone.stages(x1)[-1]
        q, dense_q = self.projector(map_q)
        with torch.no_grad():
            x2 = gather(x2)[order.chunk(world_size())[rank()]].contiguous(memory_format=torch.channels_last)
            map_k = self.target_backbone.stages(x2)[-1]
            k, dense_k = self.target_projector(map_k)
            back = order.argsort()
            own = back.chunk(world_size())[rank()]
            keys, dense_keys = unit(gather(k)[back]), unit(gather(dense_k.mean(2))[back])
            k, dense_k, map_k = keys.chunk(world_size())[rank()], unit(gather(dense_k)[own]), gather(map_k)[own]
        return unit(q), unit(dense_q), map_q.detach().flatten(2), k, dense_k, map_k.flatten(2), keys, dense_keys


def unit(x):
    return F.normalize(upcast(x), dim=1)


# ------------------------------------------------------------------------------------------------------- loss
def info_nce(q, k, queue, temperature):
    """Cross entropy of picking k among itself and the queue (equation 1), mean over the batch; no gradient into keys.

    q, k: (B, D), queue: (K, D), all of length 1. All equal gives ln(1 + K). Only one (B, K) array is made, used in
    place and freed: the gradient of log sum exp(q.k / T) costs one more product with it, so it is computed right here.
    """
    with torch.no_grad():
        logits = (q @ queue.T).div_(temperature)
        top = logits.amax(1, keepdim=True)
        weights = logits.sub_(top).exp_()
        total = weights.sum(1, keepdim=True)
        slope = weights @ queue / (total * temperature)
    negative = (top + total.log())[:, 0] + ((q - q.detach()) * slope).sum(1)  # adds 0, whose gradient is the slope
    positive = (q * k.detach()).sum(1) / temperature
    return -F.logsigmoid(positive - negative).mean()


@torch.no_grad()
def matches(backbone_q, backbone_k):
    """c: the cell of the key's map with the largest cosine to each cell of the query's. (B, C, cells) -> (B, cells)."""
    return (backbone_q.transpose(1, 2) @ F.normalize(backbone_k, dim=1)).argmax(2)  # lengths of queries do not matter


def dense_info_nce(q, k, backbone_q, backbone_k, queue, temperature):
    """`info_nce` of each cell of q and the cell of k that matches it, mean over all cells; gradient into q only.

    q, k: (B, D, cells) and queue: (K, D), of length 1; backbone_q, backbone_k: (B, C, cells). All equal gives
    ln(1 + K). Instead of an array (B cells, K), there are parts of it, one at a time.
    """
    match = matches(backbone_q, backbone_k)
    k = k.detach().gather(2, match[:, None].expand(-1, k.shape[1], -1))
    rows = max(1, CHUNK // len(queue))
    parts = zip(*(x.transpose(1, 2).flatten(0, 1).split(rows) for x in (q, k)), strict=True)
    return sum(len(a) * info_nce(a, b, queue, temperature) for a, b in parts) / match.numel()


def true_matches(boxes_q, boxes_k, side):
    """The cell of the key's view in which the centre of each cell of the query's view lies, -1 if it is not in view.

    boxes_q, boxes_k: (B, 7) as from `batch.boxes`, for maps of side x side cells. Returns (B, side^2).
    """
    centre = (torch.arange(side, dtype=boxes_q.dtype, device=boxes_q.device) + 0.5) / side
    where = []
    for axis in (0, 1):  # down, and across, where views may be mirrored
        (start, extent, mirrored), (start_k, extent_k, mirrored_k) = (
            (boxes[:, [axis]], boxes[:, [axis + 2]], axis * boxes[:, 6:] > 0) for boxes in (boxes_q, boxes_k)
        )
        x = (start + torch.where(mirrored, 1 - centre, centre) * extent - start_k) / extent_k
        where.append((torch.where(mirrored_k, 1 - x, x) * side).floor().long())
    y, x = where[0][:, :, None], where[1][:, None]
    return torch.where((y >= 0) & (y < side) & (x >= 0) & (x < side), y * side + x, -1).flatten(1)


def save_matches(path, views, match, true, spec, count=4, size=224, gap=32):
    """PNG: both views of the first images side by side, and a line from each cell to its match, right ones on top."""
    if not is_main():
        return
    pairs = torch.stack([shown(x[:count], spec) for x in views], 1).flatten(0, 1)
    picture = to_pil_image(make_grid(F.interpolate(pairs, size), nrow=2, padding=gap, pad_value=1.0))
    side, lines = math.isqrt(match.shape[1]), []
    for i, (found, right) in enumerate(zip(match[:count].tolist(), true[:count].tolist(), strict=True)):
        for a, b in enumerate(found):  # ends lie at different heights of their cells: no line hides another
            ends = [((c % side + 0.5) * size / side, (c + 0.5) * size / side**2) for c in (a, b)]
            ends = [(gap + x + v * (size + gap), gap + y + i * (size + gap)) for v, (x, y) in enumerate(ends)]
            lines.append((0 if right[a] < 0 else 2 if right[a] == b else 1, ends))
    for kind, ends in sorted(lines):
        ImageDraw.Draw(picture).line(ends, ("gray", "red", "lime")[kind], 2)
    text = "Each cell of view 1 and what it is matched with. Green: right, red: wrong, grey: not in view 2."
    save_captioned(path, picture, ["view 1", "view 2"], text)


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
    backbone = resnet(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(DenseCL(backbone, args.dim, queue, groups // world_size()), sync=False)  # batch norm by groups
    if args.init:
        model.reset_target()  # MoCo
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    lines = {"baseline": f"loss ln({queue + 1}) = {math.log(queue + 1):.2f}"}
    lines |= {"queue": f"{queue:,} keys{reason}", "batch norm": f"{groups} groups of {size // groups} images"}
    net = run.start(model, optimizer, chance=math.log(queue + 1), lr=rule, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(args.key_momentum)  # MoCo: once per step, before its keys
            lambd = args.lambd if step >= args.lambd_warmup else 0.0  # DenseCL
            keys = []
            for batch in batches:
                x1, x2 = batch.views()
                order = to_device(key_order(args.seed, step + 1, len(keys), size), run.device)
                q, dense_q, map_q, k, dense_k, map_k, *new = net(x1, x2, order)
                dense = dense_info_nce(dense_q, dense_k, map_q, map_k, model.dense_queue, args.temperature)  # DenseCL
                run.backward((1 - lambd) * info_nce(q, k, model.queue, args.temperature) + lambd * dense)
                keys.append(new)
            run.update(optimizer)
            model.enqueue(*map(torch.cat, zip(*keys, strict=True)))  # MoCo: once the losses have used the queues
            shares = [None, None]
            if run.due or step == 0:
                average_statistics(model)  # MoCo
                match, side = matches(map_q, map_k), math.isqrt(map_q.shape[2])  # DenseCL
                true = true_matches(batch.boxes(0), batch.boxes(1), side)
                shares = [(m == true).sum() / (true >= 0).sum().clamp(min=1) for m in (match, match.roll(1, 0))]
                if step in (0, run.last - 1):
                    path = f"{args.out}/matches_{'end' if step else 'start'}.png"
                    save_matches(path, (x1, x2), match, true, batch.specs[0])
            run.log(lr, std=output_std(q), agree=shares[0], chance=shares[1])


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
