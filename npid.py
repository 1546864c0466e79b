"""NPID: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al., CVPR 2018, 1805.01978).

Every image is a class of its own. A memory bank holds one unit vector v_j per image, an average of its past features,
and the feature f of one view of image i has to be recognised among them:  P(j | f) = exp(v_j . f / tau) / Z.
Noise-contrastive estimation tells i from K uniform negatives, Z being a constant measured on the first batch:
L = -ln h(i) - sum over negatives j of ln(1 - h(j)),  h(j) = P(j | f) / (P(j | f) + K / N).
With --full-softmax, Z is the exact sum over all N images and L = -ln P(i | f).

    torchrun --nproc_per_node=8 npid.py --data /imagenet
    python npid.py --data digits --arch resnet18 --width 0.25 --batch-size 64 --epochs 40 --full-softmax --flip 0

Published, ResNet-50 on ImageNet, 200 epochs: nearest-neighbour top-1 46.8 with NCE and K = 4096 (official README),
linear top-1 54.99 (those weights, VISSL) and 52.73 (VISSL's own run). With a plain softmax over the image and 65536
negatives, which is not in this file, linear top-1 58.5 (official README) and 57.97 (MMSelfSup 0.11). Ours: not run.

Memory at N = 1,281,167 and D = 128: the bank takes 656 MB on every GPU and in last.pt. Per 32 images on a GPU come
67 MB of rows gathered for NCE with K = 4096, or twice 164 MB for the logits of --full-softmax and their gradient.

Small images (official code, CIFAR-10; 32 px): --image-size 32 --arch resnet18 --batch-size 128 --lr 0.06 (0.03 at
this batch) --weight-decay 5e-4 --temperature 0.1 --full-softmax --flip 0. NCE comes to rest where P(i | f) = 1, so it
needs exp(1/tau) < Z, about N exp(1 / (2 D tau^2)): true for ImageNet at 0.07 and 50000 images at 0.1. Where it is
not, features are driven away from their own rows and the loss grows; the script warns at the start. In short runs the
loss exceeds ln N at first, as rows lag behind the features; results/run.py has settings that learn all the same.

Deviations from the paper: its proximal term |f - v|^2 is left out, as in the official code. From the official code:
batch norm uses the statistics of the global batch, not of each GPU's share, so that the number of processes does not
matter; the learning rate falls after 60 % and 80 % of --epochs whatever their number; K is at most N; with --accum,
Z comes from the first micro-batch; the last, incomplete batch of an epoch is dropped, so its rows wait for the next;
images of at most 64 pixels get a 3x3 stem.
To hack: copy this file. What is NPID: the sections augmentation, model and loss, and the lines marked in main.
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
from common.distributed import finish, gather, init, mean, parallel, sync_batch_norm
from common.knn import knn_monitor
from common.log import Logger, Parser, check_args, describe, fail, output_std, save_views
from common.optim import full, precision
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
    group = parser.add_argument_group("NPID")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=int, default=128, help="D, outputs of the projector and width of the bank")
    group.add_argument("--temperature", type=float, default=0.07, help="tau")
    group.add_argument("--nce-k", type=int, default=4096, help="K, negatives per image (at most the number of images)")
    group.add_argument("--full-softmax", action="store_true", help="softmax over all images instead of NCE")
    group.add_argument("--bank-momentum", type=float, default=0.5, help="share of its old value in a row's update")
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
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """One view per image: crop, grey before a jitter that is always applied, flip (official code)."""
    view = View(
        size=size,
        crop=(crop_min, 1.0),
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

    images: N. dim: D. The bank is a buffer, row j belongs to image j, so that it is the same on every process, is
    saved and is resumed like a weight.
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
        return F.normalize(full(self.projector(self.backbone(x))), dim=1)

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

    A pure function of (seed, epoch, image): the bits are those of common.augment.uniforms, stream 100. It is written
    in torch because a batch needs a million of them and its indices are on the device, where they can stay.
    """
    golden, state = -0x61C8864680B583EB, torch.zeros((), dtype=torch.int64)
    for part in (seed, epoch, 100):
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
def step_decay(step, total, warmup=0):
    """Factor of the learning rate at a step: 1, a tenth from 60 % of all steps on, a hundredth from 80 % on."""
    if step < warmup:
        return step / warmup
    return 0.1 ** ((5 * step >= 3 * total) + (5 * step >= 4 * total))


def main(args):
    device = init(args.device)
    check_args(args)
    if args.nce_k < 1 or args.temperature <= 0 or not 0 <= args.bank_momentum < 1:
        fail("--nce-k must be at least 1 (or --full-softmax), --temperature above 0, --bank-momentum in [0, 1)")
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = fit(augmentation(args.image_size, args.crop_min, args.flip), data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    backbone = resnet(args.arch, args.width, args.image_size, channels=args.channels)
    model = NPID(backbone, len(data), args.dim)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=args.momentum, weight_decay=args.weight_decay)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    k, chance = min(args.nce_k, len(data)), math.log(len(data)) if args.full_softmax else None
    lines = {"chance": f"loss ln({len(data)}) = {math.log(len(data)):.2f}"}
    if not args.full_softmax:
        # before training ln P is random with mean -ln N - half, Z about N exp(half); half: half the variance of v.f/tau
        half = 0.5 / (args.dim * args.temperature**2)
        lines = {"chance": f"loss about ln({k + 1}) + 1 + {half:.2f} = {math.log(k + 1) + 1 + half:.2f} untrained"}
        lines["negatives"] = f"K = {k} per image" + ("" if k == args.nce_k else f", as --nce-k {args.nce_k} exceeds N")
        if 1 / args.temperature > math.log(len(data)) + half:
            enough = math.ceil(100 / math.log(max(3, len(data)))) / 100
            cure = f"--temperature {enough} or more, or --full-softmax"
            lines["warning"] = f"NCE diverges where exp(1/tau) > Z: {len(data):,} images need {cure}"
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
            lr = peak * step_decay(step - 1, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, seen = 0.0, []
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                (x,) = batch.views()
                with amp:
                    f = net(x)
                if args.full_softmax:  # NPID
                    part = full_softmax_loss(f, model.bank, batch.indices, args.temperature) / args.accum
                else:
                    own = batch.indices[:, None]
                    columns = torch.cat([own, negatives(args.seed, epoch, batch.indices, k, len(data))], 1)
                    if step == 1 and not seen:  # the only estimate of Z, over the batches of all processes
                        score = similarity(f.detach(), model.bank, columns, args.temperature)
                        model.Z.copy_(len(data) * mean(score.exp().mean()))
                    part = nce_loss(f, model.bank, columns, model.Z, args.temperature) / args.accum
                scaler.scale(part).backward()
                loss = loss + part.detach()
                seen.append((batch.indices, f.detach()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model.update(*map(torch.cat, zip(*seen, strict=True)), args.bank_momentum)  # NPID

            if log.due(step):
                log.log(step, step / loader.steps, mean(loss).item(), lr, std=mean(output_std(f)).item())
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
