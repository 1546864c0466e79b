"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al. 2020, 2006.09882).

Two crops of each image are assigned to K prototypes c such that all prototypes serve equally often (Sinkhorn-Knopp);
every other crop, large or small, has to predict these codes q from its own similarities to the prototypes:
L = mean over code crops i = 1, 2 and crops v != i of  -sum_k q_i[k] log softmax(z_v . c / T)[k].

    torchrun --nproc_per_node=8 swav.py --data /imagenet
    torchrun --nproc_per_node=8 swav.py --data /imagenet --batch-size 256 --warmup-epochs 0 --epochs 200
    python swav.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0 --lr 3 \
        --epsilon 0.03 --color-strength 0 --crop-min 0.3

Published, ResNet-50 on ImageNet, linear top-1 (official README): 75.3/74.6/73.9/72.1 after 800/400/200/100 epochs at
batch 4096, 72.7/74.3 after 200/400 at 256, 70.1 after 400 with two crops; MMSelfSup: 70.5 (200, at 256). Ours: not run.

Crops come in groups: --crops 2 6 --sizes 224 96 --crop-min 0.14 0.05 --crop-max 1 0.14 is the default; --crops 2 alone
means two crops of --image-size covering 0.08 to 1 of the image. Equal use asks little of far fewer samples than
prototypes: by default batch + queue are 4096/3000 K, as in both official recipes.
Small images (32 px; solo-learn: 89.17 on CIFAR-10): --image-size 32 --arch resnet18 --batch-size 256 --epochs 1000. A
constant output (loss ln K) is left only along directions of z whose correlation between crops exceeds epsilon / T:
short runs want --epsilon 0.03 --color-strength 0.5 --crop-min 0.2 --lr 3 and 100 to 500 prototypes.

Deviations from the official code: batch-norm statistics span all processes (there: 8); cosines stay in single
precision; std .229 as everywhere else (there: .228); one global queue, whatever the number of processes; images of at
most 64 pixels are not blurred and get a 3x3 stem.
To hack: copy this file. What is SwAV: the sections augmentation, model and loss, and the lines marked in main.
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.augment import EvalView, View
from common.checkpoint import init_from, resume, save_run
from common.data import Loader, build, default_size, fit
from common.distributed import all_reduce, finish, gather, init, mean, parallel, rank, sync_batch_norm, world_size
from common.knn import knn_monitor
from common.log import Logger, Parser, check_args, describe, output_std, save_views
from common.optim import LARS, cosine, full, precision
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
    group.add_argument("--crops", type=int, nargs="+", help="crops per group (default: 2 6; 2 for at most 64 pixels)")
    group.add_argument("--sizes", type=int, nargs="+", help="pixels per group (default: --image-size, 3/7 of it)")
    group.add_argument("--crop-min", type=float, nargs="+", help="smallest share of the image area, per group")
    group.add_argument("--crop-max", type=float, nargs="+", help="largest share of the image area, per group")
    group.add_argument("--flip", type=float, default=0.5, help="probability of a mirrored view")
    group.add_argument("--channels", type=int, default=3, help="of the images; all can be made 1 or 3")
    group.add_argument("--stats", choices=["imagenet", "auto"], help="normalisation (default: auto unless 3 channels)")
    group.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="gpu: JPEGs by nvJPEG, other rounding")
    group.add_argument("--max-bad", type=int, default=100, help="stop after this many undecodable images")
    group = parser.add_argument_group("SwAV")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=int, default=128, help="outputs of the projector")
    group.add_argument("--hidden-dim", type=int, default=2048, help="hidden layer of the projector")
    group.add_argument("--prototypes", type=int, help="K (default: 3000, or a tenth of the images)")
    group.add_argument("--temperature", type=float, default=0.1, help="tau of the predictions")
    group.add_argument("--epsilon", type=float, default=0.05, help="entropy of the codes; 0.03 if stuck at chance")
    group.add_argument("--iterations", type=int, default=3, help="of Sinkhorn-Knopp")
    group.add_argument("--color-strength", type=float, default=1.0, help="s of the colour jitter; 0.5 on small images")
    group.add_argument("--freeze-steps", type=int, help="first steps with fixed prototypes (default: one epoch)")
    group.add_argument("--queue", type=int, help="rows of earlier embeddings (default: 4096/3000 K - batch)")
    group.add_argument("--queue-epoch", type=int, default=15, help="fill the queue from this epoch on; used when full")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=800)
    group.add_argument("--warmup-epochs", type=int, default=10)
    group.add_argument("--batch-size", type=int, default=4096, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--lr", type=float, default=0.6, help="per 256: times (batch-size/256)^0.75, 4.8 at 4096")
    group.add_argument("--weight-decay", type=float, default=1e-6)
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
    args.image_size = args.image_size or (args.sizes[0] if args.sizes else default_size(args.data))
    args.crops = args.crops or ([2, 6] if args.image_size > 64 else [2])
    groups = len(args.crops)
    args.sizes = args.sizes or [args.image_size, round(args.image_size * 3 / 7)][:groups]
    args.crop_min = args.crop_min or ([0.14, 0.05] if groups > 1 else [0.08])
    args.crop_max = args.crop_max or [1.0, 0.14][:groups]
    if not groups == len(args.sizes) == len(args.crop_min) == len(args.crop_max):
        parser.error(f"--sizes, --crop-min and --crop-max need {groups} values, one per group of --crops")
    if args.crops[0] < 2 or min(args.crops) < 1 or args.sizes[0] != args.image_size or min(args.sizes) < 8:
        parser.error("--crops must begin with at least 2, --sizes with --image-size; no size may be below 8")
    if not all(0 < low <= high <= 1 for low, high in zip(args.crop_min, args.crop_max, strict=True)):
        parser.error("--crop-min and --crop-max must obey 0 < min <= max <= 1")
    for name, low in {"prototypes": 2, "queue": 0, "queue_epoch": 0, "freeze_steps": 0, "iterations": 1}.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")
    return args


def code_sizes(prototypes, queue, batch, images):
    """Prototypes and queue rows; None becomes at most 3000 and a tenth of the images, and as many whole batches as
    bring batch + queue to 4096/3000 of the prototypes: 3840 at batch 256, none at 4096, as in the official recipes."""
    prototypes = max(2, min(3000, images // 10)) if prototypes is None else prototypes
    rows = max(0, min(prototypes * 4096 // 3000, images) - batch) // batch * batch
    return prototypes, rows if queue is None else queue


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(crops, sizes, crop_min, crop_max, flip=0.5, strength=1.0):
    """Multi-crop: groups of random crops, alike but for size and scale, with SimCLR's distortions (official code)."""
    groups = [
        View(
            size=size,
            crop=(low, high),
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
class SwAV(nn.Module):
    """Backbone f, projector of two layers, and K prototypes c of unit length, compared with unit embeddings z.

    dim, hidden_dim: outputs and hidden layer of the projector. queue: rows of earlier embeddings of each code crop,
    newest batch first, in global order and the same on every process.
    """

    def __init__(self, backbone, dim=128, hidden_dim=2048, prototypes=3000, queue=0):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim),
        )
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(2, queue, dim))
        self.register_buffer("hits", torch.zeros(prototypes, dtype=torch.bool))  # best of some sample this epoch?
        self.normalize_prototypes()

    @torch.no_grad()
    def normalize_prototypes(self):
        """Back to the unit sphere; to be called after every update, which is before every forward pass."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def forward(self, views):
        """views: V tensors (B, 3, S, S), S may differ. Returns unit embeddings z (V, B, D) and scores z . c (V, B, K).

        Views of equal size pass the backbone together, all of them the projector: so far go batch-norm statistics.
        """
        features = {}
        for size in dict.fromkeys(x.shape[-1] for x in views):
            group = [v for v, x in enumerate(views) if x.shape[-1] == size]
            features |= zip(group, self.backbone(torch.cat([views[v] for v in group])).chunk(len(group)), strict=True)
        z = self.projector(torch.cat([features[v] for v in range(len(views))]))
        with torch.autocast(z.device.type, enabled=False):  # bf16 rounds cosines by 0.002, codes by 4 %
            z = F.normalize(full(z), dim=1).unflatten(0, (len(views), -1))
            return z, self.prototypes(z)

    @torch.no_grad()
    def codes(self, scores, epsilon, iterations, use_queue):
        """Codes (2, B, K) of the first two crops; with the queue, each process adds its share of it to Sinkhorn."""
        rows = self.queue.shape[1] if use_queue else 0
        share = slice(rows * rank() // world_size(), rows * (rank() + 1) // world_size())
        both = torch.cat([self.prototypes(self.queue[:, share]), scores[:2]], dim=1)
        return torch.stack([sinkhorn(s, epsilon, iterations)[-scores.shape[1] :] for s in both])

    @torch.no_grad()
    def enqueue(self, z):
        """z: embeddings (2, B, D) of the code crops. Those of all processes enter the queue, the oldest leave it."""
        new = gather(z.detach().transpose(0, 1)).transpose(0, 1)
        self.queue.copy_(torch.cat([new, self.queue], dim=1)[:, : self.queue.shape[1]])


# ------------------------------------------------------------------------------------------------------- loss
@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Codes that maximise  sum(Q * scores) + epsilon * entropy(Q)  under equal use of all prototypes.

    scores: (B, K) of this process. Returns Q (B, K): rows sum to 1, columns over all processes to about global B / K,
    the better the more iterations. Q = diag(a) M diag(b), M = exp(scores / epsilon): only a and b are iterated.
    """
    with torch.autocast(scores.device.type, enabled=False):
        logits = full(scores) / epsilon
        top = logits.amax(1)
        m = logits.sub_(top[:, None]).exp_()  # every row has a 1: no score is too large, no row vanishes
        a = torch.exp(top - gather(top.max()[None]).max())  # what was taken out of M, but for the global maximum
        even = len(m) * world_size() / m.shape[1]
        for _ in range(iterations):
            b = even / all_reduce(a @ m).clamp_(min=1e6 * torch.finfo(m.dtype).tiny)  # (K,), over all processes
            a = 1 / (m @ b)  # (B,), each sample lives on one process
        return m.mul_(b).mul_(a[:, None])


def swav_loss(scores, codes, temperature):
    """Swapped prediction: cross entropy of code i and the prediction of every crop v != i, mean over (i, v) and B.

    scores: (V, B, K), crops 0 and 1 first; codes: (2, B, K) of these two, without gradient. Predictions that are
    uniform over the prototypes give ln K.
    """
    logs = F.log_softmax(scores / temperature, dim=2)
    pairs = [(q.detach(), logs[v]) for i, q in enumerate(codes) for v in range(len(logs)) if v != i]
    return sum(-(q * log).sum(1).mean() for q, log in pairs) / len(pairs)


# --------------------------------------------------------------------------------------------------- training
def main(args):
    device = init(args.device)
    check_args(args)
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = augmentation(args.crops, args.sizes, args.crop_min, args.crop_max, args.flip, args.color_strength)
    views = fit(views, data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    backbone = resnet(args.arch, args.width, args.image_size, channels=args.channels)
    prototypes, queue = code_sizes(args.prototypes, args.queue, args.batch_size, len(data))
    model = SwAV(backbone, args.dim, args.hidden_dim, prototypes, queue)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
    peak = args.lr * (args.batch_size / 256) ** 0.75
    optimizer = LARS(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)  # SwAV: all
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    rule = f"{args.lr} x ({args.batch_size}/256)^0.75"
    freeze = loader.steps if args.freeze_steps is None else args.freeze_steps
    queue_start = args.queue_epoch * loader.steps
    held = f"{prototypes}{'' if args.prototypes or prototypes == 3000 else ' (a tenth of the images)'}, frozen for"
    held += f" {freeze} steps, " + (f"queue {queue} from epoch {args.queue_epoch}" if queue else "no queue")
    chance = f"loss ln({prototypes}) = {math.log(prototypes):.2f}"
    describe(args, data, loader, model, lr=f"{rule} = {peak:.4g}", chance=chance, prototypes=held)
    log = Logger(args, loader, total, step, chance=math.log(prototypes))
    if args.batch_size // args.accum + queue < prototypes / 2:
        log.warn("codes", "fewer samples per step than half the prototypes: raise --queue or lower --prototypes")

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
            lr = peak * cosine(step - 1, total, warmup, final=0.001)
            lr = peak / 16 + lr * 15 / 16 if step <= warmup else lr  # SwAV: 0.3 -> 4.8 -> 0.0048
            for group in optimizer.param_groups:
                group["lr"] = lr
            use_queue = 0 < queue <= (step - 1 - queue_start) * args.batch_size  # SwAV: once it is full
            if step == epoch * loader.steps + 1:
                model.hits.zero_()
            loss = 0.0
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                with amp:
                    z, scores = net(batch.views())
                codes = model.codes(scores, args.epsilon, args.iterations, use_queue)  # SwAV
                part = swav_loss(full(scores), codes, args.temperature) / args.accum  # SwAV
                scaler.scale(part).backward()
                loss = loss + part.detach()
                model.hits.index_fill_(0, gather(scores[:2].argmax(2).flatten()), True)
                if queue and step > queue_start:  # SwAV
                    model.enqueue(z[:2])
            if step <= freeze:  # SwAV
                model.prototypes.weight.grad = None
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if step > freeze:  # SwAV
                model.normalize_prototypes()

            if log.due(step):
                log.log(step, step / loader.steps, mean(loss).item(), lr, std=mean(output_std(z[0])).item())
                stop = log.stop.requested(device)
                if stop or step == log.last or time.monotonic() - saved > 60 * args.save_every:
                    save()
                    saved = time.monotonic()
                if stop:
                    log.end(step)
        whole = step == (epoch + 1) * loader.steps  # not cut short by --max-steps
        if whole:
            log.note(step, prototypes_used=round(model.hits.float().mean().item(), 4))
        if args.knn_every and whole and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            log.note(step, **knn())
        if step >= log.last:
            break
    log.close()
    finish()


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
