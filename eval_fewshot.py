"""Few-shot classification of frozen features: episodes of some classes with few labelled images each.

In each episode --ways classes are drawn, and of each some images with a label (shots) and --queries others, which get
the class of the nearest prototype, the mean of the shots' features (Snell et al. 2017). ProtoTune (Medina et al. 2020,
section 3.2) starts a linear layer there, W = 2 c, b = -|c|^2, which gives the same classes, and trains it on the shots:
Adam, --tune-epochs passes in batches of as many images as there are classes; the network stays as it is.

    python eval_fewshot.py --pretrained runs/protoclr/backbone.pt --data /mini-imagenet
    python eval_fewshot.py --pretrained runs/protoclr/backbone.pt --data /omniglot --class-depth 2 --shots 1 5
    python eval_fewshot.py --pretrained random --arch conv4 --image-size 84 --data /mini-imagenet

Of each number of shots the mean accuracy over the episodes and its 95 % interval (1.96 standard errors), in percent.
Chance is 100 / ways. The images are those of --split (test images where there are any): their classes should not have
been used in training. --class-depth 2: classes lie two folders deep, as Omniglot's characters in their alphabets.
Episodes depend on --seed and on nothing else: all networks see the same ones. The last line printed is one JSON
object, also written to eval_fewshot.json beside the checkpoint, or in --out.
"""

import common.interrupt  # noqa: F401 (before torch)
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

from common.args import Parser, at_least, fail, positive, toggle
from common.augment import EvalView
from common.checkpoint import load_pretrained
from common.datasets import Files, Tar, open_split
from common.distributed import print0
from common.features import Features, broken_rows, extract, usual_interpolation
from common.log import bar, facts, report
from common.optim import precision
from common.run import start_device

CHUNK = 2**28  # bytes of the shots of the episodes that are tuned together


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_pretrained()
    group = parser.add_argument_group("episodes")
    group.add_argument("--split", choices=["train", "val"], help="default: val, or all images of an undivided folder")
    text = "folders of a path that name its class (default: the labels of the data set)"
    group.add_argument("--class-depth", type=positive(int), help=text)
    group.add_argument("--ways", type=at_least(2), default=5, help="classes in an episode")
    group.add_argument("--shots", type=positive(int), nargs="+", default=[1, 5, 20, 50], help="labelled images of each")
    group.add_argument("--queries", type=positive(int), default=15, help="images of each class to be told")
    group.add_argument("--episodes", type=at_least(2), default=600)
    group.add_argument("--tune", action=toggle, default=True, help="ProtoTune, too")
    group.add_argument("--tune-epochs", type=positive(int), default=15, help="passes over the shots")
    group.add_argument("--tune-lr", type=positive(float), default=1e-3)
    group.add_argument("--features", nargs=1, help="feat1 ... feat5, or cls or mean (default: the pooled output)")
    group.add_argument("--batch-size", type=positive(int), default=256, help="images per process and forward pass")
    args = parser.parse_args(argv)
    args.shots = list(dict.fromkeys(args.shots))
    return args


# ---------------------------------------------------------------------------------------------------- episodes
def class_labels(dataset, depth):
    """(labels (N,), number of classes) by the first `depth` folders below --data, or those of the data set. In an
    archive they are counted from the first folder that not all images share."""
    if depth is None:
        if dataset.labels is None:
            fail("the images have no labels: put them in class folders of a split, or say --class-depth N for folders")
        names = np.asarray(dataset.labels)
    else:
        if not isinstance(dataset, Files):
            fail(f"--class-depth {depth}: these images do not lie in folders")
        names, shared = dataset.names.strings(), ""
        if isinstance(dataset, Tar):  # what it was made of may stand in all names
            shared = os.path.commonpath(os.path.dirname(name) for name in (min(names), max(names)))
        paths = [name[len(shared) :].lstrip(os.sep).split(os.sep) for name in names]
        if short := next((path for path in paths if len(path) <= depth), None):
            fail(f"--class-depth {depth}: {os.path.join(*short)} lies in {len(short) - 1} folders only")
        names = np.array(["/".join(path[:depth]) for path in paths])
    classes, labels = np.unique(names, return_inverse=True)
    return labels, len(classes)


def draw_episodes(labels, ways, shots, queries, count, seed):
    """Numbers of images: shots (E, ways, shots) and queries (E, ways, queries) of each episode, without a repetition.

    labels: (N,); classes with fewer than shots + queries images are left out. Episode i is a function of (seed, i).
    """
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    members = [rows for rows in members if len(rows) >= shots + queries]
    if len(members) < ways:
        most = np.sort(np.bincount(labels))[::-1][:ways][-1] if len(np.unique(labels)) >= ways else 0
        remedy = f"--shots {most - queries} is possible" if most > queries else "lower --shots, --queries or --ways"
        fail(f"{len(members)} classes have {shots} + {queries} images or more, --ways {ways} are needed: {remedy}")
    found = []
    for episode in range(count):
        generator = np.random.Generator(np.random.Philox(key=[seed, episode]))
        chosen = generator.permutation(len(members))[:ways]
        found.append([generator.permutation(members[c])[: shots + queries] for c in chosen])
    found = torch.from_numpy(np.array(found))
    return found[:, :, :shots], found[:, :, shots:]


def accuracy(logits):
    """(E, ways, queries, ways) -> share of right classes per episode (E,)."""
    own = torch.arange(logits.shape[1], device=logits.device)[:, None]
    return (logits.argmax(3) == own).double().mean((1, 2))


def prototypes(x, shots):
    """Weight (E, ways, D) and bias (E, ways) of the linear layer that gives minus the squared distance to the mean of
    the shots, up to what all classes share. x: features (N, D), shots: (E, ways, S)."""
    centre = x[shots].mean(2)
    return 2 * centre, -centre.square().sum(2)


def logits_of(x, rows, weight, bias):
    """Of images (E, ways, n): (E, ways, n, ways)."""
    return torch.einsum("ewnd,ecd->ewnc", x[rows], weight) + bias[:, None, None]


def prototune(x, shots, first, seed, epochs=15, lr=1e-3):
    """The linear layers of `prototypes` after training on the shots, each episode for itself. first: number of the
    first episode, which with the seed decides the order of its images."""
    weight, bias = (p.clone().requires_grad_() for p in prototypes(x, shots))
    (count, ways, each), optimizer = shots.shape, torch.optim.Adam([weight, bias], lr=lr)
    images, labels = x[shots].flatten(1, 2), torch.arange(ways, device=x.device).repeat_interleave(each)
    generators = [np.random.Generator(np.random.Philox(key=[seed + 1, first + e])) for e in range(count)]
    for _ in range(epochs):
        order = np.stack([generator.permutation(ways * each) for generator in generators])
        for rows in torch.from_numpy(order).to(x.device).split(ways, 1):
            batch = images.gather(1, rows[:, :, None].expand(-1, -1, images.shape[2]))
            logits = batch @ weight.transpose(1, 2) + bias[:, None]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="sum") / rows.shape[1]
            optimizer.zero_grad()  # the mean over the images of an episode, the sum over episodes
            loss.backward()
            optimizer.step()
    return weight.detach(), bias.detach()


def interval(values):
    """{"mean", "interval"} in percent: the mean of (E,) and 1.96 standard errors."""
    error = 1.96 * values.std() / len(values) ** 0.5
    return {"mean": round(100 * values.mean().item(), 3), "interval": round(100 * error.item(), 3)}


def main(args):
    device = start_device(args)
    backbone, meta = load_pretrained(args)
    amp, _, dtype = precision(args.precision, device)
    model = Features(backbone, args.features).to(device, dtype, memory_format=torch.channels_last)
    how = {"mean": tuple(meta["mean"]), "std": tuple(meta["std"])}
    view = EvalView(meta["image_size"], interpolation=usual_interpolation(backbone), **how)
    data = open_split(args, meta["channels"])
    labels, classes = class_labels(data, args.class_depth)
    print0(f"data        {args.data}: {len(data):,} images, {classes:,} classes")
    for shots in args.shots:
        draw_episodes(labels, args.ways, shots, args.queries, 1, args.seed)  # refused before the features are computed
    x, _ = extract(model, data, view, device, args.workers, args.batch_size, amp, replace=False)
    if broken := broken_rows(x, data, "test", amp):
        fail(f"--pretrained {args.pretrained}: {broken}")
    labels = labels[[i for i in range(len(data)) if i not in data.undecodable]]

    result = facts(args, meta, [], data) | {"ways": args.ways, "queries": args.queries, "episodes": args.episodes}
    result |= {"classes": classes, "shots": {}}
    for shots in args.shots:
        drawn = draw_episodes(labels, args.ways, shots, args.queries, args.episodes, args.seed)
        size = max(1, CHUNK // (args.ways * shots * x.shape[1] * x.element_size()))
        plain, tuned = [], []
        for first in bar(range(0, args.episodes, size), f"{shots} shots", delay=2):
            few, ask = (part[first : first + size].to(device) for part in drawn)
            plain.append(accuracy(logits_of(x, ask, *prototypes(x, few))))
            if args.tune:
                layers = prototune(x, few, first, args.seed, args.tune_epochs, args.tune_lr)
                tuned.append(accuracy(logits_of(x, ask, *layers)))
        row = {"prototypes": interval(torch.cat(plain))} | ({"prototune": interval(torch.cat(tuned))} if tuned else {})
        result["shots"][str(shots)] = row
        text = "   ".join(f"{name} {v['mean']:6.2f} +- {v['interval']:.2f}" for name, v in row.items())
        print0(f"{args.ways} ways, {shots} shots{'' if shots > 9 else ' '}  {text}")
    return report(args, "fewshot", result)


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
