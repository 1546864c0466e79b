"""NPID: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al., CVPR 2018, 1805.01978).

Every image is a class of its own. A memory bank holds one unit vector v_j per image, an average of its past features,
among which the feature f of one view of image i has to be recognised:  P(j | f) = exp(v_j . f / tau) / Z.
Noise-contrastive estimation (NCE) tells i from K uniform negatives; Z is a constant, measured on the first batch:
L = -ln h(i) - sum over negatives j of ln(1 - h(j)),  h(j) = P(j | f) / (P(j | f) + K / N).
With --full-softmax, Z is the exact sum over all N images and L = -ln P(i | f).

    torchrun --nproc_per_node=8 npid.py --data /imagenet
    python npid.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --full-softmax --flip 0

Published, ResNet-50 on ImageNet, 200 epochs: k-NN top-1 46.8 on the 128 outputs of the projector (eval_knn.py with
--embedding, --k 200 and last.pt) with NCE and K = 4096 (official README),
linear top-1 54.99 (those weights, VISSL) and 52.73 (VISSL's own run). With a plain softmax over the image and 65536
negatives, which is not in this file, linear top-1 58.5 (official README) and 57.97 (MMSelfSup 0.11). Ours: not run.

Memory at N = 1,281,167 and D = 128: the bank takes 656 MB on every GPU and in last.pt. For 32 images on a GPU, NCE with
K = 4096 gathers 67 MB of rows; --full-softmax needs twice 164 MB, for the logits and their gradient.

Small images (official code, CIFAR-10; 32 px): --image-size 32 --arch resnet18 --batch-size 128 --lr 0.06 (0.03 at this
batch) --weight-decay 5e-4 --temperature 0.1 --full-softmax --flip 0; there the jitter comes before the greying, here
always after it. NCE is at rest where P(i | f) = 1, so it needs exp(1/tau) < Z, about N exp(1 / (2 D tau^2)): true for
ImageNet at 0.07 and for 50000 images at 0.1. Elsewhere features are driven away from their own rows and the loss grows;
the script warns at the start. In short runs the loss exceeds ln N at first, because rows lag behind the features;
results/run.py has settings that learn all the same.

Deviations from the paper: its proximal term |f - v|^2 is left out, as in the official code. From the official code:
bf16 on CUDA (--precision fp32 is the official one), the loss in fp32; batch norm uses the statistics of the global
batch, not of each GPU's share, so that the number of processes does not matter; the learning rate falls after 60 % and
80 % of --epochs whatever their number; K is at most N; with --accum, Z comes from the first micro-batch; the last,
incomplete batch of an epoch is dropped; images of at most 64 pixels get a 3x3 stem.
To hack: copy this file. What is NPID: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, at_least, below_one, default_size, positive, probability, share, toggle, width
from common.augment import View
from common.distributed import gather, process_mean
from common.features import output_std
from common.networks import network
from common.optim import upcast
from common.run import Run


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("NPID")
    group.add_argument("--crop-min", type=share, default=0.2, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101, 152, torchvision:NAME or timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=positive(int), default=128, help="D, outputs of the projector, kept in the bank")
    group.add_argument("--temperature", type=positive(float), default=0.07, help="tau")
    group.add_argument("--nce-k", type=positive(int), default=4096, help="K, negatives per image, at most all images")
    group.add_argument("--full-softmax", action=toggle, default=False, help="softmax over all images instead of NCE")
    group.add_argument("--bank-momentum", type=below_one, default=0.5, help="share of its old value in a row's update")
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
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """One view per image: crop, grey before a jitter that is always applied, flip (official code)."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
        flip=flip,
        jitter=(0.4, 0.4, 0.4, 0.4),
        jitter_p=1.0,
        gray_p=0.2,
        gray_first=True,
    )
    return [view]


# ------------------------------------------------------------------------------------------------------ model
class NPID(nn.Module):
    """Backbone, a linear layer to D dimensions, unit length (section 3), and the memory bank of all N images.

    images: N. dim: D. The bank is a buffer, row j belongs to image j: it is the same on every process, and is saved and
    resumed like a weight.
    """

    def __init__(self, backbone, images, dim=128):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Linear(backbone.dim, dim)
        # as in the official code: squared length 1 on average; a row becomes a unit vector when it is first updated
        self.register_buffer("bank", torch.empty(images, dim).uniform_(-math.sqrt(3 / dim), math.sqrt(3 / dim)))
        self.register_buffer("Z", torch.zeros(()))  # of NCE, measured in the first step and constant from then on

    def forward(self, x):
        """x: one view (B, 3, S, S). Returns unit features f (B, D), in at least single precision like the bank."""
        return F.normalize(upcast(self.projector(self.backbone(x))), dim=1)

    @torch.no_grad()
    def update(self, indices, f, momentum):
        """v <- normalise(momentum v + (1 - momentum) f) for the images of all processes, on every process alike."""
        indices, f = gather(indices), gather(f)
        rows = momentum * self.bank[indices] + (1 - momentum) * f
        self.bank.index_copy_(0, indices, F.normalize(rows, dim=1))


# ------------------------------------------------------------------------------------------------------- loss
def _mix(x):
    """The finaliser of SplitMix64 (Steele et al. 2014) in int64: products wrap, masks make the shifts logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))


def negatives(seed, epoch, indices, k, n):
    """k uniform draws, with replacement, from the n images for each image of indices (B,): int64 (B, k).

    A pure function of (seed, epoch, image), with the bits of common.rng.uniforms. It is written in torch because a
    batch needs a million of them, and its indices are on the device, where they can stay.
    """
    golden, state = -0x61C8864680B583EB, torch.zeros((), dtype=torch.int64)
    for part in (seed, epoch, rng.SCRIPT):
        state = _mix(state + golden + part)
    state = _mix(_mix(state + indices) + golden)[:, None]
    bits = _mix(state + golden * torch.arange(1, k + 1, device=indices.device))
    return (((bits >> 32) & (2**32 - 1)) * n) >> 32  # the upper 32 bits as a fraction of n: uniform to n / 2^32


def similarity(f, bank, columns, temperature):
    """v_j . f / tau of each feature with its own columns j. f: (B, D), bank: (N, D), columns: (B, K+1) -> (B, K+1)."""
    f, bank = f / temperature, bank.detach()
    if len(bank) <= 32 * columns.shape[1]:  # then one product with the whole bank costs less than gathering its rows
        return (f @ bank.T).gather(1, columns)
    return torch.bmm(bank[columns], f[:, :, None]).squeeze(2)


def nce_loss(f, bank, columns, Z, temperature):
    """Noise-contrastive estimation with uniform noise (equations 4 to 7; official code), mean over the batch.

    f: (B, D), bank: (N, D), which receives no gradient; columns: (B, K+1), an image's own row and then K negatives.
    Equal similarities, where every P is 1/N, give ln(K + 1) + K ln(1 + 1/K), about ln K + 1.
    """
    p = similarity(f, bank, columns, temperature).exp() / Z
    noise, eps = (columns.shape[1] - 1) / len(bank), 1e-7
    # -ln [P / (P + noise + eps)] and -ln [noise / (P + noise + eps)]; log1p keeps the digits of the many small terms
    return (torch.log1p((noise + eps) / p[:, 0]) + torch.log1p((p[:, 1:] + eps) / noise).sum(1)).mean()


def full_softmax_loss(f, bank, indices, temperature):
    """Non-parametric softmax over all N images (equation 2), mean over the batch. Equal embeddings give ln N.

    f: (B, D), bank: (N, D), which receives no gradient; indices: (B,), each image's own row.
    """
    return F.cross_entropy(f / temperature @ bank.detach().T, indices)


# --------------------------------------------------------------------------------------------------- training
def staircase(step, total, warmup=0):
    """Factor of the learning rate: times 0.1 at 60 and again at 80 % of the steps (epochs 120 and 160 of 200)."""
    return step / warmup if step < warmup else 0.1 ** sum(10 * step >= tenths * total for tenths in (6, 8))


def nce_lines(images, nce_k, dim, temperature):
    """What to print about NCE at the start: its loss before training, K, and a warning if it will diverge."""
    k = min(nce_k, images)
    # before training ln P is random with mean -ln N - half, Z about N exp(half); half: half the variance of v.f/tau
    half = 0.5 / (dim * temperature**2)
    lines = {"baseline": f"loss about ln({k + 1}) + 1 + {half:.2f} = {math.log(k + 1) + 1 + half:.2f} untrained"}
    lines["negatives"] = f"K = {k} per image" + ("" if k == nce_k else f", as --nce-k {nce_k} exceeds N")
    if 1 / temperature > math.log(images) + half:
        remedy = f"--temperature {math.ceil(100 / math.log(max(3, images))) / 100} or more, or --full-softmax"
        lines["warning"] = f"NCE diverges where exp(1/tau) > Z: {images:,} images need {remedy}"
    return lines


def main(args):
    run = Run(args)
    n = len(run.open(augmentation(args.image_size, args.crop_min, args.flip)))
    backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(NPID(backbone, n, args.dim))
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    chance, lines = None, nce_lines(n, args.nce_k, args.dim, args.temperature)
    if args.full_softmax:
        chance, lines = math.log(n), {"baseline": f"loss ln({n}) = {math.log(n):.2f}"}
    net = run.start(model, optimizer, chance=chance, lr=rule, **lines)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * staircase(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seen = []
            for batch in batches:
                (x,) = batch.views()
                f = net(x)
                if args.full_softmax:  # NPID
                    loss = full_softmax_loss(f, model.bank, batch.indices, args.temperature)
                else:
                    others = negatives(args.seed, epoch, batch.indices, min(args.nce_k, n), n)
                    columns = torch.cat([batch.indices[:, None], others], 1)
                    if step == 0 and not seen:  # the only estimate of Z, over the batches of all processes
                        score = similarity(f.detach(), model.bank, columns, args.temperature)
                        model.Z.copy_(n * process_mean(score.exp().mean()))
                    loss = nce_loss(f, model.bank, columns, model.Z, args.temperature)
                run.backward(loss)
                seen.append((batch.indices, f.detach()))
            run.update(optimizer)
            model.update(*map(torch.cat, zip(*seen, strict=True)), args.bank_momentum)  # NPID
            run.log(lr, std=output_std(f))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
