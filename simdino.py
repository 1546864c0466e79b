"""SimDINO: Simplifying DINO via Coding Rate Regularization (Wu et al., 2025, arXiv 2502.10385), for ViTs, XCiTs and
ResNets.

DINO without prototypes, temperatures and centre. Student and teacher give unit vectors z of p numbers; that of every
crop v is to point where the teacher's of the two large crops i points, and that they all become one vector is prevented
by what DINO's centre and low temperature stand for, the coding rate R of the large crops, which is to be large:
L = -c mean over i = 1, 2 and v != i of <z_s(x_v), z_t(x_i)>  -  mean over i of R(Z_i),
R(Z) = (p + M) / (p M) 1/2 ln det(I + p / (M eps) Z^T Z),  Z_i (n, p): the mean of the student's and the teacher's rows.

    torchrun --nproc_per_node=8 simdino.py --data /imagenet
    torchrun --nproc_per_node=8 simdino.py --data /imagenet --group 0 --out runs/whole

--group n: Z holds n consecutive images of the batch, and R is averaged over these groups, as on the 8 GPUs of 64 images
of the published runs (default: 64), while M counts the images of the whole batch (512), as there. That is a part of the
recipe: so R is at most 0.45; of all 512 images at once, --group 0, summed over all processes and exact, it is up to
2.28, five times the weight, and --coeff has to be found anew. Groups give the same loss for any number of processes and
any --accum that they divide; the whole batch is that of a step only without --accum.

Recipes by kind of network, for those of the flags not given (of ResNets and XCiTs nothing is published: DINO's):

    --arch  --optimizer  --lr  --weight-decay  --weight-decay-end  --drop-path  --global-scale  --local-scale
    vit           adamw  5e-4            0.04                 0.4          0.1           0.4 1       0.05 0.4
    resnet          sgd  0.03            1e-4                1e-4            0          0.14 1      0.05 0.14

Published, ImageNet, k-NN and linear top-1 after 100 epochs (official README): ViT-B/16 74.9 and 77.3 (the authors' run
of DINO: 72.9 and 76.3), ViT-L/16 75.6 and 77.4. Ours: not run. SimDINOv2 is not here.

Small batches (nothing published by the authors): --teacher-momentum 0.9995 for 256 images and fewer with long runs; of
64 images and fewer the whole batch is one group. Up to 64 pixels small crops have half the size and cover 0.2 to 0.4 of
the image. A coding rate near its least value, which is printed, means equal outputs: lower --coeff, --eps or --lr.

What is saved, and judged by k-NN, is the teacher. --init FILE goes on from a backbone, and from the head of the teacher
in the same file if it is there and has this shape; a line says which.

Deviations from the official code: the warm-up of the rate reaches its peak one step later; positions are interpolated
to the exact grid of a crop (there: by a factor with 0.1 added); bf16 on CUDA (there: fp16), the loss in single
precision; a failed factorisation ends the run (there: it is hidden); images of at most 64 pixels are not blurred and
get a 3x3 stem, those of at most 128 smaller patches.
To hack: copy this file. What is SimDINO: the sections augmentation, model and loss, and the lines marked in main.
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
from common.args import Parser, at_least, below_one, default_size, fail, positive, probability, share, toggle
from common.args import image_size as pixels
from common.args import width as multiplier
from common.augment import View
from common.checkpoint import load_file
from common.distributed import all_reduce, print0, world_size
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
    add = parser.add_argument_group("SimDINO").add_argument
    add("--global-scale", type=share, nargs=2, help="least and largest share of the image area in the two large crops")
    add("--local-scale", type=share, nargs=2, help="the same of the small crops (default of both: by --arch)")
    add("--local-crops", type=at_least(0), default=10, help="small crops per image")
    add("--local-size", type=pixels, help="their pixels (default: 3/7 of --image-size; half of it up to 64)")
    add("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    add("--arch", default="vit_base", help="vit_tiny ..., xcit_small_12 ..., resnet18 ..., torchvision:NAME")
    add("--width", type=multiplier, default=1.0, help="multiplier of the backbone's channels")
    add("--patch-size", type=positive(int), help="ViT, XCiT: pixels (default: 16, less for small images)")
    add("--depth", type=positive(int, 1000), help="ViT, XCiT: blocks (default: by --arch)")
    add("--drop-path", type=below_one, help="ViT, XCiT: stochastic depth of the student (default: by --arch)")
    add("--out-dim", type=at_least(2), default=256, help="p, outputs of the head")
    add("--hidden-dim", type=positive(int), default=2048, help="hidden layers of the head")
    add("--head-norm", action=toggle, default=False, help="batch norm in the head")
    add("--coeff", type=at_least(0, float), default=1.0, help="c, weight of the similarity")
    add("--eps", type=positive(float), default=0.05, help="eps of the coding rate")
    text = "images of a coding rate, 0: of the whole batch (default: 64; 0 where the batch has no more)"
    add("--group", type=at_least(0), help=text)
    add("--smooth", action=toggle, default=True, help="Z: mean of student and teacher; without, the student's alone")
    add("--teacher-momentum", type=probability, default=0.996, help="m at the start; 1 at the end")
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
    if args.group is None:
        args.group = 64 if args.batch_size > 64 else 0
    if args.group == 1:
        parser.error("--group 1: one image alone cannot be spread; choose 2 or more, or 0 for the whole batch")
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
    """Three layers with GELU, and unit length: (N, dim) -> (N, out_dim). norm: batch norm before each GELU."""

    def __init__(self, dim, out_dim=256, hidden_dim=2048, norm=False):
        super().__init__()
        layers = []
        for inputs in (dim, hidden_dim):
            layers += [nn.Linear(inputs, hidden_dim), *[nn.BatchNorm1d(hidden_dim)] * norm, nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        return F.normalize(upcast(self.mlp(x)), dim=1)


class SimDINO(nn.Module):
    """Student and teacher, each a backbone with a head of the sizes in `head` (see Head).

    drop_path: largest probability that the student leaves out a branch of a block.
    """

    def __init__(self, backbone, drop_path=0.0, **head):
        super().__init__()
        self.backbone, self.drop_path = backbone, drop_path
        self.path_factors = xcit.path_factors if isinstance(backbone, xcit.XCiT) else path_factors
        self.head = Head(backbone.dim, **head)
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
    for place, tensors in containers(load_file(path, "--init")).items():
        prefix = "head." if place.startswith("teacher.") else "teacher_head."
        found |= {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    fits = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in found.items()}
    if fits:
        model.head.load_state_dict(found)
    why = ": that of the file has other sizes" if found else ": the file has none"
    print0(f"head        {'kept, that of the teacher in the file' if fits else 'fresh' + why}")


def half_cosine(step, total, start, end):
    """From `start` at step 0 to `end` at step `total`: the teacher's momentum, the weight decay."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


# ------------------------------------------------------------------------------------------------------- loss
def simdino_loss(student, teacher, group=0, total=None, eps=0.05, coeff=1.0, smooth=True):
    """Minus `coeff` times the similarity, minus the coding rate of the large crops; no gradient into the teacher.
    student (V, B, p), teacher (2, B, p) of the crops that come first, rows of unit length -> scalar."""
    large = (student[:2] + teacher.detach()) / 2 if smooth else student[:2]
    return -coeff * similarity(student, teacher) - coding_rate(large, group, total, eps)


def similarity(student, teacher):
    """Cosine of what the teacher says of a large crop and the student of every other one, mean over pairs and batch."""
    first, second = teacher.detach()
    wanted = [second, first, *[first + second] * (len(student) - 2)]  # of a crop: the targets but its own
    return (torch.stack(wanted) * student).sum() / (2 * (len(student) - 1) * student.shape[1])


def coding_rate(z, group=0, total=None, eps=0.05):
    """R(Z) of rows z (V, B, p), mean over views and groups of `group` rows of this process; 0: one group of the rows of
    all processes. total: M (default: all those rows). Not finite where a factorisation fails."""
    dim, total = z.shape[2], total or z.shape[1] * world_size()
    z = z.unflatten(1, (-1, group)) if group else z
    covariance = z.mT @ z if group else all_reduce(z.mT @ z)
    identity = torch.eye(dim, dtype=z.dtype, device=z.device)
    factor, failed = torch.linalg.cholesky_ex(identity + dim / (total * eps) * covariance)
    rates = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) / (failed == 0)  # 1/2 ln det
    return (dim + total) / (dim * total) * rates.mean()


def bounds(dim, rows, total, eps):
    """Coding rate of `rows` unit vectors that are all equal, and of those that are spread evenly."""
    values = [n / 2 * math.log1p(dim * rows / (n * total * eps)) for n in (1, min(rows, dim))]
    return [(dim + total) / (dim * total) * value for value in values]


# --------------------------------------------------------------------------------------------------- training
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
    if args.batch_size // args.accum < 2:  # SimDINO
        fail(f"a coding rate needs 2 images or more: --batch-size {2 * args.accum} or more")
    if args.group and (images := run.loader.local) % args.group:
        fitting = n if (n := math.gcd(images, args.group)) > 1 else images
        fail(f"--group {args.group} does not divide the {images} images of a process: try {fitting}, or 0 (all)")
    if args.arch.startswith("vit"):  # SimDINO
        shape = (args.width, args.patch_size, args.depth)
        backbone = transformer(args.arch, args.image_size, *shape, channels=args.channels)
    elif args.arch.startswith("xcit"):
        shape = (args.width, args.patch_size, args.depth)
        backbone = xcit.xcit(args.arch, args.image_size, *shape, channels=args.channels)
    else:
        backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    head = {"out_dim": args.out_dim, "hidden_dim": args.hidden_dim, "norm": args.head_norm}
    model = run.place(SimDINO(backbone, args.drop_path, **head))
    if args.init:
        init_head(args.init, model)
        model.reset_teacher()  # SimDINO: the teacher starts as a copy
    peak = args.lr * args.batch_size / 256
    groups = param_groups(model, args.weight_decay)
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=peak)
    else:
        optimizer = {"sgd": torch.optim.SGD, "lars": LARS}[args.optimizer](groups, lr=peak, momentum=args.momentum)
    count = (args.group, args.batch_size if args.group else args.batch_size // args.accum)  # SimDINO: n, M
    low, high = bounds(args.out_dim, args.group or count[1], count[1], args.eps)
    lines = {"lr": f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"}
    lines["baseline"] = f"coding rate {low:.3f} (equal outputs) to {high:.3f}, loss {-args.coeff - high:.3f} at best"
    lines["schedule"] = f"{args.optimizer}, weight decay {args.weight_decay} to {args.weight_decay_end}"
    lines["crops"] = f"2 of {args.image_size} px, {args.local_crops} of {args.local_size} px"
    net = run.start(model, optimizer, export=model.teacher_backbone, **lines)
    draws = backbone.draws if args.drop_path else 0

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=args.min_lr / peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if group["adapt"]:  # SimDINO: weights; not biases and norms
                    group["weight_decay"] = half_cosine(step, run.total, args.weight_decay, args.weight_decay_end)
            for batch in batches:
                crops = batch.views()
                u = batch.uniforms(len(crops) * draws).view(-1, len(crops), draws).to(run.dtype) if draws else None
                student, teacher = net(crops, u)
                run.backward(simdino_loss(student, teacher, *count, args.eps, args.coeff, args.smooth))  # SimDINO
            run.unscale(optimizer)
            if args.clip:
                clip_each(model.parameters(), args.clip)  # SimDINO
            run.update(optimizer)
            model.update_teacher(half_cosine(step, run.total, args.teacher_momentum, 1.0))  # SimDINO
            monitors = {}
            if run.due:
                rate = coding_rate(student[:2].detach(), *count, args.eps)
                monitors = {"similarity": similarity(student.detach(), teacher), "coding_rate": rate}
                if epoch and rate < low + 0.02 * (high - low):
                    text = f"all outputs are nearly equal (coding rate {rate:.3f}, at least {low:.3f})"
                    run.warn("collapse", f"{text}: lower --coeff, --eps or --lr")
            run.log(lr, **monitors)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
