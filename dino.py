"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al., ICCV 2021, arXiv 2104.14294), for
ViTs, XCiTs and ResNets.

A student predicts, from every crop v, what a teacher says of the two large crops i, a distribution over K outputs:
L = mean over i = 1, 2 and v != i of  -sum_k P_t(x_i)[k] log P_s(x_v)[k],  P_s = softmax(s / T_s),
P_t = softmax((t - c) / T_t). The teacher is a moving average of the student, w_t <- m w_t + (1 - m) w_s; the centre c
is one of the teacher's outputs. Centring alone would lead to equal outputs, the low temperature T_t alone to one.

    torchrun --nproc_per_node=8 dino.py --data /imagenet
    torchrun --nproc_per_node=8 dino.py --data /imagenet --arch resnet50
    torchrun --nproc_per_node=8 dino.py --data /photos --init dino_deitsmall16_pretrain_full_checkpoint.pth --epochs 20

The default is the official "vanilla" ViT-S/16. Recipes by kind of network, for those of the flags not given:

    --arch  --optimizer  --lr  --weight-decay  --weight-decay-end  --drop-path  --global-scale  --local-scale
    vit           adamw  5e-4            0.04                 0.4          0.1           0.4 1       0.05 0.4
    resnet          sgd  0.03            1e-4                1e-4            0          0.14 1      0.05 0.14

XCiTs (xcit_small_12, xcit_medium_24 ...) take the ViT's: the authors' settings for them were not found.

Published, ImageNet, k-NN and linear top-1 (official README): ViT-S/16 69.3 and 74.0 after these 100 epochs on 8 GPUs;
73.3 and 76.0 after 300 epochs with T_t from 0.04 to 0.07 over 30 epochs (--teacher-temp 0.07 --teacher-temp-epochs 30
--train-last-norm); released: ViT-S/16 74.5 and 77.0, ViT-B/16 76.1 and 78.2, ResNet-50 67.5 and 75.3, XCiT-S12/16
76.0 and 77.8. Ours: not run.

Small images, small batches (nothing published by the authors): --out-dim 1024 to 8192, --teacher-momentum 0.9995 for
256 images and fewer with long runs. Up to 64 pixels small crops have half the size and cover 0.2 to 0.4 of the image.
A loss that stays at ln K means equal outputs: lower --teacher-temp (0.02), raise --freeze-epochs or lower --lr.

What is saved, and judged by k-NN, is the teacher. --init FILE goes on from a backbone, and from the head of the teacher
in the same file if it is there and has this shape; a line says which.

Deviations from the official code: the warm-up of the rate reaches its peak one step later; the centre is updated once
per step, also with --accum, by the mean over its micro-batches; positions are interpolated to the exact grid of a crop
(there: by a factor with 0.1 added); bf16 on CUDA (there: fp16); losses, norms and the last layer's input stay in single
precision; images of at most 64 pixels are not blurred and get a 3x3 stem, those of at most 128 smaller patches.
To hack: copy this file. What is DINO: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common import xcit
from common.args import Parser, at_least, below_one, default_size, positive, probability, share, toggle
from common.args import image_size as pixels
from common.args import width as multiplier
from common.augment import View
from common.checkpoint import load_file
from common.distributed import print0, process_mean
from common.features import by_size
from common.layouts import containers
from common.networks import network
from common.optim import LARS, cosine, param_groups, upcast
from common.run import Run
from common.vit import default_patch, path_factors, vit

# -------------------------------------------------------------------------------------------------- arguments
RECIPES = {
    "vit": {"optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.04, "weight_decay_end": 0.4, "drop_path": 0.1}
    | {"global_scale": [0.4, 1.0], "local_scale": [0.05, 0.4]},
    "resnet": {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "weight_decay_end": 1e-4, "drop_path": 0.0}
    | {"global_scale": [0.14, 1.0], "local_scale": [0.05, 0.14]},
}
SMALL = {"global_scale": [0.4, 1.0], "local_scale": [0.2, 0.4]}  # of images of at most 64 pixels


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    add = parser.add_argument_group("DINO").add_argument
    add("--global-scale", type=share, nargs=2, help="least and largest share of the image area in the two large crops")
    add("--local-scale", type=share, nargs=2, help="the same of the small crops (default of both: by --arch)")
    add("--local-crops", type=at_least(0), default=8, help="small crops per image")
    add("--local-size", type=pixels, help="their pixels (default: 3/7 of --image-size; half of it up to 64)")
    add("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    add("--arch", default="vit_small", help="vit_tiny ..., xcit_small_12 ..., resnet18 ..., torchvision:NAME")
    add("--width", type=multiplier, default=1.0, help="multiplier of the backbone's channels")
    add("--patch-size", type=positive(int), help="ViT, XCiT: pixels (default: 16, less for small images)")
    add("--depth", type=positive(int, 1000), help="ViT, XCiT: blocks (default: by --arch)")
    add("--drop-path", type=below_one, help="ViT, XCiT: stochastic depth of the student (default: by --arch)")
    add("--out-dim", type=at_least(2), default=65536, help="K, outputs of the head")
    add("--hidden-dim", type=positive(int), default=2048, help="hidden layers of the head")
    add("--bottleneck-dim", type=at_least(2), default=256, help="what its last layer sees")
    add("--head-norm", action=toggle, default=False, help="batch norm in the head (released ResNet-50)")
    text = "train the norms of the last layer's weights, too: better with more time, less stable"
    add("--train-last-norm", action=toggle, default=False, help=text)
    add("--student-temp", type=positive(float), default=0.1, help="T_s")
    add("--teacher-temp", type=positive(float), default=0.04, help="T_t; above 0.07 nothing is learned")
    add("--teacher-temp-start", type=positive(float), default=0.04, help="T_t in the first epoch")
    add("--teacher-temp-epochs", type=at_least(0), default=0, help="from there to --teacher-temp")
    add("--teacher-momentum", type=probability, default=0.996, help="m at the start; 1 at the end")
    add("--center-momentum", type=below_one, default=0.9, help="what is kept of the centre c per step")
    add("--freeze-epochs", type=at_least(0), default=1, help="first epochs with a fixed last layer")
    add("--clip", type=at_least(0, float), default=3.0, help="largest norm of the gradient of each tensor (0: any)")
    add("--epochs", type=positive(int), default=100)
    add("--warmup-epochs", type=at_least(0), default=10)
    add("--batch-size", type=positive(int), default=512, help="images per step over all processes and --accum")
    add("--optimizer", choices=["adamw", "sgd", "lars"], help="default: by --arch")
    add("--lr", type=positive(float), help="per 256 images: multiplied by batch-size / 256 (default: by --arch)")
    add("--min-lr", type=at_least(0, float), default=1e-6, help="at the end, not scaled")
    text = "at the start; not of biases and norms (default: by --arch)"
    add("--weight-decay", type=at_least(0, float), help=text)
    add("--weight-decay-end", type=at_least(0, float), help="default: by --arch; the start's, if only that is given")
    add("--momentum", type=below_one, default=0.9, help="of sgd and lars")
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    kind, small = "vit" if args.arch.startswith(("vit", "xcit")) else "resnet", args.image_size <= 64
    recipe = RECIPES[kind] | (SMALL if small else {})
    usual = recipe["optimizer"]
    if args.optimizer not in (None, usual) and None in (args.lr, args.weight_decay):
        parser.error(f"--optimizer {args.optimizer} needs --lr and --weight-decay: those of the table are for {usual}")
    if args.weight_decay_end is None:
        args.weight_decay_end = args.weight_decay
    for name, value in recipe.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if kind == "resnet" and (name := next((n for n in ("patch_size", "depth", "drop_path") if getattr(args, n)), None)):
        parser.error(f"--{name.replace('_', '-')} is for ViTs and XCiTs: leave it out with --arch {args.arch}")
    patch = args.patch_size or 1
    if kind == "vit" and not args.patch_size:
        patch = (
            xcit.default_patch(args.image_size) if "xcit" in args.arch else default_patch(args.arch, args.image_size)
        )
    near = max(1, round(args.image_size * (1 / 2 if small else 3 / 7) / patch)) * patch
    args.local_size = args.local_size or near
    for name, size in (("image", args.image_size), ("local", args.local_size)):
        if size % patch:
            parser.error(
                f"--{name}-size {size} is not a multiple of the patch size {patch}: try {-(-size // patch) * patch}"
            )
    for name in ("global", "local"):
        low, high = getattr(args, f"{name}_scale")
        if low > high:
            parser.error(f"--{name}-scale {low} {high}: the least share comes first")
    if args.teacher_temp_epochs > args.epochs:
        parser.error(f"--teacher-temp-epochs {args.teacher_temp_epochs} must not exceed --epochs {args.epochs}")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, global_scale, local_size, local_scale, local_crops=8, flip=0.5):
    """Multi-crop: two large crops, of which only the first is always blurred and only the second may be solarised, and
    small ones, which the teacher does not see (official code)."""
    view = View(
        size=size,
        area=tuple(global_scale),
        interpolation="bicubic",
        flip=flip,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=1.0 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
    )
    second = dataclasses.replace(view, blur_p=0.1 * view.blur_p, solarize_p=0.2)
    local = dataclasses.replace(view, size=local_size, area=tuple(local_scale), blur_p=0.5 * view.blur_p)
    return [view, second, *[local] * local_crops]


# ------------------------------------------------------------------------------------------------------ model
def transformer(arch, image_size, width=1.0, patch_size=None, depth=None, channels=3):
    """A ViT with learned positions, started as the official code does: normal numbers of deviation 0.02."""
    backbone = vit(arch, image_size, width, patch_size, depth, positions="learned", channels=channels)
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    backbone.patch_embed.proj.reset_parameters()
    nn.init.trunc_normal_(backbone.cls_token, std=0.02)
    return backbone


class Head(nn.Module):
    """Three layers with GELU, unit length, and a last layer of unit weight vectors: (N, dim) -> (N, out_dim).
    norm: batch norm before each GELU. train_norm: the lengths of the last layer's weights are trained, too."""

    def __init__(self, dim, out_dim=65536, hidden_dim=2048, bottleneck_dim=256, norm=False, train_norm=False):
        super().__init__()
        layers = []
        for inputs in (dim, hidden_dim):
            layers += [nn.Linear(inputs, hidden_dim), *[nn.BatchNorm1d(hidden_dim)] * norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(length)
        length.requires_grad_(train_norm)

    def forward(self, x):
        z = F.normalize(upcast(self.mlp(x)), dim=1)
        with torch.autocast(z.device.type, enabled=False):  # in bf16 the teacher's targets would be off by a percent
            return self.last_layer(z)


class DINO(nn.Module):
    """Student and teacher, each a backbone with a head of the sizes in `head` (see Head), and the teacher's centre.

    drop_path: largest probability that the student leaves out a branch of a block.
    """

    def __init__(self, backbone, drop_path=0.0, **head):
        super().__init__()
        self.backbone, self.drop_path = backbone, drop_path
        self.path_factors = xcit.path_factors if isinstance(backbone, xcit.XCiT) else path_factors
        self.head = Head(backbone.dim, **head)
        self.register_buffer("center", torch.zeros(self.head.last_layer.out_features))
        self.reset_teacher()

    def reset_teacher(self):
        """Makes the teacher a copy of the student as it is now, without gradient."""
        self.teacher_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self, momentum):
        """teacher <- momentum * teacher + (1 - momentum) * student; batch-norm statistics are its own."""
        teacher = [*self.teacher_backbone.parameters(), *self.teacher_head.parameters()]
        student = [*self.backbone.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - momentum)

    @torch.no_grad()
    def update_center(self, mean, momentum):
        """center <- momentum * center + (1 - momentum) * mean, of the teacher's outputs (K,) over all processes."""
        self.center.lerp_(process_mean(mean), 1 - momentum)

    def forward(self, crops, u=None):
        """crops: V tensors (B, 3, S, S), the two large ones first. u: uniforms (B, V, n) for stochastic depth.
        Returns the student's outputs (V, B, K) and the teacher's (2, B, K).

        Crops of one size pass the backbone together, all of them the head: so far go batch-norm statistics.
        """
        features = []
        for size in dict.fromkeys(x.shape[-1] for x in crops):
            group = [v for v, x in enumerate(crops) if x.shape[-1] == size]
            paths = [] if u is None else [self.path_factors(torch.cat([u[:, v] for v in group]), self.drop_path)]
            features.append(self.backbone(torch.cat([crops[v] for v in group]), *paths))
        student = self.head(torch.cat(features))
        with torch.no_grad():
            teacher = self.teacher_head(torch.cat(by_size(self.teacher_backbone, crops[:2])))
        return student.unflatten(0, (len(crops), -1)), teacher.unflatten(0, (2, -1))


def init_head(path, model):
    """Gives the student the head of the teacher in a file, ours or an official one, if there is one of this shape."""
    own, found = model.head.state_dict(), {}
    norm = {"last_layer.weight_g": "original0", "last_layer.weight_v": "original1"}  # names of older files
    for place, tensors in containers(load_file(path, "--init")).items():
        prefix = "head." if place.startswith("teacher.") else "teacher_head."
        head = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        found |= {f"last_layer.parametrizations.weight.{norm[k]}" if k in norm else k: v for k, v in head.items()}
    fits = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in found.items()}
    if fits:
        model.head.load_state_dict(found)
    why = ": that of the file has other sizes" if found else ": the file has none"
    print0(f"head        {'kept, that of the teacher in the file' if fits else 'fresh' + why}")


def teacher_temp(epoch, start, end, epochs):
    """T_t in an epoch, counted from 0: `epochs` values from `start` to `end` in equal steps, then `end`."""
    return end if epoch >= epochs else start + (end - start) * epoch / max(1, epochs - 1)


def half_cosine(step, total, start, end):
    """From `start` at step 0 to `end` at step `total`: the teacher's momentum, the weight decay."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


# ------------------------------------------------------------------------------------------------------- loss
def dino_loss(student, teacher, center, student_temp, teacher_temp):
    """Cross entropy of what the teacher says of a large crop and the student of every other one (equation 3), mean
    over pairs and batch; no gradient into the teacher.

    student (V, B, K), teacher (2, B, K) of the crops that come first, center (K,) -> scalar. Equal outputs give ln K.
    """
    first, second = F.softmax((teacher.detach() - center) / teacher_temp, dim=2)
    wanted = [second, first, *[first + second] * (len(student) - 2)]  # of a crop: the targets but its own
    total = 0.0
    for target, logits in zip(wanted, student, strict=True):  # one at a time: twice as fast as all crops at once
        total = total - (target * F.log_softmax(logits / student_temp, dim=1)).sum()
    return total / (2 * (len(student) - 1) * student.shape[1])


@torch.no_grad()
def entropies(teacher, center, temperature):
    """Entropy of the teacher's outputs (2, B, K), mean over samples, and that of their mean over all samples of all
    processes; as shares of ln K. Both near 1: the teacher says nothing. Both near 0: one output for all images."""
    p = F.softmax((teacher - center) / temperature, dim=2)
    mean = process_mean(p.mean((0, 1)))
    return tuple(torch.special.entr(x).sum(-1).mean() / math.log(p.shape[2]) for x in (p, mean))


# --------------------------------------------------------------------------------------------------- training
def collapsed(spread, mean_spread):
    """What to say of entropies that tell of a collapse, with the cure; else None."""
    if spread > 0.995:
        cure = "lower --teacher-temp (0.02), raise --freeze-epochs or lower --lr"
        return f"the teacher's outputs are uniform (entropy {spread:.3f} of ln K), it teaches nothing: {cure}"
    if mean_spread < 0.02:
        cure = "lower --center-momentum or raise --teacher-temp (up to 0.07)"
        return f"the teacher gives all images one output (entropy {mean_spread:.3f} of ln K): {cure}"


@torch.no_grad()
def clip_each(parameters, most):
    """Scales every gradient whose norm exceeds `most` down to it (official code: each tensor by itself)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    factors = [(most / (norm + 1e-6)).clamp(max=1) for norm in torch._foreach_norm(grads)]
    torch._foreach_mul_(grads, factors)


def main(args):
    run = Run(args)
    crops = (args.local_size, args.local_scale, args.local_crops)
    run.open(augmentation(args.image_size, args.global_scale, *crops, args.flip))
    if args.arch.startswith("vit"):  # DINO
        shape = (args.width, args.patch_size, args.depth)
        backbone = transformer(args.arch, args.image_size, *shape, channels=args.channels)
    elif args.arch.startswith("xcit"):
        shape = (args.width, args.patch_size, args.depth)
        backbone = xcit.xcit(args.arch, args.image_size, *shape, channels=args.channels)
    else:
        backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    head = {"out_dim": args.out_dim, "hidden_dim": args.hidden_dim, "bottleneck_dim": args.bottleneck_dim}
    head |= {"norm": args.head_norm, "train_norm": args.train_last_norm}
    model = run.place(DINO(backbone, args.drop_path, **head))
    if args.init:
        init_head(args.init, model)
        model.reset_teacher()  # DINO: the teacher starts as a copy
    peak = args.lr * args.batch_size / 256
    groups, last = param_groups(model, args.weight_decay), list(model.head.last_layer.parameters())
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=peak)
    else:
        optimizer = {"sgd": torch.optim.SGD, "lars": LARS}[args.optimizer](groups, lr=peak, momentum=args.momentum)
    chance, rule = math.log(args.out_dim), f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    lines = {"lr": rule, "baseline": f"loss ln({args.out_dim}) = {chance:.2f}"}
    lines["schedule"] = f"{args.optimizer}, weight decay {args.weight_decay} to {args.weight_decay_end}"
    lines["crops"] = f"2 of {args.image_size} px, {args.local_crops} of {args.local_size} px"
    net = run.start(model, optimizer, chance=chance, export=model.teacher_backbone, **lines)
    draws = backbone.draws if args.drop_path else 0

    for epoch in run.epochs():
        heat = teacher_temp(epoch, args.teacher_temp_start, args.teacher_temp, args.teacher_temp_epochs)
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=args.min_lr / peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if group["adapt"]:  # DINO: weights; not biases and norms
                    group["weight_decay"] = half_cosine(step, run.total, args.weight_decay, args.weight_decay_end)
            mean = torch.zeros_like(model.center)
            for batch in batches:
                crops = batch.views()
                u = batch.uniforms(len(crops) * draws).view(-1, len(crops), draws).to(run.dtype) if draws else None
                student, teacher = net(crops, u)
                run.backward(dino_loss(student, teacher, model.center, args.student_temp, heat))  # DINO
                mean += teacher.mean((0, 1)) / args.accum
            run.unscale(optimizer)
            if args.clip:
                clip_each(model.parameters(), args.clip)  # DINO
            if step < args.freeze_epochs * run.epoch_steps:  # DINO
                for p in last:
                    p.grad = None
            run.update(optimizer)
            model.update_teacher(half_cosine(step, run.total, args.teacher_momentum, 1.0))  # DINO
            monitors = {}
            if run.due:
                monitors = dict(zip(("entropy", "entropy_mean"), entropies(teacher, model.center, heat), strict=True))
            if monitors and epoch and (text := collapsed(monitors["entropy"], monitors["entropy_mean"])):
                run.warn("collapse", text)
            model.update_center(mean, args.center_momentum)  # DINO: after the loss
            run.log(lr, **monitors)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
