"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (Chen, Xie & He, ICCV 2021, arXiv
2104.02057), for ViTs and for ResNets.

The query q of one view has to pick the key k+ of the other view among the keys of all images of the batch; there is no
queue. Keys come from a second network, a moving average of the first, w_k <- m w_k + (1 - m) w_q, without predictor and
without gradient:  L = 2T [ctr(q1, k2) + ctr(q2, k1)],  ctr(q, k) = -log [ exp(q.k+ / T) / sum_k exp(q.k / T) ].

    torchrun --nproc_per_node=8 mocov3.py --data /imagenet
    torchrun --nproc_per_node=8 mocov3.py --data /imagenet --arch vit_small

Published recipes; --arch and --epochs pick the row (the nearest by ratio) for those of the flags not given:

    --arch  --epochs  --optimizer    --lr  --weight-decay  --key-momentum  --warmup-epochs  --temperature  --crop-min
    resnet       100       lars       0.6            1e-6            0.99               10              1         0.2
    resnet       300       lars       0.3            1e-6            0.99               10              1         0.2
    resnet      1000       lars       0.3          1.5e-6           0.996               10              1         0.2
    vit          300      adamw    1.5e-4             0.1            0.99               40            0.2        0.08

Published, ImageNet, batch 4096, linear top-1 (official README): ResNet-50 68.9, 72.8 and 74.6 after 100, 300 and 1000
epochs; after 300 epochs ViT-S 73.2 and ViT-B 76.7. ViT-S in MMSelfSup 0.11: 73.19. Ours: not run.

Small images, small batches (ours, nothing published): --arch resnet18 --hidden-dim 512 --batch-size 64 --lr 16
--temperature 0.2 --warmup-epochs 1.

ViTs: the patch embedding stays random (section 4.2; --train-patch-embed trains it), positions are fixed sines and
cosines, the small one has 12 heads, the class token is the feature.

Deviations from the paper: with --accum a query chooses among the keys of its micro-batch, which also has batch-norm
statistics of its own; bf16 on CUDA (there: fp16); images of at most 64 pixels are not blurred and get a 3x3 stem, those
of at most 128 pixels get smaller patches; there are no ViTs with a convolutional stem. After --init the key network is
a copy of what was loaded.
To hack: copy this file. What is MoCo v3: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, number, positive, probability, share, toggle, width
from common.augment import View
from common.distributed import gather, rank
from common.features import output_std
from common.networks import network
from common.optim import LARS, cosine, param_groups
from common.run import Run
from common.vit import ViT, vit

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
    row = min(SCHEDULES[kind], key=lambda row: abs(math.log(row / epochs)))
    return row, RECIPES[kind] | SCHEDULES[kind][row]


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    group = parser.add_argument_group("MoCo v3")
    group.add_argument("--crop-min", type=share, help="smallest share of the image area in a crop (default: by --arch)")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    group.add_argument("--arch", default="resnet50", help="resnet18 ..., vit_tiny ..., torchvision:NAME, timm:NAME")
    group.add_argument("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    group.add_argument("--patch-size", type=positive(int), help="ViT: pixels (default: 16, less for small images)")
    group.add_argument("--depth", type=positive(int, 1000), help="ViT: blocks (default: by --arch)")
    group.add_argument("--heads", type=positive(int), help="ViT: heads (default: by --arch, 12 for vit_small)")
    group.add_argument("--train-patch-embed", action=toggle, default=False, help="ViT: train the patch embedding too")
    group.add_argument("--dim", type=positive(int), default=256, help="outputs of projector and predictor")
    group.add_argument("--hidden-dim", type=positive(int), default=4096, help="hidden width of projector and predictor")
    group.add_argument("--temperature", type=positive(float), help="T (default: by --arch)")
    group.add_argument("--key-momentum", type=number(float, 0, 1), help="m at the start (default: by --arch, --epochs)")
    group.add_argument("--epochs", type=positive(int), default=300)
    group.add_argument("--warmup-epochs", type=at_least(0), help="default: by --arch")
    group.add_argument(
        "--batch-size", type=positive(int), default=4096, help="images per step over all processes and --accum"
    )
    group.add_argument("--optimizer", choices=["lars", "adamw"], help="default: by --arch")
    group.add_argument(
        "--lr", type=positive(float), help="per 256 images: multiplied by batch-size / 256 (default: by --epochs)"
    )
    group.add_argument(
        "--weight-decay", type=at_least(0, float), help="lars: not of biases and norms (default: by --arch, --epochs)"
    )
    group.add_argument("--momentum", type=below_one, default=0.9, help="of lars")
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
    elif args.arch == "vit_small":
        args.heads = args.heads or 12  # as the official one; other ViT-S have 6
    if args.batch_size < 2 * args.accum:
        parser.error(f"--batch-size {args.batch_size} with --accum {args.accum}: a micro-batch needs 2 images or more")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, crop_min=0.2, flip=0.5):
    """The views differ, as in BYOL: only the first is always blurred, only the second may be solarised."""
    view = View(
        size=size,
        area=(crop_min, 1.0),
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
    backbone = vit(arch, image_size, width, positions="sincos-yx", **shape)
    backbone.patch_embed.requires_grad_(not freeze)
    for block in backbone.blocks:
        for matrix in block.attn.qkv.weight.detach().chunk(3):
            nn.init.xavier_uniform_(matrix)
    nn.init.normal_(backbone.cls_token, std=1e-6)
    return backbone


def mlp(layers, inputs, hidden, outputs, last_norm):
    """Linear layers with batch norm and ReLU between them; last_norm: the outputs, too, pass a batch norm, which has
    no scale and shift."""
    modules = []
    for features in [inputs] + [hidden] * (layers - 2):
        modules += [nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    modules.append(nn.Linear(hidden, outputs, bias=False))
    return nn.Sequential(*modules, *[nn.BatchNorm1d(outputs, affine=False)] * last_norm)


class MoCoV3(nn.Module):
    """Query network of backbone, projector and predictor, and key network (the target) of the first two (section 3).

    dim: outputs of projector and predictor, hidden_dim: their hidden width. The heads are those of the official code:
    with a ResNet the projector has 2 layers and the predictor no last batch norm, with a ViT 3 layers and one.
    """

    def __init__(self, backbone, dim=256, hidden_dim=4096):
        super().__init__()
        convolutional = not isinstance(backbone, ViT)  # as `published` decides by the name
        self.backbone = backbone
        self.projector = mlp(2 if convolutional else 3, backbone.dim, hidden_dim, dim, last_norm=True)
        self.predictor = mlp(2, dim, hidden_dim, dim, last_norm=not convolutional)
        self.reset_target()

    def reset_target(self):
        """Makes the target a copy of the online network as it is now, without gradient."""
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum):
        """target <- momentum * target + (1 - momentum) * online, for parameters; batch-norm statistics are its own."""
        target = [*self.target_backbone.parameters(), *self.target_projector.parameters()]
        online = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - momentum)

    def forward(self, x1, x2):
        """x1, x2: views (B, 3, S, S). Returns queries q1, q2 and keys k1, k2, (B, D) each, not normalised.

        The views pass separately: batch-norm statistics are those of one view, in the target too (train mode).
        """
        q1 = self.predictor(self.projector(self.backbone(x1)))
        q2 = self.predictor(self.projector(self.backbone(x2)))
        with torch.no_grad():
            k1 = self.target_projector(self.target_backbone(x1))
            k2 = self.target_projector(self.target_backbone(x2))
        return q1, q2, k1, k2


def target_momentum(step, total, start):
    """Momentum of the target at step `step`, counted from 0, of `total`: from `start` up to 1 by half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total) + 1) / 2


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
    run = Run(args)
    run.open(augmentation(args.image_size, args.crop_min, args.flip))
    if args.arch.startswith("vit"):  # MoCo v3
        shape = (args.width, args.patch_size, args.depth, args.heads)
        backbone = transformer(args.arch, args.image_size, *shape, not args.train_patch_embed, args.channels)
    else:
        backbone = network(args.arch, args.width, args.image_size, zero_init_residual=True, channels=args.channels)
    model = run.place(MoCoV3(backbone, args.dim, args.hidden_dim))
    if args.init:
        model.reset_target()  # MoCo v3: the target starts as a copy
    peak = args.lr * args.batch_size / 256
    if args.optimizer == "adamw":  # MoCo v3: weight decay on everything
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=args.weight_decay)
    else:
        optimizer = LARS(param_groups(model, args.weight_decay), lr=peak, momentum=args.momentum)
    rule = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    row, recipe = published(args.arch, args.epochs)
    schedule = f"{args.optimizer}, m {args.key_momentum} to 1, weight decay {args.weight_decay}; "
    schedule += f"nearest published ({row} epochs): " + ", ".join(f"{name} {value}" for name, value in recipe.items())
    size = args.batch_size // args.accum  # images of a micro-batch, over all processes
    chance = 4 * args.temperature * math.log(size)
    baseline = f"loss 2 x 2 x {args.temperature} x ln({size}) = {chance:.2f}"
    net = run.start(model, optimizer, chance=chance, lr=rule, schedule=schedule, baseline=baseline)

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.update_target(target_momentum(step, run.total, args.key_momentum))  # MoCo v3: before its keys
            for batch in batches:
                x1, x2 = batch.views()
                q1, q2, k1, k2 = net(x1, x2)
                run.backward(mocov3_loss(q1, q2, k1, k2, args.temperature))  # MoCo v3
            run.update(optimizer)
            run.log(lr, std=output_std(q1))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
