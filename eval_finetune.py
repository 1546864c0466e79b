"""Fine-tuning a pre-trained network on labelled images: end to end, or with 1 % and 10 % of the labels.

    torchrun --nproc_per_node=8 eval_finetune.py --pretrained runs/mae/backbone.pt --data /imagenet
    torchrun --nproc_per_node=4 eval_finetune.py --pretrained runs/moco/backbone.pt --data /imagenet --labels 1% --grid
    python eval_finetune.py --pretrained random --arch resnet18 --width 0.25 --data digits --epochs 5

--recipe vit: that of MAE (He et al., CVPR 2022, arXiv 2111.06377, as in its code): learning rates that fall from layer
to layer, drop path, RandAugment, random erasing, mixup and CutMix; the mean of the patch tokens passes a fresh norm and
the classifier. semi: a ResNet on few labels, as OpenSelfSup and MMSelfSup run it; --grid tries 3 learning rates x 3
multipliers of the classifier's. plain: crops, flips and cross-entropy. Every number can be replaced by its flag.

recipe  epochs  batch  lr per 256  schedule                     weight decay  layer decay  drop path
vit     100     1024   5e-4        AdamW, warm-up 5, cosine     0.05          0.65         0.1       ViT-B and smaller
        50      1024   1e-3        AdamW, warm-up 5, cosine     0.05          0.75         0.2, 0.3  ViT-L, ViT-H
semi    20      256    0.01        SGD, x0.2 at 60 % and 80 %   5e-4          -            -         10 %: 1e-4
plain   30      256    0.01        SGD, cosine                  1e-4          -            -         a ViT: as vit

Published, ImageNet top-1: MAE, 1600 epochs, ViT-B 83.6, ViT-L 85.9, ViT-H 86.9 (official); ViT-B, 400 epochs, 83.1
(MMSelfSup 0.11). MoCo v2, best of nine, 1 % 39.1, 10 % 61.8 (OpenSelfSup). Ours: not run.
SwAV: --weight-decay 0 and, 1 %, --lr 0.02 --head-lr 250, 10 %, --lr 0.01 --head-lr 20. Barlow Twins, 1 %:
--weight-decay 0 --lr 0.005 --head-lr 100 --schedule cosine.

Deviations: nothing random depends on the number of processes. So an image is mixed with its neighbour in the shuffled
order, not with the mirrored place in its process's batch, and 32 images share a draw, as did those of each of the 32
processes behind the published ViT-B. --labels 1% draws its images, balanced over the classes, unless it is given a list
such as SimCLR's. Not published, our choice: all of plain, ViTs below B, a multiplier of 100 without --grid.
"best" and the best of the grid are chosen on the test images, as is usual; the last is not.
"""

import argparse
import copy
import math
import re
import sys
import time
import types
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from tqdm import tqdm

from common.augment import FLIP, JITTER, EvalView, View, uniforms
from common.checkpoint import load_backbone, resume, save
from common.data import Loader, Subset, default_size, eval_batches, labelled
from common.distributed import finish, init, mean, parallel, print0, rank, sync_batch_norm, world_size
from common.log import Logger, Parser, check_args, describe, fail, plain, report, save_views
from common.optim import cosine, full, precision
from common.vit import path_factors

MIXED = {"rand_augment": 9.0, "erase": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
UNMIXED = dict.fromkeys(MIXED, 0.0)
VIT = {"epochs": 100, "warmup_epochs": 5, "batch_size": 1024, "lr": 5e-4, "min_lr": 1e-6, "weight_decay": 0.05}
VIT |= {"layer_decay": 0.65, "drop_path": 0.1, "head_lr": 1.0, "schedule": "cosine", "val_every": 1}
SGD = {"warmup_epochs": 0, "batch_size": 256, "lr": 0.01, "min_lr": 0.0, "layer_decay": 1.0, "drop_path": 0.0}
RECIPES = {  # by name and by whether the network is a ViT
    ("vit", True): VIT | MIXED,
    ("plain", True): VIT | UNMIXED,
    ("semi", False): SGD | UNMIXED | {"epochs": 20, "head_lr": 100.0, "schedule": "step", "val_every": 5},
    ("plain", False): SGD | UNMIXED | {"epochs": 30, "head_lr": 1.0, "schedule": "cosine", "val_every": 1},
}
LARGE = {"epochs": 50, "lr": 1e-3, "layer_decay": 0.75}
BY_ARCH = {"vit_large": LARGE | {"drop_path": 0.2}, "vit_huge": LARGE | {"drop_path": 0.3}}
GRID = [(lr, head_lr) for lr in (0.1, 0.01, 0.001) for head_lr in (1.0, 10.0, 100.0)]
GROUP = 32  # images that share a draw of mixup or CutMix
EVAL_BATCH = 256
DRAW, EXTRA, ERASE, PATHS, MIXING = 100, 101, 102, 103, 2**40  # streams of random numbers


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--pretrained", required=True, help="backbone.pt, last.pt, published weights, or random")
    group.add_argument("--data", required=True, help="folder with train/ and val/, or digits, cifar10[:DIR] ...")
    group.add_argument("--train-list", help="list file of training images, 'relative/path label' per line")
    group.add_argument("--val-list", help="list file of test images")
    group.add_argument("--labels", help="1%%, 10%% ... (balanced draw), or a list file of the labelled training images")
    group.add_argument("--arch", help="where the file does not say (default: resnet50)")
    group.add_argument("--width", type=float, help="where the file does not say (default: 1)")
    group.add_argument("--channels", type=int, help="of a random initialisation (default: 3); a file tells it")
    group.add_argument("--image-size", type=int, help="default: that of the file, else what fits the data")
    group.add_argument("--crop-min", type=float, default=0.08, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=float, default=0.5, help="probability of a mirrored image")
    group.add_argument("--trust-pickle", action="store_true", help="restore any type: the file could run any program")
    group = parser.add_argument_group("recipe (defaults: the table above)")
    text = "default: vit for a ViT, semi for a ResNet with --labels, else plain"
    group.add_argument("--recipe", choices=["vit", "semi", "plain"], help=text)
    group.add_argument("--grid", action="store_true", help="semi: nine runs, lr {.1 .01 .001} x head-lr {1 10 100}")
    group.add_argument("--freeze", type=int, default=0, help="layers to keep: 1 stem or embedding, 2 also the next ...")
    group.add_argument("--epochs", type=int)
    group.add_argument("--warmup-epochs", type=int)
    group.add_argument("--batch-size", type=int, help="images per step over all processes and --accum")
    group.add_argument("--accum", type=int, default=1, help="micro-batches per step")
    group.add_argument("--lr", type=float, help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--head-lr", type=float, help="multiplier of the classifier's learning rate")
    group.add_argument("--layer-decay", type=float, help="factor of the learning rate from a layer to the one below")
    group.add_argument("--schedule", choices=["cosine", "step"], help="step: x0.2 at 60 and at 80 %% of the epochs")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--drop-path", type=float, help="probability in the last block")
    group.add_argument("--rand-augment", type=float, help="magnitude up to 10 (0: no RandAugment)")
    group.add_argument("--erase", type=float, help="probability of a rectangle of noise")
    group.add_argument("--mixup", type=float, help="alpha of the Beta distribution (0: none)")
    group.add_argument("--cutmix", type=float, help="alpha of the Beta distribution (0: none)")
    group.add_argument("--smoothing", type=float, help="share of the target that is spread over all classes")
    group = parser.add_argument_group("run")
    group.add_argument("--out", help="folder of eval_finetune.json (default: beside the checkpoint, or runs/random)")
    group.add_argument("--resume", action="store_true", default=True, help="continue from finetune_last.pt in --out")
    group.add_argument("--no-resume", dest="resume", action="store_false", help="start again, overwriting it")
    group.add_argument("--max-steps", type=int, default=0, help="stop after this many steps, keeping the schedule")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, default=8, help="loading threads per process")
    group.add_argument("--device", default="auto")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16", "fp64"], default="auto")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--log-every", type=int, default=20, help="steps")
    group.add_argument("--save-every", type=float, default=10, help="minutes")
    group.add_argument("--val-every", type=int, help="epochs between validations; the end is always validated")
    return parser.parse_args(argv)


def complete(args, backbone, meta, share):
    """The arguments with everything that was left out filled in. share: the labelled part of the training images."""
    is_vit = not hasattr(backbone, "stages")
    default = "vit" if is_vit else "semi" if args.labels else "plain"
    recipe = args.recipe or default
    if (recipe, is_vit) not in RECIPES:
        fail(f"--recipe {recipe} is not made for {meta['arch']}: choose {default} or plain")
    if args.grid and (recipe != "semi" or args.lr is not None or args.head_lr is not None):
        fail("--grid goes with --recipe semi and sets --lr and --head-lr itself: leave those two out")
    defaults = {"weight_decay": 5e-4 if recipe == "semi" and share <= 0.05 else 1e-4} | RECIPES[recipe, is_vit]
    defaults |= BY_ARCH.get(meta["arch"], {}) | {k: meta[k] for k in ("arch", "width", "image_size")}
    defaults["out"] = "runs/random" if str(args.pretrained) == "random" else str(Path(args.pretrained).parent)
    given = {k: v for k, v in vars(args).items() if v is not None}
    args = argparse.Namespace(**defaults | given | {"recipe": recipe})
    check_args(args)
    if args.drop_path == 1 or (args.drop_path and not is_vit):
        fail("--drop-path must be below 1, and is for vision transformers only")
    if (args.mixup or args.cutmix) and args.batch_size // (world_size() * args.accum) % 2:
        fail("--mixup and --cutmix mix pairs: --batch-size must be a multiple of 2 x processes x --accum")
    return args


# ------------------------------------------------------------------------------------------------------- data
def balanced(labels, share, seed):
    """Indices, sorted, of a class-balanced draw of floor(share N) samples, at least one per class. Their numbers differ
    by at most one from class to class; a class that has fewer gives all it has."""
    order = np.lexsort((uniforms(seed, 0, np.arange(len(labels)), DRAW, 1)[:, 0], labels))
    classes, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    each, left = divmod(max(len(classes), int(share * len(labels) + 1e-9)), len(classes))
    quota = each + (np.argsort(np.argsort(uniforms(seed, 0, classes, EXTRA, 1)[:, 0])) < left)
    place = np.arange(len(labels)) - np.repeat(first, counts)  # within the class, in random order
    return np.sort(order[place < np.repeat(quota, counts)])


def listed(data, path):
    """Indices, sorted, of the images in a list of bare file names or of paths that end in class/file. A label at the
    end of a line is not read: the training set has its own."""
    flag, places, indices = f"--labels {path}", {}, []
    if not Path(path).is_file():
        fail(f"{flag}: no such file; give a list of images, or a share such as 1%")
    for i in range(len(data)):
        folder, _, name = data.path(i).rpartition("/")
        for key in (name, f"{folder.rpartition('/')[2]}/{name}"):
            places[key] = -1 if key in places else i
    for number, line in enumerate(Path(path).read_text(errors="surrogateescape").splitlines(), 1):
        name = re.sub(r" +\d+$", "", line.strip())
        if not name or name.startswith("#"):
            continue
        i = places.get("/".join(name.split("/")[-2:]))
        if i is None or i < 0:
            what = "is not among the training images" if i is None else "stands for several images: give class/file"
            fail(f"{flag}, line {number}: {name!r} {what}")
        indices.append(i)
    return np.unique(indices) if indices else fail(f"{flag} names no image")


def few_labels(data, spec, seed):
    """The part of a training set that --labels names, and a phrase that says how it came about."""
    if not spec.endswith("%"):
        indices, how = listed(data, spec), f"listed in {spec}"
    elif not spec[:-1].replace(".", "", 1).isdecimal() or not 0 < float(spec[:-1]) <= 100:
        fail(f"--labels {spec}: expected a share above 0% and up to 100%, or a list file")
    else:
        how = f"balanced draw with seed {seed} (not a published list)"
        indices = balanced(data.labels, float(spec[:-1]) / 100, seed)
    return Subset(data, indices), f"{len(indices):,} of {len(data):,} images, {how}"


# ----------------------------------------------------------------------------------------------- augmentation
def _affine(image, matrix, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _enhance(kind):
    return lambda i, m, s, fill: kind(i).enhance(max(0.1, 1 + s * 0.9 * m))


# i: PIL image, m: strength from 0 to 1, the image changes the more the larger it is, s: sign, -1 or 1
OPERATIONS = {
    "autocontrast": lambda i, m, s, fill: ImageOps.autocontrast(i),
    "equalize": lambda i, m, s, fill: ImageOps.equalize(i),
    "invert": lambda i, m, s, fill: ImageOps.invert(i),
    "rotate": lambda i, m, s, fill: i.rotate(s * 30 * m, Image.Resampling.BICUBIC, fillcolor=fill),
    "posterize": lambda i, m, s, fill: i.point(lambda v: v & (256 - 2 ** (4 + int(4 * m)))),
    "solarize": lambda i, m, s, fill: ImageOps.solarize(i, 256 - int(256 * m)),
    "solarize_add": lambda i, m, s, fill: i.point(lambda v: v + int(110 * m) if v < 128 else v),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda i, m, s, fill: _affine(i, (1, s * 0.3 * m, 0, 0, 1, 0), fill),
    "shear_y": lambda i, m, s, fill: _affine(i, (1, 0, 0, s * 0.3 * m, 1, 0), fill),
    "translate_x": lambda i, m, s, fill: _affine(i, (1, 0, s * 0.45 * m * i.width, 0, 1, 0), fill),
    "translate_y": lambda i, m, s, fill: _affine(i, (1, 0, 0, 0, 1, s * 0.45 * m * i.height), fill),
}


def rand_augment(image, u, magnitude, fill):
    """RandAugment (Cubuk et al. 2020) in the form "rand-m9-mstd0.5-inc1": two of the 15 operations, each applied with
    probability 1/2, magnitudes of 0 to 10 with a deviation of 0.5. u: 8 uniforms. fill: the colour outside."""
    for choice, apply, level, sign in np.reshape(u, (2, 4)):
        if apply < 0.5:
            operation = list(OPERATIONS.values())[int(choice * len(OPERATIONS))]
            level = NormalDist(magnitude, 0.5).inv_cdf(max(level, 1e-12))
            image = operation(image, min(max(level, 0), 10) / 10, 1 if sign < 0.5 else -1, fill)
    return image


class Crops(Loader):
    """A loader whose threads also mirror the crop and apply `rand_augment` to it, in this order."""

    flip, magnitude = 0.5, 0.0
    _crop_batch = None  # PIL's operations take image by image

    def _crop(self, image, view, u):
        crop = super()._crop(image, view, u)
        crop = crop.flip(2) if u[FLIP] < self.flip else crop
        if not self.magnitude:
            return crop
        image, fill = Image.fromarray(crop.permute(1, 2, 0).numpy()), tuple(round(255 * m) for m in view.mean)
        # with the uniforms of the colour jitter, which this view does not have
        image = rand_augment(image, u[JITTER : JITTER + 8], self.magnitude, fill)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def erase(x, u, p=0.25, area=(0.02, 1 / 3), ratio=0.3):
    """Random erasing (Zhong et al. 2020) of normalised images x (B, 3, H, W), in place, with noise N(0, 1) per number.

    u: (B, 24) uniforms: whether, ten attempts at share of the area and height / width, top, left, seed of the noise.
    """
    generator, (height, width) = torch.Generator(x.device), x.shape[2:]
    for row in np.flatnonzero(u[:, 0] < p):
        for a, r in u[row, 1:21].reshape(10, 2):
            pixels, aspect = height * width * (area[0] + a * (area[1] - area[0])), ratio ** (1 - 2 * r)
            h, w = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = int(u[row, 21] * (height - h + 1)), int(u[row, 22] * (width - w + 1))
                generator.manual_seed(int(u[row, 23] * 2**53))
                noise = torch.randn(x.shape[1], h, w, generator=generator, device=x.device, dtype=x.dtype)
                x[row, :, top : top + h, left : left + w] = noise
                break
    return x


def draw_mixing(seed, step, batch_size, size, mixup=0.8, cutmix=1.0):
    """How each image of a step is mixed: lambda (B,) and box (B, 4: top, left, bottom, right), zeros for mixup.

    GROUP images share a draw, which is CutMix with probability 1/2 unless an alpha is 0. CutMix's lambda is the share
    of the image outside of the box, which has been clipped at the borders.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, MIXING + step]))
    groups = -(-batch_size // GROUP)
    u, kept, lam = rng.random((groups, 3)), *(rng.beta(alpha or 1, alpha or 1, groups) for alpha in (cutmix, mixup))
    half, centre = (size * np.sqrt(1 - kept)).astype(int)[:, None] // 2, (u[:, 1:] * size).astype(int)
    box = np.concatenate([centre - half, centre + half], 1).clip(0, size)
    cut = u[:, 0] < (0.5 if mixup and cutmix else float(cutmix > 0))
    lam = np.where(cut, 1 - (box[:, 2:] - box[:, :2]).prod(1) / size**2, lam)
    rows = np.arange(batch_size) // GROUP
    return lam[rows], (box * cut[:, None])[rows]


def mix(x, targets, lam, box):
    """Mixes each image with its neighbour, 0 with 1, 2 with 3 ... (mixup: Zhang et al. 2018; CutMix: Yun et al. 2019).

    x: (B, 3, S, S), targets: (B, C). lam, box: tensors of what `draw_mixing` gives. Returns both, mixed.
    """
    line, lam = torch.arange(x.shape[-1], device=x.device), lam.to(x.dtype)[:, None]
    rows, columns = ((line >= box[:, :2, None]) & (line < box[:, 2:, None])).to(x.dtype).unbind(1)
    inside = rows[:, :, None] * columns[:, None, :]
    weight = torch.where(box.any(1)[:, None, None], inside, 1 - lam[:, :, None])[:, None]
    other, other_targets = (t.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) for t in (x, targets))
    return torch.lerp(x, other, weight), torch.lerp(other_targets, targets, lam)


def smooth(labels, classes, smoothing, dtype=torch.float32):
    """Targets (B, C): 1 - s for the label, and s spread evenly over all classes."""
    return F.one_hot(labels, classes).to(dtype) * (1 - smoothing) + smoothing / classes


# ------------------------------------------------------------------------------------------------------ model
class Classifier(nn.Module):
    """A backbone and a linear classifier. All is trained, the positions of a ViT too, but layers of an id < freeze.

    A ViT is read as in MAE: the mean of the patch tokens, through a fresh norm; its pre-trained final norm is dropped.
    """

    def __init__(self, backbone, classes, freeze=0):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.dim, classes)
        self.depth = 4 if hasattr(backbone, "stages") else len(backbone.blocks)
        nn.init.zeros_(self.head.bias)
        if hasattr(backbone, "stages"):
            nn.init.normal_(self.head.weight, std=0.01)
        else:
            nn.init.trunc_normal_(self.head.weight, std=2e-5)
            backbone.norm, backbone.fc_norm, backbone.pool = nn.Identity(), nn.LayerNorm(backbone.dim, eps=1e-6), "mean"
        if freeze > self.depth + 1:
            fail(f"--freeze {freeze}: there are {self.depth + 1} layers below the classifier")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(layer_id(name, self.depth) >= freeze)

    def forward(self, x, paths=None):
        """x: (B, 3, S, S), paths: None or factors of drop path (2 depth, B). Returns logits (B, C)."""
        return self.head(self.backbone(x) if paths is None else self.backbone(x, paths=paths))

    def train(self, mode=True):
        """As usual, but the batch norm of frozen layers keeps its statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self


def layer_id(name, depth):
    """0: stem or embedding. i: stage i of a ResNet, i + 1: block i of a ViT. depth + 1: norm and classifier."""
    name = name.removeprefix("backbone.")
    if name.startswith(("cls_token", "pos_embed", "patch_embed", "conv1.", "bn1.")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return int(name[len("layer")]) if name.startswith("layer") else depth + 1


def parameter_groups(model, weight_decay, layer_decay=1.0, head_lr=1.0, decay_all=False):
    """Groups for the optimiser. `scale`, which multiplies the learning rate: layer_decay ** (depth + 1 - layer_id), for
    the classifier head_lr. Weight decay: on all, or not on what has one dimension, positions and the class token."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = head_lr if name.startswith("head.") else 1.0
            scale *= layer_decay ** (model.depth + 1 - layer_id(name, model.depth))
            decay = weight_decay * (decay_all or (p.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))))
            new = {"params": [], "scale": scale, "weight_decay": decay}
            groups.setdefault((scale, decay), new)["params"].append(p)
    return list(groups.values())


def schedule(step, total, warmup, name="cosine", final=0.0):
    """Factor of the peak learning rate at a step, 0 the first."""
    if name == "cosine" or step < warmup:
        return cosine(step, total, warmup, final)
    return 0.2 ** ((10 * step >= 6 * total) + (10 * step >= 8 * total))


# --------------------------------------------------------------------------------------------------- training
@torch.no_grad()
def accuracy(model, data, view, args, device, amp, dtype):
    """Top-1 and top-5 in percent. Every image counts once, whatever the number of processes."""
    model.eval()
    correct = torch.zeros(2, dtype=torch.float64, device=device)
    batches = eval_batches(data, view, EVAL_BATCH, device, args.workers, dtype)
    steps, hidden = -(-len(data) // EVAL_BATCH // world_size()), rank() > 0 or not sys.stderr.isatty()
    for x, labels, _ in tqdm(batches, "validation", steps, leave=False, disable=hidden):
        with amp:
            logits = model(x)
        score, best = logits.topk(min(5, logits.shape[1]))
        hits = (best == labels[:, None]) & score.isfinite()  # a network that diverged gets nothing right
        correct += torch.stack([hits[:, 0].sum(), hits.sum()])
    model.train()
    return [round(100 * c * world_size() / len(data), 3) for c in mean(correct).tolist()]


def finetune(args, backbone, meta, data, test, device):
    """One run. Returns its learning rates and its top-1 and top-5 at the last and at the best validation."""
    torch.manual_seed(args.seed)
    amp, scaler, dtype = precision(args.precision, device)
    is_vit, size, classes = not hasattr(backbone, "stages"), args.image_size, int(data.labels.max()) + 1
    how = {"interpolation": "bicubic" if is_vit else "bilinear", "mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    view = View(size, crop=(args.crop_min, 1.0), flip=0, **how)
    settings = {"seed": args.seed, "workers": args.workers, "accum": args.accum}
    loader = Crops(data, [view], args.batch_size, device=device, dtype=dtype, **settings)
    loader.flip, loader.magnitude = args.flip, args.rand_augment
    if loader.magnitude and (data.channels != 3 or getattr(data, "dtype", torch.uint8) != torch.uint8):
        print0("colours     RandAugment, which is for RGB images of 8 bits, is switched off")
        loader.magnitude = 0.0
    total, warmup = args.epochs * loader.steps, args.warmup_epochs * loader.steps

    model = Classifier(backbone, classes, args.freeze)
    model = sync_batch_norm(model.to(device, dtype, memory_format=torch.channels_last)).train()
    peak = args.lr * args.batch_size / 256
    groups = parameter_groups(model, args.weight_decay, args.layer_decay, args.head_lr, decay_all=not is_vit)
    optimizer = torch.optim.AdamW(groups, peak) if is_vit else torch.optim.SGD(groups, peak, momentum=0.9)
    state = resume(args, len(data), model, optimizer, scaler, "finetune_last.pt") or {"step": 0, "history": []}
    step, net = state["step"], parallel(model)
    net = torch.compile(net) if args.compile else net

    rates = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}, layer x{args.layer_decay:g}, classifier x{args.head_lr:g}"
    describe(args, data, loader, model, lr=rates, chance=f"loss ln({classes}) = {math.log(classes):.3f}")
    log = Logger(args, loader, total, step, chance=math.log(classes), name="finetune")

    def due(step):
        return step >= log.last or step % (args.val_every * loader.steps) == 0

    # without the validation at the end of a run that --max-steps had cut short
    history = [h for h in state["history"] if due(h["step"])]

    def save_state():
        now = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        now |= {"step": step, "images": len(data), "args": plain(args), "history": history}
        now |= {"backbone_prefix": "backbone.", "meta": meta | ({"pool": "mean"} if is_vit else {})}
        save(Path(args.out) / "finetune_last.pt", now)

    def validate():
        if step and due(step) and step not in [h["step"] for h in history]:
            top1, top5 = accuracy(model, test, EvalView(size, **how), args, device, amp, dtype)
            history.append({"step": step, "epoch": round(step / loader.steps, 2), "top1": top1, "top5": top5})
            log.note(step, top1=top1, top5=top5)
            save_state()

    def prepare(batch, epoch, micro):
        """Images, targets and factors of drop path; all that is random comes from sample and step."""
        (x,), targets, paths = batch.views(), smooth(batch.labels, classes, args.smoothing, dtype), None
        if args.erase:
            x = erase(x, uniforms(args.seed, epoch, batch.host_indices, ERASE, 24), args.erase)
        if args.mixup or args.cutmix:
            first = (micro * world_size() + rank()) * loader.local
            mixing = draw_mixing(args.seed, step, args.batch_size, size, args.mixup, args.cutmix)
            mixing = [loader.pool.to_device(torch.from_numpy(m[first : first + loader.local])) for m in mixing]
            x, targets = mix(x, targets, *mixing)
        if args.drop_path:
            u = torch.from_numpy(uniforms(args.seed, epoch, batch.host_indices, PATHS, 2 * model.depth))
            paths = loader.pool.to_device(path_factors(u, args.drop_path).to(dtype))
        return x, targets, paths

    validate()  # of a run that was stopped between the end of an epoch and its validation
    saved = time.monotonic()
    for epoch in range(step // loader.steps, args.epochs):
        batches = loader.epoch(epoch, start=step % loader.steps)
        for step in range(step + 1, min((epoch + 1) * loader.steps, log.last) + 1):
            lr = peak * schedule(step - 1, total, warmup, args.schedule, args.min_lr / peak)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            loss = 0.0
            for micro in range(args.accum):
                x, targets, paths = prepare(next(batches), epoch, micro)
                if step == 1 and micro == 0:
                    shown = types.SimpleNamespace(views=lambda x=x: [x], recipes=[view])
                    save_views(f"{args.out}/finetune_views.png", shown)
                with amp:
                    logits = net(x, paths)
                part = F.cross_entropy(full(logits), full(targets)) / args.accum
                scaler.scale(part).backward()
                loss = loss + part.detach()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            if log.due(step):
                loss = mean(loss).item()
                if args.grid and not math.isfinite(loss):  # one of nine may diverge
                    log.note(step, diverged=1)
                    log.close()
                    return {"lr": args.lr, "head_lr": args.head_lr, "diverged_at_step": step, "top1": 0.0, "top5": 0.0}
                log.log(step, step / loader.steps, loss, lr)
                stop = log.stop.requested(device)
                if stop or step == log.last or time.monotonic() - saved > 60 * args.save_every:
                    save_state()
                    saved = time.monotonic()
                if stop:
                    log.end(step)
        validate()
        if step >= log.last:
            break
    log.close()
    best = max(history, key=lambda h: h["top1"])
    result = {"lr": args.lr, "head_lr": args.head_lr, **history[-1]}
    return result | {f"best_{k}": best[k] for k in ("top1", "top5", "epoch")}


def main(args):
    device = init(args.device)
    size = args.image_size or (default_size(args.data) if args.pretrained == "random" else None)
    rest = (size, args.seed, args.trust_pickle, args.channels)
    backbone, meta = load_backbone(args.pretrained, args.arch, args.width, *rest)
    data, test = labelled(args.data, args.train_list, args.val_list, meta["channels"])
    everything, labels = len(data), f"all {len(data):,} images"
    if args.labels:
        data, labels = few_labels(data, args.labels, args.seed)
    args = complete(args, backbone, meta, len(data) / everything)
    print0(f"labels      {labels}; {len(test):,} test images\nrecipe      {args.recipe}")

    results, settings = [], [{}]
    if args.grid:
        settings = [{"lr": lr, "head_lr": h, "out": f"{args.out}/lr{lr:g}_head{h:g}"} for lr, h in GRID]
    for setting in settings:
        run = argparse.Namespace(**vars(args) | setting)
        results.append(finetune(run, copy.deepcopy(backbone), meta, data, test, device))
        print0("result      " + "  ".join(f"{k} {v:g}" for k, v in results[-1].items()))

    best = max(results, key=lambda r: r["top1"])
    if args.grid:
        print0(f"best        lr {best['lr']:g}  head_lr {best['head_lr']:g}  top1 {best['top1']:g}")
    names = "pretrained data arch width image_size recipe epochs batch_size weight_decay freeze seed".split()
    result = {"method": meta["method"], **{k: getattr(args, k) for k in names}}
    result |= {"labels": labels, "train": len(data), "test": len(test), **best}
    result |= {"grid": results} if args.grid else {}
    report(args, "finetune", result)
    finish()
    return result


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
