"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al., CVPR 2020, arXiv 1911.05722),
by default in its second version, MoCo v2 (Chen et al. 2020, arXiv 2003.04297); --v1 gives the first.

The query q of one view has to pick the key k+ of the other view among K keys of earlier batches, which are kept in a
queue. Keys come from a second network, a moving average of the first, w_k <- m w_k + (1 - m) w_q, which receives no
gradient:  L = -log [ exp(q.k+ / T) / (exp(q.k+ / T) + sum_{k in queue} exp(q.k / T)) ],  q and k of length 1.

    torchrun --nproc_per_node=8 moco.py --data /imagenet
    python moco.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, batch 256, linear top-1 (official README): v1 60.8 +- 0.2 after 200 epochs; v2
67.5 +- 0.1 after 200, 71.1 after 800. v2, 200 epochs in MMSelfSup 0.11: 67.58. Ours: not run.

Small images (official CIFAR-10 notebook; 82.6 after 200 epochs, 85.3 with --symmetric, by k-NN on the outputs of the
head, not of the backbone): --image-size 32 --arch resnet18 --batch-size 512 --weight-decay 5e-4 --crop-min 0.08 --head
linear --temperature 0.1 --queue 4096 --key-momentum 0.99.

Shuffled batch norm: outputs of images that are normalised together depend on each other. The common statistics of a
query and its key in one group would give the pair away, and the loss would fall with nothing learned. So queries are
normalised in groups of consecutive images, keys in groups of a random order across processes. In the paper each of 8
GPUs is a group; here --bn-splits divides the batch of all processes: one process emulates eight, and any number of
processes that divides it gives the same result; 16 processes are 16 groups.

Deviations from the paper: the learning rate follows its schedule per step, not per epoch; running statistics are the
mean over all groups, not those of one GPU; bf16 on CUDA (--precision fp32 is the paper's); with --accum each
micro-batch is grouped and shuffled within itself, and all keys enter the queue at the end of the step; images of at
most 64 pixels are not blurred and get a 3x3 stem.
To hack: copy this file. What is MoCo: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, number, positive, probability, share, toggle, width
from common.augment import View, to_device
from common.batchnorm import average_statistics, batch_norm_groups, split_batch_norm
from common.distributed import gather, rank, world_size
from common.features import output_std
from common.networks import network
from common.optim import cosine, upcast
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("MoCo")
    group.add_argument("--crop-min", type=share, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--v1", action=toggle, default=False, help="MoCo v1: head, augmentation, temperature, schedule")
    group.add_argument("--dim", type=positive(int), default=128, help="outputs of the head")
    group.add_argument("--head", choices=["mlp", "linear"], help="two layers or one (default: mlp, with --v1 linear)")
    group.add_argument("--temperature", type=positive(float), help="T (default: 0.2, with --v1 0.07)")
    group.add_argument("--queue", type=positive(int), help="number of keys, K (default: 65536, less for fewer images)")
    group.add_argument("--key-momentum", type=number(float, 0, 1), default=0.999, help="m of the key network")
    group.add_argument("--symmetric", action=toggle, default=False, help="each view is the query once; sum of losses")
    group.add_argument("--bn-splits", type=positive(int), help="batch-norm groups of a batch (default: 8 or near it)")
    group.add_argument("--epochs", type=positive(int), default=200)
    group.add_argument("--warmup-epochs", type=at_least(0), default=0)
    group.add_argument(
        "--batch-size", type=positive(int), default=256, help="images per step over all processes and --accum"
    )
    group.add_argument(
        "--lr", type=positive(float), default=0.03, help="per 256 images: multiplied by batch-size / 256"
    )
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-4)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.head = args.head or ("linear" if args.v1 else "mlp")
    args.temperature = args.temperature or (0.07 if args.v1 else 0.2)
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5, v1=False):
    """Both views alike. v1 (technical details of its paper): grey before a stronger jitter, and no blur."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
        flip=flip,
        jitter=(0.4, 0.4, 0.4, 0.4 if v1 else 0.1),
        jitter_p=1.0 if v1 else 0.8,
        gray_p=0.2,
        gray_first=v1,
        blur_p=0.5 if size > 64 and not v1 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    return [view, view]


# ------------------------------------------------------------------------------------------------------ model
def key_order(seed, step, part, batch):
    """Order of the keys of the batch of all processes, (batch,): a permutation that is the same on each of them."""
    rows = range(part * batch, (part + 1) * batch)
    return torch.from_numpy(rng.uniforms(seed, step, rows, rng.SCRIPT, 1)[:, 0]).argsort()


class MoCo(nn.Module):
    """Query network, key network of the same kind (the target), and the queue (section 3.2).

    dim: outputs of the head, queue: K, mlp: two layers as in v2, or one; splits: batch-norm groups of this process.
    """

    def __init__(self, backbone, dim=128, queue=65536, mlp=True, splits=1):
        super().__init__()
        self.backbone = backbone
        hidden = [nn.Linear(backbone.dim, backbone.dim), nn.ReLU(inplace=True)] if mlp else []
        self.projector = nn.Sequential(*hidden, nn.Linear(backbone.dim, dim))
        split_batch_norm(self, splits)
        self.reset_target()
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("oldest", torch.tensor(0))  # row of the queue that the next key replaces

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

    def forward(self, x1, x2, order):
        """x1, x2: views (B, 3, S, S), order: key_order of the W B images of all processes. Returns queries of x1 and
        keys of x2, (B, D) each, and the keys of all processes (W B, D), of length 1."""
        q = self.projector(self.backbone(x1))
        with torch.no_grad():
            x2 = gather(x2)[order.chunk(world_size())[rank()]].contiguous(memory_format=torch.channels_last)
            keys = gather(self.target_projector(self.target_backbone(x2)))[order.argsort()]
            keys = F.normalize(upcast(keys), dim=1)
        return F.normalize(upcast(q), dim=1), keys.chunk(world_size())[rank()], keys


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


# --------------------------------------------------------------------------------------------------- training
def staircase(step, total, warmup=0):
    """v1's factor of the learning rate: times 0.1 at 60 and again at 80 % of the steps (epochs 120 and 160 of 200)."""
    return step / warmup if step < warmup else 0.1 ** sum(10 * step >= tenths * total for tenths in (6, 8))


def main(args):
    run = Run(args)
    size = args.batch_size // args.accum  # images of a micro-batch, over all processes
    groups = batch_norm_groups(args.bn_splits, size)
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip, args.v1))
    queue, reason = args.queue or 65536, ""
    if not args.queue and len(data) < queue:  # MoCo: it would hold old keys of the query's own image; 1/8 epoch is safe
        queue = max(args.batch_size, 2 ** int(math.log2(1 + len(data) / 8)))
        reason = f": the usual 65,536 are more than {len(data):,} images"
    backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    model = MoCo(backbone, args.dim, queue, args.head == "mlp", groups // world_size())
    model = run.place(model, sync=False)  # MoCo: batch norm by groups
    if args.init:
        model.reset_target()  # MoCo: the target starts as a copy
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    chance = (1 + args.symmetric) * math.log(queue + 1)
    lines = {"baseline": f"loss {'2 ' if args.symmetric else ''}ln({queue + 1}) = {chance:.2f}"}
    lines |= {"queue": f"{queue:,} keys{reason}", "batch norm": f"{groups} groups of {size // groups} images"}
    net = run.start(model, optimizer, chance=chance, lr=rule, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * (staircase if args.v1 else cosine)(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(args.key_momentum)  # MoCo: once per step, before its keys
            keys = []
            for batch in batches:
                x1, x2 = batch.views()
                loss = 0.0
                for xq, xk in [(x1, x2), (x2, x1)][: 1 + args.symmetric]:  # MoCo
                    order = to_device(key_order(args.seed, step + 1, len(keys), size), run.device)
                    q, k, new = net(xq, xk, order)
                    loss = loss + info_nce(q, k, model.queue, args.temperature)
                    keys.append(new)
                run.backward(loss)
            run.update(optimizer)
            model.enqueue(torch.cat(keys))  # MoCo: once the losses of the step have used the queue
            if run.due:
                average_statistics(model)  # MoCo
            run.log(lr, std=output_std(q))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
