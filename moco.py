"""MoCo: Momentum Contrast for Unsupervised Visual Representation Learning (He et al., CVPR 2020, arXiv 1911.05722),
by default in its second version, MoCo v2 (Chen et al. 2020, arXiv 2003.04297); --v1 gives the first.

The query q of one view has to pick the key k+ of the other among K keys of earlier batches, which wait in a queue. Keys
come from a second network that follows the first slowly, w_k <- m w_k + (1 - m) w_q, and receives no gradient:
L = -log [ exp(q.k+ / T) / (exp(q.k+ / T) + sum_{k in queue} exp(q.k / T)) ],  q and k of length 1.

    torchrun --nproc_per_node=8 moco.py --data /imagenet
    python moco.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, batch 256, linear top-1 (official README): v1 60.8 +- 0.2 after 200 epochs; v2
67.5 +- 0.1 after 200, 71.1 after 800. v2, 200 epochs in MMSelfSup 0.11: 67.58. Ours: not run.

Small images (official CIFAR-10 notebook; k-NN 82.6 after 200 epochs, 85.3 with --symmetric): --image-size 32
--arch resnet18 --batch-size 512 --weight-decay 5e-4 --crop-min 0.08 --head linear --temperature 0.1 --queue 4096
--key-momentum 0.99.

Shuffled batch norm: images normalised together see each other; a query and its key in one group could be told by their
common statistics, and the loss would fall with nothing learned. So queries are normalised in groups of consecutive
images, keys in groups of a random order across processes. The paper's groups are 8 GPUs; here they are --bn-splits
groups of the batch of all processes: one process emulates eight, and any number of processes gives the same result.

Deviations from the paper: schedules go by steps, not epochs; running statistics are the mean over all groups, not those
of one GPU; with --accum each micro-batch is grouped and shuffled within itself, and all keys enter the queue at the end
of the step; images of at most 64 pixels are not blurred and get a 3x3 stem.
To hack: copy this file. What is MoCo: the sections augmentation, model and loss, and the lines marked in main.
"""

import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.augment import EvalView, View, uniforms
from common.checkpoint import init_from, resume, save_run
from common.data import Loader, build, default_size, fit
from common.distributed import finish, gather, init, mean, parallel, rank, world_size
from common.knn import knn_monitor
from common.log import Logger, Parser, check_args, describe, fail, output_std, save_views
from common.optim import cosine, full, precision
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
    group.add_argument("--crop-min", type=float, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=float, default=0.5, help="probability of a mirrored view")
    group.add_argument("--channels", type=int, default=3, help="of the images; all can be made 1 or 3")
    group.add_argument("--stats", choices=["imagenet", "auto"], help="normalisation (default: auto unless 3 channels)")
    group.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="gpu: JPEGs by nvJPEG, other rounding")
    group.add_argument("--max-bad", type=int, default=100, help="stop after this many undecodable images")
    group = parser.add_argument_group("MoCo")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--v1", action="store_true", help="MoCo v1: its head, augmentation, temperature and schedule")
    group.add_argument("--dim", type=int, default=128, help="outputs of the head")
    group.add_argument("--head", choices=["mlp", "linear"], help="two layers or one (default: mlp, with --v1 linear)")
    group.add_argument("--temperature", type=float, help="T (default: 0.2, with --v1 0.07)")
    group.add_argument("--queue", type=int, help="keys to choose from, K (default: 65536, less for fewer images)")
    group.add_argument("--key-momentum", type=float, default=0.999, help="m of the key network's moving average")
    group.add_argument("--symmetric", action="store_true", help="either view is the query once; sum of both losses")
    group.add_argument("--bn-splits", type=int, help="groups of a batch with their own statistics (default: 8)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=200)
    group.add_argument("--warmup-epochs", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=256, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--lr", type=float, default=0.03, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=float, default=1e-4)
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
    args.head = args.head or ("linear" if args.v1 else "mlp")
    if args.temperature is None:
        args.temperature = 0.07 if args.v1 else 0.2
    if min(args.temperature, args.dim, args.queue or 1) <= 0 or not 0 <= args.key_momentum <= 1:
        parser.error("--temperature, --dim and --queue must be positive, --key-momentum between 0 and 1")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5, v1=False):
    """Both views alike. v1 (technical details of its paper): grey before a stronger jitter, and no blur."""
    view = View(
        size=size,
        crop=(crop_min, 1.0),
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
class SplitBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of each of `splits` groups of consecutive rows; running ones are their means."""

    def forward(self, x):
        if not self.training or self.splits == 1:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        means, variances = self.running_mean.repeat(self.splits, 1), self.running_var.repeat(self.splits, 1)
        rest = (self.weight, self.bias, True, self.momentum, self.eps)
        x = torch.cat([F.batch_norm(*g, *rest) for g in zip(x.chunk(self.splits), means, variances, strict=True)])
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return x


def bn_groups(asked, batch):
    """Groups of the batch of all processes: as asked for, else 8 or the next smaller number that is possible."""
    possible = [n for n in range(world_size(), batch // 2 + 1, world_size()) if batch % n == 0]
    if asked is not None and asked not in possible:
        fail(f"--bn-splits {asked}: {batch} images on {world_size()} processes form groups of equal size by {possible}")
    return asked or max([n for n in possible if n <= 8], default=world_size())


@torch.no_grad()
def mean_statistics(model):
    """Replaces running statistics by their mean over processes: as they add up linearly, now and then is enough."""
    statistics = [buffer for name, buffer in model.named_buffers() if "running" in name]
    torch._foreach_copy_(statistics, mean(torch.cat(statistics)).split([len(buffer) for buffer in statistics]))


def key_order(seed, step, part, batch):
    """Order of the keys of the batch of all processes, (batch,): a permutation that is the same on each of them."""
    return torch.from_numpy(uniforms(seed, step, range(part * batch, (part + 1) * batch), 100, 1)[:, 0]).argsort()


class MoCo(nn.Module):
    """Query network, key network of the same kind, and the queue (section 3.2).

    dim: outputs of the head, queue: K, mlp: two layers as in v2, or one; splits: batch-norm groups of this process.
    """

    def __init__(self, backbone, dim=128, queue=65536, mlp=True, splits=1):
        super().__init__()
        self.backbone = backbone
        hidden = [nn.Linear(backbone.dim, backbone.dim), nn.ReLU(inplace=True)] if mlp else []
        self.projector = nn.Sequential(*hidden, nn.Linear(backbone.dim, dim))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__, module.splits = SplitBatchNorm, splits  # same tensors and names, another forward
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("oldest", torch.tensor(0))  # row of the queue that the next key replaces

    @torch.no_grad()
    def update_target(self, momentum):
        """w_k <- m w_k + (1 - m) w_q for parameters: the key network's batch-norm statistics are its own."""
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
            keys = F.normalize(full(keys), dim=1)
        return F.normalize(full(q), dim=1), keys.chunk(world_size())[rank()], keys


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
    """v1's factor of the learning rate: 0.1 more at 60 and at 80 % of the steps (epochs 120 and 160 of 200)."""
    return step / warmup if step < warmup else 0.1 ** sum(10 * step >= tenths * total for tenths in (6, 8))


def main(args):
    device = init(args.device)
    check_args(args)
    size = args.batch_size // args.accum  # images of a micro-batch, over all processes
    groups = bn_groups(args.bn_splits, size)
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = fit(augmentation(args.image_size, args.crop_min, args.flip, args.v1), data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    queue, reason = args.queue or 65536, ""
    if not args.queue and len(data) < queue:  # MoCo: it would hold old keys of the query's own image; 1/8 epoch is safe
        queue = max(args.batch_size, 2 ** int(math.log2(1 + len(data) / 8)))
        reason = f": the usual 65,536 are more than {len(data):,} images"
    backbone = resnet(args.arch, args.width, args.image_size, channels=args.channels)
    model = MoCo(backbone, args.dim, queue, args.head == "mlp", groups // world_size())
    model = model.to(device, dtype, memory_format=torch.channels_last)
    if args.init:
        init_from(args.init, model)
        model.update_target(0.0)  # MoCo: keys start as copies
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    chance = (1 + args.symmetric) * math.log(queue + 1)
    lines = {"chance": f"loss {'2 ' if args.symmetric else ''}ln({queue + 1}) = {chance:.2f}"}
    lines |= {"queue": f"{queue:,} keys{reason}", "batch norm": f"{groups} groups of {size // groups} images"}
    describe(args, data, loader, model, lr=f"{args.lr} x {args.batch_size}/256 = {peak:.4g}", **lines)
    log = Logger(args, loader, total, step, chance=chance)

    def save():
        save_run(args, step, len(data), model, optimizer, scaler, model.backbone, views[0])

    def knn():
        view = EvalView(args.image_size, mean=views[0].mean, std=views[0].std)
        return knn_monitor(model.backbone, data, val, view, device, args.workers, amp)

    if args.knn_every and not state:
        log.note(0, **knn())
    saved = time.monotonic()
    for epoch in range(step // loader.steps, args.epochs):
        batches = loader.epoch(epoch, start=step % loader.steps)
        for step in range(step + 1, min((epoch + 1) * loader.steps, log.last) + 1):
            lr = peak * (staircase if args.v1 else cosine)(step - 1, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(args.key_momentum)  # MoCo: once per step, before its keys
            keys = []
            loss = 0.0
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                x1, x2 = batch.views()
                for xq, xk in [(x1, x2), (x2, x1)][: 1 + args.symmetric]:  # MoCo
                    order = key_order(args.seed, step, len(keys), size).to(device, non_blocking=True)
                    with amp:
                        q, k, new = net(xq, xk, order)
                    part = info_nce(q, k, model.queue, args.temperature) / args.accum
                    scaler.scale(part).backward()
                    loss = loss + part.detach()
                    keys.append(new)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model.enqueue(torch.cat(keys))  # MoCo: once the step's losses have used the queue

            if log.due(step):
                mean_statistics(model)  # MoCo
                log.log(step, step / loader.steps, mean(loss).item(), lr, std=mean(output_std(q)).item())
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
