"""NNCLR: With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations (Dwibedi
et al., ICCV 2021, arXiv 2104.14548).

SimCLR whose positive is another image: the projection z of one view is replaced by its nearest neighbour n(z) among K
earlier projections in a queue, which has to pick the prediction p of the other view among those of all B images:

    L = mean over both directions and images i of  -log [ exp(n(z_i) . p'_i / T) / sum_k exp(n(z_i) . p'_k / T) ],

z, n and p of length 1. No gradient passes through n(z). The queue takes z of the first view after each step.

    torchrun --nproc_per_node=8 nnclr.py --data /imagenet
    python nnclr.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --lr 1 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, linear top-1 (paper): 75.6 (1000 epochs, batch 4096; SimCLR 71.7). Ours: not run.

Small images (solo-learn; 91.88 on CIFAR-10 after 1000 epochs): --image-size 32 --arch resnet18 --batch-size 256
--temperature 0.2 --queue 65536 --weight-decay 1e-5. lightly takes queues of 4096 and 8192 there.

What to look at: `distinct`, the share of different neighbours among those of a batch (few: a collapse, or a queue that
is too short), `agree`, the mean cosine of z and its neighbour, and where there are labels `same`, the share of
neighbours with the label of the image. Labels are for this figure alone. The first K/B steps have random neighbours.

Deviations from the paper, which has no official code: the layers' initialisation is PyTorch's; the views pass the
network one after the other; neighbours are those of the queue as it was before the step, also with --accum; the queue
is shorter for fewer images; bf16 on CUDA, neighbours and loss in fp32; images of at most 64 pixels are not blurred, are
cropped to a fifth of their area at least (0.08 in the paper), and get a 3x3 stem.
To hack: copy this file. What is NNCLR: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, width
from common.augment import View
from common.distributed import gather, rank
from common.features import output_std
from common.networks import network
from common.optim import LARS, cosine, param_groups
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("NNCLR")
    group.add_argument(
        "--crop-min", type=share, help="smallest share of the image area in a crop (default 0.08; 0.2 up to 64 px)"
    )
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=256, help="outputs of projector and predictor")
    group.add_argument("--hidden-dim", type=positive(int), default=2048, help="hidden layers of the projector")
    group.add_argument("--pred-dim", type=positive(int), default=4096, help="hidden layer of the predictor")
    group.add_argument("--temperature", type=positive(float), default=0.1, help="T; 0.2 is better on CIFAR-10")
    group.add_argument("--queue", type=positive(int), help="projections, K (default: 98304, less for fewer images)")
    group.add_argument("--epochs", type=positive(int), default=1000)
    group.add_argument("--warmup-epochs", type=at_least(0), default=10)
    group.add_argument(
        "--batch-size", type=positive(int), default=4096, help="images per step over all processes and --accum"
    )
    group.add_argument("--lr", type=positive(float), default=0.3, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--weight-decay", type=at_least(0, float), default=1e-6)
    group.add_argument("--momentum", type=below_one, default=0.9)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """The views differ, as in BYOL: only the first is always blurred, only the second may be solarised."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
        interpolation="bicubic",
        flip=flip,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=1.0 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    return [view, dataclasses.replace(view, blur_p=0.1 * view.blur_p, solarize_p=0.2)]


# ------------------------------------------------------------------------------------------------------ model
MOST = 2**24  # cosines at a time in the search for neighbours


class NNCLR(nn.Module):
    """Backbone f, projector of 3 layers, predictor of 2, and the queue of projections with the labels of their images.

    dim: outputs of projector and predictor, hidden_dim, pred_dim: their hidden layers, queue: K.
    """

    def __init__(self, backbone, dim=256, hidden_dim=2048, pred_dim=4096, queue=98304):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
        self.predictor = nn.Sequential(
            nn.Linear(dim, pred_dim, bias=False),
            nn.BatchNorm1d(pred_dim),
            nn.ReLU(inplace=True),
            nn.Linear(pred_dim, dim),
        )
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer("labels", torch.full((queue,), -1))  # -1: none
        self.register_buffer("oldest", torch.tensor(0))  # row of the queue that the next projection replaces

    @torch.no_grad()
    def enqueue(self, keys, labels):
        """Replaces the oldest rows by `keys` (N, D) and their labels (N,), in place. N and K need not divide."""
        size, n = len(self.queue), len(keys)
        rows = torch.arange(max(0, n - size), n, device=keys.device)  # of more than K, the last K stay
        rows = (self.oldest + rows) % size
        self.queue[rows], self.labels[rows] = keys[-size:], labels[-size:]
        self.oldest.add_(n).remainder_(size)  # stays on the device: reading it would wait for the step

    @torch.no_grad()
    def nearest(self, z):
        """Rows of the queue with the largest cosine to z (N, D) of any length: indices (N,)."""
        parts = z.split(max(1, MOST // len(self.queue)))
        return torch.cat([(part @ self.queue.T).argmax(1) for part in parts])

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns predictions p1, p2 and projections z1, z2, (B, D) each.

        The views pass separately: batch-norm statistics are those of one view.
        """
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        return self.predictor(z1), self.predictor(z2), z1, z2


# ------------------------------------------------------------------------------------------------------- loss
def nnclr_loss(n1, n2, p1, p2, temperature):
    """Cross entropy of picking the prediction of the other view, mean over both directions and the rows of this
    process. No gradient into neighbours.

    n1, n2: (B, D) neighbours of z1 and z2, p1, p2: (B, D) predictions, row i of all from one image; of any length.
    Candidates are the predictions of all processes: equal rows give ln B, B being the global batch.
    """
    n1, n2, p1, p2 = (F.normalize(x, dim=1) for x in (n1.detach(), n2.detach(), p1, p2))
    own = torch.arange(len(n1), device=n1.device) + rank() * len(n1)
    forth = F.cross_entropy(n1 @ gather(p2).T / temperature, own)
    return (forth + F.cross_entropy(n2 @ gather(p1).T / temperature, own)) / 2


# --------------------------------------------------------------------------------------------------- training
@torch.no_grad()
def neighbourhood(model, z, nearest, labels):
    """Monitors of the neighbours of the first view of a micro-batch, whose indices are `nearest` (N,): the share of
    different ones over all processes; the mean cosine to z (N, D); with labels, the share of those of equal label."""
    rows = gather(nearest)
    order = rows.sort().values
    figures = {"distinct": (1 + (order[1:] != order[:-1]).sum()) / len(rows)}
    figures["agree"] = F.cosine_similarity(z, model.queue[nearest]).mean()
    if labels is None:
        return figures
    known = (labels >= 0).float()  # of STL-10 most have none
    return figures | {"same": ((model.labels[nearest] == labels) * known).sum() / known.sum()}


def main(args):
    run = Run(args)
    data = run.open(augmentation(args.image_size, args.crop_min, args.flip))
    queue, reason = args.queue or 98304, ""
    if not args.queue and len(data) < queue:  # NNCLR: it would hold the same images several times
        queue = max(args.batch_size, 2 ** int(math.log2(1 + len(data) / 8)))
        reason = f": the usual 98,304 are more than {len(data):,} images"
    if queue < args.batch_size:
        fail(f"--queue {queue} is smaller than --batch-size {args.batch_size}, whose projections it takes: raise it")
    backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = run.place(NNCLR(backbone, args.dim, args.hidden_dim, args.pred_dim, queue))
    peak = args.lr * args.batch_size / 256
    optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    candidates = args.batch_size // args.accum
    chance = math.log(candidates)
    lines = {"baseline": f"loss ln({candidates}) = {chance:.2f}", "queue": f"{queue:,} projections{reason}"}
    net = run.start(model, optimizer, chance=chance, lr=rule, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            keys, labels = [], []
            for batch in batches:
                x1, x2 = batch.views()
                p1, p2, z1, z2 = net(x1, x2)
                nearest = model.nearest(z1)  # NNCLR
                n1, n2 = model.queue[nearest], model.queue[model.nearest(z2)]
                run.backward(nnclr_loss(n1, n2, p1, p2, args.temperature))  # NNCLR
                keys.append(gather(F.normalize(z1.detach(), dim=1)))
                labels.append(gather(batch.labels))
            run.update(optimizer)
            known = None if data.labels is None else batch.labels
            monitors = neighbourhood(model, z1, nearest, known) if run.due else {}
            model.enqueue(torch.cat(keys), torch.cat(labels))  # NNCLR: once the losses of the step have used the queue
            run.log(lr, std=output_std(z1), **monitors)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
