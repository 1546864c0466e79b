"""Semi-supervised evaluation: a pre-trained network is fine-tuned with 1 % or 10 % of the labels.

    torchrun --nproc_per_node=4 eval_semi.py --pretrained runs/moco/backbone.pt --data /imagenet --labels 1% --grid
    python eval_semi.py --pretrained random --arch resnet18 --width 0.25 --data digits --labels 10% --batch-size 64
    python eval_semi.py --pretrained runs/simclrv2/last.pt --data /imagenet --labels 1% --head-layer 1 --lars
    python eval_semi.py --pretrained random --data /imagenet --distill runs/simclrv2/semi.pt --out runs/student

The whole network is trained, with random crops and flips; ResNets as in OpenSelfSup and MMSelfSup. --grid tries three
learning rates times three multipliers of the classifier's.

network  epochs  batch  lr per 256  classifier  schedule                     weight decay  layer decay  drop path
ResNet   20      256    0.01        x100        SGD, x0.2 at 60 and 80 %     5e-4          -            -
ViT      100     1024   5e-4        x1          AdamW, warm-up 5, cosine     0.05          0.65         0.1
--lars   60      1024   see below   x1          LARS, cosine                 0             -            -
student  400     4096   see below   x1          LARS, warm-up 20, cosine     1e-4          -            -

ResNets with more than 5 % of the labels: weight decay 1e-4. ViT-L, ViT-H: 50 epochs, lr 1e-3, layer decay 0.75, drop
path 0.2, 0.3.

--lars, for ResNets, is SimCLR v2: rate 0.005 x root of the batch (0.002 for wider networks and selective kernels), a
classifier that starts from zero, 30 epochs with more than 5 % of the labels. --head-layer 1 keeps the first layer of
the projector, which a last.pt has. --distill TEACHER uses no label of the training images: a student learns on all of
them what the network in a semi.pt, finetune.pt or linear.pt finds probable in the same view (temperature 1); a ResNet
by the last recipe of the table, rate 0.1 x root of the batch. predict.py takes semi.pt, which is written here.

Test images: shorter side to 256 and central 224 pixels, or sizes in this ratio; no margin above 224 pixels and up to
64. Bicubic for ViTs, bilinear for ResNets. Swins and XCiTs are treated as ViTs.

Published, ImageNet top-1: MoCo v2, best of nine, 1 % 39.1, 10 % 61.8 (OpenSelfSup). Ours: not run.
SwAV: --weight-decay 0 and, 1 %, --lr 0.02 --head-lr 250, 10 %, --lr 0.01 --head-lr 20. Barlow Twins, 1 %:
--weight-decay 0 --lr 0.005 --head-lr 100 --schedule cosine.

Deviations: the labelled images are drawn, balanced over the classes, unless --labels is a list such as SimCLR's. Our
choice, not published: everything about ViTs, and the multiplier of 100 without --grid.
"best" and the best of the grid are chosen on the test images, as is usual; the other figures are those of the last
validation.
"""

import common.interrupt  # noqa: F401 (before torch)
import copy
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import rng, xcit
from common.args import Parser, at_least, below_one, fail, positive, probability, share, toggle
from common.augment import EvalView, View
from common.checkpoint import load_pretrained
from common.classes import class_names
from common.classifier import Classifier as Whole
from common.classifier import folded, load_classifier, projector_layers, save_classifier
from common.datasets import Subset, open_dataset, open_labelled
from common.distributed import print0, process_mean, rank, world_size
from common.files import result_folder
from common.lists import composed, read_text, split_lines
from common.loader import agree_on_undecodable, eval_batches
from common.log import facts, fingerprint, identity, report
from common.optim import LARS, cosine
from common.run import Run, start_device
from common.vit import ViT, path_factors

RESNET = {"epochs": 20, "warmup_epochs": 0, "batch_size": 256, "lr": 0.01, "min_lr": 0.0, "head_lr": 100.0}
RESNET |= {"schedule": "step", "layer_decay": 1.0, "drop_path": 0.0, "val_every": 5}
VIT = {"epochs": 100, "warmup_epochs": 5, "batch_size": 1024, "lr": 5e-4, "min_lr": 1e-6, "head_lr": 1.0}
VIT |= {"schedule": "cosine", "layer_decay": 0.65, "drop_path": 0.1, "val_every": 1, "weight_decay": 0.05}
BIG = {"batch_size": 1024, "lr": 0.005, "head_lr": 1.0, "schedule": "cosine", "weight_decay": 0.0}  # of --lars
STUDENT = {"epochs": 400, "warmup_epochs": 20, "batch_size": 4096, "lr": 0.1, "weight_decay": 1e-4}
LARGE = {"epochs": 50, "lr": 1e-3, "layer_decay": 0.75}
UNDECAYED = ("pos_embed", "cls_token", "relative_position_bias_table")
BY_ARCH = {"vit_large": LARGE | {"drop_path": 0.2}, "vit_huge": LARGE | {"drop_path": 0.3}}
GRID = [(lr, head_lr) for lr in (0.1, 0.01, 0.001) for head_lr in (1.0, 10.0, 100.0)]


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    run = parser.add_pretrained()
    group = parser.add_argument_group("recipe (defaults: the table above)")
    group.add_argument("--labels", help="1%%, 10%% ... (balanced draw), or a list of training images")
    group.add_argument("--distill", metavar="TEACHER", help="instead of labels: semi.pt, finetune.pt or linear.pt")
    group.add_argument("--head-layer", type=at_least(0), default=0, help="layers of the projector to keep")
    group.add_argument("--lars", action=toggle, help="the recipe with LARS (default: with --distill and a ResNet)")
    group.add_argument("--grid", action=toggle, default=False, help="nine runs, lr .1 .01 .001 x head-lr 1 10 100")
    group.add_argument("--crop-min", type=share, default=0.08, help="smallest share of the image area in a crop")
    group.add_argument("--flip", type=probability, default=0.5, help="probability of a mirrored image")
    group.add_argument("--freeze", type=at_least(0), default=0, help="lowest layers to keep (1: stem or embedding)")
    group.add_argument("--epochs", type=positive(int))
    group.add_argument("--warmup-epochs", type=at_least(0))
    group.add_argument("--batch-size", type=positive(int), help="images per step over all processes and --accum")
    text = "per 256 images: multiplied by batch-size / 256; with --lars by the root of batch-size"
    group.add_argument("--lr", type=positive(float), help=text)
    group.add_argument("--head-lr", type=positive(float), help="multiplier of the classifier's learning rate")
    group.add_argument("--layer-decay", type=share, help="factor of the learning rate from a layer to the one below")
    group.add_argument("--weight-decay", type=at_least(0, float))
    group.add_argument("--drop-path", type=below_one, help="of a transformer: probability in the last block")
    group.add_argument("--schedule", choices=["cosine", "step"], help="step: x0.2 at 60 and at 80 %% of the epochs")
    group.add_argument("--val-every", type=positive(int), help="epochs between accuracies, beside the last")
    parser.add_max_bad(run.add_argument)
    parser.add_loop(run)
    args = parser.parse_args(argv)
    if bool(args.labels) is bool(args.distill):
        parser.error("give either --labels, 1% for example, or --distill, the file of a teacher")
    if args.grid and (args.lr is not None or args.head_lr is not None):
        parser.error("--grid sets --lr and --head-lr itself: leave those two out")
    return args


def complete(args, backbone, meta, labelled):
    """The arguments with everything that was left out filled in. labelled: the share of the training images."""
    is_vit = hasattr(backbone, "patch_size")  # or a Swin, or an XCiT
    known = {k: meta[k] for k in ("arch", "width", "image_size", "channels")}
    known["out"] = str(result_folder(args.pretrained, args.out))
    defaults = VIT if is_vit else RESNET | {"weight_decay": 5e-4 if labelled <= 0.05 else 1e-4}
    known["lars"] = (bool(args.distill) and not is_vit) if args.lars is None else args.lars
    if known["lars"]:
        defaults = RESNET | BIG | (STUDENT if args.distill else {"epochs": 60 if labelled <= 0.05 else 30})
    defaults = defaults | BY_ARCH.get(meta["arch"], {})
    args = args.replace(**defaults | {k: v for k, v in vars(args).items() if v is not None} | known)
    if args.lars and is_vit:
        fail("--lars is for ResNets only")
    if args.grid and (is_vit or args.lars):
        fail("--grid is for ResNets only and rates of SGD: leave out --lars or, with --distill, add --no-lars")
    if args.drop_path and not is_vit:
        fail("--drop-path is for vision transformers only")
    return args


# ------------------------------------------------------------------------------------------------------- data
def balanced(labels, part, seed):
    """Sorted indices of a class-balanced draw of floor(part N) samples, at least one per class. Classes have equal
    numbers, up to one more or less; a class that is smaller than that is drawn completely."""
    order = np.lexsort((rng.uniforms(seed, 0, np.arange(len(labels)), rng.LABELLED, 1)[:, 0], labels))
    classes, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    each, left = divmod(max(len(classes), int(part * len(labels) + 1e-9)), len(classes))
    quota = each + (np.argsort(np.argsort(rng.uniforms(seed, 0, classes, rng.LARGER, 1)[:, 0])) < left)
    place = np.arange(len(labels)) - np.repeat(first, counts)  # within the class, in random order
    return np.sort(order[place < np.repeat(quota, counts)])


def listed(data, path):
    """Sorted indices of the images in a list of file names or of paths that end in class/file. A label at the end of a
    line is ignored: the training set has its own."""
    flag, places, indices = f"--labels {path}", {}, []
    if not Path(path).is_file():
        fail(f"{flag}: no such file; give a list of images, or a share such as 1%")
    for i in range(len(data)):
        folder, _, name = data.path(i).rpartition("/")
        for key in map(composed, (name, f"{folder.rpartition('/')[2]}/{name}")):
            places[key] = -1 if key in places else i
    for number, line in enumerate(split_lines(read_text(path, flag)), 1):
        line = composed(line.strip().replace("\\", "/"))
        name = re.sub(r"[\s,;]+\d+$", "", line)
        found = [places[key] for key in ("/".join(text.split("/")[-2:]) for text in (line, name)) if key in places]
        if not found and (not name or name.startswith("#")):
            continue
        i = found[0] if found else None
        if i is None or i < 0:
            what = "is not among the training images" if i is None else "stands for several images: give class/file"
            fail(f"{flag}, line {number}: {name!r} {what}")
        indices.append(i)
    return np.unique(indices) if indices else fail(f"{flag} names no image")


def few_labels(data, spec, seed):
    """The part of a training set that --labels names, and a description of it."""
    if not spec.endswith("%"):
        indices, how = listed(data, spec), f"listed in {spec}"
    elif not spec[:-1].replace(".", "", 1).isdecimal() or not 0 < float(spec[:-1]) <= 100:
        fail(f"--labels {spec}: expected a share above 0% and up to 100%, or a list file")
    else:
        how = f"balanced draw with seed {seed} (not a published list)"
        indices = balanced(data.labels, float(spec[:-1]) / 100, seed)
    return Subset(data, indices), f"{len(indices):,} of {len(data):,} images, {how}"


def taught(args, meta):
    """Training images, whose labels are not used; test images, their classes numbered as the teacher's that --distill
    names; the names of these; the teacher, for images normalised as the student's. meta: of the student."""
    own = dict.fromkeys(("arch", "width", "channels", "image_size", "mean", "std", "pretrained_key"))
    teacher, view, names, told = load_classifier(args.replace(pretrained=args.distill, **own), "--distill")
    for k, flag in (("channels", "--channels"), ("image_size", "--image-size")):
        if told[k] != meta[k]:
            fail(f"--distill {args.distill} has {flag} {told[k]}, the student {meta[k]}: both see the same views")
    data = open_dataset(args.data, "train", args.train_list, channels=meta["channels"])
    test = open_dataset(args.data, "val", args.val_list, channels=meta["channels"])
    if test.labels is None:
        fail(f"--data {args.data}: the test images have no labels (put them in class folders, or give --val-list)")
    classes = class_names(test)
    if unknown := sorted(set(classes.values()) - set(names)):
        fail(f"--distill {args.distill} knows {names[0]} ..., but not the class {unknown[0]} of the test images")
    test.labels, test.classes = np.array([names.index(classes[int(c)]) for c in test.labels]), names
    known = (meta["mean"], meta["std"], view.mean, view.std)
    mean, std, its_mean, its_std = (torch.tensor(x).view(-1, 1, 1) for x in known)
    teacher.register_buffer("scale", std / its_std)
    teacher.register_buffer("shift", (mean - its_mean) / its_std)
    teacher.register_forward_pre_hook(lambda module, inputs: (inputs[0] * module.scale + module.shift, inputs[1]))
    return data, test, names, teacher.requires_grad_(False).eval()


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


class HeadClassifier(Classifier):
    """A classifier on the first layers of the projector, dense, batch norm and ReLU each (SimCLR v2, section 2)."""

    def __init__(self, backbone, classes, freeze, projector):
        super().__init__(backbone, classes, freeze)
        self.projector, self.head = projector, nn.Linear(projector[-3].out_features, classes)

    def forward(self, x, paths=None):
        return self.head(self.projector(self.backbone(x) if paths is None else self.backbone(x, paths=paths)))


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
def schedule(step, total, warmup, name="cosine", final=0.0):
    """Factor of the peak learning rate at a step, 0 the first."""
    if name == "cosine" or step < warmup:
        return cosine(step, total, warmup, final)
    return 0.2 ** ((10 * step >= 6 * total) + (10 * step >= 8 * total))


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


def finetune(args, backbone, meta, data, test, names, teacher=None):
    """One run. Returns its learning rates and the accuracies at the last and at the best validation."""
    run, same = Run(args, "semi"), identity(args, backbone, data, test)
    is_vit, classes = hasattr(backbone, "patch_size"), len(names)
    how = {"interpolation": "bicubic" if is_vit else "bilinear", "mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    test_view = EvalView(args.image_size, resize=args.image_size if args.image_size > 224 else 0, **how)
    run.open([View(args.image_size, (args.crop_min, 1.0), flip=args.flip, **how)], data=data)

    projector = projector_layers(args.pretrained, args.head_layer, args.trust_pickle)
    kind, more = (HeadClassifier, [projector]) if projector else (Classifier, [])
    model = kind(backbone, classes, args.freeze, *more)
    for parameter in model.head.parameters() if projector or args.lars else ():
        nn.init.zeros_(parameter)
    model = run.place(model).train()
    same |= {"the weights of --distill": fingerprint(teacher)[:12]} if teacher else {}
    teacher = teacher and teacher.to(run.device, run.dtype, memory_format=torch.channels_last)
    peak = args.lr * (math.sqrt(args.batch_size) if args.lars else args.batch_size / 256)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay, args.head_lr, not (is_vit or args.lars))
    if args.lars:  # the classifier's steps are not adapted either, as in the official code of SimCLR
        adapted = {id(p) for p in model.parameters() if p.ndim > 1 and p is not model.head.weight}
        parts = [(g, [p for p in g["params"] if (id(p) in adapted) is a], a) for g in groups for a in (True, False)]
        optimizer = LARS([g | {"params": part, "adapt": a} for g, part, a in parts if part], peak)
    else:
        optimizer = torch.optim.AdamW(groups, peak) if is_vit else torch.optim.SGD(groups, peak, momentum=0.9)
    rule = f"{args.lr} x " + (f"sqrt({args.batch_size})" if args.lars else f"{args.batch_size}/256")
    rule += f" = {peak:.4g}, layer x{args.layer_decay:g}, classifier x{args.head_lr:g}"
    chance = math.log(classes)
    pool = {"pool": backbone.pool} if is_vit else {}  # which the classifier may have changed
    run.more = {"history": [], "meta": meta | pool, "backbone_prefix": "backbone.", "same": same}
    net = run.start(model, optimizer, chance=chance, lr=rule, baseline=f"loss ln({classes}) = {chance:.3f}")

    validate(run, test, test_view, args)  # of a run that was stopped just before it
    for epoch in run.epochs():
        for step, batches in run.steps(epoch):
            lr = peak * schedule(step, run.total, run.warmup, args.schedule, args.min_lr / peak)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            for batch in batches:
                (x,), paths = batch.views(), None
                if args.drop_path:
                    paths = model.path_factors(batch.uniforms(model.draws, rng.PATHS), args.drop_path).to(run.dtype)
                targets = teacher(x, run.amp).softmax(1) if teacher else F.one_hot(batch.labels, classes).to(run.dtype)
                run.backward(F.cross_entropy(net(x, paths), targets))
            run.update(optimizer)
            if args.grid and run.due and not process_mean(run.loss).isfinite():  # one of nine may diverge
                run.note(diverged_at_step=step + 1)
                run.close()
                return {"lr": args.lr, "head_lr": args.head_lr, "diverged_at_step": step + 1, "top1": 0.0, "top5": 0.0}
            run.log(lr)
        validate(run, test, test_view, args)

    if run.logger.recent and (ratio := run.logger.recent[-1] / chance) > 0.99:
        cure = f"lower --head-lr (now {args.head_lr:g}) or --lr (now {args.lr:g})"
        cure += "" if is_vit or args.grid else ", or let --grid choose among nine pairs"
        run.warn("end", f"the loss of the last step is {ratio:.3g} times that of guessing: {cure}")
    history = run.more["history"]
    best = max(history, key=lambda h: h["top1"])
    agree_on_undecodable(data, run.device, run.loader.pool.bad)
    what = "distilled" if teacher else f"fine-tuned with {args.labels}"
    what += f", epoch {history[-1]['epoch']:g}, top-1 {history[-1]['top1']:.2f} %"
    whole = Whole(model.backbone, model.head.weight, model.head.bias, hidden=folded(projector))
    save_classifier(f"{args.out}/semi.pt", whole, run.more["meta"], test_view, names, what)
    result = {"lr": args.lr, "head_lr": args.head_lr, **history[-1]}
    return result | {f"best_{k}": best[k] for k in ("top1", "top5", "epoch")}


def main(args):
    start_device(args)  # the processes have to exist when the data are read
    backbone, meta = load_pretrained(args)
    if args.distill:
        data, test, names, teacher = taught(args, meta)
        everything, labels = len(data), f"those that {args.distill} gives to {len(data):,} images"
    else:
        data, test = open_labelled(args.data, args.train_list, args.val_list, meta["channels"])
        everything, teacher, known = len(data), None, class_names(data)
        names = [known.get(c, f"class {c}") for c in range(int(data.labels.max()) + 1)]
        data, labels = few_labels(data, args.labels, args.seed)
    args = complete(args, backbone, meta, len(data) / everything)
    print0(f"labels      {labels}; {len(test):,} test images")

    results, settings = [], [{}]
    if args.grid:
        settings = [{"lr": lr, "head_lr": h, "out": f"{args.out}/lr{lr:g}_head{h:g}"} for lr, h in GRID]
    for setting in settings:
        results.append(finetune(args.replace(**setting), copy.deepcopy(backbone), meta, data, test, names, teacher))
        print0("result      " + "  ".join(f"{k} {v:g}" for k, v in results[-1].items()))

    best = max(results, key=lambda r: r["top1"])
    if args.grid:
        print0(f"best        lr {best['lr']:g}  head_lr {best['head_lr']:g}  top1 {best['top1']:g}")
    result = facts(args, meta, data, test) | {"labels": labels}
    result |= {k: getattr(args, k) for k in ("epochs", "batch_size", "weight_decay", "freeze", "seed")} | best
    result |= {"grid": results} if args.grid else {}
    return report(args, "semi", result)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
