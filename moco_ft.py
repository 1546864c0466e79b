"""MoCo with feature transformation: Improving Contrastive Learning by Visualizing Feature Transformation (Zhu et al.,
ICCV 2021, arXiv 2108.02982).

MoCo, whose pairs are made harder and whose negatives more diverse by moving features, not images. For a query q, its
key k and the queue, all of length 1, with lam_p = 1 + Beta(a, a) and lam_n ~ Beta(b, b), one draw per step:
positive extrapolation  q' = lam_p q + (1 - lam_p) k,  k' = lam_p k + (1 - lam_p) q,  so that with s = q.k
                        q'.k' = s + 2 lam_p (lam_p - 1) (s - 1) <= s;
negative interpolation  n' = lam_n n + (1 - lam_n) n_perm,  n_perm the queue in a random order.
L = -log [ exp(q'.k' / T) / (exp(q'.k' / T) + sum_n exp(q'.n' / T)) ]: the gradient reaches q also through k'. None of
the new vectors is brought to length 1, and the queue keeps keys as they were.

    torchrun --nproc_per_node=8 moco_ft.py --data /imagenet
    python moco_ft.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, 200 epochs, linear top-1 (official README): MoCo v1 60.6, with feature transformation
61.9; v2 67.5 and 69.6. Ours: not run. The paper looks at scores, and so does this file: `pos` and `neg` are the mean
cosines of a step's pairs and of its queries with the queue, `pos_ft` and `neg_ft` those products after the
transformation, and scores.png in the run folder shows their histograms (--pictures-every).

Deviations from the official code: one draw for all processes (there each has its own); the moving average is taken
before the keys of a step, not after it; the rate follows its schedule per step, not per epoch; more than 256 images per
step are not warmed up by default; keys are shuffled across all processes, not within a node; --v1 turns images grey
before the colour jitter, as in MoCo's code, not after it; and what moco.py says of batch norm, --bn-splits, --accum and
small images holds here.
To hack: copy this file. What is feature transformation: feature_transform, ft_loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, number, positive, probability, share, toggle, width
from common.augment import View, to_device
from common.batchnorm import average_statistics, batch_norm_groups, split_batch_norm
from common.distributed import gather, is_main, rank, world_size
from common.features import output_std
from common.files import atomic
from common.networks import network
from common.optim import cosine, upcast
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("MoCo FT")
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
    text = "a of lam_p = 1 + Beta(a, a), the extrapolation of pairs (0: none)"
    group.add_argument("--pos-alpha", type=at_least(0, float), default=2.0, help=text)
    text = "b of lam_n ~ Beta(b, b), the interpolation of negatives (0: none)"
    group.add_argument("--neg-alpha", type=at_least(0, float), default=1.6, help=text)
    group.add_argument("--ft-epoch", type=at_least(0), default=0, help="epochs of plain MoCo at the start")
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
    group = parser.add_argument_group("pictures", recipe=False)
    group.add_argument("--pictures-every", type=at_least(0), default=1, help="epochs between scores.png (0: never)")
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


class MoCoFT(nn.Module):
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
def draw_lambdas(seed, step, pos_alpha, neg_alpha, queue):
    """lam_p, lam_n and an order of the queue (K,) for a step, the same on every process. An alpha of 0: lambda 1."""
    generator = np.random.Generator(np.random.Philox(key=[seed, rng.MIXING + step]))
    lam_p = 1 + (generator.beta(pos_alpha, pos_alpha) if pos_alpha else 0.0)
    lam_n = generator.beta(neg_alpha, neg_alpha) if neg_alpha else 1.0
    return lam_p, lam_n, torch.from_numpy(generator.permutation(queue))


def feature_transform(q, k, queue, lam_p, lam_n, order):
    """Positive extrapolation and negative interpolation (equations 4 and 6): (B, D), (B, D), (K, D) as they came.

    No gradient into k and the queue; lam_p and lam_n of 1 change nothing.
    """
    k = k.detach()
    mixed = queue if lam_n == 1 else torch.lerp(queue[order], queue, lam_n)
    return lam_p * q + (1 - lam_p) * k, lam_p * k + (1 - lam_p) * q, mixed


def ft_loss(q, k, queue, temperature):
    """Cross entropy of picking k among itself and the queue, mean over the batch; gradient into q and k.

    q, k: (B, D), queue: (K, D). All equal and of length 1 gives ln(1 + K). Only one (B, K) array is made, used in place
    and freed: the gradient of log sum exp(q.k / T) costs one more product with it, so it is computed right here.
    """
    with torch.no_grad():
        logits = (q @ queue.T).div_(temperature)
        top = logits.amax(1, keepdim=True)
        weights = logits.sub_(top).exp_()
        total = weights.sum(1, keepdim=True)
        slope = weights @ queue / (total * temperature)
    negative = (top + total.log())[:, 0] + ((q - q.detach()) * slope).sum(1)  # adds 0, whose gradient is the slope
    positive = (q * k).sum(1) / temperature
    return -F.logsigmoid(positive - negative).mean()


@torch.no_grad()
def scores(q, k, queue):
    """(positive, negative): products of each query with its key (B,), and the mean of those with the queue (B,)."""
    return (q * k).sum(1), q @ queue.mean(0)


@torch.no_grad()
def save_scores(path, before, after, title):
    """PNG: histograms of positive and negative scores before and after the transformation, from the main process.
    before, after: (q, k, queue) each. Scores beyond -1 and 1 stand at the ends."""
    if not is_main():
        return
    width, height, bins, font = 800, 300, 100, ImageFont.load_default(15)
    canvas = Image.new("RGB", (width + 40, height + 90), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((20, 8), title, "black", font)
    for row, (name, (q, k, queue), blue, red) in enumerate(
        [("as they are", before, "#9ecae1", "#fdae9b"), ("transformed", after, "#08519c", "#b2182b")]
    ):
        parts = {"positive": ((q * k).sum(1), blue), "negative": ((q @ queue.T).flatten(), red)}
        for column, (which, (values, colour)) in enumerate(parts.items()):
            share = torch.histc(values.float().clamp(-1, 1).cpu(), bins, -1, 1) / len(values)
            top = height + 60
            line = [
                (20 + width * (i + d) / bins, top - (height - 20) * v / max(share.max().item(), 1e-12))
                for i, v in enumerate(share.tolist())
                for d in (0, 1)
            ]
            draw.line(line, colour, 2)
            text = f"{which}, {name}: mean {values.mean():.3f}"
            draw.text((20 + 400 * column, 28 + 18 * row), text, colour, font)
    draw.line((20, height + 60, 20 + width, height + 60), "black")
    for tick in (-1, -0.5, 0, 0.5, 1):
        draw.text((20 + width * (tick + 1) / 2, height + 64), f"{tick:g}", "black", font, anchor="ma")
    with atomic(path) as temporary:
        canvas.save(temporary)


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
    model = MoCoFT(backbone, args.dim, queue, args.head == "mlp", groups // world_size())
    model = run.place(model, sync=False)  # MoCo: batch norm by groups
    if args.init:
        model.reset_target()  # MoCo: the target starts as a copy
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    chance = math.log(queue + 1)
    lines = {"baseline": f"loss ln({queue + 1}) = {chance:.2f}, which is passed at the start: pairs are made harder"}
    lines |= {"queue": f"{queue:,} keys{reason}", "batch norm": f"{groups} groups of {size // groups} images"}
    net = run.start(model, optimizer, chance=chance, lr=rule, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * (
                staircase(step, run.total, run.warmup) if args.v1 else cosine(step, run.total, run.warmup, 0.001)
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(args.key_momentum)  # MoCo: once per step, before its keys
            alphas = (args.pos_alpha, args.neg_alpha) if epoch >= args.ft_epoch else (0, 0)
            lam_p, lam_n, permuted = draw_lambdas(args.seed, step + 1, *alphas, queue)  # FT: one draw per step
            permuted, keys = to_device(permuted, run.device), []
            for batch in batches:
                x1, x2 = batch.views()
                order = to_device(key_order(args.seed, step + 1, len(keys), size), run.device)
                q, k, new = net(x1, x2, order)
                moved = feature_transform(q, k, model.queue, lam_p, lam_n, permuted)  # FT
                run.backward(ft_loss(*moved, args.temperature))  # FT
                keys.append(new)
            run.update(optimizer)
            pictured = args.pictures_every and (step + 1) % (args.pictures_every * run.epoch_steps) == 0
            if pictured:  # FT
                title = f"Scores after {epoch + 1} epochs, lambda {lam_p:.2f} and {lam_n:.2f}"
                save_scores(f"{args.out}/scores.png", (q, k, model.queue), moved, title)
            means = {}
            if run.due:
                average_statistics(model)  # MoCo
                parts = (*scores(q, k, model.queue), *scores(*moved))
                means = {name: x.mean() for name, x in zip(("pos", "neg", "pos_ft", "neg_ft"), parts, strict=True)}
            model.enqueue(torch.cat(keys))  # MoCo: once the losses of the step have used the queue
            run.log(lr, std=output_std(q), **means)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
