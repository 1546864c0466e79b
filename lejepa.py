"""LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics (Balestriero & LeCun 2025, arXiv
2511.08544), for ViTs and ResNets.

Several crops of each of B images pass one network. The outputs z of an image should agree, and over the images they
should be distributed as independent standard normal numbers. SIGReg tests this along random directions a, |a| = 1, new
in every step: with x = z . a of the N = B outputs of one crop, by the distance of their characteristic function,

    T(a) = N integral_{-3}^{3} |mean_n exp(i t x_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt,
    L = (1 - lambda) mean |z_v - mean of the large crops|^2 / D + lambda mean over directions and crops v of T.

    torchrun --nproc_per_node=8 lejepa.py --data /imagenet
    torchrun --nproc_per_node=8 lejepa.py --data /imagenet --arch resnet50
    python lejepa.py --data digits --arch resnet18 --width 0.25 --dim 128 --batch-size 64 --epochs 40 --lr 4e-3 --flip 0

No predictor, no second network, no stop-gradient. By kind of network, for those of the flags not given:

    --arch  --local-crops  --weight-decay  --drop-path
    vit                 6            0.05          0.1
    resnet              0            5e-4            0

Published: ViT-H/14 79 linear on ImageNet (abstract). ViT-S/16, this recipe, 100 epochs in lightly: linear 64.0 and
k-NN 47.1, by code that still left the large crops out of both terms. Ours: not run.

What to look at: `ratio` is SIGReg over 1.0525, which independent normal outputs have on average whatever N is; equal
outputs have 0.4 N. So lambda * 1.05 is what is left of the loss when all is well, and as T grows with N, --lambd 0.05
weighs more in a larger batch while outputs are not normal yet. `mean` and `sd` are those of the outputs, 0 and 1 of a
normal distribution. Outputs that hardly differ have hardly a gradient: the batch norm in the projector prevents that.

Small images: up to 64 pixels there are two crops, of at least a fifth of the image. Others report 91.0 on CIFAR-10
(ResNet-18, 300 epochs, batch 256, D 128, about --lambd 0.01).
--accum is not the same as the whole batch at once: SIGReg is that of a micro-batch.

Deviations from the paper, whose runs on ImageNet are not fully described: the rate is proportional to the batch
(5e-4 at 512 images); biases and norms have no weight decay; ResNets see two large crops; directions belong to the seed
and the step, the same on any number of processes; bf16 on CUDA, the loss in fp32; images of at most 64 pixels are not
blurred and get a 3x3 stem, those of at most 128 smaller patches. Written from the paper's formulas.
To hack: copy this file. What is LeJEPA: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import rng
from common.args import Parser, at_least, below_one, default_size, image_size, positive, probability, share, width
from common.augment import View, to_device
from common.distributed import all_reduce, process_mean, world_size
from common.features import output_std
from common.networks import network
from common.optim import cosine, param_groups
from common.run import Run
from common.vit import ARCHS, default_patch, path_factors, vit

# -------------------------------------------------------------------------------------------------- arguments
RECIPES = {
    "vit": {"local_crops": 6, "weight_decay": 0.05, "drop_path": 0.1},
    "resnet": {"local_crops": 0, "weight_decay": 5e-4, "drop_path": 0.0},
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    add = parser.add_argument_group("LeJEPA").add_argument
    add("--global-crops", type=positive(int, 100), default=2, help="large crops per image")
    add("--local-crops", type=at_least(0, high=100), help="small crops (default: by --arch, 0 up to 64 px)")
    add("--global-scale", type=share, nargs=2, help="share of the image area (default 0.3 1; 0.2 1 up to 64 px)")
    add("--local-scale", type=share, nargs=2, default=[0.05, 0.3], help="the same of the small crops")
    add("--local-size", type=image_size, help="their pixels (default: 3/7 of --image-size)")
    add("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    add("--arch", default="vit_small", help="vit_tiny, vit_small ..., resnet18 ..., torchvision:NAME or timm:NAME")
    add("--width", type=width, default=1.0, help="multiplier of the backbone's channels")
    add("--patch-size", type=positive(int), help="ViT: pixels (default: 16, less for small images)")
    add("--depth", type=positive(int, 1000), help="ViT: blocks (default: by --arch)")
    add("--drop-path", type=below_one, help="ViT: stochastic depth (default: by --arch)")
    add("--hidden-dim", type=positive(int), default=2048, help="width of the projector's hidden layers")
    add("--dim", type=positive(int), default=512, help="outputs of the projector, D")
    add("--lambd", type=probability, default=0.05, help="lambda: weight of SIGReg")
    add("--slices", type=positive(int), default=1024, help="random directions per step")
    add("--knots", type=at_least(2, high=10000), default=17, help="values of t from 0 to 3 of the trapezoid rule")
    add("--epochs", type=positive(int), default=100)
    add("--warmup-epochs", type=at_least(0), default=10)
    add("--batch-size", type=positive(int), default=512, help="images per step over all processes and --accum")
    add("--lr", type=positive(float), default=2.5e-4, help="per 256 images: multiplied by batch-size / 256")
    add("--weight-decay", type=at_least(0, float), help="not of biases and norms (default: by --arch)")
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    kind, small = "vit" if args.arch.startswith("vit") else "resnet", args.image_size <= 64
    for name, value in (RECIPES[kind] | ({"local_crops": 0} if small else {})).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if kind == "resnet" and (name := next((n for n in ("patch_size", "depth", "drop_path") if getattr(args, n)), None)):
        parser.error(f"--{name.replace('_', '-')} is for ViTs: leave it out with --arch {args.arch}")
    args.global_scale = args.global_scale or [0.2 if small else 0.3, 1.0]
    for name in ("global", "local"):
        low, high = getattr(args, f"{name}_scale")
        if low > high:
            parser.error(f"--{name}-scale {low} {high}: the least share comes first")
    if args.global_crops + args.local_crops < 2:
        parser.error("--global-crops 1 --local-crops 0: outputs of one crop have nothing to agree with, take 2 or more")
    patch = (args.patch_size or default_patch(args.arch, args.image_size)) if args.arch in ARCHS else 1
    args.local_size = args.local_size or max(1, round(args.image_size * 3 / 7 / patch)) * patch
    if args.local_crops and args.local_size % patch:
        near = -(-args.local_size // patch) * patch
        parser.error(f"--local-size {args.local_size} is not a multiple of the patch size {patch}: try {near}")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def augmentation(size, large, scale, local_size, small, local_scale, flip=0.5):
    """`large` crops of `size` pixels, `small` ones of local_size: alike but for size and share of the image area."""
    view = View(
        size=size,
        area=tuple(scale),
        flip=flip,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=0.5 if size > 64 else 0.0,
        blur_sigma=(0.1, 2.0),
        solarize_p=0.2,
    )
    return [view] * large + [dataclasses.replace(view, size=local_size, area=tuple(local_scale))] * small


# ------------------------------------------------------------------------------------------------------ model
def transformer(arch, image_size, width=1.0, patch_size=None, depth=None, channels=3):
    """A ViT with learned positions whose weights start as normal numbers of deviation 0.02, as timm's do."""
    backbone = vit(arch, image_size, width, patch_size, depth, positions="learned", channels=channels)
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return backbone


class LeJEPA(nn.Module):
    """Backbone f and projector of 3 layers.

    hidden_dim: width of the projector's hidden layers, dim: its outputs, D. drop_path: largest probability that a ViT
    leaves out a branch of a block.
    """

    def __init__(self, backbone, hidden_dim=2048, dim=512, drop_path=0.0):
        super().__init__()
        self.backbone, self.drop_path = backbone, drop_path
        self.projector = nn.Sequential(
            nn.Linear(backbone.dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, dim),
        )

    def forward(self, views, u=None):
        """views: V tensors (B, 3, S, S), S may differ. u: uniforms (B, V, n) for stochastic depth. Returns projections
        (V, B, D).

        Views of equal size pass the backbone together, all of them the projector: so far go batch-norm statistics.
        """
        features = []
        for size in dict.fromkeys(x.shape[-1] for x in views):
            group = [v for v, x in enumerate(views) if x.shape[-1] == size]
            paths = [] if u is None else [path_factors(torch.cat([u[:, v] for v in group]), self.drop_path)]
            features.append(self.backbone(torch.cat([views[v] for v in group]), *paths))
        return self.projector(torch.cat(features)).unflatten(0, (len(views), -1))


def random_directions(seed, step, slices, dim):
    """Unit vectors (slices, dim) in float64, drawn on the CPU: the same on every process and every kind of device."""
    generator = torch.Generator().manual_seed(rng.seeds(seed, step, 1)[0])
    return F.normalize(torch.randn(slices, dim, generator=generator, dtype=torch.float64), dim=1)


# ------------------------------------------------------------------------------------------------------- loss
MOST = 2**22  # numbers (N, slices, knots) at a time, and as many for their cosines and sines


def quadrature(knots):
    """The trapezoid rule for T by its symmetry, in NumPy: rows t > 0, weights of squared distances, exp(-t^2 / 2)."""
    t = np.linspace(0, 3, knots)[1:]  # at 0 all characteristic functions are 1
    normal, width = np.exp(-(t**2) / 2), np.full_like(t, 2 * 3 / (knots - 1))
    width[-1] /= 2
    return np.stack([t, width * normal, normal])


def expected(knots):
    """What T is on average for independent standard normal numbers, however many, and T / N for equal zeros."""
    _, weights, normal = quadrature(knots)
    return weights @ (1 - normal**2), weights @ (1 - normal) ** 2


def characteristic_sums(z, directions, t):
    """Sums over the rows of z (N, D) of cos(t x) and sin(t x), x = z . a: (slices, len(t), 2)."""
    angles = (z @ directions.T)[:, :, None] * t
    return torch.stack([angles.cos().sum(0), angles.sin().sum(0)], dim=2)


def sigreg(z, directions, knots=17):
    """Epps and Pulley's test of normality, mean over directions; the same scalar on every process.

    z: (N, D) of one crop, of this process; the test is that of all processes. directions: unit vectors (slices, D).
    knots: values of t from 0 to 3. About 1.05 for standard normal z, 0.402 N for z = 0. Only sums (slices, knots, 2)
    travel and are stored; their insides are computed again for the gradient.
    """
    t, weights, normal = to_device(torch.from_numpy(quadrature(knots)).to(z.dtype), z.device)
    parts = directions.split(max(1, MOST // (len(z) * knots)))
    sums = [checkpoint(characteristic_sums, z, a, t, use_reentrant=False, preserve_rng_state=False) for a in parts]
    batch = len(z) * world_size()
    cosines, sines = (all_reduce(torch.cat(sums)) / batch).unbind(2)
    return batch * (((cosines - normal).square() + sines.square()) @ weights).mean()


def lejepa_terms(z, large, directions, knots=17):
    """Invariance, over the images of this process, and SIGReg: scalars. z: (V, B, D), the `large` large crops first.

    Invariance is the mean square of what z_v lacks to the mean of the large crops: of two, a quarter of their MSE.
    """
    invariance = (z - z[:large].mean(0)).square().mean()
    return invariance, sum(sigreg(view, directions, knots) for view in z) / len(z)


def lejepa_loss(z, large, directions, knots, lambd):
    """(1 - lambd) invariance + lambd SIGReg, a scalar; gradients flow into all crops, the mean included."""
    invariance, normality = lejepa_terms(z, large, directions, knots)
    return (1 - lambd) * invariance + lambd * normality


@torch.no_grad()
def moments(z):
    """Of the outputs z (V, B, D) of all processes: the root mean square over dimensions of their mean, and of their
    standard deviation; 0 and 1 where LeJEPA wants them."""
    mean, square = process_mean(z.mean((0, 1))).square().mean(), process_mean(z.square().mean())
    return mean.sqrt(), (square - mean).clamp(min=0).sqrt()


# --------------------------------------------------------------------------------------------------- training
def main(args):
    run = Run(args)
    crops = (args.global_crops, args.global_scale, args.local_size, args.local_crops, args.local_scale)
    run.open(augmentation(args.image_size, *crops, args.flip))
    if args.arch.startswith("vit"):  # LeJEPA
        shape = (args.width, args.patch_size, args.depth)
        backbone = transformer(args.arch, args.image_size, *shape, channels=args.channels)
    else:
        backbone = network(args.arch, args.width, args.image_size, channels=args.channels)
    model = run.place(LeJEPA(backbone, args.hidden_dim, args.dim, args.drop_path))
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=peak)
    lines = {"lr": f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"}
    floor, equal = expected(args.knots)
    worst = args.lambd * equal * args.batch_size / args.accum
    lines["baseline"] = f"loss {args.lambd:g} x {floor:.4g} = {args.lambd * floor:.4g} for normal outputs that agree"
    lines["baseline"] += f", {worst:.4g} for outputs of 0"
    lines["crops"] = f"{args.global_crops} of {args.image_size} px, {args.local_crops} of {args.local_size} px"
    net = run.start(model, optimizer, **lines)
    draws = backbone.draws if args.drop_path else 0

    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=0.001)  # LeJEPA: ends at 0.001 of the peak
            for group in optimizer.param_groups:
                group["lr"] = lr
            directions = random_directions(args.seed, step, args.slices, args.dim).to(run.dtype)  # LeJEPA
            directions = to_device(directions, run.device)
            for batch in batches:
                views = batch.views()
                u = batch.uniforms(len(views) * draws, rng.PATHS) if draws else None
                z = net(views, u if u is None else u.view(-1, len(views), draws).to(run.dtype))
                run.backward(lejepa_loss(z, args.global_crops, directions, args.knots, args.lambd))  # LeJEPA
            run.update(optimizer)
            monitors = {}
            if run.due:  # LeJEPA
                invariance, test = lejepa_terms(z.detach(), args.global_crops, directions, args.knots)
                monitors = {"invariance": invariance, "sigreg": test, "ratio": test / floor}
                monitors |= dict(zip(("mean", "sd"), moments(z), strict=True))
            run.log(lr, std=output_std(z[0]), **monitors)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
