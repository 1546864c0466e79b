"""Linear classification on a frozen backbone, by the protocols of the papers, several of them in one pass.

The backbone stays in eval mode and bit for bit what it was (checked; an error if not). Every image is decoded once per
epoch, its features are computed once per distinct augmentation, and every protocol trains its own classifier on them,
with its own batch size, optimiser, schedule and length. A classifier gets the same bits alone and beside others.

    torchrun --nproc_per_node=8 eval_linear.py --pretrained runs/moco/backbone.pt --data /imagenet
    python eval_linear.py --pretrained runs/moco/backbone.pt --data /imagenet --protocol moco,simsiam,swav,multihead
    python eval_linear.py --pretrained runs/moco/backbone.pt --data /imagenet --protocol moco,swav --lr 0.1,0.3,1,30
    python eval_linear.py --pretrained random --arch resnet18 --width 0.25 --data digits

--protocol: the table below, from the official code and, for multihead, MMSelfSup 0.11, or small. auto takes small below
100,000 training images, else the protocol of the method in the file; where the file does not tell the method, a guess,
and says so. byol: the rate of its code; the paper takes the best of --lr 0.05,0.1,0.2,0.3,0.4. --lr: per 256 images;
what the optimiser gets is lr x batch / 256, so that at batch 256 it is the total itself (moco 30). Several protocols
and rates are all combined. --epochs and --batch-size replace those of every protocol; drops of the learning rate and
warm-up keep their share of the epochs.

small: ours, for sets on which the others, made for 90 epochs of ImageNet, end after too few steps or diverge. Pooled
features are computed once, without augmentation, and standardised by mean and deviation over the training images, like
batch norm without scale and shift, so that rates do not depend on their scale. Classifiers start from zero: SGD with
momentum 0.9, batch 256 or all images, a cosine per step, at least 20 epochs and 2,000 steps. The rate is the one of
nine with the smallest loss of a tenth of the training images, held out and spread over the classes; with it, a
classifier is trained on all of them. The test images decide nothing. The figures compare networks with each other, not
with published ones.

Views: random resized crop of 0.08 to 1 of the area and flip; for the test, shorter side to 256 and central 224 pixels,
or sizes in this ratio (at most 64 pixels: no margin); bicubic where the table says so, and in small for ViTs. multihead
adds colour jitter (0.4, 0.4, 0.4, 0) and AlexNet's lighting (0.1).
multihead: five classifiers on five stages, each pooled to about 9,000 numbers and batch-normalised without scale and
shift. Maps of ResNet-50 at 224 pixels get the windows of Goyal et al. (2019), all others adaptive pooling to the side
floor(sqrt(9216 / channels)), at most that of the map, which gives ResNet-50 the same sizes.

Batches: the loader delivers 256 images (over all processes), which is one step of --max-steps and --log-every, and a
classifier with larger batches adds up gradients. This is exact, but for batch norm (mae, multihead), which always
normalises with the statistics of the 256; MAE's code uses those of the 512 on one GPU. The incomplete batch at the end
of an epoch is dropped.

Results: top-1 and top-5 of the test set after the last and at the best epoch. The best one is chosen on the images it
is reported for, as is usual; the last is not. Of multihead, the last is the usual figure.
The classifier with the best last top-1 is saved with the network: predict.py applies linear.pt to new images.
Of the best figure, per_class_linear.csv and confusion_linear.png show single classes, and which are taken for which.
Other data: Places205 (lists, "path label") with --epochs 28 --drops 7,14,21; iNaturalist18 (its .json files as
--train-list and --val-list) with --epochs 84 --drops 24,48,72; both with --protocol multihead.

Deviations: normalisation is the backbone's (SwAV's linear code has 0.228 for 0.229); the crop of MAE and BYOL is one
attempt clipped to the image, ours tries ten times, as torchvision; SimCLR and BYOL resize as TensorFlow does, without
antialiasing; DINO's ViT-L and larger, which it does not have, are read as ViT-B.
"""

import argparse
import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import math
import re
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import rng
from common.args import Parser, fail, positive
from common.augment import EvalView, View
from common.batchnorm import sync_batch_norm
from common.checkpoint import load_file, load_pretrained, save_file
from common.classes import by_class, class_names
from common.classifier import Classifier, save_classifier
from common.datasets import open_labelled
from common.distributed import all_reduce, any_process, gather_uneven, print0, process_mean, world_size
from common.features import broken_rows, extract, features, has_class_token, usual_interpolation
from common.files import make_folder, result_folder
from common.loader import Loader, agree_on_undecodable, eval_batches
from common.log import Stop, bar, facts, fingerprint, identity, report
from common.optim import LARS, cosine, or_precise, param_groups, precision
from common.run import start_device
from common.vit import ViT

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
    "simclr":    Protocol(4096,   90, "nesterov",      0.1, 0.0, per_step=True, train="bicubic", test="bicubic"),
    "byol":      Protocol(1024,   80, "nesterov",      0.2, 0.0, per_step=True, train="bicubic", test="bicubic"),
    "swav":      Protocol(256,   100, "sgd",           0.3, 1e-6),
    "barlow":    Protocol(256,   100, "sgd",           0.3, 1e-6),
    "directclr": Protocol(256,   100, "sgd",           0.1, 1e-6),
    "obow":      Protocol(1024,  100, "sgd",           2.5, 0.0),
    "mocov3":    Protocol(1024,   90, "sgd",           3.0, 0.0, feature="cls"),
    "mae":       Protocol(16384,  90, "lars-weights",  0.1, 0.0, per_step=True, warmup=10, feature="cls", norm=1e-6,
                          train="bicubic", test="bicubic"),
    "dino":      Protocol(1024,  100, "sgd",         0.001, 0.0, feature="blocks", test="bicubic"),
    "multihead": Protocol(256,    90, "nesterov",     0.01, 1e-4, drops=(30, 60), feature="stages", norm=1e-5,
                          colour=True),
}
AUTO = {
    "moco": "moco", "mocoft": "moco", "featuretransformation": "moco", "densecl": "moco", "interclr": "moco",
    "simsiam": "simsiam", "simclr": "simclr", "simclrv2": "simclr", "byol": "byol", "swav": "swav",
    "barlowtwins": "barlow", "vicreg": "barlow", "directclr": "directclr", "mocov3": "mocov3", "obow": "obow",
    "mae": "mae", "cae": "mae", "maskfeat": "mae", "simmim": "mae", "ijepa": "mae", "dino": "dino", "esvit": "dino",
    "simdino": "dino", "ibot": "dino",
    "deepclusterv2": "swav", "selav2": "swav", "npid": "multihead", "deepcluster": "multihead", "odc": "multihead",
    "rotationpred": "multihead", "relativeloc": "multihead", "protoclr": "swav", "pixpro": "moco", "scan": "simclr",
    "lejepa": "dino", "nnclr": "simclr",
}
# fmt: on
SMALL = 100_000  # training images, below which auto takes the protocol for small sets
RATES = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]  # per 256 images, among which that protocol chooses
EPOCHS, STEPS = 20, 2000  # its least numbers


def auto(method, backbone):
    """(protocol, "" or why it is a guess) for a network by its method, of whatever spelling ("MoCo v3", "Barlow Twins",
    "MMSelfSup, MoCo v3", "one of VICReg, SCAN"), and where that does not tell, by its positions."""
    words = [re.sub("[^a-z0-9]", "", word) for word in re.split(r",|/|\bor\b|\bone of\b", method.lower())]
    words = [word for word in words if word]
    found = list(dict.fromkeys(AUTO[word] for word in words if word in AUTO))
    vague = len(found) > 1 or ("one of" in method and any(word not in AUTO for word in words))
    if found and not vague:
        return found[0], ""
    fixed = {"sincos-xy": "mae", "sincos-yx": "mocov3"}  # tables that these two do not learn
    positions = getattr(backbone, "config", {}).get("positions")
    if positions in fixed and method != "random":
        return fixed[positions], ""
    guess = found[0] if found else "dino" if hasattr(backbone, "patch_size") else "swav"
    why = "method unknown" + (f" ({method})" if method not in ("", "unknown") else "")
    why = "a random network has none of its own" if method == "random" else why
    return guess, f"{why}, protocol {guess} is a guess; --protocol names another"


def adapt(name, backbone, epochs=0, batch=0, drops=()):
    """The protocol for this backbone and with what the user replaces."""
    protocol, is_vit = PROTOCOLS[name], isinstance(backbone, ViT)
    if name == "mocov3" and not is_vit:
        protocol = dataclasses.replace(protocol, lr=0.1)
    if name == "mae" and is_vit and backbone.dim >= 1024:  # ViT-L and ViT-H
        protocol = dataclasses.replace(protocol, epochs=50)
    if protocol.feature == "stages" and not hasattr(backbone, "stages"):
        fail(f"--protocol {name} reads the five stages of a ResNet, which this backbone is not")
    if {"cls": not has_class_token(backbone), "blocks": not hasattr(backbone, "last")}.get(protocol.feature):
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
def check_frozen(backbone, before):
    """Ends the program with code 1 if the backbone is not what it was, or no longer in eval mode."""
    if any(m.training for m in backbone.modules()) or fingerprint(backbone) != before:
        fail("the backbone has changed while its classifiers were trained: the results mean nothing", code=1)


class Source:
    """Features of images that are decoded and augmented anew in every epoch."""

    def __init__(self, backbone, train, test, micro, amp, dtype, seed=0, device="cpu", workers=4, max_bad=100):
        self.backbone, self.train, self.test_set, self.micro, self.amp = backbone, train, test, micro, amp
        self.settings = {"device": device, "workers": workers, "dtype": dtype}
        self.seed, self.max_bad, self.loader, self.steps = seed, max_bad, None, len(train) // micro

    def features(self, view, x, kinds):
        return {(view, kind): f for kind, f in features(self.backbone, x, kinds, self.amp).items()}

    def epoch(self, epoch, start, probes):
        """Yields ({(view, kind): features}, labels) of each micro-batch from number `start` on."""
        wanted = kinds_of_views(probes, 0)
        if self.loader is None or self.loader.specs != tuple(wanted):
            streams = [0] * len(wanted)  # so that a view does not depend on the others beside it
            settings = {"seed": self.seed, "streams": streams, "max_bad": self.max_bad, **self.settings}
            self.loader = Loader(self.train, wanted, self.micro, **settings)
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
            agree_on_undecodable(self.test_set, self.settings["device"])


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
            small = "take --protocol small (a smaller --batch-size alone leaves the rate and too few steps)"
            fail(f"--protocol {name} has batches of {protocol.batch} images, the training set has {images}: {small}")
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
        self.chance = math.log(classes)  # the loss of guessing
        self.results, self.loss = [], torch.zeros((), device=device)  # results: [epoch, [[top-1, top-5], ...]]
        self.seen = self.kept = None  # what `evaluate` saw, and that of the best epoch of each of its classifiers

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
                p.grad = process_mean(p.grad)
            for group in self.optimizer.param_groups:
                group["lr"] = self.peak * schedule(self.protocol, epoch * self.steps + step, self.steps)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def classifiers(self, backbone):
        """{name: (Classifier, view of the test)} as they are now."""
        found = {}
        for i, (label, part) in enumerate(zip(self.labels, self.head.parts, strict=True)):
            linear, more = part[-1], {}
            if self.protocol.norm:
                each = linear.in_features // len(part[0].running_mean)
                statistics = part[0].running_mean, (part[0].running_var + self.protocol.norm).sqrt()
                more = dict(zip(("mean", "std"), (x.repeat_interleave(each) for x in statistics), strict=True))
            model = Classifier(backbone, linear.weight, linear.bias, self.protocol.feature, i, **more)
            found[label] = model, self.views[1]
        return found

    def record(self, epoch, scores):
        """Adds the scores [[top-1, top-5], ...] of the test images after an epoch."""
        better = [all(top1 > s[i][0] for _, s in self.results) for i, (top1, _) in enumerate(scores)]
        if self.kept is None:
            self.kept = self.seen
        self.kept = torch.where(torch.tensor([False, *better])[:, None], self.seen, self.kept)
        self.results.append([epoch, scores])

    def state(self):
        """All there is to continue from; a collective, since gradients of an unfinished batch differ by process."""
        grads = [None if p.grad is None else process_mean(p.grad) for p in self.parameters]
        state = {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"grads": grads, "results": self.results, "kept": self.kept}

    def load_state(self, state):
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.results, self.kept = [list(row) for row in state["results"]], state["kept"]
        for p, grad in zip(self.parameters, state["grads"], strict=True):
            p.grad = None if grad is None else grad.to(p)


def largest(output):
    """The classes of the five largest outputs (B, classes), -1 for those that are not finite: (B, 5), or fewer."""
    score, best = output.topk(min(5, output.shape[1]), dim=1)
    return best.where(score.isfinite(), -1)  # a classifier that diverged gets nothing right


def hits(best, labels):
    """How many of these (B, 5) begin with the label, and how many have it: (2,)."""
    hit = best == labels[:, None]
    return torch.stack([hit[:, 0].sum(), hit.any(1).sum()])


@torch.no_grad()
def evaluate(source, probes):
    """{probe: [[top-1, top-5] of each of its classifiers]} in percent of the test images. `seen` of a probe becomes
    the labels and below them the predictions of each of its classifiers: (1 + classifiers, images)."""
    # a process may have no test image, so that every count needs its zero
    counts = {p: torch.zeros(len(p.labels), 2, dtype=torch.int64, device=p.loss.device) for p in probes}
    seen = {p: [counts[p].new_zeros(0, 1 + len(p.labels))] for p in probes}
    for p in probes:
        p.head.eval()
    for found, labels in source.test(probes):
        for p in [p for p in probes if (p.views[1], p.protocol.feature) in found]:
            best = [largest(output) for output in p.head(found[p.views[1], p.protocol.feature])]
            counts[p] += torch.stack([hits(b, labels) for b in best])
            seen[p].append(torch.stack([labels, *(b[:, 0] for b in best)], 1))
    for p in probes:
        p.head.train()
        p.seen = gather_uneven(torch.cat(seen[p])).T.int().cpu()
    counts = {p: (all_reduce(c).tolist(), p.seen.shape[1]) for p, c in counts.items()}
    return {p: [[100 * n / images for n in pair] for pair in pairs] for p, (pairs, images) in counts.items()}


# ------------------------------------------------------------------------------------------------- small sets
def held_out(labels, seed):
    """(N,) bool: a tenth of the samples, drawn evenly from the classes."""
    n, count = len(labels), max(1, len(labels) // 10)
    order = np.lexsort((rng.uniforms(seed, 0, np.arange(n), rng.SCRIPT, 1)[:, 0], labels))
    chosen = np.zeros(n, bool)
    chosen[order[(np.arange(count) * n + n // 2) // count]] = True
    return chosen


def standardize(x, others):
    """Features (N, D) with mean 0 and standard deviation 1, others changed in the same way, and what was subtracted and
    divided by (D,): infinite where all samples are the same, which become 0."""
    std, mean = torch.std_mean(x, 0, correction=0)
    std = torch.where(std > 1e-6 * (mean.abs() + std.max()), std, math.inf)
    return (x - mean) / std, (others - mean) / std, mean, std


def fit(x, labels, classes, rate, epochs, batch, seed=0):
    """A linear classifier of features (N, D), trained from zero at a rate per 256 samples."""
    head = nn.Linear(x.shape[1], classes, device=x.device, dtype=x.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer, batch, step = torch.optim.SGD(head.parameters(), rate, momentum=0.9), min(batch, len(x)), 0
    steps = len(x) // batch
    for epoch in bar(range(epochs), f"lr {rate:g}"):
        order = torch.from_numpy(rng.permutation(seed, epoch, len(x))).to(x.device)
        for rows in order[: steps * batch].split(batch):
            optimizer.param_groups[0]["lr"] = rate * batch / 256 * cosine(step, epochs * steps)
            F.cross_entropy(head(x[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    return head


def choose_rate(x, labels, classes, rates, epochs, batch, seed=0):
    """The rate whose classifier, trained on nine tenths of the samples, has the smallest loss on the others: of few
    samples, it depends less on chance than their accuracy. Returns it and {rate: {"top1", "loss"}} of the others."""
    held = torch.from_numpy(held_out(labels.cpu().numpy(), seed)).to(x.device)
    part, rest, *_ = standardize(x[~held], x[held])
    found = {}
    for rate in rates:
        head = fit(part, labels[~held], classes, rate, epochs, batch, seed)
        with torch.no_grad():
            output = head(rest)
            top1 = 100 * hits(largest(output), labels[held])[0].item() / len(rest)
            loss = F.cross_entropy(output, labels[held]).nan_to_num(1e9, 1e9).item()  # JSON has no others
        print0(f"{f'small lr {rate:g}':<22}top-1 {top1:.2f}, loss {loss:.4f} of the held-out images")
        found[rate] = {"top1": round(top1, 3), "loss": round(loss, 4)}
    return min(rates, key=lambda rate: found[rate]["loss"]), found


def evaluate_small(args, backbone, meta, data, test, classes, device, amp):
    """The protocol for small sets: what `results` gives, of its one classifier, {it: (labels, predictions)} of the test
    images and {it: (Classifier, view)}. Every process does all of it but the computation of features."""
    how = {"interpolation": usual_interpolation(backbone), "mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    view = EvalView(meta["image_size"], **how)
    found = []
    for dataset, which in ((data, "training"), (test, "test")):
        found += extract(backbone, dataset, view, device, args.workers, MICRO, amp, replace=False)
        if broken := broken_rows(found[-2], dataset, which, amp):
            fail(f"--pretrained {args.pretrained}: {broken}")
    (x, labels, queries, targets), rates = found, args.lr or RATES
    n = len(labels)
    batch = min(args.batch_size or MICRO, n)
    epochs = args.epochs or max(EPOCHS, -(-STEPS // (n // batch)))
    how = f"batch {batch}, {epochs} epochs x {n // batch} steps"
    print0(f"small       standardised features of unaugmented images ({view.interpolation}), {how}")
    rate, recipe = rates[0], {"protocol": "small"}
    if len(rates) > 1:
        if n < 10:
            fail(f"--protocol small holds out a tenth of the training images to choose the rate, {n} are too few")
        rate, chosen = choose_rate(x, labels, classes, rates, epochs, batch, args.seed)
        print0(f"{f'small lr {rate:g}':<22}is the best, and is trained on all {n:,} training images")
        if rate in (min(rates), max(rates)):
            print0(f"note: lr {rate:g} is at the end of those tried; --lr takes others")
        recipe["held_out"] = {f"{r:g}": row for r, row in chosen.items()}
    x, queries, mean, std = standardize(x, queries)
    head = fit(x, labels, classes, rate, epochs, batch, args.seed)
    with torch.no_grad():
        predicted = largest(head(queries))
        top1, top5 = (round(100 * hit / len(targets), 3) for hit in hits(predicted, targets).tolist())
    last = {"epoch": epochs, "top1": top1, "top5": top5}
    recipe |= {"lr": rate, "total_lr": rate * batch / 256, "batch": batch, "epochs": epochs}
    name = f"small lr {rate:g}"
    model = Classifier(backbone, head.weight, head.bias, mean=mean, std=std)
    return {name: recipe | {"last": last, "best": last}}, {name: (targets, predicted[:, 0])}, {name: (model, view)}


# -------------------------------------------------------------------------------------------------- arguments
def protocols(text):
    """A type of argparse: names with commas between them, or auto -> a list."""
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in (*PROTOCOLS, "small")]
    if unknown and text != "auto":
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown: auto, or some of {','.join(PROTOCOLS)},small")
    return names


def numbers(text):
    """A type of argparse: numbers with commas between them -> a list."""
    return list(dict.fromkeys(map(positive(float), text.split(","))))


def parse_args(argv=None):
    parser = Parser(__doc__)
    run = parser.add_pretrained()
    group = parser.add_argument_group("classifiers")
    text = f"auto (small below {SMALL:,} training images, else that of the method), or some of"
    group.add_argument("--protocol", type=protocols, default="auto", help=f"{text} {','.join(PROTOCOLS)},small")
    group.add_argument("--lr", type=numbers, help="one or several, per 256 images (default: the protocol's)")
    group.add_argument("--epochs", type=positive(int), help="default: the protocol's; drops and warm-up are scaled")
    group.add_argument("--drops", type=numbers, help="epochs that divide the rate by 10, where the protocol has such")
    group.add_argument("--batch-size", type=positive(int), help="over all processes (default: the protocol's)")
    group.add_argument("--val-every", type=positive(int), default=1, help="epochs between evaluations")
    parser.add_max_bad(run.add_argument)
    parser.add_loop(run, log_every=50, network=False)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------- training
def micro_batch(batches):
    """The largest number up to MICRO that divides all batches and that the processes can share."""
    common, w = math.gcd(*batches), world_size()
    fitting = [n for n in range(w, min(common, MICRO) + 1, w) if common % n == 0]
    if not fitting:
        fail(f"--batch-size {common} is not divisible by {w} processes: try {max(1, round(common / w)) * w}")
    return fitting[-1]


def make_probes(names, args, backbone, meta, classes, images, amp):
    """All combinations of protocols and learning rates, and the size of the micro-batches."""
    chosen = {n: adapt(n, backbone, args.epochs, args.batch_size, args.drops) for n in names}
    micro, size = micro_batch([p.batch for p in chosen.values()]), meta["image_size"]
    if micro == 1 and (name := next((n for n, p in chosen.items() if p.norm), None)):
        fail(f"--protocol {name} has a batch norm, which needs at least 2 images: choose an even --batch-size")
    blank = next(backbone.parameters()).new_zeros(1, meta["channels"], size, size)
    found = features(backbone, blank, {p.feature for p in chosen.values()}, amp)
    if not all(f.isfinite().all() for parts in found.values() for f in parts):
        cure = f"its weights are damaged{or_precise(amp)}"
        fail(f"--pretrained {args.pretrained}: features are not finite: {cure}")
    statistics = {"mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    probes = []
    for name, protocol in chosen.items():
        colour = {"jitter": (0.4, 0.4, 0.4, 0.0), "jitter_p": 1.0, "lighting": 0.1} if protocol.colour else {}
        test = EvalView(size, interpolation=protocol.test, **statistics)
        train = View(size, interpolation=protocol.train, **colour, **statistics)
        train = train if meta["channels"] == 3 else train.without_colours()
        shapes = [f.shape[1:] for f in found[protocol.feature]]
        for lr in args.lr or [protocol.lr]:
            more = {"seed": args.seed, "device": blank.device, "dtype": blank.dtype}
            probes.append(Probe(name, protocol, lr, (train, test), shapes, classes, images, micro, **more))
    return probes, micro


class State:
    """What a run needs to continue, in `<out>/linear_last.pt`. facts: what has to agree, by name."""

    def __init__(self, path, probes, facts):
        self.path, self.probes, self.facts = path, probes, facts

    def save(self, step, complete=False):
        states = {p.name: p.state() for p in self.probes}
        save_file(self.path, {"step": step, "complete": complete, "facts": self.facts, "probes": states})

    def load(self):
        """The step to go on with. A complete run with other facts counts as none, an incomplete one ends the program
        with the list of differences."""
        if not self.path.exists():
            return 0
        state = load_file(self.path, "--out")
        if not {"step", "complete", "facts", "probes"} <= state.keys():
            fail(f"{self.path} is not the state of a linear evaluation: choose another --out, or --no-resume")
        known = state["facts"]
        differences = [f"{k}: {known.get(k)} before, now {v}" for k, v in self.facts.items() if known.get(k) != v]
        if differences and state["complete"]:
            return 0
        if differences:
            remedy = "choose another --out, or --no-resume to overwrite it"
            fail(f"{self.path} is an unfinished run of something else ({'; '.join(differences)}): {remedy}")
        for probe in self.probes:
            probe.load_state(state["probes"][probe.name])
        print0(f"resuming    {self.path}, step {state['step']}")
        return state["step"]


def train(args, probes, source, state, check, device):
    """Trains and evaluates everything. check: called after the first epoch. Returns whether
    the run is complete, as it is unless --max-steps cuts it short. A step is one micro-batch of the loader."""
    stop, saved, warned, epochs = Stop(), time.monotonic(), set(), max(p.protocol.epochs for p in probes)
    step, total = state.load() if args.resume else 0, epochs * source.steps
    last = min(total, args.max_steps or total)

    def test(tested, now):
        """Of the probes, those without a result of epoch `now`."""
        tested = [p for p in tested if not p.results or p.results[-1][0] < round(now, 4)]
        if tested:
            for p, scores in evaluate(source, tested).items():
                p.record(round(now, 4), scores)
            line = (f"{p.name} {'/'.join(f'{top1:.2f}' for top1, _ in p.results[-1][1])}" for p in tested)
            print0(f"epoch {now:.4g}/{epochs}  top-1 {'  '.join(line)}")

    def warn(probe, loss, over):
        """Once per probe: of a loss that is not finite, or in the end not below twice that of guessing."""
        if probe.name not in warned and not (math.isfinite(loss) and (loss < 2 * probe.chance or not over)):
            warned.add(probe.name)
            text = f"the loss of {probe.name} is {loss:.4g}, that of chance {probe.chance:.4g}: lower --lr"
            text += ", or let --protocol small choose it"
            print0(f"warning: {text}", file=sys.stderr)

    while True:
        epoch, index = divmod(step, source.steps)
        if step and not index:
            done = [p for p in probes if epoch <= p.protocol.epochs]
            test([p for p in done if epoch % args.val_every == 0 or epoch == p.protocol.epochs], epoch)
            if epoch == 1:
                check()
        if step >= last:
            break
        active, end = [p for p in probes if epoch < p.protocol.epochs], min(step - index + source.steps, last)
        progress = bar(None, f"epoch {epoch + 1}/{epochs}", source.steps, initial=index)
        clock, logged = time.perf_counter(), step
        for found, labels in source.epoch(epoch, index, active):
            for p in active:
                p.learn(found, labels, epoch, index)
            step, index = step + 1, index + 1
            if index % args.log_every == 0 or step == end or (stop.flag and world_size() == 1):
                losses = {p: process_mean(p.loss).item() for p in active}
                speed = (step - logged) * source.micro / max(time.perf_counter() - clock, 1e-9)
                text = "  ".join([*(f"{p.name} {loss:.4f}" for p, loss in losses.items()), f"img/s {speed:.0f}"])
                progress.set_postfix_str(text, refresh=False)
                progress.update(index - progress.n)
                if progress.disable:
                    print0(f"epoch {epoch + 1}/{epochs}  batch {index}/{source.steps}  loss {text}")
                for p, loss in losses.items():
                    warn(p, loss, over=epoch + 1 == p.protocol.epochs and step == end)
                if step == end or stop.requested(device):
                    break
                if any_process(time.monotonic() - saved > 60 * args.save_every, device):
                    state.save(step)
                    saved = time.monotonic()
                clock, logged = time.perf_counter(), step
        progress.close()
        state.save(step)  # a run that is killed during the evaluation repeats only that
        if stop.requested(device):
            stop.end(step, state.path, args.resume)
    if step == total:
        state.save(step, complete=True)
    else:  # cut short: what was saved goes on from here, without this evaluation
        test([p for p in probes if step < p.protocol.epochs * source.steps], step / source.steps)
    return step == total


def results(probes):
    """{classifier: its recipe, last and best result}"""
    heads = {}
    for p in probes:
        recipe = {"protocol": p.name.split()[0], "lr": p.lr, "total_lr": p.peak}
        recipe |= {"batch": p.protocol.batch, "epochs": p.protocol.epochs}
        for i, label in enumerate(p.labels):
            rows = [{"epoch": e, "top1": round(s[i][0], 3), "top5": round(s[i][1], 3)} for e, s in p.results]
            heads[label] = recipe | {"last": rows[-1], "best": max(rows, key=lambda row: row["top1"])}
    return heads


def summary(heads):
    """Prints the table of all classifiers. Returns them and the best one."""
    print0(f"\n{'':<28}{'last: top-1':>12}{'top-5':>8}{'best: top-1':>14}{'top-5':>8}{'epoch':>7}")
    for label, row in heads.items():
        last, best = row["last"], row["best"]
        print0(
            f"{label:<28}{last['top1']:>12.2f}{last['top5']:>8.2f}"
            f"{best['top1']:>14.2f}{best['top5']:>8.2f}{best['epoch']:>7g}"
        )
    name = max(heads, key=lambda label: heads[label]["best"]["top1"])
    best = {"head": name, **heads[name]["best"]}
    print0(f"best        {name}: top-1 {best['top1']:.2f}, top-5 {best['top5']:.2f} at epoch {best['epoch']:g}\n")
    return {"heads": heads, "best": best}


def evaluate_protocols(names, before, same, args, backbone, meta, data, test, classes, device, amp):
    """The protocols of the table, in one pass: ({classifier: its recipe, last and best result}, {classifier: (labels,
    predictions) of its best epoch}, {classifier: (Classifier, view)}, is it complete?). before: the fingerprint of the
    backbone. same: its `identity`, and that of the data."""
    probes, micro = make_probes(names, args, backbone, meta, classes, len(data), amp)
    print0(f"batches     {world_size()} processes x {micro // world_size()} images, summed up to those below")
    for p in probes:
        recipe = f"{p.protocol.optimiser}, decay {p.protocol.weight_decay:g}, {p.protocol.feature}, {p.protocol.epochs}"
        print0(f"{p.name:<22}x {p.protocol.batch}/256 = {p.peak:.4g}, {recipe} epochs x {p.steps} steps")
    for p in probes:  # a step of LARS changes the weights by the rate x trust of their length; on ImageNet 45 in all
        steps = p.steps * p.protocol.epochs
        if p.protocol.optimiser.startswith("lars") and steps * p.peak * 0.001 < 2:
            print0(f"note: {p.name} hardly moves in {steps} steps; for small sets --protocol small")
    dtype = next(backbone.parameters()).dtype
    source = Source(backbone, data, test, micro, amp, dtype, args.seed, device, args.workers, args.max_bad)

    known = {k: getattr(args, k) for k in "lr epochs drops batch_size val_every seed".split()}
    known |= {"protocol": names, **{k: meta[k] for k in ("image_size", "mean", "std")}}
    known = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in known.items()}
    known = {f"--{k.replace('_', '-')}": v for k, v in known.items()}
    known |= {**same, "the number of training images": len(data), "the batch": micro}
    state = State(make_folder(result_folder(args.pretrained, args.out)) / "linear_last.pt", probes, known)
    complete = train(args, probes, source, state, lambda: check_frozen(backbone, before), device)
    agree_on_undecodable(data, device, source.loader.pool.bad if source.loader else ())
    seen = {c: (p.kept[0], row) for p in probes for c, row in zip(p.labels, p.kept[1:], strict=True)}
    return results(probes), seen, {k: v for p in probes for k, v in p.classifiers(backbone).items()}, complete


def main(args):
    device = start_device(args)
    backbone, meta = load_pretrained(args)
    amp, _, dtype = precision(args.precision, device)
    data, test = open_labelled(args.data, args.train_list, args.val_list, meta["channels"])
    same = identity(args, backbone, data, test)
    backbone = backbone.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    before, size, names, guess = fingerprint(backbone), meta["image_size"], args.protocol, ""

    classes = int(max(data.labels)) + 1
    print0(f"data        {args.data}: {len(data):,} training, {len(test):,} test images, {classes} classes, {size} px")
    if names == ["auto"]:
        own, guess = auto(meta["method"], backbone)
        if len(data) < SMALL:
            others = "--protocol takes others" if guess else f"that of the method: --protocol {own}"
            names, guess, why = ["small"], "", f"fewer than {SMALL:,} training images; {others}"
        else:
            names, why = [own], guess or f"that of {meta['method']}"
        print0(f"protocol    {names[0]}: {why}")

    idle = {"val_every", "max_steps"} & args.given if names == ["small"] else set()
    idle |= {"drops"} & args.given if not any(PROTOCOLS[name].drops for name in names if name != "small") else set()
    if idle:
        fail(f"--{min(idle).replace('_', '-')} does nothing with --protocol {','.join(names)}: leave it out")
    heads, seen, trained, complete, common = {}, {}, {}, True, (args, backbone, meta, data, test, classes, device, amp)
    if papers := [name for name in names if name != "small"]:
        heads, seen, trained, complete = evaluate_protocols(papers, before, same, *common)
    if "small" in names:
        heads, seen, trained = (a | b for a, b in zip((heads, seen, trained), evaluate_small(*common), strict=True))

    check_frozen(backbone, before)
    result = facts(args, meta, data, test, guess) | {"classes": classes, "seed": args.seed}
    result |= {"complete": complete} | summary(heads)
    best = result["best"]
    if best["head"] in seen:
        what = f"linear, {best['head']}, epoch {best['epoch']:g}, top-1 {best['top1']:.2f} %"
        result |= by_class(args, "linear", what, *(part.cpu() for part in seen[best["head"]]), test, data)
    name = max(trained, key=lambda name: heads[name]["last"]["top1"])
    names, last = class_names(data), heads[name]["last"]
    names = [names.get(c, f"class {c}") for c in range(classes)]
    what = f"{name}, epoch {last['epoch']:g}, top-1 {last['top1']:.2f} %"
    path = result_folder(args.pretrained, args.out) / "linear.pt"
    save_classifier(path, trained[name][0], meta, trained[name][1], names, what)
    result["classifier"] = {"file": path.name, "head": name, **last}
    return report(args, "linear", result)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
