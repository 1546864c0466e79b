"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (Caron et al. 2020, 2006.09882).

Two crops of each image are assigned to K prototypes c such that all prototypes are used equally often (Sinkhorn-Knopp);
every other crop, large or small, has to predict these codes q from its own similarities to the prototypes:
L = mean over code crops i = 1, 2 and crops v != i of  -sum_k q_i[k] log softmax(z_v . c / T)[k].

    torchrun --nproc_per_node=8 swav.py --data /imagenet
    torchrun --nproc_per_node=8 swav.py --data /imagenet --batch-size 256 --warmup-epochs 0 --epochs 200
    python swav.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --flip 0 --lr 3 \
        --epsilon 0.03 --color-strength 0 --crop-min 0.3

Published, ResNet-50 on ImageNet, linear top-1 (official README): 75.3/74.6/73.9/72.1 after 800/400/200/100 epochs at
batch 4096, 72.7/74.3 after 200/400 at 256, 70.1 after 400 with two crops; MMSelfSup: 70.5 (200, at 256). Ours: not run.

Crops come in groups: --crops 2 6 --sizes 224 96 --crop-min 0.14 0.05 --crop-max 1 0.14 is the default; --crops 2 alone
means two crops of --image-size covering 0.08 to 1 of the image. Equal use means little when there are far fewer samples
than prototypes: by default batch + queue are 4096/3000 K, as in both official recipes.
Small images (32 px; solo-learn: 89.17 on CIFAR-10): --image-size 32 --arch resnet18 --batch-size 256 --epochs 1000. A
constant output (loss ln K) is left only along directions of z whose correlation between crops exceeds epsilon / T, so
short runs want --epsilon 0.03 --color-strength 0.5 --crop-min 0.2 --lr 3 and 100 to 500 prototypes.

Deviations from the official code: prototypes are frozen for one epoch, of any length (there: 313 steps at batch 4096,
5005 at 256); bf16 on CUDA (there: fp16); batch-norm statistics span all processes (there: 8); cosines stay in single
precision; std .229 as everywhere else (there: .228); one global queue, whatever the number of processes; images of at
most 64 pixels are not blurred and get a 3x3 stem.
To hack: copy this file. What is SwAV: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, image_size, positive, probability, share, width
from common.augment import View
from common.distributed import all_reduce, gather, rank, world_size
from common.features import by_size, output_std
from common.networks import network
from common.optim import LARS, cosine, upcast
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("SwAV")
    group.add_argument(
        "--crops", type=positive(int), nargs="+", help="crops per group (default: 2 6; 2 for at most 64 pixels)"
    )
    group.add_argument(
        "--sizes", type=image_size, nargs="+", help="pixels per group (default: --image-size, 3/7 of it)"
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
    group.add_argument("--prototypes", type=at_least(2), help="K (default: 3000, or a tenth of the images)")
    group.add_argument("--temperature", type=positive(float), default=0.1, help="T of the predictions")
    group.add_argument(
        "--epsilon", type=positive(float), default=0.05, help="entropy of the codes; 0.03 if stuck at chance"
    )
    group.add_argument("--iterations", type=positive(int), default=3, help="of Sinkhorn-Knopp")
    group.add_argument(
        "--freeze-steps", type=at_least(0), help="first steps with fixed prototypes (default: one epoch)"
    )
    group.add_argument("--queue", type=at_least(0), help="rows of earlier embeddings (default: 4096/3000 K - batch)")
    group.add_argument(
        "--queue-epoch", type=at_least(0), default=15, help="fill the queue from this epoch on; used when full"
    )
    group.add_argument("--epochs", type=positive(int), default=800)
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
    args.image_size = args.image_size or (args.sizes[0] if args.sizes else default_size(args.data))
    args.crops = args.crops or ([2, 6] if args.image_size > 64 else [2])
    groups = len(args.crops)
    args.sizes = args.sizes or [args.image_size, round(args.image_size * 3 / 7)][:groups]
    args.crop_min = args.crop_min or ([0.14, 0.05] if groups > 1 else [0.08])
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
        z = self.projector(torch.cat(by_size(self.backbone, views)))
        with torch.autocast(z.device.type, enabled=False):  # bf16 rounds cosines by 0.002, codes by 4 %
            z = F.normalize(upcast(z), dim=1).unflatten(0, (len(views), -1))
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
        logits = upcast(scores) / epsilon
        top = logits.amax(1)
        # every row has a 1: no score is too large, no row vanishes; e^-69 = 1e-30 keeps away from subnormal numbers
        m = logits.sub_(top[:, None]).clamp_(min=-69).exp_()
        a = torch.exp(top - gather(top.max()[None]).max())  # what was taken out of M, but for the global maximum
        even = all_reduce(a.new_full((), len(m))) / m.shape[1]  # of all processes, whose rows may differ in number
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
def code_sizes(prototypes, queue, batch, images):
    """Prototypes and queue rows; None becomes at most 3000 and a tenth of the images, and as many whole batches as
    bring batch + queue to 4096/3000 of the prototypes: 3840 at batch 256, none at 4096, as in the official recipes."""
    prototypes = max(2, min(3000, images // 10)) if prototypes is None else prototypes
    rows = max(0, min(prototypes * 4096 // 3000, images) - batch) // batch * batch
    return prototypes, rows if queue is None else queue


def main(args):
    run = Run(args)
    views = augmentation(args.crops, args.sizes, args.crop_min, args.crop_max, args.flip, args.color_strength)
    prototypes, queue = code_sizes(args.prototypes, args.queue, args.batch_size, len(run.open(views)))
    backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(SwAV(backbone, args.dim, args.hidden_dim, prototypes, queue))
    peak = args.lr * (args.batch_size / 256) ** 0.75
    optimizer = LARS(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)  # SwAV: all
    freeze = min(run.epoch_steps, run.total // 2) if args.freeze_steps is None else args.freeze_steps
    queue_start, chance = round(args.queue_epoch * run.epoch_steps), math.log(prototypes)
    rule, baseline = f"{args.lr} x ({args.batch_size}/256)^0.75 = {peak:.4g}", f"loss ln({prototypes}) = {chance:.2f}"
    held = f"{prototypes}{'' if args.prototypes or prototypes == 3000 else ' (a tenth of the images)'}, frozen for"
    held += f" {freeze} steps, " + (f"queue {queue} from epoch {args.queue_epoch}" if queue else "no queue")
    net = run.start(model, optimizer, chance=chance, lr=rule, baseline=baseline, prototypes=held)
    if args.batch_size // args.accum + queue < prototypes / 2:
        run.warn("codes", "fewer samples per step than half the prototypes: raise --queue or lower --prototypes")

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=0.001)
            lr = peak / 16 + lr * 15 / 16 if step < run.warmup else lr  # SwAV: 0.3 -> 4.8 -> 0.0048
            for group in optimizer.param_groups:
                group["lr"] = lr
            use_queue = 0 < queue <= (step - queue_start) * args.batch_size  # SwAV: once it is full
            if step % run.epoch_steps == 0:
                model.hits.zero_()
            for batch in batches:
                z, scores = net(batch.views())
                codes = model.codes(scores, args.epsilon, args.iterations, use_queue)  # SwAV
                run.backward(swav_loss(scores, codes, args.temperature))  # SwAV
                model.hits.index_fill_(0, gather(scores[:2].argmax(2).flatten()), True)
                if queue and step >= queue_start:  # SwAV
                    model.enqueue(z[:2])
            if step < freeze:  # SwAV
                model.prototypes.weight.grad = None
            run.update(optimizer)
            if step >= freeze:  # SwAV
                model.normalize_prototypes()
            run.log(lr, std=output_std(z[0]))
        if run.epoch_done:
            run.note(prototypes_used=round(model.hits.float().mean().item(), 4))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
