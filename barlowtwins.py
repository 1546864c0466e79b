"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (Zbontar et al., ICML 2021, arXiv 2103.03230).

Two views of B images pass one network. Every one of the D outputs should agree with itself across the views and be
unrelated to the others: with z1, z2 standardised over the batch and C = z1^T z2 / B, the (D, D) cross-correlation,
L = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2.

    torchrun --nproc_per_node=8 barlowtwins.py --data /imagenet
    python barlowtwins.py --data digits --arch resnet18 --width 0.25 --dim 512 --batch-size 64 --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, linear top-1: 73.5 (official code, 1000 epochs, batch 2048); 71.66 in MMSelfSup 0.11
(300 epochs, batch 2048); 67.2 in solo-learn (100 epochs). Ours: not run.

Small images (after lightly's CIFAR-10 benchmark; 32 px): --image-size 32 --arch resnet18 --dim 2048 --lambd 0.005
--optimizer sgd --lr 0.12 --lr-biases 0.12 --scale-loss 1 --weight-decay 5e-4 --batch-size 128 --epochs 200
--warmup-epochs 0. solo-learn scales this loss by 0.1.

--scale-loss and --lr-biases: the official code sums C over its W processes behind autograd's back, so its steps are
those of L / W; its README trains the above on 16 V100, so W = 16. Here the gradient is exact for any number of
processes, and L / 16 stands in for theirs. LARS normalises the factor away from the weights' steps (but for the weight
decay in them); the steps of biases and norms are proportional to it, and --lr-biases 0.0048 was tuned with it. The same
steps without it: --scale-loss 1 --lr-biases 0.0003. The loss shown is L itself.
--accum is not the same as the whole batch at once: C is that of a micro-batch, whose entries are noisier.

Deviations from the official code: the exact gradient; the loss in fp32 also under autocast; the last, incomplete batch
is dropped; images of at most 64 pixels are not blurred, are cropped to a fifth of their area at least (not 0.08), and
get a 3x3 stem.
To hack: copy this file. What is Barlow Twins: the sections augmentation, model and loss, and the lines marked in main.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.augment import EvalView, View
from common.checkpoint import init_from, resume, save_run
from common.data import Loader, build, default_size, fit
from common.distributed import all_reduce, finish, init, mean, parallel, sync_batch_norm, world_size
from common.knn import knn_monitor
from common.log import Logger, Parser, check_args, describe, output_std, save_views
from common.optim import LARS, cosine, full, param_groups, precision
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
    group.add_argument("--crop-min", type=float, help="smallest share of the area in a crop (unset: 0.08, small: 0.2)")
    group.add_argument("--flip", type=float, default=0.5, help="probability of a mirrored view")
    group.add_argument("--channels", type=int, default=3, help="of the images; all can be made 1 or 3")
    group.add_argument("--stats", choices=["imagenet", "auto"], help="normalisation (default: auto unless 3 channels)")
    group.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="gpu: JPEGs by nvJPEG, other rounding")
    group.add_argument("--max-bad", type=int, default=100, help="stop after this many undecodable images")
    group = parser.add_argument_group("Barlow Twins")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--hidden-dim", type=int, help="width of the projector's hidden layers (default: --dim)")
    group.add_argument("--dim", type=int, default=8192, help="outputs of the projector, D")
    group.add_argument("--lambd", type=float, default=0.0051, help="lambda: weight of the redundancy term")
    group.add_argument("--scale-loss", type=float, default=1 / 16, help="1 / processes of the official run")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=1000)
    group.add_argument("--warmup-epochs", type=int, default=10)
    group.add_argument("--batch-size", type=int, default=2048, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--optimizer", choices=["lars", "sgd"], default="lars")
    group.add_argument("--lr", type=float, default=0.2, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--lr-biases", type=float, default=0.0048, help="the same for biases and norms")
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
    args.image_size = args.image_size or default_size(args.data)
    args.crop_min = (0.2 if args.image_size <= 64 else 0.08) if args.crop_min is None else args.crop_min
    args.hidden_dim = args.hidden_dim or args.dim
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """That of BYOL (section 2.2): view 1 always blurred; view 2 rarely, and solarized at times."""
    view = View(
        size=size,
        crop=(crop_min, 1.0),
        interpolation="bicubic",
        flip=flip,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=1.0 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
        solarize_p=0.0,
    )
    return [view, dataclasses.replace(view, blur_p=0.1 if size > 64 else 0.0, solarize_p=0.2)]


# ------------------------------------------------------------------------------------------------------ model
class BarlowTwins(nn.Module):
    """Backbone f and projector of 3 layers (section 2.2, "Architecture").

    hidden_dim: width of the projector's hidden layers, dim: its outputs, D.
    """

    def __init__(self, backbone, hidden_dim=8192, dim=8192):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim, bias=False),  # no batch norm after it: the loss standardises
        )

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns projections z1, z2, (B, D) each.

        The views pass separately: batch-norm statistics are those of one view.
        """
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        return z1, z2


# ------------------------------------------------------------------------------------------------------- loss
def standardise(z):
    """Mean 0 and variance 1 of every dimension over the batch of all processes: batch norm without scale and shift."""
    batch = len(z) * world_size()
    z = z - all_reduce(z.sum(0)) / batch
    return z * torch.rsqrt(all_reduce(z.square().sum(0)) / batch + 1e-5)


def barlow_twins_loss(z1, z2, lambd):
    """Squared distance of the cross-correlation from the identity, off-diagonal part times lambd (equations 1, 2).

    z1, z2: (B, D), row i of both from one image; C is that of the batch of all processes, and so the same on each.
    Returns a scalar >= 0, a sum over (D, D): about D + lambd * D^2 / B if the views have nothing in common.
    """
    batch = len(z1) * world_size()
    c = all_reduce(standardise(z1).T @ (standardise(z2) / batch))
    diagonal, zeros = c.diagonal(), c.new_zeros(()).expand_as(c)
    total = F.mse_loss(c, zeros, reduction="sum")  # one (D, D) temporary; c.square().sum() makes three
    off_diagonal = total - diagonal.square().sum()
    return (1 - diagonal).square().sum() + lambd * off_diagonal


# --------------------------------------------------------------------------------------------------- training
def main(args):
    device = init(args.device)
    check_args(args)
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = fit(augmentation(args.image_size, args.crop_min, args.flip), data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    backbone = resnet(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = BarlowTwins(backbone, args.hidden_dim, args.dim)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
    peak = args.lr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay)  # Barlow Twins: weights; biases and norms, each with its own rate
    optimizer = (LARS if args.optimizer == "lars" else torch.optim.SGD)(groups, lr=peak, momentum=args.momentum)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    peaks = f"{peak:.4g} and {peak * args.lr_biases / args.lr:.4g} (biases and norms)"
    rule = f"{args.lr} and {args.lr_biases} x {args.batch_size}/256 = {peaks}"
    unrelated = args.dim + args.lambd * args.dim**2 * args.accum / args.batch_size
    chance = f"loss about D + lambda D^2/B = {unrelated:.4g} for unrelated views, best 0"
    describe(args, data, loader, model, lr=rule, chance=chance)
    log = Logger(args, loader, total, step)

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
            lr = peak * cosine(step - 1, total, warmup, final=0.001)  # Barlow Twins: ends at 0.001 of the peak
            for group in optimizer.param_groups:
                group["lr"] = lr if group["adapt"] else lr * args.lr_biases / args.lr  # Barlow Twins
            loss = 0.0
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                x1, x2 = batch.views()
                with amp:
                    z1, z2 = net(x1, x2)
                part = barlow_twins_loss(full(z1), full(z2), args.lambd) / args.accum  # Barlow Twins
                scaler.scale(part * args.scale_loss).backward()  # Barlow Twins
                loss = loss + part.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            if log.due(step):
                log.log(step, step / loader.steps, mean(loss).item(), lr, std=mean(output_std(z1)).item())
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
