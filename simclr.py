"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., ICML 2020, 2002.05709).

Two views of each of B images; every one of the 2B projections has to pick its partner among the other 2B - 1:
L = mean over anchors i of  -log [ exp(cos(z_i, z_j) / T) / sum_{k != i} exp(cos(z_i, z_k) / T) ].

    torchrun --nproc_per_node=8 simclr.py --data /imagenet
    python simclr.py --data digits --arch resnet18 --width 0.25 --batch-size 128 --lr-rule sqrt --epochs 40 --flip 0

Published, ResNet-50 on ImageNet, linear top-1: 69.1 (released weights, 1000 epochs, batch 4096), about 64.5 after 100
epochs (official README); 66.66 in MMSelfSup 0.11 (200 epochs, batch 4096). Ours: not run.

Small images (paper, appendix B.9; 32 px): --image-size 32 --arch resnet18 --batch-size 512 --lr 1 --temperature 0.5
--color-strength 0.5. With batches below about 1024 use --lr-rule sqrt (appendix B.1).

Deviations from the paper: brightness jitter multiplies (as in the SimCLR v2 code); convolutions start from He's
initialisation; the blur's sigma is drawn per image, not per batch; images of at most 64 pixels are not blurred, are
cropped to a fifth of their area at least (the paper has 0.08), and get a 3x3 stem.
To hack: copy this file. What is SimCLR: the sections augmentation, model and loss, and the lines marked in main.
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
from common.distributed import finish, gather, init, mean, parallel, rank, sync_batch_norm
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
    group = parser.add_argument_group("SimCLR")
    group.add_argument("--arch", default="resnet50", help="resnet18, 34, 50, 101 or 152")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--dim", type=int, default=128, help="outputs of the projector g")
    group.add_argument("--temperature", type=float, default=0.1, help="tau; 0.5 is better on CIFAR-10")
    group.add_argument("--color-strength", type=float, default=1.0, help="s of the colour distortion; 0.5 on CIFAR-10")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=1000)
    group.add_argument("--warmup-epochs", type=int, default=10)
    group.add_argument("--batch-size", type=int, default=4096, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--lr", type=float, default=0.3, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--lr-rule", choices=["linear", "sqrt"], default="linear", help="sqrt: lr/4 * sqrt(batch-size)")
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
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.08, flip=0.5, strength=1.0):
    """Both views alike: crop, flip, colour distortion of strength s, blur (appendix A). Pixels stay in [0, 1]."""
    view = View(
        size=size,
        crop=(crop_min, 1.0),
        interpolation="bicubic",
        flip=flip,
        jitter=(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    return [view, view]


# ------------------------------------------------------------------------------------------------------ model
class SimCLR(nn.Module):
    """Backbone f and projector g of two layers with batch norm after each (section 3; official code).

    dim: outputs of the projector; its hidden layer is as wide as the features.
    """

    def __init__(self, backbone, dim=128):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, backbone.dim, bias=False),
            nn.BatchNorm1d(backbone.dim),
            nn.ReLU(inplace=True),
            nn.Linear(backbone.dim, dim, bias=False),
            nn.BatchNorm1d(dim),
        )
        self.projector[-1].bias.requires_grad_(False)  # a scale but no shift, as in the official code
        for layer in (self.projector[0], self.projector[3]):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns projections z1, z2, (B, D) each.

        The views pass together: batch-norm statistics are those of both.
        """
        z1, z2 = self.projector(self.backbone(torch.cat([x1, x2]))).chunk(2)
        return z1, z2


# ------------------------------------------------------------------------------------------------------- loss
def nt_xent(z1, z2, temperature):
    """Normalised temperature-scaled cross entropy (equation 1), mean over the 2B anchors of this process.

    z1, z2: (B, D), row i of one is the partner of row i of the other; candidates are those of all processes.
    Equal embeddings give ln(2B - 1), B being the global batch.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    anchors, candidates = torch.cat([z1, z2]), torch.cat([gather(z1), gather(z2)])
    batch = len(candidates) // 2
    own = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    logits = anchors @ candidates.T / temperature  # (2 B_local, 2B)
    logits = logits.scatter(1, torch.cat([own, own + batch])[:, None], -math.inf)  # never its own candidate
    return F.cross_entropy(logits, torch.cat([own + batch, own]))


# --------------------------------------------------------------------------------------------------- training
def main(args):
    device = init(args.device)
    check_args(args)
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = augmentation(args.image_size, args.crop_min, args.flip, args.color_strength)
    views = fit(views, data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    backbone = resnet(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = SimCLR(backbone, args.dim)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
    linear = args.lr_rule == "linear"
    peak = args.lr * args.batch_size / 256 if linear else args.lr / 4 * math.sqrt(args.batch_size)
    optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    rule = f"{args.lr} x {args.batch_size}/256" if linear else f"{args.lr}/4 x sqrt({args.batch_size})"
    candidates = 2 * args.batch_size // args.accum - 1
    chance = f"loss ln({candidates}) = {math.log(candidates):.2f}"
    describe(args, data, loader, model, lr=f"{rule} = {peak:.4g}", chance=chance)
    log = Logger(args, loader, total, step, chance=math.log(candidates))

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
                    z1, z2 = net(x1, x2)
                part = nt_xent(full(z1), full(z2), args.temperature) / args.accum  # SimCLR
                scaler.scale(part).backward()
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
