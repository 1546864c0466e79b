"""Fine-tuning: a pre-trained network is trained end to end on labelled images. With few labels: eval_semi.py.

    torchrun --nproc_per_node=8 eval_finetune.py --pretrained runs/mae/backbone.pt --data /imagenet
    python eval_finetune.py --pretrained random --arch resnet18 --width 0.25 --data digits --epochs 5

--recipe vit: as in the code of MAE (He et al., CVPR 2022, arXiv 2111.06377). The learning rate decreases from each
layer to the one below; drop path, RandAugment, random erasing, mixup and CutMix regularise; the classifier reads the
mean of the patch tokens through a new norm layer, or what a Swin or an XCiT gives. --recipe plain: crops, flips and
cross-entropy. Networks of SimMIM, MaskFeat and CAE take the recipe of their official code unless told otherwise.

recipe    epochs  batch  lr per 256  schedule                    weight decay  layer decay  drop path
vit       100     1024   5e-4        AdamW, warm-up 5, cosine    0.05          0.65         0.1       ViT-B and smaller
          50      1024   1e-3        AdamW, warm-up 5, cosine    0.05          0.75         0.2, 0.3  ViT-L, ViT-H
simmim    100     2048   6.25e-4     AdamW, warm-up 20, cosine   0.05          0.65         0.1       ViT; clip 5
                                     from the first step on                    0.9, 0.7     0.1, 0.2  Swins, Swin-L
maskfeat  100     2048   1e-3        AdamW, warm-up 20, cosine   0.05          0.65         0.1       ViT-B and smaller
          50      2048   1e-3        AdamW, warm-up 5, cosine    0.05          0.75         0.1       ViT-L
cae       100     4096   5e-4        AdamW, warm-up 5, cosine    0.05          0.65         0.1       ViT-B and smaller
          50      4096   1.25e-4     AdamW, warm-up 5, cosine    0.05          0.75         0.2       ViT-L
plain     30      256    0.01        SGD, cosine                 1e-4          -            -         a ViT: as vit

simmim, cae: every block of a ViT has relative positions of its own, copies of shared ones (in any recipe) or zeros.
cae: the network's own norm follows the mean, fixed positions stay so. A Swin of 192 px goes to 224 by --image-size 224
--window 7, SimMIM's of 800 epochs with --layer-decay 0.8.

Test images: shorter side to 256 and central 224 pixels, or sizes in this ratio; without the margin above 224 pixels, as
in MAE's code, and up to 64. Bicubic for ViTs, Swins and XCiTs, bilinear for ResNets.

Published, ImageNet top-1: MAE, 1600 epochs, ViT-B 83.6, ViT-L 85.9, ViT-H 86.9 (official); ViT-B, 400 epochs, 83.1
(MMSelfSup 0.11); of other methods in their pages. Ours: not run.

Deviations: nothing random depends on the number of processes. An image is mixed with its neighbour in the shuffled
order, not with the image at the mirrored position in the batch of its process, and 32 images share a draw, as on each
of the 32 processes of the published ViT-B. Tables of relative positions have no weight decay, in ViTs either; rates of
lower layers start and end lower, too. Our choice, not published: --recipe plain; and the same for ViTs below B, Swins
but for SimMIM's, and XCiTs (whose drop path is the same at any depth).
The network and its classifier are saved as finetune.pt, which predict.py applies to new images.
"best" is chosen on the test images, as is usual; the other figures are those of the last validation.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import math
import sys
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from tqdm import tqdm

from common import rng, swin, xcit
from common.args import Parser, at_least, below_one, fail, number, positive, probability, share, toggle
from common.augment import FLIP, JITTER, EvalView, View, to_device
from common.checkpoint import load_pretrained
from common.classes import class_names
from common.classifier import Classifier as Whole
from common.classifier import save_classifier
from common.datasets import open_labelled
from common.distributed import print0, process_mean, rank, world_size
from common.files import result_folder
from common.loader import agree_on_undecodable, eval_batches
from common.log import facts, identity, report
from common.optim import cosine, upcast
from common.pictures import save_views
from common.run import Run
from common.vit import ViT, path_factors

MIXED = {"rand_augment": 9.0, "color_jitter": 0.0, "erase": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
UNMIXED = dict.fromkeys(MIXED, 0.0)
COMMON = {"warmup_lr": 0.0, "head_lr": 1.0, "clip": 0.0, "relative_positions": False}
VIT = {"epochs": 100, "warmup_epochs": 5, "batch_size": 1024, "lr": 5e-4, "min_lr": 1e-6, "weight_decay": 0.05}
VIT |= COMMON | {"layer_decay": 0.65, "drop_path": 0.1}
SGD = {"epochs": 30, "warmup_epochs": 0, "batch_size": 256, "lr": 0.01, "min_lr": 0.0, "weight_decay": 1e-4}
SGD |= COMMON | {"layer_decay": 1.0, "drop_path": 0.0}
SIMMIM = {"batch_size": 2048, "lr": 6.25e-4, "warmup_epochs": 20, "warmup_lr": 1e-6, "clip": 5.0}
MASKFEAT = {"batch_size": 2048, "lr": 1e-3, "warmup_epochs": 20, "warmup_lr": 4e-8, "min_lr": 4e-6}
CAE = {"batch_size": 4096}
RECIPES = {  # by name and by whether the network is a ViT
    ("vit", True): VIT | MIXED,
    ("simmim", True): VIT | MIXED | SIMMIM | {"relative_positions": True},
    ("maskfeat", True): VIT | MIXED | MASKFEAT,
    ("cae", True): VIT | MIXED | CAE | {"relative_positions": True},
    ("plain", True): VIT | UNMIXED,
    ("plain", False): SGD | UNMIXED,
}
LARGE = {"epochs": 50, "warmup_epochs": 5, "lr": 1e-3, "layer_decay": 0.75}
BY_ARCH = {("simmim", arch): {"layer_decay": 0.9} for arch in swin.ARCHS}  # what differs, by recipe and architecture
BY_ARCH |= {("simmim", "swin_large"): {"layer_decay": 0.7, "drop_path": 0.2}}
BY_ARCH |= {("maskfeat", "vit_large"): LARGE | {"warmup_lr": 8e-8, "min_lr": 8e-6}}
BY_ARCH |= {("cae", "vit_large"): LARGE | {"lr": 1.25e-4, "drop_path": 0.2}}
for recipe in ("vit", "plain"):
    BY_ARCH |= {(recipe, f"vit_{size}"): LARGE | {"drop_path": p} for size, p in (("large", 0.2), ("huge", 0.3))}
UNDECAYED = ("pos_embed", "cls_token", "relative_position_bias_table")
GROUP = 32  # images that share a draw of mixup or CutMix


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    run = parser.add_pretrained()
    group = parser.add_argument_group("recipe (defaults: the table above)")
    text = "default: that of the network's method; else vit for a transformer, plain for others"
    group.add_argument("--recipe", choices=sorted({name for name, _ in RECIPES}), help=text)
    group.add_argument("--crop-min", type=share, default=0.08, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored image")
    group.add_argument("--freeze", type=at_least(0), default=0, help="lowest layers to keep (1: stem or embedding)")
    group.add_argument("--epochs", type=positive(int))
    group.add_argument("--warmup-epochs", type=at_least(0))
    group.add_argument("--batch-size", type=positive(int), help="images per step over all processes and --accum")
    group.add_argument("--lr", type=positive(float), help="per 256 images: multiplied by batch-size / 256")
    group.add_argument("--head-lr", type=positive(float), help="multiplier of the classifier's learning rate")
    group.add_argument("--layer-decay", type=share, help="factor of the learning rate from a layer to the one below")
    group.add_argument("--weight-decay", type=at_least(0, float))
    group.add_argument("--clip", type=at_least(0, float), help="largest norm of the gradient (0: any)")
    group.add_argument("--drop-path", type=below_one, help="of a transformer: probability in the last block")
    group.add_argument("--rand-augment", type=number(float, low=0, high=10), help="magnitude (0: no RandAugment)")
    group.add_argument("--color-jitter", type=probability, help="strength, where there is no RandAugment")
    group.add_argument("--erase", type=probability, help="probability of a rectangle of noise")
    group.add_argument("--mixup", type=at_least(0, float), help="alpha of the Beta distribution (0: none)")
    group.add_argument("--cutmix", type=at_least(0, float), help="alpha of the Beta distribution (0: none)")
    group.add_argument("--smoothing", type=probability, help="share of the target that is spread over all classes")
    group.add_argument("--relative-positions", action=toggle, help="of each block of a ViT, zeros if there were none")
    group.add_argument("--window", type=positive(int), help="of a Swin: tables are interpolated (default: as it is)")
    group.add_argument("--val-every", type=positive(int), default=1, help="epochs between accuracies, beside the last")
    parser.add_max_bad(run.add_argument)
    parser.add_loop(run)
    return parser.parse_args(argv)


def complete(args, backbone, meta):
    """The arguments with everything that was left out filled in."""
    is_vit = hasattr(backbone, "patch_size")  # or a Swin, or an XCiT
    method = str(meta.get("method")).lower()
    recipe = args.recipe or (method if (method, is_vit) in RECIPES else "vit" if is_vit else "plain")
    if (recipe, is_vit) not in RECIPES:
        fail(f"--recipe {recipe} is not made for {meta['arch']}: choose plain")
    known = {k: meta[k] for k in ("arch", "width", "image_size", "channels")}
    known |= {"recipe": recipe, "out": str(result_folder(args.pretrained, args.out))}
    defaults = RECIPES[recipe, is_vit] | BY_ARCH.get((recipe, meta["arch"]), {})
    args = args.replace(**defaults | {k: v for k, v in vars(args).items() if v is not None} | known)
    if args.drop_path and not is_vit:
        fail("--drop-path is for vision transformers only")
    for flag, kind in {"window": swin.Swin, "relative_positions": ViT}.items():
        if flag in args.given and not isinstance(backbone, kind):
            fail(f"--{flag.replace('_', '-')} is for a {kind.__name__}: leave it out with {meta['arch']}")
    if (args.mixup or args.cutmix) and args.batch_size // (world_size() * args.accum) % 2:
        fail("--mixup and --cutmix mix pairs: --batch-size must be a multiple of 2 x processes x --accum")
    return args


# ----------------------------------------------------------------------------------------------- augmentation
def _affine(image, matrix, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _enhance(kind):
    return lambda i, m, s, fill: kind(i).enhance(max(0.1, 1 + s * 0.9 * m))


# i: PIL image, m: strength from 0 to 1 (1 changes most), s: sign, -1 or 1
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
    probability 1/2, at a normal magnitude of deviation 0.5, clipped to [0, 10]. u: 8 uniforms. fill: colour outside."""
    for choice, apply, level, sign in np.reshape(u, (2, 4)):
        if apply < 0.5:
            operation = list(OPERATIONS.values())[int(choice * len(OPERATIONS))]
            level = NormalDist(magnitude, 0.5).inv_cdf(max(level, 1e-12))
            image = operation(image, min(max(level, 0), 10) / 10, 1 if sign < 0.5 else -1, fill)
    return image


@dataclasses.dataclass(frozen=True)
class Augmented(View):
    """A random crop that is flipped, then changed by `rand_augment`, image by image."""

    magnitude: float = 0.0
    batched = False

    def crop(self, image, u):
        crop = super().crop(image, u)
        image = (crop.flip(2) if u[FLIP] < self.flip else crop).permute(1, 2, 0)
        fill = tuple(round(255 * m) for m in self.mean)
        # the uniforms of the colour jitter are free in this view
        image = rand_augment(Image.fromarray(image.numpy()), u[JITTER : JITTER + 8], self.magnitude, fill)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def plan(self, u):
        return []  # the crop has been flipped


def erase(x, u, p=0.25, area=(0.02, 1 / 3), ratio=0.3):
    """Random erasing (Zhong et al. 2020): fills a rectangle of normalised images x (B, C, H, W) with N(0, 1), in place.

    u: (B, 24) uniforms: whether; ten attempts at share of the area and height / width; top, left, seed of the noise.
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

    GROUP images share a draw: CutMix with probability 1/2 unless an alpha is 0, else mixup. CutMix's lambda is the
    share of the image outside the box after the box has been clipped at the borders.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, rng.MIXING + step]))
    groups = -(-batch_size // GROUP)
    u = generator.random((groups, 3))
    kept, lam = (generator.beta(alpha or 1, alpha or 1, groups) for alpha in (cutmix, mixup))
    half, centre = (size * np.sqrt(1 - kept)).astype(int)[:, None] // 2, (u[:, 1:] * size).astype(int)
    box = np.concatenate([centre - half, centre + half], 1).clip(0, size)
    cut = u[:, 0] < (0.5 if mixup and cutmix else float(cutmix > 0))
    lam = np.where(cut, 1 - (box[:, 2:] - box[:, :2]).prod(1) / size**2, lam)
    rows = np.arange(batch_size) // GROUP
    return lam[rows], (box * cut[:, None])[rows]


def mix(x, targets, lam, box):
    """Mixes images 0 and 1, 2 and 3 ... with each other (mixup: Zhang et al. 2018; CutMix: Yun et al. 2019).

    x: (B, C, S, S), targets: (B, classes). lam, box: what `draw_mixing` gives, as tensors. Returns both, mixed.
    """
    line, lam = torch.arange(x.shape[-1], device=x.device), lam.to(x.dtype)[:, None]
    rows, columns = ((line >= box[:, :2, None]) & (line < box[:, 2:, None])).to(x.dtype).unbind(1)
    inside = rows[:, :, None] * columns[:, None, :]
    weight = torch.where(box.any(1)[:, None, None], inside, 1 - lam[:, :, None])[:, None]
    other, other_targets = (t.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) for t in (x, targets))
    return torch.lerp(x, other, weight), torch.lerp(other_targets, targets, lam)


def smooth(labels, classes, smoothing, dtype=torch.float32):
    """Targets (B, classes): 1 - smoothing for the label, and smoothing spread evenly over all classes."""
    return F.one_hot(labels, classes).to(dtype) * (1 - smoothing) + smoothing / classes


# ------------------------------------------------------------------------------------------------------ model
class Classifier(nn.Module):
    """A backbone and a linear classifier. All layers are trained, and a ViT's positions, except those of id < freeze.

    A ViT's features are, as in MAE, the mean of the patch tokens through a new norm; its own final norm is left out.
    A Swin's and an XCiT's are their own.
    """

    def __init__(self, backbone, classes, freeze=0):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.dim, classes)
        self.depth = 4 if hasattr(backbone, "stages") else len(getattr(backbone, "blocks", []))
        self.depths = getattr(backbone, "config", {}).get("depths", ())  # of a Swin's stages
        self.draws = getattr(backbone, "draws", 2 * self.depth)  # uniforms for drop path
        self.path_factors = xcit.path_factors if isinstance(backbone, xcit.XCiT) else path_factors
        nn.init.zeros_(self.head.bias)
        if hasattr(backbone, "patch_size"):
            nn.init.trunc_normal_(self.head.weight, std=2e-5)
        else:
            nn.init.normal_(self.head.weight, std=0.01)
        if isinstance(backbone, ViT):
            backbone.norm, backbone.fc_norm, backbone.pool = nn.Identity(), nn.LayerNorm(backbone.dim, eps=1e-6), "mean"
        if freeze > self.depth + 1:
            fail(f"--freeze {freeze}: there are {self.depth + 1} layers below the classifier")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(layer_id(name, self.depth, self.depths) >= freeze)

    def forward(self, x, paths=None):
        """x: (B, C, S, S), paths: None or factors of drop path (draws, B). Returns logits (B, classes)."""
        return self.head(self.backbone(x) if paths is None else self.backbone(x, paths=paths))

    def train(self, mode=True):
        """Batch norm of frozen layers keeps its statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self


def classifier(backbone, classes, args):
    """The Classifier of a backbone, with what the recipe changes in it."""
    norm, positions = getattr(backbone, "norm", None), getattr(backbone, "pos_embed", None)
    fixed, is_vit = positions is not None and not positions.requires_grad, isinstance(backbone, ViT)
    if is_vit and (args.relative_positions or backbone.relative == "shared"):
        backbone.unshare()
    model = Classifier(backbone, classes, args.freeze)
    if args.recipe == "cae" and is_vit:
        if isinstance(norm, nn.LayerNorm):
            backbone.fc_norm.load_state_dict(norm.state_dict())
        if fixed:
            positions.requires_grad_(False)
    if args.recipe == "simmim" and isinstance(backbone, swin.Swin):
        nn.init.trunc_normal_(model.head.weight, std=0.02)
    return model


def layer_id(name, depth, depths=()):
    """0: stem or embedding, or a library's network, whole. i: stage i of a ResNet, i + 1: block i of a transformer,
    what merges patches counting to the block before. depth + 1: norm, class attention and classifier. depths: blocks of
    the stages of a Swin."""
    name = name.removeprefix("backbone.")
    if name.startswith(("cls_token", "pos_embed", "patch_embed", "conv1.", "bn1.", "network.")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    if name.startswith("layers."):
        stage, part, block = name.split(".")[1:4]
        return sum(depths[: int(stage)]) + (int(block) + 1 if part == "blocks" else depths[int(stage)])
    return int(name[len("layer")]) if name.startswith("layer") else depth + 1


def parameter_groups(model, weight_decay, layer_decay=1.0, head_lr=1.0, decay_all=False):
    """Groups for the optimiser, whose `scale` multiplies the learning rate: layer_decay ** (depth + 1 - layer_id), for
    the classifier times head_lr. Without decay_all, vectors and what UNDECAYED names have no weight decay."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            scale = head_lr if name.startswith("head.") else 1.0
            scale *= layer_decay ** (model.depth + 1 - layer_id(name, model.depth, model.depths))
            decay = weight_decay * (decay_all or (p.ndim > 1 and not name.endswith(UNDECAYED)))
            new = {"params": [], "scale": scale, "weight_decay": decay}
            groups.setdefault((scale, decay), new)["params"].append(p)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------- training
def learning_rate(step, total, warmup, peak, args):
    """Linear over the warm-up, then half a cosine; SimMIM's begins at step 0, so that the peak is not reached."""
    if step < warmup:
        return args.warmup_lr + (peak - args.warmup_lr) * step / warmup
    begun = 0 if args.recipe == "simmim" else warmup
    return peak * cosine(step - begun, total - begun, 0, args.min_lr / peak)


@torch.no_grad()
def accuracy(model, data, view, workers, amp, batch_size=256):
    """Top-1 and top-5 in percent. Every image that can be decoded counts once, whatever the number of processes."""
    weight = model.head.weight
    correct = torch.zeros(3, dtype=torch.float64, device=weight.device)
    batches = eval_batches(data, view, batch_size, weight.device, workers, weight.dtype)
    steps, hidden = -(-len(data) // batch_size // world_size()), rank() > 0 or not sys.stderr.isatty()
    model.eval()
    for x, labels, _ in tqdm(batches, "validation", steps, leave=False, disable=hidden):
        with amp:
            logits = model(x)
        score, best = logits.topk(min(5, logits.shape[1]))
        hits = (best == labels[:, None]) & score.isfinite()  # a network that diverged gets nothing right
        correct += torch.stack([hits[:, 0].sum(), hits.sum(), hits.new_tensor(len(labels), dtype=torch.int64)])
    model.train()
    agree_on_undecodable(data, weight.device)
    top1, top5, count = process_mean(correct).tolist()
    return [round(100 * top1 / count, 3), round(100 * top5 / count, 3)]


def validate(run, test, view, args):
    """Accuracy after every --val-every epochs and at the end, to which a run that continues adds its own."""

    def due(step):
        return step and (step >= run.last or step % (args.val_every * run.epoch_steps) == 0)

    history = run.more["history"] = [h for h in run.more["history"] if due(h["step"])]
    if due(run.step) and run.step not in [h["step"] for h in history]:
        top1, top5 = accuracy(run.model, test, view, args.workers, run.amp)
        epoch = round(run.step / run.epoch_steps, 2)
        history.append({"step": run.step, "epoch": epoch, "top1": top1, "top5": top5})
        run.note(top1=top1, top5=top5)
        run.save()


def main(args):
    backbone, meta = load_pretrained(args)
    args = complete(args, backbone, meta)
    run = Run(args, "finetune")
    data, test = open_labelled(args.data, args.train_list, args.val_list, meta["channels"])
    same = identity(args, backbone, data, test)
    print0(f"recipe      {args.recipe}; {len(test):,} test images")
    is_vit, size, classes = hasattr(backbone, "patch_size"), args.image_size, int(data.labels.max()) + 1
    how = {"interpolation": "bicubic" if is_vit else "bilinear", "mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    if args.window:
        backbone = swin.with_window(backbone, args.window, size)
        meta |= backbone.config
    if text := swin.padding(backbone, size):
        print0(f"note        {text}; --window interpolates their tables for others")
    jitter = (*[args.color_jitter] * 2, args.color_jitter * (data.channels == 3), 0.0)
    view = View(size, (args.crop_min, 1.0), flip=args.flip, jitter=jitter, jitter_p=float(any(jitter)), **how)
    test_view = EvalView(size, resize=size if size > 224 else 0, **how)
    if args.rand_augment and (data.channels != 3 or getattr(data, "dtype", torch.uint8) != torch.uint8):
        print0("colours     RandAugment, which is for RGB images of 8 bits, is switched off")
    elif args.rand_augment:
        view = Augmented(size, (args.crop_min, 1.0), flip=args.flip, magnitude=args.rand_augment, **how)
    run.open([view], data=data)

    model = run.place(classifier(backbone, classes, args)).train()
    peak = args.lr * args.batch_size / 256
    groups = parameter_groups(model, args.weight_decay, args.layer_decay, args.head_lr, decay_all=not is_vit)
    optimizer = torch.optim.AdamW(groups, peak) if is_vit else torch.optim.SGD(groups, peak, momentum=0.9)
    rates = f"{args.lr} x {args.batch_size}/256 = {peak:.4g}, layer x{args.layer_decay:g}, classifier x{args.head_lr:g}"
    chance = math.log(classes)
    now = {k: getattr(backbone, k) for k in ("pool", "relative") if hasattr(backbone, k)}  # which may have changed
    run.more = {"history": [], "meta": meta | now, "backbone_prefix": "backbone.", "same": same}
    net = run.start(model, optimizer, chance=chance, lr=rates, baseline=f"loss ln({classes}) = {chance:.3f}")

    validate(run, test, test_view, args)  # of a run that was stopped just before it
    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = learning_rate(step, run.total, run.warmup, peak, args)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            for micro, batch in enumerate(batches):
                (x,), targets, paths = batch.views(), smooth(batch.labels, classes, args.smoothing, run.dtype), None
                if args.erase:
                    x = erase(x, rng.uniforms(args.seed, epoch, batch.keys, rng.ERASE, 24), args.erase)
                if args.mixup or args.cutmix:
                    mixing = draw_mixing(args.seed, step + 1, args.batch_size, size, args.mixup, args.cutmix)
                    own = np.arange(len(x)) + (micro * world_size() + rank()) * len(x)
                    mixing = [to_device(torch.from_numpy(drawn[own]), run.device) for drawn in mixing]
                    x, targets = mix(x, targets, *mixing)
                if args.drop_path:
                    paths = model.path_factors(batch.uniforms(model.draws, rng.PATHS), args.drop_path).to(run.dtype)
                if step == 0 and micro == 0:  # instead of the picture without erasing and mixing
                    seen = SimpleNamespace(views=lambda x=x: [x], specs=[view], indices=batch.indices)
                    save_views(f"{args.out}/finetune_views.png", seen, data)
                run.backward(F.cross_entropy(net(x, paths), upcast(targets)))
            run.update(optimizer, args.clip)
            run.log(lr)
        validate(run, test, test_view, args)

    if run.logger.recent and (ratio := run.logger.recent[-1] / chance) > 0.99:
        cure = f"lower --lr (now {args.lr:g}) or --head-lr (now {args.head_lr:g})"
        run.warn("end", f"the loss of the last step is {ratio:.3g} times that of guessing: {cure}")
    history = run.more["history"]
    best = max(history, key=lambda h: h["top1"])
    agree_on_undecodable(data, run.device, run.loader.pool.bad)
    result = facts(args, meta, data, test) | {"recipe": args.recipe}
    result |= {k: getattr(args, k) for k in ("epochs", "batch_size", "weight_decay", "freeze", "seed", "lr", "head_lr")}
    names = class_names(data)
    linear, names = model.head, [names.get(c, f"class {c}") for c in range(classes)]
    what = f"fine-tuned, epoch {history[-1]['epoch']:g}, top-1 {history[-1]['top1']:.2f} %"
    whole = Whole(model.backbone, linear.weight, linear.bias)
    save_classifier(f"{args.out}/finetune.pt", whole, run.more["meta"], test_view, names, what)
    result |= {**history[-1], **{f"best_{k}": best[k] for k in ("top1", "top5", "epoch")}}
    return report(args, "finetune", result)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
