"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (Chen, Xie & He, ICCV 2021, arXiv
2104.02057), for ViTs and for ResNets.

The query q of one view has to pick the key k+ of the other view among the keys of all images of the batch; there is no
queue. Keys come from a second network that follows the first slowly, w_k <- m w_k + (1 - m) w_q, has no predictor, and
receives no gradient:  L = 2T [ctr(q1, k2) + ctr(q2, k1)],  ctr(q, k) = -log [ exp(q.k+ / T) / sum_k exp(q.k / T) ].

    torchrun --nproc_per_node=8 mocov3.py --data /imagenet
    torchrun --nproc_per_node=8 mocov3.py --data /imagenet --arch vit_small

Published recipes; --arch and --epochs (the nearest by ratio) pick the row for those of the flags not given:

    --arch  --epochs  --optimizer    --lr  --weight-decay  --key-momentum  --warmup-epochs  --temperature  --crop-min
    resnet       100       lars       0.6            1e-6            0.99               10              1         0.2
    resnet       300       lars       0.3            1e-6            0.99               10              1         0.2
    resnet      1000       lars       0.3          1.5e-6           0.996               10              1         0.2
    vit          300      adamw    1.5e-4             0.1            0.99               40            0.2        0.08

Published, ImageNet, batch 4096, linear top-1 (official README): ResNet-50 68.9, 72.8 and 74.6 after 100, 300 and 1000
epochs; after 300 epochs ViT-S 73.2 and ViT-B 76.7. ViT-S in MMSelfSup 0.11: 73.19. Ours: not run.

Small images, small batches (ours, nothing published): --arch resnet18 --hidden-dim 512 --batch-size 64 --lr 16
--temperature 0.2 --warmup-epochs 1.

ViTs: the random patch embedding stays as it is (section 4.2; --train-patch-embed lets it learn), positions are fixed
sines and cosines, the small one has 12 heads, the class token is the feature.

Deviations from the paper: with --accum a query chooses among the keys of its micro-batch, which also has batch-norm
statistics of its own; images of at most 64 pixels are not blurred and get a 3x3 stem, those of at most 128 pixels get
smaller patches; ViTs with a convolutional stem are left out. --init always starts the key network as a copy of what
was loaded.
To hack: copy this file. What is MoCo v3: the sections augmentation, model and loss, and the lines marked in main.
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
from common.distributed import finish, gather, init, mean, parallel, rank, sync_batch_norm
from common.knn import knn_monitor
from common.log import Logger, Parser, check_args, describe, fail, output_std, save_views
from common.optim import LARS, cosine, full, param_groups, precision
from common.resnet import resnet
from common.vit import vit

# -------------------------------------------------------------------------------------------------- arguments
RECIPES = {
    "resnet": {"optimizer": "lars", "warmup_epochs": 10, "temperature": 1.0, "crop_min": 0.2},
    "vit": {"optimizer": "adamw", "warmup_epochs": 40, "temperature": 0.2, "crop_min": 0.08},
}
SCHEDULES = {
    "resnet": {
        100: {"lr": 0.6, "weight_decay": 1e-6, "key_momentum": 0.99},
        300: {"lr": 0.3, "weight_decay": 1e-6, "key_momentum": 0.99},
        1000: {"lr": 0.3, "weight_decay": 1.5e-6, "key_momentum": 0.996},
    },
    "vit": {300: {"lr": 1.5e-4, "weight_decay": 0.1, "key_momentum": 0.99}},
}


def published(arch, epochs):
    """(epochs of the row whose ratio to `epochs` is nearest to 1, what it says for this kind of network)."""
    kind = "vit" if arch.startswith("vit") else "resnet"
    row = min(SCHEDULES[kind], key=lambda row: abs(math.log(row / max(1, epochs))))
    return row, RECIPES[kind] | SCHEDULES[kind][row]


def parse_args(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", required=True, help="folder or .tar of images, or digits, cifar10[:DIR], cifar100, stl10, fake[:N]"
    )
    group.add_argument("--train-list", help="list file of training images, 'relative/path[ label]' per line")
    group.add_argument("--val-list", help="list file of validation images")
    group.add_argument("--image-size", type=int, help="pixels of a view (default: 224, or what fits a small named set)")
    group.add_argument("--crop-min", type=float, help="smallest share of the image area in a crop (unset: by --arch)")
    group.add_argument("--flip", type=float, default=0.5, help="probability of a mirrored view")
    group.add_argument("--channels", type=int, default=3, help="of the images; all can be made 1 or 3")
    group.add_argument("--stats", choices=["imagenet", "auto"], help="normalisation (default: auto unless 3 channels)")
    group.add_argument("--decode", choices=["cpu", "gpu"], default="cpu", help="gpu: JPEGs by nvJPEG, other rounding")
    group.add_argument("--max-bad", type=int, default=100, help="stop after this many undecodable images")
    group = parser.add_argument_group("MoCo v3")
    group.add_argument("--arch", default="resnet50", help="resnet18 ... resnet152, or vit_tiny, small, base ...")
    group.add_argument("--width", type=float, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--patch-size", type=int, help="ViT: pixels of a patch (unset: 16, less for small images)")
    group.add_argument("--depth", type=int, help="ViT: blocks (unset: by --arch)")
    group.add_argument("--heads", type=int, help="ViT: attention heads (unset: by --arch, 12 for vit_small)")
    group.add_argument("--train-patch-embed", action="store_true", help="ViT: do not freeze the patch embedding")
    group.add_argument("--dim", type=int, default=256, help="outputs of projector and predictor")
    group.add_argument("--hidden-dim", type=int, default=4096, help="hidden width of projector and predictor")
    group.add_argument("--temperature", type=float, help="T (unset: by --arch)")
    group.add_argument("--key-momentum", type=float, help="m at the start; rises to 1 (unset: by --arch and --epochs)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=300)
    group.add_argument("--warmup-epochs", type=int, help="(unset: by --arch)")
    group.add_argument("--batch-size", type=int, default=4096, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--optimizer", choices=["lars", "adamw"], help="(unset: by --arch)")
    group.add_argument("--lr", type=float, help="per 256 images: multiplied by batch-size / 256 (unset: by --epochs)")
    group.add_argument("--weight-decay", type=float, help="lars: not of biases and norms (unset: by --arch, --epochs)")
    group.add_argument("--momentum", type=float, default=0.9, help="of lars")
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
    recipe = published(args.arch, args.epochs)[1]
    usual = recipe["optimizer"]
    if args.optimizer not in (None, usual) and (args.lr is None or args.weight_decay is None):
        parser.error(f"--optimizer {args.optimizer} needs --lr and --weight-decay: those of the table are for {usual}")
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.arch.startswith("vit"):
        for name in ("patch_size", "depth", "heads", "train_patch_embed"):
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} is for ViTs: leave it out with --arch {args.arch}")
    elif args.arch == "vit_small" and args.heads is None:
        args.heads = 12  # as the official one, which has twice those of other ViT-S
    if not 0 <= args.key_momentum <= 1:
        parser.error(f"--key-momentum must lie between 0 and 1, not {args.key_momentum}")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """The views differ, as in BYOL: only the first is always blurred, only the second may be solarised."""
    view = View(
        size=size,
        crop=(crop_min, 1.0),
        flip=flip,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=1.0 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    return [view, dataclasses.replace(view, blur_p=0.1 * view.blur_p, solarize_p=0.2)]


# ------------------------------------------------------------------------------------------------------ model
def transformer(arch, image_size, width=1.0, patch_size=None, depth=None, heads=None, freeze=True, channels=3):
    """The ViT of the paper, as the official code starts it: Glorot-uniform for each of the matrices that give queries,
    keys and values, a class token near 0, fixed positions, rows before columns. freeze: of the patch embedding."""
    shape = {"patch_size": patch_size, "depth": depth, "heads": heads, "channels": channels}
    backbone = vit(arch, image_size, width, positions="sincos-yx", freeze_patch_embed=freeze, **shape)
    for block in backbone.blocks:
        for matrix in block.attn.qkv.weight.detach().chunk(3):
            nn.init.xavier_uniform_(matrix)
    nn.init.normal_(backbone.cls_token, std=1e-6)
    return backbone


def mlp(layers, inputs, hidden, outputs, last_norm):
    """Linear layers with batch norm and ReLU between them; last_norm: the outputs, too, pass a batch norm, which has
    no scale and shift."""
    modules = []
    for width in [inputs] + [hidden] * (layers - 2):
        modules += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    modules.append(nn.Linear(hidden, outputs, bias=False))
    return nn.Sequential(*modules, *[nn.BatchNorm1d(outputs, affine=False)] * last_norm)


class MoCoV3(nn.Module):
    """Query network of backbone, projector and predictor, and key network of backbone and projector (section 3).

    dim: outputs of projector and predictor, hidden_dim: their hidden width. The heads are those of the official code:
    with a ResNet the projector has 2 layers and the predictor no last batch norm, with a ViT 3 layers and one.
    """

    def __init__(self, backbone, dim=256, hidden_dim=4096):
        super().__init__()
        convolutional = hasattr(backbone, "stages")
        self.backbone = backbone
        self.projector = mlp(2 if convolutional else 3, backbone.dim, hidden_dim, dim, last_norm=True)
        self.predictor = mlp(2, dim, hidden_dim, dim, last_norm=not convolutional)
        self.reset_target()

    def reset_target(self):
        """Makes the key network a copy of the query network as it is now, without gradient."""
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum):
        """w_k <- m w_k + (1 - m) w_q for parameters: the key network's batch-norm statistics are its own."""
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - momentum)

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns queries q1, q2 and keys k1, k2, (B, D) each, not normalised.

        The views pass separately: batch-norm statistics are those of one view. The key network, too, normalises by the
        batch (train mode).
        """
        q1 = self.predictor(self.projector(self.backbone(x1)))
        q2 = self.predictor(self.projector(self.backbone(x2)))
        with torch.no_grad():
            k1 = self.target_projector(self.target_backbone(x1))
            k2 = self.target_projector(self.target_backbone(x2))
        return q1, q2, k1, k2


def key_momentum(step, total, momentum):
    """m of step `step` (counted from 0) of `total`: from `momentum` up to 1 by half a cosine (official code)."""
    return 1 - (1 - momentum) * (math.cos(math.pi * step / total) + 1) / 2


# ------------------------------------------------------------------------------------------------------- loss
def mocov3_loss(q1, q2, k1, k2, temperature):
    """Cross entropy of picking the key of the other view among those of all processes, times 2T, summed over both
    directions (algorithm 1), mean over the batch; no gradient into keys.

    (B, D) each, of this process -> scalar. All equal gives 2 * 2T ln(W B) with W processes.
    """
    q1, q2, k1, k2 = (F.normalize(x, dim=1) for x in (q1, q2, k1.detach(), k2.detach()))
    own = torch.arange(len(q1), device=q1.device) + len(q1) * rank()  # rows of this process among all keys
    first = F.cross_entropy(q1 @ gather(k2).T / temperature, own)
    second = F.cross_entropy(q2 @ gather(k1).T / temperature, own)
    return 2 * temperature * (first + second)


# --------------------------------------------------------------------------------------------------- training
def main(args):
    device = init(args.device)
    check_args(args)
    size = args.batch_size // args.accum  # images of a micro-batch, over all processes
    if size < 2:
        fail(f"--batch-size {args.batch_size} with --accum {args.accum}: a micro-batch needs 2 images or more")
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)

    data = build(args.data, "train", args.train_list, channels=args.channels)
    val = build(args.data, "val", args.val_list, required=False, channels=args.channels)
    views = fit(augmentation(args.image_size, args.crop_min, args.flip), data, args.stats, args.workers)
    settings = {k: getattr(args, k) for k in ("seed", "workers", "accum", "max_bad", "decode")}
    loader = Loader(data, views, args.batch_size, device=device, dtype=dtype, **settings)
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    if args.arch.startswith("vit"):  # MoCo v3
        shape = (args.width, args.patch_size, args.depth, args.heads)
        backbone = transformer(args.arch, args.image_size, *shape, not args.train_patch_embed, args.channels)
    else:
        backbone = resnet(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = MoCoV3(backbone, args.dim, args.hidden_dim)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last))
    if args.init:
        init_from(args.init, model)
        model.reset_target()  # MoCo v3: keys start as copies
    peak = args.lr * args.batch_size / 256
    if args.optimizer == "adamw":  # MoCo v3: weight decay on everything
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=args.weight_decay)
    else:
        optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    state = resume(args, len(data), model, optimizer, scaler)
    step = state["step"] if state else 0
    net = parallel(model)
    net = torch.compile(net) if args.compile else net

    row, recipe = published(args.arch, args.epochs)
    schedule = f"{args.optimizer}, m {args.key_momentum} to 1, weight decay {args.weight_decay}; "
    schedule += f"nearest published ({row} epochs): " + ", ".join(f"{name} {value}" for name, value in recipe.items())
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    chance = 4 * args.temperature * math.log(size)
    text = f"loss 2 x 2 x {args.temperature} x ln({size}) = {chance:.2f}"
    describe(args, data, loader, model, lr=rule, schedule=schedule, chance=text)
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
            lr = peak * cosine(step - 1, total, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(key_momentum(step - 1, total, args.key_momentum))  # MoCo v3: before the step's keys
            loss = 0.0
            for _ in range(args.accum):
                batch = next(batches)
                if step == 1:
                    save_views(f"{args.out}/views.png", batch)
                x1, x2 = batch.views()
                with amp:
                    q1, q2, k1, k2 = net(x1, x2)
                part = mocov3_loss(full(q1), full(q2), full(k1), full(k2), args.temperature) / args.accum  # MoCo v3
                scaler.scale(part).backward()
                loss = loss + part.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            if log.due(step):
                log.log(step, step / loader.steps, mean(loss).item(), lr, std=mean(output_std(q1)).item())
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
