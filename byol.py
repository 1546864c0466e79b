"""BYOL: Bootstrap Your Own Latent (Grill et al., NeurIPS 2020, arXiv 2006.07733).

One view passes the online network (backbone, projector, predictor), which has to predict what a target network makes
of the other view; the target is a moving average of the online network and gets no gradient:
L = |norm(p1) - norm(z2)|^2 + |norm(p2) - norm(z1)|^2,  target <- tau * target + (1 - tau) * online after every step.

    torchrun --nproc_per_node=8 byol.py --data /imagenet

Published schedules; --epochs picks the row (the nearest by ratio) for those of --lr, --tau, --weight-decay not given:

    epochs  --lr  --tau  --weight-decay
        40  0.45   0.97          1e-6
       100  0.45   0.99          1e-6
       300  0.3    0.99          1e-6
      1000  0.2    0.996       1.5e-6

Published, ResNet-50 on ImageNet, linear top-1: 74.4 (released weights, 1000 epochs, batch 4096; official README);
72.93 after 300 epochs, 71.88 after 200 in MMSelfSup 0.11 (batch 4096). Ours: not run.

Small images, small batches: --optimizer sgd, whose published settings are those of lightly's CIFAR-10 benchmark (its
loss has a quarter of our gradient, so the learning rate is divided and the weight decay multiplied by 4):
    python byol.py --data cifar10 --arch resnet18 --hidden-dim 1024 --batch-size 128 --epochs 200 --warmup-epochs 0 \
        --optimizer sgd --lr 0.03 --weight-decay 2e-3 --tau 0.99

Deviations from the paper: the target starts as a copy of the online network, not from another seed; brightness jitter
multiplies; weights start as in torchvision and torch, with the last scale of each residual block at 0; images of at
most 64 pixels are not blurred, are cropped to a fifth of their area at least (the paper has 0.08), and get a 3x3 stem.
--init always starts the target as a copy of what was loaded.
To hack: copy this file. What is BYOL: the sections augmentation, model and loss, and the lines marked in main.
"""

import copy
import dataclasses
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
from common.distributed import finish, init, mean, parallel, sync_batch_norm
from common.knn import knn_monitor
from common.log import Logger, Parser, check_args, describe, output_std, save_views
from common.optim import LARS, cosine, full, param_groups, precision
from common.resnet import resnet

# -------------------------------------------------------------------------------------------------- arguments
SCHEDULES = {
    40: {"lr": 0.45, "tau": 0.97, "weight_decay": 1e-6},
    100: {"lr": 0.45, "tau": 0.99, "weight_decay": 1e-6},
    300: {"lr": 0.3, "tau": 0.99, "weight_decay": 1e-6},
    1000: {"lr": 0.2, "tau": 0.996, "weight_decay": 1.5e-6},
}


def published(epochs):
    """The number of epochs in SCHEDULES whose ratio to `epochs` is nearest to 1."""
    return min(SCHEDULES, key=lambda row: abs(math.log(row / max(1, epochs))))


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
    group = parser.add_argument_group("BYOL")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=int, default=256, help="outputs of projector g and predictor q")
    group.add_argument("--hidden-dim", type=int, default=4096, help="hidden width of projector and predictor")
    group.add_argument("--tau", type=float, help="target's decay rate at the start; rises to 1 (unset: by --epochs)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=1000)
    group.add_argument("--warmup-epochs", type=int, default=10)
    group.add_argument("--batch-size", type=int, default=4096, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--optimizer", choices=["lars", "sgd"], default="lars", help="sgd: for small batches")
    group.add_argument("--lr", type=float, help="per 256 images: multiplied by batch-size / 256 (unset: by --epochs)")
    group.add_argument("--weight-decay", type=float, help="not of biases and norms (unset: by --epochs)")
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
    if args.optimizer == "sgd" and (args.lr is None or args.weight_decay is None):
        parser.error("--optimizer sgd needs --lr and --weight-decay: those of the table are for lars")
    for name, value in SCHEDULES[published(args.epochs)].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 0 <= args.tau <= 1:
        parser.error(f"--tau must lie between 0 and 1, not {args.tau}")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5):
    """The views differ: only the first is always blurred, only the second may be solarised (paper, appendix B)."""
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
    )
    return [view, dataclasses.replace(view, blur_p=0.1 * view.blur_p, solarize_p=0.2)]


# ------------------------------------------------------------------------------------------------------ model
def mlp(inputs, hidden, outputs):
    """Projector and predictor are built alike; the outputs are not normalised (section 3.3)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
    )


class BYOL(nn.Module):
    """Online network of backbone f, projector g and predictor q, and a target network of f and g (section 3.1).

    dim: outputs of projector and predictor, hidden_dim: their hidden width.
    """

    def __init__(self, backbone, dim=256, hidden_dim=4096):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.dim, hidden_dim, dim)
        self.predictor = mlp(dim, hidden_dim, dim)
        self.reset_target()

    def reset_target(self):
        """Makes the target a copy of the online network as it is now, without gradient."""
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, tau):
        """target <- tau * target + (1 - tau) * online, for parameters: the target keeps batch-norm statistics of its
        own, which its own forward passes collect."""
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - tau)

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns online predictions p1, p2 and target projections z1, z2, (B, D) each.

        The views pass separately: batch-norm statistics are those of one view. The target, too, normalises by the
        batch (train mode).
        """
        p1 = self.predictor(self.projector(self.backbone(x1)))
        p2 = self.predictor(self.projector(self.backbone(x2)))
        with torch.no_grad():
            z1 = self.target_projector(self.target_backbone(x1))
            z2 = self.target_projector(self.target_backbone(x2))
        return p1, p2, z1, z2


def target_decay(step, total, tau):
    """tau of the update that follows step `step` (counted from 0) of `total`: from `tau` up to 1 (section 3.3)."""
    return 1 - (1 - tau) * (math.cos(math.pi * step / total) + 1) / 2


# ------------------------------------------------------------------------------------------------------- loss
def byol_loss(p1, p2, z1, z2):
    """Squared distance of unit vectors, 2 - 2 cos, summed over both directions (equation 2), mean over the batch; no
    gradient into z. (B, D) each -> scalar in [0, 8], 4 for orthogonal vectors."""
    p1, p2, z1, z2 = (F.normalize(x, dim=1) for x in (p1, p2, z1.detach(), z2.detach()))
    return (p1 - z2).square().sum(1).mean() + (p2 - z1).square().sum(1).mean()


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
    model = BYOL(backbone, args.dim, args.hidden_dim)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
        model.reset_target()  # BYOL
    peak = args.lr * args.batch_size / 256
    optimizer = {"lars": LARS, "sgd": torch.optim.SGD}[args.optimizer]
    optimizer = optimizer(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    row = published(args.epochs)
    schedule = f"tau {args.tau} to 1, weight decay {args.weight_decay}; nearest published ({row} epochs): "
    schedule += ", ".join(f"{name} {value}" for name, value in SCHEDULES[row].items())
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    describe(args, data, loader, model, lr=rule, schedule=schedule, chance="loss 4, best 0")
    log = Logger(args, loader, total, step, chance=4.0)

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
            lr = peak * cosine(step - 1, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = 0.0
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                x1, x2 = batch.views()
                with amp:
                    p1, p2, z1, z2 = net(x1, x2)
                part = byol_loss(full(p1), full(p2), full(z1), full(z2)) / args.accum  # BYOL
                scaler.scale(part).backward()
                loss = loss + part.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model.update_target(target_decay(step - 1, total, args.tau))  # BYOL

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
