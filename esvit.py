"""EsViT: Efficient Self-supervised Vision Transformers for Representation Learning (Li et al., ICLR 2022, arXiv
2106.09785), for Swin transformers and for ResNets.

DINO's loss between views, and the same between regions: a region n of a student's crop has to predict what the teacher
says of that region m*(n) of a large crop whose features are most alike,
L = 1/2 L_V + 1/2 L_R,  L_R = mean over i = 1, 2, crops v != i and their regions n of
-sum_k P_t(x_i, m*(n))[k] log P_s(x_v, n)[k],  m*(n) = argmax_m cos(f_s(x_v, n), f_t(x_i, m)).
The features f are those of the backbones, without gradient through the choice; regions have a head and a centre of
their own. Swin has no class token: the feature of a view is the mean of its regions.

    torchrun --nproc_per_node=8 esvit.py --data /imagenet
    torchrun --nproc_per_node=8 esvit.py --data /imagenet --no-regions --epochs 200 --out runs/views
    torchrun --nproc_per_node=8 esvit.py --data /imagenet --epochs 100 --init runs/views/last.pt

The last two lines are the authors' way with large models: views alone first, then both with a fresh region head; a line
says which heads were kept.

Published, ImageNet, linear and k-NN top-1 after 300 epochs (official README): Swin-T 78.0 and 75.7, Swin-S 79.5 and
77.7, Swin-B 80.4 and 78.9 (windows of 7), ResNet-50 75.7 and 71.3; views alone: Swin-T 77.0 and 74.2, ResNet-50 75.0
and 69.1. Ours: not run.

Memory: at 224 px, 2 x 49 + 8 x 9 = 170 regions per image; with K = 65,536 outputs in fp32 their logits take 45 MB per
image, and the loss keeps them about three times: 4.3 GB for 32 images. --out-dim 8192 takes an eighth of it.
Small images (nothing published by the authors): --out-dim 1024 to 8192; Swin gets smaller patches and windows.

Deviations from the official code: as dino.py's (warm-up, centres with --accum, precision, images of at most 64 pixels);
the published ResNet-50 starts from views after 200 epochs at batch 1024.
To hack: copy this file. What is EsViT: the sections augmentation, model and loss, and the lines marked in main.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from common.args import Parser, at_least, below_one, default_size, positive, probability, share, toggle
from common.args import image_size as pixels
from common.args import width as multiplier
from common.augment import View
from common.checkpoint import load_file
from common.distributed import print0, process_mean
from common.layouts import containers
from common.optim import cosine, param_groups, upcast
from common.resnet import resnet
from common.run import Run
from common.swin import default_patch, path_factors, swin

# -------------------------------------------------------------------------------------------------- arguments
SCALES = {"global_scale": [0.4, 1.0], "local_scale": [0.05, 0.4]}
SMALL = {"global_scale": [0.4, 1.0], "local_scale": [0.2, 0.4]}  # of images of at most 64 pixels


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_common(__file__)  # --data, --out, --resume, --seed ...: what is the same in every script
    add = parser.add_argument_group("EsViT").add_argument
    add("--global-scale", type=share, nargs=2, help="least and largest share of the image area in the two large crops")
    add("--local-scale", type=share, nargs=2, help="the same of the small crops (default of both: by --arch)")
    add("--local-crops", type=at_least(0), default=8, help="small crops per image")
    add("--local-size", type=pixels, help="their pixels (default: 3/7 of --image-size; half of it up to 64)")
    add("--flip", type=probability, default=0.5, help="probability of a mirrored view")
    add("--arch", default="swin_tiny", help="swin_tiny, small, base, or resnet18 ... resnet152")
    add("--width", type=multiplier, default=1.0, help="multiplier of the backbone's channels")
    add("--patch-size", type=positive(int), help="Swin: pixels (default: 4, less for small images)")
    add("--window", type=positive(int), help="Swin: patches along a window's side (default: 7, less for small images)")
    add("--drop-path", type=below_one, help="Swin: stochastic depth of the student (default: 0.1, 0.2 but for tiny)")
    add("--regions", action=toggle, default=True, help="match regions, too; without, this is DINO")
    add("--out-dim", type=at_least(2), default=65536, help="K, outputs of the head")
    add("--hidden-dim", type=positive(int), default=2048, help="hidden layers of the head")
    add("--bottleneck-dim", type=at_least(2), default=256, help="what its last layer sees")
    add("--head-norm", action=toggle, default=False, help="batch norm in the heads")
    text = "train the norms of the last layer's weights, too (official: not for Swin-B with windows of 14)"
    add("--train-last-norm", action=toggle, default=True, help=text)
    add("--student-temp", type=positive(float), default=0.1, help="T_s")
    add("--teacher-temp", type=positive(float), default=0.07, help="T_t; above 0.07 nothing is learned")
    add("--teacher-temp-start", type=positive(float), default=0.04, help="T_t in the first epoch")
    add(
        "--teacher-temp-epochs",
        type=at_least(0),
        help="from there to --teacher-temp (default: 30, or a tenth of --epochs)",
    )
    add("--teacher-momentum", type=probability, default=0.996, help="m at the start; 1 at the end")
    add("--center-momentum", type=below_one, default=0.9, help="what is kept of the centre c per step")
    add("--freeze-epochs", type=at_least(0), default=1, help="first epochs with a fixed last layer")
    add("--clip", type=at_least(0, float), default=3.0, help="largest norm of the gradient of each tensor (0: any)")
    add("--epochs", type=positive(int), default=300)
    add("--warmup-epochs", type=at_least(0), default=10)
    add("--batch-size", type=positive(int), default=512, help="images per step over all processes and --accum")
    add("--lr", type=positive(float), default=5e-4, help="per 256 images: multiplied by batch-size / 256")
    add("--min-lr", type=at_least(0, float), default=1e-6, help="at the end, not scaled")
    add("--weight-decay", type=at_least(0, float), default=0.04, help="at the start; not of biases and norms")
    add("--weight-decay-end", type=at_least(0, float), default=0.4)
    args = parser.parse_args(argv)
    args.image_size = args.image_size or default_size(args.data)
    swin_like, small = args.arch.startswith("swin"), args.image_size <= 64
    for name, value in (SMALL if small else SCALES).items():
        setattr(args, name, getattr(args, name) or value)
    if not swin_like and (name := next((n for n in ("patch_size", "window", "drop_path") if getattr(args, n)), None)):
        parser.error(f"--{name.replace('_', '-')} is for Swin: leave it out with --arch {args.arch}")
    if args.drop_path is None:
        args.drop_path = (0.1 if args.arch == "swin_tiny" else 0.2) if swin_like else 0.0
    patch = (args.patch_size or default_patch(args.image_size)) if swin_like else 1
    args.local_size = args.local_size or max(1, round(args.image_size * (1 / 2 if small else 3 / 7) / patch)) * patch
    for name, size in (("image", args.image_size), ("local", args.local_size)):
        if size % patch:
            parser.error(
                f"--{name}-size {size} is not a multiple of the patch size {patch}: try {-(-size // patch) * patch}"
            )
    if args.teacher_temp_epochs is None:
        args.teacher_temp_epochs = 30 if args.epochs >= 60 else args.epochs // 10
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
def region_features(backbone, x, *paths):
    """(B, N, dim): a ResNet's last map, or a Swin's tokens after the final norm, row by row."""
    if hasattr(backbone, "stages"):
        return backbone.stages(x)[-1].flatten(2).transpose(1, 2)
    return backbone.tokens(x, *paths)


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


class EsViT(nn.Module):
    """Student and teacher, each a backbone with two heads of the sizes in `head` (see Head), one for views and, if
    regions, one for regions; and the teacher's centres.

    drop_path: largest probability that the student leaves out a branch of a block (Swin).
    """

    def __init__(self, backbone, drop_path=0.0, regions=True, **head):
        super().__init__()
        self.backbone, self.drop_path = backbone, drop_path
        self.head = Head(backbone.dim, **head)
        self.region_head = Head(backbone.dim, **head) if regions else None
        self.register_buffer("centers", torch.zeros(1 + regions, self.head.last_layer.out_features))
        self.reset_teacher()

    def reset_teacher(self):
        """Makes the teacher a copy of the student as it is now, without gradient."""
        student = nn.ModuleList([self.backbone, self.head, self.region_head or nn.Identity()])
        self.teacher_backbone, self.teacher_head, region_head = copy.deepcopy(student).requires_grad_(False)
        self.teacher_region_head = region_head if self.region_head else None

    @torch.no_grad()
    def update_teacher(self, momentum):
        """teacher <- momentum * teacher + (1 - momentum) * student; batch-norm statistics are its own."""
        named = dict(self.named_parameters())
        student = [k for k in named if not k.startswith("teacher_")]
        torch._foreach_lerp_([named[f"teacher_{k}"] for k in student], [named[k] for k in student], 1 - momentum)

    @torch.no_grad()
    def update_centers(self, means, momentum):
        """centers <- momentum * centers + (1 - momentum) * means, of the teacher's outputs, over all processes."""
        self.centers.lerp_(process_mean(means), 1 - momentum)

    def forward(self, crops, u=None):
        """crops: V tensors (B, 3, S, S), the two large ones first. u: uniforms (B, V, n) for stochastic depth. Returns
        outputs for views, the student's (V, B, K) and the teacher's (2, B, K); with regions also those for the regions
        of all crops side by side, (B, R, K) and (B, 2N, K), and their features (B, R, D) and (B, 2N, D).

        Crops of one size pass the backbone together, all of them the heads: so far go batch-norm statistics.
        """
        maps = []
        for size in dict.fromkeys(x.shape[-1] for x in crops):
            group = [v for v, x in enumerate(crops) if x.shape[-1] == size]
            paths = [] if u is None else [path_factors(torch.cat([u[:, v] for v in group]), self.drop_path)]
            maps += region_features(self.backbone, torch.cat([crops[v] for v in group]), *paths).chunk(len(group))
        student = self.head(torch.cat([x.mean(1) for x in maps])).unflatten(0, (len(crops), -1))
        with torch.no_grad():
            teacher_maps = region_features(self.teacher_backbone, torch.cat(crops[:2])).chunk(2)
            teacher = self.teacher_head(torch.cat([x.mean(1) for x in teacher_maps])).unflatten(0, (2, -1))
        if self.region_head is None:
            return student, teacher
        features, teacher_features = torch.cat(maps, 1), torch.cat(teacher_maps, 1)
        with torch.no_grad():
            teacher_regions = self.teacher_region_head(teacher_features.flatten(0, 1)).unflatten(0, (len(crops[0]), -1))
        regions = self.region_head(features.flatten(0, 1)).unflatten(0, (len(crops[0]), -1))
        return student, teacher, regions, teacher_regions, features.detach(), teacher_features


def init_head(path, head, name="head"):
    """Gives a head of the student that of the teacher in a file, ours or an official one, if there is one of this
    shape. name: of it in our files; official ones call it head or head_dense."""
    own, found, theirs = head.state_dict(), {}, {"head": "head.", "region_head": "head_dense."}[name]
    norm = {"last_layer.weight_g": "original0", "last_layer.weight_v": "original1"}  # names of older files
    for place, tensors in containers(load_file(path, "--init")).items():
        prefix = theirs if place.startswith("teacher.") else f"teacher_{name}."
        part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        found |= {f"last_layer.parametrizations.weight.{norm[k]}" if k in norm else k: v for k, v in part.items()}
    fits = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in found.items()}
    if fits:
        head.load_state_dict(found)
    why = ": that of the file has other sizes" if found else ": the file has none"
    print0(f"{name:<11} {'kept, that of the teacher in the file' if fits else 'fresh' + why}")


def teacher_temp(epoch, start, end, epochs):
    """T_t in an epoch, counted from 0: `epochs` values from `start` to `end` in equal steps, then `end`."""
    return end if epoch >= epochs else start + (end - start) * epoch / max(1, epochs - 1)


def half_cosine(step, total, start, end):
    """From `start` at step 0 to `end` at step `total`: the teacher's momentum, the weight decay."""
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


# ------------------------------------------------------------------------------------------------------- loss
def view_loss(student, teacher, center, student_temp, teacher_temp):
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


def region_loss(student, teacher, features, teacher_features, counts, center, student_temp, teacher_temp):
    """Cross entropy of every region of a student's crop with that region of a large crop whose features are most alike
    (equation 3 of the paper), mean over regions, pairs of crops and batch; no gradient into teacher and choice.

    student (B, R, K) and features (B, R, D): regions of all crops side by side, counts (V) of them in each crop.
    teacher (B, 2N, K), teacher_features (B, 2N, D): of the two large crops, which come first. Equal outputs give ln K.
    """
    targets = F.softmax((teacher.detach() - center) / teacher_temp, dim=2).chunk(2, 1)
    keys = F.normalize(upcast(teacher_features), dim=2).chunk(2, 1)
    queries = F.normalize(upcast(features), dim=2).split(counts, 1)
    total, pairs = 0.0, 2 * (len(counts) - 1)
    for v, (logits, query) in enumerate(zip(student.split(counts, 1), queries, strict=True)):
        wanted = 0.0
        for i in range(2):
            if i != v:
                best = (query @ keys[i].transpose(1, 2)).argmax(2)  # m*(n), (B, regions of crop v)
                wanted = wanted + targets[i].gather(1, best[:, :, None].expand(-1, -1, targets[i].shape[2]))
        total = total - (wanted * F.log_softmax(logits / student_temp, dim=2)).sum(2).mean()
    return total / pairs


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
    if args.arch.startswith("swin"):  # EsViT
        shape = (args.width, args.patch_size, args.window)
        backbone = swin(args.arch, args.image_size, *shape, channels=args.channels, eps=1e-6)
    else:
        backbone = resnet(args.arch, args.width, args.image_size, channels=args.channels)
    head = {"out_dim": args.out_dim, "hidden_dim": args.hidden_dim, "bottleneck_dim": args.bottleneck_dim}
    head |= {"norm": args.head_norm, "train_norm": args.train_last_norm}
    model = run.place(EsViT(backbone, args.drop_path, args.regions, **head))
    heads = {"head": model.head} | ({"region_head": model.region_head} if args.regions else {})
    if args.init:
        for name, part in heads.items():
            init_head(args.init, part, name)
        model.reset_teacher()  # EsViT: the teacher starts as a copy
    peak = args.lr * args.batch_size / 256
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=peak)
    last = [p for part in heads.values() for p in part.last_layer.parameters()]
    chance, rule = math.log(args.out_dim), f"{args.lr} x {args.batch_size}/256 = {peak:.4g}"
    lines = {"lr": rule, "baseline": f"loss ln({args.out_dim}) = {chance:.2f}"}
    lines["schedule"] = f"weight decay {args.weight_decay} to {args.weight_decay_end}"
    lines["crops"] = f"2 of {args.image_size} px, {args.local_crops} of {args.local_size} px"
    net = run.start(model, optimizer, chance=chance, export=model.teacher_backbone, **lines)
    draws = backbone.draws if args.drop_path else 0

    for epoch in run.epochs():
        heat = teacher_temp(epoch, args.teacher_temp_start, args.teacher_temp, args.teacher_temp_epochs)
        for step, batches in run.steps(epoch):
            lr = peak * cosine(step, run.total, run.warmup, final=args.min_lr / peak)
            for group in optimizer.param_groups:
                group["lr"] = lr
                if group["adapt"]:  # EsViT: weights; not biases and norms
                    group["weight_decay"] = half_cosine(step, run.total, args.weight_decay, args.weight_decay_end)
            means = torch.zeros_like(model.centers)
            for batch in batches:
                crops = batch.views()
                u = batch.uniforms(len(crops) * draws).view(-1, len(crops), draws).to(run.dtype) if draws else None
                student, teacher, *regions = net(crops, u)
                loss = view_loss(student, teacher, model.centers[0], args.student_temp, heat)
                means[0] += teacher.mean((0, 1)) / args.accum
                if args.regions:  # EsViT
                    large = regions[1].shape[1] // 2
                    small = (regions[0].shape[1] - 2 * large) // max(1, args.local_crops)
                    counts = [large] * 2 + [small] * args.local_crops
                    match = region_loss(*regions, counts, model.centers[1], args.student_temp, heat)
                    means[1] += regions[1].mean((0, 1)) / args.accum
                    loss = (loss + match) / 2
                run.backward(loss)
            run.unscale(optimizer)
            if args.clip:
                clip_each(model.parameters(), args.clip)
            if step < args.freeze_epochs * run.epoch_steps:
                for p in last:
                    p.grad = None
            run.update(optimizer)
            model.update_teacher(half_cosine(step, run.total, args.teacher_momentum, 1.0))
            monitors = {}
            if run.due:
                monitors = dict(
                    zip(("entropy", "entropy_mean"), entropies(teacher, model.centers[0], heat), strict=True)
                )
                if args.regions:
                    region = entropies(regions[1].transpose(0, 1), model.centers[1], heat)
                    monitors |= dict(zip(("regions", "regions_mean"), region, strict=True))
            if monitors and epoch and (text := collapsed(monitors["entropy"], monitors["entropy_mean"])):
                run.warn("collapse", text)
            model.update_centers(means, args.center_momentum)
            run.log(lr, **monitors)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
