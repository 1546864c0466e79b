"""Linear SVMs on frozen features, full and low-shot, on Pascal VOC07 classification (Goyal et al. 2019).

One LinearSVC per class on the five stages of the network, averaged to about 9,000 numbers each at ResNet-50's widths
(class token and mean of the patch tokens for a ViT, what they return for a Swin or an XCiT), rows divided by their
length + 1e-5. Nothing else is trained.

    python eval_svm.py --pretrained runs/simsiam/backbone.pt --data /VOCdevkit/VOC2007
    torchrun --nproc_per_node=8 eval_svm.py --pretrained runs/simsiam/backbone.pt --data /VOCdevkit
    python eval_svm.py --pretrained random --data /VOCdevkit --features feat2 --no-low-shot

Full: the cost of each class is that of the best average precision of a 3-fold cross-validation on trainval (stratified,
not shuffled). An SVM with this cost is trained on all of trainval and scored on test by the area under the monotone
envelope of precision at all recalls, which is neither VOC's 11-point figure nor scikit-learn's. mAP is the mean over
classes. Reported are all levels, the best one on the test set (as published) and the one that cross-validation prefers.

Low-shot: k positives and (classes - 1) k negatives per class, for VOC 19 k, five draws, on the level that
cross-validation prefers (on all of --features with --no-full). Two figures for each k: with the cost of best mean test
mAP over the draws, which is the published way and looks at the test set; and with the cost of best mean AP on the
trainval images that were not drawn, which does not. A k is left out if a class has fewer positives; where there are
fewer negatives, all are used.

Images: shorter side to 256, then both sides to 224 pixels whatever the aspect, or sizes in this ratio, bilinear.

Published (MMSelfSup 0.x, ResNet-50), mAP and low-shot at k 1, 4, 16, 96: MoCo v2 84.04 | 43.14 65.34 75.42 82.23;
BYOL 86.31 | 45.37 68.47 78.30 84.73; SwAV 87.00 | 44.68 67.64 78.14 85.15.

Images whose objects of a class are all difficult count as negatives in full training, are never drawn in low-shot, and
are left out of that class's test. Labels come from ImageSets/Main/<class>_{trainval,test}.txt, or, for other sets in
VOC's layout, from {trainval,test}.txt and Annotations/*.xml.

Deviations: draws and solver are seeded; a fold without a positive is left out of the mean instead of making it NaN;
images of equal score are counted together; maps of other networks or sizes than ResNet-50 at 224 pixels get adaptive
pooling to the side floor(sqrt(9216 / channels)), at most that of the map. Every fit is scikit-learn's LinearSVC, which
may be given the rows in other coordinates (`Triangle`): the decision values are the same.
"""

import common.interrupt  # noqa: F401 (before torch)
import dataclasses
import os
import sys
import time
import warnings

import numpy as np
import torch
from scipy import linalg
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed
from torch import nn
from tqdm import tqdm

from common import rng
from common.args import Parser, at_least, fail, positive, toggle
from common.augment import WholeView
from common.checkpoint import load_pretrained
from common.crop import crop_resize
from common.distributed import all_reduce, is_main, print0, rank, world_size
from common.features import broken_rows, extract, pool_stage
from common.log import facts, report
from common.optim import precision
from common.run import start_device
from common.vit import ViT
from common.voc import find_set, open_images, read_labels

COSTS = [1.0, 10.0, 100.0, *(0.5**i for i in range(4, 20))]
FOLDS, MAX_ITER = 3, 2000


# ----------------------------------------------------------------------------------------------------- arguments
def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_pretrained(lists=False)
    parser.set_defaults(precision="fp32")
    group = parser.add_argument_group("SVMs")
    group.add_argument("--features", nargs="+", help="levels: feat1 ... feat5; cls, mean of a ViT (default: all)")
    group.add_argument("--full", action=toggle, default=True, help="SVMs on all of trainval")
    group.add_argument("--low-shot", action=toggle, default=True, help="SVMs on k positives per class")
    ks = [1, 2, 4, 8, 16, 32, 64, 96]
    group.add_argument("--k", type=positive(int), nargs="+", default=ks, help="positives per class")
    group.add_argument("--draws", type=positive(int), default=5, help="low-shot samples per k")
    group.add_argument("--costs", type=positive(float), nargs="+", default=COSTS, help="SVM costs to choose from")
    group.add_argument("--jobs", type=at_least(0), default=0, help="solvers per process (0: the cores, shared out)")
    group.add_argument("--batch-size", type=positive(int), default=64, help="images per process and forward pass")
    args = parser.parse_args(argv)
    if not (args.full or args.low_shot):
        parser.error("--no-full and --no-low-shot leave nothing to do")
    return args


# ------------------------------------------------------------------------------------------------------ features
@dataclasses.dataclass(frozen=True)
class Squeezed(WholeView):
    """Shorter side to size * 256 / 224, then both sides to `size`, whatever the aspect."""

    batched = False

    def crop(self, image, u=None):
        height, width = image.shape[1:]
        sides = [round(self.size * 256 / 224) * side // min(height, width) for side in (height, width)]
        return super().crop(crop_resize(image, (0, 0, height, width), sides, self.interpolation), u)


class Levels(nn.Module):
    """A backbone that returns the levels `names` (None: all) side by side: (B, C, S, S) -> (B, sum of dims)."""

    def __init__(self, backbone, size, names=None, channels=3):
        super().__init__()
        self.backbone = backbone.eval()
        if not (hasattr(backbone, "stages") or hasattr(backbone, "patch_size")):
            read = "the stages of a ResNet or the tokens of a transformer are read here"
            fail(f"--pretrained: {read}, {backbone.arch} gives pooled features: try eval_knn.py or eval_linear.py")
        with torch.no_grad():
            levels = self.levels(torch.zeros(1, channels, size, size))
        odd = [name for name in names or [] if name not in levels]
        if odd:
            fail(f"--features {odd[0]}: this network has {', '.join(levels)}")
        self.names = [name for name in levels if not names or name in names]
        self.dims = [levels[name].shape[1] for name in self.names]
        self.dim = sum(self.dims)

    def levels(self, x):
        if hasattr(self.backbone, "stages"):
            return {f"feat{i}": pool_stage(x).flatten(1) for i, x in enumerate(self.backbone.stages(x), 1)}
        if not isinstance(self.backbone, ViT):
            return {self.backbone.pool: self.backbone(x)}
        tokens = self.backbone.tokens(x)
        mean = {"mean": self.backbone.fc_norm(tokens[:, self.backbone.prefix :].mean(1))}
        return {"cls": tokens[:, 0], **mean} if self.backbone.pool == "cls" else mean  # else it was never trained

    def forward(self, x):
        levels = self.levels(x)
        return torch.cat([levels[name] for name in self.names], 1)


def normalize(features):
    """(N, D) -> float64 rows x / (|x| + 1e-5)."""
    if features.device.type == "mps":  # has no float64
        features = features.cpu()
    features = features.double()
    return features / (features.norm(dim=1, keepdim=True) + 1e-5)


# ---------------------------------------------------------------------------------------------------------- SVMs
class Triangle:
    """Rows (n, r) with the inner products `gram` (n, n): its Cholesky factor, pivoted, so that it may be singular.

    Rotating all rows changes neither the objective of a linear SVM (the bias is a coordinate of its own) nor any step
    of coordinate descent, which sees weights and rows in inner products only. In these coordinates a row has at most n
    numbers instead of thousands, on average half of them zeros, which liblinear skips.
    """

    def __init__(self, gram):
        lower, pivot, rank, _ = linalg.lapack.dpstrf(gram, lower=1)
        self.lower, self.pivot = np.tril(lower[:, :rank]), pivot - 1
        self.rows = np.empty(self.lower.shape)
        self.rows[self.pivot] = self.lower

    def dual(self, weights):
        """(c, r) weights -> (n, c) coefficients a: the weights are the sum of a_i times row i."""
        rank = weights.shape[1]
        dual = np.zeros((len(self.lower), len(weights)))
        dual[self.pivot[:rank]] = linalg.solve_triangular(self.lower[:rank], weights.T, lower=True, trans="T")
        return dual


def decisions(x, gram, rows, positive, costs, at, seed, triangle=None):
    """Decision values (costs, len(at)) at images `at` of SVMs trained on images `rows`, and how many did not converge.

    positive (len(rows),) bool. x (N + M, D): trainval and test; or, where trainval has fewer rows than columns, None
    and gram = x @ x[:N].T (N + M, N). triangle: that of gram[rows][:, rows], if it is known.
    """
    if gram is None:
        train = x[rows]
    else:
        triangle = triangle or Triangle(gram[np.ix_(rows, rows)])
        train = triangle.rows
    svm = LinearSVC(class_weight={1: 2, -1: 1}, tol=1e-4, dual=True, max_iter=MAX_ITER, random_state=seed)
    weights, bias, capped = [], [], 0
    for cost in costs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
            svm.set_params(C=cost).fit(train, np.where(positive, 1, -1))
        weights.append(svm.coef_[0])
        bias.append(svm.intercept_[0])
        capped += svm.n_iter_ >= MAX_ITER
    weights, bias = np.stack(weights), np.array(bias)[:, None]
    if gram is None:
        return weights @ x[at].T + bias, capped
    return (gram[np.ix_(at, rows)] @ triangle.dual(weights)).T + bias, capped


def average_precision(scores, positive):
    """Area under the monotone envelope of precision over recall, at all recalls. NaN without a positive."""
    if not positive.any():
        return np.nan
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores pass a threshold together
    hits = np.cumsum(positive[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.diff(hits, prepend=0) @ envelope / positive.sum())


def cross_validate(x, gram, positive, fold, costs, seed):
    """scikit-learn's average precision of each cost on one of the folds, and the number of fits at the limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer positives than folds
        rows, at = list(StratifiedKFold(FOLDS).split(positive, positive))[fold]
    if not positive[at].any() or len(set(positive[rows])) < 2:
        return [np.nan] * len(costs) + [0]
    scores, capped = decisions(x, gram, rows, positive[rows], costs, at, seed)
    return [*(average_precision_score(positive[at], s) for s in scores), capped]


def test(x, gram, triangle, positive, cost, at, truth, seed):
    """AP on the images `at` of the SVM trained on all of trainval."""
    scores, capped = decisions(x, gram, np.arange(len(positive)), positive, [cost], at, seed, triangle)
    return [average_precision(scores[0], truth), capped]


def low_shot(x, gram, rows, positive, costs, parts, seed):
    """AP of each cost on each of `parts`, which are pairs (images, truth), and the number of fits at the limit."""
    scores, capped = decisions(x, gram, rows, positive, costs, np.concatenate([at for at, _ in parts]), seed)
    scores = np.split(scores, np.cumsum([len(at) for at, _ in parts])[:-1], axis=1)
    pairs = zip(scores, parts, strict=True)
    return [*(average_precision(s, truth) for values, (_, truth) in pairs for s in values), capped]


def draw(labels, k, number, which, seed, ratio=19):
    """Low-shot sample `number` of class `which`, labels (N,): the sorted rows of k positives and `ratio` k negatives.
    ratio: the other classes, of which VOC has 19."""
    u = rng.uniforms(seed, k, np.arange(len(labels)), rng.SHOTS + which, number + 1)[:, number]
    order = np.argsort(u)
    chosen = [order[labels[order] == value][:most] for value, most in ((1, k), (-1, ratio * k))]
    return np.sort(np.concatenate(chosen))


def solve(function, jobs, width, workers, what):
    """(len(jobs), width): the rows function(*job), on every process, whichever process did which.

    In processes, not threads: liblinear releases the interpreter lock but keeps one random generator for all threads,
    so that the order of their draws, and with it the last digits, would depend on timing. Large arrays are mapped into
    the workers' memory, not copied.
    """
    mine = range(rank(), len(jobs), world_size())
    table = torch.zeros(len(jobs), width, dtype=torch.float64)
    rows = Parallel(n_jobs=workers, return_as="generator")(delayed(function)(*jobs[i]) for i in mine)
    bar = tqdm(rows, what, len(mine), leave=False, disable=not (is_main() and sys.stderr.isatty()))
    for i, row in zip(mine, bar, strict=True):
        table[i] = torch.tensor(row)
    if world_size() > 1 and torch.distributed.get_backend() == "nccl":
        table = table.cuda()
    return all_reduce(table).cpu().numpy()


# ---------------------------------------------------------------------------------------------------- evaluation
def evaluate_full(name, x, gram, train, test_labels, args, workers):
    """train (N, classes), test_labels (M, classes). Returns {"map", "cv_map", "ap", "cost"}; lists over classes."""
    (n, classes), positive = train.shape, train == 1
    jobs = [(x, gram, positive[:, c], fold, args.costs, args.seed) for c in range(classes) for fold in range(FOLDS)]
    table = solve(cross_validate, jobs, len(args.costs) + 1, workers, f"{name} cross-validation")
    folds = table[:, :-1].reshape(classes, FOLDS, -1)
    valid = ~np.isnan(folds)
    cv = np.where(valid, folds, 0).sum(1) / np.maximum(1, valid.sum(1))
    costs = [args.costs[i] for i in cv.argmax(1)]

    triangle = None if gram is None else Triangle(gram[:n])
    jobs = []
    for c in range(classes):
        at = np.flatnonzero(test_labels[:, c])
        truth = test_labels[at, c] == 1
        jobs.append((x, gram, triangle, positive[:, c], costs[c], n + at, truth, args.seed))
    tested = solve(test, jobs, 2, workers, f"{name} test")
    warn_capped(name, table[:, -1].sum() + tested[:, -1].sum(), valid.sum() + classes)
    return {
        "map": round(100 * tested[:, 0].mean(), 3),
        "cv_map": round(100 * cv.max(1).mean(), 3),
        "ap": (100 * tested[:, 0]).round(3).tolist(),
        "cost": costs,
    }


def evaluate_low_shot(name, x, gram, train, test_labels, ks, args, workers):
    """{k: {"test": figures with the cost chosen on the test set, "trainval": on the images not drawn, or None}}."""
    (n, classes), costs = train.shape, len(args.costs)
    ratio = max(1, classes - 1)
    cases = [(k, number, c) for k in sorted(ks, reverse=True) for number in range(args.draws) for c in range(classes)]
    jobs = []
    for k, number, c in cases:  # the longest first, so that all solvers end together
        rows = draw(train[:, c], k, number, c, args.seed, ratio)
        at, rest = np.flatnonzero(test_labels[:, c]), np.setdiff1d(np.flatnonzero(train[:, c]), rows)
        parts = [(n + at, test_labels[at, c] == 1), (rest, train[rest, c] == 1)]
        jobs.append((x, gram, rows, train[rows, c] == 1, args.costs, parts, args.seed))
    table = solve(low_shot, jobs, 2 * costs + 1, workers, f"{name} low-shot")
    warn_capped(name, table[:, -1].sum(), len(jobs) * costs)
    table = table[:, :-1].reshape(-1, args.draws, classes, 2, costs)
    found = {}
    for k, values in zip(sorted(ks, reverse=True), 100 * table, strict=True):
        on_test, on_rest = values[:, :, 0], values[:, :, 1]
        on_rest = on_rest[:, ~np.isnan(on_rest).any((0, 2))]  # classes with a positive left to judge by
        found[k] = {"test": figures(on_test.mean(1), on_test.mean((0, 1)), args.costs), "trainval": None}
        if on_rest.shape[1]:
            found[k]["trainval"] = figures(on_test.mean(1), on_rest.mean((0, 1)), args.costs)
    return dict(sorted(found.items()))


def figures(maps, criterion, costs):
    """mAP over the draws at the cost that is best by `criterion` (costs,). maps (draws, costs)."""
    best = int(criterion.argmax())
    maps = maps[:, best]
    return {
        "cost": costs[best],
        "mean": round(maps.mean(), 3),
        "min": round(maps.min(), 3),
        "max": round(maps.max(), 3),
        "std": round(maps.std(), 3),  # of the draws, as a population
        "maps": maps.round(3).tolist(),
    }


def usable(classes, train, tested):
    """The same without the classes that cannot be trained or scored; a line names each."""
    kept = []
    for c, name in enumerate(classes):
        needs = {"positive trainval": train[:, c] == 1, "negative trainval": train[:, c] == -1}
        needs["positive test"] = tested[:, c] == 1
        lacks = [what for what, there in needs.items() if not there.any()]
        kept += [] if lacks else [c]
        if lacks:
            print0(f"left out    class {name}: it has no {' and no '.join(lacks)} image")
    return [classes[c] for c in kept], train[:, kept], tested[:, kept]


def shots(classes, train, ks):
    """Those of `ks` for which every class has enough positives. Lines tell what is short."""
    positives, negatives = (train == 1).sum(0), (train == -1).sum(0)
    kept, fewest = [k for k in ks if k <= positives.min()], positives.argmin()
    ratio = max(1, len(classes) - 1)
    if len(kept) < len(ks):
        left = ", ".join(map(str, ks[len(kept) :]))
        print0(f"left out    k {left}: class {classes[fewest]} has {positives[fewest]} positive trainval images")
    for name, number in zip(classes, negatives, strict=True):
        if kept and number < ratio * kept[-1]:
            print0(f"low-shot    class {name} has {number} negatives: all are used where {ratio} k is more")
    return kept


def show(found):
    """Prints the low-shot table."""
    print0(f"{'':6}{'cost chosen on test, as published':^48}   {'chosen on trainval images not drawn':^48}")
    print0(f"{'k':<6}" + "   ".join([f"{'mean':>8}{'min':>8}{'max':>8}{'std':>8}{'cost':>16}"] * 2))
    for k, row in found.items():
        halves = []
        for part in row.values():
            if part is None:
                halves.append("no class has a positive left")
            else:
                numbers = "".join(f"{part[key]:8.2f}" for key in ("mean", "min", "max", "std"))
                halves.append(f"{numbers}{part['cost']:>16.7g}")
        print0(f"{k:<6}" + "   ".join(halves))


def warn_capped(name, capped, fits):
    if capped:
        limit = f"stopped at {MAX_ITER:,} iterations, the published limit"
        print0(f"{name:<11} {capped:,.0f} of {fits:,} fits {limit}")


def main(args):
    device = start_device(args)
    root = find_set(args.data)
    classes, splits = read_labels(root)
    (train_ids, train), (test_ids, tested) = splits["trainval"], splits["test"]
    if both := sorted(set(train_ids) & set(test_ids)):
        fail(f"--data {args.data}: {len(both)} images are in trainval and in test, {both[0]} for one")
    classes, train, tested = usable(classes, train, tested)
    if not classes or len(train) < 2 * FOLDS:
        fail(f"--data {args.data}: {len(train)} trainval images and {len(classes)} usable classes are too few")
    ks = shots(classes, train, sorted(set(args.k))) if args.low_shot else []
    if not (ks or args.full):
        fail(f"--k {' '.join(map(str, args.k))}: too many for this set, ask for fewer positives")

    backbone, meta = load_pretrained(args)
    size = meta["image_size"]
    model = Levels(backbone, size, args.features, meta["channels"])
    amp, _, dtype = precision(args.precision, device)
    model = model.to(device, dtype, memory_format=torch.channels_last)
    view = Squeezed(size, mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    data = f"{len(train):,} trainval, {len(tested):,} test images, {len(classes)} classes, {size} px"
    chance = 100 * ((tested == 1).sum(0) / (tested != 0).sum(0)).mean()
    print0(f"data        {args.data}: {data}, mAP of chance {chance:.2f}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.jobs or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    clock = time.perf_counter()
    parts, sets = [], [open_images(root, ids, meta["channels"]) for ids in (train_ids, test_ids)]
    for dataset, which in zip(sets, ("trainval", "test"), strict=True):
        parts.append(extract(model, dataset, view, device, args.workers, args.batch_size, amp, replace=False)[0])
        if broken := broken_rows(parts[-1], dataset, which, amp):
            fail(f"--pretrained {args.pretrained}: {broken}")
    if any(dataset.undecodable for dataset in sets):
        train, tested = (np.delete(t, sorted(d.undecodable), 0) for t, d in zip((train, tested), sets, strict=True))
        classes, train, tested = usable(classes, train, tested)
        ks = shots(classes, train, ks) if ks else []
    levels = dict(zip(model.names, torch.cat(parts).split(model.dims, 1), strict=True))
    print0(f"features    {', '.join(f'{k} {v.shape[1]:,}' for k, v in levels.items())} ({_since(clock)})")

    def prepare(name):
        """(x, gram) as `decisions` takes them."""
        x = normalize(levels[name])
        if len(train) < x.shape[1]:
            return None, (x @ x[: len(train)].T).cpu().numpy()
        return x.cpu().numpy(), None

    result = facts(args, meta, *sets) | {"chance": round(chance, 3), "seed": args.seed, "costs": args.costs}
    chosen = list(levels)
    if args.full:
        rows = {}
        for name in levels:
            clock = time.perf_counter()
            row = rows[name] = evaluate_full(name, *prepare(name), train, tested, args, workers)
            figure = f"mAP {row['map']:6.2f}   cross-validated {row['cv_map']:6.2f}"
            print0(f"{name:<11} {levels[name].shape[1]:>6,} numbers   {figure}   ({_since(clock)})")
            row["ap"], row["cost"] = (dict(zip(classes, row[key], strict=True)) for key in ("ap", "cost"))
        best, preferred = (max(rows, key=lambda n: rows[n][key]) for key in ("map", "cv_map"))
        text = f"best {best} {rows[best]['map']:.2f}; by cross-validation {preferred} {rows[preferred]['map']:.2f}"
        print0(f"{'level':<11} {text}")
        result |= {"svm": rows, "best": best, "map": rows[best]["map"]}
        result |= {"preferred": preferred, "preferred_map": rows[preferred]["map"]}
        chosen = [preferred]
    if ks:
        result["low_shot"] = {}
        for name in chosen:
            clock = time.perf_counter()
            found = evaluate_low_shot(name, *prepare(name), train, tested, ks, args, workers)
            result["low_shot"][name] = {str(k): row for k, row in found.items()}
            print0(f"low-shot    {name}, {args.draws} draws ({_since(clock)})")
            show(found)
    return report(args, "svm", result)


def _since(clock):
    return f"{time.perf_counter() - clock:.0f} s"


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
