"""Linear classification on a frozen backbone, by the protocols of the papers, several of them in one pass.

The backbone stays in eval mode and bit for bit what it was (checked; an error if not). Every image is decoded once per
epoch, its features are computed once per distinct augmentation, and every protocol trains its own classifier on them,
with its own batch size, optimiser, schedule and length. A classifier does not notice that others are trained beside it.

    torchrun --nproc_per_node=8 eval_linear.py --pretrained runs/moco/backbone.pt --data /imagenet
    python eval_linear.py --pretrained runs/moco/backbone.pt --data /imagenet --protocol moco,simsiam,swav,multihead
    python eval_linear.py --pretrained runs/moco/backbone.pt --data /imagenet --protocol moco,swav --lr 0.1,0.3,1,30
    python eval_linear.py --pretrained random --arch resnet18 --width 0.25 --data digits --epochs 5 --batch-size 32

--protocol: the table below, from the official code and, for multihead, MMSelfSup 0.11; auto takes the one of the method
in the file. --lr: per 256 images; what the optimiser gets is lr x batch / 256, so that at batch 256 it is the total
itself (moco 30). Several protocols and rates are all combined. --epochs and --batch-size replace those of every
protocol; drops of the learning rate and warm-up keep their share of the epochs.

Views: random resized crop of 0.08 to 1 of the area and flip, then shorter side to 256 and central 224 pixels for the
test; bicubic where the table says so; multihead adds colour jitter (0.4, 0.4, 0.4, 0) and AlexNet's lighting (0.1).
multihead: five classifiers on five stages, each pooled to about 9,000 numbers and batch-normalised without scale and
shift. Maps of ResNet-50 at 224 pixels get the windows of Goyal et al. (2019), all others adaptive pooling to the side
floor(sqrt(9216 / channels)), at most that of the map, which gives ResNet-50 the same sizes.

Batches: the loader delivers 256 images (over all processes), and a classifier with larger batches adds up gradients.
This is exact, but for batch norm (mae, multihead), which always normalises with the statistics of the 256; MAE's code
uses those of the 512 on one GPU. The incomplete batch at the end of an epoch is dropped.

Results: top-1 and top-5 of the test set after the last and at the best epoch. The best one is chosen on the images it
is reported for, as is usual; the last is not. Of multihead, the last is the usual figure.
Other data: Places205 (lists, "path label") with --epochs 28 --drops 7,14,21; iNaturalist18 (its .json files as
--train-list and --val-list) with --epochs 84 --drops 24,48,72; both with --protocol multihead.
--cached extracts features once, without augmentation, and trains on them: minutes instead of hours, not the protocol.

Deviations: normalisation is the backbone's (SwAV's linear code has 0.228 for 0.229); MAE's crop is one attempt clipped
to the image, ours tries ten times, as torchvision; DINO's ViT-L and larger, which it does not have, are read as ViT-B.
"""

import dataclasses
import hashlib
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.augment import EvalView, View, without_colours
from common.checkpoint import load, load_backbone, save
from common.data import Loader, default_size, eval_batches, labelled
from common.distributed import (
    all_reduce,
    any_process,
    barrier,
    finish,
    gather_uneven,
    init,
    is_main,
    mean,
    print0,
    rank,
    sync_batch_norm,
    world_size,
)
from common.log import Parser, Stop, check_args, fail, report
from common.optim import LARS, cosine, full, param_groups, precision

MICRO = 256  # images that the loader delivers at a time, of which every protocol's batch is a multiple


# -------------------------------------------------------------------------------------------------- protocols
@dataclasses.dataclass(frozen=True)
class Protocol:
    """How one classifier is trained. lr: per 256 images. drops: epochs that divide the rate by 10, else it is a cosine
    to 0, per epoch or, with per_step, per optimiser step after `warmup` epochs of linear rise.

    optimiser: "sgd" with momentum 0.9, "nesterov" likewise, or LARS of trust 0.001 and momentum 0.9 in two dialects:
    "lars-all" scales biases too (apex's LARC with clip=False), "lars-weights" only what has two dimensions. A norm of
    0 means a factor of 1 in both: the first step of a bias, which starts at 0, is one of plain SGD.
    feature: "pool" (what the backbone returns), "cls" (class token), "blocks" (DINO's choice of tokens), "stages".
    """

    batch: int
    epochs: int
    optimiser: str
    lr: float
    weight_decay: float
    drops: tuple = ()
    per_step: bool = False
    warmup: float = 0
    feature: str = "pool"
    norm: float = 0.0  # eps of a batch norm before the classifier; 0: none
    train: str = "bilinear"  # interpolation of the training crops
    test: str = "bilinear"
    colour: bool = False  # jitter and lighting


# fmt: off
PROTOCOLS = {
    #                     batch epochs optimiser    lr/256  decay
    "moco":      Protocol(256,   100, "sgd",          30.0, 0.0, drops=(60, 80)),
    "simsiam":   Protocol(4096,   90, "lars-all",      0.1, 0.0),
    "swav":      Protocol(256,   100, "sgd",           0.3, 1e-6),
    "barlow":    Protocol(256,   100, "sgd",           0.3, 1e-6),
    "mocov3":    Protocol(1024,   90, "sgd",           3.0, 0.0, feature="cls"),
    "mae":       Protocol(16384,  90, "lars-weights",  0.1, 0.0, per_step=True, warmup=10, feature="cls", norm=1e-6,
                          train="bicubic", test="bicubic"),
    "dino":      Protocol(1024,  100, "sgd",         0.001, 0.0, feature="blocks", test="bicubic"),
    "multihead": Protocol(256,    90, "nesterov",     0.01, 1e-4, drops=(30, 60), feature="stages", norm=1e-5,
                          colour=True),
}
AUTO = {
    "moco": "moco", "simsiam": "simsiam", "simclr": "simsiam", "byol": "simsiam", "swav": "swav", "mae": "mae",
    "barlowtwins": "barlow", "mocov3": "mocov3", "dino": "dino",
    "npid": "multihead", "deepcluster": "multihead", "odc": "multihead", "featuretransformation": "moco",
}
# (channels, side) of a stage of ResNet-50 at 224 pixels: kernel, stride and padding of its average pooling
WINDOWS = {(64, 112): (10, 10, 4), (256, 56): (16, 8, 0), (512, 28): (13, 5, 0), (1024, 14): (8, 3, 0),
           (2048, 7): (6, 1, 0)}
# fmt: on


def auto(method, backbone):
    """The protocol of a method, of whatever spelling ("MoCo v3", "Barlow Twins"); of an unknown one, moco or mocov3."""
    known = re.sub("[^a-z0-9]", "", method.lower().split(",")[-1])
    return AUTO.get(known, "moco" if hasattr(backbone, "stages") else "mocov3")


def adapt(name, backbone, epochs=0, batch=0, drops=()):
    """The protocol for this backbone and with what the user replaces."""
    protocol, resnet = PROTOCOLS[name], hasattr(backbone, "stages")
    if name == "mocov3" and resnet:
        protocol = dataclasses.replace(protocol, lr=0.1)
    if name == "mae" and not resnet and backbone.dim >= 1024:  # ViT-L and ViT-H
        protocol = dataclasses.replace(protocol, epochs=50)
    if protocol.feature == "stages" and not resnet:
        fail(f"--protocol {name} reads the five stages of a ResNet, which this backbone is not")
    if protocol.feature in ("cls", "blocks") and resnet:
        protocol = dataclasses.replace(protocol, feature="pool")
    if epochs:
        share = epochs / protocol.epochs
        scaled = {"drops": tuple(d * share for d in protocol.drops), "warmup": protocol.warmup * share}
        protocol = dataclasses.replace(protocol, epochs=epochs, **scaled)
    if drops and protocol.drops:
        protocol = dataclasses.replace(protocol, drops=drops)
    return dataclasses.replace(protocol, batch=batch) if batch else protocol


def schedule(protocol, step, steps):
    """Factor of the peak learning rate at optimiser step `step` of a run with `steps` per epoch."""
    epoch = step // steps
    if protocol.drops:
        return 0.1 ** sum(epoch >= drop for drop in protocol.drops)
    if protocol.per_step:
        return cosine(step, protocol.epochs * steps, round(protocol.warmup * steps))
    return cosine(epoch, protocol.epochs)


# --------------------------------------------------------------------------------------------------- features
def pool_stage(x):
    """A stage (B, C, H, W) averaged to about 9,000 numbers per image: (B, C, s, s)."""
    channels, side = x.shape[1], x.shape[2]
    if (channels, side) in WINDOWS:
        return F.avg_pool2d(x, *WINDOWS[channels, side])
    return F.adaptive_avg_pool2d(x, max(1, min(side, math.isqrt(9216 // channels))))


@torch.no_grad()
def features(backbone, x, kinds, amp):
    """{kind: list of tensors (B, ...)} of at least single precision, from one forward pass."""
    found = {}
    with amp:
        if hasattr(backbone, "stages"):
            maps = backbone.stages(x)
            if "stages" in kinds:
                found["stages"] = [full(pool_stage(m)) for m in maps]
            if "pool" in kinds:
                found["pool"] = [full(maps[-1]).mean((2, 3))]
            return found
        if "pool" in kinds:
            found["pool"] = [full(backbone(x))]
        if kinds & {"cls", "blocks"}:
            several = backbone.dim < 768  # Caron et al. 2021: ViT-S, and smaller; else ViT-B
            tokens = backbone.last(x, 4 if several and "blocks" in kinds else 1)
            tops = [full(t[:, 0]) for t in tokens]
            if "cls" in kinds:
                found["cls"] = tops[-1:]
            if "blocks" in kinds:
                patches = [] if several else [full(tokens[-1][:, 1:]).mean(1)]
                found["blocks"] = [torch.cat([*tops, *patches], 1)]
    return found


def fingerprint(backbone):
    """A hash of all weights and statistics."""
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_frozen(backbone, before):
    """Ends the program with code 1 if the backbone is not what it was, or no longer in eval mode."""
    if any(m.training for m in backbone.modules()) or fingerprint(backbone) != before:
        fail("the backbone has changed while its classifiers were trained: the results mean nothing", code=1)


class Live:
    """Features of images that are decoded and augmented anew in every epoch."""

    def __init__(self, backbone, train, test, micro, amp, dtype, seed=0, device="cpu", workers=4):
        self.backbone, self.train, self.test_set, self.micro, self.amp = backbone, train, test, micro, amp
        self.settings = {"device": device, "workers": workers, "dtype": dtype}
        self.seed, self.loader, self.steps = seed, None, len(train) // micro

    def features(self, view, x, kinds):
        return {(view, kind): f for kind, f in features(self.backbone, x, kinds, self.amp).items()}

    def epoch(self, epoch, start, probes):
        """Yields ({(view, kind): features}, labels) of each micro-batch from number `start` on."""
        wanted = kinds_of_views(probes, 0)
        if self.loader is None or self.loader.recipes != tuple(wanted):
            self.loader = Loader(self.train, wanted, self.micro, seed=self.seed, **self.settings)
            self.loader.streams = [0] * len(wanted)  # so that a view does not depend on the others beside it
        for batch in self.loader.epoch(epoch, start):
            found = {}
            for (view, kinds), x in zip(wanted.items(), batch.views(), strict=True):
                found |= self.features(view, x, kinds)
            yield found, batch.labels

    def test(self, probes):
        """Yields the same of this process's share of the test images, one view after the other."""
        for view, kinds in kinds_of_views(probes, 1).items():
            for x, labels, _ in eval_batches(self.test_set, view, self.micro, **self.settings):
                yield self.features(view, x, kinds), labels


class Cached:
    """The same batches of features that were computed once, from the views of the test."""

    def __init__(self, live, probes):
        self.steps, self.micro, wanted = live.steps, live.micro, kinds_of_views(probes, 1)
        self.loader = Loader(live.train, wanted, live.micro, seed=live.seed, workers=0)  # for the order of its images
        found, labels = self._extract(live, live.train, wanted)  # every process draws from all of them
        self.train = {key: [gather_uneven(f) for f in parts] for key, parts in found.items()}, gather_uneven(labels)
        self.test_set = self._extract(live, live.test_set, wanted)
        size = sum(f.numel() * f.element_size() for parts in self.train[0].values() for f in parts)
        print0(f"cached      {len(live.train):,} training images, {size / 2**30:.2f} GB of features in each process")

    @staticmethod
    def _extract(live, dataset, wanted):
        """({(view, kind): list of (n, ...)}, labels (n,)) of this process's share of a dataset."""
        found = {}
        for view, kinds in wanted.items():
            blank = next(live.backbone.parameters()).new_zeros(1, len(view.mean), view.size, view.size)
            none = {key: [f[:0] for f in parts] for key, parts in live.features(view, blank, kinds).items()}
            batches = [(none, torch.empty(0, dtype=torch.int64, device=blank.device))]  # a share may be empty
            total = -(-len(dataset) // live.micro // world_size())
            for x, y, _ in bar(eval_batches(dataset, view, live.micro, **live.settings), "features", total):
                batches.append((live.features(view, x, kinds), y))
            for key in none:
                found[key] = [torch.cat(column) for column in zip(*(b[key] for b, _ in batches), strict=True)]
            labels = torch.cat([y for _, y in batches])
        return found, labels

    def epoch(self, epoch, start, probes):
        order = torch.from_numpy(self.loader.order(epoch))
        for step in range(start, self.steps):
            first = step * self.loader.batch_size + rank() * self.loader.local
            yield self._rows(self.train, order[first : first + self.loader.local])

    def test(self, probes):
        for rows in torch.arange(len(self.test_set[1])).split(4096):
            yield self._rows(self.test_set, rows)

    @staticmethod
    def _rows(source, rows):
        found, labels = source
        rows = rows.to(labels.device)
        return {key: [f[rows] for f in parts] for key, parts in found.items()}, labels[rows]


def kinds_of_views(probes, i):
    """{view: kinds of features} that the probes train (i = 0) or are tested on (i = 1)."""
    wanted = {}
    for probe in probes:
        wanted.setdefault(probe.views[i], set()).add(probe.protocol.feature)
    return wanted


# ------------------------------------------------------------------------------------------------ classifiers
class Head(nn.Module):
    """A linear classifier, or one per stage: features [(B, ...), ...] -> logits [(B, classes), ...]."""

    def __init__(self, shapes, classes, norm=0.0):
        super().__init__()
        self.parts = nn.ModuleList()
        for shape in shapes:
            linear = nn.Linear(math.prod(shape), classes)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            layer = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
            layers = [layer(shape[0], eps=norm, affine=False)] if norm else []
            self.parts.append(nn.Sequential(*layers, nn.Flatten(), linear))

    def forward(self, features):
        return [part(f) for part, f in zip(self.parts, features, strict=True)]


class Probe:
    """One classifier in training: its head, optimiser, schedule and results."""

    def __init__(self, name, protocol, lr, views, shapes, classes, images, micro, *, seed=0, device="cpu", dtype=None):
        self.name, self.protocol, self.lr, self.views = f"{name} lr {lr:g}", protocol, lr, views
        self.steps, self.accum, self.peak = images // protocol.batch, protocol.batch // micro, lr * protocol.batch / 256
        if not self.steps:
            fail(
                f"--protocol {name} has batches of {protocol.batch} images, the training set {images}: give a smaller"
                f" --batch-size, such as {min(256, images)}"
            )
        torch.manual_seed(seed)
        head = Head(shapes, classes, protocol.norm)
        self.head = sync_batch_norm(head.to(device, dtype))
        self.parameters = list(self.head.parameters())
        settings = {"lr": self.peak, "momentum": 0.9, "weight_decay": protocol.weight_decay}
        if protocol.optimiser == "lars-weights":
            self.optimizer = LARS(param_groups(self.head, protocol.weight_decay), self.peak)
        elif protocol.optimiser == "lars-all":
            self.optimizer = LARS(self.parameters, **settings)
        else:
            self.optimizer = torch.optim.SGD(self.parameters, nesterov=protocol.optimiser == "nesterov", **settings)
        self.labels = [self.name] if len(shapes) == 1 else [f"{self.name} feat{i + 1}" for i in range(len(shapes))]
        self.chance = len(shapes) * math.log(classes)  # the loss of guessing
        self.results, self.loss = [], torch.zeros((), device=device)  # results: [epoch, [[top-1, top-5], ...]]

    def learn(self, found, labels, epoch, index):
        """Micro-batch `index` of an epoch. The gradient is that of the mean over the protocol's batch."""
        step, part = divmod(index, self.accum)
        if step >= self.steps:
            return
        outputs = self.head(found[self.views[0], self.protocol.feature])
        loss = sum(F.cross_entropy(output, labels) for output in outputs)  # of independent classifiers
        (loss / self.accum).backward()
        self.loss = loss.detach() / len(outputs)
        if part + 1 == self.accum:
            for p in self.parameters:
                p.grad = mean(p.grad)
            for group in self.optimizer.param_groups:
                group["lr"] = self.peak * schedule(self.protocol, epoch * self.steps + step, self.steps)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self):
        """All there is to continue from; a collective, since gradients of an unfinished batch differ by process."""
        grads = [None if p.grad is None else mean(p.grad) for p in self.parameters]
        state = {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"grads": grads, "results": self.results}

    def load_state(self, state):
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.results = [list(row) for row in state["results"]]
        for p, grad in zip(self.parameters, state["grads"], strict=True):
            p.grad = None if grad is None else grad.to(p)


@torch.no_grad()
def evaluate(source, probes, images):
    """{name of the probe: [[top-1, top-5] of each of its classifiers]} in percent of all test images."""
    # a process may have no test image, so that every count needs its zero
    counts = {p.name: torch.zeros(len(p.labels), 2, dtype=torch.int64, device=p.loss.device) for p in probes}
    for probe in probes:
        probe.head.eval()
    for found, labels in source.test(probes):
        for probe in [p for p in probes if (p.views[1], p.protocol.feature) in found]:
            for i, output in enumerate(probe.head(found[probe.views[1], probe.protocol.feature])):
                score, best = output.topk(min(5, output.shape[1]), dim=1)
                hit = (best == labels[:, None]) & score.isfinite()  # a classifier that diverged gets nothing right
                counts[probe.name][i] += torch.stack([hit[:, 0].sum(), hit.any(1).sum()])
    for probe in probes:
        probe.head.train()
    return {name: [[100 * n / images for n in pair] for pair in all_reduce(c).tolist()] for name, c in counts.items()}


# -------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    group = parser.add_argument_group("what is evaluated")
    group.add_argument("--pretrained", required=True, help="backbone.pt, last.pt, a published file, or random")
    group.add_argument("--trust-pickle", action="store_true", help="allow --pretrained to run code while it is read")
    group.add_argument("--data", required=True, help="folder with train/ and val/, or digits, cifar10[:DIR] ...")
    group.add_argument("--train-list", help="training images: 'relative/path label' per line, or iNaturalist's .json")
    group.add_argument("--val-list", help="test images, likewise")
    group.add_argument("--arch", help="of a random initialisation (default: resnet50); a file tells it")
    group.add_argument("--width", type=float, help="of a random initialisation (default: 1); a file tells it")
    group.add_argument("--channels", type=int, help="of a random initialisation (default: 3); a file tells it")
    group.add_argument("--image-size", type=int, help="default: that of the file, else what fits the data")
    group = parser.add_argument_group("classifiers")
    group.add_argument("--protocol", default="auto", help=f"auto, or some of {','.join(PROTOCOLS)}")
    group.add_argument("--lr", default="", help="one or several, per 256 images (default: the protocol's)")
    group.add_argument("--epochs", type=int, help="instead of the protocol's; drops and warm-up keep their share")
    group.add_argument("--drops", default="", help="epochs that divide the rate by 10, where the protocol has such")
    group.add_argument("--batch-size", type=int, help="instead of the protocol's, over all processes")
    group.add_argument("--cached", action="store_true", help="train on features extracted once: not the protocol")
    group = parser.add_argument_group("run")
    group.add_argument("--out", help="folder of eval_linear.json (default: beside the checkpoint, or runs/random)")
    group.add_argument("--resume", action="store_true", default=True, help="continue from linear_last.pt in --out")
    group.add_argument("--no-resume", dest="resume", action="store_false", help="start again")
    group.add_argument("--max-steps", type=int, default=0, help="stop after this many loader batches, and evaluate")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--workers", type=int, default=8, help="loading threads per process")
    group.add_argument("--device", default="auto")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16", "fp64"], default="auto")
    group.add_argument("--log-every", type=int, default=50, help="loader batches")
    group.add_argument("--save-every", type=float, default=10, help="minutes, and after every epoch")
    group.add_argument("--val-every", type=int, default=1, help="epochs between evaluations")
    args = parser.parse_args(argv)
    unknown = [name for name in args.protocol.split(",") if name not in PROTOCOLS]
    if unknown and args.protocol != "auto":
        parser.error(f"--protocol {unknown[0]!r}: unknown, expected auto or some of {','.join(PROTOCOLS)}")
    for flag, text in (("--lr", args.lr), ("--drops", args.drops)):
        if not all(0 < value < math.inf for value in numbers(text)):
            parser.error(f"{flag} {text!r}: expected numbers greater than 0 with commas between them, such as 0.1,0.3")
    return args


def numbers(text):
    """'0.1,0.3' -> (0.1, 0.3), without repetitions; what is no number becomes 0."""
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(","))) if text else ()
    except ValueError:
        return (0.0,)


# --------------------------------------------------------------------------------------------------- training
def bar(iterable=None, name="", total=None, initial=0):
    hidden = not (is_main() and sys.stderr.isatty())
    return tqdm(iterable, name, total, initial=initial, leave=False, dynamic_ncols=True, disable=hidden)


def micro_batch(batches):
    """The largest number up to MICRO that divides all batches and that the processes can share."""
    common, w = math.gcd(*batches), world_size()
    fitting = [n for n in range(w, min(common, MICRO) + 1, w) if common % n == 0]
    if not fitting:
        fail(f"--batch-size {common} is not divisible by {w} processes: try {max(1, round(common / w)) * w}")
    return fitting[-1]


def make_probes(names, args, backbone, meta, classes, images, amp):
    """All combinations of protocols and learning rates, and the size of the micro-batches."""
    protocols = {n: adapt(n, backbone, args.epochs, args.batch_size, numbers(args.drops)) for n in names}
    micro, size = micro_batch([p.batch for p in protocols.values()]), meta["image_size"]
    blank = next(backbone.parameters()).new_zeros(1, meta["channels"], size, size)
    found = features(backbone, blank, {p.feature for p in protocols.values()}, amp)
    statistics = {"mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    probes = []
    for name, protocol in protocols.items():
        colour = {"jitter": (0.4, 0.4, 0.4, 0.0), "jitter_p": 1.0, "lighting": 0.1} if protocol.colour else {}
        test = EvalView(size, interpolation=protocol.test, **statistics)
        train = test if args.cached else View(size, interpolation=protocol.train, **colour, **statistics)
        train = train if args.cached or meta["channels"] == 3 else without_colours(train)
        shapes = [f.shape[1:] for f in found[protocol.feature]]
        for lr in numbers(args.lr) or (protocol.lr,):
            more = {"seed": args.seed, "device": blank.device, "dtype": blank.dtype}
            probes.append(Probe(name, protocol, lr, (train, test), shapes, classes, images, micro, **more))
    return probes, micro


class State:
    """What a run that died needs to continue, in `<out>/linear_last.pt`. facts: what has to agree, by name."""

    def __init__(self, path, probes, epochs, facts):
        self.path, self.probes, self.epochs, self.facts = path, probes, epochs, facts

    def save(self, epoch, index):
        states = {p.name: p.state() for p in self.probes}
        save(self.path, {"epoch": epoch, "index": index, "epochs": self.epochs, "facts": self.facts, "probes": states})

    def load(self):
        """(epoch, micro-batch) to go on with. A complete run with other facts counts as none, an incomplete one ends
        the program with the list of differences."""
        if not self.path.exists():
            return 0, 0
        state = load(self.path, "--out")
        if not {"epoch", "index", "epochs", "facts", "probes"} <= state.keys():
            fail(f"{self.path} is not the state of a linear evaluation: choose another --out, or --no-resume")
        known = state["facts"]
        differences = [f"{k} was {known.get(k)}, is {v}" for k, v in self.facts.items() if known.get(k) != v]
        if differences and state["epoch"] == state["epochs"]:
            return 0, 0
        if differences:
            remedy = "choose another --out, or --no-resume to overwrite it"
            fail(f"{self.path} is an unfinished run of something else ({'; '.join(differences)}): {remedy}")
        for probe in self.probes:
            probe.load_state(state["probes"][probe.name])
        print0(f"resuming    {self.path}, {state['epoch']} of {self.epochs} epochs and {state['index']} batches")
        return state["epoch"], state["index"]


def train(args, probes, source, state, images, check, device):
    """Trains and evaluates everything. images: in the test set. check: called after the first epoch. Returns whether
    the run is complete, as it is unless --max-steps cut it short."""
    stop, saved, warned, epochs = Stop(), time.monotonic(), set(), state.epochs
    epoch, index = state.load() if args.resume else (0, 0)
    last = min(epochs * source.steps, args.max_steps or math.inf)

    def test(tested, epoch):
        if tested:
            for name, scores in evaluate(source, tested, images).items():
                next(p for p in tested if p.name == name).results.append([round(epoch, 4), scores])
            line = (f"{p.name} {'/'.join(f'{top1:.2f}' for top1, _ in p.results[-1][1])}" for p in tested)
            print0(f"epoch {epoch:.4g}/{epochs}  top-1 {'  '.join(line)}")

    def leave(epoch, index):
        state.save(epoch, index)
        print0(f"stopped in epoch {epoch + 1}, all saved in {state.path}: run the same command again to continue")
        finish()
        raise SystemExit(Stop.CODE)

    while epoch * source.steps + index < last:
        active = [p for p in probes if epoch < p.protocol.epochs]
        progress = bar(None, f"epoch {epoch + 1}/{epochs}", source.steps, index)
        clock, logged, end = time.perf_counter(), index, min(source.steps, last - epoch * source.steps)
        for found, labels in source.epoch(epoch, index, active):
            for probe in active:
                probe.learn(found, labels, epoch, index)
            index += 1
            if index % args.log_every == 0 or index == end or (stop.flag and world_size() == 1):
                losses = {p.name: mean(p.loss).item() for p in active}
                speed = (index - logged) * source.micro / max(time.perf_counter() - clock, 1e-9)
                text = "  ".join([*(f"{name} {loss:.4f}" for name, loss in losses.items()), f"img/s {speed:.0f}"])
                progress.set_postfix_str(text, refresh=False)
                progress.update(index - progress.n)
                if progress.disable:
                    print0(f"epoch {epoch + 1}/{epochs}  batch {index}/{source.steps}  loss {text}")
                for p in active:
                    loss, over = losses[p.name], epoch + 1 == p.protocol.epochs and index == end
                    if p.name not in warned and not (math.isfinite(loss) and (loss < 2 * p.chance or not over)):
                        warned.add(p.name)
                        text = f"the loss of {p.name} is {loss:.4g}, that of chance {p.chance:.4g}: lower --lr"
                        print0(f"warning: {text}", file=sys.stderr)
                if stop.requested(device):
                    progress.close()
                    leave(epoch, index)
                if any_process(time.monotonic() - saved > 60 * args.save_every, device):
                    state.save(epoch, index)
                    saved = time.monotonic()
                clock, logged = time.perf_counter(), index
            if index == end:
                break
        progress.close()
        state.save(epoch, index)  # a run that is killed during the evaluation repeats only that
        if index < source.steps:
            break
        epoch, index = epoch + 1, 0
        test([p for p in active if epoch % args.val_every == 0 or epoch == p.protocol.epochs], epoch)
        if epoch == 1:
            check()
        if epoch < epochs and stop.requested(device):
            leave(epoch, index)
    if epoch == epochs:
        state.save(epoch, index)
    else:  # cut short: what was saved goes on from here, and does not know of this evaluation
        now = epoch + index / source.steps
        test(
            [p for p in probes if now < p.protocol.epochs and (not p.results or p.results[-1][0] < round(now, 4))], now
        )
    return epoch == epochs


def summary(probes):
    """Prints the table. Returns {classifier: its recipe, last and best result} and the best classifier."""
    heads = {}
    print0(f"\n{'':<28}{'last: top-1':>12}{'top-5':>8}{'best: top-1':>14}{'top-5':>8}{'epoch':>7}")
    for p in probes:
        recipe = {"protocol": p.name.split()[0], "lr": p.lr, "total_lr": p.peak}
        recipe |= {"batch": p.protocol.batch, "epochs": p.protocol.epochs}
        for i, label in enumerate(p.labels):
            rows = [{"epoch": e, "top1": round(s[i][0], 3), "top5": round(s[i][1], 3)} for e, s in p.results]
            last, best = rows[-1], max(rows, key=lambda row: row["top1"])
            print0(
                f"{label:<28}{last['top1']:>12.2f}{last['top5']:>8.2f}"
                f"{best['top1']:>14.2f}{best['top5']:>8.2f}{best['epoch']:>7g}"
            )
            heads[label] = recipe | {"last": last, "best": best}
    name = max(heads, key=lambda label: heads[label]["best"]["top1"])
    best = {"head": name, **heads[name]["best"]}
    print0(f"best        {name}: top-1 {best['top1']:.2f}, top-5 {best['top5']:.2f} at epoch {best['epoch']:g}\n")
    return {"heads": heads, "best": best}


def main(args):
    device = init(args.device)
    check_args(args)
    size = args.image_size or (default_size(args.data) if args.pretrained == "random" else None)
    rest = (size, args.seed, args.trust_pickle, args.channels)
    backbone, meta = load_backbone(args.pretrained, args.arch, args.width, *rest)
    size = meta["image_size"]
    if size % getattr(backbone, "patch_size", 1):
        fail(f"--image-size {size} is not a multiple of the patch size {backbone.patch_size}")
    amp, _, dtype = precision(args.precision, device)
    backbone = backbone.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    before = fingerprint(backbone)

    data, test = labelled(args.data, args.train_list, args.val_list, meta["channels"])
    classes = int(max(data.labels)) + 1
    names = list(dict.fromkeys(args.protocol.split(",")))
    if names == ["auto"]:
        names = [auto(meta["method"], backbone)]
    probes, micro = make_probes(names, args, backbone, meta, classes, len(data), amp)
    print0(f"data        {args.data}: {len(data):,} training, {len(test):,} test images, {classes} classes, {size} px")
    print0(f"batches     {world_size()} processes x {micro // world_size()} images, summed up to those below")
    for p in probes:
        recipe = f"{p.protocol.optimiser}, decay {p.protocol.weight_decay:g}, {p.protocol.feature}, {p.protocol.epochs}"
        print0(f"{p.name:<22}x {p.protocol.batch}/256 = {p.peak:.4g}, {recipe} epochs x {p.steps} steps")
    for p in probes:  # a step of LARS changes the weights by the rate x trust of their length; on ImageNet 45 in all
        if p.protocol.optimiser.startswith("lars") and p.steps * p.protocol.epochs * p.peak * 0.001 < 2:
            print0(
                f"note: {p.name} hardly moves in {p.steps * p.protocol.epochs} steps; for small sets --protocol swav"
            )
    source = Live(backbone, data, test, micro, amp, dtype, args.seed, device, args.workers)
    if args.cached:
        print0("note: --cached trains on features of unaugmented images, which is not the protocol")
        source = Cached(source, probes)

    random = str(args.pretrained) == "random"
    out = Path(args.out or ("runs/random" if random else Path(args.pretrained).parent))
    out.mkdir(parents=True, exist_ok=True)
    barrier()
    facts = {"--protocol": ",".join(names), "--lr": args.lr, "--epochs": args.epochs, "--drops": args.drops}
    facts |= {"--batch-size": args.batch_size, "--cached": args.cached, "--val-every": args.val_every}
    facts |= {"--image-size": size, "--seed": args.seed, "the backbone": before[:12]}
    facts |= {"training images": len(data), "test images": len(test), "the loader's batch": micro}
    state = State(out / "linear_last.pt", probes, max(p.protocol.epochs for p in probes), facts)
    complete = train(args, probes, source, state, len(test), lambda: check_frozen(backbone, before), device)

    check_frozen(backbone, before)
    result = {"pretrained": str(args.pretrained), "data": args.data, "image_size": size, "classes": classes}
    result |= {k: meta[k] for k in ("method", "arch", "width")}
    result |= {"train": len(data), "test": len(test), "seed": args.seed, "complete": complete, "cached": args.cached}
    result |= {"note": "features of unaugmented images: not the protocol"} if args.cached else {}
    result |= summary(probes)
    report(args, "linear", result)
    finish()
    return result


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
